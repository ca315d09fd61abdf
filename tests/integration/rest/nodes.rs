//! The whole fleet in one answer.

use std::collections::BTreeSet;
use std::sync::Arc;

use opamp_server::close::CloseReason;
use opamp_server::store::{Store, Write};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{assert_problem, fields, set};
use crate::harness::agent::{Agent, HEALTH, Poller, STATUS, Socket};
use crate::harness::server::{TestServer, moment};
use crate::harness::{Database, Kind};
use crate::store::scene::{Node, at, delete, uid};

const PATH: &str = "/api/agent/nodes";

/// More agents than the server reads at once.
const MANY: u32 = 2_345;

/// Puts many agents on record, by a node that has ended since.
async fn seed(database: &Database) {
    let store: Arc<dyn Store> = database.open().await;
    let node = Node::start(&store, "seed", at(0)).await;
    let numbers: Vec<u32> = (0..MANY).collect();
    for part in numbers.chunks(1_000) {
        let arrivals: Vec<Write> =
            part.iter().map(|number| Write::CreateConnection(node.arrival(uid(*number), at(10)))).collect();
        let written = store.write(&arrivals).await.expect("they open");
        let end = |(number, written): (&u32, _)| {
            let opened = crate::store::scene::opened(written);
            Write::UpdateConnection(node.end_of(&opened, uid(*number), CloseReason::ClosedByAgent, at(20)))
        };
        let ends: Vec<Write> = part.iter().zip(written).map(end).collect();
        store.write(&ends).await.expect("they end");
    }
    delete(&store, uid(5), at(30), false).await;
    store.end_node(node.id, at(30)).await.expect("the store answers");
    store.close().await;
}

/// Everybody but the retired is in it, once, with the fields services rely on.
pub(super) async fn all_agents_come_in_one_array(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    assert_eq!(server.read(PATH).await, json!([]));
    server.stop().await.expect("it stops");
    seed(database).await;
    let server = TestServer::on(database, |_| {}).await;
    let mut agent = Agent::with(STATUS | HEALTH);
    let (socket, _) = Socket::greet(&server, &agent.full()).await;
    let mut polling = Agent::new();
    Poller::once(&server, &polling.full()).await;
    let answer = server.ask("GET", PATH, &[]).await;
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.header("transfer-encoding"), Some("chunked"), "it is streamed");
    let nodes = answer.json();
    let nodes = nodes.as_array().expect("a bare array");
    let ids: Vec<&str> = nodes.iter().map(|node| node["id"].as_str().expect("a uid")).collect();
    assert!(ids.windows(2).all(|pair| pair[0] < pair[1]), "by id, nobody twice");
    let mut expected: BTreeSet<String> =
        (0..MANY).filter(|number| *number != 5).map(|number| uid(number).to_string()).collect();
    expected.extend([agent.uid.to_string(), polling.uid.to_string()]);
    assert_eq!(ids.iter().map(ToString::to_string).collect::<BTreeSet<_>>(), expected);
    let find = |id: String| nodes.iter().find(|node| node["id"] == id.as_str()).expect("it is there");
    let node = find(agent.uid.to_string());
    let names = set([
        "id",
        "name",
        "groups",
        "healthy",
        "status",
        "last_heartbeat",
        "clients_count",
        "sync_revision",
        "address",
    ]);
    assert_eq!(fields(node), names);
    moment(&node["last_heartbeat"]);
    assert_eq!(
        (&node["name"], &node["healthy"], &node["status"]),
        (&json!("collector"), &json!(true), &json!("online"))
    );
    assert_eq!(
        (&node["groups"], &node["clients_count"], &node["sync_revision"]),
        (&json!([]), &json!(0), &Value::Null)
    );
    assert!(node["address"].as_str().is_some_and(|address| address.starts_with("127.0.0.1:")), "{node}");
    assert!(find(polling.uid.to_string())["address"].is_string());
    assert!(find(uid(7).to_string())["address"].is_null(), "who is not connected has none");
    let answer = server.ask("GET", &format!("{PATH}?limit=5"), &[]).await;
    assert_eq!(assert_problem(&answer, 400, "bad-parameter")["parameter"], "limit");
    drop(socket);
    server.stop().await.expect("it stops");
}

/// An array that cannot be read to its end is never closed, and the body does not end in an orderly way.
pub(super) async fn a_failure_in_the_middle_breaks_the_array_off(database: &Database) {
    seed(database).await;
    let server = TestServer::on(database, |_| {}).await;
    let raw = database.raw().await;
    let unreadable = raw.literal(uid(1_500));
    match database.kind() {
        Kind::Sqlite => {
            raw.execute(format!("UPDATE agents SET groups = 'unreadable' WHERE id = {unreadable}")).await;
        }
        Kind::Postgres => {
            // Every value of a column can be read there, but none at all cannot.
            raw.execute(format!(
                "ALTER TABLE agents ALTER created_at DROP NOT NULL;
                 UPDATE agents SET created_at = NULL WHERE id = {unreadable}"
            ))
            .await;
        }
    }
    let mut stream = TcpStream::connect(server.operators).await.expect("the port is open");
    let request = format!("GET {PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("the request is written");
    let mut answer = Vec::new();
    let reading = stream.read_to_end(&mut answer);
    let _reset_or_end = tokio::time::timeout(crate::harness::server::SOON, reading).await.expect("it ends");
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer:.200}");
    assert!(answer.contains(&uid(999).to_string()), "the first page was sent");
    assert!(!answer.contains(&uid(1_500).to_string()));
    assert!(!answer.ends_with("0\r\n\r\n"), "the last chunk is missing");
    assert!(!answer.trim_end().ends_with(']'), "the array is not closed");
    server.stop().await.expect("it stops");
}

/// A service may show its token in a header of its own, here and nowhere else.
#[tokio::test]
async fn a_service_shows_its_token_in_its_own_header() {
    let server = TestServer::with(|config| config.operators.token = Some("987654".into())).await;
    for (header, value, status) in [
        ("X-Service-Token", "987654", 200),
        ("Authorization", "Bearer 987654", 200),
        ("X-Service-Token", "98765", 401),
        ("X-Other", "987654", 401),
    ] {
        assert_eq!(server.ask("GET", PATH, &[(header, value)]).await.status, status, "{header}: {value}");
    }
    let answer = server.ask("GET", "/api/v1/agents", &[("X-Service-Token", "987654")]).await;
    assert_problem(&answer, 401, "token-required");
}

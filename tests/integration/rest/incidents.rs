//! What happened tonight: disconnects that belong together, with their cause.

use std::sync::Arc;

use opamp_server::clock::Moment;
use opamp_server::close::CloseReason;
use opamp_server::store::{ConnectionEnd, NewConnection, Store, Write};
use serde_json::{Value, json};

use super::{assert_problem, fields, set};
use crate::harness::Database;
use crate::harness::server::TestServer;
use crate::store::scene::{Node, at, opened, uid};

/// Agents of a rack, which has a subnet and a version of its own.
const RACK: u32 = 20;

/// How many agents there are.
const AGENTS: u32 = 5 * RACK;

/// When the first rack falls silent, when that is known, and when the node is lost.
const SILENT: i64 = 50_000;
const KNOWN: i64 = 50_060;
const LOST: i64 = 60_000;

fn target(from: Moment, to: Moment) -> String {
    format!("/api/v1/fleet/incidents?from={from}&to={to}")
}

fn arrival(node: &Node, number: u32, at: Moment) -> Write {
    let remote_addr = format!("192.0.{}.{}:40001", number / RACK, number % RACK + 1);
    Write::CreateConnection(NewConnection { remote_addr, ..node.arrival(uid(number), at) })
}

/// A fleet by one node: a rack of it falls silent and returns, later the node is lost.
async fn seed(database: &Database) {
    let store: Arc<dyn Store> = database.open().await;
    let node = Node::start(&store, "seed", at(0)).await;
    let all: Vec<u32> = (0..AGENTS).collect();
    let arrivals: Vec<Write> = all.iter().map(|number| arrival(&node, *number, at(10))).collect();
    let mut open: Vec<_> = store.write(&arrivals).await.expect("they open").into_iter().map(opened).collect();
    let version = |number: u32| if number < 4 * RACK { "1.0.0" } else { "2.0.0" };
    let updates = all.iter().zip(&open).map(|(number, connection)| {
        let attributes = [("service.version", version(*number)), ("cloud.region", "eu-west-1")];
        Write::UpdateAgent(Box::new(node.described(connection, uid(*number), at(20), &attributes)))
    });
    store.write(&updates.collect::<Vec<_>>()).await.expect("they are stored");
    let silent = all[..RACK as usize].iter().zip(&open).map(|(number, connection)| {
        let last = at(SILENT + i64::from(*number));
        let end = node.end_of(connection, uid(*number), CloseReason::HeartbeatTimeout, last);
        Write::UpdateConnection(ConnectionEnd {
            disconnected_by: Some(at(KNOWN + i64::from(*number))),
            ..end
        })
    });
    store.write(&silent.collect::<Vec<_>>()).await.expect("they end");
    let back: Vec<Write> =
        all[..RACK as usize].iter().map(|number| arrival(&node, *number, at(KNOWN + 600))).collect();
    let back = store.write(&back).await.expect("they return").into_iter().map(opened);
    open.splice(..RACK as usize, back);
    let lost = all.iter().zip(&open).map(|(number, connection)| {
        Write::UpdateConnection(node.end_of(connection, uid(*number), CloseReason::ServerLost, at(LOST)))
    });
    store.write(&lost.collect::<Vec<_>>()).await.expect("they end");
    store.end_node(node.id, at(LOST)).await.expect("the store answers");
    store.close().await;
}

async fn incidents(server: &TestServer, from: i64, to: i64) -> Vec<Value> {
    let answer = server.read(&target(at(from), at(to))).await;
    assert_eq!(fields(&answer), set(["from", "to", "complete_from", "incidents"]));
    assert_eq!(answer["from"], json!(at(from)));
    assert_eq!(answer["to"], json!(at(to)));
    assert_eq!(answer["complete_from"], answer["from"], "all of it was looked at");
    answer["incidents"].as_array().expect("a list").clone()
}

/// One cause is one incident, with everything an operator asks first.
pub(super) async fn what_belongs_together_is_one_incident(database: &Database) {
    seed(database).await;
    let server = TestServer::on(database, |_| {}).await;
    let told = incidents(&server, 0, 86_400).await;
    let [silent, lost] = told.as_slice() else { panic!("{told:#?}") };
    let usual = silent["usual_per_minute"].as_f64().expect("a number");
    assert!((0.005..0.1).contains(&usual), "{silent}");
    let expected = json!({
        "cause": {"kind": "remote_subnet", "value": "192.0.0.0/24"},
        "reasons": {"heartbeat_timeout": RACK},
        "first": at(SILENT),
        "last": at(SILENT + i64::from(RACK) - 1),
        "known_by": at(KNOWN + i64::from(RACK) - 1),
        "agents_count": RACK,
        "disconnects": RACK,
        "connected_before": RACK,
        "share_of_disconnects": 1.0,
        "usual_per_minute": usual,
        "times_usual": silent["times_usual"],
        "agents": (0..RACK).map(uid).collect::<Vec<_>>(),
    });
    assert_eq!(silent, &expected);
    let times = silent["times_usual"].as_f64().expect("a number");
    assert!((times * usual / f64::from(RACK) - 1.0).abs() < 0.1, "all in less than a minute: {silent}");
    assert_eq!(lost["cause"]["kind"], "node");
    assert_eq!(lost["cause"]["node_name"], "seed");
    assert_eq!(lost["reasons"], json!({"server_lost": AGENTS}));
    assert_eq!((&lost["agents_count"], &lost["connected_before"]), (&json!(AGENTS), &json!(AGENTS)));
    assert_eq!(lost["agents"].as_array().map(Vec::len), Some(100), "no more than these are listed");
    // Between the two was nothing, and who left only later was connected all the same.
    assert_eq!(incidents(&server, SILENT + 1_000, LOST - 1_000).await, Vec::<Value>::new());
    assert_eq!(incidents(&server, 0, LOST - 1_000).await.as_slice(), std::slice::from_ref(silent));
    server.stop().await.expect("it stops");
}

/// A span that cannot be answered for is a problem that says so, and without one it is the last day.
pub(super) async fn a_span_has_its_limits(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    for (from, to) in [(100, 100), (100, 0), (0, 7 * 86_400 + 1)] {
        let answer = server.ask("GET", &target(at(from), at(to)), &[]).await;
        assert_eq!(assert_problem(&answer, 400, "bad-parameter")["parameter"], "from");
    }
    let answer = server.ask("GET", "/api/v1/fleet/incidents?from=9999-01-01T00:00:00Z", &[]).await;
    assert_eq!(assert_problem(&answer, 400, "bad-parameter")["parameter"], "from");
    let answer = server.read("/api/v1/fleet/incidents?to=9999-01-01T00:00:00Z").await;
    let [from, to] = ["from", "to"].map(|name| crate::harness::server::moment(&answer[name]));
    assert_eq!(to.since(from), std::time::Duration::from_hours(24), "the last day, and no future");
    assert_eq!(answer["incidents"], json!([]));
    server.stop().await.expect("it stops");
}

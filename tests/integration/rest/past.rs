//! Questions about the past: what may be asked, and in which forms it is answered.

use std::time::Duration;

use opamp_server::clock::Moment;
use opamp_server::close::CloseReason;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{assert_problem, fields, set};
use crate::harness::agent::{Agent, Socket};
use crate::harness::server::{TestServer, eventually, moment};
use crate::harness::{Database, Kind};
use crate::store::scene::{Node, at, uid};

/// An agent that came and left, and one that is there.
async fn two_agents(server: &TestServer) -> ([Agent; 2], Socket) {
    let mut agents = [Agent::new(), Agent::new()];
    let (mut socket, _) = Socket::greet(server, &agents[0].full()).await;
    socket.exchange(&agents[0].farewell()).await;
    socket.exchange(&agents[1].full()).await;
    (agents, socket)
}

/// A live server tells what it saw: before, during and after a connection, each as sure as it is.
#[tokio::test]
async fn a_timeline_tells_what_was_seen() {
    let server = TestServer::fresh().await;
    let ([left, mut stays], mut socket) = two_agents(&server).await;
    let row = &server.history(left.uid).await[0];
    let told = server.read(&format!("/api/v1/agents/{}/timeline", left.uid)).await;
    assert_eq!(fields(&told), set(["from", "to", "intervals"]));
    let (from, to) = (moment(&told["from"]), moment(&told["to"]));
    assert_eq!(to.since(from), Duration::from_hours(24), "a day, if nobody says");
    let said = |i: &Value| json!([i["state"], i["reason"], i["watched"], i["connection_id"]]);
    let intervals = told["intervals"].as_array().unwrap();
    assert_eq!(fields(&intervals[0]), set(["from", "to", "state", "connection_id", "reason", "watched"]));
    let told_so: Vec<Value> = intervals.iter().map(said).collect();
    let expected = [
        json!(["unknown", null, false, null]),
        json!(["disconnected", null, true, null]),
        json!(["connected", null, true, row["id"]]),
        json!(["disconnected", "agent_disconnect", true, null]),
    ];
    assert_eq!(told_so, expected, "{told}");
    let now = server.read(&format!("/api/v1/agents/{}/timeline?to=2100-01-01T00:00:00Z", stays.uid)).await;
    assert!(moment(&now["to"]) < Moment::parse("2100-01-01T00:00:00Z").unwrap(), "cut to now: {now}");
    // A later report proves it, once that is on record.
    eventually("it is proven to have been connected", async || {
        socket.exchange(&stays.report()).await;
        let target = format!("/api/v1/agents/{}/status?as_of={}", stays.uid, now["to"].as_str()?);
        (server.read(&target).await["connected"] == true).then_some(())
    })
    .await;
}

/// As of a moment, answers have their own fields and say the moment.
#[tokio::test]
async fn answers_as_of_a_moment_have_their_fields() {
    let server = TestServer::fresh().await;
    let ([left, _], _socket) = two_agents(&server).await;
    let row = &server.history(left.uid).await[0];
    let end = row["disconnected_at"].as_str().unwrap();
    let known = ["status", "since", "connected", "connection_id", "reason", "watched"];
    let status = server.read(&format!("/api/v1/agents/{}/status?as_of={end}", left.uid)).await;
    assert_eq!(fields(&status), known.into_iter().chain(["agent_id", "as_of"]).collect());
    assert_eq!(status["as_of"], end);
    let list = server.read(&format!("/api/v1/agents?as_of={end}")).await;
    assert_eq!(fields(&list), set(["agents", "total", "next_cursor", "as_of"]));
    assert_eq!(fields(&list["agents"][0]), known.into_iter().chain(["id"]).collect());
    let counts = server.read(&format!("/api/v1/agents/summary?as_of={end}")).await;
    let names =
        ["as_of", "total", "online", "offline", "error", "retired", "connected", "disconnected", "unknown"];
    assert_eq!(fields(&counts), set(names));
    let before = "2020-01-01T00:00:00Z";
    assert_eq!(server.read(&format!("/api/v1/agents?as_of={before}")).await["total"], 0);
    let (status, problem) = server.get(&format!("/api/v1/agents/{}/status?as_of={before}", left.uid)).await;
    assert_eq!((status, &problem["type"]), (404, &json!("agent-not-found")), "it was not known yet");
    let fleet = server.read("/api/v1/fleet/timeline?step=1h").await;
    assert_eq!(fields(&fleet), set(["from", "to", "step", "steps"]));
    let step = ["at", "online", "offline", "error", "unknown", "came", "went"];
    assert_eq!(fields(&fleet["steps"][0]), set(step));
    let steps = fleet["steps"].as_array().unwrap();
    assert_eq!((fleet["step"].as_str(), steps.len()), (Some("1h"), 24));
    let page = server.read("/api/v1/connection-history").await;
    assert_eq!(fields(&page), set(["from", "to", "connections", "next_cursor"]));
    assert_eq!(page["connections"][0]["id"], row["id"]);
}

/// What cannot be said is refused, by the name of what asked for it.
#[tokio::test]
async fn what_has_no_history_is_not_claimed() {
    let server = TestServer::fresh().await;
    let (agents, _socket) = two_agents(&server).await;
    let now = "as_of=2026-01-01T00:00:00Z";
    let one = format!("/api/v1/agents/{}", agents[0].uid);
    for (target, name) in [
        (format!("/api/v1/agents?{now}&healthy=true"), "healthy"),
        (format!("/api/v1/agents?{now}&attr.zone=north"), "attr.zone"),
        (format!("/api/v1/agents/stale?{now}"), "as_of"),
        (format!("{one}?{now}"), "as_of"),
        ("/api/v1/agents?as_of=2100-01-01T00:00:00Z".to_owned(), "as_of"),
        ("/api/v1/agents/summary?as_of=2100-01-01T00:00:00Z".to_owned(), "as_of"),
        (format!("{one}/status?as_of=2100-01-01T00:00:00Z"), "as_of"),
        (format!("{one}/timeline?from=2026-01-02T00:00:00Z&to=2026-01-01T00:00:00Z"), "from"),
        (format!("{one}/timeline?from=2100-01-01T00:00:00Z"), "from"),
        (format!("{one}/timeline?limit=5"), "limit"),
        ("/api/v1/fleet/timeline?step=0s".to_owned(), "step"),
        ("/api/v1/fleet/timeline?step=5".to_owned(), "step"),
        ("/api/v1/fleet/timeline?step=1us".to_owned(), "step"),
        ("/api/v1/fleet/timeline?step=30s".to_owned(), "step"),
    ] {
        let problem = assert_problem(&server.ask("GET", &target, &[]).await, 400, "bad-parameter");
        assert_eq!(problem["parameter"], name, "{target}: {problem}");
    }
    let answer = server.ask("GET", "/api/v1/fleet/timeline?step=44s", &[]).await;
    assert_eq!(answer.status, 200, "fewer than 2,000 steps");
    let nobody = "/api/v1/agents/0190d3c2-7a10-7b3e-9c41-5d2e8f60a1b2/timeline";
    assert_problem(&server.ask("GET", nobody, &[]).await, 404, "agent-not-found");
}

/// `Accept` decides the form; what excludes all of them is refused, and lines have no pages.
#[tokio::test]
async fn accept_decides_the_form() {
    let server = TestServer::fresh().await;
    let (agents, _socket) = two_agents(&server).await;
    let one = format!("/api/v1/agents/{}", agents[0].uid);
    for target in [
        format!("{one}/connection-history"),
        format!("{one}/timeline"),
        "/api/v1/connection-history".to_owned(),
    ] {
        for (accept, form) in [
            ("*/*", "application/json"),
            ("application/x-ndjson", "application/x-ndjson"),
            ("text/csv", "text/csv; charset=utf-8; header=present"),
        ] {
            let answer = server.ask("GET", &target, &[("Accept", accept)]).await;
            assert_eq!((answer.status, answer.header("content-type")), (200, Some(form)), "{target}");
            assert_eq!(answer.header("vary"), Some("Accept"), "{target}");
        }
        let answer = server.ask("GET", &target, &[("Accept", "text/html")]).await;
        assert_problem(&answer, 406, "not-acceptable");
        let answer = server.ask("GET", &format!("{target}?limit=5"), &[("Accept", "text/csv")]).await;
        assert_eq!(assert_problem(&answer, 400, "bad-parameter")["parameter"], "limit");
    }
    let answer =
        server.ask("GET", &format!("{one}/connection-history"), &[("Accept", "text/csv")]).await.text();
    let lines: Vec<&str> = answer.split_terminator("\r\n").collect();
    assert_eq!(
        lines[0],
        "id,agent_id,connected_at,disconnected_at,disconnected_by,duration_seconds,disconnect_reason,remote_addr,\
         transport,node_id,node_seq,created_at,confirmed_until"
    );
    assert!(lines[1].contains(",agent_disconnect,127.0.0.1:"), "{answer}");
    assert_eq!(lines.len(), 2);
}

/// How many connections the busy agent has: more than two batches.
const MANY: u32 = 2_345;

/// A long history is streamed batch by batch, whole; one that cannot be read to its end is broken off.
pub(super) async fn a_long_history_is_streamed_whole_or_broken_off(database: &Database) {
    let store = database.open().await;
    let node = Node::start(&store, "seed", at(0)).await;
    let opened = node.open(uid(1), at(10)).await;
    node.end(&opened, uid(1), CloseReason::ClosedByAgent, at(11)).await;
    store.end_node(node.id, at(50_000)).await.expect("the store answers");
    store.close().await;
    let raw = database.raw().await;
    let shift = match database.kind() {
        Kind::Sqlite => "n * 10000000",
        Kind::Postgres => "n * interval '10 seconds'",
    };
    raw.execute(format!(
        "INSERT INTO agent_connection_history (agent_id, connected_at, disconnected_at, duration_seconds,
             disconnect_reason, transport, node_seq, created_at)
         WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {MANY} - 1)
         SELECT c.agent_id, c.connected_at + {shift}, c.disconnected_at + {shift}, 1, c.disconnect_reason, c.transport,
             n, c.created_at FROM agent_connection_history c CROSS JOIN n"
    ))
    .await;
    let server = TestServer::on(database, |_| {}).await;
    let (from, to) = (at(0), at(50_000));
    let one = format!("/api/v1/agents/{}", uid(1));
    for (target, lines) in [
        (format!("{one}/connection-history"), MANY),
        (format!("/api/v1/connection-history?from={from}&to={to}"), MANY),
        (format!("{one}/timeline?from={from}&to={to}"), 2 * MANY + 1),
    ] {
        let answer = server.ask("GET", &target, &[("Accept", "application/x-ndjson")]).await;
        assert_eq!(answer.header("transfer-encoding"), Some("chunked"), "it is streamed");
        assert_eq!(answer.text().lines().count(), lines as usize, "{target}");
    }
    let target = format!("{one}/timeline?from={from}&to={to}");
    let told = server.read(&target).await;
    let intervals = told["intervals"].as_array().expect("a list");
    let text = server.ask("GET", &target, &[("Accept", "application/x-ndjson")]).await.text();
    let lines: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("a document")).collect();
    assert_eq!(lines, *intervals, "the batches are one timeline");
    // A row in the last batch becomes unreadable.
    let unreadable = match database.kind() {
        Kind::Sqlite => "UPDATE agent_connection_history SET transport = 'pigeon' WHERE id = (SELECT min(id) FROM agent_connection_history)",
        Kind::Postgres => {
            "ALTER TABLE agent_connection_history DROP CONSTRAINT agent_connection_history_transport_check;
             UPDATE agent_connection_history SET transport = 'pigeon' WHERE id = (SELECT min(id) FROM agent_connection_history)"
        }
    };
    match database.kind() {
        Kind::Sqlite => raw.execute(format!("PRAGMA ignore_check_constraints = on; {unreadable}")).await,
        Kind::Postgres => raw.execute(unreadable).await,
    };
    let mut stream = TcpStream::connect(server.operators).await.expect("the port is open");
    let request =
        format!("GET {one}/connection-history HTTP/1.1\r\nHost: localhost\r\nAccept: text/csv\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("the request is written");
    let mut answer = Vec::new();
    let reading = stream.read_to_end(&mut answer);
    let _reset_or_end = tokio::time::timeout(crate::harness::server::SOON, reading).await.expect("it ends");
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer:.200}");
    assert!(answer.lines().count() > 1_000, "the first batch was sent");
    assert!(!answer.ends_with("0\r\n\r\n"), "the last chunk is missing");
    server.stop().await.expect("it stops");
}

//! How connections end, and what their rows say.

use serde_json::json;

use crate::harness::Database;
use crate::harness::agent::{Agent, Received, Socket, assert_acknowledged, description};
use crate::harness::server::{TestServer, eventually, moment};

/// S-061: an agent that says goodbye is offline before it is answered.
#[tokio::test]
async fn s_061_a_farewell_is_on_record_before_it_is_answered() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    assert_acknowledged(&socket.exchange(&agent.farewell()).await, agent.uid);
    let row = &server.history(agent.uid).await[0];
    assert_eq!(row["disconnect_reason"], "agent_disconnect");
    assert!(row["disconnected_by"].is_null(), "the end was seen: {row}");
    let status = server.status(agent.uid).await;
    assert_eq!((&status["status"], &status["connected"]), (&json!("offline"), &json!(false)));
    assert!(status["deadline_at"].is_null() && status["active_connection"].is_null(), "{status}");
}

/// S-063: a Close frame is answered with one, and the row says who closed.
#[tokio::test]
async fn s_063_a_close_is_answered_with_a_close() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    socket.say_goodbye().await;
    assert_eq!(socket.receive().await, Received::Close(1000, String::new()));
    assert_eq!(socket.receive().await, Received::End);
    assert_eq!(server.until_ended(agent.uid).await["disconnect_reason"], "closed_by_agent");
}

/// A farewell and then a Close, as agents do it: one end, the first.
#[tokio::test]
async fn a_close_after_a_farewell_changes_nothing() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    socket.exchange(&agent.farewell()).await;
    let before = server.history(agent.uid).await;
    socket.say_goodbye().await;
    assert_eq!(socket.receive().await, Received::Close(1000, String::new()));
    until_links(&server, 0).await;
    assert_eq!(server.history(agent.uid).await, before);
}

/// Waits until so many WebSockets are open.
async fn until_links(server: &TestServer, links: u32) {
    eventually(&format!("{links} links are open"), async || {
        let open = server.metrics().await.value("opamp_links_open");
        ((open - f64::from(links)).abs() < 0.5).then_some(())
    })
    .await;
}

/// S-062, R-018: a transport that breaks off is the agent's end, seen at once.
#[tokio::test]
async fn a_broken_connection_is_seen_at_once() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (socket, _) = Socket::greet(&server, &agent.full()).await;
    socket.break_off();
    let row = server.until_ended(agent.uid).await;
    assert_eq!(row["disconnect_reason"], "connection_lost");
    assert!(row["disconnected_by"].is_null(), "FIN was seen: {row}");
    let status = server.status(agent.uid).await;
    assert_eq!(status["status"], "offline");
    assert_eq!(status["last_disconnected_at"], row["disconnected_at"]);
}

/// S-051: a newcomer takes over at once, and the late close of the older link changes nothing.
#[tokio::test]
async fn a_newcomer_takes_over_and_the_late_close_changes_nothing() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut older, _) = Socket::greet(&server, &agent.full()).await;
    let (mut newer, offer) = Socket::greet(&server, &agent.report()).await;
    assert_acknowledged(&offer, agent.uid);
    let rows = server.history(agent.uid).await;
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[1]["disconnect_reason"], "superseded");
    assert_eq!(rows[1]["disconnected_by"], rows[0]["connected_at"], "bounds: last proof … the newcomer");
    assert!(moment(&rows[1]["disconnected_at"]) <= moment(&rows[1]["disconnected_by"]));
    assert!(rows[0]["disconnected_at"].is_null());
    assert_eq!(older.closed().await, (1008, "superseded".to_owned()));
    until_links(&server, 1).await;
    assert_acknowledged(&newer.exchange(&agent.report()).await, agent.uid);
    assert_eq!(server.history(agent.uid).await[1], rows[1]);
    let status = server.status(agent.uid).await;
    assert_eq!((&status["status"], &status["connected"]), (&json!("online"), &json!(true)));
    assert_eq!(status["active_connection"]["id"], rows[0]["id"]);
    let metrics = server.metrics().await;
    assert!((metrics.value("opamp_connections_open{transport=\"websocket\"}") - 1.0).abs() < 0.5);
}

/// A newcomer takes over while a report of the older link is being stored: the older link is closed,
/// and what it still says opens nothing.
#[tokio::test]
async fn a_displaced_link_in_the_middle_of_a_report_does_not_take_its_agent_back() {
    let server = TestServer::fresh().await;
    for round in 0..20 {
        let mut agent = Agent::new();
        let (mut older, _) = Socket::greet(&server, &agent.full()).await;
        // Changes, so that the newcomer meets a save in flight, and one more that comes too late.
        for name in ["a", "b", "c"] {
            let mut change = agent.report();
            change.agent_description = Some(description(&[("service.name", name)]));
            older.send(&change).await;
        }
        let (mut newer, _) = Socket::greet(&server, &agent.report()).await;
        let closed = loop {
            match older.receive().await {
                Received::Offer(_) | Received::Ping => {}
                Received::Close(code, reason) => break (code, reason),
                Received::End => panic!("no Close frame in round {round}"),
            }
        };
        assert_eq!(closed, (1008, "superseded".to_owned()), "round {round}");
        assert_acknowledged(&newer.exchange(&agent.bare()).await, agent.uid);
        let rows = server.history(agent.uid).await;
        assert_eq!(rows.len(), 2, "round {round}: {rows:?}");
        assert!(rows[0]["disconnected_at"].is_null(), "round {round}: {rows:?}");
    }
}

/// On a shared link only the displaced agent goes; the others stay on it.
#[tokio::test]
async fn a_take_over_from_a_shared_link_leaves_the_others_on_it() {
    let server = TestServer::fresh().await;
    let (mut stays, mut moves) = (Agent::new(), Agent::new());
    let (mut shared, _) = Socket::greet(&server, &stays.full()).await;
    shared.exchange(&moves.full()).await;
    let (_newer, _) = Socket::greet(&server, &moves.report()).await;
    assert_acknowledged(&shared.exchange(&stays.report()).await, stays.uid);
    assert_eq!(server.history(stays.uid).await.len(), 1);
    assert_eq!(server.history(moves.uid).await[1]["disconnect_reason"], "superseded");
}

/// Every change of status is one row of the status log, with its reason and its connection.
#[tokio::test]
async fn every_change_of_status_is_in_the_status_log() {
    let database = Database::sqlite();
    let server = TestServer::on(&database, |_| {}).await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    socket.exchange(&agent.report()).await;
    socket.exchange(&agent.farewell()).await;
    let (socket, _) = Socket::greet(&server, &agent.report()).await;
    socket.break_off();
    server.until_ended(agent.uid).await;
    let raw = database.raw().await;
    let log: Vec<(Option<String>, String, String, Option<i64>)> = raw
        .rows("SELECT from_status, to_status, reason, connection_id FROM agent_status_log ORDER BY id")
        .await;
    let rows = server.history(agent.uid).await;
    let (second, first) = (rows[0]["id"].as_i64(), rows[1]["id"].as_i64());
    let word = |text: &str| Some(text.to_owned());
    let expected = [
        (None, "online", "first_report", first),
        (word("online"), "offline", "agent_disconnect", first),
        (word("offline"), "online", "returned", second),
        (word("online"), "offline", "connection_lost", second),
    ];
    let expected = expected.map(|(from, to, reason, id)| (from, to.to_owned(), reason.to_owned(), id));
    assert_eq!(log, expected);
    let nodes = raw.number("SELECT count(*) FROM agent_status_log WHERE node_id IS NULL").await;
    assert_eq!(nodes, 0, "each says which node noticed");
}

/// The moments of a seen end: from the first report to the end, to the second.
#[tokio::test]
async fn a_row_tells_when_from_where_and_how_long() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let open = server.history(agent.uid).await.remove(0);
    assert!(open["remote_addr"].as_str().unwrap().starts_with("127.0.0.1:"));
    assert!(moment(&open["confirmed_until"]) >= moment(&open["connected_at"]));
    socket.exchange(&agent.farewell()).await;
    let closed = server.history(agent.uid).await.remove(0);
    let lasted = moment(&closed["disconnected_at"]).since(moment(&closed["connected_at"]));
    let seconds = closed["duration_seconds"].as_u64().unwrap();
    assert!(seconds.abs_diff(lasted.as_secs()) <= 1, "{closed}");
    for column in ["id", "agent_id", "connected_at", "remote_addr", "transport", "node_id", "node_seq"] {
        assert_eq!(open[column], closed[column], "{column} does not change with the end");
    }
}

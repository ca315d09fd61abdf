//! Who is alive: pings, heartbeats, polls, and the verdict on silence.

use std::time::Duration;

use opamp_server::proto::{AgentToServer, ComponentHealth};
use serde_json::json;

use super::impatient;
use crate::harness::Database;
use crate::harness::agent::{
    Agent, HEARTBEATS, Poller, STATUS, Socket, VERDICT_DELAY, assert_acknowledged, description,
};
use crate::harness::server::{TestServer, eventually, moment};

/// The time-out of an impatient server.
const TIMEOUT: Duration = Duration::from_secs(1);

/// S-059: a peer that neither speaks nor reads goes offline within a second of its deadline, and is told so.
#[tokio::test]
async fn s_059_a_silent_agent_goes_offline_in_time_and_is_told() {
    let server = TestServer::with(impatient).await;
    let mut agent = Agent::with(STATUS | HEARTBEATS);
    // Not read from now on: the system acknowledges what the server writes, the agent answers nothing.
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let status = server.until_status(agent.uid, "offline").await;
    assert_eq!(status["disconnect_reason"], "heartbeat_timeout");
    assert_eq!(status["connected"], false);
    let row = server.until_ended(agent.uid).await;
    assert_eq!(row["disconnect_reason"], "heartbeat_timeout");
    let unknown = moment(&row["disconnected_by"]).since(moment(&row["disconnected_at"]));
    assert!(unknown >= TIMEOUT, "not before the deadline: {unknown:?}");
    assert!(unknown < TIMEOUT + VERDICT_DELAY, "at most a second after it: {unknown:?}");
    assert_eq!(moment(&status["since"]), moment(&row["disconnected_by"]));
    assert_eq!(socket.closed().await, (1001, "heartbeat_timeout".to_owned()));
    let metrics = server.metrics().await;
    assert!(metrics.value("opamp_agent_heartbeat_missed_total") > 0.5);
    assert!(metrics.value("opamp_connections_ended_total{reason=\"heartbeat_timeout\"}") > 0.5);
}

/// S-055, R-017, AMB-24: an agent without heartbeats that answers pings stays online, over several time-outs.
#[tokio::test]
async fn s_055_an_agent_without_heartbeats_that_answers_pings_stays_online() {
    let server = TestServer::with(impatient).await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    // A ping comes after three fifths of the time-out at the earliest: these are more than three time-outs.
    socket.answer_pings(6).await;
    let status = server.status(agent.uid).await;
    assert_eq!((&status["status"], &status["connected"]), (&json!("online"), &json!(true)));
    let rows = server.history(agent.uid).await;
    assert_eq!(rows.len(), 1);
    let confirmed = moment(&rows[0]["confirmed_until"]).since(moment(&rows[0]["connected_at"]));
    assert!(confirmed > TIMEOUT * 2, "answers to pings are proofs of life: {confirmed:?}");
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
}

/// S-058: who promises heartbeats and was offered no interval is not measured by one: answers to pings suffice.
#[tokio::test]
async fn s_058_no_interval_is_assumed_that_was_not_offered() {
    let server = TestServer::with(impatient).await;
    let mut agent = Agent::with(STATUS | HEARTBEATS);
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    // Several time-outs, and far more of the intervals this server expects.
    socket.answer_pings(6).await;
    let status = server.status(agent.uid).await;
    assert_eq!((&status["status"], &status["connected"]), (&json!("online"), &json!(true)));
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    assert_eq!(server.history(agent.uid).await.len(), 1);
}

/// S-057: any report is a heartbeat, a bare one and a repeated one too.
#[tokio::test]
async fn s_057_any_report_is_a_sign_of_life() {
    let server = TestServer::with(impatient).await;
    let mut agent = Agent::with(STATUS | HEARTBEATS);
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let connected = moment(&server.status(agent.uid).await["last_connected_at"]);
    let repeated = agent.report();
    eventually("three time-outs have passed", async || {
        // Never read between: no ping is answered, only these reports count.
        socket.exchange(&repeated).await;
        socket.exchange(&agent.bare()).await;
        let seen = moment(&server.status(agent.uid).await["last_seen_at"]);
        (seen.since(connected) > TIMEOUT * 3).then_some(())
    })
    .await;
    assert_eq!(server.history(agent.uid).await.len(), 1);
    assert_eq!(server.status(agent.uid).await["status"], "online");
}

/// S-060: a poller that stops is offline by the server's own timer; its row ends with its last poll.
#[tokio::test]
async fn s_060_a_poller_that_stops_goes_offline_by_the_servers_timer() {
    let server = TestServer::with(impatient).await;
    let mut agent = Agent::new();
    let mut poller = Poller::connect(&server).await;
    poller.exchange(&agent.full()).await;
    poller.exchange(&agent.report()).await;
    let status = server.until_status(agent.uid, "offline").await;
    assert_eq!(status["disconnect_reason"], "heartbeat_timeout");
    let row = server.until_ended(agent.uid).await;
    assert_eq!(row["disconnect_reason"], "heartbeat_timeout");
    let unknown = moment(&row["disconnected_by"]).since(moment(&row["disconnected_at"]));
    assert!(unknown >= TIMEOUT, "{unknown:?}");
    assert!(unknown < TIMEOUT + VERDICT_DELAY, "{unknown:?}");
    assert_acknowledged(&poller.exchange(&agent.report()).await, agent.uid);
    let rows = server.history(agent.uid).await;
    assert_eq!(rows.len(), 2, "a later poll is a new stay");
    assert_eq!(server.status(agent.uid).await["status"], "online");
}

/// S-060, R-018: before its second poll a poller has three expected intervals.
#[tokio::test]
async fn s_060_a_first_poll_gives_three_intervals() {
    let server = TestServer::with(|config| {
        config.heartbeat.timeout = Duration::from_millis(200);
        config.heartbeat.interval = Duration::from_millis(500);
    })
    .await;
    let mut agent = Agent::new();
    Poller::once(&server, &agent.full()).await;
    server.until_status(agent.uid, "offline").await;
    let row = server.until_ended(agent.uid).await;
    let unknown = moment(&row["disconnected_by"]).since(moment(&row["disconnected_at"]));
    assert!(unknown >= Duration::from_millis(1_500), "{unknown:?}");
    assert!(unknown < Duration::from_millis(1_500) + VERDICT_DELAY, "{unknown:?}");
}

/// A poller falls silent whatever its last poll carried: a change that was saved is no later sign of life.
#[tokio::test]
async fn s_060_a_poller_whose_last_poll_changed_its_state_goes_offline_too() {
    let server = TestServer::with(|config| {
        config.heartbeat.timeout = Duration::from_millis(300);
        config.heartbeat.interval = Duration::from_millis(100);
    })
    .await;
    let mut agent = Agent::new();
    let mut poller = Poller::connect(&server).await;
    poller.exchange(&agent.full()).await;
    let changed = AgentToServer {
        agent_description: Some(description(&[("service.name", "renamed")])),
        ..agent.report()
    };
    poller.exchange(&changed).await;
    server.until_status(agent.uid, "offline").await;
    let row = server.until_ended(agent.uid).await;
    assert_eq!(row["disconnect_reason"], "heartbeat_timeout");
}

/// Polls are one connection and never flap the status: N polls, over as many sockets, are one row.
#[tokio::test]
async fn polls_are_one_row_and_never_flap() {
    let database = Database::sqlite();
    let server = TestServer::on(&database, impatient).await;
    let mut agent = Agent::new();
    Poller::once(&server, &agent.full()).await;
    let connected = moment(&server.status(agent.uid).await["last_connected_at"]);
    eventually("polls went on for three time-outs", async || {
        assert_acknowledged(&Poller::once(&server, &agent.report()).await, agent.uid);
        let status = server.status(agent.uid).await;
        assert_eq!((&status["status"], &status["connected"]), (&json!("online"), &json!(true)));
        (moment(&status["last_seen_at"]).since(connected) > TIMEOUT * 3).then_some(())
    })
    .await;
    let rows = server.history(agent.uid).await;
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0]["transport"], "http");
    let raw = database.raw().await;
    let log: Vec<(Option<String>, String, String)> =
        raw.rows("SELECT from_status, to_status, reason FROM agent_status_log").await;
    assert_eq!(log, [(None, "online".to_owned(), "first_report".to_owned())]);
    server.stop().await.unwrap();
}

/// Polls of one agent that come at once, over several sockets, are answered and are one row.
///
/// Their numbers lie apart: consecutive ones that come in any order may look like two agents that take turns.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn polls_that_come_at_once_are_one_row() {
    let server = TestServer::fresh().await;
    let agent = Agent::new();
    let reports = (0..20).map(|number| {
        let mut agent = agent.clone();
        agent.number = number * 10;
        agent.full()
    });
    let polls = reports.map(|report| {
        let ports = *server;
        async move { Poller::once(&ports, &report).await }
    });
    for offer in futures_util::future::join_all(polls).await {
        assert_eq!(offer.error_response, None);
        assert_eq!(offer.instance_uid, agent.uid.as_bytes());
    }
    assert_eq!(server.history(agent.uid).await.len(), 1);
}

/// S-061 over plain HTTP: a farewell ends the row at once; a later poll is a new row.
#[tokio::test]
async fn s_061_a_poll_that_says_goodbye_ends_the_row_and_a_later_one_opens_a_new_one() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut poller = Poller::connect(&server).await;
    poller.exchange(&agent.full()).await;
    assert_acknowledged(&poller.exchange(&agent.farewell()).await, agent.uid);
    let status = server.status(agent.uid).await;
    assert_eq!((&status["status"], &status["connected"]), (&json!("offline"), &json!(false)));
    assert_eq!(status["disconnect_reason"], "agent_disconnect");
    assert_acknowledged(&poller.exchange(&agent.clone().farewell()).await, agent.uid);
    assert_eq!(server.history(agent.uid).await.len(), 1, "a second farewell opens nothing");
    assert_acknowledged(&poller.exchange(&agent.report()).await, agent.uid);
    let rows = server.history(agent.uid).await;
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[1]["disconnect_reason"], "agent_disconnect");
    assert!(rows[0]["disconnected_at"].is_null());
    assert_eq!(server.status(agent.uid).await["status"], "online");
}

/// S-051: a WebSocket takes over from polls, and a poll from a WebSocket, each at once.
#[tokio::test]
async fn a_websocket_takes_over_from_polls_and_back() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut poller = Poller::connect(&server).await;
    poller.exchange(&agent.full()).await;
    let (mut socket, offer) = Socket::greet(&server, &agent.report()).await;
    assert_acknowledged(&offer, agent.uid);
    let rows = server.history(agent.uid).await;
    assert_eq!(transports(&rows), ["websocket", "http"]);
    assert_eq!(rows[1]["disconnect_reason"], "superseded");
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    assert_acknowledged(&poller.exchange(&agent.report()).await, agent.uid);
    assert_eq!(socket.closed().await, (1008, "superseded".to_owned()));
    let rows = server.history(agent.uid).await;
    assert_eq!(transports(&rows), ["http", "websocket", "http"]);
    assert_eq!(rows[1]["disconnect_reason"], "superseded");
    assert!(rows[0]["disconnected_at"].is_null());
    assert_acknowledged(&poller.exchange(&agent.report()).await, agent.uid);
    assert_eq!(server.history(agent.uid).await.len(), 3);
    let status = server.status(agent.uid).await;
    assert_eq!((&status["status"], &status["connected"]), (&json!("online"), &json!(true)));
    assert_eq!(status["active_connection"]["transport"], "http");
}

fn transports(rows: &[serde_json::Value]) -> Vec<&str> {
    rows.iter().filter_map(|row| row["transport"].as_str()).collect()
}

/// Health is a third fact: an unhealthy agent is online, and a silent one keeps its last health.
#[tokio::test]
async fn health_never_changes_the_status() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let unhealthy = AgentToServer { health: Some(ComponentHealth::default()), ..agent.full() };
    let (mut socket, _) = Socket::greet(&server, &unhealthy).await;
    let status = server.status(agent.uid).await;
    assert_eq!((&status["status"], &status["healthy"]), (&json!("online"), &json!(false)));
    socket.exchange(&agent.farewell()).await;
    let status = server.status(agent.uid).await;
    assert_eq!((&status["status"], &status["healthy"]), (&json!("offline"), &json!(false)));
    assert_eq!(server.read("/api/v1/agents/summary").await["unhealthy"], 1);
}

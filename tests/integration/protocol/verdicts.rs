//! What time brings: the return after an end the server caused, and the sweep of those who stay away.

use std::time::Duration;

use opamp_server::proto::AgentToServer;
use serde_json::json;

use super::impatient;
use crate::harness::Database;
use crate::harness::agent::{Agent, Poller, Socket, VERDICT_DELAY, assert_acknowledged, description};
use crate::harness::server::{Process, TestServer, eventually, moment};

/// An orderly restart accuses nobody before the return time has passed; then `server_shutdown` is the reason.
#[tokio::test]
async fn who_does_not_return_after_a_restart_goes_offline_after_the_return_time() {
    let database = Database::sqlite();
    let server = TestServer::on(&database, impatient).await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let (stopped, close) = tokio::join!(server.stop(), socket.closed());
    stopped.unwrap();
    assert_eq!(close, (1012, "server_shutdown".to_owned()));
    let server = TestServer::on(&database, impatient).await;
    let status = server.status(agent.uid).await;
    assert_eq!((&status["status"], &status["connected"]), (&json!("online"), &json!(false)));
    assert_eq!(status["disconnect_reason"], "server_shutdown");
    let row = server.until_ended(agent.uid).await;
    assert_eq!(row["disconnect_reason"], "server_shutdown");
    let deadline = moment(&status["deadline_at"]);
    let away = deadline.since(moment(&row["disconnected_by"]));
    assert!(away >= Duration::from_secs(2), "2 × the time-out: {away:?}");
    let status = server.until_status(agent.uid, "offline").await;
    let since = moment(&status["since"]);
    assert!(since >= deadline, "not before its time: {status}");
    assert!(since.since(deadline) < VERDICT_DELAY, "and not long after: {status}");
    assert_eq!(status["disconnect_reason"], "server_shutdown");
    let raw = database.raw().await;
    let log: Vec<(Option<String>, String, String)> =
        raw.rows("SELECT from_status, to_status, reason FROM agent_status_log ORDER BY id").await;
    assert_eq!(log.len(), 2, "{log:?}");
    assert_eq!(log[1], (Some("online".to_owned()), "offline".to_owned(), "server_shutdown".to_owned()));
    server.stop().await.unwrap();
}

/// Who returns within the return time was never anything but online.
#[tokio::test]
async fn who_returns_in_time_stays_online_without_a_word_in_the_log() {
    let database = Database::sqlite();
    let server = TestServer::on(&database, |_| {}).await;
    let (mut agent, mut poller) = (Agent::new(), Agent::new());
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    Poller::once(&server, &poller.full()).await;
    let before = [server.status(agent.uid).await, server.status(poller.uid).await];
    let (stopped, _) = tokio::join!(server.stop(), socket.closed());
    stopped.unwrap();
    let server = TestServer::on(&database, |_| {}).await;
    let (socket, offer) = Socket::greet(&server, &agent.report()).await;
    assert_acknowledged(&offer, agent.uid);
    assert_acknowledged(&Poller::once(&server, &poller.report()).await, poller.uid);
    for (before, uid) in before.iter().zip([agent.uid, poller.uid]) {
        let after = server.status(uid).await;
        assert_eq!((&after["status"], &after["connected"]), (&json!("online"), &json!(true)));
        assert_eq!(after["since"], before["since"], "online all the time");
        let rows = server.history(uid).await;
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[1]["disconnect_reason"], "server_shutdown");
    }
    assert_eq!(database.raw().await.number("SELECT count(*) FROM agent_status_log").await, 2);
    drop(socket);
    server.stop().await.unwrap();
}

/// Who stays away is retired if it is ephemeral, else an error; both may return, and the log counts them.
#[tokio::test]
async fn the_sweep_retires_ephemeral_agents_and_marks_the_others() {
    let database = Database::sqlite();
    let server =
        Process::start(&database, &[("OPAMP_SWEEP_INTERVAL", "50ms"), ("OPAMP_SWEEP_STALE_AFTER", "300ms")])
            .await;
    let (mut durable, mut pod) = (Agent::new(), Agent::new());
    let (mut socket, _) = Socket::greet(&server, &durable.full()).await;
    let described = Some(description(&[("service.name", "pod"), ("k8s.pod.uid", "7")]));
    socket.exchange(&AgentToServer { agent_description: described, ..pod.full() }).await;
    socket.exchange(&durable.farewell()).await;
    socket.exchange(&pod.farewell()).await;
    server.until_status(durable.uid, "error").await;
    server.until_status(pod.uid, "retired").await;
    let summary = server.read("/api/v1/agents/summary").await;
    assert_eq!(
        (&summary["total"], &summary["error"], &summary["retired"]),
        (&json!(1), &json!(1), &json!(1))
    );
    assert_eq!(server.read("/api/v1/agents").await["total"], 1, "retired ones are hidden");
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 2);
    assert_eq!(server.history(pod.uid).await.len(), 1, "history is kept");
    let swept = eventually("the sweep says what it did", async || {
        let swept = server.logged("cleaned up stale agents");
        let sum: u64 = swept.iter().filter_map(|entry| entry["count"].as_u64()).sum();
        (sum == 2).then_some(swept)
    })
    .await;
    assert!(swept.iter().all(|entry| entry["count"] != 0), "nothing is said of nothing: {swept:?}");
    for agent in [&mut durable, &mut pod] {
        assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
        assert_eq!(server.status(agent.uid).await["status"], "online");
        assert_eq!(server.history(agent.uid).await.len(), 2, "the same record goes on");
    }
}

/// Every change of status is logged once, with everything needed to find it again.
#[tokio::test]
async fn every_change_of_status_is_logged() {
    let database = Database::sqlite();
    let server = Process::start(&database, &[]).await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let id = server.status(agent.uid).await["active_connection"]["id"].clone();
    socket.exchange(&agent.report()).await;
    socket.exchange(&agent.farewell()).await;
    let logged = eventually("two changes are logged", async || {
        let logged = server.logged("agent status updated");
        (logged.len() > 1).then_some(logged)
    })
    .await;
    let expected = [("unknown", "online", "first_report"), ("online", "offline", "agent_disconnect")];
    assert_eq!(logged.len(), 2, "{logged:?}");
    for (entry, (from, to, reason)) in logged.iter().zip(expected) {
        assert_eq!(entry["agent_id"], json!(agent.uid.to_string()));
        assert_eq!(
            (&entry["from"], &entry["to"], &entry["reason"]),
            (&json!(from), &json!(to), &json!(reason))
        );
        assert_eq!(entry["connection_id"], id);
    }
}

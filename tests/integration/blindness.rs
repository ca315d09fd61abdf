//! A server that was stopped and continued, as SIGSTOP, a debugger or a paused machine do it, accuses nobody.

use std::time::Duration;

use rustix::process::Signal;
use tokio::time::Instant;

use crate::harness::Database;
use crate::harness::agent::{Agent, Poller, Socket, assert_acknowledged};
use crate::harness::server::{Process, eventually, moment};

/// Silence that makes an agent offline.
const TIMEOUT: Duration = Duration::from_secs(1);

/// How long the server is stopped: several time-outs.
const STOPPED: Duration = Duration::from_secs(4);

const IMPATIENT: [(&str, &str); 3] = [
    ("OPAMP_HEARTBEAT_TIMEOUT", "1s"),
    ("OPAMP_HEARTBEAT_INTERVAL", "300ms"),
    ("OPAMP_HEARTBEAT_CHECK_INTERVAL", "100ms"),
];

/// Stops the server for a while.
async fn blind(server: &Process, meanwhile: impl Future<Output = ()>) {
    server.signal(Signal::STOP);
    let stopped = Instant::now();
    meanwhile.await;
    eventually("it was stopped long enough", async || (stopped.elapsed() >= STOPPED).then_some(())).await;
    server.signal(Signal::CONT);
}

/// What arrives while the server is stopped is read before anybody is judged, and deadlines have moved.
#[tokio::test]
async fn a_stopped_server_accuses_nobody_who_reported_meanwhile() {
    let database = Database::sqlite();
    let server = Process::start(&database, &IMPATIENT).await;
    let (mut talker, mut poller) = (Agent::new(), Agent::new());
    let (mut socket, _) = Socket::greet(&server, &talker.full()).await;
    Poller::once(&server, &poller.full()).await;
    blind(&server, socket.send(&talker.report())).await;
    assert_acknowledged(&socket.offer().await, talker.uid);
    assert_acknowledged(&Poller::once(&server, &poller.report()).await, poller.uid);
    assert_eq!(server.history(talker.uid).await.len(), 1);
    assert_eq!(server.history(poller.uid).await.len(), 1);
    let said = server.logged("this server was blind; every deadline moves by as much");
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(server.metrics().await.value("opamp_blind_seconds_total") >= 3.0);
    assert!(
        server.logged("agent status updated").iter().all(|change| change["to"] == "online"),
        "nobody was offline for a moment"
    );
}

/// Who stays silent afterwards is offline by a deadline that moved, not at once.
#[tokio::test]
async fn a_silent_agent_keeps_the_time_it_had_left() {
    let database = Database::sqlite();
    let server = Process::start(&database, &IMPATIENT).await;
    let mut agent = Agent::new();
    // Never read again: its pings stay unanswered.
    let (_socket, _) = Socket::greet(&server, &agent.full()).await;
    let connected = moment(&server.history(agent.uid).await[0]["connected_at"]);
    blind(&server, async {}).await;
    let row = server.until_ended(agent.uid).await;
    assert_eq!(row["disconnect_reason"], "heartbeat_timeout");
    let judged = moment(&row["disconnected_by"]).since(connected);
    assert!(judged >= STOPPED + TIMEOUT, "the deadline moves by the whole blindness: {judged:?}");
}

//! Several nodes on one database: who is lost, who says so, and what becomes of the agents.

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::Database;
use crate::harness::agent::{Agent, Poller, Socket};
use crate::harness::server::{Process, eventually, moment};

const ONE: [(&str, &str); 5] = [
    ("OPAMP_NODE_NAME", "one"),
    ("OPAMP_NODE_LEASE", "1s"),
    ("OPAMP_HEARTBEAT_CHECK_INTERVAL", "200ms"),
    ("OPAMP_HEARTBEAT_TIMEOUT", "2s"),
    ("OPAMP_HEARTBEAT_INTERVAL", "500ms"),
];

fn two() -> [(&'static str, &'static str); 5] {
    let mut two = ONE;
    two[0].1 = "two";
    two
}

/// A node that was killed is ended by its living peer; its agents stay online for their return time.
#[tokio::test]
async fn a_living_peer_ends_what_a_killed_node_left() {
    let Some(database) = Database::postgres().await else { return };
    let (one, two) = (Process::start(&database, &ONE).await, Process::start(&database, &two()).await);
    let (mut mover, mut mourned, mut poller) = (Agent::new(), Agent::new(), Agent::new());
    let _lost = Socket::greet(&one, &mover.full()).await;
    let _gone = Socket::greet(&one, &mourned.full()).await;
    Poller::once(&one, &poller.full()).await;
    one.kill().await;
    let row = two.until_ended(mourned.uid).await;
    assert_eq!(row["disconnect_reason"], "server_lost");
    assert!(moment(&row["disconnected_at"]) <= moment(&row["disconnected_by"]), "{row}");
    assert_eq!(two.status(mourned.uid).await["status"], "online", "it has its return time");
    let said =
        two.logged("a node was lost: its lease did not move; its connections were ended as server_lost");
    assert_eq!(said.len(), 1, "{said:?}");
    assert_eq!(said[0]["connections"], 2);
    let (mut back, _) = Socket::greet(&two, &mover.report()).await;
    eventually("who does not return in time is offline", async || {
        back.exchange(&mover.report()).await;
        (two.status(mourned.uid).await["status"] == "offline").then_some(())
    })
    .await;
    assert_eq!(two.status(mover.uid).await["status"], "online");
    let row = two.until_ended(poller.uid).await;
    assert_eq!(
        row["disconnect_reason"], "heartbeat_timeout",
        "polls belong to no node: somebody watches them"
    );
    let transitions = two.read(&format!("/api/v1/agents/{}/status-history", mover.uid)).await;
    assert_eq!(transitions["total"], 1, "it was never offline: {transitions}");
}

/// A poller that left at one node and starts again at another one, with the very report that this one heard last, is
/// connected again at once.
#[tokio::test]
async fn what_looks_like_a_repetition_opens_what_was_ended_elsewhere() {
    let Some(database) = Database::postgres().await else { return };
    // The one that is to know of the other starts last.
    let two = Process::start(&database, &two()).await;
    let one = Process::start(&database, &ONE).await;
    let mut agent = Agent::new();
    Poller::once(&one, &agent.full()).await;
    // By its gap, it has not missed a poll when it comes back.
    let polled = tokio::time::Instant::now();
    eventually("it polls every second", async || {
        (polled.elapsed() >= std::time::Duration::from_secs(1)).then_some(())
    })
    .await;
    let second = agent.full();
    Poller::once(&one, &second).await;
    Poller::once(&two, &agent.farewell()).await;
    assert_eq!(one.status(agent.uid).await["status"], "offline");
    Poller::once(&one, &second).await;
    assert_eq!(one.status(agent.uid).await["status"], "online");
    let rows = one.history(agent.uid).await;
    assert_eq!(rows.len(), 2, "{rows:?}");
}

/// A node that was stopped for so long that it was taken for lost reads that, closes its links and exits.
#[tokio::test]
async fn a_node_that_was_taken_for_lost_exits() {
    let Some(database) = Database::postgres().await else { return };
    let (one, two) = (Process::start(&database, &ONE).await, Process::start(&database, &two()).await);
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&one, &agent.full()).await;
    one.signal(Signal::STOP);
    two.until_ended(agent.uid).await;
    one.signal(Signal::CONT);
    let (code, logs) = one.exit().await;
    assert_eq!(code, Some(1), "{logs:?}");
    let says = |entry: &Value| entry.to_string().contains("took this one for lost");
    assert!(logs.iter().any(says), "{logs:?}");
    socket.closed().await;
    let rows = two.history(agent.uid).await;
    assert_eq!(rows.len(), 1, "it opened nothing after its end: {rows:?}");
    assert_eq!(rows[0]["disconnect_reason"], "server_lost");
}

/// Two nodes that both were stopped, as on one paused machine, accuse neither each other nor any agent.
#[tokio::test]
async fn nodes_that_were_stopped_together_accuse_nobody() {
    let Some(database) = Database::postgres().await else { return };
    let (one, two) = (Process::start(&database, &ONE).await, Process::start(&database, &two()).await);
    let (mut first, mut second) = (Agent::new(), Agent::new());
    let (mut socket, _) = Socket::greet(&one, &first.full()).await;
    let (mut other, _) = Socket::greet(&two, &second.full()).await;
    for node in [&one, &two] {
        node.signal(Signal::STOP);
    }
    let stopped = tokio::time::Instant::now();
    eventually("they were stopped for three leases", async || {
        (stopped.elapsed() >= std::time::Duration::from_secs(3)).then_some(())
    })
    .await;
    for node in [&one, &two] {
        node.signal(Signal::CONT);
    }
    eventually("both have noticed", async || {
        let noticed = |node: &Process| {
            !node.logged("this server was blind; every deadline moves by as much").is_empty()
        };
        (noticed(&one) && noticed(&two)).then_some(())
    })
    .await;
    socket.exchange(&first.report()).await;
    other.exchange(&second.report()).await;
    assert_eq!(one.history(first.uid).await.len(), 1);
    assert!(one.history(first.uid).await[0]["disconnected_at"].is_null());
    assert!(two.history(second.uid).await[0]["disconnected_at"].is_null());
}

//! The store is away: whoever is connected is answered, and nothing that was promised is lost.

use std::time::Duration;

use opamp_server::proto::{AgentToServer, ServerToAgentFlags};
use rustix::process::Signal;
use serde_json::Value;
use tokio::time::Instant;

use crate::harness::agent::{Agent, Poller, Socket, assert_acknowledged, effective_config};
use crate::harness::server::{Ports, Process, eventually, moment};
use crate::harness::{Database, Held, Raw};

/// It expects reports, and those it gets say what they run.
const REPORTS_CONFIG: u64 = 0x1 | 0x4;

const PATIENT: [(&str, &str); 2] =
    [("OPAMP_HEARTBEAT_CHECK_INTERVAL", "200ms"), ("OPAMP_HEARTBEAT_TIMEOUT", "60s")];

/// Keeps everybody else from writing until it is committed.
async fn block(raw: &Raw) -> Held {
    let everything = "LOCK TABLE agents, agent_liveness, nodes IN ACCESS EXCLUSIVE MODE".to_owned();
    if raw.locks_rows() { raw.hold(&[everything]).await } else { raw.hold(&[]).await }
}

fn running(agent: &mut Agent, body: &str) -> AgentToServer {
    AgentToServer { effective_config: Some(effective_config(body)), ..agent.report() }
}

fn body(agent: &Value) -> &Value {
    &agent["effective_config"][""]["body"]
}

async fn until_running(server: &Ports, agent: &Agent, wanted: &str) {
    eventually("the change is stored", async || {
        let agent = server.agent(agent.uid).await?;
        (body(&agent) == wanted).then_some(())
    })
    .await;
}

fn asks(offer: &opamp_server::proto::ServerToAgent) -> bool {
    offer.flags & ServerToAgentFlags::ReportFullState as u64 != 0
}

/// Changes are answered as always while the store hangs; the newest state is stored on its return, and the
/// numbers go on from there.
pub(super) async fn a_change_is_answered_and_stored_on_return(database: &Database) {
    let server = Process::start(database, &PATIENT).await;
    let raw = database.raw().await;
    let (mut agent, mut poller) = (Agent::with(REPORTS_CONFIG), Agent::with(REPORTS_CONFIG));
    let full = AgentToServer { effective_config: Some(effective_config("a: 1")), ..agent.full() };
    let (mut socket, _) = Socket::greet(&server, &full).await;
    let full = AgentToServer { effective_config: Some(effective_config("a: 1")), ..poller.full() };
    Poller::once(&server, &full).await;
    let held = block(&raw).await;
    for change in ["a: 2", "a: 3", "a: 4"] {
        assert_acknowledged(&socket.exchange(&running(&mut agent, change)).await, agent.uid);
    }
    let began = Instant::now();
    assert_acknowledged(&Poller::once(&server, &running(&mut poller, "a: 5")).await, poller.uid);
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    assert!(began.elapsed() < Duration::from_secs(5), "once it is known to be away, nobody waits for it");
    assert!(!Socket::is_let_in(&server).await, "nobody new can be put on record");
    held.commit().await;
    until_running(&server, &agent, "a: 4").await;
    until_running(&server, &poller, "a: 5").await;
    socket.say_goodbye().await;
    server.until_ended(agent.uid).await;
    eventually("newcomers are let in again", async || Socket::is_let_in(&server).await.then_some(())).await;
    let (mut socket, offer) = Socket::greet(&server, &agent.report()).await;
    assert!(!asks(&offer), "its numbers continue what is stored");
    assert!(!asks(&socket.exchange(&agent.report()).await));
    assert_eq!(server.history(agent.uid).await.len(), 2);
    assert_eq!(server.history(poller.uid).await.len(), 1);
}

/// A change that was answered while the store was away dies with the process: full state is asked for, once.
pub(super) async fn a_change_that_is_lost_in_a_crash_is_asked_for_once(database: &Database) {
    let server = Process::start(database, &PATIENT).await;
    let raw = database.raw().await;
    let mut agent = Agent::with(REPORTS_CONFIG);
    let full = AgentToServer { effective_config: Some(effective_config("a: 1")), ..agent.full() };
    let (mut socket, _) = Socket::greet(&server, &full).await;
    let held = block(&raw).await;
    assert_acknowledged(&socket.exchange(&running(&mut agent, "a: 2")).await, agent.uid);
    server.kill().await;
    held.commit().await;
    let server = Process::start(database, &PATIENT).await;
    let (mut socket, offer) = Socket::greet(&server, &agent.report()).await;
    assert!(asks(&offer), "a number is missing");
    let full = AgentToServer { effective_config: Some(effective_config("a: 2")), ..agent.full() };
    assert!(!asks(&socket.exchange(&full).await), "once is enough");
    assert!(!asks(&socket.exchange(&agent.report()).await));
    until_running(&server, &agent, "a: 2").await;
}

/// An end is written on return, with the moment at which it was seen.
pub(super) async fn an_end_keeps_its_moment(database: &Database) {
    let server = Process::start(database, &PATIENT).await;
    let raw = database.raw().await;
    let mut agents: Vec<Agent> = (0..3).map(|_| Agent::new()).collect();
    let mut sockets = Vec::new();
    for agent in &mut agents {
        sockets.push(Socket::greet(&server, &agent.full()).await.0);
    }
    let held = block(&raw).await;
    sockets.into_iter().for_each(Socket::break_off);
    eventually("the store is known to be away", async || {
        let away = server.logged("the store is back").is_empty()
            && server.metrics().await.value("opamp_store_failures_total") > 0.0;
        away.then_some(())
    })
    .await;
    let (mut late, known) = (Agent::new(), opamp_server::clock::Moment::parse(&now()).expect("a time"));
    held.commit().await;
    for agent in &agents {
        let row = server.until_ended(agent.uid).await;
        assert_eq!(row["disconnect_reason"], "connection_lost");
        assert!(moment(&row["disconnected_at"]) <= known, "{row}");
    }
    eventually("newcomers are let in again", async || Socket::is_let_in(&server).await.then_some(())).await;
    Socket::greet(&server, &late.full()).await;
}

fn now() -> String {
    opamp_server::clock::host_now().to_string()
}

/// SIGTERM while the store hangs: exit code 1 with one sentence, within the drain and five seconds.
pub(super) async fn a_stop_without_the_store_ends_in_time(database: &Database) {
    let environment = [PATIENT[0], PATIENT[1], ("OPAMP_SHUTDOWN_DRAIN", "1s")];
    let server = Process::start(database, &environment).await;
    let raw = database.raw().await;
    let mut agent = Agent::new();
    let (_socket, _) = Socket::greet(&server, &agent.full()).await;
    let held = block(&raw).await;
    let began = Instant::now();
    server.signal(Signal::TERM);
    let (code, logs) = server.exit().await;
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    assert_eq!(code, Some(1), "{logs:?}");
    held.commit().await;
    let server = Process::start(database, &PATIENT).await;
    let row = server.until_ended(agent.uid).await;
    assert_eq!(row["disconnect_reason"], "server_lost");
}

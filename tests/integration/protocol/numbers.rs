//! Sequence numbers: gaps, repeats, disorder, wraps, over reports, links, transports and restarts.

use opamp_server::proto::{AgentToServer, ServerErrorResponseType};
use serde_json::json;

use crate::harness::Database;
use crate::harness::agent::{
    Agent, FULL_STATE, Poller, STATUS, Socket, assert_acknowledged, description, error_of,
};
use crate::harness::server::{TestServer, eventually};

/// A report with this number and nothing new in it.
fn numbered(agent: &Agent, number: u64) -> AgentToServer {
    Agent { number, ..agent.clone() }.report()
}

/// an unknown agent may begin with any number; a full first report is enough.
#[tokio::test]
async fn r_006_a_first_report_may_have_any_number() {
    let server = TestServer::fresh().await;
    for number in [0, 1, 2, 17, 1 << 32, i64::MAX as u64, i64::MAX as u64 + 1, u64::MAX] {
        let mut agent = Agent { number, ..Agent::new() };
        let (mut socket, offer) = Socket::greet(&server, &agent.full()).await;
        assert_acknowledged(&offer, agent.uid);
        assert_eq!(server.agent(agent.uid).await.unwrap()["sequence_num"], json!(number));
        assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
        let mut agent = Agent { number, ..Agent::new() };
        let mut poller = Poller::connect(&server).await;
        assert_acknowledged(&poller.exchange(&agent.full()).await, agent.uid);
        assert_acknowledged(&poller.exchange(&agent.report()).await, agent.uid);
    }
}

/// S-044: whatever is not exactly one more asks for full state: forwards, backwards, over half of the range.
#[tokio::test]
async fn s_044_every_number_but_the_next_is_a_gap() {
    let server = TestServer::fresh().await;
    let start = 1_u64 << 40;
    for next in [start + 2, start + 3, start - 1, 0, 1, u64::MAX, start ^ (1 << 63), start + (1 << 32) + 1] {
        let mut agent = Agent { number: start, ..Agent::new() };
        let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
        let offer = socket.exchange(&numbered(&agent, next)).await;
        assert_eq!(offer.flags, FULL_STATE, "{start} and then {next}");
        assert_acknowledged(&socket.exchange(&numbered(&agent, next.wrapping_add(1))).await, agent.uid);
    }
}

/// S-044: the same over plain HTTP, each poll on a socket of its own.
#[tokio::test]
async fn s_044_a_gap_between_polls_asks_for_full_state() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    Poller::once(&server, &agent.full()).await;
    for number in [5, 3, 1_000, 0] {
        assert_eq!(Poller::once(&server, &numbered(&agent, number)).await.flags, FULL_STATE, "{number}");
        assert_acknowledged(&Poller::once(&server, &numbered(&agent, number + 1)).await, agent.uid);
    }
    assert_eq!(server.history(agent.uid).await.len(), 1);
}

/// S-044, R-003: reports out of order are gaps one by one, and what follows in order is none.
#[tokio::test]
async fn s_044_disorder_is_asked_about_and_order_is_not() {
    let server = TestServer::fresh().await;
    let mut agent = Agent { number: 5, ..Agent::new() };
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    for (number, gap) in
        [(6, false), (8, true), (7, true), (9, true), (10, false), (11, false), (9, true), (10, false)]
    {
        let offer = socket.exchange(&numbered(&agent, number)).await;
        assert_eq!(offer.flags == FULL_STATE, gap, "{number}");
    }
}

/// S-044: the numbers wrap at the largest one: 0 follows it, and 1 does not.
#[tokio::test]
async fn s_044_the_numbers_wrap() {
    let server = TestServer::fresh().await;
    let mut agent = Agent { number: u64::MAX, ..Agent::new() };
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    assert_acknowledged(&socket.exchange(&numbered(&agent, 0)).await, agent.uid);
    let mut agent = Agent { number: u64::MAX, ..Agent::new() };
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    assert_eq!(socket.exchange(&numbered(&agent, 1)).await.flags, FULL_STATE);
}

/// S-045: numbers of any size continue over links and over a restart of the server.
#[tokio::test]
async fn s_045_large_numbers_continue_over_links_and_restarts() {
    let database = Database::sqlite();
    let mut agents = [i64::MAX as u64 - 1, i64::MAX as u64, u64::MAX - 1, u64::MAX]
        .map(|number| Agent { number, ..Agent::new() });
    let server = TestServer::on(&database, |_| {}).await;
    for agent in &mut agents {
        let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
        socket.exchange(&agent.farewell()).await;
        let (mut socket, offer) = Socket::greet(&server, &agent.report()).await;
        assert_acknowledged(&offer, agent.uid);
        socket.exchange(&agent.farewell()).await;
    }
    server.stop().await.unwrap();
    let server = TestServer::on(&database, |_| {}).await;
    for agent in &mut agents {
        let (_socket, offer) = Socket::greet(&server, &agent.report()).await;
        assert_acknowledged(&offer, agent.uid);
    }
}

/// S-045: an agent that continues its numbers on another transport is asked nothing.
#[tokio::test]
async fn s_045_numbers_continue_over_both_transports() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    Poller::once(&server, &agent.full()).await;
    for _ in 0..3 {
        let (mut socket, offer) = Socket::greet(&server, &agent.report()).await;
        assert_acknowledged(&offer, agent.uid);
        assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
        socket.exchange(&agent.farewell()).await;
        assert_acknowledged(&Poller::once(&server, &agent.report()).await, agent.uid);
    }
    agent.number += 1;
    let (_socket, offer) = Socket::greet(&server, &agent.report()).await;
    assert_eq!(offer.flags, FULL_STATE, "a gap shows on another transport too");
}

/// AMB-04: a known agent that starts over is asked, although its first report says everything.
#[tokio::test]
async fn amb_04_an_agent_that_starts_over_is_asked_once() {
    let server = TestServer::fresh().await;
    let mut agent = Agent { number: 40, ..Agent::new() };
    let (socket, _) = Socket::greet(&server, &agent.full()).await;
    socket.break_off();
    server.until_ended(agent.uid).await;
    agent.number = 0;
    let (mut socket, offer) = Socket::greet(&server, &agent.full()).await;
    assert_eq!(offer.flags, FULL_STATE);
    for _ in 0..5 {
        assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    }
}

/// what comes with a gap is taken, and what is left out stays, until full state tells.
#[tokio::test]
async fn r_003_what_comes_with_a_gap_is_taken() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    agent.number += 10;
    let described = Some(description(&[("service.name", "renamed")]));
    let jump = AgentToServer { agent_description: described, ..agent.report() };
    assert_eq!(socket.exchange(&jump).await.flags, FULL_STATE);
    assert_eq!(server.agent(agent.uid).await.unwrap()["name"], "renamed");
    agent.number += 10;
    assert_eq!(socket.exchange(&agent.report()).await.flags, FULL_STATE);
    assert_eq!(server.agent(agent.uid).await.unwrap()["name"], "renamed", "nothing known is forgotten");
}

/// while something may be missing no number stands for the state; full state brings it back.
#[tokio::test]
async fn r_027_no_number_stands_for_a_state_that_may_be_incomplete() {
    let server = TestServer::fresh().await;
    let mut agent = Agent { number: 3, ..Agent::new() };
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let number = async || server.agent(agent.uid).await.unwrap()["sequence_num"].clone();
    assert_eq!(number().await, 3);
    assert_eq!(socket.exchange(&numbered(&agent, 9)).await.flags, FULL_STATE);
    assert_eq!(number().await, json!(null));
    socket.exchange(&numbered(&agent, 10)).await;
    assert_eq!(number().await, json!(null), "following in order is not complete");
    socket.exchange(&Agent { number: 11, ..agent.clone() }.full()).await;
    assert_eq!(number().await, 11);
    socket.exchange(&numbered(&agent, 12)).await;
    eventually("the flush brings the next number", async || (number().await == 12).then_some(())).await;
}

/// S-044: a heartbeat counts like any other report: a lost one shows.
#[tokio::test]
async fn s_044_a_lost_heartbeat_shows() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::with(STATUS | 0x2000);
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    let _lost = agent.report();
    assert_eq!(socket.exchange(&agent.report()).await.flags, FULL_STATE);
}

/// AMB-12: a report that was refused does not count: the next one shows the gap, and its copies do not hide it.
#[tokio::test]
async fn amb_12_a_refused_report_does_not_count() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let mut frame = crate::harness::frames::content(&agent.report());
    // health.last_error, and in it no UTF-8
    frame.extend([0x2a, 0x03, 0x1a, 0x01, 0xff]);
    for _ in 0..3 {
        socket.send_bytes(frame.clone()).await;
        error_of(&socket.offer().await, ServerErrorResponseType::BadRequest);
    }
    assert_eq!(socket.exchange(&agent.report()).await.flags, FULL_STATE);
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
}

/// S-032: copies are answered like the original, whatever it was: a first report, a gap, a heartbeat, a change.
#[tokio::test]
async fn s_032_copies_of_every_kind_are_answered_alike() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut socket = Socket::connect(&server).await;
    let first = agent.full();
    let heartbeat = agent.report();
    agent.number += 7;
    let jump = agent.report();
    let change =
        AgentToServer { agent_description: Some(description(&[("service.name", "x")])), ..agent.report() };
    for report in [first, heartbeat, jump, change] {
        let original = socket.exchange(&report).await;
        for _ in 0..3 {
            assert_eq!(socket.exchange(&report).await, original, "{report:?}");
        }
    }
    let updated = server.agent(agent.uid).await.unwrap()["updated_at"].clone();
    let mut other = Agent::new();
    Poller::once(&server, &other.full()).await;
    assert_eq!(server.agent(agent.uid).await.unwrap()["updated_at"], updated);
}

/// an older report once more is no copy of the last one, but disorder.
#[tokio::test]
async fn r_005_only_the_last_report_can_be_a_copy() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let (older, newer) = (agent.report(), agent.report());
    assert_acknowledged(&socket.exchange(&older).await, agent.uid);
    assert_acknowledged(&socket.exchange(&newer).await, agent.uid);
    assert_acknowledged(&socket.exchange(&newer).await, agent.uid);
    assert_eq!(socket.exchange(&older).await.flags, FULL_STATE);
}

/// S-046: an agent of which only a bare report is known is asked, once, on each transport.
#[tokio::test]
async fn s_046_a_bare_report_of_an_unknown_agent_is_asked_once() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, offer) = Socket::greet(&server, &agent.bare()).await;
    assert_eq!(offer.flags, FULL_STATE);
    for _ in 0..3 {
        assert_acknowledged(&socket.exchange(&agent.bare()).await, agent.uid);
    }
    assert_acknowledged(&socket.exchange(&agent.full()).await, agent.uid);
    let other = Agent::new();
    let mut poller = Poller::connect(&server).await;
    assert_eq!(poller.exchange(&other.bare()).await.flags, FULL_STATE);
    assert_acknowledged(&poller.exchange(&other.bare()).await, other.uid);
}

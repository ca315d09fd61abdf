//! SIGTERM to the real binary: everything is on record before anybody is told, and the next start knows.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::join_all;
use opamp_server::healthcheck;
use rustix::process::Signal;
use serde_json::json;
use tokio::time::Instant;

use crate::harness::Database;
use crate::harness::agent::{Agent, Poller, Received, Socket, assert_acknowledged};
use crate::harness::server::{Process, SOON, TestServer, eventually, moment};

/// How long stopping may take, `shutdown.drain` included.
const LIMIT: Duration = Duration::from_secs(6);

/// Drains for a second at most.
const QUICK: [(&str, &str); 1] = [("OPAMP_SHUTDOWN_DRAIN", "1s")];

/// Rows `server_shutdown` are written before the Close frames, the exit code is 0, and nobody is asked again.
#[tokio::test]
async fn sigterm_ends_everything_on_record_and_the_next_start_asks_nobody_who_continues() {
    let database = Database::sqlite();
    let server = Process::start(&database, &QUICK).await;
    let mut agents: Vec<Agent> = (0..5).map(|_| Agent::new()).collect();
    let mut sockets = Vec::new();
    for agent in &mut agents {
        let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
        assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
        sockets.push(socket);
    }
    let mut poller = Agent::new();
    Poller::once(&server, &poller.full()).await;
    Poller::once(&server, &poller.report()).await;
    let mut lonely = Socket::connect(&server).await;

    let started = Instant::now();
    server.signal(Signal::TERM);
    let raw = database.raw().await;
    for (socket, agent) in sockets.iter_mut().zip(&agents) {
        assert_eq!(socket.closed().await, (1012, "server_shutdown".to_owned()));
        let text = format!(
            "SELECT count(*) FROM agent_connection_history WHERE disconnect_reason = 'server_shutdown' AND agent_id = {}",
            raw.literal(agent.uid)
        );
        assert_eq!(raw.number(text).await, 1, "on record before the Close frame");
    }
    assert_eq!(lonely.closed().await.0, 1012, "nobody was on it");
    let (code, logs) = server.exit().await;
    assert_eq!(code, Some(0), "{logs:?}");
    assert!(started.elapsed() < LIMIT, "{:?}", started.elapsed());
    assert_eq!(
        raw.number("SELECT count(*) FROM agent_connection_history WHERE disconnected_at IS NULL").await,
        0
    );
    assert_eq!(raw.number("SELECT count(*) FROM nodes WHERE ended_at IS NULL").await, 0);

    let server = Process::start(&database, &QUICK).await;
    for agent in &mut agents {
        let (socket, offer) = Socket::greet(&server, &agent.report()).await;
        assert_acknowledged(&offer, agent.uid);
        let rows = server.history(agent.uid).await;
        assert_eq!(rows[1]["disconnect_reason"], "server_shutdown");
        drop(socket);
    }
    assert_acknowledged(&Poller::once(&server, &poller.report()).await, poller.uid);
    assert!(server.logged("connections that a lost server left open were ended as server_lost").is_empty());
    server.signal(Signal::TERM);
    assert_eq!(server.exit().await.0, Some(0));
}

/// A second SIGTERM ends at once, although a peer is still waited for; what was promised is on record.
#[tokio::test]
async fn a_second_sigterm_ends_at_once() {
    let database = Database::sqlite();
    let server = Process::start(&database, &[("OPAMP_SHUTDOWN_DRAIN", "60s")]).await;
    let mut agent = Agent::new();
    // Never read again: its Close is not answered, and stopping would wait for it.
    let (_socket, _) = Socket::greet(&server, &agent.full()).await;
    server.signal(Signal::TERM);
    eventually("stopping has begun", async || {
        let stopping = server.logged("SIGTERM: stopping; once more to stop at once");
        (!stopping.is_empty()).then_some(())
    })
    .await;
    let started = Instant::now();
    server.signal(Signal::TERM);
    let (code, logs) = server.exit().await;
    assert_eq!(code, Some(1), "{logs:?}");
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
}

/// SIGINT is an orderly stop as well.
#[tokio::test]
async fn sigint_stops_as_well() {
    let database = Database::sqlite();
    let server = Process::start(&database, &QUICK).await;
    server.signal(Signal::INT);
    assert_eq!(server.exit().await.0, Some(0));
}

/// While it stops nobody is admitted, and the probe says so.
#[tokio::test]
async fn a_stopping_server_admits_nobody() {
    let database = Database::sqlite();
    let server = Process::start(&database, &[("OPAMP_SHUTDOWN_DRAIN", "60s")]).await;
    let mut agent = Agent::new();
    let (_unread, _) = Socket::greet(&server, &agent.full()).await;
    server.signal(Signal::TERM);
    let body = eventually("the probe says that it stops", async || {
        let (status, body) = server.get("/readyz").await;
        (status == 503).then_some(body)
    })
    .await;
    assert!(body["status"].as_str().unwrap().contains("stopping"), "{body}");
    assert!(!Socket::is_let_in(&server).await);
    assert_eq!(server.get("/healthz").await.0, 200, "it lives");
    server.signal(Signal::KILL);
}

/// The end of a stop is not later than the deadline, also where a peer answers nothing.
#[tokio::test]
async fn a_peer_that_never_answers_delays_the_stop_only_so_long() {
    let database = Database::sqlite();
    let server = TestServer::on(&database, |config| config.shutdown.drain = Duration::from_millis(500)).await;
    let mut agent = Agent::new();
    let (mut unread, _) = Socket::greet(&server, &agent.full()).await;
    let started = Instant::now();
    server.stop().await.unwrap();
    assert!(started.elapsed() < Duration::from_millis(500) + Duration::from_secs(5));
    assert_eq!(unread.closed().await, (1012, "server_shutdown".to_owned()));
    let server = TestServer::on(&database, |_| {}).await;
    let row = server.history(agent.uid).await.remove(0);
    assert_eq!(row["disconnect_reason"], "server_shutdown");
    assert!(moment(&row["disconnected_at"]) <= moment(&row["disconnected_by"]), "{row}");
    let status = server.status(agent.uid).await;
    assert_eq!((&status["status"], &status["connected"]), (&json!("online"), &json!(false)));
}

/// An idle connection over plain HTTP, which would live for minutes, holds up nobody who stops.
#[tokio::test]
async fn an_idle_http_connection_does_not_hold_up_a_stop() {
    let server = TestServer::with(|config| config.shutdown.drain = Duration::from_mins(10)).await;
    let mut agent = Agent::new();
    let mut idle = Poller::connect(&server).await;
    idle.exchange(&agent.full()).await;
    let stopped = tokio::time::timeout(SOON, server.stop()).await;
    assert!(matches!(stopped, Ok(Ok(()))), "{stopped:?}");
    drop(idle);
}

/// Openings on their way when the server stops end on record, by the server's own word: the next
/// start has nothing to clean up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_in_the_middle_of_openings_leaves_no_row_open() {
    for round in 0..5 {
        let database = Database::sqlite();
        let server =
            TestServer::on(&database, |config| config.shutdown.drain = Duration::from_millis(200)).await;
        let ports = *server;
        let (begun, mut some_have) = tokio::sync::mpsc::channel(1_000);
        let greetings = (0..200).map(|_| {
            let begun = begun.clone();
            async move {
                let mut socket = Socket::connect(&ports).await;
                socket.send(&Agent::new().full()).await;
                begun.send(()).await.expect("the test listens");
                while !matches!(socket.receive().await, Received::Close(..) | Received::End) {}
            }
        });
        let stopping = async {
            for _ in 0..40 * (round + 1) {
                some_have.recv().await;
            }
            server.stop().await
        };
        // Who did not get in before the stop is refused, and its task ends in a panic of its own.
        let greetings = greetings.map(|greeting| AssertUnwindSafe(greeting).catch_unwind());
        let (stopped, _greeted) = tokio::join!(stopping, join_all(greetings));
        assert!(matches!(stopped, Ok(())), "round {round}: {stopped:?}");
        let raw = database.raw().await;
        let open = "SELECT count(*) FROM agent_connection_history WHERE disconnected_at IS NULL";
        assert_eq!(raw.number(open).await, 0, "round {round}");
        let others =
            "SELECT count(*) FROM agent_connection_history WHERE disconnect_reason <> 'server_shutdown'";
        assert_eq!(raw.number(others).await, 0, "round {round}");
    }
}

/// A name in use is refused at start, with a sentence that names the cure and exit code 1.
#[tokio::test]
async fn a_name_in_use_is_refused() {
    let database = Database::sqlite();
    let _holder = TestServer::on(&database, |_| {}).await;
    let refused = Process::refused(&database, &[("OPAMP_NODE_LEASE", "200ms")]).await;
    assert_eq!(refused.0, Some(1));
    assert!(refused.1.iter().any(|entry| {
        entry["message"].as_str().is_some_and(|text| text.contains("in use by another opamp-server"))
    }));
}

/// What a container's healthcheck asks is answered by the server of the same configuration, and by no other.
#[tokio::test]
async fn the_healthcheck_tells_whether_the_server_is_ready() {
    let server = TestServer::fresh().await;
    assert_eq!(healthcheck::ask(server.operators).await.unwrap(), r#"{"status":"ok"}"#);
    let ports = *server;
    server.stop().await.unwrap();
    let refused = healthcheck::ask(ports.operators).await.unwrap_err().to_string();
    assert!(refused.contains(&ports.operators.to_string()), "{refused}");
}

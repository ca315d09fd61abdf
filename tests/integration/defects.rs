//! Mistakes that other OpAMP servers make, each held off by a test that bears its name.

use std::time::Duration;

use futures_util::future::join_all;
use prost::Message as _;
use serde_json::json;

use crate::harness::Database;
use crate::harness::agent::{Agent, Poller, Socket, assert_acknowledged};
use crate::harness::server::{Process, TestServer, eventually, moment};

/// The record of a new agent is made after its first row, whose reference then fails: the first connection is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_connection_of_a_new_agent_is_missing() {
    let server = TestServer::fresh().await;
    let newcomers = (0..40).map(|number: u32| {
        let ports = *server;
        async move {
            let mut agent = Agent::new();
            let first = agent.full();
            let socket = if number.is_multiple_of(2) {
                Some(Socket::greet(&ports, &first).await.0)
            } else {
                Poller::once(&ports, &first).await;
                None
            };
            // At once: what is promised is durable before the first answer.
            let rows = ports.history(agent.uid).await;
            assert_eq!(rows.len(), 1, "agent {number}");
            assert!(rows[0]["disconnected_at"].is_null(), "agent {number}");
            socket
        }
    });
    join_all(newcomers).await;
    assert_eq!(server.read("/api/v1/agents").await["total"], 40);
}

/// The close of an old link is taken for the agent's end, although the agent has long been connected anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_close_of_an_old_link_takes_the_new_one_offline() {
    let database = Database::sqlite();
    let server = TestServer::on(&database, |_| {}).await;
    let mut agent = Agent::new();
    let (mut present, _) = Socket::greet(&server, &agent.full()).await;
    for round in 2..=20 {
        let (newer, offer) = Socket::greet(&server, &agent.report()).await;
        assert_acknowledged(&offer, agent.uid);
        // The old one goes in turn with a Close, without one, and not by itself at all.
        match round % 3 {
            0 => present.say_goodbye().await,
            1 => present.break_off(),
            _ => {}
        }
        present = newer;
    }
    eventually("all older links are gone", async || {
        (server.metrics().await.value("opamp_links_open") < 1.5).then_some(())
    })
    .await;
    assert_acknowledged(&present.exchange(&agent.report()).await, agent.uid);
    let status = server.status(agent.uid).await;
    assert_eq!((&status["status"], &status["connected"]), (&json!("online"), &json!(true)));
    let rows = server.history(agent.uid).await;
    assert_eq!(rows.len(), 20);
    assert!(rows[1..].iter().all(|row| row["disconnect_reason"] == "superseded"), "{rows:?}");
    let changes = database.raw().await.number("SELECT count(*) FROM agent_status_log").await;
    assert_eq!(changes, 1, "it was online all the time");
    drop(present);
    server.stop().await.unwrap();
}

/// After a crash rows stay open for ever, or are ended with a moment that nobody observed.
#[tokio::test]
async fn a_crash_leaves_rows_open_for_ever() {
    let database = Database::sqlite();
    let timeout = [("OPAMP_HEARTBEAT_TIMEOUT", "2s")];
    let server = Process::start(&database, &timeout).await;
    let (mut agent, mut returning) = (Agent::new(), Agent::new());
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let (_other, _) = Socket::greet(&server, &returning.full()).await;
    let connected = moment(&server.status(agent.uid).await["last_connected_at"]);
    let proof = eventually("a later sign of life is on record", async || {
        socket.exchange(&agent.report()).await;
        let seen = moment(&server.status(agent.uid).await["last_seen_at"]);
        (seen > connected).then_some(seen)
    })
    .await;
    server.kill().await;

    let server = Process::start(&database, &timeout).await;
    let row = server.history(agent.uid).await.remove(0);
    assert_eq!(row["disconnect_reason"], "server_lost");
    assert!(moment(&row["disconnected_at"]) >= proof, "the last proof on record: {row}");
    let until = moment(&row["disconnected_by"]);
    assert!(moment(&row["disconnected_at"]) < until, "in between nobody knows: {row}");
    let status = server.status(agent.uid).await;
    assert_eq!((&status["status"], &status["connected"]), (&json!("online"), &json!(false)));
    let (mut other, offer) = Socket::greet(&server, &returning.report()).await;
    assert_eq!(offer.error_response, None);
    let status = eventually("who does not come back is offline", async || {
        other.exchange(&returning.report()).await;
        Some(server.status(agent.uid).await).filter(|status| status["status"] == "offline")
    })
    .await;
    assert_eq!(status["disconnect_reason"], "server_lost");
    let waited = moment(&status["since"]).since(until);
    assert!(waited >= Duration::from_secs(4), "it had the return time to come back: {waited:?}");
    assert_eq!(server.status(returning.uid).await["status"], "online", "who came back was never offline");
    let log = server.logged("agent status updated");
    assert_eq!(log.len(), 1, "{log:?}");
}

/// An agent that leaves and returns within the accuracy of a clock has one long stay instead of two.
#[tokio::test]
async fn two_stays_are_merged_into_one() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let mut poller = Poller::connect(&server).await;
    socket.exchange(&agent.farewell()).await;
    socket.exchange(&agent.report()).await;
    socket.exchange(&agent.farewell()).await;
    poller.exchange(&agent.report()).await;
    poller.exchange(&agent.farewell()).await;
    poller.exchange(&agent.report()).await;
    let rows = server.history(agent.uid).await;
    assert_eq!(rows.len(), 4);
    assert!(rows[1..].iter().all(|row| row["disconnect_reason"] == "agent_disconnect"), "{rows:?}");
}

/// Each poll is counted as a connect and a disconnect.
#[tokio::test]
async fn polls_are_taken_for_connects() {
    let database = Database::sqlite();
    let server = TestServer::on(&database, |_| {}).await;
    let mut agent = Agent::new();
    Poller::once(&server, &agent.full()).await;
    for _ in 0..30 {
        assert_acknowledged(&Poller::once(&server, &agent.report()).await, agent.uid);
        assert_eq!(server.status(agent.uid).await["connected"], true, "also between two polls");
    }
    assert_eq!(server.history(agent.uid).await.len(), 1);
    let metrics = server.metrics().await;
    assert!((metrics.value("opamp_connections_opened_total{transport=\"http\"}") - 1.0).abs() < 0.5);
    assert!((metrics.value("opamp_connections_open{transport=\"http\"}") - 1.0).abs() < 0.5);
    let changes = database.raw().await.number("SELECT count(*) FROM agent_status_log").await;
    assert_eq!(changes, 1);
    server.stop().await.unwrap();
}

/// A metric with an agent's id as label grows with the fleet until the monitoring dies of it.
#[tokio::test]
async fn a_metric_is_labelled_with_agents_ids() {
    let server = TestServer::fresh().await;
    let mut agents: Vec<Agent> = (0..6).map(|_| Agent::new()).collect();
    let mut sockets = Vec::new();
    for agent in &mut agents[..4] {
        sockets.push(Socket::greet(&server, &agent.full()).await.0);
    }
    for agent in &mut agents[4..] {
        Poller::once(&server, &agent.full()).await;
        Poller::once(&server, &agent.farewell()).await;
    }
    sockets[0].exchange(&agents[0].farewell()).await;
    sockets.remove(1).break_off();
    server.until_ended(agents[1].uid).await;
    let text = server.metrics().await.0.to_lowercase();
    for agent in &agents {
        let uid = agent.uid.as_uuid();
        assert!(!text.contains(&uid.to_string()) && !text.contains(&uid.simple().to_string()), "{text}");
    }
    let series = text.lines().filter(|line| !line.starts_with('#')).count();
    for _ in 0..20 {
        Poller::once(&server, &Agent::new().full()).await;
    }
    let later = server.metrics().await.0.lines().filter(|line| !line.starts_with('#')).count();
    assert_eq!(series, later, "twenty more agents, not one series more");
}

/// Two registrations of one agent race, and the later one writes an empty "last seen" over the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_registrations_write_an_empty_last_seen() {
    let database = Database::sqlite();
    let server = TestServer::on(&database, |_| {}).await;
    let raw = database.raw().await;
    for round in 0..10 {
        let agent = Agent::new();
        let ports = *server;
        let greetings = (0..6).map(|number| {
            let first = Agent { number, ..agent.clone() }.full();
            async move {
                if number < 4 {
                    // Another may displace it before it is answered.
                    let mut socket = Socket::connect(&ports).await;
                    socket.send(&first).await;
                    socket.receive().await;
                    Some(socket)
                } else {
                    let answer = Poller::connect(&ports).await.post(&[], &first.encode_to_vec()).await;
                    assert!([200, 503].contains(&answer.status), "{}", answer.text());
                    None
                }
            }
        });
        let watching = async {
            // From the first moment it is known, it was seen.
            eventually("it is connected", async || {
                let record = ports.agent(agent.uid).await?;
                assert!(!record["last_seen_at"].is_null(), "round {round}: {record}");
                assert!(!record["last_connected_at"].is_null(), "round {round}: {record}");
                (record["connected"] == true).then_some(())
            })
            .await;
        };
        let (_sockets, ()) = tokio::join!(join_all(greetings), watching);
        let record = ports.agent(agent.uid).await.unwrap();
        assert!(!record["last_seen_at"].is_null(), "round {round}: {record}");
        assert_eq!(
            (&record["status"], &record["connected"]),
            (&json!("online"), &json!(true)),
            "round {round}"
        );
        let open = format!(
            "SELECT count(*) FROM agent_connection_history WHERE disconnected_at IS NULL AND agent_id = {}",
            raw.literal(agent.uid)
        );
        assert_eq!(raw.number(open).await, 1, "round {round}: exactly one row is open");
        ports.history(agent.uid).await;
    }
    server.stop().await.unwrap();
}

/// Deleting an agent deletes what it did.
#[tokio::test]
async fn a_delete_destroys_the_history() {
    let database = Database::sqlite();
    let server = TestServer::on(&database, |_| {}).await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let target = format!("/api/v1/agents/{}", agent.uid);
    assert_eq!(server.ask("DELETE", &target, &[]).await.status, 409);
    assert_eq!(server.status(agent.uid).await["status"], "online", "who is connected is not deleted");
    socket.exchange(&agent.farewell()).await;
    let rows = server.history(agent.uid).await;
    assert_eq!(server.ask("DELETE", &target, &[]).await.status, 204);
    assert_eq!(server.status(agent.uid).await["status"], "retired");
    assert_eq!(server.read("/api/v1/agents").await["total"], 0);
    assert_eq!(server.history(agent.uid).await, rows);
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    assert_eq!(server.history(agent.uid).await.len(), 2, "it returns to the same record");
    drop(socket);
    server.stop().await.unwrap();
}

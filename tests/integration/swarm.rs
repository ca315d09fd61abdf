//! The swarm against the server: each way in which its agents misbehave leads to what the server promises about it.

#![expect(clippy::expect_used, reason = "in a test a panic with a sentence is the report")]

use std::time::Duration;

use crate::harness::server::{TestServer, eventually};
use crate::harness::swarm::Swarm;

/// A fleet over WebSockets whose first reports were all answered.
async fn connected(server: &TestServer, options: &[&str]) -> Swarm {
    let mut swarm = Swarm::start(&format!("ws://{}/v1/opamp", server.agents), options);
    swarm.event("connected").await;
    swarm
}

/// How many agents a summary counts under `key`.
async fn counted(server: &TestServer, key: &str) -> u64 {
    server.read("/api/v1/agents/summary").await[key].as_u64().expect("a count")
}

/// Waits until the server has heard so many farewells.
async fn farewells(server: &TestServer, wanted: f64) {
    eventually(&format!("{wanted} farewells were heard"), async || {
        let reason = "opamp_connections_ended_total{reason=\"agent_disconnect\"}";
        let heard = server.metrics().await.value(reason);
        ((heard - wanted).abs() < 0.5).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_silent_share_is_told_by_its_silence_and_nobody_else_is() {
    let server = TestServer::with(|config| config.heartbeat.timeout = Duration::from_secs(1)).await;
    let swarm = connected(&server, &["--agents", "40", "--interval", "200ms", "--silence", "10"]).await;
    eventually("the silent ones are offline", async || {
        (counted(&server, "offline").await == 4).then_some(())
    })
    .await;
    assert_eq!(counted(&server, "connected").await, 36);
    let result = swarm.quit().await;
    assert_eq!((&result["silent"], &result["connected"]), (&4.into(), &36.into()), "{result}");
    assert_eq!(result["reconnects"], 0, "no link was lost: {result}");
    assert!((server.metrics().await.value("opamp_agent_heartbeat_missed_total") - 4.0).abs() < 0.5);
    server.stop().await.expect("it stops");
}

#[tokio::test]
async fn changes_of_health_reach_the_store() {
    let server = TestServer::fresh().await;
    // Each agent once in 400 ms on average.
    let swarm = connected(&server, &["--agents", "20", "--health-change-rate", "50"]).await;
    eventually("somebody is unhealthy", async || (counted(&server, "unhealthy").await > 0).then_some(()))
        .await;
    let result = swarm.quit().await;
    assert!(result["latency_ms"]["change"]["count"].as_u64() > Some(0), "{result}");
    assert_eq!(result["full_state_requests"], 0, "{result}");
    server.stop().await.expect("it stops");
}

#[tokio::test]
async fn who_restarts_has_one_connection_after_the_other() {
    let server = TestServer::fresh().await;
    let swarm = connected(&server, &["--agents", "10", "--churn", "20"]).await;
    eventually("there were twice as many connections as agents", async || {
        let opened = server.metrics().await.value("opamp_connections_opened_total{transport=\"websocket\"}");
        (opened > 19.5).then_some(())
    })
    .await;
    let result = swarm.quit().await;
    assert!(result["restarts"].as_u64() >= Some(10), "{result}");
    assert_eq!(result["uids_reassigned"], 0, "a restart is no clone: {result}");
    assert_eq!(counted(&server, "total").await, 10);
    farewells(&server, result["farewells"].as_f64().expect("a count")).await;
    server.stop().await.expect("it stops");
}

#[tokio::test]
async fn agents_share_links() {
    let server = TestServer::fresh().await;
    let mut swarm = connected(&server, &["--agents", "50", "--multiplex", "20"]).await;
    assert_eq!(counted(&server, "connected").await, 50);
    assert!((server.metrics().await.value("opamp_links_open") - 3.0).abs() < 0.5, "two full ones and a rest");
    swarm.order("beat 5").await;
    let beaten = swarm.event("beaten").await;
    assert_eq!((&beaten["reports"], &beaten["missed"]), (&250.into(), &0.into()), "{beaten}");
    let result = swarm.quit().await;
    assert_eq!((&result["misaddressed_offers"], &result["farewells"]), (&0.into(), &50.into()), "{result}");
    eventually("nobody is connected", async || (counted(&server, "connected").await == 0).then_some(()))
        .await;
    farewells(&server, 50.0).await;
    server.stop().await.expect("it stops");
}

#[tokio::test]
async fn packed_polls_are_answered() {
    let server = TestServer::fresh().await;
    let url = format!("http://{}/v1/opamp", server.agents);
    let mut swarm = Swarm::start(&url, &["--agents", "10", "--gzip", "--report-bytes", "32768"]);
    swarm.event("connected").await;
    swarm.order("beat 3").await;
    assert_eq!(swarm.event("beaten").await["reports"], 30);
    let result = swarm.quit().await;
    assert_eq!(result["losses"], serde_json::json!({}), "{result}");
    server.stop().await.expect("it stops");
}

#[tokio::test]
async fn a_slow_reader_is_waited_for() {
    let server = TestServer::with(|config| config.heartbeat.timeout = Duration::from_secs(2)).await;
    let mut swarm =
        connected(&server, &["--agents", "4", "--slow-readers", "50", "--interval", "500ms"]).await;
    // The two others answer at once, these within their ten seconds.
    swarm.order("beat 1").await;
    let beaten = swarm.event("beaten").await;
    assert_eq!(beaten["reports"], 4, "{beaten}");
    assert!(beaten["seconds"].as_f64() > Some(2.0), "longer than the timeout: {beaten}");
    assert_eq!(counted(&server, "connected").await, 4);
    assert_eq!(swarm.quit().await["reconnects"], 0);
    server.stop().await.expect("it stops");
}

#[tokio::test]
async fn it_is_told_when_everybody_is_back() {
    let server = TestServer::fresh().await;
    let mut swarm = connected(&server, &["--agents", "5"]).await;
    let page = server.read("/api/v1/agents?limit=1").await;
    let agent = page["agents"][0]["id"].as_str().expect("an agent");
    let answer = server.ask("POST", &format!("/api/v1/agents/{agent}/reconnect"), &[]).await;
    assert_eq!(answer.status, 202, "{}", answer.text());
    let returned = swarm.event("returned").await;
    assert_eq!(returned["agents"], 5);
    let result = swarm.quit().await;
    assert_eq!((&result["reconnects"], &result["connected"]), (&1.into(), &5.into()), "{result}");
    assert_eq!(result["losses"], serde_json::json!({ "close_1012": 1 }), "{result}");
    server.stop().await.expect("it stops");
}

//! Several agents on one link: each is its own connection.

use std::time::Duration;

use opamp_server::proto::{AgentToServer, ComponentHealth, ServerErrorResponseType};
use serde_json::json;
use tokio_tungstenite::tungstenite::protocol::Message;

use crate::harness::agent::{
    Agent, HEARTBEATS, STATUS, Socket, VERDICT_DELAY, assert_acknowledged, error_of,
};
use crate::harness::server::{TestServer, eventually, moment};

use super::impatient;

/// Greets with each of `agents` on one link.
async fn gather(server: &TestServer, agents: &mut [Agent]) -> Socket {
    let mut socket = Socket::connect(server).await;
    for agent in agents {
        assert_acknowledged(&socket.exchange(&agent.full()).await, agent.uid);
    }
    socket
}

/// S-034: agents that share a link are told apart by uid, each with a row of its own.
#[tokio::test]
async fn s_034_agents_on_one_link_are_told_apart() {
    let server = TestServer::fresh().await;
    let mut agents = [Agent::new(), Agent::new(), Agent::new()];
    let mut socket = gather(&server, &mut agents).await;
    for agent in &mut agents {
        assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
        let rows = server.history(agent.uid).await;
        assert_eq!(rows.len(), 1);
        assert!(rows[0]["disconnected_at"].is_null());
    }
    let addresses: Vec<_> = [
        &server.history(agents[0].uid).await[0]["remote_addr"],
        &server.history(agents[1].uid).await[0]["remote_addr"],
    ]
    .map(Clone::clone)
    .into();
    assert_eq!(addresses[0], addresses[1], "the same peer");
}

/// S-061: one agent leaves a shared link; the others stay, and it may come back on the same one.
#[tokio::test]
async fn s_061_one_agent_leaves_a_shared_link_and_the_others_stay() {
    let server = TestServer::fresh().await;
    let mut agents = [Agent::new(), Agent::new(), Agent::new()];
    let mut socket = gather(&server, &mut agents).await;
    assert_acknowledged(&socket.exchange(&agents[1].farewell()).await, agents[1].uid);
    let row = &server.history(agents[1].uid).await[0];
    assert_eq!(row["disconnect_reason"], "agent_disconnect");
    assert!(row["disconnected_by"].is_null(), "the end was seen: {row}");
    let status = server.status(agents[1].uid).await;
    assert_eq!((&status["status"], &status["connected"]), (&json!("offline"), &json!(false)));
    for at in [0, 2] {
        assert_acknowledged(&socket.exchange(&agents[at].report()).await, agents[at].uid);
        assert_eq!(server.status(agents[at].uid).await["connected"], true);
    }
    assert_acknowledged(&socket.exchange(&agents[1].report()).await, agents[1].uid);
    assert_eq!(server.history(agents[1].uid).await.len(), 2, "a new association is a new row");
    assert_eq!(server.status(agents[1].uid).await["status"], "online");
}

/// S-062: when the transport closes, all agents on it are gone, with or without a goodbye.
#[tokio::test]
async fn s_062_a_close_ends_all_agents_on_the_link() {
    let server = TestServer::fresh().await;
    for (politely, reason) in [(true, "closed_by_agent"), (false, "connection_lost")] {
        let mut agents = [Agent::new(), Agent::new(), Agent::new()];
        let mut socket = gather(&server, &mut agents).await;
        if politely {
            socket.say_goodbye().await;
        } else {
            socket.break_off();
        }
        for agent in &agents {
            let row = server.until_ended(agent.uid).await;
            assert_eq!(row["disconnect_reason"], reason);
            assert!(row["disconnected_by"].is_null(), "the end was seen: {row}");
            assert_eq!(server.status(agent.uid).await["status"], "offline");
        }
    }
}

/// A protocol error on a shared link is the offence of one agent; for the others the server hangs up.
#[tokio::test]
async fn an_offence_on_a_shared_link_names_the_one_agent() {
    let server = TestServer::fresh().await;
    let mut agents = [Agent::new(), Agent::new(), Agent::new()];
    let mut socket = gather(&server, &mut agents).await;
    socket.exchange(&agents[1].report()).await;
    socket.send_message(Message::Text("offence".into())).await;
    assert_eq!(socket.closed().await.0, 1003);
    let offender = server.until_ended(agents[1].uid).await;
    assert_eq!(offender["disconnect_reason"], "protocol_error");
    assert_eq!(server.status(agents[1].uid).await["status"], "offline");
    for at in [0, 2] {
        let row = server.until_ended(agents[at].uid).await;
        assert_eq!(row["disconnect_reason"], "internal_error");
        let status = server.status(agents[at].uid).await;
        assert_eq!((&status["status"], &status["connected"]), (&json!("online"), &json!(false)));
    }
}

/// S-137: a link carries as many agents as allowed; more are told to come later, and leave no row.
#[tokio::test]
async fn more_agents_than_a_link_may_carry_are_told_to_come_later() {
    let server = TestServer::with(|config| config.agents.max_per_link = 2).await;
    let mut agents = [Agent::new(), Agent::new()];
    let mut socket = gather(&server, &mut agents).await;
    let mut third = Agent::new();
    error_of(&socket.exchange(&third.full()).await, ServerErrorResponseType::Unavailable);
    assert_eq!(server.agent(third.uid).await, None);
    assert_acknowledged(&socket.exchange(&agents[0].report()).await, agents[0].uid);
    socket.exchange(&agents[1].farewell()).await;
    third.number = 0;
    assert_acknowledged(&socket.exchange(&third.full()).await, third.uid);
}

/// S-057: on a shared link an agent with heartbeats lives by its own reports; the link's bytes are not its own.
#[tokio::test]
async fn s_057_on_a_shared_link_own_reports_are_the_signs_of_life() {
    let unknown = lives_by_its_own_reports(|talker, _| talker.report()).await;
    assert!(unknown < Duration::from_secs(1) + VERDICT_DELAY, "{unknown:?}");
}

/// S-057: nor are the changes of others, each of which the server takes a moment to store. For as long as that takes it
/// hears nobody on the link, and the verdict comes as much later.
#[tokio::test]
async fn s_057_on_a_shared_link_changes_of_others_are_no_signs_of_life() {
    let changes = |talker: &mut Agent, round| AgentToServer {
        health: Some(ComponentHealth { healthy: round % 2 == 0, ..ComponentHealth::default() }),
        ..talker.report()
    };
    lives_by_its_own_reports(changes).await;
}

/// Lets one of two agents speak until the other is taken for lost; answers for how long nothing was known of it.
async fn lives_by_its_own_reports(say: fn(&mut Agent, u32) -> AgentToServer) -> Duration {
    let server = TestServer::with(impatient).await;
    let mut round = 0;
    let mut agents = [Agent::with(STATUS | HEARTBEATS), Agent::with(STATUS | HEARTBEATS)];
    let mut socket = gather(&server, &mut agents).await;
    let [talker, silent] = &mut agents;
    eventually("the silent one is offline", async || {
        round += 1;
        let told = say(talker, round);
        assert_acknowledged(&socket.exchange(&told).await, talker.uid);
        (server.status(silent.uid).await["status"] == "offline").then_some(())
    })
    .await;
    let row = server.until_ended(silent.uid).await;
    assert_eq!(row["disconnect_reason"], "heartbeat_timeout");
    let unknown = moment(&row["disconnected_by"]).since(moment(&row["disconnected_at"]));
    assert_eq!(server.status(talker.uid).await["connected"], true);
    assert_acknowledged(&socket.exchange(&talker.report()).await, talker.uid);
    assert_eq!(server.history(talker.uid).await.len(), 1);
    assert_acknowledged(&socket.exchange(&silent.report()).await, silent.uid);
    assert_eq!(server.history(silent.uid).await.len(), 2, "it speaks again: a new stay");
    unknown
}

/// S-055: agents that promise no heartbeats live with their shared link.
#[tokio::test]
async fn s_055_without_heartbeats_an_agent_lives_with_its_shared_link() {
    let server = TestServer::with(impatient).await;
    let mut agents = [Agent::new(), Agent::new()];
    let mut socket = gather(&server, &mut agents).await;
    socket.answer_pings(6).await;
    for agent in &mut agents {
        assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
        assert_eq!(server.history(agent.uid).await.len(), 1);
        assert_eq!(server.status(agent.uid).await["status"], "online");
    }
}

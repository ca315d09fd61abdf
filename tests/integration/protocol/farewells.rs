//! `agent_disconnect` in all its forms, and events that are never remembered.

use opamp_server::proto::{
    AgentToServer, ConnectionSettingsRequest, CustomMessage, OpAmpConnectionSettingsRequest,
};
use prost::Message as _;
use serde_json::json;

use crate::harness::agent::{
    Agent, CONNECTION_SETTINGS, Poller, STATUS, Socket, assert_acknowledged, offer_in,
};
use crate::harness::frames::{BINARY, CLOSE, FIN, Frames, content, frame, framed};
use crate::harness::server::TestServer;

/// S-061: a farewell counts whatever number it has, with or without a mask, and with unknown fields inside.
#[tokio::test]
async fn s_061_a_farewell_counts_in_every_form() {
    let server = TestServer::fresh().await;
    for form in 0..4 {
        let mut agent = Agent::new();
        let (mut frames, _) = Frames::greet(&server, &agent.full()).await;
        let mut farewell = agent.farewell();
        match form {
            0 => {}
            1 => farewell.sequence_num += 100,
            2 => (farewell.sequence_num, farewell.capabilities) = (0, 0),
            _ => farewell.agent_disconnect = None,
        }
        let mut message = content(&farewell);
        if form == 3 {
            message.extend([0x4a, 0x02, 0x08, 0x07]);
        }
        frames.write(&frame(FIN | BINARY, &message)).await;
        let offer = frames.offer().await;
        assert_eq!((offer.error_response, offer.instance_uid), (None, agent.uid.as_bytes().to_vec()));
        let status = server.status(agent.uid).await;
        assert_eq!((&status["status"], &status["connected"]), (&json!("offline"), &json!(false)), "{form}");
        assert_eq!(status["disconnect_reason"], "agent_disconnect", "{form}");
    }
}

/// S-061: farewell and Close in one packet: the farewell is the end, answered where that still works (AMB-07).
#[tokio::test]
async fn s_061_a_farewell_and_a_close_in_one_packet_are_one_end() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut frames, _) = Frames::greet(&server, &agent.full()).await;
    let close = frame(FIN | CLOSE, &1000_u16.to_be_bytes());
    frames.write(&[framed(&agent.farewell()), close].concat()).await;
    assert_acknowledged(&frames.offer().await, agent.uid);
    assert_eq!(frames.receive().await, Some((CLOSE, 1000_u16.to_be_bytes().to_vec())));
    frames.ended().await;
    let rows = server.history(agent.uid).await;
    assert_eq!((rows.len(), &rows[0]["disconnect_reason"]), (1, &json!("agent_disconnect")));
}

/// S-061: farewell and FIN without a Close: the farewell is the end, not a lost connection.
#[tokio::test]
async fn s_061_a_farewell_and_a_fin_are_a_farewell() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut frames, _) = Frames::greet(&server, &agent.full()).await;
    frames.write(&framed(&agent.farewell())).await;
    frames.finish().await;
    let row = server.until_ended(agent.uid).await;
    assert_eq!(row["disconnect_reason"], "agent_disconnect");
    assert_eq!(server.history(agent.uid).await.len(), 1);
}

/// S-061: a farewell said twice, thrice, and under a new number each time, is one end.
#[tokio::test]
async fn s_061_a_farewell_said_again_is_one_end() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let farewell = agent.farewell();
    for _ in 0..3 {
        assert_acknowledged(&socket.exchange(&farewell).await, agent.uid);
        assert_acknowledged(&socket.exchange(&agent.farewell()).await, agent.uid);
    }
    let rows = server.history(agent.uid).await;
    assert_eq!((rows.len(), &rows[0]["disconnect_reason"]), (1, &json!("agent_disconnect")));
}

/// S-061, AMB-07: the agents of a link leave one by one, each is answered, and the link outlives them all for a while.
#[tokio::test]
async fn s_061_the_agents_of_a_link_leave_one_by_one() {
    let server = TestServer::fresh().await;
    let mut agents: Vec<Agent> = (0..10).map(|_| Agent::new()).collect();
    let mut socket = Socket::connect(&server).await;
    for agent in &mut agents {
        socket.exchange(&agent.full()).await;
    }
    for left in 1..=agents.len() {
        let agent = &mut agents[left - 1];
        assert_acknowledged(&socket.exchange(&agent.farewell()).await, agent.uid);
        let summary = server.read("/api/v1/agents/summary").await;
        assert_eq!((&summary["offline"], &summary["connected"]), (&json!(left), &json!(10 - left)));
    }
    assert_acknowledged(&socket.exchange(&agents[3].report()).await, agents[3].uid);
    assert_eq!(server.history(agents[3].uid).await.len(), 2, "the link still serves who returns");
}

/// S-061: over plain HTTP too, a farewell that brings a change is kept and ends the stay.
#[tokio::test]
async fn s_061_a_poll_that_says_goodbye_may_be_repeated() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    Poller::once(&server, &agent.full()).await;
    let farewell = agent.farewell();
    for _ in 0..3 {
        assert_acknowledged(&Poller::once(&server, &farewell).await, agent.uid);
    }
    let rows = server.history(agent.uid).await;
    assert_eq!((rows.len(), &rows[0]["disconnect_reason"]), (1, &json!("agent_disconnect")));
    assert_eq!(server.status(agent.uid).await["connected"], false);
}

/// a stranger's farewell leaves no record, whatever comes with it, and does not keep it from coming later.
#[tokio::test]
async fn r_022_a_strangers_farewell_leaves_nothing_and_bars_nothing() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let parting = AgentToServer { agent_disconnect: agent.farewell().agent_disconnect, ..agent.full() };
    let mut socket = Socket::connect(&server).await;
    assert_acknowledged(&socket.exchange(&parting).await, agent.uid);
    assert_eq!(server.agent(agent.uid).await, None);
    assert_acknowledged(&socket.exchange(&agent.full()).await, agent.uid);
    assert_eq!(server.status(agent.uid).await["status"], "online");
}

/// S-062: a link that breaks after some have left ends only those who stayed.
#[tokio::test]
async fn s_062_a_link_that_breaks_ends_those_who_stayed() {
    let server = TestServer::fresh().await;
    let mut agents = [Agent::new(), Agent::new(), Agent::new()];
    let mut socket = Socket::connect(&server).await;
    for agent in &mut agents {
        socket.exchange(&agent.full()).await;
    }
    socket.exchange(&agents[0].farewell()).await;
    socket.break_off();
    for (agent, reason) in agents.iter().zip(["agent_disconnect", "connection_lost", "connection_lost"]) {
        assert_eq!(server.until_ended(agent.uid).await["disconnect_reason"], reason);
    }
}

/// S-115, AMB-10: requests for connection settings, empty or with a CSR, are acknowledged and nothing more.
#[tokio::test]
async fn s_115_a_request_for_connection_settings_is_acknowledged_in_every_form() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::with(STATUS | CONNECTION_SETTINGS);
    let mut socket = Socket::connect(&server).await;
    for opamp in [None, Some(OpAmpConnectionSettingsRequest::default())] {
        let asks = ConnectionSettingsRequest { opamp };
        let report = AgentToServer { connection_settings_request: Some(asks), ..agent.full() };
        assert_acknowledged(&socket.exchange(&report).await, agent.uid);
    }
    let mut csr = content(&agent.report());
    // connection_settings_request.opamp.certificate_request.csr
    csr.extend([0x5a, 0x09, 0x0a, 0x07, 0x0a, 0x05, 0x0a, 0x03, b'C', b'S', b'R']);
    socket.send_bytes(csr).await;
    assert_acknowledged(&socket.offer().await, agent.uid);
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
}

/// S-047: a custom message and a request for settings are of their report alone: nothing of them is kept.
#[tokio::test]
async fn s_047_messages_and_requests_are_not_remembered() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut poller = Poller::connect(&server).await;
    poller.exchange(&agent.full()).await;
    let before = server.agent(agent.uid).await.unwrap();
    let message = CustomMessage {
        capability: "com.example.secret".to_owned(),
        r#type: "remember".to_owned(),
        data: vec![7; 1_000],
    };
    let report = AgentToServer {
        custom_message: Some(message),
        connection_settings_request: Some(ConnectionSettingsRequest::default()),
        ..agent.report()
    };
    assert_acknowledged(&poller.exchange(&report).await, agent.uid);
    let after = server.agent(agent.uid).await.unwrap();
    assert_eq!(after["updated_at"], before["updated_at"]);
    assert!(!after.to_string().contains("com.example"), "{after}");
}

/// S-130, S-127: custom messages of every shape are acknowledged, and no capability of our own is announced.
#[tokio::test]
async fn s_130_custom_messages_of_every_shape_are_acknowledged() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut poller = Poller::connect(&server).await;
    poller.exchange(&agent.full()).await;
    for (capability, data) in [("", 0), ("x", 0), ("com.example.big/v1", 1 << 20), ("no such name!", 1)] {
        let message = CustomMessage {
            capability: capability.to_owned(),
            r#type: String::new(),
            data: vec![0xff; data],
        };
        let report = AgentToServer { custom_message: Some(message), ..agent.report() };
        let answer = poller.post(&[], &report.encode_to_vec()).await;
        let offer = offer_in(&answer);
        assert_acknowledged(&offer, agent.uid);
        assert_eq!((offer.custom_capabilities, offer.custom_message), (None, None));
    }
}

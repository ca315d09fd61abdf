//! What is answered: one offer per report, addressed, with the mask, and nothing that is not served.

use opamp_server::proto::{
    AgentToServer, ConnectionSettingsRequest, CustomMessage, OpAmpConnectionSettingsRequest,
    ServerErrorResponseType,
};

use crate::harness::agent::{
    Agent, CONNECTION_SETTINGS, FULL_STATE, HEALTH, HEARTBEATS, Poller, STATUS, Socket, assert_acknowledged,
    error_of,
};
use crate::harness::server::TestServer;

/// S-025, S-026: every report is answered, in order, also with nothing to say.
#[tokio::test]
async fn s_025_every_report_is_answered() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::with(STATUS | HEARTBEATS);
    let mut socket = Socket::connect(&server).await;
    // All at once: nobody waits for an answer.
    socket.send(&agent.full()).await;
    for _ in 0..20 {
        socket.send(&agent.report()).await;
    }
    socket.send(&agent.bare()).await;
    for _ in 0..22 {
        assert_acknowledged(&socket.offer().await, agent.uid);
    }
    assert_acknowledged(&socket.exchange(&agent.farewell()).await, agent.uid);
}

/// S-027: an offer is addressed to the uid the agent used.
#[tokio::test]
async fn s_027_an_offer_is_addressed_to_its_agent() {
    let server = TestServer::fresh().await;
    let mut agents = [Agent::new(), Agent::new(), Agent::new()];
    let mut socket = Socket::connect(&server).await;
    for agent in &mut agents {
        assert_eq!(socket.exchange(&agent.full()).await.instance_uid, agent.uid.as_bytes());
    }
    for agent in &mut agents {
        assert_eq!(socket.exchange(&agent.report()).await.instance_uid, agent.uid.as_bytes());
    }
}

/// S-028, S-029, S-030: a failure is an error that travels alone, a success has none.
#[tokio::test]
async fn s_030_an_error_travels_alone_and_the_next_report_is_answered_normally() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut socket = Socket::connect(&server).await;
    let nameless = AgentToServer { instance_uid: vec![0; 16], ..agent.clone().full() };
    error_of(&socket.exchange(&nameless).await, ServerErrorResponseType::BadRequest);
    assert_acknowledged(&socket.exchange(&agent.full()).await, agent.uid);
}

/// S-032, R-005: each copy of a report is answered, with the same flags, and processed once.
#[tokio::test]
async fn s_032_each_copy_of_a_report_is_answered() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    agent.number += 3;
    let jump = agent.report();
    for copy in 0..3 {
        let offer = socket.exchange(&jump).await;
        assert_eq!(offer.flags, FULL_STATE, "copy {copy} is answered as the first one was");
        assert_eq!(offer.error_response, None);
    }
    let heartbeat = agent.report();
    for _ in 0..3 {
        assert_acknowledged(&socket.exchange(&heartbeat).await, agent.uid);
    }
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    let repeats = server.metrics().await.value("opamp_reports_total{kind=\"repeat\"}");
    assert!((repeats - 4.0).abs() < 0.5, "{repeats}");
}

/// R-005, AMB-05: over plain HTTP, where agents do repeat: the connection is one, and nobody is asked again.
#[tokio::test]
async fn r_005_a_repeated_poll_is_answered_and_processed_once() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let first = agent.full();
    for _ in 0..3 {
        assert_acknowledged(&Poller::once(&server, &first).await, agent.uid);
    }
    agent.number += 1;
    let jump = agent.report();
    for _ in 0..3 {
        assert_eq!(Poller::once(&server, &jump).await.flags, FULL_STATE);
    }
    assert_acknowledged(&Poller::once(&server, &agent.report()).await, agent.uid);
    assert_eq!(server.history(agent.uid).await.len(), 1);
}

/// the same number with other content is no copy but a gap.
#[tokio::test]
async fn r_005_the_same_number_with_other_content_is_a_gap() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    agent.number = 0;
    assert_eq!(socket.exchange(&agent.report()).await.flags, FULL_STATE);
}

/// S-035, S-036, S-037, S-040, R-001: the mask is in every offer, states status, and has no undefined bit.
#[tokio::test]
async fn s_035_the_mask_is_in_every_offer() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut socket = Socket::connect(&server).await;
    let mut masks = vec![socket.exchange(&agent.full()).await.capabilities];
    masks.push(socket.exchange(&agent.report()).await.capabilities);
    masks.push(socket.exchange(&agent.bare()).await.capabilities);
    agent.number += 1;
    masks.push(socket.exchange(&agent.report()).await.capabilities);
    masks.push(Poller::once(&server, &Agent::new().full()).await.capabilities);
    for mask in masks {
        assert_eq!(mask & 0x1, 0x1, "S-036: AcceptsStatus in {mask:#x}");
        assert_eq!(mask & !0x7f, 0, "S-037: undefined bits in {mask:#x}");
        assert_eq!(mask & 0x40, 0, "S-040: connection settings requests are not served: {mask:#x}");
    }
}

/// AMB-06, R-010: nobody is sent connection settings that no operator asked for, whatever an agent accepts.
#[tokio::test]
async fn amb_06_no_heartbeat_interval_is_offered_by_itself() {
    let server = TestServer::fresh().await;
    for capabilities in [HEARTBEATS, CONNECTION_SETTINGS, HEARTBEATS | CONNECTION_SETTINGS] {
        let mut agent = Agent::with(STATUS | capabilities);
        let (mut socket, offer) = Socket::greet(&server, &agent.full()).await;
        assert_acknowledged(&offer, agent.uid);
        for _ in 0..5 {
            assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
        }
    }
}

/// AMB-10: a request for connection settings is ignored, and the rest of the report processed.
#[tokio::test]
async fn amb_10_a_request_for_connection_settings_is_ignored() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::with(STATUS | CONNECTION_SETTINGS);
    let asks = ConnectionSettingsRequest { opamp: Some(OpAmpConnectionSettingsRequest::default()) };
    let first = AgentToServer { connection_settings_request: Some(asks), ..agent.full() };
    let (mut socket, offer) = Socket::greet(&server, &first).await;
    assert_acknowledged(&offer, agent.uid);
    assert_eq!(server.agent(agent.uid).await.unwrap()["name"], "collector", "the rest is processed");
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
}

/// S-130: a custom message of a capability nobody knows is acknowledged and nothing else.
#[tokio::test]
async fn s_130_an_unknown_custom_message_is_acknowledged() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let message = CustomMessage {
        capability: "com.example.pause".to_owned(),
        r#type: "pause".to_owned(),
        data: vec![7],
    };
    let report = AgentToServer { custom_message: Some(message), ..agent.report() };
    assert_acknowledged(&socket.exchange(&report).await, agent.uid);
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
}

/// a promised part that is missing is asked for once per connection, not with every report.
#[tokio::test]
async fn r_004_a_missing_promised_part_is_asked_for_once() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::with(STATUS | HEALTH);
    let mut first = agent.full();
    first.health = None;
    let (mut socket, offer) = Socket::greet(&server, &first).await;
    assert_eq!(offer.flags, FULL_STATE);
    for _ in 0..5 {
        assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    }
}

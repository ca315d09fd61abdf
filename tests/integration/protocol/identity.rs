//! Uids: requested, assigned, legacy, anonymous.

use opamp_server::agent::InstanceUid;
use opamp_server::proto::{AgentToServer, ServerErrorResponseType, ServerToAgent};
use serde_json::json;
use uuid::Uuid;

use crate::harness::agent::{Agent, FULL_STATE, Poller, REQUEST_UID, Socket, assert_acknowledged, error_of};
use crate::harness::server::{TestServer, moment};

/// The uid an offer assigns; checks that it asks for full state too.
fn assigned(offer: &ServerToAgent) -> InstanceUid {
    let Some(identification) = &offer.agent_identification else { panic!("no uid: {offer:?}") };
    let bytes = &identification.new_instance_uid;
    let Ok(uid) = Uuid::from_slice(bytes) else { panic!("S-052: 16 bytes, not {bytes:02x?}") };
    assert_eq!(uid.get_version_num(), 7, "S-052: UUIDv7");
    assert_eq!(offer.flags, FULL_STATE, "R-023");
    assert_eq!(offer.error_response, None);
    uid.into()
}

fn asking(agent: &mut Agent) -> AgentToServer {
    AgentToServer { flags: REQUEST_UID, ..agent.full() }
}

/// S-048, S-052, R-023: a requested uid comes in the reply; the temporary one retires, and the new record links to it.
#[tokio::test]
async fn s_048_a_requested_uid_is_given_and_the_temporary_one_retires() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let temporary = agent.uid;
    let (mut socket, offer) = Socket::greet(&server, &asking(&mut agent)).await;
    assert_eq!(offer.instance_uid, temporary.as_bytes(), "addressed to the temporary uid");
    let new = assigned(&offer);
    let old = server.status(temporary).await;
    assert_eq!((&old["status"], &old["connected"]), (&json!("retired"), &json!(false)));
    assert_eq!(server.history(temporary).await[0]["disconnect_reason"], "uid_reassigned");
    assert_eq!(server.read("/api/v1/agents").await["total"], 0, "hidden until the new uid is used");

    agent.uid = new;
    assert_acknowledged(&socket.exchange(&agent.full()).await, new);
    let record = server.agent(new).await.unwrap();
    assert_eq!((&record["status"], &record["connected"]), (&json!("online"), &json!(true)));
    assert_eq!(record["previous_id"], json!(temporary));
    let rows = server.history(new).await;
    assert_eq!(rows.len(), 1);
    let ended = moment(&server.history(temporary).await[0]["disconnected_at"]);
    assert!(ended <= moment(&rows[0]["connected_at"]), "the two stays do not overlap");
    assert_eq!(server.read("/api/v1/agents").await["total"], 1);
    socket.say_goodbye().await;
    assert_eq!(server.until_ended(new).await["disconnect_reason"], "closed_by_agent");
}

/// S-048, R-023: asked again before the new uid is used, the server gives the same one, on any link.
#[tokio::test]
async fn s_048_asked_again_before_its_use_the_same_uid_is_given() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, offer) = Socket::greet(&server, &asking(&mut agent)).await;
    let new = assigned(&offer);
    assert_eq!(assigned(&socket.exchange(&asking(&mut agent)).await), new);
    let (_other, offer) = Socket::greet(&server, &asking(&mut agent)).await;
    assert_eq!(assigned(&offer), new);
    assert_eq!(assigned(&Poller::once(&server, &asking(&mut agent)).await), new);
    for row in server.history(agent.uid).await {
        assert_eq!(row["disconnect_reason"], "uid_reassigned", "{row}");
    }
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 2, "one record each");
}

/// S-048: once the new uid is in use, the temporary one asked again is given another.
#[tokio::test]
async fn s_048_a_used_uid_is_not_given_again() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let first = assigned(&Poller::once(&server, &asking(&mut agent)).await);
    let mut renamed = Agent { uid: first, ..agent.clone() };
    assert_acknowledged(&Poller::once(&server, &renamed.full()).await, first);
    let second = assigned(&Poller::once(&server, &asking(&mut agent)).await);
    assert_ne!(first, second);
}

/// S-054: the agent's later reports count under the new uid; the link carries them like any other.
#[tokio::test]
async fn s_054_later_reports_use_the_new_uid() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, offer) = Socket::greet(&server, &asking(&mut agent)).await;
    agent.uid = assigned(&offer);
    for _ in 0..3 {
        assert_eq!(socket.exchange(&agent.full()).await.instance_uid, agent.uid.as_bytes());
    }
    assert_eq!(server.history(agent.uid).await.len(), 1);
}

/// who asks for a uid may come without one, and leaves no other record.
#[tokio::test]
async fn r_008_an_anonymous_agent_is_given_a_uid() {
    let server = TestServer::fresh().await;
    for uid in [Vec::new(), vec![0; 16]] {
        let mut agent = Agent::new();
        let report = AgentToServer { instance_uid: uid.clone(), ..asking(&mut agent) };
        let (mut socket, offer) = Socket::greet(&server, &report).await;
        assert_eq!(offer.instance_uid, uid, "echoed as it came");
        agent.uid = assigned(&offer);
        assert_acknowledged(&socket.exchange(&agent.full()).await, agent.uid);
        let record = server.agent(agent.uid).await.unwrap();
        assert_eq!(record["status"], "online");
        assert!(record["previous_id"].is_null(), "it has no past: {record}");
        let refused = AgentToServer { instance_uid: uid, ..agent.report() };
        error_of(&socket.exchange(&refused).await, ServerErrorResponseType::BadRequest);
    }
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 2);
}

/// a legacy uid is echoed as it came, and its agent is never sent a binary one.
#[tokio::test]
async fn r_009_a_legacy_uid_is_echoed_and_never_replaced() {
    let server = TestServer::fresh().await;
    let uid = b"01J3A8QXYZ0123456789ABCDEF".to_vec();
    let key: InstanceUid = "0190d48b-f7df-0044-3214-c74254b635cf".parse().unwrap();
    let mut agent = Agent { uid: key, ..Agent::new() };
    let first = AgentToServer { instance_uid: uid.clone(), ..agent.full() };
    let (mut socket, offer) = Socket::greet(&server, &first).await;
    assert_eq!(offer.instance_uid, uid);
    assert_eq!(server.status(key).await["status"], "online");
    let asks = AgentToServer { instance_uid: uid.clone(), flags: REQUEST_UID, ..agent.report() };
    let offer = socket.exchange(&asks).await;
    assert_eq!(offer.instance_uid, uid);
    assert_eq!(offer.agent_identification, None);
    assert_eq!(offer.error_response, None);
    let lower = AgentToServer { instance_uid: uid.to_ascii_lowercase(), ..agent.report() };
    assert_eq!(socket.exchange(&lower).await.instance_uid, uid.to_ascii_lowercase());
    assert_eq!(server.history(key).await.len(), 1, "it stays connected");
    assert_eq!(server.status(key).await["connected"], true);
}

/// a first report that says goodbye is answered and leaves nothing, on both transports.
#[tokio::test]
async fn r_022_a_farewell_that_comes_first_leaves_no_record() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (_socket, offer) = Socket::greet(&server, &agent.farewell()).await;
    assert_acknowledged(&offer, agent.uid);
    assert_acknowledged(&Poller::once(&server, &agent.farewell()).await, agent.uid);
    assert_eq!(server.agent(agent.uid).await, None);
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 0);
}

//! Uids on the wire: every length, legacy forms, requests over both transports, one uid in two places.

use std::collections::HashSet;

use opamp_server::agent::InstanceUid;
use opamp_server::proto::{AgentToServer, ServerErrorResponseType, ServerToAgent};
use prost::Message as _;
use serde_json::json;
use uuid::Uuid;

use crate::harness::agent::{
    Agent, FULL_STATE, Poller, REQUEST_UID, Socket, assert_acknowledged, error_of, offer_in,
};
use crate::harness::server::TestServer;

/// A legacy uid and the 16 bytes it stands for.
const LEGACY: (&[u8], &str) = (b"01J3A8QXYZ0123456789ABCDEF", "0190d48b-f7df-0044-3214-c74254b635cf");

fn assigned(offer: &ServerToAgent) -> InstanceUid {
    let Some(identification) = &offer.agent_identification else { panic!("no uid: {offer:?}") };
    let Ok(uid) = Uuid::from_slice(&identification.new_instance_uid) else { panic!("no uid: {offer:?}") };
    assert_eq!(offer.error_response, None);
    uid.into()
}

fn with_uid(uid: &[u8]) -> AgentToServer {
    AgentToServer { instance_uid: uid.to_vec(), ..Agent::new().full() }
}

/// a uid of any other length than 16 is `BadRequest`, echoed as far as that is sane, and leaves no record.
#[tokio::test]
async fn r_008_every_wrong_length_is_a_bad_request() {
    let server = TestServer::fresh().await;
    let mut socket = Socket::connect(&server).await;
    let mut poller = Poller::connect(&server).await;
    for length in (0..=64).chain([65, 100, 1_000, 100_000]).filter(|length| *length != 16) {
        let report = with_uid(&vec![0x41; length]);
        for offer in [socket.exchange(&report).await, poller.exchange(&report).await] {
            let text = error_of(&offer, ServerErrorResponseType::BadRequest);
            assert!(text.contains("16 bytes") && text.contains(&length.to_string()), "{length}: {text}");
            let echo = if length > 64 { &[][..] } else { &report.instance_uid };
            assert_eq!(offer.instance_uid, echo, "{length}");
        }
    }
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 0);
}

/// no uid at all, whatever else the report says, is `BadRequest`; so are 16 zero bytes.
#[tokio::test]
async fn r_008_a_report_of_nobody_is_a_bad_request() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    let nobody = Agent::new();
    for uid in [&[][..], &[0; 16]] {
        for mut report in [
            nobody.clone().full(),
            nobody.clone().report(),
            nobody.clone().farewell(),
            AgentToServer::default(),
        ] {
            report.instance_uid = uid.to_vec();
            error_of(&poller.exchange(&report).await, ServerErrorResponseType::BadRequest);
        }
    }
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 0);
}

/// no bit of a uid is looked at: any version, any variant, all ones, nearly all zeros.
#[tokio::test]
async fn r_007_no_bit_of_a_uid_is_looked_at() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    for byte in 0..=u8::MAX {
        let mut bytes = [0x11; 16];
        (bytes[6], bytes[8]) = (byte, byte.rotate_left(3));
        let mut agent = Agent { uid: InstanceUid::from_bytes(bytes), ..Agent::new() };
        assert_acknowledged(&poller.exchange(&agent.full()).await, agent.uid);
    }
    let mut nearly = [0; 16];
    nearly[15] = 1;
    let mut agent = Agent { uid: InstanceUid::from_bytes(nearly), ..Agent::new() };
    assert_acknowledged(&poller.exchange(&agent.full()).await, agent.uid);
    assert_eq!(server.read("/api/v1/agents").await["total"], 257);
}

/// S-027, R-009: a legacy uid is one agent over both transports, and every answer repeats it as it was written.
#[tokio::test]
async fn r_009_a_legacy_uid_is_one_agent_over_both_transports() {
    let server = TestServer::fresh().await;
    let key: InstanceUid = LEGACY.1.parse().unwrap();
    let mut agent = Agent { uid: key, ..Agent::new() };
    let legacy = |report: AgentToServer| AgentToServer { instance_uid: LEGACY.0.to_vec(), ..report };
    let (mut socket, offer) = Socket::greet(&server, &legacy(agent.full())).await;
    assert_eq!(offer.instance_uid, LEGACY.0);
    let offer = socket.exchange(&legacy(agent.farewell())).await;
    assert_eq!(offer.instance_uid, LEGACY.0);
    assert_eq!(server.status(key).await["status"], "offline");
    let offer = Poller::once(&server, &legacy(agent.report())).await;
    assert_eq!((offer.instance_uid.as_slice(), offer.flags), (LEGACY.0, 0));
    assert_acknowledged(&Poller::once(&server, &agent.report()).await, key);
    assert_eq!(server.read("/api/v1/agents").await["total"], 1, "text and bytes are one agent");
}

/// 26 bytes that are no legacy uid are a wrong length like any other.
#[tokio::test]
async fn r_009_what_only_looks_like_a_legacy_uid_is_a_bad_request() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    for uid in [
        b"81J3A8QXYZ0123456789ABCDEF",
        b"Z1J3A8QXYZ0123456789ABCDEF",
        b"01J3A8QXYZ0123456789ABCDEI",
        b"01J3A8QXYZ0123456789ABCDEL",
        b"01J3A8QXYZ0123456789ABCDEO",
        b"01J3A8QXYZ0123456789ABCDEU",
        b"01J3A8QXYZ-123456789ABCDEF",
        b"01J3A8QXYZ0123456789ABCDE ",
        b"\x000J3A8QXYZ0123456789ABCDEF",
    ] {
        let offer = poller.exchange(&with_uid(uid)).await;
        error_of(&offer, ServerErrorResponseType::BadRequest);
        assert_eq!(offer.instance_uid, uid);
    }
    for uid in [&LEGACY.0[..25], &[LEGACY.0, b"0"].concat()] {
        error_of(&poller.exchange(&with_uid(uid)).await, ServerErrorResponseType::BadRequest);
    }
}

/// S-048, AMB-23: over plain HTTP a requested uid comes in the very answer too, and the polls go on under it.
#[tokio::test]
async fn s_048_a_poll_is_given_a_uid_in_its_answer() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let temporary = agent.uid;
    let mut poller = Poller::connect(&server).await;
    let asks = AgentToServer { flags: REQUEST_UID, ..agent.full() };
    let offer = poller.exchange(&asks).await;
    assert_eq!((offer.instance_uid.as_slice(), offer.flags), (temporary.as_bytes().as_slice(), FULL_STATE));
    agent.uid = assigned(&offer);
    assert_acknowledged(&poller.exchange(&agent.full()).await, agent.uid);
    assert_acknowledged(&poller.exchange(&agent.report()).await, agent.uid);
    assert_eq!(server.status(temporary).await["status"], "retired");
    let record = server.agent(agent.uid).await.unwrap();
    assert_eq!((&record["status"], &record["previous_id"]), (&json!("online"), &json!(temporary)));
    assert_eq!(server.history(temporary).await[0]["disconnect_reason"], "uid_reassigned");
}

/// S-048: an agent that has been connected for a while may ask as well, in the middle of its reports.
#[tokio::test]
async fn s_048_a_connected_agent_may_ask_for_a_uid() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    socket.exchange(&agent.report()).await;
    let before = agent.uid;
    let asks = AgentToServer { flags: REQUEST_UID, ..agent.report() };
    agent.uid = assigned(&socket.exchange(&asks).await);
    assert_ne!(agent.uid, before);
    assert_acknowledged(&socket.exchange(&agent.full()).await, agent.uid);
    assert_eq!(server.read("/api/v1/agents").await["total"], 1);
}

/// S-048: on a shared link only the one that asks is given another uid.
#[tokio::test]
async fn s_048_on_a_shared_link_only_who_asks_is_renamed() {
    let server = TestServer::fresh().await;
    let (mut stays, mut asks) = (Agent::new(), Agent::new());
    let (mut socket, _) = Socket::greet(&server, &stays.full()).await;
    socket.exchange(&asks.full()).await;
    let request = AgentToServer { flags: REQUEST_UID, ..asks.report() };
    asks.uid = assigned(&socket.exchange(&request).await);
    assert_acknowledged(&socket.exchange(&stays.report()).await, stays.uid);
    assert_acknowledged(&socket.exchange(&asks.full()).await, asks.uid);
    assert_acknowledged(&socket.exchange(&stays.report()).await, stays.uid);
    assert_eq!(server.history(stays.uid).await.len(), 1);
}

/// S-052, R-008: agents without a uid are each given another one, of version 7, and none leaves a record before it is used.
#[tokio::test]
async fn s_052_anonymous_agents_are_each_given_another_uid() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    let mut socket = Socket::connect(&server).await;
    let mut uids = HashSet::new();
    for round in 0..50 {
        let uid = if round % 2 == 0 { Vec::new() } else { vec![0; 16] };
        let asks = AgentToServer { instance_uid: uid, flags: REQUEST_UID, ..Agent::new().full() };
        for offer in [poller.exchange(&asks).await, socket.exchange(&asks).await] {
            let uid = assigned(&offer);
            assert_eq!(uid.as_uuid().get_version_num(), 7);
            assert!(uids.insert(uid), "{uid} was given twice");
        }
    }
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 0);
}

/// who asks for a uid with one of a wrong length has a mistake to mend first.
#[tokio::test]
async fn r_008_a_request_with_a_uid_of_wrong_length_is_a_bad_request() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    for length in [1, 15, 17, 32, 36] {
        let asks = AgentToServer { flags: REQUEST_UID, ..with_uid(&vec![0; length]) };
        let offer = poller.exchange(&asks).await;
        error_of(&offer, ServerErrorResponseType::BadRequest);
        assert_eq!(offer.agent_identification, None);
    }
}

/// The header with the uid is for routers: absent, other, broken or repeated, it changes nothing.
#[tokio::test]
async fn s_027_the_uid_of_the_header_is_never_looked_at() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut poller = Poller::connect(&server).await;
    let own = agent.uid.to_string();
    for value in [own.as_str(), "", "not a uid", "00000000-0000-0000-0000-000000000000"] {
        let report = agent.full().encode_to_vec();
        let answer =
            poller.post(&[("OpAMP-Instance-UID", value), ("OpAMP-Instance-UID", value)], &report).await;
        assert_acknowledged(&offer_in(&answer), agent.uid);
    }
    assert_eq!(server.read("/api/v1/agents").await["total"], 1);
}

/// S-034: one uid twice on one link is one agent and one row, whoever stands behind it.
#[tokio::test]
async fn s_034_one_uid_twice_on_one_link_is_one_agent_until_they_are_told_apart() {
    let server = TestServer::fresh().await;
    let mut one = Agent::new();
    let mut other = one.clone();
    let (mut socket, _) = Socket::greet(&server, &one.full()).await;
    other.number = 100;
    assert_eq!(socket.exchange(&other.report()).await.flags, FULL_STATE, "their numbers do not meet");
    assert_eq!(socket.exchange(&one.report()).await.flags, FULL_STATE);
    assert_eq!(socket.exchange(&other.report()).await.flags, FULL_STATE);
    let offer = socket.exchange(&one.report()).await;
    assert!(offer.agent_identification.is_some(), "S-049: going back and forth, they are two: {offer:?}");
    let rows = server.history(one.uid).await;
    assert_eq!(rows.len(), 1);
    assert!(rows[0]["disconnected_at"].is_null());
}

/// S-051: one uid on link after link: each newcomer takes over, each older link is closed, one row is open.
#[tokio::test]
async fn s_051_one_uid_on_link_after_link_is_with_the_last() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut older, _) = Socket::greet(&server, &agent.full()).await;
    for links in 2..=6 {
        let (mut newer, offer) = Socket::greet(&server, &agent.report()).await;
        assert_acknowledged(&offer, agent.uid);
        assert_eq!(older.closed().await, (1008, "superseded".to_owned()));
        assert_acknowledged(&newer.exchange(&agent.report()).await, agent.uid);
        let rows = server.history(agent.uid).await;
        assert_eq!(rows.len(), links);
        assert!(rows[0]["disconnected_at"].is_null());
        assert!(rows[1..].iter().all(|row| row["disconnect_reason"] == "superseded"), "{rows:?}");
        older = newer;
    }
    assert_eq!(server.status(agent.uid).await["status"], "online");
}

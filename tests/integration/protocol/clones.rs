//! Two agents with one instance uid: told apart by their numbers, and one of them is given another uid.

use opamp_server::agent::InstanceUid;
use opamp_server::proto::{AgentToServer, ServerErrorResponseType, ServerToAgent};
use prost::Message as _;

use crate::harness::Database;
use crate::harness::agent::{Agent, FULL_STATE, Poller, Socket, assert_acknowledged, error_of};
use crate::harness::server::{Ports, TestServer};

/// The uid that an offer gives.
fn given(offer: &ServerToAgent) -> Option<InstanceUid> {
    let uid = offer.agent_identification.as_ref()?.new_instance_uid.as_slice();
    let uid = uid.try_into().unwrap_or_else(|_| panic!("16 bytes: {uid:?}"));
    Some(InstanceUid::from_bytes(uid))
}

async fn clones(server: &Ports) -> f64 {
    server.metrics().await.value("opamp_clones_total")
}

/// Connects with the next report of `agent`; answers the offer, too.
async fn redial(server: &Ports, agent: &mut Agent) -> (Socket, ServerToAgent) {
    let report = agent.full();
    Socket::greet(server, &report).await
}

/// S-049, S-050, S-051, S-052, AMB-21: the displaced agent returns and goes on with its own numbers: it gets a record and
/// a row under a new uid, durable before the offer that says so; the other one is left in peace.
#[tokio::test]
async fn s_049_a_clone_is_given_a_uid_of_its_own_and_displaces_nobody() {
    let database = Database::sqlite();
    let server = TestServer::on(&database, |_| {}).await;
    let mut first = Agent { number: 100, ..Agent::new() };
    let mut second = Agent { number: 5, ..first.clone() };
    let (mut displaced, _) = redial(&server, &mut first).await;
    assert_acknowledged(&displaced.exchange(&first.report()).await, first.uid);
    let (mut present, _) = redial(&server, &mut second).await;
    assert_eq!(displaced.closed().await, (1008, "superseded".to_owned()));

    let (mut returned, offer) = redial(&server, &mut first).await;
    let uid = given(&offer).unwrap();
    assert_eq!(offer.instance_uid, first.uid.as_bytes(), "S-027: addressed as it called itself");
    assert_ne!(uid, first.uid);
    let rows = server.history(uid).await;
    assert_eq!(rows.len(), 1, "durable before the offer");
    assert!(rows[0]["disconnected_at"].is_null());
    assert_acknowledged(&present.exchange(&second.report()).await, second.uid);

    let shared = first.uid;
    first.uid = uid;
    let full = first.full();
    assert_acknowledged(&returned.exchange(&full).await, uid);
    assert_eq!(server.agent(uid).await.unwrap()["status"], "online");
    let rows = server.history(shared).await;
    assert_eq!(rows.len(), 2, "one displacement for the pair: {rows:?}");
    assert_eq!(
        (&rows[1]["disconnect_reason"], rows[0]["disconnected_at"].is_null()),
        (&"superseded".into(), true)
    );
    assert!((clones(&server).await - 1.0).abs() < 0.5, "counted once");
}

/// Two agents that started together have the same numbers; repetition proves that they are two.
#[tokio::test]
async fn s_049_clones_that_started_together_are_told_apart_soon() {
    let server = TestServer::fresh().await;
    let first = Agent::new();
    let mut pair = [first.clone(), first.clone()];
    let mut links: [Option<Socket>; 2] = [None, None];
    let mut reassigned = None;
    for turn in 0..12 {
        let (socket, offer) = redial(&server, &mut pair[turn % 2]).await;
        links[turn % 2] = Some(socket);
        if let Some(uid) = given(&offer) {
            reassigned = Some(uid);
            break;
        }
    }
    let uid = reassigned.unwrap();
    let rows = server.history(first.uid).await;
    assert!(rows.len() <= 4, "after few displacements: {rows:?}");
    assert_eq!(server.history(uid).await.len(), 1);
}

/// An agent that dials again and again, its older links half open, is one agent.
#[tokio::test]
async fn an_agent_that_reconnects_is_no_clone_of_itself() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut half_open = Vec::new();
    for _ in 0..10 {
        let (socket, offer) = redial(&server, &mut agent).await;
        assert_eq!(given(&offer), None);
        half_open.push(socket);
    }
    // An older link's report that arrives late, and the newest link once more.
    let late = AgentToServer { sequence_num: agent.number - 2, ..agent.clone().full() };
    let (_late, offer) = Socket::greet(&server, &late).await;
    assert_eq!(given(&offer), None);
    let (_newest, offer) = redial(&server, &mut agent).await;
    assert_eq!(given(&offer), None);
    assert!(clones(&server).await < 0.5);
}

/// S-049 over polls: two pollers take turns on one row until their numbers tell them apart.
#[tokio::test]
async fn s_049_pollers_that_share_a_uid_are_told_apart() {
    let server = TestServer::fresh().await;
    let mut first = Agent { number: 1_000, ..Agent::new() };
    let mut second = Agent { number: 20, ..first.clone() };
    let shared = first.uid;
    let (mut one, mut two) = (Poller::connect(&server).await, Poller::connect(&server).await);
    let mut reassigned = None;
    for _ in 0..6 {
        if let Some(uid) = given(&one.exchange(&first.full()).await) {
            reassigned = Some((true, uid));
            break;
        }
        if let Some(uid) = given(&two.exchange(&second.full()).await) {
            reassigned = Some((false, uid));
            break;
        }
    }
    let (is_first, uid) = reassigned.unwrap();
    let (moved, stays) = if is_first { (&mut first, &mut second) } else { (&mut second, &mut first) };
    moved.uid = uid;
    for round in 0..3 {
        let offer = one.exchange(&moved.full()).await;
        assert_eq!((given(&offer), &offer.instance_uid[..]), (None, &uid.as_bytes()[..]), "round {round}");
        let offer = two.exchange(&stays.full()).await;
        assert_eq!(
            (given(&offer), offer.flags & FULL_STATE),
            (None, 0),
            "round {round}: nobody comes between"
        );
    }
    assert_eq!(server.history(shared).await.len(), 1);
    assert_eq!(server.history(uid).await.len(), 1);
    assert!((clones(&server).await - 1.0).abs() < 0.5, "counted once");
}

/// who ignores three such offers is answered `BadRequest`, and its link stays open.
#[tokio::test]
async fn r_024_a_clone_that_ignores_its_uid_is_refused_in_the_end() {
    let server = TestServer::fresh().await;
    let mut first = Agent { number: 100, ..Agent::new() };
    let mut second = Agent { number: 5, ..first.clone() };
    let (_displaced, _) = redial(&server, &mut first).await;
    let (mut present, _) = redial(&server, &mut second).await;
    let (mut deaf, offer) = redial(&server, &mut first).await;
    let uid = given(&offer).unwrap();
    for _ in 0..2 {
        assert_eq!(given(&deaf.exchange(&first.full()).await), Some(uid), "the same uid each time");
    }
    for _ in 0..3 {
        error_of(&deaf.exchange(&first.full()).await, ServerErrorResponseType::BadRequest);
    }
    assert_acknowledged(&present.exchange(&second.report()).await, second.uid);
    first.uid = uid;
    let offer = deaf.exchange(&first.full()).await;
    assert_eq!((given(&offer), offer.error_response), (None, None), "its link lives, and it may still obey");
}

/// A WebSocket and a poller that share a uid: whoever returns to its own numbers is the clone.
#[tokio::test]
async fn s_049_a_websocket_and_a_poller_that_share_a_uid_are_told_apart() {
    let server = TestServer::fresh().await;
    let mut socket_agent = Agent { number: 100, ..Agent::new() };
    let mut poll_agent = Agent { number: 5, ..socket_agent.clone() };
    let (mut displaced, _) = redial(&server, &mut socket_agent).await;
    let mut poller = Poller::connect(&server).await;
    assert_eq!(given(&poller.exchange(&poll_agent.full()).await), None);
    assert_eq!(displaced.closed().await.0, 1008);
    let (_returned, offer) = redial(&server, &mut socket_agent).await;
    assert!(given(&offer).is_some());
    assert_acknowledged(&poller.exchange(&poll_agent.report()).await, poll_agent.uid);
    let answer = poller.post(&[], &poll_agent.report().encode_to_vec()).await;
    assert_eq!(answer.status, 200);
}

/// The same across two nodes: the displaced one returns to the other node.
#[tokio::test]
async fn s_049_a_clone_is_told_apart_across_nodes() {
    let Some(database) = Database::postgres().await else { return };
    let a = TestServer::on(&database, |config| config.node.name = Some("a".to_owned())).await;
    let b = TestServer::on(&database, |config| config.node.name = Some("b".to_owned())).await;
    let mut first = Agent { number: 100, ..Agent::new() };
    let mut second = Agent { number: 5, ..first.clone() };
    let (_displaced, _) = redial(&a, &mut first).await;
    let (mut present, _) = redial(&b, &mut second).await;
    let (_returned, offer) = redial(&a, &mut first).await;
    let uid = given(&offer).unwrap();
    assert_acknowledged(&present.exchange(&second.report()).await, second.uid);
    assert_eq!(b.history(uid).await.len(), 1);
}

//! Plain HTTP: one row spans the polls, whichever node they reach.

use std::sync::Arc;
use std::time::Duration;

use opamp_server::close::CloseReason;
use opamp_server::store::{
    ConnectionEnd, NewConnection, PolledConnection, Sighting, Status, Store, Transport,
};

use crate::harness::Database;

use super::scene::{
    Node, assert_true_history, at, create, end, history, new_node, only_row, row, uid, update,
};

/// A poll of an agent that was seen in time goes on with its row: no new row, no displacement, the same beginning.
pub(super) async fn a_poll_in_time_goes_on_with_the_open_row(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let first = create(&store, node.poll(uid(1), at(10))).await;
    let next = create(&store, node.poll(uid(1), at(70))).await;
    assert_eq!((next.connection_id, next.connected_at), (first.connection_id, at(10)));
    assert_eq!((next.displaced, next.status), (None, None));
    let connection = only_row(&store, uid(1)).await;
    assert_eq!((connection.transport, connection.node_id), (Transport::Http, None));
    assert_eq!((connection.disconnected_at, connection.confirmed_until), (None, Some(at(70))));
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.connection_id, agent.last_connected_at), (Some(first.connection_id), Some(at(10))));
    assert_eq!((agent.transport.as_deref(), agent.last_seen_at), (Some("http"), Some(at(70))));
}

/// A poll later than the deadline is a new stay: the old one ended with its last poll, by silence.
pub(super) async fn a_poll_after_its_deadline_ends_the_row_and_opens_a_new_one(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let first = create(&store, node.poll(uid(1), at(10))).await;
    create(&store, node.poll(uid(1), at(50))).await;
    let next = create(&store, node.poll(uid(1), at(200))).await;
    assert_ne!(next.connection_id, first.connection_id);
    assert_eq!(next.displaced.map(|displaced| displaced.reason), Some(CloseReason::HeartbeatTimeout));
    let rows = history(&store, uid(1)).await;
    assert_eq!(rows[0].disconnect_reason.as_deref(), Some("heartbeat_timeout"));
    assert_eq!((rows[0].disconnected_at, rows[0].disconnected_by), (Some(at(50)), Some(at(200))));
    assert_eq!((rows[1].connected_at, rows[1].disconnected_at), (at(200), None));
    assert_true_history(&store, uid(1)).await;
}

/// A WebSocket of the same agent takes over from its polls.
pub(super) async fn a_websocket_ends_the_row_of_polls(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    create(&store, node.poll(uid(1), at(10))).await;
    let socket = node.open(uid(1), at(30)).await;
    assert_eq!(socket.displaced.map(|displaced| displaced.reason), Some(CloseReason::Superseded));
    let rows = history(&store, uid(1)).await;
    assert_eq!((rows[0].disconnected_at, rows[0].disconnected_by), (Some(at(10)), Some(at(30))));
    assert_eq!(row(&store, uid(1)).await.transport.as_deref(), Some("websocket"));
}

/// A poll of an agent that holds a WebSocket is a newcomer, however lately that one was seen.
pub(super) async fn a_poll_ends_the_row_of_a_websocket(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let socket = node.open(uid(1), at(10)).await;
    let poll = create(&store, node.poll(uid(1), at(20))).await;
    assert_ne!(poll.connection_id, socket.connection_id);
    assert_eq!(poll.displaced.map(|displaced| displaced.reason), Some(CloseReason::Superseded));
    assert_eq!(history(&store, uid(1)).await[0].disconnect_reason.as_deref(), Some("superseded"));
}

/// Polls may land anywhere: another node goes on with the row, and an end by either node counts.
pub(super) async fn a_poll_at_another_node_goes_on_with_the_row(store: Arc<dyn Store>) {
    let (a, b) = (Node::start(&store, "a", at(0)).await, Node::start(&store, "b", at(0)).await);
    let first = create(&store, a.poll(uid(1), at(10))).await;
    let next = create(&store, b.poll(uid(1), at(40))).await;
    assert_eq!(next.connection_id, first.connection_id);
    assert!(update(&store, b.report(&next, uid(1), at(40))).await);
    let ended = a.end(&first, uid(1), CloseReason::AgentDisconnect, at(50)).await;
    assert_eq!(ended.duration_seconds, Some(40));
    assert_eq!(row(&store, uid(1)).await.status, Status::Offline);
}

/// A poller sets its own pace, and that is on record: a slow one goes on with its row at any node, also
/// after a start, as long as it keeps to its pace.
pub(super) async fn a_slow_poller_keeps_its_row_over_a_start(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let first = create(&store, node.poll(uid(1), at(10))).await;
    assert_eq!((first.continued, first.poll_silence), (false, None));
    let pace = Duration::from_mins(30);
    let seen = Sighting {
        agent: uid(1),
        connection_id: first.connection_id,
        at: at(100),
        sequence_num: None,
        poll_silence: Some(pace),
    };
    assert_eq!(store.update_last_seen(&[seen]).await, Ok(1));
    let (node, found) = Node::start_as(&store, new_node("a", at(1_000))).await;
    assert_eq!(found.lost_connections, 0, "15 minutes of silence are nothing for it");
    let polled = store.list_polled_connections().await.expect("the store answers");
    assert_eq!(polled.iter().map(|poll| poll.poll_silence_ms).collect::<Vec<_>>(), [Some(1_800_000)]);
    let next = create(&store, node.poll(uid(1), at(1_900))).await;
    assert_eq!((next.connection_id, next.poll_silence), (first.connection_id, Some(pace)));
    let late = create(&store, node.poll(uid(1), at(3_701))).await;
    assert_eq!(late.displaced.map(|displaced| displaced.reason), Some(CloseReason::HeartbeatTimeout));
    assert_eq!(late.poll_silence, None, "a new row starts without a pace");
    let (_, found) = Node::start_as(&store, new_node("a", at(3_900))).await;
    assert_eq!(found.lost_connections, 1);
}

/// A verdict on a poller counts only if the store did not see the agent meanwhile.
pub(super) async fn a_verdict_on_a_poller_yields_to_a_later_poll(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let opened = create(&store, node.poll(uid(1), at(10))).await;
    let verdict = |seen| ConnectionEnd {
        disconnected_by: Some(at(110)),
        unless_seen_after: Some(at(seen)),
        ..node.end_of(&opened, uid(1), CloseReason::HeartbeatTimeout, at(seen))
    };
    let elsewhere = Sighting {
        agent: uid(1),
        connection_id: opened.connection_id,
        at: at(60),
        sequence_num: Some(3),
        poll_silence: None,
    };
    assert_eq!(store.update_last_seen(&[elsewhere]).await, Ok(1));
    let refused = end(&store, verdict(10)).await;
    assert_eq!((refused.duration_seconds, refused.status), (None, None));
    assert_eq!(only_row(&store, uid(1)).await.disconnected_at, None);
    assert_eq!(row(&store, uid(1)).await.connection_id, Some(opened.connection_id));
    assert_eq!(end(&store, verdict(60)).await.duration_seconds, Some(50));
    assert_eq!(row(&store, uid(1)).await.status, Status::Offline);
}

/// The verdict is decided on what the store holds once the agent's row is free, not on what it held before.
pub(super) async fn a_verdict_sees_the_poll_that_was_committed_while_it_waited(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    let opened = create(&store, node.poll(uid(1), at(10))).await;
    let (agent, seen) = (raw.literal(uid(1)), raw.moment(at(60)));
    let poll = [
        format!("UPDATE agents SET updated_at = {seen} WHERE id = {agent}"),
        format!("UPDATE agent_liveness SET last_seen_at = {seen} WHERE agent_id = {agent}"),
    ];
    let poll = raw.hold(&poll).await;
    let release = async {
        raw.until_somebody_waits().await;
        poll.commit().await;
    };
    let verdict = ConnectionEnd {
        unless_seen_after: Some(at(10)),
        ..node.end_of(&opened, uid(1), CloseReason::HeartbeatTimeout, at(10))
    };
    let (refused, ()) = tokio::join!(end(&store, verdict), release);
    assert_eq!(refused.duration_seconds, None);
    assert_eq!(row(&store, uid(1)).await.connection_id, Some(opened.connection_id));
}

/// What a starting node has to watch: open rows of polls, with the last poll and its number.
pub(super) async fn polled_connections_are_listed(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    assert_eq!(store.list_polled_connections().await, Ok(Vec::new()));
    let open = create(&store, node.poll(uid(1), at(10))).await;
    let mut seen = node.report(&open, uid(1), at(15));
    seen.sequence_num = Some(4);
    update(&store, seen).await;
    let left = create(&store, node.poll(uid(2), at(10))).await;
    node.end(&left, uid(2), CloseReason::AgentDisconnect, at(11)).await;
    node.open(uid(3), at(10)).await;
    let polled = PolledConnection {
        agent_id: uid(1),
        id: open.connection_id,
        connected_at: at(10),
        last_seen_at: at(15),
        sequence_num: Some(4),
        poll_silence_ms: None,
    };
    assert_eq!(store.list_polled_connections().await, Ok(vec![polled]));
}

/// A node that starts alone ends polls whose time was over before, and lets those go on that may still come.
pub(super) async fn a_start_ends_polls_that_stopped_and_keeps_the_others(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    create(&store, node.poll(uid(1), at(10))).await;
    let lively = create(&store, node.poll(uid(2), at(95))).await;
    let again = new_node("a", at(150));
    let (node, found) = Node::start_as(&store, again).await;
    assert_eq!((found.lost_connections, found.alone), (1, true));
    let stopped = only_row(&store, uid(1)).await;
    assert_eq!((stopped.disconnected_at, stopped.disconnected_by), (Some(at(10)), Some(at(150))));
    assert_eq!(only_row(&store, uid(2)).await.disconnected_at, None);
    let next = create(&store, NewConnection { ..node.poll(uid(2), at(160)) }).await;
    assert_eq!(next.connection_id, lively.connection_id);
}

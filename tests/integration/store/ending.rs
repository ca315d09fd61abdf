//! Ends: whose they are, what they do to the status, and how long a stay lasted.

use std::sync::Arc;
use std::time::Duration;

use opamp_server::close::{Cause, CloseReason};
use opamp_server::config::Ephemeral;
use opamp_server::store::{ConnectionEnd, Status, Store, Write};

use super::scene::{
    Node, RETURN_TIME, at, create, end, ended, history, only_row, row, status_log, uid, update, write_one,
};
use crate::harness::Database;

/// An end the agent caused: row, status, log and the clock of staleness, all at once.
pub(super) async fn an_end_the_agent_caused_makes_it_offline_at_once(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    let opened = node.open(uid(1), at(10)).await;
    let ended = node.end(&opened, uid(1), CloseReason::AgentDisconnect, at(25)).await;
    assert_eq!(ended.duration_seconds, Some(15));
    let change = ended.status.expect("the status changes");
    assert_eq!((change.from, change.to), (Some(Status::Online), Status::Offline));
    assert_eq!(
        (change.reason.as_str(), change.connection_id),
        ("agent_disconnect", Some(opened.connection_id))
    );
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.status, agent.status_since, agent.offline_at), (Status::Offline, at(25), None));
    assert_eq!((agent.connection_id, agent.transport, agent.remote_addr), (None, None, None));
    assert_eq!((agent.last_disconnected_at, agent.last_seen_at), (Some(at(25)), Some(at(25))));
    assert_eq!(agent.disconnect_reason.as_deref(), Some("agent_disconnect"));
    let (when, from, to, reason, connection) = status_log(&raw, uid(1)).await.remove(1);
    assert_eq!((when, from.as_deref(), to.as_str()), (at(25), Some("online"), "offline"));
    assert_eq!((reason.as_str(), connection), ("agent_disconnect", Some(opened.connection_id)));
    let stale = store.retire_stale_agents(at(85), Duration::from_mins(1), Ephemeral::None).await;
    assert_eq!(stale.expect("the sweep runs").len(), 1, "the clock of staleness runs since the end");
}

/// Each reason is stored as its word; only whose end it is decides about the status.
pub(super) async fn every_reason_is_one_word_and_has_one_effect(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let mut ends = Vec::new();
    for (number, reason) in (1..).zip(CloseReason::ALL) {
        let opened = node.open(uid(number), at(10)).await;
        ends.push(Write::UpdateConnection(node.end_of(&opened, uid(number), reason, at(20))));
    }
    store.write(&ends).await.expect("all ends share a batch");
    for (number, reason) in (1..).zip(CloseReason::ALL) {
        assert_eq!(only_row(&store, uid(number)).await.disconnect_reason.as_deref(), Some(reason.label()));
        let agent = row(&store, uid(number)).await;
        let expected = match (reason, reason.cause()) {
            (CloseReason::UidReassigned | CloseReason::Deleted, _) => (Status::Retired, None),
            (_, Cause::Agent) => (Status::Offline, None),
            (_, Cause::Server) => (Status::Online, Some(at(20).after(RETURN_TIME))),
        };
        assert_eq!((agent.status, agent.offline_at), expected, "{reason}");
        assert_eq!((agent.connection_id, agent.disconnect_reason.as_deref()), (None, Some(reason.label())));
    }
}

/// The server's own end accuses nobody; once the return time has passed, the verdict names that end.
pub(super) async fn an_end_the_server_caused_leaves_the_agent_online_until_its_return_time(
    database: &Database,
) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    let opened = node.open(uid(1), at(10)).await;
    let ended = node.end(&opened, uid(1), CloseReason::ServerShutdown, at(20)).await;
    assert_eq!((ended.duration_seconds, ended.status), (Some(10), None));
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.status, agent.status_since, agent.connection_id), (Status::Online, at(10), None));
    let due = at(20).after(RETURN_TIME);
    assert_eq!((agent.offline_at, store.next_overdue().await), (Some(due), Ok(Some(due))));
    let changes = store.update_overdue_status(due).await.expect("the verdicts fall");
    assert_eq!(changes.len(), 1, "{changes:?}");
    assert_eq!((changes[0].from, changes[0].to), (Some(Status::Online), Status::Offline));
    assert_eq!(changes[0].reason, "server_shutdown");
    assert_eq!(changes[0].connection_id, Some(opened.connection_id));
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.status, agent.status_since, agent.offline_at), (Status::Offline, due, None));
    let (when, _, to, reason, _) = status_log(&raw, uid(1)).await.remove(1);
    assert_eq!((when, to.as_str(), reason.as_str()), (due, "offline", "server_shutdown"));
    assert_eq!(store.next_overdue().await, Ok(None));
}

/// An agent that came back before the return time had passed was never offline.
pub(super) async fn who_returns_in_time_is_not_overdue(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let opened = node.open(uid(1), at(10)).await;
    node.end(&opened, uid(1), CloseReason::ReconnectRequested, at(20)).await;
    assert_eq!(node.open(uid(1), at(30)).await.status, None);
    assert_eq!(store.next_overdue().await, Ok(None));
    assert_eq!(store.update_overdue_status(at(1_000)).await, Ok(Vec::new()));
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.status, agent.status_since, agent.offline_at), (Status::Online, at(10), None));
}

/// Pending verdicts fall one by one, each at its own moment, and once.
pub(super) async fn a_pending_verdict_is_due_at_its_moment_and_not_before(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    for (number, left) in [(1, 20), (2, 30)] {
        let opened = node.open(uid(number), at(10)).await;
        node.end(&opened, uid(number), CloseReason::InternalError, at(left)).await;
    }
    let first = at(20).after(RETURN_TIME);
    assert_eq!(store.update_overdue_status(first.before(Duration::from_micros(1))).await, Ok(Vec::new()));
    let changes = store.update_overdue_status(first).await.expect("the verdicts fall");
    assert_eq!(changes.iter().map(|change| change.agent).collect::<Vec<_>>(), [uid(1)]);
    assert_eq!(store.next_overdue().await, Ok(Some(at(30).after(RETURN_TIME))));
    assert_eq!(store.update_overdue_status(first).await, Ok(Vec::new()));
    assert_eq!(row(&store, uid(2)).await.status, Status::Online);
}

/// The duration is whole seconds between the two bounds of the stay, cut, never rounded up.
pub(super) async fn a_duration_is_whole_seconds(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let hundred_years = 3_155_760_000;
    let cases = [
        (0, 0),
        (999_999, 0),
        (1_999_999, 1),
        (3_600_000_000, 3_600),
        (hundred_years * 1_000_000, 2_147_483_647),
    ];
    for (number, (micros, seconds)) in (1..).zip(cases) {
        let opened = node.open(uid(number), at(10)).await;
        let left = at(10).after(Duration::from_micros(micros));
        let ended = node.end(&opened, uid(number), CloseReason::ConnectionLost, left).await;
        assert_eq!(ended.duration_seconds, Some(seconds));
        let stored = only_row(&store, uid(number)).await.duration_seconds;
        assert_eq!(stored.map(i64::from), Some(seconds));
    }
}

/// Clocks that disagree cannot end a stay before it began, nor know of an end before it.
pub(super) async fn an_end_is_never_before_its_beginning(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let opened = node.open(uid(1), at(10)).await;
    let early = ConnectionEnd {
        disconnected_by: Some(at(8)),
        ..node.end_of(&opened, uid(1), CloseReason::HeartbeatTimeout, at(5))
    };
    assert_eq!(end(&store, early).await.duration_seconds, Some(0));
    let connection = only_row(&store, uid(1)).await;
    assert_eq!((connection.disconnected_at, connection.disconnected_by), (Some(at(10)), Some(at(10))));
    assert_eq!(row(&store, uid(1)).await.last_seen_at, Some(at(10)), "last seen does not go back either");
}

/// An end that was only noticed: last proof … the moment it was known, which is when the agent goes offline.
pub(super) async fn an_end_that_was_not_seen_has_two_bounds(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let opened = node.open(uid(1), at(10)).await;
    let silent = ConnectionEnd {
        disconnected_by: Some(at(80)),
        ..node.end_of(&opened, uid(1), CloseReason::HeartbeatTimeout, at(20))
    };
    end(&store, silent).await;
    let connection = only_row(&store, uid(1)).await;
    assert_eq!((connection.disconnected_at, connection.disconnected_by), (Some(at(20)), Some(at(80))));
    assert_eq!((connection.duration_seconds, connection.confirmed_until), (Some(10), None));
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.status_since, agent.last_disconnected_at), (at(80), Some(at(20))));
}

/// An end that overtakes a change on its way leaves the number of the stored state as it stands.
pub(super) async fn an_end_ahead_of_a_change_leaves_the_number(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    for (number, unsaved, left) in [(1, true, Some(1)), (2, false, None)] {
        let opened = node.open(uid(number), at(10)).await;
        update(&store, node.report(&opened, uid(number), at(12))).await;
        let end = node.end_of(&opened, uid(number), CloseReason::ServerShutdown, at(20));
        let end = ConnectionEnd { sequence_num: None, unsaved, ..end };
        write_one(&store, Write::UpdateConnection(end)).await.expect("it ends");
        let stored = store.get_agent(uid(number)).await.expect("the store answers").expect("it is on record");
        assert_eq!(stored.sequence_num, left);
    }
}

/// An end written twice is one end: the first one stands.
pub(super) async fn an_end_done_again_changes_nothing(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let opened = node.open(uid(1), at(10)).await;
    update(&store, node.report(&opened, uid(1), at(12))).await;
    node.end(&opened, uid(1), CloseReason::ClosedByAgent, at(20)).await;
    let before = (history(&store, uid(1)).await, store.get_agent(uid(1)).await);
    let again = node.end(&opened, uid(1), CloseReason::ServerShutdown, at(40)).await;
    assert_eq!((again.duration_seconds, again.status), (None, None));
    assert_eq!((history(&store, uid(1)).await, store.get_agent(uid(1)).await), before);
}

/// Who gave up a temporary uid left no agent behind that could be missed.
pub(super) async fn a_temporary_uid_is_retired_by_its_end(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let opened = create(&store, node.arrival(uid(1), at(10))).await;
    let mut written = store
        .write(&[Write::UpdateConnection(node.end_of(&opened, uid(1), CloseReason::UidReassigned, at(11)))])
        .await
        .expect("the end is written");
    let change = ended(written.remove(0)).status.expect("the status changes");
    assert_eq!((change.to, change.reason.as_str()), (Status::Retired, "uid_reassigned"));
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.status, agent.retired_at, agent.offline_at), (Status::Retired, Some(at(11)), None));
}

//! Records: deleting them, and uids that the server gives.

use std::sync::Arc;

use opamp_server::close::CloseReason;
use opamp_server::store::{Deleted, HistoryFilter, Status, Store};

use super::scene::{ALL, Node, at, delete, history, row, status_log, uid};
use crate::harness::Database;

/// A deleted agent is hidden; its record and its history stay.
pub(super) async fn a_deleted_agent_keeps_its_history(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    node.visit(uid(1), at(10), at(20)).await;
    let done = delete(&store, uid(1), at(30), false).await;
    assert_eq!((done.found, done.deleted, done.skipped_connected, done.next), (1, 1, 0, None));
    let change = done.changes.first().expect("it is deleted");
    assert_eq!((change.from, change.to), (Some(Status::Offline), Status::Retired));
    assert_eq!(change.reason, "deleted");
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.status, agent.status_since, agent.retired_at), (Status::Retired, at(30), Some(at(30))));
    assert_eq!(history(&store, uid(1)).await.len(), 1);
    assert_eq!(status_log(&raw, uid(1)).await.len(), 3);
    let again = delete(&store, uid(1), at(40), true).await;
    assert_eq!(again, Deleted { found: 1, ..Deleted::default() }, "once is enough");
    assert_eq!(row(&store, uid(1)).await.retired_at, Some(at(30)));
}

/// A connected agent is closed first: deleting it does nothing.
pub(super) async fn a_connected_agent_is_not_deleted(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    node.open(uid(1), at(10)).await;
    let before = store.get_agent(uid(1)).await;
    let done = delete(&store, uid(1), at(20), false).await;
    assert_eq!(done, Deleted { found: 1, skipped_connected: 1, ..Deleted::default() });
    assert_eq!(store.get_agent(uid(1)).await, before);
    assert_eq!(store.list_close_orders(node.id).await, Ok(Vec::new()));
}

/// Deleting bars nobody, and a pending verdict does not outlive it.
pub(super) async fn who_was_deleted_may_return(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let opened = node.open(uid(1), at(10)).await;
    node.end(&opened, uid(1), CloseReason::ServerShutdown, at(20)).await;
    let done = delete(&store, uid(1), at(21), false).await;
    assert_eq!(done.changes.first().and_then(|change| change.from), Some(Status::Online));
    assert_eq!(store.update_overdue_status(at(1_000)).await, Ok(Vec::new()));
    let returned = node.open(uid(1), at(1_010)).await;
    assert_eq!(returned.status.and_then(|change| change.from), Some(Status::Retired));
    assert_eq!(row(&store, uid(1)).await.status, Status::Online);
    assert_eq!(history(&store, uid(1)).await.len(), 2);
}

/// An agent that asks again before it used its new uid is told the same one; the records are linked.
pub(super) async fn a_uid_is_assigned_once_until_it_is_used(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let temporary = node.open(uid(1), at(10)).await;
    assert_eq!(store.assign_uid(uid(1), uid(2), at(11)).await, Ok(uid(2)));
    let record = row(&store, uid(2)).await;
    assert_eq!((record.status, record.previous_id), (Status::Retired, Some(uid(1).as_uuid())));
    assert_eq!((record.created_at, record.last_connected_at), (at(11), None));
    assert_eq!(store.assign_uid(uid(1), uid(3), at(12)).await, Ok(uid(2)));
    assert_eq!(store.get_agent_row(uid(3)).await, Ok(None));
    node.end(&temporary, uid(1), CloseReason::UidReassigned, at(13)).await;
    let opened = node.open(uid(2), at(14)).await;
    assert!(!opened.agent.known, "it never connected under this uid");
    let change = opened.status.expect("the status changes");
    assert_eq!((change.from, change.reason.as_str()), (None, "first_report"));
    let record = row(&store, uid(2)).await;
    assert_eq!((record.status, record.retired_at), (Status::Online, None));
    assert_eq!(record.previous_id, Some(uid(1).as_uuid()));
    assert_eq!(store.assign_uid(uid(1), uid(3), at(20)).await, Ok(uid(3)), "the other one is in use");
}

/// What was never seen is absent, not an error.
pub(super) async fn an_unknown_agent_is_nothing(store: Arc<dyn Store>) {
    assert_eq!(store.get_agent(uid(1)).await, Ok(None));
    assert_eq!(store.get_agent_row(uid(1)).await, Ok(None));
    assert_eq!(store.get_active_connection(uid(1)).await, Ok(None));
    assert_eq!(delete(&store, uid(1), at(0), true).await, Deleted::default());
    assert_eq!(store.order_reconnect(uid(1)).await, Ok(None));
    let page = store
        .list_connection_history(uid(1), HistoryFilter::default(), ALL)
        .await
        .expect("the store answers");
    assert_eq!((page.items.len(), page.total, page.more), (0, 0, false));
}

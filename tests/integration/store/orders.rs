//! Orders: which connection they are for, who reads them, and that a delete holds whatever happens.

use std::sync::Arc;

use opamp_server::close::CloseReason;
use opamp_server::store::{AgentFilter, CloseOrder, Deletion, Reconnect, Status, Store, Write};
use uuid::Uuid;

use super::scene::{Node, assert_true_history, at, create, delete, new_node, only_row, row, status_log, uid};
use crate::harness::Database;

/// An order is for the connection that is open now; the node that holds it reads it, nobody else, and its end clears it.
pub(super) async fn an_order_is_for_the_open_connection(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    assert_eq!(store.order_reconnect(uid(1)).await, Ok(None));
    let first = node.open(uid(1), at(10)).await;
    node.open(uid(2), at(10)).await;
    assert_eq!(store.order_reconnect(uid(1)).await, Ok(Some(Reconnect::Ordered(first.connection_id))));
    let order = CloseOrder {
        agent: uid(1),
        connection_id: first.connection_id,
        reason: CloseReason::ReconnectRequested,
    };
    assert_eq!(store.list_close_orders(node.id).await, Ok(vec![order]));
    assert_eq!(
        store.order_reconnect(uid(1)).await,
        Ok(Some(Reconnect::Ordered(first.connection_id))),
        "twice is once"
    );
    assert_eq!(store.list_close_orders(Uuid::now_v7()).await, Ok(Vec::new()));
    let orders = "SELECT count(*) FROM agents WHERE close_connection IS NOT NULL OR close_reason IS NOT NULL";
    assert_eq!(raw.number(orders).await, 1);
    let second = node.open(uid(1), at(20)).await;
    assert_eq!(store.list_close_orders(node.id).await, Ok(Vec::new()), "a newcomer was not meant");
    assert_eq!(raw.number(orders).await, 0);
    store.order_reconnect(uid(1)).await.expect("the store answers");
    node.end(&second, uid(1), CloseReason::ReconnectRequested, at(30)).await;
    assert_eq!(store.list_close_orders(node.id).await, Ok(Vec::new()));
    assert_eq!(raw.number(orders).await, 0);
    assert_eq!(store.order_reconnect(uid(1)).await, Ok(Some(Reconnect::NotConnected)));
    create(&store, node.poll(uid(3), at(10))).await;
    assert_eq!(store.order_reconnect(uid(3)).await, Ok(Some(Reconnect::NotWebsocket)));
    assert_eq!(row(&store, uid(1)).await.status, Status::Online, "an order changes no status");
}

/// A delete is more than a reconnect: it takes the place of one, and is not taken back by one.
pub(super) async fn a_delete_outweighs_a_reconnect(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    node.open(uid(1), at(10)).await;
    store.order_reconnect(uid(1)).await.expect("the store answers");
    delete(&store, uid(1), at(20), true).await;
    store.order_reconnect(uid(1)).await.expect("the store answers");
    let orders = store.list_close_orders(node.id).await.expect("the store answers");
    assert_eq!(orders.iter().map(|order| order.reason).collect::<Vec<_>>(), [CloseReason::Deleted]);
    assert_eq!(row(&store, uid(1)).await.status, Status::Online, "until its connection has ended");
}

/// Whatever ends the connection first, the agent was deleted; the row tells how it ended.
pub(super) async fn a_delete_holds_whatever_ends_the_connection(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    for (number, reason) in
        [(1, CloseReason::Deleted), (2, CloseReason::ConnectionLost), (3, CloseReason::ServerShutdown)]
    {
        let opened = node.open(uid(number), at(10)).await;
        let done = delete(&store, uid(number), at(20), true).await;
        assert_eq!((done.deleted, done.changes.len(), done.ended.len()), (1, 0, 0), "the end brings it");
        let ended = node.end(&opened, uid(number), reason, at(30)).await;
        assert_eq!(
            ended.status.map(|change| (change.to, change.reason)),
            Some((Status::Retired, "deleted".to_owned()))
        );
        let agent = row(&store, uid(number)).await;
        assert_eq!((agent.status, agent.retired_at, agent.offline_at), (Status::Retired, Some(at(30)), None));
        assert_eq!(only_row(&store, uid(number)).await.disconnect_reason.as_deref(), Some(reason.label()));
        let (_, from, to, why, id) = status_log(&raw, uid(number)).await.pop().expect("a change");
        assert_eq!((from.as_deref(), to.as_str(), why.as_str()), (Some("online"), "retired", "deleted"));
        assert_eq!(id, Some(opened.connection_id));
    }
    assert_eq!(store.update_overdue_status(at(10_000)).await, Ok(Vec::new()));
}

/// A node that was killed before it closed the connection of a deleted agent takes no delete back.
pub(super) async fn a_delete_survives_the_node_that_had_to_carry_it_out(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    let deleted = node.open(uid(1), at(10)).await;
    node.open(uid(2), at(10)).await;
    store.order_reconnect(uid(2)).await.expect("the store answers");
    delete(&store, uid(1), at(20), true).await;
    let (successor, found) = Node::start_as(&store, new_node("a", at(30))).await;
    assert_eq!(found.lost_connections, 2);
    assert_eq!(only_row(&store, uid(1)).await.disconnect_reason.as_deref(), Some("server_lost"));
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.status, agent.status_since, agent.offline_at), (Status::Retired, at(30), None));
    let (when, from, to, why, id) = status_log(&raw, uid(1)).await.pop().expect("a change");
    assert_eq!(
        (when, from.as_deref(), to.as_str(), why.as_str()),
        (at(30), Some("online"), "retired", "deleted")
    );
    assert_eq!(id, Some(deleted.connection_id));
    assert_eq!(row(&store, uid(2)).await.status, Status::Online);
    assert_eq!(raw.number("SELECT count(*) FROM agents WHERE close_connection IS NOT NULL").await, 0);
    successor.open(uid(1), at(40)).await;
    assert_eq!(row(&store, uid(1)).await.status, Status::Online, "it may return");
}

/// Who connects anew after the delete has returned: the order was for the connection before.
pub(super) async fn who_returns_before_the_order_is_carried_out_has_returned(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let old = node.open(uid(1), at(10)).await;
    delete(&store, uid(1), at(20), true).await;
    let new = node.open(uid(1), at(30)).await;
    assert_eq!(new.displaced.map(|displaced| displaced.connection_id), Some(old.connection_id));
    node.end(&old, uid(1), CloseReason::Deleted, at(31)).await;
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.status, agent.connection_id), (Status::Online, Some(new.connection_id)));
    assert_true_history(&store, uid(1)).await;
}

/// Nobody holds the polls of an agent: the delete ends them itself, between the last poll and now.
pub(super) async fn a_delete_ends_polls_itself(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let polled = create(&store, node.poll(uid(1), at(10))).await;
    assert_eq!(store.list_ended_connections(&[polled.connection_id]).await, Ok(Vec::new()));
    let done = delete(&store, uid(1), at(40), true).await;
    assert_eq!((done.deleted, done.ended), (1, vec![(CloseReason::Deleted, 0)]));
    assert_eq!(done.changes.first().map(|change| change.to), Some(Status::Retired));
    let ended = only_row(&store, uid(1)).await;
    assert_eq!((ended.disconnected_at, ended.disconnected_by), (Some(at(10)), Some(at(40))));
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.status, agent.connection_id), (Status::Retired, None));
    assert_eq!(
        store.list_ended_connections(&[polled.connection_id, 999]).await,
        Ok(vec![polled.connection_id])
    );
    create(&store, node.poll(uid(1), at(50))).await;
    assert_eq!(row(&store, uid(1)).await.status, Status::Online);
    assert_true_history(&store, uid(1)).await;
}

/// Many agents are deleted in batches of at most 1,000 a transaction; connected ones are counted and left alone.
pub(super) async fn a_delete_of_many_goes_by_batches(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let numbers: Vec<u32> = (0..2_003).collect();
    for part in numbers.chunks(1_000) {
        let arrivals: Vec<Write> =
            part.iter().map(|number| Write::CreateConnection(node.arrival(uid(*number), at(10)))).collect();
        let written = store.write(&arrivals).await.expect("they open");
        let ends: Vec<Write> = part
            .iter()
            .zip(written)
            .filter(|(number, _)| **number >= 3)
            .map(|(number, written)| {
                let opened = super::scene::opened(written);
                Write::UpdateConnection(node.end_of(
                    &opened,
                    uid(*number),
                    CloseReason::ClosedByAgent,
                    at(20),
                ))
            })
            .collect();
        store.write(&ends).await.expect("they end");
    }
    let filter = AgentFilter {
        connected: None,
        prefix: Some(uid(0).to_string()[..20].to_owned()),
        ..AgentFilter::default()
    };
    let deletion = Deletion { filter, force: false, at: at(30), node_id: node.id };
    let (mut after, mut batches) = (None, Vec::new());
    loop {
        let done = store.delete_agents(&deletion, after).await.expect("the store answers");
        batches.push((done.found, done.deleted, done.skipped_connected));
        after = done.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(batches, [(1_000, 997, 3), (1_000, 1_000, 0), (3, 3, 0)]);
    let left = store.summarize_agents().await.expect("the store answers");
    assert_eq!((left.total, left.online, left.retired), (3, 3, 2_000));
}

/// A filter holds for the agents as they are when they are deleted, not as they were a moment ago.
pub(super) async fn a_filter_is_looked_at_under_the_lock(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    if !raw.locks_rows() {
        return;
    }
    let node = Node::start(&store, "a", at(0)).await;
    node.visit(uid(1), at(10), at(20)).await;
    let returns = format!("UPDATE agents SET status = 'online' WHERE id = {}", raw.literal(uid(1)));
    let held = raw.hold(&[returns]).await;
    let filter = AgentFilter { statuses: vec![Status::Offline], ..AgentFilter::default() };
    let deletion = Deletion { filter, force: true, at: at(30), node_id: node.id };
    let (done, ()) = tokio::join!(store.delete_agents(&deletion, None), async {
        raw.until_somebody_waits().await;
        held.commit().await;
    });
    assert_eq!(done.expect("the store answers").found, 0);
    assert_eq!(row(&store, uid(1)).await.status, Status::Online);
}

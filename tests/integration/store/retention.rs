//! What is forgotten, and what never is.

use std::sync::Arc;

use opamp_server::clock::Moment;
use opamp_server::close::CloseReason;
use opamp_server::store::{Forgotten, Observer, Status, Store};
use uuid::Uuid;

use super::lists::found_by;
use super::scene::{Node, at, delete, history, row, status_log, uid, update};
use crate::harness::{Database, Kind};

/// Closed rows go by their end, changes of status by their moment; an open row never goes, however old.
pub(super) async fn what_is_past_its_time_is_forgotten_and_what_is_open_stays(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    node.visit(uid(1), at(10), at(20)).await;
    node.visit(uid(1), at(30), at(110)).await;
    let stays = node.open(uid(1), at(120)).await;
    let ancient = node.open(uid(2), at(5)).await;
    assert_eq!(
        store.forget(at(100)).await,
        // First reports of both, the first end and return of one.
        Ok(Forgotten { connections: 1, transitions: 4, agents: 0 })
    );
    let left: Vec<i64> = history(&store, uid(1)).await.iter().map(|row| row.id).collect();
    assert_eq!(left.len(), 2, "the row that ended later stays: {left:?}");
    assert!(left.contains(&stays.connection_id), "{left:?}");
    assert_eq!(history(&store, uid(2)).await[0].id, ancient.connection_id);
    assert_eq!(row(&store, uid(2)).await.status, Status::Online);
    assert_eq!(store.forget(at(100)).await, Ok(Forgotten::default()), "once is enough");
}

/// A retired agent goes once its history is gone; whoever is not retired stays, with or without history.
pub(super) async fn retired_agents_without_history_are_forgotten(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    let temporary = node.open(uid(1), at(10)).await;
    assert_eq!(store.assign_uid(uid(1), uid(2), at(11)).await, Ok(uid(2)));
    node.end(&temporary, uid(1), CloseReason::UidReassigned, at(12)).await;
    node.visit(uid(2), at(13), at(20)).await;
    node.visit(uid(3), at(10), at(20)).await;
    assert_eq!(
        store.forget(at(12)).await.map(|forgotten| forgotten.agents),
        Ok(0),
        "its row is not past its time"
    );
    assert_eq!(store.forget(at(1_000)).await.map(|forgotten| forgotten.agents), Ok(1));
    assert_eq!(store.get_agent_row(uid(1)).await, Ok(None));
    assert!(status_log(&raw, uid(1)).await.is_empty());
    let heir = row(&store, uid(2)).await;
    assert_eq!((heir.status, heir.previous_id), (Status::Offline, None), "nobody links to what is gone");
    assert_eq!(row(&store, uid(3)).await.status, Status::Offline, "offline is not forgotten");
    let returned = node.open(uid(1), at(2_000)).await;
    assert!(!returned.agent.known, "it starts anew");
}

/// What a forgotten agent said finds nobody, whoever comes after it.
pub(super) async fn attributes_are_forgotten_with_their_agent(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    for (number, zone) in [(1, "eu"), (2, "us")] {
        let opened = node.open(uid(number), at(10)).await;
        assert!(update(&store, node.described(&opened, uid(number), at(11), &[("zone", zone)])).await);
        node.end(&opened, uid(number), CloseReason::ClosedByAgent, at(12)).await;
    }
    delete(&store, uid(2), at(13), false).await;
    assert_eq!(store.forget(at(1_000)).await.map(|forgotten| forgotten.agents), Ok(1));
    assert_eq!(raw.number("SELECT count(*) FROM agent_attributes").await, 1);
    let heir = node.open(uid(3), at(2_000)).await;
    assert!(update(&store, node.described(&heir, uid(3), at(2_001), &[("zone", "asia")])).await);
    for (zone, expected) in [("eu", vec![uid(1)]), ("us", vec![]), ("asia", vec![uid(3)])] {
        assert_eq!(found_by(&store, &[("zone", zone)]).await, expected, "{zone}");
    }
    if database.kind() == Kind::Sqlite {
        let order =
            |what| format!("INSERT INTO agent_attribute_index (agent_attribute_index) VALUES ('{what}')");
        raw.execute(order("integrity-check")).await;
        // As docs/database.md tells to mend it.
        raw.execute(order("delete-all")).await;
        assert_eq!(found_by(&store, &[("zone", "asia")]).await, []);
        let anew = "INSERT INTO agent_attribute_index (rowid, pairs) SELECT number,
                (SELECT group_concat(hex(p.value), ' ') FROM json_each(pairs) p) FROM agent_attribute_sets";
        raw.execute(anew).await;
        raw.execute(order("integrity-check")).await;
        assert_eq!(found_by(&store, &[("zone", "asia")]).await, [uid(3)]);
    }
}

/// A backlog is worked off in batches of at most 1,000, each a transaction of its own.
pub(super) async fn much_is_forgotten_in_batches(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    node.visit(uid(1), at(10), at(20)).await;
    let copies = "INSERT INTO agent_connection_history
             (agent_id, connected_at, disconnected_at, duration_seconds, disconnect_reason, transport, node_seq, created_at)
         WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 1500)
         SELECT c.agent_id, c.connected_at, c.disconnected_at, c.duration_seconds, c.disconnect_reason, c.transport,
             c.node_seq, c.created_at
         FROM agent_connection_history c CROSS JOIN n";
    raw.execute(copies).await;
    let first = store.forget(at(100)).await.expect("the store answers");
    assert_eq!((first.connections, first.may_be_more()), (1_000, true));
    let second = store.forget(at(100)).await.expect("the store answers");
    assert_eq!((second.connections, second.may_be_more()), (501, false));
}

async fn horizon(store: &Arc<dyn Store>) -> Option<Moment> {
    let watch = store.watch(Observer { node: Uuid::nil(), now: at(9_000) }).await;
    watch.expect("the store answers").horizon()
}

/// What was deleted is a fact: it moves on with what is forgotten, never back, and not where nothing was there to forget.
pub(super) async fn how_far_history_was_forgotten_is_kept(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    node.visit(uid(1), at(10), at(20)).await;
    node.visit(uid(1), at(200), at(300)).await;
    assert_eq!(store.forget(at(5)).await, Ok(Forgotten::default()));
    assert_eq!(horizon(&store).await, None, "nothing was there");
    store.forget(at(100)).await.expect("the store answers");
    assert_eq!(horizon(&store).await, Some(at(100)));
    store.forget(at(150)).await.expect("the store answers");
    assert_eq!(horizon(&store).await, Some(at(100)), "nothing more was there");
    store.forget(at(400)).await.expect("the store answers");
    node.visit(uid(1), at(40), at(50)).await;
    store.forget(at(500)).await.expect("the store answers");
    let last = horizon(&store).await;
    assert_eq!(last, Some(at(500)));
    store.forget(at(450)).await.expect("the store answers");
    assert_eq!(horizon(&store).await, last, "it never goes back");
}

/// A row says until when nobody knew: it stays until that is past its time as well.
pub(super) async fn a_row_stays_while_it_speaks_of_later_time(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let opened = node.open(uid(1), at(10)).await;
    let mut unseen = node.end_of(&opened, uid(1), CloseReason::HeartbeatTimeout, at(20));
    unseen.disconnected_by = Some(at(80));
    super::scene::end(&store, unseen).await;
    assert_eq!(store.forget(at(50)).await.map(|forgotten| forgotten.connections), Ok(0));
    assert_eq!(store.forget(at(80)).await.map(|forgotten| forgotten.connections), Ok(0));
    assert_eq!(store.forget(at(81)).await.map(|forgotten| forgotten.connections), Ok(1));
}

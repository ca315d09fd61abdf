//! Nodes: what a start finds and ends, leases, and the lock on a name.

use std::sync::Arc;
use std::time::Duration;

use opamp_server::clock;
use opamp_server::close::CloseReason;
use opamp_server::config::Ephemeral;
use opamp_server::store::{Heir, Held, NodeStart, Peer, Status, Store, StoreError, Write};
use uuid::Uuid;

use super::scene::{
    Node, RETURN_TIME, assert_true_history, at, create, history, new_node, only_row, row, status_log, uid,
    update, write_one,
};
use crate::harness::{Database, Kind};

/// After a crash no row is open without an owner: last proof … this start; nobody is accused before the return time.
pub(super) async fn a_restart_ends_what_the_crash_left_open(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let crashed = Node::start(&store, "a", at(0)).await;
    let lost = crashed.open(uid(1), at(10)).await;
    update(&store, crashed.report(&lost, uid(1), at(25))).await;
    crashed.visit(uid(2), at(10), at(20)).await;
    assert_eq!(store.renew_node(crashed.id, at(30)).await, Ok(true));
    let (node, found) = Node::start_as(&store, new_node("a", at(100))).await;
    let unwatched = Some(Duration::from_secs(70));
    assert_eq!(found, NodeStart { lost_connections: 1, alone: true, unwatched });
    let connection = only_row(&store, uid(1)).await;
    assert_eq!((connection.disconnected_at, connection.disconnected_by), (Some(at(25)), Some(at(100))));
    assert_eq!(
        (connection.duration_seconds, connection.disconnect_reason.as_deref()),
        (Some(15), Some("server_lost"))
    );
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.status, agent.offline_at), (Status::Online, Some(at(100).after(RETURN_TIME))));
    assert_eq!((agent.connection_id, agent.last_disconnected_at), (None, Some(at(25))));
    assert_eq!(agent.disconnect_reason.as_deref(), Some("server_lost"));
    assert_eq!(only_row(&store, uid(2)).await.disconnect_reason.as_deref(), Some("closed_by_agent"));
    assert_eq!(status_log(&raw, uid(1)).await.len(), 1, "a crash changes no status");
    let returned = node.open(uid(1), at(110)).await;
    assert_eq!((returned.displaced, returned.status), (None, None));
    assert_true_history(&store, uid(1)).await;
}

/// A crashed node starts again while its agents arrive at a peer: nobody waits for anybody in a circle.
pub(super) async fn a_restart_meets_agents_that_flee_to_a_peer(database: &Database) {
    let (store, other) = (database.open().await, database.open().await);
    let peer = Node::start(&other, "b", at(0)).await;
    for round in 1..=10 {
        let crashed = Node::start(&store, "a", at(round * 100)).await;
        let arrivals = |node: &Node, second: i64| -> Vec<Write> {
            let arrival =
                |number| Write::CreateConnection(node.arrival(uid(number), at(round * 100 + second)));
            (0..200).map(arrival).collect()
        };
        store.write(&arrivals(&crashed, 1)).await.expect("they open");
        let flight = arrivals(&peer, 50);
        let again = new_node("a", at(round * 100 + 50));
        let (found, fled) = tokio::join!(store.start_node(&again), other.write(&flight));
        assert!(found.is_ok() && fled.is_ok(), "{found:?} {:?}", fled.err());
    }
    for number in 0..200 {
        assert_true_history(&store, uid(number)).await;
    }
}

/// Who was pending when the node died has the whole return time again once it is back.
pub(super) async fn a_restart_moves_pending_verdicts(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let opened = node.open(uid(1), at(10)).await;
    node.end(&opened, uid(1), CloseReason::ServerShutdown, at(20)).await;
    store.end_node(node.id, at(21)).await.expect("the node ends");
    Node::start(&store, "a", at(1_000)).await;
    let due = at(1_000).after(RETURN_TIME);
    assert_eq!(row(&store, uid(1)).await.offline_at, Some(due));
    assert_eq!(store.update_overdue_status(due.before(Duration::from_micros(1))).await, Ok(Vec::new()));
    let changes = store.update_overdue_status(due).await.expect("the verdicts fall");
    assert_eq!(changes.iter().map(|change| change.reason.as_str()).collect::<Vec<_>>(), ["server_shutdown"]);
}

/// An hour without any node is no hour of absence.
pub(super) async fn time_in_which_nobody_watched_makes_nobody_stale(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    node.visit(uid(1), at(10), at(20)).await;
    store.renew_node(node.id, at(50)).await.expect("the lease is renewed");
    let (_, found) = Node::start_as(&store, new_node("a", at(3_650))).await;
    assert_eq!(found.unwatched, Some(Duration::from_hours(1)));
    let stale_after = Duration::from_mins(10);
    let due = at(20 + 3_600 + 600);
    let early =
        store.retire_stale_agents(due.before(Duration::from_micros(1)), stale_after, Ephemeral::None).await;
    assert_eq!(early, Ok(Vec::new()));
    assert_eq!(
        store.retire_stale_agents(due, stale_after, Ephemeral::None).await.map(|swept| swept.len()),
        Ok(1)
    );
    assert_eq!(row(&store, uid(1)).await.last_disconnected_at, Some(at(20)), "the past itself stays");
}

/// Postgres serves several nodes: a start leaves what a living peer holds. On `SQLite` whoever starts is alone.
pub(super) async fn a_start_leaves_the_rows_of_a_living_peer(database: &Database) {
    let store = database.open().await;
    let peer = Node::start(&store, "a", at(0)).await;
    let held = peer.open(uid(1), at(10)).await;
    let polled = create(&store, peer.poll(uid(2), at(10))).await;
    peer.visit(uid(3), at(10), at(20)).await;
    let (_, found) = Node::start_as(&store, new_node("b", at(500))).await;
    let peers = database.kind() == Kind::Postgres;
    // It did not renew for so long that nobody can have watched.
    let unwatched = Some(Duration::from_secs(500));
    assert_eq!(found, NodeStart { lost_connections: if peers { 0 } else { 2 }, alone: !peers, unwatched });
    let fence = |opened: &opamp_server::store::Opened| peers.then_some(opened.connection_id);
    assert_eq!(row(&store, uid(1)).await.connection_id, fence(&held));
    assert_eq!(row(&store, uid(2)).await.connection_id, fence(&polled));
    assert_eq!(store.renew_node(peer.id, at(501)).await, Ok(peers));
    let (_, found) = Node::start_as(&store, new_node("c", at(502))).await;
    assert_eq!(found.unwatched, (!peers).then_some(Duration::from_secs(2)), "it renewed a moment ago");
    for number in [1, 2, 3] {
        assert_true_history(&store, uid(number)).await;
    }
}

fn heir(node: &Node, second: i64) -> Heir {
    Heir { node: node.id, at: at(second), return_time: RETURN_TIME, first_poll: Duration::from_secs(90) }
}

/// A node that does not renew is ended once, by one, with what it held; one that moved is left alone.
pub(super) async fn a_lost_node_is_ended_once(database: &Database) {
    let store = database.open().await;
    let lost = Node::start(&store, "a", at(0)).await;
    lost.open(uid(1), at(10)).await;
    let polled = create(&store, lost.poll(uid(2), at(10))).await;
    let peer = Node::start(&store, "b", at(20)).await;
    let other = Node::start(&store, "c", at(20)).await;
    if database.kind() == Kind::Sqlite {
        assert_eq!(store.list_peers(other.id).await, Ok(Vec::new()), "whoever starts is alone");
        return;
    }
    let peers = store.list_peers(peer.id).await.expect("the store answers");
    let seen = peers.iter().find(|peer| peer.id == lost.id).expect("it is on record").clone();
    assert_eq!(store.renew_node(lost.id, at(30)).await, Ok(true));
    assert_eq!(store.end_lost_node(&seen, &heir(&peer, 40)).await, Ok(None), "it moved");
    let seen = Peer { renewed_at: at(30), ..seen };
    assert_eq!(store.end_lost_node(&seen, &heir(&peer, 50)).await, Ok(Some(1)));
    assert_eq!(store.end_lost_node(&seen, &heir(&other, 50)).await, Ok(None), "once is enough");
    assert_eq!(store.renew_node(lost.id, at(51)).await, Ok(false));
    let rows = history(&store, uid(1)).await;
    assert_eq!(rows[0].disconnect_reason.as_deref(), Some("server_lost"));
    assert_eq!((rows[0].disconnected_at, rows[0].disconnected_by), (Some(at(10)), Some(at(50))));
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.status, agent.offline_at), (Status::Online, Some(at(50).after(RETURN_TIME))));
    assert_eq!(history(&store, uid(2)).await[0].disconnected_at, None, "polls belong to nobody");
    let late = write_one(&store, Write::CreateConnection(lost.arrival(uid(3), at(52)))).await;
    assert!(matches!(late, Err(StoreError::NodeEnded)), "who was ended opens nothing: {late:?}");
    // The row goes on at another node, so the fence alone would let it pass.
    let late = Write::UpdateAgent(Box::new(lost.report(&polled, uid(2), at(53))));
    let late = write_one(&store, late).await;
    assert!(matches!(late, Err(StoreError::NodeEnded)), "nor stores it what it read: {late:?}");
    let told = Write::UpdateAgent(Box::new(peer.report(&polled, uid(2), at(54))));
    assert!(write_one(&store, told).await.is_ok());
    let again = Peer { id: peer.id, renewed_at: at(20), ..seen };
    assert_eq!(store.end_lost_node(&again, &heir(&lost, 60)).await, Ok(None), "nor does it end anybody");
}

/// What an ended node left open after all is ended; the rows of living nodes are on record as theirs.
pub(super) async fn strays_of_ended_nodes_are_ended(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let gone = Node::start(&store, "a", at(0)).await;
    let stray = gone.open(uid(1), at(10)).await;
    let node = Node::start(&store, "b", at(20)).await;
    let own = node.open(uid(2), at(21)).await;
    let held = store.list_held_connections(node.id).await.expect("the store answers");
    assert_eq!(held, [Held { id: own.connection_id, agent: uid(2), last_seen_at: at(21) }]);
    raw.execute("UPDATE nodes SET ended_at = renewed_at WHERE name = 'a'").await;
    let ended = u64::from(database.kind() == Kind::Postgres);
    assert_eq!(
        store.end_strays(&heir(&node, 30)).await,
        Ok(ended),
        "SQLite ended it at the start of the other"
    );
    assert_eq!(store.end_strays(&heir(&node, 31)).await, Ok(0));
    let rows = history(&store, uid(1)).await;
    assert_eq!(
        (rows[0].id, rows[0].disconnect_reason.as_deref()),
        (stray.connection_id, Some("server_lost"))
    );
    assert_eq!(history(&store, uid(2)).await[0].disconnected_at, None);
}

/// Agents that fled from a dying node were not superseded by themselves: once its loss is known, that is the reason.
pub(super) async fn rows_displaced_since_the_last_renewal_of_a_lost_node_are_server_lost(
    database: &Database,
) {
    let store = database.open().await;
    let lost = Node::start(&store, "a", at(0)).await;
    let peer = Node::start(&store, "b", at(0)).await;
    for number in [1, 2] {
        lost.open(uid(number), at(10)).await;
    }
    peer.open(uid(1), at(20)).await;
    store.renew_node(lost.id, at(30)).await.expect("the store answers");
    peer.open(uid(2), at(40)).await;
    Node::start(&store, "a", at(100)).await;
    let reasons = [history(&store, uid(1)).await, history(&store, uid(2)).await]
        .map(|rows| rows[0].disconnect_reason.clone().expect("the row is ended"));
    let before = if database.kind() == Kind::Postgres { "superseded" } else { "server_lost" };
    assert_eq!(
        reasons,
        [before, "server_lost"],
        "SQLite knows at the start of another node that this one is gone"
    );
    assert_eq!(row(&store, uid(2)).await.disconnect_reason.as_deref(), Some("server_lost"));
    assert_true_history(&store, uid(1)).await;
    assert_true_history(&store, uid(2)).await;
}

/// A lease is renewed until its node is marked as ended; the mark stays.
pub(super) async fn an_ended_node_cannot_renew(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    assert_eq!(store.renew_node(node.id, at(5)).await, Ok(true));
    store.end_node(node.id, at(6)).await.expect("the node ends");
    store.end_node(node.id, at(7)).await.expect("a second end is no error");
    assert_eq!(store.renew_node(node.id, at(8)).await, Ok(false));
    assert_eq!(store.renew_node(Uuid::now_v7(), at(8)).await, Ok(false), "nobody knows this node");
}

/// Who starts under the same name ends the predecessor, which learns so from its own renewal.
pub(super) async fn a_node_that_was_replaced_cannot_renew(store: Arc<dyn Store>) {
    let predecessor = Node::start(&store, "a", at(0)).await;
    let node = Node::start(&store, "a", at(10)).await;
    assert_eq!(store.renew_node(predecessor.id, at(11)).await, Ok(false));
    assert_eq!(store.renew_node(node.id, at(11)).await, Ok(true));
}

/// A node knows whether there are others: until they are marked as ended, however late they renew.
pub(super) async fn peers_are_seen(database: &Database) {
    let store = database.open().await;
    let peers = async |node: &Node| {
        let peers = store.list_peers(node.id).await.expect("the store answers");
        peers.into_iter().map(|peer| peer.id).collect::<Vec<_>>()
    };
    let first = Node::start(&store, "a", at(0)).await;
    assert!(peers(&first).await.is_empty());
    let second = Node::start(&store, "b", at(1)).await;
    assert_eq!(peers(&first).await, [second.id]);
    let several = database.kind() == Kind::Postgres;
    assert_eq!(peers(&second).await, if several { vec![first.id] } else { vec![] }, "on SQLite there is one");
    store.end_node(first.id, at(2)).await.expect("the node ends");
    assert!(peers(&second).await.is_empty());
}

/// One process holds a name; when it is gone, the next one gets it.
pub(super) async fn a_node_name_has_one_holder(database: &Database) {
    let (first, second) = (database.open().await, database.open().await);
    assert_eq!(first.lock_node_name("a").await, Ok(true));
    assert_eq!(second.lock_node_name("a").await, Ok(false));
    let other = second.lock_node_name("b").await;
    assert_eq!(other, Ok(database.kind() == Kind::Postgres), "SQLite serves one process, whatever its name");
    first.close().await;
    await_lock(&second, "a").await;
    drop(first);
    drop(second);
    await_lock(&database.open().await, "a").await;
}

/// A database that drops its sessions has forgotten who holds a name: the holder takes it again when it asks.
pub(super) async fn a_lost_lock_on_a_name_is_taken_again(database: &Database) {
    let (holder, other, raw) = (database.open().await, database.open().await, database.raw().await);
    assert_eq!(holder.lock_node_name("a").await, Ok(true));
    if database.kind() == Kind::Postgres {
        let cut = "SELECT count(pg_terminate_backend(l.pid)) FROM pg_locks l
                   WHERE l.locktype = 'advisory' AND l.granted
                       AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())";
        assert_eq!(raw.number(cut).await, 1);
    }
    await_lock(&holder, "a").await;
    assert_eq!(other.lock_node_name("a").await, Ok(false), "it is held again");
}

async fn await_lock(store: &Arc<dyn Store>, name: &str) {
    let taken = async { while store.lock_node_name(name).await != Ok(true) {} };
    tokio::time::timeout(Duration::from_secs(10), taken).await.expect("the name is free again");
}

/// The store tells the time, and it passes.
pub(super) async fn the_time_is_the_databases(store: Arc<dyn Store>) {
    let (before, now) = (clock::host_now(), store.now().await.expect("the store answers"));
    assert!(now.since(before) < Duration::from_mins(1) && before.since(now) < Duration::from_mins(1));
    assert!(store.now().await.expect("the store answers") >= now);
}

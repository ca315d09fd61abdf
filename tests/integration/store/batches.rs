//! Batches: many writes as one transaction, whole or not at all, and two writers at once.

use std::sync::Arc;
use std::time::Duration;

use opamp_server::agent::InstanceUid;
use opamp_server::clock::Moment;
use opamp_server::close::CloseReason;
use opamp_server::store::{NewConnection, Opened, Sighting, Store, StoreError, Write, Written};
use uuid::Uuid;

use super::scene::{Node, assert_true_history, at, ended, opened, row, uid};
use crate::harness::{Database, Kind, Raw};

/// Agents that arrive together share a commit, and each gets its own row.
pub(super) async fn a_thousand_openings_are_one_transaction(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    let batch: Vec<Write> =
        (0..1_000).rev().map(|number| Write::CreateConnection(node.arrival(uid(number), at(10)))).collect();
    let written = store.write(&batch).await.expect("all open");
    let ids: Vec<i64> = written.into_iter().map(|written| opened(written).connection_id).collect();
    for (number, id) in (0..1_000).rev().zip(&ids).step_by(97) {
        assert_eq!(
            row(&store, uid(number)).await.connection_id,
            Some(*id),
            "each answer is that of its agent"
        );
        assert_true_history(&store, uid(number)).await;
    }
    let open = "SELECT count(*) FROM agent_connection_history h JOIN agents a ON a.connection_id = h.id AND a.id = h.agent_id";
    assert_eq!(raw.number(open).await, 1_000);
    assert_eq!(writers_of(&raw).await, 1, "one transaction wrote them all");
}

/// One flush stores the signs of life of a whole fleet within the time of a call, also where the database takes steps into
/// indexes for cheap, as on a fast disk, knows nothing of the fleet's size yet, and takes the batch for short.
pub(super) async fn a_large_fleet_is_stored_by_one_flush(database: &Database) {
    const AGENTS: u32 = 15_000;
    let mut url = database.url().to_owned();
    if url.starts_with("postgres") {
        url += if url.contains('?') { "&" } else { "?" };
        url += "options=-crandom_page_cost%3D1.1";
    }
    let store = opamp_server::store::open(&url, 2, true).await.expect("the store opens");
    let node = Node::start(&store, "a", at(0)).await;
    let mut fleet = (Vec::new(), Vec::new());
    for first in (0..AGENTS).step_by(1_000) {
        let agents: Vec<InstanceUid> = (first..first + 1_000).map(uid).collect();
        let arrivals = agents.iter().map(|agent| Write::CreateConnection(node.arrival(*agent, at(10))));
        let written = store.write(&arrivals.collect::<Vec<_>>()).await.expect("all open");
        fleet.0.extend(agents);
        fleet.1.extend(written.into_iter().map(opened));
    }
    let seen = sightings(&fleet.0, &fleet.1, at(20));
    assert_eq!(store.update_last_seen(&seen).await, Ok(AGENTS.into()));
}

/// How many transactions wrote the rows of the history, as far as the database can tell.
async fn writers_of(raw: &Raw) -> i64 {
    match raw {
        Raw::Sqlite(_) => 1,
        Raw::Postgres(_) => {
            raw.number("SELECT count(DISTINCT xmin::text) FROM agent_connection_history").await
        }
    }
}

/// One write that the database refuses undoes the whole batch, the others' new records included.
pub(super) async fn a_poisoned_batch_leaves_nothing_behind(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    let held = node.open(uid(1), at(10)).await;
    let before = (counts(&raw).await, store.get_agent(uid(1)).await);
    let unknown_node = NewConnection { node_id: Uuid::now_v7(), ..node.arrival(uid(3), at(20)) };
    let batch = [
        Write::UpdateAgent(Box::new(node.described(&held, uid(1), at(20), &[("service.name", "edge")]))),
        Write::CreateConnection(node.arrival(uid(2), at(20))),
        Write::CreateConnection(unknown_node),
    ];
    let refused = store.write(&batch).await;
    assert!(matches!(refused, Err(StoreError::Rejected(_))), "{refused:?}");
    assert_eq!((counts(&raw).await, store.get_agent(uid(1)).await), before);
    store.write(&batch[..2]).await.expect("the others are fine without it");
    let nul = NewConnection { remote_addr: "192.0.2.1\0".to_owned(), ..node.arrival(uid(4), at(30)) };
    let taken = store.write(&[Write::CreateConnection(nul)]).await;
    match database.kind() {
        Kind::Sqlite => assert!(taken.is_ok(), "{taken:?}"),
        Kind::Postgres => assert!(matches!(taken, Err(StoreError::Rejected(_))), "{taken:?}"),
    }
}

async fn counts(raw: &Raw) -> Vec<i64> {
    let mut counts = Vec::new();
    for table in
        ["agents", "agent_liveness", "agent_attributes", "agent_connection_history", "agent_status_log"]
    {
        counts.push(raw.number(format!("SELECT count(*) FROM {table}")).await);
    }
    counts
}

/// Nothing to write is nothing written.
pub(super) async fn an_empty_batch_is_nothing(store: Arc<dyn Store>) {
    assert_eq!(store.write(&[]).await.map(|written| written.len()), Ok(0));
}

/// Each answer stands where its write stood, of the same kind, also for one agent in several stages.
pub(super) async fn answers_come_in_the_order_of_the_batch(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let (first, second) = (node.open(uid(1), at(10)).await, node.open(uid(2), at(10)).await);
    let batch = [
        Write::CreateConnection(node.arrival(uid(1), at(30))),
        Write::UpdateConnection(node.end_of(&second, uid(2), CloseReason::ClosedByAgent, at(30))),
        Write::UpdateAgent(Box::new(node.report(&second, uid(2), at(20)))),
        Write::CreateConnection(node.arrival(uid(3), at(30))),
        Write::UpdateConnection(node.end_of(&first, uid(1), CloseReason::ConnectionLost, at(25))),
        Write::UpdateAgent(Box::new(node.report(&first, uid(1), at(20)))),
    ];
    let mut written = store.write(&batch).await.expect("the batch is written");
    assert!(matches!(written.pop(), Some(Written::Agent(true))), "updates come before ends");
    assert_eq!(written.pop().map(ended).and_then(|end| end.duration_seconds), Some(15));
    assert_eq!(written.pop().map(opened).and_then(|new| new.status?.from), None);
    assert!(matches!(written.pop(), Some(Written::Agent(true))));
    assert_eq!(written.pop().map(ended).and_then(|end| end.duration_seconds), Some(20));
    let returned = written.pop().map(opened).expect("an answer");
    assert_eq!((returned.agent.known, returned.displaced), (true, None));
    assert_eq!(row(&store, uid(1)).await.connection_id, Some(returned.connection_id));
}

const SHARED: u32 = 50;
const ROUNDS: i64 = 20;

/// Two writers that open, end and see the same agents never leave a history that overlaps; a retry always gets through.
pub(super) async fn two_writers_share_the_same_agents(database: &Database) {
    let (first, second) = (database.open().await, database.open().await);
    let a = Node::start(&first, "a", at(0)).await;
    let b = Node::start(&second, "b", at(0)).await;
    tokio::join!(work(&a, 1), work(&b, 2));
    for number in 0..SHARED {
        assert_true_history(&first, uid(number)).await;
    }
}

/// Rounds of openings, flushes and ends, in an order of agents that differs by writer.
async fn work(node: &Node, writer: i64) {
    for round in 0..ROUNDS {
        let now = at(100 * round + writer);
        let mut agents: Vec<InstanceUid> = (0..SHARED).map(uid).collect();
        if (round + writer) % 2 == 0 {
            agents.reverse();
        }
        let arrivals =
            agents.iter().map(|agent| Write::CreateConnection(node.arrival(*agent, now))).collect();
        let held: Vec<Opened> = write(node, arrivals).await.into_iter().map(opened).collect();
        let later = now.after(Duration::from_secs(10));
        flush(node, &agents, &held, later).await;
        let ends = agents.iter().zip(&held).step_by(2).map(|(agent, held)| {
            Write::UpdateConnection(node.end_of(held, *agent, CloseReason::ConnectionLost, later))
        });
        let reports = agents.iter().zip(&held).map(|(agent, held)| {
            Write::UpdateAgent(Box::new(node.described(held, *agent, later, &[("zone", "eu")])))
        });
        write(node, reports.chain(ends).collect()).await;
    }
}

/// Writes until no other writer is in the way.
async fn write(node: &Node, batch: Vec<Write>) -> Vec<Written> {
    loop {
        match node.store.write(&batch).await {
            Ok(written) => return written,
            Err(StoreError::Conflict | StoreError::Unavailable(_)) => {}
            Err(error) => panic!("two writers get in each other's way: {error}"),
        }
    }
}

async fn flush(node: &Node, agents: &[InstanceUid], held: &[Opened], now: Moment) {
    let seen = sightings(agents, held, now);
    while let Err(error) = node.store.update_last_seen(&seen).await {
        assert!(matches!(error, StoreError::Conflict | StoreError::Unavailable(_)), "{error}");
    }
}

/// A sign of life of each of these agents, over the connections they hold.
fn sightings(agents: &[InstanceUid], held: &[Opened], now: Moment) -> Vec<Sighting> {
    let seen = |(agent, held): (&InstanceUid, &Opened)| Sighting {
        agent: *agent,
        connection_id: held.connection_id,
        at: now,
        sequence_num: Some(7),
        poll_silence: None,
    };
    agents.iter().zip(held).map(seen).collect()
}

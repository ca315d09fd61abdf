//! The sweep: agents that stay away are retired or become errors, and what their return does.

use std::sync::Arc;
use std::time::Duration;

use opamp_server::close::CloseReason;
use opamp_server::config::Ephemeral;
use opamp_server::store::{Status, Store, Write};

use super::scene::{Node, at, history, row, status_log, uid, update};
use crate::harness::Database;

const STALE_AFTER: Duration = Duration::from_mins(10);

/// One marked agent and one that is not, both offline since second 20.
async fn two_offline(store: &Arc<dyn Store>) -> Node {
    let node = Node::start(store, "a", at(0)).await;
    for (number, attribute) in [(1, "k8s.pod.uid"), (2, "zone")] {
        let opened = node.open(uid(number), at(10)).await;
        update(store, node.described(&opened, uid(number), at(11), &[(attribute, "x")])).await;
        node.end(&opened, uid(number), CloseReason::ClosedByAgent, at(20)).await;
    }
    node
}

async fn statuses(store: &Arc<dyn Store>) -> [Status; 2] {
    [row(store, uid(1)).await.status, row(store, uid(2)).await.status]
}

/// Ephemeral agents vanish from the lists, for the others somebody must look; both are logged, once.
pub(super) async fn marked_agents_that_stay_away_are_retired_and_others_are_errors(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    two_offline(&store).await;
    let mut changes =
        store.retire_stale_agents(at(700), STALE_AFTER, Ephemeral::Marked).await.expect("the sweep runs");
    changes.sort_by_key(|change| change.agent);
    let words: Vec<_> =
        changes.iter().map(|change| (change.from, change.to, change.reason.as_str())).collect();
    let offline = Some(Status::Offline);
    assert_eq!(words, [(offline, Status::Retired, "stale"), (offline, Status::Error, "stale")]);
    let (pod, host) = (row(&store, uid(1)).await, row(&store, uid(2)).await);
    assert_eq!((pod.status, pod.status_since, pod.retired_at), (Status::Retired, at(700), Some(at(700))));
    assert_eq!((host.status, host.status_since, host.retired_at), (Status::Error, at(700), None));
    let (when, from, to, reason, _) = status_log(&raw, uid(1)).await.remove(2);
    assert_eq!((when, from.as_deref(), to.as_str()), (at(700), Some("offline"), "retired"));
    assert_eq!(reason, "stale");
    let again = store.retire_stale_agents(at(9_000), STALE_AFTER, Ephemeral::Marked).await;
    assert_eq!(again, Ok(Vec::new()));
}

/// Operators may call all agents ephemeral, or none.
pub(super) async fn the_sweep_spares_all_or_none_as_told(store: Arc<dyn Store>) {
    let node = two_offline(&store).await;
    store.retire_stale_agents(at(700), STALE_AFTER, Ephemeral::All).await.expect("the sweep runs");
    assert_eq!(statuses(&store).await, [Status::Retired, Status::Retired]);
    for number in [1, 2] {
        node.visit(uid(number), at(800), at(810)).await;
    }
    store.retire_stale_agents(at(1_500), STALE_AFTER, Ephemeral::None).await.expect("the sweep runs");
    assert_eq!(statuses(&store).await, [Status::Error, Status::Error]);
}

/// Nobody is stale before `stale_after` has passed since the verdict, nor while online.
pub(super) async fn the_sweep_waits_for_stale_after(store: Arc<dyn Store>) {
    let node = two_offline(&store).await;
    let opened = node.open(uid(3), at(10)).await;
    node.end(&opened, uid(3), CloseReason::ServerShutdown, at(20)).await;
    node.open(uid(4), at(10)).await;
    let just_before = at(620).before(Duration::from_micros(1));
    assert_eq!(store.retire_stale_agents(just_before, STALE_AFTER, Ephemeral::All).await, Ok(Vec::new()));
    let swept =
        store.retire_stale_agents(at(620), STALE_AFTER, Ephemeral::All).await.expect("the sweep runs");
    assert_eq!(swept.len(), 2);
    assert_eq!(row(&store, uid(3)).await.status, Status::Online, "its verdict is pending");
    store.update_overdue_status(at(620)).await.expect("the verdicts fall");
    assert_eq!(store.retire_stale_agents(at(1_219), STALE_AFTER, Ephemeral::All).await, Ok(Vec::new()));
    let swept =
        store.retire_stale_agents(at(1_220), STALE_AFTER, Ephemeral::All).await.expect("the sweep runs");
    assert_eq!(swept.len(), 1, "{swept:?}");
}

/// However many agents are due, verdicts and sweep leave none behind.
pub(super) async fn a_sweep_of_many_is_complete(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let arrivals: Vec<Write> =
        (0..2_001).map(|number| Write::CreateConnection(node.arrival(uid(number), at(10)))).collect();
    let written = store.write(&arrivals).await.expect("all open");
    let ends = (0..).zip(written).map(|(number, written)| {
        let opened = super::scene::opened(written);
        Write::UpdateConnection(node.end_of(&opened, uid(number), CloseReason::ServerShutdown, at(20)))
    });
    store.write(&ends.collect::<Vec<_>>()).await.expect("all end");
    assert_eq!(store.update_overdue_status(at(200)).await.map(|changes| changes.len()), Ok(2_001));
    let swept = store.retire_stale_agents(at(1_000), STALE_AFTER, Ephemeral::None).await;
    assert_eq!(swept.map(|changes| changes.len()), Ok(2_001));
    let summary = store.summarize_agents().await.expect("the store answers");
    assert_eq!((summary.total, summary.error), (2_001, 2_001));
}

/// A retired agent that returns goes on with its record and its history.
pub(super) async fn a_retired_agent_returns_to_the_same_record(store: Arc<dyn Store>) {
    let node = two_offline(&store).await;
    store.retire_stale_agents(at(700), STALE_AFTER, Ephemeral::All).await.expect("the sweep runs");
    let opened = node.open(uid(1), at(800)).await;
    assert!(opened.agent.known);
    let change = opened.status.expect("the status changes");
    assert_eq!((change.from, change.to), (Some(Status::Retired), Status::Online));
    assert_eq!(change.reason, "returned");
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.status, agent.retired_at, agent.created_at), (Status::Online, None, at(10)));
    assert!(agent.ephemeral);
    assert_eq!(history(&store, uid(1)).await.len(), 2);
}

/// An agent in error that returns is online, and its clock of staleness starts anew.
pub(super) async fn an_agent_in_error_returns(store: Arc<dyn Store>) {
    let node = two_offline(&store).await;
    store.retire_stale_agents(at(700), STALE_AFTER, Ephemeral::None).await.expect("the sweep runs");
    let change = node.open(uid(1), at(800)).await.status.expect("the status changes");
    assert_eq!((change.from, change.to), (Some(Status::Error), Status::Online));
    assert_eq!(store.retire_stale_agents(at(9_000), STALE_AFTER, Ephemeral::All).await, Ok(Vec::new()));
}

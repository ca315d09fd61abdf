//! What incidents are told from: every connection of a span, and who was there.

use std::sync::Arc;

use opamp_server::close::CloseReason;
use opamp_server::incidents::Observation;
use opamp_server::store::{NewConnection, Store};

use super::scene::{Node, at, create, uid};

const ALL: u32 = 1_000;

/// How many left together, and how many were connected before.
fn told(observation: &Observation) -> Vec<(u32, u32)> {
    let incidents = observation.incidents(at(0));
    incidents.iter().map(|incident| (incident.agents_count, incident.connected_before)).collect()
}

/// Six of eight agents by one address left; the others left later or are still there, and a ninth came later.
async fn scene(store: &Arc<dyn Store>) {
    let node = Node::start(store, "a", at(0)).await;
    let arrive = async |number: u32, since: i64| {
        let remote_addr = if number < 9 { "192.0.2.1:1" } else { "198.51.100.7:1" }.to_owned();
        create(store, NewConnection { remote_addr, ..node.arrival(uid(number), at(since)) }).await
    };
    let mut open = Vec::new();
    for number in (0..40).filter(|number| *number != 8) {
        open.push((number, arrive(number, 1).await));
    }
    let leave = async |numbers: &[u32], when: i64| {
        for (number, connection) in open.iter().filter(|(number, _)| numbers.contains(number)) {
            node.end(connection, uid(*number), CloseReason::ConnectionLost, at(when)).await;
        }
    };
    leave(&[0, 1, 2, 3, 4, 5], 50_000).await;
    arrive(8, 60_000).await;
    leave(&[6, 9], 70_000).await;
    for number in [6, 9] {
        node.visit(uid(number), at(70_100), at(70_200)).await;
    }
}

/// Who left after the span was there, too; who came after it was not.
pub(super) async fn an_observation_has_all_who_were_connected(store: Arc<dyn Store>) {
    scene(&store).await;
    for ends in [50_001, 55_000, 65_000, 80_000] {
        let observation = store.observe(at(0), at(ends), ALL).await.expect("the store answers");
        assert_eq!(told(&observation), [(6, 8)], "up to {ends}");
        assert_eq!(observation.begins(), at(0));
    }
    let before = store.observe(at(0), at(50_000), ALL).await.expect("the store answers");
    assert_eq!(told(&before), [], "the end of a span is not in it");
}

/// Of more ends than are wanted the latest are read, and it is said from when on that is all.
pub(super) async fn an_observation_of_too_many_ends_begins_later(store: Arc<dyn Store>) {
    scene(&store).await;
    let observation = store.observe(at(0), at(80_000), 3).await.expect("the store answers");
    assert_eq!(observation.begins(), at(70_000));
    assert_eq!(told(&observation), []);
}

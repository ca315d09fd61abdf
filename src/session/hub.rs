//! Which connection of which agent lives on this node.
//!
//! Promises: a newer connection always takes the place of an older one, never the other way round,
//! and only a connection itself gives up its place. 64 locked shards; no lock is held while anybody
//! is told. A poller's session lives in its place here, between its polls. The gauges of open
//! connections are counted here, where every connection comes in and goes out.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::hash::RandomState;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Session;
use crate::agent::InstanceUid;
use crate::close::CloseReason;
use crate::history::OpenConnection;
use crate::metrics::Metrics;
use crate::store::Transport;

const SHARDS: usize = 64;

/// Where the session of a poller waits for the next poll.
pub type Seat = Arc<tokio::sync::Mutex<Option<Session>>>;

#[derive(Debug, Default)]
struct Place {
    connection: Option<Arc<OpenConnection>>,
    seat: Option<Seat>,
}

/// The connections on this node.
#[derive(Debug)]
pub struct Hub {
    shards: Vec<Mutex<HashMap<InstanceUid, Place>>>,
    hasher: RandomState,
    metrics: Arc<Metrics>,
}

impl Hub {
    /// An empty hub.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { shards, hasher: RandomState::new(), metrics }
    }

    fn shard(&self, agent: InstanceUid) -> MutexGuard<'_, HashMap<InstanceUid, Place>> {
        let index = usize::try_from(self.hasher.hash_one(agent) % SHARDS as u64).unwrap_or_default();
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection of an agent, if it lives here.
    #[must_use]
    pub fn get(&self, agent: InstanceUid) -> Option<Arc<OpenConnection>> {
        self.shard(agent).get(&agent)?.connection.clone()
    }

    /// Gives `connection` the place of its agent; the older one of the two is told that it was superseded.
    pub fn enter(&self, connection: &Arc<OpenConnection>) {
        // A seat is left to its owner after the lock is gone: a session's end takes the lock again.
        let (older, _seat) = {
            let mut shard = self.shard(connection.agent);
            let place = shard.entry(connection.agent).or_default();
            match &place.connection {
                Some(present) if present.id > connection.id => (Some(Arc::clone(connection)), None),
                Some(_) | None => {
                    let older = place.connection.replace(Arc::clone(connection));
                    let seat = place.seat.take_if(|_| connection.transport == Transport::Websocket);
                    self.count(older.as_ref(), Some(connection));
                    (older, seat)
                }
            }
        };
        if let Some(older) = older {
            older.abandon(CloseReason::Superseded);
        }
    }

    /// Counts who left a place and who took it.
    fn count(&self, left: Option<&Arc<OpenConnection>>, entered: Option<&Arc<OpenConnection>>) {
        let open = &self.metrics.connections_open;
        if let Some(left) = left {
            open.of(left.transport).decrement(1.0);
        }
        if let Some(entered) = entered {
            open.of(entered.transport).increment(1.0);
        }
    }

    /// Gives up the place of `connection`, unless a newer one has taken it.
    pub fn leave(&self, connection: &Arc<OpenConnection>) {
        // What was in the place is dropped after the lock is gone: a session's end takes it again.
        let _left = {
            let mut shard = self.shard(connection.agent);
            match shard.get(&connection.agent) {
                Some(Place { connection: Some(present), .. }) if Arc::ptr_eq(present, connection) => {
                    self.count(Some(connection), None);
                    shard.remove(&connection.agent)
                }
                _ => None,
            }
        };
    }

    /// The seat of a poller, made where there is none.
    #[must_use]
    pub fn seat(&self, agent: InstanceUid) -> Seat {
        Arc::clone(self.shard(agent).entry(agent).or_default().seat.get_or_insert_default())
    }

    /// Keeps the seat in its agent's place: an end that came meanwhile may have cleared the place.
    pub fn keep_seat(&self, agent: InstanceUid, seat: &Seat) {
        let is_poller = |connection: &Arc<OpenConnection>| connection.transport == Transport::Http;
        // Whatever was kept before is dropped after the lock is gone: a session's end takes it again.
        let _replaced = {
            let mut shard = self.shard(agent);
            shard
                .get_mut(&agent)
                .filter(|place| place.connection.as_ref().is_some_and(is_poller))
                .and_then(|place| place.seat.replace(Arc::clone(seat)))
        };
    }

    /// Gives up the seat of a poller that has no session after all.
    pub fn free_seat(&self, agent: InstanceUid) {
        // As above: the seat may be another one, with a session in it.
        let _freed = {
            let mut shard = self.shard(agent);
            let is_empty = shard.get(&agent).is_some_and(|place| place.connection.is_none());
            if is_empty { shard.remove(&agent) } else { None }
        };
    }

    /// Every connection on this node.
    #[must_use]
    pub fn connections(&self) -> Vec<Arc<OpenConnection>> {
        let mut all = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            all.extend(shard.values().filter_map(|place| place.connection.clone()));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Tick;
    use crate::pulse::{Link, Pulse};

    fn connection(id: i64) -> Arc<OpenConnection> {
        let pulse = Pulse::starting(Tick::default(), None);
        let link = Arc::new(Link::default());
        Arc::new(OpenConnection::new(InstanceUid::from_bytes([1; 16]), id, Transport::Websocket, link, pulse))
    }

    #[test]
    fn a_newcomer_takes_the_place_and_the_older_one_is_told() {
        let hub = Hub::new(Arc::default());
        let (older, newer) = (connection(1), connection(2));
        hub.enter(&older);
        hub.enter(&newer);
        assert_eq!(older.ended(), Some(CloseReason::Superseded));
        assert_eq!(newer.ended(), None);
        assert_eq!(hub.get(newer.agent).map(|connection| connection.id), Some(2));
    }

    #[test]
    fn of_two_that_enter_in_the_wrong_order_the_newer_stays() {
        let hub = Hub::new(Arc::default());
        let (older, newer) = (connection(1), connection(2));
        hub.enter(&newer);
        hub.enter(&older);
        assert_eq!(older.ended(), Some(CloseReason::Superseded));
        assert_eq!(hub.get(newer.agent).map(|connection| connection.id), Some(2));
    }

    #[test]
    fn a_late_leave_of_the_older_one_changes_nothing() {
        let hub = Hub::new(Arc::default());
        let (older, newer) = (connection(1), connection(2));
        hub.enter(&older);
        hub.enter(&newer);
        hub.leave(&older);
        assert_eq!(hub.connections().len(), 1);
        hub.leave(&newer);
        assert!(hub.connections().is_empty());
    }
}

//! This node's lease, and the watch over those of others.
//!
//! A lease is judged by watching, never by comparing clocks: another node is lost once this one has
//! renewed its own lease without a failure for a whole lease while the other's row did not move. Who
//! finds a mark on its own row stops the server; errors never do. It must not know what connections
//! or agents are: the store ends what a lost node left.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::clock::{Moment, Tick};
use crate::close::CloseReason;
use crate::history::History;
use crate::metrics::Metrics;
use crate::outage::{Outage, Witness};
use crate::peers::Peers;
use crate::store::{Peer, Store, StoreError};

/// Holds the lease of one node, and watches those of the others.
pub struct Lease {
    /// Where leases stand.
    pub store: Arc<dyn Store>,
    /// What is told of verdicts that become pending; its clock.
    pub history: History,
    /// Where lost connections are counted.
    pub metrics: Arc<Metrics>,
    /// Whether the store is away.
    pub outage: Arc<Outage>,
    /// This node.
    pub node_id: Uuid,
    /// Its name.
    pub name: String,
    /// For how long a renewal holds; it is renewed three times as often.
    pub length: Duration,
    /// What is seen of the others.
    pub peers: Arc<Peers>,
    /// Cancelled when this node was marked as ended.
    pub ended: CancellationToken,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").field("node_id", &self.node_id).finish_non_exhaustive()
    }
}

impl Lease {
    /// Renews until `stop` is cancelled or the node was ended.
    ///
    /// What a lost node left is ended beside the renewals: should that take long, this node must not be
    /// taken for lost meanwhile.
    pub async fn run(self, stop: CancellationToken) {
        let mut watching = Watching::new(self.length);
        let mut renewals = tokio::time::interval(self.length / 3);
        renewals.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ending = FuturesUnordered::new();
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some(()) = ending.next() => continue,
                _ = renewals.tick() => {}
                // Some write found the mark; it is read here.
                () = self.history.node_ended() => {}
            }
            match self.renew(&mut watching).await {
                Ok(Some(lost)) => ending.extend(lost.into_iter().map(|peer| self.end(peer))),
                Ok(None) => {
                    self.ended.cancel();
                    // Who was ended ends nobody.
                    drop(ending);
                    stop.cancelled().await;
                    return;
                }
                Err(error) => {
                    watching.failed();
                    self.outage.failed(Witness::Lease, "the renewal of the node's lease", &error);
                }
            }
        }
    }

    /// Renews once; answers who is lost, none where this node itself was ended.
    async fn renew(&self, watching: &mut Watching) -> Result<Option<Vec<Peer>>, StoreError> {
        if !self.store.renew_node(self.node_id, self.history.now()).await? {
            return Ok(None);
        }
        self.outage.written(Witness::Lease);
        // Beside each other, so that a store that hangs is noticed after one deadline; and the name, which has a connection
        // of its own, must not hold up the renewals.
        let name = tokio::time::timeout(self.length / 3, self.store.lock_node_name(&self.name));
        let (named, peers) = tokio::join!(name, self.store.list_peers(self.node_id));
        // A database that was restarted has forgotten who holds the name.
        if named == Ok(Ok(false)) {
            tracing::warn!(name = self.name, "another opamp-server has taken the name of this node");
        }
        let peers = peers?;
        let now = self.history.clock().tick();
        let (some, gone) = (!peers.is_empty(), watching.misses_any(&peers));
        let lost = watching.renewed(now, peers);
        if gone || !lost.is_empty() {
            self.peers.note_loss(now);
        }
        // Two renewals are due by then: what holds them up may hold up the others as well.
        let known_until = now.after(self.length * 2 / 3);
        self.peers.note(now, known_until, some, !lost.is_empty() || watching.is_unsure(now));
        Ok(Some(lost))
    }

    /// Ends a lost node and what it left open.
    async fn end(&self, lost: Peer) {
        match self.store.end_lost_node(&lost, &self.history.heir()).await {
            Ok(None) => {}
            Ok(Some(connections)) => {
                self.metrics.connections_ended.of(CloseReason::ServerLost).increment(connections);
                tracing::warn!(
                    node_id = %lost.id,
                    name = lost.name,
                    connections,
                    "a node was lost: its lease did not move; its connections were ended as server_lost"
                );
                self.history.expect_verdicts();
            }
            Err(error) => self.outage.stumbled("ending a lost node", &error),
        }
    }
}

/// What was seen of the leases of others. Pure.
#[derive(Debug)]
struct Watching {
    length: Duration,
    /// When this node renewed last; none after a failure.
    renewed: Option<Tick>,
    /// What was seen of each peer while this node renews without failure.
    peers: BTreeMap<Uuid, Seen>,
    /// Who was there when this node last looked, however long ago, and was not lost.
    there: BTreeSet<Uuid>,
    /// Whose loss was told, while they are still on record as living.
    lost: BTreeSet<Uuid>,
}

/// The last renewal of a peer, and since when it stands.
#[derive(Debug)]
struct Seen {
    renewal: Moment,
    since: Tick,
    lease: Duration,
}

impl Watching {
    fn new(length: Duration) -> Self {
        Self { length, renewed: None, peers: BTreeMap::new(), there: BTreeSet::new(), lost: BTreeSet::new() }
    }

    /// This node's own renewal failed: nothing seen so far counts against anybody.
    fn failed(&mut self) {
        self.renewed = None;
        self.peers.clear();
    }

    /// True where one of the others did not renew when it should have.
    fn is_unsure(&self, now: Tick) -> bool {
        self.peers.values().any(|seen| now.since(seen.since) >= seen.lease * 2 / 3)
    }

    /// True where somebody is gone who was seen before: also while this node could not look.
    fn misses_any(&self, peers: &[Peer]) -> bool {
        self.there.iter().any(|id| peers.iter().all(|peer| peer.id != *id))
    }

    /// This node renewed at `now` and then saw `peers`; answers which of them are lost.
    fn renewed(&mut self, now: Tick, peers: Vec<Peer>) -> Vec<Peer> {
        // A renewal that comes late is a failure: whatever held it up may have held up the others.
        if self.renewed.is_none_or(|last| now.since(last) > self.length / 2) {
            self.failed();
        }
        self.renewed = Some(now);
        let listed: BTreeSet<Uuid> = peers.iter().map(|peer| peer.id).collect();
        self.lost.retain(|id| listed.contains(id));
        self.there = &listed - &self.lost;
        self.peers.retain(|id, _| listed.contains(id));
        let lost = |peer: &Peer| {
            let seen = || Seen { renewal: peer.renewed_at, since: now, lease: peer.lease };
            let known = self.peers.entry(peer.id).or_insert_with(seen);
            if known.renewal != peer.renewed_at {
                *known = seen();
            }
            now.since(known.since) >= self.length.max(peer.lease)
        };
        let lost: Vec<Peer> = peers.into_iter().filter(lost).collect();
        for peer in &lost {
            // Whoever is still there after another whole lease is reported once more.
            self.peers.remove(&peer.id);
            self.there.remove(&peer.id);
            self.lost.insert(peer.id);
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: Duration = Duration::from_secs(9);

    fn at(second: u64) -> Tick {
        Tick::from_micros(second * 1_000_000)
    }

    fn peer(renewal: i64) -> Peer {
        Peer {
            id: Uuid::from_u128(1),
            name: "peer".to_owned(),
            renewed_at: Moment::from_micros(renewal),
            lease: LENGTH,
        }
    }

    /// The second at which a peer that never renews is taken for lost by a node that renews at these seconds.
    fn lost_at(seconds: impl IntoIterator<Item = u64>) -> Option<u64> {
        let mut watching = Watching::new(LENGTH);
        seconds.into_iter().find(|second| !watching.renewed(at(*second), vec![peer(1)]).is_empty())
    }

    #[test]
    fn who_does_not_move_for_a_whole_lease_is_lost() {
        assert_eq!(lost_at([0, 3, 6, 9, 12]), Some(9));
        let mut watching = Watching::new(LENGTH);
        for (second, renewal) in [(0, 1), (3, 1), (6, 2), (9, 2), (12, 2)] {
            assert!(watching.renewed(at(second), vec![peer(renewal)]).is_empty(), "it moved at 6 s");
        }
        assert_eq!(watching.renewed(at(15), vec![peer(2)]), [peer(2)]);
        assert!(!watching.misses_any(&[]), "its loss was told");
        assert!(watching.renewed(at(16), vec![peer(2)]).is_empty(), "it is being ended");
        assert!(!watching.misses_any(&[]), "its loss was told once");
        assert!(watching.renewed(at(18), Vec::new()).is_empty(), "it was ended");
    }

    #[test]
    fn a_peer_with_a_longer_lease_has_its_own_time() {
        let mut watching = Watching::new(LENGTH);
        let slow = Peer { lease: LENGTH * 2, ..peer(1) };
        let lost =
            (0..10).map(|step| step * 3).find(|s| !watching.renewed(at(*s), vec![slow.clone()]).is_empty());
        assert_eq!(lost, Some(18));
    }

    #[test]
    fn whoever_was_held_up_itself_accuses_nobody() {
        assert_eq!(lost_at([0, 3, 6, 60, 63, 66]), None, "it was stopped, and so may have been the other");
        assert_eq!(lost_at([0, 3, 6, 60, 63, 66, 69]), Some(69));
        let mut watching = Watching::new(LENGTH);
        for second in [0, 3, 6] {
            assert!(watching.renewed(at(second), vec![peer(1)]).is_empty());
        }
        watching.failed();
        assert!(watching.renewed(at(9), vec![peer(1)]).is_empty(), "the store may have failed them both");
    }

    #[test]
    fn who_went_while_this_node_could_not_look_is_missed() {
        let mut watching = Watching::new(LENGTH);
        assert!(!watching.misses_any(&[peer(1)]), "nobody was there");
        assert!(watching.renewed(at(0), vec![peer(1)]).is_empty());
        watching.failed();
        assert!(!watching.misses_any(&[peer(2)]));
        assert!(watching.misses_any(&[]));
        assert!(watching.renewed(at(60), Vec::new()).is_empty());
        assert!(!watching.misses_any(&[]), "once");
    }
}

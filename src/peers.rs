//! What this node knows of the others at this moment, as its lease saw them.
//!
//! Polls may land on any node: whether somebody else heard a poller is known only while the others
//! reach the store. It must not know leases or who ends whom.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::clock::Tick;

/// The other nodes.
#[derive(Debug, Default)]
pub struct Peers {
    some: AtomicBool,
    unsure: AtomicBool,
    /// When they were seen last, in microseconds.
    seen_at: AtomicU64,
    /// For how long that is known, in microseconds.
    known_until: AtomicU64,
    /// When the last one went, in microseconds; 0 = none did.
    lost_at: AtomicU64,
}

impl Peers {
    /// Notes what was seen of them at `now`: whether there are any, and whether one of them does not reach the store.
    /// After `known_until`, nobody knows that any more.
    pub fn note(&self, now: Tick, known_until: Tick, some: bool, unsure: bool) {
        self.some.store(some, Ordering::Relaxed);
        self.unsure.store(unsure, Ordering::Relaxed);
        self.seen_at.store(now.as_micros(), Ordering::Relaxed);
        // Last: nobody takes what was seen before for fresh.
        self.known_until.store(known_until.as_micros(), Ordering::Release);
    }

    /// Notes that one went, in whatever way.
    pub fn note_loss(&self, now: Tick) {
        self.lost_at.store(now.as_micros().max(1), Ordering::Relaxed);
    }

    /// True where there may be others, on which polls may land: there were, or nobody looked since this server sees
    /// again, which it does since `resumed`.
    #[must_use]
    pub fn may_be_there(&self, resumed: Tick) -> bool {
        self.some.load(Ordering::Relaxed) || Tick::from_micros(self.seen_at.load(Ordering::Relaxed)) < resumed
    }

    /// True while one of them may hear polls and not tell the store: it was seen, or nobody could look for a while.
    #[must_use]
    pub fn is_unsure(&self, now: Tick) -> bool {
        let stale = now > Tick::from_micros(self.known_until.load(Ordering::Acquire));
        self.unsure.load(Ordering::Relaxed) || stale && self.some.load(Ordering::Relaxed)
    }

    /// When the last one went.
    #[must_use]
    pub fn lost_at(&self) -> Option<Tick> {
        let lost = self.lost_at.load(Ordering::Relaxed);
        (lost > 0).then(|| Tick::from_micros(lost))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_could_not_look_for_a_while_is_unsure_of_peers_that_were_there() {
        let at = |second: u64| Tick::from_micros(second * 1_000_000);
        let peers = Peers::default();
        assert!(!peers.is_unsure(at(100)), "there were none");
        peers.note(at(100), at(106), true, false);
        assert!(!peers.is_unsure(at(106)));
        assert!(peers.is_unsure(at(107)), "what they did since then is not known");
        peers.note(at(107), at(113), true, true);
        assert!(peers.is_unsure(at(108)), "one of them does not reach the store");
        peers.note(at(108), at(114), false, false);
        assert!(!peers.is_unsure(at(200)));
    }
}

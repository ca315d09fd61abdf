//! What the fleet tells its agents, and how they report back that they have done it.
//!
//! Promises that a round of heartbeats ends when every agent has either done its share or cannot
//! do it. Orders are a cell with the newest one, not a queue. Must not know agents or links.

use std::sync::atomic::{
    AtomicU64, AtomicUsize,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

use tokio::sync::Notify;

/// The newest wish of the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Live on: connect, send heartbeats.
    Live,
    /// Send this many heartbeats now, each after the answer to the one before.
    Beat(u32),
    /// Say farewell and end.
    Leave,
}

/// The round of ordered heartbeats that is under way, if any.
#[derive(Debug, Default)]
pub(crate) struct Round {
    agents: AtomicUsize,
    answered: AtomicU64,
    finished: Notify,
}

impl Round {
    /// To be called before the order goes out; `agents` is how many will obey it.
    pub(crate) fn begin(&self, agents: usize) {
        self.answered.store(0, Relaxed);
        self.agents.store(agents, Release);
    }

    /// An agent has done what it could: so many of its heartbeats were answered.
    pub(crate) fn done(&self, answered: u32) {
        self.answered.fetch_add(answered.into(), Relaxed);
        if self.agents.fetch_sub(1, AcqRel) == 1 {
            self.finished.notify_one();
        }
    }

    /// Waits for the last agent; how many heartbeats of the round were answered.
    pub(crate) async fn finish(&self) -> u64 {
        while self.agents.load(Acquire) > 0 {
            self.finished.notified().await;
        }
        self.answered.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_round_ends_with_its_last_agent() {
        let round = Round::default();
        for _ in 0..2 {
            round.begin(2);
            round.done(3);
            let early = tokio::time::timeout(std::time::Duration::ZERO, round.finish()).await;
            assert!(early.is_err());
            round.done(1);
            assert_eq!(round.finish().await, 4);
        }
    }
}

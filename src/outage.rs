//! Whether the store is away: said once when it goes, and once when it is back.
//!
//! Every task that writes meets the same trouble; [`Outage`] makes one log line of it, on the word of a
//! few [`Witness`]es. Each failed call is counted all the same. It must not know what was to be written.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};

use tokio::sync::Notify;

use crate::metrics::Metrics;
use crate::store::StoreError;

/// Whose word counts for whether the store is there. What else fails may fail by itself: a slow look
/// at old rows is no outage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Witness {
    /// The writer of connections and changes.
    Writer = 1,
    /// The renewal of the node's lease.
    Lease = 2,
    /// The flush of signs of life.
    Flush = 4,
}

/// What the tasks of one server know together about the store's trouble.
#[derive(Debug)]
pub struct Outage {
    metrics: Arc<Metrics>,
    /// The witnesses that could not write, a bit each.
    away: AtomicU8,
    begun: AtomicUsize,
    /// True while the writer has nothing to write, and so nothing to say.
    idle: AtomicBool,
    back: Notify,
}

impl Outage {
    /// No trouble yet.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            away: AtomicU8::new(0),
            begun: AtomicUsize::new(0),
            idle: AtomicBool::new(true),
            back: Notify::new(),
        }
    }

    /// Notes that `work` has to wait because the store did not do it.
    pub fn failed(&self, witness: Witness, work: &str, error: &StoreError) {
        self.metrics.store_failures.increment(1);
        if self.away.fetch_or(witness as u8, Ordering::Relaxed) == 0 {
            self.begun.fetch_add(1, Ordering::Release);
            tracing::warn!(%error, "the store is away: {work} must wait; nothing that ended is forgotten");
        } else {
            tracing::debug!(%error, "{work} must wait: the store is still away");
        }
    }

    /// Notes that `work` was not done this time; that alone does not mean that the store is away.
    pub fn stumbled(&self, work: &str, error: &StoreError) {
        self.metrics.store_failures.increment(1);
        if self.is_away() {
            tracing::debug!(%error, "{work} must wait: the store is away");
        } else {
            tracing::warn!(%error, "{work} failed and is tried again");
        }
    }

    /// True while the store does not write.
    #[must_use]
    pub fn is_away(&self) -> bool {
        self.away.load(Ordering::Relaxed) != 0
    }

    /// How often the store went away so far. Also a trouble that is told and over within a moment may have lasted: it is
    /// told when a call has waited for its deadline.
    #[must_use]
    pub fn begun(&self) -> usize {
        self.begun.load(Ordering::Acquire)
    }

    /// Notes whether the writer has anything to write.
    pub fn rest(&self, idle: bool) {
        self.idle.store(idle, Ordering::Relaxed);
    }

    /// Waits until the store is back from a trouble that began after the last call returned. One task waits.
    pub async fn back(&self) {
        self.back.notified().await;
    }

    /// Notes that the store wrote again.
    pub fn written(&self, witness: Witness) {
        // A load first: after every commit, and hardly ever anything to say.
        if !self.is_away() {
            return;
        }
        // A writer that has nothing to write cannot tell itself.
        let idle = if self.idle.load(Ordering::Relaxed) { Witness::Writer as u8 } else { 0 };
        // Who writes more speaks for who writes less, never the other way round.
        self.clear(
            idle | match witness {
                Witness::Writer => u8::MAX,
                Witness::Flush => Witness::Flush as u8 | Witness::Lease as u8,
                Witness::Lease => Witness::Lease as u8,
            },
        );
    }

    /// Notes that a witness has nothing to write any more, and so nothing to say: the others tell.
    pub fn withdraw(&self, witness: Witness) {
        if self.is_away() {
            self.clear(witness as u8);
        }
    }

    fn clear(&self, cleared: u8) {
        let before = self.away.fetch_and(!cleared, Ordering::Relaxed);
        if before != 0 && before & !cleared == 0 {
            tracing::info!("the store is back");
            self.back.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_store_is_back_when_nobody_misses_it() {
        let outage = Outage::new(Arc::default());
        outage.stumbled("a look", &StoreError::Conflict);
        assert!(!outage.is_away());
        outage.rest(false);
        outage.failed(Witness::Writer, "a batch", &StoreError::Conflict);
        outage.failed(Witness::Lease, "a renewal", &StoreError::Conflict);
        outage.written(Witness::Lease);
        assert!(outage.is_away(), "the writer still waits");
        outage.rest(true);
        outage.written(Witness::Lease);
        assert!(!outage.is_away(), "it has nothing left to write");
        outage.failed(Witness::Lease, "a renewal", &StoreError::Conflict);
        outage.written(Witness::Writer);
        assert!(!outage.is_away(), "the next renewal will be done");
        outage.failed(Witness::Flush, "a flush", &StoreError::Conflict);
        outage.written(Witness::Lease);
        assert!(outage.is_away(), "renewals are not signs of life");
        outage.withdraw(Witness::Flush);
        assert!(!outage.is_away(), "there are none left to write");
    }
}

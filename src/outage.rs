//! Whether the store is away: said once when it goes, and once when it is back.
//!
//! Every task that writes meets the same trouble; [`Outage`] makes one log line of it. Each failed
//! call is counted all the same. It must not know what was to be written.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

use crate::metrics::Metrics;
use crate::store::StoreError;

/// What the tasks of one server know together about the store's trouble.
#[derive(Debug)]
pub struct Outage {
    metrics: Arc<Metrics>,
    away: AtomicBool,
    back: Notify,
}

impl Outage {
    /// No trouble yet.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { metrics, away: AtomicBool::new(false), back: Notify::new() }
    }

    /// Notes that `work` has to wait because the store did not do it.
    pub fn failed(&self, work: &str, error: &StoreError) {
        self.metrics.store_failures.increment(1);
        if self.away.swap(true, Ordering::Relaxed) {
            tracing::debug!(%error, "{work} must wait: the store is still away");
        } else {
            tracing::warn!(%error, "the store is away: {work} must wait; nothing that ended is forgotten");
        }
    }

    /// True while the store does not write.
    #[must_use]
    pub fn is_away(&self) -> bool {
        self.away.load(Ordering::Relaxed)
    }

    /// Waits until the store is back from a trouble that began after the last call returned. One task waits.
    pub async fn back(&self) {
        self.back.notified().await;
    }

    /// Notes that the store wrote again.
    pub fn written(&self) {
        // A load first: after every commit, and hardly ever anything to say.
        if self.away.load(Ordering::Relaxed) && self.away.swap(false, Ordering::Relaxed) {
            tracing::info!("the store is back");
            self.back.notify_one();
        }
    }
}

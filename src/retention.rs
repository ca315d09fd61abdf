//! Retention: what ended longer ago than `retention.history` is forgotten, a little at a time.
//!
//! Only this deletes history. It must not touch what is open or who may still return.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::metrics::{Kept, Metrics};
use crate::outage::Outage;
use crate::store::{Forgotten, Store};

/// How often what is past its time is looked for.
const PACE: Duration = Duration::from_mins(5);

/// How long others may write between two batches.
const PAUSE: Duration = Duration::from_millis(20);

/// Forgets history at a fixed pace.
pub struct Retention {
    /// Where it stands.
    pub store: Arc<dyn Store>,
    /// The database's time.
    pub clock: Clock,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Whether the store is away.
    pub outage: Arc<Outage>,
    /// How long history is kept; zero = for ever.
    pub history: Duration,
}

impl std::fmt::Debug for Retention {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Retention").field("history", &self.history).finish_non_exhaustive()
    }
}

impl Retention {
    /// Works until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let pace = PACE.min(self.history);
        if pace.is_zero() {
            stop.cancelled().await;
        }
        while stop.run_until_cancelled(tokio::time::sleep(pace)).await.is_some() {
            let _cut_short = stop.run_until_cancelled(self.forget()).await;
        }
    }

    async fn forget(&self) {
        let before = self.clock.now().before(self.history);
        let mut all = Forgotten::default();
        loop {
            match self.store.forget(before).await {
                Ok(forgotten) => {
                    self.count(forgotten);
                    all = all.and(forgotten);
                    if !forgotten.may_be_more() {
                        break;
                    }
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => {
                    self.outage.stumbled("retention", &error);
                    break;
                }
            }
        }
        if all != Forgotten::default() {
            let Forgotten { connections, transitions, agents } = all;
            tracing::info!(%before, connections, transitions, agents, "forgot history past retention.history");
        }
    }

    fn count(&self, forgotten: Forgotten) {
        let deleted = &self.metrics.retention_deleted;
        deleted.of(Kept::Connections).increment(forgotten.connections);
        deleted.of(Kept::Transitions).increment(forgotten.transitions);
        deleted.of(Kept::Agents).increment(forgotten.agents);
    }
}

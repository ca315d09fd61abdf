//! What time alone changes: agents that did not return in time go offline, stale ones become errors or retire.
//!
//! Both verdicts stand in the store, so any node carries them out; this node looks when one of its
//! own is due and, as a safety net, every `heartbeat.check_interval`. A store that is away delays
//! verdicts and never skips one.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, Moment};
use crate::config::Ephemeral;
use crate::history::History;
use crate::outage::Outage;
use crate::sight::Sight;
use crate::store::{Status, StatusChange, Store, StoreError};

/// The shortest pause between two looks at pending verdicts.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);

/// Carries out pending verdicts as they fall due.
pub struct Verdicts {
    /// Where they stand.
    pub store: Arc<dyn Store>,
    /// Tells when one was added.
    pub history: History,
    /// Whether a verdict may fall.
    pub sight: Arc<Sight>,
    /// Whether the store is away.
    pub outage: Arc<Outage>,
    /// Pace of the safety net.
    pub check_interval: Duration,
}

impl std::fmt::Debug for Verdicts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verdicts").field("check_interval", &self.check_interval).finish_non_exhaustive()
    }
}

impl Verdicts {
    /// Works until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        // Nothing is forgiven yet: a start may have taken long, and nobody was admitted meanwhile.
        let mut forgiven = None;
        loop {
            let pause = self.carry_out(&mut forgiven).await.unwrap_or_else(|error| {
                self.outage.stumbled("carrying out verdicts", &error);
                self.check_interval
            });
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
                () = self.history.pending_verdict() => {}
            }
        }
    }

    /// Carries out what is due; answers how long to wait for the next.
    ///
    /// `forgiven` counts the blindnesses for which agents were given their return time anew.
    async fn carry_out(&self, forgiven: &mut Option<usize>) -> Result<Duration, StoreError> {
        if !self.sight.can_conclude(self.history.clock().tick()) {
            return Ok(SHORTEST_PAUSE);
        }
        let now = self.history.now();
        let noticed = self.sight.noticed();
        if *forgiven != Some(noticed) {
            // Also where other nodes live: whether those agents could reach them nobody knows.
            self.store.postpone_verdicts(now, self.history.expected().return_time()).await?;
            *forgiven = Some(noticed);
        }
        let next = self.store.next_overdue().await?;
        if next.is_some_and(|next| next <= now) {
            self.store.update_overdue_status(now).await?.iter().for_each(StatusChange::log);
            return Ok(SHORTEST_PAUSE);
        }
        let until = next.map_or(self.check_interval, |next: Moment| next.since(now));
        Ok(until.clamp(SHORTEST_PAUSE, self.check_interval.max(SHORTEST_PAUSE)))
    }
}

/// Looks for stale agents at a fixed pace.
pub struct Sweep {
    /// Where they stand.
    pub store: Arc<dyn Store>,
    /// The database's time.
    pub clock: Clock,
    /// Whether the store is away.
    pub outage: Arc<Outage>,
    /// Its pace.
    pub interval: Duration,
    /// How long an agent may be offline.
    pub stale_after: Duration,
    /// Which agents are retired instead of becoming errors.
    pub ephemeral: Ephemeral,
}

impl std::fmt::Debug for Sweep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sweep").field("interval", &self.interval).finish_non_exhaustive()
    }
}

impl Sweep {
    /// Works until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        while stop.run_until_cancelled(tokio::time::sleep(self.interval)).await.is_some() {
            let stale =
                self.store.retire_stale_agents(self.clock.now(), self.stale_after, self.ephemeral).await;
            match stale {
                Err(error) => self.outage.stumbled("the sweep", &error),
                Ok(changes) => {
                    changes.iter().for_each(StatusChange::log);
                    let retired = changes.iter().filter(|change| change.to == Status::Retired).count();
                    let errors = changes.len() - retired;
                    if !changes.is_empty() {
                        tracing::info!(count = changes.len(), retired, errors, "cleaned up stale agents");
                    }
                }
            }
        }
    }
}

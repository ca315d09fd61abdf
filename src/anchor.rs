//! Keeps the clock anchored to the database's time: measured at the start, every minute, and after a blindness.
//!
//! It must not know what is dated by it.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, Moment, Tick};
use crate::outage::Outage;
use crate::sight::Sight;
use crate::store::{Store, StoreError};

/// How often the clock is anchored.
const INTERVAL: Duration = Duration::from_mins(1);

/// A measurement of the database's time that took no longer than this is good enough.
const QUICK: Duration = Duration::from_millis(10);

/// How often a measurement is tried that took longer.
const MEASUREMENTS: usize = 5;

/// A clock that is anchored to the database's time.
pub async fn anchored(store: &dyn Store) -> Result<Clock, StoreError> {
    // Roughly first, so that there are ticks to measure by.
    let clock = Clock::anchored(store.now().await?);
    let (now, tick) = measure(store, &clock).await?;
    clock.anchor(now, tick);
    Ok(clock)
}

/// Anchors the clock again and again.
pub struct Anchor {
    /// Whose time it is.
    pub store: Arc<dyn Store>,
    /// What is anchored.
    pub clock: Clock,
    /// Whether this server was blind.
    pub sight: Arc<Sight>,
    /// Whether the store is away.
    pub outage: Arc<Outage>,
}

impl std::fmt::Debug for Anchor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Anchor").field("clock", &self.clock).finish_non_exhaustive()
    }
}

impl Anchor {
    /// Works until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(INTERVAL) => {}
                // A machine that was paused may have lost time that its monotonic clock does not know of.
                () = self.sight.blindness() => {}
            }
            match measure(self.store.as_ref(), &self.clock).await {
                Ok((now, tick)) => self.clock.anchor(now, tick),
                Err(error) => self.outage.stumbled("anchoring the clock", &error),
            }
        }
    }
}

/// The database's time, and the tick at which it read so: the middle of the quickest of some calls.
async fn measure(store: &dyn Store, clock: &Clock) -> Result<(Moment, Tick), StoreError> {
    let once = async || {
        let before = clock.tick();
        let now = store.now().await?;
        let took = clock.tick().since(before);
        Ok::<_, StoreError>((took, now, before.after(took / 2)))
    };
    let mut best = once().await?;
    for _ in 1..MEASUREMENTS {
        if best.0 <= QUICK {
            break;
        }
        let next = once().await?;
        if next.0 < best.0 {
            best = next;
        }
    }
    Ok((best.1, best.2))
}

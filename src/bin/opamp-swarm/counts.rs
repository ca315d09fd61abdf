//! Everything the swarm counts, shared by all its agents.
//!
//! Promises that counting never blocks an agent (only losses, which are rare, take a lock). Must
//! not know how the counts are shown.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
    },
    time::Duration,
};

use opamp_server::proto::ServerErrorResponseType;
use tokio::{sync::Notify, time::Instant};

use crate::{histogram::Histogram, loss::Loss};

/// A number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// The counts of the whole fleet.
#[derive(Debug)]
pub(crate) struct Counts {
    pub(crate) agents: usize,
    /// Reports sent, farewells not included.
    pub(crate) reports: Counter,
    /// Offers that answered a report.
    pub(crate) answers: Counter,
    /// Offers that came when no report was unanswered.
    pub(crate) unasked: Counter,
    /// Offers for another uid than the agent's.
    pub(crate) misaddressed: Counter,
    pub(crate) full_state_requests: Counter,
    pub(crate) uids_reassigned: Counter,
    pub(crate) reconnects: Counter,
    /// Agents that left by themselves to come back as a new process.
    pub(crate) restarts: Counter,
    /// Agents whose farewell the server acknowledged.
    pub(crate) farewells: Counter,
    pub(crate) errors: Errors,
    /// Time from an agent's first report to its answer.
    pub(crate) first_latency: Histogram,
    /// The same for reports of a change of health.
    pub(crate) change_latency: Histogram,
    /// The same for all others.
    pub(crate) later_latency: Histogram,
    acknowledged: AtomicUsize,
    all_acknowledged: Notify,
    connected: AtomicUsize,
    silent: AtomicUsize,
    absence: Mutex<Absence>,
    all_back: Notify,
    losses: Mutex<BTreeMap<String, u64>>,
}

/// What an answer took is counted by what was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Series {
    /// An agent's first report ever.
    First,
    /// A change of health.
    Change,
    /// Anything else.
    Later,
}

/// The time in which not everybody had a link who should.
#[derive(Debug, Default)]
struct Absence {
    since: Option<Instant>,
    lasted: Option<Duration>,
}

/// Error responses by type.
#[derive(Debug, Default)]
pub(crate) struct Errors {
    pub(crate) unknown: Counter,
    pub(crate) bad_request: Counter,
    pub(crate) unavailable: Counter,
}

impl Errors {
    pub(crate) fn add(&self, kind: ServerErrorResponseType) {
        match kind {
            ServerErrorResponseType::Unknown => self.unknown.add(),
            ServerErrorResponseType::BadRequest => self.bad_request.add(),
            ServerErrorResponseType::Unavailable => self.unavailable.add(),
        }
    }

    pub(crate) fn sum(&self) -> u64 {
        self.unknown.get() + self.bad_request.get() + self.unavailable.get()
    }
}

impl Counts {
    pub(crate) fn new(agents: usize) -> Self {
        Self {
            agents,
            reports: Counter::default(),
            answers: Counter::default(),
            unasked: Counter::default(),
            misaddressed: Counter::default(),
            full_state_requests: Counter::default(),
            uids_reassigned: Counter::default(),
            reconnects: Counter::default(),
            restarts: Counter::default(),
            farewells: Counter::default(),
            errors: Errors::default(),
            first_latency: Histogram::new(),
            change_latency: Histogram::new(),
            later_latency: Histogram::new(),
            acknowledged: AtomicUsize::new(0),
            all_acknowledged: Notify::new(),
            connected: AtomicUsize::new(0),
            silent: AtomicUsize::new(0),
            absence: Mutex::default(),
            all_back: Notify::new(),
            losses: Mutex::new(BTreeMap::new()),
        }
    }

    /// An agent's first report was answered, without an error.
    pub(crate) fn acknowledge(&self) {
        if self.acknowledged.fetch_add(1, AcqRel) + 1 == self.agents {
            self.all_acknowledged.notify_one();
        }
    }

    pub(crate) fn acknowledged(&self) -> usize {
        self.acknowledged.load(Acquire)
    }

    pub(crate) async fn all_acknowledged(&self) {
        while self.acknowledged() < self.agents {
            self.all_acknowledged.notified().await;
        }
    }

    /// A link was answered for the first time.
    pub(crate) fn enter(&self) {
        let connected = self.connected.fetch_add(1, AcqRel) + 1;
        if connected + self.silent() == self.agents {
            let mut absence = self.absence.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(since) = absence.since.take() {
                absence.lasted = Some(since.elapsed());
                self.all_back.notify_one();
            }
        }
    }

    /// Such a link is gone.
    pub(crate) fn exit(&self) {
        let connected = self.connected.fetch_sub(1, AcqRel);
        if connected + self.silent() == self.agents {
            let mut absence = self.absence.lock().unwrap_or_else(PoisonError::into_inner);
            absence.since = Some(Instant::now());
        }
    }

    /// Waits until everybody has a link again after somebody had lost it; how long that took.
    pub(crate) async fn all_back(&self) -> Duration {
        loop {
            self.all_back.notified().await;
            let mut absence = self.absence.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(lasted) = absence.lasted.take() {
                return lasted;
            }
        }
    }

    /// An agent says nothing any more, on a link that was `answered` or not.
    pub(crate) fn fall_silent(&self, answered: bool) {
        self.silent.fetch_add(1, AcqRel);
        if answered {
            self.connected.fetch_sub(1, AcqRel);
        }
    }

    /// Agents that have fallen silent on purpose.
    pub(crate) fn silent(&self) -> usize {
        self.silent.load(Acquire)
    }

    /// Agents whose link was answered and has not been lost since, those without that are silent.
    pub(crate) fn connected(&self) -> usize {
        self.connected.load(Acquire)
    }

    pub(crate) fn lose(&self, loss: &Loss) {
        let label = loss.label().into_owned();
        let mut losses = self.losses.lock().unwrap_or_else(PoisonError::into_inner);
        *losses.entry(label).or_default() += 1;
    }

    /// Links lost and attempts failed, by cause.
    pub(crate) fn losses(&self) -> BTreeMap<String, u64> {
        let losses = self.losses.lock().unwrap_or_else(PoisonError::into_inner);
        losses.clone()
    }

    pub(crate) fn record(&self, series: Series, latency: Duration) {
        let histogram = match series {
            Series::First => &self.first_latency,
            Series::Change => &self.change_latency,
            Series::Later => &self.later_latency,
        };
        histogram.record(latency);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_absence_lasts_from_the_first_that_goes_to_the_last_that_is_back() {
        let counts = Counts::new(3);
        let nobody = |counts: &Counts| counts.absence.lock().map(|a| a.lasted.is_none()).ok();
        (0..3).for_each(|_| counts.enter());
        assert_eq!(nobody(&counts), Some(true), "the first arrival is no return");
        counts.fall_silent(true);
        counts.exit();
        counts.exit();
        counts.enter();
        assert_eq!(nobody(&counts), Some(true));
        counts.enter();
        assert!(counts.all_back().await < Duration::from_mins(1));
        assert_eq!((counts.connected(), counts.silent()), (2, 1));
    }
}

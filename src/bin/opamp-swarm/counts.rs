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
use tokio::sync::Notify;

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
    /// Agents whose farewell the server acknowledged.
    pub(crate) farewells: Counter,
    pub(crate) errors: Errors,
    /// Time from an agent's first report to its answer.
    pub(crate) first_latency: Histogram,
    /// The same for all later reports.
    pub(crate) later_latency: Histogram,
    acknowledged: AtomicUsize,
    all_acknowledged: Notify,
    connected: AtomicUsize,
    losses: Mutex<BTreeMap<String, u64>>,
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
            farewells: Counter::default(),
            errors: Errors::default(),
            first_latency: Histogram::new(),
            later_latency: Histogram::new(),
            acknowledged: AtomicUsize::new(0),
            all_acknowledged: Notify::new(),
            connected: AtomicUsize::new(0),
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
        self.connected.fetch_add(1, Relaxed);
    }

    /// Such a link is gone.
    pub(crate) fn exit(&self) {
        self.connected.fetch_sub(1, Relaxed);
    }

    /// Agents whose link was answered and has not been lost since.
    pub(crate) fn connected(&self) -> usize {
        self.connected.load(Relaxed)
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

    pub(crate) fn record(&self, first: bool, latency: Duration) {
        let histogram = if first { &self.first_latency } else { &self.later_latency };
        histogram.record(latency);
    }
}

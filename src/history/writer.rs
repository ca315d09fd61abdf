//! The one task that writes: batches, halves where the store refuses them, patience where it is away.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::inbox::{Job, Reply, Waiting};
use super::{Shared, count};
use crate::store::{Ended, StoreError, Write, Written};

/// The most writes that share one commit.
const BATCH_LIMIT: usize = 1_000;

/// How long the writer waits before it tries again what the store could not take.
const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// How often a batch is tried that met another writer.
const CONFLICT_TRIES: u32 = 5;

/// The pace at which the store takes writes: the time of one, in nanoseconds, averaged over the last commits.
#[derive(Debug, Default)]
pub(super) struct Pace(AtomicU64);

impl Pace {
    /// Notes that so many writes took so long.
    fn note(&self, writes: usize, took: Duration) {
        let writes = u64::try_from(writes).unwrap_or(u64::MAX).max(1);
        let one = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX) / writes;
        let before = self.0.load(Ordering::Relaxed);
        // A commit of a few says little about one of many: it counts by its size.
        let weight = writes.min(100);
        let after =
            (u128::from(before) * u128::from(400 - weight) + u128::from(one) * u128::from(weight)) / 400;
        self.0.store(u64::try_from(after).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// How long so many writes will take.
    pub(super) fn time_for(&self, writes: usize) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed).saturating_mul(writes as u64))
    }
}

/// The task that writes; exactly one runs.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    /// How many writes share one commit at present: fewer while the store cannot take so many in time.
    limit: usize,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, limit: BATCH_LIMIT }
    }

    /// Writes until `stop` is cancelled and nothing is left to write.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let batch = self.take_batch();
            if !batch.is_empty() {
                self.write(batch).await;
            } else if stop.is_cancelled() {
                return;
            } else {
                tokio::select! {
                    () = self.shared.arrived.notified() => {}
                    () = stop.cancelled() => {}
                }
            }
        }
    }

    fn take_batch(&self) -> Vec<Job> {
        let mut inbox = self.shared.inbox();
        let batch = inbox.take_batch(self.limit);
        self.shared.metrics.store_backlog.set(count(inbox.len()));
        batch
    }

    /// Writes a batch, by halves where the store refuses it, until a culprit stands alone.
    async fn write(&mut self, batch: Vec<Job>) {
        let mut parts = vec![batch];
        while let Some(batch) = parts.pop() {
            let started = self.shared.clock.tick();
            let (writes, waiting): (Vec<Write>, Vec<Waiting>) =
                batch.into_iter().map(|job| (job.write, job.waiting)).unzip();
            match self.try_write(&writes).await {
                Ok(written) => {
                    let took = self.shared.clock.tick().since(started);
                    self.shared.pace.note(writes.len(), took);
                    self.shared.metrics.store_commit.record(took.as_secs_f64());
                    self.shared.metrics.store_batch_size.record(count(writes.len()));
                    self.shared.outage.written();
                    self.limit = (self.limit * 2).min(BATCH_LIMIT);
                    self.answer(writes.iter().zip(waiting).zip(written));
                }
                Err(error) => {
                    let jobs = writes.into_iter().zip(waiting);
                    let jobs = jobs.map(|(write, waiting)| Job { write, waiting }).collect();
                    self.failed(jobs, &error, &mut parts).await;
                }
            }
        }
    }

    /// A batch was not written: it waits, or goes on by halves, those of `parts` that are left included.
    async fn failed(&mut self, mut batch: Vec<Job>, error: &StoreError, parts: &mut Vec<Vec<Job>>) {
        if matches!(error, StoreError::Unavailable(_) | StoreError::Conflict | StoreError::Schema(_)) {
            // What the store could not do in time, it may do in smaller pieces.
            self.limit = (batch.len() / 2).max(1);
            parts.push(batch);
            self.postpone(parts.drain(..).rev().flatten().collect(), error).await;
        } else if batch.len() > 1 {
            let second = batch.split_off(batch.len() / 2);
            parts.push(second);
            parts.push(batch);
        } else if let Some(job) = batch.pop() {
            self.shared.metrics.store_failures.increment(1);
            tracing::warn!(agent_id = %job.write.agent(), %error, "the store refused a write");
            job.waiting.answer(Reply::Failed(error.clone()));
        }
    }

    async fn try_write(&self, writes: &[Write]) -> Result<Vec<Written>, StoreError> {
        let mut tries = 1;
        loop {
            match self.shared.store.write(writes).await {
                Err(StoreError::Conflict) if tries < CONFLICT_TRIES => tries += 1,
                result => return result,
            }
        }
    }

    /// The store is away: what waits keeps its order.
    async fn postpone(&self, jobs: Vec<Job>, error: &StoreError) {
        self.shared.outage.failed(&format!("a batch of {} writes", jobs.len()), error);
        {
            let mut inbox = self.shared.inbox();
            jobs.into_iter().rev().for_each(|job| inbox.put_back(job, error));
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }

    fn answer<'a>(&self, batch: impl Iterator<Item = ((&'a Write, Waiting), Written)>) {
        for ((write, waiting), written) in batch {
            let change = match &written {
                Written::Agent(_) | Written::Rival(_) => None,
                Written::Connection(ended) => {
                    self.shared.unrecorded.send_modify(|ends| *ends -= 1);
                    self.count_end(write, ended);
                    ended.status.as_ref()
                }
                Written::Created(opened) => {
                    if let Some(displaced) = opened.displaced {
                        self.shared.metrics.connection_ended(displaced.reason, displaced.duration_seconds);
                    }
                    opened.status.as_ref()
                }
            };
            if let Some(change) = change {
                change.log();
            }
            waiting.answer(Reply::Written(written));
        }
    }

    fn count_end(&self, write: &Write, ended: &Ended) {
        let Write::UpdateConnection(end) = write else { return };
        if let Some(seconds) = ended.duration_seconds {
            self.shared.metrics.connection_ended(end.reason, seconds);
        }
        if end.offline_at.is_some() {
            self.shared.pending_verdict.notify_one();
        }
    }
}

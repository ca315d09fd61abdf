//! The one task that writes: batches, halves where the store refuses them, patience where it is away.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::inbox::{Job, Reply, Waiting};
use super::{Shared, count};
use crate::clock::Tick;
use crate::outage::Witness;
use crate::store::{Ended, StoreError, Write, Written};

/// The most writes that share one commit.
const BATCH_LIMIT: usize = 2_000;

/// How long the writer waits before it tries again what the store could not take.
const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// The stage of ends.
const END: u8 = 1;

/// How often a batch is tried that met another writer.
const CONFLICT_TRIES: u32 = 5;

/// How fast the store takes writes, as the last commits showed.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// How long a commit takes, in microseconds.
    commit: AtomicU64,
    /// How many writes share one at most.
    limit: AtomicUsize,
    /// When the commit that is under way began, in microseconds; 0 = none is.
    began: AtomicU64,
}

impl Pace {
    fn begin(&self, now: Tick, limit: usize) {
        self.limit.store(limit, Ordering::Relaxed);
        self.began.store(now.as_micros(), Ordering::Relaxed);
    }

    fn end(&self, took: Duration) {
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let before = self.commit.load(Ordering::Relaxed);
        self.commit.store(before / 2 + took / 2, Ordering::Relaxed);
        self.began.store(0, Ordering::Relaxed);
    }

    /// How long a write that comes at `now` will wait behind so many others.
    pub(super) fn delay(&self, now: Tick, waiting: usize) -> Duration {
        let commits = waiting / self.limit.load(Ordering::Relaxed).max(1);
        let all = self.commit.load(Ordering::Relaxed).saturating_mul(commits as u64);
        let began = self.began.load(Ordering::Relaxed);
        let under_way = if began == 0 { Duration::ZERO } else { now.since(Tick::from_micros(began)) };
        under_way.max(Duration::from_micros(all))
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
            self.shared.outage.rest(batch.is_empty());
            if !batch.is_empty() {
                self.write(batch).await;
            } else if stop.is_cancelled() {
                return;
            } else {
                tokio::select! {
                    biased;
                    () = self.shared.arrived.notified() => {}
                    () = stop.cancelled() => {}
                }
            }
        }
    }

    fn take_batch(&self) -> Vec<Job> {
        let mut inbox = self.shared.inbox();
        let mut batch = inbox.take_batch(self.limit);
        self.shared.metrics.store_backlog.set(count(inbox.len()));
        drop(inbox);
        self.grant_return_time(&mut batch);
        batch
    }

    /// Moves the verdicts of ends that waited for the store: while it was away nobody was let in, and who lost its
    /// connection then has its whole return time from when this server admits again.
    fn grant_return_time(&self, batch: &mut [Job]) {
        let Shared { clock, sight, expected, .. } = &*self.shared;
        let pending = batch.iter_mut().filter_map(|job| match &mut job.write {
            Write::UpdateConnection(end) => end.offline_at.as_mut(),
            Write::CreateConnection(_) | Write::UpdateAgent(_) => None,
        });
        let mut granted = None;
        for offline_at in pending {
            let earliest = *granted.get_or_insert_with(|| {
                clock.moment(sight.resumed(clock.tick()).after(expected.return_time()))
            });
            *offline_at = earliest.max(*offline_at);
        }
    }

    /// Writes a batch, by halves where the store refuses it, until a culprit stands alone.
    async fn write(&mut self, batch: Vec<Job>) {
        let mut parts = vec![batch];
        while let Some(batch) = parts.pop() {
            let started = self.shared.clock.tick();
            let (writes, waiting): (Vec<Write>, Vec<Waiting>) =
                batch.into_iter().map(|job| (job.write, job.waiting)).unzip();
            self.shared.pace.begin(started, self.limit);
            let result = self.try_write(&writes).await;
            let took = self.shared.clock.tick().since(started);
            self.shared.pace.end(took);
            match result {
                Ok(written) => {
                    self.shared.metrics.store_commit.record(took.as_secs_f64());
                    self.shared.metrics.store_batch_size.record(count(writes.len()));
                    self.shared.outage.written(Witness::Writer);
                    self.shared.successes.fetch_add(1, Ordering::Relaxed);
                    self.limit = (self.limit * 2).min(BATCH_LIMIT);
                    self.answer(writes.into_iter().zip(waiting).zip(written));
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
        if matches!(error, StoreError::NodeEnded) {
            // What it left was ended by who marked it.
            parts.push(batch);
            for job in parts.drain(..).flatten() {
                self.give_up(job, error);
            }
            self.shared.node_ended.notify_one();
        } else if matches!(error, StoreError::Unavailable(_) | StoreError::Conflict | StoreError::Schema(_)) {
            // What the store could not do in time, it may do in smaller pieces.
            self.limit = (batch.len() / 2).max(1);
            parts.push(batch);
            self.postpone(parts.drain(..).rev().flatten().collect(), error).await;
        } else if batch.len() > 1 {
            let second = batch.split_off(batch.len() / 2);
            parts.push(second);
            parts.push(batch);
        } else if let Some(Job { write: Write::CreateConnection(new), .. }) = batch.first_mut()
            && new.first_report.take().is_some()
        {
            // It may be the report that the store refuses: its agent is connected all the same.
            parts.push(batch);
        } else if let Some(job) =
            batch.pop_if(|job| matches!(error, StoreError::Rejected(_)) && job.is_opened_again())
        {
            // Its row was made when its answer was lost, and a newer connection has ended it since: what the report
            // holds is as good as ever. Were it not, it is refused when it comes again.
            self.give_up(job, &StoreError::Unavailable("its opening was overtaken".to_owned()));
        } else if let Some(job) = batch.pop() {
            self.refuse(job, error);
        }
    }

    /// The store cannot take this very write: nothing more is tried.
    fn refuse(&self, job: Job, error: &StoreError) {
        self.shared.metrics.store_failures.increment(1);
        tracing::warn!(agent_id = %job.write.agent(), %error, "the store refused a write");
        self.give_up(job, error);
    }

    fn give_up(&self, job: Job, error: &StoreError) {
        if job.write.stage() == END {
            self.shared.unrecorded.send_modify(|ends| *ends -= 1);
        }
        job.waiting.answer(Reply::Failed(error.clone()));
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
        let work = format!("a batch of {} writes", jobs.len());
        self.shared.outage.failed(Witness::Writer, &work, error);
        let (alone, successes) = (jobs.len() == 1, self.shared.successes.load(Ordering::Relaxed));
        let hopeless: Vec<Job> = {
            let mut inbox = self.shared.inbox();
            let back = jobs.into_iter().rev();
            let hopeless = back.filter_map(|job| inbox.put_back(job, error, alone, successes)).collect();
            inbox.give_up_waiting(error);
            hopeless
        };
        for job in hopeless {
            self.refuse(job, error);
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }

    fn answer(&self, batch: impl Iterator<Item = ((Write, Waiting), Written)>) {
        for ((write, waiting), written) in batch {
            let change = match &written {
                Written::Agent(_) | Written::Rival(_) => None,
                Written::Connection(ended) => {
                    self.shared.unrecorded.send_modify(|ends| *ends -= 1);
                    self.count_end(&write, ended);
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
            // Whoever waits is then the last to hold its report.
            drop(write);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_follows_what_commits_take_and_the_one_under_way() {
        let (pace, at) = (Pace::default(), |second: u64| Tick::from_micros(second * 1_000_000));
        assert_eq!(pace.delay(at(1), 5_000), Duration::ZERO, "nothing is known");
        for second in 1..20 {
            pace.begin(at(second), 1_000);
            pace.end(Duration::from_millis(500));
        }
        let delay = pace.delay(at(20), 5_000);
        assert!(delay > Duration::from_millis(2_400) && delay <= Duration::from_millis(2_500), "{delay:?}");
        pace.begin(at(20), 1_000);
        assert_eq!(pace.delay(at(27), 10), Duration::from_secs(7), "it hangs");
    }
}

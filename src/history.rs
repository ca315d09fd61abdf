//! The timeline of connections, written in batches: whatever arrives during one commit shares the next.
//!
//! [`History`] is the handle, [`Writer`] the one task that writes. Promises: an opening is durable
//! before it is answered, a connection ends exactly once ([`OpenConnection`] remembers its end), an
//! end is never lost while the process lives, and one odd agent never spoils the commit of others.
//! It must not know what a report said or how a link looks.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::agent::InstanceUid;
use crate::burden::Share;
use crate::clock::{Clock, Moment, Tick};
use crate::close::{Cause, CloseReason};
use crate::metrics::Metrics;
use crate::outage::Outage;
use crate::pulse::{Expectations, Link, Pulse};
use crate::store::{
    AgentUpdate, ConnectionEnd, Ended, NewConnection, Older, Opened, Rival, Store, StoreError, Transport,
    Write, Written,
};

/// The most writes that share one commit.
const BATCH_LIMIT: usize = 1_000;

/// What the messages behind the writes of one commit may hold together: larger ones stand alone.
const BATCH_BYTES: u64 = 64 << 20;

/// How long the writer waits before it tries ends again that the store could not take.
const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// How often a batch is tried that met another writer.
const CONFLICT_TRIES: u32 = 5;

/// An open connection: what the parts of this node share of it.
#[derive(Debug)]
pub struct OpenConnection {
    /// Whose connection.
    pub agent: InstanceUid,
    /// Its id, the fence of all writes.
    pub id: i64,
    /// How its reports travel.
    pub transport: Transport,
    /// The link it is on.
    pub link: Arc<Link>,
    /// Its signs of life.
    pub pulse: Pulse,
    end: OnceLock<CloseReason>,
    recorded: AtomicBool,
    /// The latest sign of life that this node handed to the store, in microseconds.
    sighted: AtomicI64,
}

impl OpenConnection {
    /// A connection that was opened with this id.
    #[must_use]
    pub fn new(agent: InstanceUid, id: i64, transport: Transport, link: Arc<Link>, pulse: Pulse) -> Self {
        link.enter();
        let (end, recorded, sighted) = (OnceLock::new(), AtomicBool::new(false), AtomicI64::new(i64::MIN));
        Self { agent, id, transport, link, pulse, end, recorded, sighted }
    }

    /// Why it ended; `None` while it is open.
    #[must_use]
    pub fn ended(&self) -> Option<CloseReason> {
        self.end.get().copied()
    }

    /// True once its end is on record, so that the peer may be told.
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        self.recorded.load(Ordering::Acquire)
    }

    /// Notes that the store is told of a sign of life: what it shows later than that, another node heard.
    pub fn note_sighting(&self, at: Moment) {
        self.sighted.fetch_max(at.as_micros(), Ordering::Relaxed);
    }

    /// Notes an end that is on record already, because a newer connection took over.
    pub fn abandon(&self, reason: CloseReason) {
        if self.claim_end(reason) {
            self.settle();
        }
    }

    /// Notes why it ended; false where it had ended before.
    fn claim_end(&self, reason: CloseReason) -> bool {
        let first = self.end.set(reason).is_ok();
        if first {
            self.link.leave();
        }
        first
    }

    /// Notes that the end is on record and tells the link.
    fn settle(&self) {
        self.recorded.store(true, Ordering::Release);
        self.link.wake();
    }

    /// For a poller whose pace is known: how long it may be silent.
    #[must_use]
    pub fn poll_silence(&self, expected: &Expectations) -> Option<Duration> {
        if self.transport == Transport::Http { self.pulse.beat().poll_silence(expected) } else { None }
    }

    /// When it was last heard.
    #[must_use]
    pub fn last_seen(&self) -> Tick {
        self.pulse.beat().last_seen(self.transport, &self.link)
    }
}

/// How the end of a connection was noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noticed {
    /// The peer itself showed it, just now.
    Seen,
    /// The server knows or decides it now; the last proof that it was connected is its last sign of life.
    Concluded,
    /// A poller fell silent: as `Concluded`, unless another node heard it since.
    Unheard,
}

/// A connection to open.
#[derive(Debug)]
pub struct Opening<'a> {
    /// Whose connection.
    pub agent: InstanceUid,
    /// How its reports travel.
    pub transport: Transport,
    /// Peer address and port.
    pub remote_addr: &'a str,
    /// When its first report came.
    pub heard: Tick,
    /// The number of that report.
    pub number: u64,
    /// The connection of the same uid that lives on this node.
    pub older: Option<&'a OpenConnection>,
    /// The uid to give to its agent where two agents share one; none where it would not understand.
    pub spare: Option<InstanceUid>,
}

/// What an opening came to.
#[derive(Debug)]
pub enum Opens {
    /// The connection is open and durable.
    Connection(Box<Opened>),
    /// It comes from another agent than the connected one, and is to be opened under another uid.
    Rival(Rival),
}

/// Waits until an end is on record.
#[derive(Debug)]
pub struct EndTicket(oneshot::Receiver<Result<Written, StoreError>>);

impl EndTicket {
    /// Waits; `None` where the store took it for wrong or the writer is gone.
    pub async fn recorded(self) -> Option<Ended> {
        match self.0.await {
            Ok(Ok(Written::Connection(ended))) => Some(ended),
            _ => None,
        }
    }
}

#[derive(Debug)]
struct Job {
    write: Write,
    waiting: Waiting,
}

/// Who waits for a write.
#[derive(Debug)]
struct Waiting {
    /// The connection that a write ends: its link is told once that is on record.
    ends: Option<Arc<OpenConnection>>,
    /// What the message behind it holds of the budget for messages.
    share: Option<Share>,
    /// True where it was postponed before.
    postponed: bool,
    answer: oneshot::Sender<Result<Written, StoreError>>,
}

impl Waiting {
    fn answer(self, result: Result<Written, StoreError>) {
        if let Some(connection) = self.ends {
            connection.settle();
        }
        // Who no longer waits has been told enough by the link.
        let _unawaited = self.answer.send(result);
    }
}

struct Shared {
    store: Arc<dyn Store>,
    clock: Clock,
    metrics: Arc<Metrics>,
    outage: Arc<Outage>,
    node_id: Uuid,
    node_seq: AtomicI64,
    expected: Expectations,
    inbox: Mutex<VecDeque<Job>>,
    arrived: Notify,
    pending_verdict: Notify,
    /// How many ends are not on record.
    unrecorded: watch::Sender<usize>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("History").field("node_id", &self.node_id).finish_non_exhaustive()
    }
}

/// The handle to the timeline; cheap to clone.
///
/// Its queue is bounded by what is open: a link waits for its opening and its saves, and each
/// connection ends once.
#[derive(Clone, Debug)]
pub struct History {
    shared: Arc<Shared>,
}

/// The task that writes; exactly one runs.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    /// How many writes share one commit at present: fewer while the store cannot take so many in time.
    limit: usize,
}

impl History {
    /// A timeline written into `store` by the node `node_id`, and its writer.
    #[must_use]
    pub fn new(
        store: Arc<dyn Store>,
        clock: Clock,
        metrics: Arc<Metrics>,
        outage: Arc<Outage>,
        node_id: Uuid,
        expected: Expectations,
    ) -> (Self, Writer) {
        let shared = Arc::new(Shared {
            store,
            clock,
            metrics,
            outage,
            node_id,
            node_seq: AtomicI64::new(0),
            expected,
            inbox: Mutex::default(),
            arrived: Notify::new(),
            pending_verdict: Notify::new(),
            unrecorded: watch::Sender::new(0),
        });
        (Self { shared: Arc::clone(&shared) }, Writer { shared, limit: BATCH_LIMIT })
    }

    /// Opens a connection; it is durable when this returns.
    pub async fn open(&self, opening: Opening<'_>) -> Result<Opens, StoreError> {
        let Opening { agent, transport, remote_addr, heard, number, older, spare } = opening;
        let now = self.shared.clock.moment(heard);
        let new = NewConnection {
            agent,
            transport,
            remote_addr: remote_addr.to_owned(),
            node_id: self.shared.node_id,
            node_seq: self.shared.node_seq.fetch_add(1, Ordering::Relaxed),
            at: now,
            number,
            older: older.map(|older| Older {
                connection_id: older.id,
                last_proof: self.shared.clock.moment(older.last_seen()),
                number: older.pulse.beat().heard,
            }),
            spare,
            first_poll: (transport == Transport::Http).then(|| self.shared.expected.first_poll()),
        };
        match self.push(Write::CreateConnection(new), None, None).await {
            Ok(Ok(Written::Created(opened))) => {
                self.shared.metrics.connections_opened.of(transport).increment(u64::from(!opened.continued));
                Ok(Opens::Connection(opened))
            }
            Ok(Ok(Written::Rival(rival))) => {
                self.shared.metrics.clones.increment(u64::from(rival.offers == 1));
                Ok(Opens::Rival(rival))
            }
            Ok(Err(error)) => Err(error),
            Ok(Ok(_)) | Err(_) => Err(writer_gone()),
        }
    }

    /// Stores what an agent reported; false where a newer connection took over.
    ///
    /// `share` is held until that is done, whether anybody waits for it or not.
    pub async fn save(&self, update: AgentUpdate, share: Option<Share>) -> Result<bool, StoreError> {
        match self.push(Write::UpdateAgent(Box::new(update)), None, share).await {
            Ok(Ok(Written::Agent(stored))) => Ok(stored),
            Ok(Err(error)) => Err(error),
            Ok(Ok(_)) | Err(_) => Err(writer_gone()),
        }
    }

    /// Ends a connection, unless it has ended before. The end is queued at once, so that whatever
    /// is queued later comes after it; the ticket tells when it is on record.
    pub fn end(
        &self,
        connection: &Arc<OpenConnection>,
        reason: CloseReason,
        noticed: Noticed,
    ) -> Option<EndTicket> {
        // Before the link is left: whether it was shared decides what counts as a sign of life.
        let heard = connection.last_seen();
        if !connection.claim_end(reason) {
            return None;
        }
        let clock = &self.shared.clock;
        let now = clock.now();
        let beat = connection.pulse.beat();
        let last_seen_at = clock.moment(heard).min(now);
        let seen = noticed == Noticed::Seen;
        let sighted = Moment::from_micros(connection.sighted.load(Ordering::Relaxed));
        let server_caused = reason.cause() == Cause::Server;
        let end = ConnectionEnd {
            agent: connection.agent,
            connection_id: connection.id,
            reason,
            disconnected_at: if seen { now } else { last_seen_at },
            disconnected_by: (!seen).then_some(now),
            last_seen_at,
            sequence_num: if beat.unsaved { None } else { beat.number },
            offline_at: server_caused.then(|| now.after(self.shared.expected.return_time())),
            unless_seen_after: (noticed == Noticed::Unheard).then_some(last_seen_at.max(sighted)),
            node_id: self.shared.node_id,
        };
        self.shared.unrecorded.send_modify(|ends| *ends += 1);
        Some(EndTicket(self.push(Write::UpdateConnection(end), Some(Arc::clone(connection)), None)))
    }

    /// How many connections have ended whose end is not on record.
    #[must_use]
    pub fn unrecorded(&self) -> usize {
        *self.shared.unrecorded.borrow()
    }

    /// Waits until every end is on record.
    pub async fn recorded(&self) {
        // The sender lives as long as this handle.
        let mut unrecorded = self.shared.unrecorded.subscribe();
        let _every_end = unrecorded.wait_for(|ends| *ends == 0).await;
    }

    /// Waits until an end was written whose verdict is still pending.
    pub async fn pending_verdict(&self) {
        self.shared.pending_verdict.notified().await;
    }

    fn push(
        &self,
        write: Write,
        ends: Option<Arc<OpenConnection>>,
        share: Option<Share>,
    ) -> oneshot::Receiver<Result<Written, StoreError>> {
        let (answer, answered) = oneshot::channel();
        let length = {
            let mut inbox = self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
            inbox.push_back(Job { write, waiting: Waiting { ends, share, postponed: false, answer } });
            inbox.len()
        };
        self.shared.metrics.store_backlog.set(count(length));
        self.shared.arrived.notify_one();
        answered
    }
}

fn writer_gone() -> StoreError {
    StoreError::Unavailable("the writer has stopped".to_owned())
}

/// A count as a metric's value.
#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
fn count(number: usize) -> f64 {
    number as f64
}

impl Writer {
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

    /// The longest run of waiting jobs that may share a commit: no agent twice, but for its end ahead of its opening.
    fn take_batch(&self) -> Vec<Job> {
        let mut inbox = self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stages: HashMap<InstanceUid, u8> = HashMap::new();
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while let Some(job) = inbox.front() {
            bytes += job.waiting.share.as_ref().map_or(0, Share::asked);
            let stage = job.write.stage();
            let shares = match (stages.get(&job.write.agent()), &job.write) {
                (None, _) | (Some(1), Write::CreateConnection(_)) => true,
                (Some(_), _) => false,
            };
            let fits = batch.is_empty() || bytes <= BATCH_BYTES;
            if !shares || !fits || batch.len() == self.limit {
                break;
            }
            stages.insert(job.write.agent(), stage);
            batch.extend(inbox.pop_front());
        }
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
            job.waiting.answer(Err(error.clone()));
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

    /// The store is away: ends wait in their order, openings do once, everything else is answered.
    ///
    /// An opening is done again because nobody knows whether it was: the answer to a commit may be
    /// lost, and then its row would be open without an owner. The store recognises it (`node_seq`).
    async fn postpone(&self, jobs: Vec<Job>, error: &StoreError) {
        self.shared.outage.failed(&format!("a batch of {} writes", jobs.len()), error);
        {
            let mut inbox = self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
            for mut job in jobs.into_iter().rev() {
                match job.write {
                    Write::UpdateConnection(_) => inbox.push_front(job),
                    Write::CreateConnection(_) if !job.waiting.postponed => {
                        job.waiting.postponed = true;
                        inbox.push_front(job);
                    }
                    Write::UpdateAgent(_) | Write::CreateConnection(_) => {
                        job.waiting.answer(Err(error.clone()));
                    }
                }
            }
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
            waiting.answer(Ok(written));
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

impl History {
    /// The clock of all moments on this timeline.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.shared.clock
    }

    /// What the server expects of agents.
    #[must_use]
    pub fn expected(&self) -> &Expectations {
        &self.shared.expected
    }

    /// The present moment.
    #[must_use]
    pub fn now(&self) -> Moment {
        self.shared.clock.now()
    }
}

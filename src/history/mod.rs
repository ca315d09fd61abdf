//! The timeline of connections, written in batches: whatever arrives during one commit shares the next.
//!
//! [`History`] is the handle, [`Writer`] the one task that writes. Promises: an opening is durable
//! before it is answered, a connection ends exactly once ([`OpenConnection`] remembers its end), an
//! end is never lost while the process lives, a change that could not be stored is kept until it
//! is, and one odd agent never spoils the commit of others. It must not know what a report said or
//! how a link looks.

mod inbox;
mod writer;

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot, watch};
use uuid::Uuid;

use crate::agent::InstanceUid;
use crate::burden::Share;
use crate::clock::{Clock, Moment, Tick};
use crate::close::{Cause, CloseReason};
use crate::metrics::Metrics;
use crate::outage::Outage;
use crate::pulse::{Expectations, Link, Pulse};
use crate::sight::Sight;
use crate::store::{
    AgentUpdate, ConnectionEnd, Ended, FirstReport, Heir, Held, NewConnection, Older, Opened, Rival, Store,
    StoreError, Transport, Write, Written,
};
use inbox::{Answered, AtWork, Concern, Inbox, Job, Reply};
use writer::Pace;
pub use writer::Writer;

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
    /// True where its end will not be put on record by this node.
    unrecordable: AtomicBool,
    /// True where a change that was answered could not be stored after all.
    forgot: AtomicBool,
    /// The latest sign of life that this node handed to the store, in microseconds.
    sighted: AtomicI64,
}

impl OpenConnection {
    /// A connection that was opened with this id.
    #[must_use]
    pub fn new(agent: InstanceUid, id: i64, transport: Transport, link: Arc<Link>, pulse: Pulse) -> Self {
        link.enter();
        let (end, sighted) = (OnceLock::new(), AtomicI64::new(i64::MIN));
        let [recorded, unrecordable, forgot] = std::array::from_fn(|_| AtomicBool::new(false));
        Self { agent, id, transport, link, pulse, end, recorded, unrecordable, forgot, sighted }
    }

    /// Why it ended; `None` while it is open.
    #[must_use]
    pub fn ended(&self) -> Option<CloseReason> {
        self.end.get().copied()
    }

    /// True once its end is on record, so that the peer may be told, or never will be.
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        self.recorded.load(Ordering::Acquire)
    }

    /// True where this node cannot put its end on record: what the record will say of it is not known here, so that the
    /// peer is told nothing.
    #[must_use]
    pub fn is_unrecordable(&self) -> bool {
        self.unrecordable.load(Ordering::Acquire)
    }

    /// Notes that the store is told of a sign of life: what it shows later than that, another node heard.
    pub fn note_sighting(&self, at: Moment) {
        self.sighted.fetch_max(at.as_micros(), Ordering::Relaxed);
    }

    /// The latest sign of life that this node handed to the store.
    #[must_use]
    pub fn sighted(&self) -> Moment {
        Moment::from_micros(self.sighted.load(Ordering::Relaxed))
    }

    /// Notes an end that is on record already, because a newer connection took over.
    pub fn abandon(&self, reason: CloseReason) {
        if self.claim_end(reason) {
            self.settle();
        }
    }

    /// True where a change that was answered could not be stored after all: full state is to be asked for.
    #[must_use]
    pub fn forgot(&self) -> bool {
        self.forgot.load(Ordering::Relaxed)
    }

    /// Notes that full state is asked for.
    pub fn asked(&self) {
        self.forgot.store(false, Ordering::Relaxed);
    }

    /// Notes that a change that was answered could not be stored after all: until its agent was asked for
    /// everything, no number stands for what is stored.
    fn forget(&self) {
        self.forgot.store(true, Ordering::Relaxed);
        self.pulse.forget();
        self.link.wake();
    }

    /// Notes that a kept change was not stored because the store knows what is newer.
    ///
    /// Of a link, a newer connection told it: this one is over. Of polls, another node may have told it for this very
    /// connection, which goes on. Where it has ended, its change stays unsaved, and the number on record stands.
    fn overtaken(&self) {
        match self.transport {
            Transport::Websocket => self.abandon(CloseReason::Superseded),
            Transport::Http if self.ended().is_none() => {
                self.forget();
                self.pulse.release();
            }
            Transport::Http => {}
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

    /// Notes that its end will not be put on record by this node, and tells the link.
    fn give_up_end(&self) {
        self.unrecordable.store(true, Ordering::Release);
        self.settle();
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

    /// What is proved by a sign of life that was read at `seen`: less, where nothing was read before.
    #[must_use]
    pub fn proof(&self, sight: &Sight, seen: Tick) -> Tick {
        match self.transport {
            Transport::Websocket => sight.proof(self.link.proof(seen)),
            // Each poll has a socket of its own, whose bytes are dated as they come.
            Transport::Http => sight.proof(seen),
        }
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
    /// The peer itself showed it, by what was read at this tick.
    SeenAt(Tick),
    /// The server knows or decides it now; the last proof that it was connected is its last sign of life.
    Concluded,
    /// A poller fell silent: as `Concluded`, unless another node heard it since.
    Unheard,
    /// A poller showed it, by what was read so late that it counts only if no other node heard it after this moment.
    Late(Moment),
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
    /// How long a poll that another node read may be on its way to the store.
    pub poll_grace: Duration,
    /// When the last of the other nodes went: who polled there had to find this one.
    pub peer_lost: Option<Tick>,
    /// What is stored with it where nothing is on record of the agent.
    pub first_report: Option<Arc<FirstReport>>,
}

/// What an opening came to.
#[derive(Debug)]
pub enum Opens {
    /// The connection is open and durable.
    Connection {
        /// What the store says of it.
        opened: Box<Opened>,
        /// The sign of life that this opening told the store.
        told: Moment,
    },
    /// It comes from another agent than the connected one, and is to be opened under another uid.
    Rival(Rival),
}

/// What became of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Saved {
    /// It is stored.
    Stored,
    /// The store is away: it is kept in memory and stored once the store is back.
    Kept,
    /// A newer connection took over: it is not stored.
    Superseded,
}

/// Waits until an end is on record.
#[derive(Debug)]
pub struct EndTicket(oneshot::Receiver<Answered>);

impl EndTicket {
    /// Waits; `None` where the store took it for wrong or the writer is gone.
    pub async fn recorded(self) -> Option<Ended> {
        match self.0.await.ok()?.reply {
            Reply::Written(Written::Connection(ended)) => Some(ended),
            Reply::Written(_) | Reply::Kept | Reply::Failed(_) => None,
        }
    }
}

struct Shared {
    store: Arc<dyn Store>,
    clock: Clock,
    metrics: Arc<Metrics>,
    sight: Arc<Sight>,
    outage: Arc<Outage>,
    node_id: Uuid,
    node_seq: AtomicI64,
    expected: Expectations,
    inbox: Mutex<Inbox>,
    /// Agents one of whose connections is about to open or to end.
    at_work: Arc<AtWork>,
    /// How fast the store takes writes.
    pace: Pace,
    /// How many batches were written.
    successes: AtomicU64,
    arrived: Notify,
    pending_verdict: Notify,
    node_ended: Notify,
    /// How many ends are not on record.
    unrecorded: watch::Sender<usize>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("History").field("node_id", &self.node_id).finish_non_exhaustive()
    }
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The handle to the timeline; cheap to clone.
///
/// Its queue is bounded by what is open: a link waits for its opening and its saves, each
/// connection ends once, and of each the newest state is kept.
#[derive(Clone, Debug)]
pub struct History {
    shared: Arc<Shared>,
}

impl History {
    /// A timeline written into `store` by the node `node_id`, and its writer.
    #[must_use]
    pub fn new(
        store: Arc<dyn Store>,
        clock: Clock,
        metrics: Arc<Metrics>,
        sight: Arc<Sight>,
        node_id: Uuid,
        expected: Expectations,
    ) -> (Self, Writer) {
        let outage = Arc::clone(sight.outage());
        let shared = Arc::new(Shared {
            store,
            clock,
            metrics,
            sight,
            outage,
            node_id,
            node_seq: AtomicI64::new(0),
            expected,
            inbox: Mutex::default(),
            at_work: Arc::default(),
            pace: Pace::default(),
            successes: AtomicU64::new(0),
            arrived: Notify::new(),
            pending_verdict: Notify::new(),
            node_ended: Notify::new(),
            unrecorded: watch::Sender::new(0),
        });
        (Self { shared: Arc::clone(&shared) }, Writer::new(shared))
    }

    /// Opens a connection; it is durable when this returns, with the first report where nothing was on record of its
    /// agent.
    ///
    /// With a first report, `share` is held meanwhile, whether anybody waits for it or not, and comes back with the answer.
    pub async fn open(&self, opening: Opening<'_>, share: &mut Option<Share>) -> Result<Opens, StoreError> {
        let Opening { agent, transport, heard, number, older, spare, poll_grace, peer_lost, .. } = opening;
        let now = self.shared.clock.moment(heard);
        let proof = if transport == Transport::Http { self.shared.sight.proof(heard) } else { heard };
        let told = self.shared.clock.moment(proof);
        let new = NewConnection {
            agent,
            transport,
            remote_addr: opening.remote_addr.to_owned(),
            node_id: self.shared.node_id,
            node_seq: self.shared.node_seq.fetch_add(1, Ordering::Relaxed),
            at: now,
            seen_at: told,
            number,
            older: older.map(|older| Older {
                connection_id: older.id,
                transport: older.transport,
                last_proof: self.shared.clock.moment(older.proof(&self.shared.sight, older.last_seen())),
                number: older.pulse.beat().heard,
            }),
            spare,
            first_poll: (transport == Transport::Http).then(|| self.shared.expected.first_poll()),
            poll_grace,
            excused_until: (transport == Transport::Http).then(|| {
                let resumed = self.shared.sight.resumed(self.shared.clock.tick());
                let excused_from = resumed.max(peer_lost.unwrap_or_default());
                self.shared.clock.moment(excused_from.after(self.shared.expected.return_time()))
            }),
            first_report: opening.first_report,
        };
        let held = if new.first_report.is_some() { share.take() } else { None };
        let answered = self.push(Write::CreateConnection(new), Concern::Nobody, held).await;
        let Answered { reply, share: left } = answered.map_err(|_| writer_gone())?;
        *share = left.or(share.take());
        match reply {
            Reply::Written(Written::Created(opened)) => {
                self.shared.metrics.connections_opened.of(transport).increment(u64::from(!opened.continued));
                Ok(Opens::Connection { opened, told })
            }
            Reply::Written(Written::Rival(rival)) => {
                self.shared.metrics.clones.increment(u64::from(rival.offers == 1));
                Ok(Opens::Rival(rival))
            }
            Reply::Failed(error) => Err(error),
            Reply::Written(_) | Reply::Kept => Err(writer_gone()),
        }
    }

    /// Stores what an agent reported on `connection`, or keeps it while the store is away.
    ///
    /// `share` is held until that is done, whether anybody waits for it or not.
    pub async fn save(
        &self,
        connection: &Arc<OpenConnection>,
        update: AgentUpdate,
        share: Option<Share>,
    ) -> Result<Saved, StoreError> {
        let saves = Concern::Saves(Arc::clone(connection));
        let answered = self.push(Write::UpdateAgent(Box::new(update)), saves, share).await;
        match answered.map_err(|_| writer_gone())?.reply {
            Reply::Written(Written::Agent(true)) => Ok(Saved::Stored),
            Reply::Written(Written::Agent(false)) => Ok(Saved::Superseded),
            Reply::Kept => Ok(Saved::Kept),
            Reply::Failed(error) => Err(error),
            Reply::Written(_) => Err(writer_gone()),
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
        let (clock, sight) = (&self.shared.clock, &self.shared.sight);
        let tick = if let Noticed::SeenAt(tick) = noticed { tick } else { clock.tick() };
        let now = clock.moment(tick);
        let last_seen_at = clock.moment(connection.proof(sight, heard)).min(now);
        // What is read after a time in which nothing was may have happened at any moment of it.
        let shown = matches!(noticed, Noticed::Seen | Noticed::SeenAt(_));
        let seen = shown && connection.proof(sight, tick) == tick;
        // Who lost its connection while newcomers are refused could not have kept it: nobody said good-bye.
        let server_caused = reason.cause() == Cause::Server
            || reason == CloseReason::ConnectionLost && sight.is_refusing(tick);
        let (number, unsaved) = connection.pulse.stands();
        let end = ConnectionEnd {
            agent: connection.agent,
            connection_id: connection.id,
            reason,
            disconnected_at: if seen { now } else { last_seen_at },
            disconnected_by: (!seen).then_some(now),
            last_seen_at,
            sequence_num: number,
            unsaved,
            offline_at: server_caused.then(|| now.after(self.shared.expected.return_time())),
            unless_seen_after: match noticed {
                Noticed::Unheard => Some(last_seen_at.max(connection.sighted())),
                Noticed::Late(known) => Some(known),
                Noticed::Seen | Noticed::SeenAt(_) | Noticed::Concluded => None,
            },
            node_id: self.shared.node_id,
        };
        self.shared.unrecorded.send_modify(|ends| *ends += 1);
        Some(EndTicket(self.push(Write::UpdateConnection(end), Concern::Ends(Arc::clone(connection)), None)))
    }

    /// Ends a row that is on record as open and that no connection of this process stands for.
    #[must_use]
    pub fn end_stray(&self, row: &Held) -> Option<EndTicket> {
        let now = self.now();
        let end = ConnectionEnd {
            agent: row.agent,
            connection_id: row.id,
            reason: CloseReason::InternalError,
            disconnected_at: row.last_seen_at.min(now),
            disconnected_by: Some(now),
            last_seen_at: row.last_seen_at.min(now),
            sequence_num: None,
            unsaved: false,
            offline_at: Some(now.after(self.shared.expected.return_time())),
            unless_seen_after: None,
            node_id: self.shared.node_id,
        };
        self.shared.unrecorded.send_modify(|ends| *ends += 1);
        Some(EndTicket(self.push(Write::UpdateConnection(end), Concern::Nobody, None)))
    }

    /// True while something about the agent's connections waits to be written or is being written.
    #[must_use]
    pub fn is_at_work_on(&self, agent: InstanceUid) -> bool {
        self.shared.at_work.has(agent)
    }

    /// How long a write that comes now will wait for those before it, at the pace at which the store
    /// took the last ones.
    #[must_use]
    pub fn delay(&self) -> Duration {
        self.shared.pace.delay(self.shared.clock.tick(), self.shared.inbox().len())
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

    /// This node.
    #[must_use]
    pub fn node_id(&self) -> Uuid {
        self.shared.node_id
    }

    /// Tells that ends were written elsewhere whose verdicts are pending.
    pub fn expect_verdicts(&self) {
        self.shared.pending_verdict.notify_one();
    }

    /// Waits until an end was written whose verdict is still pending.
    pub async fn pending_verdict(&self) {
        self.shared.pending_verdict.notified().await;
    }

    /// Waits until a write was refused because this node is marked as ended.
    pub async fn node_ended(&self) {
        self.shared.node_ended.notified().await;
    }

    fn push(&self, write: Write, concern: Concern, share: Option<Share>) -> oneshot::Receiver<Answered> {
        let (answer, answered) = oneshot::channel();
        let at_work = (write.stage() > 0).then(|| AtWork::note(&self.shared.at_work, write.agent()));
        let job = Job::new(write, concern, share, at_work, answer);
        let length = {
            let mut inbox = self.shared.inbox();
            if self.shared.outage.is_away() && job.can_be_kept() {
                inbox.keep(job);
            } else {
                inbox.push(job);
            }
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

    /// This node as the one that ends, at this moment, what others left open.
    #[must_use]
    pub fn heir(&self) -> Heir {
        let expected = self.expected();
        Heir {
            node: self.shared.node_id,
            at: self.now(),
            return_time: expected.return_time(),
            first_poll: expected.first_poll(),
        }
    }

    /// The present moment.
    #[must_use]
    pub fn now(&self) -> Moment {
        self.shared.clock.now()
    }
}

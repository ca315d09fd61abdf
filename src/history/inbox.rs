//! What waits to be written: jobs in their order, and the changes that are kept while the store is away.

use std::collections::VecDeque;
use std::collections::btree_map::{BTreeMap, OccupiedEntry};
use std::collections::hash_map::{Entry, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::OpenConnection;
use crate::agent::InstanceUid;
use crate::burden::Share;
use crate::close::CloseReason;
use crate::store::{StoreError, Write, Written};

/// What the messages behind the writes of one commit may hold together: larger ones stand alone.
const BATCH_BYTES: u64 = 64 << 20;

/// What became of a job.
#[derive(Debug)]
pub(super) enum Reply {
    /// The store's answer.
    Written(Written),
    /// The store is away; it is kept.
    Kept,
    /// It was not done, and is not done any more.
    Failed(StoreError),
}

/// Whose connection a job concerns, beside whoever waits for it.
#[derive(Debug)]
pub(super) enum Concern {
    /// There is none yet.
    Nobody,
    /// Its link is told once its end is on record.
    Ends(Arc<OpenConnection>),
    /// A change of it.
    Saves(Arc<OpenConnection>),
    /// A change of it that was answered already.
    Kept(Arc<OpenConnection>),
}

/// Agents one of whose connections is about to open or to end, and how many such writes there are.
#[derive(Debug, Default)]
pub(super) struct AtWork(Mutex<HashMap<InstanceUid, u32>>);

impl AtWork {
    /// Notes that something about `agent` is under way.
    pub(super) fn note(registry: &Arc<Self>, agent: InstanceUid) -> Working {
        *registry.lock().entry(agent).or_default() += 1;
        Working { registry: Arc::clone(registry), agent }
    }

    pub(super) fn has(&self, agent: InstanceUid) -> bool {
        self.lock().contains_key(&agent)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<InstanceUid, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One thing that is under way.
#[derive(Debug)]
pub(super) struct Working {
    registry: Arc<AtWork>,
    agent: InstanceUid,
}

impl Drop for Working {
    fn drop(&mut self) {
        if let Entry::Occupied(mut writes) = self.registry.lock().entry(self.agent) {
            *writes.get_mut() -= 1;
            if *writes.get() == 0 {
                writes.remove();
            }
        }
    }
}

/// One write, and who waits for it.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) write: Write,
    pub(super) waiting: Waiting,
}

/// Who waits for a write.
#[derive(Debug)]
pub(super) struct Waiting {
    concern: Concern,
    /// What the message behind it holds of the budget for messages.
    share: Option<Share>,
    /// Says that something is under way, until it is dropped.
    _at_work: Option<Working>,
    /// True where it was postponed before.
    postponed: bool,
    /// Nobody waits for what was answered already.
    answer: Option<oneshot::Sender<Reply>>,
}

impl Job {
    pub(super) fn new(
        write: Write,
        concern: Concern,
        share: Option<Share>,
        at_work: Option<Working>,
        answer: oneshot::Sender<Reply>,
    ) -> Self {
        let waiting = Waiting { concern, share, _at_work: at_work, postponed: false, answer: Some(answer) };
        Self { write, waiting }
    }

    /// True for a change, which may wait in memory for the store while its agent goes on.
    pub(super) fn can_be_kept(&self) -> bool {
        matches!(self.write, Write::UpdateAgent(_))
    }
}

impl Waiting {
    /// Tells whoever waits, and the connection concerned.
    pub(super) fn answer(self, reply: Reply) {
        match (&self.concern, &reply) {
            (Concern::Ends(connection), _) => connection.settle(),
            (Concern::Kept(connection), _) => {
                match reply {
                    Reply::Written(Written::Agent(false)) => connection.abandon(CloseReason::Superseded),
                    Reply::Failed(_) => connection.forget(),
                    Reply::Written(_) | Reply::Kept => {}
                }
                connection.pulse.release();
            }
            (Concern::Nobody | Concern::Saves(_), _) => {}
        }
        if let Some(answer) = self.answer {
            // Who no longer waits has been told enough by the link.
            let _unawaited = answer.send(reply);
        }
    }
}

/// The larger of two shares: what a newer change replaces is held no more.
fn larger(one: Option<Share>, other: Option<Share>) -> Option<Share> {
    let asked = |share: &Option<Share>| share.as_ref().map_or(0, Share::asked);
    if asked(&one) >= asked(&other) { one } else { other }
}

/// What waits to be written.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    jobs: VecDeque<Job>,
    /// By connection, the newest state of agents that were answered while the store was away. It is
    /// older than any job of its agent, and written first.
    kept: BTreeMap<i64, Job>,
}

impl Inbox {
    pub(super) fn len(&self) -> usize {
        self.jobs.len() + self.kept.len()
    }

    pub(super) fn push(&mut self, job: Job) {
        self.jobs.push_back(job);
    }

    /// Keeps a change, together with what is kept of its connection already.
    pub(super) fn keep(&mut self, job: Job) {
        let Job { write: Write::UpdateAgent(update), waiting } = job else {
            return self.jobs.push_front(job);
        };
        let (connection, returns) = match waiting.concern {
            Concern::Saves(connection) | Concern::Ends(connection) => (connection, false),
            Concern::Kept(connection) => (connection, true),
            Concern::Nobody => return,
        };
        // Small messages are many, and as long as they are kept they are counted by connections.
        let share = waiting.share.filter(Share::is_large);
        let id = update.connection_id;
        let (update, share) = match self.kept.remove(&id) {
            None => {
                if !returns {
                    connection.pulse.keep();
                }
                (*update, share)
            }
            Some(Job { write: Write::UpdateAgent(present), waiting: other }) => {
                if returns {
                    connection.pulse.release();
                }
                // What returns from the store was taken from here before the present one came.
                let (older, newer) = if returns { (update, present) } else { (present, update) };
                (older.followed_by(*newer), larger(share, other.share))
            }
            Some(_) => return,
        };
        let kept = Waiting {
            concern: Concern::Kept(connection),
            share,
            _at_work: None,
            postponed: true,
            answer: None,
        };
        self.kept.insert(id, Job { write: Write::UpdateAgent(Box::new(update)), waiting: kept });
        if let Some(answer) = waiting.answer {
            let _unawaited = answer.send(Reply::Kept);
        }
    }

    /// The store did not take a job: it waits in its order, an opening does so once, a change is kept.
    ///
    /// An opening is done again because nobody knows whether it was: the answer to a commit may be
    /// lost, and then its row would be open without an owner. The store recognises it (`node_seq`).
    pub(super) fn put_back(&mut self, mut job: Job, error: &StoreError) {
        match job.write {
            Write::UpdateConnection(_) => self.jobs.push_front(job),
            Write::UpdateAgent(_) => self.keep(job),
            Write::CreateConnection(_) if !job.waiting.postponed => {
                job.waiting.postponed = true;
                self.jobs.push_front(job);
            }
            Write::CreateConnection(_) => job.waiting.answer(Reply::Failed(error.clone())),
        }
    }

    /// The longest run of waiting jobs that may share a commit, at most `limit`: no agent twice, but for
    /// its end ahead of its opening.
    pub(super) fn take_batch(&mut self, limit: usize) -> Vec<Job> {
        let mut stages: HashMap<InstanceUid, u8> = HashMap::new();
        let (mut batch, mut bytes) = (Vec::new(), 0);
        loop {
            let first_kept = self.kept.first_entry();
            let next = first_kept.as_ref().map(OccupiedEntry::get);
            let Some(job) = next.or(if first_kept.is_none() { self.jobs.front() } else { None }) else {
                break;
            };
            bytes += job.waiting.share.as_ref().map_or(0, Share::asked);
            let stage = job.write.stage();
            let shares = match (stages.get(&job.write.agent()), &job.write) {
                (None, _) | (Some(1), Write::CreateConnection(_)) => true,
                (Some(_), _) => false,
            };
            let fits = batch.is_empty() || bytes <= BATCH_BYTES;
            if !shares || !fits || batch.len() == limit {
                break;
            }
            stages.insert(job.write.agent(), stage);
            match first_kept {
                Some(entry) => batch.push(entry.remove()),
                None => batch.extend(self.jobs.pop_front()),
            }
        }
        batch
    }
}

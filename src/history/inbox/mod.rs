//! What waits to be written: jobs in their order, and the changes that are kept while the store is away.

use std::collections::hash_map::{Entry, HashMap};
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::OpenConnection;
use crate::agent::InstanceUid;
use crate::burden::Share;
use crate::store::{AgentUpdate, StoreError, Write, Written};

/// What the messages behind the writes of one commit may hold together: larger ones stand alone.
const BATCH_BYTES: u64 = 64 << 20;

/// What became of a job, and what is left of what its message held of the budget.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) reply: Reply,
    pub(super) share: Option<Share>,
}

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
    tries: Tries,
    /// Nobody waits for what was answered already.
    answer: Option<oneshot::Sender<Answered>>,
}

impl Job {
    pub(super) fn new(
        write: Write,
        concern: Concern,
        share: Option<Share>,
        at_work: Option<Working>,
        answer: oneshot::Sender<Answered>,
    ) -> Self {
        let waiting = Waiting {
            concern,
            share,
            _at_work: at_work,
            postponed: false,
            tries: Tries::default(),
            answer: Some(answer),
        };
        Self { write, waiting }
    }

    /// An end that waited for changes of its connection: once they are stored, its number stands for them.
    fn caught_up(mut self) -> Self {
        if let (Write::UpdateConnection(end), Concern::Ends(connection)) =
            (&mut self.write, &self.waiting.concern)
            && end.unsaved
        {
            (end.sequence_num, end.unsaved) = connection.pulse.stands();
        }
        self
    }

    /// True for an opening that may have been done already, so that the store refuses the same row once more.
    pub(super) fn is_opened_again(&self) -> bool {
        matches!(self.write, Write::CreateConnection(_)) && self.waiting.postponed
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
            (Concern::Ends(connection), Reply::Failed(_)) => connection.give_up_end(),
            (Concern::Ends(connection), _) => connection.settle(),
            (Concern::Kept(connection), Reply::Written(Written::Agent(false))) => connection.overtaken(),
            (Concern::Kept(connection), _) => {
                if matches!(reply, Reply::Failed(_)) {
                    connection.forget();
                }
                connection.pulse.release();
            }
            (Concern::Nobody | Concern::Saves(_), _) => {}
        }
        if let Some(answer) = self.answer {
            // Who no longer waits has been told enough by the link.
            let _unawaited = answer.send(Answered { reply, share: self.share });
        }
    }
}

/// How often a change was tried alone and in vain while the store took others.
#[derive(Clone, Copy, Debug, Default)]
struct Tries {
    count: u32,
    /// How many batches had been written at the last try.
    successes: u64,
}

/// After so many tries it is this very change that the store cannot take.
const MOST_TRIES: u32 = 5;

/// For so many jobs there is always room.
const LEAST_ROOM: usize = 64;

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
        let id = update.connection_id;
        let (update, mut share, tries) = match self.kept.remove(&id) {
            None => {
                if !returns {
                    connection.pulse.keep();
                }
                (*update, waiting.share, waiting.tries)
            }
            Some(Job { write: Write::UpdateAgent(present), waiting: other }) => {
                if returns {
                    connection.pulse.release();
                }
                // What returns from the store was taken from here before the present one came.
                let (older, newer) = if returns { (update, present) } else { (present, update) };
                let share = match (waiting.share, other.share) {
                    (Some(mut share), Some(other)) => {
                        share.absorb(other);
                        Some(share)
                    }
                    (share, other) => share.or(other),
                };
                (older.followed_by(*newer), share, Tries::default())
            }
            Some(_) => return,
        };
        let update = AgentUpdate { late: true, ..update };
        if let Some(share) = &mut share {
            // The message is gone, and nobody copies the documents while they wait.
            share.shrink(update.documents.size() as u64);
        }
        let kept = Waiting {
            concern: Concern::Kept(connection),
            share,
            _at_work: None,
            postponed: true,
            tries,
            answer: None,
        };
        self.kept.insert(id, Job { write: Write::UpdateAgent(Box::new(update)), waiting: kept });
        if let Some(answer) = waiting.answer {
            let _unawaited = answer.send(Answered { reply: Reply::Kept, share: None });
        }
    }

    /// The store did not take a job: it waits in its order, an opening does so once, a change is kept.
    /// Answers a change that was tried `alone` too often while the store took others.
    ///
    /// An opening is done again because nobody knows whether it was: the answer to a commit may be
    /// lost, and then its row would be open without an owner. The store recognises it (`node_seq`).
    pub(super) fn put_back(
        &mut self,
        mut job: Job,
        error: &StoreError,
        alone: bool,
        successes: u64,
    ) -> Option<Job> {
        match job.write {
            Write::UpdateConnection(_) => self.jobs.push_front(job),
            Write::UpdateAgent(_) => {
                let tries = &mut job.waiting.tries;
                if alone && tries.successes < successes {
                    *tries = Tries { count: tries.count + 1, successes };
                }
                if tries.count >= MOST_TRIES {
                    return Some(job);
                }
                self.keep(job);
            }
            Write::CreateConnection(ref mut new) if !job.waiting.postponed => {
                // It may be the report with which the store has trouble: as a change it is kept, and tried alone.
                new.first_report = None;
                job.waiting.postponed = true;
                self.jobs.push_front(job);
            }
            Write::CreateConnection(_) => job.waiting.answer(Reply::Failed(error.clone())),
        }
        None
    }

    /// The store is away: nobody is kept waiting for it who need not. Changes are kept, and openings that
    /// were not tried are not done.
    pub(super) fn give_up_waiting(&mut self, error: &StoreError) {
        for job in std::mem::take(&mut self.jobs) {
            match job.write {
                Write::UpdateAgent(_) => self.keep(job),
                Write::CreateConnection(_) if !job.waiting.postponed => {
                    job.waiting.answer(Reply::Failed(error.clone()));
                }
                Write::UpdateConnection(_) | Write::CreateConnection(_) => self.jobs.push_back(job),
            }
        }
    }

    /// Jobs that may share a commit, at most `limit`: no agent twice, but for its end ahead of its opening.
    ///
    /// Kept changes come first, those that were tried in vain after everybody else: whatever the store
    /// cannot take keeps nobody waiting but its own agent.
    pub(super) fn take_batch(&mut self, limit: usize) -> Vec<Job> {
        let mut batch = Batch { limit, ..Batch::default() };
        let fresh = |job: &Job| job.waiting.tries.count == 0;
        let ids: Vec<i64> =
            self.kept.iter().filter(|(_, job)| fresh(job)).map(|(id, _)| *id).take(limit).collect();
        for id in ids {
            if !batch.takes(&self.kept[&id]) {
                break;
            }
            batch.jobs.extend(self.kept.remove(&id));
        }
        if batch.jobs.is_empty() {
            let blocked: HashSet<InstanceUid> = self.kept.values().map(|job| job.write.agent()).collect();
            let mut passed_over = blocked;
            let mut rest = VecDeque::new();
            while let Some(job) = self.jobs.pop_front() {
                if passed_over.contains(&job.write.agent()) || !batch.takes(&job) {
                    if batch.is_full() {
                        self.jobs.push_front(job);
                        break;
                    }
                    passed_over.insert(job.write.agent());
                    rest.push_back(job);
                } else {
                    batch.jobs.push(job.caught_up());
                }
            }
            while let Some(job) = rest.pop_back() {
                self.jobs.push_front(job);
            }
        }
        if batch.jobs.is_empty() {
            let tried =
                self.kept.iter().min_by_key(|(id, job)| (job.waiting.tries.count, **id)).map(|(id, _)| *id);
            batch.jobs.extend(tried.and_then(|id| self.kept.remove(&id)));
        }
        // What a storm needed is given back: a job is large, and idle agents send few.
        if self.jobs.capacity() > LEAST_ROOM.max(4 * self.jobs.len()) {
            self.jobs.shrink_to(LEAST_ROOM.max(2 * self.jobs.len()));
        }
        batch.jobs
    }
}

/// Jobs that are about to share a commit.
#[derive(Default)]
struct Batch {
    jobs: Vec<Job>,
    limit: usize,
    bytes: u64,
    stages: HashMap<InstanceUid, u8>,
}

impl Batch {
    fn is_full(&self) -> bool {
        self.jobs.len() >= self.limit || self.bytes > BATCH_BYTES
    }

    /// True where `job` may be added; it is counted then.
    fn takes(&mut self, job: &Job) -> bool {
        let bytes = self.bytes + job.waiting.share.as_ref().map_or(0, Share::asked);
        let shares = match (self.stages.get(&job.write.agent()), &job.write) {
            (None, _) | (Some(1), Write::CreateConnection(_)) => true,
            (Some(_), _) => false,
        };
        let fits = self.jobs.is_empty() || bytes <= BATCH_BYTES;
        if !shares || !fits || self.jobs.len() >= self.limit {
            return false;
        }
        self.bytes = bytes;
        self.stages.insert(job.write.agent(), job.write.stage());
        true
    }
}

#[cfg(test)]
mod tests;

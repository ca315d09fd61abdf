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
            let _unawaited = answer.send(reply);
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
            let _unawaited = answer.send(Reply::Kept);
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
            Write::CreateConnection(_) if !job.waiting.postponed => {
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
mod tests {
    use serde_json::json;
    use uuid::Uuid;

    use super::*;
    use crate::agent::Capabilities;
    use crate::agent::document::Documents;
    use crate::clock::{Moment, Tick};
    use crate::close::CloseReason;
    use crate::pulse::{Link, Pulse};
    use crate::store::{ConnectionEnd, Ended, NewConnection, Transport};

    fn uid(number: u8) -> InstanceUid {
        InstanceUid::from_bytes([number; 16])
    }

    /// The connection of agent `number`, with the same id.
    fn connection(number: u8) -> Arc<OpenConnection> {
        let pulse = Pulse::starting(Tick::default(), Some(1));
        Arc::new(OpenConnection::new(
            uid(number),
            number.into(),
            Transport::Websocket,
            Arc::new(Link::default()),
            pulse,
        ))
    }

    fn job(write: Write, concern: Concern) -> (Job, oneshot::Receiver<Reply>) {
        let (answer, answered) = oneshot::channel();
        (Job::new(write, concern, None, None, answer), answered)
    }

    fn change(
        connection: &Arc<OpenConnection>,
        healthy: bool,
        name: Option<&str>,
    ) -> (Job, oneshot::Receiver<Reply>) {
        let documents = Documents {
            healthy: Some(healthy),
            custom_capabilities: name.map(|name| json!([name])),
            ..Documents::default()
        };
        let update = AgentUpdate {
            agent: connection.agent,
            connection_id: connection.id,
            at: Moment::from_micros(1),
            read_at: Moment::from_micros(1),
            sequence_num: Some(2),
            capabilities: Capabilities(1),
            documents,
            late: false,
            node_id: Uuid::nil(),
        };
        job(Write::UpdateAgent(Box::new(update)), Concern::Saves(Arc::clone(connection)))
    }

    fn end(connection: &Arc<OpenConnection>) -> (Job, oneshot::Receiver<Reply>) {
        let end = ConnectionEnd {
            agent: connection.agent,
            connection_id: connection.id,
            reason: CloseReason::ConnectionLost,
            disconnected_at: Moment::from_micros(2),
            disconnected_by: None,
            last_seen_at: Moment::from_micros(2),
            sequence_num: None,
            unsaved: false,
            offline_at: None,
            unless_seen_after: None,
            node_id: Uuid::nil(),
        };
        job(Write::UpdateConnection(end), Concern::Ends(Arc::clone(connection)))
    }

    fn opening(number: u8) -> (Job, oneshot::Receiver<Reply>) {
        let new = NewConnection {
            agent: uid(number),
            transport: Transport::Websocket,
            remote_addr: "127.0.0.1:1".to_owned(),
            node_id: Uuid::nil(),
            node_seq: 0,
            at: Moment::from_micros(3),
            seen_at: Moment::from_micros(3),
            number: 1,
            older: None,
            spare: None,
            first_poll: None,
            poll_grace: std::time::Duration::ZERO,
            excused_until: None,
        };
        job(Write::CreateConnection(new), Concern::Nobody)
    }

    fn away() -> StoreError {
        StoreError::Unavailable("a test".to_owned())
    }

    fn agents(batch: &[Job]) -> Vec<(InstanceUid, u8)> {
        batch.iter().map(|job| (job.write.agent(), job.write.stage())).collect()
    }

    #[test]
    fn a_kept_change_is_answered_merged_and_written_ahead_of_its_agents_end() {
        let (mut inbox, one, two) = (Inbox::default(), connection(1), connection(2));
        let (first, mut answered) = change(&one, true, Some("a"));
        inbox.keep(first);
        assert!(matches!(answered.try_recv(), Ok(Reply::Kept)));
        inbox.keep(change(&one, false, None).0);
        assert_eq!((inbox.len(), one.pulse.number()), (1, None), "one newest state, and no number for it");
        inbox.push(end(&one).0);
        inbox.push(end(&two).0);
        let batch = inbox.take_batch(10);
        let [Job { write: Write::UpdateAgent(update), .. }] = batch.as_slice() else { panic!("{batch:?}") };
        assert_eq!(
            (update.documents.healthy, &update.documents.custom_capabilities),
            (Some(false), &Some(json!(["a"])))
        );
        for job in batch {
            job.waiting.answer(Reply::Written(Written::Agent(true)));
        }
        assert_eq!(one.pulse.number(), Some(1), "what is stored stands for its number again");
        assert_eq!(agents(&inbox.take_batch(10)), [(uid(1), 1), (uid(2), 1)]);
    }

    /// What is written as the number of a connection that ends while a change of it is kept, and whether it is unsaved.
    fn number_after(kept_became: impl Fn() -> Reply) -> (Option<u64>, bool) {
        let (mut inbox, one) = (Inbox::default(), connection(1));
        inbox.keep(change(&one, true, None).0);
        one.pulse.settled(Some(2), Some(2), false, false);
        let (mut ending, _ticket) = end(&one);
        let Write::UpdateConnection(end) = &mut ending.write else { panic!("{ending:?}") };
        (end.sequence_num, end.unsaved) = one.pulse.stands();
        assert_eq!((end.sequence_num, end.unsaved), (Some(2), true));
        inbox.push(ending);
        for job in inbox.take_batch(10) {
            job.waiting.answer(kept_became());
        }
        let batch = inbox.take_batch(10);
        let [Job { write: Write::UpdateConnection(end), .. }] = batch.as_slice() else { panic!("{batch:?}") };
        (end.sequence_num, end.unsaved)
    }

    #[test]
    fn an_end_that_waited_for_a_kept_change_tells_the_number_of_what_is_stored() {
        assert_eq!(number_after(|| Reply::Written(Written::Agent(true))), (Some(2), false));
        let (_, unsaved) = number_after(|| Reply::Written(Written::Agent(false)));
        assert!(unsaved, "the store knows what is newer, and its number stands");
        assert_eq!(number_after(|| Reply::Failed(away())), (None, false), "nothing stands for any number");
    }

    #[test]
    fn nobody_is_told_an_end_that_is_not_on_record() {
        for (reply, told) in [
            (Reply::Failed(StoreError::NodeEnded), false),
            (Reply::Written(Written::Connection(Ended { duration_seconds: Some(1), status: None })), true),
        ] {
            let one = connection(1);
            let (ending, _ticket) = end(&one);
            ending.waiting.answer(reply);
            assert!(one.is_recorded(), "nothing is waited for any more");
            assert_eq!(one.is_unrecordable(), !told);
        }
    }

    #[test]
    fn polls_go_on_after_a_kept_change_came_too_late_and_a_link_does_not() {
        for (transport, ended) in
            [(Transport::Http, None), (Transport::Websocket, Some(CloseReason::Superseded))]
        {
            let link = Arc::new(Link::default());
            let pulse = Pulse::starting(Tick::default(), Some(1));
            let (mut inbox, one) =
                (Inbox::default(), Arc::new(OpenConnection::new(uid(1), 1, transport, link, pulse)));
            inbox.keep(change(&one, true, None).0);
            for job in inbox.take_batch(10) {
                job.waiting.answer(Reply::Written(Written::Agent(false)));
            }
            assert_eq!((one.ended(), one.forgot()), (ended, ended.is_none()), "{transport:?}");
        }
    }

    #[test]
    fn a_change_that_cannot_be_stored_keeps_nobody_else_waiting_and_is_given_up() {
        let (mut inbox, odd, other) = (Inbox::default(), connection(1), connection(2));
        inbox.keep(change(&odd, true, None).0);
        let mut try_it = |successes| {
            let batch = inbox.take_batch(10);
            assert_eq!(agents(&batch), [(uid(1), 0)]);
            let back = batch.into_iter().filter_map(|job| inbox.put_back(job, &away(), true, successes));
            back.collect::<Vec<Job>>()
        };
        assert!(try_it(0).is_empty() && try_it(1).is_empty());
        assert!(try_it(1).is_empty(), "while nothing else is stored it proves nothing");
        inbox.push(end(&odd).0);
        inbox.push(end(&other).0);
        assert_eq!(agents(&inbox.take_batch(10)), [(uid(2), 1)], "others go ahead, its own end does not");
        let mut hopeless = Vec::new();
        for successes in 2..=u64::from(MOST_TRIES) {
            assert!(hopeless.is_empty());
            let batch = inbox.take_batch(10);
            hopeless
                .extend(batch.into_iter().filter_map(|job| inbox.put_back(job, &away(), true, successes)));
        }
        assert_eq!(hopeless.len(), 1);
        for job in hopeless {
            job.waiting.answer(Reply::Failed(away()));
        }
        assert!(odd.forgot(), "its agent is asked for everything");
        assert_eq!(odd.pulse.number(), None);
    }

    #[test]
    fn while_the_store_is_away_only_ends_and_tried_openings_wait() {
        let (mut inbox, one, two) = (Inbox::default(), connection(1), connection(2));
        let (ending, _ticket) = end(&one);
        inbox.push(ending);
        let (saving, mut saved) = change(&two, true, None);
        inbox.push(saving);
        let (untried, mut refused) = opening(3);
        inbox.push(untried);
        let (tried, mut waits) = opening(4);
        assert!(inbox.put_back(tried, &away(), true, 0).is_none());
        inbox.give_up_waiting(&away());
        assert!(matches!(saved.try_recv(), Ok(Reply::Kept)));
        assert!(matches!(refused.try_recv(), Ok(Reply::Failed(_))));
        assert!(waits.try_recv().is_err(), "nobody knows whether it was done");
        assert_eq!(agents(&inbox.take_batch(10)), [(uid(2), 0)]);
        let batch = inbox.take_batch(10);
        assert_eq!(agents(&batch), [(uid(4), 2), (uid(1), 1)]);
        let again = batch.into_iter().find(|job| job.write.stage() == 2).unwrap();
        assert!(inbox.put_back(again, &away(), true, 0).is_none());
        assert!(matches!(waits.try_recv(), Ok(Reply::Failed(_))), "twice is enough");
    }

    #[test]
    fn the_room_a_storm_needed_is_given_back() {
        let (mut inbox, one) = (Inbox::default(), connection(1));
        for _ in 0..1_000 {
            inbox.push(end(&one).0);
        }
        while inbox.len() > 0 {
            inbox.take_batch(10);
        }
        assert!(inbox.jobs.capacity() <= LEAST_ROOM, "{}", inbox.jobs.capacity());
    }

    #[test]
    fn no_agent_is_twice_in_a_stage_of_a_batch() {
        let (mut inbox, one, two) = (Inbox::default(), connection(1), connection(2));
        for job in [end(&one).0, opening(1).0, opening(1).0, end(&two).0] {
            inbox.push(job);
        }
        assert_eq!(agents(&inbox.take_batch(10)), [(uid(1), 1), (uid(1), 2), (uid(2), 1)]);
        assert_eq!(agents(&inbox.take_batch(10)), [(uid(1), 2)]);
    }
}

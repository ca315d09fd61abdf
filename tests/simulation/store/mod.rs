//! The database of the simulation: one memory that outlives every process, behind calls that may fail in every way.
//!
//! What a call meets is drawn from the seed, the moment and the call itself, not from a sequence:
//! a call more or less changes nothing for the others.

mod handle;
mod records;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fastrand::Rng;
use opamp_server::clock::Moment;
use opamp_server::store::StoreError;
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;

pub(crate) use handle::Handle;
pub(crate) use records::{Agent, EndedBy, Records, Row, RowEnd};

use crate::check;
use crate::truth::Truth;

/// What is wrong with the store for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It cannot be reached: every call fails at once.
    Away,
    /// It does not answer: every call fails at its deadline, and nothing is done.
    Hanging,
    /// It answers late, but in time.
    Slow,
    /// Some calls meet other writers.
    Conflicts,
    /// Some calls are done, and their answer is lost.
    Forgetful,
    /// Some calls are done long after their caller has given up.
    Late,
    /// Any of it, call by call.
    Mixed,
}

impl Fault {
    pub(crate) const ALL: [Self; 7] =
        [Self::Away, Self::Hanging, Self::Slow, Self::Conflicts, Self::Forgetful, Self::Late, Self::Mixed];
}

/// A time in which the store fails: for one place of a node, or for all.
#[derive(Clone, Copy, Debug)]
struct Window {
    place: Option<usize>,
    until: Moment,
    fault: Fault,
}

/// What becomes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Done and answered.
    Done,
    /// Not done, and told so.
    Refused,
    /// Not done: another writer was there.
    Conflict,
    /// Not done, and never answered.
    Unanswered,
    /// Done, and the connection breaks before the answer.
    Lost,
    /// Done, and never answered.
    Silent,
    /// Done after the caller has given up.
    Late,
}

/// The database.
#[derive(Debug)]
pub(crate) struct Database {
    seed: u64,
    /// One node holds the whole of it.
    pub(crate) single: bool,
    truth: Arc<Truth>,
    records: Mutex<Records>,
    windows: Mutex<Vec<Window>>,
    /// Until when a transaction holds its locks whose commit comes late.
    locked: Mutex<Moment>,
    /// Which node names are held, and by whom.
    names: Mutex<Vec<(String, u64)>>,
    work: TaskTracker,
}

impl Database {
    pub(crate) fn new(seed: u64, single: bool, truth: Arc<Truth>, work: TaskTracker) -> Arc<Self> {
        Arc::new(Self {
            seed,
            single,
            truth,
            records: Mutex::default(),
            windows: Mutex::default(),
            locked: Mutex::default(),
            names: Mutex::default(),
            work,
        })
    }

    pub(crate) fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn windows(&self) -> MutexGuard<'_, Vec<Window>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn locked(&self) -> MutexGuard<'_, Moment> {
        self.locked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody holds the locks.
    async fn unlocked(&self) {
        loop {
            let left = self.locked().since(self.truth.now());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left).await;
        }
    }

    fn names(&self) -> MutexGuard<'_, Vec<(String, u64)>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store fails for a while.
    pub(crate) fn fail(&self, place: Option<usize>, fault: Fault, lasts: Duration) {
        let until = self.truth.now().after(lasts);
        self.windows().push(Window { place, until, fault });
    }

    /// From now on it works.
    pub(crate) fn heal(&self) {
        self.windows().clear();
    }

    /// What is wrong for this place of a node now.
    pub(crate) fn fault(&self, place: usize) -> Option<Fault> {
        let now = self.truth.now();
        let mut windows = self.windows();
        windows.retain(|window| window.until > now);
        windows.iter().find(|window| window.place.is_none_or(|at| at == place)).map(|window| window.fault)
    }

    /// A process is gone, and its locks with it.
    pub(crate) fn release(&self, process: u64) {
        self.names().retain(|(_, holder)| *holder != process);
    }

    fn lock_name(&self, name: &str, process: u64) -> bool {
        let mut names = self.names();
        let held = names.iter().find(|(held, _)| self.single || held == name).map(|(_, holder)| *holder);
        if held.is_none() {
            names.push((name.to_owned(), process));
        }
        held.is_none_or(|holder| holder == process)
    }

    fn fate(&self, rng: &mut Rng, place: usize) -> (Fate, Duration) {
        let quick = Duration::from_millis(rng.u64(0..3));
        let Some(fault) = self.fault(place) else { return (Fate::Done, quick) };
        let fault = if fault == Fault::Mixed { Fault::ALL[rng.usize(0..6)] } else { fault };
        let sometimes = rng.u8(0..10) < 4;
        match fault {
            Fault::Away => (Fate::Refused, quick),
            Fault::Hanging => (Fate::Unanswered, quick),
            Fault::Slow => (Fate::Done, Duration::from_millis(rng.u64(100..9_000))),
            Fault::Conflicts if sometimes => (Fate::Conflict, quick),
            Fault::Forgetful if sometimes => (if rng.bool() { Fate::Lost } else { Fate::Silent }, quick),
            Fault::Late if sometimes => (Fate::Late, Duration::from_millis(rng.u64(1..15_000))),
            Fault::Conflicts | Fault::Forgetful | Fault::Late | Fault::Mixed => (Fate::Done, quick),
        }
    }
}

/// A call: which, and a number that tells it from others of the same moment.
#[derive(Clone, Copy, Debug)]
struct Call {
    name: &'static str,
    key: u64,
    /// True where it changes what is on record.
    writes: bool,
    /// How long it may take.
    deadline: Duration,
    /// True where it does so under locks: a late commit of it keeps others waiting.
    locks: bool,
}

impl Handle {
    /// Does `work` on the records as one transaction of its own, with whatever becomes of it.
    async fn call<T: Send + 'static>(
        &self,
        call: Call,
        work: impl FnOnce(&mut Records) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        if !self.alive.load(Ordering::Relaxed) {
            return std::future::pending().await;
        }
        let database = &self.database;
        let mut hasher = DefaultHasher::new();
        let now = database.truth.now();
        (database.seed, now.as_micros(), self.place, call.name, call.key).hash(&mut hasher);
        let mut rng = Rng::with_seed(hasher.finish());
        let (fate, takes) = database.fate(&mut rng, self.place);
        let takes = if fate == Fate::Late { takes + call.deadline } else { takes };
        let survives = rng.bool();
        let (answer, answered) = oneshot::channel();
        let transaction = transaction(
            Arc::clone(database),
            self.process,
            Arc::clone(&self.alive),
            (fate, takes, survives),
            call,
            work,
            answer,
        );
        drop(database.work.spawn(transaction));
        let away = |text: &str| StoreError::Unavailable(format!("{} {text}", call.name));
        match tokio::time::timeout(call.deadline, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(_closed)) => Err(away("lost its answer")),
            Err(_elapsed) => Err(away("was not answered")),
        }
    }
}

/// What the database does with one call.
async fn transaction<T: Send + 'static>(
    database: Arc<Database>,
    process: u64,
    alive: Arc<AtomicBool>,
    (fate, takes, survives): (Fate, Duration, bool),
    call: Call,
    work: impl FnOnce(&mut Records) -> T + Send + 'static,
    answer: oneshot::Sender<Result<T, StoreError>>,
) {
    if call.locks {
        database.unlocked().await;
        if answer.is_closed() {
            // Whoever gave up waiting never sent the commit.
            return;
        }
        if fate == Fate::Late {
            let now = database.truth.now();
            *database.locked() = now.after(takes);
            database.truth.trouble(now, now.after(takes));
        }
    }
    let whole = fate == Fate::Late;
    if !takes.is_zero() {
        tokio::time::sleep(if whole { takes } else { takes / 2 }).await;
    }
    if fate != Fate::Done {
        database.truth.say(format_args!("store: {} of process {process} is {fate:?}", call.name));
    }
    match fate {
        Fate::Refused => {
            let _gone = answer.send(Err(StoreError::Unavailable("the store is away".to_owned())));
            return;
        }
        Fate::Conflict => {
            let _gone = answer.send(Err(StoreError::Conflict));
            return;
        }
        Fate::Unanswered => {
            tokio::time::sleep(call.deadline * 2).await;
            return;
        }
        Fate::Done | Fate::Lost | Fate::Silent | Fate::Late => {}
    }
    // What a process had sent before it was killed may still be done.
    if !alive.load(Ordering::Relaxed) && (database.single || !survives) {
        return;
    }
    let (done, seen) = {
        let mut records = database.records();
        let done = work(&mut records);
        let touched: Vec<_> = std::mem::take(&mut records.touched).into_iter().collect();
        for uid in &touched {
            check::records(&database.truth, &records, *uid);
        }
        (done, touched.len())
    };
    if matches!(call.name, "start" | "end lost" | "end node") {
        database.truth.say(format_args!("store: {} of process {process} is done", call.name));
    }
    if call.writes {
        database.truth.stir(seen as u64 ^ process << 8);
    }
    if !takes.is_zero() && !whole {
        tokio::time::sleep(takes / 2).await;
    }
    match fate {
        Fate::Lost => drop(answer),
        Fate::Silent => tokio::time::sleep(call.deadline * 2).await,
        Fate::Done | Fate::Late | Fate::Refused | Fate::Conflict | Fate::Unanswered => {
            let _gone = answer.send(Ok(done));
        }
    }
}

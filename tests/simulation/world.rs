//! The world: places where nodes run, the store they share, the agents, and what befalls all of them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fastrand::Rng;
use opamp_server::agent::InstanceUid;
use opamp_server::clock::Moment;
use opamp_server::config::Config;
use tokio::sync::oneshot;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::agent::Agent;
use crate::check::{self, Expected};
use crate::gate::State;
use crate::node::{Process, Start};
use crate::rules::Rules;
use crate::store::{Database, Fault};
use crate::truth::{Contradiction, Truth};

/// What a simulation came to.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) contradiction: Option<Contradiction>,
    pub(crate) timeline: Vec<(Moment, String)>,
    /// The same for the same seed.
    pub(crate) fingerprint: u64,
    pub(crate) lasted: Duration,
    pub(crate) places: usize,
}

/// The world.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) truth: Arc<Truth>,
    pub(crate) config: Config,
    database: Arc<Database>,
    tasks: TaskTracker,
    places: Vec<Place>,
    calm: CancellationToken,
    quiet: AtomicBool,
    next_process: AtomicU64,
    next_wire: AtomicU64,
}

/// Where a node runs.
#[derive(Debug, Default)]
struct Place {
    process: Mutex<Option<Arc<Process>>>,
    /// True while somebody brings a process up or down.
    busy: AtomicBool,
}

impl Place {
    fn process(&self) -> MutexGuard<'_, Option<Arc<Process>>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What befalls the world.
#[derive(Clone, Copy, Debug)]
enum Event {
    StoreFails,
    Crash,
    Stop,
    Freeze,
    Order,
    Quiet,
}

/// The settings of one world: the defaults, or everything faster.
fn settings(rng: &mut Rng) -> Config {
    let mut config = Config::default();
    if rng.u8(0..4) > 0 {
        let timeout = rng.u64(8..40);
        config.heartbeat.timeout = Duration::from_secs(timeout);
        config.heartbeat.interval = Duration::from_secs(timeout / 2);
        config.heartbeat.check_interval = Duration::from_secs(rng.u64(3..30));
        config.store.flush_interval = Duration::from_secs(rng.u64(1..8));
        config.node.lease = Duration::from_secs(rng.u64(2..12));
        config.sweep.interval = Duration::from_secs(rng.u64(5..60));
        config.sweep.stale_after = Duration::from_secs(rng.u64(30..300));
        config.shutdown.drain = Duration::from_secs(rng.u64(1..10));
    }
    config
}

/// A time between so many milliseconds, short ones as likely as long ones.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rough time will do"
)]
pub(crate) fn between(rng: &mut Rng, least: u64, most: u64) -> Duration {
    let (low, high) = ((least.max(1) as f64).ln(), (most.max(1) as f64).ln());
    Duration::from_millis((low + (high - low) * rng.f64()).exp() as u64)
}

/// Runs the simulation of a seed.
pub(crate) async fn run(seed: u64, rules: Rules, recording: bool) -> Outcome {
    let mut rng = Rng::with_seed(seed);
    let config = settings(&mut rng);

    let places = if rng.u8(0..5) < 3 { 1 } else { 2 };
    let expected = Expected {
        timeout: config.heartbeat.timeout,
        flush: config.store.flush_interval,
        several: places > 1,
    };
    let truth = Arc::new(Truth::new(rules, recording, expected));
    let tasks = TaskTracker::new();
    let single = places == 1 && rng.bool();
    let database = Database::new(seed, single, Arc::clone(&truth), tasks.clone());
    let world = Arc::new(World {
        truth,
        config,
        database,
        tasks,
        places: (0..places).map(|_| Place::default()).collect(),
        calm: CancellationToken::new(),
        quiet: AtomicBool::new(false),
        next_process: AtomicU64::new(1),
        next_wire: AtomicU64::new(1),
    });
    world.truth.say(format_args!(
        "timeout {:?}, flush {:?}, lease {:?}, check {:?}, {places} places",
        world.config.heartbeat.timeout,
        world.config.store.flush_interval,
        world.config.node.lease,
        world.config.heartbeat.check_interval
    ));
    for place in 0..places {
        world.bring_up(place).await;
    }
    let agents = rng.u64(2..20);
    for index in 1..=agents {
        let twin = index > 2 && rng.u8(0..40) == 0;
        let byte = u8::try_from(if twin { index - 1 } else { index }).unwrap_or_default();
        let uid = InstanceUid::from_bytes([byte; 16]);
        let name = format!("a{index}");
        let agent = Agent::new(&world, index, uid, name, rng.fork());
        drop(world.tasks.spawn(agent.live()));
    }
    world.befall(&mut rng).await;
    if world.truth.first().is_none() {
        world.settle(&mut rng).await;
    }
    let outcome = Outcome {
        contradiction: world.truth.first(),
        timeline: world.truth.timeline(),
        fingerprint: world.truth.fingerprint(),
        lasted: world.truth.lasted(),
        places,
    };
    for process in (0..places).filter_map(|place| world.process(place)) {
        process.die(&mut rng);
    }
    outcome
}

impl World {
    pub(crate) fn places(&self) -> usize {
        self.places.len()
    }

    /// The process at a place, if one is up.
    pub(crate) fn process(&self, place: usize) -> Option<Arc<Process>> {
        self.places.get(place)?.process().clone().filter(|process| process.is_up())
    }

    pub(crate) fn next_wire(&self) -> u64 {
        self.next_wire.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn is_calm(&self) -> bool {
        self.calm.is_cancelled()
    }

    /// True once nobody changes anything any more.
    pub(crate) fn is_quiet(&self) -> bool {
        self.quiet.load(Ordering::Relaxed)
    }

    pub(crate) async fn calmed(&self) {
        self.calm.cancelled().await;
    }

    /// Notes since when somebody admits agents, where that was interrupted for so long that a server knows.
    fn note_admission(&self) {
        let process = |place| self.process(place).filter(|process| !process.closed.load(Ordering::Relaxed));
        let runs =
            |place: &usize| process(*place).is_some_and(|process| process.gate.state() == State::Running);
        let away = |place: usize| matches!(self.database.fault(place), Some(Fault::Away | Fault::Hanging));
        let places = 0..self.places();
        let unnoticed = if places.clone().all(|place| process(place).is_none()) {
            // Among several nodes a short absence is nobody's business: their leases tell.
            Some(if self.places() > 1 { self.config.node.lease } else { Duration::ZERO })
        } else if !places.clone().any(|place| runs(&place)) {
            Some(Duration::from_millis(1_500))
        } else if places.clone().filter(runs).all(away) {
            Some(self.config.node.lease / 3 + Duration::from_secs(11))
        } else {
            None
        };
        let now = self.truth.now();
        let mut inner = self.truth.lock();
        inner.admits(now, unnoticed);
    }

    /// Every agent may be asked for its state: something was lost.
    fn excuse_all(&self, why: &'static str) {
        let now = self.truth.now();
        let until = now.after(Duration::from_secs(90));
        self.truth.lock().agents.values_mut().for_each(|own| {
            own.excuse = Some((why, now));
            own.excused_until = own.excused_until.max(Some(until));
        });
    }

    /// Starts a process at a place, again and again until one runs.
    async fn bring_up(self: &Arc<Self>, place: usize) {
        loop {
            let number = self.next_process.fetch_add(1, Ordering::Relaxed);
            let start = Start {
                number,
                place,
                config: self.config.clone(),
                database: Arc::clone(&self.database),
                truth: Arc::clone(&self.truth),
                tasks: self.tasks.clone(),
            };
            match Process::start(start).await {
                Ok(process) => {
                    self.truth.say(format_args!("node-{place}.{number} runs"));
                    *self.places[place].process() = Some(Arc::clone(&process));
                    self.note_admission();
                    self.watch_over(process);
                    return;
                }
                Err(error) => {
                    self.truth.say(format_args!("node-{place}.{number} does not start: {error}"));
                    sleep(Duration::from_secs(2)).await;
                }
            }
        }
    }

    /// A process that was taken for lost stops, and another is started.
    fn watch_over(self: &Arc<Self>, process: Arc<Process>) {
        let world = Arc::clone(self);
        drop(self.tasks.spawn(async move {
            process.ended.cancelled().await;
            let place = &world.places[process.place];
            if !process.is_up() || place.busy.swap(true, Ordering::Relaxed) {
                return;
            }
            world
                .truth
                .say(format_args!("node-{}.{} learns that it was ended", process.place, process.number));
            world.excuse_all("a node was taken for lost");
            process.abandon_all();
            world.stop(process.place, Duration::from_secs(1)).await;
        }));
    }

    /// Stops the process at a place in an orderly way, and starts the next one after a pause.
    async fn stop(self: &Arc<Self>, place: usize, pause: Duration) {
        let Some(process) = self.process(place) else { return };
        self.truth.say(format_args!("node-{place}.{} is stopped", process.number));
        let (done, stopped) = oneshot::channel();
        let stopping = Arc::clone(&process);
        process.spawn(async move {
            let _gone = done.send(stopping.stop().await);
        });
        self.note_admission();
        let unrecorded = stopped.await.unwrap_or(usize::MAX);
        if unrecorded > 0 {
            self.excuse_all("a node stopped without the store");
        }
        if self.was_taken_for_lost(&process) {
            // It answered until its stop and never learnt of its mark; what it heard is unknown elsewhere.
            self.excuse_all("a node was taken for lost");
        }
        self.truth
            .say(format_args!("node-{place}.{} has stopped, {unrecorded} not on record", process.number));
        // Its owners see that everything is over.
        sleep(Duration::from_millis(1)).await;
        process.die(&mut Rng::with_seed(process.number));
        self.places[place].process().take();
        self.note_admission();
        sleep(pause).await;
        self.bring_up(place).await;
        self.places[place].busy.store(false, Ordering::Relaxed);
    }

    /// True where another node has ended this one.
    pub(crate) fn was_taken_for_lost(&self, process: &Process) -> bool {
        self.database.records().was_taken_for_lost(process.node_id)
    }

    /// Kills the process at a place, and starts the next one after a pause.
    async fn crash(self: &Arc<Self>, place: usize, silent: bool, seed: u64, pause: Duration) {
        let Some(process) = self.process(place) else { return };
        self.truth.say(format_args!(
            "node-{place}.{} is killed{}",
            process.number,
            if silent { " with its host" } else { "" }
        ));
        process.silent.store(silent, Ordering::Relaxed);
        process.die(&mut Rng::with_seed(seed));
        self.places[place].process().take();
        self.excuse_all("a node was killed");
        self.note_admission();
        sleep(pause).await;
        self.bring_up(place).await;
        self.places[place].busy.store(false, Ordering::Relaxed);
    }

    /// Stops all tasks of a process for a while.
    async fn freeze(self: &Arc<Self>, place: usize, seed: u64, lasts: Duration) {
        let Some(process) = self.process(place) else { return };
        self.truth.say(format_args!("node-{place}.{} is frozen for {lasts:?}", process.number));
        let from = self.truth.now();
        process.gate.freeze();
        self.truth.froze(process.node_id, from, from.after(lasts));
        self.note_admission();
        sleep(lasts).await;
        self.truth.say(format_args!("node-{place}.{} goes on", process.number));
        process.gate.thaw(&mut Rng::with_seed(seed));
        self.note_admission();
    }

    /// The time of events.
    async fn befall(self: &Arc<Self>, rng: &mut Rng) {
        let lasts = between(rng, 60_000, 3_600_000);
        let until = self.truth.now().after(lasts);
        while self.truth.now() < until {
            let pause = between(rng, 50, 180_000);
            sleep(pause).await;
            if self.truth.first().is_some() {
                return;
            }
            self.happen(rng);
        }
    }

    fn happen(self: &Arc<Self>, rng: &mut Rng) {
        let event = match rng.u8(0..20) {
            0..=6 => Event::StoreFails,
            7..=9 => Event::Crash,
            10..=11 => Event::Stop,
            12..=14 => Event::Freeze,
            15..=16 => Event::Order,
            _ => Event::Quiet,
        };
        let place = rng.usize(0..self.places());
        let seed = rng.u64(..);
        let lasts = between(rng, 100, 240_000);
        let world = Arc::clone(self);
        match event {
            Event::Quiet => {}
            Event::StoreFails => {
                let fault = Fault::ALL[rng.usize(0..Fault::ALL.len())];
                let at = (self.places() > 1 && rng.bool()).then_some(place);
                let pause = lasts;
                self.truth.say(format_args!("store: {fault:?} for {pause:?}, at {at:?}"));
                self.database.fail(at, fault, pause);
                let now = self.truth.now();
                self.truth.trouble(now, now.after(pause + Duration::from_secs(40)));
                self.note_admission();
                drop(self.tasks.spawn(async move {
                    world.excuse_all("the store was away");
                    sleep(pause + Duration::from_millis(1)).await;
                    world.note_admission();
                    world.excuse_all("the store was away");
                    sleep(Duration::from_secs(30)).await;
                    world.excuse_all("the store was away");
                }));
            }
            Event::Crash | Event::Stop => {
                if self.places[place].busy.swap(true, Ordering::Relaxed) {
                    return;
                }
                if self.process(place).is_none() {
                    self.places[place].busy.store(false, Ordering::Relaxed);
                    return;
                }
                let pause = lasts.min(Duration::from_mins(3));
                let silent = rng.u8(0..4) == 0;
                let crash = matches!(event, Event::Crash);
                drop(self.tasks.spawn(async move {
                    if crash {
                        world.crash(place, silent, seed, pause).await;
                    } else {
                        world.stop(place, pause).await;
                    }
                }));
            }
            Event::Freeze => {
                let pause = lasts;
                drop(self.tasks.spawn(async move { world.freeze(place, seed, pause).await }));
            }
            Event::Order => {
                let agents: Vec<InstanceUid> = self.truth.lock().agents.keys().copied().collect();
                let ordered = rng.choice(&agents).and_then(|uid| {
                    let ordered = self.database.records().order(*uid);
                    ordered.map(|connection| (*uid, connection))
                });
                if let Some((uid, connection)) = ordered {
                    let who = self.truth.who(uid);
                    self.truth.say(format_args!("{who} is ordered to reconnect ({connection})"));
                }
            }
        }
    }

    /// Everything heals; after a while the record must be what is.
    async fn settle(self: &Arc<Self>, rng: &mut Rng) {
        self.truth.say(format_args!("calm"));
        self.database.heal();
        for place in &self.places {
            let process = place.process().clone();
            if let Some(process) = process {
                process.gate.thaw(rng);
            }
        }
        self.note_admission();
        self.calm.cancel();
        let expected = &self.config;
        let long = expected.heartbeat.timeout * 4
            + expected.heartbeat.check_interval * 2
            + expected.node.lease * 3
            + Duration::from_mins(25);
        sleep(long).await;
        self.quiet.store(true, Ordering::Relaxed);
        sleep(expected.heartbeat.timeout * 3).await;
        self.converged();
        // From now on nothing is lost, so that nobody has a reason to ask.
        self.truth.say(format_args!("every node is stopped and started"));
        for place in 0..self.places() {
            if !self.places[place].busy.swap(true, Ordering::Relaxed) {
                self.stop(place, Duration::from_secs(3)).await;
            }
        }
        sleep(expected.heartbeat.timeout * 4 + expected.heartbeat.check_interval + Duration::from_mins(4))
            .await;
        self.converged();
    }

    fn converged(&self) {
        let up: Vec<Arc<Process>> = (0..self.places()).filter_map(|place| self.process(place)).collect();
        check::converged(&self.truth, &self.database.records(), &up);
    }
}

//! One process of the server: its parts as the server puts them together, without listeners.
//!
//! The order of starting and of stopping is the server's. Every task goes through the process's gate.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fastrand::Rng;
use opamp_server::burden::Budget;
use opamp_server::close::CloseReason;
use opamp_server::config::Config;
use opamp_server::history::{Noticed, OpenConnection};
use opamp_server::lanes::Lanes;
use opamp_server::lease::Lease;
use opamp_server::orders::Orders;
use opamp_server::pulse::Link;
use opamp_server::safety::Safety;
use opamp_server::server::{assemble, restore};
use opamp_server::session::{Services, flush};
use opamp_server::store::{NodeStore as _, Transport};
use opamp_server::sweep::{Sweep, Verdicts};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::gate::{Gate, OnPanic, State};
use crate::rules::Rule;
use crate::store::{Database, Handle};
use crate::truth::Truth;

/// How long stopping may take beyond the drain.
const GRACE: Duration = Duration::from_secs(5);

/// A process.
pub(crate) struct Process {
    pub(crate) number: u64,
    pub(crate) place: usize,
    pub(crate) node_id: Uuid,
    pub(crate) gate: Arc<Gate>,
    pub(crate) services: Arc<Services>,
    pub(crate) budget: Budget,
    pub(crate) truth: Arc<Truth>,
    store: Arc<Handle>,
    alive: Arc<AtomicBool>,
    tasks: TaskTracker,
    judging: CancellationToken,
    flushing: CancellationToken,
    writing: CancellationToken,
    /// Cancelled when another node took this one for lost.
    pub(crate) ended: CancellationToken,
    /// Set once it admits nobody any more.
    pub(crate) closed: AtomicBool,
    links: Mutex<BTreeMap<u64, Arc<Link>>>,
    open_links: TaskTracker,
    owners: TaskTracker,
    next_link: AtomicU64,
    drain: Duration,
    /// Pace of its safety net.
    pub(crate) check_interval: Duration,
    name: String,
    /// Set when its host vanished with it: nobody is told.
    pub(crate) silent: AtomicBool,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process").field("number", &self.number).finish_non_exhaustive()
    }
}

/// What a process is started with.
#[derive(Clone, Debug)]
pub(crate) struct Start {
    pub(crate) number: u64,
    pub(crate) place: usize,
    pub(crate) config: Config,
    pub(crate) database: Arc<Database>,
    pub(crate) truth: Arc<Truth>,
    pub(crate) tasks: TaskTracker,
}

impl Process {
    /// Starts a process, or says why it did not.
    pub(crate) async fn start(start: Start) -> Result<Arc<Self>, String> {
        let alive = Arc::new(AtomicBool::new(true));
        let (database, number) = (Arc::clone(&start.database), start.number);
        let started = Self::try_start(start, &alive).await;
        if started.is_err() {
            alive.store(false, Ordering::Relaxed);
            database.release(number);
        }
        started
    }

    async fn try_start(start: Start, alive: &Arc<AtomicBool>) -> Result<Arc<Self>, String> {
        let Start { number, place, config, database, truth, tasks } = start;
        let store = Arc::new(Handle::new(Arc::clone(&database), place, number, Arc::clone(alive)));
        let name = format!("node-{place}");
        let (node_id, gate) = (Uuid::now_v7(), Gate::new());
        truth.name_process(node_id, format!("{name}.{number}"));
        let deadline = Instant::now() + config.node.lease;
        while !store.lock_node_name(&name).await.map_err(|error| error.to_string())? {
            if Instant::now() >= deadline {
                return Err("its name is in use".to_owned());
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        let shared: Arc<dyn opamp_server::store::Store> = Arc::<Handle>::clone(&store);
        let (services, writer, monitor) =
            assemble(&config, shared, node_id).await.map_err(|error| error.to_string())?;
        let process = Arc::new(Self {
            number,
            place,
            node_id,
            gate,
            services,
            budget: Budget::new(config.agents.max_inflight),
            truth,
            store,
            alive: Arc::clone(alive),
            tasks,
            judging: CancellationToken::new(),
            flushing: CancellationToken::new(),
            writing: CancellationToken::new(),
            ended: CancellationToken::new(),
            closed: AtomicBool::new(false),
            links: Mutex::default(),
            open_links: TaskTracker::new(),
            owners: TaskTracker::new(),
            next_link: AtomicU64::new(0),
            drain: config.shutdown.drain,
            check_interval: config.heartbeat.check_interval,
            name,
            silent: AtomicBool::new(false),
        });
        process.own("writer", writer.run(process.writing.clone()));
        process.own("monitor", monitor.run(Lanes::default(), process.judging.clone()));
        if let Err(error) = restore(&process.services, &process.name, node_id, &config).await {
            process.die(&mut Rng::with_seed(number));
            return Err(error.to_string());
        }
        process.own_timers(&config);
        let lease = Lease {
            store: Arc::clone(&process.services.store),
            history: process.services.history.clone(),
            metrics: Arc::clone(&process.services.metrics),
            outage: Arc::clone(&process.services.outage),
            node_id,
            name: process.name.clone(),
            length: config.node.lease,
            peers: Arc::clone(&process.services.peers),
            ended: process.ended.clone(),
        };
        process.own("lease", lease.run(process.writing.clone()));
        let orders = Orders {
            store: Arc::clone(&process.services.store),
            history: process.services.history.clone(),
            hub: Arc::clone(&process.services.hub),
            node_id,
            written: Arc::new(Notify::new()),
            listen_url: None,
            check_interval: config.heartbeat.check_interval,
        };
        process.own("orders", orders.run(process.flushing.clone()));
        Ok(process)
    }

    fn own_timers(self: &Arc<Self>, config: &Config) {
        let services = &self.services;
        self.own("sight", Arc::clone(&services.sight).run(Lanes::default(), self.writing.clone()));
        let verdicts = Verdicts {
            store: Arc::clone(&services.store),
            history: services.history.clone(),
            sight: Arc::clone(&services.sight),
            outage: Arc::clone(&services.outage),
            check_interval: config.heartbeat.check_interval,
        };
        self.own("verdicts", verdicts.run(self.judging.clone()));
        let safety = Safety {
            services: Arc::clone(services),
            node_id: self.node_id,
            check_interval: config.heartbeat.check_interval,
            flush_interval: config.store.flush_interval,
        };
        self.own("safety net", safety.run(self.judging.clone()));
        let sweep = Sweep {
            store: Arc::clone(&services.store),
            clock: services.clock.clone(),
            outage: Arc::clone(&services.outage),
            interval: config.sweep.interval,
            stale_after: config.sweep.stale_after,
            ephemeral: config.sweep.ephemeral,
        };
        self.own("sweep", sweep.run(self.judging.clone()));
        let flush = flush::run(Arc::clone(services), config.store.flush_interval, self.flushing.clone());
        self.own("flush", flush);
    }

    /// A task of the process.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let truth = Arc::clone(&self.truth);
        let on_panic: OnPanic =
            Arc::new(move |words| truth.contradict(Rule::Panic, || format!("a task panicked: {words}")));
        drop(self.tasks.spawn(self.gate.through(task, on_panic)));
    }

    /// A task without which the server does not go on.
    fn own(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let (truth, judging) = (Arc::clone(&self.truth), self.judging.clone());
        let task = self.owners.track_future(task);
        self.spawn(async move {
            task.await;
            if !judging.is_cancelled() {
                truth.contradict(Rule::Panic, || format!("the {name} ended by itself"));
            }
        });
    }

    pub(crate) fn links(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Link>>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A link's task, and its place among the open ones.
    pub(crate) fn open_link(
        self: &Arc<Self>,
        link: &Arc<Link>,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let number = self.next_link.fetch_add(1, Ordering::Relaxed);
        self.links().insert(number, Arc::clone(link));
        if self.closed.load(Ordering::Relaxed) && self.flushing.is_cancelled() {
            link.dismiss();
        }
        let process = Arc::clone(self);
        let task = self.open_links.track_future(task);
        self.spawn(async move {
            task.await;
            process.links().remove(&number);
        });
    }

    pub(crate) fn database(&self) -> &Database {
        self.store.database()
    }

    /// True where it answers agents.
    pub(crate) fn is_up(&self) -> bool {
        self.gate.state() != State::Dead
    }

    /// Ends the process without another word.
    pub(crate) fn die(&self, rng: &mut Rng) {
        self.truth.died(self.node_id);
        self.alive.store(false, Ordering::Relaxed);
        self.gate.kill(rng);
        self.store.release();
        // Sessions of pollers wait in the hub, which they hold themselves: a process takes both along when it ends.
        for connection in self.services.hub.connections() {
            self.services.hub.leave(&connection);
        }
    }

    /// Another node has ended all connections of this one: what is still here is closed, and writes nothing more.
    pub(crate) fn abandon_all(&self) {
        self.services.closing.store(true, Ordering::Relaxed);
        let mut connections = self.services.hub.connections();
        connections.sort_by_key(|connection| connection.id);
        for connection in connections {
            connection.abandon(CloseReason::ServerLost);
            self.services.hub.leave(&connection);
        }
    }

    /// Stops in an orderly way, as the server does; answers how many connections are not on record.
    pub(crate) async fn stop(self: &Arc<Self>) -> usize {
        let deadline = Instant::now() + self.drain + GRACE / 2;
        self.services.closing.store(true, Ordering::Relaxed);
        self.closed.store(true, Ordering::Relaxed);
        self.judging.cancel();
        let peers = tokio::time::timeout(GRACE / 4, self.store.list_peers(self.node_id)).await;
        let peers = !peers.is_ok_and(|peers| peers.is_ok_and(|peers| peers.is_empty()));
        let _store_may_be_away = tokio::time::timeout_at(deadline, self.end_connections(peers)).await;
        let links: Vec<_> = self.links().values().cloned().collect();
        for link in links {
            link.dismiss();
        }
        self.flushing.cancel();
        self.open_links.close();
        let _some_peers_never_answer = tokio::time::timeout_at(deadline, async {
            self.open_links.wait().await;
            self.services.history.recorded().await;
        })
        .await;
        let unrecorded = self.services.history.unrecorded() + self.still_open(peers).len();
        let now = self.services.clock.now();
        let ending = tokio::time::timeout_at(deadline + GRACE / 4, self.store.end_node(self.node_id, now));
        let _ended = ending.await;
        self.writing.cancel();
        self.owners.close();
        let _nothing_left = tokio::time::timeout_at(deadline + GRACE / 4, self.owners.wait()).await;
        unrecorded
    }

    fn still_open(&self, peers: bool) -> Vec<Arc<OpenConnection>> {
        let mut connections = self.services.hub.connections();
        connections.retain(|connection| {
            connection.ended().is_none() && (connection.transport == Transport::Websocket || !peers)
        });
        connections.sort_by_key(|connection| connection.id);
        connections
    }

    async fn end_connections(&self, peers: bool) {
        loop {
            let connections = self.still_open(peers);
            if connections.is_empty() {
                return;
            }
            let history = &self.services.history;
            let end = |connection: &Arc<OpenConnection>| {
                let noticed = match connection.transport {
                    Transport::Websocket => Noticed::Concluded,
                    Transport::Http => Noticed::Unheard,
                };
                history.end(connection, CloseReason::ServerShutdown, noticed)
            };
            let tickets: Vec<_> = connections.iter().filter_map(end).collect();
            for ticket in tickets {
                ticket.recorded().await;
            }
            for connection in connections.iter().filter(|one| one.transport == Transport::Http) {
                self.services.hub.leave(connection);
            }
        }
    }
}

//! The server: everything is built here once, from top to bottom, and stopped in the opposite order.
//!
//! Two listeners, one task tracker for links and the threads on which those live, one set of owner tasks (writer,
//! monitor, sight, verdicts, safety net, sweep, retention, orders, flush, lease, clock). An owner that ends before it is
//! told to stops the server: the next start tells the truth. A link's panic ends that link only.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::anchor::{Anchor, anchored};
use crate::api::{self, ApiState};
use crate::clock::Rate;
use crate::close::CloseReason;
use crate::config::Config;
use crate::heartbeat::HeartbeatMonitor;
use crate::history::{History, Noticed, OpenConnection, Writer};
use crate::lanes::Lanes;
use crate::lease::Lease;
use crate::metrics::Metrics;
use crate::orders::Orders;
use crate::outage::Outage;
use crate::peers::Peers;
use crate::pulse::Expectations;
use crate::retention::Retention;
use crate::safety::{self, Safety};
use crate::session::hub::Hub;
use crate::session::{QUESTIONS_PER_SECOND, Services, flush};
use crate::sight::Sight;
use crate::store::{self, NewNode, Store, StoreError, Transport};
use crate::sweep::{Sweep, Verdicts};
use crate::transport::{Admission, Limits, Listener};

/// How often a starting node tries to take the lock on its name.
const LOCK_PAUSE: Duration = Duration::from_millis(250);

/// How many connections wait to be accepted when a whole fleet comes at once; the system may allow fewer. Who finds no
/// room is tried again by its TCP after 1, 3 and 7 s.
const BACKLOG: u32 = 65_535;

/// File handles kept free of links: database, listeners, operators, and four for each lane.
const SPARE_FILES: u64 = 192;

/// How long stopping may take beyond `shutdown.drain`.
const GRACE: Duration = Duration::from_secs(5);

/// Pace at which connections are ended while stopping.
const DRAIN_STEP: Duration = Duration::from_millis(100);

/// How many connections a step of stopping ends at least.
const DRAIN_MINIMUM: usize = 200;

/// Why the server does not start, or stopped with a failure; one sentence that names the cure.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A listener cannot be bound.
    #[error("cannot listen on {address} ({key}): {source}")]
    Listen {
        /// The setting.
        key: &'static str,
        /// Its value.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// The store does not open.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another node has the name.
    #[error(
        "node.name {0} is in use by another opamp-server on this store: stop that one, or set another node.name"
    )]
    NameInUse(String),
    /// Another node has the whole database.
    #[error("the database file is in use by another opamp-server: stop that one, or set another store.url")]
    FileInUse,
    /// The system gives no file handles.
    #[error("cannot read or set the limit of open files: {0}")]
    FileLimit(std::io::Error),
    /// The system gives no threads.
    #[error("cannot start the threads on which links live: {0}")]
    Threads(std::io::Error),
    /// An owner task ended by itself.
    #[error("the {0} stopped unexpectedly; the server cannot go on without it")]
    Owner(String),
    /// Not everything was on record in time.
    #[error(
        "stopped without the store: {0} connections could not be ended on record, the next start ends them as server_lost"
    )]
    Unrecorded(usize),
    /// The node was marked as ended by another.
    #[error("another node took this one for lost and ended its connections: start again")]
    Ended,
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    agents: SocketAddr,
    operators: SocketAddr,
    node_id: Uuid,
    store: StoreHandle,
    services: Arc<Services>,
    admission: Arc<Admission>,
    owners: JoinSet<&'static str>,
    links: TaskTracker,
    stops: Stops,
    stopping: Arc<AtomicBool>,
    drain: Duration,
    ended: CancellationToken,
    /// Ends the lanes; dropped after the store is closed, whose connections were opened by whoever needed one.
    _threads: DropGuard,
}

struct StoreHandle(Arc<dyn Store>);

impl std::fmt::Debug for StoreHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Store")
    }
}

/// What is stopped when: first nobody is accused any more, last the writer.
#[derive(Clone, Debug, Default)]
struct Stops {
    judging: CancellationToken,
    flushing: CancellationToken,
    writing: CancellationToken,
}

impl Server {
    /// Starts a server; it admits agents when this returns.
    pub async fn start(config: &Config, migrate: bool) -> Result<Self, ServerError> {
        let (agents, agents_address) = bind("agents.listen", config.agents.listen)?;
        let (operators, operators_address) = bind("operators.listen", config.operators.listen)?;
        // It is accepted from on another thread.
        let agents = agents.into_std().map_err(|source| ServerError::Listen {
            key: "agents.listen",
            address: agents_address,
            source,
        })?;
        let max_connections = raise_file_limit(config.agents.max_connections)?;
        let store = store::open(config.store.url.expose(), config.store.max_connections, migrate)
            .await
            .map_err(with_cure)?;
        let name = config.node.node_name(agents_address.port());
        if !take_name(store.as_ref(), &name, config.node.lease).await? {
            // A file has one lock, whatever the names.
            let file = config.store.url.expose().starts_with("sqlite:");
            return Err(if file { ServerError::FileInUse } else { ServerError::NameInUse(name) });
        }

        let threads = CancellationToken::new();
        let lanes = Lanes::start(max_connections, &threads).await.map_err(ServerError::Threads)?;
        let threads = threads.drop_guard();
        let node_id = Uuid::now_v7();
        let (services, writer, monitor) = assemble(config, Arc::clone(&store), node_id).await?;
        let (stops, ended) = (Stops::default(), CancellationToken::new());
        let mut owners = JoinSet::new();
        own(&mut owners, "writer", writer.run(stops.writing.clone()));
        own(&mut owners, "heartbeat monitor", monitor.run(lanes.clone(), stops.judging.clone()));
        restore(&services, &name, node_id, config).await?;
        own_timers(&mut owners, config, &services, lanes.clone(), node_id, &stops);
        let lease = Lease {
            store: Arc::clone(&services.store),
            history: services.history.clone(),
            metrics: Arc::clone(&services.metrics),
            outage: Arc::clone(&services.outage),
            node_id,
            name: name.clone(),
            length: config.node.lease,
            peers: Arc::clone(&services.peers),
            ended: ended.clone(),
        };
        own(&mut owners, "lease", lease.run(stops.writing.clone()));

        let links = TaskTracker::new();
        let admission = Arc::new(Admission::new(limits(config, max_connections)));
        let listener = Listener::new(
            agents,
            Arc::clone(&services),
            Arc::clone(&admission),
            links.clone(),
            &lanes,
            stops.flushing.clone(),
        );
        // A fleet that comes at once does not wait behind what it has set going.
        owners.spawn_on(owned("agents' listener", listener.run()), &lanes.door());
        let (stopping, ordered) = (Arc::new(AtomicBool::new(false)), Arc::new(Notify::new()));
        let orders = Orders {
            store: Arc::clone(&services.store),
            history: services.history.clone(),
            hub: Arc::clone(&services.hub),
            node_id,
            written: Arc::clone(&ordered),
            listen_url: config.store.listen_url.clone(),
            check_interval: config.heartbeat.check_interval,
        };
        own(&mut owners, "orders", orders.run(stops.flushing.clone()));
        let state = api_state(config, &services, node_id, ordered, Arc::clone(&stopping));
        let router = api::router(state);
        own(&mut owners, "operators' listener", serve_operators(operators, router, stops.writing.clone()));
        Ok(Self {
            agents: agents_address,
            operators: operators_address,
            node_id,
            store: StoreHandle(store),
            services,
            admission,
            owners,
            links,
            stops,
            stopping,
            drain: config.shutdown.drain,
            ended,
            _threads: threads,
        })
    }

    /// Where agents connect.
    #[must_use]
    pub fn agents_address(&self) -> SocketAddr {
        self.agents
    }

    /// Where operators connect.
    #[must_use]
    pub fn operators_address(&self) -> SocketAddr {
        self.operators
    }

    /// Runs until `stop` completes or an owner fails, then stops in an orderly way.
    pub async fn run(mut self, stop: impl Future<Output = ()> + Send) -> Result<(), ServerError> {
        let failed = tokio::select! {
            () = stop => None,
            () = self.ended.cancelled() => {
                self.abandon_all();
                Some(ServerError::Ended)
            }
            owner = self.owners.join_next() => Some(ServerError::Owner(owner_name(owner))),
        };
        let stopped = self.stop().await;
        match failed {
            Some(error) => Err(error),
            None => stopped,
        }
    }

    /// Another node has ended all connections of this one: what is still here is closed, and writes nothing more.
    fn abandon_all(&self) {
        self.services.closing.store(true, Ordering::Relaxed);
        for connection in self.services.hub.connections() {
            connection.abandon(CloseReason::ServerLost);
            self.services.hub.leave(&connection);
        }
    }

    /// Stops: admits nobody, ends what is open on record, closes the links, and the store last.
    async fn stop(mut self) -> Result<(), ServerError> {
        let deadline = Instant::now() + self.drain + GRACE / 2;
        self.stopping.store(true, Ordering::Relaxed);
        self.services.closing.store(true, Ordering::Relaxed);
        self.admission.close();
        self.stops.judging.cancel();
        let peers = tokio::time::timeout(GRACE / 4, self.store.0.list_peers(self.node_id)).await;
        // Polls that may live on elsewhere are left alone: who cannot ask does not end them, nor is a node lost whose
        // renewal is merely late.
        let peers = !peers.is_ok_and(|peers| peers.is_ok_and(|peers| peers.is_empty()));
        let _store_may_be_away = tokio::time::timeout_at(deadline, self.end_connections(peers)).await;
        self.admission.dismiss();
        self.stops.flushing.cancel();
        self.links.close();
        let _some_peers_never_answer = tokio::time::timeout_at(deadline, async {
            self.links.wait().await;
            self.services.history.recorded().await;
        })
        .await;
        let unrecorded = self.services.history.unrecorded() + self.still_open(peers).len();
        let now = self.services.clock.now();
        let ending = tokio::time::timeout_at(deadline + GRACE / 4, self.store.0.end_node(self.node_id, now));
        if !matches!(ending.await, Ok(Ok(()))) {
            tracing::warn!("the node's end is not on record");
        }
        self.stops.writing.cancel();
        let _nothing_left_to_wait_for = tokio::time::timeout_at(deadline + GRACE / 4, async {
            while self.owners.join_next().await.is_some() {}
            self.store.0.close().await;
        })
        .await;
        if unrecorded == 0 { Ok(()) } else { Err(ServerError::Unrecorded(unrecorded)) }
    }

    /// The connections that this node has to end before it stops.
    ///
    /// Polls may land on another node, so they go on where there are `peers`.
    fn still_open(&self, peers: bool) -> Vec<Arc<OpenConnection>> {
        let mut connections = self.services.hub.connections();
        connections.retain(|connection| {
            connection.ended().is_none() && (connection.transport == Transport::Websocket || !peers)
        });
        connections
    }

    /// Ends the connections of this node, spread over `shutdown.drain`.
    async fn end_connections(&self, peers: bool) {
        // More than once, because an opening may just be on its way.
        loop {
            let connections = self.still_open(peers);
            if connections.is_empty() {
                return;
            }
            self.drain(connections).await;
        }
    }

    async fn drain(&self, mut connections: Vec<Arc<OpenConnection>>) {
        // Whoever shares a link leaves together.
        connections.sort_by_key(|connection| Arc::as_ptr(&connection.link) as usize);
        let steps =
            usize::try_from((self.drain / 2).as_millis() / DRAIN_STEP.as_millis()).unwrap_or(1).max(1);
        let size = (connections.len() / steps).max(DRAIN_MINIMUM);
        let mut chunks = connections.chunks(size).peekable();
        while let Some(chunk) = chunks.next() {
            let next_step = Instant::now() + DRAIN_STEP;
            self.end_chunk(chunk).await;
            if chunks.peek().is_some() {
                tokio::time::sleep_until(next_step).await;
            }
        }
    }

    async fn end_chunk(&self, connections: &[Arc<OpenConnection>]) {
        let end = |connection: &Arc<OpenConnection>| {
            let noticed = match connection.transport {
                Transport::Websocket => Noticed::Concluded,
                Transport::Http => Noticed::Unheard,
            };
            self.services.history.end(connection, CloseReason::ServerShutdown, noticed)
        };
        let tickets: Vec<_> = connections.iter().filter_map(end).collect();
        for ticket in tickets {
            ticket.recorded().await;
        }
        for connection in connections.iter().filter(|connection| connection.transport == Transport::Http) {
            self.services.hub.leave(connection);
        }
    }
}

fn own(
    owners: &mut JoinSet<&'static str>,
    name: &'static str,
    task: impl Future<Output = ()> + Send + 'static,
) {
    owners.spawn(owned(name, task));
}

/// A task that tells its name when it ends.
async fn owned(name: &'static str, task: impl Future<Output = ()> + Send + 'static) -> &'static str {
    task.await;
    name
}

fn owner_name(owner: Option<Result<&'static str, tokio::task::JoinError>>) -> String {
    match owner {
        Some(Ok(name)) => name.to_owned(),
        Some(Err(error)) => format!("owner of a part of it ({error})"),
        None => "server".to_owned(),
    }
}

fn bind(key: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), ServerError> {
    let failed = |source| ServerError::Listen { key, address, source };
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.map_err(failed)?;
    // A restart does not wait for the links of the process before.
    socket.set_reuseaddr(true).map_err(failed)?;
    socket.bind(address).map_err(failed)?;
    let listener = socket.listen(BACKLOG).map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Builds what sessions work with, and the two tasks behind it: a node without listeners.
pub async fn assemble(
    config: &Config,
    store: Arc<dyn Store>,
    node_id: Uuid,
) -> Result<(Arc<Services>, Writer, HeartbeatMonitor), ServerError> {
    let clock = anchored(store.as_ref()).await?;
    let metrics = Arc::new(Metrics::new());
    let outage = Arc::new(Outage::new(Arc::clone(&metrics)));
    let expected = Expectations { interval: config.heartbeat.interval, timeout: config.heartbeat.timeout };
    let sight = Arc::new(Sight::new(clock.clone(), Arc::clone(&metrics), Arc::clone(&outage)));
    let (history, writer) = History::new(
        Arc::clone(&store),
        clock.clone(),
        Arc::clone(&metrics),
        Arc::clone(&sight),
        node_id,
        expected,
    );
    let hub = Arc::new(Hub::new(Arc::clone(&metrics)));
    let leaving = Arc::clone(&hub);
    let peers = Arc::new(Peers::default());
    let (watch, monitor) = HeartbeatMonitor::new(
        history.clone(),
        Arc::clone(&sight),
        Arc::clone(&peers),
        Arc::clone(&metrics),
        config.store.flush_interval,
        Box::new(move |connection| leaving.leave(connection)),
    );
    let (questions, closing) = (Rate::new(QUESTIONS_PER_SECOND), AtomicBool::new(false));
    let services =
        Services { store, history, hub, watch, clock, metrics, outage, sight, peers, questions, closing };
    Ok((Arc::new(services), writer, monitor))
}

/// Starts the owners that act by the clock.
fn own_timers(
    owners: &mut JoinSet<&'static str>,
    config: &Config,
    services: &Arc<Services>,
    lanes: Lanes,
    node_id: Uuid,
    stops: &Stops,
) {
    own(owners, "sight", Arc::clone(&services.sight).run(lanes, stops.writing.clone()));
    let verdicts = Verdicts {
        store: Arc::clone(&services.store),
        history: services.history.clone(),
        sight: Arc::clone(&services.sight),
        outage: Arc::clone(&services.outage),
        check_interval: config.heartbeat.check_interval,
    };
    own(owners, "verdicts", verdicts.run(stops.judging.clone()));
    let safety = Safety {
        services: Arc::clone(services),
        node_id,
        check_interval: config.heartbeat.check_interval,
        flush_interval: config.store.flush_interval,
    };
    own(owners, "safety net", safety.run(stops.judging.clone()));
    let sweep = Sweep {
        store: Arc::clone(&services.store),
        clock: services.clock.clone(),
        outage: Arc::clone(&services.outage),
        interval: config.sweep.interval,
        stale_after: config.sweep.stale_after,
        ephemeral: config.sweep.ephemeral,
    };
    own(owners, "sweep", sweep.run(stops.judging.clone()));
    let retention = Retention {
        store: Arc::clone(&services.store),
        clock: services.clock.clone(),
        metrics: Arc::clone(&services.metrics),
        outage: Arc::clone(&services.outage),
        history: config.retention.history,
    };
    own(owners, "retention", retention.run(stops.judging.clone()));
    let flush = flush::run(Arc::clone(services), config.store.flush_interval, stops.flushing.clone());
    own(owners, "flush", flush);
    let anchor = Anchor {
        store: Arc::clone(&services.store),
        clock: services.clock.clone(),
        sight: Arc::clone(&services.sight),
        outage: Arc::clone(&services.outage),
    };
    own(owners, "clock", anchor.run(stops.writing.clone()));
}

fn limits(config: &Config, max_connections: usize) -> Limits {
    Limits {
        path: config.agents.path.clone(),
        token: config.agents.token.clone(),
        local: config.agents.token.is_none() && !config.agents.allow_anonymous,
        max_connections,
        max_connects_per_second: config.agents.max_connects_per_second,
        max_inflight: config.agents.max_inflight,
        max_message_size: config.agents.max_message_size,
        max_per_link: config.agents.max_per_link,
    }
}

fn api_state(
    config: &Config,
    services: &Services,
    node_id: Uuid,
    ordered: Arc<Notify>,
    stopping: Arc<AtomicBool>,
) -> ApiState {
    ApiState {
        node_id,
        ordered,
        local: config.operators.token.is_none() && !config.operators.allow_anonymous,
        store: Arc::clone(&services.store),
        clock: services.clock.clone(),
        metrics: Arc::clone(&services.metrics),
        token: config.operators.token.clone(),
        expected: *services.history.expected(),
        stale_after: config.sweep.stale_after,
        stopping,
        turns: Arc::new(Semaphore::new(api::TURNS)),
    }
}

/// Raises the soft limit of open files to the hard one; answers how many links it allows, at most `wanted`.
fn raise_file_limit(wanted: usize) -> Result<usize, ServerError> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        setrlimit(Resource::Nofile, raised).map_err(|error| ServerError::FileLimit(error.into()))?;
    }
    let Some(files) = limit.maximum else { return Ok(wanted) };
    let allowed = usize::try_from(files.saturating_sub(SPARE_FILES)).unwrap_or(usize::MAX).max(1);
    if allowed < wanted {
        tracing::info!(
            max_connections = allowed,
            "agents.max_connections is lowered from {wanted}: this process may open {files} files (ulimit -n)"
        );
    }
    Ok(allowed.min(wanted))
}

/// Names the setting to look at where the store cannot be reached.
fn with_cure(error: StoreError) -> StoreError {
    if let StoreError::Unavailable(text) = error {
        StoreError::Unavailable(format!("{text} (check store.url)"))
    } else {
        error
    }
}

/// Takes the lock on the node's name; waits for a predecessor that is just letting go. False where it does not.
async fn take_name(store: &dyn Store, name: &str, lease: Duration) -> Result<bool, StoreError> {
    let deadline = Instant::now() + lease;
    while !store.lock_node_name(name).await? {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        tokio::time::sleep(LOCK_PAUSE).await;
    }
    Ok(true)
}

/// Puts the node on record, ends what its predecessor left, and takes polls on record under watch.
pub async fn restore(
    services: &Arc<Services>,
    name: &str,
    node_id: Uuid,
    config: &Config,
) -> Result<(), ServerError> {
    let expected = *services.history.expected();
    let at = services.clock.now();
    let started = services
        .store
        .start_node(&NewNode {
            id: node_id,
            name: name.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            lease: config.node.lease,
            at,
            return_time: expected.return_time(),
            first_poll: expected.first_poll(),
        })
        .await?;
    services.metrics.connections_ended.of(CloseReason::ServerLost).increment(started.lost_connections);
    if started.lost_connections > 0 {
        tracing::warn!(
            connections = started.lost_connections,
            "connections that a lost server left open were ended as server_lost"
        );
    }
    let polled = services.store.list_polled_connections().await?;
    safety::watch_polls(services, &polled).await;
    tracing::info!(%node_id, name, polled = polled.len(), unwatched_seconds = started.unwatched.map(|time| time.as_secs()), "node started");
    Ok(())
}

async fn serve_operators(listener: TcpListener, router: axum::Router, stop: CancellationToken) {
    let served =
        axum::serve(listener, router).with_graceful_shutdown(async move { stop.cancelled().await }).await;
    if let Err(error) = served {
        tracing::error!(%error, "the operators' listener failed");
    }
}

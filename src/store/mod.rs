//! What is on record: agents, their connections, their status over time, and the nodes that watch them.
//!
//! The only place that knows SQL. [`Store`] is one promise that two databases keep: every method is
//! one whole transaction named by its intent, no transaction leaves this folder, and every write
//! for a connection carries its id, the **fence**: it changes nothing once a newer one took over.
//!
//! Where operators look for: create and update a connection, upsert an agent → [`Write`]; the active
//! connection and the history → [`ConnectionStore`]; get, list (online, offline, stale) and retire
//! agents, last seen, overdue status → [`AgentStore`]; close a connection, delete agents →
//! [`OrderStore`]; what a restart restores → [`NodeStore`]; what was at a moment → [`PastStore`].

mod agents;
mod attributes;
mod connections;
mod dialect;
mod migrations;
mod moment;
mod nodes;
mod observation;
mod orders;
mod page;
mod past;
#[cfg(test)]
mod plans;
mod postgres;
mod retention;
mod sqlite;
mod status_log;
mod write;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::Serialize;
use uuid::Uuid;

pub use agents::{AgentDetail, AgentFilter, AgentRow, AgentSummary, Sighting};
pub use connections::{ConnectionRow, HistoryFilter, PolledConnection};
pub use migrations::{MigrationState, Migrations};
pub use nodes::{Heir, Held, NewNode, NodeStart, Peer};
pub use orders::{CloseOrder, Deleted, Deletion, Reconnect};
pub(crate) use page::cut;
pub use past::{
    FleetPast, MOST_ROWS, Observer, PastAgent, PastAgents, PastFilter, PastSummary, Span, Stay, StayPlace,
    Stays, Watch,
};
pub use retention::Forgotten;
pub use status_log::Transition;
pub use write::{
    AgentUpdate, ConnectionEnd, Displaced, Ended, FirstReport, NewConnection, Older, Opened, Rival, Write,
    Written,
};

use crate::agent::InstanceUid;
use crate::clock::Moment;
use crate::config::Ephemeral;
use crate::incidents::Observation;

/// A call to the store takes at most this long, then it counts as unavailable.
pub const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// Why the store did not do as told; it speaks of what the caller can do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The database cannot be reached or cannot write: try again later.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// Two writers met: do it again.
    #[error("two writers met in the store")]
    Conflict,
    /// The node that writes is marked as ended: nothing of it is written any more.
    #[error("another node took this one for lost")]
    NodeEnded,
    /// A stored row cannot be read.
    #[error("unreadable data in the store: {0}")]
    Corrupt(String),
    /// The database refuses this very data.
    #[error("the store refuses the data: {0}")]
    Rejected(String),
    /// The schema does not fit this binary; the text names the cure.
    #[error("{0}")]
    Schema(String),
}

/// An agent's status: a verdict, not an observation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It reports, or was cut off by the server a moment ago.
    Online,
    /// It left or fell silent.
    Offline,
    /// Offline for too long: somebody must look.
    Error,
    /// An ephemeral agent that stayed offline, or a deleted one: hidden, history kept.
    Retired,
}

impl Status {
    /// The word used in rows, logs and the API.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Offline => "offline",
            Self::Error => "error",
            Self::Retired => "retired",
        }
    }

    /// Reads a [`label`](Self::label).
    #[must_use]
    pub fn from_label(label: &str) -> Option<Self> {
        [Self::Online, Self::Offline, Self::Error, Self::Retired]
            .into_iter()
            .find(|status| status.label() == label)
    }
}

impl TryFrom<String> for Status {
    type Error = String;

    fn try_from(label: String) -> Result<Self, String> {
        Self::from_label(&label).ok_or_else(|| format!("unknown status {label:?}"))
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// How a connection's reports travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// One WebSocket.
    Websocket,
    /// Polls over plain HTTP.
    Http,
}

impl Transport {
    /// All transports.
    pub const ALL: [Self; 2] = [Self::Websocket, Self::Http];

    /// The word used in rows, metric labels and the API.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Websocket => "websocket",
            Self::Http => "http",
        }
    }

    /// Reads a [`label`](Self::label).
    #[must_use]
    pub fn from_label(label: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|transport| transport.label() == label)
    }
}

impl TryFrom<String> for Transport {
    type Error = String;

    fn try_from(label: String) -> Result<Self, String> {
        Self::from_label(&label).ok_or_else(|| format!("unknown transport {label:?}"))
    }
}

/// One change of an agent's status, as logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusChange {
    /// Whose status.
    pub agent: InstanceUid,
    /// The status before; none for an agent's first report.
    pub from: Option<Status>,
    /// The status from now on.
    pub to: Status,
    /// Why: `first_report`, `returned`, `stale`, `deleted` or the reason of a connection's end.
    pub reason: String,
    /// The connection concerned.
    pub connection_id: Option<i64>,
}

impl StatusChange {
    /// Logs it, once it is on record.
    pub fn log(&self) {
        tracing::info!(
            agent_id = %self.agent,
            from = self.from.map_or("unknown", |status| status.label()),
            to = self.to.label(),
            reason = self.reason,
            connection_id = self.connection_id,
            "agent status updated"
        );
    }
}

/// Which page of a list: at most `limit` items that follow `after`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRequest<K> {
    /// The key of the last item of the page before.
    pub after: Option<K>,
    /// How many items, 1 to 1,000.
    pub limit: u32,
}

/// One page of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<T> {
    /// The items, in the order of the list.
    pub items: Vec<T>,
    /// How many items the whole list has, exactly.
    pub total: u64,
    /// True where more items follow.
    pub more: bool,
}

/// Agents: what is known of each, and their status.
#[async_trait]
pub trait AgentStore: Send + Sync {
    /// Everything known of one agent, retired ones included.
    async fn get_agent(&self, agent: InstanceUid) -> Result<Option<AgentDetail>, StoreError>;

    /// The short row of one agent, retired ones included.
    async fn get_agent_row(&self, agent: InstanceUid) -> Result<Option<AgentRow>, StoreError>;

    /// The agents that match `filter` (online, offline, stale, …), by id.
    async fn list_agents(
        &self,
        filter: &AgentFilter,
        page: PageRequest<InstanceUid>,
    ) -> Result<Page<AgentRow>, StoreError>;

    /// The next agents that match `filter`, by id, and nothing else: for who reads all of them.
    async fn next_agents(
        &self,
        filter: &AgentFilter,
        page: PageRequest<InstanceUid>,
    ) -> Result<Vec<AgentRow>, StoreError>;

    /// How many agents have which status and health.
    async fn summarize_agents(&self) -> Result<AgentSummary, StoreError>;

    /// The changes of an agent's status, newest first.
    async fn list_status_history(
        &self,
        agent: InstanceUid,
        page: PageRequest<i64>,
    ) -> Result<Page<Transition>, StoreError>;

    /// Updates when agents were last seen, and their numbers, in one statement; answers how many rows changed.
    ///
    /// A sighting changes nothing where a newer connection holds the fence or a later sighting is stored.
    async fn update_last_seen(&self, sightings: &[Sighting]) -> Result<u64, StoreError>;

    /// Carries out the pending verdicts that are due at `now`: agents that did not return in time go offline.
    async fn update_overdue_status(&self, now: Moment) -> Result<Vec<StatusChange>, StoreError>;

    /// When the next pending verdict is due.
    async fn next_overdue(&self) -> Result<Option<Moment>, StoreError>;

    /// Agents offline since before `now - stale_after`: ephemeral ones are retired, the others become `error`.
    async fn retire_stale_agents(
        &self,
        now: Moment,
        stale_after: Duration,
        ephemeral: Ephemeral,
    ) -> Result<Vec<StatusChange>, StoreError>;

    /// Notes that an agent was given a uid (S-048): the record of the new one exists, retired until
    /// its first report, and links to the temporary one. Answers the uid to use: asked again before
    /// the agent used it, the same as before.
    async fn assign_uid(
        &self,
        temporary: InstanceUid,
        candidate: InstanceUid,
        at: Moment,
    ) -> Result<InstanceUid, StoreError>;
}

/// The connection history.
#[async_trait]
pub trait ConnectionStore: Send + Sync {
    /// Does all of `batch` in one transaction, in the order of [`Write`]'s stages; one answer each, in the same order.
    ///
    /// No agent may occur twice in one stage. Where an error is returned, nothing was done.
    async fn write(&self, batch: &[Write]) -> Result<Vec<Written>, StoreError>;

    /// The open connection of an agent.
    async fn get_active_connection(&self, agent: InstanceUid) -> Result<Option<ConnectionRow>, StoreError>;

    /// The connections of an agent, newest first.
    async fn list_connection_history(
        &self,
        agent: InstanceUid,
        filter: HistoryFilter,
        page: PageRequest<i64>,
    ) -> Result<Page<ConnectionRow>, StoreError>;

    /// Open connections over plain HTTP, which no node holds: a starting node watches them again.
    async fn list_polled_connections(&self) -> Result<Vec<PolledConnection>, StoreError>;
}

/// What operators order of agents and their connections.
#[async_trait]
pub trait OrderStore: Send + Sync {
    /// Orders that the open connection of an agent ends as `reconnect_requested`; none where the agent is unknown.
    async fn order_reconnect(&self, agent: InstanceUid) -> Result<Option<Reconnect>, StoreError>;

    /// Deletes the next batch of agents that match, by id: they are hidden, their history stays.
    ///
    /// Connected ones are left alone, unless it is forced: then a connection that a node holds is
    /// ordered to end, one that nobody holds (plain HTTP) is ended here, both as `deleted`.
    async fn delete_agents(
        &self,
        deletion: &Deletion,
        after: Option<InstanceUid>,
    ) -> Result<Deleted, StoreError>;

    /// The connections held by this node that are to end.
    async fn list_close_orders(&self, node: Uuid) -> Result<Vec<CloseOrder>, StoreError>;

    /// Those of these connections whose end is on record.
    async fn list_ended_connections(&self, connections: &[i64]) -> Result<Vec<i64>, StoreError>;
}

/// The nodes that watch the fleet.
#[async_trait]
pub trait NodeStore: Send + Sync {
    /// The database's time.
    async fn now(&self) -> Result<Moment, StoreError>;

    /// Takes the lock on a node name, held until the store is dropped; false where another process
    /// holds it. Asked again by its holder, it makes sure that the lock is still held.
    async fn lock_node_name(&self, name: &str) -> Result<bool, StoreError>;

    /// Puts a starting node on record and ends its predecessor's open connections as `server_lost`.
    ///
    /// Pending verdicts give their agents the return time from now on; without another living node, the
    /// time in which nobody watched makes nobody stale. The caller holds the lock on the name.
    async fn start_node(&self, node: &NewNode) -> Result<NodeStart, StoreError>;

    /// Gives every agent with a pending verdict its return time anew, from `now`: nobody could have seen it return.
    async fn postpone_verdicts(&self, now: Moment, return_time: Duration) -> Result<(), StoreError>;

    /// Renews a node's lease; false where the node was marked as ended.
    async fn renew_node(&self, node: Uuid, at: Moment) -> Result<bool, StoreError>;

    /// The other nodes that are not marked as ended.
    async fn list_peers(&self, node: Uuid) -> Result<Vec<Peer>, StoreError>;

    /// Marks a node that did not renew its lease as ended and ends what it left open as `server_lost`,
    /// once: none where it renewed meanwhile, was ended by another, or the heir was ended itself.
    /// Otherwise how many connections ended.
    async fn end_lost_node(&self, lost: &Peer, heir: &Heir) -> Result<Option<u64>, StoreError>;

    /// Ends what ended nodes left open after all, as `server_lost`; answers how many connections.
    async fn end_strays(&self, heir: &Heir) -> Result<u64, StoreError>;

    /// The open connections that are on record as held by a node.
    async fn list_held_connections(&self, node: Uuid) -> Result<Vec<Held>, StoreError>;

    /// Marks a node as ended in an orderly way.
    async fn end_node(&self, node: Uuid, at: Moment) -> Result<(), StoreError>;
}

/// What was, as of a moment or over a span.
///
/// Each call reads one state of the database, and says who watched as that state has it.
#[async_trait]
pub trait PastStore: Send + Sync {
    /// When the fleet was watched, and since when history is whole.
    async fn watch(&self, observer: Observer) -> Result<Watch, StoreError>;

    /// The next stays of an agent that say something about a span, in the order of time: first the last one that began
    /// at or before its beginning, if any, then at most `limit` that follow `after`, or the beginning.
    async fn list_stays(
        &self,
        agent: InstanceUid,
        span: Span,
        after: Option<StayPlace>,
        limit: u32,
        observer: Observer,
    ) -> Result<Stays, StoreError>;

    /// The agents that match `filter` as of a moment, by id.
    async fn list_agents_as_of(
        &self,
        filter: &PastFilter,
        at: Moment,
        page: PageRequest<InstanceUid>,
        observer: Observer,
    ) -> Result<PastAgents, StoreError>;

    /// How many agents had which status at a moment, and of how many is known whether they were connected.
    async fn summarize_as_of(
        &self,
        at: Moment,
        observer: Observer,
    ) -> Result<(PastSummary, Watch), StoreError>;

    /// Everything that decides the counts of the fleet over a span; none where that is more than [`MOST_ROWS`].
    async fn read_fleet(&self, span: Span, observer: Observer) -> Result<Option<FleetPast>, StoreError>;

    /// The next connections of an agent, newest first, and nothing else: for who reads all of them.
    async fn next_connections(
        &self,
        agent: InstanceUid,
        filter: HistoryFilter,
        page: PageRequest<i64>,
    ) -> Result<Vec<ConnectionRow>, StoreError>;

    /// The next connections of all agents that were, or may have been, open in a span, in the order of time.
    async fn next_connections_of_all(
        &self,
        span: Span,
        after: Option<StayPlace>,
        limit: u32,
    ) -> Result<Vec<ConnectionRow>, StoreError>;
}

/// What is forgotten in the end.
#[async_trait]
pub trait RetentionStore: Send + Sync {
    /// Forgets connections that ended and changes of status that happened before `before`, and then
    /// agents retired before it that have no history left; at most 1,000 of each.
    async fn forget(&self, before: Moment) -> Result<Forgotten, StoreError>;
}

/// What incidents are told from.
#[async_trait]
pub trait ObservationStore: Send + Sync {
    /// Reads the connections that ended from `begins` up to `ends`, and those that were open then.
    ///
    /// Of more than `most` ends the latest are read, and the observation begins later. Attributes are those of now.
    async fn observe(&self, begins: Moment, ends: Moment, most: u32) -> Result<Observation, StoreError>;
}

/// One database that keeps all of it.
#[async_trait]
pub trait Store:
    AgentStore + ConnectionStore + OrderStore + NodeStore + PastStore + RetentionStore + ObservationStore
{
    /// True where the database answers and its schema is complete; the error says what is wrong.
    async fn check(&self) -> Result<(), StoreError>;

    /// Calls `heard` once it listens and then whenever any node wrote an order; returns why it hears nothing more.
    ///
    /// `url` is where to listen, if not at the store's own: a pooler hears nothing. Where no other
    /// process can write orders, nothing more is ever heard.
    async fn hear_orders(&self, url: Option<&str>, heard: &(dyn Fn() + Send + Sync)) -> StoreError;

    /// Closes all connections to the database.
    async fn close(&self);
}

/// The two kinds of database, told apart by the URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Postgres,
    Sqlite,
}

fn kind(url: &str) -> Result<Kind, StoreError> {
    match url.split_once(':').map(|(scheme, _)| scheme) {
        Some("postgres" | "postgresql") => Ok(Kind::Postgres),
        Some("sqlite") => Ok(Kind::Sqlite),
        _ => Err(StoreError::Schema(
            "store.url must start with postgres:// (a server) or sqlite:// (a file)".to_owned(),
        )),
    }
}

/// Opens the store at `url`. Missing migrations are applied, or, where `migrate` is false, an error.
pub async fn open(url: &str, max_connections: u32, migrate: bool) -> Result<Arc<dyn Store>, StoreError> {
    match kind(url)? {
        Kind::Postgres => Ok(Arc::new(postgres::open(url, max_connections, migrate).await?)),
        Kind::Sqlite => Ok(Arc::new(sqlite::open(url, max_connections, migrate).await?)),
    }
}

/// The migrations of the database at `url`, without touching them; a missing SQLite file is made
/// only where `create` says so.
pub async fn migrations(url: &str, create: bool) -> Result<Box<dyn Migrations>, StoreError> {
    match kind(url)? {
        Kind::Postgres => Ok(Box::new(postgres::connect(url, 1).await?)),
        Kind::Sqlite => Ok(Box::new(sqlite::connect(url, 1, create).await?)),
    }
}

//! What was: agents as of a moment, their stays over a span, and who watched then.
//!
//! Owns the questions about the past, and the record of when nobody could have answered them: [`Watch`]. Every call
//! reads one state of the database, so that what it says of rows, nodes and forgotten history fits together. How a
//! stretch of time is told from the rows is not decided here but in `timeline`; only where all agents are counted at
//! one moment is the same rule spelt in SQL, so that counts read indexes alone.

mod statements;
mod watch;

use async_trait::async_trait;
use serde::Serialize;
use sqlx::{Decode, Encode, Executor, FromRow, IntoArguments, QueryBuilder, Transaction, Type};
use utoipa::ToSchema;
use uuid::Uuid;

use super::connections::select_connections;
use super::dialect::{Dialect, SqlStore, bounded, failure};
use super::page::cut;
use super::{ConnectionRow, HistoryFilter, PageRequest, PastStore, Status, StoreError, Transport};
use crate::agent::InstanceUid;
use crate::clock::Moment;
pub(super) use statements::{
    count_past, select_changes, select_connections_of_all, select_ends, select_everybody,
    select_further_stays, select_open_at, select_past, select_stay_at, select_stays_of_all,
};
pub use watch::{Observer, Watch};

/// A stretch of time: `from` belongs to it, `to` does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its first moment.
    pub from: Moment,
    /// The first moment after it.
    pub to: Moment,
}

/// What the row of a connection says about time.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct Stay {
    /// The connection.
    pub id: i64,
    /// Its first report.
    pub connected_at: Moment,
    /// Its end, or the last proof that it was there; none while open.
    pub disconnected_at: Option<Moment>,
    /// When an end that was not seen was known.
    pub disconnected_by: Option<Moment>,
    /// Why it ended.
    pub reason: Option<String>,
    /// How its reports travelled.
    #[sqlx(try_from = "String")]
    pub transport: Transport,
    /// For an open one: the last sign of life on record.
    pub confirmed_until: Option<Moment>,
}

/// The stays of one agent that say something about a span, in the order of time.
#[derive(Clone, Debug)]
pub struct Stays {
    /// Without a place to go on from, the first is the last one that began at or before the span's beginning.
    pub stays: Vec<Stay>,
    /// True where more follow.
    pub more: bool,
    /// Who watched.
    pub watch: Watch,
}

/// A place among stays in the order of time: when one began, and its id.
pub type StayPlace = (Moment, i64);

/// An agent as of a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PastAgent {
    /// The instance uid.
    pub id: InstanceUid,
    /// Its status then.
    pub status: Status,
    /// Since when it had that; none where that change is not on record any more.
    pub since: Option<Moment>,
    /// The last connection that had begun by then.
    pub stay: Option<Stay>,
}

/// Which agents, as of a moment; every condition given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PastFilter {
    /// This very one.
    pub id: Option<InstanceUid>,
    /// With one of these statuses then; none = any but `retired`.
    pub statuses: Vec<Status>,
    /// Known to have been connected then, or known not to have been.
    pub connected: Option<bool>,
    /// Connected this way then.
    pub transport: Option<Transport>,
    /// Whose id, present name or present host begins with this, in any case.
    pub prefix: Option<String>,
    /// Those that were retired then, too.
    pub include_retired: bool,
}

/// One page of agents as of a moment, by id.
#[derive(Clone, Debug)]
pub struct PastAgents {
    /// The agents.
    pub agents: Vec<PastAgent>,
    /// How many there are on all pages.
    pub total: u64,
    /// True where more follow.
    pub more: bool,
    /// Who watched.
    pub watch: Watch,
}

/// How many agents there were at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct PastSummary {
    /// Agents that were known then and not retired: `online` + `offline` + `error`, and also
    /// `connected` + `disconnected` + `unknown`.
    pub total: i64,
    /// Status online.
    pub online: i64,
    /// Status offline.
    pub offline: i64,
    /// Status error.
    pub error: i64,
    /// Status retired, as far as they are still on record.
    pub retired: i64,
    /// Proven to have been connected.
    pub connected: i64,
    /// Known not to have been connected.
    pub disconnected: i64,
    /// Of whom nobody knows.
    pub unknown: i64,
}

/// The most connections, ends or changes of status of which the counts of a fleet are told.
pub const MOST_ROWS: u32 = 500_000;

/// Everything that decides the counts of a fleet over a span.
#[derive(Clone, Debug)]
pub struct FleetPast {
    /// Every agent on record: its status at the beginning, none where it was not known yet.
    pub agents: Vec<(Uuid, Option<Status>)>,
    /// Those that began before the span and reach into it, and all that began in it, in the order of time.
    pub stays: Vec<(Uuid, Stay)>,
    /// The changes of status after the beginning, in the order of time: whose, when, to which.
    pub changes: Vec<(Uuid, Moment, Status)>,
    /// The moments in the span at which connections ended.
    pub ends: Vec<Moment>,
    /// Who watched.
    pub watch: Watch,
}

/// A row of [`select_past`]: the total, and an agent with its stay, where there is one.
#[derive(FromRow)]
struct PastRow {
    total: i64,
    agent: Option<Uuid>,
    status: Option<String>,
    since: Option<Moment>,
    id: Option<i64>,
    connected_at: Option<Moment>,
    disconnected_at: Option<Moment>,
    disconnected_by: Option<Moment>,
    reason: Option<String>,
    transport: Option<String>,
    confirmed_until: Option<Moment>,
}

fn known<T>(label: &str, read: impl Fn(&str) -> Option<T>) -> Result<T, StoreError> {
    read(label).ok_or_else(|| StoreError::Corrupt(format!("unknown word {label:?}")))
}

impl PastRow {
    fn agent(self) -> Result<Option<PastAgent>, StoreError> {
        let (Some(agent), Some(status)) = (self.agent, self.status) else { return Ok(None) };
        let stay = match (self.id, self.connected_at, self.transport) {
            (Some(id), Some(connected_at), Some(transport)) => Some(Stay {
                id,
                connected_at,
                disconnected_at: self.disconnected_at,
                disconnected_by: self.disconnected_by,
                reason: self.reason,
                transport: known(&transport, Transport::from_label)?,
                confirmed_until: self.confirmed_until,
            }),
            _ => None,
        };
        let status = known(&status, Status::from_label)?;
        Ok(Some(PastAgent { id: agent.into(), status, since: self.since, stay }))
    }
}

/// A row of [`select_stays_of_all`].
#[derive(FromRow)]
struct StayOfAgent {
    agent: Uuid,
    #[sqlx(flatten)]
    stay: Stay,
}

#[async_trait]
impl<D> PastStore for SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> Stay: FromRow<'r, D::Row>,
    for<'r> StayOfAgent: FromRow<'r, D::Row>,
    for<'r> PastRow: FromRow<'r, D::Row>,
    for<'r> ConnectionRow: FromRow<'r, D::Row>,
    for<'r> (Moment,): FromRow<'r, D::Row>,
    for<'r> (Uuid, String): FromRow<'r, D::Row>,
    for<'r> (String, String, i64): FromRow<'r, D::Row>,
    for<'r> (Uuid, Moment, String): FromRow<'r, D::Row>,
    for<'r> (Uuid, Moment, Moment, bool): FromRow<'r, D::Row>,
    usize: sqlx::ColumnIndex<D::Row>,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> bool: Encode<'q, D> + Type<D>,
    for<'q> i64: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    async fn watch(&self, observer: Observer) -> Result<Watch, StoreError> {
        bounded(async {
            let mut tx = self.begin_reading().await?;
            Self::read_watch(&mut tx, observer).await
        })
        .await
    }

    async fn list_stays(
        &self,
        agent: InstanceUid,
        span: Span,
        after: Option<StayPlace>,
        limit: u32,
        observer: Observer,
    ) -> Result<Stays, StoreError> {
        bounded(async {
            let mut tx = self.begin_reading().await?;
            let mut stays: Vec<Stay> = Vec::new();
            if after.is_none() {
                let mut query = QueryBuilder::new("");
                select_stay_at(&mut query, agent, span.from);
                let first = query.build_query_as().fetch_optional(&mut *tx).await.map_err(failure::<D>)?;
                stays.extend(first);
            }
            let mut query = QueryBuilder::new("");
            select_further_stays(&mut query, agent, span, after, limit);
            let further: Vec<Stay> =
                query.build_query_as().fetch_all(&mut *tx).await.map_err(failure::<D>)?;
            let more = further.len() >= usize::try_from(limit).unwrap_or(usize::MAX);
            stays.extend(further);
            let watch = Self::read_watch(&mut tx, observer).await?;
            Ok(Stays { stays, more, watch })
        })
        .await
    }

    async fn list_agents_as_of(
        &self,
        filter: &PastFilter,
        at: Moment,
        page: PageRequest<InstanceUid>,
        observer: Observer,
    ) -> Result<PastAgents, StoreError> {
        bounded(async {
            let mut tx = self.begin_reading().await?;
            let watch = Self::read_watch(&mut tx, observer).await?;
            let mut query = QueryBuilder::new("");
            let further = PageRequest { limit: page.limit + 1, ..page };
            select_past(&mut query, filter, at, watch.at(at), further);
            let rows: Vec<PastRow> =
                query.build_query_as().fetch_all(&mut *tx).await.map_err(failure::<D>)?;
            let total = rows.first().map_or(0, |row| u64::try_from(row.total).unwrap_or_default());
            let agents = rows.into_iter().map(PastRow::agent).collect::<Result<Vec<_>, _>>()?;
            let (agents, more) = cut(agents.into_iter().flatten().collect(), page.limit);
            Ok(PastAgents { agents, total, more, watch })
        })
        .await
    }

    async fn summarize_as_of(
        &self,
        at: Moment,
        observer: Observer,
    ) -> Result<(PastSummary, Watch), StoreError> {
        bounded(async {
            let mut tx = self.begin_reading().await?;
            let watch = Self::read_watch(&mut tx, observer).await?;
            let mut query = QueryBuilder::new("");
            count_past(&mut query, at, watch.at(at));
            let counts: Vec<(String, String, i64)> =
                query.build_query_as().fetch_all(&mut *tx).await.map_err(failure::<D>)?;
            let mut summary = PastSummary::default();
            for (status, state, count) in counts {
                // Who was not known yet has no status.
                let Some(status) = Status::from_label(&status) else { continue };
                summary.add(status, &state, count);
            }
            Ok((summary, watch))
        })
        .await
    }

    async fn read_fleet(&self, span: Span, observer: Observer) -> Result<Option<FleetPast>, StoreError> {
        bounded(async {
            let mut tx = self.begin_reading().await?;
            let mut query = QueryBuilder::new("");
            select_everybody(&mut query, span.from);
            let agents: Vec<(Uuid, String)> =
                query.build_query_as().fetch_all(&mut *tx).await.map_err(failure::<D>)?;
            // Who was not known yet has no status.
            let agents = agents.into_iter().map(|(id, word)| (id, Status::from_label(&word))).collect();
            let most = usize::try_from(MOST_ROWS).unwrap_or(usize::MAX);
            let mut stays: Vec<StayOfAgent> = Vec::new();
            for begun in [false, true] {
                let mut query = QueryBuilder::new("");
                select_stays_of_all(&mut query, span, begun, MOST_ROWS + 1);
                stays.extend(
                    query.build_query_as::<StayOfAgent>().fetch_all(&mut *tx).await.map_err(failure::<D>)?,
                );
            }
            let mut query = QueryBuilder::new("");
            select_changes(&mut query, span, MOST_ROWS + 1);
            let changes: Vec<(Uuid, Moment, String)> =
                query.build_query_as().fetch_all(&mut *tx).await.map_err(failure::<D>)?;
            let mut query = QueryBuilder::new("");
            select_ends(&mut query, span, MOST_ROWS + 1);
            let ends: Vec<(Moment,)> =
                query.build_query_as().fetch_all(&mut *tx).await.map_err(failure::<D>)?;
            if stays.len() > most || changes.len() > most || ends.len() > most {
                return Ok(None);
            }
            let stays = stays.into_iter().map(|row| (row.agent, row.stay)).collect();
            let changes: Result<Vec<_>, StoreError> = changes
                .into_iter()
                .map(|(agent, at, to)| Ok((agent, at, known(&to, Status::from_label)?)))
                .collect();
            let ends = ends.into_iter().map(|(at,)| at).collect();
            let watch = Self::read_watch(&mut tx, observer).await?;
            Ok(Some(FleetPast { agents, stays, changes: changes?, ends, watch }))
        })
        .await
    }

    async fn next_connections(
        &self,
        agent: InstanceUid,
        filter: HistoryFilter,
        page: PageRequest<i64>,
    ) -> Result<Vec<ConnectionRow>, StoreError> {
        let mut query = QueryBuilder::new("");
        select_connections(&mut query, agent, filter, page);
        bounded(async { query.build_query_as().fetch_all(&self.readers).await.map_err(failure::<D>) }).await
    }

    async fn next_connections_of_all(
        &self,
        span: Span,
        after: Option<StayPlace>,
        limit: u32,
    ) -> Result<Vec<ConnectionRow>, StoreError> {
        bounded(async {
            let mut rows: Vec<ConnectionRow> = Vec::new();
            // Those that began before the span come first.
            for begun in [false, true] {
                let left = limit.saturating_sub(u32::try_from(rows.len()).unwrap_or(u32::MAX));
                let passed = !begun && after.is_some_and(|(began, _)| began > span.from);
                if left == 0 || passed {
                    continue;
                }
                let mut query = QueryBuilder::new("");
                select_connections_of_all(&mut query, span, begun, after, left);
                let found: Vec<ConnectionRow> =
                    query.build_query_as().fetch_all(&self.readers).await.map_err(failure::<D>)?;
                rows.extend(found);
            }
            Ok(rows)
        })
        .await
    }
}

impl PastSummary {
    fn add(&mut self, status: Status, state: &str, count: i64) {
        match status {
            Status::Retired => {
                self.retired += count;
                return;
            }
            Status::Online => self.online += count,
            Status::Offline => self.offline += count,
            Status::Error => self.error += count,
        }
        self.total += count;
        match state {
            statements::UNKNOWN => self.unknown += count,
            statements::DISCONNECTED => self.disconnected += count,
            _ => self.connected += count,
        }
    }
}

impl<D> SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> (Moment,): FromRow<'r, D::Row>,
    for<'r> (Uuid, Moment, Moment, bool): FromRow<'r, D::Row>,
{
    /// Reads who watched; in the transaction that reads rows, so that neither knows more than the other.
    async fn read_watch(tx: &mut Transaction<'_, D>, observer: Observer) -> Result<Watch, StoreError> {
        let horizon: Option<(Moment,)> = sqlx::query_as("SELECT forgotten_before FROM history_horizon")
            .fetch_optional(&mut **tx)
            .await
            .map_err(failure::<D>)?;
        let nodes: Vec<(Uuid, Moment, Moment, bool)> =
            sqlx::query_as("SELECT id, started_at, renewed_at, ended_at IS NULL FROM nodes")
                .fetch_all(&mut **tx)
                .await
                .map_err(failure::<D>)?;
        let lives = nodes
            .into_iter()
            .map(|(id, from, renewed_at, running)| (from, observer.life_of(id, renewed_at, running)));
        Ok(Watch::new(horizon.map(|(before,)| before), lives))
    }
}

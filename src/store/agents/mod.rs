//! Agents: reading their records and lists, their signs of life, and the verdicts that time brings.

mod statements;

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use serde::Serialize;
use serde_json::Value;
use sqlx::{ColumnIndex, Decode, Encode, Executor, FromRow, IntoArguments, QueryBuilder, Type};
use utoipa::ToSchema;
use uuid::Uuid;

use self::statements::{DETAIL, JOINED, ROW};
pub(super) use self::statements::{NEXT_OVERDUE, count_agents, from_matching, select_agents};
use super::dialect::{Column, Dialect, SqlStore, batch, bounded, failure, rows, sql};
use super::status_log::{Transition, log_row};
use super::write::stored_number;
use super::{AgentStore, Page, PageRequest, Status, StatusChange, StoreError, Transport};
use crate::agent::InstanceUid;
use crate::agent::document::Document;
use crate::clock::Moment;
use crate::config::Ephemeral;

/// The short row of an agent, as lists show it.
#[derive(Clone, Debug, PartialEq, FromRow)]
pub struct AgentRow {
    /// The instance uid.
    #[sqlx(try_from = "Uuid")]
    pub id: InstanceUid,
    /// `service.name`.
    pub name: Option<String>,
    /// `host.name`.
    pub host: Option<String>,
    /// The verdict.
    #[sqlx(try_from = "String")]
    pub status: Status,
    /// Since when.
    pub status_since: Moment,
    /// When a pending verdict is due.
    pub offline_at: Option<Moment>,
    /// The open connection.
    pub connection_id: Option<i64>,
    /// How the open connection's reports travel.
    pub transport: Option<String>,
    /// Peer of the open connection.
    pub remote_addr: Option<String>,
    /// Whether the agent says it is healthy; none until it says so.
    pub healthy: Option<bool>,
    /// The groups it says it belongs to, a list of texts.
    #[sqlx(json)]
    pub groups: Document,
    /// Integer attribute `clients_count`.
    pub clients_count: i32,
    /// Hex hash of the last remote config it reported as applied.
    pub sync_revision: Option<String>,
    /// True where it is retired, not an error, when it stays away.
    pub ephemeral: bool,
    /// The last sign of life on record.
    pub last_seen_at: Option<Moment>,
    /// For a poller whose pace is on record: how long it may be silent, in milliseconds.
    pub poll_silence_ms: Option<i64>,
    /// The last opening of a connection.
    pub last_connected_at: Option<Moment>,
    /// The last end of a connection.
    pub last_disconnected_at: Option<Moment>,
    /// Why the last connection ended.
    pub disconnect_reason: Option<String>,
    /// The temporary uid it had before.
    pub previous_id: Option<Uuid>,
    /// When it was retired.
    pub retired_at: Option<Moment>,
    /// When the record was made.
    pub created_at: Moment,
    /// When the record last changed.
    pub updated_at: Moment,
}

/// Everything known of an agent.
#[derive(Clone, Debug, PartialEq, FromRow)]
pub struct AgentDetail {
    /// The short row.
    #[sqlx(flatten)]
    pub row: AgentRow,
    /// The mask, as its 64 bits.
    pub capabilities: i64,
    /// `{identifying_attributes, non_identifying_attributes}`.
    #[sqlx(json(nullable))]
    pub description: Option<Value>,
    /// The health tree.
    #[sqlx(json(nullable))]
    pub health: Option<Value>,
    /// File name to `{body, content_type}`.
    #[sqlx(json(nullable))]
    pub effective_config: Option<Value>,
    /// The outcome of the last remote config.
    #[sqlx(json(nullable))]
    pub remote_config_status: Option<Value>,
    /// All packages with their states.
    #[sqlx(json(nullable))]
    pub package_statuses: Option<Value>,
    /// The list of custom capabilities.
    #[sqlx(json(nullable))]
    pub custom_capabilities: Option<Value>,
    /// Hash of the component inventory, hex.
    pub components_hash: Option<String>,
    /// The inventory with that hash, if any agent sent it.
    #[sqlx(json(nullable))]
    pub components: Option<Value>,
    /// The outcome of the last connection settings.
    #[sqlx(json(nullable))]
    pub connection_settings_status: Option<Value>,
    /// The number that the stored state stands for, as its 64 bits.
    pub sequence_num: Option<i64>,
}

/// Which agents; every condition given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgentFilter {
    /// This very one.
    pub id: Option<InstanceUid>,
    /// With one of these; none = any but `retired`.
    pub statuses: Vec<Status>,
    /// With, or without, an open connection.
    pub connected: Option<bool>,
    /// That say they are healthy, or not.
    pub healthy: Option<bool>,
    /// Whose open connection uses this transport.
    pub transport: Option<Transport>,
    /// With these attributes, compared as text.
    pub attributes: BTreeMap<String, String>,
    /// Whose id, name or host begins with this, in any case.
    pub prefix: Option<String>,
    /// Not seen since.
    pub unseen_since: Option<Moment>,
    /// Retired ones too.
    pub include_retired: bool,
}

impl AgentFilter {
    /// True where it leaves out anybody but retired agents.
    #[must_use]
    pub fn narrows(&self) -> bool {
        let widest = Self { include_retired: self.include_retired, ..Self::default() };
        Self { prefix: self.search().map(str::to_owned), ..self.clone() } != widest
    }

    /// What is searched for; none where the prefix is empty, as every id begins with nothing.
    fn search(&self) -> Option<&str> {
        self.prefix.as_deref().filter(|prefix| !prefix.is_empty())
    }
}

/// How many agents there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct AgentSummary {
    /// Agents that are not retired: `online` + `offline` + `error`.
    pub total: i64,
    /// Status online.
    pub online: i64,
    /// Status offline.
    pub offline: i64,
    /// Status error.
    pub error: i64,
    /// Status retired.
    pub retired: i64,
    /// With an open connection.
    pub connected: i64,
    /// That say they are healthy.
    pub healthy: i64,
    /// That say they are not.
    pub unhealthy: i64,
}

/// A sign of life, to be stored with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// Whose.
    pub agent: InstanceUid,
    /// The fence.
    pub connection_id: i64,
    /// When.
    pub at: Moment,
    /// The number that the stored state stands for.
    pub sequence_num: Option<u64>,
    /// For a poller whose pace is known: how long it may be silent.
    pub poll_silence: Option<Duration>,
}

/// The most agents whose status one transaction changes.
const VERDICTS_PER_COMMIT: i64 = 1_000;

#[async_trait]
impl<D> AgentStore for SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> AgentRow: FromRow<'r, D::Row>,
    for<'r> AgentDetail: FromRow<'r, D::Row>,
    for<'r> Transition: FromRow<'r, D::Row>,
    for<'r> (i64, i64, i64, i64, i64, i64, i64): FromRow<'r, D::Row>,
    for<'r> (Uuid, Option<String>, Option<i64>): FromRow<'r, D::Row>,
    for<'r> (Option<Moment>,): FromRow<'r, D::Row>,
    usize: ColumnIndex<D::Row>,
    for<'q> String: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> bool: Encode<'q, D> + Type<D>,
    for<'q> i64: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Decode<'q, D> + Type<D>,
{
    async fn get_agent(&self, agent: InstanceUid) -> Result<Option<AgentDetail>, StoreError> {
        let mut query = QueryBuilder::<D>::new("SELECT ");
        query.push(ROW).push(DETAIL).push(JOINED).push(" WHERE a.id = ").push_bind(agent.as_uuid());
        bounded(async { query.build_query_as().fetch_optional(&self.readers).await.map_err(failure::<D>) })
            .await
    }

    async fn get_agent_row(&self, agent: InstanceUid) -> Result<Option<AgentRow>, StoreError> {
        let mut query = QueryBuilder::<D>::new("SELECT ");
        query.push(ROW).push(JOINED).push(" WHERE a.id = ").push_bind(agent.as_uuid());
        bounded(async { query.build_query_as().fetch_optional(&self.readers).await.map_err(failure::<D>) })
            .await
    }

    async fn list_agents(
        &self,
        filter: &AgentFilter,
        page: PageRequest<InstanceUid>,
    ) -> Result<Page<AgentRow>, StoreError> {
        let mut count = QueryBuilder::<D>::new("");
        count_agents(&mut count, filter);
        let mut query = QueryBuilder::<D>::new("");
        select_agents(&mut query, filter, PageRequest { limit: page.limit + 1, ..page });
        bounded(self.counted_page(count, query, page.limit)).await
    }

    async fn next_agents(
        &self,
        filter: &AgentFilter,
        page: PageRequest<InstanceUid>,
    ) -> Result<Vec<AgentRow>, StoreError> {
        let mut query = QueryBuilder::<D>::new("");
        select_agents(&mut query, filter, page);
        bounded(async { query.build_query_as().fetch_all(&self.readers).await.map_err(failure::<D>) }).await
    }

    async fn summarize_agents(&self) -> Result<AgentSummary, StoreError> {
        let query = sqlx::query_as(
            "SELECT count(CASE WHEN status = 'online' THEN 1 END), count(CASE WHEN status = 'offline' THEN 1 END),
                    count(CASE WHEN status = 'error' THEN 1 END), count(CASE WHEN status = 'retired' THEN 1 END),
                    count(connection_id), count(CASE WHEN status <> 'retired' AND healthy THEN 1 END),
                    count(CASE WHEN status <> 'retired' AND NOT healthy THEN 1 END)
             FROM agents",
        );
        let (online, offline, error, retired, connected, healthy, unhealthy) =
            bounded(async { query.fetch_one(&self.readers).await.map_err(failure::<D>) }).await?;
        let total = online + offline + error;
        Ok(AgentSummary { total, online, offline, error, retired, connected, healthy, unhealthy })
    }

    async fn list_status_history(
        &self,
        agent: InstanceUid,
        page: PageRequest<i64>,
    ) -> Result<Page<Transition>, StoreError> {
        bounded(self.transitions(agent, page)).await
    }

    async fn update_last_seen(&self, sightings: &[Sighting]) -> Result<u64, StoreError> {
        let columns = [
            ("id", Column::Uuid),
            ("connection_id", Column::Integer),
            ("at", Column::Moment),
            ("number", Column::Integer),
            ("silence", Column::Integer),
        ];
        // A save of the same moment has told the number already; the pace it did not tell.
        // A row that somebody else is writing is skipped: what they write is as fresh, and nobody waits in a circle. The
        // batch is named once only: a database that takes it for short would join it with itself, row by row.
        let rows = rows::<D>(&columns);
        let free = D::SKIP_LOCKED.map_or_else(
            || format!("WITH free AS {rows}"),
            |skip_locked| {
                format!(
                    "WITH free AS (SELECT r.* FROM {rows} r JOIN agent_liveness l ON l.agent_id = r.id {skip_locked})"
                )
            },
        );
        let text = format!(
            "{free}
             UPDATE agent_liveness AS l SET last_seen_at = r.at, poll_silence_ms = r.silence,
                 sequence_num = CASE WHEN l.last_seen_at < r.at THEN r.number ELSE coalesce(r.number, l.sequence_num) END
             FROM free r JOIN agents a {} ON a.id = r.id AND a.connection_id = r.connection_id
             WHERE l.agent_id = r.id AND l.connection_id = r.connection_id AND l.last_seen_at <= r.at",
            D::CONNECTED
        );
        let row = |s: &Sighting| {
            let silence = s.poll_silence.map(|silence| silence.as_millis());
            (s.agent, s.connection_id, s.at.as_micros(), stored_number(s.sequence_num), silence)
        };
        let values: Vec<_> = sightings.iter().map(row).collect();
        bounded(async {
            let done = sqlx::query(sql(text))
                .bind(batch(&values))
                .execute(&self.writers)
                .await
                .map_err(failure::<D>)?;
            Ok(D::affected(&done))
        })
        .await
    }

    async fn update_overdue_status(&self, now: Moment) -> Result<Vec<StatusChange>, StoreError> {
        let text = format!(
            "UPDATE agents SET status = 'offline', status_since = $1, stale_from = $1, offline_at = NULL,
                 updated_at = {}(updated_at, $1)
             WHERE id IN (SELECT a.id FROM agents a WHERE a.offline_at <= $1 AND a.connection_id IS NULL
                          AND a.status = 'online' ORDER BY a.id LIMIT {VERDICTS_PER_COMMIT} {})
             RETURNING id, disconnect_reason,
                 (SELECT max(c.id) FROM agent_connection_history c WHERE c.agent_id = agents.id)",
            D::GREATEST,
            D::LOCK_AGENTS
        );
        bounded(self.verdicts(text, now, now, Status::Online)).await
    }

    async fn next_overdue(&self) -> Result<Option<Moment>, StoreError> {
        let query = sqlx::query_as(NEXT_OVERDUE);
        let (next,): (Option<Moment>,) =
            bounded(async { query.fetch_one(&self.readers).await.map_err(failure::<D>) }).await?;
        Ok(next)
    }

    async fn retire_stale_agents(
        &self,
        now: Moment,
        stale_after: Duration,
        ephemeral: Ephemeral,
    ) -> Result<Vec<StatusChange>, StoreError> {
        let is_ephemeral = match ephemeral {
            Ephemeral::Marked => "ephemeral",
            Ephemeral::All => "true",
            Ephemeral::None => "false",
        };
        let text = format!(
            "UPDATE agents SET status = CASE WHEN {is_ephemeral} THEN 'retired' ELSE 'error' END, status_since = $2,
                 retired_at = CASE WHEN {is_ephemeral} THEN $2 END, stale_from = NULL,
                 updated_at = {}(updated_at, $2)
             WHERE id IN (SELECT a.id FROM agents a WHERE a.stale_from <= $1 AND a.status = 'offline'
                          ORDER BY a.id LIMIT {VERDICTS_PER_COMMIT} {})
             RETURNING id, status, connection_id",
            D::GREATEST,
            D::LOCK_AGENTS
        );
        bounded(self.verdicts(text, now.before(stale_after), now, Status::Offline)).await
    }

    async fn assign_uid(
        &self,
        temporary: InstanceUid,
        candidate: InstanceUid,
        at: Moment,
    ) -> Result<InstanceUid, StoreError> {
        bounded(async {
            let mut tx = self.begin().await?;
            let lock = format!("SELECT a.id FROM agents a WHERE a.id = $1 {}", D::LOCK_AGENTS);
            sqlx::query(sql(lock)).bind(temporary.as_uuid()).execute(&mut *tx).await.map_err(failure::<D>)?;
            let unused = sqlx::query_scalar::<_, Uuid>(
                "SELECT id FROM agents WHERE previous_id = $1 AND last_connected_at IS NULL ORDER BY id LIMIT 1",
            )
            .bind(temporary.as_uuid())
            .fetch_optional(&mut *tx)
            .await
            .map_err(failure::<D>)?;
            if let Some(unused) = unused {
                return Ok(unused.into());
            }
            let columns = [("id", Column::Uuid), ("previous", Column::Uuid), ("at", Column::Moment)];
            let text = format!(
                "INSERT INTO agents (id, status, status_since, retired_at, previous_id, created_at, updated_at)
                 SELECT r.id, 'retired', r.at, r.at, r.previous, r.at, r.at FROM {} r",
                rows::<D>(&columns)
            );
            Self::execute(&mut tx, text, &[(candidate, temporary, at.as_micros())]).await?;
            tx.commit().await.map_err(failure::<D>)?;
            Ok(candidate)
        })
        .await
    }
}

impl<D> SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> (Uuid, Option<String>, Option<i64>): FromRow<'r, D::Row>,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    /// Changes the status of a set of agents by one statement and logs each change; repeats until none is left.
    ///
    /// The statement answers id, reason (a status's word where the new status differs by agent), connection.
    async fn verdicts(
        &self,
        text: String,
        due: Moment,
        now: Moment,
        from: Status,
    ) -> Result<Vec<StatusChange>, StoreError> {
        let mut changes = Vec::new();
        loop {
            let mut tx = self.begin().await?;
            let mut query = sqlx::query_as(sql(text.clone())).bind(due);
            if from == Status::Offline {
                query = query.bind(now);
            }
            let found: Vec<(Uuid, Option<String>, Option<i64>)> =
                query.fetch_all(&mut *tx).await.map_err(failure::<D>)?;
            let batch: Vec<StatusChange> = found
                .into_iter()
                .map(|(id, word, connection_id)| {
                    let word = word.unwrap_or_default();
                    let stale = from == Status::Offline;
                    StatusChange {
                        agent: id.into(),
                        from: Some(from),
                        to: if stale {
                            Status::from_label(&word).unwrap_or(Status::Error)
                        } else {
                            Status::Offline
                        },
                        reason: if stale { "stale".to_owned() } else { word },
                        connection_id,
                    }
                })
                .collect();
            let log = batch.iter().map(|change| log_row(change, now, None)).collect();
            Self::write_log(&mut tx, log).await?;
            tx.commit().await.map_err(failure::<D>)?;
            let last = i64::try_from(batch.len()).unwrap_or(i64::MAX) < VERDICTS_PER_COMMIT;
            changes.extend(batch);
            if last {
                return Ok(changes);
            }
        }
    }
}

//! Reading the connection history: rows as they are shown, page by page, newest first.

use serde::Serialize;
use sqlx::{Decode, Encode, Executor, FromRow, IntoArguments, QueryBuilder, Type};
use utoipa::ToSchema;
use uuid::Uuid;

use super::dialect::{Dialect, SqlStore, failure, push_rows_before};
use super::{Page, PageRequest, StoreError, Transport};
use crate::agent::InstanceUid;
use crate::clock::Moment;

/// One connection of an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema, FromRow)]
pub struct ConnectionRow {
    /// Unique and growing; also the fence of all writes for this connection.
    pub id: i64,
    /// The instance uid.
    #[sqlx(try_from = "Uuid")]
    #[schema(value_type = Uuid)]
    pub agent_id: InstanceUid,
    /// The first report of the connection.
    #[schema(value_type = String, format = DateTime)]
    pub connected_at: Moment,
    /// The end as the peer showed it, else the last proof that it was connected; null while open.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub disconnected_at: Option<Moment>,
    /// When an end that was not seen was known; between the two the agent's whereabouts are unknown.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub disconnected_by: Option<Moment>,
    /// Whole seconds from `connected_at` to `disconnected_at`.
    pub duration_seconds: Option<i32>,
    /// Why it ended.
    pub disconnect_reason: Option<String>,
    /// Peer address and port.
    pub remote_addr: Option<String>,
    /// How its reports travel.
    #[sqlx(try_from = "String")]
    pub transport: Transport,
    /// The process that held it; null for plain HTTP.
    pub node_id: Option<Uuid>,
    /// Number of the opening within its node.
    pub node_seq: i64,
    /// When the row was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Moment,
    /// For an open connection: the last sign of life on record.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub confirmed_until: Option<Moment>,
}

/// Which connections of an agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HistoryFilter {
    /// Connections that were, or may have been, open at this moment or later.
    pub from: Option<Moment>,
    /// Connections that began before this moment.
    pub to: Option<Moment>,
}

/// An open connection over plain HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct PolledConnection {
    /// Whose connection.
    #[sqlx(try_from = "Uuid")]
    pub agent_id: InstanceUid,
    /// Its id.
    pub id: i64,
    /// When it began.
    pub connected_at: Moment,
    /// The last poll on record.
    pub last_seen_at: Moment,
    /// The number that the stored state stands for, as its 64 bits.
    pub sequence_num: Option<i64>,
    /// How long it may be silent, in milliseconds; none where its pace is not on record.
    pub poll_silence_ms: Option<i64>,
}

pub(super) const COLUMNS: &str =
    "SELECT c.id, c.agent_id, c.connected_at, c.disconnected_at, c.disconnected_by, c.duration_seconds,
    c.disconnect_reason, c.remote_addr, c.transport, c.node_id, c.node_seq, c.created_at,
    CASE WHEN c.disconnected_at IS NULL THEN l.last_seen_at END AS confirmed_until";

pub(super) const LIVENESS: &str = " LEFT JOIN agent_liveness l ON l.agent_id = c.agent_id";

impl<D> SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> ConnectionRow: FromRow<'r, D::Row>,
    for<'r> PolledConnection: FromRow<'r, D::Row>,
    usize: sqlx::ColumnIndex<D::Row>,
    for<'q> i64: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    pub(super) async fn active_connection(
        &self,
        agent: InstanceUid,
    ) -> Result<Option<ConnectionRow>, StoreError> {
        let mut query = QueryBuilder::new(COLUMNS);
        query.push(" FROM agent_connection_history c").push(LIVENESS);
        query.push(" WHERE c.disconnected_at IS NULL AND c.agent_id = ").push_bind(agent.as_uuid());
        query.build_query_as().fetch_optional(&self.readers).await.map_err(failure::<D>)
    }

    pub(super) async fn connection_history(
        &self,
        agent: InstanceUid,
        filter: HistoryFilter,
        page: PageRequest<i64>,
    ) -> Result<Page<ConnectionRow>, StoreError> {
        let mut count = QueryBuilder::new("");
        count_connections(&mut count, agent, filter);
        let mut query = QueryBuilder::new("");
        let further = PageRequest { limit: page.limit + 1, ..page };
        select_connections(&mut query, agent, filter, further);
        self.counted_page(count, query, page.limit).await
    }

    pub(super) async fn polled_connections(&self) -> Result<Vec<PolledConnection>, StoreError> {
        sqlx::query_as(
            "SELECT c.agent_id, c.id, c.connected_at, l.last_seen_at, l.sequence_num, l.poll_silence_ms
             FROM agent_connection_history c JOIN agent_liveness l ON l.agent_id = c.agent_id
             WHERE c.disconnected_at IS NULL AND c.transport = 'http' ORDER BY c.id",
        )
        .fetch_all(&self.readers)
        .await
        .map_err(failure::<D>)
    }
}

/// Adds the query for the number of an agent's connections.
pub(super) fn count_connections<D>(query: &mut QueryBuilder<D>, agent: InstanceUid, filter: HistoryFilter)
where
    D: Dialect,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query
        .push("SELECT count(*) FROM agent_connection_history c WHERE c.agent_id = ")
        .push_bind(agent.as_uuid());
    narrow(query, filter);
}

/// Adds the query for the next of an agent's connections, newest first.
pub(super) fn select_connections<D>(
    query: &mut QueryBuilder<D>,
    agent: InstanceUid,
    filter: HistoryFilter,
    page: PageRequest<i64>,
) where
    D: Dialect,
    for<'q> i64: Encode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    // First which rows the page shows, from the index alone, then those rows.
    query.push(COLUMNS).push(" FROM (SELECT c.id FROM agent_connection_history c WHERE ");
    push_rows_before(query, agent.as_uuid(), page.after);
    narrow(query, filter);
    query.push(" ORDER BY c.agent_id DESC, c.id DESC LIMIT ").push_bind(i64::from(page.limit));
    query.push(") page JOIN agent_connection_history c ON c.id = page.id").push(LIVENESS);
    query.push(" ORDER BY c.id DESC");
}

/// Adds the conditions of `filter`.
pub(super) fn narrow<D>(query: &mut QueryBuilder<D>, filter: HistoryFilter)
where
    D: Dialect,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    if let Some(from) = filter.from {
        query
            .push(" AND (c.disconnected_at IS NULL OR coalesce(c.disconnected_by, c.disconnected_at) >= ")
            .push_bind(from)
            .push(")");
    }
    if let Some(to) = filter.to {
        query.push(" AND c.connected_at < ").push_bind(to);
    }
}

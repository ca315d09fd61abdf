//! The log of every change of an agent's status, written in the transaction that makes the change.

use serde::Serialize;
use serde_json::{Value, json};
use sqlx::{ColumnIndex, Decode, Encode, Executor, FromRow, IntoArguments, QueryBuilder, Transaction, Type};
use utoipa::ToSchema;
use uuid::Uuid;

use super::dialect::{Column, Dialect, SqlStore, push_rows_before, rows};
use super::{Page, PageRequest, Status, StatusChange, StoreError};
use crate::agent::InstanceUid;
use crate::clock::Moment;

/// One change of an agent's status on record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema, FromRow)]
pub struct Transition {
    /// Unique and growing.
    #[serde(skip)]
    pub id: i64,
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: Moment,
    /// The status before; null for the first report of an agent.
    pub from: Option<String>,
    /// The status from then on.
    pub to: String,
    /// `first_report`, `returned`, `stale`, `deleted`, or why the connection ended.
    pub reason: String,
    /// The connection concerned.
    pub connection_id: Option<i64>,
    /// The process that wrote it; null where any node would have.
    pub node_id: Option<Uuid>,
}

/// One row of the status log.
pub(super) fn log_row(change: &StatusChange, at: Moment, node: Option<Uuid>) -> Value {
    json!([
        change.agent,
        at.as_micros(),
        change.from.map(Status::label),
        change.to.label(),
        change.reason,
        change.connection_id,
        node
    ])
}

impl<D> SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'q> String: Encode<'q, D> + Type<D>,
{
    /// Writes changes of status into the log.
    pub(super) async fn write_log(
        tx: &mut Transaction<'_, D>,
        changes: Vec<Value>,
    ) -> Result<(), StoreError> {
        let columns = [
            ("agent_id", Column::Uuid),
            ("at", Column::Moment),
            ("from_status", Column::Text),
            ("to_status", Column::Text),
            ("reason", Column::Text),
            ("connection_id", Column::Integer),
            ("node_id", Column::Uuid),
        ];
        let names = columns.map(|(name, _)| name).join(", ");
        let text =
            format!("INSERT INTO agent_status_log ({names}) SELECT {names} FROM {} r", rows::<D>(&columns));
        Self::execute(tx, text, &changes).await
    }
}

impl<D> SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> Transition: FromRow<'r, D::Row>,
    usize: ColumnIndex<D::Row>,
    for<'q> i64: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
{
    pub(super) async fn transitions(
        &self,
        agent: InstanceUid,
        page: PageRequest<i64>,
    ) -> Result<Page<Transition>, StoreError> {
        let mut count = QueryBuilder::new("");
        count_transitions(&mut count, agent);
        let mut query = QueryBuilder::new("");
        select_transitions(&mut query, agent, PageRequest { limit: page.limit + 1, ..page });
        self.counted_page(count, query, page.limit).await
    }
}

/// Adds the query for the number of changes of an agent's status.
pub(super) fn count_transitions<D>(query: &mut QueryBuilder<D>, agent: InstanceUid)
where
    D: Dialect,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
{
    query.push("SELECT count(*) FROM agent_status_log WHERE agent_id = ").push_bind(agent.as_uuid());
}

/// Adds the query for the next changes of an agent's status, newest first.
pub(super) fn select_transitions<D>(query: &mut QueryBuilder<D>, agent: InstanceUid, page: PageRequest<i64>)
where
    D: Dialect,
    for<'q> i64: Encode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
{
    query.push(
        "SELECT s.id, s.at, s.from_status AS \"from\", s.to_status AS \"to\", s.reason, s.connection_id, s.node_id
         FROM (SELECT c.id FROM agent_status_log c WHERE ",
    );
    push_rows_before(query, agent.as_uuid(), page.after);
    query.push(" ORDER BY c.agent_id DESC, c.id DESC LIMIT ").push_bind(i64::from(page.limit));
    query.push(") page JOIN agent_status_log s ON s.id = page.id ORDER BY s.id DESC");
}

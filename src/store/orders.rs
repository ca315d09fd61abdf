//! What operators order: connections to close and agents to delete.
//!
//! An order names the connection that was open when it was given, so that it never reaches a newer
//! one. It is written under the lock of the agent's row and announced in the same transaction;
//! whoever holds the connection carries it out. What nobody holds is ended here, at once.

use std::collections::HashMap;

use async_trait::async_trait;
use serde_json::Value;
use sqlx::{ColumnIndex, Decode, Encode, Executor, FromRow, IntoArguments, QueryBuilder, Transaction, Type};
use uuid::Uuid;

use super::agents::from_matching;
use super::dialect::{Column, Dialect, SqlStore, batch, bounded, failure, keys, rows, sql};
use super::status_log::log_row;
use super::write::{ConnectionEnd, LockedAgent, OpenRow};
use super::{AgentFilter, OrderStore, Status, StatusChange, StoreError, Transport};
use crate::agent::InstanceUid;
use crate::clock::Moment;
use crate::close::CloseReason;

/// The most agents that one transaction deletes.
const DELETES_PER_COMMIT: usize = 1_000;

/// What became of the wish that an agent reconnects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reconnect {
    /// This connection is to end.
    Ordered(i64),
    /// There is nothing to close.
    NotConnected,
    /// Polls have no connection that could be closed.
    NotWebsocket,
}

/// An open connection that is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CloseOrder {
    /// Whose connection.
    pub agent: InstanceUid,
    /// Which connection.
    pub connection_id: i64,
    /// Why.
    pub reason: CloseReason,
}

/// Which agents are deleted, and how.
#[derive(Clone, Debug)]
pub struct Deletion {
    /// Which.
    pub filter: AgentFilter,
    /// Connected ones too: their connections end as `deleted`.
    pub force: bool,
    /// When.
    pub at: Moment,
    /// The node that does it, for the status log.
    pub node_id: Uuid,
}

/// What one batch of a deletion did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deleted {
    /// Agents that match.
    pub found: u64,
    /// Agents that are retired now, or will be once their connection has ended.
    pub deleted: u64,
    /// Agents that were left alone because they are connected.
    pub skipped_connected: u64,
    /// The connections that were ended here: why, and how long they lasted in seconds.
    pub ended: Vec<(CloseReason, i64)>,
    /// The changes of status.
    pub changes: Vec<StatusChange>,
    /// Where the next batch goes on; none after the last.
    pub next: Option<InstanceUid>,
}

#[async_trait]
impl<D> OrderStore for SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> LockedAgent: FromRow<'r, D::Row>,
    for<'r> OpenRow: FromRow<'r, D::Row>,
    for<'r> (Option<i64>, Option<String>, bool): FromRow<'r, D::Row>,
    for<'r> (Uuid, i64, String): FromRow<'r, D::Row>,
    usize: ColumnIndex<D::Row>,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> bool: Encode<'q, D> + Type<D>,
    for<'q> i64: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    async fn order_reconnect(&self, agent: InstanceUid) -> Result<Option<Reconnect>, StoreError> {
        bounded(self.reconnect(agent)).await
    }

    async fn delete_agents(
        &self,
        deletion: &Deletion,
        after: Option<InstanceUid>,
    ) -> Result<Deleted, StoreError> {
        bounded(self.delete_batch(deletion, after)).await
    }

    async fn list_close_orders(&self, node: Uuid) -> Result<Vec<CloseOrder>, StoreError> {
        let mut query = QueryBuilder::<D>::new("");
        select_close_orders(&mut query, node);
        let orders: Vec<(Uuid, i64, String)> =
            bounded(async { query.build_query_as().fetch_all(&self.readers).await.map_err(failure::<D>) })
                .await?;
        let read = |(agent, connection_id, word): (Uuid, i64, String)| {
            let reason = CloseReason::from_label(&word);
            let reason = reason
                .ok_or_else(|| StoreError::Corrupt(format!("close_reason of agent {agent}: {word}")))?;
            Ok(CloseOrder { agent: agent.into(), connection_id, reason })
        };
        orders.into_iter().map(read).collect()
    }

    async fn list_ended_connections(&self, connections: &[i64]) -> Result<Vec<i64>, StoreError> {
        let text = format!(
            "SELECT c.id FROM agent_connection_history c
             WHERE c.disconnected_at IS NOT NULL AND c.id IN (SELECT r.id FROM {} r)",
            rows::<D>(&[("id", Column::Integer)])
        );
        bounded(async {
            let query = sqlx::query_scalar(sql(text)).bind(batch(&keys(connections)));
            query.fetch_all(&self.readers).await.map_err(failure::<D>)
        })
        .await
    }
}

/// Adds the query for the orders to a node.
pub(super) fn select_close_orders<D>(query: &mut QueryBuilder<D>, node: Uuid)
where
    D: Dialect,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
{
    query.push(
        "SELECT a.id, c.id, a.close_reason FROM agents a JOIN agent_connection_history c ON c.id = a.close_connection
         WHERE a.close_connection IS NOT NULL AND c.disconnected_at IS NULL AND c.node_id = ",
    );
    query.push_bind(node);
}

/// Adds the query that locks the next agents that match, in the order of every writer.
pub(super) fn select_to_lock<D>(query: &mut QueryBuilder<D>, filter: &AgentFilter, after: Option<InstanceUid>)
where
    D: Dialect,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> bool: Encode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query.push("SELECT a.id");
    from_matching(query, filter, after);
    query.push(format!(" ORDER BY a.id LIMIT {DELETES_PER_COMMIT} {}", D::LOCK_AGENTS));
}

/// What a batch of a deletion does to whom.
#[derive(Default)]
struct Plan {
    /// Agents that are not connected: retired at once.
    retired: Vec<(InstanceUid, i64)>,
    log: Vec<Value>,
    /// Agents whose connection a living node holds: it is told.
    ordered: Vec<InstanceUid>,
    /// Connections that nobody holds: ended at once.
    ends: Vec<ConnectionEnd>,
}

impl Plan {
    fn retire(&mut self, agent: &LockedAgent, deletion: &Deletion) -> StatusChange {
        let at = deletion.at.max(agent.updated_at);
        let change = StatusChange {
            agent: agent.id,
            from: Some(agent.status),
            to: Status::Retired,
            reason: CloseReason::Deleted.label().to_owned(),
            connection_id: None,
        };
        self.retired.push((agent.id, at.as_micros()));
        self.log.push(log_row(&change, at, Some(deletion.node_id)));
        change
    }

    fn close(&mut self, agent: &LockedAgent, open: &OpenRow, deletion: &Deletion) {
        if open.transport == Transport::Websocket && !open.node_gone {
            self.ordered.push(agent.id);
            return;
        }
        let known = deletion.at.max(agent.updated_at);
        let proof = agent.last_seen_at.unwrap_or(open.connected_at).min(known);
        self.ends.push(ConnectionEnd {
            agent: agent.id,
            connection_id: open.id,
            reason: CloseReason::Deleted,
            disconnected_at: proof,
            disconnected_by: Some(known),
            last_seen_at: proof,
            sequence_num: agent.sequence_num.map(i64::cast_unsigned),
            unsaved: false,
            offline_at: None,
            unless_seen_after: None,
            node_id: deletion.node_id,
        });
    }
}

impl<D> SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> LockedAgent: FromRow<'r, D::Row>,
    for<'r> OpenRow: FromRow<'r, D::Row>,
    for<'r> (Option<i64>, Option<String>, bool): FromRow<'r, D::Row>,
    usize: ColumnIndex<D::Row>,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> bool: Encode<'q, D> + Type<D>,
    for<'q> i64: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    async fn reconnect(&self, agent: InstanceUid) -> Result<Option<Reconnect>, StoreError> {
        let mut tx = self.begin().await?;
        let lock = format!("SELECT a.id FROM agents a WHERE a.id = $1 {}", D::LOCK_AGENTS);
        sqlx::query(sql(lock)).bind(agent.as_uuid()).execute(&mut *tx).await.map_err(failure::<D>)?;
        let found: Option<(Option<i64>, Option<String>, bool)> = sqlx::query_as(
            "SELECT a.connection_id, c.transport, coalesce(a.close_connection = a.connection_id, false)
             FROM agents a LEFT JOIN agent_connection_history c ON c.id = a.connection_id WHERE a.id = $1",
        )
        .bind(agent.as_uuid())
        .fetch_optional(&mut *tx)
        .await
        .map_err(failure::<D>)?;
        let (id, ordered) = match found {
            None => return Ok(None),
            Some((None, ..)) => return Ok(Some(Reconnect::NotConnected)),
            Some((Some(_), Some(transport), _)) if transport == Transport::Http.label() => {
                return Ok(Some(Reconnect::NotWebsocket));
            }
            Some((Some(id), _, ordered)) => (id, ordered),
        };
        // An order that is on its way stands: it closes this very connection, and a delete is more than a reconnect.
        if !ordered {
            Self::order_close(&mut tx, &[agent], CloseReason::ReconnectRequested).await?;
            tx.commit().await.map_err(failure::<D>)?;
        }
        Ok(Some(Reconnect::Ordered(id)))
    }

    /// Orders that the open connections of locked agents end, and tells every node.
    async fn order_close(
        tx: &mut Transaction<'_, D>,
        agents: &[InstanceUid],
        reason: CloseReason,
    ) -> Result<(), StoreError> {
        let text = format!(
            "UPDATE agents AS a SET close_connection = a.connection_id, close_reason = '{}'
             FROM {} r WHERE a.id = r.id",
            reason.label(),
            rows::<D>(&[("id", Column::Uuid)])
        );
        Self::execute(tx, text, &keys(agents)).await?;
        Self::announce(tx).await
    }

    /// Tells every node that orders were written, once this transaction is committed.
    async fn announce(tx: &mut Transaction<'_, D>) -> Result<(), StoreError> {
        if let Some(text) = D::ANNOUNCE {
            sqlx::query(text).execute(&mut **tx).await.map_err(failure::<D>)?;
        }
        Ok(())
    }

    async fn delete_batch(
        &self,
        deletion: &Deletion,
        after: Option<InstanceUid>,
    ) -> Result<Deleted, StoreError> {
        let mut tx = self.begin().await?;
        let found = Self::lock_matching(&mut tx, deletion, after).await?;
        let agents = Self::read_agents(&mut tx, &found).await?;
        let open = Self::open_rows(&mut tx, "agent_id", &keys(found.iter().copied())).await?;
        let open: HashMap<InstanceUid, OpenRow> = open.into_iter().map(|row| (row.agent_id, row)).collect();
        let mut done = Deleted { found: found.len() as u64, ..Deleted::default() };
        done.next = found.last().copied().filter(|_| found.len() == DELETES_PER_COMMIT);
        let mut plan = Plan::default();
        for id in found {
            let Some(agent) = agents.get(&id) else { continue };
            match open.get(&id) {
                None if agent.status == Status::Retired => continue,
                None => done.changes.push(plan.retire(agent, deletion)),
                Some(_) if !deletion.force => {
                    done.skipped_connected += 1;
                    continue;
                }
                Some(open) => plan.close(agent, open, deletion),
            }
            done.deleted += 1;
        }
        Self::carry_out(&mut tx, plan, agents, &mut done).await?;
        tx.commit().await.map_err(failure::<D>)?;
        Ok(done)
    }

    /// Locks the next agents that match, in the order of every writer; a statement of its own, so that
    /// the next one sees what was committed while this one waited.
    async fn lock_matching(
        tx: &mut Transaction<'_, D>,
        deletion: &Deletion,
        after: Option<InstanceUid>,
    ) -> Result<Vec<InstanceUid>, StoreError> {
        let mut query = QueryBuilder::<D>::new("");
        select_to_lock(&mut query, &deletion.filter, after);
        let found: Vec<Uuid> = query.build_query_scalar().fetch_all(&mut **tx).await.map_err(failure::<D>)?;
        Ok(found.into_iter().map(InstanceUid::from).collect())
    }

    async fn carry_out(
        tx: &mut Transaction<'_, D>,
        plan: Plan,
        mut agents: HashMap<InstanceUid, LockedAgent>,
        done: &mut Deleted,
    ) -> Result<(), StoreError> {
        let text = format!(
            "UPDATE agents AS a SET status = 'retired', status_since = r.at, retired_at = r.at, offline_at = NULL,
                 stale_from = NULL, updated_at = r.at FROM {} r WHERE a.id = r.id",
            rows::<D>(&[("id", Column::Uuid), ("at", Column::Moment)])
        );
        Self::execute(tx, text, &plan.retired).await?;
        Self::write_log(tx, plan.log).await?;
        let ends: Vec<&ConnectionEnd> = plan.ends.iter().collect();
        for ended in Self::update_connections(tx, &ends, &mut agents).await?.into_values() {
            done.ended.extend(ended.duration_seconds.map(|seconds| (CloseReason::Deleted, seconds)));
            done.changes.extend(ended.status);
        }
        if !plan.ordered.is_empty() {
            Self::order_close(tx, &plan.ordered, CloseReason::Deleted).await
        } else if !plan.ends.is_empty() {
            // Pollers have no order: their sessions look whether they still have a connection.
            Self::announce(tx).await
        } else {
            Ok(())
        }
    }
}

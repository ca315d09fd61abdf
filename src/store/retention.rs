//! What is forgotten: ended connections and changes of status past their time, then agents nobody knows any more.
//!
//! The transaction that forgets says so in `history_horizon`: from then on nobody takes what is missing there for
//! something that did not happen, whatever the setting becomes.

use async_trait::async_trait;
use sqlx::{ColumnIndex, Decode, Encode, Executor, FromRow, IntoArguments, Type};
use uuid::Uuid;

use super::dialect::{Column, Dialect, SqlStore, bounded, failure, rows, sql};
use super::{RetentionStore, StoreError};
use crate::clock::Moment;

/// The most rows of each kind that one transaction forgets.
const BATCH: u64 = 1_000;

/// How much one call forgot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forgotten {
    /// Ended connections.
    pub connections: u64,
    /// Changes of status.
    pub transitions: u64,
    /// Retired agents without history.
    pub agents: u64,
}

impl Forgotten {
    /// True where there may be more to forget.
    #[must_use]
    pub fn may_be_more(&self) -> bool {
        [self.connections, self.transitions, self.agents].contains(&BATCH)
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            connections: self.connections + other.connections,
            transitions: self.transitions + other.transitions,
            agents: self.agents + other.agents,
        }
    }
}

#[async_trait]
impl<D> RetentionStore for SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> (Uuid,): FromRow<'r, D::Row>,
    usize: ColumnIndex<D::Row>,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> Uuid: Decode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    async fn forget(&self, before: Moment) -> Result<Forgotten, StoreError> {
        bounded(async {
            let mut tx = self.begin().await?;
            let forget = |table: &str, end: &str, also: &str| {
                sql(format!(
                    "DELETE FROM {table} WHERE id IN
                         (SELECT t.id FROM {table} t WHERE t.{end} < $1 {also} ORDER BY t.{end} LIMIT {BATCH})"
                ))
            };
            // A row also says until when nobody knew: it goes once that lies before as well.
            let known = "AND (t.disconnected_by IS NULL OR t.disconnected_by < $1)";
            let query = sqlx::query(forget("agent_connection_history", "disconnected_at", known)).bind(before);
            let connections = D::affected(&query.execute(&mut *tx).await.map_err(failure::<D>)?);
            let query = sqlx::query(forget("agent_status_log", "at", "")).bind(before);
            let transitions = D::affected(&query.execute(&mut *tx).await.map_err(failure::<D>)?);
            let text = format!(
                "SELECT a.id FROM agents a WHERE a.status = 'retired' AND a.retired_at < $1 AND a.connection_id IS NULL
                     AND NOT EXISTS (SELECT 1 FROM agent_connection_history c WHERE c.agent_id = a.id)
                 ORDER BY a.id LIMIT {BATCH} {}",
                D::LOCK_AGENTS
            );
            let gone: Vec<(Uuid,)> =
                sqlx::query_as(sql(text)).bind(before).fetch_all(&mut *tx).await.map_err(failure::<D>)?;
            let ids = rows::<D>(&[("id", Column::Uuid)]);
            for text in [
                format!("DELETE FROM agent_attribute_sets WHERE agent_id IN (SELECT r.id FROM {ids} r)"),
                format!("DELETE FROM agent_liveness WHERE agent_id IN (SELECT r.id FROM {ids} r)"),
                format!("DELETE FROM agent_status_log WHERE agent_id IN (SELECT r.id FROM {ids} r)"),
                format!("UPDATE agents SET previous_id = NULL WHERE previous_id IN (SELECT r.id FROM {ids} r)"),
                format!("DELETE FROM agents WHERE id IN (SELECT r.id FROM {ids} r)"),
            ] {
                Self::execute(&mut tx, text, &gone).await?;
            }
            let forgotten = Forgotten { connections, transitions, agents: gone.len() as u64 };
            if forgotten != Forgotten::default() {
                let text = format!(
                    "INSERT INTO history_horizon (only_one, forgotten_before) VALUES (true, $1) ON CONFLICT (only_one) DO UPDATE
                     SET forgotten_before = {}(history_horizon.forgotten_before, excluded.forgotten_before)",
                    D::GREATEST
                );
                sqlx::query(sql(text)).bind(before).execute(&mut *tx).await.map_err(failure::<D>)?;
            }
            tx.commit().await.map_err(failure::<D>)?;
            Ok(forgotten)
        })
        .await
    }
}

//! One batch of writes for connections: updates of agents, ends, openings, in one transaction.
//!
//! The order of the stages keeps the promises: an end known in memory is written, with its own
//! reason, ahead of the newcomer's row; opening locks the agents' rows sorted by uid, ends open
//! rows, inserts, and then sets the fence, with the first report of whom nothing is on record. Decisions are made in Rust under these locks, so that
//! both databases decide alike. The statements know nothing of links or sessions.

mod batch;
mod decide;
mod update;

use std::collections::HashMap;

use async_trait::async_trait;
use serde::Serialize;
use serde_json::Value;
use sqlx::types::Json;
use sqlx::{ColumnIndex, Decode, Encode, Executor, FromRow, IntoArguments, Transaction, Type};
use uuid::Uuid;

use super::dialect::{Column, Dialect, SqlStore, batch, bounded, failure, keys, rows, sql};
use super::status_log::log_row;
use super::{ConnectionRow, HistoryFilter, Page, PageRequest, PolledConnection, StatusChange, Transport};
use super::{ConnectionStore, StoreError};
use crate::agent::InstanceUid;
use crate::agent::document::Document;
use crate::clock::Moment;
pub use batch::{
    AgentUpdate, ConnectionEnd, Displaced, Ended, FirstReport, NewConnection, Older, Opened, Rival, Write,
    Written,
};
use decide::{Arrival, Effects, Newcomer, RowEnd, Seen, end_of_stay, last_proof, welcome};
pub(super) use decide::{LockedAgent, OpenRow};
use update::{Inventory, Reported};

/// The JSON form of a number as stored: 64 bits, the sign is only a reading.
pub(super) fn stored_number(number: Option<u64>) -> Option<i64> {
    number.map(u64::cast_signed)
}

#[async_trait]
impl<D> ConnectionStore for SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> LockedAgent: FromRow<'r, D::Row>,
    for<'r> OpenRow: FromRow<'r, D::Row>,
    for<'r> ConnectionRow: FromRow<'r, D::Row>,
    for<'r> PolledConnection: FromRow<'r, D::Row>,
    usize: ColumnIndex<D::Row>,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> i64: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
    for<'q> Json<&'q Document>: Encode<'q, D> + Type<D>,
{
    async fn write(&self, batch: &[Write]) -> Result<Vec<Written>, StoreError> {
        bounded(self.write_batch(batch)).await
    }

    async fn get_active_connection(&self, agent: InstanceUid) -> Result<Option<ConnectionRow>, StoreError> {
        bounded(self.active_connection(agent)).await
    }

    async fn list_connection_history(
        &self,
        agent: InstanceUid,
        filter: HistoryFilter,
        page: PageRequest<i64>,
    ) -> Result<Page<ConnectionRow>, StoreError> {
        bounded(self.connection_history(agent, filter, page)).await
    }

    async fn list_polled_connections(&self) -> Result<Vec<PolledConnection>, StoreError> {
        bounded(self.polled_connections()).await
    }
}

impl<D> SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> LockedAgent: FromRow<'r, D::Row>,
    for<'r> OpenRow: FromRow<'r, D::Row>,
    usize: ColumnIndex<D::Row>,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> i64: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Json<&'q Document>: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    /// Makes sure that the node which writes is not marked as ended, nor will be before the commit.
    ///
    /// Nodes are locked ahead of agents, by whoever ends one as well; renewals do not wait for it.
    async fn hold_node(tx: &mut Transaction<'_, D>, writes: &[Write]) -> Result<(), StoreError> {
        // A batch is of one node.
        let node = writes.first().map(Write::node);
        let Some(node) = node.filter(|_| !D::SINGLE_NODE) else { return Ok(()) };
        let living: Option<(Uuid,)> =
            sqlx::query_as("SELECT id FROM nodes WHERE id = $1 AND ended_at IS NULL FOR KEY SHARE")
                .bind(node)
                .fetch_optional(&mut **tx)
                .await
                .map_err(failure::<D>)?;
        if living.is_none() {
            return Err(StoreError::NodeEnded);
        }
        Ok(())
    }

    async fn write_batch(&self, writes: &[Write]) -> Result<Vec<Written>, StoreError> {
        let (mut updates, mut ends, mut news) = (Vec::new(), Vec::new(), Vec::new());
        for write in writes {
            match write {
                Write::UpdateAgent(update) => updates.push(update.as_ref()),
                Write::UpdateConnection(end) => ends.push(end),
                Write::CreateConnection(new) => news.push(new),
            }
        }
        let mut tx = self.begin().await?;
        Self::hold_node(&mut tx, writes).await?;
        Self::insert_agents(&mut tx, &news).await?;
        let ids: Vec<InstanceUid> = writes.iter().map(Write::agent).collect();
        Self::lock_agents(&mut tx, &ids).await?;
        let mut agents = Self::read_agents(&mut tx, &ids).await?;
        let updates: Vec<_> = updates.into_iter().map(Reported::from).collect();
        let stored = Self::update_agents(&mut tx, &updates).await?;
        let mut ended = Self::update_connections(&mut tx, &ends, &mut agents).await?;
        let mut opened = Self::create_connections(&mut tx, &news, &agents).await?;
        let inventories = writes.iter().filter_map(|write| match write {
            Write::UpdateAgent(update) if stored.contains(&update.agent) => {
                Inventory::of(&update.documents, update.at)
            }
            Write::CreateConnection(new) => match opened.get(&new.agent) {
                Some(Written::Created(opened)) if opened.stored => {
                    Inventory::of(&new.first_report.as_ref()?.documents, new.at)
                }
                _ => None,
            },
            Write::UpdateAgent(_) | Write::UpdateConnection(_) => None,
        });
        Self::store_inventories(&mut tx, inventories.collect()).await?;
        tx.commit().await.map_err(failure::<D>)?;
        writes
            .iter()
            .map(|write| match write {
                Write::UpdateAgent(update) => Some(Written::Agent(stored.contains(&update.agent))),
                Write::UpdateConnection(end) => ended.remove(&end.connection_id).map(Written::Connection),
                Write::CreateConnection(new) => opened.remove(&new.agent),
            })
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| StoreError::Corrupt("a batch was answered incompletely".to_owned()))
    }

    /// Opens connections: ends open rows, inserts, sets the fence.
    async fn create_connections(
        tx: &mut Transaction<'_, D>,
        news: &[&NewConnection],
        agents: &HashMap<InstanceUid, LockedAgent>,
    ) -> Result<HashMap<InstanceUid, Written>, StoreError> {
        if news.is_empty() {
            return Ok(HashMap::new());
        }
        let open = Self::open_rows(tx, "agent_id", &keys(news.iter().map(|new| new.agent))).await?;
        let open: HashMap<InstanceUid, OpenRow> = open.into_iter().map(|row| (row.agent_id, row)).collect();
        let (mut newcomers, mut rivals) = (Vec::new(), Vec::new());
        for new in news {
            let Some(agent) = agents.get(&new.agent) else { continue };
            match welcome(new, agent, open.get(&new.agent)) {
                Arrival::Newcomer(newcomer) => newcomers.push(*newcomer),
                Arrival::Rival(rival) => rivals.push((*new, rival)),
            }
        }
        Self::note_rivals(tx, &rivals).await?;
        let told = rivals.into_iter().map(|(new, rival)| (new.agent, Written::Rival(rival)));
        let displaced = newcomers.iter().filter_map(|n| n.displaced.map(|(id, end)| end.row(id)));
        Self::end_rows(tx, displaced.collect()).await?;
        let ids = Self::insert_rows(tx, &newcomers).await?;
        let id_of = |newcomer: &Newcomer<'_>| {
            newcomer.continues.map(|row| row.id).or_else(|| ids.get(&newcomer.new.agent).copied())
        };
        let (first, others): (Vec<_>, Vec<_>) =
            newcomers.iter().partition(|newcomer| newcomer.first_report().is_some());
        Self::set_fences(tx, &others, &id_of).await?;
        let first = first.into_iter().filter_map(|newcomer| Reported::first(newcomer, id_of(newcomer)?));
        Self::store_first_reports(tx, &first.collect::<Vec<_>>()).await?;
        Self::start_liveness(tx, &newcomers, &id_of).await?;
        let log = newcomers.iter().filter_map(|n| {
            let change = StatusChange { connection_id: id_of(n), ..n.status.clone()? };
            Some(log_row(&change, n.at, Some(n.new.node_id)))
        });
        Self::write_log(tx, log.collect()).await?;
        Ok(newcomers
            .into_iter()
            .filter_map(|newcomer| {
                let connection_id = id_of(&newcomer)?;
                let opened = Opened {
                    connection_id,
                    continued: newcomer.continues.is_some(),
                    poll_silence: newcomer.agent.poll_silence().filter(|_| newcomer.continues.is_some()),
                    connected_at: newcomer.continues.map_or(newcomer.at, |row| row.connected_at),
                    seen_at: newcomer.seen_at().max(newcomer.agent.last_seen_at.unwrap_or_default()),
                    agent: newcomer.agent.known(),
                    stored: newcomer.first_report().is_some(),
                    displaced: newcomer.displaced.map(|(connection_id, end)| Displaced {
                        connection_id,
                        reason: end.reason,
                        duration_seconds: end.duration_seconds,
                    }),
                    status: newcomer
                        .status
                        .map(|change| StatusChange { connection_id: Some(connection_id), ..change }),
                };
                Some((newcomer.new.agent, Written::Created(Box::new(opened))))
            })
            .chain(told)
            .collect())
    }
}

impl<D> SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> LockedAgent: FromRow<'r, D::Row>,
    for<'r> OpenRow: FromRow<'r, D::Row>,
    usize: ColumnIndex<D::Row>,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> i64: Decode<'q, D> + Type<D>,
    for<'q> Uuid: Decode<'q, D> + Type<D>,
{
    /// Creates the records of agents never seen before.
    async fn insert_agents(tx: &mut Transaction<'_, D>, news: &[&NewConnection]) -> Result<(), StoreError> {
        let text = format!(
            "INSERT INTO agents (id, status, status_since, created_at, updated_at)
             SELECT r.id, 'online', r.at, r.at, r.at FROM {} r WHERE true ORDER BY r.id
             ON CONFLICT (id) DO NOTHING",
            rows::<D>(&[("id", Column::Uuid), ("at", Column::Moment)])
        );
        let values: Vec<_> = news.iter().map(|new| (new.agent, new.at.as_micros())).collect();
        Self::execute(tx, text, &values).await
    }

    /// Locks the rows of all agents of the batch, sorted by uid, so that two batches cannot wait for each other in a circle.
    async fn lock_agents(tx: &mut Transaction<'_, D>, agents: &[InstanceUid]) -> Result<(), StoreError> {
        if D::LOCK_AGENTS.is_empty() {
            return Ok(());
        }
        // A statement of its own: the next one sees what was committed while this one waited.
        let text = format!(
            "SELECT a.id FROM agents a WHERE a.id IN (SELECT r.id FROM {} r) ORDER BY a.id {}",
            rows::<D>(&[("id", Column::Uuid)]),
            D::LOCK_AGENTS
        );
        Self::execute(tx, text, &keys(agents.iter().copied())).await
    }

    /// The rows of agents that are locked.
    pub(super) async fn read_agents(
        tx: &mut Transaction<'_, D>,
        agents: &[InstanceUid],
    ) -> Result<HashMap<InstanceUid, LockedAgent>, StoreError> {
        let rows = rows::<D>(&[("id", Column::Uuid)]);
        let text = format!(
            "SELECT a.id, a.status, a.connection_id, a.capabilities, l.sequence_num, l.last_seen_at, l.poll_silence_ms,
                    a.displaced_at, a.displaced_number, a.swaps, a.rival_id, a.rival_offers,
                    a.last_connected_at, a.updated_at,
                    coalesce(a.close_connection = a.connection_id AND a.close_reason = 'deleted', false) AS delete_ordered,
                    a.description IS NOT NULL AS has_description,
                    a.health IS NOT NULL AS has_health,
                    a.effective_config IS NOT NULL AS has_effective_config,
                    a.remote_config_status IS NOT NULL AS has_remote_config_status,
                    a.package_statuses IS NOT NULL AS has_package_statuses,
                    a.custom_capabilities IS NOT NULL AS has_custom_capabilities,
                    a.components_hash IS NOT NULL AS has_components,
                    a.connection_settings_status IS NOT NULL AS has_connection_settings_status
             FROM agents a LEFT JOIN agent_liveness l ON l.agent_id = a.id
             WHERE a.id IN (SELECT r.id FROM {rows} r)"
        );
        let agents: Vec<LockedAgent> = sqlx::query_as(sql(text))
            .bind(batch(&keys(agents.iter().copied())))
            .fetch_all(&mut **tx)
            .await
            .map_err(failure::<D>)?;
        Ok(agents.into_iter().map(|agent| (agent.id, agent)).collect())
    }

    /// Stores when agents were last seen and the numbers their stored state stands for, under the lock of their rows.
    pub(super) async fn update_liveness(
        tx: &mut Transaction<'_, D>,
        seen: impl Iterator<Item = Seen> + Send,
    ) -> Result<(), StoreError> {
        let values: Vec<_> = seen
            .map(|seen| (seen.agent, seen.at.as_micros(), stored_number(seen.number), seen.unsaved))
            .collect();
        let columns = [
            ("id", Column::Uuid),
            ("at", Column::Moment),
            ("number", Column::Integer),
            ("unsaved", Column::Boolean),
        ];
        let text = format!(
            "UPDATE agent_liveness AS l SET last_seen_at = {}(l.last_seen_at, r.at),
                 sequence_num = CASE WHEN r.unsaved THEN l.sequence_num ELSE r.number END
             FROM {} r WHERE l.agent_id = r.id",
            D::GREATEST,
            rows::<D>(&columns)
        );
        Self::execute(tx, text, &values).await
    }

    /// The open rows among these connections or of these agents.
    pub(super) async fn open_rows<K: Serialize + Sync>(
        tx: &mut Transaction<'_, D>,
        by: &str,
        keys: &[(K,)],
    ) -> Result<Vec<OpenRow>, StoreError> {
        let rows = rows::<D>(&[("key", if by == "id" { Column::Integer } else { Column::Uuid })]);
        let text = format!(
            "SELECT c.id, c.agent_id, c.connected_at, c.transport, c.node_id, c.node_seq, c.created_at,
                    n.ended_at IS NOT NULL AS node_gone
             FROM agent_connection_history c LEFT JOIN nodes n ON n.id = c.node_id
             WHERE c.disconnected_at IS NULL AND c.{by} IN (SELECT r.key FROM {rows} r)"
        );
        sqlx::query_as(sql(text)).bind(batch(keys)).fetch_all(&mut **tx).await.map_err(failure::<D>)
    }

    /// Ends connections; an end whose row was ended before changes nothing.
    pub(super) async fn update_connections(
        tx: &mut Transaction<'_, D>,
        ends: &[&ConnectionEnd],
        agents: &mut HashMap<InstanceUid, LockedAgent>,
    ) -> Result<HashMap<i64, Ended>, StoreError> {
        let mut ended: HashMap<i64, Ended> =
            ends.iter().map(|end| (end.connection_id, Ended::default())).collect();
        if ends.is_empty() {
            return Ok(ended);
        }
        let open = Self::open_rows(tx, "id", &keys(ends.iter().map(|end| end.connection_id))).await?;
        let open: HashMap<i64, OpenRow> = open.into_iter().map(|row| (row.id, row)).collect();
        let mut effects = Effects::default();
        for end in ends {
            let (Some(row), Some(agent)) = (open.get(&end.connection_id), agents.get_mut(&end.agent)) else {
                continue;
            };
            let seen_since = end.unless_seen_after.is_some_and(|limit| agent.last_seen_at > Some(limit));
            if seen_since {
                continue;
            }
            let decided = RowEnd::new(row, end.reason, last_proof(end, row, agent), end.disconnected_by);
            effects.rows.push(decided.row(row.id));
            let status = end_of_stay(end, &decided, agent, &mut effects);
            ended.insert(row.id, Ended { duration_seconds: Some(decided.duration_seconds), status });
        }
        Self::store_ends(tx, effects).await?;
        Ok(ended)
    }

    /// Writes the decided ends.
    async fn store_ends(tx: &mut Transaction<'_, D>, effects: Effects) -> Result<(), StoreError> {
        Self::end_rows(tx, effects.rows).await?;
        let columns = [
            ("id", Column::Uuid),
            ("status", Column::Text),
            ("changed", Column::Boolean),
            ("known_at", Column::Moment),
            ("disconnected_at", Column::Moment),
            ("reason", Column::Text),
            ("offline_at", Column::Moment),
        ];
        let text = format!(
            "UPDATE agents AS a SET connection_id = NULL, close_connection = NULL, close_reason = NULL, status = r.status,
                 status_since = CASE WHEN r.changed THEN r.known_at ELSE a.status_since END,
                 stale_from = CASE WHEN r.status = 'offline' THEN r.known_at ELSE NULL END,
                 retired_at = CASE WHEN r.status = 'retired' THEN r.known_at ELSE NULL END,
                 offline_at = r.offline_at, last_disconnected_at = r.disconnected_at,
                 disconnect_reason = r.reason, updated_at = {}(a.updated_at, r.known_at)
             FROM {} r WHERE a.id = r.id",
            D::GREATEST,
            rows::<D>(&columns)
        );
        Self::execute(tx, text, &effects.agents).await?;
        Self::update_liveness(tx, effects.sightings.into_iter()).await?;
        Self::write_log(tx, effects.log).await
    }

    /// Ends rows of the history.
    async fn end_rows(tx: &mut Transaction<'_, D>, ends: Vec<Value>) -> Result<(), StoreError> {
        let columns = [
            ("id", Column::Integer),
            ("at", Column::Moment),
            ("known_by", Column::Moment),
            ("seconds", Column::Integer),
            ("reason", Column::Text),
        ];
        let text = format!(
            "UPDATE agent_connection_history AS c SET disconnected_at = r.at, disconnected_by = r.known_by,
                 duration_seconds = r.seconds, disconnect_reason = r.reason
             FROM {} r WHERE c.id = r.id AND {}c.disconnected_at IS NULL",
            rows::<D>(&columns),
            // By the row's key, not through every open row and the whole batch for each.
            D::LOOK_THROUGH
        );
        Self::execute(tx, text, &ends).await
    }

    /// Notes which uid the second of two agents with one uid was given, and the number it has come to.
    async fn note_rivals(
        tx: &mut Transaction<'_, D>,
        rivals: &[(&NewConnection, Rival)],
    ) -> Result<(), StoreError> {
        let columns = [
            ("id", Column::Uuid),
            ("at", Column::Moment),
            ("number", Column::Integer),
            ("rival", Column::Uuid),
            ("offers", Column::Integer),
        ];
        let text = format!(
            "UPDATE agents AS a SET displaced_at = r.at, displaced_number = r.number, rival_id = r.rival,
                 rival_offers = r.offers
             FROM {} r WHERE a.id = r.id",
            rows::<D>(&columns)
        );
        let values = rivals.iter().map(|(new, rival)| {
            (new.agent, new.at.as_micros(), new.number.cast_signed(), rival.uid, rival.offers)
        });
        Self::execute(tx, text, &values.collect::<Vec<_>>()).await
    }

    /// Inserts the rows of newcomers that do not go on with an open one; answers their ids.
    async fn insert_rows(
        tx: &mut Transaction<'_, D>,
        newcomers: &[Newcomer<'_>],
    ) -> Result<HashMap<InstanceUid, i64>, StoreError> {
        let columns = [
            ("agent_id", Column::Uuid),
            ("connected_at", Column::Moment),
            ("remote_addr", Column::Text),
            ("transport", Column::Text),
            ("node_id", Column::Uuid),
            ("node_seq", Column::Integer),
            ("created_at", Column::Moment),
        ];
        let names = columns.map(|(name, _)| name).join(", ");
        let text = format!(
            "INSERT INTO agent_connection_history ({names}) SELECT {names} FROM {} r RETURNING id, agent_id",
            rows::<D>(&columns)
        );
        let values = newcomers.iter().filter(|newcomer| newcomer.continues.is_none()).map(|newcomer| {
            let new = newcomer.new;
            (
                new.agent,
                newcomer.at.as_micros(),
                new.remote_addr.as_str(),
                new.transport.label(),
                (new.transport == Transport::Websocket).then_some(new.node_id),
                new.node_seq,
                new.at.as_micros(),
            )
        });
        let inserted: Vec<(i64, Uuid)> = sqlx::query_as(sql(text))
            .bind(batch(&values.collect::<Vec<_>>()))
            .fetch_all(&mut **tx)
            .await
            .map_err(failure::<D>)?;
        Ok(inserted.into_iter().map(|(id, agent)| (agent.into(), id)).collect())
    }

    /// Makes the newcomers the ones whose writes count, and their agents online.
    async fn set_fences(
        tx: &mut Transaction<'_, D>,
        newcomers: &[&Newcomer<'_>],
        id_of: &(impl Fn(&Newcomer<'_>) -> Option<i64> + Sync),
    ) -> Result<(), StoreError> {
        let columns = [
            ("id", Column::Uuid),
            ("connection_id", Column::Integer),
            ("at", Column::Moment),
            ("changed", Column::Boolean),
            ("connected_at", Column::Moment),
            ("disconnected_at", Column::Moment),
            ("reason", Column::Text),
            ("displaced_at", Column::Moment),
            ("displaced_number", Column::Integer),
            ("swaps", Column::Integer),
            ("fresh", Column::Boolean),
        ];
        let text = format!(
            "UPDATE agents AS a SET connection_id = r.connection_id, status = 'online',
                 displaced_at = coalesce(r.displaced_at, a.displaced_at),
                 displaced_number = CASE WHEN r.displaced_at IS NULL THEN a.displaced_number ELSE r.displaced_number END,
                 swaps = coalesce(r.swaps, a.swaps),
                 rival_id = CASE WHEN r.fresh THEN NULL ELSE a.rival_id END,
                 rival_offers = CASE WHEN r.fresh THEN 0 ELSE a.rival_offers END,
                 close_connection = CASE WHEN a.close_connection = r.connection_id THEN a.close_connection END,
                 close_reason = CASE WHEN a.close_connection = r.connection_id THEN a.close_reason END,
                 status_since = CASE WHEN r.changed THEN r.at ELSE a.status_since END,
                 offline_at = NULL, stale_from = NULL, retired_at = NULL,
                 last_connected_at = coalesce(r.connected_at, a.last_connected_at),
                 last_disconnected_at = coalesce(r.disconnected_at, a.last_disconnected_at),
                 disconnect_reason = coalesce(r.reason, a.disconnect_reason),
                 updated_at = {}(a.updated_at, r.at)
             FROM {} r WHERE a.id = r.id",
            D::GREATEST,
            rows::<D>(&columns)
        );
        let values = newcomers.iter().map(|newcomer| {
            let ended = newcomer.displaced.map(|(_, end)| end);
            (
                newcomer.new.agent,
                id_of(newcomer),
                newcomer.at.as_micros(),
                newcomer.status.is_some(),
                newcomer.continues.is_none().then_some(newcomer.at.as_micros()),
                ended.map(|end| end.at.as_micros()),
                ended.map(|end| end.reason.label()),
                ended.map(|_| newcomer.at.as_micros()),
                newcomer.left_at_number.map(u64::cast_signed),
                ended.map(|_| newcomer.swaps),
                ended.is_some() && newcomer.swaps == 0,
            )
        });
        Self::execute(tx, text, &values.collect::<Vec<_>>()).await
    }

    /// Notes the newcomers' signs of life, and the numbers of those whose first report is stored.
    async fn start_liveness(
        tx: &mut Transaction<'_, D>,
        newcomers: &[Newcomer<'_>],
        id_of: &(impl Fn(&Newcomer<'_>) -> Option<i64> + Sync),
    ) -> Result<(), StoreError> {
        let text = format!(
            "INSERT INTO agent_liveness (agent_id, connection_id, last_seen_at, poll_silence_ms, sequence_num)
             SELECT r.id, r.connection_id, r.at, r.silence, r.number FROM {} r WHERE true
             ON CONFLICT (agent_id) DO UPDATE SET connection_id = excluded.connection_id,
                 last_seen_at = {}(agent_liveness.last_seen_at, excluded.last_seen_at),
                 poll_silence_ms = excluded.poll_silence_ms,
                 sequence_num = coalesce(excluded.sequence_num, agent_liveness.sequence_num)",
            rows::<D>(&[
                ("id", Column::Uuid),
                ("connection_id", Column::Integer),
                ("at", Column::Moment),
                ("silence", Column::Integer),
                ("number", Column::Integer)
            ]),
            D::GREATEST
        );
        let seen = newcomers.iter().map(|n| {
            let silence = n.continues.and(n.agent.poll_silence_ms);
            let number = n.first_report().and_then(|report| stored_number(report.sequence_num));
            (n.new.agent, id_of(n), n.seen_at().as_micros(), silence, number)
        });
        Self::execute(tx, text, &seen.collect::<Vec<_>>()).await
    }
}

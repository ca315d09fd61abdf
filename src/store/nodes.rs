//! Nodes: the lock on a name, the lease, and what a node does about those that are gone.

use std::time::Duration;

use async_trait::async_trait;
use sqlx::{ColumnIndex, Connection, Decode, Encode, Executor, FromRow, IntoArguments, Transaction, Type};
use uuid::Uuid;

use super::dialect::{Dialect, LockPlace, NameLock, SqlStore, bounded, bounded_by, failure, sql};
use super::status_log::log_row;
use super::{NodeStore, Status, StatusChange, StoreError};
use crate::agent::InstanceUid;
use crate::clock::{Moment, micros};
use crate::close::CloseReason;

/// How long it may take to end what a node left open: its whole fleet, in one transaction.
const TAKE_OVER: Duration = Duration::from_mins(1);

/// A node that starts.
#[derive(Clone, Debug)]
pub struct NewNode {
    /// New with every start.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// The version of its binary.
    pub version: String,
    /// For how long a renewal holds.
    pub lease: Duration,
    /// When it starts.
    pub at: Moment,
    /// How long agents cut off by the server have to return before they count as offline.
    pub return_time: Duration,
    /// How long a poller may be silent whose pace is not on record.
    pub first_poll: Duration,
}

/// The node that ends what others left open, and by which rules.
#[derive(Clone, Copy, Debug)]
pub struct Heir {
    /// Which node.
    pub node: Uuid,
    /// When it does so.
    pub at: Moment,
    /// How long agents cut off by the server have to return before they count as offline.
    pub return_time: Duration,
    /// How long a poller may be silent whose pace is not on record.
    pub first_poll: Duration,
}

/// Another node that is not marked as ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Which one.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// When it last renewed its lease, by its own account: told apart, not compared with a clock.
    pub renewed_at: Moment,
    /// For how long a renewal holds.
    pub lease: Duration,
}

/// A connection that a node holds, by the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its id.
    pub id: i64,
    /// Its agent.
    pub agent: InstanceUid,
    /// When the agent was last seen.
    pub last_seen_at: Moment,
}

/// What a starting node found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeStart {
    /// Connections of predecessors that were still open: ended as `server_lost`.
    pub lost_connections: u64,
    /// True where no other node is alive.
    pub alone: bool,
    /// How long no node watched the fleet; none where another one lives or there never was one.
    pub unwatched: Option<Duration>,
}

#[async_trait]
impl<D> NodeStore for SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> (Uuid,): FromRow<'r, D::Row>,
    for<'r> (Option<Moment>,): FromRow<'r, D::Row>,
    for<'r> (Uuid, String, i64, Moment): FromRow<'r, D::Row>,
    for<'r> (Uuid, String, Moment, i64): FromRow<'r, D::Row>,
    for<'r> (i64, Uuid, Moment): FromRow<'r, D::Row>,
    for<'r> (Moment,): FromRow<'r, D::Row>,
    usize: ColumnIndex<D::Row>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> i64: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Decode<'q, D> + Type<D>,
{
    async fn now(&self) -> Result<Moment, StoreError> {
        bounded(async {
            match D::NOW {
                None => Ok(crate::clock::host_now()),
                Some(text) => {
                    let (now,): (Moment,) =
                        sqlx::query_as(text).fetch_one(&self.readers).await.map_err(failure::<D>)?;
                    Ok(now)
                }
            }
        })
        .await
    }

    async fn lock_node_name(&self, name: &str) -> Result<bool, StoreError> {
        let mut held = self.name_lock.lock().await;
        if let Some((held_name, lock)) = held.as_mut()
            && held_name == name
            && bounded(still_holds(lock)).await.is_ok()
        {
            return Ok(true);
        }
        *held = None;
        *held = bounded(take_lock(&self.lock_place, name)).await?.map(|lock| (name.to_owned(), lock));
        Ok(held.is_some())
    }

    async fn start_node(&self, node: &NewNode) -> Result<NodeStart, StoreError> {
        bounded_by(TAKE_OVER, self.start(node)).await
    }

    async fn postpone_verdicts(&self, now: Moment, return_time: Duration) -> Result<(), StoreError> {
        bounded(async {
            let mut tx = self.begin().await?;
            Self::move_verdicts(&mut tx, now, return_time).await?;
            tx.commit().await.map_err(failure::<D>)
        })
        .await
    }

    async fn renew_node(&self, node: Uuid, at: Moment) -> Result<bool, StoreError> {
        let query = sqlx::query_as(
            "UPDATE nodes SET renewed_at = $2 WHERE id = $1 AND ended_at IS NULL RETURNING id",
        );
        let renewed: Option<(Uuid,)> = bounded(async {
            query.bind(node).bind(at).fetch_optional(&self.writers).await.map_err(failure::<D>)
        })
        .await?;
        Ok(renewed.is_some())
    }

    async fn end_node(&self, node: Uuid, at: Moment) -> Result<(), StoreError> {
        let query =
            sqlx::query("UPDATE nodes SET ended_at = $2, renewed_at = $2 WHERE id = $1 AND ended_at IS NULL");
        bounded(async { query.bind(node).bind(at).execute(&self.writers).await.map_err(failure::<D>) })
            .await?;
        Ok(())
    }

    async fn list_peers(&self, node: Uuid) -> Result<Vec<Peer>, StoreError> {
        let query = sqlx::query_as(
            "SELECT id, name, renewed_at, lease_ms FROM nodes WHERE ended_at IS NULL AND id <> $1 ORDER BY id",
        );
        let peers: Vec<(Uuid, String, Moment, i64)> =
            // Beside the renewals, so that many readers are not taken for a store that is away.
            bounded(async { query.bind(node).fetch_all(&self.writers).await.map_err(failure::<D>) }).await?;
        let peer = |(id, name, renewed_at, lease_ms): (Uuid, String, Moment, i64)| {
            let lease = Duration::from_millis(lease_ms.unsigned_abs());
            Peer { id, name, renewed_at, lease }
        };
        Ok(peers.into_iter().map(peer).collect())
    }

    async fn end_lost_node(&self, lost: &Peer, heir: &Heir) -> Result<Option<u64>, StoreError> {
        bounded_by(TAKE_OVER, self.end_lost(lost, heir)).await
    }

    async fn end_strays(&self, heir: &Heir) -> Result<u64, StoreError> {
        bounded(async {
            let strays = sqlx::query_as(
                "SELECT n.id FROM nodes n WHERE n.ended_at IS NOT NULL AND EXISTS (SELECT 1
                     FROM agent_connection_history c WHERE c.disconnected_at IS NULL AND c.node_id = n.id) LIMIT 1",
            );
            let any: Option<(Uuid,)> = strays.fetch_optional(&self.readers).await.map_err(failure::<D>)?;
            if any.is_none() {
                return Ok(0);
            }
            let mut tx = self.begin().await?;
            let ended = Self::inherit(&mut tx, heir, false).await?;
            tx.commit().await.map_err(failure::<D>)?;
            Ok(ended)
        })
        .await
    }

    async fn list_held_connections(&self, node: Uuid) -> Result<Vec<Held>, StoreError> {
        let query = sqlx::query_as(
            "SELECT c.id, c.agent_id, coalesce(l.last_seen_at, c.connected_at)
             FROM agent_connection_history c LEFT JOIN agent_liveness l ON l.agent_id = c.agent_id
             WHERE c.disconnected_at IS NULL AND c.node_id = $1 ORDER BY c.id",
        );
        let held: Vec<(i64, Uuid, Moment)> =
            bounded(async { query.bind(node).fetch_all(&self.readers).await.map_err(failure::<D>) }).await?;
        let held = held.into_iter();
        Ok(held.map(|(id, agent, last_seen_at)| Held { id, agent: agent.into(), last_seen_at }).collect())
    }
}

/// An error where the session that held the lock is gone, and the lock with it.
async fn still_holds(lock: &mut NameLock) -> Result<(), StoreError> {
    match lock {
        NameLock::Session(session) => session.ping().await.map_err(failure::<sqlx::Postgres>),
        NameLock::File(_) | NameLock::Nowhere => Ok(()),
    }
}

/// Takes the lock on a node name; `None` where another process holds it.
async fn take_lock(place: &LockPlace, name: &str) -> Result<Option<NameLock>, StoreError> {
    match place {
        LockPlace::Nowhere => Ok(Some(NameLock::Nowhere)),
        LockPlace::File(path) => {
            let opened = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(path);
            let file = opened.map_err(|error| {
                StoreError::Unavailable(format!("cannot open {}: {error}", path.display()))
            })?;
            match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => Ok(Some(NameLock::File(file))),
                Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
                Err(error) => {
                    Err(StoreError::Unavailable(format!("cannot lock {}: {error}", path.display())))
                }
            }
        }
        LockPlace::Session(options) => {
            let lost = |error| failure::<sqlx::Postgres>(error);
            let mut session = sqlx::PgConnection::connect_with(options).await.map_err(lost)?;
            let taken: bool = sqlx::query_scalar(
                "SELECT pg_try_advisory_lock(hashtextextended('opamp-server node ' || $1, 0))",
            )
            .bind(name)
            .fetch_one(&mut session)
            .await
            .map_err(lost)?;
            Ok(taken.then_some(NameLock::Session(session)))
        }
    }
}

/// Open rows `c` of ended nodes, and, where nobody else could have heard them, of pollers that were
/// silent for longer than they may be at `$1`; `$2` microseconds where their pace is not on record.
fn lost<D: Dialect>(alone: bool) -> String {
    let polls = if alone {
        let silence = D::shifted("l.last_seen_at", "coalesce(l.poll_silence_ms * 1000, $2)");
        format!(
            "OR (c.transport = 'http' AND (SELECT {silence} FROM agent_liveness l
                 WHERE l.agent_id = c.agent_id) < $1)"
        )
    } else {
        "AND $2 = $2".to_owned()
    };
    format!(
        "c.disconnected_at IS NULL AND $1 = $1
         AND (c.node_id IN (SELECT n.id FROM nodes n WHERE n.ended_at IS NOT NULL) {polls})"
    )
}

/// Rows `c` displaced since the last renewal of a node that `ender` ended at `at`: their agents fled from it.
fn fled(ender: &str, at: &str) -> String {
    format!(
        "FROM agent_connection_history c JOIN nodes n ON n.id = c.node_id
         WHERE n.ended_by = {ender} AND n.ended_at = {at} AND c.disconnected_by > n.renewed_at AND c.disconnect_reason = '{}'",
        CloseReason::Superseded.label()
    )
}

impl<D> SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> (Uuid,): FromRow<'r, D::Row>,
    for<'r> (Option<Moment>,): FromRow<'r, D::Row>,
    for<'r> (Uuid, String, i64, Moment): FromRow<'r, D::Row>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> i64: Encode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    async fn start(&self, node: &NewNode) -> Result<NodeStart, StoreError> {
        let mut tx = self.begin().await?;
        Self::limit_time(&mut tx, TAKE_OVER).await?;
        let (watched_until,): (Option<Moment>,) = sqlx::query_as("SELECT max(renewed_at) FROM nodes")
            .fetch_one(&mut *tx)
            .await
            .map_err(failure::<D>)?;
        sqlx::query(
            "INSERT INTO nodes (id, name, version, lease_ms, started_at, renewed_at) VALUES ($1, $2, $3, $4, $5, $5)",
        )
        .bind(node.id)
        .bind(node.name.as_str())
        .bind(node.version.as_str())
        .bind(i64::try_from(node.lease.as_millis()).unwrap_or(i64::MAX))
        .bind(node.at)
        .execute(&mut *tx)
        .await
        .map_err(failure::<D>)?;
        if !D::SINGLE_NODE {
            let query = sqlx::query("SELECT id FROM nodes WHERE name = $1 AND ended_at IS NULL FOR UPDATE");
            query.bind(node.name.as_str()).execute(&mut *tx).await.map_err(failure::<D>)?;
        }
        // Who holds the lock on a name is its only living node; where a lock guards the whole database, the only one.
        let same_name = if D::SINGLE_NODE { "$2 = $2" } else { "name = $2" };
        let text = format!(
            "UPDATE nodes SET ended_at = $3, ended_by = $1 WHERE id <> $1 AND {same_name} AND ended_at IS NULL"
        );
        sqlx::query(sql(text))
            .bind(node.id)
            .bind(node.name.as_str())
            .bind(node.at)
            .execute(&mut *tx)
            .await
            .map_err(failure::<D>)?;
        let peer: Option<(Uuid,)> =
            sqlx::query_as("SELECT id FROM nodes WHERE ended_at IS NULL AND id <> $1 LIMIT 1")
                .bind(node.id)
                .fetch_optional(&mut *tx)
                .await
                .map_err(failure::<D>)?;
        let alone = peer.is_none();
        // A peer that is not marked as ended may be dead all the same: then nobody renewed for a lease.
        let unwatched = watched_until
            .map(|until| node.at.since(until))
            .filter(|unwatched| alone || *unwatched > node.lease);
        let heir =
            Heir { node: node.id, at: node.at, return_time: node.return_time, first_poll: node.first_poll };
        let lost_connections = Self::inherit(&mut tx, &heir, alone).await?;
        // No peer is asked whether it watched: two that were half blind would each trust the other. One that did
        // has carried out what fell due.
        Self::move_verdicts(&mut tx, node.at, node.return_time).await?;
        if let Some(unwatched) = unwatched {
            Self::move_stale_clocks(&mut tx, unwatched).await?;
        }
        tx.commit().await.map_err(failure::<D>)?;
        Ok(NodeStart { lost_connections, alone, unwatched })
    }

    /// Marks a node as ended and ends what it left open; none where it moved meanwhile, or was ended, or the
    /// heir itself was.
    async fn end_lost(&self, lost: &Peer, heir: &Heir) -> Result<Option<u64>, StoreError> {
        let mut tx = self.begin().await?;
        Self::limit_time(&mut tx, TAKE_OVER).await?;
        Self::lock_node(&mut tx, lost.id).await?;
        let marked: Option<(Uuid,)> = sqlx::query_as(
            "UPDATE nodes SET ended_at = $3, ended_by = $2
             WHERE id = $1 AND ended_at IS NULL AND renewed_at = $4
                 AND EXISTS (SELECT 1 FROM nodes h WHERE h.id = $2 AND h.ended_at IS NULL)
             RETURNING id",
        )
        .bind(lost.id)
        .bind(heir.node)
        .bind(heir.at)
        .bind(lost.renewed_at)
        .fetch_optional(&mut *tx)
        .await
        .map_err(failure::<D>)?;
        if marked.is_none() {
            return Ok(None);
        }
        let ended = Self::inherit(&mut tx, heir, false).await?;
        tx.commit().await.map_err(failure::<D>)?;
        Ok(Some(ended))
    }

    /// Ends what ended nodes left open; `alone` where no other node lives.
    async fn inherit(tx: &mut Transaction<'_, D>, heir: &Heir, alone: bool) -> Result<u64, StoreError> {
        Self::lock_agents_of_lost(tx, heir, alone).await?;
        let ended = Self::end_lost_connections(tx, heir, alone).await?;
        Self::retire_deleted(tx, heir).await?;
        Self::rename_displaced(tx, heir).await?;
        Ok(ended)
    }

    /// Waits for the openings and ends of a node that are under way, and keeps others from beginning.
    async fn lock_node(tx: &mut Transaction<'_, D>, node: Uuid) -> Result<(), StoreError> {
        if !D::SINGLE_NODE {
            let query = sqlx::query("SELECT id FROM nodes WHERE id = $1 FOR UPDATE");
            query.bind(node).execute(&mut **tx).await.map_err(failure::<D>)?;
        }
        Ok(())
    }

    /// Locks the agents that an heir may change in the order of every writer, so that nobody waits in a circle.
    async fn lock_agents_of_lost(
        tx: &mut Transaction<'_, D>,
        heir: &Heir,
        alone: bool,
    ) -> Result<(), StoreError> {
        if D::LOCK_AGENTS.is_empty() {
            return Ok(());
        }
        let text = format!(
            "SELECT a.id FROM agents a WHERE a.id IN
                 (SELECT c.agent_id FROM agent_connection_history c WHERE {} UNION SELECT c.agent_id {})
             ORDER BY a.id {}",
            lost::<D>(alone),
            fled("$3", "$1"),
            D::LOCK_AGENTS
        );
        sqlx::query(sql(text))
            .bind(heir.at)
            .bind(micros(heir.first_poll))
            .bind(heir.node)
            .execute(&mut **tx)
            .await
            .map_err(failure::<D>)?;
        Ok(())
    }

    /// Ends what ended nodes left open, and, where nobody else could have heard them, polls that stopped.
    async fn end_lost_connections(
        tx: &mut Transaction<'_, D>,
        heir: &Heir,
        alone: bool,
    ) -> Result<u64, StoreError> {
        let (least, greatest) = (D::LEAST, D::GREATEST);
        let proof = format!(
            "{greatest}(c.connected_at, {least}($1, coalesce((SELECT l.last_seen_at FROM agent_liveness l
             WHERE l.agent_id = c.agent_id), c.connected_at)))"
        );
        let lost = lost::<D>(alone);
        let (reason, deleted) = (CloseReason::ServerLost.label(), CloseReason::Deleted.label());
        let text = format!(
            "UPDATE agent_connection_history AS c SET disconnected_at = {proof},
                 disconnected_by = {greatest}($1, {proof}), duration_seconds = {},
                 disconnect_reason = '{reason}'
             WHERE {lost}",
            D::seconds("c.connected_at", &proof)
        );
        let ended = sqlx::query(sql(text))
            .bind(heir.at)
            .bind(micros(heir.first_poll))
            .execute(&mut **tx)
            .await
            .map_err(failure::<D>)?;
        let text = format!(
            "UPDATE agents SET connection_id = NULL, disconnect_reason = '{reason}',
                 close_connection = CASE WHEN close_reason = '{deleted}' THEN close_connection END,
                 close_reason = CASE WHEN close_reason = '{deleted}' THEN close_reason END,
                 last_disconnected_at = (SELECT c.disconnected_at FROM agent_connection_history c
                                         WHERE c.id = agents.connection_id),
                 offline_at = CASE WHEN status = 'online' THEN {} END, updated_at = {greatest}(updated_at, $1)
             WHERE connection_id IN (SELECT c.id FROM agent_connection_history c
                                     WHERE c.id = agents.connection_id AND c.disconnected_at IS NOT NULL)",
            D::shifted("$1", "$2")
        );
        sqlx::query(sql(text))
            .bind(heir.at)
            .bind(micros(heir.return_time))
            .execute(&mut **tx)
            .await
            .map_err(failure::<D>)?;
        Ok(D::affected(&ended))
    }

    /// A node that was lost before it closed the connection of a deleted agent closed it by being lost.
    async fn retire_deleted(tx: &mut Transaction<'_, D>, heir: &Heir) -> Result<(), StoreError> {
        let orphans = format!(
            "close_connection IS NOT NULL AND close_reason = '{}' AND connection_id IS NULL",
            CloseReason::Deleted.label()
        );
        // The moments of an agent never go back, whatever the clocks of two nodes say.
        let at = format!("{}($1, updated_at)", D::GREATEST);
        let text =
            format!("SELECT id, status, close_connection, {at} FROM agents WHERE {orphans} ORDER BY id");
        let query = sqlx::query_as(sql(text)).bind(heir.at);
        let deleted: Vec<(Uuid, String, i64, Moment)> =
            query.fetch_all(&mut **tx).await.map_err(failure::<D>)?;
        let text = format!(
            "UPDATE agents SET status = 'retired', status_since = {at}, retired_at = {at}, offline_at = NULL,
                 stale_from = NULL, close_connection = NULL, close_reason = NULL WHERE {orphans}"
        );
        sqlx::query(sql(text)).bind(heir.at).execute(&mut **tx).await.map_err(failure::<D>)?;
        let log = deleted.into_iter().map(|(id, status, connection_id, at)| {
            let change = StatusChange {
                agent: id.into(),
                from: Status::from_label(&status),
                to: Status::Retired,
                reason: CloseReason::Deleted.label().to_owned(),
                connection_id: Some(connection_id),
            };
            log_row(&change, at, Some(heir.node))
        });
        Self::write_log(tx, log.collect()).await
    }

    /// Rows displaced since the last renewal of a node that this start ended: its agents fled from it.
    async fn rename_displaced(tx: &mut Transaction<'_, D>, heir: &Heir) -> Result<(), StoreError> {
        let (from, to) = (CloseReason::Superseded.label(), CloseReason::ServerLost.label());
        let fled = fled("$1", "$2");
        for text in [
            format!(
                "UPDATE agents AS a SET disconnect_reason = '{to}' {fled} AND c.agent_id = a.id
                     AND c.disconnected_at = a.last_disconnected_at AND a.disconnect_reason = '{from}'"
            ),
            format!(
                "UPDATE agent_connection_history SET disconnect_reason = '{to}' WHERE id IN (SELECT c.id {fled})"
            ),
        ] {
            sqlx::query(sql(text))
                .bind(heir.node)
                .bind(heir.at)
                .execute(&mut **tx)
                .await
                .map_err(failure::<D>)?;
        }
        Ok(())
    }

    /// Time in which nobody watched counts for no agent: pending verdicts move on.
    async fn move_verdicts(
        tx: &mut Transaction<'_, D>,
        now: Moment,
        return_time: Duration,
    ) -> Result<(), StoreError> {
        if !D::LOCK_AGENTS.is_empty() {
            let text = format!(
                "SELECT a.id FROM agents a WHERE a.offline_at IS NOT NULL ORDER BY a.id {}",
                D::LOCK_AGENTS
            );
            sqlx::query(sql(text)).execute(&mut **tx).await.map_err(failure::<D>)?;
        }
        let text = format!(
            "UPDATE agents SET offline_at = {}(offline_at, {}) WHERE offline_at IS NOT NULL",
            D::GREATEST,
            D::shifted("$1", "$2")
        );
        let query = sqlx::query(sql(text)).bind(now).bind(micros(return_time));
        query.execute(&mut **tx).await.map_err(failure::<D>)?;
        Ok(())
    }

    /// Nor does such time make anybody stale.
    async fn move_stale_clocks(tx: &mut Transaction<'_, D>, unwatched: Duration) -> Result<(), StoreError> {
        let text = format!(
            "UPDATE agents SET stale_from = {} WHERE stale_from IS NOT NULL",
            D::shifted("stale_from", "$1")
        );
        sqlx::query(sql(text)).bind(micros(unwatched)).execute(&mut **tx).await.map_err(failure::<D>)?;
        Ok(())
    }
}

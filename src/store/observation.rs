//! Reading what incidents are told from: the connections of a span, and what their agents have in common.

use async_trait::async_trait;
use futures_util::TryStreamExt;
use sqlx::{ColumnIndex, Decode, Encode, Executor, FromRow, IntoArguments, QueryBuilder, Type};
use uuid::Uuid;

use super::dialect::{Column, Dialect, SqlStore, batch, bounded, failure, rows, sql};
use super::{ObservationStore, StoreError};
use crate::agent::InstanceUid;
use crate::clock::Moment;
use crate::close::CloseReason;
use crate::incidents::{CauseKind, End, Observation, Stay};

/// How many connections are read by their ids at once.
const BATCH: usize = 1_000;

/// A connection that ended within the observation.
#[derive(FromRow)]
struct Ended {
    agent_id: Uuid,
    connected_at: Moment,
    disconnected_at: Moment,
    known_at: Moment,
    disconnect_reason: String,
    node_id: Option<Uuid>,
    remote_addr: Option<String>,
}

/// A connection that was open when the observation ended.
#[derive(FromRow)]
pub(super) struct Staying {
    agent_id: Uuid,
    connected_at: Moment,
    node_id: Option<Uuid>,
    remote_addr: Option<String>,
}

#[async_trait]
impl<D> ObservationStore for SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> Ended: FromRow<'r, D::Row>,
    for<'r> Staying: FromRow<'r, D::Row>,
    for<'r> (Option<i64>,): FromRow<'r, D::Row>,
    for<'r> (i64, Moment): FromRow<'r, D::Row>,
    for<'r> (Uuid, String): FromRow<'r, D::Row>,
    for<'r> (Uuid, String, String): FromRow<'r, D::Row>,
    usize: ColumnIndex<D::Row>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> i64: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Decode<'q, D> + Type<D>,
{
    async fn observe(&self, begins: Moment, ends: Moment, most: u32) -> Result<Observation, StoreError> {
        bounded(async {
            let mut observation = Observation::new(begins, ends);
            // Who leaves while this is read is read twice, and counted once, but never missed.
            for row in self.staying(ends).await? {
                observation.add_stay(Stay {
                    agent: row.agent_id.into(),
                    connected_at: row.connected_at,
                    end: None,
                    node: row.node_id,
                    remote_addr: row.remote_addr.as_deref(),
                });
            }
            let mut query = QueryBuilder::<D>::new("");
            select_ended(&mut query, begins, ends, most);
            let mut ended = query.build_query_as::<Ended>().fetch(&self.readers);
            let mut read = 0;
            while let Some(row) = ended.try_next().await.map_err(failure::<D>)? {
                let reason = CloseReason::from_label(&row.disconnect_reason).ok_or_else(|| {
                    StoreError::Corrupt(format!("unknown disconnect_reason {:?}", row.disconnect_reason))
                })?;
                observation.add_stay(Stay {
                    agent: row.agent_id.into(),
                    connected_at: row.connected_at,
                    end: Some(End { at: row.disconnected_at, known: row.known_at, reason }),
                    node: row.node_id,
                    remote_addr: row.remote_addr.as_deref(),
                });
                read += 1;
                if read == most {
                    observation.begin_at(row.disconnected_at);
                }
            }
            drop(ended);
            self.describe(&mut observation).await?;
            Ok(observation)
        })
        .await
    }
}

impl<D> SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> Staying: FromRow<'r, D::Row>,
    for<'r> (Option<i64>,): FromRow<'r, D::Row>,
    for<'r> (i64, Moment): FromRow<'r, D::Row>,
    for<'r> (Uuid, String): FromRow<'r, D::Row>,
    for<'r> (Uuid, String, String): FromRow<'r, D::Row>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> i64: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    /// The connections that were open at `at`.
    async fn staying(&self, at: Moment) -> Result<Vec<Staying>, StoreError> {
        let mut query = QueryBuilder::<D>::new("");
        select_last_connections(&mut query, self.first_connection_since(at).await?);
        let last: Vec<(Option<i64>,)> =
            query.build_query_as().fetch_all(&self.readers).await.map_err(failure::<D>)?;
        let last: Vec<[i64; 1]> = last.into_iter().filter_map(|(id,)| id.map(|id| [id])).collect();
        let text = format!(
            "SELECT c.agent_id, c.connected_at, c.node_id, c.remote_addr
             FROM {} r JOIN agent_connection_history c ON c.id = r.id
             WHERE c.connected_at < $2 AND (c.disconnected_at IS NULL OR c.disconnected_at >= $2)",
            rows::<D>(&[("id", Column::Integer)])
        );
        let mut staying = Vec::new();
        for part in last.chunks(BATCH) {
            let query = sqlx::query_as(sql(text.clone())).bind(batch(part)).bind(at);
            let found: Vec<Staying> = query.fetch_all(&self.readers).await.map_err(failure::<D>)?;
            staying.extend(found);
        }
        Ok(staying)
    }

    /// The id behind those of the connections that began before `at`: ids and beginnings grow together.
    async fn first_connection_since(&self, at: Moment) -> Result<i64, StoreError> {
        let query = sqlx::query_as("SELECT max(id) FROM agent_connection_history");
        let (last,): (Option<i64>,) = query.fetch_one(&self.readers).await.map_err(failure::<D>)?;
        let (mut low, mut high) = (0, last.unwrap_or_default().saturating_add(1));
        while low < high {
            let middle = low + (high - low) / 2;
            let query = sqlx::query_as(
                "SELECT id, connected_at FROM agent_connection_history WHERE id >= $1 ORDER BY id LIMIT 1",
            );
            let found: Option<(i64, Moment)> =
                query.bind(middle).fetch_optional(&self.readers).await.map_err(failure::<D>)?;
            match found {
                Some((id, began)) if began < at => low = id.saturating_add(1),
                _ => high = middle,
            }
        }
        Ok(low)
    }

    /// Adds the attributes of the agents and the names of the nodes.
    async fn describe(&self, observation: &mut Observation) -> Result<(), StoreError> {
        let mut query = QueryBuilder::<D>::new("");
        select_attributes(&mut query);
        let mut attributes = query.build_query_as::<(Uuid, String, String)>().fetch(&self.readers);
        while let Some((agent, key, value)) = attributes.try_next().await.map_err(failure::<D>)? {
            observation.add_attribute(InstanceUid::from(agent), &key, value);
        }
        drop(attributes);
        let query = sqlx::query_as("SELECT id, name FROM nodes");
        let nodes: Vec<(Uuid, String)> = query.fetch_all(&self.readers).await.map_err(failure::<D>)?;
        for (node, name) in nodes {
            observation.name_node(node, &name);
        }
        Ok(())
    }
}

/// Adds the query for the connections that ended from `begins` up to `ends`, the latest first, at most `most`.
pub(super) fn select_ended<D>(query: &mut QueryBuilder<D>, begins: Moment, ends: Moment, most: u32)
where
    D: Dialect,
    for<'q> i64: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query.push(
        "SELECT c.agent_id, c.connected_at, c.disconnected_at,
             coalesce(c.disconnected_by, c.disconnected_at) AS known_at, c.disconnect_reason, c.node_id, c.remote_addr
         FROM agent_connection_history c WHERE c.disconnected_at >= ",
    );
    query.push_bind(begins).push(" AND c.disconnected_at < ").push_bind(ends);
    query.push(" ORDER BY c.disconnected_at DESC LIMIT ").push_bind(i64::from(most));
}

/// Adds the query for the id of each agent's last connection, of those whose id is below `behind`.
pub(super) fn select_last_connections<D>(query: &mut QueryBuilder<D>, behind: i64)
where
    D: Dialect,
    for<'q> i64: Encode<'q, D> + Type<D>,
{
    // One look into an index for each agent, however many connections it had before and since. Their rows are read
    // by these ids then: as one statement, Postgres reads the whole history where it is small beside the fleet.
    query
        .push("SELECT (SELECT max(h.id) FROM agent_connection_history h WHERE h.agent_id = a.id AND h.id < ");
    query.push_bind(behind).push(") FROM agents a");
}

/// Adds the query for the attributes that may be causes.
pub(super) fn select_attributes<D>(query: &mut QueryBuilder<D>)
where
    D: Dialect,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
{
    query.push("SELECT t.agent_id, t.key, t.value FROM agent_attributes t WHERE t.key IN (");
    let mut keys = query.separated(", ");
    for kind in CauseKind::ATTRIBUTES {
        keys.push_bind(kind.label());
    }
    query.push(")");
}

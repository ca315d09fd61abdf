//! Reading what incidents are told from: the connections of a span, and what their agents have in common.

use async_trait::async_trait;
use futures_util::TryStreamExt;
use sqlx::types::Json;
use sqlx::{ColumnIndex, Decode, Encode, Executor, FromRow, IntoArguments, QueryBuilder, Type};
use uuid::Uuid;

use super::attributes::{Causes, select_causes};
use super::dialect::{Dialect, SqlStore, bounded, failure};
use super::past::select_open_at;
use super::{ObservationStore, StoreError};
use crate::agent::InstanceUid;
use crate::clock::Moment;
use crate::close::CloseReason;
use crate::incidents::{End, Observation, Stay};

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
    for<'r> (Uuid, String): FromRow<'r, D::Row>,
    for<'r> (Uuid, Causes): FromRow<'r, D::Row>,
    usize: ColumnIndex<D::Row>,
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
    for<'r> (Uuid, String): FromRow<'r, D::Row>,
    for<'r> (Uuid, Causes): FromRow<'r, D::Row>,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> i64: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    /// The connections that were open at `at`.
    async fn staying(&self, at: Moment) -> Result<Vec<Staying>, StoreError> {
        let mut query = QueryBuilder::<D>::new("");
        select_open_at(&mut query, at);
        query.build_query_as().fetch_all(&self.readers).await.map_err(failure::<D>)
    }

    /// Adds the attributes of the agents and the names of the nodes.
    async fn describe(&self, observation: &mut Observation) -> Result<(), StoreError> {
        let mut query = QueryBuilder::<D>::new("");
        select_causes(&mut query);
        let mut agents = query.build_query_as::<(Uuid, Causes)>().fetch(&self.readers);
        while let Some((agent, Json(causes))) = agents.try_next().await.map_err(failure::<D>)? {
            for (key, value) in causes {
                observation.add_attribute(InstanceUid::from(agent), &key, value);
            }
        }
        drop(agents);
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

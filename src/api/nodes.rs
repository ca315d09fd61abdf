//! The whole fleet in one answer, for services that ask for it as a bare array.

use std::sync::Arc;

use axum::BoxError;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::ApiState;
use super::error::{ApiError, BadRequest, Refusals};
use super::page::Params;
use crate::agent::InstanceUid;
use crate::clock::Moment;
use crate::store::{AgentFilter, AgentRow, PageRequest, Status, Store, StoreError};

/// Where it is; the token may come in another header here.
pub(super) const PATH: &str = "/api/agent/nodes";

/// How many agents are in memory at once.
const PAGE: u32 = 1_000;

/// An agent as services see it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct NodeItem {
    /// The instance uid.
    #[schema(value_type = uuid::Uuid)]
    id: InstanceUid,
    /// `service.name`.
    #[schema(example = "edge-gateway")]
    name: Option<String>,
    /// The groups it says it belongs to.
    #[schema(value_type = Vec<String>)]
    groups: Value,
    /// What it says of its health; null until it says so.
    healthy: Option<bool>,
    /// The verdict.
    status: Status,
    /// The last sign of life on record.
    #[schema(value_type = Option<String>, format = DateTime)]
    last_heartbeat: Option<Moment>,
    /// Its attribute `clients_count`, else 0.
    clients_count: i32,
    /// Hex hash of the last remote config it reported as applied.
    sync_revision: Option<String>,
    /// Peer address and port of the open connection; null while it is not connected.
    #[schema(example = "10.0.4.17:51034")]
    address: Option<String>,
}

impl From<AgentRow> for NodeItem {
    fn from(row: AgentRow) -> Self {
        Self {
            id: row.id,
            name: row.name,
            groups: row.groups,
            healthy: row.healthy,
            status: row.status,
            last_heartbeat: row.last_seen_at,
            clients_count: row.clients_count,
            sync_revision: row.sync_revision,
            address: row.remote_addr,
        }
    }
}

/// All agents, by id.
///
/// Streamed as one array without pages; retired agents are left out. An answer whose array is not
/// closed is incomplete: the store failed while it was read.
#[utoipa::path(get, path = "/api/agent/nodes", tag = "agents",
    security(("bearer" = []), ("service_token" = [])),
    responses((status = 200, description = "All agents", body = Vec<NodeItem>), BadRequest, Refusals))]
pub(super) async fn list(State(state): State<ApiState>, params: Params) -> Result<Response, ApiError> {
    params.finish()?;
    // Before the answer begins, a failure still has a status of its own.
    let first = next_page(state.store.as_ref(), None).await?;
    let walk = (state.store, Step::First(first));
    let body = Body::from_stream(stream::try_unfold(walk, write_page));
    Ok(([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response())
}

/// Where the walk through the fleet stands.
enum Step {
    /// This page comes first.
    First(Vec<AgentRow>),
    /// What follows this agent comes next.
    After(InstanceUid),
    /// Everything was written.
    Done,
}

async fn next_page(store: &dyn Store, after: Option<InstanceUid>) -> Result<Vec<AgentRow>, StoreError> {
    store.next_agents(&AgentFilter::default(), PageRequest { after, limit: PAGE }).await
}

/// Writes one page; an error breaks the body off, so that it never looks complete.
async fn write_page(
    (store, step): (Arc<dyn Store>, Step),
) -> Result<Option<(Bytes, (Arc<dyn Store>, Step))>, BoxError> {
    let (rows, mut text) = match step {
        Step::First(rows) => (rows, vec![b'[']),
        Step::After(last) => {
            let page = next_page(store.as_ref(), Some(last)).await;
            if let Err(error) = &page {
                tracing::warn!(%error, "a list of all agents was broken off");
                // An error drops what the HTTP connection has not sent; a pause lets it send the pages before.
                tokio::task::yield_now().await;
            }
            (page?, Vec::new())
        }
        Step::Done => return Ok(None),
    };
    let full = rows.len() == PAGE as usize;
    let next = rows.last().filter(|_| full).map_or(Step::Done, |row| Step::After(row.id));
    for row in rows {
        if text != b"[" {
            text.push(b',');
        }
        serde_json::to_writer(&mut text, &NodeItem::from(row))?;
    }
    if !full {
        text.push(b']');
    }
    Ok(Some((text.into(), (store, next))))
}

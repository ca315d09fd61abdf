//! The whole fleet in one answer, for services that ask for it as a bare array.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::ApiState;
use super::error::{ApiError, BadRequest, Refusals};
use super::page::Params;
use super::stream::{BATCH, Batch, Source, stream_all};
use crate::agent::InstanceUid;
use crate::agent::document::Document;
use crate::clock::Moment;
use crate::store::{AgentFilter, AgentRow, PageRequest, Status, Store, StoreError};

/// Where it is; the token may come in another header here.
pub(super) const PATH: &str = "/api/agent/nodes";

/// An agent as services see it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct NodeItem<'a> {
    /// The instance uid.
    #[schema(value_type = uuid::Uuid)]
    id: InstanceUid,
    /// `service.name`.
    #[schema(example = "edge-gateway")]
    name: Option<&'a str>,
    /// The groups it says it belongs to.
    #[schema(value_type = Vec<String>)]
    groups: &'a Document,
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
    sync_revision: Option<&'a str>,
    /// Peer address and port of the open connection; null while it is not connected.
    #[schema(example = "10.0.4.17:51034")]
    address: Option<&'a str>,
}

impl<'a> From<&'a AgentRow> for NodeItem<'a> {
    fn from(row: &'a AgentRow) -> Self {
        Self {
            id: row.id,
            name: row.name.as_deref(),
            groups: &row.groups,
            healthy: row.healthy,
            status: row.status,
            last_heartbeat: row.last_seen_at,
            clients_count: row.clients_count,
            sync_revision: row.sync_revision.as_deref(),
            address: row.remote_addr.as_deref(),
        }
    }
}

/// All agents, by id.
///
/// Streamed as one array without pages; retired agents are left out. An answer whose array is not
/// closed is incomplete: the store failed while it was read.
#[utoipa::path(get, path = "/api/agent/nodes", tag = "agents",
    security(("bearer" = []), ("service_token" = [])),
    responses((status = 200, description = "All agents", body = Vec<NodeItem<'_>>), BadRequest, Refusals))]
pub(super) async fn list(State(state): State<ApiState>, params: Params) -> Result<Response, ApiError> {
    params.finish()?;
    let fleet = Fleet { store: state.store, after: None };
    let mut separator = b'[';
    let body = stream_all("a list of all agents", fleet, move |batch, text| {
        for row in &batch.items {
            text.push(separator);
            separator = b',';
            serde_json::to_writer(&mut *text, &NodeItem::from(row))?;
        }
        if !batch.more {
            text.extend(if separator == b'[' { &b"[]"[..] } else { b"]" });
        }
        Ok(())
    });
    let headers = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    Ok((headers, body.await?).into_response())
}

/// All agents, by id.
struct Fleet {
    store: Arc<dyn Store>,
    after: Option<InstanceUid>,
}

impl Source for Fleet {
    type Item = AgentRow;

    async fn next(&mut self) -> Result<Batch<AgentRow>, StoreError> {
        let page = PageRequest { after: self.after, limit: BATCH };
        let rows = self.store.next_agents(&AgentFilter::default(), page).await?;
        self.after = rows.last().map(|row| row.id);
        Ok(Batch::of_page(rows))
    }
}

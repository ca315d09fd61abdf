//! What operators order of agents: to reconnect, to be deleted.
//!
//! A handler writes the order into the store and is done; whichever node holds the connection
//! carries it out.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use super::ApiState;
use super::agents::{AgentId, FilterQuery, read_filter};
use super::error::{
    AgentConnected, ApiError, BadRequest, MissingFilter, NotReconnectable, Refusals, UnknownAgent, WrongBody,
};
use super::page::Params;
use crate::agent::InstanceUid;
use crate::store::{AgentFilter, Deleted, Deletion, Reconnect};

/// The order to reconnect, as accepted.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ReconnectAccepted {
    /// The connection that is to end; its row in the connection history tells when it did.
    #[schema(example = 7)]
    connection_id: i64,
}

/// Makes an agent reconnect.
///
/// Its open connection is ended on record as `reconnect_requested`, whichever node holds it, and
/// then its WebSocket is closed with code 1012. On a link shared by several agents only this agent's
/// connection ends; the link is closed with its last one. The status of the agent does not change
/// unless it stays away.
#[utoipa::path(post, path = "/api/v1/agents/{id}/reconnect", tag = "agents",
    params(("id" = Uuid, Path, description = "The instance uid", example = "01919d4c-8f2b-7aa0-9d3e-5b1c2d3e4f50")),
    responses(
        (status = 202, description = "The order is on record", body = ReconnectAccepted),
        BadRequest, UnknownAgent, NotReconnectable, WrongBody, Refusals,
    ))]
pub(super) async fn reconnect(
    State(state): State<ApiState>,
    AgentId(agent): AgentId,
    params: Params,
) -> Result<(StatusCode, Json<ReconnectAccepted>), ApiError> {
    params.finish()?;
    match state.store.order_reconnect(agent).await? {
        None => Err(ApiError::NoSuchAgent(agent)),
        Some(Reconnect::NotConnected) => Err(ApiError::NotConnected(agent)),
        Some(Reconnect::NotWebsocket) => Err(ApiError::NotWebsocket(agent)),
        Some(Reconnect::Ordered(connection_id)) => {
            state.ordered.notify_one();
            Ok((StatusCode::ACCEPTED, Json(ReconnectAccepted { connection_id })))
        }
    }
}

/// How agents are deleted.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "described here, read by `Params`")]
pub(super) struct ForceQuery {
    /// Delete connected agents too: their connections end as `deleted`
    #[param(example = true, default = false)]
    force: Option<bool>,
}

/// Deletes an agent.
///
/// It is retired: hidden from lists, its record and its history stay. A connected one is left alone,
/// unless it is forced: then its connection is ended on record as `deleted`, it is retired with that
/// end, and its WebSocket is closed with code 1008. Deleting does not bar: an agent that reports again is back.
#[utoipa::path(delete, path = "/api/v1/agents/{id}", tag = "agents",
    params(("id" = Uuid, Path, description = "The instance uid", example = "01919d4c-8f2b-7aa0-9d3e-5b1c2d3e4f50"), ForceQuery),
    responses(
        (status = 204, description = "It is deleted, or will be once its connection has ended"),
        BadRequest, UnknownAgent, AgentConnected, WrongBody, Refusals,
    ))]
pub(super) async fn delete(
    State(state): State<ApiState>,
    AgentId(agent): AgentId,
    mut params: Params,
) -> Result<StatusCode, ApiError> {
    let force = read_force(&mut params)?;
    params.finish()?;
    let filter = AgentFilter { id: Some(agent), include_retired: true, ..AgentFilter::default() };
    let done = delete_batch(&state, &state.deletion(filter, force), None).await?;
    match (done.found, done.skipped_connected) {
        (0, _) => Err(ApiError::NoSuchAgent(agent)),
        (_, 0) => Ok(StatusCode::NO_CONTENT),
        _ => Err(ApiError::AgentConnected(agent)),
    }
}

/// What a deletion of many did.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(super) struct DeletedAgents {
    /// Agents that are deleted, or will be once their connections have ended.
    #[schema(example = 12)]
    deleted: u64,
    /// Agents that were left alone because they are connected.
    #[schema(example = 3)]
    skipped_connected: u64,
}

/// Deletes all agents that match.
///
/// Takes the filters of the list and refuses to run without any. Works in transactions of at most
/// 1,000 agents: after a failure those deleted so far stay deleted, and the same request goes on.
#[utoipa::path(delete, path = "/api/v1/agents", tag = "agents", params(FilterQuery, ForceQuery),
    responses(
        (status = 200, description = "How many were deleted", body = DeletedAgents),
        MissingFilter, WrongBody, Refusals,
    ))]
pub(super) async fn delete_many(
    State(state): State<ApiState>,
    mut params: Params,
) -> Result<Json<DeletedAgents>, ApiError> {
    let force = read_force(&mut params)?;
    let filter = read_filter(&mut params)?;
    params.finish()?;
    if !filter.narrows() {
        return Err(ApiError::FilterMissing);
    }
    let deletion = state.deletion(filter, force);
    let mut total = DeletedAgents::default();
    let mut after: Option<InstanceUid> = None;
    loop {
        let done = delete_batch(&state, &deletion, after).await?;
        total.deleted += done.deleted;
        total.skipped_connected += done.skipped_connected;
        after = done.next;
        if after.is_none() {
            return Ok(Json(total));
        }
    }
}

fn read_force(params: &mut Params) -> Result<bool, ApiError> {
    Ok(params.parsed("force", "true or false")?.unwrap_or(false))
}

impl ApiState {
    fn deletion(&self, filter: AgentFilter, force: bool) -> Deletion {
        Deletion { filter, force, at: self.clock.now(), node_id: self.node_id }
    }
}

/// Deletes one batch, tells the log and the metrics what came of it, and whoever holds the connections.
async fn delete_batch(
    state: &ApiState,
    deletion: &Deletion,
    after: Option<InstanceUid>,
) -> Result<Deleted, ApiError> {
    let done = state.store.delete_agents(deletion, after).await?;
    for change in &done.changes {
        change.log();
    }
    for (reason, seconds) in &done.ended {
        state.metrics.connection_ended(*reason, *seconds);
    }
    if deletion.force && done.deleted > 0 {
        state.ordered.notify_one();
    }
    Ok(done)
}

//! What is on record of an agent over time: its connections and the changes of its status.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use super::ApiState;
use super::agents::AgentId;
use super::error::{ApiError, BadRequest, Refusals, UnknownAgent};
use super::page::{HistoryPageQuery, Params};
use crate::store::{ConnectionRow, HistoryFilter, Transition};

/// One page of the connection history.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ConnectionPage {
    /// The connections, newest first.
    connections: Vec<ConnectionRow>,
    /// How many there are on all pages.
    total: u64,
    /// The `cursor` of the next page; null on the last one.
    next_cursor: Option<String>,
}

/// Which connections.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "described here, read by `Params`")]
pub(super) struct SpanQuery {
    /// Only connections that were open at this time or later
    #[param(format = DateTime, example = "2026-01-31T03:42:00Z")]
    from: Option<String>,
    /// Only connections that began before this time
    #[param(format = DateTime, example = "2026-01-31T04:00:00Z")]
    to: Option<String>,
}

/// The connections of an agent, newest first.
///
/// Between `disconnected_at` and `disconnected_by` nobody knows: the first is the last proof that it
/// was connected, the second the moment the end was known. An open connection is proven up to
/// `confirmed_until`.
#[utoipa::path(get, path = "/api/v1/agents/{id}/connection-history", tag = "connections",
    params(
        ("id" = uuid::Uuid, Path, description = "The instance uid", example = "01919d4c-8f2b-7aa0-9d3e-5b1c2d3e4f50"),
        SpanQuery,
        HistoryPageQuery,
    ),
    responses(
        (status = 200, description = "One page", body = ConnectionPage),
        BadRequest, UnknownAgent, Refusals,
    ))]
pub(super) async fn history(
    State(state): State<ApiState>,
    AgentId(agent): AgentId,
    mut params: Params,
) -> Result<Json<ConnectionPage>, ApiError> {
    let filter = HistoryFilter { from: params.moment("from")?, to: params.moment("to")? };
    let page = params.page::<i64>()?;
    params.finish()?;
    state.store.get_agent_row(agent).await?.ok_or(ApiError::NoSuchAgent(agent))?;
    let page = state.store.list_connection_history(agent, filter, page).await?;
    let last = page.items.last().filter(|_| page.more);
    Ok(Json(ConnectionPage {
        next_cursor: last.map(|row| row.id.to_string()),
        total: page.total,
        connections: page.items,
    }))
}

/// One page of the status history.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TransitionPage {
    /// The changes, newest first.
    transitions: Vec<Transition>,
    /// How many there are on all pages.
    total: u64,
    /// The `cursor` of the next page; null on the last one.
    next_cursor: Option<String>,
}

/// The changes of an agent's status, newest first.
///
/// Each with its reason: `first_report`, `returned`, `stale`, or why the connection ended.
#[utoipa::path(get, path = "/api/v1/agents/{id}/status-history", tag = "agents",
    params(
        ("id" = uuid::Uuid, Path, description = "The instance uid", example = "01919d4c-8f2b-7aa0-9d3e-5b1c2d3e4f50"),
        HistoryPageQuery,
    ),
    responses(
        (status = 200, description = "One page", body = TransitionPage),
        BadRequest, UnknownAgent, Refusals,
    ))]
pub(super) async fn status_history(
    State(state): State<ApiState>,
    AgentId(agent): AgentId,
    mut params: Params,
) -> Result<Json<TransitionPage>, ApiError> {
    let page = params.page::<i64>()?;
    params.finish()?;
    state.store.get_agent_row(agent).await?.ok_or(ApiError::NoSuchAgent(agent))?;
    let page = state.store.list_status_history(agent, page).await?;
    let last = page.items.last().filter(|_| page.more);
    Ok(Json(TransitionPage {
        next_cursor: last.map(|row| row.id.to_string()),
        total: page.total,
        transitions: page.items,
    }))
}

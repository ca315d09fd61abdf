//! What is on record of an agent over time: its connections and the changes of its status.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::ApiState;
use super::agents::AgentId;
use super::error::{ApiError, Problem};
use super::page::Params;
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

/// The connections of an agent, newest first.
///
/// Between `disconnected_at` and `disconnected_by` nobody knows: the first is the last proof that it
/// was connected, the second the moment the end was known. An open connection is proven up to
/// `confirmed_until`.
#[utoipa::path(get, path = "/api/v1/agents/{id}/connection-history", tag = "connections",
    params(
        ("id" = uuid::Uuid, Path, description = "The instance uid"),
        ("from" = Option<String>, Query, description = "Only connections that were open at this time or later (RFC 3339)", example = "2026-01-31T03:42:00Z"),
        ("to" = Option<String>, Query, description = "Only connections that began before this time (RFC 3339)", example = "2026-01-31T04:00:00Z"),
        ("limit" = Option<u32>, Query, description = "Connections per page, 1 to 1000", example = 100),
        ("cursor" = Option<String>, Query, description = "The next_cursor of the page before"),
    ),
    responses(
        (status = 200, description = "One page", body = ConnectionPage),
        (status = 400, description = "A parameter is wrong", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such agent", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away", body = Problem, content_type = "application/problem+json"),
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
#[utoipa::path(get, path = "/api/v1/agents/{id}/status-history", tag = "agents",
    params(
        ("id" = uuid::Uuid, Path, description = "The instance uid"),
        ("limit" = Option<u32>, Query, description = "Changes per page, 1 to 1000", example = 100),
        ("cursor" = Option<String>, Query, description = "The next_cursor of the page before"),
    ),
    responses(
        (status = 200, description = "One page", body = TransitionPage),
        (status = 400, description = "A parameter is wrong", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such agent", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away", body = Problem, content_type = "application/problem+json"),
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

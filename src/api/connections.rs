//! What is on record of an agent over time: its connections and the changes of its status.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use super::ApiState;
use super::agents::AgentId;
use super::error::{ApiError, BadRequest, OtherForm, Refusals, UnknownAgent};
use super::export::{Representation, Table, document, export};
use super::page::{ConnectionPageQuery, HistoryPageQuery, Params};
use super::past::{TimeQuery, observer, span_of};
use super::stream::{BATCH, Batch, Source};
use crate::agent::InstanceUid;
use crate::clock::Moment;
use crate::store::{
    ConnectionRow, HistoryFilter, PageRequest, Span, StayPlace, Store, StoreError, Transition, cut,
};

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
///
/// As NDJSON or CSV everything that was asked for, streamed, without pages. An answer that is broken off is incomplete:
/// the store failed while it was read.
#[utoipa::path(get, path = "/api/v1/agents/{id}/connection-history", tag = "connections",
    params(
        ("id" = uuid::Uuid, Path, description = "The instance uid", example = "01919d4c-8f2b-7aa0-9d3e-5b1c2d3e4f50"),
        SpanQuery,
        HistoryPageQuery,
    ),
    responses(
        (status = 200, description = "One page; all of them, a line each, as NDJSON or CSV", content(
            (ConnectionPage = "application/json"), (String = "application/x-ndjson"), (String = "text/csv"))),
        BadRequest, UnknownAgent, OtherForm, Refusals,
    ))]
pub(super) async fn history(
    State(state): State<ApiState>,
    AgentId(agent): AgentId,
    form: Representation,
    mut params: Params,
) -> Result<Response, ApiError> {
    let filter = HistoryFilter { from: params.moment("from")?, to: params.moment("to")? };
    let page = if form == Representation::Json { Some(params.page::<i64>()?) } else { None };
    params.finish()?;
    state.store.get_agent_row(agent).await?.ok_or(ApiError::NoSuchAgent(agent))?;
    let Some(page) = page else {
        let store = Arc::clone(&state.store);
        return export(form, Connections { store, agent, filter, after: None }).await;
    };
    let page = state.store.list_connection_history(agent, filter, page).await?;
    let last = page.items.last().filter(|_| page.more);
    Ok(document(ConnectionPage {
        next_cursor: last.map(|row| row.id.to_string()),
        total: page.total,
        connections: page.items,
    }))
}

/// The columns of a connection, as CSV has them.
const COLUMNS: &[&str] = &[
    "id",
    "agent_id",
    "connected_at",
    "disconnected_at",
    "disconnected_by",
    "duration_seconds",
    "disconnect_reason",
    "remote_addr",
    "transport",
    "node_id",
    "node_seq",
    "created_at",
    "confirmed_until",
];

/// The connections of an agent, newest first.
struct Connections {
    store: Arc<dyn Store>,
    agent: InstanceUid,
    filter: HistoryFilter,
    after: Option<i64>,
}

impl Table for Connections {
    const COLUMNS: &'static [&'static str] = COLUMNS;
}

impl Source for Connections {
    type Item = ConnectionRow;

    async fn next(&mut self) -> Result<Batch<ConnectionRow>, StoreError> {
        let page = PageRequest { after: self.after, limit: BATCH };
        let rows = self.store.next_connections(self.agent, self.filter, page).await?;
        self.after = rows.last().map(|row| row.id);
        Ok(Batch::of_page(rows))
    }
}

/// One page of the connections of all agents.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FleetConnectionPage {
    /// The beginning of the span.
    #[schema(value_type = String, format = DateTime)]
    from: Moment,
    /// Its end: what was asked for, cut to now.
    #[schema(value_type = String, format = DateTime)]
    to: Moment,
    /// The connections, oldest first.
    connections: Vec<ConnectionRow>,
    /// The `cursor` of the next page; null on the last one.
    next_cursor: Option<String>,
}

/// The connections of all agents in a span.
///
/// Those that were, or may have been, open in it, oldest first. How many there are is not counted. As NDJSON or CSV all of them, streamed, without pages; an answer that is broken off is incomplete.
#[utoipa::path(get, path = "/api/v1/connection-history", tag = "connections",
    params(TimeQuery, ConnectionPageQuery),
    responses(
        (status = 200, description = "One page; all of them, a line each, as NDJSON or CSV", content(
            (FleetConnectionPage = "application/json"), (String = "application/x-ndjson"), (String = "text/csv"))),
        BadRequest, OtherForm, Refusals,
    ))]
pub(super) async fn history_of_all(
    State(state): State<ApiState>,
    form: Representation,
    mut params: Params,
) -> Result<Response, ApiError> {
    let (from, to) = (params.moment("from")?, params.moment("to")?);
    let span = span_of(from, to, observer(&state).now)?;
    let page = if form == Representation::Json { Some(params.page::<StayPlace>()?) } else { None };
    params.finish()?;
    if page.is_some_and(|page| page.after.is_some()) && (from.is_none() || to.is_none()) {
        return Err(ApiError::bad("cursor", "needs the from and to that the first page answered"));
    }
    let Some(page) = page else {
        let store = Arc::clone(&state.store);
        return export(form, ConnectionsOfAll { store, span, after: None }).await;
    };
    let rows = state.store.next_connections_of_all(span, page.after, page.limit + 1).await?;
    let (rows, more) = cut(rows, page.limit);
    let last = rows.last().filter(|_| more);
    let last = last.map(|row| format!("{}.{}", row.connected_at.as_micros(), row.id));
    Ok(document(FleetConnectionPage { from: span.from, to: span.to, connections: rows, next_cursor: last }))
}

fn place_of(row: &ConnectionRow) -> StayPlace {
    (row.connected_at, row.id)
}

/// The connections of all agents.
struct ConnectionsOfAll {
    store: Arc<dyn Store>,
    span: Span,
    after: Option<StayPlace>,
}

impl Table for ConnectionsOfAll {
    const COLUMNS: &'static [&'static str] = COLUMNS;
}

impl Source for ConnectionsOfAll {
    type Item = ConnectionRow;

    async fn next(&mut self) -> Result<Batch<ConnectionRow>, StoreError> {
        let rows = self.store.next_connections_of_all(self.span, self.after, BATCH).await?;
        self.after = rows.last().map(place_of);
        Ok(Batch::of_page(rows))
    }
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

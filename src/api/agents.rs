//! Agents: lists, summary, detail and status.

use std::time::Duration;

use axum::Json;
use axum::extract::{FromRequestParts, Path, State};
use axum::http::request::Parts;
use serde::Serialize;
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::ApiState;
use super::error::{ApiError, BadRequest, Refusals, UnknownAgent};
use super::mask::mask_value;
use super::page::{AgentPageQuery, Params};
use super::past::{self, AsOfQuery, PastCounts, PastItem, PastStatus, read_as_of};
use crate::agent::document::Document;
use crate::agent::{Capabilities, InstanceUid};
use crate::clock::Moment;
use crate::store::{AgentDetail, AgentFilter, AgentRow, AgentSummary, ConnectionRow, Status, Transport};

/// The agent named in the path.
#[derive(Debug)]
pub(super) struct AgentId(pub(super) InstanceUid);

impl<S: Send + Sync> FromRequestParts<S> for AgentId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Path(text) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|_| ApiError::bad("id", "must be an instance uid in UUID form"))?;
        text.parse().map(Self).map_err(|_| ApiError::bad("id", "must be an instance uid in UUID form"))
    }
}

/// An agent as lists show it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AgentItem {
    /// The instance uid.
    #[schema(value_type = Uuid)]
    id: InstanceUid,
    /// `service.name`.
    name: Option<String>,
    /// `host.name`.
    host: Option<String>,
    /// The verdict.
    status: Status,
    /// Since when.
    #[schema(value_type = String, format = DateTime)]
    since: Moment,
    /// True while it has an open connection.
    connected: bool,
    /// What it says of its health; null until it says so.
    healthy: Option<bool>,
    /// How the open connection's reports travel.
    transport: Option<String>,
    /// Peer address and port of the open connection.
    remote_addr: Option<String>,
    /// The groups it says it belongs to.
    #[schema(value_type = Vec<String>)]
    groups: Document,
    /// Its attribute `clients_count`, else 0.
    clients_count: i32,
    /// Hex hash of the last remote config it reported as applied.
    sync_revision: Option<String>,
    /// True where it is retired, not an error, when it stays away.
    ephemeral: bool,
    /// The last sign of life on record.
    #[schema(value_type = Option<String>, format = DateTime)]
    last_seen_at: Option<Moment>,
    /// When it connected last.
    #[schema(value_type = Option<String>, format = DateTime)]
    last_connected_at: Option<Moment>,
    /// When its last connection ended.
    #[schema(value_type = Option<String>, format = DateTime)]
    last_disconnected_at: Option<Moment>,
    /// Why its last connection ended.
    disconnect_reason: Option<String>,
    /// The temporary uid it had before.
    previous_id: Option<Uuid>,
    /// When it was retired.
    #[schema(value_type = Option<String>, format = DateTime)]
    retired_at: Option<Moment>,
    /// When it was first heard of.
    #[schema(value_type = String, format = DateTime)]
    created_at: Moment,
    /// When its record last changed.
    #[schema(value_type = String, format = DateTime)]
    updated_at: Moment,
}

impl From<AgentRow> for AgentItem {
    fn from(row: AgentRow) -> Self {
        Self {
            id: row.id,
            name: row.name,
            host: row.host,
            status: row.status,
            since: row.status_since,
            connected: row.connection_id.is_some(),
            healthy: row.healthy,
            transport: row.transport,
            remote_addr: row.remote_addr,
            groups: row.groups,
            clients_count: row.clients_count,
            sync_revision: row.sync_revision,
            ephemeral: row.ephemeral,
            last_seen_at: row.last_seen_at,
            last_connected_at: row.last_connected_at,
            last_disconnected_at: row.last_disconnected_at,
            disconnect_reason: row.disconnect_reason,
            previous_id: row.previous_id,
            retired_at: row.retired_at,
            created_at: row.created_at,
            updated_at: row.updated_at,
        }
    }
}

/// Everything known of an agent.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AgentDocument {
    #[serde(flatten)]
    item: AgentItem,
    /// What it says it can do, by OpAMP's names.
    capabilities: Vec<&'static str>,
    /// `{identifying_attributes, non_identifying_attributes}`, each key to value.
    description: Option<Value>,
    /// The health tree: `{healthy, status, last_error, start_time, status_time, attributes, component_health_map}`.
    health: Option<Value>,
    /// File name to `{body, content_type}`; secrets are masked.
    effective_config: Option<Value>,
    /// `{last_remote_config_hash, status, error_message}`.
    remote_config_status: Option<Value>,
    /// `{packages, server_provided_all_packages_hash, error_message}`.
    package_statuses: Option<Value>,
    /// The custom capabilities it states.
    custom_capabilities: Option<Value>,
    /// Hash of its component inventory, hex.
    components_hash: Option<String>,
    /// Its component inventory; null until an agent sent the one with that hash.
    available_components: Option<Value>,
    /// `{last_connection_settings_hash, status, error_message}`.
    connection_settings_status: Option<Value>,
    /// The number of the last report whose state is on record; null where something may be missing.
    sequence_num: Option<u64>,
}

impl From<AgentDetail> for AgentDocument {
    fn from(detail: AgentDetail) -> Self {
        let mut effective_config = detail.effective_config;
        if let Some(config) = &mut effective_config {
            mask_value(config);
        }
        Self {
            item: detail.row.into(),
            capabilities: Capabilities(detail.capabilities.cast_unsigned()).names(),
            description: detail.description,
            health: detail.health,
            effective_config,
            remote_config_status: detail.remote_config_status,
            package_statuses: detail.package_statuses,
            custom_capabilities: detail.custom_capabilities,
            components_hash: detail.components_hash,
            available_components: detail.components,
            connection_settings_status: detail.connection_settings_status,
            sequence_num: detail.sequence_num.map(i64::cast_unsigned),
        }
    }
}

/// The status of an agent and what it rests on.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AgentStatus {
    /// The instance uid.
    #[schema(value_type = Uuid)]
    agent_id: InstanceUid,
    /// The verdict.
    status: Status,
    /// True while it has an open connection.
    connected: bool,
    /// What it says of its health; null until it says so.
    #[schema(required)]
    healthy: Option<bool>,
    /// Since when it has this status.
    #[schema(value_type = String, format = DateTime)]
    since: Moment,
    /// When it goes offline unless it is heard before; null where no verdict is due.
    #[schema(value_type = Option<String>, format = DateTime, required)]
    deadline_at: Option<Moment>,
    /// The last sign of life on record.
    #[schema(value_type = Option<String>, format = DateTime, required)]
    last_seen_at: Option<Moment>,
    /// When it connected last.
    #[schema(value_type = Option<String>, format = DateTime, required)]
    last_connected_at: Option<Moment>,
    /// When its last connection ended.
    #[schema(value_type = Option<String>, format = DateTime, required)]
    last_disconnected_at: Option<Moment>,
    /// Why its last connection ended.
    #[schema(required)]
    disconnect_reason: Option<String>,
    /// The open connection.
    #[schema(required)]
    active_connection: Option<ConnectionRow>,
}

/// One page of agents.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AgentPage {
    /// The agents, by id.
    agents: Vec<Listed>,
    /// How many there are on all pages.
    total: u64,
    /// The `cursor` of the next page; null on the last one.
    next_cursor: Option<String>,
    /// The moment of which this is known; absent where that is now.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    as_of: Option<Moment>,
}

/// An agent of a list, as it is or as it was.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum Listed {
    /// As it is.
    Present(Box<AgentItem>),
    /// As of a moment.
    Past(PastItem),
}

/// What an agent's status rests on, or what it was.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum AnyStatus {
    /// As it is.
    Present(Box<AgentStatus>),
    /// As of a moment.
    Past(PastStatus),
}

/// The counts, as they are or as they were.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum AnySummary {
    /// As they are.
    Present(AgentSummary),
    /// As of a moment.
    Past(PastCounts),
}

/// Which agents.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "described here, read by `read_filter`")]
pub(super) struct FilterQuery {
    /// Only with this status
    #[param(inline, example = "online")]
    status: Option<Status>,
    /// Only with, or without, an open connection
    #[param(example = true)]
    connected: Option<bool>,
    /// Only those that say they are healthy, or not
    #[param(example = false)]
    healthy: Option<bool>,
    /// Only those connected this way
    #[param(inline, example = "websocket")]
    transport: Option<Transport>,
    /// Only with this attribute as text, e.g. `attr.os.type=linux`; repeatable with other keys
    #[param(rename = "attr.<key>", pattern = r"^[^\x00]*$", example = "linux")]
    attribute: Option<String>,
    /// Only those whose id, name or host begins with this, in any case
    #[param(pattern = r"^[^\x00]*$", example = "edge")]
    q: Option<String>,
    /// Retired agents as well
    #[param(inline, example = "retired")]
    include: Option<Include>,
}

/// Which agents are listed on request only.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
#[expect(dead_code, reason = "described here, read by `read_filter`")]
pub(super) enum Include {
    Retired,
}

/// Declares one list of agents: its route, its documentation, the parameters beside the filters, and what it narrows.
macro_rules! agent_list {
    ($name:ident, $path:literal, $doc:literal, [$($query:ident),*], $narrow:expr) => {
        #[doc = $doc]
        #[doc = ""]
        #[doc = "Ordered by id, page by page; `total` counts all pages. Filters combine: all must hold."]
        #[utoipa::path(get, path = $path, tag = "agents",
            params(FilterQuery, $($query,)* AgentPageQuery),
            responses((status = 200, description = "One page", body = AgentPage), BadRequest, Refusals))]
        pub(super) async fn $name(State(state): State<ApiState>, params: Params) -> Result<Json<AgentPage>, ApiError> {
            let has_past = !([$(stringify!($query)),*] as [&str; _]).is_empty();
            page_of(&state, params, has_past, $narrow).await
        }
    };
}

agent_list!(list, "/api/v1/agents", "Agents, by id.", [AsOfQuery], |_, _| {});
agent_list!(
    list_online,
    "/api/v1/agents/online",
    "Agents with status online, by id.",
    [AsOfQuery],
    |filter, _| {
        filter.statuses = vec![Status::Online];
    }
);
agent_list!(
    list_offline,
    "/api/v1/agents/offline",
    "Agents with status offline, by id.",
    [AsOfQuery],
    |filter, _| {
        filter.statuses = vec![Status::Offline];
    }
);
agent_list!(
    list_error,
    "/api/v1/agents/error",
    "Agents with status error, by id.",
    [AsOfQuery],
    |filter, _| {
        filter.statuses = vec![Status::Error];
    }
);
// When an agent was last seen has no history.
agent_list!(
    list_stale,
    "/api/v1/agents/stale",
    "Agents with status offline or error that were not seen for `sweep.stale_after`, by id.",
    [],
    |filter, state| {
        filter.statuses = vec![Status::Offline, Status::Error];
        filter.unseen_since = Some(state.clock.now().before(state.stale_after));
    }
);

async fn page_of(
    state: &ApiState,
    mut params: Params,
    has_past: bool,
    narrow: impl FnOnce(&mut AgentFilter, &ApiState),
) -> Result<Json<AgentPage>, ApiError> {
    let page = params.page::<InstanceUid>()?;
    let mut filter = read_filter(&mut params)?;
    let as_of = if has_past { read_as_of(&mut params, state.clock.now())? } else { None };
    params.finish()?;
    narrow(&mut filter, state);
    if let Some(at) = as_of {
        let page = past::list(state, filter, at, page).await?;
        return Ok(Json(AgentPage {
            agents: page.agents.into_iter().map(Listed::Past).collect(),
            total: page.total,
            next_cursor: page.last.map(|agent| agent.to_string()),
            as_of,
        }));
    }
    let page = state.store.list_agents(&filter, page).await?;
    let last = page.items.last().filter(|_| page.more);
    let next_cursor = last.map(|row| row.id.to_string());
    let agents = page.items.into_iter().map(|row| Listed::Present(Box::new(row.into()))).collect();
    Ok(Json(AgentPage { agents, total: page.total, next_cursor, as_of: None }))
}

pub(super) fn read_filter(params: &mut Params) -> Result<AgentFilter, ApiError> {
    let status = params.checked("status", "online, offline, error or retired", Status::from_label)?;
    let retired = params.checked("include", "retired", |text| (text == "retired").then_some(true))?;
    Ok(AgentFilter {
        id: None,
        statuses: status.into_iter().collect(),
        connected: params.parsed("connected", "true or false")?,
        healthy: params.parsed("healthy", "true or false")?,
        transport: params.checked("transport", "websocket or http", Transport::from_label)?,
        attributes: params.prefixed("attr.").into_iter().collect(),
        prefix: params.text("q")?,
        unseen_since: None,
        include_retired: retired.unwrap_or(false),
    })
}

/// How many agents have which status and health.
///
/// `total` = `online` + `offline` + `error`: retired agents are counted apart. As of a moment, `unknown` says of how
/// many nobody knows whether they were connected, and health is not told.
#[utoipa::path(get, path = "/api/v1/agents/summary", tag = "agents",
    params(AsOfQuery),
    responses((status = 200, description = "The counts", body = AnySummary), BadRequest, Refusals))]
pub(super) async fn summary(
    State(state): State<ApiState>,
    mut params: Params,
) -> Result<Json<AnySummary>, ApiError> {
    let as_of = read_as_of(&mut params, state.clock.now())?;
    params.finish()?;
    Ok(Json(match as_of {
        Some(at) => AnySummary::Past(past::summary(&state, at).await?),
        None => AnySummary::Present(state.store.summarize_agents().await?),
    }))
}

/// Everything known of one agent.
///
/// Retired ones included. Secrets in the effective config are masked: values under keys like
/// `password`, `token`, `api_key` or `authorization`, and user info in URLs.
#[utoipa::path(get, path = "/api/v1/agents/{id}", tag = "agents",
    params(("id" = Uuid, Path, description = "The instance uid", example = "01919d4c-8f2b-7aa0-9d3e-5b1c2d3e4f50")),
    responses(
        (status = 200, description = "The agent", body = AgentDocument),
        BadRequest, UnknownAgent, Refusals,
    ))]
pub(super) async fn detail(
    State(state): State<ApiState>,
    AgentId(agent): AgentId,
    params: Params,
) -> Result<Json<AgentDocument>, ApiError> {
    params.finish()?;
    let detail = state.store.get_agent(agent).await?.ok_or(ApiError::NoSuchAgent(agent))?;
    Ok(Json(detail.into()))
}

/// The status of one agent and what it rests on.
///
/// `deadline_at` is the moment at which it goes offline unless it is heard before. As of a moment, `connected` is null
/// where nobody knows; who had not reported yet is answered 404.
#[utoipa::path(get, path = "/api/v1/agents/{id}/status", tag = "agents",
    params(
        ("id" = Uuid, Path, description = "The instance uid", example = "01919d4c-8f2b-7aa0-9d3e-5b1c2d3e4f50"),
        AsOfQuery,
    ),
    responses(
        (status = 200, description = "The status", body = AnyStatus),
        BadRequest, UnknownAgent, Refusals,
    ))]
pub(super) async fn status(
    State(state): State<ApiState>,
    AgentId(agent): AgentId,
    mut params: Params,
) -> Result<Json<AnyStatus>, ApiError> {
    let as_of = read_as_of(&mut params, state.clock.now())?;
    params.finish()?;
    if let Some(at) = as_of {
        return Ok(Json(AnyStatus::Past(past::status(&state, agent, at).await?)));
    }
    let row = state.store.get_agent_row(agent).await?.ok_or(ApiError::NoSuchAgent(agent))?;
    let active_connection = state.store.get_active_connection(agent).await?;
    let silence = active_connection.as_ref().map(|open| silence(&state, open.transport, row.poll_silence_ms));
    Ok(Json(AnyStatus::Present(Box::new(AgentStatus {
        agent_id: row.id,
        status: row.status,
        connected: active_connection.is_some(),
        healthy: row.healthy,
        since: row.status_since,
        deadline_at: row.offline_at.or_else(|| Some(row.last_seen_at?.after(silence?))),
        last_seen_at: row.last_seen_at,
        last_connected_at: row.last_connected_at,
        last_disconnected_at: row.last_disconnected_at,
        disconnect_reason: row.disconnect_reason,
        active_connection,
    }))))
}

/// How long a connection may at least be silent.
fn silence(state: &ApiState, transport: Transport, poll_silence_ms: Option<i64>) -> Duration {
    match (transport, poll_silence_ms) {
        (Transport::Websocket, _) => state.expected.timeout,
        (Transport::Http, Some(ms)) => Duration::from_millis(ms.unsigned_abs()),
        (Transport::Http, None) => state.expected.first_poll(),
    }
}

//! The fleet as of a moment: which parameters may be combined with `as_of`, and what is answered.
//!
//! Only what has a history is told of the past: status and connectedness. Health, description, attributes and names are
//! the present ones wherever they are shown, so they are not shown here, and nobody can filter by them.

use std::time::Duration;

use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use super::ApiState;
use super::error::ApiError;
use super::page::Params;
use crate::agent::InstanceUid;
use crate::clock::Moment;
use crate::store::{
    AgentFilter, Observer, PageRequest, PastAgent, PastFilter, PastSummary, Span, Status, Watch,
};
use crate::timeline::{Finding, State, look};

/// How long a span is if nobody says.
const DEFAULT_SPAN: Duration = Duration::from_hours(24);

/// As of when.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "described here, read by `read_as_of`")]
pub(super) struct AsOfQuery {
    /// What was known to be at this time, instead of now: not in the future, not before history was forgotten. Together
    /// with `healthy` or `attr.<key>` it is refused, because these have no history; `q` looks at present names
    #[param(format = DateTime, example = "2026-11-22T06:05:30Z")]
    as_of: Option<String>,
}

/// Which span.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "described here, read by `read_span`")]
pub(super) struct TimeQuery {
    /// The beginning of the span, which belongs to it; 24 h before its end if nobody says
    #[param(format = DateTime, example = "2026-11-22T06:00:00Z")]
    from: Option<String>,
    /// The end of the span, which does not belong to it; now if nobody says, and never later
    #[param(format = DateTime, example = "2026-11-22T07:00:00Z")]
    to: Option<String>,
}

/// Who asks, and when.
pub(super) fn observer(state: &ApiState) -> Observer {
    Observer { node: state.node_id, now: state.clock.now() }
}

/// Takes `from` and `to`, cut to now.
pub(super) fn read_span(params: &mut Params, now: Moment) -> Result<Span, ApiError> {
    let (from, to) = (params.moment("from")?, params.moment("to")?);
    span_of(from, to, now)
}

/// The span between two moments that somebody may have named.
pub(super) fn span_of(from: Option<Moment>, to: Option<Moment>, now: Moment) -> Result<Span, ApiError> {
    let to = to.map_or(now, |to| to.min(now));
    let from = from.unwrap_or_else(|| to.before(DEFAULT_SPAN));
    if from >= to {
        return Err(ApiError::bad("from", format!("must lie before the end of the span, {to}")));
    }
    Ok(Span { from, to })
}

/// Takes `as_of`.
pub(super) fn read_as_of(params: &mut Params, now: Moment) -> Result<Option<Moment>, ApiError> {
    let at = params.moment("as_of")?;
    match at {
        Some(at) if at > now => {
            Err(ApiError::bad("as_of", format!("lies in the future: nothing is known after {now}")))
        }
        at => Ok(at),
    }
}

/// A problem where history before a moment was forgotten.
pub(super) fn refuse_forgotten(name: &str, at: Moment, watch: &Watch) -> Result<(), ApiError> {
    match watch.horizon() {
        Some(horizon) if at < horizon => {
            let text = format!("lies before {horizon}: older history was forgotten, nothing is known of it");
            Err(ApiError::bad(name, text))
        }
        _ => Ok(()),
    }
}

/// An agent as of a moment.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PastItem {
    /// The instance uid.
    #[schema(value_type = Uuid)]
    id: InstanceUid,
    #[serde(flatten)]
    known: PastKnown,
}

/// What was known of an agent at a moment.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PastKnown {
    /// The verdict then.
    status: Status,
    /// Since when it had this status; null where that change was forgotten.
    #[schema(value_type = Option<String>, format = DateTime)]
    since: Option<Moment>,
    /// True where that is proven, false where it is known that it was not, null where nobody knows.
    connected: Option<bool>,
    /// The connection that is proven, or whose end is not known to the moment.
    connection_id: Option<i64>,
    /// Why the connection before ended; null while connected, and where no end is on record.
    reason: Option<String>,
    /// False where no node was alive.
    watched: bool,
}

impl PastKnown {
    fn new(agent: &PastAgent, at: Moment, watch: &Watch) -> Self {
        let Finding { state, connection_id, reason, watched } = look(agent.stay.as_ref(), watch, at);
        let connected = match state {
            State::Connected => Some(true),
            State::Disconnected => Some(false),
            State::Unknown => None,
        };
        Self { status: agent.status, since: agent.since, connected, connection_id, reason, watched }
    }
}

/// The status of an agent as of a moment.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PastStatus {
    /// The instance uid.
    #[schema(value_type = Uuid)]
    agent_id: InstanceUid,
    /// The moment.
    #[schema(value_type = String, format = DateTime)]
    as_of: Moment,
    #[serde(flatten)]
    known: PastKnown,
}

/// The counts as of a moment.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PastCounts {
    /// The moment.
    #[schema(value_type = String, format = DateTime)]
    as_of: Moment,
    #[serde(flatten)]
    counts: PastSummary,
}

/// A page of agents as of a moment: the items, how many there are on all pages, and whether more follow.
pub(super) struct PastPage {
    pub(super) agents: Vec<PastItem>,
    pub(super) total: u64,
    pub(super) last: Option<InstanceUid>,
}

/// The agents that match as of a moment.
pub(super) async fn list(
    state: &ApiState,
    filter: AgentFilter,
    at: Moment,
    page: PageRequest<InstanceUid>,
) -> Result<PastPage, ApiError> {
    let without_history =
        "has no history, so that nobody can say who it held for then: leave it or as_of out";
    if filter.healthy.is_some() {
        return Err(ApiError::bad("healthy", without_history));
    }
    if let Some(key) = filter.attributes.keys().next() {
        return Err(ApiError::bad(format!("attr.{key}"), without_history));
    }
    let filter = PastFilter {
        id: filter.id,
        statuses: filter.statuses,
        connected: filter.connected,
        transport: filter.transport,
        prefix: filter.prefix,
        include_retired: filter.include_retired,
    };
    let _turn = state.turn().await?;
    let found = state.store.list_agents_as_of(&filter, at, page, observer(state)).await?;
    refuse_forgotten("as_of", at, &found.watch)?;
    let item = |agent: &PastAgent| PastItem { id: agent.id, known: PastKnown::new(agent, at, &found.watch) };
    Ok(PastPage {
        agents: found.agents.iter().map(item).collect(),
        total: found.total,
        last: found.agents.last().filter(|_| found.more).map(|agent| agent.id),
    })
}

/// One agent as of a moment.
pub(super) async fn status(state: &ApiState, agent: InstanceUid, at: Moment) -> Result<PastStatus, ApiError> {
    let filter = PastFilter { id: Some(agent), include_retired: true, ..PastFilter::default() };
    let page = PageRequest { after: None, limit: 1 };
    let found = state.store.list_agents_as_of(&filter, at, page, observer(state)).await?;
    refuse_forgotten("as_of", at, &found.watch)?;
    let row = found.agents.first().ok_or(ApiError::NoSuchAgent(agent))?;
    Ok(PastStatus { agent_id: agent, as_of: at, known: PastKnown::new(row, at, &found.watch) })
}

/// The counts as of a moment.
pub(super) async fn summary(state: &ApiState, at: Moment) -> Result<PastCounts, ApiError> {
    let _turn = state.turn().await?;
    let (counts, watch) = state.store.summarize_as_of(at, observer(state)).await?;
    refuse_forgotten("as_of", at, &watch)?;
    Ok(PastCounts { as_of: at, counts })
}

//! What is known over a span: of one agent in intervals, of the fleet in steps.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use super::ApiState;
use super::agents::AgentId;
use super::error::{ApiError, BadRequest, OtherForm, Refusals, UnknownAgent};
use super::export::{Representation, Table, document, export};
use super::page::Params;
use super::past::{TimeQuery, observer, read_span, refuse_forgotten};
use super::stream::{BATCH, Batch, Source};
use crate::agent::InstanceUid;
use crate::clock::{Moment, micros};
use crate::store::{MOST_ROWS, Observer, Span, Stay, Store, StoreError};
use crate::timeline::fleet::{Step, steps};
use crate::timeline::{Interval, append, intervals};

/// The most intervals that one document holds; a stream holds any number.
const MOST_INTERVALS: usize = 10_000;

/// The most steps of a fleet's timeline.
const MOST_STEPS: i64 = 2_000;

/// How long a step is if nobody says.
const DEFAULT_STEP: Duration = Duration::from_mins(5);

/// What is known of an agent over a span.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AgentTimeline {
    /// The beginning of the span.
    #[schema(value_type = String, format = DateTime)]
    from: Moment,
    /// Its end: what was asked for, cut to now.
    #[schema(value_type = String, format = DateTime)]
    to: Moment,
    /// In the order of time; they cover the span exactly once.
    intervals: Vec<Interval>,
}

/// Was it connected, and how sure are we?
///
/// Intervals of `connected`, `disconnected` and `unknown` cover the span exactly once, each from `from` up to, and not
/// including, `to`. `connected` is proven by a connection; `disconnected` is known because somebody watched; everything
/// else is `unknown`: between the last proof of a connection and the moment its end was known, after the last sign of
/// life of an open one, and, `watched: false`, where no node was alive or history has been forgotten.
///
/// At most 10,000 intervals in one document; as NDJSON or CSV any number, streamed. An answer that is broken off is
/// incomplete: the store failed while it was read.
#[utoipa::path(get, path = "/api/v1/agents/{id}/timeline", tag = "connections",
    params(
        ("id" = uuid::Uuid, Path, description = "The instance uid", example = "01919d4c-8f2b-7aa0-9d3e-5b1c2d3e4f50"),
        TimeQuery,
    ),
    responses(
        (status = 200, description = "The intervals; a line each as NDJSON or CSV", content(
            (AgentTimeline = "application/json"), (String = "application/x-ndjson"), (String = "text/csv"))),
        BadRequest, UnknownAgent, OtherForm, Refusals,
    ))]
pub(super) async fn of_agent(
    State(state): State<ApiState>,
    AgentId(agent): AgentId,
    form: Representation,
    mut params: Params,
) -> Result<Response, ApiError> {
    let observer = observer(&state);
    let span = read_span(&mut params, observer.now)?;
    params.finish()?;
    state.store.get_agent_row(agent).await?.ok_or(ApiError::NoSuchAgent(agent))?;
    let mut source = Intervals::new(Arc::clone(&state.store), agent, span, observer);
    if form != Representation::Json {
        return export(form, source).await;
    }
    let mut told = Vec::new();
    loop {
        let batch = source.next().await?;
        told.extend(batch.items);
        if told.len() > MOST_INTERVALS {
            let cure = "a shorter span, or Accept: application/x-ndjson";
            let text = format!("the span has more than {MOST_INTERVALS} intervals: ask for {cure}");
            return Err(ApiError::bad("from", text));
        }
        if !batch.more {
            return Ok(document(AgentTimeline { from: span.from, to: span.to, intervals: told }));
        }
    }
}

/// The intervals of an agent, batch by batch: together they are those of the whole span at once.
struct Intervals {
    store: Arc<dyn Store>,
    agent: InstanceUid,
    /// What is not told yet.
    span: Span,
    observer: Observer,
    /// The last stay that was read; it reaches into what is not told yet.
    last: Option<Stay>,
    /// The last interval that was told: the next one may only lengthen it.
    pending: Vec<Interval>,
}

impl Intervals {
    fn new(store: Arc<dyn Store>, agent: InstanceUid, span: Span, observer: Observer) -> Self {
        Self { store, agent, span, observer, last: None, pending: Vec::new() }
    }
}

impl Table for Intervals {
    const COLUMNS: &'static [&'static str] = &["from", "to", "state", "connection_id", "reason", "watched"];
}

impl Source for Intervals {
    type Item = Interval;

    async fn next(&mut self) -> Result<Batch<Interval>, StoreError> {
        while self.span.from < self.span.to {
            let after = self.last.as_ref().map(|stay| (stay.connected_at, stay.id));
            let page = self.store.list_stays(self.agent, self.span, after, BATCH, self.observer).await?;
            let stays: Vec<Stay> = self.last.take().into_iter().chain(page.stays).collect();
            let to = stays.last().filter(|_| page.more).map_or(self.span.to, |stay| stay.connected_at);
            let told = intervals(&stays, &page.watch, Span { from: self.span.from, to });
            self.span.from = to;
            self.last = stays.into_iter().last();
            for interval in told {
                append(&mut self.pending, interval);
            }
            if let Some(last) = self.pending.pop() {
                let told = std::mem::replace(&mut self.pending, vec![last]);
                if !told.is_empty() {
                    return Ok(Batch { items: told, more: true });
                }
            }
        }
        Ok(Batch { items: std::mem::take(&mut self.pending), more: false })
    }
}

/// How far the steps of a fleet's timeline are apart.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "described here, read by `read_step`")]
pub(super) struct StepQuery {
    /// From one step to the next, a whole number of milliseconds such as `30s`, `5m`, `1h`; at most 2,000 of them make a span
    #[param(example = "5m")]
    step: Option<String>,
}

/// The fleet over a span.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FleetTimeline {
    /// The beginning of the span, and the first step.
    #[schema(value_type = String, format = DateTime)]
    from: Moment,
    /// Its end: what was asked for, cut to now.
    #[schema(value_type = String, format = DateTime)]
    to: Moment,
    /// From one step to the next.
    #[schema(example = "5m")]
    step: String,
    /// The steps, in the order of time; the last one ends with the span.
    steps: Vec<Step>,
}

fn read_step(params: &mut Params, span: Span) -> Result<Duration, ApiError> {
    let read = |text: &str| {
        let step = humantime_serde::re::humantime::parse_duration(text).ok()?;
        (!step.is_zero() && step.subsec_nanos().is_multiple_of(1_000_000)).then_some(step)
    };
    let step = params.checked("step", "a duration of whole milliseconds such as 5m", read)?;
    let step = step.unwrap_or(DEFAULT_STEP);
    if micros(span.to.since(span.from)) > micros(step).saturating_mul(MOST_STEPS) {
        let text = format!("makes more than {MOST_STEPS} steps of this span: take longer ones");
        return Err(ApiError::bad("step", text));
    }
    Ok(step)
}

/// How many agents were online, offline or unknown over a span?
///
/// The counts of a step are those of the moment `at`, as `/api/v1/agents/summary?as_of=` tells them; `came` and `went`
/// are the connections that began and ended from there to the next step.
#[utoipa::path(get, path = "/api/v1/fleet/timeline", tag = "agents",
    params(TimeQuery, StepQuery),
    responses((status = 200, description = "The steps", body = FleetTimeline), BadRequest, Refusals))]
pub(super) async fn of_fleet(
    State(state): State<ApiState>,
    mut params: Params,
) -> Result<Json<FleetTimeline>, ApiError> {
    let observer = observer(&state);
    let span = read_span(&mut params, observer.now)?;
    let step = read_step(&mut params, span)?;
    params.finish()?;
    refuse_forgotten("from", span.from, &state.store.watch(observer).await?)?;
    let turn = state.turn().await?;
    let Some(past) = state.store.read_fleet(span, observer).await? else {
        let text =
            format!("leaves more than {MOST_ROWS} connections or changes of status to read: ask for less");
        return Err(ApiError::bad("from", text));
    };
    // It may have been forgotten meanwhile.
    refuse_forgotten("from", span.from, &past.watch)?;
    // Of a large fleet this takes longer than links may wait for their turn.
    let told = tokio::task::spawn_blocking(move || {
        let _until_counted = turn;
        steps(past, span, step)
    });
    let told = told.await;
    let steps = told.map_err(|error| {
        tracing::error!(%error, "the steps of a fleet's timeline could not be counted");
        ApiError::Internal
    })?;
    let step = humantime_serde::re::humantime::format_duration(step).to_string();
    Ok(Json(FleetTimeline { from: span.from, to: span.to, step, steps }))
}

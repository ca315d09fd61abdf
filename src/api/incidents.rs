//! What happened: disconnects that belong together, with their cause.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use super::ApiState;
use super::error::{ApiError, BadRequest, Refusals};
use super::page::Params;
use super::past::{observer, read_span, refuse_forgotten};
use crate::clock::Moment;
use crate::incidents::Incident;
use crate::store::Span;

/// The longest span.
const MAX_SPAN: Duration = Duration::from_hours(7 * 24);

/// How long before the span the usual rates are measured, too.
const BEFORE: Duration = Duration::from_hours(6);

/// The most ends that are looked at: enough for a fleet of 18,000 that leaves 25 times a day, and less than 50 MB.
const MOST_ENDS: u32 = 500_000;

/// What happened in a span.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct IncidentList {
    /// The beginning of the span.
    #[schema(value_type = String, format = DateTime)]
    from: Moment,
    /// Its end; now, where a later one was asked for.
    #[schema(value_type = String, format = DateTime)]
    to: Moment,
    /// From when on all disconnects were looked at: `from`, or later where there were more than 500,000.
    #[schema(value_type = String, format = DateTime)]
    complete_from: Moment,
    /// The incidents, by their first moment.
    incidents: Vec<Incident>,
}

/// Which span.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "described here, read by `Params`")]
pub(super) struct SpanQuery {
    /// The beginning, at most 7 days before the end; 24 hours before it, if nobody says
    #[param(format = DateTime, example = "2026-01-31T00:00:00Z")]
    from: Option<String>,
    /// The end; now, if nobody says
    #[param(format = DateTime, example = "2026-02-01T00:00:00Z")]
    to: Option<String>,
}

/// Disconnects that belong together, by cause.
///
/// One incident for each cause: a node, a peer address or network, an attribute, else the reason that
/// they share. Agents that come and go as usual make none. The usual is measured over the span and the 6 hours
/// before it. Attributes are those that agents report now. What counts is `disconnected_at`, the last
/// proof that an agent was connected: a crash is told when it was, not when it was noticed.
#[utoipa::path(get, path = "/api/v1/fleet/incidents", tag = "connections",
    params(SpanQuery),
    responses(
        (status = 200, description = "The incidents of the span", body = IncidentList),
        BadRequest, Refusals,
    ))]
pub(super) async fn list(
    State(state): State<ApiState>,
    mut params: Params,
) -> Result<Json<IncidentList>, ApiError> {
    let observer = observer(&state);
    let Span { from, to } = read_span(&mut params, observer.now)?;
    params.finish()?;
    if to.since(from) > MAX_SPAN {
        return Err(ApiError::bad("from", "must be at most 7 days before to"));
    }
    let watch = state.store.watch(observer).await?;
    refuse_forgotten("from", from, &watch)?;
    let turn = state.turn().await?;
    // Hours of which history was forgotten are not hours without a disconnect.
    let begins = from.before(BEFORE).max(watch.horizon().unwrap_or_default());
    let observation = state.store.observe(begins, to, MOST_ENDS).await?;
    let complete_from = observation.begins().max(from);
    // Some hundred milliseconds of work: nobody else's request waits for it.
    let told = tokio::task::spawn_blocking(move || {
        let _until_told = turn;
        observation.incidents(from)
    });
    let incidents = told.await.map_err(|error| {
        tracing::error!(%error, "the incidents of a span could not be told");
        ApiError::Internal
    })?;
    Ok(Json(IncidentList { from, to, complete_from, incidents }))
}

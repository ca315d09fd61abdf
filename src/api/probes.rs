//! Whether the server lives, is ready, and what it counts.

use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::ApiState;
use super::error::{ForeignSite, Guarded};
use crate::store::StoreError;

/// How long the store may take for a probe or a scrape: who asks has little patience.
const PROBE: Duration = Duration::from_millis(900);

/// The answer of a probe.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Probe {
    /// `ok`, or why not.
    #[schema(example = "ok")]
    status: String,
}

/// The process lives.
///
/// Needs no token.
#[utoipa::path(get, path = "/healthz", tag = "probes", security(()),
    responses((status = 200, description = "It lives", body = Probe), ForeignSite))]
pub(super) async fn healthz() -> Json<Probe> {
    Json(Probe { status: "ok".to_owned() })
}

/// The server can do its work.
///
/// The store answers, its schema is complete, and the server is not stopping. Needs no token.
#[utoipa::path(get, path = "/readyz", tag = "probes", security(()), responses(
    (status = 200, description = "It is ready", body = Probe),
    (status = 503, description = "It is not, and why", body = Probe),
    ForeignSite,
))]
pub(super) async fn readyz(State(state): State<ApiState>) -> (StatusCode, Json<Probe>) {
    if state.stopping.load(Ordering::Relaxed) {
        return (
            StatusCode::SERVICE_UNAVAILABLE,
            Json(Probe { status: "the server is stopping".to_owned() }),
        );
    }
    let checked = tokio::time::timeout(PROBE, state.store.check()).await;
    match checked.unwrap_or_else(|_| Err(StoreError::Unavailable("no answer in time".to_owned()))) {
        Ok(()) => (StatusCode::OK, Json(Probe { status: "ok".to_owned() })),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, Json(Probe { status: error.to_string() })),
    }
}

/// All metrics, in Prometheus' text format.
///
/// The gauges of the fleet are what the store knows, the same on every node; the rest is this process's own.
#[utoipa::path(get, path = "/metrics", tag = "probes", responses(
    (status = 200, description = "Metrics", body = String, content_type = "text/plain"),
    Guarded,
))]
pub(super) async fn metrics(State(state): State<ApiState>) -> Response {
    let summary = tokio::time::timeout(PROBE, state.store.summarize_agents()).await;
    match summary.unwrap_or_else(|_| Err(StoreError::Unavailable("no answer in time".to_owned()))) {
        Ok(summary) => {
            let gauges = [
                (&state.metrics.agents_online, summary.online),
                (&state.metrics.agents_offline, summary.offline),
                (&state.metrics.agents_error, summary.error),
                (&state.metrics.agents_retired, summary.retired),
            ];
            for (gauge, agents) in gauges {
                gauge.set(f64::from(u32::try_from(agents).unwrap_or(u32::MAX)));
            }
        }
        // The gauges keep what the store said last; everything else is this process's own.
        Err(error) => {
            state.metrics.store_failures.increment(1);
            tracing::debug!(%error, "the fleet's gauges were not refreshed");
        }
    }
    let content_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, content_type)], state.metrics.render()).into_response()
}

//! REST for operators: reads the store and knows nothing of sockets or sessions.
//!
//! Routes are a resource a file; `access` says who may call, `error` is every problem that is
//! answered, `page` the cursor of every list. What is documented in `/openapi.json` is generated
//! from the handlers themselves.

mod access;
mod agents;
mod connections;
mod error;
mod mask;
mod page;
mod probes;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use axum::http::{Method, Uri};
use axum::routing::get;
use axum::{Json, Router, middleware};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::clock::Clock;
use crate::config::Secret;
use crate::metrics::Metrics;
use crate::pulse::Expectations;
use crate::store::Store;

use error::ApiError;

/// What the handlers work with.
#[derive(Clone)]
pub struct ApiState {
    /// What is on record.
    pub store: Arc<dyn Store>,
    /// Time.
    pub clock: Clock,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What operators show; none = everybody may call.
    pub token: Option<Secret>,
    /// What the server expects of agents.
    pub expected: Expectations,
    /// For how long an agent may be offline before it is stale.
    pub stale_after: std::time::Duration,
    /// True once the server stops.
    pub stopping: Arc<AtomicBool>,
}

impl std::fmt::Debug for ApiState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiState").finish_non_exhaustive()
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "opamp-server",
        description = "Who is connected, who was, when and why it ended, and how sure we are.",
        contact(name = "opamp-server"),
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    tags(
        (name = "agents", description = "Agents and their status"),
        (name = "connections", description = "The connection history"),
        (name = "probes", description = "Health, readiness and metrics of the server itself")
    )
)]
struct Description;

/// The router of the operators' listener.
pub fn router(state: ApiState) -> Router {
    let (guarded, mut description) = OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(agents::list))
        .routes(routes!(agents::list_online))
        .routes(routes!(agents::list_offline))
        .routes(routes!(agents::list_error))
        .routes(routes!(agents::list_stale))
        .routes(routes!(agents::summary))
        .routes(routes!(agents::detail))
        .routes(routes!(agents::status))
        .routes(routes!(connections::history))
        .routes(routes!(connections::status_history))
        .routes(routes!(probes::metrics))
        .split_for_parts();
    let (open, probes) = OpenApiRouter::new()
        .routes(routes!(probes::healthz))
        .routes(routes!(probes::readyz))
        .split_for_parts();
    description.merge(probes);
    env!("CARGO_PKG_VERSION").clone_into(&mut description.info.version);
    let description = Arc::new(description);
    guarded
        .route("/openapi.json", get(move || async move { Json(Arc::unwrap_or_clone(description)) }))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(state.clone(), access::require_token))
        .merge(open.method_not_allowed_fallback(method_not_allowed))
        .with_state(state)
}

async fn not_found(uri: Uri) -> ApiError {
    ApiError::NoSuchRoute(uri.path().to_owned())
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::MethodNotAllowed(method.to_string(), uri.path().to_owned())
}

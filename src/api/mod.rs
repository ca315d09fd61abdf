//! REST for operators: reads the store, writes orders into it, and knows nothing of sockets or sessions.
//!
//! Routes are a resource a file; `access` says who may call, `error` is every problem that is
//! answered, `page` the cursor of every list. What is documented in `/openapi.json` is generated
//! from the handlers themselves; `/docs` shows it to people.

mod access;
mod agents;
mod connections;
mod error;
mod export;
mod incidents;
mod mask;
mod nodes;
mod orders;
mod page;
mod past;
mod probes;
mod stream;
mod timeline;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use axum::http::{Method, Uri};
use axum::routing::get;
use axum::{Json, Router, middleware};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use utoipa::openapi::security::{ApiKey, ApiKeyValue, Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use utoipa_swagger_ui::{Config, SwaggerUi};
use uuid::Uuid;

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
    /// This node.
    pub node_id: Uuid,
    /// Is told when an order was written.
    pub ordered: Arc<Notify>,
    /// What operators show; none = everybody may call.
    pub token: Option<Secret>,
    /// True where only requests for this machine by name are answered.
    pub local: bool,
    /// What the server expects of agents.
    pub expected: Expectations,
    /// For how long an agent may be offline before it is stale.
    pub stale_after: std::time::Duration,
    /// True once the server stops.
    pub stopping: Arc<AtomicBool>,
    /// Whose turn it is to ask of the past of the whole fleet; see [`TURNS`].
    pub turns: Arc<Semaphore>,
}

/// How many questions about the past of the whole fleet are answered at once. Each reads much and holds a connection to
/// the store for as long: leases and agents need theirs.
pub const TURNS: usize = 2;

/// How long such a question waits for its turn.
const PATIENCE: Duration = Duration::from_secs(10);

impl ApiState {
    /// Waits for the turn of a question about the past of the whole fleet; it lasts until what is answered is dropped.
    async fn turn(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        let turn = Arc::clone(&self.turns).acquire_owned();
        tokio::time::timeout(PATIENCE, turn).await.ok().and_then(Result::ok).ok_or(ApiError::Busy)
    }
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
        description = "Who is connected, who was, when and why it ended, and how sure we are.\n\n\
            Times are RFC 3339 in UTC with milliseconds, uids are UUID text. Every failure is \
            `application/problem+json` (RFC 9457) with a stable `type`; a wrong parameter is named. \
            What is not here is answered 404, another method 405.",
        contact(name = "opamp-server"),
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    tags(
        (name = "agents", description = "Agents and their status"),
        (name = "connections", description = "The connection history"),
        (name = "probes", description = "Health, readiness and metrics of the server itself")
    ),
    components(schemas(error::Problem)),
    modifiers(&Tokens),
    security(("bearer" = []))
)]
struct Description;

/// The ways to show the operators' token.
struct Tokens;

impl Modify for Tokens {
    fn modify(&self, description: &mut utoipa::openapi::OpenApi) {
        let components = description.components.get_or_insert_default();
        let bearer = Http::builder()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some("`operators.token`; needed where one is set"))
            .build();
        components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
        let header = ApiKeyValue::with_description("X-Service-Token", "The same token");
        components.add_security_scheme("service_token", SecurityScheme::ApiKey(ApiKey::Header(header)));
    }
}

/// Where the description of the API is.
const DESCRIPTION: &str = "/openapi.json";

/// The router of the operators' listener.
pub fn router(state: ApiState) -> Router {
    let (guarded, mut description) = OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(agents::list, orders::delete_many))
        .routes(routes!(agents::list_online))
        .routes(routes!(agents::list_offline))
        .routes(routes!(agents::list_error))
        .routes(routes!(agents::list_stale))
        .routes(routes!(agents::summary))
        .routes(routes!(agents::detail, orders::delete))
        .routes(routes!(agents::status))
        .routes(routes!(orders::reconnect))
        .routes(routes!(nodes::list))
        .routes(routes!(connections::history))
        .routes(routes!(connections::status_history))
        .routes(routes!(connections::history_of_all))
        .routes(routes!(timeline::of_agent))
        .routes(routes!(timeline::of_fleet))
        .routes(routes!(incidents::list))
        .routes(routes!(probes::metrics))
        .split_for_parts();
    let (open, probes) = OpenApiRouter::new()
        .routes(routes!(probes::healthz))
        .routes(routes!(probes::readyz))
        .split_for_parts();
    description.merge(probes);
    env!("CARGO_PKG_VERSION").clone_into(&mut description.info.version);
    let description = Arc::new(description);
    // The page asks no other host: a validator elsewhere is not told of this one.
    let page = SwaggerUi::new("/docs").config(Config::from(DESCRIPTION).validator_url("none"));
    guarded
        .merge(page)
        .route(DESCRIPTION, get(move || async move { Json(Arc::unwrap_or_clone(description)) }))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(state.clone(), access::require_token))
        .merge(open.method_not_allowed_fallback(method_not_allowed))
        .layer(middleware::from_fn_with_state(state.clone(), access::screen))
        .with_state(state)
}

async fn not_found(uri: Uri) -> ApiError {
    ApiError::NoSuchRoute(uri.path().to_owned())
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::MethodNotAllowed(method.to_string(), uri.path().to_owned())
}

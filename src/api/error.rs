//! Every problem the API answers, as `application/problem+json` (RFC 9457) with a stable type.

use std::collections::BTreeMap;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::openapi::example::ExampleBuilder;
use utoipa::openapi::{self, ContentBuilder, Ref, RefOr, ResponseBuilder};
use utoipa::{IntoResponses, ToSchema};

use crate::agent::InstanceUid;
use crate::site::Foreign;
use crate::store::StoreError;

/// The media type of problems.
const PROBLEM: &str = "application/problem+json";

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    #[error("there is no agent {0}")]
    NoSuchAgent(InstanceUid),
    #[error("there is nothing at {0}")]
    NoSuchRoute(String),
    #[error("{0} is not allowed at {1}")]
    MethodNotAllowed(String, String),
    #[error("parameter {name}: {problem}")]
    BadParameter { name: String, problem: String },
    #[error(
        "name the agents to delete by at least one filter: status, connected, healthy, transport, attr.<key> or q"
    )]
    FilterMissing,
    #[error("agent {0} is not connected")]
    NotConnected(InstanceUid),
    #[error("agent {0} polls over plain HTTP: it has no connection that could be closed")]
    NotWebsocket(InstanceUid),
    #[error("agent {0} is connected: add force=true to close its connection and delete it")]
    AgentConnected(InstanceUid),
    #[error("{0}")]
    Foreign(#[from] Foreign),
    #[error(
        "this is answered as application/json, application/x-ndjson or text/csv: let Accept name one of them"
    )]
    NotAcceptable,
    #[error("a body must be application/json")]
    UnsupportedMediaType,
    #[error("show the operators' token: Authorization: Bearer <token>")]
    TokenRequired,
    #[error("the token is not the one this server was started with")]
    InvalidToken,
    #[error("the store is unavailable")]
    StoreUnavailable,
    #[error(
        "few questions about the past of the whole fleet are answered at once, and others came first: ask again"
    )]
    Busy,
    #[error("the store holds data this server cannot read")]
    Internal,
}

/// A problem as answered.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Problem {
    /// Stable name of the kind of problem.
    #[schema(example = "bad-parameter")]
    r#type: &'static str,
    /// The same in words.
    #[schema(example = "Bad parameter")]
    title: &'static str,
    /// The HTTP status.
    #[schema(example = 400)]
    status: u16,
    /// What is wrong with this very request.
    #[schema(example = "parameter limit: must be 1 to 1000")]
    detail: String,
    /// The parameter that is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    parameter: Option<String>,
}

impl ApiError {
    pub(super) fn bad(name: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::BadParameter { name: name.into(), problem: problem.into() }
    }

    fn kind(&self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Self::NoSuchAgent(_) => (StatusCode::NOT_FOUND, "agent-not-found", "Agent not found"),
            Self::NoSuchRoute(_) => (StatusCode::NOT_FOUND, "not-found", "Not found"),
            Self::MethodNotAllowed(..) => {
                (StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", "Method not allowed")
            }
            Self::BadParameter { .. } => (StatusCode::BAD_REQUEST, "bad-parameter", "Bad parameter"),
            Self::FilterMissing => (StatusCode::BAD_REQUEST, "filter-missing", "Filter missing"),
            Self::NotConnected(_) => (StatusCode::CONFLICT, "not-connected", "Not connected"),
            Self::NotWebsocket(_) => (StatusCode::CONFLICT, "not-a-websocket-agent", "Not a WebSocket agent"),
            Self::AgentConnected(_) => (StatusCode::CONFLICT, "agent-connected", "Agent connected"),
            Self::Foreign(Foreign::Origin) => (StatusCode::FORBIDDEN, "foreign-origin", "Foreign origin"),
            Self::Foreign(Foreign::Site) => (StatusCode::FORBIDDEN, "cross-site", "Cross-site request"),
            Self::Foreign(Foreign::Host) => (StatusCode::FORBIDDEN, "foreign-host", "Foreign host"),
            Self::NotAcceptable => (StatusCode::NOT_ACCEPTABLE, "not-acceptable", "Not acceptable"),
            Self::UnsupportedMediaType => {
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", "Unsupported media type")
            }
            Self::TokenRequired => (StatusCode::UNAUTHORIZED, "token-required", "Token required"),
            Self::InvalidToken => (StatusCode::UNAUTHORIZED, "invalid-token", "Invalid token"),
            Self::StoreUnavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, "store-unavailable", "Store unavailable")
            }
            Self::Busy => (StatusCode::SERVICE_UNAVAILABLE, "busy", "Busy"),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal-error", "Internal error"),
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        tracing::warn!(%error, "an operator's request met a failure of the store");
        match error {
            StoreError::Unavailable(_)
            | StoreError::Conflict
            | StoreError::NodeEnded
            | StoreError::Schema(_) => Self::StoreUnavailable,
            StoreError::Corrupt(_) | StoreError::Rejected(_) => Self::Internal,
        }
    }
}

impl ApiError {
    fn problem(&self) -> (StatusCode, Problem) {
        let (status, r#type, title) = self.kind();
        let parameter = match self {
            Self::BadParameter { name, .. } => Some(name.clone()),
            Self::NoSuchAgent(_)
            | Self::NoSuchRoute(_)
            | Self::MethodNotAllowed(..)
            | Self::FilterMissing
            | Self::NotConnected(_)
            | Self::NotWebsocket(_)
            | Self::AgentConnected(_)
            | Self::Foreign(_)
            | Self::NotAcceptable
            | Self::UnsupportedMediaType
            | Self::TokenRequired
            | Self::InvalidToken
            | Self::StoreUnavailable
            | Self::Busy
            | Self::Internal => None,
        };
        (status, Problem { r#type, title, status: status.as_u16(), detail: self.to_string(), parameter })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, problem) = self.problem();
        let mut response = (status, axum::Json(problem)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM));
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// Describes problems for `/openapi.json`, each by the very error that is answered.
fn described(samples: impl IntoIterator<Item = ApiError>) -> BTreeMap<String, RefOr<openapi::Response>> {
    let mut by_status: BTreeMap<String, Vec<Problem>> = BTreeMap::new();
    for sample in samples {
        let (status, problem) = sample.problem();
        by_status.entry(status.as_str().to_owned()).or_default().push(problem);
    }
    let describe = |problems: Vec<Problem>| {
        let titles: Vec<_> = problems.iter().map(|problem| problem.title).collect();
        let examples = problems.iter().map(|problem| {
            let example =
                ExampleBuilder::new().summary(problem.title).value(serde_json::to_value(problem).ok());
            (problem.r#type, example.build())
        });
        let content = ContentBuilder::new()
            .schema(Some(Ref::from_schema_name("Problem")))
            .examples_from_iter(examples)
            .build();
        RefOr::T(ResponseBuilder::new().description(titles.join(", or ")).content(PROBLEM, content).build())
    };
    by_status.into_iter().map(|(status, problems)| (status, describe(problems))).collect()
}

/// Declares sets of problems that routes may answer.
macro_rules! problems {
    ($($(#[$doc:meta])* $name:ident: [$($sample:expr),+ $(,)?];)*) => {$(
        $(#[$doc])*
        pub(super) struct $name;

        impl IntoResponses for $name {
            fn responses() -> BTreeMap<String, RefOr<openapi::Response>> {
                described([$($sample),+])
            }
        }
    )*};
}

/// An agent for examples.
const SOMEBODY: InstanceUid = InstanceUid::from_bytes([
    1, 0x91, 0x9d, 0x4c, 0x8f, 0x2b, 0x7a, 0xa0, 0x9d, 0x3e, 0x5b, 0x1c, 0x2d, 0x3e, 0x4f, 0x50,
]);

problems! {
    /// Of every route.
    ForeignSite: [Foreign::Origin.into(), Foreign::Site.into(), Foreign::Host.into()];
    /// Of every route that needs the token.
    Guarded: [
        Foreign::Origin.into(), Foreign::Site.into(), Foreign::Host.into(),
        ApiError::TokenRequired, ApiError::InvalidToken,
    ];
    /// Of every route that needs the token and the store.
    Refusals: [
        Foreign::Origin.into(), Foreign::Site.into(), Foreign::Host.into(),
        ApiError::TokenRequired, ApiError::InvalidToken, ApiError::StoreUnavailable, ApiError::Busy, ApiError::Internal,
    ];
    /// Of every route with parameters, and for those that others do not have.
    BadRequest: [ApiError::bad("limit", "must be 1 to 1000")];
    /// Of every route about one agent.
    UnknownAgent: [ApiError::NoSuchAgent(SOMEBODY)];
    /// Of every route that has more than one form of answer.
    OtherForm: [ApiError::NotAcceptable];
    /// Of every route that changes something.
    WrongBody: [ApiError::UnsupportedMediaType];
    NotReconnectable: [ApiError::NotConnected(SOMEBODY), ApiError::NotWebsocket(SOMEBODY)];
    AgentConnected: [ApiError::AgentConnected(SOMEBODY)];
    MissingFilter: [ApiError::FilterMissing, ApiError::bad("healthy", "must be true or false")];
}

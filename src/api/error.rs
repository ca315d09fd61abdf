//! Every problem the API answers, as `application/problem+json` (RFC 9457) with a stable type.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::agent::InstanceUid;
use crate::store::StoreError;

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
    #[error("show the operators' token: Authorization: Bearer <token>")]
    TokenRequired,
    #[error("the token is not the one this server was started with")]
    InvalidToken,
    #[error("the store is unavailable")]
    StoreUnavailable,
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
            Self::TokenRequired => (StatusCode::UNAUTHORIZED, "token-required", "Token required"),
            Self::InvalidToken => (StatusCode::UNAUTHORIZED, "invalid-token", "Invalid token"),
            Self::StoreUnavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, "store-unavailable", "Store unavailable")
            }
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal-error", "Internal error"),
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        tracing::warn!(%error, "an operator's request met a failure of the store");
        match error {
            StoreError::Unavailable(_) | StoreError::Conflict | StoreError::Schema(_) => {
                Self::StoreUnavailable
            }
            StoreError::Corrupt(_) | StoreError::Rejected(_) => Self::Internal,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, r#type, title) = self.kind();
        let parameter = match &self {
            Self::BadParameter { name, .. } => Some(name.clone()),
            Self::NoSuchAgent(_)
            | Self::NoSuchRoute(_)
            | Self::MethodNotAllowed(..)
            | Self::TokenRequired
            | Self::InvalidToken
            | Self::StoreUnavailable
            | Self::Internal => None,
        };
        let problem = Problem { r#type, title, status: status.as_u16(), detail: self.to_string(), parameter };
        let mut response = (status, axum::Json(problem)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

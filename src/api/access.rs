//! Who may call: nobody through a page of another site, and with a token set, only who shows it, but for the probes.

use axum::body::HttpBody as _;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use subtle::ConstantTimeEq;

use super::error::ApiError;
use super::{ApiState, nodes};
use crate::site;

/// Lets a request pass that no page of another site sent, and whose body, if any, is JSON.
pub(super) async fn screen(
    State(state): State<ApiState>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let headers = request.headers();
    site::check(|name| headers.get(name).map(HeaderValue::as_bytes), state.local)?;
    // A form of a page can send anything but this type without asking first.
    if !request.method().is_safe() && !request.body().is_end_stream() && !is_json(headers) {
        return Err(ApiError::UnsupportedMediaType);
    }
    Ok(next.run(request).await)
}

fn is_json(headers: &HeaderMap) -> bool {
    let media_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence = media_type.and_then(|value| value.split(';').next()).unwrap_or_default();
    essence.trim().eq_ignore_ascii_case("application/json")
}

/// Lets a request pass that shows the token, compared in constant time.
pub(super) async fn require_token(
    State(state): State<ApiState>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if let Some(token) = &state.token {
        let shown = shown_token(&request).ok_or(ApiError::TokenRequired)?;
        if !bool::from(shown.ct_eq(token.expose().as_bytes())) {
            return Err(ApiError::InvalidToken);
        }
    }
    Ok(next.run(request).await)
}

/// The token of a request: `Authorization: Bearer …`, for the list of nodes `X-Service-Token: …` as well.
fn shown_token(request: &Request) -> Option<&[u8]> {
    if request.uri().path() == nodes::PATH
        && let Some(token) = request.headers().get("x-service-token")
    {
        return Some(token.as_bytes());
    }
    let (scheme, token) = request.headers().get(header::AUTHORIZATION)?.as_bytes().split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

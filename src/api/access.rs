//! Who may call: with an operators' token set, everything needs it but the probes.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use subtle::ConstantTimeEq;

use super::ApiState;
use super::error::ApiError;

/// Lets a request pass that shows the token, compared in constant time.
pub(super) async fn require_token(
    State(state): State<ApiState>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if let Some(token) = &state.token {
        let shown = shown_token(request.headers()).ok_or(ApiError::TokenRequired)?;
        if !bool::from(shown.ct_eq(token.expose().as_bytes())) {
            return Err(ApiError::InvalidToken);
        }
    }
    Ok(next.run(request).await)
}

fn shown_token(headers: &HeaderMap) -> Option<&[u8]> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.as_bytes().split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

//! Query parameters and the pages of every list.
//!
//! [`Params`] hands out each parameter once, with its type; what nobody asked for is a problem that
//! names it, so that a misspelt filter never passes for an answer.

use std::fmt::Display;
use std::str::FromStr;

use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;
use utoipa::IntoParams;

use super::error::ApiError;
use crate::agent::InstanceUid;
use crate::clock::Moment;
use crate::store::{PageRequest, StayPlace};

/// How many items a page has if nobody says.
const DEFAULT_LIMIT: u32 = 100;

/// How many items a page has at most.
const MAX_LIMIT: u32 = 1_000;

/// Which page of a list of agents.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "described here, read by `Params::page`")]
pub(super) struct AgentPageQuery {
    /// Items per page
    #[param(minimum = 1, maximum = 1000, default = 100, example = 100)]
    limit: Option<u32>,
    /// The `next_cursor` of the page before, as it is: what it holds may change
    #[param(format = Uuid)]
    cursor: Option<String>,
}

/// Which page of an agent's history.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "described here, read by `Params::page`")]
pub(super) struct HistoryPageQuery {
    /// Items per page
    #[param(minimum = 1, maximum = 1000, default = 100, example = 100)]
    limit: Option<u32>,
    /// The `next_cursor` of the page before, as it is: what it holds may change
    #[param(pattern = "^[0-9]{1,18}$")]
    cursor: Option<String>,
}

/// Which page of the connections of all agents.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "described here, read by `Params::page`")]
pub(super) struct ConnectionPageQuery {
    /// Items per page
    #[param(minimum = 1, maximum = 1000, default = 100, example = 100)]
    limit: Option<u32>,
    /// The `next_cursor` of the page before, as it is: what it holds may change
    #[param(pattern = "^[0-9]{1,18}[.][0-9]{1,18}$")]
    cursor: Option<String>,
}

/// What the last item of a page is known by.
pub(super) trait Cursor: Sized {
    /// Reads it as it was given out, and in no other form.
    fn read(text: &str) -> Option<Self>;
}

impl Cursor for InstanceUid {
    fn read(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl Cursor for i64 {
    fn read(text: &str) -> Option<Self> {
        let digits = text.len() <= 18 && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|_| digits)
    }
}

impl Cursor for StayPlace {
    fn read(text: &str) -> Option<Self> {
        let (micros, id) = text.split_once('.')?;
        Some((Moment::from_micros(i64::read(micros)?), i64::read(id)?))
    }
}

/// The query parameters of a request that nobody has asked for yet.
#[derive(Debug)]
pub(super) struct Params {
    pairs: Vec<(String, String)>,
}

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let Query(pairs): Query<Vec<(String, String)>> = Query::try_from_uri(&parts.uri)
            .map_err(|_| ApiError::bad("query", "is not a valid query string"))?;
        // No database keeps this character in a text, so nothing can match it.
        match pairs.iter().find(|(key, value)| key.contains('\0') || value.contains('\0')) {
            Some((key, _)) => Err(ApiError::bad(key.replace('\0', "\u{fffd}"), "must not contain NUL")),
            None => Ok(Self { pairs }),
        }
    }
}

impl Params {
    /// Takes the parameter `name`; twice the same is a problem.
    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        let mut found: Vec<(String, String)> = self.pairs.extract_if(.., |(key, _)| key == name).collect();
        let first = found.pop();
        if found.is_empty() {
            Ok(first.map(|(_, value)| value))
        } else {
            Err(ApiError::bad(name, "is given twice"))
        }
    }

    /// Takes all parameters whose name begins with `prefix`, without the prefix.
    pub(super) fn prefixed(&mut self, prefix: &str) -> Vec<(String, String)> {
        let found = self.pairs.extract_if(.., |(key, _)| key.starts_with(prefix));
        found.map(|(key, value)| (key[prefix.len()..].to_owned(), value)).collect()
    }

    /// Takes the parameter `name` as a `T`.
    pub(super) fn parsed<T: FromStr<Err: Display>>(
        &mut self,
        name: &str,
        what: &str,
    ) -> Result<Option<T>, ApiError> {
        self.checked(name, what, |text| text.parse().ok())
    }

    /// Takes the parameter `name` as a moment.
    pub(super) fn moment(&mut self, name: &str) -> Result<Option<Moment>, ApiError> {
        self.checked(name, "an RFC 3339 time such as 2026-01-31T03:42:00Z", Moment::parse)
    }

    /// Takes the parameter `name` as whatever `read` makes of it.
    pub(super) fn checked<T>(
        &mut self,
        name: &str,
        what: &str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        read(&text).map(Some).ok_or_else(|| ApiError::bad(name, format!("must be {what}")))
    }

    /// Takes `limit` and `cursor`.
    pub(super) fn page<K: Cursor>(&mut self) -> Result<PageRequest<K>, ApiError> {
        let limit = self
            .checked("limit", "1 to 1000", |text| {
                text.parse().ok().filter(|limit| (1..=MAX_LIMIT).contains(limit))
            })?
            .unwrap_or(DEFAULT_LIMIT);
        let after = self.checked("cursor", "the next_cursor of the page before", K::read)?;
        Ok(PageRequest { after, limit })
    }

    /// A problem, if anything is left.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        match self.pairs.into_iter().next() {
            None => Ok(()),
            Some((name, _)) => Err(ApiError::bad(name, "is not a parameter of this route")),
        }
    }
}

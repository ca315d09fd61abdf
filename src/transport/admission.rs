//! Who may connect, how many at once, and when to come back.
//!
//! Refusals are answers to the HTTP request, before any upgrade: once upgraded and closed, real
//! agents redial at once and without delay.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::StatusCode;
use hyper::header::{self, HeaderMap, HeaderValue};
use subtle::ConstantTimeEq;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Answer, text};
use crate::burden::Budget;
use crate::clock::Rate;

use crate::config::Secret;
use crate::history::History;
use crate::metrics::Refused;
use crate::pulse::Link;
use crate::site::{self, Foreign};

/// Seconds after which a refused agent may come back: spread, so that they do not come at once.
const COME_BACK: std::ops::RangeInclusive<u32> = 30..=60;

/// How long the writes that wait for the store may take at its present pace before newcomers have to come later.
const LONGEST_QUEUE: Duration = Duration::from_secs(5);

/// How many sockets beyond `agents.max_connections` are kept until they are answered that it is full.
const DOORWAY: usize = 64;

/// Why a request is not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Denied {
    /// A browser sent it for a page of somebody else.
    Foreign(Foreign),
    /// It shows no token.
    TokenRequired,
    /// It shows a wrong one.
    InvalidToken,
    /// The server is stopping.
    Closed,
    /// As many links as allowed are open.
    Full,
    /// As many came in the last second as allowed.
    Rate,
    /// The store is away: nobody new can be put on record.
    Store,
}

impl Denied {
    /// What the refusal is counted as.
    pub(super) fn cause(self) -> Refused {
        match self {
            Self::Foreign(Foreign::Origin) => Refused::ForeignOrigin,
            Self::Foreign(Foreign::Site) => Refused::CrossSite,
            Self::Foreign(Foreign::Host) => Refused::ForeignHost,
            Self::TokenRequired | Self::InvalidToken => Refused::Unauthorized,
            Self::Closed => Refused::Draining,
            Self::Full => Refused::Connections,
            Self::Rate => Refused::Rate,
            Self::Store => Refused::Store,
        }
    }

    /// What the peer is answered.
    pub(super) fn answer(self) -> Answer {
        match self {
            Self::Foreign(foreign) => text(StatusCode::FORBIDDEN, &format!("{foreign}\n")),
            Self::TokenRequired => {
                unauthorized("agent_token_required", "show the agents' token: Authorization: Bearer <token>")
            }
            Self::InvalidToken => {
                unauthorized("invalid_agent_token", "the token is not the one this server was started with")
            }
            Self::Closed | Self::Full | Self::Rate | Self::Store => come_back_later(),
        }
    }
}

/// What the agents' listener allows.
#[derive(Clone, Debug)]
pub struct Limits {
    /// The path agents connect at.
    pub path: String,
    /// What agents show; none = everybody may connect.
    pub token: Option<Secret>,
    /// True where only requests for this machine by name are answered.
    pub local: bool,
    /// The most sockets open at once, whatever they speak.
    pub max_connections: usize,
    /// The most newcomers let in per second.
    pub max_connects_per_second: usize,
    /// The budget for messages from their first byte until what they changed is stored, in bytes.
    pub max_inflight: usize,
    /// The largest message in bytes, also unpacked.
    pub max_message_size: usize,
    /// The most agents on one link.
    pub max_per_link: usize,
}

/// The gate of the agents' listener.
#[derive(Debug)]
pub struct Admission {
    limits: Limits,
    budget: Budget,
    closed: AtomicBool,
    /// The open links, to wake them when the server stops.
    links: Mutex<Links>,
    rate: Rate,
    /// Room for those who find every place taken, while they are told so.
    doorway: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Links {
    next: u64,
    open: HashMap<u64, Arc<Link>>,
}

/// A place among the open links, given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    admission: Arc<Admission>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.admission.links().open.remove(&self.number);
    }
}

impl Admission {
    /// An open gate.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let budget = Budget::new(limits.max_inflight);
        let (links, rate) = (Mutex::default(), Rate::new(limits.max_connects_per_second));
        let doorway = Arc::new(Semaphore::new(DOORWAY));
        Self { limits, budget, closed: AtomicBool::new(false), links, rate, doorway }
    }

    /// What is allowed.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The memory for unfinished messages.
    pub(super) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// True where one more newcomer is let in now; counts it. None is while openings queue up:
    /// whoever is let in is answered soon.
    pub(super) fn admits_newcomer(&self, history: &History) -> bool {
        history.delay() <= LONGEST_QUEUE && self.rate.take(history.clock().tick())
    }

    /// How many links are open.
    #[must_use]
    pub fn open_links(&self) -> usize {
        self.links().open.len()
    }

    /// Admits nobody from now on.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// Tells links that carry no agent to close.
    pub fn dismiss(&self) {
        let links: Vec<Arc<Link>> = self.links().open.values().cloned().collect();
        for link in links {
            link.dismiss();
        }
    }

    fn links(&self) -> std::sync::MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room to be refused in; none where even that is taken.
    pub(super) fn doorway(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.doorway).try_acquire_owned().ok()
    }

    /// Refuses while the gate is closed.
    pub(super) fn admit(&self) -> Result<(), Denied> {
        if self.closed.load(Ordering::Relaxed) { Err(Denied::Closed) } else { Ok(()) }
    }

    /// Takes a place among the open links, as long as there is one.
    pub(super) fn take_place(admission: &Arc<Self>, link: &Arc<Link>) -> Result<Place, Denied> {
        let mut links = admission.links();
        if links.open.len() >= admission.limits.max_connections {
            return Err(Denied::Full);
        }
        let number = links.next;
        links.next += 1;
        links.open.insert(number, Arc::clone(link));
        Ok(Place { admission: Arc::clone(admission), number })
    }

    /// Refuses what a browser sends for a page of somebody else.
    pub(super) fn screen(&self, headers: &HeaderMap) -> Result<(), Denied> {
        let find = |name: &str| headers.get(name).map(HeaderValue::as_bytes);
        site::check(find, self.limits.local).map_err(Denied::Foreign)
    }

    /// Refuses a request without the token, in constant time (S-022, S-023).
    pub(super) fn authorize(&self, headers: &HeaderMap) -> Result<(), Denied> {
        let Some(token) = &self.limits.token else { return Ok(()) };
        let shown = shown_token(headers).ok_or(Denied::TokenRequired)?;
        if bool::from(shown.ct_eq(token.expose().as_bytes())) { Ok(()) } else { Err(Denied::InvalidToken) }
    }
}

/// The token of a request: `Authorization: Bearer …` or `Secret-Key: …`.
fn shown_token(headers: &HeaderMap) -> Option<&[u8]> {
    if let Some(key) = headers.get("secret-key") {
        return Some(key.as_bytes());
    }
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.as_bytes().split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

fn unauthorized(error: &str, message: &str) -> Answer {
    let body = serde_json::json!({ "error": error, "message": message }).to_string();
    let mut answer = text(StatusCode::UNAUTHORIZED, &body);
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    answer
}

/// 503 with the moment to come back (S-138).
pub(super) fn come_back_later() -> Answer {
    let mut answer = text(StatusCode::SERVICE_UNAVAILABLE, "the server admits no agents now\n");
    answer.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(fastrand::u32(COME_BACK)));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(max_connections: usize) -> Arc<Admission> {
        Arc::new(Admission::new(Limits {
            path: "/v1/opamp".to_owned(),
            token: Some(Secret::from("123456".to_owned())),
            local: false,
            max_connections,
            max_connects_per_second: 1,
            max_inflight: 1,
            max_message_size: 1,
            max_per_link: 1,
        }))
    }

    fn status(name: &'static str, value: &'static str) -> u16 {
        let headers =
            HeaderMap::from_iter([(header::HeaderName::from_static(name), HeaderValue::from_static(value))]);
        gate(1).authorize(&headers).map_or_else(|denied| denied.answer().status().as_u16(), |()| 200)
    }

    #[test]
    fn s_023_the_token_comes_as_bearer_or_secret_key() {
        assert_eq!(status("authorization", "Bearer 123456"), 200);
        assert_eq!(status("authorization", "bearer  123456"), 200);
        assert_eq!(status("secret-key", "123456"), 200);
        assert_eq!(status("authorization", "Bearer 12345"), 401);
        assert_eq!(status("authorization", "Basic 123456"), 401);
        assert_eq!(status("authorization", "B"), 401);
        assert_eq!(status("accept", "*/*"), 401);
    }

    #[test]
    fn a_place_is_given_back() {
        let (gate, link) = (gate(1), Arc::new(Link::default()));
        let place = Admission::take_place(&gate, &link).unwrap();
        let refusal = Admission::take_place(&gate, &link).unwrap_err().answer();
        assert_eq!(refusal.status(), StatusCode::SERVICE_UNAVAILABLE);
        let seconds: u32 = refusal.headers()[header::RETRY_AFTER].to_str().unwrap().parse().unwrap();
        assert!(COME_BACK.contains(&seconds));
        drop(place);
        assert!(Admission::take_place(&gate, &link).is_ok());
    }
}

//! Why an agent is without its link, and how long it waits before it tries again.
//!
//! Promises one short label per cause, fit for counting, and the patience of real agents: at once
//! after a break, then ever longer, never shorter than the server asked for. Must not know the
//! conversation on the link.

use std::{borrow::Cow, io, time::Duration};

use fastrand::Rng;
use hyper::{HeaderMap, StatusCode, header::RETRY_AFTER};
use tokio_tungstenite::tungstenite::{Error as WebSocketError, error::ProtocolError};

const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// For a `Retry-After` that names a date: the least that agents are told to wait.
const UNREADABLE_RETRY_AFTER: Duration = Duration::from_secs(30);
/// What a Close frame without a code counts as.
const NO_CODE: u16 = 1005;

/// Why a link could not be opened, or ended against the agent's wish.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Loss {
    /// The server answered the handshake or the poll with this status.
    Refused(StatusCode, Option<Duration>),
    /// The server sent a Close frame.
    Closed(u16),
    /// The server asked, in an offer, to come back later.
    Unavailable(Option<Duration>),
    /// The server ended the TCP connection without a Close frame.
    Eof,
    Io(io::ErrorKind),
    TimedOut,
    /// The server broke the protocol in the way named.
    Malformed(&'static str),
}

impl Loss {
    pub(crate) fn refused(status: StatusCode, headers: &HeaderMap) -> Self {
        let retry_after = headers.get(RETRY_AFTER).map(|value| {
            let seconds = value.to_str().ok().and_then(|text| text.trim().parse().ok());
            seconds.map_or(UNREADABLE_RETRY_AFTER, Duration::from_secs)
        });
        Self::Refused(status, retry_after)
    }

    pub(crate) fn closed(code: Option<u16>) -> Self {
        Self::Closed(code.unwrap_or(NO_CODE))
    }

    pub(crate) fn label(&self) -> Cow<'static, str> {
        match self {
            Self::Refused(status, _) => format!("http_{}", status.as_u16()).into(),
            Self::Closed(code) => format!("close_{code}").into(),
            Self::Unavailable(_) => "unavailable".into(),
            Self::Eof => "eof".into(),
            Self::Io(kind) => io_label(*kind).into(),
            Self::TimedOut => "timed_out".into(),
            Self::Malformed(what) => (*what).into(),
        }
    }

    /// Whether the very same report is worth another try. Agents drop what the server refused,
    /// unless it was only too busy.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Refused(status, _) => {
                [StatusCode::SERVICE_UNAVAILABLE, StatusCode::TOO_MANY_REQUESTS].contains(status)
            }
            Self::Closed(_) | Self::Eof | Self::Io(_) | Self::TimedOut => true,
            Self::Unavailable(_) | Self::Malformed(_) => false,
        }
    }

    fn retry_after(&self) -> Duration {
        match self {
            Self::Refused(_, wait) | Self::Unavailable(wait) => wait.unwrap_or_default(),
            Self::Closed(_) | Self::Eof | Self::Io(_) | Self::TimedOut | Self::Malformed(_) => Duration::ZERO,
        }
    }

    /// Whether a link that worked went away by surprise, which calls for an immediate return.
    fn is_break(&self) -> bool {
        matches!(self, Self::Closed(_) | Self::Eof | Self::Io(_))
    }
}

fn io_label(kind: io::ErrorKind) -> &'static str {
    use io::ErrorKind as Kind;
    let labels = [
        (Kind::ConnectionRefused, "connect_refused"),
        (Kind::ConnectionReset, "reset"),
        (Kind::ConnectionAborted, "reset"),
        (Kind::BrokenPipe, "reset"),
        (Kind::AddrNotAvailable, "no_local_port"),
        (Kind::AddrInUse, "no_local_port"),
        (Kind::TimedOut, "timed_out"),
    ];
    let known = labels.into_iter().find(|(known, _)| *known == kind);
    known.map_or("io", |(_, label)| label)
}

impl From<io::Error> for Loss {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return Self::Eof;
        }
        Self::Io(error.kind())
    }
}

impl From<WebSocketError> for Loss {
    fn from(error: WebSocketError) -> Self {
        use WebSocketError as E;
        match error {
            E::Io(error) => error.into(),
            E::Http(response) => Self::refused(response.status(), response.headers()),
            E::ConnectionClosed
            | E::AlreadyClosed
            | E::Protocol(ProtocolError::ResetWithoutClosingHandshake | ProtocolError::HandshakeIncomplete) => {
                Self::Eof
            }
            E::Capacity(_) => Self::Malformed("too_large"),
            E::Protocol(_)
            | E::Utf8(_)
            | E::AttackAttempt
            | E::HttpFormat(_)
            | E::Tls(_)
            | E::Url(_)
            | E::WriteBufferFull(_) => Self::Malformed("websocket"),
        }
    }
}

/// How often the agent has failed since it was last answered.
#[derive(Debug)]
pub(crate) struct Backoff {
    failures: u32,
    /// Instead of the ever longer waits of real agents.
    pause: Option<Duration>,
}

impl Backoff {
    /// For an agent that was never answered, so that no failure can be a break. With a `pause`, every
    /// wait is half of that or more; the server's wish remains the least.
    pub(crate) fn new(pause: Option<Duration>) -> Self {
        Self { failures: 1, pause }
    }

    /// How long an agent that left by itself stays away; it comes back as one that was never answered.
    pub(crate) fn restart(&mut self, rng: &mut Rng) -> Duration {
        self.failures = 1;
        jittered(self.pause.unwrap_or(FIRST_WAIT), rng)
    }

    pub(crate) fn answered(&mut self) {
        self.failures = 0;
    }

    /// How long to wait before the next attempt.
    pub(crate) fn after(&mut self, loss: &Loss, rng: &mut Rng) -> Duration {
        let doublings = self.failures.saturating_sub(1).min(10);
        let longest = FIRST_WAIT.saturating_mul(1 << doublings).min(LONGEST_WAIT);
        let own = if let Some(pause) = self.pause {
            jittered(pause, rng)
        } else if self.failures == 0 && loss.is_break() {
            Duration::ZERO
        } else {
            jittered(longest, rng)
        };
        self.failures += 1;
        own.max(loss.retry_after())
    }
}

/// Between half of it and all of it.
fn jittered(wait: Duration, rng: &mut Rng) -> Duration {
    wait.mul_f64(0.5 + rng.f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy(retry_after: &str) -> Loss {
        let mut headers = HeaderMap::new();
        if let Ok(value) = retry_after.parse() {
            headers.insert(RETRY_AFTER, value);
        }
        Loss::refused(StatusCode::SERVICE_UNAVAILABLE, &headers)
    }

    #[test]
    fn a_break_is_followed_at_once_then_ever_slower() {
        let (mut backoff, mut rng) = (Backoff::new(None), Rng::with_seed(1));
        backoff.answered();
        let mut wait = || backoff.after(&Loss::Eof, &mut rng);
        assert_eq!(wait(), Duration::ZERO);
        let waits: Vec<_> = (0..12).map(|_| wait()).collect();
        assert!(waits[0] >= FIRST_WAIT / 2 && waits[0] <= FIRST_WAIT);
        assert!(waits[11] >= LONGEST_WAIT / 2 && waits[11] <= LONGEST_WAIT);
    }

    #[test]
    fn a_newcomer_does_not_hurry() {
        let (mut backoff, mut rng) = (Backoff::new(None), Rng::with_seed(1));
        assert!(backoff.after(&Loss::Eof, &mut rng) >= FIRST_WAIT / 2);
    }

    #[test]
    fn an_answer_restores_the_patience() {
        let (mut backoff, mut rng) = (Backoff::new(None), Rng::with_seed(1));
        backoff.after(&Loss::Eof, &mut rng);
        backoff.answered();
        assert_eq!(backoff.after(&Loss::Eof, &mut rng), Duration::ZERO);
    }

    #[test]
    fn the_server_s_wish_is_the_least_wait() {
        let (mut backoff, mut rng) = (Backoff::new(None), Rng::with_seed(1));
        assert_eq!(backoff.after(&busy("7"), &mut rng), Duration::from_secs(7));
        let date = busy("Wed, 21 Oct 2026 07:28:00 GMT");
        assert_eq!(backoff.after(&date, &mut rng), UNREADABLE_RETRY_AFTER);
    }

    #[test]
    fn a_pause_of_one_s_own_grows_not_but_gives_way_to_the_server_s_wish() {
        let pause = Duration::from_millis(100);
        let (mut backoff, mut rng) = (Backoff::new(Some(pause)), Rng::with_seed(1));
        backoff.answered();
        for _ in 0..12 {
            let wait = backoff.after(&Loss::Eof, &mut rng);
            assert!(wait >= pause / 2 && wait <= pause, "{wait:?}");
        }
        assert_eq!(backoff.after(&busy("45"), &mut rng), Duration::from_secs(45));
        assert!(backoff.restart(&mut rng) <= pause);
    }

    #[test]
    fn labels_name_the_cause() {
        assert_eq!(busy("1").label(), "http_503");
        assert_eq!(Loss::closed(Some(1012)).label(), "close_1012");
        assert_eq!(Loss::closed(None).label(), "close_1005");
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        assert_eq!(Loss::from(refused).label(), "connect_refused");
    }
}

//! What the ends of sessions mean for the link that they are on.

use std::sync::atomic::Ordering;

use super::{Services, Session};
use crate::agent::InstanceUid;
use crate::close::CloseReason;
use crate::pulse::Link;

/// What is to become of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outlook {
    /// It goes on. `adrift` where an agent on it lost nothing but its row: it keeps its place and is asked to report,
    /// which opens a new one.
    Open {
        /// True where somebody is to be asked.
        adrift: bool,
    },
    /// Nobody is left on it: it is closed with this reason.
    Close(CloseReason),
    /// Nobody is left on it, and an end is not on record, which may come to say something else than a Close frame
    /// would: nothing is said.
    Break,
}

/// Lets go of the sessions on `link` that were ended elsewhere.
pub fn look_around(
    services: &Services,
    link: &Link,
    sessions: &mut Vec<(InstanceUid, Option<Session>)>,
) -> Outlook {
    let (mut reason, mut adrift, mut untold) = (None, false, false);
    let closing = services.closing.load(Ordering::Relaxed);
    sessions.retain_mut(|(_, session)| {
        let connection = session.as_ref().map(Session::connection);
        let recorded = connection.filter(|connection| connection.is_recorded());
        if recorded.is_some_and(|connection| connection.is_unrecordable()) {
            untold = true;
            return false;
        }
        let ended = recorded.and_then(|connection| connection.ended());
        if ended == Some(CloseReason::ServerLost) && !closing {
            *session = None;
            adrift = true;
            return true;
        }
        reason = reason.or(ended);
        ended.is_none()
    });
    let lonely = sessions.iter().all(|(_, session)| session.is_none());
    match reason {
        _ if untold && sessions.is_empty() => Outlook::Break,
        Some(reason) if sessions.is_empty() => Outlook::Close(reason),
        _ if lonely && link.is_dismissed() => Outlook::Close(CloseReason::ServerShutdown),
        _ => Outlook::Open { adrift },
    }
}

//! Verdicts: nobody is offline who is there, or who had no time to return.

use opamp_server::clock::Moment;
use opamp_server::close::{Cause, CloseReason};

use super::Case;
use super::spans::connected;
use crate::bounds::{CLOCK, EARLIEST, LONG_PAUSE, RETURN_TIME};
use crate::database::Change;
use crate::record::{End, Stay, Trouble, Way};

/// No verdict falls on an agent that is connected, that a server sent away a moment ago, or before its deadline.
pub(super) fn accused(case: &Case<'_>) -> Vec<String> {
    let offline = case.changes.iter().filter(|change| change.to_status == "offline");
    offline.filter_map(|change| wrongly(case, change)).collect()
}

fn wrongly(case: &Case<'_>, change: &Change) -> Option<String> {
    let at = change.at;
    let what = format!("offline at {at} ({})", change.reason);
    let stays = &case.agent.stays;
    let there = stays.iter().flat_map(connected);
    if there.into_iter().any(|span| span.holds(at.before(CLOCK)) && span.holds(at.after(CLOCK))) {
        return Some(format!("{what} while it was connected"));
    }
    // Who left its link of its own will left, whenever that was read.
    if case.stay_of(change.connection_id).is_some_and(|stay| wrongly_after(case, stay, at).is_none()) {
        return None;
    }
    // Whoever tries to return, or did a moment ago, was judged by what came before: the last stay that was answered by then.
    let is_known =
        |stay: &Stay| stay.exchanges.first().is_some_and(|exchange| exchange.answered.after(CLOCK) <= at);
    let mut wrong = None;
    for stay in stays.iter().rev().skip_while(|stay| stay.hello.before(CLOCK) > at) {
        let wrongly = wrongly_after(case, stay, at)?;
        wrong = wrong.or(Some(wrongly));
        if is_known(stay) {
            break;
        }
    }
    let wrong = wrong.unwrap_or_else(|| "before it ever came".to_owned());
    Some(format!("{what} {wrong}"))
}

/// Why a verdict at `at` is wrong, by the stay before it.
fn wrongly_after(case: &Case<'_>, stay: &Stay, at: Moment) -> Option<String> {
    let ended = stay.ended.as_ref().filter(|(ended, _)| *ended <= at.after(CLOCK));
    match ended {
        Some((_, End::Silence | End::Abandon)) => {
            too_early(stay, at).then(|| "before its deadline".to_owned())
        }
        Some((_, end)) if end.is_own() || *end == End::Impatience => None,
        _ if is_late(case, stay) || stay.farewell || is_unheard(case, stay, at) => None,
        _ => in_vain(case, stay, ended.map(|(ended, _)| *ended), at),
    }
}

fn too_early(stay: &Stay, at: Moment) -> bool {
    stay.released.is_none_or(|released| released > at.after(CLOCK))
        && !stay.farewell
        && stay.last_sent.after(EARLIEST) > at
}

/// True where the agent itself, or the host, kept it from speaking for so long that a server may have taken it for silent.
fn is_late(case: &Case<'_>, stay: &Stay) -> bool {
    let end = stay.gone.unwrap_or(case.evidence.now);
    let lag = case.evidence.windows.iter().any(|window| {
        window.trouble == Trouble::Lag && window.node.is_none() && window.overlaps(stay.hello, end)
    });
    lag && stay.longest_gap >= LONG_PAUSE
}

/// True for a poller that nobody heard for its time although somebody listened: its polls went where nobody did.
fn is_unheard(case: &Case<'_>, stay: &Stay, at: Moment) -> bool {
    let heard = stay.exchanges.iter().map(|exchange| exchange.answered).take_while(|heard| *heard <= at);
    stay.way == Way::Http && heard.last().is_some_and(|heard| case.evidence.open_time(heard, at) >= EARLIEST)
}

/// Why the verdict on an agent that did not leave is wrong.
fn in_vain(case: &Case<'_>, stay: &Stay, ended: Option<Moment>, at: Moment) -> Option<String> {
    let Some(sent_away) = ended.max(case.evidence.last_closed(at)) else {
        return Some("although nothing had happened".to_owned());
    };
    let time = at.since(sent_away);
    if time + CLOCK < RETURN_TIME {
        return Some(format!("only {time:?} after it could return, without having left"));
    }
    // One node does not know whom another refused.
    let refused = case.agent.refusals.iter().filter(|_| case.evidence.kind.nodes() == 1).find(|refused| {
        stay.way == Way::Http && **refused <= at && at.since(**refused) + CLOCK < RETURN_TIME
    });
    refused.map(|refused| format!("although its poll was refused at {refused}, which is a sign of life"))
}

/// A change of status follows from the end of its connection: at once where it is the agent's, after the return time where not.
pub(super) fn log(case: &Case<'_>) -> Vec<String> {
    let mut found = Vec::new();
    let mut before: Option<&str> = None;
    for change in &case.changes {
        if change.from_status.as_deref() != before {
            found.push(format!(
                "the change at {} comes from {:?}, and {before:?} was before",
                change.at, change.from_status
            ));
        }
        before = Some(&change.to_status);
        if change.to_status != "offline" {
            continue;
        }
        let row = case.rows.iter().find(|row| Some(row.id) == change.connection_id);
        let Some(row) = row else {
            found.push(format!("offline at {} without a connection", change.at));
            continue;
        };
        let reason = row.disconnect_reason.as_deref().unwrap_or("none: it is open");
        if reason != change.reason {
            found
                .push(format!("offline at {} by {}, row {} says {reason}", change.at, change.reason, row.id));
        }
        let known = row.disconnected_by.or(row.disconnected_at).unwrap_or(change.at);
        let whose = CloseReason::from_label(reason).map(CloseReason::cause);
        if whose == Some(Cause::Server) && change.at.since(known) + CLOCK < RETURN_TIME {
            found.push(format!(
                "offline at {}, {:?} after the server ended row {}",
                change.at,
                change.at.since(known),
                row.id
            ));
        }
    }
    found
}

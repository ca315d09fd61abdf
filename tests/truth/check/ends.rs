//! Ends: whose they are, how sure they are, and what they cost.

use std::time::Duration;

use opamp_server::close::{Cause, CloseReason};

use super::{Case, longest_silence, rows};
use crate::bounds::{CLOCK, LONG_PAUSE, READ, TIMEOUT};
use crate::database::{Kind, Row};
use crate::record::{End, Stay, Trouble, Way};

/// How long before an end a trouble may have begun to show in it.
const TRACE: Duration = Duration::from_secs(3);

/// A stay by WebSocket and the last row that was written for it.
fn held<'a>(case: &'a Case<'_>) -> impl Iterator<Item = (&'a Stay, usize, &'a Row)> {
    case.agent.stays.iter().enumerate().filter(|(_, stay)| stay.way == Way::WebSocket).filter_map(
        |(index, stay)| {
            let until = stay.gone.unwrap_or(case.evidence.now).after(READ);
            let row = case.rows.iter().rev().find(|row| {
                row.remote_addr.as_deref() == Some(&*stay.address)
                    && row.connected_at >= stay.hello.before(CLOCK)
                    && row.connected_at <= until
            });
            Some((stay, index, *row?))
        },
    )
}

/// The reason of every end is one that what happened can have.
pub(super) fn reasons(case: &Case<'_>) -> Vec<String> {
    held(case).filter_map(|(stay, index, row)| reason(case, stay, index, row)).collect()
}

fn reason(case: &Case<'_>, stay: &Stay, index: usize, row: &Row) -> Option<String> {
    let said = row.disconnect_reason.as_deref()?;
    let Some((ended, end)) = &stay.ended else {
        return Some(format!("row {} ended as {said}, and the agent is connected on it", row.id));
    };
    let reason = CloseReason::from_label(said)?;
    // A silent end shows when the socket is given up at the latest.
    let shown = stay.released.unwrap_or(*ended);
    let troubled = case.evidence.disturbed(Some(stay.node), ended.before(TRACE), shown.after(READ));
    let next = case.agent.stays.get(index + 1);
    let soon_back = next.is_some_and(|next| next.hello.since(*ended) < READ);
    if rows::taken_for_lost(case, stay, Some(row), *ended) {
        return None;
    }
    let own_word = match end {
        End::Farewell => CloseReason::AgentDisconnect,
        End::Close => CloseReason::ClosedByAgent,
        End::Finish | End::Reset | End::Impatience => CloseReason::ConnectionLost,
        End::Silence => CloseReason::HeartbeatTimeout,
        End::Abandon => CloseReason::Superseded,
        End::Told(code, word) => {
            // A row whose opening was never answered is nobody's for the server that made it.
            let unanswered = stay.exchanges.is_empty() && reason == CloseReason::ServerLost;
            let told = unanswered || word == said && *code == reason.code();
            let accused = reason.cause() == Cause::Agent && stay.longest_gap < LONG_PAUSE;
            return if !told {
                Some(format!("row {} says {said}, the agent was told {code} {word}", row.id))
            } else if accused {
                Some(format!("row {} says {said}, and the agent spoke all the time", row.id))
            } else {
                None
            };
        }
        End::Broken | End::Refused => {
            let wrong = reason.cause() == Cause::Agent && !stay.farewell;
            let groundless =
                !case.evidence.disturbed(Some(stay.node), ended.before(TRACE * 4), ended.after(READ));
            return (wrong || groundless || reason == CloseReason::InternalError).then(|| {
                format!("row {} says {said}, and the agent saw its link break with a server in trouble: {troubled}", row.id)
            });
        }
    };
    let given_up = stay.released.is_some_and(|released| released < stay.last_sent.after(TIMEOUT + READ));
    let fits = reason == own_word
        || (end != &End::Farewell
            && troubled
            && reason.cause() == Cause::Server
            && reason != CloseReason::InternalError)
        || (end != &End::Farewell && (soon_back || troubled) && reason == CloseReason::Superseded)
        || (end == &End::Abandon
            && matches!(reason, CloseReason::ConnectionLost | CloseReason::HeartbeatTimeout)
            && (troubled || !soon_back))
        || (end == &End::Silence
            && given_up
            && matches!(reason, CloseReason::ConnectionLost | CloseReason::Superseded))
        || (matches!(end, End::Silence | End::Close) && troubled && reason == CloseReason::ConnectionLost)
        || (end == &End::Impatience && reason.cause() == Cause::Server)
        || (stay.farewell && reason == CloseReason::AgentDisconnect);
    (!fits)
        .then(|| format!("row {} says {said}, and the agent left by {end:?} (troubled: {troubled})", row.id))
}

/// An end that the agent showed to a server in good health is on record as seen, at its moment.
pub(super) fn seen(case: &Case<'_>) -> Vec<String> {
    let mut found = Vec::new();
    for (stay, _, row) in held(case) {
        let (Some((ended, end)), Some(at)) = (&stay.ended, row.disconnected_at) else { continue };
        let own = matches!(end, End::Close | End::Finish | End::Farewell);
        let said = row.disconnect_reason.as_deref();
        let shown = matches!(said, Some("agent_disconnect" | "closed_by_agent" | "connection_lost"));
        if !own || !shown || case.evidence.disturbed(Some(stay.node), ended.before(TRACE), ended.after(READ))
        {
            continue;
        }
        let earliest = if *end == End::Farewell { stay.last_sent } else { *ended };
        if row.disconnected_by.is_some() || at < earliest.before(CLOCK) || at > ended.after(READ) {
            found.push(format!(
                "row {}: the end by {end:?} at {ended} was seen, and the row says {at} to {:?}",
                row.id, row.disconnected_by
            ));
        }
    }
    found
}

/// Without trouble it is unknown for no longer than an agent may be silent when its connection ended.
pub(super) fn unknown(case: &Case<'_>) -> Vec<String> {
    let mut found = Vec::new();
    for row in &case.rows {
        let (Some(at), Some(by)) = (row.disconnected_at, row.disconnected_by) else { continue };
        let silence = if row.transport == "http" { longest_silence(case.agent) } else { TIMEOUT };
        let time = by.since(at);
        if time > silence + READ && !case.evidence.disturbed(None, at.before(TRACE), by.after(CLOCK)) {
            found.push(format!(
                "row {}: it is unknown for {time:?} when it ended, and nothing was wrong",
                row.id
            ));
        }
    }
    found
}

/// Who starts ends what its predecessor left before it is ready: with one node, nobody else ends it as lost.
pub(super) fn inherited(case: &Case<'_>) -> Vec<String> {
    if case.evidence.kind == Kind::TwoNodes {
        return Vec::new();
    }
    let late = case.rows.iter().filter_map(|row| {
        let by = row.disconnected_by?;
        let lost = row.disconnect_reason.as_deref() == Some("server_lost");
        let in_a_start = case.evidence.windows.iter().any(|window| {
            window.trouble == Trouble::Down && window.overlaps(by.before(CLOCK), by.after(CLOCK))
        });
        // Who was displaced shortly before the loss had fled from it.
        let fled = case.rows.iter().any(|next| next.connected_at == by);
        (lost && !in_a_start && !fled).then(|| {
            format!("row {} is known as lost only from {by}, and no server was starting then", row.id)
        })
    });
    late.collect()
}

/// Full state is asked for where a number does not continue, and once.
pub(super) fn asked(case: &Case<'_>) -> Vec<String> {
    let mut found = Vec::new();
    for ask in &case.agent.asked {
        let Some(previous) = ask.previous else { continue };
        if ask.lost || case.evidence.disturbed(None, previous.before(TRACE), ask.at) {
            continue;
        }
        // What one node heard a moment ago the other may not have read yet.
        if case.evidence.kind == Kind::TwoNodes && ask.at.since(previous) < READ {
            continue;
        }
        let what = if ask.again { "although it had just sent it" } else { "although its numbers continued" };
        found.push(format!("asked for full state at {}, {what}", ask.at));
    }
    found
}

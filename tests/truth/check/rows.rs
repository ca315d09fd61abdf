//! Rows of the history against the times in which the agent was connected or away.

use opamp_server::clock::Moment;

use super::Case;
use super::spans::{Span, connected};
use crate::bounds::{AFTERMATH, CLOCK, EARLIEST};
use crate::database::{Kind, Row};
use crate::record::{Stay, Trouble, Way};

/// Rows are whole, in order, do not overlap, and at most one is open.
pub(super) fn shape(case: &Case<'_>) -> Vec<String> {
    let mut found = Vec::new();
    for row in &case.rows {
        let ordered = row.disconnected_at.is_none_or(|end| row.connected_at <= end)
            && (row.disconnected_by.is_none() || row.disconnected_at <= row.disconnected_by);
        if !ordered || row.disconnected_at.is_some() != row.disconnect_reason.is_some() {
            found.push(format!("row {} is not in order: {row:?}", row.id));
        }
        let lasted = row.disconnected_at.map(|end| end.since(row.connected_at).as_secs());
        if row.seconds.map(i64::unsigned_abs) != lasted || (row.transport == "http") != row.node_id.is_none()
        {
            found.push(format!("row {} does not fit together: {row:?}", row.id));
        }
    }
    for pair in case.rows.windows(2) {
        match pair[0].disconnected_at {
            None => found.push(format!("row {} is open although row {} is newer", pair[0].id, pair[1].id)),
            Some(end) if end > pair[1].connected_at => {
                found.push(format!("rows {} and {} overlap", pair[0].id, pair[1].id));
            }
            Some(_) if pair[0].disconnected_by.is_some_and(|by| by > pair[1].connected_at.after(CLOCK)) => {
                found.push(format!(
                    "row {} is unknown until after row {} began: the newcomer was the proof",
                    pair[0].id, pair[1].id
                ));
            }
            Some(_) => {}
        }
    }
    found
}

/// The agent's own record says what its rows and its changes of status say.
pub(super) fn record(case: &Case<'_>) -> Vec<String> {
    let id = case.agent.uid.as_uuid();
    let Some(agent) = case.evidence.books.agents.iter().find(|agent| agent.id == id) else {
        return case.rows.iter().map(|row| format!("row {} is of nobody", row.id)).collect();
    };
    let open = case.rows.iter().find(|row| row.disconnected_at.is_none());
    let closed = case.rows.iter().rev().find(|row| row.disconnected_at.is_some());
    let status = case.changes.last().map(|change| &*change.to_status);
    let fits = [
        ("connection", agent.connection_id == open.map(|row| row.id)),
        ("beginning", agent.last_connected_at == case.rows.last().map(|row| row.connected_at)),
        ("end", agent.last_disconnected_at == closed.and_then(|row| row.disconnected_at)),
        ("reason", agent.disconnect_reason == closed.and_then(|row| row.disconnect_reason.clone())),
        ("status", Some(&*agent.status) == status),
    ];
    let wrong = fits.iter().filter(|(_, fits)| !fits);
    wrong.map(|(what, _)| format!("its record says another {what} than its rows: {agent:?}")).collect()
}

/// Whenever the agent was connected beyond doubt, a row says so, or says that it is not known.
pub(super) fn covered(case: &Case<'_>) -> Vec<String> {
    let mut found = Vec::new();
    for stay in &case.agent.stays {
        for span in connected(stay) {
            if let Some(hole) = hole(case, stay, span) {
                found.push(format!(
                    "connected on node {} and on no row from {} to {}",
                    stay.node, hole.from, hole.to
                ));
            }
        }
    }
    found
}

/// The first part of a span that no row covers.
fn hole(case: &Case<'_>, stay: &Stay, span: Span) -> Option<Span> {
    let mut reached = span.from;
    let mut before: Option<&Row> = None;
    for row in &case.rows {
        let end = row.disconnected_by.or(row.disconnected_at).unwrap_or(case.evidence.now);
        if row.connected_at > reached.after(CLOCK) {
            let gap = Span { from: reached, to: row.connected_at.min(span.to) };
            if gap.to > gap.from.after(CLOCK) && !is_excused(case, stay, before, gap) {
                return Some(gap);
            }
        }
        reached = reached.max(end);
        before = Some(row);
        if reached >= span.to {
            return None;
        }
    }
    let rest = Span { from: reached, to: span.to };
    (rest.to > rest.from.after(CLOCK) && !is_excused(case, stay, before, rest)).then_some(rest)
}

/// True where the server could not know better than that the agent was not connected after this row.
fn is_excused(case: &Case<'_>, stay: &Stay, row: Option<&Row>, hole: Span) -> bool {
    taken_for_lost(case, stay, row, hole.to)
        || stopped_between_polls(case, stay, row, hole)
        || ended_elsewhere(case, stay, row, hole)
}

/// A node whose database is away answers whom it knows: that another node was told of a poller's end it cannot know.
fn ended_elsewhere(case: &Case<'_>, stay: &Stay, row: Option<&Row>, hole: Span) -> bool {
    case.evidence.kind == Kind::TwoNodes
        && stay.way == Way::Http
        && row.is_some_and(|row| row.transport == "http")
        && case.evidence.windows.iter().any(|window| {
            window.trouble.is_of_store()
                && window.is_of(stay.node)
                && window.overlaps(hole.from, hole.to)
                && window.to.is_none_or(|to| hole.to <= to.after(EARLIEST))
        })
}

/// The last node that lives ends polls when it stops; the next one may be up before the next poll.
fn stopped_between_polls(case: &Case<'_>, stay: &Stay, row: Option<&Row>, hole: Span) -> bool {
    stay.way == Way::Http
        && row.is_some_and(|row| row.disconnect_reason.as_deref() == Some("server_shutdown"))
        && hole.to.since(hole.from) < EARLIEST
        && case.evidence.windows.iter().any(|window| {
            window.trouble == Trouble::Terminated && window.overlaps(hole.from.before(CLOCK), hole.to)
        })
}

/// A node that was stopped, or lost the database alone, is taken for lost by the other: its agents are unknown
/// there, until it learns that.
pub(super) fn taken_for_lost(case: &Case<'_>, stay: &Stay, row: Option<&Row>, until: Moment) -> bool {
    let Some(row) = row else { return false };
    let Some(proof) = row.disconnected_at else { return false };
    case.evidence.kind == Kind::TwoNodes
        && row.disconnect_reason.as_deref() == Some("server_lost")
        && case.evidence.windows.iter().any(|window| {
            window.is_of(stay.node)
                && (window.trouble.is_of_store() || matches!(window.trouble, Trouble::Stopped | Trouble::Lag))
                && window.overlaps(proof.before(AFTERMATH), until)
        })
}

/// Whenever the agent was away beyond doubt, no row says that it was connected.
pub(super) fn away(case: &Case<'_>) -> Vec<String> {
    let mut found = Vec::new();
    let away = case.away();
    for row in &case.rows {
        let claim = Span { from: row.connected_at, to: row.disconnected_at.unwrap_or(case.evidence.now) };
        for span in &away {
            let overlap = claim.overlap(*span);
            if overlap > CLOCK {
                let what = if row.disconnected_at.is_none() { "is open" } else { "claims it" };
                found.push(format!(
                    "row {} {what} for {overlap:?} in which the agent was away, from {} to {}",
                    row.id, span.from, span.to
                ));
            }
        }
    }
    found
}

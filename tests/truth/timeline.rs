//! What happened to one agent, by the clock, for people: its own record, its rows, its changes of status, and the troubles.

use std::fmt::Write as _;

use opamp_server::clock::Moment;

use crate::check::Evidence;
use crate::record::AgentRecord;

/// The lines, in order of time, in seconds since `start`.
pub(crate) fn timeline(
    start: Moment,
    evidence: &Evidence,
    agent: &AgentRecord,
    notes: &[(Moment, String)],
) -> String {
    let id = agent.uid.as_uuid();
    let mut lines: Vec<(Moment, String)> = Vec::new();
    lines.extend(notes.iter().map(|(at, text)| (*at, format!("        {text}"))));
    lines.extend(agent.notes.iter().map(|(at, text)| (*at, format!("  agent {text}"))));
    for row in evidence.books.rows.iter().filter(|row| row.agent_id == id) {
        let place = row.remote_addr.as_deref().unwrap_or_default();
        let node = row.node_id.map(|node| node.to_string()).unwrap_or_default();
        let opened = format!("    row {} opens: {} {place} {node}", row.id, row.transport);
        lines.push((row.connected_at, opened));
        let reason = row.disconnect_reason.as_deref().unwrap_or_default();
        if let Some(at) = row.disconnected_at {
            lines.push((at, format!("    row {} ends: {reason}", row.id)));
        }
        if let Some(by) = row.disconnected_by {
            lines.push((by, format!("    row {}: its end is known ({reason})", row.id)));
        }
    }
    for change in evidence.books.changes.iter().filter(|change| change.agent_id == id) {
        let from = change.from_status.as_deref().unwrap_or("unknown");
        let text = format!(
            "    status {from} -> {}: {} (row {:?})",
            change.to_status, change.reason, change.connection_id
        );
        lines.push((change.at, text));
    }
    lines.sort_by_key(|(at, _)| *at);
    let mut text = String::new();
    for (at, line) in lines {
        let micros = at.as_micros() - start.as_micros();
        let sign = if micros < 0 { '-' } else { ' ' };
        let millis = micros.unsigned_abs() / 1_000;
        // Into a text nothing fails.
        let _written = writeln!(text, "{sign}{:3}.{:03} {line}", millis / 1_000, millis % 1_000);
    }
    text
}

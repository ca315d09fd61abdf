//! The checker: what is on record against what happened.
//!
//! Every rule is the contract's; how far it bends is in [`crate::bounds`] and nowhere else. A rule looks at one
//! agent and answers the contradictions it found, in words.

mod ends;
mod rows;
mod spans;
mod status;

use std::time::Duration;

use opamp_server::clock::Moment;

use crate::bounds::READ;
use crate::database::{Books, Change, Kind, Row};
use crate::record::{AgentRecord, Stay, Trouble, Way, Window};
pub(crate) use spans::longest_silence;

/// All that is known of a round.
#[derive(Debug)]
pub(crate) struct Evidence {
    pub(crate) kind: Kind,
    pub(crate) windows: Vec<Window>,
    pub(crate) books: Books,
    /// When the books were read.
    pub(crate) now: Moment,
}

/// All that is known of an agent.
#[derive(Debug)]
pub(crate) struct Case<'a> {
    evidence: &'a Evidence,
    agent: &'a AgentRecord,
    rows: Vec<&'a Row>,
    changes: Vec<&'a Change>,
}

/// A rule: its name, by which it can be left out, and what it looks at.
type Rule = (&'static str, fn(&Case<'_>) -> Vec<String>);

const RULES: [Rule; 11] = [
    ("shape", rows::shape),
    ("record", rows::record),
    ("covered", rows::covered),
    ("away", rows::away),
    ("accused", status::accused),
    ("log", status::log),
    ("reasons", ends::reasons),
    ("seen", ends::seen),
    ("unknown", ends::unknown),
    ("inherited", ends::inherited),
    ("asked", ends::asked),
];

impl Evidence {
    /// The contradictions about one agent, but for the rules that are left out.
    pub(crate) fn contradictions(&self, agent: &AgentRecord, without: &[String]) -> Vec<String> {
        let id = agent.uid.as_uuid();
        let case = Case {
            evidence: self,
            agent,
            rows: self.books.rows.iter().filter(|row| row.agent_id == id).collect(),
            changes: self.books.changes.iter().filter(|change| change.agent_id == id).collect(),
        };
        let mut found: Vec<String> = agent.outrages.iter().map(|text| format!("outrage: {text}")).collect();
        for (name, rule) in RULES {
            if !without.iter().any(|left_out| left_out == name) {
                found.extend(rule(&case).into_iter().map(|text| format!("{name}: {text}")));
            }
        }
        found
    }

    /// True where something was broken at a node between two moments.
    fn disturbed(&self, node: Option<usize>, from: Moment, to: Moment) -> bool {
        self.windows
            .iter()
            .any(|window| node.is_none_or(|node| window.is_of(node)) && window.overlaps(from, to))
    }

    /// When a server that lives had read what was sent at `sent`: later where it was stopped or starved, as the host may be.
    fn read_by(&self, sent: Moment, blind: &[Trouble]) -> Moment {
        let mut by = sent.after(READ);
        // A blindness may follow the one before.
        loop {
            let blind = self.windows.iter().filter(|window| blind.contains(&window.trouble));
            let later = blind
                .filter(|window| window.overlaps(sent, by))
                .map(|window| window.to.unwrap_or(self.now).after(READ))
                .max();
            match later {
                Some(later) if later > by => by = later,
                _ => return by,
            }
        }
    }

    /// True where no node could admit anybody.
    fn is_closed(&self, moment: Moment) -> bool {
        (0..self.kind.nodes()).all(|node| {
            self.windows
                .iter()
                .any(|window| window.closes() && window.is_of(node) && window.overlaps(moment, moment))
        })
    }

    /// The last moment up to `at` in which no node could admit anybody.
    fn last_closed(&self, at: Moment) -> Option<Moment> {
        let ends = self.windows.iter().map(|window| window.to.map_or(at, |to| to.min(at)));
        ends.filter(|end| self.is_closed(*end)).max()
    }

    /// For how long between two moments some node could admit.
    fn open_time(&self, from: Moment, to: Moment) -> Duration {
        let turns = self.windows.iter().flat_map(|window| [Some(window.from), window.to]).flatten();
        let mut turns: Vec<Moment> = turns.filter(|turn| from < *turn && *turn < to).collect();
        turns.extend([from, to]);
        turns.sort();
        let open = turns.windows(2).filter(|turn| {
            let length = turn[1].since(turn[0]);
            !self.is_closed(turn[0].after(length / 2))
        });
        open.map(|turn| turn[1].since(turn[0])).sum()
    }
}

impl Case<'_> {
    /// The stay by WebSocket on which a connection was.
    fn stay_of(&self, connection: Option<i64>) -> Option<&Stay> {
        let row = self.rows.iter().find(|row| Some(row.id) == connection)?;
        let address = row.remote_addr.as_deref()?;
        let mut stays = self.agent.stays.iter().rev().filter(|stay| stay.way == Way::WebSocket);
        stays.find(|stay| stay.address == address && stay.hello <= row.connected_at.after(READ))
    }
}

#[cfg(test)]
mod tests;

//! The counts of a fleet at the steps of a span. Pure.
//!
//! Each count is what a summary as of that moment says: every agent is told by the same rule, once for each stretch in
//! which neither its status nor what its row says changes.

use std::collections::HashMap;
use std::time::Duration;

use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Phase, phase};
use crate::clock::{Moment, micros};
use crate::store::{FleetPast, Span, Status, Stay, Transport};

/// The fleet at a moment, and what happened until the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Step {
    /// The moment that is counted.
    #[schema(value_type = String, format = DateTime)]
    pub at: Moment,
    /// Agents with status online.
    pub online: i64,
    /// Agents with status offline.
    pub offline: i64,
    /// Agents with status error.
    pub error: i64,
    /// Of these, agents of whom nobody knows whether they were connected.
    pub unknown: i64,
    /// Connections that began from this moment to the next one.
    pub came: i64,
    /// Connections that ended from this moment to the next one; where an end was not seen, its last proof counts.
    pub went: i64,
}

/// What an agent is for the counts: its status, none where it is not counted, and what its row proves.
type Standing = (Option<Status>, Proof);

/// What the row of an agent says, whoever watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Proof {
    /// Connected, whoever watched.
    Firm,
    /// Connected where somebody watched.
    Polled,
    /// Unknown, whoever watched.
    Open,
    /// Not connected where somebody watched.
    Nothing,
}

fn proof(stay: &Stay, moment: Moment) -> Proof {
    match (phase(stay, moment), stay.transport) {
        (Phase::Proven, Transport::Websocket) => Proof::Firm,
        (Phase::Proven, Transport::Http) => Proof::Polled,
        (Phase::Limbo, _) => Proof::Open,
        (Phase::Over, _) => Proof::Nothing,
    }
}

/// The moments of the steps.
#[derive(Clone, Copy)]
struct Grid {
    from: i64,
    step: i64,
    count: usize,
}

impl Grid {
    fn new(span: Span, step: Duration) -> Self {
        let (from, step) = (span.from.as_micros(), micros(step).max(1));
        let length = span.to.as_micros().saturating_sub(from).max(0);
        let count =
            usize::try_from(length.unsigned_abs().div_ceil(step.unsigned_abs())).unwrap_or(usize::MAX);
        Self { from, step, count }
    }

    fn at(&self, index: usize) -> Moment {
        let steps = i64::try_from(index).unwrap_or(i64::MAX);
        Moment::from_micros(self.from.saturating_add(self.step.saturating_mul(steps)))
    }

    /// The first step at or after a moment.
    fn first_at_or_after(&self, moment: Moment) -> usize {
        let since = u64::try_from(moment.as_micros().saturating_sub(self.from)).unwrap_or(0);
        usize::try_from(since.div_ceil(self.step.unsigned_abs())).unwrap_or(usize::MAX).min(self.count)
    }

    /// The step in which a moment lies; none outside of the span.
    fn holding(&self, moment: Moment) -> Option<usize> {
        let since = u64::try_from(moment.as_micros().checked_sub(self.from)?).ok()?;
        usize::try_from(since / self.step.unsigned_abs()).ok().filter(|index| *index < self.count)
    }
}

/// What changes in the counts at each step, by standing.
struct Changes {
    grid: Grid,
    by_standing: HashMap<Standing, Vec<i64>>,
}

impl Changes {
    /// An agent stands so from one step to before another.
    fn add(&mut self, standing: Standing, from: usize, to: usize) {
        if from >= to || standing.0.is_none_or(|status| status == Status::Retired) {
            return;
        }
        let changes = self.by_standing.entry(standing).or_insert_with(|| vec![0; self.grid.count + 1]);
        changes[from] += 1;
        changes[to] -= 1;
    }

    /// Adds one agent: its statuses and its stays, each in the order of time.
    fn add_agent(&mut self, first: Option<Status>, statuses: &[(Moment, Status)], stays: &[Stay]) {
        let of_stays = stays.iter().flat_map(|stay| {
            [Some(stay.connected_at), stay.disconnected_at.or(stay.confirmed_until), stay.disconnected_by]
        });
        let moments = of_stays.flatten().chain(statuses.iter().map(|(at, _)| *at));
        let grid = self.grid;
        let mut edges: Vec<usize> = moments.map(|moment| grid.first_at_or_after(moment)).collect();
        edges.push(0);
        edges.sort_unstable();
        edges.dedup();
        for (index, from) in edges.iter().copied().enumerate().filter(|(_, from)| *from < grid.count) {
            let to = edges.get(index + 1).copied().unwrap_or(grid.count);
            let at = grid.at(from);
            let changed = statuses.partition_point(|(when, _)| *when <= at);
            let status = changed.checked_sub(1).map_or(first, |last| Some(statuses[last].1));
            let proof = super::begun(stays, at).map_or(Proof::Nothing, |stay| proof(stay, at));
            self.add((status, proof), from, to);
        }
    }
}

/// The counts at every step of a span, which has at least one; the last step ends with the span.
#[must_use]
pub fn steps(past: FleetPast, span: Span, step: Duration) -> Vec<Step> {
    let grid = Grid::new(span, step);
    let mut told: Vec<Step> =
        (0..grid.count).map(|index| Step { at: grid.at(index), ..Step::default() }).collect();
    let mut changes = Changes { grid, by_standing: HashMap::new() };
    let mut statuses: HashMap<Uuid, Vec<(Moment, Status)>> = HashMap::new();
    for (agent, at, status) in past.changes {
        statuses.entry(agent).or_default().push((at, status));
    }
    let mut stays: HashMap<Uuid, Vec<Stay>> = HashMap::new();
    for (agent, stay) in past.stays {
        if let Some(index) = grid.holding(stay.connected_at) {
            told[index].came += 1;
        }
        stays.entry(agent).or_default().push(stay);
    }
    for (agent, first) in past.agents {
        let statuses = statuses.get(&agent).map_or(&[][..], Vec::as_slice);
        let stays = stays.get(&agent).map_or(&[][..], Vec::as_slice);
        changes.add_agent(first, statuses, stays);
    }
    for ((status, proof), changes) in changes.by_standing {
        let mut count = 0;
        for (step, change) in told.iter_mut().zip(changes) {
            count += change;
            match status {
                Some(Status::Online) => step.online += count,
                Some(Status::Offline) => step.offline += count,
                Some(Status::Error) => step.error += count,
                Some(Status::Retired) | None => {}
            }
            let known = proof == Proof::Firm || (proof != Proof::Open && past.watch.at(step.at));
            if !known {
                step.unknown += count;
            }
        }
    }
    for index in past.ends.iter().filter_map(|at| grid.holding(*at)) {
        told[index].went += 1;
    }
    told
}

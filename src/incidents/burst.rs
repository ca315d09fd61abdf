//! Bursts: when more different agents left than chance explains.
//!
//! Knows moments and agents, and nothing of causes.

use std::time::Duration;

use super::observation::AgentNumber;
use super::{GAP, LEAST_AGENTS};
use crate::clock::Moment;

/// The windows that slide over the disconnects, the shortest first.
pub(super) const WINDOWS: [Duration; 3] =
    [Duration::from_mins(1), Duration::from_mins(5), Duration::from_mins(30)];

const HOUR: Duration = Duration::from_hours(1);

/// The expected false alarms of one observation.
const FALSE_ALARMS: f64 = 0.001;

/// How many times the usual a burst is at least.
const LEAST_RATIO: f64 = 3.0;

/// How many times as lively as the median the busiest hours are taken to be at most: what an incident of
/// hours adds beyond that does not pass for a tide.
const TIDE: f64 = 2.0;

/// By which windows the tide is measured: in longer ones an agent that left twice is one agent.
const TIDE_WINDOW: Duration = WINDOWS[1];

/// An hour of less than this many agents has none more often than not.
const UNSEEN_PER_HOUR: f64 = 0.7;

/// A disconnect: when, and who.
pub(super) type Departure = (Moment, AgentNumber);

/// How many different agents leave as a rule.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usual {
    /// By [`WINDOWS`].
    within: [f64; 3],
    /// How many times as many leave in the busy windows of a day, 1 to [`TIDE`].
    busy: f64,
}

impl Usual {
    /// What is usual for some of those for whom this is.
    pub(super) fn share(self, share: f64) -> Self {
        Self { within: self.within.map(|usual| usual * share), ..self }
    }

    /// The larger of both.
    pub(super) fn max(self, other: Self) -> Self {
        let within = std::array::from_fn(|window| self.within[window].max(other.within[window]));
        Self { within, busy: self.busy.max(other.busy) }
    }

    /// How many leave per minute.
    pub(super) fn per_minute(self) -> f64 {
        self.within[0]
    }

    /// How many leave within `span`.
    pub(super) fn within(self, span: Duration) -> f64 {
        self.per_minute() * span.as_secs_f64() / 60.0
    }

    /// How many different agents within each window are a burst, where `trials` windows are looked at.
    pub(super) fn thresholds(self, trials: f64) -> [u32; 3] {
        let surprise = (trials / FALSE_ALARMS).ln();
        self.within.map(|usual| {
            let mut least = LEAST_AGENTS;
            while f64::from(least) < LEAST_RATIO * usual
                || rarity(f64::from(least), usual * self.busy) < surprise
            {
                // In steps of a hundredth: large counts need no exact bound.
                least += 1 + least / 100;
            }
            least
        })
    }
}

/// How rare it is that at least `count` agents leave where `usual` are expected: the negative logarithm
/// of Chernoff's bound of the Poisson tail, which the true probability never exceeds.
fn rarity(count: f64, usual: f64) -> f64 {
    if count <= usual { 0.0 } else { count * (count / usual).ln() - count + usual }
}

/// Counts different agents without clearing anything in between.
#[derive(Debug)]
pub(super) struct Tally {
    round: u64,
    /// By agent: the round in which it was counted last, and how often in it.
    seen: Vec<(u64, u32)>,
    different: u32,
}

impl Tally {
    /// A tally for this many agents.
    pub(super) fn new(agents: usize) -> Self {
        Self { round: 0, seen: vec![(0, 0); agents], different: 0 }
    }

    /// Begins anew.
    pub(super) fn clear(&mut self) {
        self.round += 1;
        self.different = 0;
    }

    /// Counts an agent; true where it is a new one.
    pub(super) fn add(&mut self, agent: AgentNumber) -> bool {
        let (round, times) = &mut self.seen[agent as usize];
        if *round != self.round {
            (*round, *times) = (self.round, 0);
        }
        *times += 1;
        self.different += u32::from(*times == 1);
        *times == 1
    }

    /// Takes back one [`add`](Self::add).
    fn remove(&mut self, agent: AgentNumber) {
        let (_, times) = &mut self.seen[agent as usize];
        *times -= 1;
        self.different -= u32::from(*times == 0);
    }

    /// How many different agents were counted.
    pub(super) fn different(&self) -> u32 {
        self.different
    }

    /// How many different agents are among these.
    pub(super) fn count(&mut self, agents: impl IntoIterator<Item = AgentNumber>) -> u32 {
        self.clear();
        for agent in agents {
            self.add(agent);
        }
        self.different
    }
}

/// The usual number of agents that leave, from all `departures` between `begins` and `ends`, in order of time.
pub(super) fn usual(departures: &[Departure], begins: Moment, ends: Moment, tally: &mut Tally) -> Usual {
    let hour = quantile(&mut counts(departures, begins, ends, HOUR, tally), 5) + UNSEEN_PER_HOUR;
    let mut busy = 1.0_f64;
    let within = WINDOWS.map(|window| {
        let mut counts = counts(departures, begins, ends, window, tally);
        let usual = quantile(&mut counts, 5).max(hour * window.as_secs_f64() / HOUR.as_secs_f64());
        if window == TIDE_WINDOW {
            busy = (quantile(&mut counts, 9) / usual).clamp(1.0, TIDE);
        }
        usual
    });
    Usual { within, busy }
}

/// How many different agents left in each of the windows of this length, one behind the other.
fn counts(
    departures: &[Departure],
    begins: Moment,
    ends: Moment,
    window: Duration,
    tally: &mut Tally,
) -> Vec<u32> {
    let place = |at: Moment| {
        usize::try_from(at.since(begins).as_micros() / window.as_micros().max(1)).unwrap_or(usize::MAX)
    };
    // A last window that is cut short counts only where it is the only one.
    let mut counts = vec![0_u32; place(ends).max(1)];
    let mut current = usize::MAX;
    for (at, agent) in departures {
        let here = place(*at);
        if here != current {
            tally.clear();
            current = here;
        }
        if let Some(count) = counts.get_mut(here) {
            *count += u32::from(tally.add(*agent));
        }
    }
    counts
}

/// The count that this share of `counts`, in tenths, does not exceed.
fn quantile(counts: &mut [u32], tenths: usize) -> f64 {
    let place = (counts.len() * tenths / 10).min(counts.len() - 1);
    f64::from(*counts.select_nth_unstable(place).1)
}

/// The spans of the bursts among `departures`, in order of time: the first and the last disconnect of each.
pub(super) fn bursts(
    departures: &[Departure],
    thresholds: [u32; 3],
    tally: &mut Tally,
) -> Vec<(Moment, Moment)> {
    let mut rest: Vec<Departure> = departures.to_vec();
    let mut found: Vec<(Moment, Moment)> = Vec::new();
    for (window, threshold) in WINDOWS.into_iter().zip(thresholds) {
        let spans = crowded(&rest, window, threshold, tally);
        // A longer window looks at what the shorter ones left: else it would begin long before its burst.
        rest.retain(|(at, _)| !spans.iter().any(|(first, last)| first <= at && at <= last));
        found.extend(spans);
    }
    found.sort_unstable();
    let mut merged: Vec<(Moment, Moment)> = Vec::new();
    for (first, last) in found {
        match merged.last_mut() {
            Some(before) if first <= before.1.after(GAP) => before.1 = before.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

/// The spans covered by windows with at least `threshold` different agents.
fn crowded(
    departures: &[Departure],
    window: Duration,
    threshold: u32,
    tally: &mut Tally,
) -> Vec<(Moment, Moment)> {
    let mut spans: Vec<(Moment, Moment)> = Vec::new();
    let mut left = 0;
    tally.clear();
    for (at, agent) in departures {
        tally.add(*agent);
        while at.since(departures[left].0) > window {
            tally.remove(departures[left].1);
            left += 1;
        }
        if tally.different() >= threshold {
            let first = departures[left].0;
            match spans.last_mut() {
                Some(before) if first <= before.1 => before.1 = *at,
                _ => spans.push((first, *at)),
            }
        }
    }
    spans
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_as_rare_as_the_poisson_tail_or_rarer() {
        // P(X >= 10 | 1) = 1.114e-7, P(X >= 5 | 0.012) = 2.05e-12.
        for (count, usual, tail) in [(10.0, 1.0, 1.114e-7_f64), (5.0, 0.012, 2.05e-12)] {
            let bound = (-rarity(count, usual)).exp();
            assert!(bound >= tail && bound < tail * 100.0, "{bound:e} for {tail:e}");
        }
        assert!(rarity(3.0, 3.0).abs() < f64::EPSILON);
    }

    #[test]
    fn one_agent_that_flaps_is_no_burst_and_raises_no_rate() {
        let minute = |n: i64| Moment::from_micros(n * 60_000_000);
        let flaps: Vec<Departure> =
            (0..24 * 60 * 20).map(|n| (Moment::from_micros(n * 3_000_000), 0)).collect();
        let mut tally = Tally::new(1);
        let usual = usual(&flaps, minute(0), minute(24 * 60), &mut tally);
        assert!(usual.per_minute() <= 1.0, "{usual:?}");
        assert_eq!(bursts(&flaps, usual.thresholds(1.0e6), &mut tally), []);
    }

    #[test]
    fn what_touches_is_one_burst() {
        let at = |seconds: i64| Moment::from_micros(seconds * 1_000_000);
        let departures: Vec<Departure> =
            (0..60).map(|n| (at(i64::from(n) * 20 + 600), n)).chain([(at(5_000), 60)]).collect();
        let spans = bursts(&departures, [3, 10, 30], &mut Tally::new(61));
        assert_eq!(spans, [(at(600), at(600 + 59 * 20))]);
    }
}

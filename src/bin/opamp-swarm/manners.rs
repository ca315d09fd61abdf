//! What agents do besides heartbeats: their health changes, they restart, fall silent or read slowly.
//!
//! Promises that the whole fleet does it at the wanted rate, each agent in its own time, and that a
//! share of the fleet is spread evenly over it and the same in every run. Pure: must not know links,
//! clocks or what an agent reports.

use std::time::Duration;

use fastrand::Rng;

/// The manners of a fleet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Manners {
    /// How often an agent's health changes.
    pub(crate) changes: Pace,
    /// How often an agent restarts.
    pub(crate) restarts: Pace,
    /// Who falls silent once all are connected.
    pub(crate) silent: Share,
    /// Who reads slowly.
    pub(crate) slow: Share,
}

/// How often something happens to one agent, so that it happens to the fleet at a certain rate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// Seconds between two times on average; absent where it never happens.
    mean: Option<f64>,
}

impl Pace {
    /// For `agents` agents to whom it happens `per_second` times a second altogether.
    pub(crate) fn new(per_second: f64, agents: usize) -> Self {
        let agents = f64::from(u32::try_from(agents).unwrap_or(u32::MAX));
        Self { mean: (per_second > 0.0).then(|| agents / per_second) }
    }

    pub(crate) fn is_never(self) -> bool {
        self.mean.is_none()
    }

    /// How long until the next time. Exponential: what many independent agents do comes at no beat.
    pub(crate) fn next(self, rng: &mut Rng) -> Option<Duration> {
        // Never zero, so that the logarithm is finite.
        let chance = 1.0 - rng.f64();
        self.mean.map(|mean| Duration::try_from_secs_f64(mean * -chance.ln()).unwrap_or(Duration::MAX))
    }
}

/// A share of the fleet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    percent: f64,
}

impl Share {
    pub(crate) fn new(percent: f64) -> Self {
        Self { percent }
    }

    /// Whether the agent of this index belongs to it; of the first n agents, n × percent do, rounded down.
    pub(crate) fn has(self, index: usize) -> bool {
        let below = |count: usize| {
            let count = f64::from(u32::try_from(count).unwrap_or(u32::MAX));
            (count * self.percent / 100.0).floor()
        };
        below(index + 1) > below(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_exact_and_spread() {
        for (percent, agents, wanted) in
            [(1.0, 18_000, 180), (0.0, 500, 0), (100.0, 500, 500), (2.5, 1_000, 25), (1.0, 99, 0)]
        {
            let share = Share::new(percent);
            assert_eq!((0..agents).filter(|index| share.has(*index)).count(), wanted, "{percent} %");
        }
        assert_eq!((0..10).filter(|index| Share::new(50.0).has(*index)).collect::<Vec<_>>(), [1, 3, 5, 7, 9]);
    }

    #[test]
    fn the_fleet_keeps_the_rate() {
        let (pace, mut rng) = (Pace::new(50.0, 1_000), Rng::with_seed(1));
        let waits = (0..10_000).filter_map(|_| pace.next(&mut rng));
        let mean = waits.sum::<Duration>() / 10_000;
        // 1,000 agents at 50 a second: each every 20 s.
        assert!(mean > Duration::from_secs(19) && mean < Duration::from_secs(21), "{mean:?}");
    }

    #[test]
    fn without_a_rate_it_never_happens() {
        assert!(Pace::new(0.0, 1_000).is_never());
        assert_eq!(Pace::new(0.0, 1_000).next(&mut Rng::with_seed(1)), None);
    }
}

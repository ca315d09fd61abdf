//! When somebody could have heard an agent, and the record of it is whole. Pure.

use std::time::Duration;

use uuid::Uuid;

use crate::clock::Moment;

/// Who asks: a node that is alive while it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observer {
    /// Which node.
    pub node: Uuid,
    /// When it asks.
    pub now: Moment,
}

impl Observer {
    /// Until when a node is proven to have been alive, not counting that moment itself where the node is another one.
    ///
    /// That is its last renewal: an orderly end renews once more, and one that others wrote proves nothing. Who asks
    /// lives, unless it was ended and has not read that yet.
    pub(super) fn life_of(&self, node: Uuid, renewed_at: Moment, running: bool) -> Moment {
        if running && node == self.node {
            renewed_at.max(self.now.after(Duration::from_micros(1)))
        } else {
            renewed_at
        }
    }
}

/// When the fleet was watched: a node was alive and what it wrote is still on record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Watch {
    horizon: Option<Moment>,
    /// In the order of time, apart from each other, none empty; `from` belongs to a stretch, `to` does not.
    stretches: Vec<(Moment, Moment)>,
}

impl Watch {
    /// The watch of nodes that lived so, each from its first moment to the first one after its life; history before
    /// `horizon` was deleted.
    #[must_use]
    pub fn new(horizon: Option<Moment>, lives: impl IntoIterator<Item = (Moment, Moment)>) -> Self {
        let mut lives: Vec<(Moment, Moment)> = lives
            .into_iter()
            .map(|(from, to)| (horizon.map_or(from, |horizon| from.max(horizon)), to))
            .filter(|(from, to)| from < to)
            .collect();
        lives.sort_unstable();
        let mut stretches: Vec<(Moment, Moment)> = Vec::new();
        for (from, to) in lives {
            match stretches.last_mut() {
                Some((_, end)) if from <= *end => *end = to.max(*end),
                _ => stretches.push((from, to)),
            }
        }
        Self { horizon, stretches }
    }

    /// The greatest moment before which history was ever deleted; none where it is whole.
    #[must_use]
    pub fn horizon(&self) -> Option<Moment> {
        self.horizon
    }

    /// True where the fleet was watched at this moment.
    #[must_use]
    pub fn at(&self, moment: Moment) -> bool {
        let begun = self.stretches.partition_point(|(from, _)| *from <= moment);
        begun.checked_sub(1).is_some_and(|last| moment < self.stretches[last].1)
    }

    /// The moments at which the watch begins or ends, in the order of time.
    pub fn edges(&self) -> impl Iterator<Item = Moment> {
        self.stretches.iter().flat_map(|(from, to)| [*from, *to])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Moment {
        Moment::from_micros(second * 1_000_000)
    }

    #[test]
    fn lives_that_meet_are_one_watch_and_forgotten_time_is_none() {
        let lives =
            [(at(50), at(60)), (at(10), at(20)), (at(20), at(30)), (at(12), at(14)), (at(40), at(40))];
        let watch = Watch::new(Some(at(15)), lives);
        assert_eq!(watch.edges().collect::<Vec<_>>(), [at(15), at(30), at(50), at(60)]);
        let watched: Vec<i64> = (0..70).filter(|second| watch.at(at(*second))).collect();
        assert_eq!(watched, (15..30).chain(50..60).collect::<Vec<_>>());
        assert_eq!(watch.horizon(), Some(at(15)));
        assert!(!Watch::default().at(at(1)));
    }

    #[test]
    fn only_who_asks_is_alive_beyond_its_last_renewal() {
        let (asking, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let observer = Observer { node: asking, now: at(100) };
        assert!(observer.life_of(asking, at(97), true) > at(100), "the present moment is watched");
        assert_eq!(observer.life_of(asking, at(97), false), at(97), "another node took it for lost");
        assert_eq!(observer.life_of(other, at(98), true), at(98));
    }
}

//! Who an agent of the swarm is: a uid and a source of chance, both drawn from seed and index.
//!
//! Promises that the same seed and index always give the same agent, and other seeds or indexes
//! another one. Must not know messages or links.

use fastrand::Rng;
use uuid::{Builder, Uuid};

/// The agents claim to have been born within the year that begins here (2025-01-01, in
/// milliseconds since 1970): their uids look like a grown fleet's and need no clock.
const FIRST_BIRTH_MS: u64 = 1_735_689_600_000;
const YEAR_MS: u64 = 365 * 24 * 60 * 60 * 1000;

/// What a simulated agent keeps of itself from run to run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) index: usize,
    pub(crate) uid: Uuid,
    pub(crate) born_ms: u64,
    seed: u64,
}

impl Identity {
    pub(crate) fn new(seed: u64, index: usize) -> Self {
        let seed = scatter(seed, index);
        let mut rng = Rng::with_seed(seed);
        let born_ms = FIRST_BIRTH_MS + rng.u64(..YEAR_MS);
        let mut random = [0; 10];
        rng.fill(&mut random);
        let uid = Builder::from_unix_timestamp_millis(born_ms, &random).into_uuid();
        Self { index, uid, born_ms, seed }
    }

    /// Chance of the agent's own; each purpose gets a sequence that the others do not disturb.
    pub(crate) fn rng(&self, purpose: usize) -> Rng {
        Rng::with_seed(scatter(self.seed, purpose))
    }
}

/// `SplitMix64`: neighbouring seeds and indexes end far apart.
fn scatter(seed: u64, index: usize) -> u64 {
    let index = u64::try_from(index).unwrap_or(u64::MAX);
    let mut mixed = finish(seed.wrapping_add(0x9e37_79b9_7f4a_7c15));
    mixed = mixed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    finish(mixed)
}

fn finish(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_agents() {
        for index in 0..100 {
            assert_eq!(Identity::new(7, index).uid, Identity::new(7, index).uid);
        }
    }

    #[test]
    fn agents_and_seeds_do_not_collide() {
        let uids = (0..4).flat_map(|seed| (0..5_000).map(move |i| Identity::new(seed, i).uid));
        assert_eq!(uids.collect::<HashSet<_>>().len(), 20_000);
    }

    #[test]
    fn uids_have_the_form_of_version_7() {
        for index in 0..100 {
            let identity = Identity::new(1, index);
            assert_eq!(identity.uid.get_version_num(), 7);
            assert_eq!(identity.uid.get_variant(), uuid::Variant::RFC4122);
            let shown = identity.uid.as_u128() >> 80;
            assert_eq!(shown, u128::from(identity.born_ms));
        }
    }
}

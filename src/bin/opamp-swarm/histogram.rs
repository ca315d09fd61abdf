//! Latencies in fixed buckets, so that memory does not grow with the number of samples.
//!
//! Promises quantiles that are at most 1.6 % too high and a maximum that is exact to the
//! microsecond; recording is lock-free. Must not know what is measured.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Buckets per power of two.
const STEPS: u64 = 64;
const STEP_BITS: u32 = STEPS.trailing_zeros();
/// Samples are counted in microseconds; anything above this bound (19 hours) goes into the last bucket.
const BOUND_BITS: u32 = 36;
const BUCKETS: usize = 64 * (BOUND_BITS - STEP_BITS + 1) as usize;

/// Counts of samples by size.
#[derive(Debug)]
pub(crate) struct Histogram {
    buckets: Box<[AtomicU64]>,
    max: AtomicU64,
}

impl Histogram {
    pub(crate) fn new() -> Self {
        Self { buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(), max: AtomicU64::new(0) }
    }

    pub(crate) fn record(&self, sample: Duration) {
        let micros = u64::try_from(sample.as_micros()).unwrap_or(u64::MAX);
        self.max.fetch_max(micros, Relaxed);
        if let Some(bucket) = self.buckets.get(bucket_of(micros)) {
            bucket.fetch_add(1, Relaxed);
        }
    }

    /// Adds what the other one has counted.
    pub(crate) fn merge(&self, other: &Self) {
        self.max.fetch_max(other.max.load(Relaxed), Relaxed);
        for (mine, theirs) in self.buckets.iter().zip(&other.buckets) {
            mine.fetch_add(theirs.load(Relaxed), Relaxed);
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Relaxed)).sum()
    }

    pub(crate) fn max(&self) -> Duration {
        Duration::from_micros(self.max.load(Relaxed))
    }

    /// The smallest bound that `per_mille` of the samples do not exceed; zero without samples.
    pub(crate) fn quantile(&self, per_mille: u64) -> Duration {
        let rank = (self.count() * per_mille).div_ceil(1000);
        let mut seen = 0;
        for (index, bucket) in self.buckets.iter().enumerate() {
            seen += bucket.load(Relaxed);
            if seen >= rank && seen > 0 {
                return Duration::from_micros(top_of(index)).min(self.max());
            }
        }
        self.max()
    }
}

fn bucket_of(micros: u64) -> usize {
    let micros = micros.min((1 << BOUND_BITS) - 1);
    let shift = micros.max(STEPS).ilog2() - STEP_BITS;
    let index = u64::from(shift) * STEPS + (micros >> shift);
    usize::try_from(index).unwrap_or(BUCKETS)
}

/// The largest sample that falls into the bucket.
fn top_of(index: usize) -> u64 {
    let index = u64::try_from(index).unwrap_or(u64::MAX);
    let shift = (index / STEPS).saturating_sub(1);
    ((index - shift * STEPS + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_contiguous_and_fine() {
        let mut previous = 0;
        for index in 0..BUCKETS {
            let top = top_of(index);
            assert_eq!(bucket_of(top), index);
            assert_eq!(bucket_of(top + 1).min(BUCKETS - 1), (index + 1).min(BUCKETS - 1));
            assert!(index < 128 || (top - previous) * 64 <= top, "bucket {index}");
            previous = top;
        }
    }

    #[test]
    fn quantiles_follow_the_samples() {
        let histogram = Histogram::new();
        for millis in 1..=1000 {
            histogram.record(Duration::from_millis(millis));
        }
        for per_mille in [1, 500, 900, 990, 999, 1000] {
            let exact = Duration::from_millis(per_mille);
            let found = histogram.quantile(per_mille);
            assert!(found >= exact && found <= exact * 1016 / 1000, "{per_mille}: {found:?}");
        }
        assert_eq!(histogram.max(), Duration::from_secs(1));
    }

    #[test]
    fn nothing_recorded_is_zero() {
        assert_eq!(Histogram::new().quantile(990), Duration::ZERO);
    }

    #[test]
    fn merging_keeps_every_sample() {
        let (all, more) = (Histogram::new(), Histogram::new());
        all.record(Duration::from_micros(5));
        more.record(Duration::from_hours(48));
        all.merge(&more);
        assert_eq!(all.count(), 2);
        assert_eq!(all.quantile(500), Duration::from_micros(5));
        assert_eq!(all.max(), Duration::from_hours(48));
    }
}

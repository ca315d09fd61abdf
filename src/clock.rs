//! Time: [`Moment`] is a point in the database's time, [`Tick`] a point of this process's monotonic time.
//!
//! The clock promises that ticks never go back and that reading it takes no lock. Moments are the
//! last measured anchor plus monotonic time, so a jump of the host's wall clock changes nothing
//! until the next anchor. Everything else in the crate receives time as an argument or asks here.

use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::Instant;

/// A point in the database's time: microseconds since the Unix epoch, UTC.
///
/// Written and read as RFC 3339 text, printed with milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Moment(i64);

impl Moment {
    /// The moment `micros` microseconds after the Unix epoch.
    #[must_use]
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// Microseconds since the Unix epoch.
    #[must_use]
    pub const fn as_micros(self) -> i64 {
        self.0
    }

    /// The moment `later` after this one.
    #[must_use]
    pub fn after(self, later: Duration) -> Self {
        Self(self.0.saturating_add(micros(later)))
    }

    /// The moment `earlier` before this one.
    #[must_use]
    pub fn before(self, earlier: Duration) -> Self {
        Self(self.0.saturating_sub(micros(earlier)))
    }

    /// The time from `earlier` to this moment; zero where `earlier` is the later one.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// Reads RFC 3339 text with any offset; `None` where it is not a valid time.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let parsed = OffsetDateTime::parse(text, &Rfc3339).ok()?;
        i64::try_from(parsed.unix_timestamp_nanos() / 1_000).ok().map(Self)
    }
}

/// A duration in whole microseconds, saturating.
pub(crate) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = OffsetDateTime::from_unix_timestamp(self.0.div_euclid(1_000_000)).ok();
        let Some((at, year)) =
            at.and_then(|at| Some((at, u16::try_from(at.year()).ok().filter(|year| *year <= 9_999)?)))
        else {
            return write!(f, "{}us", self.0);
        };
        let millis = u16::try_from(self.0.rem_euclid(1_000_000) / 1_000).unwrap_or_default();
        // A page of a thousand agents has six thousand of them: `write!` takes a tenth of the answer's time.
        let mut text = *b"0000-00-00T00:00:00.000Z";
        let fields = [
            (0..4, year),
            (5..7, u8::from(at.month()).into()),
            (8..10, at.day().into()),
            (11..13, at.hour().into()),
            (14..16, at.minute().into()),
            (17..19, at.second().into()),
            (20..23, millis),
        ];
        for (place, mut value) in fields {
            for digit in text[place].iter_mut().rev() {
                *digit += u8::try_from(value % 10).unwrap_or_default();
                value /= 10;
            }
        }
        f.write_str(str::from_utf8(&text).unwrap_or_default())
    }
}

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Moment {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text)
            .ok_or_else(|| de::Error::custom("expected an RFC 3339 time such as 2026-01-31T03:42:00Z"))
    }
}

/// How long before the making of a clock its ticks begin, so that what was last heard before a
/// start still has a tick: longer than any poller may be silent.
const HEAD_START: Duration = Duration::from_hours(48);

/// A point of this process's monotonic time: microseconds since two days before the clock was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Tick(u64);

impl Tick {
    /// The tick `micros` microseconds after the first one.
    #[must_use]
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    /// Microseconds since the first tick.
    #[must_use]
    pub const fn as_micros(self) -> u64 {
        self.0
    }

    /// The tick `later` after this one.
    #[must_use]
    pub fn after(self, later: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(later.as_micros()).unwrap_or(u64::MAX)))
    }

    /// The tick `earlier` before this one, or the first one.
    #[must_use]
    pub fn before(self, earlier: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(earlier.as_micros()).unwrap_or(u64::MAX)))
    }

    /// The time from `earlier` to this tick; zero where `earlier` is the later one.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// Tells moments and ticks; cheap to clone, all clones share one anchor.
#[derive(Clone, Debug)]
pub struct Clock {
    /// When the clock was made: [`HEAD_START`] after the first tick.
    made: Instant,
    /// Moment of the first tick, in microseconds since the Unix epoch.
    zero: Arc<AtomicI64>,
}

impl Clock {
    /// A clock that reads `now` at this instant.
    #[must_use]
    pub fn anchored(now: Moment) -> Self {
        Self { made: Instant::now(), zero: Arc::new(AtomicI64::new(now.before(HEAD_START).0)) }
    }

    /// Sets the clock so that it read `measured` at `tick`.
    pub fn anchor(&self, measured: Moment, tick: Tick) {
        let elapsed = i64::try_from(tick.0).unwrap_or(i64::MAX);
        self.zero.store(measured.0.saturating_sub(elapsed), Ordering::Relaxed);
    }

    /// The present tick.
    #[must_use]
    pub fn tick(&self) -> Tick {
        Tick::default().after(HEAD_START + self.made.elapsed())
    }

    /// The present moment.
    #[must_use]
    pub fn now(&self) -> Moment {
        self.moment(self.tick())
    }

    /// The moment of `tick` by the present anchor.
    #[must_use]
    pub fn moment(&self, tick: Tick) -> Moment {
        let zero = self.zero.load(Ordering::Relaxed);
        Moment(zero.saturating_add(i64::try_from(tick.0).unwrap_or(i64::MAX)))
    }

    /// The instant of `tick`, for timers; one before the clock was made has passed.
    #[must_use]
    pub fn instant(&self, tick: Tick) -> Instant {
        self.made + Duration::from_micros(tick.0).saturating_sub(HEAD_START)
    }
}

/// The host's wall clock; only a store without a clock of its own asks for it.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the one place that reads the host's wall clock")]
pub fn host_now() -> Moment {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Moment(micros(elapsed))
}

/// So many a second and no more: a bucket that holds as many as one second lets through.
#[derive(Debug)]
pub struct Rate {
    price: Duration,
    /// Until when those let through so far are paid for.
    paid_until: Mutex<Tick>,
}

impl Rate {
    /// A rate of `per_second`, at least one.
    #[must_use]
    pub fn new(per_second: usize) -> Self {
        let price = Duration::from_secs(1) / u32::try_from(per_second.max(1)).unwrap_or(u32::MAX);
        Self { price, paid_until: Mutex::default() }
    }

    /// True where one more may come at `now`.
    pub fn take(&self, now: Tick) -> bool {
        let mut paid_until = self.paid_until.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = (*paid_until).max(now.before(Duration::from_secs(1)));
        let free = now.since(earliest) >= self.price;
        if free {
            *paid_until = earliest.after(self.price);
        }
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_rfc3339_with_milliseconds_and_reads_any_offset() {
        let moment = Moment::from_micros(1_769_830_920_123_456);
        assert_eq!(moment.to_string(), "2026-01-31T03:42:00.123Z");
        assert_eq!(Moment::from_micros(-1).to_string(), "1969-12-31T23:59:59.999Z");
        for text in ["0000-01-01T00:00:00.000Z", "9999-12-31T23:59:59.999Z"] {
            assert_eq!(
                Moment::parse(text).unwrap().to_string(),
                text,
                "the first and the last that have a text"
            );
        }
        assert_eq!(Moment::from_micros(i64::MAX).to_string(), format!("{}us", i64::MAX));
        assert_eq!(
            Moment::parse("2026-01-31T05:42:00.123456+02:00"),
            Some(moment),
            "an offset is converted and microseconds are kept"
        );
        assert_eq!(Moment::parse("yesterday"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_anchor_moves_moments_and_leaves_ticks() {
        let clock = Clock::anchored(Moment::from_micros(1_000_000));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(clock.now(), Moment::from_micros(3_000_000));
        let tick = clock.tick();
        clock.anchor(Moment::from_micros(9_000_000), tick);
        assert_eq!(clock.tick(), tick);
        assert_eq!(clock.moment(tick), Moment::from_micros(9_000_000));
        let last_heard = tick.before(Duration::from_hours(1));
        assert_eq!(clock.now().since(clock.moment(last_heard)), Duration::from_hours(1), "before the start");
    }

    #[test]
    fn a_second_lets_in_so_many_and_the_next_one_as_many_again() {
        let (rate, start) = (Rate::new(10), Tick::from_micros(10_000_000));
        let admitted = |now: Tick| (0..100).filter(|_| rate.take(now)).count();
        assert_eq!(admitted(start), 10, "a burst of one second's worth");
        assert_eq!(admitted(start), 0);
        assert_eq!(admitted(start.after(Duration::from_millis(250))), 2);
        assert_eq!(admitted(start.after(Duration::from_mins(1))), 10, "unused seconds do not add up");
    }
}

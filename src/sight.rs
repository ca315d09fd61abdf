//! Blindness: times in which this server could see nobody, and for which it therefore accuses nobody.
//!
//! The process was stopped or starved, or the store is away. [`Sight::run`] looks at the clock at a
//! steady pace, once every thread that reads links has come round; a look that comes late is a
//! blindness, and until it was noticed [`Sight::can_judge`] says no, so that no verdict falls in between. Every deadline moves by the blindness since the
//! agent was last seen. A time in which newcomers are refused is no blindness, but nobody is accused
//! of not returning in it. It must not know agents, connections or verdicts.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, Tick};
use crate::lanes::Lanes;
use crate::metrics::Metrics;
use crate::outage::Outage;

/// Pace of the looks.
const PACE: Duration = Duration::from_millis(200);

/// A look that comes later than this is a blindness.
const LATE: Duration = Duration::from_secs(1);

/// Why a server is blind that is not stopped.
const AWAY: &str = "the store was away";

/// How long what arrived during a blindness has to be read before anybody is judged.
const SETTLE: Duration = Duration::from_secs(1);

/// How long after the last refusal those refused may still be on their way: they are told to come back within
/// 30 to 60 s.
const COMING_BACK: Duration = Duration::from_secs(65);

/// For how long refusals excuse those who stay away.
const LONGEST_EXCUSE: Duration = Duration::from_mins(10);

/// The most blindnesses that are kept apart; beyond it the oldest two become one.
const KEPT: usize = 64;

/// A time in which nobody was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Blindness {
    from: Tick,
    until: Tick,
    /// True where nothing was read meanwhile, either.
    deaf: bool,
}

/// What this server could see, and when.
#[derive(Debug)]
pub struct Sight {
    clock: Clock,
    metrics: Arc<Metrics>,
    outage: Arc<Outage>,
    began: Tick,
    last_look: AtomicU64,
    /// How many of the store's troubles were noted: a look after it is back notes one, however short it was.
    outages: AtomicUsize,
    /// When a newcomer was refused last, in microseconds; 0 = never.
    refused: AtomicU64,
    /// When the present run of refusals began.
    refusing_since: AtomicU64,
    noticed: AtomicUsize,
    signal: Notify,
    past: Mutex<VecDeque<Blindness>>,
}

impl Sight {
    /// Good sight from now on.
    #[must_use]
    pub fn new(clock: Clock, metrics: Arc<Metrics>, outage: Arc<Outage>) -> Self {
        let began = clock.tick();
        let last_look = AtomicU64::new(began.as_micros());
        let outages = outage.begun();
        Self {
            clock,
            metrics,
            outage,
            began,
            last_look,
            outages: AtomicUsize::new(outages),
            refused: AtomicU64::new(0),
            refusing_since: AtomicU64::new(0),
            noticed: AtomicUsize::new(0),
            signal: Notify::new(),
            past: Mutex::default(),
        }
    }

    /// Looks until `stop` is cancelled, each time after every lane has come round: what came before is known there.
    /// Ends as well when a lane is gone, and with it the sight of its links.
    pub async fn run(self: Arc<Self>, lanes: Lanes, stop: CancellationToken) {
        // What came before the first look was the start.
        self.last_look.store(self.clock.tick().as_micros(), Ordering::Release);
        let (mut away_since, mut refusing) = (None, false);
        let look = async || {
            tokio::time::sleep(PACE).await;
            let began = self.clock.tick();
            self.come_round(&lanes).await.then_some(began)
        };
        while let Some(Some(began)) = stop.run_until_cancelled(look()).await {
            let now = self.clock.tick();
            let mut last = self.last_look();
            if now.since(last) > LATE {
                // Each by itself, so that no time is forgotten and none counts twice.
                if let Some(from) = away_since {
                    self.notice(Blindness { from, until: last, deaf: false }, AWAY);
                    away_since = Some(now);
                }
                let stopped = Blindness { from: last, until: now, deaf: true };
                self.notice(stopped, "the process was stopped or starved");
                last = now;
            }
            let begun = self.outage.begun();
            if self.outage.is_away() {
                away_since = away_since.or(Some(now));
            } else if begun != self.outages.load(Ordering::Relaxed) {
                let from = away_since.take().unwrap_or(last);
                self.notice(Blindness { from, until: now, deaf: false }, AWAY);
                self.outages.store(begun, Ordering::Release);
            }
            if std::mem::replace(&mut refusing, self.is_refusing(now)) && !refusing {
                // Whoever was refused has its whole return time from now on.
                self.noticed.fetch_add(1, Ordering::Release);
            }
            // Last, so that whoever judges by a fresh look knows of every blindness before it. The first lane may have
            // answered long before the last one: what a look in time proves is from when it began.
            let look = if last == now { now } else { began };
            self.last_look.store(look.as_micros(), Ordering::Release);
        }
    }

    /// Waits until every lane has come round, and says so where one does not. False where one is gone.
    async fn come_round(&self, lanes: &Lanes) -> bool {
        let mut round = pin!(lanes.come_round());
        if let Ok(all) = tokio::time::timeout(LATE, &mut round).await {
            return all;
        }
        tracing::warn!("a thread that reads links does not come round; nobody is judged until it does");
        round.await
    }

    fn last_look(&self) -> Tick {
        Tick::from_micros(self.last_look.load(Ordering::Acquire))
    }

    /// Notes a blindness and says so, once.
    fn notice(&self, blindness: Blindness, cause: &str) {
        let length = blindness.until.since(blindness.from);
        self.with(|past| {
            if past.len() == KEPT
                && let Some(oldest) = past.pop_front()
                && let Some(next) = past.front_mut()
            {
                next.from = oldest.from;
                // What lies between them was heard: it forgives, and it proves nothing away.
                next.deaf = false;
            }
            past.push_back(blindness);
        });
        self.noticed.fetch_add(1, Ordering::Release);
        self.signal.notify_one();
        // Whole seconds, rounded up: the server forgives rather too much than too little.
        self.metrics
            .blind_seconds
            .increment(length.as_millis().div_ceil(1_000).try_into().unwrap_or(u64::MAX));
        tracing::warn!(
            seconds = length.as_secs_f64(),
            cause,
            "this server was blind; every deadline moves by as much"
        );
    }

    fn with<T>(&self, act: impl FnOnce(&mut VecDeque<Blindness>) -> T) -> T {
        act(&mut self.past.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// True while the store is away, and until a look has noted that it was.
    fn is_troubled(&self) -> bool {
        self.outage.begun() != self.outages.load(Ordering::Acquire)
    }

    /// True where a verdict may fall at `now`: the last look is fresh, the store is there, and
    /// whatever arrived during the last blindness had its time to be read.
    #[must_use]
    pub fn can_judge(&self, now: Tick) -> bool {
        now.since(self.last_look()) <= LATE
            && !self.is_troubled()
            && self.with(|past| past.back().is_none_or(|last| now >= last.until.after(SETTLE)))
    }

    /// True where it may be held against an agent that it did not return by `now`: it could have.
    #[must_use]
    pub fn can_conclude(&self, now: Tick) -> bool {
        self.can_judge(now) && !self.is_refusing(now)
    }

    /// Notes that a newcomer was refused at `now` for want of room.
    pub fn refuse(&self, now: Tick) {
        let before = self.refused.swap(now.as_micros().max(1), Ordering::Relaxed);
        if before == 0 || now.since(Tick::from_micros(before)) > COMING_BACK {
            self.refusing_since.store(now.as_micros(), Ordering::Relaxed);
        }
    }

    /// True while those who were refused may still be on their way. A server that refuses for long has
    /// no room for its fleet: that excuses nobody for ever.
    #[must_use]
    pub fn is_refusing(&self, now: Tick) -> bool {
        let refused = self.refused.load(Ordering::Relaxed);
        let since = Tick::from_micros(self.refusing_since.load(Ordering::Relaxed));
        refused > 0
            && now.since(Tick::from_micros(refused)) <= COMING_BACK
            && now.since(since) <= LONGEST_EXCUSE
    }

    /// For how long the server was blind since `seen`.
    #[must_use]
    pub fn blindness_since(&self, seen: Tick) -> Duration {
        self.with(|past| past.iter().rev().map(|blind| blind.until.since(blind.from.max(seen))).sum())
    }

    /// What is proved by a sign of life that was read at `seen`: who is read after this process was
    /// stopped was there when it began, and nobody knows how much longer.
    #[must_use]
    pub fn proof(&self, seen: Tick) -> Tick {
        let last_look = self.last_look();
        let unnoticed = (seen.since(last_look) > LATE).then_some(last_look);
        let noticed = self.with(|past| {
            let covers =
                |blind: &&Blindness| blind.deaf && blind.from < seen && seen <= blind.until.after(SETTLE);
            past.iter().find(covers).map(|blind| blind.from)
        });
        noticed.or(unnoticed).unwrap_or(seen)
    }

    /// Since when this server sees and the store is there: its start, or the end of its last blindness.
    #[must_use]
    pub fn resumed(&self, now: Tick) -> Tick {
        let unnoticed = now.since(self.last_look()) > LATE || self.is_troubled();
        if unnoticed { now } else { self.with(|past| past.back().map_or(self.began, |last| last.until)) }
    }

    /// The store's trouble, which blinds as well.
    #[must_use]
    pub fn outage(&self) -> &Arc<Outage> {
        &self.outage
    }

    /// Waits for the next blindness to be noticed. One task waits.
    pub async fn blindness(&self) {
        self.signal.notified().await;
    }

    /// How many blindnesses were noticed so far.
    #[must_use]
    pub fn noticed(&self) -> usize {
        self.noticed.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Moment;
    use crate::outage::Witness;
    use crate::store::StoreError;

    fn sight() -> (Arc<Sight>, Arc<Outage>, Clock) {
        let (clock, metrics) = (Clock::anchored(Moment::default()), Arc::<Metrics>::default());
        let outage = Arc::new(Outage::new(Arc::clone(&metrics)));
        (Arc::new(Sight::new(clock.clone(), metrics, Arc::clone(&outage))), outage, clock)
    }

    /// Plays a story while somebody looks.
    async fn beside_looks(sight: &Arc<Sight>, story: impl Future<Output = ()>) {
        let stop = CancellationToken::new();
        let looking = Arc::clone(sight).run(Lanes::default(), stop.clone());
        let story = async {
            story.await;
            stop.cancel();
        };
        tokio::join!(looking, story);
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_look_is_a_blindness_and_nobody_is_judged_before_it_is_noticed() {
        let (sight, _, clock) = sight();
        assert!(sight.can_judge(clock.tick()));
        let seen = clock.tick();
        tokio::time::advance(Duration::from_secs(10)).await;
        assert!(!sight.can_judge(clock.tick()), "nobody has looked for ten seconds");
        sight.notice(Blindness { from: seen, until: clock.tick(), deaf: true }, "stopped");
        sight.last_look.store(clock.tick().as_micros(), Ordering::Release);
        assert!(!sight.can_judge(clock.tick()), "what arrived meanwhile is to be read first");
        tokio::time::advance(SETTLE).await;
        assert!(sight.can_judge(clock.tick()));
        assert_eq!(sight.blindness_since(seen), Duration::from_secs(10));
        assert_eq!(sight.blindness_since(seen.after(Duration::from_secs(4))), Duration::from_secs(6));
        assert_eq!(sight.blindness_since(clock.tick()), Duration::ZERO);
        assert_eq!(sight.resumed(clock.tick()), seen.after(Duration::from_secs(10)));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_read_after_a_stop_proves_nothing_of_the_time_before() {
        let (sight, _, clock) = sight();
        let began = clock.tick();
        assert_eq!(sight.proof(began), began);
        tokio::time::advance(Duration::from_secs(10)).await;
        let resumed = clock.tick();
        assert_eq!(sight.proof(resumed), began, "also before it was noticed");
        sight.notice(Blindness { from: began, until: resumed, deaf: true }, "stopped");
        sight.last_look.store(resumed.as_micros(), Ordering::Release);
        assert_eq!(sight.proof(resumed.after(SETTLE)), began);
        let later = resumed.after(SETTLE).after(Duration::from_millis(1));
        sight.last_look.store(later.as_micros(), Ordering::Release);
        assert_eq!(sight.proof(later), later);
        assert_eq!(sight.proof(began), began, "what was read before it stands");
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_is_away_blinds_until_it_is_back() {
        let (sight, outage, clock) = sight();
        let began = clock.tick();
        let story = async {
            outage.failed(Witness::Lease, "a test", &StoreError::Conflict);
            tokio::time::sleep(Duration::from_secs(5)).await;
            assert!(!sight.can_judge(clock.tick()));
            outage.written(Witness::Lease);
            tokio::time::sleep(PACE * 2 + SETTLE).await;
            assert!(sight.can_judge(clock.tick()));
        };
        beside_looks(&sight, story).await;
        let blind = sight.blindness_since(began);
        assert!(blind > Duration::from_millis(4_500) && blind < Duration::from_secs(6), "{blind:?}");
        assert_eq!(sight.noticed(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_while_the_store_is_away_leaves_no_part_of_that_out() {
        let (sight, outage, clock) = sight();
        let began = clock.tick();
        let story = async {
            outage.failed(Witness::Lease, "a test", &StoreError::Conflict);
            tokio::time::sleep(Duration::from_secs(5)).await;
            // The clock jumps: nobody looks meanwhile.
            tokio::time::advance(Duration::from_secs(10)).await;
            tokio::time::sleep(Duration::from_secs(5)).await;
            outage.written(Witness::Lease);
            tokio::time::sleep(PACE * 2).await;
        };
        beside_looks(&sight, story).await;
        let blind = sight.blindness_since(began);
        assert!(blind > Duration::from_secs(19) && blind < Duration::from_secs(21), "{blind:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_trouble_that_is_told_and_over_between_two_looks_is_noted() {
        let (sight, outage, clock) = sight();
        let story = async {
            tokio::time::sleep(PACE + PACE / 2).await;
            outage.failed(Witness::Lease, "a call that waited for its deadline", &StoreError::Conflict);
            outage.written(Witness::Lease);
            assert!(!sight.can_judge(clock.tick()), "no look has noted it");
            tokio::time::sleep(PACE).await;
            assert_eq!(sight.noticed(), 1);
            assert!(!sight.can_judge(clock.tick()), "what arrived meanwhile is to be read first");
            tokio::time::sleep(SETTLE).await;
            assert!(sight.can_judge(clock.tick()));
            assert_eq!(sight.noticed(), 1);
        };
        beside_looks(&sight, story).await;
    }

    #[tokio::test(start_paused = true)]
    async fn between_a_return_of_the_store_and_the_look_that_notes_it_nobody_is_judged() {
        let (sight, outage, clock) = sight();
        let story = async {
            outage.failed(Witness::Lease, "a test", &StoreError::Conflict);
            tokio::time::sleep(PACE + PACE / 2).await;
            outage.written(Witness::Lease);
            assert!(!sight.can_judge(clock.tick()));
            tokio::time::sleep(PACE).await;
            assert!(!sight.can_judge(clock.tick()), "what arrived meanwhile is to be read first");
        };
        beside_looks(&sight, story).await;
    }

    /// Waits until `holds`, in real time.
    async fn until(what: &str, holds: impl Fn() -> bool + Send + Sync) {
        let waiting = async {
            while !holds() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), waiting).await.expect(what);
    }

    #[tokio::test]
    async fn a_thread_that_is_stuck_blinds_as_well() {
        let (sight, _, clock) = sight();
        let (threads, stop) = (CancellationToken::new(), CancellationToken::new());
        let lanes = Lanes::start(1, &threads).await.unwrap();
        let stuck = lanes.iter().next().unwrap().clone();
        let story = async {
            let began = sight.last_look();
            until("a look", || sight.last_look() > began).await;
            assert!(sight.can_judge(clock.tick()) && sight.noticed() == 0, "all threads come round");
            let (release, released) = std::sync::mpsc::channel::<()>();
            let stuck = stuck.spawn(async move { released.recv().is_err() });
            until("nobody is judged", || !sight.can_judge(clock.tick())).await;
            assert_eq!(sight.noticed(), 0, "it lasts");
            drop(release);
            assert!(stuck.await.unwrap());
            until("it is noticed", || sight.noticed() == 1).await;
            assert!(sight.blindness_since(began) > LATE);
            stop.cancel();
            threads.cancel();
        };
        tokio::join!(Arc::clone(&sight).run(lanes, stop.clone()), story);
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_refused_is_not_accused_of_staying_away() {
        let (sight, _, clock) = sight();
        let story = async {
            sight.refuse(clock.tick());
            tokio::time::sleep(COMING_BACK).await;
            assert!(sight.can_judge(clock.tick()) && !sight.can_conclude(clock.tick()));
            assert_eq!(sight.noticed(), 0);
            tokio::time::sleep(PACE * 2).await;
            assert!(sight.can_conclude(clock.tick()));
            assert_eq!(sight.noticed(), 1, "return times begin anew");
            for _ in 0..11 {
                sight.refuse(clock.tick());
                tokio::time::sleep(Duration::from_mins(1)).await;
            }
            assert!(sight.can_conclude(clock.tick()), "a server that is full for good excuses nobody");
        };
        beside_looks(&sight, story).await;
    }

    #[test]
    fn a_forgotten_boundary_forgives_too_much_not_too_little() {
        let (sight, _, _) = sight();
        let at = |second: usize| Tick::from_micros(second as u64 * 1_000_000);
        for number in 0..=KEPT {
            let blindness = Blindness { from: at(number * 10), until: at(number * 10 + 1), deaf: false };
            sight.notice(blindness, "a test");
        }
        assert_eq!(sight.with(|past| past.len()), KEPT);
        assert!(sight.blindness_since(at(0)) >= Duration::from_secs(KEPT as u64 + 1));
    }
}

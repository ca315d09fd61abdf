//! Signs of life: when a connection and its link were last heard, and by when they must be heard again.
//!
//! [`Link`] is shared by all connections on one link, [`Pulse`] belongs to one connection. A
//! heartbeat writes into these two and nowhere else: no store, nothing the fleet shares.
//! They must not know what was reported or what follows from silence.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

use crate::clock::Tick;
use crate::store::Transport;

/// Polls that are expected even of the slowest poller: at least one an hour.
const LONGEST_POLL_DEADLINE: Duration = Duration::from_hours(1);

/// A poller is silent once it missed this many of its own gaps.
const SILENT_GAPS: u32 = 3;

/// How many gaps between polls are remembered.
const GAPS: usize = 5;

/// What the server expects of agents.
#[derive(Clone, Copy, Debug)]
pub struct Expectations {
    /// The interval at which agents are expected to report.
    pub interval: Duration,
    /// How long a link may be silent.
    pub timeout: Duration,
}

impl Expectations {
    /// How long an agent has to return after an end the server caused.
    #[must_use]
    pub fn return_time(&self) -> Duration {
        self.timeout * 2
    }

    /// How long a poller may be silent before its second poll.
    #[must_use]
    pub fn first_poll(&self) -> Duration {
        self.timeout.max(self.interval * 3)
    }
}

/// What arrives while a link is not read for longer than this is not dated by its reading; for as long the link has to
/// be read until all of it was.
const ABSENCE: Duration = Duration::from_secs(1);

/// What one link shares with the connections on it.
#[derive(Debug, Default)]
pub struct Link {
    last_byte: AtomicU64,
    agents: AtomicU32,
    /// When the write began that is under way; 0 = none is.
    writing_since: AtomicU64,
    receiving: AtomicBool,
    dismissed: AtomicBool,
    /// True where a first report of an agent was refused on it.
    refused: AtomicBool,
    /// True while a message is being taken in, and the link is not read.
    busy: AtomicBool,
    /// Since when it is read, but for moments: the end of its last absence.
    attentive_since: AtomicU64,
    /// For how long it was not read so far, moments included, in microseconds.
    away: AtomicU64,
    /// The last time for which it was not read for long: from, until. The time in which it was not read again before all
    /// that came was read prolongs it.
    absence: [AtomicU64; 2],
    received: AtomicU64,
    sent: AtomicU64,
    wake: Notify,
}

impl Link {
    /// A link that was just heard.
    #[must_use]
    pub fn heard_at(tick: Tick) -> Self {
        Self { last_byte: AtomicU64::new(tick.as_micros()), ..Self::default() }
    }

    /// Notes that `bytes` bytes came.
    pub fn heard(&self, tick: Tick, bytes: usize) {
        self.last_byte.store(tick.as_micros(), Ordering::Relaxed);
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Notes that `bytes` bytes went out.
    pub fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes received and sent since the last call.
    pub fn harvest(&self) -> (u64, u64) {
        (self.received.swap(0, Ordering::Relaxed), self.sent.swap(0, Ordering::Relaxed))
    }

    /// When bytes came last.
    #[must_use]
    pub fn last_byte(&self) -> Tick {
        Tick::from_micros(self.last_byte.load(Ordering::Relaxed))
    }

    /// Notes that a connection opened on it.
    pub fn enter(&self) {
        self.agents.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that a connection on it ended.
    pub fn leave(&self) {
        self.agents.fetch_sub(1, Ordering::Relaxed);
    }

    /// Notes that an agent's first report was refused.
    pub fn refuse(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }

    /// True where the one agent on it may have said what nobody took, before it had a connection.
    #[must_use]
    pub fn has_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed) && !self.is_shared()
    }

    /// True where it carries several agents.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.agents.load(Ordering::Relaxed) > 1
    }

    /// Notes that a write began at `now`, and waits for the peer to read.
    pub fn write_from(&self, now: Tick) {
        self.writing_since.store(now.as_micros(), Ordering::Relaxed);
    }

    /// Notes that nothing is being written.
    pub fn written(&self) {
        self.writing_since.store(0, Ordering::Relaxed);
    }

    /// For how long a write has been waiting for the peer to read.
    #[must_use]
    pub fn writing_for(&self, now: Tick) -> Duration {
        let since = self.writing_since.load(Ordering::Relaxed);
        if since == 0 { Duration::ZERO } else { now.since(Tick::from_micros(since)) }
    }

    /// Notes whether a message has begun to come and is not whole.
    pub fn set_receiving(&self, receiving: bool) {
        self.receiving.store(receiving, Ordering::Relaxed);
    }

    /// True while a message has begun to come and is not whole.
    #[must_use]
    pub fn is_receiving(&self) -> bool {
        self.receiving.load(Ordering::Relaxed)
    }

    /// Notes that the link is not read until [`attend`](Self::attend): a message of it is being taken in.
    pub fn turn_away(&self) {
        self.busy.store(true, Ordering::Relaxed);
    }

    /// Notes that the link is read again, after it was not since `turned_away`.
    pub fn attend(&self, turned_away: Tick, now: Tick) {
        let (away, [from, until]) = (now.since(turned_away), &self.absence);
        self.away.fetch_add(u64::try_from(away.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
        let last = Tick::from_micros(until.load(Ordering::Relaxed));
        let goes_on = last > Tick::default() && turned_away <= last.after(ABSENCE);
        if goes_on {
            // What waits behind the messages of a long absence waits while each of them is taken in.
            until.store(last.after(away).as_micros(), Ordering::Relaxed);
        } else if away > ABSENCE {
            from.store(turned_away.as_micros(), Ordering::Relaxed);
            until.store(now.as_micros(), Ordering::Relaxed);
        }
        if goes_on || away > ABSENCE {
            self.attentive_since.store(now.as_micros(), Ordering::Relaxed);
        }
        self.busy.store(false, Ordering::Relaxed);
    }

    /// For how long it was not read so far, in microseconds: what was on its way then may have to wait as long.
    #[must_use]
    pub fn time_away(&self) -> u64 {
        self.away.load(Ordering::Relaxed)
    }

    /// What is proved by bytes that were read at `seen`: those read after an absence may have waited all the while.
    #[must_use]
    pub fn proof(&self, seen: Tick) -> Tick {
        let [from, until] =
            self.absence.each_ref().map(|tick| Tick::from_micros(tick.load(Ordering::Relaxed)));
        if from < seen && seen <= until.after(ABSENCE) { from } else { seen }
    }

    /// Since when the link is read, but for moments; none while it is not, and nobody on it can be heard.
    #[must_use]
    pub fn attentive_since(&self) -> Option<Tick> {
        let is_read = !self.busy.load(Ordering::Relaxed);
        is_read.then(|| Tick::from_micros(self.attentive_since.load(Ordering::Relaxed)))
    }

    /// Tells the link to close once it carries no agent.
    pub fn dismiss(&self) {
        self.dismissed.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// True where the link is to close once it carries no agent.
    #[must_use]
    pub fn is_dismissed(&self) -> bool {
        self.dismissed.load(Ordering::Relaxed)
    }

    /// Tells the link's task to look at its connections: one of them was ended elsewhere.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Waits for a [`wake`](Self::wake); one that came before is not lost.
    pub async fn woken(&self) {
        self.wake.notified().await;
    }
}

/// The signs of life of one connection.
#[derive(Debug)]
pub struct Pulse {
    beat: Mutex<Beat>,
}

/// A connection's state of life at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Beat {
    /// When its last report came.
    pub last_report: Tick,
    /// The number that the stored state stands for.
    pub number: Option<u64>,
    /// The number of the last report.
    pub heard: Option<u64>,
    /// True while a reported change is on its way to the store: its number must not be stored either.
    pub unsaved: bool,
    /// How many writes of changes are kept that were answered while the store was away: as above.
    kept: u32,
    /// True where the agent promises heartbeats.
    pub heartbeats: bool,
    /// What the store was last told: when it was seen and its number.
    told: (Tick, Option<u64>),
    /// Gaps between polls in milliseconds, the newest first; 0 = none yet.
    gaps: [u32; GAPS],
    /// Mere signs of life since the last harvest.
    quiet_reports: u32,
}

impl Pulse {
    /// The pulse of a connection that opens at `tick` with this stored number.
    #[must_use]
    pub fn starting(tick: Tick, number: Option<u64>) -> Self {
        let beat = Beat {
            last_report: tick,
            number,
            heard: number,
            unsaved: false,
            kept: 0,
            heartbeats: false,
            told: (tick, number),
            gaps: [0; GAPS],
            quiet_reports: 0,
        };
        Self { beat: Mutex::new(beat) }
    }

    /// The pulse of a poller that goes on, with how long it may be silent if that is on record.
    #[must_use]
    pub fn resuming(tick: Tick, number: Option<u64>, silence: Option<Duration>) -> Self {
        let pulse = Self::starting(tick, number);
        let gap = silence.and_then(|silence| u32::try_from((silence / SILENT_GAPS).as_millis()).ok());
        pulse.with(|beat| beat.gaps[0] = gap.unwrap_or(0));
        pulse
    }

    fn with<T>(&self, act: impl FnOnce(&mut Beat) -> T) -> T {
        let mut beat = self.beat.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        act(&mut beat)
    }

    /// The present state.
    #[must_use]
    pub fn beat(&self) -> Beat {
        self.with(|beat| *beat)
    }

    /// The number that the stored state stands for; none while a change is unsaved.
    #[must_use]
    pub fn number(&self) -> Option<u64> {
        self.with(|beat| beat.number.filter(|_| !beat.is_unsaved()))
    }

    /// The number that the stored state stands for, and whether a change is unsaved, so that the one on record stands.
    #[must_use]
    pub fn stands(&self) -> (Option<u64>, bool) {
        self.with(|beat| (beat.number, beat.is_unsaved()))
    }

    /// Notes that a report came; `unsaved` where it changed something that has to be stored first.
    pub fn reported(&self, tick: Tick, unsaved: bool) {
        self.with(|beat| {
            let gap = u32::try_from(tick.since(beat.last_report).as_millis()).unwrap_or(u32::MAX);
            // The report that opened the connection ends no gap.
            if gap > 0 {
                beat.gaps.rotate_right(1);
                beat.gaps[0] = gap;
            }
            beat.last_report = tick;
            beat.unsaved = unsaved;
        });
    }

    /// True where a poll at `tick` comes later than the shortest gap so far and a half: others may have landed elsewhere.
    #[must_use]
    pub fn missed_polls(&self, tick: Tick) -> bool {
        self.with(|beat| {
            let shortest = beat.gaps.iter().copied().filter(|gap| *gap > 0).min().unwrap_or(0);
            tick.since(beat.last_report) > Duration::from_millis(shortest.into()) * 3 / 2
        })
    }

    /// True where the report with this number follows the last one; the first one of all does, whatever its number.
    #[must_use]
    pub fn is_followed_by(&self, number: u64) -> bool {
        self.with(|beat| beat.heard.is_none_or(|last| last.wrapping_add(1) == number))
    }

    /// True where the report with this number is the last one once more, or that of an agent that counts anew.
    #[must_use]
    pub fn is_repeated_by(&self, number: u64) -> bool {
        self.with(|beat| beat.heard == Some(number))
    }

    /// Notes what the store holds now, or needs not be told at once, and the number of the last report.
    pub fn settled(&self, number: Option<u64>, heard: Option<u64>, heartbeats: bool, quiet: bool) {
        self.with(|beat| {
            beat.number = number;
            beat.heard = heard;
            beat.heartbeats = heartbeats;
            beat.unsaved = false;
            beat.quiet_reports += u32::from(quiet);
        });
    }

    /// Notes that a change could not be stored: what is stored stands.
    pub fn unsettled(&self) {
        self.with(|beat| beat.unsaved = false);
    }

    /// Notes a poll that was refused: its agent lives.
    pub fn refused(&self, tick: Tick) {
        self.with(|beat| beat.last_report = beat.last_report.max(tick));
    }

    /// Notes that a change was answered which is kept until the store is back.
    pub fn keep(&self) {
        self.with(|beat| beat.kept += 1);
    }

    /// Notes that what is stored stands for no number.
    pub fn forget(&self) {
        self.with(|beat| beat.number = None);
    }

    /// Notes that a kept change is kept no more.
    pub fn release(&self) {
        self.with(|beat| beat.kept = beat.kept.saturating_sub(1));
    }

    /// What the store has to be told of a connection last seen at `seen`: nothing while a change is
    /// unsaved, and nothing where it knows.
    #[must_use]
    pub fn untold(&self, seen: Tick) -> Option<(Tick, Option<u64>)> {
        self.with(|beat| {
            let sighting = (seen.max(beat.last_report), beat.number);
            (!beat.is_unsaved() && sighting != beat.told).then_some(sighting)
        })
    }

    /// Notes what the store was told.
    pub fn told(&self, sighting: (Tick, Option<u64>)) {
        self.with(|beat| beat.told = sighting);
    }

    /// Mere signs of life since the last call.
    pub fn harvest(&self) -> u32 {
        self.with(|beat| std::mem::take(&mut beat.quiet_reports))
    }
}

impl Beat {
    /// True while the stored state is behind the reported one.
    fn is_unsaved(&self) -> bool {
        self.unsaved || self.kept > 0
    }

    /// By when the connection must be heard again.
    #[must_use]
    pub fn deadline(&self, transport: Transport, link: &Link, expected: &Expectations) -> Tick {
        // Nobody is heard on a link that the server does not read.
        let attended = |seen: Tick| seen.max(link.attentive_since().unwrap_or_default());
        match transport {
            Transport::Http => {
                attended(self.last_report).after(self.poll_silence(expected).unwrap_or(expected.first_poll()))
            }
            Transport::Websocket => {
                let seen = attended(self.last_seen(transport, link));
                let own_pace = link.is_shared() && self.heartbeats;
                seen.after(if own_pace {
                    expected.timeout.max(expected.interval * 3)
                } else {
                    expected.timeout
                })
            }
        }
    }

    /// When the connection was last heard.
    #[must_use]
    pub fn last_seen(&self, transport: Transport, link: &Link) -> Tick {
        match transport {
            Transport::Http => self.last_report,
            Transport::Websocket if link.is_shared() && self.heartbeats => self.last_report,
            Transport::Websocket => link.last_byte(),
        }
    }

    /// How long a poller may be silent: three times the longest of its last gaps; none before its second poll.
    #[must_use]
    pub fn poll_silence(&self, expected: &Expectations) -> Option<Duration> {
        let longest = self.gaps.iter().copied().max().filter(|longest| *longest > 0)?;
        let silence = Duration::from_millis(longest.into()) * SILENT_GAPS;
        Some(expected.timeout.max(silence.min(LONGEST_POLL_DEADLINE)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPECTED: Expectations =
        Expectations { interval: Duration::from_secs(30), timeout: Duration::from_mins(1) };

    fn at(seconds: u64) -> Tick {
        Tick::from_micros(seconds * 1_000_000)
    }

    #[test]
    fn a_link_of_one_agent_lives_by_its_bytes() {
        let (link, pulse) = (Link::heard_at(at(0)), Pulse::starting(at(0), None));
        link.enter();
        link.heard(at(50), 1);
        assert_eq!(pulse.beat().deadline(Transport::Websocket, &link, &EXPECTED), at(110));
    }

    #[test]
    fn on_a_shared_link_own_reports_count_if_heartbeats_are_promised() {
        let (link, pulse) = (Link::heard_at(at(0)), Pulse::starting(at(0), None));
        link.enter();
        link.enter();
        link.heard(at(50), 1);
        assert_eq!(
            pulse.beat().deadline(Transport::Websocket, &link, &EXPECTED),
            at(110),
            "lives with the link"
        );
        pulse.reported(at(10), false);
        pulse.settled(Some(1), Some(1), true, true);
        assert_eq!(pulse.beat().deadline(Transport::Websocket, &link, &EXPECTED), at(100), "3 x 30 s");
    }

    #[test]
    fn a_link_that_is_not_read_is_given_its_time_again() {
        let (link, pulse) = (Link::heard_at(at(0)), Pulse::starting(at(0), None));
        link.turn_away();
        assert_eq!(link.attentive_since(), None);
        link.attend(at(5), at(45));
        let beat = pulse.beat();
        assert_eq!(beat.deadline(Transport::Websocket, &link, &EXPECTED), at(105));
        assert_eq!(beat.last_seen(Transport::Websocket, &link), at(0), "that proves nothing");
        link.attend(at(45), at(45));
        assert_eq!(link.proof(at(46)), at(5), "what is read now may have waited");
        assert_eq!(link.proof(at(47)), at(47));
        assert_eq!(link.proof(at(4)), at(4));
    }

    #[test]
    fn moments_without_reading_add_up_and_move_no_deadline() {
        let (link, half) = (Link::heard_at(at(0)), Duration::from_millis(500));
        for second in 1..4 {
            link.turn_away();
            assert_eq!(link.attentive_since(), None);
            link.attend(at(second), at(second).after(half));
            assert_eq!(link.attentive_since(), Some(Tick::default()));
        }
        assert_eq!(link.time_away(), 1_500_000);
        link.attend(at(10), at(20));
        assert_eq!((link.attentive_since(), link.time_away()), (Some(at(20)), 11_500_000));
    }

    #[test]
    fn what_waits_behind_the_messages_of_an_absence_is_not_dated_by_its_reading() {
        let (link, half) = (Link::heard_at(at(0)), Duration::from_millis(500));
        link.attend(at(5), at(45));
        for second in 45..48 {
            link.attend(at(second).after(half), at(second + 1));
        }
        assert_eq!(link.proof(at(47)), at(5), "it was read for half a second in each");
        assert_eq!(link.proof(at(48)), at(48), "by then for long enough");
        link.attend(at(60), at(62));
        link.attend(at(62), at(90));
        assert_eq!(link.proof(at(91)), at(60), "one long absence after the other");
        link.attend(at(100), at(100).after(half));
        assert_eq!(link.proof(at(100).after(half)), at(100).after(half), "a short one hides nothing");
    }

    #[test]
    fn a_poller_sets_its_own_pace() {
        let (link, pulse) = (Link::default(), Pulse::starting(at(0), None));
        let deadline = |pulse: &Pulse| pulse.beat().deadline(Transport::Http, &link, &EXPECTED);
        assert_eq!(deadline(&pulse), at(90), "before the second poll 3 x interval");
        pulse.reported(at(5), false);
        assert_eq!(deadline(&pulse), at(65), "never below the timeout");
        pulse.reported(at(105), false);
        assert_eq!(deadline(&pulse), at(405), "3 x the longest of the last gaps");
        for poll in 1..=5 {
            pulse.reported(at(105 + poll), false);
        }
        assert_eq!(deadline(&pulse), at(170), "the long gap is forgotten after five polls");
        pulse.reported(at(100_000), false);
        assert_eq!(deadline(&pulse), at(103_600), "at most one hour");
        let silence = pulse.beat().poll_silence(&EXPECTED);
        let restored = Pulse::resuming(at(200_000), None, silence);
        assert_eq!(deadline(&restored), at(203_600), "its pace outlives a restart");
    }

    #[test]
    fn nothing_is_flushed_while_a_change_is_unsaved() {
        let pulse = Pulse::starting(at(0), Some(4));
        pulse.reported(at(1), true);
        assert_eq!(pulse.untold(at(1)), None, "the stored number never passes the stored state");
        assert_eq!(pulse.number(), None, "nor does the one that a successor goes on with");
        pulse.settled(Some(5), Some(5), false, false);
        assert_eq!(pulse.untold(at(1)), Some((at(1), Some(5))));
        assert_eq!(pulse.untold(at(1)), Some((at(1), Some(5))), "until the store was told");
        pulse.told((at(1), Some(5)));
        assert_eq!(pulse.untold(at(1)), None, "once is enough");
        pulse.keep();
        pulse.settled(Some(7), Some(7), false, true);
        assert_eq!((pulse.untold(at(2)), pulse.number()), (None, None), "nor while one is kept");
        pulse.release();
        pulse.settled(Some(5), Some(5), false, false);
        assert_eq!(pulse.untold(at(2)), Some((at(2), Some(5))));
    }
}

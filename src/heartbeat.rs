//! Silence: the monitor holds a deadline per connection and alone says that an agent fell silent.
//!
//! Deadlines are re-armed lazily: a heartbeat only writes an instant, the timer looks at it when it
//! fires. A verdict ends the connection in the history before anybody else hears of it. It must not
//! know links or sessions: whoever holds a place for the connection gives `on_verdict`.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::time::DelayQueue;

use crate::clock::Tick;
use crate::close::CloseReason;
use crate::history::{History, Noticed, OpenConnection};
use crate::lanes::Lanes;
use crate::metrics::Metrics;
use crate::peers::Peers;
use crate::sight::Sight;
use crate::store::Transport;

/// How many new connections may wait for the monitor to take them in.
const INTAKE: usize = 1_024;

/// A write that waits for longer than this waits for a peer that does not read.
const STUCK: Duration = Duration::from_millis(500);

/// How long a verdict waits that must not fall now.
const UNSURE: Duration = Duration::from_millis(200);

/// The handle by which connections come under watch; cheap to clone.
#[derive(Clone, Debug)]
pub struct Watch {
    intake: mpsc::Sender<(Arc<OpenConnection>, Tick)>,
    poll_grace: Duration,
}

impl Watch {
    /// How long a poll that another node read may be on its way to the store.
    #[must_use]
    pub fn poll_grace(&self) -> Duration {
        self.poll_grace
    }

    /// Watches a connection until it ends; no verdict falls before `not_before`.
    pub async fn over(&self, connection: Arc<OpenConnection>, not_before: Tick) {
        // Without a monitor the server is stopping, and nobody is to be accused.
        let _stopping = self.intake.send((connection, not_before)).await;
    }
}

/// Who is told of a verdict once the connection has ended.
pub type OnVerdict = Box<dyn Fn(&Arc<OpenConnection>) + Send + Sync>;

/// The task that watches; exactly one runs.
pub struct HeartbeatMonitor {
    history: History,
    sight: Arc<Sight>,
    peers: Arc<Peers>,
    metrics: Arc<Metrics>,
    /// Added to a poller's deadline, so that another node's sighting is in the store by then.
    poll_grace: Duration,
    on_verdict: OnVerdict,
    intake: mpsc::Receiver<(Arc<OpenConnection>, Tick)>,
    deadlines: DelayQueue<Watched>,
    /// When every lane was last asked to come round; each has.
    asked: Tick,
}

struct Watched {
    connection: Arc<OpenConnection>,
    not_before: Tick,
    /// Since when it is watched, or was last given time.
    since: Tick,
    /// For how long its link had not been read when it was armed, in microseconds.
    away: u64,
}

impl std::fmt::Debug for HeartbeatMonitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeartbeatMonitor").field("watched", &self.deadlines.len()).finish_non_exhaustive()
    }
}

impl HeartbeatMonitor {
    /// A monitor and the handle to it.
    #[must_use]
    pub fn new(
        history: History,
        sight: Arc<Sight>,
        peers: Arc<Peers>,
        metrics: Arc<Metrics>,
        poll_grace: Duration,
        on_verdict: OnVerdict,
    ) -> (Watch, Self) {
        let (sender, intake) = mpsc::channel(INTAKE);
        (
            Watch { intake: sender, poll_grace },
            Self {
                history,
                sight,
                peers,
                metrics,
                poll_grace,
                on_verdict,
                intake,
                deadlines: DelayQueue::new(),
                asked: Tick::default(),
            },
        )
    }

    /// Watches until `stop` is cancelled; from then on nobody is accused. Ends as well when a lane is gone.
    pub async fn run(mut self, lanes: Lanes, stop: CancellationToken) {
        loop {
            let expired = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some((connection, not_before)) = self.intake.recv() => {
                    let since = self.history.clock().tick();
                    self.arm(Watched { connection, not_before, since, away: 0 });
                    continue;
                }
                Some(expired) = std::future::poll_fn(|context| self.deadlines.poll_expired(context)),
                    if !self.deadlines.is_empty() => expired.into_inner(),
            };
            // What came before the deadline may not have been read: its lane has to come to it first. Most have ended or
            // were heard meanwhile, and nobody is asked for them.
            let now = self.history.clock().tick();
            let unread = |deadline| self.asked < deadline && deadline <= now;
            if expired.connection.ended().is_none() && unread(self.deadline(&expired)) {
                if stop.run_until_cancelled(lanes.come_round()).await != Some(true) {
                    return;
                }
                self.asked = now;
            }
            self.judge(expired);
        }
    }

    fn deadline(&self, watched: &Watched) -> Tick {
        let connection = &watched.connection;
        let beat = connection.pulse.beat();
        let deadline = beat.deadline(connection.transport, &connection.link, self.history.expected());
        let seen = beat.last_seen(connection.transport, &connection.link);
        let deadline = deadline.after(self.sight.blindness_since(seen));
        let not_before = watched.not_before.after(self.sight.blindness_since(watched.since));
        match connection.transport {
            Transport::Websocket => deadline.max(not_before),
            // Who polled a node that was lost has the time to find another one.
            Transport::Http => {
                let found = self
                    .peers
                    .lost_at()
                    .map_or(deadline, |lost| lost.after(self.history.expected().return_time()));
                deadline.max(found).max(not_before).after(self.poll_grace)
            }
        }
    }

    fn arm(&mut self, mut watched: Watched) {
        watched.away = watched.connection.link.time_away();
        let at = self.history.clock().instant(self.deadline(&watched));
        self.deadlines.insert_at(watched, at);
    }

    /// Ends a connection whose deadline has passed; one that was heard meanwhile is armed again.
    fn judge(&mut self, watched: Watched) {
        if watched.connection.ended().is_some() {
            return;
        }
        // Before the deadline is read, which moves when the link is read again.
        let attended = watched.connection.link.attentive_since().is_some();
        let deadline = self.deadline(&watched);
        let now = self.history.clock().tick();
        if now < deadline {
            self.arm(watched);
            return;
        }
        // A report may have waited behind others, each of which the server took a moment for.
        let away = watched.connection.link.time_away().saturating_sub(watched.away);
        if attended && away > 0 {
            let not_before = now.after(Duration::from_micros(away));
            self.arm(Watched { not_before, since: now, ..watched });
            return;
        }
        let polls = watched.connection.transport == Transport::Http;
        if !self.sight.can_judge(now) || !attended || polls && self.peers.is_unsure(now) {
            self.deadlines.insert(watched, UNSURE);
            return;
        }
        let connection = &watched.connection;
        let reason = if connection.link.writing_for(now) >= STUCK {
            CloseReason::SlowReader
        } else {
            CloseReason::HeartbeatTimeout
        };
        let noticed = match connection.transport {
            Transport::Websocket => Noticed::Concluded,
            Transport::Http => Noticed::Unheard,
        };
        if self.history.end(connection, reason, noticed).is_some() {
            self.metrics.heartbeat_missed.increment(1);
            self.metrics.verdict_delay.record(now.since(deadline).as_secs_f64());
            (self.on_verdict)(connection);
        }
    }
}

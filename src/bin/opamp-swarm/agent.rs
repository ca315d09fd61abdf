//! One simulated agent: connects, reports, sends heartbeats, comes back when it is cut off.
//!
//! Promises the behaviour of the common agents: numbers from 0 in steps of 1 over all links,
//! everything in the first report and on request, only id, number and capabilities otherwise.
//! Must not know transports, nor the other agents.

use std::{
    collections::VecDeque,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use fastrand::Rng;
use opamp_server::proto::{
    AgentIdentification, ServerErrorResponse, ServerErrorResponseType, ServerToAgent, ServerToAgentFlags,
    server_error_response::Details,
};
use prost::Message;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use uuid::Uuid;

use crate::{
    args::Leave,
    counts::{Counts, Series},
    endpoint::{Endpoint, Transport},
    identity::Identity,
    link::{Link, Sockets},
    loss::{Backoff, Loss},
    manners::Manners,
    orders::{Order, Round},
    report,
};

/// How long an agent that is to leave waits for the answers still due.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);
/// For how long a slow reader reads nothing once it has read everything: as long as a collector that starts anew.
const SLOW_READ: Duration = Duration::from_secs(10);
/// Purpose of the chance behind jitter.
const JITTER: usize = 0;

/// What all agents of a fleet share.
pub(crate) struct Common {
    pub(crate) endpoint: Arc<Endpoint>,
    /// The sockets that the agents share, where they do.
    pub(crate) shared: Option<Sockets>,
    pub(crate) interval: Duration,
    pub(crate) redial_pause: Option<Duration>,
    pub(crate) report_bytes: usize,
    pub(crate) manners: Manners,
    /// How agents go when they restart.
    pub(crate) leave: Leave,
    /// Set once, when those who are to fall silent shall do so.
    pub(crate) silence: AtomicBool,
    pub(crate) counts: Counts,
    pub(crate) round: Round,
}

/// A report's occasion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Occasion {
    /// Nothing was ever answered, or the server asked for everything.
    Full,
    /// The agent's health is another one than before.
    Change,
    /// A heartbeat, or the first word on a new link.
    Beat,
    /// A heartbeat that the fleet ordered.
    Ordered,
}

struct Sent {
    at: Instant,
    sequence: u64,
    occasion: Occasion,
}

/// The share of a round that is still to be done.
#[derive(Debug, Clone, Copy)]
struct Share {
    left: u32,
    answered: u32,
    under_way: bool,
}

/// Why a stay ended by the agent's own doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Departure {
    /// Ordered to leave.
    Home,
    /// Ordered to leave while silent: without a word.
    Silent,
    /// To come back as a new process.
    Restart,
}

/// One stay on a link.
#[expect(clippy::struct_excessive_bools, reason = "each is due by itself")]
struct Stay {
    link: Link,
    unanswered: VecDeque<Sent>,
    answered: bool,
    full_due: bool,
    change_due: bool,
    beat_due: bool,
    next_beat: Instant,
    next_change: Option<Instant>,
    restart_at: Option<Instant>,
    /// Until when a slow reader reads nothing.
    reads_from: Option<Instant>,
}

pub(crate) struct Agent {
    common: Arc<Common>,
    orders: watch::Receiver<Order>,
    identity: Identity,
    uid: Uuid,
    sequence: u64,
    rng: Rng,
    backoff: Backoff,
    /// The server has answered, without an error, at least once.
    acknowledged: bool,
    healthy: bool,
    /// A report of state that the last link took along unanswered, or that a new process owes.
    full_owed: bool,
    share: Option<Share>,
}

impl Agent {
    pub(crate) fn new(common: Arc<Common>, orders: watch::Receiver<Order>, identity: Identity) -> Self {
        let backoff = Backoff::new(common.redial_pause);
        Self {
            common,
            orders,
            identity,
            uid: identity.uid,
            sequence: 0,
            rng: identity.rng(JITTER),
            backoff,
            acknowledged: false,
            healthy: true,
            full_owed: false,
            share: None,
        }
    }

    /// Lives until ordered to leave.
    pub(crate) async fn run(mut self) {
        loop {
            let ended = self.stay().await;
            self.give_up_share();
            let wait = match ended {
                Ok(Departure::Home | Departure::Silent) => return,
                Ok(Departure::Restart) => self.restart(),
                Err(loss) => {
                    self.common.counts.lose(&loss);
                    self.backoff.after(&loss, &mut self.rng)
                }
            };
            if self.unless_leaving(sleep(wait)).await.is_none() {
                return;
            }
        }
    }

    /// The next process of this agent: it begins to count anew and has everything to say.
    fn restart(&mut self) -> Duration {
        self.common.counts.restarts.add();
        self.sequence = 0;
        self.full_owed = true;
        self.backoff.restart(&mut self.rng)
    }

    /// One link from opening to end; fails unless the agent itself left.
    async fn stay(&mut self) -> Result<Departure, Loss> {
        let common = Arc::clone(&self.common);
        let opening = Link::open(Arc::clone(&common.endpoint), common.shared.as_ref(), self.identity.index);
        let Some(link) = self.unless_leaving(opening).await else {
            return Ok(Departure::Home);
        };
        let now = Instant::now();
        let mut stay = Stay {
            link: link?,
            unanswered: VecDeque::new(),
            answered: false,
            full_due: self.full_owed || !self.acknowledged,
            change_due: false,
            beat_due: true,
            next_beat: self.next_beat(),
            next_change: later(now, self.common.manners.changes.next(&mut self.rng)),
            restart_at: later(now, self.common.manners.restarts.next(&mut self.rng)),
            reads_from: None,
        };
        if self.acknowledged {
            self.common.counts.reconnects.add();
        }
        let result = self.converse(&mut stay).await;
        match &result {
            Ok(Departure::Home) => {
                self.leave(stay).await;
            }
            Ok(Departure::Silent) => {}
            Ok(Departure::Restart) => {
                let orderly = self.common.leave == Leave::Orderly;
                let answered = if orderly { self.leave(stay).await } else { stay.answered };
                if answered {
                    self.common.counts.exit();
                }
            }
            Err(loss) => {
                if stay.answered {
                    self.common.counts.exit();
                }
                self.resume_after(loss, &stay);
                stay.link.hang_up(loss).await;
            }
        }
        result
    }

    /// Returns when the agent is to leave.
    async fn converse(&mut self, stay: &mut Stay) -> Result<Departure, Loss> {
        loop {
            if self.falls_silent() {
                return Ok(self.be_silent(stay).await);
            }
            while let Some(occasion) = self.occasion(stay) {
                self.report(stay, occasion).await?;
            }
            let alarm = self.alarm(stay);
            tokio::select! {
                offer = stay.link.next(), if stay.reads_from.is_none() => self.take(stay, &offer?)?,
                order = newest(&mut self.orders) => match order {
                    Order::Live => {}
                    Order::Beat(reports) => self.accept_share(reports),
                    Order::Leave => return Ok(Departure::Home),
                },
                () = sleep_until(alarm.unwrap_or(stay.next_beat)), if alarm.is_some() => {
                    let now = Instant::now();
                    if stay.restart_at.is_some_and(|at| at <= now) {
                        return Ok(Departure::Restart);
                    }
                    self.wake(stay, now);
                }
            }
        }
    }

    /// When there is something to do again without being told.
    fn alarm(&self, stay: &Stay) -> Option<Instant> {
        let idle = !self.common.interval.is_zero() && !stay.beat_due;
        let beat = idle.then_some(stay.next_beat);
        [beat, stay.next_change, stay.restart_at, stay.reads_from].into_iter().flatten().min()
    }

    fn wake(&mut self, stay: &mut Stay, now: Instant) {
        if stay.next_beat <= now {
            stay.beat_due = true;
            stay.next_beat = self.next_beat();
        }
        if stay.next_change.is_some_and(|at| at <= now) {
            self.healthy = !self.healthy;
            stay.change_due = true;
            stay.next_change = later(now, self.common.manners.changes.next(&mut self.rng));
        }
        stay.reads_from = stay.reads_from.filter(|at| *at > now);
    }

    fn falls_silent(&self) -> bool {
        self.common.silence.load(Relaxed) && self.common.manners.silent.has(self.identity.index)
    }

    /// Neither reads nor writes any more; the link stays open until the fleet goes home.
    async fn be_silent(&mut self, stay: &Stay) -> Departure {
        self.common.counts.fall_silent(stay.answered);
        self.give_up_share();
        loop {
            match newest(&mut self.orders).await {
                Order::Live => {}
                Order::Beat(_) => self.common.round.done(0),
                Order::Leave => return Departure::Silent,
            }
        }
    }

    /// What is to be reported now, most urgent first.
    fn occasion(&self, stay: &Stay) -> Option<Occasion> {
        if !stay.link.has_room(stay.unanswered.len()) {
            None
        } else if stay.full_due {
            Some(Occasion::Full)
        } else if stay.change_due {
            Some(Occasion::Change)
        } else if self.share.is_some_and(|share| !share.under_way) {
            Some(Occasion::Ordered)
        } else {
            stay.beat_due.then_some(Occasion::Beat)
        }
    }

    async fn report(&mut self, stay: &mut Stay, occasion: Occasion) -> Result<(), Loss> {
        let sequence = self.sequence;
        let report = match occasion {
            Occasion::Full => {
                (stay.full_due, stay.change_due) = (false, false);
                let bytes = self.common.report_bytes;
                report::full(&self.identity, self.uid, sequence, self.healthy, bytes)
            }
            Occasion::Change => {
                stay.change_due = false;
                report::changed(&self.identity, self.uid, sequence, self.healthy)
            }
            Occasion::Beat | Occasion::Ordered => report::heartbeat(self.uid, sequence),
        };
        // Any report tells that the agent lives.
        stay.beat_due = false;
        if let Some(share) = &mut self.share {
            share.under_way |= occasion == Occasion::Ordered;
        }
        self.sequence += 1;
        stay.unanswered.push_back(Sent { at: Instant::now(), sequence, occasion });
        self.common.counts.reports.add();
        stay.link.send(&report).await
    }

    fn take(&mut self, stay: &mut Stay, offer: &[u8]) -> Result<(), Loss> {
        let now = Instant::now();
        let offer = ServerToAgent::decode(offer).map_err(|_| Loss::Malformed("bad_offer"))?;
        let sent = stay.unanswered.pop_front();
        let slow = self.common.manners.slow.has(self.identity.index);
        stay.reads_from = (slow && stay.unanswered.is_empty()).then(|| now + SLOW_READ);
        let counts = &self.common.counts;
        match &sent {
            Some(sent) => {
                counts.answers.add();
                let series = match sent.occasion {
                    _ if !self.acknowledged => Series::First,
                    Occasion::Change => Series::Change,
                    Occasion::Full | Occasion::Beat | Occasion::Ordered => Series::Later,
                };
                // What lay unread says nothing about the server.
                if !slow {
                    counts.record(series, now - sent.at);
                }
            }
            None => counts.unasked.add(),
        }
        let ours = offer.instance_uid == self.uid.as_bytes();
        if !ours {
            counts.misaddressed.add();
        }
        let fine = ours && offer.error_response.is_none();
        if sent.is_some_and(|sent| sent.occasion == Occasion::Ordered) {
            self.count_share(fine);
        }
        if let Some(error) = &offer.error_response {
            return self.suffer(error);
        }
        if fine {
            self.settle(stay);
            self.obey(stay, &offer);
        }
        Ok(())
    }

    fn suffer(&self, error: &ServerErrorResponse) -> Result<(), Loss> {
        self.common.counts.errors.add(error.r#type());
        if error.r#type() != ServerErrorResponseType::Unavailable {
            return Ok(());
        }
        let wait = error
            .details
            .as_ref()
            .map(|Details::RetryInfo(info)| Duration::from_nanos(info.retry_after_nanoseconds));
        Err(Loss::Unavailable(wait))
    }

    /// The server has answered as it should.
    fn settle(&mut self, stay: &mut Stay) {
        self.backoff.answered();
        self.full_owed = false;
        if !stay.answered {
            stay.answered = true;
            self.common.counts.enter();
        }
        if !self.acknowledged {
            self.acknowledged = true;
            self.common.counts.acknowledge();
        }
    }

    fn obey(&mut self, stay: &mut Stay, offer: &ServerToAgent) {
        if offer.flags & ServerToAgentFlags::ReportFullState as u64 != 0 {
            self.common.counts.full_state_requests.add();
            stay.full_due = true;
        }
        let new_uid = offer.agent_identification.as_ref().and_then(usable_uid);
        if let Some(uid) = new_uid {
            self.common.counts.uids_reassigned.add();
            self.uid = uid;
        }
    }

    /// A poll that failed for the moment is repeated as it was; on a WebSocket the number moves on
    /// and the server has to ask for what it missed.
    fn resume_after(&mut self, loss: &Loss, stay: &Stay) {
        let polls = self.common.endpoint.transport == Transport::Http;
        if let Some(failed) = stay.unanswered.front()
            && polls
            && loss.is_passing()
        {
            self.sequence = failed.sequence;
            self.full_owed = matches!(failed.occasion, Occasion::Full | Occasion::Change);
        }
    }

    /// Whether the stay was ever answered.
    async fn leave(&mut self, mut stay: Stay) -> bool {
        // Nothing that was answered may look as if it were not.
        let _ = timeout(SETTLE_LIMIT, self.settle_up(&mut stay)).await;
        let farewell = report::farewell(self.uid, self.sequence);
        if stay.link.leave(&farewell).await {
            self.common.counts.farewells.add();
        }
        stay.answered
    }

    async fn settle_up(&mut self, stay: &mut Stay) -> Result<(), Loss> {
        while !stay.unanswered.is_empty() {
            let offer = stay.link.next().await?;
            self.take(stay, &offer)?;
        }
        Ok(())
    }

    /// `None` if ordered to leave first. Without a link, the agent has no part in rounds.
    async fn unless_leaving<F: Future>(&mut self, future: F) -> Option<F::Output> {
        let mut future = pin!(future);
        loop {
            tokio::select! {
                output = &mut future => return Some(output),
                order = newest(&mut self.orders) => match order {
                    Order::Live => {}
                    Order::Beat(_) => self.common.round.done(0),
                    Order::Leave => return None,
                },
            }
        }
    }

    fn accept_share(&mut self, reports: u32) {
        self.share = Some(Share { left: reports, answered: 0, under_way: false });
        self.finish_share();
    }

    fn count_share(&mut self, answered: bool) {
        if let Some(share) = &mut self.share {
            share.under_way = false;
            share.left -= 1;
            share.answered += u32::from(answered);
        }
        self.finish_share();
    }

    fn finish_share(&mut self) {
        if let Some(share) = self.share.take_if(|share| share.left == 0) {
            self.common.round.done(share.answered);
        }
    }

    fn give_up_share(&mut self) {
        if let Some(share) = self.share.take() {
            self.common.round.done(share.answered);
        }
    }

    fn next_beat(&mut self) -> Instant {
        let interval = self.common.interval.mul_f64(0.9 + 0.2 * self.rng.f64());
        Instant::now() + interval
    }
}

/// `None` for never.
fn later(now: Instant, wait: Option<Duration>) -> Option<Instant> {
    now.checked_add(wait?)
}

/// The next order that the agent has not seen yet; a fleet that is gone wants nobody to stay.
async fn newest(orders: &mut watch::Receiver<Order>) -> Order {
    match orders.changed().await {
        Ok(()) => *orders.borrow_and_update(),
        Err(_) => Order::Leave,
    }
}

fn usable_uid(identification: &AgentIdentification) -> Option<Uuid> {
    let uid = Uuid::from_slice(&identification.new_instance_uid).ok()?;
    (!uid.is_nil()).then_some(uid)
}

//! One simulated agent: connects, reports, sends heartbeats, comes back when it is cut off.
//!
//! Promises the behaviour of the common agents: numbers from 0 in steps of 1 over all links,
//! everything in the first report and on request, only id, number and capabilities otherwise.
//! Must not know transports, nor the other agents.

use std::{collections::VecDeque, pin::pin, sync::Arc, time::Duration};

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
    counts::Counts,
    endpoint::{Endpoint, Transport},
    identity::Identity,
    link::Link,
    loss::{Backoff, Loss},
    orders::{Order, Round},
    report,
};

/// How long an agent that is to leave waits for the answers still due.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);
/// Purpose of the chance behind jitter.
const JITTER: usize = 0;

/// What all agents of a fleet share.
pub(crate) struct Common {
    pub(crate) endpoint: Arc<Endpoint>,
    pub(crate) interval: Duration,
    pub(crate) report_bytes: usize,
    pub(crate) counts: Counts,
    pub(crate) round: Round,
}

/// A report's occasion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Occasion {
    /// Nothing was ever answered, or the server asked for everything.
    Full,
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

/// One stay on a link.
struct Stay {
    link: Link,
    unanswered: VecDeque<Sent>,
    answered: bool,
    full_due: bool,
    beat_due: bool,
    next_beat: Instant,
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
    /// A full report that the last link took along unanswered and that is to be sent again.
    full_owed: bool,
    share: Option<Share>,
}

impl Agent {
    pub(crate) fn new(common: Arc<Common>, orders: watch::Receiver<Order>, identity: Identity) -> Self {
        Self {
            common,
            orders,
            identity,
            uid: identity.uid,
            sequence: 0,
            rng: identity.rng(JITTER),
            backoff: Backoff::new(),
            acknowledged: false,
            full_owed: false,
            share: None,
        }
    }

    /// Lives until ordered to leave.
    pub(crate) async fn run(mut self) {
        while let Err(loss) = self.stay().await {
            self.common.counts.lose(&loss);
            self.give_up_share();
            let wait = self.backoff.after(&loss, &mut self.rng);
            if self.unless_leaving(sleep(wait)).await.is_none() {
                return;
            }
        }
    }

    /// One link from opening to end; fails unless the agent itself left.
    async fn stay(&mut self) -> Result<(), Loss> {
        let opening = Link::open(Arc::clone(&self.common.endpoint), self.identity.index);
        let Some(link) = self.unless_leaving(opening).await else {
            return Ok(());
        };
        let mut stay = Stay {
            link: link?,
            unanswered: VecDeque::new(),
            answered: false,
            full_due: self.full_owed || !self.acknowledged,
            beat_due: true,
            next_beat: self.next_beat(),
        };
        if self.acknowledged {
            self.common.counts.reconnects.add();
        }
        let result = self.converse(&mut stay).await;
        match &result {
            Ok(()) => self.leave(stay).await,
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

    /// Returns when ordered to leave.
    async fn converse(&mut self, stay: &mut Stay) -> Result<(), Loss> {
        loop {
            while let Some(occasion) = self.occasion(stay) {
                self.report(stay, occasion).await?;
            }
            let idle = !self.common.interval.is_zero() && !stay.beat_due;
            tokio::select! {
                offer = stay.link.next() => self.take(stay, &offer?)?,
                order = newest(&mut self.orders) => match order {
                    Order::Live => {}
                    Order::Beat(reports) => self.accept_share(reports),
                    Order::Leave => return Ok(()),
                },
                () = sleep_until(stay.next_beat), if idle => {
                    stay.beat_due = true;
                    stay.next_beat = self.next_beat();
                }
            }
        }
    }

    /// What is to be reported now, most urgent first.
    fn occasion(&self, stay: &Stay) -> Option<Occasion> {
        if !stay.link.has_room(stay.unanswered.len()) {
            None
        } else if stay.full_due {
            Some(Occasion::Full)
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
                stay.full_due = false;
                let bytes = self.common.report_bytes;
                report::full(&self.identity, self.uid, sequence, bytes)
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
        let counts = &self.common.counts;
        match &sent {
            Some(sent) => {
                counts.answers.add();
                counts.record(!self.acknowledged, now - sent.at);
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
            self.full_owed = failed.occasion == Occasion::Full;
        }
    }

    async fn leave(&mut self, mut stay: Stay) {
        // Nothing that was answered may look as if it were not.
        let _ = timeout(SETTLE_LIMIT, self.settle_up(&mut stay)).await;
        let farewell = report::farewell(self.uid, self.sequence);
        if stay.link.leave(&farewell).await {
            self.common.counts.farewells.add();
        }
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

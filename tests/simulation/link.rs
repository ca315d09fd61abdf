//! The server's end of a link and of a poll, as the transports do it: without sockets, frame by frame.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use opamp_server::agent::offer::{Answer, Refusal, compose};
use opamp_server::agent::report::Outline;
use opamp_server::agent::{InstanceUid, Sender};
use opamp_server::clock::Tick;
use opamp_server::close::CloseReason;
use opamp_server::history::{EndTicket, Noticed, OpenConnection};
use opamp_server::metrics::Refused;
use opamp_server::proto::{AgentToServer, ServerToAgent};
use opamp_server::pulse::Link;
use opamp_server::session::ends::{Outlook, look_around};
use opamp_server::session::{
    Exchange, Exchanged, Inbound, Origin, Session, exchange, introduce, reject, sender,
};
use opamp_server::store::Transport;
use prost::Message as _;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::check;
use crate::node::Process;
use crate::pipe::Pipe;
use crate::rules::Rule;
use crate::truth::Shown;

/// How long a link may carry no agent.
const LONELY: Duration = Duration::from_secs(10);

/// How long the writes that wait may take before newcomers have to come later.
const LONGEST_QUEUE: Duration = Duration::from_secs(5);

/// How long a link may not be read for what is read then to prove something.
const ABSENCE: Duration = Duration::from_secs(1);

/// What an agent sends on a link.
#[derive(Debug)]
pub(crate) enum Up {
    Report(Vec<u8>),
    Pong,
    Close,
    Fin,
    Reset,
}

/// What a link brings an agent.
#[derive(Debug)]
pub(crate) enum Down {
    Offer(Box<ServerToAgent>),
    /// An offer that answers no report.
    Question(Box<ServerToAgent>),
    Ping,
    Close(CloseReason),
    /// The transport ended.
    Gone,
}

/// A connection between an agent and a server, both directions of it.
#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) number: u64,
    pub(crate) up: Pipe<Up>,
    pub(crate) down: Pipe<Down>,
    /// How long anything takes in milliseconds.
    pub(crate) takes: AtomicU64,
}

impl Wire {
    pub(crate) fn new(number: u64, takes: u64) -> Arc<Self> {
        Arc::new(Self { number, up: Pipe::new(), down: Pipe::new(), takes: AtomicU64::new(takes) })
    }

    fn takes(&self) -> Duration {
        Duration::from_millis(self.takes.load(Ordering::Relaxed))
    }

    /// Something for the server; `process` must be heard of by the record of the truth.
    pub(crate) fn send(&self, process: &Process, item: Up) -> Instant {
        let shown = match &item {
            Up::Close => Some(Shown::Close),
            Up::Fin => Some(Shown::Fin),
            Up::Reset => Some(Shown::Reset),
            Up::Report(_) | Up::Pong => None,
        };
        let due = self.up.push(self.takes(), item);
        process.truth.arrives(self.number, due, shown);
        due
    }

    fn answer(&self, item: Down) {
        self.down.push(self.takes(), item);
    }
}

/// An agent's wish for a WebSocket, as the server meets it.
pub(crate) fn admit_link(process: &Process) -> bool {
    !process.closed.load(Ordering::Relaxed) && admits_newcomer(process)
}

fn admits_newcomer(process: &Process) -> bool {
    let services = &process.services;
    let cause = if services.outage.is_away() {
        Some(Refused::Store)
    } else {
        (services.history.delay() > LONGEST_QUEUE).then_some(Refused::Rate)
    };
    if let Some(cause) = cause {
        services.note_refusal(cause);
    }
    cause.is_none()
}

/// Why a link ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Close(CloseReason),
    Lonely,
    ClosedByPeer,
    Broken,
    Unwritable,
}

/// Tells the peer that the transport is gone once the server's end of it is.
struct Hangup(Arc<Wire>, Arc<Process>);

impl Drop for Hangup {
    fn drop(&mut self) {
        if !self.1.silent.load(Ordering::Relaxed) {
            self.0.answer(Down::Gone);
        }
    }
}

/// The server's end of a link.
pub(crate) struct LinkTask {
    process: Arc<Process>,
    wire: Arc<Wire>,
    origin: Origin,
    sessions: Vec<(InstanceUid, Option<Session>)>,
    lonely_since: Option<Tick>,
    /// True where a session is to be asked something before it reports by itself.
    curious: bool,
    /// Until when what is read may have waited.
    absent_until: Option<Instant>,
    _hangup: Hangup,
}

impl LinkTask {
    /// The task of a link that was just admitted.
    pub(crate) fn spawn(process: &Arc<Process>, wire: &Arc<Wire>, remote_addr: SocketAddr) {
        let tick = process.services.clock.tick();
        let link = Arc::new(Link::heard_at(tick));
        let task = Self {
            process: Arc::clone(process),
            wire: Arc::clone(wire),
            origin: Origin { transport: Transport::Websocket, remote_addr, link: Arc::clone(&link) },
            sessions: Vec::with_capacity(1),
            lonely_since: Some(tick),
            curious: false,
            absent_until: None,
            _hangup: Hangup(Arc::clone(wire), Arc::clone(process)),
        };
        process.open_link(&link, Box::pin(task.run()));
    }

    async fn run(mut self) {
        let end = self.converse().await;
        self.finish(end).await;
    }

    async fn converse(&mut self) -> End {
        let mut timer = Box::pin(tokio::time::sleep(LONELY.min(self.patience())));
        loop {
            let (link, wire) = (Arc::clone(&self.origin.link), Arc::clone(&self.wire));
            let step = tokio::select! {
                biased;
                () = link.woken() => self.look_around(),
                (_, frame) = wire.up.next() => self.on_frame(frame).await,
                () = &mut timer => match self.on_timer(timer.as_mut()) {
                    Ok(true) => {
                        self.curious = true;
                        wire.answer(Down::Ping);
                        Ok(())
                    }
                    Ok(false) => Ok(()),
                    Err(end) => Err(end),
                },
            };
            if let Err(end) = step {
                return end;
            }
            if self.curious {
                self.ask();
            }
        }
    }

    /// Asks those for their full state who are to be asked.
    fn ask(&mut self) {
        self.curious = false;
        for (agent, session) in &mut self.sessions {
            let question = match session {
                None => Some(compose(agent.as_bytes(), Answer { ask_full_state: true, new_uid: None })),
                Some(session) => session.overdue_question(),
            };
            if let Some(question) = question {
                self.wire.answer(Down::Question(Box::new(question)));
            }
        }
    }

    async fn on_frame(&mut self, frame: Up) -> Result<(), End> {
        let bytes = match &frame {
            Up::Report(bytes) => bytes.len(),
            Up::Pong | Up::Close => 2,
            Up::Fin => return Err(End::Broken),
            Up::Reset => return Err(End::Unwritable),
        };
        self.origin.link.heard(self.process.services.clock.tick(), bytes);
        let proves = self.absent_until.is_none_or(|until| Instant::now() > until);
        self.process.truth.hears(self.wire.number, proves);
        match frame {
            Up::Report(bytes) => self.on_message(bytes).await,
            Up::Close => Err(End::ClosedByPeer),
            Up::Pong | Up::Fin | Up::Reset => Ok(()),
        }
    }

    async fn on_message(&mut self, bytes: Vec<u8>) -> Result<(), End> {
        let Ok(report) = AgentToServer::decode(bytes.as_slice()) else { return Ok(()) };
        let outline = Outline::of(&report, &bytes);
        let offer = if let Some(offer) = self.beat(&report, &outline) {
            offer
        } else {
            let link = Arc::clone(&self.origin.link);
            link.turn_away();
            let turned_away = self.process.services.clock.tick();
            let began = Instant::now();
            let mut share = self.process.budget.small_share();
            share.cover_message(bytes.len(), 10).await;
            let inbound = Inbound::new(report, outline, share);
            let offer = self.take(inbound).await;
            link.attend(turned_away, self.process.services.clock.tick());
            // What waits behind the messages of a long absence waits while each of them is taken in.
            self.absent_until = match self.absent_until {
                Some(until) if began <= until => Some(until + began.elapsed()),
                _ if began.elapsed() > ABSENCE => Some(Instant::now() + ABSENCE),
                until => until,
            };
            offer
        };
        self.wire.answer(Down::Offer(Box::new(offer)));
        self.note_company();
        self.look_around()
    }

    fn beat(&mut self, report: &AgentToServer, outline: &Outline) -> Option<ServerToAgent> {
        let Ok(Sender::Agent(agent)) = Sender::of(report) else { return None };
        let index = self.sessions.binary_search_by_key(&agent, |(uid, _)| *uid).ok()?;
        self.sessions.get_mut(index)?.1.as_mut()?.beat(report, outline)
    }

    async fn take(&mut self, mut inbound: Inbound) -> ServerToAgent {
        let services = &self.process.services;
        let mut agent = match sender(services, &inbound.report) {
            Ok(Sender::Agent(agent)) => agent,
            Ok(Sender::Anonymous) => return introduce(services, &inbound.report).offer,
            Err(exchanged) => return exchanged.offer,
        };
        loop {
            match self.take_through(agent, &mut inbound).await {
                Exchange::Done(exchanged) => return exchanged.offer,
                Exchange::Rival(uid) => agent = uid,
            }
        }
    }

    async fn take_through(&mut self, agent: InstanceUid, inbound: &mut Inbound) -> Exchange {
        let index = match self.sessions.binary_search_by_key(&agent, |(uid, _)| *uid) {
            Ok(index) => index,
            Err(index) => {
                self.sessions.insert(index, (agent, None));
                index
            }
        };
        let process = Arc::clone(&self.process);
        let heard = process.services.clock.moment(self.origin.link.last_byte());
        let slot = &mut self.sessions[index].1;
        let exchange = exchange(&process.services, slot, &self.origin, agent, inbound).await;
        if let Some(session) = slot {
            let (id, link) = (session.connection().id, Some(self.wire.number));
            process.truth.taken(id, Transport::Websocket, process.node_id, link, heard);
            check::answered(&process, agent, id, heard, &exchange);
        } else {
            self.sessions.remove(index);
        }
        exchange
    }

    fn is_lonely(&self) -> bool {
        self.sessions.iter().all(|(_, session)| session.is_none())
    }

    fn note_company(&mut self) {
        if !self.is_lonely() {
            self.lonely_since = None;
        } else if self.lonely_since.is_none() {
            self.lonely_since = Some(self.process.services.clock.tick());
        }
    }

    /// Lets go of sessions that were ended elsewhere; a link that lost its last one that way ends.
    fn look_around(&mut self) -> Result<(), End> {
        match look_around(&self.process.services, &self.origin.link, &mut self.sessions) {
            Outlook::Open { adrift } => {
                self.curious |= adrift;
                self.note_company();
                Ok(())
            }
            Outlook::Close(reason) => Err(End::Close(reason)),
            Outlook::Break => Err(End::Unwritable),
        }
    }

    fn on_timer(&self, timer: std::pin::Pin<&mut tokio::time::Sleep>) -> Result<bool, End> {
        let clock = &self.process.services.clock;
        let now = clock.tick();
        let patience = self.patience();
        if let Some(since) = self.lonely_since {
            timer.reset(clock.instant(since.after(LONELY).min(now.after(patience))));
            return if now.since(since) >= LONELY { Err(End::Lonely) } else { Ok(false) };
        }
        let due = self.origin.link.last_byte().after(patience);
        let ping = now >= due;
        timer.reset(clock.instant(if ping { now.after(patience / 3) } else { due }));
        Ok(ping)
    }

    fn patience(&self) -> Duration {
        self.process.services.history.expected().timeout / 5 * 3
    }

    fn end(&mut self, end: End) -> Vec<(i64, EndTicket)> {
        let (reason, noticed) = match end {
            End::Close(reason) => (reason, Noticed::Concluded),
            End::ClosedByPeer => (CloseReason::ClosedByAgent, Noticed::Seen),
            End::Lonely | End::Broken => (CloseReason::ConnectionLost, Noticed::Seen),
            End::Unwritable => (CloseReason::ConnectionLost, Noticed::Concluded),
        };
        let sessions = self.sessions.drain(..).filter_map(|(_, session)| session);
        sessions
            .filter_map(|session| Some((session.connection().id, session.end(reason, noticed)?)))
            .collect()
    }

    async fn finish(mut self, end: End) {
        let tickets = self.end(end);
        let reason = match end {
            End::Close(reason) => reason,
            End::Lonely => CloseReason::ConnectionLost,
            End::ClosedByPeer | End::Broken | End::Unwritable => return,
        };
        let mut ended = Vec::new();
        for (id, ticket) in tickets {
            if ticket.recorded().await.is_none() {
                return;
            }
            ended.push(id);
        }
        for id in ended {
            let open = self.process.database().records().row(id).is_none_or(|row| row.end.is_none());
            if open {
                self.process
                    .truth
                    .contradict(Rule::Close, || format!("Close {reason} is sent and row {id} is open"));
            }
        }
        self.wire.answer(Down::Close(reason));
        // The peer answers, or it does not.
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// What a poll came to.
#[derive(Debug)]
pub(crate) enum Polled {
    Offer(Box<ServerToAgent>),
    /// 503.
    Later,
}

/// Answers one poll, as the listener's task for it does: it is finished whether anybody waits or not.
pub(crate) async fn poll(
    process: Arc<Process>,
    bytes: Vec<u8>,
    peer: SocketAddr,
    answer: oneshot::Sender<Polled>,
) {
    let Ok(report) = AgentToServer::decode(bytes.as_slice()) else { return };
    if process.closed.load(Ordering::Relaxed) {
        let _gone = answer.send(Polled::Later);
        return;
    }
    // What it says was true when it came.
    let link = Arc::new(Link::heard_at(process.services.clock.tick()));
    let mut share = process.budget.small_share();
    share.cover_message(bytes.len(), 10).await;
    let outline = Outline::of(&report, &bytes);
    let inbound = Inbound::new(report, outline, share);
    let exchanged = exchanged(&process, inbound, peer, link).await;
    let polled = match exchanged.refusal {
        Some(Refusal::Unavailable { .. }) => Polled::Later,
        _ => Polled::Offer(Box::new(exchanged.offer)),
    };
    let _gone = answer.send(polled);
}

async fn exchanged(
    process: &Arc<Process>,
    mut inbound: Inbound,
    peer: SocketAddr,
    link: Arc<Link>,
) -> Exchanged {
    let services = &process.services;
    let mut agent = match sender(services, &inbound.report) {
        Ok(Sender::Agent(agent)) => agent,
        Ok(Sender::Anonymous) => return introduce(services, &inbound.report),
        Err(exchanged) => return *exchanged,
    };
    if services.hub.get(agent).is_none() && !admits_newcomer(process) {
        let uid = inbound.report.instance_uid.clone();
        return reject(services, &uid, Refusal::Unavailable { retry_after_seconds: 30 });
    }
    let origin = Origin { transport: Transport::Http, remote_addr: peer, link };
    loop {
        match seated(process, &origin, agent, &mut inbound).await {
            Exchange::Done(exchanged) => return *exchanged,
            Exchange::Rival(uid) => agent = uid,
        }
    }
}

async fn seated(
    process: &Arc<Process>,
    origin: &Origin,
    agent: InstanceUid,
    inbound: &mut Inbound,
) -> Exchange {
    let services = &process.services;
    let seat = services.hub.seat(agent);
    let mut session = seat.lock().await;
    let polls = |connection: &Arc<OpenConnection>| connection.transport == Transport::Http;
    let known = services.hub.get(agent).filter(polls).map(|connection| Arc::clone(&connection.link));
    let _to_the_known = known.map(|link| Attending::since(process.services.clock.tick(), process, link));
    let _to_a_new = Attending::since(origin.link.last_byte(), process, Arc::clone(&origin.link));
    let heard = services.clock.moment(origin.link.last_byte());
    // Not every poll is taken in its turn: where the seat was given up, who waited for it comes after later ones.
    process.truth.own(agent, |own| own.polled = own.polled.max(Some((heard, process.node_id))));
    if let Some(session) = &*session {
        let id = session.connection().id;
        process.truth.taken(id, Transport::Http, process.node_id, None, heard);
    }
    let exchange = exchange(services, &mut session, origin, agent, inbound).await;
    if let Exchange::Done(exchanged) = &exchange
        && exchanged.refusal.is_some()
        && let Some(connection) = services.hub.get(agent).filter(polls)
    {
        connection.pulse.refused(origin.link.last_byte());
    }
    if let Some(session) = &*session {
        let id = session.connection().id;
        process.truth.taken(id, Transport::Http, process.node_id, None, heard);
        check::answered(process, agent, id, heard, &exchange);
        services.hub.keep_seat(agent, &seat);
    } else {
        services.hub.free_seat(agent);
    }
    exchange
}

/// A poll that the server works on.
struct Attending<'a> {
    process: &'a Process,
    link: Arc<Link>,
    began: Tick,
}

impl<'a> Attending<'a> {
    fn since(began: Tick, process: &'a Process, link: Arc<Link>) -> Self {
        link.turn_away();
        Self { process, link, began }
    }
}

impl Drop for Attending<'_> {
    fn drop(&mut self) {
        self.link.attend(self.began, self.process.services.clock.tick());
    }
}

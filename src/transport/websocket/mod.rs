//! One WebSocket, one task, one `select!`: frames in, offers out, a timer for pings.
//!
//! A link may carry several agents, each with a session of its own. Promises: an end the server
//! causes is on record before its Close frame is sent; a peer that does not read blocks nobody but
//! itself. It must not know what a report means or what the store does.

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::{FutureExt, SinkExt, StreamExt};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::Sleep;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::{CapacityError, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Message, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Bytes, Error};

use super::admission::{Admission, Place};
use super::intake::{self, Unfit};
use super::io::{Bearer, Metered};
use crate::agent::offer::{Answer, Refusal, compose};
use crate::agent::{InstanceUid, Sender};
use crate::burden::Share;
use crate::clock::Tick;
use crate::close::CloseReason;
use crate::history::{EndTicket, Noticed};
use crate::metrics::{DecodeFailure, Metrics, Refused};
use crate::proto::{AgentToServer, ServerToAgent};
use crate::pulse::Link;
use crate::session::{Exchange, Inbound, Origin, Services, Session, exchange, introduce, reject, sender};
use crate::store::Transport;
use crate::wire::{self, WireError};

/// The read buffer of a link in bytes: what an idle agent costs, see the crate's measurements.
const READ_BUFFER: usize = 1 << 10;

/// How long a link may carry no agent.
const LONELY: Duration = Duration::from_secs(10);

/// How long to wait for the peer's Close frame.
const CLOSING: Duration = Duration::from_secs(5);

/// Malformed messages in a row after which a link is closed.
const MALFORMED_LIMIT: u32 = 5;

/// The task of an upgraded connection; `None` where the upgrade was not of this listener.
pub(super) async fn link(
    services: Arc<Services>,
    admission: Arc<Admission>,
    place: Place,
    upgraded: Upgraded,
    peer: SocketAddr,
    link: Arc<Link>,
) -> Option<impl Future<Output = ()> + Send + 'static> {
    let parts = upgraded.downcast::<TokioIo<Metered>>().ok()?;
    let limit = Some(admission.limits().max_message_size);
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(0)
        .max_message_size(limit)
        .max_frame_size(limit);
    let mut socket = parts.io.into_inner();
    socket.upgrade(&parts.read_buf);
    let socket = if parts.read_buf.is_empty() {
        WebSocketStream::from_raw_socket(socket, Role::Server, Some(config)).await
    } else {
        WebSocketStream::from_partially_read(socket, parts.read_buf.to_vec(), Role::Server, Some(config))
            .await
    };
    let lonely_since = Some(services.clock.tick());
    let agents = Agents {
        services,
        admission,
        origin: Origin { transport: Transport::Websocket, remote_addr: peer, link },
        sessions: Vec::with_capacity(1),
        speaker: None,
        malformed: 0,
        lonely_since,
        curious: false,
    };
    // In a box, because a future keeps every argument twice: this is what an idle agent costs.
    Some(Box::new(LinkTask { socket, agents, _place: place }).run())
}

/// Why a link ends.
#[derive(Clone, Copy, Debug)]
enum End {
    /// Close with this reason: the server's, or the offending frame's.
    Close(CloseReason),
    /// A text message: close with 1003.
    Text,
    /// A message was not whole in time.
    Stalled,
    /// Nobody is on it: close it quietly.
    Lonely,
    /// The peer sent Close.
    ClosedByPeer,
    /// The transport broke, as seen by reading.
    Broken,
    /// The transport broke by a reset or a failed write: nobody knows when the peer was gone.
    Unwritable,
}

/// A socket and the agents on it.
struct LinkTask<S> {
    socket: WebSocketStream<S>,
    agents: Agents,
    _place: Place,
}

/// The agents on a link.
struct Agents {
    services: Arc<Services>,
    admission: Arc<Admission>,
    origin: Origin,
    /// Sorted by uid.
    sessions: Vec<(InstanceUid, Option<Session>)>,
    /// Who spoke last: a protocol error is theirs.
    speaker: Option<InstanceUid>,
    /// Malformed messages in a row.
    malformed: u32,
    /// Since when nobody is on the link.
    lonely_since: Option<Tick>,
    /// True where a session is to be asked something before it reports by itself.
    curious: bool,
}

/// What to do about a message.
enum Take {
    /// Send this frame: it answers a mere sign of life, or what is no report.
    Answer(Vec<u8>),
    /// The report, of so many elements, wants more than a look at its session.
    Process(Box<(AgentToServer, usize)>),
    /// It is too heavy to be looked at here and now.
    Unfold,
}

impl<S> LinkTask<S>
where
    S: AsyncRead + AsyncWrite + Bearer + Unpin + Send,
{
    async fn run(mut self: Box<Self>) {
        let _counted = Counted::new(&self.agents.services.metrics, &self.agents.origin.link);
        let end = match AssertUnwindSafe(self.converse()).catch_unwind().await {
            Ok(end) => end,
            Err(_panic) => {
                self.agents.services.metrics.link_panics.increment(1);
                tracing::error!(peer = %self.agents.origin.remote_addr, "the task of a link panicked; the link is closed");
                End::Close(CloseReason::InternalError)
            }
        };
        Box::pin(self.finish(end)).await;
    }

    async fn converse(&mut self) -> End {
        let mut timer = Box::pin(tokio::time::sleep(LONELY.min(self.agents.patience())));
        loop {
            let step = tokio::select! {
                biased;
                () = self.agents.origin.link.woken() => self.agents.look_around(),
                frame = self.socket.next() => match frame {
                    Some(Ok(Message::Binary(bytes))) => self.on_message(bytes).await,
                    other => self.agents.on_other(other),
                },
                () = &mut timer => match self.agents.on_timer(timer.as_mut()) {
                    Ok(true) => {
                        self.agents.curious = true;
                        self.send(Message::Ping(Bytes::new())).await
                    }
                    Ok(false) => Ok(()),
                    Err(end) => Err(end),
                },
            };
            let step = match step {
                Ok(()) if self.agents.curious => Box::pin(self.ask()).await,
                step => step,
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    /// Answers one message. A mere sign of life is answered on the spot.
    async fn on_message(&mut self, bytes: Bytes) -> Result<(), End> {
        let share = self.socket.get_mut().take_share();
        let frame = match wire::body_of_frame(&bytes).map(|body| bytes.slice_ref(body)) {
            Err(error) => self.agents.malformed(&error),
            Ok(body) => match self.agents.take(&body) {
                Take::Answer(frame) => frame,
                Take::Process(report) => Box::pin(self.agents.process(Some(report), body, share)).await?,
                Take::Unfold => {
                    drop(bytes);
                    Box::pin(self.agents.process(None, body, share)).await?
                }
            },
        };
        self.send(Message::Binary(frame.into())).await?;
        self.agents.note_company();
        if self.agents.malformed >= MALFORMED_LIMIT {
            return Err(End::Close(CloseReason::ProtocolError));
        }
        // A session that a newer connection displaced meanwhile must not speak again.
        self.agents.look_around()
    }

    /// Asks those for their full state who are to be asked: who lost its row, or was not asked in its turn.
    async fn ask(&mut self) -> Result<(), End> {
        self.agents.curious = false;
        for offer in self.agents.questions() {
            self.send(Message::Binary(wire::encode_frame(&offer).into())).await?;
        }
        Ok(())
    }

    /// Sends a message; gives up when the monitor has ended everybody on the link.
    async fn send(&mut self, message: Message) -> Result<(), End> {
        let agents = &mut self.agents;
        if agents.is_lonely() {
            // Nobody watches such a link: a peer that does not read is given up.
            let sent = tokio::time::timeout(LONELY, self.socket.send(message)).await;
            return sent.map_err(|_elapsed| End::Lonely)?.map_err(|_| End::Unwritable);
        }
        agents.origin.link.write_from(agents.services.clock.tick());
        let mut sending = self.socket.send(message);
        let result = loop {
            tokio::select! {
                biased;
                sent = &mut sending => break sent.map_err(|_| End::Unwritable),
                () = agents.origin.link.woken() => agents.look_around()?,
            }
        };
        agents.origin.link.written();
        result
    }

    /// Ends what is still open, puts it on record, and then closes the socket as the end demands.
    async fn finish(mut self: Box<Self>, end: End) {
        let tickets = self.agents.end(end);
        let frame = match end {
            End::Close(reason) => Some((reason.code(), reason.label())),
            End::Text => Some((1003, "OpAMP messages are binary")),
            End::Stalled => Some((1002, "the message was not whole in time")),
            End::Lonely => Some((1000, "no agent on this link")),
            End::ClosedByPeer => None,
            End::Broken | End::Unwritable => return,
        };
        if frame.is_some() {
            for ticket in tickets {
                ticket.recorded().await;
            }
        }
        let limit = self.agents.admission.limits().max_message_size.saturating_mul(2);
        let _peer_may_be_gone = tokio::time::timeout(CLOSING, close(&mut self.socket, frame, limit)).await;
    }
}

/// An open link in the metrics, until dropped.
struct Counted {
    metrics: Arc<Metrics>,
    link: Arc<Link>,
}

impl Counted {
    fn new(metrics: &Arc<Metrics>, link: &Arc<Link>) -> Self {
        metrics.links_open.increment(1.0);
        Self { metrics: Arc::clone(metrics), link: Arc::clone(link) }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.metrics.links_open.decrement(1.0);
        self.metrics.count_bytes(self.link.harvest());
    }
}

impl Agents {
    /// Lets go of sessions that were ended elsewhere; a link that lost its last one that way ends.
    ///
    /// Who only lost its row keeps its place and is asked to report, which opens a new one.
    fn look_around(&mut self) -> Result<(), End> {
        let (mut reason, mut adrift) = (None, false);
        let closing = self.services.closing.load(Ordering::Relaxed);
        self.sessions.retain_mut(|(_, session)| {
            let connection = session.as_ref().map(Session::connection);
            let recorded = connection.filter(|connection| connection.is_recorded());
            let ended = recorded.and_then(|connection| connection.ended());
            if ended == Some(CloseReason::ServerLost) && !closing {
                *session = None;
                adrift = true;
                return true;
            }
            reason = reason.or(ended);
            ended.is_none()
        });
        self.curious |= adrift;
        self.note_company();
        match reason {
            Some(reason) if self.sessions.is_empty() => Err(End::Close(reason)),
            _ if self.is_lonely() && self.origin.link.is_dismissed() => {
                Err(End::Close(CloseReason::ServerShutdown))
            }
            _ => Ok(()),
        }
    }

    /// The questions for those who are to be asked for their full state.
    fn questions(&mut self) -> Vec<ServerToAgent> {
        let asked = self.sessions.iter_mut().filter_map(|(agent, session)| match session {
            None => Some(compose(agent.as_bytes(), Answer { ask_full_state: true, new_uid: None })),
            Some(session) => session.overdue_question(),
        });
        asked.collect()
    }

    /// Takes whatever is not a binary message.
    fn on_other(&self, frame: Option<Result<Message, Error>>) -> Result<(), End> {
        match frame {
            Some(Ok(Message::Text(_))) => {
                self.services.metrics.decode_failures.of(DecodeFailure::Text).increment(1);
                Err(End::Text)
            }
            Some(Ok(Message::Binary(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => Ok(()),
            Some(Ok(Message::Close(_))) => Err(End::ClosedByPeer),
            Some(Err(error)) => Err(self.on_error(&error)),
            None => Err(End::Broken),
        }
    }

    fn on_error(&self, error: &Error) -> End {
        let failures = &self.services.metrics.decode_failures;
        match error {
            Error::Capacity(CapacityError::MessageTooLong { .. }) => {
                failures.of(DecodeFailure::TooLarge).increment(1);
                End::Close(CloseReason::MessageTooLarge)
            }
            Error::Io(error) if error.kind() == std::io::ErrorKind::OutOfMemory => {
                self.services.note_refusal(Refused::Memory);
                End::Close(CloseReason::InternalError)
            }
            Error::Io(error) if error.kind() == std::io::ErrorKind::TimedOut => {
                failures.of(DecodeFailure::Unfinished).increment(1);
                End::Stalled
            }
            // A reset may answer our own ping, long after the peer was gone: it proves nothing.
            Error::Io(_) => End::Unwritable,
            Error::Protocol(ProtocolError::ResetWithoutClosingHandshake)
            | Error::ConnectionClosed
            | Error::AlreadyClosed => End::Broken,
            Error::Utf8(_) => {
                failures.of(DecodeFailure::Text).increment(1);
                End::Text
            }
            Error::Protocol(_)
            | Error::Capacity(_)
            | Error::WriteBufferFull(_)
            | Error::AttackAttempt
            | Error::Tls(_)
            | Error::Url(_)
            | Error::Http(_)
            | Error::HttpFormat(_) => {
                failures.of(DecodeFailure::Frame).increment(1);
                End::Close(CloseReason::ProtocolError)
            }
        }
    }

    /// Looks at a message without waiting for anything.
    fn take(&mut self, body: &[u8]) -> Take {
        let Some(elements) = intake::light(body) else { return Take::Unfold };
        let report = match wire::decode_body(body) {
            Ok(report) => report,
            Err(error) => return Take::Answer(self.malformed(&error)),
        };
        self.malformed = 0;
        if let Ok(Sender::Agent(agent)) = Sender::of(&report)
            && let Ok(index) = self.sessions.binary_search_by_key(&agent, |(uid, _)| *uid)
            && let Some((_, Some(session))) = self.sessions.get_mut(index)
            && let Some(offer) = session.beat(&report, body)
        {
            self.speaker = Some(agent);
            return Take::Answer(wire::encode_frame(&offer));
        }
        Take::Process(Box::new((report, elements)))
    }

    /// Takes a message in that asks for more than a look; answers the frame to send.
    async fn process(
        &mut self,
        report: Option<Box<(AgentToServer, usize)>>,
        body: Bytes,
        share: Option<Box<Share>>,
    ) -> Result<Vec<u8>, End> {
        let link = Arc::clone(&self.origin.link);
        let turned_away = self.services.clock.tick();
        link.turn_away();
        let frame = match self.unfold(report, body, share).await {
            Ok(Ok(inbound)) => {
                self.malformed = 0;
                Ok(wire::encode_frame(&self.converse(inbound).await))
            }
            Ok(Err(Unfit::Wire(error))) => Ok(self.malformed(&error)),
            Ok(Err(Unfit::Crowded)) => {
                self.services.note_refusal(Refused::Memory);
                Ok(wire::encode_frame(&reject(&self.services, &self.only_uid(), come_later()).offer))
            }
            Err(end) => Err(end),
        };
        link.attend(turned_away, self.services.clock.tick());
        frame
    }

    /// Takes a message apart once there is memory for it; gives up when everybody on the link was ended.
    async fn unfold(
        &mut self,
        report: Option<Box<(AgentToServer, usize)>>,
        body: Bytes,
        share: Option<Box<Share>>,
    ) -> Result<Result<Inbound, Unfit>, End> {
        let (admission, link) = (Arc::clone(&self.admission), Arc::clone(&self.origin.link));
        let budget = admission.budget();
        let unfolding = async {
            if let Some(report) = report {
                return intake::weighed(*report, &body, budget).await;
            }
            intake::unfold(body, share.map(|share| *share), budget).await
        };
        let mut unfolding = pin!(unfolding);
        loop {
            tokio::select! {
                biased;
                unfolded = &mut unfolding => return Ok(unfolded),
                () = link.woken() => self.look_around()?,
            }
        }
    }

    /// Takes a report through the session of its agent, which its first report opens.
    async fn converse(&mut self, mut inbound: Inbound) -> ServerToAgent {
        let mut agent = match sender(&self.services, &inbound.report) {
            Ok(Sender::Agent(agent)) => agent,
            Ok(Sender::Anonymous) => return introduce(&self.services, &inbound.report).offer,
            Err(exchanged) => return exchanged.offer,
        };
        loop {
            match self.take_through(agent, &mut inbound).await {
                Exchange::Done(exchanged) => return exchanged.offer,
                Exchange::Rival(uid) => agent = uid,
            }
        }
    }

    /// Takes a report through the session of `agent`.
    async fn take_through(&mut self, agent: InstanceUid, inbound: &mut Inbound) -> Exchange {
        let uid = &inbound.report.instance_uid;
        self.speaker = Some(agent);
        let index = match self.sessions.binary_search_by_key(&agent, |(uid, _)| *uid) {
            Ok(index) => index,
            Err(_) if self.sessions.len() >= self.admission.limits().max_per_link => {
                self.services.note_refusal(Refused::PerLink);
                return Exchange::Done(Box::new(reject(&self.services, uid, come_later())));
            }
            // The first agent of a link was admitted with it.
            Err(_)
                if !self.sessions.is_empty() && !self.admission.admits_newcomer(&self.services.history) =>
            {
                self.services.note_refusal(Refused::Rate);
                return Exchange::Done(Box::new(reject(&self.services, uid, come_later())));
            }
            Err(index) => {
                self.sessions.insert(index, (agent, None));
                index
            }
        };
        let slot = &mut self.sessions[index].1;
        let exchange = exchange(&self.services, slot, &self.origin, agent, inbound).await;
        if slot.is_none() {
            self.sessions.remove(index);
        }
        exchange
    }

    /// Answers what is no report; the sequence state stays as it is, so that the next good one shows the gap.
    fn malformed(&mut self, error: &WireError) -> Vec<u8> {
        self.malformed += 1;
        let cause = match error {
            WireError::HeaderMissing | WireError::HeaderNotZero => DecodeFailure::Header,
            WireError::Protobuf(_) | WireError::Gzip => DecodeFailure::Protobuf,
            WireError::TooMany => DecodeFailure::TooMany,
            WireError::TooLarge { .. } => DecodeFailure::TooLarge,
        };
        self.services.metrics.decode_failures.of(cause).increment(1);
        let refusal = Refusal::BadRequest(error.to_string());
        wire::encode_frame(&reject(&self.services, &self.only_uid(), refusal).offer)
    }

    /// The uid of the agent on a link of one: whoever sent what cannot be read.
    fn only_uid(&self) -> Vec<u8> {
        match self.sessions.as_slice() {
            [(only, _)] => only.as_bytes().to_vec(),
            _ => Vec::new(),
        }
    }

    /// True where no session is on the link.
    fn is_lonely(&self) -> bool {
        self.sessions.iter().all(|(_, session)| session.is_none())
    }

    /// Notes since when nobody is on the link.
    fn note_company(&mut self) {
        if !self.is_lonely() {
            self.lonely_since = None;
        } else if self.lonely_since.is_none() {
            self.lonely_since = Some(self.services.clock.tick());
        }
    }

    /// True where it is time to ping: a link that was silent for a while, then every third of that.
    fn on_timer(&self, timer: Pin<&mut Sleep>) -> Result<bool, End> {
        let clock = &self.services.clock;
        let now = clock.tick();
        let patience = self.patience();
        if let Some(since) = self.lonely_since {
            // A first message that is on its way has a limit of its own.
            let since = if self.origin.link.is_receiving() { now } else { since };
            timer.reset(clock.instant(since.after(LONELY).min(now.after(patience))));
            return if now.since(since) >= LONELY { Err(End::Lonely) } else { Ok(false) };
        }
        let due = self.origin.link.last_byte().after(patience);
        let ping = now >= due;
        timer.reset(clock.instant(if ping { now.after(patience / 3) } else { due }));
        Ok(ping)
    }

    /// How long a link may be silent before it is pinged: three fifths of the time-out.
    fn patience(&self) -> Duration {
        self.services.history.expected().timeout / 5 * 3
    }

    /// Ends the connections that are still open; answers what to wait for until that is on record.
    fn end(&mut self, end: End) -> Vec<EndTicket> {
        let (reason, noticed) = match end {
            End::Close(reason @ (CloseReason::ProtocolError | CloseReason::MessageTooLarge)) => {
                (reason, Noticed::Seen)
            }
            End::Close(reason) => (reason, Noticed::Concluded),
            End::Text => (CloseReason::ProtocolError, Noticed::Seen),
            End::Stalled => (CloseReason::ProtocolError, Noticed::Concluded),
            End::ClosedByPeer => (CloseReason::ClosedByAgent, Noticed::Seen),
            End::Lonely | End::Broken => (CloseReason::ConnectionLost, Noticed::Seen),
            End::Unwritable => (CloseReason::ConnectionLost, Noticed::Concluded),
        };
        let offence = matches!(reason, CloseReason::ProtocolError | CloseReason::MessageTooLarge);
        let shared = self.sessions.len() > 1;
        let mut tickets = Vec::new();
        for (agent, session) in self.sessions.drain(..) {
            // One agent's offence on a shared link is not the others': for them the server hangs up.
            let bystander = offence && shared && self.speaker != Some(agent);
            let (reason, noticed) =
                if bystander { (CloseReason::InternalError, Noticed::Concluded) } else { (reason, noticed) };
            tickets.extend(session.and_then(|session| session.end(reason, noticed)));
        }
        tickets
    }
}

/// Sends the Close frame, or answers the peer's, and waits for the other side (S-063).
///
/// What the peer still sends is thrown away, up to `limit` bytes: a socket closed with unread bytes
/// is reset, and then the peer may never see the Close frame.
async fn close<S>(
    socket: &mut WebSocketStream<S>,
    frame: Option<(u16, &'static str)>,
    limit: usize,
) -> Result<(), Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    match frame {
        Some((code, reason)) => {
            socket.close(Some(CloseFrame { code: code.into(), reason: reason.into() })).await?;
            while let Some(Ok(_)) = socket.next().await {}
        }
        None => socket.flush().await?,
    }
    let socket = socket.get_mut();
    socket.shutdown().await?;
    let (mut discarded, mut waste) = (0, [0; READ_BUFFER]);
    while discarded < limit {
        match socket.read(&mut waste).await? {
            0 => break,
            bytes => discarded += bytes,
        }
    }
    Ok(())
}

fn come_later() -> Refusal {
    Refusal::Unavailable { retry_after_seconds: 30 }
}

#[cfg(test)]
mod tests;

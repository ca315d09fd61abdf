//! One WebSocket, one task, one `select!`: frames in, offers out, a timer for pings.
//!
//! A link may carry several agents, each with a session of its own. Promises: an end the server
//! causes is on record before its Close frame is sent; a peer that does not read blocks nobody but
//! itself. It must not know what a report means or what the store does.

mod agents;

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt, SinkExt, StreamExt};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::{CapacityError, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Message, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Bytes, Error};

use self::agents::{Agents, Take};
use super::admission::{Admission, Place};
use super::io::{Bearer, Metered};
use crate::close::CloseReason;
use crate::metrics::{DecodeFailure, Metrics, Refused};
use crate::pulse::Link;
use crate::session::{Origin, Services};
use crate::store::Transport;
use crate::wire;

/// The read buffer of a link in bytes: what an idle agent costs, see the crate's measurements.
const READ_BUFFER: usize = 1 << 10;

/// How long a link may carry no agent.
const LONELY: Duration = Duration::from_secs(10);

/// How long to wait for the peer's Close frame.
const CLOSING: Duration = Duration::from_secs(5);

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
    let origin = Origin { transport: Transport::Websocket, remote_addr: peer, link };
    let agents = Agents::new(services, admission, origin);
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
                    other => self.on_other(other),
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

    /// Takes whatever is not a binary message.
    fn on_other(&self, frame: Option<Result<Message, Error>>) -> Result<(), End> {
        match frame {
            Some(Ok(Message::Text(_))) => {
                self.agents.services.metrics.decode_failures.of(DecodeFailure::Text).increment(1);
                Err(End::Text)
            }
            Some(Ok(Message::Binary(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => Ok(()),
            Some(Ok(Message::Close(_))) => Err(End::ClosedByPeer),
            Some(Err(error)) => Err(self.on_error(&error)),
            None => Err(End::Broken),
        }
    }

    fn on_error(&self, error: &Error) -> End {
        let failures = &self.agents.services.metrics.decode_failures;
        match error {
            Error::Capacity(CapacityError::MessageTooLong { .. }) => {
                failures.of(DecodeFailure::TooLarge).increment(1);
                End::Close(CloseReason::MessageTooLarge)
            }
            Error::Io(error) if error.kind() == std::io::ErrorKind::OutOfMemory => {
                self.agents.services.note_refusal(Refused::Memory);
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
        self.agents.refuse_nonsense()?;
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
                if ticket.recorded().await.is_none() {
                    return;
                }
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

#[cfg(test)]
mod tests;

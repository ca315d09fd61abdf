//! A link to the server, whatever the transport: reports go in, offers come out.
//!
//! Promises that both transports look alike to the agent and that waiting for an offer may be
//! given up at any moment without loss. Must not know what reports and offers mean.

mod http1;
mod polling;
mod shared;
mod websocket;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use opamp_server::proto::AgentToServer;
use tokio::time::timeout;

pub(crate) use self::shared::Sockets;
use self::{polling::Poller, shared::Seat, websocket::Socket};
use crate::{
    endpoint::{CONNECT_LIMIT, Endpoint, Transport},
    loss::Loss,
};

/// The largest offer taken.
const MAX_OFFER: usize = 64 * 1024 * 1024;
/// How long an agent that leaves in good order waits for the server.
const FAREWELL_LIMIT: Duration = Duration::from_secs(5);

/// One agent's way to the server.
pub(crate) enum Link {
    WebSocket(Box<Socket>),
    Shared(Box<Seat>),
    Http(Box<Poller>),
}

impl Link {
    /// A link of the agent's own, or its seat on one of those `shared`.
    pub(crate) async fn open(
        endpoint: Arc<Endpoint>,
        shared: Option<&Sockets>,
        agent: usize,
    ) -> Result<Self, Loss> {
        let opening = async {
            Ok(match (endpoint.transport, shared) {
                (Transport::WebSocket, None) => {
                    Self::WebSocket(Box::new(Socket::open(&endpoint, agent).await?))
                }
                (Transport::WebSocket, Some(shared)) => {
                    Self::Shared(Box::new(shared.join(&endpoint, agent).await?))
                }
                (Transport::Http, _) => Self::Http(Box::new(Poller::open(endpoint, agent).await?)),
            })
        };
        let limited = timeout(CONNECT_LIMIT, Box::pin(opening)).await;
        limited.unwrap_or(Err(Loss::TimedOut))
    }

    /// Whether another report may be sent while `unanswered` ones are under way.
    pub(crate) fn has_room(&self, unanswered: usize) -> bool {
        match self {
            Self::WebSocket(_) | Self::Shared(_) => unanswered < websocket::MAX_UNANSWERED,
            Self::Http(_) => unanswered == 0,
        }
    }

    pub(crate) async fn send(&mut self, report: &AgentToServer) -> Result<(), Loss> {
        match self {
            Self::WebSocket(socket) => socket.send(report).await,
            Self::Shared(seat) => seat.send(report).await,
            Self::Http(poller) => poller.send(report).await,
        }
    }

    /// The bytes of the next offer. Dropping the future before it is ready loses nothing.
    pub(crate) async fn next(&mut self) -> Result<Bytes, Loss> {
        match self {
            Self::WebSocket(socket) => socket.next().await,
            Self::Shared(seat) => seat.next().await,
            Self::Http(poller) => poller.next().await,
        }
    }

    /// Says farewell and waits, within limits, until the server has taken notice of it.
    pub(crate) async fn leave(mut self, farewell: &AgentToServer) -> bool {
        let leaving = async {
            match &mut self {
                Self::WebSocket(socket) => socket.leave(farewell).await,
                Self::Shared(seat) => seat.leave(farewell).await,
                Self::Http(poller) => poller.leave(farewell).await,
            }
        };
        matches!(timeout(FAREWELL_LIMIT, leaving).await, Ok(Ok(())))
    }

    /// Ends what is left of a link that is lost: a Close frame may still be owed.
    pub(crate) async fn hang_up(self, loss: &Loss) {
        if let Self::WebSocket(mut socket) = self {
            socket.hang_up(loss).await;
        }
    }
}

//! The WebSocket transport: one header byte, then the protobuf, in binary messages.
//!
//! Promises small buffers, as there are thousands of links, and that Ping and Close are answered
//! as the protocol demands. Must not know what the messages mean.

use std::time::Duration;

use bytes::{Buf, Bytes};
use futures_util::{SinkExt, StreamExt};
use opamp_server::proto::AgentToServer;
use prost::Message as _;
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{
        Message,
        protocol::{CloseFrame, WebSocketConfig, frame::coding::CloseCode},
    },
};

use super::MAX_OFFER;
use crate::{endpoint::Endpoint, loss::Loss};

/// The only header there is: the number 0.
const HEADER: u8 = 0;
const READ_BUFFER: usize = 1024;
/// More than that a server may be behind only if it stands still; then heartbeats wait.
pub(super) const MAX_UNANSWERED: usize = 32;
const HANG_UP_LIMIT: Duration = Duration::from_secs(1);

/// A report as it goes over the socket.
pub(super) fn frame(report: &AgentToServer) -> Vec<u8> {
    let mut frame = Vec::with_capacity(1 + report.encoded_len());
    frame.push(HEADER);
    report.encode_raw(&mut frame);
    frame
}

pub(crate) struct Socket {
    stream: WebSocketStream<TcpStream>,
}

impl Socket {
    pub(super) async fn open(endpoint: &Endpoint, turn: usize) -> Result<Self, Loss> {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER)
            .write_buffer_size(0)
            .max_message_size(Some(MAX_OFFER))
            .max_frame_size(Some(MAX_OFFER));
        let tcp = endpoint.dial(turn).await?;
        let (stream, _) = client_async_with_config(endpoint.upgrade(), tcp, Some(config)).await?;
        Ok(Self { stream })
    }

    pub(super) async fn send(&mut self, report: &AgentToServer) -> Result<(), Loss> {
        self.send_frame(frame(report).into()).await
    }

    pub(super) async fn send_frame(&mut self, frame: Bytes) -> Result<(), Loss> {
        Ok(self.stream.send(Message::Binary(frame)).await?)
    }

    pub(super) async fn next(&mut self) -> Result<Bytes, Loss> {
        loop {
            match self.stream.next().await.ok_or(Loss::Eof)?? {
                Message::Binary(mut frame) => {
                    if frame.first() != Some(&HEADER) {
                        return Err(Loss::Malformed("bad_header"));
                    }
                    frame.advance(1);
                    return Ok(frame);
                }
                Message::Text(_) => return Err(Loss::Malformed("text_frame")),
                Message::Close(frame) => return Err(Loss::closed(frame.map(|f| f.code.into()))),
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
            }
        }
    }

    /// Fails unless the server answers the Close frame.
    pub(super) async fn leave(&mut self, farewell: &AgentToServer) -> Result<(), Loss> {
        self.send(farewell).await?;
        self.close_and_wait().await
    }

    /// Fails unless the server answers the Close frame.
    pub(super) async fn close_and_wait(&mut self) -> Result<(), Loss> {
        self.close(CloseCode::Normal).await?;
        loop {
            match self.next().await {
                Ok(_) => {}
                Err(Loss::Closed(_)) => return Ok(()),
                Err(loss) => return Err(loss),
            }
        }
    }

    /// Best effort: the link is given up in any case.
    pub(super) async fn hang_up(&mut self, loss: &Loss) {
        let closing = async {
            match loss {
                // The library has the answer to the Close frame ready; it only must go out.
                Loss::Closed(_) => Ok(self.stream.flush().await?),
                Loss::Unavailable(_) => self.close(CloseCode::Normal).await,
                Loss::Malformed(_) => self.close(CloseCode::Protocol).await,
                Loss::Refused(..) | Loss::Eof | Loss::Io(_) | Loss::TimedOut => Ok(()),
            }
        };
        let _ = timeout(HANG_UP_LIMIT, closing).await;
    }

    async fn close(&mut self, code: CloseCode) -> Result<(), Loss> {
        let frame = CloseFrame { code, reason: "".into() };
        Ok(self.stream.send(Message::Close(Some(frame))).await?)
    }
}

//! The agents' end of the wire: WebSocket frames and polls, written and read byte by byte.
//!
//! Nothing here answers a ping or closes by itself: an agent that falls silent must be silent. Reading can be
//! broken off at any moment and goes on later.

use std::io;
use std::net::SocketAddr;

use bytes::{Buf, BytesMut};
use opamp_server::proto::{AgentToServer, ServerToAgent};
use prost::Message as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const FIN: u8 = 0x80;
const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xa;

/// The key every frame is masked with.
const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

/// What a server sends.
#[derive(Debug)]
pub(crate) enum Frame {
    Offer(Box<ServerToAgent>),
    Ping(Vec<u8>),
    Close(u16, String),
}

/// An answer over plain HTTP.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
}

/// A socket and what was read from it ahead.
#[derive(Debug)]
pub(crate) struct Socket {
    stream: TcpStream,
    inbox: BytesMut,
}

fn broken(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

impl Socket {
    pub(crate) async fn dial(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, inbox: BytesMut::new() })
    }

    /// Our own address, which the server writes into the history.
    pub(crate) fn address(&self) -> String {
        self.stream.local_addr().map_or_else(|_| "unknown".to_owned(), |address| address.to_string())
    }

    /// Asks for a WebSocket; answers the status.
    pub(crate) async fn shake_hands(&mut self, host: SocketAddr) -> io::Result<u16> {
        let request = format!(
            "GET /v1/opamp HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        self.stream.write_all(request.as_bytes()).await?;
        let (status, _length) = self.read_head().await?;
        Ok(status)
    }

    /// Sends a request and reads its answer.
    pub(crate) async fn request(&mut self, head: &str, body: &[u8]) -> io::Result<Answer> {
        let mut bytes = format!("{head}Content-Length: {}\r\n\r\n", body.len()).into_bytes();
        bytes.extend_from_slice(body);
        self.stream.write_all(&bytes).await?;
        let (status, length) = self.read_head().await?;
        while self.inbox.len() < length {
            self.read_more().await?;
        }
        Ok(Answer { status, body: self.inbox.split_to(length).to_vec() })
    }

    /// One poll.
    pub(crate) async fn poll(&mut self, host: SocketAddr, report: &AgentToServer) -> io::Result<Answer> {
        let head =
            format!("POST /v1/opamp HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/x-protobuf\r\n");
        self.request(&head, &report.encode_to_vec()).await
    }

    async fn read_more(&mut self) -> io::Result<()> {
        if self.stream.read_buf(&mut self.inbox).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// Reads the head of an answer: its status and the length of its body.
    async fn read_head(&mut self) -> io::Result<(u16, usize)> {
        loop {
            if let Some(end) = self.inbox.windows(4).position(|four| four == b"\r\n\r\n") {
                let head = self.inbox.split_to(end + 4);
                let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
                let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
                let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
                let length = length.and_then(|length| length.trim().parse().ok()).unwrap_or(0);
                return Ok((status.ok_or_else(|| broken("no status line"))?, length));
            }
            self.read_more().await?;
        }
    }

    /// Sends a report in one frame.
    pub(crate) async fn send(&mut self, report: &AgentToServer) -> io::Result<()> {
        let mut content = vec![0];
        content.extend(report.encode_to_vec());
        self.stream.write_all(&frame(BINARY, &content)).await
    }

    pub(crate) async fn pong(&mut self, payload: &[u8]) -> io::Result<()> {
        self.stream.write_all(&frame(PONG, payload)).await
    }

    pub(crate) async fn close(&mut self, code: u16) -> io::Result<()> {
        self.stream.write_all(&frame(CLOSE, &code.to_be_bytes())).await
    }

    /// Says that nothing more comes: FIN.
    pub(crate) async fn finish(&mut self) -> io::Result<()> {
        self.stream.shutdown().await
    }

    /// Breaks off with a reset.
    pub(crate) fn reset(self) {
        // Without the option the drop is a FIN, which the record would not know; loopback has it.
        let _on_every_system = self.stream.set_zero_linger();
    }

    /// The next frame; none at the end of the stream.
    pub(crate) async fn receive(&mut self) -> io::Result<Option<Frame>> {
        loop {
            if let Some(frame) = self.parse()? {
                return Ok(Some(frame));
            }
            if self.stream.read_buf(&mut self.inbox).await? == 0 {
                return Ok(None);
            }
        }
    }

    /// The first whole frame of what was read.
    fn parse(&mut self) -> io::Result<Option<Frame>> {
        let Some((&first, rest)) = self.inbox.split_first() else { return Ok(None) };
        let (length, head) = match rest {
            [126, high, low, ..] => (u64::from(u16::from_be_bytes([*high, *low])), 4),
            [127, length @ ..] if length.len() >= 8 => {
                let length = length.first_chunk::<8>().copied().unwrap_or_default();
                (u64::from_be_bytes(length), 10)
            }
            [length @ ..=125, ..] => (u64::from(*length), 2),
            [126 | 127, ..] | [] => return Ok(None),
            [_masked, ..] => return Err(broken("a server masks nothing")),
        };
        let length = usize::try_from(length).map_err(|_| broken("a frame beyond memory"))?;
        if self.inbox.len() < head + length {
            return Ok(None);
        }
        self.inbox.advance(head);
        let payload = self.inbox.split_to(length).freeze();
        match (first, payload.split_first()) {
            (first, Some((0, offer))) if first == FIN | BINARY => {
                let offer = ServerToAgent::decode(offer).map_err(|_| broken("no offer"))?;
                Ok(Some(Frame::Offer(Box::new(offer))))
            }
            (first, _) if first == FIN | PING => Ok(Some(Frame::Ping(payload.to_vec()))),
            (first, _) if first == FIN | CLOSE => {
                let (code, reason) = payload.split_at_checked(2).unwrap_or_default();
                let code = code.try_into().map_or(1005, u16::from_be_bytes);
                Ok(Some(Frame::Close(code, String::from_utf8_lossy(reason).into_owned())))
            }
            _ => Err(broken("no frame that this server sends")),
        }
    }
}

/// A whole frame as agents send it.
fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![FIN | opcode];
    match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
        (Ok(length @ ..=125), _) => bytes.push(0x80 | length),
        (_, Ok(length)) => {
            bytes.push(0x80 | 0x7e);
            bytes.extend(length.to_be_bytes());
        }
        _ => {
            bytes.push(0x80 | 0x7f);
            bytes.extend((payload.len() as u64).to_be_bytes());
        }
    }
    bytes.extend(MASK);
    bytes.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    bytes
}

//! A WebSocket written frame by frame, so that a test can send what no client library would.

use opamp_server::proto::{AgentToServer, ServerToAgent};
use prost::Message as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::http::{Http, Response};
use super::server::{Ports, SOON};

/// The last frame of a message.
pub(crate) const FIN: u8 = 0x80;
pub(crate) const CONTINUATION: u8 = 0x0;
pub(crate) const TEXT: u8 = 0x1;
pub(crate) const BINARY: u8 = 0x2;
pub(crate) const CLOSE: u8 = 0x8;
pub(crate) const PING: u8 = 0x9;
pub(crate) const PONG: u8 = 0xa;

/// What a handshake asks for.
pub(crate) const HANDSHAKE: [(&str, &str); 4] = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

/// The key every frame of these tests is masked with.
const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

/// A frame as agents send it: `first` is its first byte, the payload is masked.
pub(crate) fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = head(first, payload.len() as u64);
    bytes.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    bytes
}

/// The head of a frame that announces so many bytes.
pub(crate) fn head(first: u8, length: u64) -> Vec<u8> {
    let mut bytes = vec![first];
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(length @ ..=125), _) => bytes.push(0x80 | length),
        (_, Ok(length)) => {
            bytes.push(0x80 | 0x7e);
            bytes.extend(length.to_be_bytes());
        }
        _ => {
            bytes.push(0x80 | 0x7f);
            bytes.extend(length.to_be_bytes());
        }
    }
    bytes.extend(MASK);
    bytes
}

/// A report as the content of a WebSocket message: header zero, then protobuf.
pub(crate) fn content(report: &AgentToServer) -> Vec<u8> {
    let mut bytes = vec![0];
    report.encode(&mut bytes).expect("a vector grows");
    bytes
}

/// A report as one whole frame.
pub(crate) fn framed(report: &AgentToServer) -> Vec<u8> {
    frame(FIN | BINARY, &content(report))
}

/// A WebSocket behind its handshake, in bytes.
#[derive(Debug)]
pub(crate) struct Frames {
    stream: BufReader<TcpStream>,
}

impl Frames {
    pub(crate) async fn connect(server: &Ports) -> Self {
        Self::open(server, &[]).await.0
    }

    /// Shakes hands with further headers; answers the handshake's answer too.
    pub(crate) async fn open(server: &Ports, headers: &[(&str, &str)]) -> (Self, Response) {
        let mut http = Http::connect(server.agents).await;
        let headers: Vec<_> = HANDSHAKE.iter().chain(headers).copied().collect();
        let answer = http.send("GET", "/v1/opamp", &headers, &[]).await;
        assert_eq!(answer.status, 101, "{}", answer.text());
        (Self::upgraded(http), answer)
    }

    /// The WebSocket behind a handshake that succeeded.
    pub(crate) fn upgraded(http: Http) -> Self {
        Self { stream: http.into_stream() }
    }

    /// Connects and sends the first report; answers the offer too.
    pub(crate) async fn greet(server: &Ports, first: &AgentToServer) -> (Self, ServerToAgent) {
        let mut frames = Self::connect(server).await;
        let offer = frames.exchange(first).await;
        (frames, offer)
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).await.expect("the bytes are written");
    }

    pub(crate) async fn exchange(&mut self, report: &AgentToServer) -> ServerToAgent {
        self.write(&framed(report)).await;
        self.offer().await
    }

    /// The next frame that is no ping: opcode and payload; none at the end of the stream.
    ///
    /// Every frame of a server is whole, unmasked and without reserved bits.
    pub(crate) async fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            let next = tokio::time::timeout(SOON, self.read()).await.expect("something comes in time");
            if next.as_ref().is_none_or(|(opcode, _)| *opcode != PING) {
                return next;
            }
        }
    }

    async fn read(&mut self) -> Option<(u8, Vec<u8>)> {
        let first = self.stream.read_u8().await.ok()?;
        assert_eq!(first & 0xf0, FIN, "a whole frame without reserved bits: {first:#x}");
        let second = self.stream.read_u8().await.expect("a length");
        assert_eq!(second & 0x80, 0, "a server masks nothing");
        let length = match second {
            126 => u64::from(self.stream.read_u16().await.expect("a length of two bytes")),
            127 => self.stream.read_u64().await.expect("a length of eight bytes"),
            length => u64::from(length),
        };
        let mut payload = vec![0; usize::try_from(length).expect("a length fits into memory")];
        self.stream.read_exact(&mut payload).await.expect("the whole payload");
        Some((first & 0x0f, payload))
    }

    /// The next offer.
    pub(crate) async fn offer(&mut self) -> ServerToAgent {
        let Some((BINARY, message)) = self.receive().await else { panic!("no offer comes") };
        assert_eq!(message.first(), Some(&0), "the header is one zero byte (S-005)");
        ServerToAgent::decode(&message[1..]).expect("an offer")
    }

    /// Waits for the Close frame, answers it, and waits for the end (S-063); answers code and reason.
    pub(crate) async fn closed(&mut self) -> (u16, String) {
        let next = self.receive().await;
        let Some((CLOSE, payload)) = next else { panic!("no Close frame but {next:?}") };
        let (code, reason) = payload.split_at_checked(2).expect("a Close frame of a server has a code");
        // The server may have heard enough.
        let _the_end_tells = self.stream.get_mut().write_all(&frame(FIN | CLOSE, code)).await;
        self.ended().await;
        let code = u16::from_be_bytes([code[0], code[1]]);
        (code, String::from_utf8(reason.to_vec()).expect("a reason is text"))
    }

    /// Waits for the end of the stream; nothing comes before it.
    pub(crate) async fn ended(&mut self) {
        assert_eq!(self.receive().await, None, "nothing comes before the end");
    }

    /// Says that nothing more comes: FIN, without a Close frame.
    pub(crate) async fn finish(&mut self) {
        self.stream.get_mut().shutdown().await.expect("the socket is open");
    }
}

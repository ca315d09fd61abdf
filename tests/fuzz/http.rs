//! Raw bytes on the agents' listener of a whole server in this process, many connections at a time.
//!
//! An input is a byte that says how the bytes are sent, and the bytes. Whatever they are: the server stays, the
//! agents that speak beside them are answered, no task panics, and what comes back is HTTP (or, after an upgrade,
//! WebSocket frames with OpAMP in them).

use std::io::Read as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use fastrand::Rng;
use flate2::read::GzDecoder;
use futures_util::future::join_all;
use futures_util::{SinkExt, StreamExt};
use opamp_server::agent::InstanceUid;
use opamp_server::config::{Config, Secret};
use opamp_server::proto::{AgentToServer, ServerToAgent};
use opamp_server::server::Server;
use opamp_server::wire;
use prost::Message as _;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::protocol::Message;
use tokio_tungstenite::{WebSocketStream, client_async};

use crate::engine::{Happened, Outcome, Target};
use crate::{frame, mutate};

/// How the names of the server's threads begin, by which a panic on them is told from others: those of its runtime, and
/// those on which links live.
const THREADS: [&str; 3] = ["fuzz-server", "lane-", "door"];

/// The largest message the server takes.
const LARGEST_MESSAGE: usize = 1 << 20;

/// How many agents speak beside the hostile ones.
const WITNESSES: usize = 8;

/// After so many batches the witnesses are asked.
const CHECK_EVERY: usize = 16;

/// How long an answer may keep everybody waiting before the sender stops sending.
const IDLE: Duration = Duration::from_millis(25);

/// How long a connection may stay open once its peer has stopped sending.
const CLOSING: Duration = Duration::from_secs(15);

/// Panics on the server's threads.
static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Sockets opened so far: each comes from an address of its own, or the ports would run out.
static OPENED: AtomicU32 = AtomicU32::new(0);

/// An agent that is to be served whatever happens beside it.
struct Witness {
    report: AgentToServer,
    socket: WebSocketStream<TcpStream>,
}

impl Witness {
    async fn come(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.expect("the port is open");
        let (socket, _) =
            client_async(format!("ws://{address}/v1/opamp"), stream).await.expect("a handshake");
        let uid = InstanceUid::generate().as_bytes().to_vec();
        let report = AgentToServer { instance_uid: uid, capabilities: 1, ..AgentToServer::default() };
        let mut witness = Self { report, socket };
        // A link that nobody speaks on is closed after a while.
        witness.speak().await.expect("its first report is answered");
        witness
    }

    async fn speak(&mut self) -> Result<(), String> {
        self.report.sequence_num += 1;
        let mut bytes = vec![0];
        self.report.encode(&mut bytes).map_err(|error| error.to_string())?;
        self.socket.send(Message::Binary(bytes.into())).await.map_err(|error| error.to_string())?;
        loop {
            let next = timeout(Duration::from_secs(20), self.socket.next());
            match next.await.map_err(|_| "no answer to a witness".to_owned())? {
                Some(Ok(Message::Binary(bytes))) => {
                    let offer = bytes.get(1..).and_then(|body| ServerToAgent::decode(body).ok());
                    let fine = offer.as_ref().is_some_and(|offer| {
                        offer.instance_uid == self.report.instance_uid && offer.error_response.is_none()
                    });
                    return fine.then_some(()).ok_or_else(|| format!("a witness was answered {offer:?}"));
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                other => return Err(format!("a witness' link ended: {other:?}")),
            }
        }
    }
}

/// The target: a server and those who speak beside the hostile ones.
pub(crate) struct Http {
    runtime: Runtime,
    address: SocketAddr,
    witnesses: Vec<Witness>,
    batches: usize,
    panics: usize,
    _database: TempDir,
}

impl Http {
    /// Starts the server.
    #[expect(clippy::disallowed_methods, reason = "the server ends with the process")]
    pub(crate) fn start() -> Self {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let thread = std::thread::current();
            let name = thread.name().unwrap_or_default();
            if THREADS.iter().any(|threads| name.starts_with(threads)) {
                PANICS.fetch_add(1, Ordering::SeqCst);
            }
            usual(panic);
        }));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .thread_name(THREADS[0])
            .enable_all()
            .build()
            .expect("a runtime");
        let database = tempfile::tempdir().expect("a folder");
        let mut config = Config::default();
        config.agents.listen = SocketAddr::from(([127, 0, 0, 1], 0));
        config.operators.listen = SocketAddr::from(([127, 0, 0, 1], 0));
        config.agents.max_message_size = LARGEST_MESSAGE;
        config.agents.max_connects_per_second = 10_000_000;
        config.agents.max_connections = 10_000;
        config.store.url = Secret::from(format!("sqlite://{}/fleet.db", database.path().display()));
        config.node.name = Some("node".to_owned());
        let (address, witnesses) = runtime.block_on(async {
            let server = Server::start(&config, true).await.expect("the server starts");
            let address = server.agents_address();
            tokio::spawn(async move {
                let ended = server.run(std::future::pending()).await;
                PANICS.fetch_add(1, Ordering::SeqCst);
                eprintln!("the server ended by itself: {ended:?}");
            });
            let mut witnesses = Vec::new();
            for _ in 0..WITNESSES {
                witnesses.push(Witness::come(address).await);
            }
            (address, witnesses)
        });
        Self { runtime, address, witnesses, batches: 0, panics: 0, _database: database }
    }
}

impl Target for Http {
    const NAME: &'static str = "http";
    const LARGEST: usize = 96 << 10;
    const AT_ONCE: usize = 128;
    const PATIENCE: Duration = Duration::from_secs(16);

    fn mutate(&self, rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
        mutate(rng, input, other)
    }

    fn run(&mut self, inputs: &[Vec<u8>]) -> Vec<Outcome> {
        let address = self.address;
        self.runtime.block_on(async {
            // On the server's threads, so that hostile peers and the server share them as they share a machine.
            let all = inputs.iter().map(|input| {
                let input = input.clone();
                let mut happened = Happened::default();
                async move {
                    let result = one(address, &input, &mut happened).await;
                    (happened, result)
                }
            });
            join_all(all).await
        })
    }

    fn check(&mut self) -> Result<(), String> {
        let panics = PANICS.load(Ordering::SeqCst);
        if panics != self.panics {
            self.panics = panics;
            return Err("a task of the server panicked, or the server ended".to_owned());
        }
        self.batches += 1;
        if !self.batches.is_multiple_of(CHECK_EVERY) {
            return Ok(());
        }
        let witnesses = &mut self.witnesses;
        self.runtime.block_on(async {
            join_all(witnesses.iter_mut().map(Witness::speak)).await.into_iter().collect::<Result<(), _>>()
        })
    }
}

/// Sends one input and judges what comes back.
async fn one(address: SocketAddr, input: &[u8], happened: &mut Happened) -> Result<(), String> {
    let Some((&control, bytes)) = input.split_first() else { return Ok(()) };
    let socket = TcpSocket::new_v4().map_err(|error| error.to_string())?;
    let number = OPENED.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    // Where only one loopback address exists, the ports have to do.
    let _best_effort = socket.bind(SocketAddr::from(([127, 9, number[2] % 250, 1 + number[3] % 250], 0)));
    let mut stream = timeout(CLOSING, socket.connect(address))
        .await
        .map_err(|_| "nobody accepts".to_owned())?
        .map_err(|error| format!("cannot connect: {error}"))?;
    let pieces = usize::from(1 + (control & 3));
    let mut received = Vec::new();
    let mut broken = false;
    for piece in bytes.chunks(bytes.len().div_ceil(pieces).max(1)) {
        // Whoever is refused may be hung up on while it sends.
        broken |= !matches!(timeout(CLOSING, stream.write_all(piece)).await, Ok(Ok(())));
        tokio::task::yield_now().await;
    }
    if control & 0b1100 == 0b1100 {
        happened.note("gone");
        return Ok(());
    }
    if control & 0b1100 == 0b0100 {
        let _may_be_gone = stream.shutdown().await;
    }
    let mut buffer = vec![0; 4 << 10];
    let mut over = false;
    let mut shut = false;
    while !over {
        let patience = if shut { CLOSING } else { IDLE };
        match timeout(patience, stream.read(&mut buffer)).await {
            Ok(Ok(0)) => over = true,
            Ok(Ok(read)) => {
                received.extend(&buffer[..read]);
                if !shut
                    && control & 0b1_0000 == 0
                    && judge(bytes, &received, true, &mut Happened::default()).is_ok()
                {
                    let _may_be_gone = stream.shutdown().await;
                    shut = true;
                }
            }
            Ok(Err(_)) => (over, broken) = (true, true),
            Err(_) if shut => return Err("the connection outlives its peer".to_owned()),
            Err(_) => {
                let _may_be_gone = stream.shutdown().await;
                shut = true;
            }
        }
    }
    judge(bytes, &received, !broken, happened)
}

/// The status codes the listener answers with, those of the HTTP library included.
const STATUSES: [u16; 15] = [100, 101, 200, 400, 401, 403, 404, 405, 408, 413, 414, 415, 426, 431, 503];

/// Whether what came back is HTTP, and OpAMP inside.
fn judge(sent: &[u8], mut received: &[u8], whole: bool, happened: &mut Happened) -> Result<(), String> {
    let heads = sent.windows(5).any(|word| word.eq_ignore_ascii_case(b"HEAD "));
    let cut = |what: &str| if whole { Err(what.to_owned()) } else { Ok(()) };
    while !received.is_empty() {
        let Some(end) = received.windows(4).position(|window| window == b"\r\n\r\n") else {
            return cut("an answer without the end of its head");
        };
        let head = std::str::from_utf8(&received[..end]).map_err(|_| "a head that is no text".to_owned())?;
        let mut lines = head.split("\r\n");
        let first = lines.next().unwrap_or_default();
        let status: u16 = first
            .strip_prefix("HTTP/1.1 ")
            .or_else(|| first.strip_prefix("HTTP/1.0 "))
            .and_then(|rest| rest.get(..3)?.parse().ok())
            .ok_or_else(|| format!("no status line: {first:?}"))?;
        if !STATUSES.contains(&status) {
            return Err(format!("an unknown status: {first:?}"));
        }
        let mut headers = Vec::new();
        for line in lines {
            let (name, value) = line.split_once(": ").ok_or_else(|| format!("no header: {line:?}"))?;
            if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
                || value.bytes().any(|byte| byte < b' ')
            {
                return Err(format!("no header: {line:?}"));
            }
            headers.push((name.to_ascii_lowercase(), value));
        }
        let find = |name: &str| headers.iter().find(|(key, _)| key == name).map(|(_, value)| *value);
        received = &received[end + 4..];
        happened.note((status, headers.len(), find("content-type")));
        match status {
            100 => continue,
            101 => return frames(received, whole, happened),
            _ => {}
        }
        if status == 503 && find("retry-after").is_none() {
            return Err("503 without a moment to come back".to_owned());
        }
        let length: usize = find("content-length")
            .and_then(|length| length.parse().ok())
            .ok_or_else(|| format!("an answer without its length: {head:?}"))?;
        if heads && (received.is_empty() || received.starts_with(b"HTTP/1.")) {
            continue;
        }
        let Some((body, rest)) = received.split_at_checked(length) else { return cut("half a body") };
        if status == 200 {
            offer(body, find("content-encoding"), happened)?;
        } else {
            happened.note((status, body));
        }
        received = rest;
    }
    Ok(())
}

/// The body of a 200 is an offer.
fn offer(body: &[u8], encoding: Option<&str>, happened: &mut Happened) -> Result<(), String> {
    let mut unpacked = Vec::new();
    let body = match encoding {
        None => body,
        Some("gzip") => {
            GzDecoder::new(body).read_to_end(&mut unpacked).map_err(|error| error.to_string())?;
            &unpacked
        }
        Some(other) => return Err(format!("an unknown encoding: {other}")),
    };
    let offer = ServerToAgent::decode(body).map_err(|error| format!("200 without an offer: {error}"))?;
    note(&offer, happened)
}

fn note(offer: &ServerToAgent, happened: &mut Happened) -> Result<(), String> {
    let error = offer.error_response.as_ref();
    if error.is_some() && (offer.capabilities, offer.flags) != (0, 0) {
        return Err(format!("an error does not travel alone: {offer:?}"));
    }
    let known = error.map(|error| error.error_message.chars().take(40).collect::<String>());
    happened.note((known, offer.flags, offer.capabilities, offer.agent_identification.is_some()));
    Ok(())
}

/// After the upgrade: whole, unmasked frames with offers in them.
fn frames(mut bytes: &[u8], whole: bool, happened: &mut Happened) -> Result<(), String> {
    let mut closed = false;
    while let [head, second, ..] = bytes {
        let (start, length) = match (second, bytes) {
            (126, [_, _, a, b, ..]) => (4, usize::from(u16::from_be_bytes([*a, *b]))),
            (0..126, _) => (2, usize::from(*second)),
            _ => return Err(format!("a frame of the server's with length byte {second}")),
        };
        let Some(payload) = bytes.get(start..start + length) else { break };
        bytes = &bytes[start + length..];
        if closed {
            return Err("a frame behind the Close frame".to_owned());
        }
        match head {
            0x82 => {
                let offer = payload.split_first().filter(|(zero, _)| **zero == 0);
                let offer = offer.and_then(|(_, body)| ServerToAgent::decode(body).ok());
                note(&offer.ok_or_else(|| "a binary message that is no offer".to_owned())?, happened)?;
            }
            0x88 => {
                closed = true;
                happened.note(("close", payload));
            }
            0x89 | 0x8a => happened.note(head),
            _ => return Err(format!("a frame with head {head:#x}")),
        }
    }
    if bytes.is_empty() || !whole { Ok(()) } else { Err("half a frame".to_owned()) }
}

/// Parts of requests.
const LINES: [&str; 34] = [
    "POST /v1/opamp HTTP/1.1",
    "GET /v1/opamp HTTP/1.1",
    "HEAD /v1/opamp HTTP/1.1",
    "OPTIONS * HTTP/1.1",
    "CONNECT /v1/opamp HTTP/1.1",
    "POST /v1/opamp HTTP/1.0",
    "POST http://x/v1/opamp?q=%00 HTTP/1.1",
    "PRI * HTTP/2.0",
    "Content-Type: application/x-protobuf",
    "Content-Type: application/x-protobuf; charset=\"",
    "Content-Type: text/plain",
    "Content-Encoding: gzip",
    "Content-Encoding: br",
    "Content-Encoding: identity",
    "Accept-Encoding: gzip",
    "Accept-Encoding: gzip;q=0, *;q=0.0001",
    "Content-Length: 0",
    "Content-Length: 22",
    "Content-Length: 18446744073709551615",
    "Content-Length: 1048577",
    "Content-Length: -1",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: identity",
    "Expect: 100-continue",
    "Connection: Upgrade",
    "Connection: close",
    "Upgrade: websocket",
    "Upgrade: h2c",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Origin: http://evil.example",
    "OpAMP-Instance-UID: 0190d3c2-7a10-7b3e-9c41-5d2e8f60a1b2",
    "Host: localhost",
];

/// The end of the first head.
fn body_of(bytes: &[u8]) -> usize {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map_or(bytes.len(), |at| at + 4)
}

/// One mutation of a request; of its bytes where it is none.
fn mutate(rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
    let (&control, bytes) = input.split_first().unwrap_or((&0, &[]));
    let (_, donor) = other.split_first().unwrap_or((&0, &[]));
    let (head, body) = bytes.split_at(body_of(bytes));
    let text = String::from_utf8_lossy(head);
    let mut lines: Vec<String> =
        text.split("\r\n").map(str::to_owned).filter(|line| !line.is_empty()).collect();
    let mut body = body.to_vec();
    let is_link = lines.iter().any(|line| line.eq_ignore_ascii_case("upgrade: websocket"));
    let mut control = control;
    let mut fits = rng.u8(0..4) > 0;
    if lines.is_empty() {
        lines.push(LINES[0].to_owned());
    }
    let at = rng.usize(0..lines.len());
    match rng.u8(0..16) {
        0 => control = rng.u8(..),
        1 => return [&[control], mutate::bytes(rng, bytes, donor).as_slice()].concat(),
        2 => LINES[rng.usize(0..LINES.len())].clone_into(&mut lines[at]),
        3 => lines.insert(at.max(1), LINES[rng.usize(8..LINES.len())].to_owned()),
        4 => {
            lines.remove(at);
        }
        5 => {
            let to = rng.usize(0..lines.len());
            lines.swap(at, to);
        }
        6 => {
            let changed = mutate::bytes(rng, lines[at].as_bytes(), b"\r\n: \t,;=\"\0\xff");
            lines[at] = String::from_utf8_lossy(&changed).into_owned();
        }
        7 if is_link => {
            for _ in 0..rng.usize(1..4) {
                body = frame::mutate(rng, &body, &donor[body_of(donor)..]);
            }
        }
        7..=9 if is_link => body = frame::mutate(rng, &body, &donor[body_of(donor)..]),
        7..=9 => body = mutate::message(rng, &body, &donor[body_of(donor)..]),
        10 => {
            if let Some(packed) = wire::gzip(&body) {
                body = packed;
                lines.push("Content-Encoding: gzip".to_owned());
            }
        }
        11 => {
            // A bomb, or a pack of packs.
            let bomb = vec![0; [1_000, LARGEST_MESSAGE, LARGEST_MESSAGE + 1, 20 << 20][rng.usize(0..4)]];
            body = wire::gzip(&bomb).unwrap_or_default().repeat(rng.usize(1..3));
            lines.push("Content-Encoding: gzip".to_owned());
        }
        12 => {
            let chunk = rng.usize(1..200);
            let framed = body
                .chunks(chunk)
                .flat_map(|chunk| [format!("{:x}\r\n", chunk.len()).as_bytes(), chunk, b"\r\n"].concat());
            body = framed.collect();
            if rng.u8(0..5) > 0 {
                body.extend(b"0\r\n\r\n");
            }
            lines.retain(|line| !line.to_ascii_lowercase().starts_with("content-length"));
            lines.push("Transfer-Encoding: chunked".to_owned());
            fits = false;
        }
        13 => {
            // One after the other, on one connection.
            body.extend(donor);
            fits = false;
        }
        14 => body = donor[body_of(donor)..].to_vec(),
        _ => body = mutate::bytes(rng, &body, donor),
    }
    if fits && lines.iter().any(|line| line.to_ascii_lowercase().starts_with("content-length")) {
        lines.retain(|line| !line.to_ascii_lowercase().starts_with("content-length"));
        lines.push(format!("Content-Length: {}", body.len()));
    }
    [&[control], lines.join("\r\n").as_bytes(), b"\r\n\r\n", &body].concat()
}

//! Limits on every phase of a peer, each met by a raw socket that stops in the middle of it.

#![expect(clippy::expect_used, reason = "in a test a panic with a sentence is the report")]

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use opamp_server::proto::ServerErrorResponseType;
use prost::Message as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::harness::Database;
use crate::harness::agent::{
    Agent, PROTOBUF, Poller, Socket, assert_acknowledged, description, effective_config, error_of,
};
use crate::harness::http::Http;
use crate::harness::server::{Process, TestServer, eventually};

/// How much later than its limit a phase may end.
const SLACK: Duration = Duration::from_secs(6);

const HANDSHAKE: &[u8] =
    b"GET /v1/opamp HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

/// A peer that writes what it likes.
struct Peer {
    stream: TcpStream,
    connected: Instant,
}

impl Peer {
    async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.expect("the port is open");
        Self { stream, connected: Instant::now() }
    }

    /// A peer behind a WebSocket handshake.
    async fn upgraded(address: SocketAddr) -> Self {
        let mut peer = Self::connect(address).await;
        peer.send(HANDSHAKE).await;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(peer.stream.read_u8().await.expect("the answer"));
        }
        assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
        peer.connected = Instant::now();
        peer
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("the server listens");
    }

    /// Sends a ping every now and then until the server hangs up.
    async fn ping_until_closed(mut self) -> (Duration, Vec<u8>) {
        let (mut all, mut buffer) = (Vec::new(), [0; 1024]);
        loop {
            match tokio::time::timeout(Duration::from_millis(500), self.stream.read(&mut buffer)).await {
                Ok(Ok(0) | Err(_)) => return (self.connected.elapsed(), all),
                Ok(Ok(read)) => all.extend(&buffer[..read]),
                Err(_still_open) => {
                    let _hung_up_meanwhile = self.stream.write_all(&masked(0x89, b"")).await;
                }
            }
        }
    }

    /// Reads until the server hangs up; answers how long after the connect that was, and what it said.
    async fn until_closed(mut self) -> (Duration, Vec<u8>) {
        let mut all = Vec::new();
        let _reset_is_an_end = self.stream.read_to_end(&mut all).await;
        (self.connected.elapsed(), all)
    }
}

/// A masked frame with this first byte; the mask is zero.
fn masked(head: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).ok().filter(|length| *length < 126).expect("a short frame");
    [&[head, 0x80 | length, 0, 0, 0, 0][..], payload].concat()
}

/// The Close code in what a server said at last.
fn close_code(said: &[u8]) -> Option<u16> {
    let frame = said.windows(4).rposition(|window| window[0] == 0x88)?;
    Some(u16::from_be_bytes([said[frame + 2], said[frame + 3]]))
}

/// Silence, half a head, half a body, half a frame, and fragments that pings keep alive: each has its
/// time, and not more. A good agent beside them lives on.
#[tokio::test]
async fn no_phase_lasts_for_ever() {
    let server = TestServer::fresh().await;
    let address = server.agents;
    let mut good = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &good.full()).await;

    let silent = Peer::connect(address).await;
    let mut half_head = Peer::connect(address).await;
    half_head.send(b"POST /v1/opamp HTTP/1.1\r\nHost: x\r\n").await;
    let mut second_head = Peer::connect(address).await;
    second_head.send(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n").await;
    second_head.stream.read_u8().await.expect("an answer");
    second_head.send(b"GET /nowhere HT").await;
    let mut half_body = Peer::connect(address).await;
    let head = b"POST /v1/opamp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-protobuf\r\nContent-Length: 50\r\n\r\n";
    half_body.send(&[&head[..], b"0123"].concat()).await;
    let mut half_frame = Peer::upgraded(address).await;
    half_frame.send(&masked(0x82, &[0; 50])[..20]).await;
    let mut fragments = Peer::upgraded(address).await;
    fragments.send(&masked(0x02, &[0; 50])).await;
    let lonely = Peer::upgraded(address).await;

    let (ten, thirty) = (Duration::from_secs(10), Duration::from_secs(30));
    let closings = [
        ("silent", ten, silent.until_closed().await),
        ("half a head", ten, half_head.until_closed().await),
        ("half of a second head", ten, second_head.until_closed().await),
        ("lonely", ten, lonely.until_closed().await),
    ];
    let (body, frame, fragments) =
        tokio::join!(half_body.until_closed(), half_frame.until_closed(), fragments.ping_until_closed());
    assert!(body.1.starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&body.1));
    assert_eq!((close_code(&frame.1), close_code(&fragments.1)), (Some(1002), Some(1002)));
    let late = [("body", thirty, body), ("frame", thirty, frame), ("fragments", thirty, fragments)];
    for (phase, limit, (took, _)) in closings.into_iter().chain(late) {
        assert!(took + Duration::from_millis(200) >= limit, "{phase} was cut short after {took:?}");
        // A message's time runs from its first byte, and until its Close frame is answered.
        assert!(took <= limit + SLACK, "{phase} lasted {took:?}");
    }
    let failures = server.metrics().await.value("opamp_decode_failures_total{cause=\"unfinished\"}");
    assert!((failures - 3.0).abs() < 0.5, "{failures}");
    assert_acknowledged(&socket.exchange(&good.report()).await, good.uid);
}

/// What is not admitted is told so before the upgrade, with a moment to come back that differs from one to the next.
#[tokio::test]
async fn too_many_links_are_refused_with_a_spread_retry_after() {
    let server = TestServer::with(|config| config.agents.max_connections = 3).await;
    let mut agents: Vec<Agent> = (0..3).map(|_| Agent::new()).collect();
    let mut sockets = Vec::new();
    for agent in &mut agents {
        sockets.push(Socket::greet(&server, &agent.full()).await.0);
    }
    let mut moments = std::collections::BTreeSet::new();
    for _ in 0..20 {
        let refusal = Socket::open(&server, "/v1/opamp", &[]).await.expect_err("there is no place");
        assert_eq!(refusal.status, 503);
        let seconds: u32 =
            refusal.header("retry-after").expect("when to come back").parse().expect("seconds");
        assert!((30..=60).contains(&seconds), "{seconds}");
        moments.insert(seconds);
    }
    assert!(moments.len() > 5, "spread: {moments:?}");
    let poll = Poller::connect(&server).await.post(&[], &Agent::new().full().encode_to_vec()).await;
    assert_eq!(poll.status, 503, "a poll is a socket too");
    assert!(server.metrics().await.value("opamp_refused_total{cause=\"connections\"}") >= 21.0);
    sockets.pop();
    eventually("the place is free again", async || Socket::is_let_in(&server).await.then_some(())).await;
}

/// Newcomers share a rate, on both transports; who is refused leaves no trace, and who is known is no newcomer.
#[tokio::test]
async fn newcomers_share_a_rate() {
    let server = TestServer::with(|config| config.agents.max_connects_per_second = 2).await;
    let mut known = Agent::new();
    let mut poller = Poller::connect(&server).await;
    poller.exchange(&known.full()).await;
    let mut refused = Vec::new();
    let began = Instant::now();
    for _ in 0..20 {
        let newcomer = Agent::new();
        let answer = poller.post(&[], &newcomer.clone().full().encode_to_vec()).await;
        assert!([200, 503].contains(&answer.status), "{}", answer.text());
        if answer.status == 503 {
            assert!(answer.header("retry-after").is_some());
            refused.push(newcomer);
        }
        assert_acknowledged(&poller.exchange(&known.report()).await, known.uid);
    }
    let let_in = 20 - refused.len() as u64;
    let fair = 2 * (began.elapsed().as_secs() + 1) + 2;
    assert!(let_in <= fair, "{let_in} in {:?}", began.elapsed());
    assert!(!refused.is_empty());
    for agent in &refused {
        assert_eq!(server.agent(agent.uid).await, None, "no trace");
    }
    assert!(server.metrics().await.value("opamp_refused_total{cause=\"rate\"}") >= 1.0);
}

/// On a link the rate counts for every agent after the first: `Unavailable`, no row, and the link lives.
#[tokio::test]
async fn further_agents_on_a_link_share_the_rate() {
    let server = TestServer::with(|config| config.agents.max_connects_per_second = 1).await;
    let mut first = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &first.full()).await;
    let mut refused = 0;
    for _ in 0..5 {
        let mut next = Agent::new();
        let offer = socket.exchange(&next.full()).await;
        if offer.error_response.is_some() {
            error_of(&offer, ServerErrorResponseType::Unavailable);
            assert_eq!(server.agent(next.uid).await, None);
            refused += 1;
        }
    }
    assert!(refused >= 3, "{refused}");
    assert_acknowledged(&socket.exchange(&first.report()).await, first.uid);
}

/// Large messages wait for each other where the budget is small; small ones wait for nobody; all come through.
#[tokio::test]
async fn large_messages_wait_for_the_budget() {
    let server = TestServer::with(|config| config.agents.max_inflight = 1 << 20).await;
    // Three large messages that stop short of their end, by which two of them exhaust the budget.
    let mut config = Agent::with(0x1 | 0x4).full();
    config.effective_config = Some(effective_config(&"x".repeat(900_000)));
    let mut hogs = Vec::new();
    for _ in 0..3 {
        let mut hog = Peer::upgraded(server.agents).await;
        let length = 900_100_u64;
        let mut frame = vec![0x82, 0xff];
        frame.extend(length.to_be_bytes());
        frame.extend([0; 4]);
        frame.resize(frame.len() + 800_000, 0);
        // The server stops reading: what the kernel does not take is never written.
        let _not_read = tokio::time::timeout(Duration::from_millis(200), hog.stream.write_all(&frame)).await;
        hogs.push(hog);
    }
    let mut small = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &small.full()).await;
    assert_acknowledged(&socket.exchange(&small.report()).await, small.uid);
    drop(hogs);
    let mut agents: Vec<Agent> = (0..4).map(|_| Agent::with(0x1 | 0x4)).collect();
    let greetings = agents.iter_mut().map(|agent| {
        let mut report = agent.full();
        report.effective_config.clone_from(&config.effective_config);
        let ports = *server;
        async move {
            let (_socket, offer) = Socket::greet(&ports, &report).await;
            assert_eq!(offer.error_response, None);
        }
    });
    join_all(greetings).await;
}

/// An answer that is never read blocks nobody else, and its reader is ended as `slow_reader` at its deadline.
#[tokio::test]
async fn an_answer_that_is_never_read_ends_its_reader() {
    let server = TestServer::with(|config| config.heartbeat.timeout = Duration::from_secs(2)).await;
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4_096).expect("the option is known");
    let stream = socket.connect(server.agents).await.expect("the port is open");
    let mut peer = Peer { stream, connected: Instant::now() };
    peer.send(HANDSHAKE).await;
    let mut agent = Agent::new();
    let first = [&[0][..], &agent.full().encode_to_vec()].concat();
    peer.send(&masked(0x82, &first)).await;
    let sign_of_life = masked(0x82, &[&[0][..], &agent.bare().encode_to_vec()].concat());
    let many = sign_of_life.repeat(1_000);
    // Until the server has stopped reading, because what it has to say is not read.
    while tokio::time::timeout(Duration::from_millis(500), peer.stream.write_all(&many)).await.is_ok() {}
    let mut other = Agent::new();
    assert_acknowledged(&Socket::greet(&server, &other.full()).await.1, other.uid);
    assert_eq!(server.until_ended(agent.uid).await["disconnect_reason"], "slow_reader");
    assert_eq!(server.status(agent.uid).await["status"], "offline");
}

/// Handshakes that never come to an end keep nobody out.
#[tokio::test]
async fn ten_thousand_half_open_handshakes_keep_nobody_out() {
    let database = Database::sqlite();
    let server = Process::start(&database, &[]).await;
    let mut half_open = Vec::new();
    for _ in 0..10_000 {
        let mut peer = Peer::connect(server.agents).await;
        peer.send(&HANDSHAKE[..60]).await;
        half_open.push(peer);
    }
    let mut agents: Vec<Agent> = (0..50).map(|_| Agent::new()).collect();
    for agent in &mut agents {
        let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
        assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    }
    assert_eq!(server.read("/api/v1/agents/summary").await["total"], 50);
}

/// A refused body is read and thrown away, so that the sender sees the status and not a reset.
#[tokio::test]
async fn a_refused_body_is_answered_where_the_sender_sees_it() {
    let server = TestServer::with(|config| config.agents.max_message_size = 100_000).await;
    let body = vec![0x0a; 190_000];
    let mut http = Http::connect(server.agents).await;
    let announced = http.send("POST", "/v1/opamp", &[PROTOBUF], &body).await;
    assert_eq!(announced.status, 413, "{}", announced.text());
    let mut http = Http::connect(server.agents).await;
    let chunked = http.send_chunked("POST", "/v1/opamp", &[PROTOBUF], &body).await;
    assert_eq!(chunked.status, 413, "{}", chunked.text());
    let mut http = Http::connect(server.agents).await;
    let encoded = http.send("POST", "/v1/opamp", &[PROTOBUF, ("Content-Encoding", "br")], &body).await;
    assert_eq!(encoded.status, 415, "{}", encoded.text());
}

/// A frame that announces 2^63 bytes is refused by its head, and nothing is set aside for it.
#[tokio::test]
async fn a_frame_of_two_to_the_63_is_refused_by_its_head() {
    let server = TestServer::fresh().await;
    let mut peer = Peer::upgraded(server.agents).await;
    let announced = [&[0x82, 0xff][..], &(1_u64 << 63).to_be_bytes(), &[0; 4]].concat();
    peer.send(&announced).await;
    let (_, said) = peer.until_closed().await;
    assert!(matches!(close_code(&said), Some(1002 | 1009)), "{said:?}");
    let metrics = server.metrics().await;
    let counted = ["too_large", "frame"]
        .map(|cause| metrics.value(&format!("opamp_decode_failures_total{{cause=\"{cause}\"}}")));
    assert!((counted.iter().sum::<f64>() - 1.0).abs() < 0.5, "{counted:?}");
}

/// R-032: a message of very many elements is refused although it is small; the link lives.
#[tokio::test]
async fn r_032_a_message_of_very_many_elements_is_a_bad_request() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let mut many = agent.report();
    let pairs = vec![opamp_server::proto::KeyValue::default(); 300_000];
    let mut heavy = description(&[]);
    heavy.identifying_attributes = pairs;
    many.agent_description = Some(heavy);
    error_of(&socket.exchange(&many).await, ServerErrorResponseType::BadRequest);
    let next = agent.report();
    assert_eq!(socket.exchange(&next).await.flags & 1, 1, "the refused report is a gap");
}

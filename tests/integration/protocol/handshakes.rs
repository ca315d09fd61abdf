//! The listener's answers before any report: paths, methods, media types, tokens and handshakes.

use opamp_server::config::Config;
use prost::Message as _;

use crate::harness::agent::{Agent, PROTOBUF, Poller, Socket, assert_acknowledged, offer_in};
use crate::harness::frames::{Frames, HANDSHAKE};
use crate::harness::http::{Http, Response};
use crate::harness::server::TestServer;

/// A body that fits into no socket buffer.
const LARGE: usize = 8 << 20;

/// The token of these tests.
const TOKEN: (&str, &str) = ("Secret-Key", "123456");

/// A request: method, path, headers and body.
type Asked = (&'static str, &'static str, &'static [(&'static str, &'static str)], &'static [u8]);

/// The handshake without this header.
fn without(name: &str) -> Vec<(&'static str, &'static str)> {
    HANDSHAKE.into_iter().filter(|(key, _)| *key != name).collect()
}

/// The handshake with this header instead of its own.
fn with(name: &'static str, value: &'static str) -> Vec<(&'static str, &'static str)> {
    let mut headers = without(name);
    headers.push((name, value));
    headers
}

async fn shake(server: &TestServer, headers: &[(&str, &str)]) -> Response {
    Http::connect(server.agents).await.send("GET", "/v1/opamp", headers, &[]).await
}

fn acknowledges(answer: &Response, agent: &Agent) {
    assert_acknowledged(&offer_in(answer), agent.uid);
}

/// S-002, S-003, S-012: port, path and size limit of the protocol are the defaults.
#[test]
fn s_002_port_path_and_limit_of_the_protocol_are_the_defaults() {
    let agents = Config::default().agents;
    assert_eq!(agents.listen.port(), 4320);
    assert_eq!(agents.path, "/v1/opamp");
    assert_eq!(agents.max_message_size, 64 << 20);
}

/// S-014: what is neither a poll nor a whole handshake is 426 and told what is missing.
#[tokio::test]
async fn s_014_an_incomplete_handshake_is_426() {
    let server = TestServer::fresh().await;
    let cases = [
        ("nothing", Vec::new()),
        ("no key", without("Sec-WebSocket-Key")),
        ("no version", without("Sec-WebSocket-Version")),
        ("no upgrade", without("Upgrade")),
        ("no connection", without("Connection")),
        ("an old version", with("Sec-WebSocket-Version", "8")),
        ("a new version", with("Sec-WebSocket-Version", "14")),
        ("another protocol", with("Upgrade", "h2c")),
        ("no intention", with("Connection", "keep-alive")),
    ];
    for (what, headers) in cases {
        let answer = shake(&server, &headers).await;
        assert_eq!(answer.status, 426, "{what}");
        assert_eq!(answer.header("upgrade"), Some("websocket"), "{what}");
        assert_eq!(answer.header("sec-websocket-version"), Some("13"), "{what}");
        assert!(!answer.text().is_empty(), "{what}: it says what it wants");
    }
    let post = Http::connect(server.agents).await.send("POST", "/v1/opamp", &HANDSHAKE, &[]).await;
    assert_eq!(post.status, 426, "a handshake is a GET");
}

/// S-001: the words of a handshake count in any case and among others.
#[tokio::test]
async fn s_001_a_handshake_is_read_in_any_case_and_in_lists() {
    let server = TestServer::fresh().await;
    for headers in [
        with("Connection", "keep-alive, Upgrade"),
        with("Connection", "UPGRADE"),
        with("Upgrade", "WebSocket"),
        with("Upgrade", "h2c, websocket"),
    ] {
        let answer = shake(&server, &headers).await;
        assert_eq!(answer.status, 101, "{headers:?}");
        assert_eq!(answer.header("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
    }
}

/// S-001: no subprotocol is demanded and none chosen, and extensions are declined.
#[tokio::test]
async fn s_001_subprotocols_and_extensions_are_declined() {
    let server = TestServer::fresh().await;
    let offered = [
        ("Sec-WebSocket-Protocol", "opamp, v1.opamp"),
        (
            "Sec-WebSocket-Extensions",
            "permessage-deflate; server_no_context_takeover; client_no_context_takeover",
        ),
    ];
    let (mut frames, answer) = Frames::open(&server, &offered).await;
    assert_eq!(answer.header("sec-websocket-protocol"), None);
    assert_eq!(answer.header("sec-websocket-extensions"), None);
    let mut agent = Agent::new();
    assert_acknowledged(&frames.exchange(&agent.full()).await, agent.uid);
}

/// S-003: another path is 404 for both transports, and that comes before any question for a token.
#[tokio::test]
async fn s_003_another_path_is_404_before_anything_else() {
    let server = TestServer::with(|config| config.agents.token = Some("123456".into())).await;
    let mut agent = Agent::new();
    for path in ["/", "/v1", "/v1/", "/v1/opamp/", "/v1/opampx", "/V1/OPAMP", "/v1//opamp", "/v1/opamp/x"] {
        let mut http = Http::connect(server.agents).await;
        let poll = http.send("POST", path, &[PROTOBUF], &agent.full().encode_to_vec()).await;
        assert_eq!(poll.status, 404, "{path}");
        assert!(poll.text().contains("/v1/opamp"), "it says where: {}", poll.text());
        let handshake = Http::connect(server.agents).await.send("GET", path, &HANDSHAKE, &[]).await;
        assert_eq!(handshake.status, 404, "{path}");
    }
}

/// S-003: the path is the path: a query, and the absolute form of a proxy, change nothing.
#[tokio::test]
async fn s_003_a_query_and_the_absolute_form_are_the_same_path() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut http = Http::connect(server.agents).await;
    let absolute = format!("http://{}/v1/opamp", server.agents);
    for target in ["/v1/opamp?tenant=blue", "/v1/opamp?", &absolute] {
        let answer = http.send("POST", target, &[PROTOBUF], &agent.full().encode_to_vec()).await;
        acknowledges(&answer, &agent);
    }
    let answer = shake_at(&server, "/v1/opamp?tenant=blue").await;
    assert_eq!(answer.status, 101);
}

async fn shake_at(server: &TestServer, target: &str) -> Response {
    Http::connect(server.agents).await.send("GET", target, &HANDSHAKE, &[]).await
}

/// R-030: a poll is a POST; every other method with the media type of one is 405.
#[tokio::test]
async fn r_030_every_method_but_post_is_405() {
    let server = TestServer::fresh().await;
    let mut http = Http::connect(server.agents).await;
    for method in ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "REPORT"] {
        let answer = http.send(method, "/v1/opamp", &[PROTOBUF], &[]).await;
        assert_eq!((answer.status, answer.header("allow")), (405, Some("POST")), "{method}");
    }
}

/// S-014: media types that only look like the one of OpAMP are none.
#[tokio::test]
async fn s_014_other_media_types_are_no_polls() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let body = agent.full().encode_to_vec();
    for media_type in [
        "application/x-protobuf2",
        "application/protobuf",
        "application/octet-stream",
        "text/plain; application/x-protobuf",
        "application/json",
        "",
    ] {
        let mut http = Http::connect(server.agents).await;
        let answer = http.send("POST", "/v1/opamp", &[("Content-Type", media_type)], &body).await;
        assert_eq!(answer.status, 426, "{media_type:?}");
    }
    for media_type in ["application/x-protobuf ;v=1", "APPLICATION/X-PROTOBUF", " application/x-protobuf"] {
        let mut http = Http::connect(server.agents).await;
        let answer = http.send("POST", "/v1/opamp", &[("Content-Type", media_type)], &body).await;
        acknowledges(&answer, &agent);
    }
    assert_eq!(server.read("/api/v1/agents").await["total"], 1);
}

/// S-014: the media type decides even where a handshake comes with it.
#[tokio::test]
async fn s_014_a_handshake_with_the_media_type_of_a_poll_is_a_poll() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let headers: Vec<_> = HANDSHAKE.into_iter().chain([PROTOBUF]).collect();
    let mut http = Http::connect(server.agents).await;
    let answer = http.send("POST", "/v1/opamp", &headers, &agent.full().encode_to_vec()).await;
    acknowledges(&answer, &agent);
    assert_eq!(shake(&server, &headers).await.status, 405);
}

/// S-021: a connection that is kept alive serves polls one after another, pipelined ones in order.
#[tokio::test]
async fn s_021_a_connection_serves_many_polls() {
    let server = TestServer::fresh().await;
    let mut agents = [Agent::new(), Agent::new()];
    let mut poller = Poller::connect(&server).await;
    for _ in 0..10 {
        for agent in &mut agents {
            assert_acknowledged(&poller.exchange(&agent.full()).await, agent.uid);
        }
    }
    let mut pipelined = Vec::new();
    for agent in &mut agents {
        let body = agent.report().encode_to_vec();
        let head = format!(
            "POST /v1/opamp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-protobuf\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        pipelined.extend(head.bytes().chain(body));
    }
    let mut http = Http::connect(server.agents).await;
    http.write(&pipelined).await;
    for agent in &agents {
        acknowledges(&http.read().await, agent);
        assert_eq!(server.history(agent.uid).await.len(), 1, "S-018: however many sockets, one stay");
    }
}

/// S-021: HTTP/1.0 is answered, and its connection closed, or kept where it asks for that.
#[tokio::test]
async fn s_021_http_1_0_is_answered() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut poll = |keep: &str| {
        let body = agent.full().encode_to_vec();
        let head = format!(
            "POST /v1/opamp HTTP/1.0\r\n{keep}Content-Type: application/x-protobuf\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        [head.into_bytes(), body].concat()
    };
    let polls = [poll("Connection: keep-alive\r\n"), poll(""), poll("Connection: close\r\n")];
    let mut http = Http::connect(server.agents).await;
    for bytes in &polls[..2] {
        acknowledges(&http.send_bytes(bytes).await, &agent);
    }
    http.ended().await;
    let mut http = Http::connect(server.agents).await;
    acknowledges(&http.send_bytes(&polls[2]).await, &agent);
    http.ended().await;
}

/// A connection serves on after each refusal: whoever is refused once is not disconnected for it.
#[tokio::test]
async fn s_021_a_connection_serves_on_after_each_refusal() {
    let server = TestServer::with(|config| {
        config.agents.max_message_size = 10_000;
        config.agents.token = Some("123456".into());
    })
    .await;
    let refusals: [(Asked, u16); 9] = [
        (("POST", "/elsewhere", &[TOKEN, PROTOBUF], &[]), 404),
        (("POST", "/elsewhere", &[TOKEN, PROTOBUF], &[7; 500]), 404),
        (("POST", "/v1/opamp", &[PROTOBUF], &[7; 500]), 401),
        (("PUT", "/v1/opamp", &[TOKEN, PROTOBUF], &[7; 500]), 405),
        (("POST", "/v1/opamp", &[TOKEN, PROTOBUF, ("Content-Encoding", "br")], &[7; 500]), 415),
        (("POST", "/v1/opamp", &[TOKEN, PROTOBUF, ("Content-Encoding", "gzip")], &[7; 500]), 400),
        (("POST", "/v1/opamp", &[TOKEN, PROTOBUF], &[7; 15_000]), 413),
        (("GET", "/v1/opamp", &[TOKEN], &[]), 426),
        (("POST", "/v1/opamp", &[TOKEN], &[7; 500]), 426),
    ];
    for ((method, path, headers, body), status) in refusals {
        // In one packet, so that the body is there when the head is refused.
        let mut bytes = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n");
        for (name, value) in headers {
            bytes.extend([*name, ": ", *value, "\r\n"]);
        }
        let mut bytes = format!("{bytes}Content-Length: {}\r\n\r\n", body.len()).into_bytes();
        bytes.extend(body);
        let mut http = Http::connect(server.agents).await;
        let refusal = http.send_bytes(&bytes).await;
        assert_eq!(refusal.status, status, "{method} {path}");
        if refusal.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
            http.ended().await;
            continue;
        }
        let mut agent = Agent::new();
        let body = agent.full().encode_to_vec();
        let answer = http.send("POST", "/v1/opamp", &[TOKEN, PROTOBUF], &body).await;
        acknowledges(&answer, &agent);
    }
}

/// S-023: a refusal is seen although the body is large and nobody reads it: 401, 404, 405 and 426 alike.
#[tokio::test]
async fn s_023_a_refusal_is_seen_although_the_body_is_large() {
    let server = TestServer::with(|config| config.agents.token = Some("123456".into())).await;
    let body = vec![7; LARGE];
    let refusals: [(Asked, u16); 4] = [
        (("POST", "/v1/opamp", &[PROTOBUF], &[]), 401),
        (("POST", "/elsewhere", &[TOKEN, PROTOBUF], &[]), 404),
        (("PUT", "/v1/opamp", &[TOKEN, PROTOBUF], &[]), 405),
        (("POST", "/v1/opamp", &[TOKEN], &[]), 426),
    ];
    for ((method, path, headers, _), status) in refusals {
        for _ in 0..3 {
            let mut http = Http::connect(server.agents).await;
            assert_eq!(http.send(method, path, headers, &body).await.status, status);
        }
    }
}

/// S-022, S-023: the token in every accepted spelling, and everything that is not it.
#[tokio::test]
async fn s_022_the_token_in_every_spelling() {
    let server = TestServer::with(|config| config.agents.token = Some("123456".into())).await;
    let accepted = [
        ("authorization", "Bearer 123456"),
        ("authorization", "bearer 123456"),
        ("authorization", "BEARER  123456"),
        ("secret-key", "123456"),
    ];
    for header in accepted {
        assert!(Socket::open(&server, "/v1/opamp", &[header]).await.is_ok(), "{header:?}");
    }
    let refused = [
        ("authorization", "Bearer"),
        ("authorization", "Bearer "),
        ("authorization", "Bearer 1234567"),
        ("authorization", "Bearer 123456 7"),
        ("authorization", "123456"),
        ("authorization", "Token 123456"),
        ("secret-key", ""),
        ("secret-key", "Bearer 123456"),
        ("x-secret-key", "123456"),
        ("cookie", "token=123456"),
    ];
    for header in refused {
        let Err(refusal) = Socket::open(&server, "/v1/opamp", &[header]).await else {
            panic!("{header:?} was let in");
        };
        assert_eq!(refusal.status, 401, "{header:?}");
        assert_eq!(refusal.header("www-authenticate"), Some("Bearer"), "{header:?}");
        let body = refusal.json();
        let error = body["error"].as_str().unwrap();
        assert!(["agent_token_required", "invalid_agent_token"].contains(&error), "{header:?}: {body}");
        assert!(!refusal.text().contains("123456"), "{header:?}: a secret is told: {body}");
    }
    let metrics = server.metrics().await;
    // Each was refused twice: the harness asks again in plain words to see the answer.
    let counted = metrics.value("opamp_refused_total{cause=\"unauthorized\"}");
    assert!((counted - 20.0).abs() < 0.5, "{counted}");
}

/// A client that asks before it sends its body is told to go on, and then answered.
#[tokio::test]
async fn s_017_expect_100_continue_is_answered_before_the_body() {
    let server = TestServer::with(|config| config.agents.token = Some("123456".into())).await;
    let mut agent = Agent::new();
    let body = agent.full().encode_to_vec();
    let head = |token: &str| {
        format!(
            "POST /v1/opamp HTTP/1.1\r\nHost: localhost\r\nSecret-Key: {token}\r\nExpect: 100-continue\r\n\
             Content-Type: application/x-protobuf\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes()
    };
    let mut http = Http::connect(server.agents).await;
    assert_eq!(http.send_bytes(&head("123456")).await.status, 100);
    acknowledges(&http.send_bytes(&body).await, &agent);
    let mut http = Http::connect(server.agents).await;
    assert_eq!(http.send_bytes(&head("wrong")).await.status, 401, "refused before the body is sent");
}

/// What is no HTTP is 400, and harms nobody else.
#[tokio::test]
async fn what_is_no_http_is_400() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut poller = Poller::connect(&server).await;
    for bytes in [
        &b"HELLO\r\n\r\n"[..],
        b"GET /v1/opamp SPDY/9\r\n\r\n",
        b"POST /v1/opamp HTTP/1.1\r\nContent-Length: many\r\n\r\n",
        b"POST /v1/opamp HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS hello\r\n\r\n",
    ] {
        let mut http = Http::connect(server.agents).await;
        let answer = http.send_bytes(bytes).await;
        assert_eq!(answer.status, 400, "{:?}", String::from_utf8_lossy(bytes));
        http.ended().await;
        assert_acknowledged(&poller.exchange(&agent.full()).await, agent.uid);
    }
}

/// S-001: a connection that served polls may become a WebSocket.
#[tokio::test]
async fn s_001_a_connection_that_polled_may_become_a_websocket() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut http = Http::connect(server.agents).await;
    let body = agent.full().encode_to_vec();
    acknowledges(&http.send("POST", "/v1/opamp", &[PROTOBUF], &body).await, &agent);
    assert_eq!(http.send("GET", "/v1/opamp", &HANDSHAKE, &[]).await.status, 101);
    let mut frames = Frames::upgraded(http);
    assert_acknowledged(&frames.exchange(&agent.report()).await, agent.uid);
    assert_eq!(server.status(agent.uid).await["active_connection"]["transport"], "websocket");
}

/// S-014: a handshake needs HTTP/1.1.
#[tokio::test]
async fn s_014_a_handshake_over_http_1_0_is_refused() {
    let server = TestServer::fresh().await;
    let mut bytes = b"GET /v1/opamp HTTP/1.0\r\nHost: localhost\r\n".to_vec();
    for (name, value) in HANDSHAKE {
        bytes.extend(format!("{name}: {value}\r\n").bytes());
    }
    bytes.extend(b"\r\n");
    let answer = Http::connect(server.agents).await.send_bytes(&bytes).await;
    assert!([400, 426, 505].contains(&answer.status), "{}", answer.status);
}

/// S-021: a refusal that is sent before the body has come either says that the connection ends, or it serves on.
#[tokio::test]
async fn s_021_a_refusal_ahead_of_the_body_announces_an_end_or_serves_on() {
    let server = TestServer::with(|config| config.agents.token = Some("123456".into())).await;
    let refusals = [
        ("POST", "/elsewhere", "application/x-protobuf", "123456", 404),
        ("POST", "/v1/opamp", "application/x-protobuf", "wrong", 401),
        ("PUT", "/v1/opamp", "application/x-protobuf", "123456", 405),
        ("POST", "/v1/opamp", "application/json", "123456", 426),
    ];
    for (method, path, media_type, token, status) in refusals {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nSecret-Key: {token}\r\nContent-Type: {media_type}\r\n\
             Content-Length: 100\r\n\r\n"
        );
        let mut http = Http::connect(server.agents).await;
        let refusal = http.send_bytes(head.as_bytes()).await;
        assert_eq!(refusal.status, status);
        if refusal.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
            http.ended().await;
            continue;
        }
        let mut agent = Agent::new();
        http.write(&[7; 100]).await;
        let headers = [PROTOBUF, ("Secret-Key", "123456")];
        let answer = http.send("POST", "/v1/opamp", &headers, &agent.full().encode_to_vec()).await;
        acknowledges(&answer, &agent);
    }
}

/// S-014: a key that is not 16 bytes in base 64 is no key.
#[tokio::test]
async fn s_014_a_handshake_with_a_broken_key_is_refused() {
    let server = TestServer::fresh().await;
    for key in ["", "x", "not base 64 at all!!", "c2hvcnQ=", "dGhpcyBrZXkgaXMgZmFyIHRvbyBsb25nIGluZGVlZA=="] {
        let answer = shake(&server, &with("Sec-WebSocket-Key", key)).await;
        assert!([400, 426].contains(&answer.status), "{key:?}: {}", answer.status);
    }
}

/// S-019: whoever asks before it sends a body is told at once that it is too large, or packed unreadably.
#[tokio::test]
async fn s_019_a_body_that_will_be_refused_is_refused_before_it_is_sent() {
    let server = TestServer::fresh().await;
    for (header, length, status) in [("X-None: 0", 1_u64 << 40, 413), ("Content-Encoding: br", 1_000, 415)] {
        let head = format!(
            "POST /v1/opamp HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n{header}\r\n\
             Content-Type: application/x-protobuf\r\nContent-Length: {length}\r\n\r\n"
        );
        let mut http = Http::connect(server.agents).await;
        let started = tokio::time::Instant::now();
        assert_eq!(http.send_bytes(head.as_bytes()).await.status, status, "{header}");
        let took = started.elapsed();
        assert!(took < std::time::Duration::from_secs(2), "answered after {took:?}");
    }
}

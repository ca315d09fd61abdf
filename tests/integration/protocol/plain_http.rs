//! Plain HTTP: encodings, limits and status codes of a poll.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use futures_util::future::join_all;
use opamp_server::proto::{ServerErrorResponseType, ServerToAgent};
use prost::Message as _;

use super::unhex;
use crate::harness::Database;
use crate::harness::agent::{Agent, PROTOBUF, Poller, Socket, assert_acknowledged, error_of};
use crate::harness::http::Http;
use crate::harness::server::{Process, TestServer};

/// The limit of messages in these tests.
const LIMIT: usize = 1 << 20;

#[expect(clippy::unwrap_used, reason = "a vector takes everything")]
fn gzip(body: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(body).unwrap();
    encoder.finish().unwrap()
}

/// S-014: the media type alone tells the transports apart, in any case and with parameters.
#[tokio::test]
async fn s_014_the_media_type_tells_the_transports_apart() {
    let server = TestServer::fresh().await;
    let mut http = Http::connect(server.agents).await;
    for media_type in ["application/x-protobuf", "Application/X-Protobuf; charset=binary"] {
        let body = Agent::new().full().encode_to_vec();
        let answer = http.send("POST", "/v1/opamp", &[("Content-Type", media_type)], &body).await;
        assert_eq!(answer.status, 200, "{media_type}");
    }
    for headers in [&[("Content-Type", "application/json")][..], &[]] {
        let answer = Http::connect(server.agents).await.send("POST", "/v1/opamp", headers, &[]).await;
        assert_eq!(answer.status, 426, "no WebSocket handshake: {headers:?}");
        assert_eq!(answer.header("upgrade"), Some("websocket"));
    }
}

/// S-015: bodies come plain or packed with gzip.
#[tokio::test]
async fn s_015_plain_and_gzip_bodies_are_taken() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    let mut agent = Agent::new();
    let packed = gzip(&agent.full().encode_to_vec());
    for (headers, body) in [
        (&[("Content-Encoding", "gzip")][..], packed),
        (&[("Content-Encoding", "identity")], agent.report().encode_to_vec()),
        (&[], agent.report().encode_to_vec()),
    ] {
        let answer = poller.post(headers, &body).await;
        assert_eq!(answer.status, 200, "{headers:?}");
        assert_acknowledged(&ServerToAgent::decode(answer.body.as_slice()).unwrap(), agent.uid);
    }
    assert_eq!(server.agent(agent.uid).await.unwrap()["name"], "collector");
}

/// S-016: the answer is packed where the agent says it can read that, and only there.
#[tokio::test]
async fn s_016_the_answer_is_packed_on_request() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    let mut agent = Agent::new();
    let answer = poller.post(&[("Accept-Encoding", "gzip")], &agent.full().encode_to_vec()).await;
    assert_eq!(answer.header("content-encoding"), Some("gzip"));
    let mut body = Vec::new();
    GzDecoder::new(answer.body.as_slice()).read_to_end(&mut body).unwrap();
    assert_acknowledged(&ServerToAgent::decode(body.as_slice()).unwrap(), agent.uid);
    let answer = poller.post(&[("Accept-Encoding", "gzip;q=0")], &agent.report().encode_to_vec()).await;
    assert_eq!(answer.header("content-encoding"), None);
    assert_acknowledged(&ServerToAgent::decode(answer.body.as_slice()).unwrap(), agent.uid);
}

/// S-017, S-025: each POST is answered with exactly one offer, without a header in front.
#[tokio::test]
async fn s_017_each_poll_is_answered_with_one_offer() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    let mut agent = Agent::new();
    assert_acknowledged(&poller.exchange(&agent.full()).await, agent.uid);
    for _ in 0..10 {
        assert_acknowledged(&poller.exchange(&agent.report()).await, agent.uid);
    }
}

/// S-019: a body over the limit is 413, and the sender sees it: announced, in chunks, or only once unpacked.
#[tokio::test]
async fn s_019_an_oversized_body_is_413_and_its_sender_sees_it() {
    let server = TestServer::with(|config| config.agents.max_message_size = LIMIT).await;
    // More than the sockets' buffers hold, and no more than the server reads for courtesy.
    let large = vec![0x55; 2 * LIMIT];
    let announced = Poller::connect(&server).await.post(&[], &large).await;
    assert_eq!(announced.status, 413);
    let mut http = Http::connect(server.agents).await;
    let chunked = http.send_chunked("POST", "/v1/opamp", &[PROTOBUF], &large).await;
    assert_eq!(chunked.status, 413);
    let bomb = gzip(&vec![0; 64 * LIMIT]);
    assert!(bomb.len() < LIMIT);
    let headers = [PROTOBUF, ("Content-Encoding", "gzip")];
    let unpacked = Poller::connect(&server).await.post(&headers[1..], &bomb).await;
    assert_eq!(unpacked.status, 413);
    let mut http = Http::connect(server.agents).await;
    let unpacked = http.send_chunked("POST", "/v1/opamp", &headers, &bomb).await;
    assert_eq!(unpacked.status, 413);
    let metrics = server.metrics().await;
    assert!(metrics.value("opamp_decode_failures_total{cause=\"too_large\"}") > 3.5);
    let mut agent = Agent::new();
    assert_acknowledged(&Poller::once(&server, &agent.full()).await, agent.uid);
}

/// A body in chunks within the limit is taken.
#[tokio::test]
async fn s_019_a_chunked_body_within_the_limit_is_taken() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut http = Http::connect(server.agents).await;
    let answer = http.send_chunked("POST", "/v1/opamp", &[PROTOBUF], &agent.full().encode_to_vec()).await;
    assert_eq!(answer.status, 200);
    assert_acknowledged(&ServerToAgent::decode(answer.body.as_slice()).unwrap(), agent.uid);
}

/// R-020, AMB-08: what is no report is 200 with `BadRequest` inside; 400 is for bodies that cannot be read.
#[tokio::test]
async fn r_020_a_malformed_poll_is_200_with_an_error_and_400_only_for_an_unreadable_body() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    // A header does not belong in front of a poll.
    let with_header = unhex("000a100190d3c27a107b3e9c415d2e8f60a1b210072001");
    for body in [with_header, unhex("0a100190"), unhex("0a0501020304051007"), Vec::new()] {
        let answer = poller.post(&[], &body).await;
        assert_eq!(answer.status, 200, "{body:02x?}");
        let offer = ServerToAgent::decode(answer.body.as_slice()).unwrap();
        error_of(&offer, ServerErrorResponseType::BadRequest);
    }
    let gzip_headers = [("Content-Encoding", "gzip")];
    for body in [b"not packed at all".to_vec(), gzip(&[0; 100])[..20].to_vec()] {
        assert_eq!(poller.post(&gzip_headers, &body).await.status, 400);
    }
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 0);
}

/// R-030: an unknown encoding is 415, and what is no POST is 405.
#[tokio::test]
async fn r_030_unknown_encodings_are_415_and_other_methods_405() {
    let server = TestServer::fresh().await;
    let body = Agent::new().full().encode_to_vec();
    let mut poller = Poller::connect(&server).await;
    assert_eq!(poller.post(&[("Content-Encoding", "br")], &body).await.status, 415);
    let mut http = Http::connect(server.agents).await;
    for method in ["GET", "PUT", "DELETE"] {
        let answer = http.send(method, "/v1/opamp", &[PROTOBUF], &[]).await;
        assert_eq!(answer.status, 405, "{method}");
        assert_eq!(answer.header("allow"), Some("POST"));
    }
}

/// S-022, S-023: without the right token 401, before the upgrade, on both transports and for both header forms.
#[tokio::test]
async fn s_023_a_wrong_token_is_401_before_the_upgrade() {
    let server = TestServer::with(|config| config.agents.token = Some("123456".into())).await;
    let cases = [
        (None, "agent_token_required"),
        (Some(("authorization", "Bearer 12345")), "invalid_agent_token"),
        (Some(("authorization", "Bearer 1234567")), "invalid_agent_token"),
        (Some(("secret-key", "654321")), "invalid_agent_token"),
        (Some(("authorization", "Basic MTIzNDU2")), "agent_token_required"),
    ];
    for (header, error) in cases {
        let headers: Vec<_> = header.into_iter().collect();
        let Err(refusal) = Socket::open(&server, "/v1/opamp", &headers).await else {
            panic!("{header:?} was let in");
        };
        let poll = Poller::connect(&server).await.post(&headers, &Agent::new().full().encode_to_vec()).await;
        for refusal in [refusal, poll] {
            assert_eq!(refusal.status, 401, "{header:?}");
            assert_eq!(refusal.header("content-type"), Some("application/json"));
            let body = refusal.json();
            assert_eq!(body["error"], error, "{header:?}");
            assert!(body["message"].as_str().is_some_and(|text| !text.is_empty()), "{body}");
        }
    }
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 0, "nobody got through");
    for header in [("authorization", "Bearer 123456"), ("secret-key", "123456")] {
        assert!(Socket::open(&server, "/v1/opamp", &[header]).await.is_ok(), "{header:?}");
        let mut agent = Agent::new();
        let poll = Poller::connect(&server).await.post(&[header], &agent.full().encode_to_vec()).await;
        assert_eq!(poll.status, 200, "{header:?}");
    }
}

/// S-027: a header of plain HTTP agents that contradicts the body changes nothing: the body decides.
#[tokio::test]
async fn the_uid_in_the_header_never_overrules_the_body() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let headers = [("OpAMP-Instance-UID", "0190d3c2-7a10-7b3e-9c41-5d2e8f60a1b2")];
    let answer = Poller::connect(&server).await.post(&headers, &agent.full().encode_to_vec()).await;
    assert_eq!(answer.status, 200);
    assert_acknowledged(&ServerToAgent::decode(answer.body.as_slice()).unwrap(), agent.uid);
}

/// Section 8 of the limits: as many links as allowed, and then 503 with a moment to come back, before the upgrade.
#[tokio::test]
async fn s_138_too_many_links_are_503_with_a_moment_to_come_back() {
    let server = TestServer::with(|config| config.agents.max_connections = 2).await;
    let first = Socket::connect(&server).await;
    let _second = Socket::connect(&server).await;
    let Err(refusal) = Socket::open(&server, "/v1/opamp", &[]).await else { panic!("a third was let in") };
    assert_eq!(refusal.status, 503);
    let seconds: u32 = refusal.header("retry-after").unwrap().parse().unwrap();
    assert!((30..=60).contains(&seconds), "{seconds}");
    first.break_off();
    crate::harness::server::eventually("a place is free again", async || {
        Socket::open(&server, "/v1/opamp", &[]).await.ok()
    })
    .await;
}

/// Polls that cross farewells of the same agent leave seats behind; whoever clears one away must not wait for itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn polls_of_one_agent_at_once_freeze_nobody() {
    let database = Database::sqlite();
    // A process of its own: what freezes there must not freeze the test.
    let server = Process::start(&database, &[("OPAMP_AGENTS_MAX_CONNECTS_PER_SECOND", "100000")]).await;
    let mut agent = Agent::new();
    for _ in 0..40 {
        let reports = (0..12).map(|number| if number % 3 == 1 { agent.farewell() } else { agent.full() });
        let polls = reports.map(|report| {
            let ports = *server;
            async move { Poller::connect(&ports).await.post(&[], &report.encode_to_vec()).await.status }
        });
        for status in join_all(polls).await {
            assert!([200, 503].contains(&status), "{status}");
        }
    }
    assert_eq!(server.ask("GET", "/healthz", &[]).await.status, 200);
    server.kill().await;
}

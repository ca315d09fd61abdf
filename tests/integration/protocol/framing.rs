//! What travels over a WebSocket: header, limits, and what is no report.

use opamp_server::agent::InstanceUid;
use opamp_server::proto::{AgentToServer, ServerErrorResponseType};
use prost::Message as _;
use tokio_tungstenite::tungstenite::protocol::Message;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};
use uuid::Uuid;

use super::unhex;
use crate::harness::agent::{Agent, Poller, Socket, assert_acknowledged, description, error_of};
use crate::harness::http::Http;
use crate::harness::server::{TestServer, eventually};

/// What becomes of a message.
enum Verdict {
    /// An answer with `BadRequest`.
    Bad,
    /// It is a report of the agent with this uid.
    Taken(&'static str),
}

/// S-001: plain HTTP and WebSocket agents are accepted, at the same URL.
#[tokio::test]
async fn s_001_both_transports_are_accepted_at_one_url() {
    let server = TestServer::fresh().await;
    let (mut one, mut other) = (Agent::new(), Agent::new());
    let (_socket, offer) = Socket::greet(&server, &one.full()).await;
    assert_acknowledged(&offer, one.uid);
    let offer = Poller::once(&server, &other.full()).await;
    assert_acknowledged(&offer, other.uid);
    assert_eq!(server.history(one.uid).await[0]["transport"], "websocket");
    assert_eq!(server.history(other.uid).await[0]["transport"], "http");
}

/// S-003: the path can be configured; every other path is 404.
#[tokio::test]
async fn s_003_the_path_is_configurable_and_others_are_404() {
    let server = TestServer::with(|config| "/fleet/agents".clone_into(&mut config.agents.path)).await;
    assert!(Socket::open(&server, "/fleet/agents", &[]).await.is_ok());
    for path in ["/v1/opamp", "/", "/fleet/agents/", "/fleet"] {
        let Err(refusal) = Socket::open(&server, path, &[]).await else { panic!("{path} is open") };
        assert_eq!(refusal.status, 404, "{path}");
    }
    let headers = [("Content-Type", "application/x-protobuf")];
    let mut http = Http::connect(server.agents).await;
    assert_eq!(
        http.send("POST", "/v1/opamp", &headers, &Agent::new().full().encode_to_vec()).await.status,
        404
    );
    let body = Agent::new().full().encode_to_vec();
    assert_eq!(http.send("POST", "/fleet/agents?x=1", &headers, &body).await.status, 200);
}

/// S-004, S-006, S-007, S-135, R-007, R-008, R-009: every input of the list gets its verdict, and the link lives on.
#[tokio::test]
async fn s_004_to_s_008_every_input_of_the_list_gets_its_verdict() {
    use Verdict::{Bad, Taken};
    const UID: &str = "0190d3c2-7a10-7b3e-9c41-5d2e8f60a1b2";
    let inputs = [
        ("", Bad),
        ("00", Bad),
        ("80", Bad),
        ("000a100190d3c27a107b3e9c415d2e8f60a1b210072001", Taken(UID)),
        ("80000a100190d3c27a107b3e9c415d2e8f60a1b210072001", Taken(UID)),
        ("808080808080808080000a100190d3c27a107b3e9c415d2e8f60a1b210072001", Taken(UID)),
        ("010a100190d3c27a107b3e9c415d2e8f60a1b210072001", Bad),
        ("2a0a100190d3c27a107b3e9c415d2e8f60a1b210072001", Bad),
        ("ffffffffffffffffff010a00", Bad),
        ("ffffffffffffffffffff01", Bad),
        ("0a100190d3c27a107b3e9c415d2e8f60a1b210072001", Bad),
        ("000a100190", Bad),
        ("000000", Bad),
        ("00020161", Bad),
        ("000e", Bad),
        ("009c06", Bad),
        ("002a031a01ff", Bad),
        ("000801", Bad),
        ("000a05010203040510072001", Bad),
        ("000a1030303030303030303030303030303030", Taken("30303030-3030-3030-3030-303030303030")),
        ("000a1000000000000000000000000000000000", Bad),
        (
            "000a1a30314a3341385158595a3031323334353637383941424344454610012001",
            Taken("0190d48b-f7df-0044-3214-c74254b635cf"),
        ),
    ];
    let server = TestServer::fresh().await;
    let mut refused = 0;
    for (input, verdict) in inputs {
        let mut socket = Socket::connect(&server).await;
        socket.send_bytes(unhex(input)).await;
        let offer = socket.offer().await;
        match verdict {
            Bad => {
                refused += 1;
                let text = error_of(&offer, ServerErrorResponseType::BadRequest);
                assert!(!text.is_empty(), "{input}: the error is readable");
            }
            Taken(uid) => {
                assert_eq!(offer.error_response, None, "{input}");
                let row = server.agent(uid.parse().unwrap()).await;
                assert_eq!(row.unwrap_or_else(|| panic!("{input}"))["status"], "online");
            }
        }
        let mut next = Agent::new();
        assert_acknowledged(&socket.exchange(&next.full()).await, next.uid);
    }
    let metrics = server.metrics().await;
    let causes = ["header", "protobuf", "instance_uid"];
    let counted =
        causes.map(|cause| metrics.value(&format!("opamp_decode_failures_total{{cause=\"{cause}\"}}")));
    assert!((counted.iter().sum::<f64>() - f64::from(refused)).abs() < 0.5, "{counted:?} of {refused}");
}

/// S-008: an empty data part is a valid message; it lacks the uid, and says so when asked for one.
#[tokio::test]
async fn s_008_an_empty_data_part_is_the_message_without_anything() {
    let server = TestServer::fresh().await;
    let mut socket = Socket::connect(&server).await;
    socket.send_bytes(vec![0]).await;
    let text = error_of(&socket.offer().await, ServerErrorResponseType::BadRequest);
    assert!(text.contains("instance_uid"), "framing is fine, the uid is missing: {text}");
}

/// S-005: every message sent has the header zero, errors included; the harness checks each.
#[tokio::test]
async fn s_005_every_offer_has_the_header_zero() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    agent.number += 5;
    socket.exchange(&agent.report()).await;
    socket.send_bytes(vec![0x2a]).await;
    socket.offer().await;
}

/// S-009, S-010: a message over the limit ends the link with 1009, whole or in fragments.
#[tokio::test]
async fn s_010_an_oversized_message_is_closed_with_1009() {
    let server = TestServer::with(|config| config.agents.max_message_size = 2_000).await;
    for fragmented in [false, true] {
        let mut agent = Agent::new();
        let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
        let mut frame = vec![0];
        let mut report = agent.report();
        report.agent_description = Some(description(&[("service.name", &"x".repeat(3_000))]));
        report.encode(&mut frame).unwrap();
        if fragmented {
            for (index, part) in frame.chunks(1_100).enumerate() {
                let opcode = OpCode::Data(if index == 0 { Data::Binary } else { Data::Continue });
                let last = (index + 1) * 1_100 >= frame.len();
                socket.send_message(Message::Frame(Frame::message(part.to_vec(), opcode, last))).await;
            }
        } else {
            socket.send_bytes(frame).await;
        }
        assert_eq!(socket.closed().await, (1009, "message_too_large".to_owned()));
        let row = server.until_ended(agent.uid).await;
        assert_eq!(row["disconnect_reason"], "message_too_large");
        assert!(row["disconnected_by"].is_null(), "the end was seen: {row}");
        assert_eq!(server.status(agent.uid).await["status"], "offline", "the agent caused it");
    }
    let metrics = server.metrics().await;
    assert!(metrics.value("opamp_decode_failures_total{cause=\"too_large\"}") > 1.5);
}

/// S-012: a message just within the limit is taken.
#[tokio::test]
async fn s_012_a_message_within_the_limit_is_taken() {
    let server = TestServer::with(|config| config.agents.max_message_size = 100_000).await;
    let mut agent = Agent::new();
    let mut report = agent.full();
    report.agent_description = Some(description(&[("service.name", &"x".repeat(90_000))]));
    let (_socket, offer) = Socket::greet(&server, &report).await;
    assert_acknowledged(&offer, agent.uid);
}

/// a text frame is no OpAMP message; the link is closed with 1003.
#[tokio::test]
async fn r_021_a_text_frame_is_closed_with_1003() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    socket.send_message(Message::Text("{}".into())).await;
    assert_eq!(socket.closed().await.0, 1003);
    let row = server.until_ended(agent.uid).await;
    assert_eq!(row["disconnect_reason"], "protocol_error");
    assert!(row["disconnected_by"].is_null(), "the offending frame was seen: {row}");
}

/// A frame that breaks RFC 6455 ends the link with 1002.
#[tokio::test]
async fn a_broken_frame_is_closed_with_1002() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let orphan = Frame::message(vec![0], OpCode::Data(Data::Continue), true);
    socket.send_message(Message::Frame(orphan)).await;
    assert_eq!(socket.closed().await, (1002, "protocol_error".to_owned()));
    assert_eq!(server.until_ended(agent.uid).await["disconnect_reason"], "protocol_error");
}

/// malformed messages are answered and the link lives; the fifth in a row closes it with 1002.
#[tokio::test]
async fn r_020_a_malformed_message_is_answered_and_five_in_a_row_close_the_link() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    for _ in 0..2 {
        for _ in 0..4 {
            socket.send_bytes(unhex("000a100190")).await;
            let offer = socket.offer().await;
            error_of(&offer, ServerErrorResponseType::BadRequest);
            assert_eq!(offer.instance_uid, agent.uid.as_bytes(), "addressed to the only agent of the link");
        }
        let offer = socket.exchange(&agent.report()).await;
        assert_acknowledged(&offer, agent.uid);
    }
    for _ in 0..5 {
        socket.send_bytes(unhex("000a100190")).await;
        error_of(&socket.offer().await, ServerErrorResponseType::BadRequest);
    }
    assert_eq!(socket.closed().await, (1002, "protocol_error".to_owned()));
    let row = server.until_ended(agent.uid).await;
    assert_eq!(row["disconnect_reason"], "protocol_error");
    assert_eq!(server.status(agent.uid).await["status"], "offline");
}

/// S-135, S-136: `BadRequest` is readable and answers a report; who sends nothing gets nothing.
#[tokio::test]
async fn s_135_a_bad_request_is_readable_and_leaves_no_record() {
    let server = TestServer::fresh().await;
    let mut socket = Socket::connect(&server).await;
    let odd = AgentToServer { instance_uid: vec![1, 2, 3, 4, 5], ..Agent::new().full() };
    let offer = socket.exchange(&odd).await;
    assert_eq!(offer.instance_uid, [1, 2, 3, 4, 5], "the uid is echoed as it came");
    let text = error_of(&offer, ServerErrorResponseType::BadRequest);
    assert!(text.contains("16 bytes") && text.contains('5'), "{text}");
    let text = odd_text_uid(&mut socket).await;
    assert!(text.contains("16 bytes"), "UUID text is no uid: {text}");
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 0);
}

async fn odd_text_uid(socket: &mut Socket) -> String {
    let uid = Uuid::now_v7().to_string().into_bytes();
    let report = AgentToServer { instance_uid: uid, ..Agent::new().full() };
    error_of(&socket.exchange(&report).await, ServerErrorResponseType::BadRequest)
}

/// S-141, S-142: unknown fields and unknown bits are ignored.
#[tokio::test]
async fn s_141_unknown_fields_and_s_142_unknown_bits_are_ignored() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::with(1 << 60 | 0x1);
    let mut report = agent.full();
    report.flags = 1 << 50;
    let mut frame = vec![0];
    report.encode(&mut frame).unwrap();
    // Field 1000 with a text, field 1001 with a number.
    frame.extend(unhex("c23e03616263c83e2a"));
    let mut socket = Socket::connect(&server).await;
    socket.send_bytes(frame).await;
    assert_acknowledged(&socket.offer().await, agent.uid);
    let row = server.agent(agent.uid).await.unwrap();
    assert_eq!(row["capabilities"], serde_json::json!(["ReportsStatus"]));
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
}

/// A link that carries no agent is closed in an orderly way and leaves no record.
#[tokio::test]
async fn a_link_without_any_agent_is_closed() {
    let server = TestServer::fresh().await;
    let mut socket = Socket::connect(&server).await;
    eventually("the link is counted", async || {
        (server.metrics().await.value("opamp_links_open") > 0.5).then_some(())
    })
    .await;
    socket.closed().await;
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 0);
    eventually("the link is gone", async || {
        (server.metrics().await.value("opamp_links_open") < 0.5).then_some(())
    })
    .await;
}

/// A uid that is no UUID of any version is a uid.
#[tokio::test]
async fn r_007_any_16_bytes_are_a_uid() {
    let server = TestServer::fresh().await;
    for bytes in [[0xff; 16], [1; 16], *b"not a uuid at al"] {
        let mut agent = Agent { uid: InstanceUid::from_bytes(bytes), ..Agent::new() };
        let (_socket, offer) = Socket::greet(&server, &agent.full()).await;
        assert_acknowledged(&offer, agent.uid);
        assert_eq!(server.status(agent.uid).await["status"], "online");
    }
}

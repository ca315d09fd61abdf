//! RFC 6455 below OpAMP: masks, reserved bits, opcodes, fragments, control frames and Close codes.

use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::harness::agent::{Agent, assert_acknowledged, description};
use crate::harness::frames::{
    BINARY, CLOSE, CONTINUATION, FIN, Frames, HANDSHAKE, PING, PONG, TEXT, content, frame, framed, head,
};
use crate::harness::http::Http;
use crate::harness::server::{TestServer, eventually};

/// Greets, sends these bytes, and checks that they end the link with this code, seen as the agent's offence.
async fn offends(server: &TestServer, what: &str, bytes: &[u8], code: u16) {
    let mut agent = Agent::new();
    let (mut frames, _) = Frames::greet(server, &agent.full()).await;
    frames.write(bytes).await;
    assert_eq!(frames.closed().await.0, code, "{what}");
    let row = server.until_ended(agent.uid).await;
    let reason = if code == 1009 { "message_too_large" } else { "protocol_error" };
    assert_eq!(row["disconnect_reason"], reason, "{what}");
    assert!(row["disconnected_by"].is_null(), "{what}: the offending frame was seen: {row}");
    assert_eq!(server.status(agent.uid).await["status"], "offline", "{what}: the agent caused it");
}

/// S-004: agents mask, the server does not; each message is one binary frame with a header.
#[tokio::test]
async fn s_004_a_masked_message_is_answered_by_an_unmasked_one() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut frames, offer) = Frames::greet(&server, &agent.full()).await;
    assert_acknowledged(&offer, agent.uid);
    assert_acknowledged(&frames.exchange(&agent.report()).await, agent.uid);
}

/// An unmasked frame of an agent ends the link with 1002.
#[tokio::test]
async fn an_unmasked_frame_is_closed_with_1002() {
    let server = TestServer::fresh().await;
    let message = content(&Agent::new().full());
    let mut bytes = vec![FIN | BINARY, u8::try_from(message.len()).unwrap()];
    bytes.extend(message);
    offends(&server, "unmasked", &bytes, 1002).await;
}

/// Each reserved bit ends the link with 1002, because no extension was agreed on.
#[tokio::test]
async fn a_reserved_bit_is_closed_with_1002() {
    let server = TestServer::fresh().await;
    for bit in [0x40, 0x20, 0x10, 0x70] {
        let bytes = frame(FIN | bit | BINARY, &content(&Agent::new().full()));
        offends(&server, &format!("reserved {bit:#x}"), &bytes, 1002).await;
    }
}

/// Each opcode that nobody has defined ends the link with 1002.
#[tokio::test]
async fn an_unknown_opcode_is_closed_with_1002() {
    let server = TestServer::fresh().await;
    for opcode in (0x3..=0x7).chain(0xb..=0xf) {
        let bytes = frame(FIN | opcode, &content(&Agent::new().full()));
        offends(&server, &format!("opcode {opcode:#x}"), &bytes, 1002).await;
    }
}

/// S-004: a message in fragments of any size is one report, joined before it is read.
#[tokio::test]
async fn s_004_fragments_are_joined() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut frames, _) = Frames::greet(&server, &agent.full()).await;
    for size in [1, 2, 7, 1_000] {
        let message = content(&agent.full());
        let parts: Vec<&[u8]> = message.chunks(size).collect();
        for (index, part) in parts.iter().enumerate() {
            let opcode = if index == 0 { BINARY } else { CONTINUATION };
            let last = if index + 1 == parts.len() { FIN } else { 0 };
            frames.write(&frame(last | opcode, part)).await;
        }
        assert_acknowledged(&frames.offer().await, agent.uid);
    }
    assert_acknowledged(&frames.exchange(&agent.report()).await, agent.uid);
}

/// S-004: empty fragments, at either end and between, add nothing.
#[tokio::test]
async fn s_004_empty_fragments_add_nothing() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut frames = Frames::connect(&server).await;
    let message = content(&agent.full());
    let (one, other) = message.split_at(5);
    for (first, part) in [(BINARY, &[][..]), (0, one), (0, &[]), (0, other), (FIN, &[])] {
        frames.write(&frame(first, part)).await;
    }
    assert_acknowledged(&frames.offer().await, agent.uid);
}

/// Pings between the fragments of a message are answered at once, and the message stays whole.
#[tokio::test]
async fn pings_between_fragments_are_answered_and_the_message_stays_whole() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut frames, _) = Frames::greet(&server, &agent.full()).await;
    let message = content(&agent.full());
    let parts: Vec<&[u8]> = message.chunks(9).collect();
    for (index, part) in parts.iter().enumerate() {
        let opcode = if index == 0 { BINARY } else { CONTINUATION };
        let last = if index + 1 == parts.len() { FIN } else { 0 };
        frames.write(&frame(last | opcode, part)).await;
        if last == 0 {
            let payload = format!("ping {index}").into_bytes();
            frames.write(&frame(FIN | PING, &payload)).await;
            assert_eq!(frames.receive().await, Some((PONG, payload)));
        }
    }
    assert_acknowledged(&frames.offer().await, agent.uid);
}

/// A pong repeats the payload of its ping, of every length a control frame may have, also without any agent.
#[tokio::test]
async fn a_pong_repeats_its_ping() {
    let server = TestServer::fresh().await;
    let mut frames = Frames::connect(&server).await;
    for length in [0, 1, 4, 124, 125] {
        let payload: Vec<u8> = (0..length).collect();
        frames.write(&frame(FIN | PING, &payload)).await;
        assert_eq!(frames.receive().await, Some((PONG, payload)));
    }
    let mut agent = Agent::new();
    assert_acknowledged(&frames.exchange(&agent.full()).await, agent.uid);
    frames.write(&frame(FIN | PING, b"still there?")).await;
    assert_eq!(frames.receive().await, Some((PONG, b"still there?".to_vec())));
}

/// S-136: who sends no report is sent no error, and nothing else: answers to pings and to the Close are all.
#[tokio::test]
async fn s_136_who_sends_no_report_is_sent_none() {
    let server = TestServer::fresh().await;
    let mut frames = Frames::connect(&server).await;
    for round in 0..10 {
        frames.write(&frame(FIN | PING, &[round])).await;
        assert_eq!(frames.receive().await, Some((PONG, vec![round])));
    }
    frames.write(&frame(FIN | CLOSE, b"")).await;
    assert_eq!(frames.receive().await, Some((CLOSE, Vec::new())));
    frames.ended().await;
}

/// A pong nobody asked for is no answer, no error, and no report.
#[tokio::test]
async fn a_pong_nobody_asked_for_is_ignored() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut frames, _) = Frames::greet(&server, &agent.full()).await;
    for payload in [&b""[..], b"unasked", &[0; 125]] {
        frames.write(&frame(FIN | PONG, payload)).await;
    }
    assert_acknowledged(&frames.exchange(&agent.report()).await, agent.uid);
}

/// A control frame that is too long or in fragments ends the link with 1002.
#[tokio::test]
async fn a_control_frame_against_the_rules_is_closed_with_1002() {
    let server = TestServer::fresh().await;
    for (what, bytes) in [
        ("a ping of 126 bytes", frame(FIN | PING, &[0; 126])),
        ("a pong of 126 bytes", frame(FIN | PONG, &[0; 126])),
        ("a ping in fragments", frame(PING, b"x")),
        ("a Close in fragments", frame(CLOSE, &1000_u16.to_be_bytes())),
    ] {
        offends(&server, what, &bytes, 1002).await;
    }
}

/// A new message before the last one is whole, and the rest of none, end the link with 1002.
#[tokio::test]
async fn fragments_out_of_order_are_closed_with_1002() {
    let server = TestServer::fresh().await;
    let message = content(&Agent::new().full());
    let interrupted = [frame(BINARY, &message), frame(FIN | BINARY, &message)].concat();
    offends(&server, "a message within a message", &interrupted, 1002).await;
    offends(&server, "a text within a message", &[frame(BINARY, &message), frame(TEXT, b"x")].concat(), 1002)
        .await;
    offends(&server, "the end of no message", &frame(FIN | CONTINUATION, &message), 1002).await;
    offends(&server, "the middle of no message", &frame(CONTINUATION, &message), 1002).await;
}

/// a text message ends the link with 1003: empty, whole, in fragments, and where it is no UTF-8.
#[tokio::test]
async fn r_021_text_messages_of_every_kind_are_closed_with_1003() {
    let server = TestServer::fresh().await;
    let report = content(&Agent::new().full());
    for (what, bytes) in [
        ("empty", frame(FIN | TEXT, b"")),
        ("words", frame(FIN | TEXT, b"hello")),
        ("fragments", [frame(TEXT, b"hel"), frame(FIN, b"lo")].concat()),
        ("a report", frame(FIN | TEXT, &report)),
        ("no UTF-8", frame(FIN | TEXT, b"\xff\xfe")),
    ] {
        offends(&server, what, &bytes, 1003).await;
    }
    let metrics = server.metrics().await;
    let counted = metrics.value("opamp_decode_failures_total{cause=\"text\"}");
    assert!((counted - 5.0).abs() < 0.5, "{counted}");
}

/// S-010: a frame that announces more than the limit ends the link with 1009, before any of it has come.
#[tokio::test]
async fn s_010_a_frame_that_announces_too_much_is_closed_with_1009_at_once() {
    let server = TestServer::fresh().await;
    for length in [(64 << 20) + 1, 1 << 32, 1 << 62, 1 << 63, u64::MAX] {
        offends(&server, &format!("{length} bytes"), &head(FIN | BINARY, length), 1009).await;
    }
}

/// S-009, S-010: the limit counts header and data of the whole message: what just fits is taken, one byte more is 1009.
#[tokio::test]
async fn s_009_the_limit_is_met_to_the_byte() {
    const LIMIT: usize = 4_000;
    let server = TestServer::with(|config| config.agents.max_message_size = LIMIT).await;
    let sized = |agent: &mut Agent, size: usize| {
        let mut report = agent.full();
        let spare = size - 200;
        report.agent_description = Some(description(&[("service.name", &"x".repeat(spare))]));
        let missing = size - content(&report).len();
        report.agent_description = Some(description(&[("service.name", &"x".repeat(spare + missing))]));
        let message = content(&report);
        assert_eq!(message.len(), size);
        message
    };
    let mut agent = Agent::new();
    let mut frames = Frames::connect(&server).await;
    frames.write(&frame(FIN | BINARY, &sized(&mut agent, LIMIT))).await;
    assert_acknowledged(&frames.offer().await, agent.uid);
    let (one, other) = (sized(&mut agent, LIMIT), LIMIT / 3);
    let (one, other) = one.split_at(other);
    frames.write(&[frame(BINARY, one), frame(FIN, other)].concat()).await;
    assert_acknowledged(&frames.offer().await, agent.uid);
    let large = sized(&mut agent, LIMIT + 1);
    offends(&server, "one byte more", &frame(FIN | BINARY, &large), 1009).await;
    let (one, other) = large.split_at(LIMIT / 3);
    offends(&server, "in fragments", &[frame(BINARY, one), frame(FIN, other)].concat(), 1009).await;
}

/// S-063: every Close code an endpoint may send is answered by the same one, and the agent has closed.
#[tokio::test]
async fn s_063_every_close_code_is_answered_by_itself() {
    let server = TestServer::fresh().await;
    for code in [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999_u16] {
        let mut agent = Agent::new();
        let (mut frames, _) = Frames::greet(&server, &agent.full()).await;
        let payload = [&code.to_be_bytes()[..], b"going"].concat();
        frames.write(&frame(FIN | CLOSE, &payload)).await;
        let Some((CLOSE, answer)) = frames.receive().await else { panic!("{code} is not answered") };
        assert_eq!(answer[..2], code.to_be_bytes(), "{code}");
        frames.ended().await;
        let row = server.until_ended(agent.uid).await;
        assert_eq!(row["disconnect_reason"], "closed_by_agent", "{code}");
        assert!(row["disconnected_by"].is_null(), "the end was seen: {row}");
    }
}

/// S-063: a Close without a code is answered by one without a code.
#[tokio::test]
async fn s_063_a_close_without_a_code_is_answered() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut frames, _) = Frames::greet(&server, &agent.full()).await;
    frames.write(&frame(FIN | CLOSE, b"")).await;
    assert_eq!(frames.receive().await, Some((CLOSE, Vec::new())));
    frames.ended().await;
    assert_eq!(server.until_ended(agent.uid).await["disconnect_reason"], "closed_by_agent");
}

/// S-063: a Close code that must not travel is answered by 1002.
#[tokio::test]
async fn s_063_a_close_code_that_must_not_travel_is_answered_by_1002() {
    let server = TestServer::fresh().await;
    for code in [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, u16::MAX] {
        let mut agent = Agent::new();
        let (mut frames, _) = Frames::greet(&server, &agent.full()).await;
        frames.write(&frame(FIN | CLOSE, &code.to_be_bytes())).await;
        assert_eq!(frames.closed().await.0, 1002, "{code}");
        server.until_ended(agent.uid).await;
    }
}

/// S-063: a Close frame whose payload is half a code ends the link with 1002.
#[tokio::test]
async fn s_063_a_close_frame_with_half_a_code_is_closed_with_1002() {
    let server = TestServer::fresh().await;
    offends(&server, "half a code", &frame(FIN | CLOSE, &[3]), 1002).await;
}

/// S-063: what comes behind a Close frame is not read any more.
#[tokio::test]
async fn s_063_a_report_behind_a_close_frame_is_not_taken() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut frames, _) = Frames::greet(&server, &agent.full()).await;
    let mut late = agent.full();
    late.agent_description = Some(description(&[("service.name", "too late")]));
    frames.write(&[frame(FIN | CLOSE, &1000_u16.to_be_bytes()), framed(&late)].concat()).await;
    assert_eq!(frames.receive().await, Some((CLOSE, 1000_u16.to_be_bytes().to_vec())));
    frames.ended().await;
    assert_eq!(server.until_ended(agent.uid).await["disconnect_reason"], "closed_by_agent");
    assert_eq!(server.agent(agent.uid).await.unwrap()["name"], "collector");
}

/// S-062: a FIN without a Close frame, also in the middle of a frame or of a message, is a lost connection.
#[tokio::test]
async fn s_062_a_fin_in_the_middle_of_anything_is_a_lost_connection() {
    let server = TestServer::fresh().await;
    let message = content(&Agent::new().full());
    let whole = frame(FIN | BINARY, &message);
    for (what, bytes) in [
        ("nothing", &[][..]),
        ("half a head", &whole[..1]),
        ("half a frame", &whole[..whole.len() / 2]),
        ("half a message", &frame(BINARY, &message)),
    ] {
        let mut agent = Agent::new();
        let (mut frames, _) = Frames::greet(&server, &agent.full()).await;
        frames.write(bytes).await;
        frames.finish().await;
        let row = server.until_ended(agent.uid).await;
        assert_eq!(row["disconnect_reason"], "connection_lost", "{what}");
        assert!(row["disconnected_by"].is_null(), "{what}: FIN was seen: {row}");
        assert_eq!(server.status(agent.uid).await["status"], "offline", "{what}");
    }
}

/// Where frames begin and end has nothing to do with where packets do: byte by byte, or many at once.
#[tokio::test]
async fn s_025_reports_are_answered_however_they_are_cut_into_packets() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut frames = Frames::connect(&server).await;
    for byte in framed(&agent.full()) {
        frames.write(&[byte]).await;
    }
    assert_acknowledged(&frames.offer().await, agent.uid);
    let many: Vec<u8> = (0..100).flat_map(|_| framed(&agent.report())).collect();
    frames.write(&many).await;
    for _ in 0..100 {
        assert_acknowledged(&frames.offer().await, agent.uid);
    }
}

/// A first report that comes in one packet with the handshake is not lost.
#[tokio::test]
async fn s_025_a_report_in_one_packet_with_the_handshake_is_answered() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut bytes = b"GET /v1/opamp HTTP/1.1\r\nHost: localhost\r\n".to_vec();
    for (name, value) in HANDSHAKE {
        bytes.extend(format!("{name}: {value}\r\n").bytes());
    }
    bytes.extend(b"\r\n");
    bytes.extend(framed(&agent.full()));
    let mut http = Http::connect(server.agents).await;
    let answer = http.send_bytes(&bytes).await;
    assert_eq!(answer.status, 101);
    let accept = derive_accept_key(HANDSHAKE[3].1.as_bytes());
    assert_eq!(answer.header("sec-websocket-accept"), Some(accept.as_str()));
    let mut frames = Frames::upgraded(http);
    assert_acknowledged(&frames.offer().await, agent.uid);
    assert_acknowledged(&frames.exchange(&agent.report()).await, agent.uid);
}

/// One misbehaving link harms no other: everybody else is answered as before.
#[tokio::test]
async fn s_062_a_broken_link_harms_no_other() {
    let server = TestServer::fresh().await;
    let mut bystander = Agent::new();
    let (mut calm, _) = Frames::greet(&server, &bystander.full()).await;
    for bytes in [head(FIN | BINARY, 1 << 63), frame(FIN | 0x7, b""), frame(FIN | TEXT, b""), vec![0xff; 64]]
    {
        let (mut frames, _) = Frames::greet(&server, &Agent::new().full()).await;
        frames.write(&bytes).await;
        frames.closed().await;
        assert_acknowledged(&calm.exchange(&bystander.report()).await, bystander.uid);
    }
    assert_eq!(server.history(bystander.uid).await.len(), 1);
    eventually("only one link is left", async || {
        let open = server.metrics().await.value("opamp_links_open");
        ((open - 1.0).abs() < 0.5).then_some(())
    })
    .await;
}

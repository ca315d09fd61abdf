//! Bodies of polls: packed, broken, truncated, too large, and what the answer is packed with.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use opamp_server::proto::{AgentToServer, ServerErrorResponseType, ServerToAgent};
use prost::Message as _;

use crate::harness::agent::{Agent, PROTOBUF, Poller, assert_acknowledged, description, error_of, offer_in};
use crate::harness::http::{Http, Response};
use crate::harness::server::{TestServer, eventually};

/// The header of a packed body.
const PACKED: (&str, &str) = ("Content-Encoding", "gzip");

#[expect(clippy::unwrap_used, reason = "a vector takes everything")]
fn gzip(body: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(body).unwrap();
    encoder.finish().unwrap()
}

fn acknowledges(answer: &Response, agent: &Agent) {
    assert_acknowledged(&offer_in(answer), agent.uid);
}

/// A report of exactly so many bytes.
fn sized(agent: &mut Agent, size: usize) -> Vec<u8> {
    let mut report = agent.full();
    let name = "x".repeat(size - 200);
    report.agent_description = Some(description(&[("service.name", &name)]));
    let missing = size - report.encoded_len();
    report.agent_description = Some(description(&[("service.name", &(name + &"x".repeat(missing)))]));
    assert_eq!(report.encoded_len(), size);
    report.encode_to_vec()
}

/// S-015: gzip in every form it may take: the name in any case, several members, an empty one among them.
#[tokio::test]
async fn s_015_gzip_in_every_form_is_unpacked() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut poller = Poller::connect(&server).await;
    for name in ["gzip", "GZIP", "GZip", " gzip "] {
        let answer = poller.post(&[("Content-Encoding", name)], &gzip(&agent.full().encode_to_vec())).await;
        acknowledges(&answer, &agent);
    }
    let body = agent.full().encode_to_vec();
    let (one, other) = body.split_at(body.len() / 2);
    let members = [gzip(one), gzip(&[]), gzip(other)].concat();
    acknowledges(&poller.post(&[PACKED], &members).await, &agent);
    assert_eq!(server.agent(agent.uid).await.unwrap()["name"], "collector");
}

/// S-015: gzip that is cut anywhere is 400, and nothing of it is taken.
#[tokio::test]
async fn s_015_gzip_cut_anywhere_is_400() {
    let server = TestServer::fresh().await;
    let packed = gzip(&Agent::new().full().encode_to_vec());
    let mut poller = Poller::connect(&server).await;
    for length in 1..packed.len() {
        let answer = poller.post(&[PACKED], &packed[..length]).await;
        assert_eq!(answer.status, 400, "cut to {length} of {} bytes", packed.len());
    }
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 0);
    let counted = server.metrics().await.value("opamp_decode_failures_total{cause=\"gzip\"}");
    assert!((counted - f64::from(u32::try_from(packed.len() - 1).unwrap())).abs() < 0.5, "{counted}");
}

/// S-015: an empty body is no gzip.
#[tokio::test]
async fn s_015_an_empty_body_is_no_gzip() {
    let server = TestServer::fresh().await;
    assert_eq!(Poller::connect(&server).await.post(&[PACKED], &[]).await.status, 400);
}

/// S-015: gzip with a wrong checksum, a wrong length, a foreign method or anything behind it is 400.
#[tokio::test]
async fn s_015_broken_gzip_is_400() {
    let server = TestServer::fresh().await;
    let packed = gzip(&Agent::new().full().encode_to_vec());
    let broken = |at: usize| {
        let mut bytes = packed.clone();
        bytes[at] ^= 0x55;
        bytes
    };
    let end = packed.len();
    let mut poller = Poller::connect(&server).await;
    for (what, body) in [
        ("the first magic byte", broken(0)),
        ("the second magic byte", broken(1)),
        ("the method", broken(2)),
        ("the checksum", broken(end - 8)),
        ("the length", broken(end - 1)),
        ("text behind it", [&packed[..], b"and more"].concat()),
        ("half a member behind it", [&packed[..], &packed[..12]].concat()),
        ("a plain report", Agent::new().full().encode_to_vec()),
        ("zlib", b"\x78\x9c\x03\x00\x00\x00\x00\x01".to_vec()),
    ] {
        assert_eq!(poller.post(&[PACKED], &body).await.status, 400, "{what}");
    }
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 0);
}

/// S-015: a packed body is a report like any other: what is none inside is `BadRequest`.
#[tokio::test]
async fn s_135_a_packed_body_that_is_no_report_is_a_bad_request() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    let twice = gzip(&gzip(&Agent::new().full().encode_to_vec()));
    for body in [gzip(&[]), gzip(b"not protobuf"), twice] {
        let answer = poller.post(&[PACKED], &body).await;
        error_of(&offer_in(&answer), ServerErrorResponseType::BadRequest);
    }
}

/// R-030: encodings that are not gzip, alone or in a list, are 415, and the sender of a large body sees it.
#[tokio::test]
async fn r_030_every_other_encoding_is_415() {
    let server = TestServer::with(|config| config.agents.max_message_size = 4 << 20).await;
    let large = vec![7; 8 << 20];
    for name in ["br", "deflate", "zstd", "compress", "snappy", "gzip, gzip", "gzip, br", "gzip;q=1"] {
        let mut poller = Poller::connect(&server).await;
        let answer = poller.post(&[("Content-Encoding", name)], &large).await;
        assert_eq!(answer.status, 415, "{name}");
        let mut agent = Agent::new();
        assert_acknowledged(&poller.exchange(&agent.full()).await, agent.uid);
    }
}

/// S-019: what just fits the limit is taken: plain, packed, in chunks; one byte more is 413 in each form.
#[tokio::test]
async fn s_019_the_limit_is_met_to_the_byte() {
    const LIMIT: usize = 20_000;
    let server = TestServer::with(|config| config.agents.max_message_size = LIMIT).await;
    let mut agent = Agent::new();
    for (size, status) in [(LIMIT - 1, 200), (LIMIT, 200), (LIMIT + 1, 413)] {
        let mut http = Http::connect(server.agents).await;
        let body = sized(&mut agent, size);
        assert_eq!(http.send("POST", "/v1/opamp", &[PROTOBUF], &body).await.status, status, "{size}");
        let body = sized(&mut agent, size);
        let answer = http.send_chunked("POST", "/v1/opamp", &[PROTOBUF], &body).await;
        assert_eq!(answer.status, status, "{size} in chunks");
        let body = gzip(&sized(&mut agent, size));
        let answer = http.send("POST", "/v1/opamp", &[PROTOBUF, PACKED], &body).await;
        assert_eq!(answer.status, status, "{size} packed");
        let answer = http.send_chunked("POST", "/v1/opamp", &[PROTOBUF, PACKED], &body).await;
        assert_eq!(answer.status, status, "{size} packed and in chunks");
    }
    let stored = server.agent(agent.uid).await.unwrap();
    let name = stored["description"]["identifying_attributes"]["service.name"].as_str().unwrap();
    assert!(name.len() < LIMIT, "nothing of the larger ones was taken");
}

/// S-019: a bomb in several members, each within the limit, is 413 all the same.
#[tokio::test]
async fn s_019_a_bomb_in_many_members_is_413() {
    const LIMIT: usize = 1 << 20;
    let server = TestServer::with(|config| config.agents.max_message_size = LIMIT).await;
    let member = gzip(&vec![0; LIMIT / 2]);
    let bomb: Vec<u8> = member.iter().copied().cycle().take(member.len() * 50).collect();
    assert!(bomb.len() < LIMIT);
    let mut poller = Poller::connect(&server).await;
    assert_eq!(poller.post(&[PACKED], &bomb).await.status, 413);
    let mut agent = Agent::new();
    assert_acknowledged(&poller.exchange(&agent.full()).await, agent.uid);
}

/// S-019: a length that no body ever has is 413 by its announcement alone, or at the latest when it ends.
#[tokio::test]
async fn s_019_an_absurd_announced_length_is_413() {
    let server = TestServer::fresh().await;
    for length in [(64_u64 << 20) + 1, 1 << 40, 1 << 62, (1 << 63) - 1] {
        let head = format!(
            "POST /v1/opamp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-protobuf\r\nContent-Length: {length}\r\n\r\n"
        );
        let mut http = Http::connect(server.agents).await;
        http.write(head.as_bytes()).await;
        http.finish().await;
        assert_eq!(http.read().await.status, 413, "{length}");
    }
}

/// S-016: the answer is packed exactly where `Accept-Encoding` allows it, errors included.
#[tokio::test]
async fn s_016_the_answer_is_packed_exactly_where_that_is_allowed() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut poller = Poller::connect(&server).await;
    let cases = [
        ("gzip", true),
        ("GZIP", true),
        ("*", true),
        ("deflate, gzip;q=0.5", true),
        ("br , gzip ; q=1.0", true),
        ("gzip;q=0.001", true),
        ("", false),
        ("identity", false),
        ("br, deflate", false),
        ("gzip;q=0", false),
        ("gzip; q=0.000", false),
        ("*;q=0", false),
    ];
    for (accept, packed) in cases {
        let answer = poller.post(&[("Accept-Encoding", accept)], &agent.full().encode_to_vec()).await;
        check_packed(&answer, accept, packed, |offer| assert_acknowledged(offer, agent.uid));
        let answer = poller.post(&[("Accept-Encoding", accept)], b"no report").await;
        check_packed(&answer, accept, packed, |offer| {
            error_of(offer, ServerErrorResponseType::BadRequest);
        });
    }
}

#[expect(clippy::unwrap_used, reason = "what is no offer or no gzip fails the test")]
fn check_packed(answer: &Response, accept: &str, packed: bool, check: impl Fn(&ServerToAgent)) {
    assert_eq!(answer.status, 200, "{accept:?}");
    assert_eq!(answer.header("content-type"), Some("application/x-protobuf"), "{accept:?}");
    assert_eq!(answer.header("content-encoding"), packed.then_some("gzip"), "{accept:?}");
    let mut body = answer.body.clone();
    if packed {
        body.clear();
        GzDecoder::new(answer.body.as_slice()).read_to_end(&mut body).unwrap();
    }
    check(&ServerToAgent::decode(body.as_slice()).unwrap());
}

/// S-140: `Retry-After` is for who was refused: an answered poll carries none, also one with an error inside.
#[tokio::test]
async fn s_140_an_answered_poll_carries_no_retry_after() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut poller = Poller::connect(&server).await;
    for body in [agent.full().encode_to_vec(), agent.report().encode_to_vec(), b"no report".to_vec()] {
        let answer = poller.post(&[], &body).await;
        assert_eq!((answer.status, answer.header("retry-after")), (200, None));
    }
}

/// A body that breaks off is no report: nothing is taken of it, and the server serves on.
#[tokio::test]
async fn s_135_a_body_that_breaks_off_is_not_taken() {
    let server = TestServer::fresh().await;
    let whole = Agent::new().full().encode_to_vec();
    let head = format!(
        "POST /v1/opamp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-protobuf\r\nContent-Length: {}\r\n\r\n",
        whole.len()
    );
    let chunked = "POST /v1/opamp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-protobuf\r\nTransfer-Encoding: chunked\r\n\r\n";
    let mut bad_chunk = chunked.as_bytes().to_vec();
    bad_chunk.extend(b"zz\r\n");
    bad_chunk.extend(&whole);
    let mut cut_chunk = format!("{chunked}{:x}\r\n", whole.len()).into_bytes();
    cut_chunk.extend(&whole);
    for bytes in [
        [head.as_bytes(), &whole[..whole.len() - 1]].concat(),
        head.as_bytes().to_vec(),
        bad_chunk,
        cut_chunk,
    ] {
        let mut http = Http::connect(server.agents).await;
        http.write(&bytes).await;
        http.finish().await;
        drop(http);
        let mut agent = Agent::new();
        assert_acknowledged(&Poller::once(&server, &agent.full()).await, agent.uid);
        Poller::once(&server, &agent.farewell()).await;
    }
    let reports = eventually("every good report is counted", async || {
        let metrics = server.metrics().await;
        let reports = metrics.value("opamp_reports_total{kind=\"continued\"}");
        (reports > 7.5).then_some(reports)
    })
    .await;
    assert!((reports - 8.0).abs() < 0.5, "{reports}");
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 4);
}

/// S-017: the answer to a poll is one offer without a header, whatever the report was.
#[tokio::test]
async fn s_017_every_kind_of_poll_is_answered_by_one_plain_offer() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut poller = Poller::connect(&server).await;
    let nameless = AgentToServer { instance_uid: Vec::new(), ..agent.clone().full() };
    agent.number = 1;
    for report in [agent.full(), agent.report(), agent.bare(), agent.farewell(), nameless] {
        let answer = poller.post(&[], &report.encode_to_vec()).await;
        assert_eq!(answer.header("content-length"), Some(answer.body.len().to_string().as_str()));
        assert_ne!(answer.body.first(), Some(&0), "no header in front");
        assert_eq!(offer_in(&answer).instance_uid, report.instance_uid);
    }
}

/// S-017: a body in chunks may have extensions and trailers, which say nothing to this server.
#[tokio::test]
async fn s_017_chunks_with_extensions_and_trailers_are_one_body() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let body = agent.full().encode_to_vec();
    let (one, other) = body.split_at(7);
    let mut bytes =
        b"POST /v1/opamp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-protobuf\r\nTransfer-Encoding: chunked\r\n\r\n"
            .to_vec();
    for (size, part) in
        [(format!("{:X};name=value\r\n", one.len()), one), (format!("0{:x}\r\n", other.len()), other)]
    {
        bytes.extend(size.bytes());
        bytes.extend(part);
        bytes.extend(b"\r\n");
    }
    bytes.extend(b"0\r\nChecksum: none\r\n\r\n");
    let mut http = Http::connect(server.agents).await;
    acknowledges(&http.send_bytes(&bytes).await, &agent);
    let next = agent.report().encode_to_vec();
    acknowledges(&http.send("POST", "/v1/opamp", &[PROTOBUF], &next).await, &agent);
}

/// R-030: encodings in several headers are a list as well.
#[tokio::test]
async fn r_030_encodings_in_several_headers_are_a_list() {
    let server = TestServer::fresh().await;
    let body = gzip(&Agent::new().full().encode_to_vec());
    for second in ["br", "gzip"] {
        let headers = [PACKED, ("Content-Encoding", second)];
        let answer = Poller::connect(&server).await.post(&headers, &body).await;
        assert_eq!(answer.status, 415, "gzip and {second}");
    }
}

/// S-016: what is refused by name is refused, whatever a star allows, and weights are read in any case.
#[tokio::test]
async fn s_016_gzip_refused_by_name_is_not_sent_for_a_star() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut poller = Poller::connect(&server).await;
    for accept in ["gzip;q=0, *", "*, gzip;q=0", "gzip;Q=0"] {
        let answer = poller.post(&[("Accept-Encoding", accept)], &agent.full().encode_to_vec()).await;
        check_packed(&answer, accept, false, |offer| assert_acknowledged(offer, agent.uid));
    }
}

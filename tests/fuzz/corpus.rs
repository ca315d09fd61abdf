//! Where the corpus comes from: the golden messages, and hostile inputs made by hand.
//!
//! What a run found later lies beside them under other names; nothing here removes it.

use std::fs;
use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;
use prost::Message as _;
use serde::Deserialize;

use crate::{engine, frame, state};

/// A report with a uid, a number and a mask.
const MINIMAL: &str = "0a100190d3c27a107b3e9c415d2e8f60a1b210072001";

/// Inputs that must be refused, and some that must be taken although they look odd: a WebSocket message each.
const HOSTILE: [(&str, &str); 20] = [
    ("empty", ""),
    ("header_only", "00"),
    ("header_incomplete", "80"),
    ("header_long", "80000a100190d3c27a107b3e9c415d2e8f60a1b210072001"),
    ("header_one", "010a100190d3c27a107b3e9c415d2e8f60a1b210072001"),
    ("header_largest", "ffffffffffffffffff010a00"),
    ("header_too_long", "ffffffffffffffffffff01"),
    ("header_none", MINIMAL),
    ("length_beyond_the_end", "000a100190"),
    ("tag_zero", "000000"),
    ("field_zero", "00020161"),
    ("wire_type_six", "000e"),
    ("group_without_start", "009c06"),
    ("group_in_group", "00fb07fb07fc07fc07"),
    ("text_not_utf8", "002a031a01ff"),
    ("foreign_wire_type", "000801"),
    ("uid_of_five", "000a05010203040510072001"),
    ("uid_of_digits", "000a1030303030303030303030303030303030"),
    ("uid_of_zeros", "000a1000000000000000000000000000000000"),
    ("uid_of_old", "000a1a30314a3341385158595a3031323334353637383941424344454610012001"),
];

#[derive(Deserialize)]
struct Golden {
    name: String,
    #[serde(rename = "type")]
    message: String,
    hex: String,
}

fn unhex(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex")).collect()
}

fn golden() -> Vec<(String, Vec<u8>)> {
    let all: Vec<Golden> =
        serde_json::from_str(include_str!("../golden/messages.json")).expect("the golden file");
    let reports = all.into_iter().filter(|entry| entry.message == "AgentToServer");
    reports.map(|entry| (entry.name, unhex(&entry.hex))).collect()
}

/// A field that holds `content`, `levels` deep.
fn nested(path: &[u8], levels: usize, content: &[u8]) -> Vec<u8> {
    let mut message = content.to_vec();
    for level in (0..levels).rev() {
        let mut outer = vec![path[level % path.len()] << 3 | 2];
        prost::encoding::encode_varint(message.len() as u64, &mut outer);
        outer.append(&mut message);
        message = outer;
    }
    message
}

/// Reports made by hand that hurt where many small things, deep things or odd texts hurt.
fn handmade() -> Vec<(String, Vec<u8>)> {
    let minimal = unhex(MINIMAL);
    let with = |name: &str, field: Vec<u8>| (name.to_owned(), [minimal.clone(), field].concat());
    // A health tree, values in values, components in components: as deep as is read, and one level deeper.
    let mut all = Vec::new();
    for levels in [10, 47, 48, 49, 50, 60, 200] {
        let tree = nested(&[5], 1, &nested(&[6, 2], levels * 2, &[0x08, 0x01]));
        all.push(with(&format!("health_{levels}_deep"), tree));
        let parts = nested(&[14, 1], 2, &nested(&[2], levels * 2, &[0x0a, 0x02, 0x0a, 0x00]));
        all.push(with(&format!("components_{levels}_deep"), parts));
        let lists = nested(&[3, 1, 2], 3, &nested(&[5, 1], levels * 2, &[0x10, 0x01]));
        all.push(with(&format!("lists_{levels}_deep"), lists));
        let pairs = nested(&[3, 1, 2], 3, &nested(&[6, 1, 2], levels * 3, &[0x10, 0x01]));
        all.push(with(&format!("pairs_{levels}_deep"), pairs));
    }
    // Deep, and wide at the bottom: whatever looks at a tree once a level looks at this one too often.
    let leaf = |number: u32| {
        let key = nested(&[1], 1, number.to_string().as_bytes());
        nested(&[6], 1, &[key, nested(&[2], 1, &[0x08, 0x01])].concat())
    };
    let wide: Vec<u8> = (0..1_000).flat_map(leaf).collect();
    all.push(with("health_deep_and_wide", nested(&[5], 1, &nested(&[6, 2], 92, &wide))));
    let pair = |key: &[u8], value: &[u8]| {
        let value = nested(&[2, 1], 2, value);
        let key = nested(&[1], 1, key);
        nested(&[1], 1, &[key, value].concat())
    };
    let described = |pairs: &[Vec<u8>]| nested(&[3], 1, &pairs.concat());
    all.push(with(
        "nul_everywhere",
        described(&[pair(b"service.name\0", b"\0a\0"), pair(b"host.name", b"\0")]),
    ));
    let many: Vec<_> = (0..400).map(|number| pair(format!("key{number}").as_bytes(), b"value")).collect();
    all.push(with("attributes_400", described(&many)));
    all.push(with("long_texts", described(&[pair(&b"k".repeat(256), &"é".repeat(300).into_bytes())])));
    all.push(with("groups", described(&[pair(b"groups", b"a, ,b,,"), pair(b"opamp.ephemeral", b"TRUE")])));
    all.push(with("empty_pairs", nested(&[3], 1, &[0x0a, 0x00].repeat(2_000))));
    all
}

fn seeds() -> Vec<(&'static str, String, Vec<u8>)> {
    let mut all = Vec::new();
    let reports: Vec<_> = golden().into_iter().chain(handmade()).collect();
    for (name, report) in &reports {
        let message = [&[0], report.as_slice()].concat();
        all.push(("frame", name.clone(), frame::masked(0x82, &message, [1, 2, 3, 4])));
        all.push(("state", name.clone(), state::written([(0, report.as_slice())])));
    }
    for (name, hex) in HOSTILE {
        let message = unhex(hex);
        all.push(("frame", format!("bare_{name}"), message.clone()));
        all.push(("frame", format!("framed_{name}"), frame::masked(0x82, &message, [0; 4])));
        all.push(("state", name.to_owned(), state::written([(0, message.get(1..).unwrap_or_default())])));
    }
    streams(&mut all);
    conversations(&mut all, &reports);
    requests(&mut all, &reports);
    all
}

/// Streams of frames.
fn streams(all: &mut Vec<(&'static str, String, Vec<u8>)>) {
    let message = unhex(&format!("00{MINIMAL}"));
    let (front, back) = message.split_at(9);
    let ping = frame::masked(0x89, b"ping", [9; 4]);
    let stream = |frames: &[&[u8]]| frames.concat();
    let first = frame::masked(0x02, front, [5; 4]);
    let last = frame::masked(0x80, back, [6; 4]);
    let whole = frame::masked(0x82, &message, [7; 4]);
    all.push(("frame", "fragments".to_owned(), stream(&[&first, &last, &whole])));
    all.push(("frame", "fragments_and_pings".to_owned(), stream(&[&first, &ping, &ping, &last, &ping])));
    all.push(("frame", "begun_twice".to_owned(), stream(&[&first, &first, &last])));
    all.push(("frame", "continued_without_start".to_owned(), stream(&[&last, &whole])));
    all.push((
        "frame",
        "empty_fragments".to_owned(),
        stream(&[&first, &frame::masked(0, b"", [0; 4]).repeat(50), &last]),
    ));
    all.push(("frame", "text".to_owned(), frame::masked(0x81, "héllo".as_bytes(), [1; 4])));
    all.push(("frame", "text_not_utf8".to_owned(), frame::masked(0x81, b"\xff\xfe", [1; 4])));
    all.push((
        "frame",
        "close".to_owned(),
        stream(&[&whole, &frame::masked(0x88, b"\x03\xe8bye", [1; 4]), &whole]),
    ));
    all.push(("frame", "close_of_one_byte".to_owned(), frame::masked(0x88, b"\x03", [1; 4])));
    all.push(("frame", "ping_too_long".to_owned(), frame::masked(0x89, &[1; 126], [1; 4])));
    all.push(("frame", "unmasked".to_owned(), [&[0x82, 23][..], &message].concat()));
    all.push(("frame", "reserved_bits".to_owned(), frame::masked(0xf2, &message, [1; 4])));
    all.push(("frame", "reserved_opcode".to_owned(), frame::masked(0x83, &message, [1; 4])));
    all.push(("frame", "length_of_all_bits".to_owned(), [&[0x82, 0xff][..], &[0xff; 20]].concat()));
    all.push(("frame", "length_of_63_bits".to_owned(), [&[0x82, 0xff, 0x7f][..], &[0xff; 20]].concat()));
    for size in [125, 126, 127, 16_384, 16_385] {
        all.push(("frame", format!("of_{size}"), frame::masked(0x82, &vec![0; size], [1; 4])));
    }
}

/// Sequences of reports.
fn conversations(all: &mut Vec<(&'static str, String, Vec<u8>)>, reports: &[(String, Vec<u8>)]) {
    use opamp_server::proto::AgentToServer;
    let full =
        reports.iter().find(|(name, _)| name == "a2s_first_full_status").map(|(_, bytes)| bytes.as_slice());
    let full = AgentToServer::decode(full.expect("a golden entry")).expect("a report");
    let numbered = |number: u64, whole: bool| {
        let report = if whole {
            full.clone()
        } else {
            let (instance_uid, capabilities) = (full.instance_uid.clone(), full.capabilities);
            AgentToServer { instance_uid, capabilities, ..AgentToServer::default() }
        };
        AgentToServer { sequence_num: number, ..report }.encode_to_vec()
    };
    let written = |steps: &[(u8, Vec<u8>)]| {
        state::written(steps.iter().map(|(control, message)| (*control, message.as_slice())))
    };
    let mut add = |name: &str, steps: &[(u8, Vec<u8>)]| all.push(("state", name.to_owned(), written(steps)));
    add(
        "in_order",
        &[(0, numbered(1, true)), (0, numbered(2, false)), (0, numbered(3, false)), (0, numbered(4, true))],
    );
    add("gap", &[(0, numbered(1, true)), (0, numbered(5, false)), (0, numbered(6, true))]);
    add("repeat", &[(0, numbered(1, true)), (0, numbered(1, true)), (0, numbered(2, false))]);
    add(
        "refused",
        &[(0, numbered(1, false)), (5, numbered(2, true)), (0, numbered(3, false)), (0, numbered(4, true))],
    );
    add("refused_new_start", &[(0, numbered(1, true)), (5, numbered(1, false)), (0, numbered(2, false))]);
    add(
        "crash",
        &[(0, numbered(1, true)), (0, numbered(2, false)), (7, numbered(3, false)), (6, numbered(4, true))],
    );
    add("wraps", &[(0, numbered(u64::MAX, true)), (0, numbered(0, false)), (0, numbered(1, false))]);
}

/// Requests on a raw socket.
fn requests(all: &mut Vec<(&'static str, String, Vec<u8>)>, reports: &[(String, Vec<u8>)]) {
    let post = "POST /v1/opamp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-protobuf\r\n";
    let upgrade = "GET /v1/opamp HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let request = |more: &str, body: &[u8]| [&[0], post.as_bytes(), more.as_bytes(), b"\r\n", body].concat();
    let sized = |body: &[u8]| request(&format!("Content-Length: {}\r\n", body.len()), body);
    let packed = |body: &[u8]| {
        request(
            &format!("Content-Encoding: gzip\r\nAccept-Encoding: gzip\r\nContent-Length: {}\r\n", body.len()),
            body,
        )
    };
    // As clients pack: the server stores small bodies as they are.
    let gzip = |body: &[u8]| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(body).expect("memory takes it");
        encoder.finish().expect("it is packed")
    };
    let mut add = |name: &str, input: Vec<u8>| all.push(("http", name.to_owned(), input));
    let kept = [
        "a2s_minimal",
        "a2s_first_full_status",
        "a2s_empty",
        "health_60_deep",
        "attributes_400",
        "nul_everywhere",
    ];
    for (name, report) in reports.iter().filter(|(name, _)| kept.contains(&name.as_str())) {
        add(&format!("post_{name}"), sized(report));
        add(&format!("gzip_{name}"), packed(&gzip(report)));
        let message = frame::masked(0x82, &[&[0], report.as_slice()].concat(), [1, 2, 3, 4]);
        add(&format!("link_{name}"), [&[0], upgrade.as_bytes(), &message].concat());
    }
    for (name, hex) in HOSTILE {
        let message = frame::masked(0x82, &unhex(hex), [1, 2, 3, 4]);
        add(&format!("link_{name}"), [&[0], upgrade.as_bytes(), &message].concat());
    }
    let minimal = unhex(MINIMAL);
    add("header_in_a_body", sized(&unhex(&format!("00{MINIMAL}"))));
    add("bomb", packed(&gzip(&vec![0; 20 << 20])));
    add("bomb_of_text", packed(&gzip(&nested(&[3, 1, 1], 3, &vec![b'a'; 1 << 19]))));
    add("gzip_cut", packed(&gzip(&minimal)[..20]));
    add("gzip_twice", packed(&gzip(&gzip(&minimal))));
    add("gzip_members", packed(&[gzip(&minimal[..10]), gzip(&minimal[10..])].concat()));
    add("gzip_waste_behind", packed(&[gzip(&minimal), vec![1, 2, 3]].concat()));
    add("not_gzip", packed(&minimal));
    add("unknown_encoding", request("Content-Encoding: br\r\nContent-Length: 3\r\n", b"abc"));
    add("too_long", request("Content-Length: 1048577\r\n", &minimal));
    add("length_of_all_bits", request("Content-Length: 18446744073709551615\r\n", &minimal));
    add("length_twice", request("Content-Length: 22\r\nContent-Length: 3\r\n", &minimal));
    add("length_and_chunks", request("Content-Length: 22\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"));
    add(
        "chunks",
        request(
            "Transfer-Encoding: chunked\r\n",
            &[b"16\r\n", minimal.as_slice(), b"\r\n0\r\n\r\n"].concat(),
        ),
    );
    add("chunk_of_all_bits", request("Transfer-Encoding: chunked\r\n", b"ffffffffffffffff\r\nabc"));
    add(
        "chunk_extension",
        request(
            "Transfer-Encoding: chunked\r\n",
            &[b"1;a=\"", "x".repeat(9_000).as_bytes(), b"\"\r\n"].concat(),
        ),
    );
    add("continue", request("Expect: 100-continue\r\nContent-Length: 22\r\n", &minimal));
    add("two_in_a_row", [sized(&minimal), sized(&minimal)[1..].to_vec()].concat());
    add("cut_head", [&[0], &post.as_bytes()[..40]].concat());
    add("head_of_64k", request(&format!("X: {}\r\n", "x".repeat(64 << 10)), b""));
    add("headers_200", request(&"X: y\r\n".repeat(200), b""));
    add("other_path", [&[0], &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..]].concat());
    add("foreign_origin", request("Origin: http://evil.example\r\nContent-Length: 0\r\n", b""));
    add(
        "old_http",
        [&[0], &b"POST /v1/opamp HTTP/1.0\r\nContent-Type: application/x-protobuf\r\n\r\n"[..]].concat(),
    );
    add("http_2", [&[0], &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..]].concat());
    add("tls", [&[0], &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..]].concat());
    add("upgrade_without_key", [&[0], upgrade.replace("Sec-WebSocket-Key", "X").as_bytes()].concat());
    add("upgrade_and_gone", [&[12], upgrade.as_bytes()].concat());
    add("upgrade_by_post", [&[0], upgrade.replace("GET", "POST").as_bytes()].concat());
    let message = frame::masked(0x82, &[&[0], minimal.as_slice()].concat(), [1, 2, 3, 4]);
    add("link_many", [&[3], upgrade.as_bytes(), &message.repeat(30)].concat());
    add("link_half_a_message", [&[1], upgrade.as_bytes(), &message[..12]].concat());
    add("link_text", [&[0], upgrade.as_bytes(), &frame::masked(0x81, b"hello", [1; 4])].concat());
    add(
        "link_malformed",
        [&[0], upgrade.as_bytes(), &frame::masked(0x82, &[0, 0], [1; 4]).repeat(6)].concat(),
    );
    add(
        "link_too_large",
        [&[0], upgrade.as_bytes(), &[0x82, 0xff, 0, 0, 0, 0, 0, 0x10, 0, 1, 1, 2, 3, 4]].concat(),
    );
    add("link_unmasked", [&[0], upgrade.as_bytes(), &[0x82, 0x01, 0x00]].concat());
    add(
        "link_close",
        [&[0], upgrade.as_bytes(), &message, &frame::masked(0x88, b"\x03\xe8", [1; 4])].concat(),
    );
}

/// The folder holds what is made here. After a change here: `cargo test --test fuzz -- --ignored write_the_corpus`.
#[test]
fn the_corpus_holds_its_seeds() {
    for (target, name, input) in seeds() {
        let found = fs::read(engine::folder(target).join(&name));
        assert!(
            found.is_ok_and(|found| found == input),
            "{target}/{name} is not as it is made: write the corpus anew"
        );
    }
}

/// Writes the seeds into the corpus.
#[test]
#[ignore = "it writes into the sources"]
fn write_the_corpus() {
    for (target, name, input) in seeds() {
        let folder = engine::folder(target);
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join(name), input).expect("it is written");
    }
}

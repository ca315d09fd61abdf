//! What must be accepted and what must be refused, whatever it does to a decoder, a store or a screen.

use opamp_server::proto::any_value::Value as Kind;
use opamp_server::proto::{
    AgentDescription, AgentToServer, AnyValue, ArrayValue, AvailableComponents, ComponentDetails,
    ComponentHealth, CustomCapabilities, KeyValue, KeyValueList, ServerErrorResponseType, ServerToAgent,
};
use prost::Message as _;
use prost::encoding::encode_varint;
use serde_json::Value;

use super::unhex;
use crate::harness::agent::{
    Agent, Poller, Socket, assert_acknowledged, description, effective_config, error_of, offer_in, pair,
};
use crate::harness::frames::content;
use crate::harness::server::TestServer;

/// Posts a body that must be answered with 200; answers the offer.
async fn post(poller: &mut Poller, body: &[u8]) -> ServerToAgent {
    let answer = poller.post(&[], body).await;
    offer_in(&answer)
}

/// A length-delimited field.
fn field(number: u64, bytes: &[u8]) -> Vec<u8> {
    let mut field = Vec::new();
    encode_varint(number << 3 | 2, &mut field);
    encode_varint(bytes.len() as u64, &mut field);
    field.extend(bytes);
    field
}

/// Every golden report of other implementations is taken over both transports; only who has no uid and asks for none is refused.
#[tokio::test]
async fn s_141_every_golden_report_is_taken() {
    let entries: Value = serde_json::from_str(include_str!("../../golden/messages.json")).unwrap();
    let mut seen = 0;
    for entry in entries.as_array().unwrap() {
        if entry["type"] != "AgentToServer" {
            continue;
        }
        seen += 1;
        let name = entry["name"].as_str().unwrap();
        let nobody = entry["json"]["instanceUid"].is_null() && entry["json"]["flags"] != "1";
        let body = unhex(entry["hex"].as_str().unwrap());
        // Each on its own: many of them share one uid, and would be taken for rivals.
        let server = TestServer::fresh().await;
        let mut poller = Poller::connect(&server).await;
        let mut socket = Socket::connect(&server).await;
        socket.send_bytes([&[0][..], &body].concat()).await;
        let first = socket.offer().await;
        for offer in [first, post(&mut poller, &body).await] {
            if nobody {
                error_of(&offer, ServerErrorResponseType::BadRequest);
            } else {
                assert_eq!(offer.error_response, None, "{name}");
                assert_eq!(offer.capabilities, 0x15, "{name}");
            }
        }
        let mut next = Agent::new();
        assert_acknowledged(&poller.exchange(&next.full()).await, next.uid);
    }
    assert_eq!(seen, 58);
}

/// S-141: unknown fields of every wire type, groups too, are skipped at every depth, before and behind known ones.
#[tokio::test]
async fn s_141_unknown_fields_of_every_wire_type_are_skipped() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    let unknown = [
        ("a varint", "c03e ffffffffffffffffff01"),
        ("64 bits", "c13e 0102030405060708"),
        ("bytes", "c23e 03 616263"),
        ("no bytes", "c23e 00"),
        ("an empty group", "c33e c43e"),
        ("a group with a group in it", "c33e 0801 0b 1001 0c 1203616263 c43e"),
        ("32 bits", "c53e 01020304"),
        ("the largest number", "faffffff0f 00"),
        ("the next number of a report", "8201 00"),
        ("one of each", "c03e01 c13e0102030405060708 c23e00 c33ec43e c53e01020304"),
    ];
    for (what, hex) in unknown {
        let odd = unhex(&hex.replace(' ', ""));
        let mut agent = Agent::new();
        let body = agent.full().encode_to_vec();
        let described =
            field(3, &[&odd[..], &description(&[("service.name", "odd")]).encode_to_vec(), &odd].concat());
        let health = field(5, &[&odd[..], &[0x08, 0x01], &odd].concat());
        let offer = post(&mut poller, &[&odd[..], &body, &described, &odd, &health].concat()).await;
        assert_acknowledged(&offer, agent.uid);
        let known = server.agent(agent.uid).await.unwrap();
        assert_eq!((&known["name"], &known["healthy"]), (&"odd".into(), &true.into()), "{what}");
    }
}

/// S-141: legal encodings that hardly anybody writes mean what they say.
#[tokio::test]
async fn s_141_unusual_encodings_mean_what_they_say() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    let mut agent = Agent::new();
    // The number in ten bytes, the mask twice, the parts ahead of the uid, the description in two halves.
    let mut body = field(3, &description(&[("service.name", "first")]).encode_to_vec());
    body.extend(unhex("10808080808080808080002005"));
    body.extend(field(3, &description(&[("service.name", "second"), ("team", "edge")]).encode_to_vec()));
    body.extend(field(1, &[9; 16]));
    body.extend(field(1, agent.uid.as_bytes()));
    body.extend(unhex("2001"));
    assert_acknowledged(&post(&mut poller, &body).await, agent.uid);
    let known = server.agent(agent.uid).await.unwrap();
    assert_eq!((&known["name"], &known["sequence_num"]), (&"second".into(), &0.into()));
    assert_eq!(known["capabilities"], serde_json::json!(["ReportsStatus"]), "the last mask counts");
    assert_eq!(known["description"]["identifying_attributes"]["team"], "edge", "halves are joined");
    agent.number = 1;
    // A map: an entry without key, one without value, one twice, one with its value ahead of its key.
    let mut map = field(6, &[]);
    map.extend(field(6, &field(1, b"novalue")));
    map.extend(field(6, &[field(1, b"twice"), field(2, &field(3, b"old"))].concat()));
    map.extend(field(6, &[field(1, b"twice"), field(2, &field(3, b"new"))].concat()));
    map.extend(field(6, &[field(2, &field(3, b"x")), field(1, b"backwards")].concat()));
    let body = [agent.report().encode_to_vec(), field(5, &map)].concat();
    assert_acknowledged(&post(&mut poller, &body).await, agent.uid);
    let known = server.agent(agent.uid).await.unwrap();
    let map = known["health"]["component_health_map"].as_object().unwrap();
    let errors: Vec<_> =
        map.iter().map(|(name, part)| (name.as_str(), part["last_error"].as_str().unwrap())).collect();
    assert_eq!(errors, [("", ""), ("backwards", "x"), ("novalue", ""), ("twice", "new")]);
}

/// S-135: text that is no UTF-8, in whatever field it is, is `BadRequest`, and nothing of the report is taken.
#[tokio::test]
async fn s_135_text_that_is_no_utf_8_is_a_bad_request_wherever_it_is() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    let bad = b"\xc3\x28";
    let attribute = |key: &[u8], value: &[u8]| [field(1, key), field(2, &field(1, value))].concat();
    let cases = [
        ("the key of an attribute", field(3, &field(1, &attribute(bad, b"x")))),
        ("the value of an attribute", field(3, &field(2, &attribute(b"x", bad)))),
        ("an error", field(5, &field(3, bad))),
        ("a status", field(5, &field(4, bad))),
        ("the name of a component", field(5, &field(6, &field(1, bad)))),
        ("the name of a file", field(6, &field(1, &field(1, &field(1, bad))))),
        ("a content type", field(6, &field(1, &field(1, &field(2, &field(2, bad)))))),
        ("the error of a config", field(7, &field(3, bad))),
        ("the name of a package", field(8, &field(1, &field(1, bad)))),
        ("a custom capability", field(12, &field(1, bad))),
        ("the type of a custom message", field(13, &field(2, bad))),
        ("the name of an inventory's component", field(14, &field(1, &field(1, bad)))),
        ("the error of connection settings", field(15, &field(3, bad))),
    ];
    for (what, bytes) in cases {
        let mut agent = Agent::new();
        let offer = post(&mut poller, &[agent.full().encode_to_vec(), bytes].concat()).await;
        let text = error_of(&offer, ServerErrorResponseType::BadRequest);
        assert!(!text.is_empty(), "{what}");
        assert_eq!(server.agent(agent.uid).await, None, "{what}: nothing is taken");
    }
}

/// S-135: a known field with a foreign wire type is `BadRequest`, in whatever field it is.
#[tokio::test]
async fn s_135_a_foreign_wire_type_is_a_bad_request() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    for number in 1..=15_u8 {
        let foreign = match number {
            2 | 4 | 10 => vec![number << 3 | 2, 1, 0],
            _ => vec![number << 3, 1],
        };
        let offer = post(&mut poller, &[Agent::new().full().encode_to_vec(), foreign].concat()).await;
        error_of(&offer, ServerErrorResponseType::BadRequest);
    }
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 0);
}

/// S-135: a report cut anywhere is refused, or is a shorter report; never is an agent known that did not say its name.
#[tokio::test]
async fn s_135_a_report_cut_anywhere_is_answered() {
    let server = TestServer::fresh().await;
    let mut witness = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &witness.full()).await;
    let whole = content(&Agent::new().full());
    let (mut refused, mut taken) = (0, 0);
    for length in 0..whole.len() {
        socket.send_bytes(whole[..length].to_vec()).await;
        let offer = socket.offer().await;
        if offer.error_response.is_some() {
            error_of(&offer, ServerErrorResponseType::BadRequest);
            refused += 1;
        } else {
            taken += 1;
        }
        assert_acknowledged(&socket.exchange(&witness.report()).await, witness.uid);
    }
    assert!(refused > whole.len() / 2, "{refused} of {}", whole.len());
    assert_eq!(taken, 2, "behind the uid, and behind the mask");
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 2);
}

/// NUL, control characters and text of every script are shown; NUL as U+FFFD, because no database takes it.
#[tokio::test]
async fn s_042_nul_and_odd_text_in_every_part_is_shown() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let odd = "a\0b\u{1}\u{7f}\u{feff}\u{202e}é漢🦀\"\\'%_;--";
    let shown = odd.replace('\0', "\u{fffd}");
    let mut report = agent.full();
    report.agent_description = Some(description(&[("service.name", odd), ("host.name", odd), (odd, odd)]));
    report.health = Some(ComponentHealth {
        last_error: odd.to_owned(),
        status: odd.to_owned(),
        component_health_map: [(odd.to_owned(), ComponentHealth::default())].into(),
        ..ComponentHealth::default()
    });
    report.effective_config = Some(effective_config(odd));
    report.custom_capabilities = Some(CustomCapabilities { capabilities: vec![odd.to_owned()] });
    report.available_components = Some(AvailableComponents {
        components: [(odd.to_owned(), ComponentDetails::default())].into(),
        hash: vec![1],
    });
    assert_acknowledged(&Poller::once(&server, &report).await, agent.uid);
    let known = server.agent(agent.uid).await.unwrap();
    for text in [
        &known["name"],
        &known["host"],
        &known["description"]["identifying_attributes"][&shown],
        &known["health"]["last_error"],
        &known["health"]["status"],
        &known["effective_config"][""]["body"],
        &known["custom_capabilities"][0],
    ] {
        assert_eq!(text, &shown);
    }
    assert!(known["health"]["component_health_map"][&shown].is_object());
    assert!(known["available_components"][&shown].is_object());
}

/// Text of 100 kB, wherever it is, is kept whole; only name and host are cut to what an index takes.
#[tokio::test]
async fn s_042_text_of_100_kb_is_kept_whole() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let long = "é".repeat(50_000);
    let mut report = agent.full();
    report.agent_description =
        Some(description(&[("service.name", &long), ("host.name", &long), (&long, "x")]));
    report.health = Some(ComponentHealth { last_error: long.clone(), ..ComponentHealth::default() });
    report.effective_config = Some(effective_config(&long));
    report.custom_capabilities = Some(CustomCapabilities { capabilities: vec![long.clone()] });
    let (mut socket, offer) = Socket::greet(&server, &report).await;
    assert_acknowledged(&offer, agent.uid);
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    let known = server.agent(agent.uid).await.unwrap();
    let attributes = &known["description"]["identifying_attributes"];
    assert_eq!(attributes["service.name"], long);
    assert_eq!(attributes[&long], "x");
    assert_eq!(known["health"]["last_error"], long);
    assert_eq!(known["effective_config"][""]["body"], long);
    assert_eq!(known["custom_capabilities"][0], long);
    for column in ["name", "host"] {
        assert_eq!(known[column].as_str().unwrap().chars().count(), 255, "{column}");
    }
}

/// An agent with 10,000 attributes is taken and shown whole.
#[tokio::test]
async fn s_042_ten_thousand_attributes_are_shown() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let non_identifying_attributes = (0..10_000).map(|number| pair(&format!("k{number}"), "v")).collect();
    let described = AgentDescription {
        identifying_attributes: vec![pair("service.name", "collector")],
        non_identifying_attributes,
    };
    let report = AgentToServer { agent_description: Some(described), ..agent.full() };
    assert_acknowledged(&Poller::once(&server, &report).await, agent.uid);
    let known = server.agent(agent.uid).await.unwrap();
    assert_eq!(known["description"]["non_identifying_attributes"].as_object().unwrap().len(), 10_000);
    assert_eq!(server.read("/api/v1/agents?attr.k0=v").await["total"], 1);
}

/// A health tree of so many levels.
fn tree(levels: usize) -> ComponentHealth {
    (1..levels).fold(
        ComponentHealth { last_error: "deepest".to_owned(), ..ComponentHealth::default() },
        |inner, _| ComponentHealth {
            component_health_map: [("c".to_owned(), inner)].into(),
            ..ComponentHealth::default()
        },
    )
}

/// Health trees of 40 levels are shown to the bottom; 60 are more than any decoder takes: refused, and briefly.
#[tokio::test]
async fn s_135_health_of_60_levels_is_refused_and_of_40_shown() {
    let server = TestServer::fresh().await;
    let mut witness = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &witness.full()).await;
    for levels in 1..=60 {
        let mut agent = Agent::new();
        let report = AgentToServer { health: Some(tree(levels)), ..agent.full() };
        let offer = socket.exchange(&report).await;
        if offer.error_response.is_some() {
            assert!(levels > 40, "{levels} levels are few enough");
            let text = error_of(&offer, ServerErrorResponseType::BadRequest);
            assert!(text.chars().count() < 300, "{text}");
            assert_eq!(server.agent(agent.uid).await, None);
        } else {
            assert!(levels < 60, "no decoder takes that many");
            let known = server.agent(agent.uid).await.unwrap();
            let bottom = (1..levels).fold(&known["health"], |part, _| &part["component_health_map"]["c"]);
            assert_eq!(bottom["last_error"], "deepest", "{levels} levels");
            assert_acknowledged(&socket.exchange(&agent.farewell()).await, agent.uid);
        }
        assert_acknowledged(&socket.exchange(&witness.report()).await, witness.uid);
    }
}

/// Values within values: 30 levels are shown, 60 are refused; lists and objects alike.
#[tokio::test]
async fn s_135_values_of_60_levels_are_refused_and_of_30_shown() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    let list = |inner: AnyValue| Kind::ArrayValue(ArrayValue { values: vec![inner] });
    let object = |inner: AnyValue| {
        let pair = KeyValue { key: "k".to_owned(), value: Some(inner) };
        Kind::KvlistValue(KeyValueList { values: vec![pair] })
    };
    let wraps: [(&str, &dyn Fn(AnyValue) -> Kind); 2] = [("list", &list), ("object", &object)];
    for (what, wrap) in wraps {
        for (levels, fits) in [(1, true), (30, true), (60, false), (1_000, false)] {
            let bottom = AnyValue { value: Some(Kind::StringValue("deepest".to_owned())) };
            let value = (0..levels).fold(bottom, |inner, _| AnyValue { value: Some(wrap(inner)) });
            let mut agent = Agent::new();
            let pair = KeyValue { key: "deep".to_owned(), value: Some(value) };
            let described =
                AgentDescription { identifying_attributes: vec![pair], ..AgentDescription::default() };
            let report = AgentToServer { agent_description: Some(described), ..agent.full() };
            let offer = poller.exchange(&report).await;
            if fits {
                assert_acknowledged(&offer, agent.uid);
                let known = server.agent(agent.uid).await.unwrap();
                assert!(known.to_string().contains("deepest"), "{what} of {levels} levels");
            } else {
                error_of(&offer, ServerErrorResponseType::BadRequest);
                assert_eq!(server.agent(agent.uid).await, None, "{what} of {levels} levels");
            }
        }
    }
}

/// Components within components, as deep as a decoder goes, are stored and shown like health.
#[tokio::test]
async fn s_135_an_inventory_of_60_levels_is_refused_and_of_40_shown() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    for (levels, fits) in [(40, true), (60, false)] {
        let bottom = ComponentDetails { metadata: vec![pair("deepest", "yes")], ..Default::default() };
        let details = (1..levels).fold(bottom, |inner, _| ComponentDetails {
            sub_component_map: [("c".to_owned(), inner)].into(),
            ..ComponentDetails::default()
        });
        let components = [("c".to_owned(), details)].into();
        let mut agent = Agent::new();
        let report = AgentToServer {
            available_components: Some(AvailableComponents { components, hash: vec![levels] }),
            ..agent.full()
        };
        let offer = poller.exchange(&report).await;
        assert_eq!(offer.error_response.is_none(), fits, "{levels} levels");
        let known = server.agent(agent.uid).await;
        assert_eq!(known.is_some_and(|known| known.to_string().contains("deepest")), fits, "{levels} levels");
    }
}

/// Bytes without sense, many of them, are each answered or closed on; whoever speaks sense is served.
#[tokio::test]
async fn s_135_noise_is_answered_and_harms_nobody() {
    let server = TestServer::fresh().await;
    let mut witness = Agent::new();
    let (mut calm, _) = Socket::greet(&server, &witness.full()).await;
    let mut poller = Poller::connect(&server).await;
    // A small generator, so that every run sees the same noise.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    for round in 0..300_u32 {
        let length = usize::from(next()[0]) % 90;
        let noise: Vec<u8> = std::iter::repeat_with(&mut next).flatten().take(length).collect();
        let offer = post(&mut poller, &noise).await;
        let text = error_of(&offer, ServerErrorResponseType::BadRequest);
        assert!(text.chars().count() < 300, "{text}");
        if round % 10 == 0 {
            assert_acknowledged(&calm.exchange(&witness.report()).await, witness.uid);
        }
    }
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 1);
}

/// S-135, R-020: the classic bad inputs over plain HTTP, where no header belongs in front: 200 with the verdict inside.
#[tokio::test]
async fn s_135_the_classic_bad_inputs_are_refused_as_polls_too() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    for bad in [
        "",
        "80",
        "000a100190d3c27a107b3e9c415d2e8f60a1b210072001",
        "80000a100190d3c27a107b3e9c415d2e8f60a1b210072001",
        "ffffffffffffffffff010a00",
        "ffffffffffffffffffff01",
        "0a100190",
        "0000",
        "020161",
        "0e",
        "9c06",
        "2a031a01ff",
        "0801",
        "0a05010203040510072001",
        "0a1000000000000000000000000000000000",
    ] {
        let offer = post(&mut poller, &unhex(bad)).await;
        assert!(
            !error_of(&offer, ServerErrorResponseType::BadRequest).is_empty(),
            "{bad}: the error is readable"
        );
    }
    assert_eq!(server.read("/api/v1/agents?include=retired").await["total"], 0);
    for good in [
        "0a100190d3c27a107b3e9c415d2e8f60a1b210072001",
        "0a1030303030303030303030303030303030",
        "0a1a30314a3341385158595a3031323334353637383941424344454610012001",
    ] {
        assert_eq!(post(&mut poller, &unhex(good)).await.error_response, None, "{good}");
    }
    assert_eq!(server.read("/api/v1/agents").await["total"], 3);
}

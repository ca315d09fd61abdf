//! The pure parts on a report's way, each by itself: decode, absorb, compose, encode, deadlines.
//!
//! `cargo bench --bench hot` tells the time of each and how it differs from the run before; a heartbeat
//! is the report that a server reads a thousand times as often as any other, the first report of 2 KiB
//! the largest usual one.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use opamp_server::agent::offer::{Answer, compose};
use opamp_server::agent::report::{AgentState, KnownAgent, Outline};
use opamp_server::clock::Tick;
use opamp_server::proto::any_value::Value;
use opamp_server::proto::{
    AgentConfigFile, AgentConfigMap, AgentDescription, AgentToServer, AnyValue, ComponentHealth,
    EffectiveConfig, KeyValue,
};
use opamp_server::pulse::{Expectations, Link, Pulse};
use opamp_server::store::Transport;
use opamp_server::wire;
use prost::Message;

/// The agents whose deadlines are computed: as many as one server is made for.
const FLEET: u64 = 18_000;

/// The capabilities that such an agent states: status, effective config, health, heartbeats.
const CAPABILITIES: u64 = 0x2805;

fn heartbeat(sequence_num: u64) -> AgentToServer {
    AgentToServer {
        instance_uid: vec![7; 16],
        sequence_num,
        capabilities: CAPABILITIES,
        ..AgentToServer::default()
    }
}

/// About 2 KiB.
fn first_report() -> AgentToServer {
    let attribute = |number: usize| KeyValue {
        key: format!("attribute.{number:02}"),
        value: Some(AnyValue { value: Some(Value::StringValue("x".repeat(60))) }),
    };
    let file =
        AgentConfigFile { body: "receivers: {}\n".repeat(20).into(), content_type: "text/yaml".into() };
    AgentToServer {
        agent_description: Some(AgentDescription {
            identifying_attributes: (0..2).map(attribute).collect(),
            non_identifying_attributes: (2..20).map(attribute).collect(),
        }),
        health: Some(ComponentHealth { healthy: true, ..ComponentHealth::default() }),
        effective_config: Some(EffectiveConfig {
            config_map: Some(AgentConfigMap { config_map: BTreeMap::from([(String::new(), file)]) }),
        }),
        ..heartbeat(0)
    }
}

fn frame(report: &AgentToServer) -> Vec<u8> {
    [vec![0], report.encode_to_vec()].concat()
}

/// An agent's state after its first report, which is what heartbeats find.
fn known() -> AgentState {
    let report = first_report();
    AgentState::restore(&KnownAgent::default()).absorb(&Outline::of(&report, &report.encode_to_vec())).0
}

fn decode(criterion: &mut Criterion) {
    for (name, report) in [("heartbeat", heartbeat(7)), ("first report", first_report())] {
        let frame = frame(&report);
        criterion.bench_function(&format!("decode/{name}"), |bencher| {
            bencher.iter(|| wire::decode_frame(black_box(&frame)));
        });
    }
}

fn absorb(criterion: &mut Criterion) {
    let unknown = AgentState::restore(&KnownAgent::default());
    for (name, state, report) in
        [("heartbeat", known(), heartbeat(1)), ("first report", unknown, first_report())]
    {
        let bytes = report.encode_to_vec();
        criterion.bench_function(&format!("absorb/{name}"), |bencher| {
            bencher.iter(|| black_box(&state).absorb(&Outline::of(black_box(&report), black_box(&bytes))));
        });
    }
}

fn answer(criterion: &mut Criterion) {
    criterion.bench_function("compose", |bencher| {
        bencher.iter(|| compose(black_box(&[7; 16]), Answer::default()));
    });
    let offer = compose(&[7; 16], Answer::default());
    criterion.bench_function("encode", |bencher| bencher.iter(|| wire::encode_frame(black_box(&offer))));
}

fn heartbeat_s_way(criterion: &mut Criterion) {
    let frame = frame(&heartbeat(1));
    let state = known();
    criterion.bench_function("heartbeat, all of it", |bencher| {
        bencher.iter(|| {
            let body = wire::body_of_frame(black_box(&frame)).unwrap_or_default();
            let report = wire::decode_body(body).unwrap_or_default();
            let (next, change) = state.absorb(&Outline::of(&report, body));
            let answer = Answer { ask_full_state: change.ask_full_state, new_uid: None };
            (next, wire::encode_frame(&compose(&report.instance_uid, answer)))
        });
    });
}

/// What the monitor does for a whole fleet whose timers have all fired.
fn deadlines(criterion: &mut Criterion) {
    let expected = Expectations { interval: Duration::from_secs(30), timeout: Duration::from_mins(1) };
    let fleet: Vec<(Link, Pulse)> = (0..FLEET)
        .map(|number| {
            let tick = Tick::from_micros(number);
            (Link::heard_at(tick), Pulse::starting(tick, Some(number)))
        })
        .collect();
    for transport in [Transport::Websocket, Transport::Http] {
        criterion.bench_function(&format!("deadlines of {FLEET} agents/{transport:?}"), |bencher| {
            bencher.iter(|| {
                let earliest =
                    fleet.iter().map(|(link, pulse)| pulse.beat().deadline(transport, link, &expected));
                earliest.min()
            });
        });
    }
}

criterion_group!(hot, decode, absorb, answer, heartbeat_s_way, deadlines);
criterion_main!(hot);

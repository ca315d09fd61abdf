//! The reports an agent of the swarm sends: everything about itself, a heartbeat, a farewell.
//!
//! Promises that the full report of an agent is the same each time and as large as asked (never
//! larger, unless it is so by nature). Pure: must not know links, clocks or answers.

use std::collections::BTreeMap;

use opamp_server::proto::{
    AgentCapabilities, AgentConfigFile, AgentConfigMap, AgentDescription, AgentDisconnect, AgentToServer,
    AnyValue, ComponentHealth, EffectiveConfig, KeyValue, any_value::Value,
};
use prost::Message;
use uuid::Uuid;

use crate::identity::Identity;

const CAPABILITIES: u64 = AgentCapabilities::ReportsStatus as u64
    | AgentCapabilities::ReportsEffectiveConfig as u64
    | AgentCapabilities::ReportsHealth as u64
    | AgentCapabilities::ReportsHeartbeat as u64;

const CONFIG: &str = "receivers:\n  otlp:\n    protocols:\n      grpc:\n";

/// Padding is spread over several attributes, as a real description has several.
const MAX_PADS: usize = 24;
/// What a padding attribute of usual length takes besides its text.
const PAD_OVERHEAD: usize = 20;
const USUAL_PAD: usize = 64;
/// Purpose of the chance that padding draws from.
const PADDING: usize = 1;

/// What every report carries and a heartbeat consists of.
pub(crate) fn heartbeat(uid: Uuid, sequence_num: u64) -> AgentToServer {
    AgentToServer {
        instance_uid: uid.as_bytes().to_vec(),
        sequence_num,
        capabilities: CAPABILITIES,
        ..AgentToServer::default()
    }
}

/// Says that the health of the agent has changed, and nothing else.
pub(crate) fn changed(identity: &Identity, uid: Uuid, sequence_num: u64, healthy: bool) -> AgentToServer {
    AgentToServer { health: Some(health(identity, healthy)), ..heartbeat(uid, sequence_num) }
}

/// The last report before the agent leaves.
pub(crate) fn farewell(uid: Uuid, sequence_num: u64) -> AgentToServer {
    AgentToServer { agent_disconnect: Some(AgentDisconnect {}), ..heartbeat(uid, sequence_num) }
}

/// Everything the agent has to say about itself, in `bytes` of protobuf for the first number.
pub(crate) fn full(
    identity: &Identity,
    uid: Uuid,
    sequence_num: u64,
    healthy: bool,
    bytes: usize,
) -> AgentToServer {
    // The number's own size must not change what the agent says about itself.
    let mut report = heartbeat(uid, 0);
    report.health = Some(health(identity, healthy));
    report.effective_config = Some(effective_config());
    let bare = description(identity, Vec::new());
    let room = bytes.saturating_sub(with_description(&mut report, bare));
    if room > PAD_OVERHEAD {
        let padded = description(identity, padding(identity, room));
        let size = with_description(&mut report, padded);
        fit(&mut report, size, bytes);
    }
    report.sequence_num = sequence_num;
    report
}

fn with_description(report: &mut AgentToServer, description: AgentDescription) -> usize {
    report.agent_description = Some(description);
    report.encoded_len()
}

fn description(identity: &Identity, padding: Vec<KeyValue>) -> AgentDescription {
    // The name of the instance stays even where the server gives the agent another uid.
    let instance = identity.uid.to_string();
    let host = format!("swarm-{}", identity.index);
    let mut non_identifying_attributes =
        vec![attribute("host.name", host), attribute("os.type", "linux".to_owned())];
    non_identifying_attributes.extend(padding);
    AgentDescription {
        identifying_attributes: vec![
            attribute("service.name", "swarm".to_owned()),
            attribute("service.instance.id", instance),
        ],
        non_identifying_attributes,
    }
}

fn health(identity: &Identity, healthy: bool) -> ComponentHealth {
    ComponentHealth {
        healthy,
        start_time_unix_nano: identity.born_ms * 1_000_000,
        status: if healthy { "StatusOK" } else { "StatusRecoverableError" }.to_owned(),
        status_time_unix_nano: identity.born_ms * 1_000_000,
        ..ComponentHealth::default()
    }
}

fn effective_config() -> EffectiveConfig {
    let file = AgentConfigFile { body: CONFIG.into(), content_type: "text/yaml".to_owned() };
    EffectiveConfig {
        config_map: Some(AgentConfigMap { config_map: BTreeMap::from([(String::new(), file)]) }),
    }
}

/// Attributes that together take about `room` bytes.
fn padding(identity: &Identity, room: usize) -> Vec<KeyValue> {
    let mut rng = identity.rng(PADDING);
    let count = (room / (USUAL_PAD + PAD_OVERHEAD)).clamp(1, MAX_PADS);
    let length = (room / count).saturating_sub(PAD_OVERHEAD);
    let mut pad = |number| {
        let text = (0..length).map(|_| rng.alphanumeric()).collect();
        attribute(&format!("swarm.pad.{number:02}"), text)
    };
    (0..count).map(&mut pad).collect()
}

/// Stretches or cuts the last attribute until the report has `wanted` bytes, or a byte or two
/// less where the growing length prefixes jump over that size.
fn fit(report: &mut AgentToServer, mut size: usize, wanted: usize) {
    const ROUNDS: usize = 6;
    for round in 0..ROUNDS {
        let Some(text) = last_text(report) else {
            return;
        };
        if size > wanted {
            text.truncate(text.len().saturating_sub(size - wanted));
        } else if size < wanted && round + 2 < ROUNDS {
            text.extend(std::iter::repeat_n('x', wanted - size));
        } else {
            return;
        }
        size = report.encoded_len();
    }
}

fn last_text(report: &mut AgentToServer) -> Option<&mut String> {
    let description = report.agent_description.as_mut()?;
    let last = description.non_identifying_attributes.last_mut()?;
    match last.value.as_mut()?.value.as_mut()? {
        Value::StringValue(text) => Some(text),
        Value::BoolValue(_)
        | Value::IntValue(_)
        | Value::DoubleValue(_)
        | Value::ArrayValue(_)
        | Value::KvlistValue(_)
        | Value::BytesValue(_) => None,
    }
}

fn attribute(key: &str, text: String) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(Value::StringValue(text)) }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first_of(identity: &Identity, bytes: usize) -> AgentToServer {
        full(identity, identity.uid, 0, true, bytes)
    }

    #[test]
    fn the_full_report_has_the_size_asked_for() {
        for (index, bytes) in (512..6_000).chain([100_000, 1_000_000, 5_000_001]).enumerate() {
            let size = first_of(&Identity::new(1, index), bytes).encoded_len();
            assert!(size <= bytes && size + 3 >= bytes, "asked {bytes}, got {size}");
        }
    }

    #[test]
    fn a_report_too_small_to_ask_for_is_not_padded() {
        let bare = first_of(&Identity::new(1, 0), 0);
        assert!(bare.encoded_len() < 400, "{}", bare.encoded_len());
        let described = bare.agent_description.map(|d| d.non_identifying_attributes.len());
        assert_eq!(described, Some(2));
    }

    #[test]
    fn the_full_report_is_the_same_each_time() {
        let identity = Identity::new(3, 3);
        let first = first_of(&identity, 2048);
        let mut later = full(&identity, identity.uid, 1_000_000, true, 2048);
        later.sequence_num = 0;
        assert_eq!(first, later);
    }

    #[test]
    fn a_change_of_health_is_what_the_full_report_says_then() {
        let identity = Identity::new(3, 3);
        for healthy in [true, false] {
            let change = changed(&identity, identity.uid, 5, healthy);
            let whole = full(&identity, identity.uid, 5, healthy, 2048);
            assert_eq!(change.health, whole.health);
            assert_eq!(change.health.map(|health| health.healthy), Some(healthy));
            assert_eq!(change.agent_description, None);
        }
    }

    #[test]
    fn the_first_number_is_absent_on_the_wire() {
        let uid = Identity::new(1, 1).uid;
        let (first, second) = (heartbeat(uid, 0), heartbeat(uid, 1));
        assert_eq!(first.encoded_len() + 2, second.encoded_len());
        assert_eq!(first.capabilities, 0x2805);
    }
}

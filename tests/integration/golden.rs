//! The golden messages: what other implementations put on the wire, with its meaning as JSON.
//!
//! Every entry passes through both the generated types, which the server uses, and the schema,
//! which knows the names of canonical JSON. Each test names every entry it fails.

use std::collections::{BTreeMap, BTreeSet};

use prost::{DecodeError, Message};
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};
use serde::Deserialize;
use serde_json::Value;

const MESSAGES: usize = 41;
const ENUMS: usize = 10;
const ENTRIES: usize = 177;

/// Entries of this prefix are legal but unusual encodings, which nobody has to reproduce.
const DECODE_ONLY: &str = "decode_only_";

/// Entries that spell out a default key or value of a map entry, which prost leaves out.
const EXPLICIT_MAP_DEFAULTS: [&str; 6] = [
    "a2s_available_components_full",
    "a2s_effective_config_single_unnamed",
    "a2s_first_seq0_with_empty_submessages",
    "a2s_remote_config_status_applied",
    "s2a_remote_config_single_unnamed",
    "type_AvailableComponents",
];

const ENUM_NAMES: [&str; ENUMS] = [
    "AgentCapabilities",
    "AgentToServerFlags",
    "CommandType",
    "ConnectionSettingsStatuses",
    "PackageStatusEnum",
    "PackageType",
    "RemoteConfigStatuses",
    "ServerCapabilities",
    "ServerErrorResponseType",
    "ServerToAgentFlags",
];

/// Lists the messages: the name in the schema, then the generated type.
macro_rules! messages {
    ($($name:literal => $generated:ident,)+) => {
        const MESSAGE_NAMES: [&str; MESSAGES] = [$($name),+];

        /// Decodes as the generated type of that name and encodes the result.
        fn through_generated(name: &str, bytes: &[u8]) -> Result<Vec<u8>, String> {
            match name {
                $($name => reencoded::<opamp_server::proto::$generated>(bytes),)+
                _ => return Err("no such message".to_owned()),
            }
            .map_err(|error| format!("generated type: {error}"))
        }
    };
}

messages! {
    "AgentConfigFile" => AgentConfigFile,
    "AgentConfigMap" => AgentConfigMap,
    "AgentDescription" => AgentDescription,
    "AgentDisconnect" => AgentDisconnect,
    "AgentIdentification" => AgentIdentification,
    "AgentRemoteConfig" => AgentRemoteConfig,
    "AgentToServer" => AgentToServer,
    "AnyValue" => AnyValue,
    "ArrayValue" => ArrayValue,
    "AvailableComponents" => AvailableComponents,
    "CertificateRequest" => CertificateRequest,
    "ComponentDetails" => ComponentDetails,
    "ComponentHealth" => ComponentHealth,
    "ConnectionSettingsOffers" => ConnectionSettingsOffers,
    "ConnectionSettingsRequest" => ConnectionSettingsRequest,
    "ConnectionSettingsStatus" => ConnectionSettingsStatus,
    "CustomCapabilities" => CustomCapabilities,
    "CustomMessage" => CustomMessage,
    "DownloadableFile" => DownloadableFile,
    "EffectiveConfig" => EffectiveConfig,
    "Header" => Header,
    "Headers" => Headers,
    "KeyValue" => KeyValue,
    "KeyValueList" => KeyValueList,
    "OpAMPConnectionSettings" => OpAmpConnectionSettings,
    "OpAMPConnectionSettingsRequest" => OpAmpConnectionSettingsRequest,
    "OtherConnectionSettings" => OtherConnectionSettings,
    "PackageAvailable" => PackageAvailable,
    "PackageDownloadDetails" => PackageDownloadDetails,
    "PackageStatus" => PackageStatus,
    "PackageStatuses" => PackageStatuses,
    "PackagesAvailable" => PackagesAvailable,
    "ProxyConnectionSettings" => ProxyConnectionSettings,
    "RemoteConfigStatus" => RemoteConfigStatus,
    "RetryInfo" => RetryInfo,
    "ServerErrorResponse" => ServerErrorResponse,
    "ServerToAgent" => ServerToAgent,
    "ServerToAgentCommand" => ServerToAgentCommand,
    "TLSCertificate" => TlsCertificate,
    "TLSConnectionSettings" => TlsConnectionSettings,
    "TelemetryConnectionSettings" => TelemetryConnectionSettings,
}

fn reencoded<M: Message + Default>(bytes: &[u8]) -> Result<Vec<u8>, DecodeError> {
    M::decode(bytes).map(|message| message.encode_to_vec())
}

/// One golden message.
#[derive(Deserialize)]
struct Entry {
    name: String,
    #[serde(rename = "type")]
    message: String,
    hex: String,
    json: Value,
}

impl Entry {
    fn all() -> Vec<Self> {
        serde_json::from_str(include_str!("../golden/messages.json"))
            .unwrap_or_else(|error| panic!("the golden file: {error}"))
    }

    /// The bytes on the wire, without any WebSocket header.
    fn bytes(&self) -> Result<Vec<u8>, String> {
        self.hex
            .as_bytes()
            .chunks(2)
            .map(|pair| {
                str::from_utf8(pair)
                    .ok()
                    .filter(|digits| digits.len() == 2)
                    .and_then(|digits| u8::from_str_radix(digits, 16).ok())
                    .ok_or_else(|| "hex: not pairs of digits".to_owned())
            })
            .collect()
    }

    /// The bytes on the wire after a pass through the generated type.
    fn reencoded(&self) -> Result<Vec<u8>, String> {
        through_generated(&self.message, &self.bytes()?)
    }

    /// Whether these bytes mean what the entry says they should.
    fn means(&self, schema: &DescriptorPool, bytes: &[u8]) -> Result<(), String> {
        let message = DynamicMessage::decode(message_of(schema, &self.message)?, bytes)
            .map_err(|error| format!("schema: {error}"))?;
        let json = serde_json::to_value(&message).map_err(|error| format!("JSON: {error}"))?;
        if same(&json, &self.json) { Ok(()) } else { Err(format!("is {json}, should be {}", self.json)) }
    }

    /// The bytes the schema makes of the JSON.
    fn encoded_from_json(&self, schema: &DescriptorPool) -> Result<Vec<u8>, String> {
        DynamicMessage::deserialize(message_of(schema, &self.message)?, &self.json)
            .map(|message| message.encode_to_vec())
            .map_err(|error| format!("JSON: {error}"))
    }
}

fn schema() -> DescriptorPool {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/proto");
    let files =
        protox::compile(["opamp.proto"], [folder]).unwrap_or_else(|error| panic!("the schema: {error}"));
    DescriptorPool::from_file_descriptor_set(files).unwrap_or_else(|error| panic!("the schema: {error}"))
}

fn message_of(schema: &DescriptorPool, name: &str) -> Result<MessageDescriptor, String> {
    schema
        .get_message_by_name(&format!("opamp.proto.v1.{name}"))
        .ok_or_else(|| "not in the schema".to_owned())
}

/// Equality of JSON to which 1 and 1.0 are one number. Whole numbers of 64 bits are text in it.
fn same(left: &Value, right: &Value) -> bool {
    match (left, right) {
        (Value::Number(left), Value::Number(right)) => left.as_f64() == right.as_f64(),
        (Value::Array(left), Value::Array(right)) => {
            left.len() == right.len() && left.iter().zip(right).all(|(l, r)| same(l, r))
        }
        (Value::Object(left), Value::Object(right)) => {
            left.len() == right.len()
                && left.iter().all(|(key, l)| right.get(key).is_some_and(|r| same(l, r)))
        }
        _ => left == right,
    }
}

/// Checks every entry and fails with the names of all that did not pass.
fn each_entry(check: impl Fn(&Entry) -> Result<(), String>) {
    let failures: Vec<String> = Entry::all()
        .iter()
        .filter_map(|entry| check(entry).err().map(|error| format!("{}: {error}", entry.name)))
        .collect();
    assert!(failures.is_empty(), "{} entries fail:\n{}", failures.len(), failures.join("\n"));
}

/// S-144: what arrives means the same to the generated types as to every other implementation.
#[test]
fn bytes_are_read_as_their_json() {
    let schema = schema();
    each_entry(|entry| entry.means(&schema, &entry.reencoded()?));
}

/// What others write from the same JSON, in whatever field order, is read without loss.
#[test]
fn json_survives_the_way_through_bytes() {
    let schema = schema();
    each_entry(|entry| {
        let written = entry.encoded_from_json(&schema)?;
        entry.means(&schema, &through_generated(&entry.message, &written)?)
    });
}

/// Messages are written byte for byte as others write them, but for the known exceptions.
#[test]
fn bytes_are_written_as_they_were_read() {
    let mut different = BTreeSet::new();
    for entry in Entry::all() {
        let same = entry.reencoded() == entry.bytes();
        if !same && !entry.name.starts_with(DECODE_ONLY) {
            different.insert(entry.name);
        }
    }
    assert_eq!(different, BTreeSet::from(EXPLICIT_MAP_DEFAULTS.map(str::to_owned)));
}

/// The golden file is whole: 177 entries, no name twice, every message among them.
#[test]
fn no_entry_is_missing() {
    let entries = Entry::all();
    let names: BTreeSet<_> = entries.iter().map(|entry| entry.name.as_str()).collect();
    let messages: BTreeSet<_> = entries.iter().map(|entry| entry.message.as_str()).collect();
    assert_eq!((entries.len(), names.len()), (ENTRIES, ENTRIES));
    assert_eq!(messages, BTreeSet::from(MESSAGE_NAMES));
}

/// S-144, AMB-19: the schema declares the 41 messages and 10 enums of the protocol, and nothing else.
#[test]
fn the_schema_declares_the_protocol_and_nothing_else() {
    let schema = schema();
    let messages: BTreeSet<_> = schema
        .all_messages()
        .filter(|message| !message.is_map_entry())
        .map(|message| message.full_name().to_owned())
        .collect();
    let enums: BTreeSet<_> = schema.all_enums().map(|it| it.full_name().to_owned()).collect();
    let qualified = |name| format!("opamp.proto.v1.{name}");
    assert_eq!(messages, BTreeSet::from(MESSAGE_NAMES.map(qualified)));
    assert_eq!(enums, BTreeSet::from(ENUM_NAMES.map(qualified)));
    assert_eq!(schema.services().count() + schema.all_extensions().count(), 0);
}

/// S-144: every enum value and mask bit has an entry of its name, and no entry names another.
#[test]
fn every_enum_value_has_its_entry() {
    let schema = schema();
    let declared: BTreeSet<_> = schema
        .all_enums()
        .flat_map(|it| it.values().map(|value| value.name().to_owned()).collect::<Vec<_>>())
        .collect();
    let named: BTreeSet<_> = Entry::all()
        .iter()
        .filter_map(|entry| entry.name.strip_prefix("enum_").or_else(|| entry.name.strip_prefix("bit_")))
        .map(str::to_owned)
        .collect();
    assert_eq!(declared, named);
}

/// S-144: the mask enums are no field's type, so the entries of their names alone pin their numbers.
#[test]
fn mask_bits_have_the_numbers_of_their_entries() {
    let numbers: BTreeMap<String, i32> = schema()
        .all_enums()
        .flat_map(|it| it.values().map(|v| (v.name().to_owned(), v.number())).collect::<Vec<_>>())
        .collect();
    each_entry(|entry| {
        let Some(bit) = entry.name.strip_prefix("bit_") else {
            return Ok(());
        };
        let mask = entry.json.get("capabilities").or_else(|| entry.json.get("flags"));
        let wanted = mask.and_then(Value::as_str).unwrap_or("0");
        let number = numbers.get(bit).map(i32::to_string);
        (number.as_deref() == Some(wanted))
            .then_some(())
            .ok_or_else(|| format!("is {number:?}, should be {wanted}"))
    });
}

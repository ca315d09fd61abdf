//! The reported parts as the documents that are stored and shown: JSON with cleaned text.
//!
//! Promises: whatever an agent sends becomes a document both databases take: NUL becomes U+FFFD,
//! names are cut to 255 characters, bytes become base64, and numbers JSON cannot hold become text.
//! It must not know where documents are stored or who may see them.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value};

use super::report::{Part, PartSet};
use crate::clock::Moment;
use crate::proto::any_value;
use crate::proto::{
    AgentConfigMap, AgentDescription, AgentToServer, AnyValue, AvailableComponents, ComponentDetails,
    ComponentHealth, ConnectionSettingsStatus, ConnectionSettingsStatuses, KeyValue, PackageStatus,
    PackageStatusEnum, PackageStatuses, RemoteConfigStatus, RemoteConfigStatuses,
};

/// The longest name, host, attribute key and attribute value that is indexed, in characters.
pub const INDEXED_LENGTH: usize = 255;

/// The most attributes of one agent that are indexed, identifying ones first; the rest is only shown.
pub const INDEXED_ATTRIBUTES: usize = 256;

/// The parts of one report that changed, ready to be stored; an absent one stays as it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Documents {
    /// The description, and what is derived from it.
    pub description: Option<Described>,
    /// The health tree.
    pub health: Option<Value>,
    /// The `healthy` of the whole agent.
    pub healthy: Option<bool>,
    /// The effective config: file name to `{body, content_type}`.
    pub effective_config: Option<Value>,
    /// The outcome of the last remote config.
    pub remote_config_status: Option<Value>,
    /// Hex of the remote config's hash, if it was reported APPLIED.
    pub sync_revision: Option<String>,
    /// All packages with their states.
    pub package_statuses: Option<Value>,
    /// The full list of custom capabilities (S-128).
    pub custom_capabilities: Option<Value>,
    /// Hash of the component inventory (S-132), hex.
    pub components_hash: Option<String>,
    /// The inventory itself, if it came with its hash (S-134).
    pub components: Option<Value>,
    /// The outcome of the last connection settings.
    pub connection_settings_status: Option<Value>,
}

/// A description and what is derived from it.
#[derive(Clone, Debug, PartialEq)]
pub struct Described {
    /// `{identifying_attributes, non_identifying_attributes}`, each key to value.
    pub document: Value,
    /// Attribute `service.name`.
    pub name: Option<String>,
    /// Attribute `host.name`.
    pub host: Option<String>,
    /// Attribute `groups` or `agent.groups`, as a list of texts.
    pub groups: Value,
    /// True with `opamp.ephemeral` true or `k8s.pod.uid` present.
    pub ephemeral: bool,
    /// Integer attribute `clients_count`, else 0.
    pub clients_count: i64,
    /// Up to [`INDEXED_ATTRIBUTES`] attributes as text, cut to [`INDEXED_LENGTH`], for filters.
    pub attributes: Map<String, Value>,
}

impl Documents {
    /// The documents of the parts `changed`, which are taken out of `report`: a text is moved where it can be.
    #[must_use]
    pub fn take(report: &mut AgentToServer, changed: PartSet) -> Self {
        let when = |part| changed.has(part);
        let description = report.agent_description.take_if(|_| when(Part::Description));
        let health = report.health.take_if(|_| when(Part::Health));
        let config = report.effective_config.take_if(|_| when(Part::EffectiveConfig));
        let remote = report.remote_config_status.take_if(|_| when(Part::RemoteConfigStatus));
        let packages = report.package_statuses.take_if(|_| when(Part::PackageStatuses));
        let custom = report.custom_capabilities.take_if(|_| when(Part::CustomCapabilities));
        let components = report.available_components.take_if(|_| when(Part::AvailableComponents));
        let settings = report.connection_settings_status.take_if(|_| when(Part::ConnectionSettingsStatus));
        Self {
            description: description.map(described),
            healthy: health.as_ref().map(|health| health.healthy),
            health: health.map(health_document),
            effective_config: config.map(|config| config_document(config.config_map.unwrap_or_default())),
            sync_revision: remote
                .as_ref()
                .filter(|status| status.status() == RemoteConfigStatuses::Applied)
                .map(|status| hex(&status.last_remote_config_hash)),
            remote_config_status: remote.map(remote_config_document),
            package_statuses: packages.map(packages_document),
            custom_capabilities: custom.map(|custom| custom.capabilities.into_iter().map(text).collect()),
            components_hash: components.as_ref().map(|components| hex(&components.hash)),
            components: components.and_then(components_document),
            connection_settings_status: settings.map(settings_document),
        }
    }
}

impl Documents {
    /// About how many bytes they hold.
    #[must_use]
    pub fn size(&self) -> usize {
        let described = self.description.as_ref();
        let documents = [
            described.map(|described| &described.document),
            self.health.as_ref(),
            self.effective_config.as_ref(),
            self.remote_config_status.as_ref(),
            self.package_statuses.as_ref(),
            self.custom_capabilities.as_ref(),
            self.components.as_ref(),
            self.connection_settings_status.as_ref(),
        ];
        documents.into_iter().flatten().map(size).sum()
    }

    /// These documents and, where they say something, the `newer` ones of the same agent.
    #[must_use]
    pub fn followed_by(self, newer: Self) -> Self {
        let components = if newer.components_hash.is_some() && newer.components_hash != self.components_hash {
            newer.components
        } else {
            newer.components.or(self.components)
        };
        Self {
            description: newer.description.or(self.description),
            health: newer.health.or(self.health),
            healthy: newer.healthy.or(self.healthy),
            effective_config: newer.effective_config.or(self.effective_config),
            remote_config_status: newer.remote_config_status.or(self.remote_config_status),
            sync_revision: newer.sync_revision.or(self.sync_revision),
            package_statuses: newer.package_statuses.or(self.package_statuses),
            custom_capabilities: newer.custom_capabilities.or(self.custom_capabilities),
            components_hash: newer.components_hash.or(self.components_hash),
            components,
            connection_settings_status: newer.connection_settings_status.or(self.connection_settings_status),
        }
    }
}

/// Text both databases take: NUL becomes U+FFFD.
#[must_use]
pub fn clean(text: String) -> String {
    if text.contains('\0') { text.replace('\0', "\u{fffd}") } else { text }
}

/// Lower-case hex.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _infallible = write!(text, "{byte:02x}");
        text
    })
}

/// About how many bytes a document holds.
fn size(document: &Value) -> usize {
    let own = size_of::<Value>();
    match document {
        Value::Null | Value::Bool(_) | Value::Number(_) => own,
        Value::String(text) => own + text.len(),
        Value::Array(list) => own + list.iter().map(size).sum::<usize>(),
        Value::Object(members) => {
            own + members.iter().map(|(name, member)| 2 * own + name.len() + size(member)).sum::<usize>()
        }
    }
}

/// Cleaned text as JSON.
fn text(text: String) -> Value {
    Value::String(clean(text))
}

/// An object of these members. They are moved: the macro of JSON copies what it is given, which in a tree
/// copies every leaf once a level.
fn object<const N: usize>(members: [(&str, Value); N]) -> Value {
    Value::Object(members.into_iter().map(|(name, member)| (name.to_owned(), member)).collect())
}

/// At most [`INDEXED_LENGTH`] characters of `text`.
fn cut(text: &str) -> String {
    let end = text.char_indices().nth(INDEXED_LENGTH).map_or(text.len(), |(end, _)| end);
    text[..end].to_owned()
}

fn described(description: AgentDescription) -> Described {
    let identifying = attributes(description.identifying_attributes);
    let other = attributes(description.non_identifying_attributes);
    let find = |key: &str| identifying.get(key).or_else(|| other.get(key));
    let text = |key: &str| find(key).map(|value| cut(&plain(value)));
    let groups = match find("groups").or_else(|| find("agent.groups")) {
        Some(Value::Array(groups)) => groups.iter().map(|group| Value::String(plain(group))).collect(),
        Some(Value::String(groups)) => {
            groups.split(',').map(str::trim).filter(|group| !group.is_empty()).map(Value::from).collect()
        }
        _ => Value::Array(Vec::new()),
    };
    let marked = find("opamp.ephemeral").is_some_and(|mark| plain(mark).eq_ignore_ascii_case("true"));
    let mut indexed = Map::new();
    for (key, value) in identifying.iter().chain(&other) {
        if indexed.len() == INDEXED_ATTRIBUTES {
            break;
        }
        // The first mention of a key counts where both lists have it: identifying attributes win.
        indexed.entry(cut(key)).or_insert_with(|| Value::String(cut(&plain(value))));
    }
    Described {
        name: text("service.name"),
        host: text("host.name"),
        groups,
        ephemeral: marked || find("k8s.pod.uid").is_some(),
        clients_count: find("clients_count")
            .and_then(Value::as_i64)
            .map_or(0, |count| count.clamp(0, i64::from(i32::MAX))),
        attributes: indexed,
        document: object([
            ("identifying_attributes", Value::Object(identifying)),
            ("non_identifying_attributes", Value::Object(other)),
        ]),
    }
}

/// Attributes as an object; the last one wins where a key is repeated.
fn attributes(list: Vec<KeyValue>) -> Map<String, Value> {
    list.into_iter().map(|pair| (clean(pair.key), value_document(pair.value))).collect()
}

/// A value as JSON.
fn value_document(value: Option<AnyValue>) -> Value {
    use any_value::Value as Kind;
    match value.and_then(|value| value.value) {
        None => Value::Null,
        Some(Kind::StringValue(words)) => text(words),
        Some(Kind::BoolValue(flag)) => Value::Bool(flag),
        Some(Kind::IntValue(number)) => Value::from(number),
        Some(Kind::DoubleValue(number)) => number_document(number),
        Some(Kind::ArrayValue(list)) => {
            list.values.into_iter().map(|value| value_document(Some(value))).collect()
        }
        Some(Kind::KvlistValue(list)) => Value::Object(attributes(list.values)),
        Some(Kind::BytesValue(bytes)) => Value::String(BASE64.encode(bytes)),
    }
}

/// A number, or its text where JSON has none: `NaN`, `inf`, `-inf`.
fn number_document(number: f64) -> Value {
    serde_json::Number::from_f64(number).map_or_else(|| Value::String(number.to_string()), Value::Number)
}

/// A value as the text by which it is filtered: strings bare, everything else as JSON.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// RFC 3339 text of nanoseconds since the Unix epoch; null for 0, which means "not known".
fn time_document(unix_nano: u64) -> Value {
    if unix_nano == 0 {
        return Value::Null;
    }
    let micros = i64::try_from(unix_nano / 1_000).unwrap_or(i64::MAX);
    Value::String(Moment::from_micros(micros).to_string())
}

fn health_document(health: ComponentHealth) -> Value {
    let components =
        health.component_health_map.into_iter().map(|(name, part)| (clean(name), health_document(part)));
    let components = components.collect();
    object([
        ("healthy", Value::Bool(health.healthy)),
        ("status", text(health.status)),
        ("last_error", text(health.last_error)),
        ("start_time", time_document(health.start_time_unix_nano)),
        ("status_time", time_document(health.status_time_unix_nano)),
        ("attributes", Value::Object(attributes(health.attributes))),
        ("component_health_map", Value::Object(components)),
    ])
}

fn config_document(config: AgentConfigMap) -> Value {
    let files = config.config_map.into_iter().map(|(name, file)| {
        let body = match String::from_utf8(file.body) {
            Ok(body) => ("body", text(body)),
            Err(no_text) => ("body_base64", Value::String(BASE64.encode(no_text.as_bytes()))),
        };
        (clean(name), object([body, ("content_type", text(file.content_type))]))
    });
    Value::Object(files.collect())
}

fn remote_config_document(status: RemoteConfigStatus) -> Value {
    let state = RemoteConfigStatuses::try_from(status.status).ok().map(|state| state.as_str_name());
    object([
        ("last_remote_config_hash", Value::String(hex(&status.last_remote_config_hash))),
        ("status", Value::String(state_word(state, "RemoteConfigStatuses_", status.status))),
        ("error_message", text(status.error_message)),
    ])
}

fn settings_document(status: ConnectionSettingsStatus) -> Value {
    let state = ConnectionSettingsStatuses::try_from(status.status).ok().map(|state| state.as_str_name());
    object([
        ("last_connection_settings_hash", Value::String(hex(&status.last_connection_settings_hash))),
        ("status", Value::String(state_word(state, "ConnectionSettingsStatuses_", status.status))),
        ("error_message", text(status.error_message)),
    ])
}

fn packages_document(statuses: PackageStatuses) -> Value {
    let packages = statuses
        .packages
        .into_iter()
        .map(|(name, package)| (clean(name), package_document(package)))
        .collect();
    object([
        ("packages", Value::Object(packages)),
        (
            "server_provided_all_packages_hash",
            Value::String(hex(&statuses.server_provided_all_packages_hash)),
        ),
        ("error_message", text(statuses.error_message)),
    ])
}

fn package_document(package: PackageStatus) -> Value {
    let state = PackageStatusEnum::try_from(package.status).ok().map(|state| state.as_str_name());
    let download = package.download_details.map_or(Value::Null, |details| {
        object([
            ("download_percent", number_document(details.download_percent)),
            ("download_bytes_per_second", number_document(details.download_bytes_per_second)),
        ])
    });
    object([
        ("agent_has_version", text(package.agent_has_version)),
        ("agent_has_hash", Value::String(hex(&package.agent_has_hash))),
        ("server_offered_version", text(package.server_offered_version)),
        ("server_offered_hash", Value::String(hex(&package.server_offered_hash))),
        ("status", Value::String(state_word(state, "PackageStatusEnum_", package.status))),
        ("error_message", text(package.error_message)),
        ("download_details", download),
    ])
}

/// The inventory, if there is one: a message with only the hash says nothing about it (S-134).
fn components_document(components: AvailableComponents) -> Option<Value> {
    if components.components.is_empty() {
        return None;
    }
    Some(Value::Object(
        components
            .components
            .into_iter()
            .map(|(id, details)| (clean(id), component_document(details)))
            .collect(),
    ))
}

fn component_document(details: ComponentDetails) -> Value {
    let parts = details
        .sub_component_map
        .into_iter()
        .map(|(id, part)| (clean(id), component_document(part)))
        .collect();
    object([
        ("metadata", Value::Object(attributes(details.metadata))),
        ("sub_component_map", Value::Object(parts)),
    ])
}

/// The word of an enum number; the number itself where this server does not know it (S-141).
fn state_word(name: Option<&str>, prefix: &str, number: i32) -> String {
    name.map_or_else(|| number.to_string(), |name| name.trim_start_matches(prefix).to_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::AgentConfigFile;
    use proptest::prelude::*;
    use prost::Message;
    use serde_json::json;

    fn text(key: &str, value: &str) -> KeyValue {
        let value = AnyValue { value: Some(any_value::Value::StringValue(value.to_owned())) };
        KeyValue { key: key.to_owned(), value: Some(value) }
    }

    #[test]
    fn a_description_yields_name_host_groups_and_indexed_attributes() {
        let described = described(AgentDescription {
            identifying_attributes: vec![text("service.name", "edge\0gateway"), text("k", "mine")],
            non_identifying_attributes: vec![
                text("groups", "a, b"),
                text("k", "theirs"),
                text("k8s.pod.uid", "p"),
            ],
        });
        assert_eq!(described.name.as_deref(), Some("edge\u{fffd}gateway"));
        assert_eq!(described.host, None);
        assert_eq!(described.groups, json!(["a", "b"]));
        assert!(described.ephemeral);
        assert_eq!(described.attributes["k"], json!("mine"), "identifying attributes win");
    }

    #[test]
    fn one_odd_value_is_cut_for_the_index_and_kept_in_the_document() {
        let long = "é".repeat(100_000);
        let described = described(AgentDescription {
            identifying_attributes: vec![text("service.name", &long)],
            non_identifying_attributes: Vec::new(),
        });
        assert_eq!(described.name.map(|name| name.chars().count()), Some(INDEXED_LENGTH));
        assert_eq!(described.document["identifying_attributes"]["service.name"], json!(long));
    }

    #[test]
    fn only_the_named_parts_become_documents() {
        let mut report = AgentToServer {
            health: Some(ComponentHealth { healthy: true, ..ComponentHealth::default() }),
            agent_description: Some(AgentDescription::default()),
            ..AgentToServer::default()
        };
        let documents = Documents::take(&mut report, PartSet::of([Part::Health]));
        assert_eq!(documents.healthy, Some(true));
        assert_eq!(documents.description, None);
        assert!(report.health.is_none() && report.agent_description.is_some());
    }

    #[test]
    fn newer_documents_replace_older_ones_part_by_part() {
        let older = Documents {
            healthy: Some(true),
            health: Some(json!(1)),
            components_hash: Some("aa".to_owned()),
            components: Some(json!({ "old": 1 })),
            ..Documents::default()
        };
        let newer = Documents { health: Some(json!(2)), ..Documents::default() };
        let both = older.clone().followed_by(newer);
        assert_eq!((both.health, both.healthy), (Some(json!(2)), Some(true)));
        assert_eq!(both.components, Some(json!({ "old": 1 })));
        let other = Documents { components_hash: Some("bb".to_owned()), ..Documents::default() };
        assert_eq!(older.followed_by(other).components, None, "the inventory of another hash");
    }

    #[test]
    fn a_config_body_that_is_no_text_is_kept_as_base64() {
        let file = AgentConfigFile { body: vec![0xff, 0x00], content_type: String::new() };
        let map = AgentConfigMap { config_map: [(String::new(), file)].into() };
        assert_eq!(config_document(map), json!({ "": { "body_base64": "/wA=", "content_type": "" } }));
    }

    #[test]
    fn s_134_a_hash_alone_says_nothing_about_the_inventory() {
        let hash_only = AvailableComponents { hash: vec![0xab], ..AvailableComponents::default() };
        let mut report = AgentToServer { available_components: Some(hash_only), ..AgentToServer::default() };
        let documents = Documents::take(&mut report, PartSet::of([Part::AvailableComponents]));
        assert_eq!((documents.components_hash.as_deref(), documents.components), (Some("ab"), None));
    }

    proptest! {
        #[test]
        fn any_report_becomes_documents_without_nul(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            if let Ok(mut report) = AgentToServer::decode(bytes.as_slice()) {
                let documents = Documents::take(&mut report, PartSet::of(Part::ALL));
                let text = format!("{documents:?}");
                prop_assert!(!text.contains("\\0"), "{text}");
            }
        }
    }
}

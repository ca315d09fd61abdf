//! The reported parts as the documents that are stored and shown: JSON with cleaned text.
//!
//! Promises: whatever an agent sends becomes a document both databases take: NUL becomes U+FFFD,
//! names are cut to 255 characters, bytes become base64, and numbers JSON cannot hold become text.
//! A document is made as the text it is stored as, by whoever has the report: what writes for everybody
//! only copies it. It must not know where documents are stored or who may see them.

mod forms;

use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value};

use self::forms::{
    Attribute, Attributes, Components, Config, CustomCapabilities, Description, Health, Packages,
    RemoteConfig, Settings,
};
use super::report::{Part, PartSet};
use crate::proto::{AgentDescription, AgentToServer, RemoteConfigStatuses};

/// The longest name, host, attribute key and attribute value that is indexed, in characters.
pub const INDEXED_LENGTH: usize = 255;

/// The most attributes of one agent that are indexed, identifying ones first; the rest is only shown.
pub const INDEXED_ATTRIBUTES: usize = 256;

/// A document: the text of its JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Document(Box<RawValue>);

impl Document {
    /// The document of what has this form.
    fn of(content: &impl Serialize) -> Self {
        // Nothing here fails: keys are texts.
        Self(to_raw_value(content).unwrap_or_else(|_| RawValue::NULL.to_owned()))
    }

    /// Its text.
    #[must_use]
    pub fn text(&self) -> &str {
        self.0.get()
    }
}

impl PartialEq for Document {
    fn eq(&self, other: &Self) -> bool {
        self.text() == other.text()
    }
}

impl From<Value> for Document {
    fn from(value: Value) -> Self {
        Self::of(&value)
    }
}

/// The parts of one report that changed, ready to be stored; an absent one stays as it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Documents {
    /// The description, and what is derived from it.
    pub description: Option<Described>,
    /// The health tree.
    pub health: Option<Document>,
    /// The `healthy` of the whole agent.
    pub healthy: Option<bool>,
    /// The effective config: file name to `{body, content_type}`.
    pub effective_config: Option<Document>,
    /// The outcome of the last remote config.
    pub remote_config_status: Option<Document>,
    /// Hex of the remote config's hash, if it was reported APPLIED.
    pub sync_revision: Option<String>,
    /// All packages with their states.
    pub package_statuses: Option<Document>,
    /// The full list of custom capabilities (S-128).
    pub custom_capabilities: Option<Document>,
    /// Hash of the component inventory (S-132), hex.
    pub components_hash: Option<String>,
    /// The inventory itself, if it came with its hash (S-134).
    pub components: Option<Document>,
    /// The outcome of the last connection settings.
    pub connection_settings_status: Option<Document>,
}

/// A description and what is derived from it.
#[derive(Clone, Debug, PartialEq)]
pub struct Described {
    /// `{identifying_attributes, non_identifying_attributes}`, each key to value.
    pub document: Document,
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
    /// The documents of the parts `changed`, which are taken out of `report`: each is gone once its document is made.
    #[must_use]
    pub fn take(report: &mut AgentToServer, changed: PartSet) -> Self {
        let when = |part| changed.has(part);
        let description = report.agent_description.take_if(|_| when(Part::Description));
        let description = description.map(|description| described(&description));
        let health = report.health.take_if(|_| when(Part::Health));
        let healthy = health.as_ref().map(|health| health.healthy);
        let health = health.map(|health| Document::of(&Health::from(&health)));
        let config = report.effective_config.take_if(|_| when(Part::EffectiveConfig));
        let remote = report.remote_config_status.take_if(|_| when(Part::RemoteConfigStatus));
        let packages = report.package_statuses.take_if(|_| when(Part::PackageStatuses));
        let custom = report.custom_capabilities.take_if(|_| when(Part::CustomCapabilities));
        let components = report.available_components.take_if(|_| when(Part::AvailableComponents));
        let settings = report.connection_settings_status.take_if(|_| when(Part::ConnectionSettingsStatus));
        Self {
            description,
            health,
            healthy,
            effective_config: config.map(|config| Document::of(&Config::from(&config))),
            sync_revision: remote
                .as_ref()
                .filter(|status| status.status() == RemoteConfigStatuses::Applied)
                .map(|status| hex(&status.last_remote_config_hash)),
            remote_config_status: remote.map(|remote| Document::of(&RemoteConfig::from(&remote))),
            package_statuses: packages.map(|packages| Document::of(&Packages::from(&packages))),
            custom_capabilities: custom.map(|custom| Document::of(&CustomCapabilities::from(&custom))),
            components_hash: components.as_ref().map(|components| hex(&components.hash)),
            components: components
                // A message with only the hash says nothing about the inventory (S-134).
                .filter(|components| !components.components.is_empty())
                .map(|components| Document::of(&Components::from(&components))),
            connection_settings_status: settings.map(|settings| Document::of(&Settings::from(&settings))),
        }
    }

    /// How many bytes of text they hold.
    #[must_use]
    pub fn size(&self) -> usize {
        let attributes = self.description.iter().flat_map(|described| &described.attributes);
        let indexed = attributes.map(|(key, value)| key.len() + value.as_str().map_or(0, str::len));
        self.all().map(|document| document.text().len()).chain(indexed).sum()
    }

    /// Those that are there.
    fn all(&self) -> impl Iterator<Item = &Document> {
        let documents = [
            self.description.as_ref().map(|described| &described.document),
            self.health.as_ref(),
            self.effective_config.as_ref(),
            self.remote_config_status.as_ref(),
            self.package_statuses.as_ref(),
            self.custom_capabilities.as_ref(),
            self.components.as_ref(),
            self.connection_settings_status.as_ref(),
        ];
        documents.into_iter().flatten()
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

/// At most [`INDEXED_LENGTH`] characters of `text`.
fn cut(text: &str) -> String {
    let end = text.char_indices().nth(INDEXED_LENGTH).map_or(text.len(), |(end, _)| end);
    text[..end].to_owned()
}

fn described(description: &AgentDescription) -> Described {
    let identifying = Attributes::from(description.identifying_attributes.as_slice());
    let other = Attributes::from(description.non_identifying_attributes.as_slice());
    let find = |key: &str| identifying.get(key).or_else(|| other.get(key));
    let text = |key: &str| find(key).map(|value| cut(&value.plain()));
    let groups = find("groups").or_else(|| find("agent.groups"));
    let groups = groups.map_or_else(Vec::new, |groups| match (groups.items(), groups.text()) {
        (Some(items), _) => items.map(|item| item.plain().into_owned()).collect(),
        (None, Some(list)) => {
            list.split(',').map(str::trim).filter(|group| !group.is_empty()).map(str::to_owned).collect()
        }
        (None, None) => Vec::new(),
    });
    let marked = find("opamp.ephemeral").is_some_and(|mark| mark.plain().eq_ignore_ascii_case("true"));
    let mut indexed = Map::new();
    for (key, value) in identifying.iter().chain(other.iter()) {
        if indexed.len() == INDEXED_ATTRIBUTES {
            break;
        }
        // The first mention of a key counts where both lists have it: identifying attributes win.
        indexed.entry(cut(key)).or_insert_with(|| Value::String(cut(&value.plain())));
    }
    Described {
        name: text("service.name"),
        host: text("host.name"),
        groups: groups.into(),
        ephemeral: marked || find("k8s.pod.uid").is_some(),
        clients_count: find("clients_count")
            .and_then(Attribute::integer)
            .map_or(0, |count| count.clamp(0, i64::from(i32::MAX))),
        attributes: indexed,
        document: Document::of(&Description {
            identifying_attributes: &identifying,
            non_identifying_attributes: &other,
        }),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{
        AgentConfigFile, AgentConfigMap, AnyValue, AvailableComponents, ComponentHealth, EffectiveConfig,
        KeyValue, any_value,
    };
    use proptest::prelude::*;
    use prost::Message;
    use serde_json::json;

    fn text(key: &str, value: &str) -> KeyValue {
        let value = AnyValue { value: Some(any_value::Value::StringValue(value.to_owned())) };
        KeyValue { key: key.to_owned(), value: Some(value) }
    }

    fn value(document: &Document) -> Value {
        serde_json::from_str(document.text()).unwrap()
    }

    #[test]
    fn a_description_yields_name_host_groups_and_indexed_attributes() {
        let described = described(&AgentDescription {
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
        let described = described(&AgentDescription {
            identifying_attributes: vec![text("service.name", &long)],
            non_identifying_attributes: Vec::new(),
        });
        assert_eq!(described.name.map(|name| name.chars().count()), Some(INDEXED_LENGTH));
        let document = value(&described.document);
        assert_eq!(document["identifying_attributes"]["service.name"], json!(long));
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
            health: Some(json!(1).into()),
            components_hash: Some("aa".to_owned()),
            components: Some(json!({ "old": 1 }).into()),
            ..Documents::default()
        };
        let newer = Documents { health: Some(json!(2).into()), ..Documents::default() };
        let both = older.clone().followed_by(newer);
        assert_eq!((both.health, both.healthy), (Some(json!(2).into()), Some(true)));
        assert_eq!(both.components, Some(json!({ "old": 1 }).into()));
        let other = Documents { components_hash: Some("bb".to_owned()), ..Documents::default() };
        assert_eq!(older.followed_by(other).components, None, "the inventory of another hash");
    }

    #[test]
    fn a_config_body_that_is_no_text_is_kept_as_base64() {
        let file = AgentConfigFile { body: vec![0xff, 0x00], content_type: String::new() };
        let map = AgentConfigMap { config_map: [(String::new(), file)].into() };
        let config = EffectiveConfig { config_map: Some(map) };
        assert_eq!(
            value(&Document::of(&Config::from(&config))),
            json!({ "": { "body_base64": "/wA=", "content_type": "" } })
        );
    }

    #[test]
    fn s_134_a_hash_alone_says_nothing_about_the_inventory() {
        let hash_only = AvailableComponents { hash: vec![0xab], ..AvailableComponents::default() };
        let mut report = AgentToServer { available_components: Some(hash_only), ..AgentToServer::default() };
        let documents = Documents::take(&mut report, PartSet::of([Part::AvailableComponents]));
        assert_eq!((documents.components_hash.as_deref(), documents.components), (Some("ab"), None));
    }

    #[test]
    fn no_name_that_an_agent_chooses_changes_how_its_object_is_read() {
        let odd = "$serde_json::private::RawValue";
        let file = AgentConfigFile { body: b"{\"a\":1}".to_vec(), content_type: String::new() };
        let mut report = AgentToServer {
            agent_description: Some(AgentDescription {
                identifying_attributes: vec![text(odd, "{\"a\":1}")],
                non_identifying_attributes: Vec::new(),
            }),
            health: Some(ComponentHealth { attributes: vec![text(odd, "x")], ..ComponentHealth::default() }),
            effective_config: Some(EffectiveConfig {
                config_map: Some(AgentConfigMap { config_map: [(odd.to_owned(), file)].into() }),
            }),
            ..AgentToServer::default()
        };
        let documents = Documents::take(&mut report, PartSet::of(Part::ALL));
        let described = value(&documents.description.unwrap().document);
        let shown = format!("{odd}\u{fffd}");
        assert_eq!(described["identifying_attributes"], json!({ &shown: "{\"a\":1}" }));
        assert_eq!(value(&documents.health.unwrap())["attributes"], json!({ &shown: "x" }));
        assert_eq!(value(&documents.effective_config.unwrap())[&shown]["body"], json!("{\"a\":1}"));
    }

    /// True where a text, or a name, has a NUL.
    fn has_nul(value: &Value) -> bool {
        match value {
            Value::String(text) => text.contains('\0'),
            Value::Array(list) => list.iter().any(has_nul),
            Value::Object(members) => {
                members.iter().any(|(name, member)| name.contains('\0') || has_nul(member))
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => false,
        }
    }

    proptest! {
        #[test]
        fn any_report_becomes_documents_without_nul(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            if let Ok(mut report) = AgentToServer::decode(bytes.as_slice()) {
                let documents = Documents::take(&mut report, PartSet::of(Part::ALL));
                if let Some(described) = &documents.description {
                    let derived = json!([described.name, described.host, described.groups, described.attributes]);
                    prop_assert!(!has_nul(&derived), "{derived}");
                }
                for document in documents.all() {
                    prop_assert!(!has_nul(&value(document)), "{document:?}");
                }
            }
        }
    }
}

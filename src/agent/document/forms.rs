//! How each reported part looks as JSON: views of the messages, written from where they stand.
//!
//! Members of an object come in the order of their names where agents choose those; the last one counts where a name is
//! repeated.

use std::borrow::Cow;
use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Serialize, Serializer};

use super::hex;
use crate::clock::Moment;
use crate::proto::any_value::Value as Kind;
use crate::proto::{
    AgentConfigFile, AnyValue, AvailableComponents, ComponentDetails, ComponentHealth,
    ConnectionSettingsStatus, ConnectionSettingsStatuses, EffectiveConfig, KeyValue, PackageDownloadDetails,
    PackageStatus, PackageStatusEnum, PackageStatuses, RemoteConfigStatus, RemoteConfigStatuses,
};

/// Text both databases take: NUL becomes U+FFFD.
#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct Clean<'a>(Cow<'a, str>);

impl<'a> From<&'a str> for Clean<'a> {
    fn from(text: &'a str) -> Self {
        Self(clean(text))
    }
}

fn clean(text: &str) -> Cow<'_, str> {
    if text.contains('\0') { text.replace('\0', "\u{fffd}").into() } else { text.into() }
}

/// The name by which the reader of JSON knows a text that it must not read; as a name that an agent chose it would make
/// of its object whatever JSON it holds, or nothing that can be read.
const UNREAD: &str = "$serde_json::private::RawValue";

/// A name that an agent chose.
fn name(text: &str) -> Cow<'_, str> {
    if text == UNREAD { format!("{text}\u{fffd}").into() } else { clean(text) }
}

/// An object whose names agents choose.
type Named<'a, T> = BTreeMap<Cow<'a, str>, T>;

fn named<'a, M, T: From<&'a M>>(map: &'a BTreeMap<String, M>) -> Named<'a, T> {
    map.iter().map(|(text, member)| (name(text), member.into())).collect()
}

/// Attributes by key; the last one counts where a key is repeated.
#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct Attributes<'a>(Named<'a, Attribute<'a>>);

impl<'a> From<&'a [KeyValue]> for Attributes<'a> {
    fn from(list: &'a [KeyValue]) -> Self {
        Self(list.iter().map(|pair| (name(&pair.key), Attribute::from(pair.value.as_ref()))).collect())
    }
}

impl<'a> Attributes<'a> {
    pub(super) fn get(&self, key: &str) -> Option<Attribute<'a>> {
        self.0.get(key).copied()
    }

    /// All of them, by key.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, Attribute<'a>)> {
        self.0.iter().map(|(key, value)| (key.as_ref(), *value))
    }
}

/// A value; none where the agent sent none.
#[derive(Clone, Copy)]
pub(super) struct Attribute<'a>(Option<&'a Kind>);

impl<'a> From<Option<&'a AnyValue>> for Attribute<'a> {
    fn from(value: Option<&'a AnyValue>) -> Self {
        Self(value.and_then(|value| value.value.as_ref()))
    }
}

impl<'a> Attribute<'a> {
    /// The text that it is in JSON; none where it is something else there.
    pub(super) fn text(self) -> Option<Cow<'a, str>> {
        match self.0? {
            Kind::StringValue(text) => Some(clean(text)),
            Kind::BytesValue(bytes) => Some(BASE64.encode(bytes).into()),
            // JSON has no number for these: `NaN`, `inf`, `-inf`.
            Kind::DoubleValue(number) if !number.is_finite() => Some(number.to_string().into()),
            Kind::DoubleValue(_)
            | Kind::BoolValue(_)
            | Kind::IntValue(_)
            | Kind::ArrayValue(_)
            | Kind::KvlistValue(_) => None,
        }
    }

    /// The text by which it is filtered: texts bare, everything else as JSON.
    pub(super) fn plain(self) -> Cow<'a, str> {
        self.text().unwrap_or_else(|| serde_json::to_string(&self).unwrap_or_default().into())
    }

    /// What it is a list of; none where it is no list.
    pub(super) fn items(self) -> Option<impl Iterator<Item = Attribute<'a>>> {
        let Some(Kind::ArrayValue(list)) = self.0 else { return None };
        Some(list.values.iter().map(|item| Attribute::from(Some(item))))
    }

    /// The integer that it is; none where it is something else.
    pub(super) fn integer(self) -> Option<i64> {
        let Some(Kind::IntValue(number)) = self.0 else { return None };
        Some(*number)
    }
}

impl Serialize for Attribute<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let Some(text) = self.text() {
            return serializer.serialize_str(&text);
        }
        match self.0 {
            Some(Kind::BoolValue(flag)) => serializer.serialize_bool(*flag),
            Some(Kind::IntValue(number)) => serializer.serialize_i64(*number),
            Some(Kind::DoubleValue(number)) => serializer.serialize_f64(*number),
            Some(Kind::ArrayValue(_)) => serializer.collect_seq(self.items().into_iter().flatten()),
            Some(Kind::KvlistValue(list)) => Attributes::from(list.values.as_slice()).serialize(serializer),
            Some(Kind::StringValue(_) | Kind::BytesValue(_)) | None => serializer.serialize_unit(),
        }
    }
}

/// A number, or its text where JSON has none.
struct Number(f64);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Attribute(Some(&Kind::DoubleValue(self.0))).serialize(serializer)
    }
}

/// RFC 3339 text of nanoseconds since the Unix epoch; null for 0, which means "not known".
fn time(unix_nano: u64) -> Option<String> {
    let micros = i64::try_from(unix_nano / 1_000).unwrap_or(i64::MAX);
    (unix_nano != 0).then(|| Moment::from_micros(micros).to_string())
}

/// The word of an enum number; the number itself where this server does not know it (S-141).
fn state_word(name: Option<&str>, prefix: &str, number: i32) -> String {
    name.map_or_else(|| number.to_string(), |name| name.trim_start_matches(prefix).to_ascii_uppercase())
}

#[derive(Serialize)]
pub(super) struct Description<'a> {
    pub(super) identifying_attributes: &'a Attributes<'a>,
    pub(super) non_identifying_attributes: &'a Attributes<'a>,
}

#[derive(Serialize)]
pub(super) struct Health<'a> {
    healthy: bool,
    status: Clean<'a>,
    last_error: Clean<'a>,
    start_time: Option<String>,
    status_time: Option<String>,
    attributes: Attributes<'a>,
    component_health_map: Named<'a, Health<'a>>,
}

impl<'a> From<&'a ComponentHealth> for Health<'a> {
    fn from(health: &'a ComponentHealth) -> Self {
        Self {
            healthy: health.healthy,
            status: health.status.as_str().into(),
            last_error: health.last_error.as_str().into(),
            start_time: time(health.start_time_unix_nano),
            status_time: time(health.status_time_unix_nano),
            attributes: health.attributes.as_slice().into(),
            component_health_map: named(&health.component_health_map),
        }
    }
}

/// File name to file.
#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct Config<'a>(Named<'a, ConfigFile<'a>>);

impl<'a> From<&'a EffectiveConfig> for Config<'a> {
    fn from(config: &'a EffectiveConfig) -> Self {
        Self(config.config_map.as_ref().map_or_else(Named::new, |map| named(&map.config_map)))
    }
}

#[derive(Serialize)]
struct ConfigFile<'a> {
    #[serde(flatten)]
    body: Body<'a>,
    content_type: Clean<'a>,
}

#[derive(Serialize)]
enum Body<'a> {
    #[serde(rename = "body")]
    Text(Clean<'a>),
    #[serde(rename = "body_base64")]
    Bytes(String),
}

impl<'a> From<&'a AgentConfigFile> for ConfigFile<'a> {
    fn from(file: &'a AgentConfigFile) -> Self {
        let body = match str::from_utf8(&file.body) {
            Ok(text) => Body::Text(text.into()),
            Err(_) => Body::Bytes(BASE64.encode(&file.body)),
        };
        Self { body, content_type: file.content_type.as_str().into() }
    }
}

#[derive(Serialize)]
pub(super) struct RemoteConfig<'a> {
    last_remote_config_hash: String,
    status: String,
    error_message: Clean<'a>,
}

impl<'a> From<&'a RemoteConfigStatus> for RemoteConfig<'a> {
    fn from(status: &'a RemoteConfigStatus) -> Self {
        let state = RemoteConfigStatuses::try_from(status.status).ok().map(|state| state.as_str_name());
        Self {
            last_remote_config_hash: hex(&status.last_remote_config_hash),
            status: state_word(state, "RemoteConfigStatuses_", status.status),
            error_message: status.error_message.as_str().into(),
        }
    }
}

#[derive(Serialize)]
pub(super) struct Settings<'a> {
    last_connection_settings_hash: String,
    status: String,
    error_message: Clean<'a>,
}

impl<'a> From<&'a ConnectionSettingsStatus> for Settings<'a> {
    fn from(status: &'a ConnectionSettingsStatus) -> Self {
        let state = ConnectionSettingsStatuses::try_from(status.status).ok().map(|state| state.as_str_name());
        Self {
            last_connection_settings_hash: hex(&status.last_connection_settings_hash),
            status: state_word(state, "ConnectionSettingsStatuses_", status.status),
            error_message: status.error_message.as_str().into(),
        }
    }
}

#[derive(Serialize)]
#[expect(clippy::struct_field_names, reason = "members are named as the protocol names them")]
pub(super) struct Packages<'a> {
    packages: Named<'a, Package<'a>>,
    server_provided_all_packages_hash: String,
    error_message: Clean<'a>,
}

impl<'a> From<&'a PackageStatuses> for Packages<'a> {
    fn from(statuses: &'a PackageStatuses) -> Self {
        Self {
            packages: named(&statuses.packages),
            server_provided_all_packages_hash: hex(&statuses.server_provided_all_packages_hash),
            error_message: statuses.error_message.as_str().into(),
        }
    }
}

#[derive(Serialize)]
struct Package<'a> {
    agent_has_version: Clean<'a>,
    agent_has_hash: String,
    server_offered_version: Clean<'a>,
    server_offered_hash: String,
    status: String,
    error_message: Clean<'a>,
    download_details: Option<Download>,
}

impl<'a> From<&'a PackageStatus> for Package<'a> {
    fn from(package: &'a PackageStatus) -> Self {
        let state = PackageStatusEnum::try_from(package.status).ok().map(|state| state.as_str_name());
        Self {
            agent_has_version: package.agent_has_version.as_str().into(),
            agent_has_hash: hex(&package.agent_has_hash),
            server_offered_version: package.server_offered_version.as_str().into(),
            server_offered_hash: hex(&package.server_offered_hash),
            status: state_word(state, "PackageStatusEnum_", package.status),
            error_message: package.error_message.as_str().into(),
            download_details: package.download_details.as_ref().map(Download::from),
        }
    }
}

#[derive(Serialize)]
struct Download {
    download_percent: Number,
    download_bytes_per_second: Number,
}

impl From<&PackageDownloadDetails> for Download {
    fn from(details: &PackageDownloadDetails) -> Self {
        Self {
            download_percent: Number(details.download_percent),
            download_bytes_per_second: Number(details.download_bytes_per_second),
        }
    }
}

#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct CustomCapabilities<'a>(Vec<Clean<'a>>);

impl<'a> From<&'a crate::proto::CustomCapabilities> for CustomCapabilities<'a> {
    fn from(custom: &'a crate::proto::CustomCapabilities) -> Self {
        Self(custom.capabilities.iter().map(|name| name.as_str().into()).collect())
    }
}

/// Component id to what is told of it.
#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct Components<'a>(Named<'a, Component<'a>>);

impl<'a> From<&'a AvailableComponents> for Components<'a> {
    fn from(components: &'a AvailableComponents) -> Self {
        Self(named(&components.components))
    }
}

#[derive(Serialize)]
struct Component<'a> {
    metadata: Attributes<'a>,
    sub_component_map: Named<'a, Component<'a>>,
}

impl<'a> From<&'a ComponentDetails> for Component<'a> {
    fn from(details: &'a ComponentDetails) -> Self {
        Self {
            metadata: details.metadata.as_slice().into(),
            sub_component_map: named(&details.sub_component_map),
        }
    }
}

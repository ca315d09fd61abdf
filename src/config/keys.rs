//! The table of all keys: how each is named, read from text, checked and shown.
//!
//! Everything else goes through this table: the file, the environment, the checks and the printing
//! of `config check` know the same keys because there is no second list.

use std::fmt::Display;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use ::config::ValueKind;
use bytesize::ByteSize;
use humantime_serde::re::humantime::{format_duration, parse_duration};
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::{Error as NoSuchWord, StrDeserializer};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use super::{Config, ConfigError, Ephemeral, LogFormat, Secret};

/// One key of the configuration.
pub(super) struct Key {
    pub(super) section: &'static str,
    pub(super) name: &'static str,
    /// The variable that counts where the key is set nowhere.
    pub(super) fallback: Option<&'static str>,
    slot: fn(&mut Config) -> Slot<'_>,
}

/// The place of a key's value in [`Config`]; its variant is the key's type.
pub(super) enum Slot<'a> {
    Address(&'a mut SocketAddr),
    Path(&'a mut String),
    Filter(&'a mut String),
    Name(&'a mut Option<String>),
    Token(&'a mut Option<Secret>),
    Url(&'a mut Secret),
    Switch(&'a mut bool),
    Count(&'a mut usize, RangeInclusive<usize>),
    Pool(&'a mut u32, RangeInclusive<u32>),
    Size(&'a mut usize, RangeInclusive<usize>),
    Span(&'a mut Duration, RangeInclusive<Duration>),
    Ephemeral(&'a mut Ephemeral),
    Format(&'a mut Option<LogFormat>),
}

const MAX_SIZE: usize = 1 << 30;
/// Less than this and single messages would wait for each other for nothing.
const MIN_INFLIGHT: usize = 1 << 20;
const MAX_INFLIGHT: usize = 1 << 40;
/// Longer durations are slips of the pen, and far below what clocks can add.
const YEAR: Duration = Duration::from_hours(365 * 24);
const CENTURY: Duration = Duration::from_hours(36_500 * 24);
const SHORT: RangeInclusive<Duration> = Duration::from_millis(10)..=YEAR;
const MEDIUM: RangeInclusive<Duration> = Duration::from_millis(100)..=YEAR;
const ANY: RangeInclusive<Duration> = Duration::ZERO..=YEAR;

const fn key(section: &'static str, name: &'static str, slot: fn(&mut Config) -> Slot<'_>) -> Key {
    Key { section, name, fallback: None, slot }
}

/// All keys, section by section, in the order in which they are shown.
pub(super) static ALL: [Key; 28] = [
    key("agents", "listen", |c| Slot::Address(&mut c.agents.listen)),
    key("agents", "path", |c| Slot::Path(&mut c.agents.path)),
    Key {
        fallback: Some("INTERNAL_SERVICE_TOKEN"),
        ..key("agents", "token", |c| Slot::Token(&mut c.agents.token))
    },
    key("agents", "allow_anonymous", |c| Slot::Switch(&mut c.agents.allow_anonymous)),
    key("agents", "max_connections", |c| Slot::Count(&mut c.agents.max_connections, 1..=10_000_000)),
    key("agents", "max_connects_per_second", |c| {
        Slot::Count(&mut c.agents.max_connects_per_second, 1..=10_000_000)
    }),
    key("agents", "max_message_size", |c| Slot::Size(&mut c.agents.max_message_size, 1..=MAX_SIZE)),
    key("agents", "max_inflight", |c| Slot::Size(&mut c.agents.max_inflight, MIN_INFLIGHT..=MAX_INFLIGHT)),
    key("agents", "max_per_link", |c| Slot::Count(&mut c.agents.max_per_link, 1..=10_000_000)),
    key("operators", "listen", |c| Slot::Address(&mut c.operators.listen)),
    key("operators", "token", |c| Slot::Token(&mut c.operators.token)),
    key("operators", "allow_anonymous", |c| Slot::Switch(&mut c.operators.allow_anonymous)),
    Key { fallback: Some("DATABASE_URL"), ..key("store", "url", |c| Slot::Url(&mut c.store.url)) },
    key("store", "listen_url", |c| Slot::Token(&mut c.store.listen_url)),
    key("store", "max_connections", |c| Slot::Pool(&mut c.store.max_connections, 1..=10_000)),
    key("store", "flush_interval", |c| Slot::Span(&mut c.store.flush_interval, SHORT)),
    key("heartbeat", "interval", |c| Slot::Span(&mut c.heartbeat.interval, SHORT)),
    key("heartbeat", "timeout", |c| Slot::Span(&mut c.heartbeat.timeout, MEDIUM)),
    key("heartbeat", "check_interval", |c| Slot::Span(&mut c.heartbeat.check_interval, SHORT)),
    key("sweep", "interval", |c| Slot::Span(&mut c.sweep.interval, SHORT)),
    key("sweep", "stale_after", |c| Slot::Span(&mut c.sweep.stale_after, SHORT)),
    key("sweep", "ephemeral", |c| Slot::Ephemeral(&mut c.sweep.ephemeral)),
    key("retention", "history", |c| Slot::Span(&mut c.retention.history, Duration::ZERO..=CENTURY)),
    key("node", "name", |c| Slot::Name(&mut c.node.name)),
    key("node", "lease", |c| Slot::Span(&mut c.node.lease, MEDIUM)),
    key("shutdown", "drain", |c| Slot::Span(&mut c.shutdown.drain, ANY)),
    key("log", "level", |c| Slot::Filter(&mut c.log.level)),
    key("log", "format", |c| Slot::Format(&mut c.log.format)),
];

impl Key {
    /// `section.name`.
    pub(super) fn full(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }

    /// The environment variable of the key.
    pub(super) fn variable(&self) -> String {
        format!("OPAMP_{}_{}", self.section, self.name).to_uppercase()
    }

    /// Whether the value is a secret, which has a `_file` form and is never shown.
    pub(super) fn secret(&self) -> bool {
        matches!((self.slot)(&mut Config::default()), Slot::Token(_) | Slot::Url(_))
    }

    /// What an error may show of `text`.
    pub(super) fn safe<'a>(&self, text: &'a str) -> &'a str {
        if self.secret() { "***" } else { text }
    }

    /// Sets the key from its text; `Err` says what to write instead.
    pub(super) fn set(&self, config: &mut Config, text: &str) -> Result<(), String> {
        (self.slot)(config).set(text)
    }

    /// The text of a TOML value of the right type, or what to write instead.
    pub(super) fn text_of(&self, value: &ValueKind, file: &str) -> Result<String, String> {
        let mut config = Config::default();
        let slot = (self.slot)(&mut config);
        slot.text_of(value, file).ok_or_else(|| slot.cure())
    }

    /// Checks the value in `config` against the key's range and form.
    pub(super) fn check(&self, config: &Config) -> Result<(), ConfigError> {
        let mut config = config.clone();
        let slot = (self.slot)(&mut config);
        if slot.holds() {
            return Ok(());
        }
        Err(ConfigError::Invalid {
            key: self.full(),
            value: slot.shown().unwrap_or_default(),
            origin: None,
            cure: slot.cure(),
        })
    }

    /// The value in `config` as TOML, masked if it is a secret; `None` where it is not set.
    pub(super) fn shown(&self, config: &Config) -> Option<String> {
        (self.slot)(&mut config.clone()).shown()
    }
}

impl Slot<'_> {
    fn set(self, text: &str) -> Result<(), String> {
        let cure = self.cure();
        let done = match self {
            Self::Address(place) => put(place, text.parse().ok()),
            Self::Path(place) | Self::Filter(place) => put(place, Some(text.to_owned())),
            Self::Name(place) => put(place, Some(Some(text.to_owned()))),
            Self::Token(place) => put(place, Some(Some(Secret::from(text)))),
            Self::Url(place) => put(place, Some(Secret::from(text))),
            Self::Switch(place) => put(place, text.parse().ok()),
            Self::Count(place, _) => put(place, text.parse().ok()),
            Self::Pool(place, _) => put(place, text.parse().ok()),
            Self::Size(place, _) => put(place, size(text)),
            Self::Span(place, _) => put(place, parse_duration(text).ok()),
            Self::Ephemeral(place) => put(place, word(text)),
            Self::Format(place) => put(place, word(text).map(Some)),
        };
        done.ok_or(cure)
    }

    /// A TOML value counts only in the key's own type, except a token that looks like a number.
    fn text_of(&self, value: &ValueKind, file: &str) -> Option<String> {
        match (self, value) {
            (Self::Switch(_), ValueKind::Boolean(_))
            | (Self::Count(..) | Self::Pool(..) | Self::Size(..), ValueKind::I64(_)) => {
                Some(value.to_string())
            }
            (Self::Span(..), ValueKind::I64(0)) => Some("0s".to_owned()),
            (Self::Token(_), ValueKind::I64(_) | ValueKind::Float(_) | ValueKind::Boolean(_)) => {
                Some(value.to_string()).filter(|text| spelled(file, text))
            }
            (Self::Switch(_) | Self::Count(..) | Self::Pool(..), _) => None,
            (_, ValueKind::String(text)) => Some(text.clone()),
            _ => None,
        }
    }

    /// Whether the value is in range and of a form that can work.
    fn holds(&self) -> bool {
        match self {
            Self::Path(path) => {
                path.starts_with('/')
                    && !path.contains(['?', '#'])
                    && path.bytes().all(|b| b.is_ascii_graphic())
            }
            Self::Filter(filter) => filter_holds(filter),
            Self::Name(name) => name.as_ref().is_none_or(|name| !name.trim().is_empty()),
            Self::Token(token) => token.as_ref().is_none_or(|token| token_holds(token.expose())),
            Self::Url(url) => ["sqlite:", "postgres://", "postgresql://"]
                .iter()
                .any(|scheme| url.expose().starts_with(scheme)),
            Self::Count(count, range) | Self::Size(count, range) => range.contains(count),
            Self::Pool(count, range) => range.contains(count),
            Self::Span(span, range) => range.contains(&**span),
            Self::Address(_) | Self::Switch(_) | Self::Ephemeral(_) | Self::Format(_) => true,
        }
    }

    /// What to write, as the end of an error's sentence.
    fn cure(&self) -> String {
        match self {
            Self::Address(_) => {
                "write an address and a port, such as \"127.0.0.1:4320\" or \"[::1]:4320\"".into()
            }
            Self::Path(_) => "write a path such as \"/v1/opamp\": first a /, no blank, ? or #".into(),
            Self::Filter(_) => {
                "write off, error, warn, info, debug, trace or a filter such as \"info,hyper=warn\"".into()
            }
            Self::Name(_) => "write a name, or remove it to use the host name and the agents' port".into(),
            Self::Token(_) => {
                "remove it, or set it to a text of visible ASCII characters (in quotes in the file)".into()
            }
            Self::Url(_) => {
                "remove it, or set it to a URL such as \"sqlite://opamp-server.db\" or \"postgres://…\""
                    .into()
            }
            Self::Switch(_) => "write true or false, without quotes in the file".into(),
            Self::Count(_, range) => number_cure(range),
            Self::Pool(_, range) => number_cure(range),
            Self::Size(_, range) => {
                format!(
                    "write a size from {} to {}, such as \"64MiB\"",
                    sized(*range.start()),
                    sized(*range.end())
                )
            }
            Self::Span(_, range) => format!(
                "write a duration from {} to {}, such as \"500ms\", \"60s\" or \"10m\"",
                spanned(*range.start()),
                spanned(*range.end())
            ),
            Self::Ephemeral(_) => "write \"marked\", \"all\" or \"none\"".into(),
            Self::Format(_) => "write \"human\" or \"json\", or remove it".into(),
        }
    }

    fn shown(&self) -> Option<String> {
        Some(match self {
            Self::Address(address) => quoted(address),
            Self::Path(text) | Self::Filter(text) => quoted(text),
            Self::Name(name) => quoted(name.as_ref()?),
            Self::Token(token) => token.as_ref().map(|token| shown_secret(token, token.to_string()))?,
            Self::Url(url) => shown_secret(url, url.masked_url()),
            Self::Switch(on) => on.to_string(),
            Self::Count(count, _) => count.to_string(),
            Self::Pool(count, _) => count.to_string(),
            Self::Size(bytes, _) => quoted(sized(**bytes)),
            Self::Span(span, _) => quoted(spanned(**span)),
            Self::Ephemeral(which) => quoted(which),
            Self::Format(format) => quoted(format.as_ref()?),
        })
    }
}

fn put<T>(place: &mut T, read: Option<T>) -> Option<()> {
    *place = read?;
    Some(())
}

fn number_cure(range: &RangeInclusive<impl Display>) -> String {
    format!("write a whole number from {} to {}", range.start(), range.end())
}

fn word<'de, T: Deserialize<'de>>(text: &'de str) -> Option<T> {
    let reader: StrDeserializer<'de, NoSuchWord> = text.into_deserializer();
    T::deserialize(reader).ok()
}

fn size(text: &str) -> Option<usize> {
    usize::try_from(text.parse::<ByteSize>().ok()?.as_u64()).ok()
}

/// A size in the largest unit that shows it exactly.
fn sized(bytes: usize) -> String {
    let units = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    let exact = units.into_iter().find(|&(_, unit)| bytes >= unit && bytes.is_multiple_of(unit));
    exact.map_or_else(|| format!("{bytes}B"), |(name, unit)| format!("{}{name}", bytes / unit))
}

/// A duration in the largest unit that shows it exactly.
fn spanned(span: Duration) -> String {
    let units = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];
    let ms = span.as_millis();
    let exact = units.into_iter().find(|&(_, unit)| ms >= unit && ms.is_multiple_of(unit));
    let whole = span.subsec_nanos().is_multiple_of(1_000_000);
    match exact {
        Some((name, unit)) if whole => format!("{}{name}", ms / unit),
        _ => format_duration(span).to_string(),
    }
}

/// A TOML string; every escape of JSON is one of TOML too.
fn quoted(text: impl Display) -> String {
    serde_json::Value::from(text.to_string()).to_string()
}

/// That a secret is empty is no secret, and the very thing an error is about.
fn shown_secret(secret: &Secret, masked: String) -> String {
    quoted(if secret.expose().is_empty() { String::new() } else { masked })
}

/// Whether some `token` of the file is written exactly so: `0x1F` and `1_000` are read as other texts.
fn spelled(file: &str, text: &str) -> bool {
    file.lines().filter_map(|line| line.split_once('=')).any(|(name, value)| {
        let value = value.split_once('#').map_or(value, |(value, _)| value);
        name.trim().trim_matches(['"', '\'']).ends_with("token") && value.trim() == text
    })
}

/// What a header can carry unchanged.
fn token_holds(token: &str) -> bool {
    !token.is_empty() && token.trim() == token && token.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}

/// A word that is no level would be taken for a module's name and silence everything else.
fn filter_holds(filter: &str) -> bool {
    let whole =
        |part: &str| part.contains(['=', '[']) || (!part.is_empty() && LevelFilter::from_str(part).is_ok());
    filter.split(',').all(whole) && EnvFilter::try_new(filter).is_ok()
}

//! Where values come from: the file, the environment and the flags, laid over the defaults.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use ::config::{FileFormat, Map, Source as _, Value, ValueKind};
use clap::Args;

use super::keys::{ALL, Key};
use super::{Config, ConfigError, Secret};

/// Names the configuration file, as `--config` does; no key of it.
const FILE_VARIABLE: &str = "OPAMP_CONFIG";

/// What the command line says about the configuration.
#[derive(Args, Clone, Default)]
pub struct Overrides {
    /// The configuration file (TOML).
    #[arg(long, value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    /// Address of the agents' listener; wins over `agents.listen`.
    #[arg(long, value_name = "ADDRESS:PORT", global = true)]
    pub agents_listen: Option<String>,
    /// Address of the operators' listener; wins over `operators.listen`.
    #[arg(long, value_name = "ADDRESS:PORT", global = true)]
    pub operators_listen: Option<String>,
    /// The store, `sqlite://FILE` or `postgres://…`; wins over `store.url`. Other users of the
    /// machine can see it: give a URL with a password in the environment or in a file.
    #[arg(long, value_name = "URL", global = true)]
    pub store_url: Option<String>,
}

impl Overrides {
    /// Flag, key and value of everything said.
    fn flags(&self) -> impl Iterator<Item = (&'static str, &'static str, &String)> {
        [
            ("--agents-listen", "agents.listen", &self.agents_listen),
            ("--operators-listen", "operators.listen", &self.operators_listen),
            ("--store-url", "store.url", &self.store_url),
        ]
        .into_iter()
        .filter_map(|(flag, key, value)| Some((flag, key, value.as_ref()?)))
    }
}

impl fmt::Debug for Overrides {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Overrides")
            .field("config", &self.config)
            .field("agents_listen", &self.agents_listen)
            .field("operators_listen", &self.operators_listen)
            .field("store_url", &self.store_url.as_deref().map(Secret::from))
            .finish()
    }
}

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nowhere.
    Default,
    /// In the configuration file.
    File(PathBuf),
    /// In the environment, under this name.
    Environment(String),
    /// On the command line, as this flag.
    Flag(&'static str),
    /// In a file of its own, which was named elsewhere.
    SecretFile(PathBuf, Box<Self>),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::Flag(flag) => write!(f, "flag {flag}"),
            Self::SecretFile(path, named) => write!(f, "file {}, named by {named}", path.display()),
        }
    }
}

/// A configuration that passed every check, and what is to be said about it.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// What does not prevent a start and should be logged, a sentence each.
    pub warnings: Vec<String>,
    /// Origin of each key, in the order of [`ALL`].
    origins: Vec<Origin>,
}

impl Loaded {
    /// The effective configuration as TOML, each key with where it comes from, secrets masked.
    #[must_use]
    pub fn render(&self) -> String {
        let mut lines = Vec::new();
        let mut section = "";
        for (key, origin) in ALL.iter().zip(&self.origins) {
            if key.section != section {
                let gap = if section.is_empty() { "" } else { "\n" };
                section = key.section;
                lines.push(format!("{gap}[{section}]\n"));
            }
            let origin = origin.to_string().replace(char::is_control, "?");
            lines.push(match key.shown(&self.config) {
                Some(value) => format!("{} = {value} # {origin}\n", key.name),
                None => format!("# {} is not set # {origin}\n", key.name),
            });
        }
        lines.concat()
    }
}

impl Config {
    /// Reads and checks the configuration of this process.
    pub fn load(overrides: &Overrides) -> Result<Loaded, ConfigError> {
        // Bytes that are no UTF-8 become visible in the error about the value they stand in.
        let lossy = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
        Self::load_from(overrides, std::env::vars_os().map(|(name, value)| (lossy(name), lossy(value))))
    }

    /// Reads and checks the configuration of a process with the environment `env`.
    pub fn load_from(
        overrides: &Overrides,
        env: impl Iterator<Item = (String, String)>,
    ) -> Result<Loaded, ConfigError> {
        let mut layers = Layers::new();
        if let Some(path) = &overrides.config {
            layers.add_file(path)?;
        }
        layers.add_environment(env);
        layers.add_flags(overrides);
        let (config, origins) = layers.resolve()?;
        let origin_of = |wanted: &str| {
            let found = ALL.iter().zip(&origins).find(|(key, _)| key.full() == wanted);
            found.map(|(_, origin)| origin.clone())
        };
        config.validate().map_err(|error| error.traced(origin_of))?;
        let warnings = layers.unknown_variables().into_iter().chain(config.doubts()).collect();
        Ok(Loaded { config, warnings, origins })
    }
}

/// A text as it was written, and where.
type Written = (String, Origin);

/// What is known of one key: the last text that was written for it, in each of its forms.
#[derive(Clone, Default)]
struct Layer {
    value: Option<Written>,
    file: Option<Written>,
    fallback: Option<Written>,
}

struct Layers {
    /// In the order of [`ALL`].
    layers: Vec<Layer>,
    unknown: BTreeSet<String>,
}

impl Layers {
    fn new() -> Self {
        Self { layers: vec![Layer::default(); ALL.len()], unknown: BTreeSet::new() }
    }

    fn pairs(&mut self) -> impl Iterator<Item = (&'static Key, &mut Layer)> {
        ALL.iter().zip(&mut self.layers)
    }

    fn add_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::Unreadable { path: path.to_owned(), error })?;
        let sections = ::config::File::from_str(&text, FileFormat::Toml).collect().map_err(|error| {
            ConfigError::Syntax { path: path.to_owned(), detail: detail(&error.to_string()) }
        })?;
        for (section, value) in sorted(sections) {
            if !ALL.iter().any(|key| key.section == section) {
                return Err(ConfigError::UnknownKey { key: section, path: path.to_owned() });
            }
            let ValueKind::Table(entries) = value.kind else {
                let cure = format!("write [{section}] and the keys of the section below it");
                return Err(invalid(section, &value.to_string(), &Origin::File(path.to_owned()), cure));
            };
            for (name, value) in sorted(entries) {
                self.add_entry(&section, &name, &value, &text, path)?;
            }
        }
        Ok(())
    }

    fn add_entry(
        &mut self,
        section: &str,
        name: &str,
        value: &Value,
        text: &str,
        path: &Path,
    ) -> Result<(), ConfigError> {
        let origin = Origin::File(path.to_owned());
        for (key, layer) in self.pairs().filter(|(key, _)| key.section == section) {
            if name == key.name {
                let text = key
                    .text_of(&value.kind, text)
                    .map_err(|cure| invalid(key.full(), key.safe(&value.to_string()), &origin, cure))?;
                layer.value = Some((text, origin));
                return Ok(());
            }
            if key.secret() && name.strip_suffix("_file") == Some(key.name) {
                let ValueKind::String(file) = &value.kind else {
                    let cure = "write the path of a file, in quotes".to_owned();
                    return Err(invalid(format!("{section}.{name}"), &value.to_string(), &origin, cure));
                };
                layer.file = Some((file.clone(), origin));
                return Ok(());
            }
        }
        Err(ConfigError::UnknownKey { key: format!("{section}.{name}"), path: path.to_owned() })
    }

    fn add_environment(&mut self, env: impl Iterator<Item = (String, String)>) {
        for (name, text) in env {
            let mut known = false;
            for (key, layer) in self.pairs() {
                let variable = key.variable();
                let place = if name == variable {
                    &mut layer.value
                } else if key.secret() && name.strip_suffix("_FILE") == Some(&variable) {
                    &mut layer.file
                } else if key.fallback == Some(name.as_str()) {
                    &mut layer.fallback
                } else {
                    continue;
                };
                *place = Some((text.clone(), Origin::Environment(name.clone())));
                known = true;
            }
            if !known && name.starts_with("OPAMP_") && name != FILE_VARIABLE {
                self.unknown.insert(name);
            }
        }
    }

    fn add_flags(&mut self, overrides: &Overrides) {
        for (flag, wanted, text) in overrides.flags() {
            for (_, layer) in self.pairs().filter(|(key, _)| key.full() == wanted) {
                layer.value = Some((text.clone(), Origin::Flag(flag)));
            }
        }
    }

    fn resolve(&self) -> Result<(Config, Vec<Origin>), ConfigError> {
        let mut config = Config::default();
        let mut origins = Vec::with_capacity(ALL.len());
        for (key, layer) in ALL.iter().zip(&self.layers) {
            let Some((text, origin)) = layer.written(key)? else {
                origins.push(Origin::Default);
                continue;
            };
            key.set(&mut config, &text)
                .map_err(|cure| invalid(key.full(), key.safe(&format!("{text:?}")), &origin, cure))?;
            origins.push(origin);
        }
        Ok((config, origins))
    }

    fn unknown_variables(&self) -> Option<String> {
        let names: Vec<&str> = self.unknown.iter().map(String::as_str).collect();
        (!names.is_empty()).then(|| {
            format!(
                "these environment variables are no keys and were ignored: {}; correct their names, or ignore \
                 this where Kubernetes added them for a service",
                names.join(", ")
            )
        })
    }
}

impl Layer {
    /// The text that counts for `key`.
    fn written(&self, key: &Key) -> Result<Option<Written>, ConfigError> {
        match (&self.value, &self.file) {
            (Some((_, value)), Some((_, file))) => {
                Err(ConfigError::BothForms { key: key.full(), value: value.clone(), file: file.clone() })
            }
            (None, Some((path, origin))) => secret_file(key, Path::new(path), origin).map(Some),
            (Some(written), None) => Ok(Some(written.clone())),
            (None, None) => Ok(self.fallback.clone()),
        }
    }
}

fn secret_file(key: &Key, path: &Path, origin: &Origin) -> Result<Written, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError::SecretFile {
        key: key.full(),
        path: path.to_owned(),
        origin: origin.clone(),
        error,
    })?;
    let text = text.trim_end_matches(['\r', '\n']).to_owned();
    Ok((text, Origin::SecretFile(path.to_owned(), Box::new(origin.clone()))))
}

fn invalid(key: String, value: &str, origin: &Origin, cure: String) -> ConfigError {
    ConfigError::Invalid { key, value: value.to_owned(), origin: Some(origin.clone()), cure }
}

/// The same first error every time, whatever order the map is in.
fn sorted(map: Map<String, Value>) -> Vec<(String, Value)> {
    let mut entries: Vec<_> = map.into_iter().collect();
    entries.sort_by(|left, right| left.0.cmp(&right.0));
    entries
}

/// Place and reason of a TOML error, without the excerpt in between: it may show a secret.
fn detail(error: &str) -> String {
    let excerpt = |line: &&str| {
        line.trim_start().trim_start_matches(|c: char| c.is_ascii_digit()).trim_start().starts_with('|')
    };
    let lines: Vec<&str> = error.lines().filter(|line| !excerpt(line)).map(str::trim).collect();
    lines.join(": ")
}

#[cfg(test)]
mod tests;

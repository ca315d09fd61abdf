//! [`ConfigError`]: why the configuration cannot be used, each in one sentence with its cure.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use thiserror::Error;

use super::load::Origin;

/// Why the server does not start with this configuration. No message holds a secret.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file named by `--config` cannot be read.
    #[error(
        "the configuration file {path} cannot be read ({error}); correct --config or make the file readable"
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The file is not TOML.
    #[error("the configuration file {path} is not valid TOML ({detail}); correct it, texts stand in quotes")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why; never the line itself, which may hold a secret.
        detail: String,
    },
    /// The file has a key that does not exist.
    #[error("the key {key} in {path} does not exist; remove it or correct its name")]
    UnknownKey {
        /// The key with its section.
        key: String,
        /// The file.
        path: PathBuf,
    },
    /// A value that is of the wrong type, cannot be read or is out of range.
    #[error("{key} = {value}{} cannot be used; {cure}", from(.origin.as_ref()))]
    Invalid {
        /// The key with its section.
        key: String,
        /// The value as it was written; `***` for a secret.
        value: String,
        /// Where it was written, if known.
        origin: Option<Origin>,
        /// What to write instead.
        cure: String,
    },
    /// A secret is given both as itself and as the file that holds it.
    #[error("{key} is set ({value}) and {key}_file is set too ({file}); remove one of them")]
    BothForms {
        /// The key with its section.
        key: String,
        /// Where the secret itself was written.
        value: Origin,
        /// Where its file was named.
        file: Origin,
    },
    /// The file that holds a secret cannot be read.
    #[error("{key}_file = {path}{} cannot be read ({error}); correct the path or make the file readable", from(Some(.origin)))]
    SecretFile {
        /// The key with its section.
        key: String,
        /// The file.
        path: PathBuf,
        /// Where the file was named.
        origin: Origin,
        /// What the system said.
        error: io::Error,
    },
    /// A listener that other machines reach lets everybody in.
    #[error(
        "{section}.listen = {listen} can be reached from other machines and {section}.token is not set; \
         set {section}.token, or write {section}.allow_anonymous = true to let everybody in"
    )]
    Open {
        /// The section of the listener.
        section: &'static str,
        /// Its address.
        listen: SocketAddr,
    },
    /// Both listeners want the same address.
    #[error("agents.listen and operators.listen are both {listen}; give one of them another port")]
    SameListener {
        /// The address.
        listen: SocketAddr,
    },
}

impl ConfigError {
    /// The same error with the origin of its key, where it is not known yet.
    pub(super) fn traced(mut self, find: impl FnOnce(&str) -> Option<Origin>) -> Self {
        if let Self::Invalid { key, origin: origin @ None, .. } = &mut self {
            *origin = find(key);
        }
        self
    }
}

fn from(origin: Option<&Origin>) -> String {
    origin.map(|origin| format!(" ({origin})")).unwrap_or_default()
}

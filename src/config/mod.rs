//! The configuration: all keys with their defaults, where they come from, and what is refused.
//!
//! This module is the only reader of the environment. It promises that a [`Loaded`] configuration
//! passed every check, that later layers win (defaults, file, environment, flags), that every
//! refusal names the key and the cure in one sentence, and that no secret is ever printed.
//! It opens no port and no store.
//!
//! The layers are laid over each other through one table of keys. config-rs reads the TOML; its own
//! layering is not used, since it converts types silently (`1.5` connections become 2, the token
//! `0x1F` becomes 31), splits variables at guessed underscores, and forgets where a value came from
//! once the types are filled.

mod error;
mod keys;
mod load;
mod secret;

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use error::ConfigError;
pub use load::{Loaded, Origin, Overrides};
pub use secret::Secret;

/// Everything that can be set.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// The agents' listener.
    pub agents: Agents,
    /// The operators' listener.
    pub operators: Operators,
    /// The database.
    pub store: Store,
    /// How silence is noticed.
    pub heartbeat: Heartbeat,
    /// What becomes of agents that stay away.
    pub sweep: Sweep,
    /// What is forgotten in the end.
    pub retention: Retention,
    /// This replica.
    pub node: Node,
    /// The orderly stop.
    pub shutdown: Shutdown,
    /// What is logged, and how.
    pub log: Log,
}

/// Section `agents`: the listener for agents, and its limits.
#[derive(Clone, Debug)]
pub struct Agents {
    /// Address and port; port 0 takes a free one. Default `127.0.0.1:4320`.
    pub listen: SocketAddr,
    /// The path of both transports, starting with `/`. Default `/v1/opamp`.
    pub path: String,
    /// What agents must present. Default: none. `INTERNAL_SERVICE_TOKEN` counts where it is not set.
    pub token: Option<Secret>,
    /// Lets a listener without token be reached from other machines. Default false.
    pub allow_anonymous: bool,
    /// Most links at once, 1 to 10,000,000. Default 100,000.
    pub max_connections: usize,
    /// Most WebSockets, and agents never heard before over plain HTTP, that are let in per second,
    /// 1 to 10,000,000. Default 1,000.
    pub max_connects_per_second: usize,
    /// Largest message in bytes, unpacked too, 1 B to 1 GiB. Default 64 MiB.
    pub max_message_size: usize,
    /// Most bytes of unfinished messages that all links together keep in memory, 1 MiB to 1 TiB; the
    /// first 64 KiB of each are not counted. Default 256 MiB.
    pub max_inflight: usize,
    /// Most agents on one link, 1 to 10,000,000. Default 1,000.
    pub max_per_link: usize,
}

/// Section `operators`: the listener for REST, metrics and probes.
#[derive(Clone, Debug)]
pub struct Operators {
    /// Address and port; port 0 takes a free one. Default `127.0.0.1:4321`.
    pub listen: SocketAddr,
    /// What callers must present. Default: none.
    pub token: Option<Secret>,
    /// Lets a listener without token be reached from other machines. Default false.
    pub allow_anonymous: bool,
}

/// Section `store`: the database.
#[derive(Clone, Debug)]
pub struct Store {
    /// `sqlite://FILE` or `postgres://…`; a secret, since it may hold a password. Default
    /// `sqlite://opamp-server.db`. `DATABASE_URL` counts where it is not set.
    pub url: Secret,
    /// A `postgres://…` URL at which orders are listened for where a pooler, which hears nothing, stands
    /// before `url`; a secret. Default: none, `url` is used.
    pub listen_url: Option<Secret>,
    /// Most connections to the database, 1 to 10,000. Default 16.
    pub max_connections: u32,
    /// How long signs of life are gathered before they are written together, 10 ms to a year. Default 5 s.
    pub flush_interval: Duration,
}

/// Section `heartbeat`: how silence is noticed.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    /// How often agents are expected to report; never offered to them. 10 ms to a year. Default 30 s.
    pub interval: Duration,
    /// Silence after which an agent is offline, 100 ms to a year. Default 60 s.
    pub timeout: Duration,
    /// How often the safety net looks for deadlines that were missed, 10 ms to a year. Default 30 s.
    pub check_interval: Duration,
}

/// Section `sweep`: what becomes of agents that stay away.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// How often they are looked for, 10 ms to a year. Default 5 min.
    pub interval: Duration,
    /// How long an agent may stay offline, 10 ms to a year. Default 10 min.
    pub stale_after: Duration,
    /// Which agents are retired then; the others become errors. Default `marked`.
    pub ephemeral: Ephemeral,
}

/// Section `retention`: what is forgotten in the end.
#[derive(Clone, Debug)]
pub struct Retention {
    /// How long ended connections and changes of status are kept, 0 (for ever) to a century. Default 90 d.
    pub history: Duration,
}

/// Section `node`: this replica.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name, unique among the nodes of a store. Default: see [`node_name`](Self::node_name).
    pub name: Option<String>,
    /// How long the others wait before they take this node for dead, 100 ms to a year. Default 10 s.
    pub lease: Duration,
}

/// Section `shutdown`: the orderly stop.
#[derive(Clone, Debug)]
pub struct Shutdown {
    /// The time links have to end, 0 to a year. Default 10 s.
    pub drain: Duration,
}

/// Section `log`: what is logged, and how.
#[derive(Clone, Debug)]
pub struct Log {
    /// A level, or filter directives such as `info,hyper=warn`. Default `info`.
    pub level: String,
    /// Default: `human` on a terminal, else `json`.
    pub format: Option<LogFormat>,
}

/// Which agents count as ephemeral.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ephemeral {
    /// Those that say so: `opamp.ephemeral` true or `k8s.pod.uid` present.
    #[default]
    Marked,
    /// All.
    All,
    /// None.
    None,
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

impl fmt::Display for Ephemeral {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl Default for Agents {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 4320)),
            path: "/v1/opamp".to_owned(),
            token: None,
            allow_anonymous: false,
            max_connections: 100_000,
            max_connects_per_second: 1_000,
            max_message_size: 64 << 20,
            max_inflight: 256 << 20,
            max_per_link: 1_000,
        }
    }
}

impl Default for Operators {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 4321)), token: None, allow_anonymous: false }
    }
}

impl Default for Store {
    fn default() -> Self {
        Self {
            url: Secret::from("sqlite://opamp-server.db"),
            listen_url: None,
            max_connections: 16,
            flush_interval: Duration::from_secs(5),
        }
    }
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(30),
            timeout: Duration::from_mins(1),
            check_interval: Duration::from_secs(30),
        }
    }
}

impl Default for Sweep {
    fn default() -> Self {
        Self {
            interval: Duration::from_mins(5),
            stale_after: Duration::from_mins(10),
            ephemeral: Ephemeral::default(),
        }
    }
}

impl Default for Retention {
    fn default() -> Self {
        Self { history: Duration::from_hours(90 * 24) }
    }
}

impl Default for Node {
    fn default() -> Self {
        Self { name: None, lease: Duration::from_secs(10) }
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Self { drain: Duration::from_secs(10) }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: None }
    }
}

impl Node {
    /// The configured name, else the host's name and `port`, on which agents are listened to.
    #[must_use]
    pub fn node_name(&self, port: u16) -> String {
        self.name.clone().unwrap_or_else(|| format!("{}:{port}", host_name()))
    }
}

/// The kernel's word first: in a container it is the container's name.
fn host_name() -> String {
    ["/proc/sys/kernel/hostname", "/etc/hostname"]
        .into_iter()
        .filter_map(|path| std::fs::read_to_string(path).ok())
        .map(|name| name.trim().to_owned())
        .find(|name| !name.is_empty())
        .unwrap_or_else(|| "localhost".to_owned())
}

impl Config {
    /// Refuses values that cannot work and set-ups that are unsafe.
    pub fn validate(&self) -> Result<(), ConfigError> {
        keys::ALL.iter().try_for_each(|key| key.check(self))?;
        let Self { agents, operators, .. } = self;
        let listeners = [
            ("agents", agents.listen, agents.token.is_some() || agents.allow_anonymous),
            ("operators", operators.listen, operators.token.is_some() || operators.allow_anonymous),
        ];
        for (section, listen, guarded) in listeners {
            if !guarded && !listen.ip().to_canonical().is_loopback() {
                return Err(ConfigError::Open { section, listen });
            }
        }
        let (left, right) = (agents.listen, operators.listen);
        if left.port() != 0
            && left.port() == right.port()
            && left.ip().to_canonical() == right.ip().to_canonical()
        {
            return Err(ConfigError::SameListener { listen: left });
        }
        Ok(())
    }

    /// What works and is hardly meant, a sentence each.
    fn doubts(&self) -> Option<String> {
        let Heartbeat { interval, timeout, .. } = self.heartbeat;
        (timeout <= interval).then(|| {
            format!(
                "heartbeat.timeout ({timeout:?}) is not longer than heartbeat.interval ({interval:?}), so agents that \
                 report as expected are called offline; raise the timeout"
            )
        })
    }
}

//! The command line: every option with its unit, range and default.
//!
//! Promises that what it hands out is within range and free of contradictions. Reads the one
//! variable of the environment that the swarm knows. Must not know what the options lead to.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use anyhow::ensure;
use clap::{Parser, ValueEnum, builder::RangedU64ValueParser};
use humantime_serde::re::humantime;

use crate::endpoint::Target;

/// The most agents one process may hold: its links must fit into the usual limit of open files.
const MAX_AGENTS: u64 = 18_000;
const MAX_REPORT_BYTES: u64 = 64 * 1024 * 1024;
const MAX_DURATION: Duration = Duration::from_hours(365 * 24);
/// How long a run lasts once all are connected, unless a controlling process ends it.
const DEFAULT_DURATION: Duration = Duration::from_mins(1);

/// Simulates a fleet of agents: connects them, sends heartbeats, counts the answers.
///
/// Durations are written like 500ms, 30s, 5m. Exit code 0: the first report of every agent was
/// answered; 1: not so; 2: wrong use.
#[derive(Parser)]
#[command(name = "opamp-swarm", version)]
pub(crate) struct Args {
    /// Where the server listens for agents: ws:// for WebSocket, http:// for plain HTTP polling
    #[arg(long, value_name = "URL", default_value = "ws://127.0.0.1:4320/v1/opamp")]
    pub(crate) url: Target,

    /// Number of agents, 1 to 18000; start more processes with other seeds for more
    #[arg(long, value_name = "N", default_value = "1000",
          value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_AGENTS))]
    pub(crate) agents: usize,

    /// Agents that start connecting per second; 0 = all at once
    #[arg(long, value_name = "R", default_value = "500")]
    pub(crate) connect_rate: u32,

    /// Give up if not all are connected this long after the last was started; 0s = never
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = duration)]
    pub(crate) connect_timeout: Duration,

    /// Time between an agent's heartbeats (or polls), each drawn anew within ±10 %; 0s = none
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    pub(crate) interval: Duration,

    /// Size of the first report in bytes of protobuf, up to 67108864, reached by padding the
    /// description; without padding it has about 350
    #[arg(long, value_name = "BYTES", default_value = "2048",
          value_parser = RangedU64ValueParser::<usize>::new().range(..=MAX_REPORT_BYTES))]
    pub(crate) report_bytes: usize,

    /// How long to go on after all are connected; 0s = until SIGINT or SIGTERM
    /// [default: 60s; with --control: until `quit`]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    duration: Option<Duration>,

    /// Token sent as `Authorization: Bearer`
    #[arg(long, env = "OPAMP_AGENTS_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,

    /// The fleet's seed: the same seed gives the same uids, so a second run returns as the same
    /// agents; processes running side by side need different ones
    #[arg(long, value_name = "SEED", default_value = "1")]
    pub(crate) seed: u64,

    /// Local address to connect from, repeatable; the agents take turns [default: the system's choice]
    #[arg(long, value_name = "ADDRESS", conflicts_with = "sources")]
    source: Vec<IpAddr>,

    /// Connect from this many loopback addresses, 127.0.0.1 and up, 1 to 254
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=254))]
    sources: Option<u8>,

    /// How the agents go at the end
    #[arg(long, value_enum, default_value = "orderly")]
    pub(crate) leave: Leave,

    /// Write events and the result to stdout as JSON, one object per line
    #[arg(long)]
    json: bool,

    /// Write a line of progress to stderr every second, also where stderr is no terminal
    #[arg(long)]
    pub(crate) progress: bool,

    /// Obey commands on stdin, one per line: `beat K` (every agent sends K heartbeats now, each after the
    /// answer to the one before; those without a link miss them), `quit` (at once, as does the end of
    /// input). Implies --json
    #[arg(long)]
    pub(crate) control: bool,
}

/// Bounded, so that adding it to a moment never overflows.
fn duration(text: &str) -> anyhow::Result<Duration> {
    let duration = humantime::parse_duration(text)?;
    ensure!(duration <= MAX_DURATION, "at most 365 days");
    Ok(duration)
}

/// How agents end their stay.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Leave {
    /// A last report with `agent_disconnect`, then Close 1000
    Orderly,
    /// The connection just ends
    Abrupt,
}

impl Args {
    pub(crate) fn json(&self) -> bool {
        self.json || self.control
    }

    /// `None` means: until told otherwise.
    pub(crate) fn duration(&self) -> Option<Duration> {
        let unless_given = (!self.control).then_some(DEFAULT_DURATION);
        self.duration.or(unless_given).filter(|d| !d.is_zero())
    }

    /// Empty means: whatever address the system picks.
    pub(crate) fn sources(&self) -> Vec<IpAddr> {
        match self.sources {
            Some(count) => (1..=count).map(|last| Ipv4Addr::new(127, 0, 0, last).into()).collect(),
            None => self.source.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(options: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from([&["opamp-swarm"], options].concat())
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn duration_ends_by_default_but_not_under_control() {
        let duration = |options: &[&str]| parse(options).map(|args| args.duration()).ok();
        assert_eq!(duration(&[]), Some(Some(DEFAULT_DURATION)));
        assert_eq!(duration(&["--duration", "0s"]), Some(None));
        assert_eq!(duration(&["--control"]), Some(None));
        let given = duration(&["--control", "--duration", "5s"]);
        assert_eq!(given, Some(Some(Duration::from_secs(5))));
    }

    #[test]
    fn sources_count_up_from_loopback() {
        let sources = parse(&["--sources", "3"]).map(|args| args.sources()).ok();
        let last = sources.as_ref().and_then(|all| all.last().copied());
        assert_eq!(last, Some(IpAddr::from([127, 0, 0, 3])));
        assert_eq!(sources.map(|all| all.len()), Some(3));
    }

    #[test]
    fn more_agents_than_a_process_holds_are_refused() {
        assert!(parse(&["--agents", "18000"]).is_ok());
        assert!(parse(&["--agents", "18001"]).is_err());
        assert!(parse(&["--agents", "0"]).is_err());
    }
}

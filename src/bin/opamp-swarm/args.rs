//! The command line: every option with its unit, range and default.
//!
//! Promises that what it hands out is within range and free of contradictions. Reads the one
//! variable of the environment that the swarm knows. Must not know what the options lead to.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use anyhow::{bail, ensure};
use clap::{CommandFactory, Parser, ValueEnum, builder::RangedU64ValueParser, error::ErrorKind};
use humantime_serde::re::humantime;

use crate::endpoint::{Target, Transport};

/// The most agents one process may hold: its links must fit into the usual limit of open files.
const MAX_AGENTS: u64 = 18_000;
const MAX_SEATS: u64 = 1_000;
/// More than any machine does, so that a typing error is told.
const MAX_RATE: f64 = 1_000_000.0;
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
#[expect(clippy::struct_excessive_bools, reason = "each is an option of its own")]
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

    /// Pause before an agent tries again, between half of it and all of it, never shorter than a
    /// `Retry-After` of the server [default: as real agents do: none after a break, then from 500ms
    /// doubling up to 30s]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) redial_pause: Option<Duration>,

    /// Give up if not all are connected this long after the last was started; 0s = never
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = duration)]
    pub(crate) connect_timeout: Duration,

    /// Time between an agent's heartbeats (or polls), each drawn anew within ±10 %; 0s = none
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    pub(crate) interval: Duration,

    /// Size of the first report in bytes of protobuf, up to 67108864, reached by padding the
    /// description; without padding it has about 350
    #[arg(long, visible_alias = "description-bytes", value_name = "BYTES", default_value = "2048",
          value_parser = RangedU64ValueParser::<usize>::new().range(..=MAX_REPORT_BYTES))]
    pub(crate) report_bytes: usize,

    /// Agents per second, of the whole fleet, whose health changes and is reported
    #[arg(long, value_name = "R", default_value = "0", value_parser = rate)]
    pub(crate) health_change_rate: f64,

    /// Agents per second, of the whole fleet, that restart: they go as --leave says and come back after
    /// --redial-pause, numbering from 0 and reporting everything
    #[arg(long, value_name = "R", default_value = "0", value_parser = rate)]
    pub(crate) churn: f64,

    /// Percentage of the agents, `1` or `1%`, that neither send nor read anything, nor answer pings, once
    /// all are connected; their links stay open
    #[arg(long, value_name = "P", default_value = "0", value_parser = percentage)]
    pub(crate) silence: f64,

    /// Percentage of the agents, `5` or `5%`, that stop reading for 10 s again and again and go on sending
    #[arg(long, value_name = "P", default_value = "0", value_parser = percentage)]
    pub(crate) slow_readers: f64,

    /// Agents that share one WebSocket, 1 to 1000
    #[arg(long, value_name = "N", default_value = "1",
          value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_SEATS))]
    pub(crate) multiplex: usize,

    /// Pack the bodies of plain HTTP with gzip, in both directions
    #[arg(long)]
    pub(crate) gzip: bool,

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

    /// How the agents go at the end, and when they restart
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

fn rate(text: &str) -> anyhow::Result<f64> {
    within(text, MAX_RATE)
}

fn percentage(text: &str) -> anyhow::Result<f64> {
    within(text.strip_suffix('%').unwrap_or(text), 100.0)
}

fn within(text: &str, most: f64) -> anyhow::Result<f64> {
    let number: f64 = text.parse()?;
    ensure!((0.0..=most).contains(&number), "0 to {most}");
    Ok(number)
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
    /// Ends the process where the command line is wrong or asks for help.
    pub(crate) fn from_command_line() -> Self {
        let args = Self::parse();
        if let Err(error) = args.check() {
            Self::command().error(ErrorKind::ArgumentConflict, error).exit();
        }
        args
    }

    /// What no single option can tell.
    fn check(&self) -> anyhow::Result<()> {
        match self.url.transport {
            Transport::WebSocket if self.gzip => {
                bail!("--gzip is for plain HTTP: give a --url that begins with http://")
            }
            Transport::Http if self.shares_links() => {
                bail!("--multiplex is for WebSockets: give a --url that begins with ws://")
            }
            Transport::WebSocket if self.shares_links() && self.slow_readers > 0.0 => {
                bail!("--slow-readers would hold up all who share the link: leave out --multiplex")
            }
            Transport::WebSocket | Transport::Http => Ok(()),
        }
    }

    pub(crate) fn shares_links(&self) -> bool {
        self.multiplex > 1
    }

    /// How many connections to the server the fleet has.
    pub(crate) fn links(&self) -> usize {
        self.agents.div_ceil(self.multiplex)
    }

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
    fn options_that_contradict_each_other_are_refused() {
        let fits = |options: &[&str]| parse(options).is_ok_and(|args| args.check().is_ok());
        assert!(fits(&["--gzip", "--url", "http://host/x"]));
        assert!(!fits(&["--gzip", "--url", "ws://host/x"]));
        assert!(fits(&["--multiplex", "50"]));
        assert!(!fits(&["--multiplex", "50", "--url", "http://host/x"]));
        assert!(!fits(&["--multiplex", "50", "--slow-readers", "1"]));
        assert!(fits(&["--slow-readers", "1", "--silence", "0.5", "--churn", "2.5"]));
        let silence = |share| parse(&["--silence", share]).map(|args| args.silence.to_bits()).ok();
        assert_eq!(silence("1%"), Some(1.0_f64.to_bits()), "as it is said");
        assert_eq!(silence("1"), silence("1%"));
    }

    #[test]
    fn rates_and_percentages_are_within_range() {
        for wrong in [
            ["--silence", "101"],
            ["--silence", "-1"],
            ["--silence", "101%"],
            ["--silence", "%"],
            ["--churn", "1%"],
            ["--churn", "NaN"],
            ["--churn", "1e9"],
        ] {
            assert!(parse(&[&format!("{}={}", wrong[0], wrong[1])]).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn agents_that_share_need_fewer_links() {
        let links = |options: &[&str]| parse(options).map(|args| args.links()).ok();
        assert_eq!(links(&["--agents", "10"]), Some(10));
        assert_eq!(links(&["--agents", "10", "--multiplex", "4"]), Some(3));
    }

    #[test]
    fn more_agents_than_a_process_holds_are_refused() {
        assert!(parse(&["--agents", "18000"]).is_ok());
        assert!(parse(&["--agents", "18001"]).is_err());
        assert!(parse(&["--agents", "0"]).is_err());
    }
}

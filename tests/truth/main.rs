//! The truth test: real servers, real faults, and agents that know what happened to them.
//!
//! A simulator plays a fleet from a seed while processes are killed, stopped and told to end and the database is
//! refused, cut, frozen and delayed. It keeps its own record. Afterwards a checker reads the tables and the API
//! and holds them against that record, by the contract's rules. Any contradiction is a lie, and is told with its
//! seed and a timeline.
//!
//! As a normal test each kind of store gets one short round; `scripts/truth` plays on for as long as it is told.

#![expect(clippy::expect_used, reason = "in a test a panic with a sentence is the report")]

mod agent;
mod bounds;
mod check;
mod database;
mod faults;
mod lives;
mod node;
mod operator;
#[path = "../integration/harness/postgres.rs"]
mod postgres;
mod proxy;
mod record;
mod round;
mod settle;
mod timeline;
mod wire;

use std::io::Write as _;
use std::time::{Duration, Instant};

use database::Kind;
use record::Trouble;
use round::{Outcome, Plan, play};

/// What the environment says: `scripts/truth` sets it from its arguments.
struct Settings {
    minutes: Option<f64>,
    seed: u64,
    agents: usize,
    storm: Duration,
    without: Vec<String>,
    /// Tells of a contradiction and plays on.
    play_on: bool,
}

impl Settings {
    #[expect(clippy::disallowed_methods, reason = "the environment tells a test how long to run")]
    fn read() -> Self {
        let read = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let number = |name: &str| read(name).map(|value| value.parse().expect("a whole number"));
        let minutes = read("TRUTH_MINUTES").map(|value| value.parse().expect("a number of minutes"));
        Self {
            minutes,
            seed: number("TRUTH_SEED").unwrap_or(1),
            agents: number("TRUTH_AGENTS")
                .map_or(40, |agents| usize::try_from(agents).expect("a small number")),
            storm: Duration::from_secs(number("TRUTH_STORM").unwrap_or(if minutes.is_some() {
                30
            } else {
                18
            })),
            without: read("TRUTH_WITHOUT")
                .map_or_else(Vec::new, |names| names.split(',').map(str::to_owned).collect()),
            play_on: read("TRUTH_PLAY_ON").is_some(),
        }
    }

    fn plan(&self, kind: Kind, seed: u64) -> Plan {
        Plan { kind, seed, agents: self.agents, storm: self.storm, without: self.without.clone() }
    }
}

#[test]
fn sqlite() {
    drive(Kind::Sqlite);
}

#[test]
fn postgres() {
    drive(Kind::Postgres);
}

#[test]
fn two_nodes() {
    drive(Kind::TwoNodes);
}

/// One short round, or as many as fit into the time that is given.
fn drive(kind: Kind) {
    let settings = Settings::read();
    let start = Instant::now();
    let (mut seed, mut contradictions) = (settings.seed, 0);
    loop {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let Some(outcome) = runtime.block_on(Box::pin(play(settings.plan(kind, seed)))) else { return };
        say(&line(kind, seed, &outcome));
        contradictions += outcome.contradictions.len();
        if settings.play_on {
            outcome.contradictions.iter().for_each(|text| say(text));
        } else {
            assert_eq!(contradictions, 0, "contradictions\n\n{}", outcome.contradictions.join("\n\n"));
        }
        let Some(minutes) = settings.minutes else { return };
        if start.elapsed().as_secs_f64() >= minutes * 60.0 {
            say(&format!("{}: {contradictions} contradictions after {:?}", kind.word(), start.elapsed()));
            return;
        }
        // Far from its neighbours: seeds that somebody gives are small.
        seed = fastrand::Rng::with_seed(seed).u64(..1 << 32);
    }
}

/// What a round was, in one line.
fn line(kind: Kind, seed: u64, outcome: &Outcome) -> String {
    let dealt = outcome.faults.iter().filter(|(trouble, _)| !matches!(trouble, Trouble::Down | Trouble::Lag));
    let ends: Vec<String> = outcome.ends.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
    let faults: Vec<String> = dealt.map(|(trouble, count)| format!("{trouble:?} {count}")).collect();
    format!(
        "{}: seed {seed}, {} stays, {} exchanges, {} rows ({}), {} changes of status, faults: {}; {} contradictions",
        kind.word(),
        outcome.stays,
        outcome.exchanges,
        outcome.rows,
        ends.join(", "),
        outcome.changes,
        faults.join(", "),
        outcome.contradictions.len()
    )
}

/// Past the test runner's capture: a long run is watched while it runs.
fn say(line: &str) {
    let _best_effort = writeln!(std::io::stderr(), "{line}");
}

//! What the swarm says: events and the result on stdout, progress on stderr.
//!
//! Promises one JSON object per line where JSON is wanted, flushed at once, and lines for people
//! otherwise. Must not know how the numbers come about.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fmt,
    io::{self, Write},
    time::Duration,
};

use serde::Serialize;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::{counts::Counts, histogram::Histogram};

const PROGRESS_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// The first report of every agent was answered.
    Connected {
        agents: usize,
        seconds: f64,
        per_second: f64,
    },
    /// Everybody has a working link again, so long after the first had lost it.
    Returned {
        agents: usize,
        seconds: f64,
        per_second: f64,
    },
    /// A round of ordered heartbeats is over; `reports` of them were answered, the rest `missed`.
    Beaten {
        reports: u64,
        missed: u64,
        seconds: f64,
    },
    /// A command could not be obeyed.
    Error {
        message: String,
    },
    Result(Box<Outcome>),
}

/// The result of a run.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    pub(crate) transport: String,
    pub(crate) agents: usize,
    /// Agents whose first report was answered.
    pub(crate) acknowledged: usize,
    /// Agents with a working link just before they left.
    pub(crate) connected: usize,
    /// Until the first report of every agent was answered; absent if that never happened.
    pub(crate) connect_seconds: Option<f64>,
    pub(crate) connects_per_second: Option<f64>,
    pub(crate) run_seconds: f64,
    pub(crate) reports: u64,
    pub(crate) answers: u64,
    pub(crate) unasked_offers: u64,
    pub(crate) misaddressed_offers: u64,
    pub(crate) full_state_requests: u64,
    pub(crate) uids_reassigned: u64,
    pub(crate) errors: ErrorCounts,
    pub(crate) reconnects: u64,
    /// Agents that left to come back as a new process.
    pub(crate) restarts: u64,
    /// Agents that fell silent on purpose.
    pub(crate) silent: usize,
    pub(crate) http_401: u64,
    pub(crate) http_503: u64,
    pub(crate) losses: BTreeMap<String, u64>,
    pub(crate) farewells: u64,
    pub(crate) failed_tasks: usize,
    pub(crate) latency_ms: Latencies,
}

#[derive(Debug, Serialize)]
pub(crate) struct ErrorCounts {
    unknown: u64,
    bad_request: u64,
    unavailable: u64,
}

/// From a report to its offer: each agent's first, changes of health, all others, and all of these.
#[derive(Debug, Serialize)]
pub(crate) struct Latencies {
    first: Latency,
    change: Latency,
    later: Latency,
    all: Latency,
}

#[derive(Debug, Serialize)]
struct Latency {
    count: u64,
    /// Absent where nothing was measured: no time is not a time of zero.
    #[serde(flatten)]
    quantiles: Option<Quantiles>,
}

#[derive(Debug, Serialize)]
struct Quantiles {
    p50: f64,
    p90: f64,
    p99: f64,
    p999: f64,
    max: f64,
}

/// What the counts do not know.
pub(crate) struct Course {
    pub(crate) transport: String,
    pub(crate) connected: usize,
    pub(crate) connect_time: Option<Duration>,
    pub(crate) run_time: Duration,
    pub(crate) failed_tasks: usize,
}

impl Event {
    pub(crate) fn connected(agents: usize, time: Duration) -> Self {
        Self::Connected { agents, seconds: rounded(time.as_secs_f64()), per_second: rate(agents, time) }
    }

    pub(crate) fn returned(agents: usize, away: Duration) -> Self {
        Self::Returned { agents, seconds: rounded(away.as_secs_f64()), per_second: rate(agents, away) }
    }

    pub(crate) fn beaten(reports: u64, wanted: u64, time: Duration) -> Self {
        Self::Beaten { reports, missed: wanted.saturating_sub(reports), seconds: rounded(time.as_secs_f64()) }
    }

    /// Writes the event to stdout; a reader that has gone is none of our business.
    pub(crate) fn write(&self, json: bool) {
        let mut out = io::stdout().lock();
        let _ = if json {
            let line = serde_json::to_string(self).unwrap_or_default();
            writeln!(out, "{line}").and_then(|()| out.flush())
        } else {
            writeln!(out, "{self}").and_then(|()| out.flush())
        };
    }
}

impl Outcome {
    pub(crate) fn new(counts: &Counts, course: Course) -> Self {
        let losses = counts.losses();
        let lost_by = |cause: &str| losses.get(cause).copied().unwrap_or_default();
        Self {
            transport: course.transport,
            agents: counts.agents,
            acknowledged: counts.acknowledged(),
            connected: course.connected,
            connect_seconds: course.connect_time.map(|time| rounded(time.as_secs_f64())),
            connects_per_second: course.connect_time.map(|time| rate(counts.agents, time)),
            run_seconds: rounded(course.run_time.as_secs_f64()),
            reports: counts.reports.get(),
            answers: counts.answers.get(),
            unasked_offers: counts.unasked.get(),
            misaddressed_offers: counts.misaddressed.get(),
            full_state_requests: counts.full_state_requests.get(),
            uids_reassigned: counts.uids_reassigned.get(),
            errors: ErrorCounts {
                unknown: counts.errors.unknown.get(),
                bad_request: counts.errors.bad_request.get(),
                unavailable: counts.errors.unavailable.get(),
            },
            reconnects: counts.reconnects.get(),
            restarts: counts.restarts.get(),
            silent: counts.silent(),
            http_401: lost_by("http_401"),
            http_503: lost_by("http_503"),
            losses,
            farewells: counts.farewells.get(),
            failed_tasks: course.failed_tasks,
            latency_ms: Latencies::new(counts),
        }
    }
}

impl Latencies {
    fn new(counts: &Counts) -> Self {
        let all = Histogram::new();
        all.merge(&counts.first_latency);
        all.merge(&counts.change_latency);
        all.merge(&counts.later_latency);
        Self {
            first: Latency::new(&counts.first_latency),
            change: Latency::new(&counts.change_latency),
            later: Latency::new(&counts.later_latency),
            all: Latency::new(&all),
        }
    }
}

impl Latency {
    fn new(histogram: &Histogram) -> Self {
        let quantile = |per_mille| millis(histogram.quantile(per_mille));
        let count = histogram.count();
        let quantiles = (count > 0).then(|| Quantiles {
            p50: quantile(500),
            p90: quantile(900),
            p99: quantile(990),
            p999: quantile(999),
            max: millis(histogram.max()),
        });
        Self { count, quantiles }
    }
}

fn millis(time: Duration) -> f64 {
    rounded(time.as_secs_f64() * 1000.0)
}

fn rate(agents: usize, time: Duration) -> f64 {
    let agents = f64::from(u32::try_from(agents).unwrap_or(u32::MAX));
    rounded(agents / time.as_secs_f64().max(0.001))
}

/// Three decimals say all there is to say.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connected { agents, seconds, per_second } => {
                write!(f, "connected {agents} agents in {seconds} s, {per_second} per second")
            }
            Self::Returned { agents, seconds, per_second } => {
                write!(f, "all {agents} agents are back after {seconds} s, {per_second} per second")
            }
            Self::Beaten { reports, missed, seconds } => {
                write!(f, "{reports} heartbeats answered in {seconds} s, {missed} missed")
            }
            Self::Error { message } => write!(f, "error: {message}"),
            Self::Result(outcome) => outcome.fmt(f),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "agents        {} over {}, {} acknowledged, {} connected at the end, {} said farewell",
            self.agents, self.transport, self.acknowledged, self.connected, self.farewells
        )?;
        writeln!(
            f,
            "reports       {} sent, {} answered in {} s; {} full-state requests, {} unasked offers, \
             {} misaddressed",
            self.reports,
            self.answers,
            self.run_seconds,
            self.full_state_requests,
            self.unasked_offers,
            self.misaddressed_offers
        )?;
        writeln!(
            f,
            "errors        {} unknown, {} bad request, {} unavailable; {} uids reassigned",
            self.errors.unknown, self.errors.bad_request, self.errors.unavailable, self.uids_reassigned
        )?;
        writeln!(f, "latency       first report: {}", self.latency_ms.first)?;
        if self.latency_ms.change.count > 0 {
            writeln!(f, "              changes:      {}", self.latency_ms.change)?;
        }
        writeln!(f, "              later ones:   {}", self.latency_ms.later)?;
        if self.restarts > 0 || self.silent > 0 {
            writeln!(f, "manners       {} restarts, {} fell silent", self.restarts, self.silent)?;
        }
        write!(f, "losses        {} reconnects", self.reconnects)?;
        for (cause, count) in &self.losses {
            write!(f, ", {count} × {cause}")?;
        }
        if self.failed_tasks > 0 {
            write!(f, "\nfailed        {} tasks", self.failed_tasks)?;
        }
        Ok(())
    }
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(Quantiles { p50, p90, p99, p999, max }) = &self.quantiles else {
            return f.write_str("none");
        };
        write!(f, "p50 {p50} ms, p90 {p90} ms, p99 {p99} ms, p99.9 {p999} ms, max {max} ms")
    }
}

/// Writes a line to stderr every second, for as long as it is polled.
pub(crate) async fn progress(counts: &Counts) -> Infallible {
    let start = Instant::now();
    let mut ticks = interval(PROGRESS_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut answered = 0;
    loop {
        ticks.tick().await;
        let answers = counts.answers.get();
        let latency = Latencies::new(counts).all.quantiles;
        eprintln!(
            "{:>5} s  {}/{} connected  {answers} answers (+{})  {} full-state requests  \
             {} errors  {} losses{}",
            start.elapsed().as_secs(),
            counts.connected(),
            counts.agents,
            answers - answered,
            counts.full_state_requests.get(),
            counts.errors.sum(),
            counts.losses().values().sum::<u64>(),
            latency.map_or_else(String::new, |latency| format!("  p99 {} ms", latency.p99)),
        );
        answered = answers;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counts::Series;

    #[test]
    fn events_are_tagged_objects() {
        let event = Event::beaten(5, 6, Duration::from_micros(1_234_567));
        let line = serde_json::to_string(&event).ok();
        let expected = r#"{"event":"beaten","reports":5,"missed":1,"seconds":1.235}"#;
        assert_eq!(line.as_deref(), Some(expected));
    }

    #[test]
    fn the_result_carries_its_tag_beside_the_counts() {
        let counts = Counts::new(3);
        counts.record(Series::First, Duration::from_millis(2));
        let course = Course {
            transport: "http".to_owned(),
            connected: 3,
            connect_time: None,
            run_time: Duration::from_secs(1),
            failed_tasks: 0,
        };
        let event = Event::Result(Box::new(Outcome::new(&counts, course)));
        let value = serde_json::to_value(&event).unwrap_or_default();
        assert_eq!(value["event"], "result");
        assert_eq!(value["agents"], 3);
        assert_eq!(value["latency_ms"]["all"]["max"], 2.0);
        assert_eq!(value["latency_ms"]["later"], serde_json::json!({ "count": 0 }), "none was sent");
        assert!(event.to_string().contains("later ones:   none"), "{event}");
    }
}

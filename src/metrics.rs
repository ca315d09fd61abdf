//! The server's metrics: each declared once, its doc comment is the help text, its labels are closed lists.
//!
//! The recorder belongs to one server, not to the process, so that several servers can live in one
//! test binary. No label has an agent's id.

use metrics::{Counter, Gauge, Histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use metrics_process::Collector;

use crate::agent::report::Kind;
use crate::close::CloseReason;
use crate::store::Transport;

/// A closed list of label values.
pub trait Label: Copy + PartialEq + 'static {
    /// The label's name.
    const NAME: &'static str;
    /// All values.
    const ALL: &'static [Self];
    /// The value's word.
    fn word(self) -> &'static str;
}

impl Label for CloseReason {
    const NAME: &'static str = "reason";
    const ALL: &'static [Self] = &CloseReason::ALL;
    fn word(self) -> &'static str {
        self.label()
    }
}

impl Label for Transport {
    const NAME: &'static str = "transport";
    const ALL: &'static [Self] = &Transport::ALL;
    fn word(self) -> &'static str {
        self.label()
    }
}

impl Label for Kind {
    const NAME: &'static str = "kind";
    const ALL: &'static [Self] = &Kind::ALL;
    fn word(self) -> &'static str {
        self.label()
    }
}

/// What an offer carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OfferKind {
    /// Nothing but the acknowledgement.
    Acknowledgement,
    /// The request for full state.
    FullStateRequest,
    /// A new instance uid.
    Identification,
    /// An error.
    Error,
}

impl Label for OfferKind {
    const NAME: &'static str = "kind";
    const ALL: &'static [Self] =
        &[Self::Acknowledgement, Self::FullStateRequest, Self::Identification, Self::Error];
    fn word(self) -> &'static str {
        match self {
            Self::Acknowledgement => "acknowledgement",
            Self::FullStateRequest => "full_state_request",
            Self::Identification => "identification",
            Self::Error => "error",
        }
    }
}

/// Why a message could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeFailure {
    /// The WebSocket header was missing or not zero.
    Header,
    /// Not an `AgentToServer`.
    Protobuf,
    /// No valid instance uid.
    InstanceUid,
    /// A text message.
    Text,
    /// Broken WebSocket framing.
    Frame,
    /// Broken gzip.
    Gzip,
    /// Not whole in time, or broken off.
    Unfinished,
    /// More elements than any agent has.
    TooMany,
    /// Larger than the limit.
    TooLarge,
    /// The database refused the content.
    Refused,
}

impl Label for DecodeFailure {
    const NAME: &'static str = "cause";
    const ALL: &'static [Self] = &[
        Self::Header,
        Self::Protobuf,
        Self::InstanceUid,
        Self::Text,
        Self::Frame,
        Self::Gzip,
        Self::Unfinished,
        Self::TooMany,
        Self::TooLarge,
        Self::Refused,
    ];
    fn word(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::Protobuf => "protobuf",
            Self::InstanceUid => "instance_uid",
            Self::Text => "text",
            Self::Frame => "frame",
            Self::Gzip => "gzip",
            Self::Unfinished => "unfinished",
            Self::TooMany => "too_many",
            Self::TooLarge => "too_large",
            Self::Refused => "refused",
        }
    }
}

/// Why a link or a poll was not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No token, or a wrong one.
    Unauthorized,
    /// As many links as `agents.max_connections` allows.
    Connections,
    /// The server is stopping.
    Draining,
    /// The store is away.
    Store,
    /// As many in the last second as `agents.max_connects_per_second` allows.
    Rate,
    /// As many agents on the link as `agents.max_per_link` allows.
    PerLink,
    /// `agents.max_inflight`: no memory became free for the message in time.
    Memory,
    /// A page of another origin asked a browser to connect.
    ForeignOrigin,
    /// A browser says that another site is behind the request.
    CrossSite,
    /// Without token: the request is not for this machine by name.
    ForeignHost,
}

impl Label for Refused {
    const NAME: &'static str = "cause";
    const ALL: &'static [Self] = &[
        Self::Unauthorized,
        Self::Connections,
        Self::Draining,
        Self::Store,
        Self::Rate,
        Self::PerLink,
        Self::Memory,
        Self::ForeignOrigin,
        Self::CrossSite,
        Self::ForeignHost,
    ];
    fn word(self) -> &'static str {
        match self {
            Self::Unauthorized => "unauthorized",
            Self::Connections => "connections",
            Self::Draining => "draining",
            Self::Store => "store",
            Self::Rate => "rate",
            Self::PerLink => "per_link",
            Self::Memory => "memory",
            Self::ForeignOrigin => "foreign_origin",
            Self::CrossSite => "cross_site",
            Self::ForeignHost => "foreign_host",
        }
    }
}

/// What is kept for `retention.history`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Ended connections.
    Connections,
    /// Changes of status.
    Transitions,
    /// Retired agents without history.
    Agents,
}

impl Label for Kept {
    const NAME: &'static str = "kind";
    const ALL: &'static [Self] = &[Self::Connections, Self::Transitions, Self::Agents];
    fn word(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Transitions => "transitions",
            Self::Agents => "agents",
        }
    }
}

/// The direction of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From agents.
    Received,
    /// To agents.
    Sent,
}

impl Label for Direction {
    const NAME: &'static str = "direction";
    const ALL: &'static [Self] = &[Self::Received, Self::Sent];
    fn word(self) -> &'static str {
        match self {
            Self::Received => "received",
            Self::Sent => "sent",
        }
    }
}

/// The version of this binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version;

impl Label for Version {
    const NAME: &'static str = "version";
    const ALL: &'static [Self] = &[Self];
    fn word(self) -> &'static str {
        env!("CARGO_PKG_VERSION")
    }
}

/// One metric per value of a label.
#[derive(Debug)]
pub struct Family<L, M> {
    members: Vec<(L, M)>,
}

impl<L: Label, M> Family<L, M> {
    fn new(make: impl Fn(&'static str, &'static str) -> M) -> Self {
        Self { members: L::ALL.iter().map(|label| (*label, make(L::NAME, label.word()))).collect() }
    }

    /// The member for `label`.
    ///
    /// # Panics
    /// Never: every value of the closed list has a member.
    #[must_use]
    #[expect(clippy::expect_used, reason = "Label::ALL holds every value of the closed list")]
    pub fn of(&self, label: L) -> &M {
        self.members
            .iter()
            .find(|(member, _)| *member == label)
            .map(|(_, metric)| metric)
            .expect("a closed list")
    }
}

/// How each kind of metric is made.
trait Declare: Sized {
    fn declare(name: &'static str, help: &'static str) -> Self;
}

macro_rules! declare_kind {
    ($kind:ty, $describe:ident, $make:ident) => {
        impl Declare for $kind {
            fn declare(name: &'static str, help: &'static str) -> Self {
                metrics::$describe!(name, help);
                metrics::$make!(name)
            }
        }
        impl<L: Label> Declare for Family<L, $kind> {
            fn declare(name: &'static str, help: &'static str) -> Self {
                metrics::$describe!(name, help);
                Self::new(|label, word| metrics::$make!(name, label => word))
            }
        }
    };
}

declare_kind!(Counter, describe_counter, counter);
declare_kind!(Gauge, describe_gauge, gauge);
declare_kind!(Histogram, describe_histogram, histogram);

/// Declares the struct: each field a metric, its doc comment the help text.
macro_rules! metrics {
    ($( #[doc = $help:literal] $field:ident: $kind:ty = $name:literal; )*) => {
        /// Every metric of one server.
        #[derive(Debug)]
        pub struct Metrics {
            $( #[doc = $help] pub $field: $kind, )*
            process: Collector,
            recorder: Recorder,
        }

        impl Metrics {
            /// The names of all metrics declared here.
            pub const NAMES: &[&str] = &[$( $name, )*];

            fn declare(recorder: Recorder) -> Self {
                metrics::with_local_recorder(&recorder.0, || Self {
                    $( $field: Declare::declare($name, $help.trim_ascii()), )*
                    process: describe_process(),
                    recorder: recorder.clone(),
                })
            }
        }
    };
}

metrics! {
    /// Agents of the whole fleet with status online, as the store knows it.
    agents_online: Gauge = "opamp_agents_online_total";
    /// Agents of the whole fleet with status offline, as the store knows it.
    agents_offline: Gauge = "opamp_agents_offline_total";
    /// Agents of the whole fleet with status error, as the store knows it.
    agents_error: Gauge = "opamp_agents_error_total";
    /// Retired agents, as the store knows them.
    agents_retired: Gauge = "opamp_agents_retired_total";
    /// How long connections lasted, in seconds, counted when they end.
    connection_duration: Family<CloseReason, Histogram> = "opamp_agent_connection_duration_seconds";
    /// Agents that were not heard until their deadline.
    heartbeat_missed: Counter = "opamp_agent_heartbeat_missed_total";
    /// How late verdicts fell, in seconds after the deadline.
    verdict_delay: Histogram = "opamp_verdict_delay_seconds";
    /// Open connections that this node holds.
    connections_open: Family<Transport, Gauge> = "opamp_connections_open";
    /// Connections opened.
    connections_opened: Family<Transport, Counter> = "opamp_connections_opened_total";
    /// Connections ended.
    connections_ended: Family<CloseReason, Counter> = "opamp_connections_ended_total";
    /// Links open on this node: WebSockets, with or without agents on them.
    links_open: Gauge = "opamp_links_open";
    /// Reports received; mere signs of life are counted every `store.flush_interval`.
    reports: Family<Kind, Counter> = "opamp_reports_total";
    /// Offers sent; answers to mere signs of life are counted every `store.flush_interval`.
    offers: Family<OfferKind, Counter> = "opamp_offers_total";
    /// Bytes of links and polls, counted when a link ends and every `store.flush_interval`.
    bytes: Family<Direction, Counter> = "opamp_bytes_total";
    /// Messages that could not be read.
    decode_failures: Family<DecodeFailure, Counter> = "opamp_decode_failures_total";
    /// Links, polls and agents that were not admitted.
    refused: Family<Refused, Counter> = "opamp_refused_total";
    /// Tasks of single links that panicked.
    link_panics: Counter = "opamp_link_panics_total";
    /// Writes that shared one commit.
    store_batch_size: Histogram = "opamp_store_batch_size";
    /// How long one commit took, in seconds.
    store_commit: Histogram = "opamp_store_commit_seconds";
    /// Writes that wait for their commit.
    store_backlog: Gauge = "opamp_store_backlog";
    /// Failed calls to the store.
    store_failures: Counter = "opamp_store_failures_total";
    /// Signs of life stored.
    sightings: Counter = "opamp_sightings_stored_total";
    /// Agents that were found to share an instance uid with another, each pair once.
    clones: Counter = "opamp_clones_total";
    /// Seconds in which this server could not judge, because it was stopped, starved or without its store.
    blind_seconds: Counter = "opamp_blind_seconds_total";
    /// Rows that were deleted because they were older than `retention.history`.
    retention_deleted: Family<Kept, Counter> = "opamp_retention_deleted_total";
    /// Always 1; the label tells the version.
    build_info: Family<Version, Gauge> = "opamp_build_info";
}

/// The process's own metrics, by Prometheus' names: CPU, memory, files, start.
fn describe_process() -> Collector {
    let collector = Collector::default();
    collector.describe();
    collector
}

/// The recorder behind the metrics.
#[derive(Clone)]
struct Recorder(std::sync::Arc<PrometheusRecorder>, PrometheusHandle);

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Recorder")
    }
}

/// Buckets from a second to weeks.
const STAYS: [f64; 12] =
    [1.0, 10.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0, 43_200.0, 86_400.0, 259_200.0, 604_800.0, 2_592_000.0];
/// Buckets from a millisecond to ten seconds.
const DELAYS: [f64; 11] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5, 10.0];
/// Buckets for batch sizes.
const SIZES: [f64; 9] = [1.0, 4.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1_024.0, 2_048.0];

impl Metrics {
    /// All metrics of a new server.
    #[must_use]
    pub fn new() -> Self {
        let recorder = PrometheusBuilder::new();
        let buckets = [
            ("opamp_agent_connection_duration_seconds", &STAYS[..]),
            ("opamp_verdict_delay_seconds", &DELAYS[..]),
            ("opamp_store_commit_seconds", &DELAYS[..]),
            ("opamp_store_batch_size", &SIZES[..]),
        ];
        let recorder = buckets
            .into_iter()
            .try_fold(recorder, |recorder, (name, buckets)| {
                recorder.set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)
            })
            .unwrap_or_default()
            .build_recorder();
        let handle = recorder.handle();
        let metrics = Self::declare(Recorder(std::sync::Arc::new(recorder), handle));
        metrics.build_info.of(Version).set(1.0);
        metrics
    }

    /// Counts mere signs of life, and the acknowledgements that answered them.
    pub fn count_quiet(&self, reports: u32) {
        self.reports.of(Kind::Continued).increment(reports.into());
        self.offers.of(OfferKind::Acknowledgement).increment(reports.into());
    }

    /// Counts bytes received and sent.
    pub fn count_bytes(&self, (received, sent): (u64, u64)) {
        self.bytes.of(Direction::Received).increment(received);
        self.bytes.of(Direction::Sent).increment(sent);
    }

    /// Counts the end of a connection that lasted so many seconds.
    pub fn connection_ended(&self, reason: CloseReason, seconds: i64) {
        let seconds = u32::try_from(seconds).unwrap_or(u32::MAX);
        self.connections_ended.of(reason).increment(1);
        self.connection_duration.of(reason).record(f64::from(seconds));
    }

    /// The text of `/metrics`.
    #[must_use]
    pub fn render(&self) -> String {
        metrics::with_local_recorder(&self.recorder.0, || self.process.collect());
        self.recorder.1.run_upkeep();
        self.recorder.1.render()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_rendered_with_its_help_text() {
        let metrics = Metrics::new();
        for histogram in [&metrics.verdict_delay, &metrics.store_batch_size, &metrics.store_commit] {
            histogram.record(1.0);
        }
        for reason in CloseReason::ALL {
            metrics.connection_duration.of(reason).record(2.0);
        }
        let text = metrics.render();
        for name in ["process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"] {
            assert!(text.contains(&format!("\n{name} ")), "{name} in:\n{text}");
        }
        for name in Metrics::NAMES {
            assert!(text.contains(&format!("# HELP {name} ")), "{name} has no help in:\n{text}");
            assert!(
                text.contains(&format!("\n{name}")) || text.contains(&format!("{name}_bucket")),
                "{name}"
            );
        }
        assert!(
            text.contains("opamp_agent_connection_duration_seconds_bucket{reason=\"superseded\",le=\"10\"}")
        );
    }
}

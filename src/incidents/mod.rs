//! Incidents: disconnects that belong together, told apart from the coming and going of every day.
//!
//! Pure: an [`Observation`] is filled with connections and attributes, and answers [`Incident`]s; no
//! I/O, no clock, and the same answer for the same rows in any order.
//!
//! # Which moment counts
//!
//! `disconnected_at`, the last proof that an agent was connected. It is known of every end, it is
//! nearest to the cause, and it does not depend on who noticed: the agents of a crashed node left
//! when it crashed, not an hour later when it was started again. `disconnected_by`, the moment the
//! end was known, is told as [`Incident::known_by`] and decides nothing.
//!
//! # Which ends count
//!
//! Every end that cut an agent off: all that the agent's side caused, `server_shutdown`,
//! `server_lost` and `internal_error`. Not `superseded`, `uid_reassigned` and `uid_refused`, which
//! nobody suffered, and not what operators ordered connection by connection. Ends by
//! `server_shutdown` and `server_lost` are the server's own: no rack and no version explains them.
//!
//! # What is a burst
//!
//! Each value of each dimension (a subnet, a version, a node, …) is looked at by itself, because ten
//! agents of one rack are nothing among the whole fleet's noise and everything in their rack. Windows
//! of 1, 5 and 30 minutes slide over its disconnects. **Agents are counted, not disconnects**: who
//! leaves a hundred times is one agent. A window is a burst where so many different agents
//!
//! - are too many for chance: by Chernoff's bound of the Poisson tail against the usual rate, one
//!   false alarm in a thousand observations, shared among all windows of all values (Bonferroni),
//! - are at least [`LEAST_AGENTS`], and three times the usual: a day has its hours.
//!
//! The **usual rate** is a median over the whole observation, which begins before the span that is
//! asked for: an incident that lasts less than half of it does not raise its own measure. Of these the
//! largest: the median of such windows; for values whose windows are mostly empty, that of hours plus 0.7,
//! the highest rate whose median is still 0; and the value's share of what is usual for the fleet, because a
//! node that lived for an hour has no past of its own. Chance is measured against a busy hour, at most
//! twice the median, so that noon is no burst. Bursts of one value less than [`GAP`] apart are one.
//!
//! # Which cause
//!
//! Of all bursts of all values the one that is explained best becomes an incident: by the F-measure
//! of *precision* (the share that has this value of all agents that left above the usual then) and
//! *recall* (the share that left of the value's connected agents). Near ties go to the narrower cause.
//! Its disconnects are taken away, what overlaps is looked at again, and the next best follows, until
//! nothing significant is left. So a rack is a rack and not its zone, and ten racks at once are ten
//! incidents unless all of a zone left.
//!
//! A value explains only if half of its agents left, or if it is held by half of the burst and
//! markedly more often than by the fleet. What nine in ten agents share tells nobody apart: an
//! attribute never explains then, the one node or the one address of a fleet does if four in five of its
//! agents left. What remains is explained by its reason alone, or by nothing: the fleet.

mod burst;
mod explain;
mod observation;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use utoipa::ToSchema;

pub use observation::{End, Observation, Stay};

use crate::agent::InstanceUid;
use crate::clock::Moment;

/// The fewest agents that make an incident.
pub const LEAST_AGENTS: u32 = 5;

/// How many agents of an incident are listed.
pub const LISTED_AGENTS: usize = 100;

/// Bursts of one value that are less than this apart are one.
pub const GAP: Duration = Duration::from_mins(2);

/// Incidents of one cause that are less than this apart are one.
const SAME_INCIDENT: Duration = Duration::from_mins(10);

/// What agents have in common that left together; the narrower kind first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSchema)]
pub enum CauseKind {
    /// One peer address: a balancer, a NAT, a proxy, a host with many agents.
    #[serde(rename = "remote_address")]
    RemoteAddress,
    /// The attribute `host.name`.
    #[serde(rename = "host.name")]
    Host,
    /// The attribute `k8s.node.name`.
    #[serde(rename = "k8s.node.name")]
    KubernetesNode,
    /// One network of peer addresses: /24, with IPv6 /64.
    #[serde(rename = "remote_subnet")]
    RemoteSubnet,
    /// The attribute `host.rack`.
    #[serde(rename = "host.rack")]
    Rack,
    /// The attribute `service.version`.
    #[serde(rename = "service.version")]
    Version,
    /// The attribute `service.name`.
    #[serde(rename = "service.name")]
    Service,
    /// The attribute `k8s.cluster.name`.
    #[serde(rename = "k8s.cluster.name")]
    Cluster,
    /// The attribute `cloud.availability_zone`.
    #[serde(rename = "cloud.availability_zone")]
    Zone,
    /// The attribute `cloud.region`.
    #[serde(rename = "cloud.region")]
    Region,
    /// One process of the server, by its `node_id`.
    #[serde(rename = "node")]
    Node,
    /// Nothing but the reason.
    #[serde(rename = "reason")]
    Reason,
    /// Nothing at all.
    #[serde(rename = "fleet")]
    Fleet,
}

impl CauseKind {
    /// The kinds that are attributes of agents. Stores keep these apart from all others: a further one takes a migration.
    pub const ATTRIBUTES: [Self; 8] = [
        Self::Host,
        Self::KubernetesNode,
        Self::Rack,
        Self::Version,
        Self::Service,
        Self::Cluster,
        Self::Zone,
        Self::Region,
    ];

    /// The word used in the API; of an attribute, its key.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::RemoteAddress => "remote_address",
            Self::Host => "host.name",
            Self::KubernetesNode => "k8s.node.name",
            Self::RemoteSubnet => "remote_subnet",
            Self::Rack => "host.rack",
            Self::Version => "service.version",
            Self::Service => "service.name",
            Self::Cluster => "k8s.cluster.name",
            Self::Zone => "cloud.availability_zone",
            Self::Region => "cloud.region",
            Self::Node => "node",
            Self::Reason => "reason",
            Self::Fleet => "fleet",
        }
    }

    /// The attribute with this key.
    #[must_use]
    pub fn of_attribute(key: &str) -> Option<Self> {
        Self::ATTRIBUTES.into_iter().find(|kind| kind.label() == key)
    }

    /// True where an end that the server caused by itself may have this cause.
    const fn explains_the_server(self) -> bool {
        matches!(self, Self::Node | Self::Reason | Self::Fleet)
    }
}

/// What the agents of an incident have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Cause {
    /// In what they agree.
    #[schema(example = "remote_subnet")]
    pub kind: CauseKind,
    /// On what they agree; null where it is the whole fleet.
    #[schema(example = "10.4.7.0/24")]
    pub value: Option<String>,
    /// Where it is a node: its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
}

/// Disconnects with one cause.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Incident {
    /// What the agents have in common.
    pub cause: Cause,
    /// How many of the disconnects had which reason.
    #[schema(value_type = std::collections::BTreeMap<String, u32>, example = json!({"heartbeat_timeout": 38, "connection_lost": 2}))]
    pub reasons: BTreeMap<&'static str, u32>,
    /// The earliest `disconnected_at`: the last proof that the first of them was connected.
    #[schema(value_type = String, format = DateTime)]
    pub first: Moment,
    /// The latest `disconnected_at`.
    #[schema(value_type = String, format = DateTime)]
    pub last: Moment,
    /// When the last of these ends was known.
    #[schema(value_type = String, format = DateTime)]
    pub known_by: Moment,
    /// How many agents left, each counted once.
    #[schema(example = 40)]
    pub agents_count: u32,
    /// How often they left.
    #[schema(example = 40)]
    pub disconnects: u32,
    /// How many agents with this cause were connected when it began.
    #[schema(example = 40)]
    pub connected_before: u32,
    /// Of all agents that left above the usual between `first` and `last`, the share that these are: 0 to 1.
    #[schema(example = 0.98)]
    pub share_of_disconnects: f64,
    /// How many different agents with this cause leave per minute as a rule; at least 0.01.
    #[schema(example = 0.012)]
    pub usual_per_minute: f64,
    /// How many times as many left during the incident, counted over a minute at least.
    #[schema(example = 3428.6)]
    pub times_usual: f64,
    /// Those who left first, at most 100.
    #[schema(value_type = Vec<uuid::Uuid>)]
    pub agents: Vec<InstanceUid>,
}

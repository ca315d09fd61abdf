//! Generated days of a fleet: agents that come and go at random, and one storm with a known cause.

use super::*;

const DAY: f64 = 24.0 * 3_600.0;

/// How long the observation begins before the day.
const BEFORE: f64 = 6.0 * 3_600.0;

/// Agents in one rack, which has a subnet of its own.
const RACK: u32 = 40;

/// The moment `seconds` into the day.
fn at(seconds: f64) -> Moment {
    let micros = Duration::from_secs_f64(seconds + 1.0e9).as_micros();
    Moment::from_micros(i64::try_from(micros).unwrap())
}

/// When the day begins.
pub(super) fn morning() -> Moment {
    at(0.0)
}

/// What happens on a day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A rack falls silent.
    Rack,
    /// A few agents of a rack fall silent.
    PartOfARack,
    /// A zone is cut off.
    Zone,
    /// A version crashes again and again after it came to its agents.
    Version,
    /// What stands before some of the agents starts again.
    Balancer,
    /// Everybody is cut off at once.
    Everybody,
    /// Everybody is cut off, and what of it was seen differs.
    Partition,
    /// A process of the server dies.
    NodeLost,
    /// A process of the server is stopped.
    NodeStopped,
    /// Agents with nothing in common break the protocol.
    Anybody,
}

impl Kind {
    pub(super) const ALL: [Self; 10] = [
        Self::Rack,
        Self::PartOfARack,
        Self::Zone,
        Self::Version,
        Self::Balancer,
        Self::Everybody,
        Self::Partition,
        Self::NodeLost,
        Self::NodeStopped,
        Self::Anybody,
    ];
}

/// A fleet's size and manners.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    agents: u32,
    nodes: u8,
    /// How often an agent leaves by itself on a day.
    leaves_per_day: f64,
    /// The share of the racks whose agents come by one address.
    behind_balancer: f64,
    /// How much livelier noon is than midnight: 0 to 1.
    tide: f64,
}

impl Shape {
    pub(super) fn any(rng: &mut Rng, sizes: &[u32]) -> Self {
        let agents = sizes[rng.usize(..sizes.len())];
        // A large fleet at the highest rate is a million connections a day.
        let rates = if agents > 5_000 { &[0.2, 1.0, 4.0][..] } else { &[0.2, 1.0, 4.0, 20.0][..] };
        Self {
            agents,
            nodes: rng.u8(1..=3),
            leaves_per_day: rates[rng.usize(..rates.len())],
            behind_balancer: [0.0, 0.2, 0.5][rng.usize(..3)],
            tide: [0.0, 0.5][rng.usize(..2)],
        }
    }
}

/// Someone leaves, in seconds of the day, and stays away for a while.
#[derive(Clone, Copy, Debug)]
struct Leave {
    at: f64,
    away: f64,
    reason: CloseReason,
    /// The node it dials next.
    next: Option<u8>,
    /// True where the storm makes it leave.
    struck: bool,
}

struct Somebody {
    uid: InstanceUid,
    node: u8,
    address: String,
    rack: String,
    zone: String,
    version: &'static str,
    leaves: Vec<Leave>,
}

pub(super) struct Fleet {
    shape: Shape,
    agents: Vec<Somebody>,
    /// When a node starts, under a new id.
    starts: Vec<(u8, f64)>,
}

/// A time until something happens that happens `per_second`.
fn wait(rng: &mut Rng, per_second: f64) -> f64 {
    -(1.0 - rng.f64()).ln() / per_second
}

fn between(rng: &mut Rng, low: f64, high: f64) -> f64 {
    low + rng.f64() * (high - low)
}

impl Fleet {
    /// A fleet and its noise.
    pub(super) fn new(shape: Shape, rng: &mut Rng) -> Self {
        let agents = (0..shape.agents).map(|number| Somebody::new(number, shape, rng)).collect();
        Self { shape, agents, starts: Vec::new() }
    }

    /// The day as the store would have it on record, and how many agents the storm met.
    pub(super) fn observe(&mut self, rng: &mut Rng) -> (Observation, u32) {
        let mut met = 0;
        let mut observation = Observation::new(at(-BEFORE), at(DAY));
        for agent in &mut self.agents {
            agent.leaves.sort_by(|a, b| a.at.total_cmp(&b.at));
            let (mut since, mut node) = (-BEFORE - between(rng, 0.0, 1.0e6), agent.node);
            let mut stay = |since: f64, node: u8, left: Option<Leave>| {
                let process = self.starts.iter().filter(|(other, at)| *other == node && *at <= since).count();
                let id = u128::from(node) << 64 | u128::try_from(process).unwrap() | 1 << 100;
                observation.add_stay(Stay {
                    agent: agent.uid,
                    connected_at: at(since),
                    end: left.map(|left| End { at: at(left.at), known: at(left.at), reason: left.reason }),
                    node: Some(uuid::Uuid::from_u128(id)),
                    remote_addr: Some(&agent.address),
                });
            };
            let (mut over, mut struck) = (false, false);
            for leave in &agent.leaves {
                // Who is away cannot leave.
                if leave.at < since {
                    continue;
                }
                if leave.at >= DAY {
                    break;
                }
                stay(since, node, Some(*leave));
                struck |= leave.struck;
                since = leave.at + leave.away;
                node = leave.next.unwrap_or(node);
                over = since >= DAY;
            }
            if !over {
                stay(since, node, None);
            }
            met += u32::from(struck);
            observation.add_attribute(agent.uid, "host.rack", agent.rack.clone());
            observation.add_attribute(agent.uid, "cloud.availability_zone", agent.zone.clone());
            observation.add_attribute(agent.uid, "cloud.region", "eu-west-1".to_owned());
            observation.add_attribute(agent.uid, "service.name", "collector".to_owned());
            observation.add_attribute(agent.uid, "service.version", agent.version.to_owned());
        }
        (observation, met)
    }

    /// Adds a storm to the day; answers the causes by which it may be told.
    pub(super) fn strike(&mut self, kind: Kind, rng: &mut Rng) -> Vec<Cause> {
        let begins = between(rng, 600.0, DAY - 5_400.0);
        let nodes = self.shape.nodes;
        let struck = match kind {
            Kind::Rack | Kind::PartOfARack => self.rack(kind, rng),
            Kind::Zone => {
                let zone = self.pick(rng).zone.clone();
                let who = |agent: &Somebody| agent.zone == zone;
                self.struck(who, vec![cause(CauseKind::Zone, &zone)])
            }
            Kind::Version => {
                let version = ["2.0.0", "2.1.0-rc1"][rng.usize(..2)];
                let share = between(rng, 0.5, 1.0);
                let mut struck =
                    self.struck(|agent| agent.version == version, vec![cause(CauseKind::Version, version)]);
                struck.0.retain(|_| rng.f64() < share);
                struck
            }
            Kind::Balancer if self.agents.iter().any(|agent| agent.address.starts_with(BALANCER)) => {
                let address = vec![cause(CauseKind::RemoteAddress, BALANCER)];
                self.struck(|agent| agent.address.starts_with(BALANCER), address)
            }
            Kind::Balancer | Kind::Everybody => {
                let mut causes = vec![cause(CauseKind::Reason, "connection_lost")];
                if nodes == 1 {
                    causes = vec![cause(CauseKind::Node, &id(0))];
                }
                self.struck(|_| true, causes)
            }
            Kind::Partition => {
                let fleet = Cause { kind: CauseKind::Fleet, value: None, node_name: None };
                let causes = if nodes == 1 { cause(CauseKind::Node, &id(0)) } else { fleet };
                self.struck(|_| true, vec![causes])
            }
            Kind::NodeLost | Kind::NodeStopped => {
                let node = rng.u8(..nodes);
                self.starts.push((node, begins + 60.0));
                self.struck(|agent| agent.node == node, vec![cause(CauseKind::Node, &id(node))])
            }
            Kind::Anybody => {
                let all = u32::try_from(self.agents.len()).unwrap();
                let mut struck = self.struck(|_| true, vec![cause(CauseKind::Reason, "protocol_error")]);
                let share = between(rng, 20.0, 60.0) / f64::from(all);
                struck.0.retain(|_| rng.f64() < share);
                struck
            }
        };
        for place in &struck.0 {
            let agent = &mut self.agents[*place];
            agent.strike(kind, begins, nodes, rng);
        }
        struck.1
    }

    fn rack(&self, kind: Kind, rng: &mut Rng) -> (Vec<usize>, Vec<Cause>) {
        let rack = self.pick(rng).rack.clone();
        // Who comes by the balancer shows no subnet of its own.
        let mut causes = vec![cause(CauseKind::Rack, &rack)];
        let mut struck = self.struck(|agent| agent.rack == rack, Vec::new()).0;
        let number: u32 = rack.trim_start_matches("rack-").parse().unwrap();
        if kind == Kind::PartOfARack {
            struck.truncate(rng.usize(12..=24));
        }
        if !self.agents[struck[0]].address.starts_with(BALANCER) {
            causes
                .push(cause(CauseKind::RemoteSubnet, &format!("10.{}.{}.0/24", number / 250, number % 250)));
        }
        (struck, causes)
    }

    fn struck(&self, who: impl Fn(&Somebody) -> bool, causes: Vec<Cause>) -> (Vec<usize>, Vec<Cause>) {
        let places = self.agents.iter().enumerate().filter(|(_, agent)| who(agent)).map(|(place, _)| place);
        (places.collect(), causes)
    }

    fn pick(&self, rng: &mut Rng) -> &Somebody {
        &self.agents[rng.usize(..self.agents.len())]
    }
}

const BALANCER: &str = "172.16.0.9";

fn id(node: u8) -> String {
    uuid::Uuid::from_u128(u128::from(node) << 64 | 1 << 100).to_string()
}

fn cause(kind: CauseKind, value: &str) -> Cause {
    Cause { kind, value: Some(value.to_owned()), node_name: None }
}

impl Somebody {
    fn new(number: u32, shape: Shape, rng: &mut Rng) -> Self {
        let rack = number / RACK;
        let port = rng.u16(1_024..);
        let host = format!("10.{}.{}.{}:{port}", rack / 250, rack % 250, number % RACK + 1);
        let mut agent = Self {
            uid: InstanceUid::from_bytes(u128::from(number).to_be_bytes()),
            node: rng.u8(..shape.nodes),
            address: if f64::from(rack * 7 % 10) < shape.behind_balancer * 10.0 {
                format!("{BALANCER}:{port}")
            } else {
                host
            },
            rack: format!("rack-{rack}"),
            zone: format!("zone-{}", rack % 3),
            version: match rng.u8(..10) {
                0 => "2.1.0-rc1",
                1..=3 => "2.0.0",
                _ => "1.9.4",
            },
            leaves: Vec::new(),
        };
        let mut now = -BEFORE;
        while now < DAY {
            now += wait(rng, shape.leaves_per_day * (1.0 + shape.tide) / DAY);
            let noon = (now / DAY * std::f64::consts::TAU).cos();
            if rng.f64() * (1.0 + shape.tide) > 1.0 - shape.tide * noon {
                continue;
            }
            let long = rng.u8(..10) == 0;
            let away = wait(rng, if long { 1.0 / 7_200.0 } else { 1.0 / 60.0 });
            let reasons = [
                CloseReason::ConnectionLost,
                CloseReason::ConnectionLost,
                CloseReason::HeartbeatTimeout,
                CloseReason::AgentDisconnect,
                CloseReason::ClosedByAgent,
            ];
            let reason = reasons[rng.usize(..reasons.len())];
            agent.leaves.push(Leave { at: now, away, reason, next: None, struck: false });
        }
        agent
    }

    /// Is hit by the storm that begins at `begins`.
    fn strike(&mut self, kind: Kind, begins: f64, nodes: u8, rng: &mut Rng) {
        let elsewhere = |node: u8, rng: &mut Rng| (nodes > 1).then(|| (node + rng.u8(1..nodes)) % nodes);
        let leave = match kind {
            Kind::Rack | Kind::PartOfARack | Kind::Zone => {
                // Noticed by time-outs: the last proof is older by up to an interval of heartbeats.
                let lost = rng.u8(..10) == 0;
                let reason = if lost { CloseReason::ConnectionLost } else { CloseReason::HeartbeatTimeout };
                Leave {
                    at: begins + rng.f64() * 45.0,
                    away: between(rng, 60.0, 1_800.0),
                    reason,
                    next: None,
                    struck: true,
                }
            }
            Kind::Version => return self.crash(begins, rng),
            Kind::Balancer | Kind::Everybody => Leave {
                at: begins + rng.f64() * 5.0,
                away: between(rng, 1.0, 60.0),
                reason: CloseReason::ConnectionLost,
                next: None,
                struck: true,
            },
            Kind::Partition => {
                let lost = rng.bool();
                let reason = if lost { CloseReason::ConnectionLost } else { CloseReason::HeartbeatTimeout };
                let at = begins + rng.f64() * if lost { 5.0 } else { 30.0 };
                Leave { at, away: between(rng, 30.0, 120.0), reason, next: None, struck: true }
            }
            Kind::NodeLost => Leave {
                at: begins - rng.f64() * 30.0,
                away: between(rng, 100.0, 160.0),
                reason: CloseReason::ServerLost,
                next: elsewhere(self.node, rng),
                struck: true,
            },
            Kind::NodeStopped => Leave {
                at: begins + rng.f64() * 10.0,
                away: between(rng, 61.0, 120.0),
                reason: CloseReason::ServerShutdown,
                next: elsewhere(self.node, rng),
                struck: true,
            },
            Kind::Anybody => Leave {
                at: begins + rng.f64() * 20.0,
                away: between(rng, 5.0, 60.0),
                reason: CloseReason::ProtocolError,
                next: None,
                struck: true,
            },
        };
        self.leaves.push(leave);
    }

    /// Gets a version that crashes until it is taken back.
    fn crash(&mut self, begins: f64, rng: &mut Rng) {
        let mut at = begins + rng.f64() * 300.0;
        while at < begins + 1_200.0 {
            let away = between(rng, 2.0, 30.0);
            self.leaves.push(Leave {
                at,
                away,
                reason: CloseReason::ConnectionLost,
                next: None,
                struck: true,
            });
            at += away + between(rng, 30.0, 240.0);
        }
    }
}

//! What was observed: connections of a span and the attributes of their agents, kept compactly.
//!
//! A connection takes some 70 bytes; agents, addresses and values are held once and named by number.

use core::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::collections::HashMap;

use uuid::Uuid;

use super::CauseKind;
use crate::agent::InstanceUid;
use crate::clock::Moment;
use crate::close::CloseReason;

/// One connection.
#[derive(Clone, Copy, Debug)]
pub struct Stay<'a> {
    /// Whose.
    pub agent: InstanceUid,
    /// When it began.
    pub connected_at: Moment,
    /// How it ended; none where it did not end before the end of the observation.
    pub end: Option<End>,
    /// The process that held it.
    pub node: Option<Uuid>,
    /// Peer address and port.
    pub remote_addr: Option<&'a str>,
}

/// The end of a connection.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// The last proof that it was connected.
    pub at: Moment,
    /// When the end was known.
    pub known: Moment,
    /// Why.
    pub reason: CloseReason,
}

/// The number of an agent.
pub(super) type AgentNumber = u32;

/// The number of a value of a dimension.
pub(super) type ValueNumber = u32;

/// A connection as it is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kept {
    pub(super) agent: AgentNumber,
    pub(super) since: Moment,
    pub(super) end: Option<End>,
    /// Node, address, subnet.
    pub(super) values: [Option<ValueNumber>; 3],
}

impl Kept {
    /// The last moment of it; of an open one, the last that there is.
    pub(super) fn until(&self) -> Moment {
        self.end.map_or(Moment::from_micros(i64::MAX), |end| end.at)
    }

    /// True where its end cut an agent off, and a cause of `kind` may be why.
    pub(super) fn counts(&self, kind: CauseKind) -> bool {
        self.end.is_some_and(|end| match end.reason {
            CloseReason::AgentDisconnect
            | CloseReason::ClosedByAgent
            | CloseReason::ConnectionLost
            | CloseReason::HeartbeatTimeout
            | CloseReason::ProtocolError
            | CloseReason::MessageTooLarge
            | CloseReason::SlowReader
            | CloseReason::InternalError => true,
            CloseReason::ServerShutdown | CloseReason::ServerLost => kind.explains_the_server(),
            CloseReason::Superseded
            | CloseReason::UidReassigned
            | CloseReason::UidRefused
            | CloseReason::ReconnectRequested
            | CloseReason::Deleted
            | CloseReason::CredentialsRevoked => false,
        })
    }
}

/// The connections of a span, with what their agents have in common.
#[derive(Debug)]
pub struct Observation {
    pub(super) begins: Moment,
    pub(super) ends: Moment,
    pub(super) agents: Vec<InstanceUid>,
    numbers: HashMap<InstanceUid, AgentNumber>,
    pub(super) values: Vec<(CauseKind, String)>,
    places: HashMap<IpAddr, [Option<ValueNumber>; 2]>,
    subnets: HashMap<IpAddr, ValueNumber>,
    nodes: HashMap<Uuid, ValueNumber>,
    pub(super) node_names: HashMap<ValueNumber, String>,
    texts: HashMap<(CauseKind, String), ValueNumber>,
    /// The values of each agent's attributes.
    pub(super) attributes: Vec<Vec<ValueNumber>>,
    pub(super) stays: Vec<Kept>,
}

impl Observation {
    /// An observation of nothing yet, complete from `begins` up to `ends`, that moment excluded.
    #[must_use]
    pub fn new(begins: Moment, ends: Moment) -> Self {
        Self {
            begins,
            ends,
            agents: Vec::new(),
            numbers: HashMap::new(),
            values: Vec::new(),
            places: HashMap::new(),
            subnets: HashMap::new(),
            nodes: HashMap::new(),
            node_names: HashMap::new(),
            texts: HashMap::new(),
            attributes: Vec::new(),
            stays: Vec::new(),
        }
    }

    /// The moment from which it is complete.
    #[must_use]
    pub fn begins(&self) -> Moment {
        self.begins
    }

    /// Makes it begin later: what ended before was not read.
    pub fn begin_at(&mut self, begins: Moment) {
        self.begins = begins;
    }

    /// Adds a connection. Every one that ended within the observation belongs in it, and every one that was
    /// open at its end.
    pub fn add_stay(&mut self, stay: Stay<'_>) {
        let agent = self.number(stay.agent);
        let [address, subnet] = stay.remote_addr.and_then(address).map_or([None; 2], |ip| self.place(ip));
        let node = stay.node.map(|node| self.node(node));
        self.stays.push(Kept {
            agent,
            since: stay.connected_at,
            end: stay.end,
            values: [node, address, subnet],
        });
    }

    /// Adds an attribute of an agent that has a connection in it; of others, and what is none of
    /// [`CauseKind::ATTRIBUTES`], is left out.
    pub fn add_attribute(&mut self, agent: InstanceUid, key: &str, value: String) {
        let Some(kind) = CauseKind::of_attribute(key) else { return };
        let Some(agent) = self.numbers.get(&agent).copied() else { return };
        let values = &mut self.values;
        let number = *self.texts.entry((kind, value)).or_insert_with_key(|known| push(values, known.clone()));
        self.attributes[agent as usize].push(number);
    }

    /// Tells the name of a node; of one without connection it is left out.
    pub fn name_node(&mut self, node: Uuid, name: &str) {
        if let Some(number) = self.nodes.get(&node) {
            self.node_names.insert(*number, name.to_owned());
        }
    }

    fn number(&mut self, agent: InstanceUid) -> AgentNumber {
        *self.numbers.entry(agent).or_insert_with(|| {
            self.attributes.push(Vec::new());
            push(&mut self.agents, agent)
        })
    }

    fn node(&mut self, node: Uuid) -> ValueNumber {
        let values = &mut self.values;
        *self.nodes.entry(node).or_insert_with(|| push(values, (CauseKind::Node, node.to_string())))
    }

    fn place(&mut self, ip: IpAddr) -> [Option<ValueNumber>; 2] {
        let (values, subnets) = (&mut self.values, &mut self.subnets);
        *self.places.entry(ip).or_insert_with(|| {
            let address = push(values, (CauseKind::RemoteAddress, ip.to_string()));
            let (network, bits) = network(ip);
            let subnet = subnets
                .entry(network)
                .or_insert_with(|| push(values, (CauseKind::RemoteSubnet, format!("{network}/{bits}"))));
            [Some(address), Some(*subnet)]
        })
    }
}

/// Appends `item` and answers its number.
fn push<T>(list: &mut Vec<T>, item: T) -> u32 {
    let number = u32::try_from(list.len()).unwrap_or(u32::MAX);
    list.push(item);
    number
}

/// The address of a peer, without its port.
fn address(peer: &str) -> Option<IpAddr> {
    let peer: SocketAddr = peer.parse().ok()?;
    Some(peer.ip().to_canonical())
}

/// The network of an address and the length of its prefix: /24, with IPv6 /64.
fn network(ip: IpAddr) -> (IpAddr, u8) {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            (IpAddr::from([a, b, c, 0]), 24)
        }
        IpAddr::V6(ip) => (Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(), 64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_belongs_to_its_network() {
        let text = |peer: &str| address(peer).map(network).map(|(network, bits)| format!("{network}/{bits}"));
        assert_eq!(text("192.0.2.77:40001").as_deref(), Some("192.0.2.0/24"));
        assert_eq!(text("[::ffff:192.0.2.77]:1").as_deref(), Some("192.0.2.0/24"));
        assert_eq!(text("[2001:db8:1:2:3:4:5:6]:1").as_deref(), Some("2001:db8:1:2::/64"));
        assert_eq!(text("somewhere"), None);
    }
}

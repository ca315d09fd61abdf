//! Some days of a fleet, lived through by the store's real calls: agents come, leave, fall silent and poll, nodes crash
//! and return, and history is forgotten. The seed decides everything.

use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use opamp_server::agent::InstanceUid;
use opamp_server::clock::Moment;
use opamp_server::close::CloseReason;
use opamp_server::config::Ephemeral;
use opamp_server::store::{ConnectionEnd, Heir, Sighting, Store};
use uuid::Uuid;

use super::record::{End, Fact, Life, Record};
use crate::harness::Kind;
use crate::store::scene::{
    Node, POLL_DEADLINE, RETURN_TIME, create, delete, end as end_connection, new_node, uid,
};

/// How many agents there are; every fourth of them polls.
const AGENTS: u32 = 24;

/// How long the fleet lives.
pub(super) const DAYS: Duration = Duration::from_hours(48);

/// The mean time from one event to the next.
const PACE: u64 = 80_000;

/// How long an agent may be offline before it is stale.
const STALE_AFTER: Duration = Duration::from_mins(10);

/// The fleet, its store and what happened.
pub(super) struct Days {
    store: Arc<dyn Store>,
    single: bool,
    rng: Rng,
    pub(super) record: Record,
    nodes: Vec<Node>,
    now: Moment,
    pub(super) begun: Moment,
    /// The name under which the last node ran.
    pub(super) last_name: String,
}

impl Days {
    /// Lives through them; they end before the present, however long nobody is there in the end.
    pub(super) async fn live(store: Arc<dyn Store>, kind: Kind, seed: u64) -> Self {
        let now = store.now().await.expect("the store answers").before(DAYS + Duration::from_hours(3));
        // Answers tell milliseconds.
        let begun = Moment::from_micros(now.as_micros() / 1_000 * 1_000);
        let agents = (0..AGENTS).map(uid).collect();
        let record = Record { agents, ..Record::default() };
        let (single, rng) = (kind == Kind::Sqlite, Rng::with_seed(seed));
        let mut days = Self {
            store,
            single,
            rng,
            record,
            nodes: Vec::new(),
            now: begun,
            begun,
            last_name: String::new(),
        };
        let end = begun.after(DAYS);
        let mut forgotten = 0;
        while days.now < end {
            days.pass(1, PACE * 2);
            days.event().await;
            // A third through and half through.
            let part = usize::try_from(days.now.since(begun).as_secs() * 6 / DAYS.as_secs()).unwrap_or(0);
            if [2, 3].contains(&part) && forgotten + 1 < part {
                forgotten = part - 1;
                days.forget().await;
            }
        }
        days.last_name = days.finish().await;
        days
    }

    /// The first moment after them.
    pub(super) fn end(&self) -> Moment {
        self.now
    }

    fn pass(&mut self, least: u64, most: u64) {
        self.now = self.now.after(Duration::from_millis(self.rng.u64(least..=most)));
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.rng.u32(0..100) < percent
    }

    async fn event(&mut self) {
        if self.nodes.is_empty() {
            // Now and then nobody is there for hours.
            let gap = if self.chance(10) { 7_200_000 } else { 600_000 };
            self.pass(1_000, gap);
            return self.start().await;
        }
        if self.chance(60) {
            self.renew().await;
        }
        match self.rng.u32(0..100) {
            0..50 => {
                let agent = uid(self.rng.u32(0..AGENTS));
                self.agent_acts(agent).await;
            }
            50..80 => self.flush().await,
            80..86 => self.judge().await,
            86..89 => self.crash(),
            89..91 => self.stop().await,
            91..95 if !self.single => self.start().await,
            95..98 if !self.single => self.bury().await,
            _ => {
                let agent = uid(self.rng.u32(0..AGENTS));
                let deleted = delete(&self.store, agent, self.now, false).await;
                for change in &deleted.changes {
                    self.record.changed(change, self.now);
                }
            }
        }
    }

    fn some_node(&mut self) -> usize {
        self.rng.usize(0..self.nodes.len())
    }

    async fn agent_acts(&mut self, agent: InstanceUid) {
        let polls = agent.as_uuid().as_u128().is_multiple_of(4);
        let open = self.record.open_of(agent).cloned();
        match open {
            _ if polls => self.polls(agent).await,
            None => self.arrives(agent, false).await,
            // It came to a node that has crashed since; it comes again.
            Some(fact) if !self.nodes.iter().any(|node| node.id == fact.node) => {
                self.arrives(agent, false).await;
            }
            Some(fact) if fact.truly_over.is_some() => {
                if self.chance(50) {
                    let (reason, word) = (CloseReason::HeartbeatTimeout, "heartbeat_timeout");
                    self.ends(
                        fact.clone(),
                        reason,
                        word,
                        End { at: fact.proof, by: Some(self.now), reason: word },
                    )
                    .await;
                } else {
                    self.arrives(agent, false).await;
                }
            }
            Some(fact) => match self.rng.u32(0..100) {
                0..35 => {
                    let (reason, word) = match self.rng.u32(0..4) {
                        0 => (CloseReason::ClosedByAgent, "closed_by_agent"),
                        1 => (CloseReason::ConnectionLost, "connection_lost"),
                        2 => (CloseReason::AgentDisconnect, "agent_disconnect"),
                        _ => (CloseReason::ReconnectRequested, "reconnect_requested"),
                    };
                    self.ends(fact, reason, word, End { at: self.now, by: None, reason: word }).await;
                }
                // It falls silent, and nobody knows yet.
                35..60 => {
                    let now = self.now;
                    self.record.open_of(agent).expect("it is open").truly_over = Some(now);
                }
                60..75 => self.arrives(agent, false).await,
                _ => {}
            },
        }
    }

    /// It polls some times in a row, and maybe says good-bye.
    async fn polls(&mut self, agent: InstanceUid) {
        for _ in 0..self.rng.u32(1..6) {
            self.arrives(agent, true).await;
            self.pass(10_000, 70_000);
        }
        if self.chance(30) {
            let fact = self.record.open_of(agent).expect("it polls").clone();
            let word = "agent_disconnect";
            let end = End { at: self.now, by: None, reason: word };
            self.ends(fact, CloseReason::AgentDisconnect, word, end).await;
        }
    }

    async fn arrives(&mut self, agent: InstanceUid, polls: bool) {
        let (now, node) = (self.now, self.some_node());
        let node = &self.nodes[node];
        let new = if polls { node.poll(agent, now) } else { node.arrival(agent, now) };
        let node = node.id;
        let opened = create(&self.store, new).await;
        let gone: Vec<Uuid> =
            self.record.lives.iter().filter(|life| life.marked).map(|life| life.id).collect();
        if let Some(fact) = self.record.open_of(agent) {
            if polls && now <= fact.proof.after(POLL_DEADLINE) {
                assert!(opened.continued, "a poll in time goes on");
                fact.proof = now;
                return;
            }
            let reason = match polls {
                true => "heartbeat_timeout",
                false if gone.contains(&fact.node) => "server_lost",
                false => "superseded",
            };
            fact.end = Some(End { at: fact.proof, by: Some(now), reason });
            fact.truly_over.get_or_insert(now);
        }
        if let Some(change) = &opened.status {
            self.record.changed(change, now);
        }
        self.record.facts.push(Fact {
            agent,
            id: opened.connection_id,
            polls,
            node,
            begun: now,
            proof: now,
            end: None,
            truly_over: None,
            forgotten: false,
        });
    }

    async fn ends(&mut self, fact: Fact, reason: CloseReason, word: &'static str, end: End) {
        let (node, now) = (self.some_node(), self.now);
        let node = if fact.polls { self.nodes[node].id } else { fact.node };
        let told = ConnectionEnd {
            agent: fact.agent,
            connection_id: fact.id,
            reason,
            disconnected_at: end.at,
            disconnected_by: end.by,
            last_seen_at: end.at,
            sequence_num: None,
            unsaved: false,
            offline_at: (word == "reconnect_requested").then(|| now.after(RETURN_TIME)),
            unless_seen_after: None,
            node_id: node,
        };
        let ended = end_connection(&self.store, told).await;
        assert!(ended.duration_seconds.is_some(), "it was open");
        let known = self.record.open_of(fact.agent).expect("it is open");
        known.truly_over.get_or_insert(end.at);
        known.end = Some(end);
        if let Some(change) = &ended.status {
            self.record.changed(change, now);
        }
    }

    /// Signs of life of some of those who are heard are stored.
    async fn flush(&mut self) {
        let (now, mut sightings) = (self.now, Vec::new());
        for fact in &mut self.record.facts {
            let heard = fact.end.is_none() && fact.truly_over.is_none() && !fact.polls;
            if heard && self.nodes.iter().any(|node| node.id == fact.node) && self.rng.bool() {
                fact.proof = now;
                let (agent, connection_id) = (fact.agent, fact.id);
                sightings.push(Sighting {
                    agent,
                    connection_id,
                    at: now,
                    sequence_num: None,
                    poll_silence: None,
                });
            }
        }
        let stored = self.store.update_last_seen(&sightings).await.expect("the store answers");
        assert_eq!(stored, sightings.len() as u64);
    }

    async fn renew(&mut self) {
        for node in &self.nodes {
            assert_eq!(self.store.renew_node(node.id, self.now).await, Ok(true));
            self.record.life(node.id).renewed = self.now;
        }
    }

    /// What time alone changes.
    async fn judge(&mut self) {
        let overdue = self.store.update_overdue_status(self.now).await.expect("the store answers");
        let stale = self.store.retire_stale_agents(self.now, STALE_AFTER, Ephemeral::None).await;
        for change in overdue.iter().chain(&stale.expect("the store answers")) {
            self.record.changed(change, self.now);
        }
    }

    /// A process is gone from one moment to the next, and every link it held.
    fn crash(&mut self) {
        let node = self.some_node();
        let node = self.nodes.swap_remove(node);
        self.record.life(node.id).runs = false;
        for fact in self.record.facts.iter_mut().filter(|fact| fact.node == node.id && fact.end.is_none()) {
            fact.truly_over.get_or_insert(self.now);
        }
    }

    /// A node stops in an orderly way.
    async fn stop(&mut self) {
        let node = self.some_node();
        let node = self.nodes.swap_remove(node);
        let held = |fact: &&Fact| fact.node == node.id && fact.end.is_none() && !fact.polls;
        let held: Vec<Fact> = self.record.facts.iter().filter(held).cloned().collect();
        for fact in held {
            let mut told = ConnectionEnd {
                agent: fact.agent,
                connection_id: fact.id,
                reason: CloseReason::ServerShutdown,
                disconnected_at: self.now,
                disconnected_by: None,
                last_seen_at: self.now,
                sequence_num: None,
                unsaved: false,
                offline_at: Some(self.now.after(RETURN_TIME)),
                unless_seen_after: None,
                node_id: node.id,
            };
            let mut end = End { at: self.now, by: None, reason: "server_shutdown" };
            if fact.truly_over.is_some() {
                (told.disconnected_at, told.disconnected_by) = (fact.proof, Some(self.now));
                end = End { at: fact.proof, by: Some(self.now), ..end };
            }
            end_connection(&self.store, told).await;
            let known = self.record.open_of(fact.agent).expect("it is open");
            known.truly_over.get_or_insert(self.now);
            known.end = Some(end);
        }
        self.store.end_node(node.id, self.now).await.expect("the store answers");
        let life = self.record.life(node.id);
        (life.renewed, life.runs, life.marked) = (self.now, false, true);
    }

    /// A node starts, under a name whose holder is gone.
    async fn start(&mut self) {
        let held = |name: &str| self.record.lives.iter().any(|life| life.runs && life.name == name);
        let Some(name) = ["a", "b"].into_iter().find(|name| !held(name)) else { return };
        let new = new_node(name, self.now);
        let id = new.id;
        let (node, found) = Node::start_as(&self.store, new).await;
        self.record_start(id, name, self.now, found.alone);
        self.nodes.push(node);
    }

    /// A node started: what its predecessors left is over, and, where it is alone, polls that stopped.
    fn record_start(&mut self, id: Uuid, name: &str, at: Moment, alone: bool) {
        let life = Life { id, name: name.to_owned(), from: at, renewed: at, runs: true, marked: false };
        let gone: Vec<Uuid> = self
            .record
            .lives
            .iter()
            .filter(|life| !life.marked && (self.single || life.name == name))
            .map(|life| life.id)
            .collect();
        for node in gone {
            self.record.lost(node, at);
        }
        assert_eq!(alone, self.record.lives.iter().all(|life| life.marked), "who is alone");
        self.record.lives.push(life);
        let stopped =
            |fact: &&mut Fact| fact.polls && fact.end.is_none() && fact.proof.after(POLL_DEADLINE) < at;
        for fact in self.record.facts.iter_mut().filter(stopped).filter(|_| alone) {
            fact.end = Some(End { at: fact.proof, by: Some(at), reason: "server_lost" });
        }
    }

    /// A living node finds that another is gone.
    async fn bury(&mut self) {
        let node = self.some_node();
        let heir = Heir {
            node: self.nodes[node].id,
            at: self.now,
            return_time: RETURN_TIME,
            first_poll: POLL_DEADLINE,
        };
        let peers = self.store.list_peers(heir.node).await.expect("the store answers");
        let Some(lost) = peers.iter().find(|peer| !self.nodes.iter().any(|node| node.id == peer.id)) else {
            return;
        };
        let ended = self.store.end_lost_node(lost, &heir).await.expect("the store answers");
        assert!(ended.is_some(), "it was not ended before");
        self.record.lost(lost.id, self.now);
    }

    async fn forget(&mut self) {
        let before = self.now.before(Duration::from_hours(14));
        let mut gone = 0;
        loop {
            let forgotten = self.store.forget(before).await.expect("the store answers");
            gone += forgotten.connections;
            if !forgotten.may_be_more() {
                break;
            }
        }
        assert!(gone > 0, "there was something to forget");
        assert_eq!(gone, self.record.forget(before), "what is past its time, and nothing else");
    }

    /// The last node crashes, and nobody has found out yet; answers its name.
    async fn finish(&mut self) -> String {
        if self.nodes.is_empty() {
            self.start().await;
        }
        while self.nodes.len() > 1 {
            self.stop().await;
        }
        self.pass(1, PACE);
        while !self.single && self.record.lives.iter().any(|life| !life.marked && !life.runs) {
            self.bury().await;
        }
        let name = self.record.life(self.nodes[0].id).name.clone();
        self.crash();
        self.pass(1_000, PACE);
        name
    }

    /// A server was started on what they left behind.
    pub(super) fn restarted(&mut self, id: Uuid, at: Moment) {
        let name = self.last_name.clone();
        self.record_start(id, &name, at, true);
    }
}

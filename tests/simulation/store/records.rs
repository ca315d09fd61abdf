//! What the database holds, and what each write makes of it: the contract in its simplest form.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use opamp_server::agent::document::Documents;
use opamp_server::agent::report::{KnownAgent, Part, PartSet};
use opamp_server::agent::{Capabilities, InstanceUid};
use opamp_server::clock::Moment;
use opamp_server::close::CloseReason;
use opamp_server::store::{
    AgentUpdate, ConnectionEnd, Displaced, Ended, Heir, Held, NewConnection, NewNode, NodeStart, Opened,
    Peer, Rival, Sighting, Status, StatusChange, Transport, Write, Written,
};
use uuid::Uuid;

use crate::truth::Marks;

/// How long after its displacement an agent may return for its uid to count as shared.
const RIVALRY: Duration = Duration::from_mins(1);

/// Numbers as near as this may be those of one agent whose connections arrive out of order.
const NEAR: u64 = 8;

/// After so many returns in a row near numbers are no accident.
const TOO_OFTEN: u32 = 2;

/// An agent's record.
#[derive(Clone, Debug)]
pub(crate) struct Agent {
    pub(crate) status: Status,
    pub(crate) offline_at: Option<Moment>,
    stale_from: Option<Moment>,
    pub(crate) retired_at: Option<Moment>,
    /// The fence.
    pub(crate) connection: Option<i64>,
    pub(crate) previous: Option<InstanceUid>,
    displaced: Option<(Moment, Option<u64>)>,
    swaps: u32,
    rival: Option<(InstanceUid, u32)>,
    pub(crate) last_connected_at: Option<Moment>,
    pub(crate) last_disconnected_at: Option<Moment>,
    pub(crate) reason: Option<CloseReason>,
    pub(crate) updated_at: Moment,
    ephemeral: bool,
    capabilities: Capabilities,
    parts: PartSet,
    pub(crate) marks: Marks,
    pub(crate) seen: Option<Seen>,
    order: Option<(i64, CloseReason)>,
    /// Its connections, the oldest first.
    pub(crate) rows: Vec<i64>,
    pub(crate) log: Vec<(Moment, StatusChange)>,
}

/// Its liveness.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    connection: i64,
    pub(crate) at: Moment,
    pub(crate) number: Option<u64>,
    silence: Option<Duration>,
}

/// A row of the history.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) id: i64,
    pub(crate) agent: InstanceUid,
    pub(crate) transport: Transport,
    pub(crate) remote_addr: String,
    /// None for polls.
    pub(crate) node: Option<Uuid>,
    pub(crate) seq: i64,
    pub(crate) connected_at: Moment,
    pub(crate) created_at: Moment,
    pub(crate) end: Option<RowEnd>,
}

/// Its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowEnd {
    pub(crate) at: Moment,
    pub(crate) by: Option<Moment>,
    pub(crate) reason: CloseReason,
    pub(crate) ended_by: EndedBy,
}

/// Who ended a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EndedBy {
    /// A process that held it.
    Holder,
    /// A newcomer at the process that held it.
    NewcomerThere,
    /// A newcomer at another process.
    NewcomerElsewhere,
    /// A node that found it without an owner.
    Finder,
}

impl RowEnd {
    /// By when it was known.
    pub(crate) fn known(&self) -> Moment {
        self.by.unwrap_or(self.at)
    }
}

/// A node.
#[derive(Clone, Debug)]
pub(crate) struct NodeRow {
    pub(crate) id: Uuid,
    name: String,
    pub(crate) renewed_at: Moment,
    lease: Duration,
    pub(crate) ended_at: Option<Moment>,
    ended_by: Option<Uuid>,
}

/// Everything on record.
#[derive(Clone, Debug, Default)]
pub(crate) struct Records {
    pub(crate) agents: BTreeMap<InstanceUid, Agent>,
    rows: Vec<Row>,
    pub(crate) nodes: Vec<NodeRow>,
    /// Agents that were written since somebody looked.
    pub(crate) touched: BTreeSet<InstanceUid>,
}

impl Agent {
    fn new(at: Moment, status: Status) -> Self {
        Self {
            status,
            offline_at: None,
            stale_from: None,
            retired_at: None,
            connection: None,
            previous: None,
            displaced: None,
            swaps: 0,
            rival: None,
            last_connected_at: None,
            last_disconnected_at: None,
            reason: None,
            updated_at: at,
            ephemeral: false,
            capabilities: Capabilities(0),
            parts: PartSet::EMPTY,
            marks: Marks::default(),
            seen: None,
            order: None,
            rows: Vec::new(),
            log: Vec::new(),
        }
    }

    fn number(&self) -> Option<u64> {
        self.seen.and_then(|seen| seen.number)
    }

    fn known(&self) -> KnownAgent {
        KnownAgent {
            known: self.last_connected_at.is_some(),
            sequence_num: self.number(),
            capabilities: self.capabilities,
            parts: self.parts,
        }
    }

    /// Takes over what was reported.
    fn adopt(&mut self, capabilities: Capabilities, documents: &Documents) {
        let described = documents.description.as_ref();
        let parts = [
            (Part::Description, described.map(|described| &described.document)),
            (Part::Health, documents.health.as_ref()),
            (Part::EffectiveConfig, documents.effective_config.as_ref()),
        ];
        for ((part, document), mark) in parts.into_iter().zip(&mut self.marks) {
            if let Some(document) = document {
                self.parts = self.parts.with(part);
                *mark = mark_in(document.text());
            }
        }
        if let Some(described) = described {
            self.ephemeral = described.ephemeral;
        }
        self.capabilities = capabilities;
    }

    /// Changes the status and logs that, where it is another one.
    fn turn(
        &mut self,
        agent: InstanceUid,
        to: Status,
        at: Moment,
        reason: &str,
        connection_id: Option<i64>,
    ) -> Option<StatusChange> {
        let first = to == Status::Online && self.last_connected_at.is_none();
        if self.status == to && !first {
            return None;
        }
        let from = (!first).then_some(self.status);
        let change = StatusChange { agent, from, to, reason: reason.to_owned(), connection_id };
        self.status = to;
        self.log.push((at, change.clone()));
        Some(change)
    }
}

impl Records {
    pub(crate) fn row(&self, id: i64) -> Option<&Row> {
        self.rows.get(usize::try_from(id - 1).ok()?)
    }

    fn row_mut(&mut self, id: i64) -> Option<&mut Row> {
        self.rows.get_mut(usize::try_from(id - 1).ok()?)
    }

    pub(crate) fn all_rows(&self) -> &[Row] {
        &self.rows
    }

    /// The open row of an agent.
    pub(crate) fn open_row(&self, agent: InstanceUid) -> Option<&Row> {
        let rows = &self.agents.get(&agent)?.rows;
        rows.iter().rev().filter_map(|id| self.row(*id)).find(|row| row.end.is_none())
    }

    /// True where a node is marked as ended, or did not renew for a whole lease.
    pub(crate) fn is_lost(&self, node: Uuid, now: Moment) -> bool {
        self.nodes
            .iter()
            .any(|row| row.id == node && (row.ended_at.is_some() || now.since(row.renewed_at) > row.lease))
    }

    /// True where another node ended this one.
    pub(crate) fn was_taken_for_lost(&self, node: Uuid) -> bool {
        self.nodes.iter().any(|row| row.id == node && row.ended_by.is_some())
    }

    fn is_gone(&self, node: Option<Uuid>) -> bool {
        self.nodes.iter().any(|row| Some(row.id) == node && row.ended_at.is_some())
    }

    /// Ends a row, not before it began.
    fn end_row(
        &mut self,
        id: i64,
        ended_by: EndedBy,
        reason: CloseReason,
        at: Moment,
        by: Option<Moment>,
    ) -> Option<RowEnd> {
        let row = self.row_mut(id)?;
        let at = at.max(row.connected_at);
        let end = RowEnd { at, by: by.map(|by| by.max(at)), reason, ended_by };
        row.end = Some(end);
        Some(end)
    }

    fn seconds(&self, id: i64) -> i64 {
        let length = self.row(id).and_then(|row| Some(row.end?.at.since(row.connected_at)));
        length.map_or(0, |length| i64::try_from(length.as_secs()).unwrap_or(i64::MAX))
    }

    pub(crate) fn write(&mut self, batch: &[Write]) -> Vec<Written> {
        let mut answers: Vec<(usize, Written)> = Vec::new();
        for stage in 0..3 {
            for (index, write) in batch.iter().enumerate().filter(|(_, write)| write.stage() == stage) {
                self.touched.insert(write.agent());
                let answer = match write {
                    Write::UpdateAgent(update) => Written::Agent(self.update(update)),
                    Write::UpdateConnection(end) => Written::Connection(self.end(end)),
                    Write::CreateConnection(new) => self.create(new),
                };
                answers.push((index, answer));
            }
        }
        answers.sort_by_key(|(index, _)| *index);
        answers.into_iter().map(|(_, answer)| answer).collect()
    }

    fn update(&mut self, update: &AgentUpdate) -> bool {
        let Some(agent) = self.agents.get_mut(&update.agent) else { return false };
        if agent.connection != Some(update.connection_id)
            || update.late && agent.seen.as_ref().is_some_and(|seen| seen.at > update.read_at)
        {
            return false;
        }
        agent.adopt(update.capabilities, &update.documents);
        agent.updated_at = agent.updated_at.max(update.at);
        if let Some(seen) = &mut agent.seen {
            seen.at = seen.at.max(update.at);
            seen.number = update.sequence_num;
        }
        true
    }

    fn end(&mut self, end: &ConnectionEnd) -> Ended {
        let open = self.row(end.connection_id).is_some_and(|row| row.end.is_none());
        let seen = self.agents.get(&end.agent).and_then(|agent| agent.seen).map(|seen| seen.at);
        if !open || end.unless_seen_after.is_some_and(|limit| seen > Some(limit)) {
            return Ended::default();
        }
        let (id, by) = (end.connection_id, end.disconnected_by);
        let polls = self.row(id).is_some_and(|row| row.transport == Transport::Http);
        // Another node may have heard a poller later than the one that ends it.
        let at = match (by, seen) {
            (Some(by), Some(seen)) if polls => end.disconnected_at.max(seen.min(by)),
            _ => end.disconnected_at,
        };
        let Some(decided) = self.end_row(id, EndedBy::Holder, end.reason, at, by) else {
            return Ended::default();
        };
        let duration_seconds = Some(self.seconds(end.connection_id));
        let Some(agent) = self.agents.get_mut(&end.agent) else { return Ended::default() };
        if agent.connection != Some(end.connection_id) {
            return Ended { duration_seconds, status: None };
        }
        let deleted = agent.order == Some((end.connection_id, CloseReason::Deleted));
        let to = if deleted || matches!(end.reason, CloseReason::UidReassigned | CloseReason::Deleted) {
            Status::Retired
        } else if end.offline_at.is_none() {
            Status::Offline
        } else {
            agent.status
        };
        let at = decided.known();
        let reason = if deleted { CloseReason::Deleted } else { end.reason };
        let status = agent.turn(end.agent, to, at, reason.label(), Some(end.connection_id));
        agent.connection = None;
        agent.order = None;
        agent.offline_at = end.offline_at.filter(|_| to == Status::Online);
        agent.stale_from = (to == Status::Offline).then_some(at);
        agent.retired_at = (to == Status::Retired).then_some(at);
        agent.last_disconnected_at = Some(decided.at);
        agent.reason = Some(end.reason);
        agent.updated_at = agent.updated_at.max(at);
        if let Some(seen) = &mut agent.seen {
            seen.at = seen.at.max(end.last_seen_at);
            if !end.unsaved {
                seen.number = end.sequence_num;
            }
        }
        Ended { duration_seconds, status }
    }

    fn create(&mut self, new: &NewConnection) -> Written {
        let agent = self.agents.entry(new.agent).or_insert_with(|| Agent::new(new.at, Status::Online));
        let mut agent = agent.clone();
        let open = self.open_row(new.agent).cloned();
        let came = agent.updated_at.max(new.at);
        let mut at = came.max(agent.seen.map(|seen| seen.at).unwrap_or_default());
        let again = open.as_ref().is_some_and(|row| is_again(row, new));
        let held = new.older.filter(|older| open.as_ref().is_some_and(|row| row.id == older.connection_id));
        let present = held.map_or(agent.number(), |older| older.number);
        let returns = agent.displaced.is_some_and(|(when, number)| {
            came.since(when) <= RIVALRY && number.is_some_and(|number| number.wrapping_add(1) == new.number)
        });
        if let (Some(spare), true, true, false) = (new.spare, open.is_some(), returns, again)
            && is_another(&agent, present)
        {
            let (uid, offers) = agent.rival.unwrap_or((spare, 0));
            agent.displaced = Some((new.at, Some(new.number)));
            agent.rival = Some((uid, offers + 1));
            self.agents.insert(new.agent, agent);
            return Written::Rival(Rival { uid, offers: offers + 1 });
        }
        let swaps = if returns { agent.swaps.saturating_add(1) } else { 0 };
        let mut displaced = None;
        let mut continues = None;
        if let Some(row) = &open {
            let polls = row.transport == Transport::Http && new.transport == Transport::Http;
            let last_proof = new
                .older
                .filter(|older| polls && older.transport == Transport::Http)
                .or(held)
                .map(|older| older.last_proof);
            let proof = agent.seen.map(|seen| seen.at).max(last_proof).unwrap_or(row.connected_at).min(at);
            let silence = agent.seen.and_then(|seen| seen.silence).or(new.first_poll).unwrap_or_default();
            let deadline = proof.after(silence + new.poll_grace).max(new.excused_until.unwrap_or_default());
            if again || polls && deadline >= at {
                continues = Some(row.id);
            } else {
                let reason = if polls {
                    CloseReason::HeartbeatTimeout
                } else if self.is_gone(row.node) {
                    CloseReason::ServerLost
                } else {
                    CloseReason::Superseded
                };
                let by = if held.is_some() { EndedBy::NewcomerThere } else { EndedBy::NewcomerElsewhere };
                displaced = self.end_row(row.id, by, reason, proof, Some(at)).map(|end| (row.id, end));
            }
        }
        at = displaced.map_or(at, |(_, end)| at.max(end.at));
        let id = continues.unwrap_or_else(|| self.insert_row(new, at));
        let known = agent.known();
        let first = new.first_report.as_deref().filter(|_| known == KnownAgent::default() && open.is_none());
        let word = if agent.last_connected_at.is_none() { "first_report" } else { "returned" };
        let status = agent.turn(new.agent, Status::Online, at, word, Some(id));
        let silence = agent.seen.and_then(|seen| seen.silence).filter(|_| continues.is_some());
        if let Some((_, end)) = displaced {
            agent.displaced = Some((at, present));
            agent.swaps = swaps;
            agent.rival = agent.rival.filter(|_| swaps > 0);
            agent.last_disconnected_at = Some(end.at);
            agent.reason = Some(end.reason);
        }
        let before = agent.seen.map(|seen| seen.at);
        let seen_at = if continues.is_some() { new.seen_at } else { at }.max(before.unwrap_or_default());
        if continues.is_none() {
            agent.last_connected_at = Some(at);
            agent.rows.push(id);
        }
        agent.connection = Some(id);
        agent.order = agent.order.filter(|(connection, _)| *connection == id);
        (agent.offline_at, agent.stale_from, agent.retired_at) = (None, None, None);
        agent.updated_at = agent.updated_at.max(at);
        let number = first.map_or(agent.number(), |report| report.sequence_num);
        agent.seen = Some(Seen { connection: id, at: seen_at, number, silence });
        if let Some(report) = first {
            agent.adopt(report.capabilities, &report.documents);
        }
        self.agents.insert(new.agent, agent);
        Written::Created(Box::new(Opened {
            connection_id: id,
            continued: continues.is_some(),
            connected_at: self.row(id).map_or(at, |row| row.connected_at),
            seen_at,
            poll_silence: silence,
            agent: known,
            stored: first.is_some(),
            displaced: displaced.map(|(connection_id, end)| Displaced {
                connection_id,
                reason: end.reason,
                duration_seconds: self.seconds(connection_id),
            }),
            status,
        }))
    }

    fn insert_row(&mut self, new: &NewConnection, at: Moment) -> i64 {
        let id = i64::try_from(self.rows.len()).unwrap_or(i64::MAX) + 1;
        self.rows.push(Row {
            id,
            agent: new.agent,
            transport: new.transport,
            remote_addr: new.remote_addr.clone(),
            node: (new.transport == Transport::Websocket).then_some(new.node_id),
            seq: new.node_seq,
            connected_at: at,
            created_at: new.at,
            end: None,
        });
        id
    }

    pub(crate) fn see(&mut self, sightings: &[Sighting]) -> u64 {
        let mut changed = 0;
        for sighting in sightings {
            let Some(agent) = self.agents.get_mut(&sighting.agent) else { continue };
            let Some(seen) = agent.seen.as_mut() else { continue };
            let id = sighting.connection_id;
            if agent.connection != Some(id) || seen.connection != id || seen.at > sighting.at {
                continue;
            }
            // A save of the same moment has told the number already, or nobody has.
            seen.number = if seen.at < sighting.at {
                sighting.sequence_num
            } else {
                sighting.sequence_num.or(seen.number)
            };
            (seen.at, seen.silence) = (sighting.at, sighting.poll_silence);
            self.touched.insert(sighting.agent);
            changed += 1;
        }
        changed
    }

    pub(crate) fn overdue(&mut self, now: Moment) -> Vec<StatusChange> {
        let mut changes = Vec::new();
        for (uid, agent) in &mut self.agents {
            let due = agent.offline_at.is_some_and(|due| due <= now);
            if !due || agent.connection.is_some() || agent.status != Status::Online {
                continue;
            }
            let reason = agent.reason.map_or("", CloseReason::label);
            changes.extend(agent.turn(*uid, Status::Offline, now, reason, agent.rows.last().copied()));
            agent.offline_at = None;
            agent.stale_from = Some(now);
            agent.updated_at = agent.updated_at.max(now);
            self.touched.insert(*uid);
        }
        changes
    }

    pub(crate) fn next_overdue(&self) -> Option<Moment> {
        self.agents.values().filter_map(|agent| agent.offline_at).min()
    }

    pub(crate) fn retire(&mut self, now: Moment, stale_after: Duration) -> Vec<StatusChange> {
        let mut changes = Vec::new();
        for (uid, agent) in &mut self.agents {
            let stale = agent.stale_from.is_some_and(|from| from <= now.before(stale_after));
            if !stale || agent.status != Status::Offline {
                continue;
            }
            let to = if agent.ephemeral { Status::Retired } else { Status::Error };
            changes.extend(agent.turn(*uid, to, now, "stale", agent.connection));
            agent.retired_at = agent.ephemeral.then_some(now);
            agent.stale_from = None;
            agent.updated_at = agent.updated_at.max(now);
            self.touched.insert(*uid);
        }
        changes
    }

    pub(crate) fn assign(
        &mut self,
        temporary: InstanceUid,
        candidate: InstanceUid,
        at: Moment,
    ) -> InstanceUid {
        let unused = self
            .agents
            .iter()
            .find(|(_, agent)| agent.previous == Some(temporary) && agent.last_connected_at.is_none());
        if let Some((unused, _)) = unused {
            return *unused;
        }
        let mut agent = Agent::new(at, Status::Retired);
        (agent.previous, agent.retired_at) = (Some(temporary), Some(at));
        self.agents.insert(candidate, agent);
        candidate
    }

    /// Orders that an agent's connection ends.
    pub(crate) fn order(&mut self, agent: InstanceUid) -> Option<i64> {
        let open = self.open_row(agent).filter(|row| row.transport == Transport::Websocket)?.id;
        self.agents.get_mut(&agent)?.order = Some((open, CloseReason::ReconnectRequested));
        Some(open)
    }

    pub(crate) fn orders(&self, node: Uuid) -> Vec<(InstanceUid, i64, CloseReason)> {
        self.agents
            .iter()
            .filter_map(|(uid, agent)| {
                let (connection, reason) = agent.order?;
                let row = self.row(connection)?;
                (row.end.is_none() && row.node == Some(node)).then_some((*uid, connection, reason))
            })
            .collect()
    }
}

/// Nodes.
impl Records {
    pub(crate) fn start(&mut self, node: &NewNode, single: bool) -> NodeStart {
        let watched_until = self.nodes.iter().map(|row| row.renewed_at).max();
        for row in &mut self.nodes {
            if row.ended_at.is_none() && (single || row.name == node.name) {
                (row.ended_at, row.ended_by) = (Some(node.at), Some(node.id));
            }
        }
        let alone = self.nodes.iter().all(|row| row.ended_at.is_some());
        self.nodes.push(NodeRow {
            id: node.id,
            name: node.name.clone(),
            renewed_at: node.at,
            lease: node.lease,
            ended_at: None,
            ended_by: None,
        });
        let heir =
            Heir { node: node.id, at: node.at, return_time: node.return_time, first_poll: node.first_poll };
        let lost_connections = self.inherit(&heir, alone);
        // Who is not marked as ended may be dead all the same.
        let unwatched = watched_until
            .map(|until| node.at.since(until))
            .filter(|unwatched| alone || *unwatched > node.lease);
        self.postpone(node.at, node.return_time);
        if let Some(unwatched) = unwatched {
            for agent in self.agents.values_mut() {
                agent.stale_from = agent.stale_from.map(|from| from.after(unwatched));
            }
        }
        NodeStart { lost_connections, alone, unwatched }
    }

    /// Ends what ended nodes left open; `alone` where no other node could have heard a poller.
    pub(crate) fn inherit(&mut self, heir: &Heir, alone: bool) -> u64 {
        let lost: Vec<i64> = self
            .rows
            .iter()
            .filter(|row| row.end.is_none())
            .filter(|row| match row.transport {
                Transport::Websocket => self.is_gone(row.node),
                Transport::Http => alone && self.is_silent(row, heir),
            })
            .map(|row| row.id)
            .collect();
        for id in &lost {
            self.lose(*id, heir.at, heir.return_time);
        }
        self.rename_fled(heir);
        lost.len() as u64
    }

    /// Ends a node whose lease did not move, unless it did or its heir was ended itself.
    pub(crate) fn end_lost(&mut self, lost: &Peer, heir: &Heir) -> Option<u64> {
        let heir_lives = self.nodes.iter().any(|row| row.id == heir.node && row.ended_at.is_none());
        let row = self.nodes.iter_mut().find(|row| {
            row.id == lost.id && row.ended_at.is_none() && row.renewed_at == lost.renewed_at && heir_lives
        })?;
        (row.ended_at, row.ended_by) = (Some(heir.at), Some(heir.node));
        Some(self.inherit(heir, false))
    }

    /// The other nodes that are not marked as ended.
    pub(crate) fn peers(&self, node: Uuid) -> Vec<Peer> {
        let living = self.nodes.iter().filter(|row| row.id != node && row.ended_at.is_none());
        let peer = |row: &NodeRow| Peer {
            id: row.id,
            name: row.name.clone(),
            renewed_at: row.renewed_at,
            lease: row.lease,
        };
        living.map(peer).collect()
    }

    /// The open connections of a node.
    pub(crate) fn held(&self, node: Uuid) -> Vec<Held> {
        let rows = self.rows.iter().filter(|row| row.end.is_none() && row.node == Some(node));
        let seen = |row: &Row| self.agents.get(&row.agent)?.seen.map(|seen| seen.at);
        let held = |row: &Row| Held {
            id: row.id,
            agent: row.agent,
            last_seen_at: seen(row).unwrap_or(row.connected_at),
        };
        rows.map(held).collect()
    }

    /// True where the node that opens or ends connections is not marked as ended.
    pub(crate) fn may_write(&self, batch: &[Write]) -> bool {
        let node = batch.first().map(|write| match write {
            Write::CreateConnection(new) => new.node_id,
            Write::UpdateConnection(end) => end.node_id,
            Write::UpdateAgent(update) => update.node_id,
        });
        node.is_none_or(|node| self.nodes.iter().any(|row| row.id == node && row.ended_at.is_none()))
    }

    /// True where an opening on a node is done again whose row was made and has ended: the row's key is unique.
    pub(crate) fn has_opened_before(&self, batch: &[Write]) -> bool {
        batch.iter().any(|write| {
            let Write::CreateConnection(new) = write else { return false };
            let made = |row: &Row| row.node == Some(new.node_id) && row.seq == new.node_seq;
            new.transport == Transport::Websocket
                && self.rows.iter().any(|row| made(row) && row.end.is_some())
        })
    }

    fn is_silent(&self, row: &Row, heir: &Heir) -> bool {
        let seen = self.agents.get(&row.agent).and_then(|agent| agent.seen);
        seen.is_some_and(|seen| seen.at.after(seen.silence.unwrap_or(heir.first_poll)) < heir.at)
    }

    /// Ends a row that nobody holds any more.
    fn lose(&mut self, id: i64, at: Moment, return_time: Duration) {
        let Some(row) = self.row(id) else { return };
        let uid = row.agent;
        let seen = self.agents.get(&uid).and_then(|agent| agent.seen).map(|seen| seen.at);
        let proof = seen.unwrap_or(row.connected_at).min(at);
        let Some(end) = self.end_row(id, EndedBy::Finder, CloseReason::ServerLost, proof, Some(at)) else {
            return;
        };
        self.touched.insert(uid);
        let Some(agent) = self.agents.get_mut(&uid) else { return };
        if agent.connection == Some(id) {
            agent.connection = None;
            agent.order = None;
            agent.reason = Some(CloseReason::ServerLost);
            agent.last_disconnected_at = Some(end.at);
            agent.offline_at = (agent.status == Status::Online).then(|| at.after(return_time));
            agent.updated_at = agent.updated_at.max(at);
        }
    }

    /// Agents that were displaced since the last renewal of a node that was just lost had fled from it.
    fn rename_fled(&mut self, heir: &Heir) {
        let lost: Vec<(Uuid, Moment)> = self
            .nodes
            .iter()
            .filter(|row| row.ended_by == Some(heir.node) && row.ended_at == Some(heir.at))
            .map(|row| (row.id, row.renewed_at))
            .collect();
        for row in &mut self.rows {
            let Some(end) = &mut row.end else { continue };
            let fled = lost
                .iter()
                .any(|(node, renewed)| row.node == Some(*node) && end.by.is_some_and(|by| by > *renewed));
            if !fled || end.reason != CloseReason::Superseded {
                continue;
            }
            end.reason = CloseReason::ServerLost;
            if let Some(agent) = self.agents.get_mut(&row.agent)
                && agent.last_disconnected_at == Some(end.at)
                && agent.reason == Some(CloseReason::Superseded)
            {
                agent.reason = Some(CloseReason::ServerLost);
            }
        }
    }

    pub(crate) fn postpone(&mut self, now: Moment, return_time: Duration) {
        for agent in self.agents.values_mut() {
            agent.offline_at = agent.offline_at.map(|at| at.max(now.after(return_time)));
        }
    }

    pub(crate) fn renew(&mut self, node: Uuid, at: Moment) -> bool {
        let row = self.nodes.iter_mut().find(|row| row.id == node && row.ended_at.is_none());
        row.map(|row| row.renewed_at = at).is_some()
    }

    pub(crate) fn end_node(&mut self, node: Uuid, at: Moment) {
        if let Some(row) = self.nodes.iter_mut().find(|row| row.id == node && row.ended_at.is_none()) {
            (row.ended_at, row.renewed_at) = (Some(at), at);
        }
    }

    pub(crate) fn polled(&self) -> Vec<(&Row, Seen)> {
        self.rows
            .iter()
            .filter(|row| row.end.is_none() && row.transport == Transport::Http)
            .filter_map(|row| Some((row, self.agents.get(&row.agent)?.seen?)))
            .collect()
    }
}

impl Seen {
    pub(crate) fn silence_ms(&self) -> Option<i64> {
        self.silence.map(|silence| i64::try_from(silence.as_millis()).unwrap_or(i64::MAX))
    }
}

/// True where `new` is the opening that made this row, done again because its answer was lost.
fn is_again(row: &Row, new: &NewConnection) -> bool {
    let same_node = match new.transport {
        Transport::Websocket => row.node == Some(new.node_id),
        Transport::Http => row.created_at == new.at,
    };
    same_node && row.transport == new.transport && row.seq == new.node_seq
}

/// True where who returns to the displaced numbers cannot be the agent that is connected.
fn is_another(agent: &Agent, present: Option<u64>) -> bool {
    let displaced = agent.displaced.and_then(|(_, number)| number);
    let near = displaced.zip(present).is_some_and(|(displaced, present)| displaced.abs_diff(present) <= NEAR);
    !near || agent.swaps >= TOO_OFTEN
}

/// The mark in a document: the digits behind `mark-`.
fn mark_in(document: &str) -> u64 {
    let digits = document.split_once("mark-").map(|(_, rest)| rest).unwrap_or_default();
    let digits: String = digits.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_default()
}

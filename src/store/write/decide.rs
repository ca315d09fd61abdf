//! What a write does to what is on record, decided in memory under the locks: no SQL, no clock.
//!
//! Both databases decide alike because the decisions are made here, on rows read under their locks.

use std::time::Duration;

use serde_json::{Value, json};
use sqlx::FromRow;
use uuid::Uuid;

use super::super::status_log::log_row;
use super::super::{Status, StatusChange, Transport};
use super::{ConnectionEnd, FirstReport, NewConnection, Older, Rival, stored_number};
use crate::agent::report::{KnownAgent, Part, PartSet};
use crate::agent::{Capabilities, InstanceUid};
use crate::clock::Moment;
use crate::close::CloseReason;

/// An agent's row as locked at the start of a transaction.
#[derive(Clone, Debug, FromRow)]
#[expect(clippy::struct_excessive_bools, reason = "which parts are stored, a column each")]
pub(in crate::store) struct LockedAgent {
    #[sqlx(try_from = "Uuid")]
    pub(in crate::store) id: InstanceUid,
    #[sqlx(try_from = "String")]
    pub(in crate::store) status: Status,
    connection_id: Option<i64>,
    capabilities: i64,
    pub(in crate::store) sequence_num: Option<i64>,
    pub(in crate::store) last_seen_at: Option<Moment>,
    pub(super) poll_silence_ms: Option<i64>,
    displaced_at: Option<Moment>,
    displaced_number: Option<i64>,
    swaps: i32,
    rival_id: Option<Uuid>,
    rival_offers: i32,
    last_connected_at: Option<Moment>,
    pub(in crate::store) updated_at: Moment,
    /// An operator deleted it; its open connection is to end.
    delete_ordered: bool,
    has_description: bool,
    has_health: bool,
    has_effective_config: bool,
    has_remote_config_status: bool,
    has_package_statuses: bool,
    has_custom_capabilities: bool,
    has_components: bool,
    has_connection_settings_status: bool,
}

impl LockedAgent {
    pub(super) fn poll_silence(&self) -> Option<Duration> {
        self.poll_silence_ms.map(|ms| Duration::from_millis(ms.unsigned_abs()))
    }

    pub(super) fn known(&self) -> KnownAgent {
        let stored = [
            (self.has_description, Part::Description),
            (self.has_health, Part::Health),
            (self.has_effective_config, Part::EffectiveConfig),
            (self.has_remote_config_status, Part::RemoteConfigStatus),
            (self.has_package_statuses, Part::PackageStatuses),
            (self.has_custom_capabilities, Part::CustomCapabilities),
            (self.has_components, Part::AvailableComponents),
            (self.has_connection_settings_status, Part::ConnectionSettingsStatus),
        ];
        KnownAgent {
            known: self.last_connected_at.is_some(),
            sequence_num: self.sequence_num.map(i64::cast_unsigned),
            capabilities: Capabilities(self.capabilities.cast_unsigned()),
            parts: PartSet::of(stored.into_iter().filter_map(|(has, part)| has.then_some(part))),
        }
    }
}

/// An open row of the history.
#[derive(Clone, Copy, Debug, FromRow)]
pub(in crate::store) struct OpenRow {
    pub(in crate::store) id: i64,
    #[sqlx(try_from = "Uuid")]
    pub(in crate::store) agent_id: InstanceUid,
    pub(in crate::store) connected_at: Moment,
    #[sqlx(try_from = "String")]
    pub(in crate::store) transport: Transport,
    node_id: Option<Uuid>,
    node_seq: i64,
    created_at: Moment,
    pub(in crate::store) node_gone: bool,
}

impl OpenRow {
    /// True where `new` is the opening that made this row, done again because its answer was lost.
    fn is_of(&self, new: &NewConnection) -> bool {
        let same_node = match new.transport {
            Transport::Websocket => self.node_id == Some(new.node_id),
            Transport::Http => self.created_at == new.at,
        };
        same_node && self.transport == new.transport && self.node_seq == new.node_seq
    }
}

/// The end of a row, as decided.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowEnd {
    pub(super) at: Moment,
    by: Option<Moment>,
    pub(super) reason: CloseReason,
    pub(super) duration_seconds: i64,
}

impl RowEnd {
    pub(super) fn new(row: &OpenRow, reason: CloseReason, at: Moment, by: Option<Moment>) -> Self {
        let at = at.max(row.connected_at);
        let duration_seconds = i64::try_from(at.since(row.connected_at).as_secs()).unwrap_or(i64::MAX);
        Self {
            at,
            by: by.map(|by| by.max(at)),
            reason,
            duration_seconds: duration_seconds.min(i64::from(i32::MAX)),
        }
    }

    /// When the end was known.
    fn known_at(&self) -> Moment {
        self.by.unwrap_or(self.at)
    }

    pub(super) fn row(&self, connection_id: i64) -> Value {
        json!([
            connection_id,
            self.at.as_micros(),
            self.by.map(Moment::as_micros),
            self.duration_seconds,
            self.reason.label()
        ])
    }
}

/// When a connection was last known to be there. Another node may have heard a poller later than who ends it.
pub(super) fn last_proof(end: &ConnectionEnd, row: &OpenRow, agent: &LockedAgent) -> Moment {
    match (end.disconnected_by, agent.last_seen_at) {
        (Some(by), Some(seen)) if row.transport == Transport::Http => end.disconnected_at.max(seen.min(by)),
        _ => end.disconnected_at,
    }
}

/// What a newcomer does to the open row it finds; `None` where it goes on with it.
fn displacement(
    row: &OpenRow,
    agent: &LockedAgent,
    new: &NewConnection,
    connected_at: Moment,
) -> Option<RowEnd> {
    if row.is_of(new) {
        return None;
    }
    let polls_on = row.transport == Transport::Http && new.transport == Transport::Http;
    // What was heard over a link that another one displaced meanwhile proves nothing of that other one. Polls are all of
    // one agent, whichever row they were taken for.
    let polled = |older: &Older| polls_on && older.transport == Transport::Http;
    let held = new.older.filter(|older| polled(older) || older.connection_id == row.id);
    let held = held.map(|older| older.last_proof);
    let proof = agent.last_seen_at.max(held).unwrap_or(row.connected_at).min(connected_at);
    let in_time = |first| {
        let deadline = proof.after(agent.poll_silence().unwrap_or(first) + new.poll_grace);
        deadline.max(new.excused_until.unwrap_or(deadline)) >= connected_at
    };
    let reason = match new.first_poll {
        Some(first) if polls_on && in_time(first) => return None,
        Some(_) if polls_on => CloseReason::HeartbeatTimeout,
        _ if row.node_gone => CloseReason::ServerLost,
        _ => CloseReason::Superseded,
    };
    Some(RowEnd::new(row, reason, proof, Some(connected_at)))
}

/// When an agent was last seen, and the number that its stored state stands for.
pub(in crate::store) struct Seen {
    pub(in crate::store) agent: InstanceUid,
    pub(in crate::store) at: Moment,
    pub(in crate::store) number: Option<u64>,
    /// The number on record stands.
    pub(in crate::store) unsaved: bool,
}

/// What the ends of a batch make of the agents' rows.
#[derive(Default)]
pub(super) struct Effects {
    pub(super) rows: Vec<Value>,
    pub(super) agents: Vec<Value>,
    pub(super) log: Vec<Value>,
    pub(super) sightings: Vec<Seen>,
}

/// What the end of the connection that holds the fence makes of its agent.
pub(super) fn end_of_stay(
    end: &ConnectionEnd,
    decided: &RowEnd,
    agent: &mut LockedAgent,
    effects: &mut Effects,
) -> Option<StatusChange> {
    if agent.connection_id != Some(end.connection_id) {
        return None;
    }
    // A delete that was ordered holds, whatever ended the connection first.
    let retires = matches!(end.reason, CloseReason::UidReassigned | CloseReason::Deleted);
    let to = if retires || agent.delete_ordered {
        Status::Retired
    } else if end.offline_at.is_none() {
        Status::Offline
    } else {
        agent.status
    };
    let change = (to != agent.status).then(|| StatusChange {
        agent: end.agent,
        from: Some(agent.status),
        to,
        reason: if agent.delete_ordered { CloseReason::Deleted } else { end.reason }.label().to_owned(),
        connection_id: Some(end.connection_id),
    });
    let at = decided.known_at();
    let offline_at = end.offline_at.filter(|_| to == Status::Online);
    effects.log.extend(change.iter().map(|change| log_row(change, at, Some(end.node_id))));
    effects.sightings.push(Seen {
        agent: end.agent,
        at: end.last_seen_at,
        number: end.sequence_num,
        unsaved: end.unsaved,
    });
    effects.agents.push(json!([
        end.agent,
        to.label(),
        change.is_some(),
        at.as_micros(),
        decided.at.as_micros(),
        end.reason.label(),
        offline_at.map(Moment::as_micros)
    ]));
    agent.status = to;
    agent.connection_id = None;
    agent.delete_ordered = false;
    agent.updated_at = agent.updated_at.max(at);
    agent.last_seen_at = agent.last_seen_at.max(Some(end.last_seen_at));
    if !end.unsaved {
        agent.sequence_num = stored_number(end.sequence_num);
    }
    change
}

/// A newcomer as decided, before its row exists.
pub(super) struct Newcomer<'a> {
    pub(super) new: &'a NewConnection,
    pub(super) agent: &'a LockedAgent,
    /// Its first report, not before anything on record.
    pub(super) at: Moment,
    pub(super) displaced: Option<(i64, RowEnd)>,
    /// The number at which the displaced connection was left, as far as anybody knows.
    pub(super) left_at_number: Option<u64>,
    /// How often in a row the displaced one came back, this time included.
    pub(super) swaps: i32,
    /// The open row with which it goes on.
    pub(super) continues: Option<OpenRow>,
    pub(super) status: Option<StatusChange>,
}

impl Newcomer<'_> {
    /// What is stored of its first report: all of it, where nothing is on record that it could continue.
    pub(super) fn first_report(&self) -> Option<&FirstReport> {
        let unknown = self.agent.known() == KnownAgent::default();
        self.new
            .first_report
            .as_deref()
            .filter(|_| unknown && self.displaced.is_none() && self.continues.is_none())
    }

    /// When it was last seen, as far as that is proved.
    pub(super) fn seen_at(&self) -> Moment {
        if self.continues.is_some() { self.new.seen_at } else { self.at }
    }
}

/// Who arrives: the agent itself, or another one that uses the same uid.
pub(super) enum Arrival<'a> {
    Newcomer(Box<Newcomer<'a>>),
    Rival(Rival),
}

/// Decides what a newcomer does to what is on record.
pub(super) fn welcome<'a>(
    new: &'a NewConnection,
    agent: &'a LockedAgent,
    open: Option<&OpenRow>,
) -> Arrival<'a> {
    // Whatever is on record for this agent came before; so did what was heard over a link that this one overtakes.
    let came = agent.updated_at.max(new.at);
    let at = came.max(agent.last_seen_at.unwrap_or_default());
    let held = open.and_then(|row| new.older.filter(|older| older.connection_id == row.id));
    let present = held.map_or(agent.sequence_num.map(i64::cast_unsigned), |older| older.number);
    let lately = agent.displaced_at.is_some_and(|displaced| came.since(displaced) <= RIVALRY);
    let returns = lately && continues_the_displaced(agent, new.number);
    if let (Some(row), Some(spare), true) = (open, new.spare, returns)
        && !row.is_of(new)
        && is_another(agent, present)
    {
        let uid = agent.rival_id.map_or(spare, InstanceUid::from);
        return Arrival::Rival(Rival { uid, offers: agent.rival_offers.unsigned_abs() + 1 });
    }
    let swaps = if returns { agent.swaps.saturating_add(1) } else { 0 };
    let displaced = open.and_then(|row| Some((row.id, displacement(row, agent, new, at)?)));
    let continues = open.copied().filter(|_| displaced.is_none());
    let at = displaced.map_or(at, |(_, end)| at.max(end.at));
    let first = agent.last_connected_at.is_none();
    let status = (first || agent.status != Status::Online).then(|| StatusChange {
        agent: new.agent,
        from: (!first).then_some(agent.status),
        to: Status::Online,
        reason: if first { "first_report" } else { "returned" }.to_owned(),
        connection_id: None,
    });
    let left_at_number = present.filter(|_| displaced.is_some());
    let newcomer = Newcomer { new, agent, at, displaced, left_at_number, swaps, continues, status };
    Arrival::Newcomer(Box::new(newcomer))
}

/// How long after its displacement an agent may return for its uid to count as shared.
const RIVALRY: Duration = Duration::from_mins(1);

/// Numbers as near as this may be those of one agent whose connections arrive out of order.
const NEAR: u64 = 8;

/// After so many returns in a row near numbers are no accident: two agents that started together.
const TOO_OFTEN: i32 = 2;

/// True where `number` is the next one of the connection that was displaced.
fn continues_the_displaced(agent: &LockedAgent, number: u64) -> bool {
    agent.displaced_number.is_some_and(|displaced| displaced.cast_unsigned().wrapping_add(1) == number)
}

/// True where who returns to the displaced numbers cannot be the agent that is connected.
///
/// An agent that gives up connections faster than the server takes them can look like two for a
/// moment, with numbers that are near each other; there only repetition proves that they are two.
/// A present number that is unknown did not continue what was stored, which is as far as can be.
fn is_another(agent: &LockedAgent, present: Option<u64>) -> bool {
    let near =
        agent.displaced_number.map(i64::cast_unsigned).zip(present).is_some_and(|(displaced, present)| {
            displaced.wrapping_sub(present).min(present.wrapping_sub(displaced)) <= NEAR
        });
    !near || agent.swaps >= TOO_OFTEN
}

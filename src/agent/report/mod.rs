//! What a report changes: the rules of omitted parts, whole replacement, gaps and repeats.
//!
//! [`AgentState`] is all a session keeps of what was reported: the number, the mask and a digest per
//! part; an [`Outline`] is what of a report decides. [`AgentState::absorb`] promises that under any
//! loss, repetition and reordering of reports the state either equals the agent's or full state has
//! been asked for, and that [`AgentState::stored_number`] is unknown as long as anything may be missing.
//! It must not know what the parts mean, where they are stored, or how an answer travels.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroU64;

use prost::Message;
use prost::encoding::bytes;

use super::{Capabilities, requests_uid};
use crate::proto::{AgentCapabilities, AgentToServer, ComponentHealth};

/// One of the eight parts of the status that an agent leaves out while it is unchanged (S-042).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Part {
    /// `agent_description`.
    Description,
    /// `health`.
    Health,
    /// `effective_config`.
    EffectiveConfig,
    /// `remote_config_status`.
    RemoteConfigStatus,
    /// `package_statuses`.
    PackageStatuses,
    /// `custom_capabilities`.
    CustomCapabilities,
    /// `available_components`.
    AvailableComponents,
    /// `connection_settings_status`.
    ConnectionSettingsStatus,
}

impl Part {
    /// All parts.
    pub const ALL: [Self; 8] = [
        Self::Description,
        Self::Health,
        Self::EffectiveConfig,
        Self::RemoteConfigStatus,
        Self::PackageStatuses,
        Self::CustomCapabilities,
        Self::AvailableComponents,
        Self::ConnectionSettingsStatus,
    ];

    /// True where an agent with this mask promises to report the part.
    fn is_promised(self, capabilities: Capabilities) -> bool {
        match self {
            Self::Description => true,
            Self::CustomCapabilities => false,
            Self::Health => capabilities.has(AgentCapabilities::ReportsHealth),
            Self::EffectiveConfig => capabilities.has(AgentCapabilities::ReportsEffectiveConfig),
            Self::RemoteConfigStatus => capabilities.has(AgentCapabilities::ReportsRemoteConfig),
            Self::PackageStatuses => capabilities.has(AgentCapabilities::ReportsPackageStatuses),
            Self::AvailableComponents => capabilities.has(AgentCapabilities::ReportsAvailableComponents),
            Self::ConnectionSettingsStatus => {
                capabilities.has(AgentCapabilities::ReportsConnectionSettingsStatus)
            }
        }
    }

    /// Digest of the part's content in `report`, if the report carries it.
    fn digest(self, report: &AgentToServer) -> Option<u64> {
        match self {
            Self::Description => report.agent_description.as_ref().map(digest_of),
            Self::Health => report.health.as_ref().map(|health| digest_of(&without_times(health))),
            Self::EffectiveConfig => report.effective_config.as_ref().map(digest_of),
            Self::RemoteConfigStatus => report.remote_config_status.as_ref().map(digest_of),
            Self::PackageStatuses => report.package_statuses.as_ref().map(digest_of),
            Self::CustomCapabilities => report.custom_capabilities.as_ref().map(digest_of),
            Self::AvailableComponents => report.available_components.as_ref().map(digest_of),
            Self::ConnectionSettingsStatus => report.connection_settings_status.as_ref().map(digest_of),
        }
    }
}

/// What of a report decides what it changes, whatever state it meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outline {
    number: u64,
    capabilities: u64,
    /// By part, in the order of [`Part::ALL`].
    digests: [Option<NonZeroU64>; Part::ALL.len()],
    /// Digest of its bytes, to recognise a retransmission.
    digest: u64,
    bare: bool,
    leaves: bool,
    requests_uid: bool,
}

impl Outline {
    /// The outline of `report`, which came as these bytes.
    #[must_use]
    pub fn of(report: &AgentToServer, bytes: &[u8]) -> Self {
        // Zero stands for "not reported on this connection"; a digest that happens to be zero is 1.
        let digests = Part::ALL.map(|part| NonZeroU64::new(part.digest(report)?).or(Some(NonZeroU64::MIN)));
        Self {
            number: report.sequence_num,
            capabilities: report.capabilities,
            digests,
            digest: digest_of_bytes(bytes),
            bare: is_bare(report),
            leaves: report.agent_disconnect.is_some(),
            requests_uid: requests_uid(report),
        }
    }
}

/// A set of parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PartSet(u8);

impl PartSet {
    /// No part.
    pub const EMPTY: Self = Self(0);

    /// The set of these parts.
    #[must_use]
    pub fn of(parts: impl IntoIterator<Item = Part>) -> Self {
        parts.into_iter().fold(Self::EMPTY, Self::with)
    }

    /// This set and `part`.
    #[must_use]
    pub const fn with(self, part: Part) -> Self {
        Self(self.0 | 1 << part as u8)
    }

    /// True where `part` is in the set.
    #[must_use]
    pub const fn has(self, part: Part) -> bool {
        self.0 & (1 << part as u8) != 0
    }

    /// True where every part of `other` is in this set.
    #[must_use]
    pub const fn covers(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// True where the set has no part.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The parts of both sets.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What the store knows of an agent when a connection of it opens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KnownAgent {
    /// True where the agent has connected before.
    pub known: bool,
    /// The number of the last report whose state is stored; none where something may be missing.
    pub sequence_num: Option<u64>,
    /// The last mask.
    pub capabilities: Capabilities,
    /// The stored parts.
    pub parts: PartSet,
}

/// What a session keeps of an agent's reports.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "facts of one agent, each of its own")]
pub struct AgentState {
    /// Number of the last report, the base of the next one.
    number: Option<u64>,
    /// True from a gap until everything known and everything promised has come anew, the description among it.
    stale: bool,
    /// The parts that came since the last gap, the report that showed it included: they are as the agent has them.
    fresh: PartSet,
    /// True where the agent was heard before, so that a first number continues nothing.
    known_agent: bool,
    /// True from the loss of a report that did not continue until the next one, which does not either.
    broken: bool,
    /// True once full state was asked for because a promised part was missing.
    asked: bool,
    capabilities: Capabilities,
    known: PartSet,
    digests: [Option<NonZeroU64>; Part::ALL.len()],
    /// Digest of the last report's bytes, to recognise a retransmission.
    last_report: Option<u64>,
    /// The number before the last gap: two agents that share a uid and a link go on from there by turns.
    rival: Option<u64>,
    /// How many gaps in a row led back to the number before the gap.
    swaps: u8,
}

/// After so many swaps the reports are those of two agents: late or lost reports of one alone lead to two.
const RIVALRY: u8 = 3;

/// What kind of report it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// It continues the numbers, or is the first one ever.
    Continued,
    /// Reports before it were lost, or the agent started over (S-044).
    Gap,
    /// The last report once more: answered, not processed.
    Repeat,
    /// Nothing but the uid: a sign of life.
    Bare,
    /// It continues the numbers of another agent that uses the same uid (S-049).
    Rival,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::Continued, Self::Gap, Self::Repeat, Self::Bare, Self::Rival];

    /// The word used as metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Continued => "continued",
            Self::Gap => "gap",
            Self::Repeat => "repeat",
            Self::Bare => "bare",
            Self::Rival => "rival",
        }
    }
}

/// What one report changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "facts of one report, each of its own")]
pub struct Change {
    /// What kind of report it was.
    pub kind: Kind,
    /// Parts whose content differs from what was known; times alone do not count.
    pub parts: PartSet,
    /// True where the change must be durable before the answer.
    pub must_save: bool,
    /// True where the answer has to ask for full state.
    pub ask_full_state: bool,
    /// True where the agent says that it leaves (S-061).
    pub leaves: bool,
    /// True where the agent asks for a uid (S-048).
    pub requests_uid: bool,
}

impl AgentState {
    /// The state at the opening of a connection.
    #[must_use]
    pub fn restore(agent: &KnownAgent) -> Self {
        Self {
            number: agent.sequence_num,
            stale: agent.known && agent.sequence_num.is_none(),
            fresh: PartSet::EMPTY,
            known_agent: agent.known,
            broken: false,
            asked: false,
            capabilities: agent.capabilities,
            known: agent.parts,
            digests: [None; Part::ALL.len()],
            last_report: None,
            rival: None,
            swaps: 0,
        }
    }

    /// The number of the last report.
    #[must_use]
    pub fn number(&self) -> Option<u64> {
        self.number
    }

    /// Notes the number to which the other agent with this uid has come: its next report is told by it.
    pub fn set_aside(&mut self, number: u64) {
        (self.rival, self.swaps) = (Some(number), RIVALRY);
    }

    /// The number to store beside the state: none while something may be missing, so that a restart asks again.
    #[must_use]
    pub fn stored_number(&self) -> Option<u64> {
        if self.stale { None } else { self.number }
    }

    /// True from a gap until every part that is known has come anew, as it does where full state is sent. Who never told
    /// any was asked for them once.
    #[must_use]
    pub fn owes_known_parts(&self) -> bool {
        self.stale && !self.fresh.covers(self.known)
    }

    /// The agent's present mask.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Notes that the report with this number could not be stored: whatever comes next does not continue.
    ///
    /// That holds where no number is known, and where the lost report started over: the one after it may
    /// happen to fit the old number.
    pub fn missed(&mut self, number: u64) {
        self.broken |= self.breaks_numbers(number);
        self.lost_one();
    }

    /// Notes that a change which was answered could not be stored after all: everything is asked for once more.
    pub fn forget(&mut self) {
        self.broken = true;
        self.digests = [None; Part::ALL.len()];
        self.lost_one();
    }

    /// This state after a report with this number that was not taken: everything is asked for once more.
    #[must_use]
    pub fn past(mut self, number: u64) -> Self {
        self.forget();
        Self {
            number: Some(number),
            broken: false,
            stale: true,
            fresh: PartSet::EMPTY,
            last_report: None,
            ..self
        }
    }

    /// What a report makes of this state.
    ///
    /// The caller adopts the new state once the change is durable; until then the old one stands,
    /// and the agent's next report shows the gap (AMB-12).
    #[must_use]
    pub fn absorb(&self, report: &Outline) -> (Self, Change) {
        let mut change = Change {
            kind: Kind::Continued,
            parts: PartSet::EMPTY,
            must_save: false,
            ask_full_state: false,
            leaves: report.leaves,
            requests_uid: report.requests_uid,
        };
        let mut next = *self;
        if report.bare {
            change.kind = Kind::Bare;
            change.ask_full_state = self.owes_first_question();
            next.asked |= change.ask_full_state;
            return (next, change);
        }
        if self.last_report == Some(report.digest) && self.number == Some(report.number) {
            change.kind = Kind::Repeat;
            return (next, change);
        }
        let gap = self.breaks_numbers(report.number);
        if gap {
            let returns = self.rival.is_some_and(|rival| rival.wrapping_add(1) == report.number);
            next.swaps = if returns { self.swaps.saturating_add(1) } else { 0 };
            next.rival = self.number;
            if next.swaps >= RIVALRY {
                change.kind = Kind::Rival;
                return (next, change);
            }
            // Another node may have stored something else meanwhile.
            next.digests = [None; Part::ALL.len()];
        }
        let present = next.replace_parts(report, &mut change);
        let promised = PartSet::of(Part::ALL.into_iter().filter(|part| part.is_promised(next.capabilities)));
        next.fresh = if gap { present } else { self.fresh.union(present) };
        if gap {
            change.kind = Kind::Gap;
            change.ask_full_state = true;
            next.stale = true;
        } else if self.number.is_none() {
            change.ask_full_state = !self.asked && !present.covers(promised);
            next.stale = !present.covers(promised);
        } else if self.stale && next.fresh.covers(self.known.union(promised)) {
            next.stale = false;
        }
        next.asked |= change.ask_full_state;
        next.number = Some(report.number);
        next.broken = false;
        next.last_report = Some(report.digest);
        change.must_save = !change.parts.is_empty()
            || next.capabilities != self.capabilities
            || next.stored_number().is_some() != self.stored_number().is_some();
        (next, change)
    }

    /// Whatever comes next belongs to an agent that is known, and is no proof of two that take turns: where a
    /// number is missing in their series, the next report must ask for what is lost.
    fn lost_one(&mut self) {
        self.known_agent = true;
        (self.rival, self.swaps) = (None, 0);
    }

    /// True where an agent without any number was not yet asked for its state on this connection.
    fn owes_first_question(&self) -> bool {
        self.number.is_none() && !self.asked
    }

    /// True where `number` does not continue (S-044); an agent whose stored number is unknown continues nothing.
    fn breaks_numbers(&self, number: u64) -> bool {
        match self.number {
            _ if self.broken => true,
            Some(last) => last.wrapping_add(1) != number,
            None => self.known_agent,
        }
    }

    /// Takes over mask and present parts, each as a whole (S-043, R-002); returns which were present.
    fn replace_parts(&mut self, report: &Outline, change: &mut Change) -> PartSet {
        if report.capabilities != 0 {
            self.capabilities = Capabilities(report.capabilities);
        }
        let mut present = PartSet::EMPTY;
        for ((part, known), digest) in Part::ALL.into_iter().zip(&mut self.digests).zip(report.digests) {
            if digest.is_none() {
                continue;
            }
            present = present.with(part);
            if *known != digest {
                *known = digest;
                change.parts = change.parts.with(part);
            }
        }
        self.known = self.known.union(present);
        present
    }
}

/// True for a report that carries its uid and nothing else.
fn is_bare(report: &AgentToServer) -> bool {
    let uid = if report.instance_uid.is_empty() { 0 } else { bytes::encoded_len(1, &report.instance_uid) };
    report.encoded_len() == uid
}

fn digest_of_bytes(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// Digest of a part's canonical encoding; maps are sorted, so that their order on the wire does not count.
fn digest_of(part: &impl Message) -> u64 {
    digest_of_bytes(&part.encode_to_vec())
}

/// The health tree without the times of observation: when only they change, nothing changed.
fn without_times(health: &ComponentHealth) -> ComponentHealth {
    let mut timeless = health.clone();
    forget_times(&mut timeless);
    timeless
}

fn forget_times(health: &mut ComponentHealth) {
    health.status_time_unix_nano = 0;
    health.component_health_map.values_mut().for_each(forget_times);
}

#[cfg(test)]
mod tests;

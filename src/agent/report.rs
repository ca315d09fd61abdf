//! What a report changes: the rules of omitted parts, whole replacement, gaps and repeats.
//!
//! [`AgentState`] is all a session keeps of what was reported: the number, the mask and a digest per
//! part. [`AgentState::absorb`] promises that under any loss, repetition and reordering of reports
//! the state either equals the agent's or full state has been asked for, and that
//! [`AgentState::stored_number`] is unknown as long as anything may be missing.
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
pub struct AgentState {
    /// Number of the last report, the base of the next one.
    number: Option<u64>,
    /// True from a gap until a report covers everything known and the description.
    stale: bool,
    /// True where the agent was heard before, so that a first number continues nothing.
    known_agent: bool,
    /// True once full state was asked for because a promised part was missing.
    asked: bool,
    capabilities: Capabilities,
    known: PartSet,
    digests: [Option<NonZeroU64>; Part::ALL.len()],
    /// Digest of the last report's bytes, to recognise a retransmission.
    last_report: Option<u64>,
}

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
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Continued, Self::Gap, Self::Repeat, Self::Bare];

    /// The word used as metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Continued => "continued",
            Self::Gap => "gap",
            Self::Repeat => "repeat",
            Self::Bare => "bare",
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
            known_agent: agent.known,
            asked: false,
            capabilities: agent.capabilities,
            known: agent.parts,
            digests: [None; Part::ALL.len()],
            last_report: None,
        }
    }

    /// The number to store beside the state: none while something may be missing, so that a restart asks again.
    #[must_use]
    pub fn stored_number(&self) -> Option<u64> {
        if self.stale { None } else { self.number }
    }

    /// The agent's present mask.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Notes that a report could not be stored: whatever comes next does not continue, also where no number is known.
    pub fn missed(&mut self) {
        self.known_agent = true;
    }

    /// What `report` makes of this state. `digest` is over the report's bytes, see [`digest_of_bytes`].
    ///
    /// The caller adopts the new state once the change is durable; until then the old one stands,
    /// and the agent's next report shows the gap (AMB-12).
    #[must_use]
    pub fn absorb(&self, report: &AgentToServer, digest: u64) -> (Self, Change) {
        let mut change = Change {
            kind: Kind::Continued,
            parts: PartSet::EMPTY,
            must_save: false,
            ask_full_state: false,
            leaves: report.agent_disconnect.is_some(),
            requests_uid: requests_uid(report),
        };
        let mut next = *self;
        if is_bare(report) {
            change.kind = Kind::Bare;
            change.ask_full_state = self.owes_first_question();
            next.asked |= change.ask_full_state;
            return (next, change);
        }
        if self.last_report == Some(digest) && self.number == Some(report.sequence_num) {
            change.kind = Kind::Repeat;
            return (next, change);
        }
        let present = next.replace_parts(report, &mut change);
        if self.breaks_numbers(report.sequence_num) {
            change.kind = Kind::Gap;
            change.ask_full_state = true;
            next.stale = true;
        } else if self.number.is_none() {
            let promised =
                PartSet::of(Part::ALL.into_iter().filter(|part| part.is_promised(next.capabilities)));
            change.ask_full_state = !self.asked && !present.covers(promised);
            next.stale = !present.covers(promised);
        } else if self.stale && present.covers(self.known.with(Part::Description)) {
            next.stale = false;
        }
        next.asked |= change.ask_full_state;
        next.number = Some(report.sequence_num);
        next.last_report = Some(digest);
        change.must_save = !change.parts.is_empty()
            || next.capabilities != self.capabilities
            || next.stored_number().is_some() != self.stored_number().is_some();
        (next, change)
    }

    /// True where an agent without any number was not yet asked for its state on this connection.
    fn owes_first_question(&self) -> bool {
        self.number.is_none() && !self.asked
    }

    /// True where `number` does not continue (S-044); an agent whose stored number is unknown continues nothing.
    fn breaks_numbers(&self, number: u64) -> bool {
        match self.number {
            Some(last) => last.wrapping_add(1) != number,
            None => self.known_agent,
        }
    }

    /// Takes over mask and present parts, each as a whole (S-043, R-002); returns which were present.
    fn replace_parts(&mut self, report: &AgentToServer, change: &mut Change) -> PartSet {
        if report.capabilities != 0 {
            self.capabilities = Capabilities(report.capabilities);
        }
        let mut present = PartSet::EMPTY;
        for (part, known) in Part::ALL.into_iter().zip(&mut self.digests) {
            let Some(digest) = part.digest(report) else { continue };
            // Zero stands for "not reported on this connection"; a digest that happens to be zero is 1.
            let digest = NonZeroU64::new(digest).or(Some(NonZeroU64::MIN));
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

/// Digest of a report's bytes, to recognise a retransmission.
#[must_use]
pub fn digest_of_bytes(bytes: &[u8]) -> u64 {
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
mod tests {
    use super::*;
    use crate::proto::{
        AgentConfigFile, AgentConfigMap, AgentDescription, AgentDisconnect, EffectiveConfig, KeyValue,
        RemoteConfigStatus,
    };
    use proptest::prelude::*;

    /// Capabilities that promise description, health, effective config and remote config status.
    const MASK: u64 = 0x1 | 0x4 | 0x800 | 0x1000;

    fn report(number: u64) -> AgentToServer {
        AgentToServer {
            instance_uid: vec![7; 16],
            sequence_num: number,
            capabilities: MASK,
            ..AgentToServer::default()
        }
    }

    /// The content of the four parts of the model, each a number that changes.
    type Content = [u8; 4];

    const PARTS: [Part; 4] =
        [Part::Description, Part::Health, Part::EffectiveConfig, Part::RemoteConfigStatus];

    fn put(report: &mut AgentToServer, part: Part, content: u8) {
        let text = content.to_string();
        match part {
            Part::Description => {
                let pair = KeyValue { key: text, value: None };
                let description =
                    AgentDescription { identifying_attributes: vec![pair], ..AgentDescription::default() };
                report.agent_description = Some(description);
            }
            Part::Health => {
                report.health = Some(ComponentHealth { last_error: text, ..ComponentHealth::default() });
            }
            Part::EffectiveConfig => {
                let file = AgentConfigFile { body: vec![content], ..AgentConfigFile::default() };
                let config_map = Some(AgentConfigMap { config_map: [(text, file)].into() });
                report.effective_config = Some(EffectiveConfig { config_map });
            }
            Part::RemoteConfigStatus => {
                let status = RemoteConfigStatus { error_message: text, ..RemoteConfigStatus::default() };
                report.remote_config_status = Some(status);
            }
            Part::PackageStatuses
            | Part::CustomCapabilities
            | Part::AvailableComponents
            | Part::ConnectionSettingsStatus => panic!("{part:?} is not in the model"),
        }
    }

    fn full(number: u64, content: Content) -> AgentToServer {
        let mut full = report(number);
        for (part, content) in PARTS.into_iter().zip(content) {
            put(&mut full, part, content);
        }
        full
    }

    fn bytes(report: &AgentToServer) -> u64 {
        digest_of_bytes(&report.encode_to_vec())
    }

    fn absorb(state: &mut AgentState, report: &AgentToServer) -> Change {
        let (next, change) = state.absorb(report, bytes(report));
        *state = next;
        change
    }

    fn new_agent() -> AgentState {
        AgentState::restore(&KnownAgent::default())
    }

    #[test]
    fn a_full_first_report_of_an_unknown_agent_is_enough() {
        let mut state = new_agent();
        let change = absorb(&mut state, &full(0, [1; 4]));
        assert!(!change.ask_full_state);
        assert!(change.must_save);
        assert_eq!(change.parts, PartSet::of(PARTS));
        assert_eq!(state.stored_number(), Some(0));
    }

    #[test]
    fn r_004_an_unknown_agent_without_a_promised_part_is_asked_once() {
        let mut state = new_agent();
        assert!(absorb(&mut state, &report(5)).ask_full_state);
        assert_eq!(state.stored_number(), None, "a restart would have to ask again");
        assert!(!absorb(&mut state, &report(6)).ask_full_state);
        assert!(!absorb(&mut state, &full(7, [1; 4])).ask_full_state);
        assert_eq!(state.stored_number(), Some(7));
    }

    #[test]
    fn s_044_a_gap_is_asked_about_once_and_r_003_its_number_is_the_new_base() {
        let mut state = new_agent();
        absorb(&mut state, &full(1, [1; 4]));
        let change = absorb(&mut state, &report(3));
        assert_eq!((change.kind, change.ask_full_state, change.must_save), (Kind::Gap, true, true));
        assert_eq!(state.stored_number(), None);
        assert!(!absorb(&mut state, &report(4)).ask_full_state);
        let change = absorb(&mut state, &full(5, [1; 4]));
        assert!(change.must_save, "nothing changed, but the number counts again");
        assert_eq!(state.stored_number(), Some(5));
    }

    #[test]
    fn s_045_a_known_agent_that_continues_is_asked_nothing() {
        let known = KnownAgent {
            known: true,
            sequence_num: Some(u64::MAX),
            capabilities: Capabilities(MASK),
            parts: PartSet::of(PARTS),
        };
        let change = absorb(&mut AgentState::restore(&known), &report(0));
        assert_eq!(
            (change.kind, change.ask_full_state, change.must_save),
            (Kind::Continued, false, false),
            "R-006"
        );
        let change = absorb(&mut AgentState::restore(&known), &report(7));
        assert_eq!((change.kind, change.ask_full_state), (Kind::Gap, true));
    }

    #[test]
    fn a_known_agent_whose_number_is_unknown_is_asked() {
        let known = KnownAgent { known: true, parts: PartSet::of(PARTS), ..KnownAgent::default() };
        assert!(absorb(&mut AgentState::restore(&known), &full(7, [1; 4])).ask_full_state);
    }

    #[test]
    fn r_005_the_same_bytes_are_a_repeat_and_other_bytes_with_the_number_a_gap() {
        let mut state = new_agent();
        absorb(&mut state, &full(1, [1; 4]));
        assert_eq!(absorb(&mut state, &full(1, [1; 4])).kind, Kind::Repeat);
        let change = absorb(&mut state, &full(1, [2; 4]));
        assert_eq!((change.kind, change.ask_full_state), (Kind::Gap, true));
    }

    #[test]
    fn r_035_a_bare_report_is_a_sign_of_life_and_leaves_the_numbers() {
        let mut state = new_agent();
        absorb(&mut state, &full(4, [1; 4]));
        let bare = AgentToServer { instance_uid: vec![7; 16], ..AgentToServer::default() };
        let change = absorb(&mut state, &bare);
        assert_eq!((change.kind, change.ask_full_state, change.must_save), (Kind::Bare, false, false));
        assert_eq!(absorb(&mut state, &report(5)).kind, Kind::Continued);
        assert!(absorb(&mut new_agent(), &bare).ask_full_state, "nothing is known of it");
    }

    #[test]
    fn s_043_a_part_is_replaced_as_a_whole_and_an_unchanged_one_is_no_change() {
        let mut state = new_agent();
        absorb(&mut state, &full(1, [1; 4]));
        let mut next = report(2);
        put(&mut next, Part::Health, 1);
        assert!(!absorb(&mut state, &next).must_save);
        let mut next = report(3);
        put(&mut next, Part::Health, 2);
        assert_eq!(absorb(&mut state, &next).parts, PartSet::of([Part::Health]));
    }

    #[test]
    fn a_change_of_observation_times_alone_is_no_change() {
        let mut state = new_agent();
        absorb(&mut state, &full(1, [1; 4]));
        let part = |time, error: &str| ComponentHealth {
            status_time_unix_nano: time,
            last_error: error.to_owned(),
            ..ComponentHealth::default()
        };
        let tree = |time, error: &str| AgentToServer {
            health: Some(ComponentHealth {
                component_health_map: [("a".to_owned(), part(time, error))].into(),
                ..part(time, "")
            }),
            ..report(0)
        };
        let mut number = 1;
        let mut saves = |time, error: &str| {
            number += 1;
            absorb(&mut state, &AgentToServer { sequence_num: number, ..tree(time, error) }).must_save
        };
        assert!(saves(1, ""));
        assert!(!saves(2, ""));
        assert!(saves(3, "down"));
    }

    #[test]
    fn r_002_a_mask_of_zero_keeps_the_last_one_and_s_039_a_new_one_counts() {
        let mut state = new_agent();
        absorb(&mut state, &full(1, [1; 4]));
        let silent = AgentToServer { sequence_num: 2, capabilities: 0, ..report(2) };
        assert!(!absorb(&mut state, &silent).must_save);
        assert_eq!(state.capabilities(), Capabilities(MASK));
        let change = absorb(&mut state, &AgentToServer { sequence_num: 3, capabilities: 1, ..report(3) });
        assert!(change.must_save);
        assert_eq!(state.capabilities(), Capabilities(1));
    }

    #[test]
    fn s_047_a_farewell_and_a_request_for_a_uid_are_events_of_one_message() {
        let mut state = new_agent();
        let farewell =
            AgentToServer { agent_disconnect: Some(AgentDisconnect {}), flags: 1, ..full(1, [1; 4]) };
        let change = absorb(&mut state, &farewell);
        assert!(change.leaves && change.requests_uid);
        let change = absorb(&mut state, &report(2));
        assert!(!change.leaves && !change.requests_uid);
    }

    /// One step of a schedule of the model below.
    #[derive(Clone, Debug)]
    enum Step {
        /// The agent changes these parts and reports; what becomes of report and answer.
        Report(u8, Fate),
        /// A report that was held back arrives after all.
        Late,
        /// The last report arrives once more.
        Repeated,
        /// The agent starts over: its numbers begin anew and its first report is full.
        AgentRestarts,
        /// Signs of life are flushed.
        Flush,
        /// The server dies and comes back with what is stored.
        Crash,
    }

    #[derive(Clone, Copy, Debug)]
    enum Fate {
        Answered,
        Lost,
        HeldBack,
        AnswerLost,
        StoreRefuses,
    }

    fn step() -> impl Strategy<Value = Step> {
        let fate = prop_oneof![
            4 => Just(Fate::Answered),
            2 => Just(Fate::Lost),
            1 => Just(Fate::HeldBack),
            1 => Just(Fate::AnswerLost),
            1 => Just(Fate::StoreRefuses),
        ];
        prop_oneof![
            8 => (0_u8..16, fate).prop_map(|(parts, fate)| Step::Report(parts, fate)),
            1 => Just(Step::Late),
            1 => Just(Step::Repeated),
            1 => Just(Step::AgentRestarts),
            2 => Just(Step::Flush),
            1 => Just(Step::Crash),
        ]
    }

    /// An agent, a server and what the server has stored.
    struct Model {
        content: Content,
        number: u64,
        asked: bool,
        last: Option<AgentToServer>,
        held: Vec<AgentToServer>,
        state: AgentState,
        answered: bool,
        /// What the store holds: parts, number, mask.
        stored: [Option<Vec<u8>>; 4],
        stored_number: Option<u64>,
        known: bool,
    }

    impl Model {
        fn new() -> Self {
            Self {
                content: [0; 4],
                number: 0,
                asked: true,
                last: None,
                held: Vec::new(),
                state: new_agent(),
                answered: false,
                stored: Default::default(),
                stored_number: None,
                known: false,
            }
        }

        /// The agent's next report: what changed, or everything where it was asked for.
        fn next_report(&mut self, mask: u8) -> AgentToServer {
            let mut next = report(self.number);
            self.number = self.number.wrapping_add(1);
            for (index, part) in PARTS.into_iter().enumerate() {
                let changes = mask & (1 << index) != 0;
                self.content[index] = self.content[index].wrapping_add(u8::from(changes));
                if changes || self.asked {
                    put(&mut next, part, self.content[index]);
                }
            }
            self.asked = false;
            next
        }

        /// The server takes a report; answers whether it asks for full state.
        fn arrives(&mut self, report: &AgentToServer, store_refuses: bool) -> Option<bool> {
            let (next, change) = self.state.absorb(report, bytes(report));
            if change.kind == Kind::Repeat {
                return Some(self.answered);
            }
            if change.must_save {
                if store_refuses {
                    self.state.missed();
                    return None;
                }
                for (index, part) in PARTS.into_iter().enumerate() {
                    if change.parts.has(part) {
                        self.stored[index] = content_of(report, part);
                    }
                }
                self.stored_number = next.stored_number();
            }
            self.known = true;
            self.state = next;
            self.answered = change.ask_full_state;
            Some(change.ask_full_state)
        }

        fn reconnect(&mut self) {
            let stored = PARTS.into_iter().zip(&self.stored).filter(|(_, stored)| stored.is_some());
            self.state = AgentState::restore(&KnownAgent {
                known: self.known,
                sequence_num: self.stored_number,
                capabilities: Capabilities(MASK),
                parts: PartSet::of(stored.map(|(part, _)| part)),
            });
            self.answered = false;
        }

        fn run(&mut self, step: &Step) {
            match step {
                Step::Report(changed, fate) => {
                    let report = self.next_report(*changed);
                    self.last = Some(report.clone());
                    match fate {
                        Fate::Answered => self.asked |= self.arrives(&report, false) == Some(true),
                        Fate::Lost => {}
                        Fate::HeldBack => self.held.push(report),
                        Fate::AnswerLost => {
                            // Over WebSocket an answer is lost with its link; the session flushes its number at the end.
                            self.arrives(&report, false);
                            self.stored_number = self.state.stored_number();
                            self.reconnect();
                        }
                        Fate::StoreRefuses => self.asked |= self.arrives(&report, true) == Some(true),
                    }
                }
                Step::Late => {
                    if let Some(report) = self.held.pop() {
                        self.asked |= self.arrives(&report, false) == Some(true);
                    }
                }
                Step::Repeated => {
                    if let Some(report) = self.last.clone() {
                        self.asked |= self.arrives(&report, false) == Some(true);
                    }
                }
                // Where the numbers of two lives happen to meet, no server can tell: the protocol has nothing else.
                Step::AgentRestarts => (self.number, self.asked) = (self.number.wrapping_add(1_000), true),
                Step::Flush => self.stored_number = self.state.stored_number(),
                Step::Crash => self.reconnect(),
            }
        }
    }

    fn content_of(report: &AgentToServer, part: Part) -> Option<Vec<u8>> {
        match part {
            Part::Description => report.agent_description.as_ref().map(Message::encode_to_vec),
            Part::Health => report.health.as_ref().map(Message::encode_to_vec),
            Part::EffectiveConfig => report.effective_config.as_ref().map(Message::encode_to_vec),
            Part::RemoteConfigStatus => report.remote_config_status.as_ref().map(Message::encode_to_vec),
            Part::PackageStatuses
            | Part::CustomCapabilities
            | Part::AvailableComponents
            | Part::ConnectionSettingsStatus => None,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

        /// Under any loss, repetition and reordering of reports, lost answers, refused saves and crashes:
        /// after reports that arrive in order, the server equals the agent, or it has just asked.
        #[test]
        fn the_server_equals_the_agent_or_has_asked(steps in proptest::collection::vec(step(), 0..40)) {
            let mut model = Model::new();
            for step in &steps {
                model.run(step);
            }
            for _ in 0..2 {
                let report = model.next_report(0);
                model.asked |= model.arrives(&report, false) == Some(true);
            }
            if !model.asked {
                let agent = full(0, model.content);
                for (part, stored) in PARTS.into_iter().zip(&model.stored) {
                    prop_assert_eq!(stored, &content_of(&agent, part), "{:?} after {:?}", part, steps);
                }
            }
        }

        #[test]
        fn any_bytes_never_panic(messages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..64), 0..8)) {
            let mut state = new_agent();
            for bytes in messages {
                if let Ok(report) = AgentToServer::decode(bytes.as_slice()) {
                    absorb(&mut state, &report);
                }
            }
        }
    }
}

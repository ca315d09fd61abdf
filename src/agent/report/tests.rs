use super::*;
use crate::proto::{
    AgentConfigFile, AgentConfigMap, AgentDescription, AgentDisconnect, CustomCapabilities, EffectiveConfig,
    KeyValue, RemoteConfigStatus,
};
use proptest::collection::vec;
use proptest::prelude::*;
use prost::encoding::encode_varint;

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

/// The content of the five parts of the model, each a number that changes; the last is promised by no mask.
type Content = [u8; 5];

const PARTS: [Part; 5] = [
    Part::Description,
    Part::Health,
    Part::EffectiveConfig,
    Part::RemoteConfigStatus,
    Part::CustomCapabilities,
];

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
        Part::CustomCapabilities => {
            report.custom_capabilities = Some(CustomCapabilities { capabilities: vec![text] });
        }
        Part::RemoteConfigStatus => {
            let status = RemoteConfigStatus { error_message: text, ..RemoteConfigStatus::default() };
            report.remote_config_status = Some(status);
        }
        Part::PackageStatuses | Part::AvailableComponents | Part::ConnectionSettingsStatus => {
            panic!("{part:?} is not in the model")
        }
    }
}

fn full(number: u64, content: Content) -> AgentToServer {
    let mut full = report(number);
    for (part, content) in PARTS.into_iter().zip(content) {
        put(&mut full, part, content);
    }
    full
}

fn outline(report: &AgentToServer) -> Outline {
    Outline::of(report, &report.encode_to_vec())
}

fn absorb(state: &mut AgentState, report: &AgentToServer) -> Change {
    let (next, change) = state.absorb(&outline(report));
    *state = next;
    change
}

fn new_agent() -> AgentState {
    AgentState::restore(&KnownAgent::default())
}

#[test]
fn a_full_first_report_of_an_unknown_agent_is_enough() {
    let mut state = new_agent();
    let change = absorb(&mut state, &full(0, [1; 5]));
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
    assert!(!absorb(&mut state, &full(7, [1; 5])).ask_full_state);
    assert_eq!(state.stored_number(), Some(7));
}

#[test]
fn r_004_what_was_never_heard_is_waited_for_and_may_come_in_several_reports() {
    let mut state = new_agent();
    absorb(&mut state, &report(5));
    let mut described = report(6);
    put(&mut described, Part::Description, 1);
    absorb(&mut state, &described);
    assert_eq!(state.stored_number(), None, "its other parts were lost before anybody knew of it");
    let mut rest = full(7, [1; 5]);
    rest.agent_description = None;
    absorb(&mut state, &rest);
    assert_eq!(state.stored_number(), Some(7));
}

#[test]
fn s_044_a_gap_is_asked_about_once_and_r_003_its_number_is_the_new_base() {
    let mut state = new_agent();
    absorb(&mut state, &full(1, [1; 5]));
    let change = absorb(&mut state, &report(3));
    assert_eq!((change.kind, change.ask_full_state, change.must_save), (Kind::Gap, true, true));
    assert_eq!(state.stored_number(), None);
    assert!(!absorb(&mut state, &report(4)).ask_full_state);
    assert!(state.owes_known_parts(), "it may not have seen the question");
    let change = absorb(&mut state, &full(5, [1; 5]));
    assert!(change.must_save, "nothing changed, but the number counts again");
    assert_eq!((state.stored_number(), state.owes_known_parts()), (Some(5), false));
}

/// Health goes from 1 to 2 at another node and back to 1 here: what is stored is 2.
#[test]
fn after_a_gap_what_this_node_knew_is_stored_again() {
    let mut state = new_agent();
    absorb(&mut state, &full(0, [1; 5]));
    let mut back = report(2);
    put(&mut back, Part::Health, 1);
    let change = absorb(&mut state, &back);
    assert!(change.must_save && change.ask_full_state);
    assert_eq!(change.parts, PartSet::EMPTY.with(Part::Health));
    let change = absorb(&mut state, &full(3, [1; 5]));
    let others = PARTS.into_iter().filter(|part| *part != Part::Health);
    assert_eq!(change.parts, PartSet::of(others), "nor is any other part trusted");
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
    assert!(absorb(&mut AgentState::restore(&known), &full(7, [1; 5])).ask_full_state);
}

#[test]
fn a_refused_new_start_is_not_forgotten_because_the_next_number_fits() {
    let mut state = new_agent();
    absorb(&mut state, &full(7, [0; 5]));
    // The agent started over, with numbers that meet the old ones by chance.
    let (next, change) = state.absorb(&outline(&full(7, [1; 5])));
    assert!(change.kind == Kind::Gap && change.must_save && next.stored_number().is_none());
    state.missed(7);
    assert_eq!(state.stored_number(), Some(7), "what is stored is still stored");
    let change = absorb(&mut state, &report(8));
    assert!(change.kind == Kind::Gap && change.ask_full_state && change.must_save, "{change:?}");
    assert_eq!(absorb(&mut state, &report(9)).kind, Kind::Continued);
}

#[test]
fn a_lost_report_is_asked_for_though_two_agents_seem_to_take_turns() {
    let turns = || {
        let mut state = new_agent();
        for number in [4, 100, 5, 101] {
            absorb(&mut state, &full(number, [number.to_le_bytes()[0]; 5]));
        }
        assert_eq!(absorb(&mut { state }, &report(6)).kind, Kind::Rival, "the next turn would show them");
        state
    };
    let mut state = turns();
    state.missed(5);
    let change = absorb(&mut state, &report(6));
    assert!(change.kind == Kind::Gap && change.ask_full_state, "not taken: {change:?}");
    let mut state = turns();
    state.forget();
    let change = absorb(&mut state, &report(6));
    assert!(change.kind == Kind::Gap && change.ask_full_state, "answered, yet not stored: {change:?}");
}

#[test]
fn r_005_the_same_bytes_are_a_repeat_and_other_bytes_with_the_number_a_gap() {
    let mut state = new_agent();
    absorb(&mut state, &full(1, [1; 5]));
    assert_eq!(absorb(&mut state, &full(1, [1; 5])).kind, Kind::Repeat);
    let change = absorb(&mut state, &full(1, [2; 5]));
    assert_eq!((change.kind, change.ask_full_state), (Kind::Gap, true));
}

#[test]
fn r_035_a_bare_report_is_a_sign_of_life_and_leaves_the_numbers() {
    let mut state = new_agent();
    absorb(&mut state, &full(4, [1; 5]));
    let bare = AgentToServer { instance_uid: vec![7; 16], ..AgentToServer::default() };
    let change = absorb(&mut state, &bare);
    assert_eq!((change.kind, change.ask_full_state, change.must_save), (Kind::Bare, false, false));
    assert_eq!(absorb(&mut state, &report(5)).kind, Kind::Continued);
    assert!(absorb(&mut new_agent(), &bare).ask_full_state, "nothing is known of it");
}

#[test]
fn s_043_a_part_is_replaced_as_a_whole_and_an_unchanged_one_is_no_change() {
    let mut state = new_agent();
    absorb(&mut state, &full(1, [1; 5]));
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
    absorb(&mut state, &full(1, [1; 5]));
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
    absorb(&mut state, &full(1, [1; 5]));
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
    let farewell = AgentToServer { agent_disconnect: Some(AgentDisconnect {}), flags: 1, ..full(1, [1; 5]) };
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
    /// It starts over at the very number of its last report, and its first one is answered.
    RestartsAtTheSameNumber(u8),
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
        2 => Just(Fate::StoreRefuses),
    ];
    prop_oneof![
        8 => (prop_oneof![3 => 0_u8..32, 1 => Just(0b0_1111)], fate).prop_map(|(parts, fate)| Step::Report(parts, fate)),
        1 => Just(Step::Late),
        1 => Just(Step::Repeated),
        1 => Just(Step::AgentRestarts),
        1 => (0_u8..32).prop_map(Step::RestartsAtTheSameNumber),
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
    stored: [Option<Vec<u8>>; PARTS.len()],
    stored_number: Option<u64>,
    known: bool,
}

impl Model {
    fn new() -> Self {
        Self {
            content: [0; PARTS.len()],
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
        // The opening is on record ahead of any report, also of one that the store refuses.
        self.known = true;
        let (next, change) = self.state.absorb(&outline(report));
        if change.kind == Kind::Repeat {
            return Some(self.answered);
        }
        if change.must_save {
            if store_refuses {
                self.state.missed(report.sequence_num);
                return None;
            }
            for (index, part) in PARTS.into_iter().enumerate() {
                if change.parts.has(part) {
                    self.stored[index] = content_of(report, part);
                }
            }
            self.stored_number = next.stored_number();
        }
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
                    // Of an agent never heard nobody can miss an unpromised part: it introduces itself anew.
                    Fate::Lost => self.asked |= !self.known,
                    Fate::HeldBack => {
                        self.asked |= !self.known;
                        self.held.push(report);
                    }
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
            Step::RestartsAtTheSameNumber(changed) => {
                self.held.clear();
                (self.number, self.asked) = (self.number.wrapping_sub(1), true);
                self.run(&Step::Report(*changed, Fate::Answered));
            }
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
        Part::CustomCapabilities => report.custom_capabilities.as_ref().map(Message::encode_to_vec),
        Part::RemoteConfigStatus => report.remote_config_status.as_ref().map(Message::encode_to_vec),
        Part::PackageStatuses | Part::AvailableComponents | Part::ConnectionSettingsStatus => None,
    }
}

/// Bytes that are often a report: fields of low numbers, each a varint or bytes, which may be a message again.
fn message() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..4).prop_recursive(5, 32, 4, |inner| {
        let number = prop_oneof![any::<u64>(), Just(u64::MAX)].prop_map(|number| (0, number, Vec::new()));
        let nested = inner.prop_map(|bytes| (2, bytes.len() as u64, bytes));
        vec((1_u64..16, prop_oneof![1 => number, 2 => nested]), 0..4).prop_map(|fields| {
            let mut message = Vec::new();
            for (field, (wire_type, number, bytes)) in fields {
                encode_varint(field << 3 | wire_type, &mut message);
                encode_varint(number, &mut message);
                message.extend(bytes);
            }
            message
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    /// Under any loss, repetition and reordering of reports, lost answers, refused saves and crashes:
    /// after reports that arrive in order, the server equals the agent, or it has just asked.
    #[test]
    fn the_server_equals_the_agent_or_has_asked(start in prop_oneof![Just(0), Just(u64::MAX - 3)], steps in prop_oneof![vec(step(), 0..6), vec(step(), 0..40)]) {
        let mut model = Model { number: start, ..Model::new() };
        for step in &steps {
            model.run(step);
        }
        for _ in 0..2 {
            let report = model.next_report(0);
            model.asked |= model.arrives(&report, false) == Some(true);
        }
        prop_assert!(!model.asked, "nothing is missing any more after {:?}", steps);
        let agent = full(0, model.content);
        for (part, stored) in PARTS.into_iter().zip(&model.stored) {
            prop_assert_eq!(stored, &content_of(&agent, part), "{:?} after {:?}", part, steps);
        }
    }

    #[test]
    fn any_bytes_never_panic(messages in vec(prop_oneof![vec(any::<u8>(), 0..64), message()], 0..8)) {
        let mut state = new_agent();
        for bytes in messages {
            if let Ok(report) = AgentToServer::decode(bytes.as_slice()) {
                absorb(&mut state, &report);
            }
        }
    }
}

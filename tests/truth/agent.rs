//! An agent as it lives: it comes, reports, changes, and goes in every way an agent can; it never lies.
//!
//! What it does is drawn from its own generator, so that a seed gives the same lives; when a server answers
//! decides about the rest. It follows the protocol: numbers go up, what was refused is sent again, full state
//! follows a request at once, and whoever is refused comes back later.

use std::time::Duration;

use fastrand::Rng;
use opamp_server::agent::InstanceUid;
use opamp_server::clock::{Moment, host_now};
use opamp_server::proto::any_value::Value;
use opamp_server::proto::{
    AgentConfigFile, AgentConfigMap, AgentDescription, AgentDisconnect, AgentToServer, AnyValue,
    ComponentHealth, EffectiveConfig, KeyValue, ServerErrorResponseType, ServerToAgent,
};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};

use crate::node::Place;
use crate::record::{Ask, Content, End, Exchange, Record, Way};

/// `ReportsStatus`, `ReportsEffectiveConfig`, `ReportsHealth`, `ReportsHeartbeat`.
const CAPABILITIES: u64 = 0x1 | 0x4 | 0x800 | 0x2000;

/// The flag `ReportFullState` of an offer.
const FULL_STATE: u64 = 0x1;

/// What everybody does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Come and go.
    Storm,
    /// Whoever is there stays, whoever left stays away.
    Calm,
    /// Everybody comes and stays.
    Return,
    /// Everybody goes for good.
    Over,
}

/// Parts of a report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parts {
    pub(crate) description: bool,
    pub(crate) health: bool,
    pub(crate) config: bool,
}

impl Parts {
    const NONE: Self = Self { description: false, health: false, config: false };
    const ALL: Self = Self { description: true, health: true, config: true };
}

/// An agent and the one who plays it.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) record: Record,
    pub(crate) rng: Rng,
    pub(crate) places: Vec<Place>,
    pub(crate) phase: watch::Receiver<Phase>,
    uid: InstanceUid,
    pub(crate) node: usize,
    way: Way,
    /// The number of the next report.
    number: u64,
    /// Parts that must travel with the next report.
    owed: Parts,
    /// True where a report may not have arrived since the last one that did.
    lost: bool,
    /// The same before the letter that is on its way.
    lost_before: bool,
    /// When the last answered report was sent.
    previous: Option<Moment>,
    /// Reports answered on this stay.
    pub(crate) answered: u32,
    /// Questions on this stay that may have come before the answer to a report.
    pub(crate) questions: u32,
    /// Sockets that it left open.
    pub(crate) forgotten: JoinSet<()>,
}

/// A report on its way.
#[derive(Clone, Debug)]
pub(crate) struct Letter {
    pub(crate) report: AgentToServer,
    pub(crate) parts: Parts,
    content: Content,
}

/// What an offer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    Accepted,
    Refused,
}

impl Agent {
    pub(crate) fn new(mut rng: Rng, places: Vec<Place>, phase: watch::Receiver<Phase>) -> Self {
        let mut uid = [0; 16];
        rng.fill(&mut uid);
        // A UUID of version 7, as agents make them.
        uid[6] = 0x70 | uid[6] & 0x0f;
        uid[8] = 0x80 | uid[8] & 0x3f;
        let uid = InstanceUid::from_bytes(uid);
        let node = rng.usize(..places.len());
        let way = if rng.u8(..100) < 35 { Way::Http } else { Way::WebSocket };
        Self {
            record: Record::new(uid),
            rng,
            places,
            phase,
            uid,
            node,
            way,
            number: 0,
            owed: Parts::ALL,
            lost: false,
            lost_before: false,
            previous: None,
            answered: 0,
            questions: 0,
            forgotten: JoinSet::new(),
        }
    }

    pub(crate) fn record(&self) -> Record {
        self.record.clone()
    }

    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// True in so many of a hundred cases.
    pub(crate) fn chance(&mut self, percent: u8) -> bool {
        self.rng.u8(..100) < percent
    }

    /// A time between two numbers of milliseconds.
    pub(crate) fn between(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(self.rng.u64(least..=most))
    }

    /// Lives until everything is over.
    pub(crate) async fn live(mut self) {
        // Not all in the same millisecond.
        sleep(self.between(0, 1_500)).await;
        while self.phase() != Phase::Over {
            (self.answered, self.questions) = (0, 0);
            let end = match self.way {
                Way::WebSocket => self.visit().await,
                Way::Http => self.poll_along().await,
            };
            if self.chance(15) {
                self.way = if self.way == Way::Http { Way::WebSocket } else { Way::Http };
            }
            if end.is_own() {
                self.stay_away().await;
            } else if end == End::Abandon {
                // At once: the server cannot know of it.
                sleep(self.between(0, 400)).await;
            } else {
                if self.chance(50) {
                    self.hop();
                }
                sleep(self.between(200, 1_800)).await;
            }
        }
    }

    /// Goes to any node.
    pub(crate) fn hop(&mut self) {
        self.node = self.rng.usize(..self.places.len());
    }

    /// After a leave of its own: a while in the storm, until everybody is called back in the calm.
    async fn stay_away(&mut self) {
        let time = match self.rng.u8(..10) {
            0..=2 => self.between(0, 300),
            3..=7 => self.between(500, 4_000),
            _ => self.between(5_000, 9_000),
        };
        if self.chance(20) {
            self.hop();
        }
        let until = Instant::now() + time;
        loop {
            let phase = *self.phase.borrow_and_update();
            let changed = match phase {
                Phase::Storm => timeout_at(until, self.phase.changed()).await.is_ok(),
                Phase::Calm => self.phase.changed().await.is_ok(),
                Phase::Return | Phase::Over => false,
            };
            if !changed {
                return;
            }
        }
    }

    /// Changes a part of what it is, now and then in the storm; everything goes along that is owed.
    pub(crate) fn next_letter(&mut self) -> Letter {
        let mut parts = std::mem::replace(&mut self.owed, Parts::NONE);
        if self.phase() == Phase::Storm && self.chance(30) {
            let mut record = self.record.lock();
            match self.rng.u8(..3) {
                0 => (record.content.description += 1, parts.description = true),
                1 => (record.content.health += 1, parts.health = true),
                _ => (record.content.config += 1, parts.config = true),
            };
        }
        self.letter(parts)
    }

    /// The first report of a stay: everything, or just a heartbeat where it may continue.
    pub(crate) fn first_letter(&mut self) -> Letter {
        if self.chance(50) {
            self.owed = Parts::ALL;
        }
        let parts = std::mem::replace(&mut self.owed, Parts::NONE);
        self.letter(parts)
    }

    pub(crate) fn farewell(&mut self) -> Letter {
        let mut letter = self.letter(Parts::NONE);
        letter.report.agent_disconnect = Some(AgentDisconnect {});
        letter
    }

    fn letter(&mut self, parts: Parts) -> Letter {
        let content = self.record.lock().content;
        let number = self.number;
        self.number += 1;
        let report = AgentToServer {
            instance_uid: self.uid.as_bytes().to_vec(),
            sequence_num: number,
            capabilities: CAPABILITIES,
            agent_description: parts.description.then(|| description(content.description)),
            health: parts.health.then(|| health(content.health)),
            effective_config: parts.config.then(|| config(content.config)),
            ..AgentToServer::default()
        };
        self.record.note(format!("sends {number} {}", words(parts, content)));
        Letter { report, parts, content }
    }

    /// A letter is on its way: until it is answered nobody knows whether it arrives.
    pub(crate) fn sends(&mut self) {
        self.record.sending();
        self.lost_before = std::mem::replace(&mut self.lost, true);
    }

    /// Takes an offer that answers a letter sent at `sent`.
    pub(crate) fn take(&mut self, offer: &ServerToAgent, letter: &Letter, sent: Moment) -> Taken {
        let answered = host_now();
        if let Some(error) = &offer.error_response {
            let kind = error.r#type;
            if kind == i32::from(ServerErrorResponseType::Unavailable) {
                self.record.note("is refused for now");
                self.record.lock().refusals.push(answered);
            } else {
                self.record.outrage(format!("answered with the error {kind}: {}", error.error_message));
            }
            // What was refused was not taken: it is sent again, and the numbers show a gap.
            self.owed = merged(self.owed, letter.parts);
            return Taken::Refused;
        }
        if offer.instance_uid != self.uid.as_bytes() || offer.agent_identification.is_some() {
            self.record.outrage("is told another uid, and is alone with its own".to_owned());
        }
        let asked = offer.flags & FULL_STATE != 0;
        self.record.note(if asked { "is answered, and asked for full state" } else { "is answered" });
        let again = letter.parts == Parts::ALL && self.answered > 0;
        let ask = Ask { at: answered, previous: self.previous, lost: self.lost_before, again };
        {
            let mut record = self.record.lock();
            // What is asked for is sent once more: only then it counts.
            let mut unasked = Content::default();
            let acknowledged = if asked { &mut unasked } else { &mut record.acknowledged };
            if letter.parts.description {
                acknowledged.description = letter.content.description;
            }
            if letter.parts.health {
                acknowledged.health = letter.content.health;
            }
            if letter.parts.config {
                acknowledged.config = letter.content.config;
            }
            if asked {
                record.asked.push(ask);
            }
            if let Some(stay) = record.stays.last_mut() {
                stay.exchanges.push(Exchange { sent, answered, asked });
            }
        }
        self.answered += 1;
        self.previous = Some(sent);
        self.lost = false;
        if asked {
            self.owed = Parts::ALL;
            self.questions += 1;
        }
        Taken::Accepted
    }

    /// Takes an offer that answers nothing: a server may ask for full state by itself.
    pub(crate) fn hear(&mut self, offer: &ServerToAgent) {
        let mine = offer.instance_uid == self.uid.as_bytes() && offer.error_response.is_none();
        if mine && offer.flags & FULL_STATE != 0 && offer.agent_identification.is_none() {
            self.record.note("is asked for full state, unprompted");
            self.owed = Parts::ALL;
            self.questions += 1;
        } else if mine && self.questions > 0 {
            // The answer to a report that a question overtook.
            self.questions -= 1;
        } else {
            self.record.outrage(format!("is sent what it did not wait for: {offer:?}"));
        }
    }

    /// True where the server waits for something that should not wait for the next heartbeat.
    pub(crate) fn owes(&self) -> bool {
        self.owed != Parts::NONE
    }

    /// A stay ended; what comes next is chosen by the caller.
    pub(crate) fn end(&self, end: End) -> End {
        self.record.ended(end.clone());
        self.record.gone();
        end
    }
}

fn merged(one: Parts, other: Parts) -> Parts {
    Parts {
        description: one.description || other.description,
        health: one.health || other.health,
        config: one.config || other.config,
    }
}

fn words(parts: Parts, content: Content) -> String {
    let mut words = String::new();
    for (has, name, generation) in [
        (parts.description, "description", content.description),
        (parts.health, "health", content.health),
        (parts.config, "config", content.config),
    ] {
        if has {
            words.extend([name, " ", &generation.to_string(), " "]);
        }
    }
    words
}

fn description(generation: u32) -> AgentDescription {
    let pair = |key: &str, text: String| KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(Value::StringValue(text)) }),
    };
    AgentDescription {
        identifying_attributes: vec![
            pair("service.name", "collector".to_owned()),
            pair("generation", format!("generation={generation};")),
        ],
        non_identifying_attributes: Vec::new(),
    }
}

fn health(generation: u32) -> ComponentHealth {
    ComponentHealth {
        healthy: generation.is_multiple_of(2),
        status: format!("generation={generation};"),
        ..ComponentHealth::default()
    }
}

fn config(generation: u32) -> EffectiveConfig {
    let body = format!("generation={generation};").into_bytes();
    let file = AgentConfigFile { body, content_type: "text/plain".to_owned() };
    EffectiveConfig { config_map: Some(AgentConfigMap { config_map: [(String::new(), file)].into() }) }
}

/// The generation that a shown document speaks of.
pub(crate) fn generation(document: &serde_json::Value) -> Option<u32> {
    let text = document.to_string();
    let (_, rest) = text.split_once("generation=")?;
    rest.split_once(';')?.0.parse().ok()
}

//! A simulated agent: it connects, reports, changes, falls silent, breaks off, hops, and comes back.
//!
//! It does what OpAMP clients do with answers, and tells the record of the truth what it does.

mod polls;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use opamp_server::agent::InstanceUid;
use opamp_server::close::CloseReason;
use opamp_server::proto::any_value::Value as AnyOf;
use opamp_server::proto::server_error_response::Details;
use opamp_server::proto::{
    AgentCapabilities, AgentConfigFile, AgentConfigMap, AgentDescription, AgentDisconnect, AgentToServer,
    AnyValue, ComponentHealth, EffectiveConfig, KeyValue, ServerToAgent, ServerToAgentFlags,
};
use prost::Message as _;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::link::{Down, LinkTask, Up, Wire, admit_link};
use crate::node::Process;
use crate::rules::Rule;
use crate::truth::{Marks, PARTS};
use crate::world::{World, between};

/// How long an agent waits for a handshake or for the answer to a poll.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long anything may be on its way where no process is frozen.
const SOON: Duration = Duration::from_secs(2);

/// How long what overtook each other on two links of one agent may show: a poller speaks again only then.
const LATER: Duration = Duration::from_mins(1);

/// How an agent's stay on a link comes to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// It says that it leaves, and closes.
    Farewell,
    /// It closes.
    Close,
    /// Its process ends: the system closes the transport.
    Fin,
    /// The transport is reset.
    Reset,
    /// Its network is gone: nobody is told.
    Vanish,
    /// It opens the next link before it gives up this one.
    Hop,
    /// It is stopped for a while and then goes on.
    Freeze,
    /// Its process starts again, at once.
    Restart,
}

impl Ending {
    const ALL: [Self; 8] = [
        Self::Farewell,
        Self::Close,
        Self::Fin,
        Self::Reset,
        Self::Vanish,
        Self::Hop,
        Self::Freeze,
        Self::Restart,
    ];
}

/// A report that was sent and not answered yet.
#[derive(Clone, Copy, Debug)]
struct Sent {
    marks: Marks,
    full: bool,
}

/// What an agent says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Say {
    Full,
    Part(usize),
    Nothing,
    Farewell,
}

/// An agent.
#[expect(clippy::struct_excessive_bools, reason = "habits of one agent, each of its own")]
pub(crate) struct Agent {
    world: Arc<World>,
    rng: Rng,
    uid: InstanceUid,
    name: String,
    polls: bool,
    number: u64,
    marks: Marks,
    /// How often it reports without need.
    pace: Duration,
    /// True where it sends its full state first on every link.
    full_first: bool,
    /// True where it promises heartbeats.
    heartbeats: bool,
    stays: bool,
    home: usize,
    /// The process that answered its last poll.
    polled: Option<u64>,
    /// The link before the last, which it has not given up yet.
    older: Option<(Arc<Process>, Arc<Wire>)>,
    /// Until then what it said on two links may show in the wrong order.
    overtakes_until: Option<Instant>,
}

impl Agent {
    pub(crate) fn new(world: &Arc<World>, index: u64, uid: InstanceUid, name: String, mut rng: Rng) -> Self {
        let timeout = world.config.heartbeat.timeout;
        let pace = timeout.mul_f64([0.1, 0.3, 0.5, 0.9][rng.usize(0..4)]);
        let stays = rng.u8(0..3) > 0;
        let agent = Self {
            world: Arc::clone(world),
            uid,
            name,
            polls: rng.u8(0..3) == 0,
            number: rng.u64(0..2),
            marks: [index * 1_000_000 + 1; PARTS],
            pace: Duration::from_millis(u64::try_from(pace.as_millis()).unwrap_or(1_000)),
            full_first: rng.bool(),
            heartbeats: rng.u8(0..4) > 0,
            stays,
            home: rng.usize(0..world.places()),
            polled: None,
            older: None,
            overtakes_until: None,
            rng,
        };
        world.truth.name(uid, agent.name.clone());
        let (marks, now) = (agent.marks, world.truth.now());
        world.truth.own(uid, |own| {
            own.cloned |= !own.said.is_empty();
            own.stays = stays;
            own.marks = marks;
            own.said.push(std::collections::BTreeMap::new());
            own.excuse = Some(("it is new", now));
        });
        agent
    }

    /// Lives until the world ends.
    pub(crate) async fn live(mut self) {
        let lateness = self.between(1, 60_000);
        sleep(lateness).await;
        loop {
            if self.world.is_calm() && !self.stays {
                self.give_up_older();
                let now = self.world.truth.now();
                self.world.truth.own(self.uid, |own| own.gone = Some(now));
                return;
            }
            if self.rng.u8(0..12) == 0 && !self.world.is_calm() {
                self.polls = !self.polls;
            }
            let pause = if self.polls { self.poll().await } else { self.link().await };
            let world = Arc::clone(&self.world);
            tokio::select! {
                biased;
                () = sleep(pause) => {}
                () = world.calmed() => sleep(pause.min(Duration::from_secs(5))).await,
            }
        }
    }

    /// A time between so many milliseconds, short ones as likely as long ones.
    fn between(&mut self, least: u64, most: u64) -> Duration {
        between(&mut self.rng, least, most)
    }

    fn say(&self, text: std::fmt::Arguments<'_>) {
        self.world.truth.say(format_args!("{}: {text}", self.name));
    }

    fn excuse(&self, why: &'static str) {
        let now = self.world.truth.now();
        self.world.truth.own(self.uid, |own| own.excuse = Some((why, now)));
    }

    /// As [`excuse`](Self::excuse), for as long as anything may be on its way.
    fn excuse_longer(&self, why: &'static str, lasts: Duration) {
        let now = self.world.truth.now();
        let until = now.after(lasts);
        self.world.truth.own(self.uid, |own| {
            own.excuse = Some((why, now));
            own.excused_until = own.excused_until.max(Some(until));
        });
    }

    /// What is on its way on one link may arrive after what its next link brings, and continues nothing then.
    fn excuse_overtaking(&mut self) {
        self.excuse_longer("its next link may overtake this one", LATER);
        self.overtakes_until = Some(Instant::now() + LATER);
    }

    /// Nobody may have told it until its stay ends: the next one shows what came last.
    fn excuse_overtaken(&self) {
        if self.overtakes_until.is_some_and(|until| Instant::now() < until) {
            self.excuse("its last links may have overtaken each other");
        }
    }

    /// The next report, as bytes.
    fn report(&mut self, say: Say) -> (Vec<u8>, Sent) {
        if let Say::Part(part) = say {
            self.marks[part] += 1;
        }
        self.number += 1;
        let full = say == Say::Full;
        let has = |part: usize| full || say == Say::Part(part);
        let mark = |part: usize| format!("mark-{}", self.marks[part]);
        let mut capabilities = AgentCapabilities::ReportsStatus as u64
            | AgentCapabilities::ReportsHealth as u64
            | AgentCapabilities::ReportsEffectiveConfig as u64;
        if self.heartbeats {
            capabilities |= AgentCapabilities::ReportsHeartbeat as u64;
        }
        let attribute = |key: &str, value: String| KeyValue {
            key: key.to_owned(),
            value: Some(AnyValue { value: Some(AnyOf::StringValue(value)) }),
        };
        let file = AgentConfigFile { body: mark(2).into_bytes(), content_type: String::new() };
        let map = AgentConfigMap { config_map: [("f".to_owned(), file)].into_iter().collect() };
        let report = AgentToServer {
            instance_uid: self.uid.as_bytes().to_vec(),
            sequence_num: self.number,
            capabilities,
            agent_description: has(0).then(|| AgentDescription {
                identifying_attributes: vec![attribute("service.version", mark(0))],
                non_identifying_attributes: Vec::new(),
            }),
            health: has(1).then(|| ComponentHealth {
                healthy: true,
                status: mark(1),
                ..ComponentHealth::default()
            }),
            effective_config: has(2).then_some(EffectiveConfig { config_map: Some(map) }),
            agent_disconnect: (say == Say::Farewell).then(AgentDisconnect::default),
            ..AgentToServer::default()
        };
        let (number, marks) = (self.number, self.marks);
        self.world.truth.own(self.uid, |own| {
            own.marks = marks;
            if let Some(run) = own.said.last_mut() {
                run.insert(number, marks);
            }
        });
        (report.encode_to_vec(), Sent { marks, full })
    }

    /// Its process starts again: its numbers start anew, and it tells everything.
    fn restart(&mut self) {
        self.say(format_args!("starts again"));
        self.number = self.rng.u64(0..2);
        self.full_first = true;
        self.world.truth.own(self.uid, |own| own.said.push(std::collections::BTreeMap::new()));
        self.excuse("it started again");
    }

    fn give_up_older(&mut self) {
        if let Some((process, wire)) = self.older.take() {
            self.say(format_args!("gives up link {}", wire.number));
            match self.rng.u8(0..3) {
                0 => drop(wire.send(&process, Up::Close)),
                1 => drop(wire.send(&process, Up::Fin)),
                _ => {}
            }
        }
    }

    /// Where it goes next.
    fn place(&mut self) -> usize {
        if self.rng.u8(0..8) == 0 {
            let next = self.rng.usize(0..self.world.places());
            if next != self.home {
                self.excuse_longer("it is at another node", SOON);
            }
            self.home = next;
        }
        self.home
    }

    fn peer(number: u64) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 1], u16::try_from(number % 60_000).unwrap_or_default()))
    }

    /// One link, from the handshake to its end; answers how long to stay away.
    async fn link(&mut self) -> Duration {
        let place = self.place();
        let Some(process) = self.world.process(place) else { return self.between(100, 20_000) };
        let wire = Wire::new(self.world.next_wire(), self.rng.u64(0..30));
        self.say(format_args!("dials node-{place}.{} as link {}", process.number, wire.number));
        let (answer, answered) = oneshot::channel();
        let handshake = {
            let (process, wire) = (Arc::clone(&process), Arc::clone(&wire));
            async move {
                let admitted = admit_link(&process);
                if admitted {
                    LinkTask::spawn(&process, &wire, Self::peer(wire.number));
                }
                let _gone = answer.send(admitted);
            }
        };
        process.spawn(handshake);
        match timeout(PATIENCE, answered).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => {
                self.say(format_args!("is refused"));
                return self.between(30_000, 60_000);
            }
            Ok(Err(_)) => return self.between(100, 20_000),
            Err(_elapsed) => {
                wire.send(&process, Up::Fin);
                return self.between(100, 20_000);
            }
        }
        let pause = self.converse(&process, &wire).await;
        if self.older.as_ref().is_some_and(|(_, older)| older.number != wire.number) {
            self.give_up_older();
        }
        pause
    }

    async fn converse(&mut self, process: &Arc<Process>, wire: &Arc<Wire>) -> Duration {
        let mut unanswered: VecDeque<Sent> = VecDeque::new();
        // Sooner or later the system gives up a peer that says nothing.
        let patience = self.between(60_000, 900_000);
        let mut answered_at = Instant::now();
        let mut ending = *self.rng.choice(&Ending::ALL).unwrap_or(&Ending::Close);
        let mut until = Instant::now() + self.between(1, 1_800_000);
        let mut next_beat = Instant::now() + self.pace;
        let mut next_change = Instant::now() + self.between(10, 600_000);
        let world = Arc::clone(&self.world);
        let mut calm = false;
        let first = if self.full_first || self.number <= 1 { Say::Full } else { Say::Nothing };
        self.send(process, wire, first, &mut unanswered);
        let pause = loop {
            let pace = self.pace;
            tokio::select! {
                biased;
                (came, down) = wire.down.next() => match down {
                    Down::Ping => drop(wire.send(process, Up::Pong)),
                    Down::Offer(offer) => {
                        answered_at = Instant::now();
                        let Some(sent) = unanswered.pop_front() else { continue };
                        if self.on_offer(process, &offer, sent, came) {
                            self.send(process, wire, Say::Full, &mut unanswered);
                        }
                    }
                    Down::Question(offer) => {
                        let sent = Sent { marks: self.marks, full: false };
                        if self.on_offer(process, &offer, sent, came) {
                            self.send(process, wire, Say::Full, &mut unanswered);
                        }
                    }
                    Down::Close(reason) => {
                        self.say(format_args!("link {} is closed: {reason}", wire.number));
                        wire.send(process, Up::Close);
                        if reason == CloseReason::Superseded {
                            // What was on its way elsewhere came after what was said here.
                            self.world.truth.own(self.uid, |own| own.asked = true);
                        }
                        break self.between(1, 60_000);
                    }
                    Down::Gone => {
                        self.say(format_args!("link {} is gone", wire.number));
                        break self.between(1, 60_000);
                    }
                },
                () = sleep_until(next_beat) => {
                    next_beat = Instant::now() + pace;
                    if unanswered.len() > 1 && answered_at.elapsed() > patience {
                        self.say(format_args!("link {}: nobody answers", wire.number));
                        wire.send(process, Up::Fin);
                        break self.between(1, 60_000);
                    }
                    if self.heartbeats || calm || self.rng.u8(0..4) == 0 {
                        self.send(process, wire, Say::Nothing, &mut unanswered);
                    }
                }
                () = sleep_until(next_change) => {
                    next_change = Instant::now() + self.between(10, 600_000);
                    if self.world.is_quiet() {
                        continue;
                    }
                    let part = self.rng.usize(0..PARTS);
                    self.send(process, wire, Say::Part(part), &mut unanswered);
                }
                () = sleep_until(until) => {
                    if let Some(pause) = self.ends(process, wire, ending, &mut unanswered).await {
                        break pause;
                    }
                        ending = *self.rng.choice(&Ending::ALL).unwrap_or(&Ending::Close);
                        until = Instant::now() + self.between(1, 1_800_000);
                }
                () = world.calmed(), if !calm => {
                    calm = true;
                    let soon = if self.stays { Duration::from_hours(10_000) } else { self.between(1, 20_000) };
                    until = Instant::now() + soon;
                    if ending == Ending::Hop || ending == Ending::Freeze {
                        ending = Ending::Fin;
                    }
                }
            }
        };
        if !unanswered.is_empty() {
            self.excuse_longer("a report was not answered", SOON);
        }
        self.excuse_overtaken();
        pause
    }

    /// Ends its stay; none where it goes on after all.
    async fn ends(
        &mut self,
        process: &Arc<Process>,
        wire: &Arc<Wire>,
        ending: Ending,
        unanswered: &mut VecDeque<Sent>,
    ) -> Option<Duration> {
        self.say(format_args!("link {}: {ending:?}", wire.number));
        if ending != Ending::Freeze && !unanswered.is_empty() {
            self.excuse_overtaking();
        }
        match ending {
            Ending::Farewell => {
                self.send(process, wire, Say::Farewell, unanswered);
                if self.rng.bool() {
                    wire.send(process, Up::Close);
                } else {
                    wire.send(process, Up::Fin);
                }
            }
            Ending::Close => drop(wire.send(process, Up::Close)),
            Ending::Fin => drop(wire.send(process, Up::Fin)),
            Ending::Reset => drop(wire.send(process, Up::Reset)),
            Ending::Vanish => self.excuse_longer("its network was gone", SOON),
            Ending::Restart => {
                wire.send(process, Up::Fin);
                self.restart();
                return Some(self.between(1, 1_000));
            }
            Ending::Hop => {
                self.give_up_older();
                self.older = Some((Arc::clone(process), Arc::clone(wire)));
                self.home = self.rng.usize(0..self.world.places());
                self.excuse_overtaking();
                return Some(Duration::ZERO);
            }
            Ending::Freeze => {
                let asleep = self.between(100, 300_000);
                sleep(asleep).await;
                return None;
            }
        }
        // Mostly it is back soon, sometimes after it was given up.
        Some(if self.rng.u8(0..4) == 0 { self.between(60_000, 1_800_000) } else { self.between(1, 120_000) })
    }

    fn send(&mut self, process: &Process, wire: &Wire, say: Say, unanswered: &mut VecDeque<Sent>) {
        let (bytes, sent) = self.report(say);
        self.say(format_args!("link {}: report {} {say:?}", wire.number, self.number));
        let due = wire.send(process, Up::Report(bytes));
        if say == Say::Farewell {
            let due = self.world.truth.moment(due);
            self.world.truth.own(self.uid, |own| own.farewells.push(due));
        }
        unanswered.push_back(sent);
    }

    /// Takes an answer that came then, and lay unread while the agent was stopped; true where it asks for full state.
    fn on_offer(&mut self, process: &Process, offer: &ServerToAgent, sent: Sent, came: Instant) -> bool {
        let (now, came) = (self.world.truth.now(), self.world.truth.moment(came));
        if let Some(error) = &offer.error_response {
            self.say(format_args!("is answered: {}", error.error_message));
            self.world.truth.own(self.uid, |own| own.excuse = Some(("a report was refused", came)));
            if !matches!(error.details, Some(Details::RetryInfo(_))) {
                let cloned = self.world.truth.own(self.uid, |own| own.cloned);
                if !cloned {
                    let text = format!("{}: {}", self.name, error.error_message);
                    self.world.truth.contradict(Rule::Asked, || format!("a good report is refused: {text}"));
                }
            }
            return false;
        }
        if let Some(identification) = &offer.agent_identification
            && let Ok(bytes) = <[u8; 16]>::try_from(identification.new_instance_uid.as_slice())
        {
            self.rename(InstanceUid::from_bytes(bytes));
        }
        let asks = offer.flags & ServerToAgentFlags::ReportFullState as u64 != 0;
        if asks {
            let (excuse, cloned) = self.world.truth.own(self.uid, |own| {
                let late =
                    own.excused_until.filter(|until| came <= *until).map(|_| "something was on its way");
                let asked = std::mem::replace(&mut own.asked, true).then_some("it was asked before");
                (own.excuse.map(|(why, _)| why).or(late).or(asked), own.cloned)
            });
            // What it answered and had not stored yet is lost, and it may learn of its end by that.
            let ended = || self.world.was_taken_for_lost(process).then_some("its node was taken for lost");
            let excuse = excuse.or_else(ended);
            self.say(format_args!("is asked for full state ({})", excuse.unwrap_or("without need")));
            if excuse.is_none() && !cloned {
                let text = format!("{} is asked for full state, and nothing was lost", self.name);
                self.world.truth.contradict(Rule::Asked, || text);
            }
            // A full report that is asked for once more would never end.
            if sent.full && excuse.is_none() {
                return false;
            }
        } else {
            self.world.truth.own(self.uid, |own| {
                own.answered = sent.marks;
                // It says nothing of what happened after it, while it lay unread.
                own.excuse = own.excuse.filter(|(_, since)| *since > came);
                // Who was asked and told something else is asked again on the next link.
                own.asked &= !sent.full;
                own.acknowledged = Some(now);
            });
        }
        asks
    }

    /// It was given another uid.
    fn rename(&mut self, uid: InstanceUid) {
        if uid == self.uid {
            return;
        }
        self.say(format_args!("is to use {uid}"));
        self.name = format!("{}'", self.name);
        self.world.truth.name(uid, self.name.clone());
        let (marks, stays, said, number) = (self.marks, self.stays, self.marks, self.number);
        // Its old uid is left to whoever else uses it.
        self.world.truth.own(self.uid, |own| own.cloned = true);
        self.world.truth.own(uid, |own| {
            own.cloned = true;
            own.stays = stays;
            own.marks = marks;
            own.said.push([(number, said)].into_iter().collect());
        });
        self.uid = uid;
    }
}

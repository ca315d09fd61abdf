//! What really happened, as nobody inside the simulation could know it, and the first contradiction to it.
//!
//! The simulated agents and links tell it what they do and hear; the checker holds what is on record against it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use opamp_server::agent::InstanceUid;
use opamp_server::clock::Moment;
use opamp_server::store::Transport;
use tokio::time::Instant;
use uuid::Uuid;

use crate::check::Expected;
use crate::rules::{Rule, Rules};

/// The moment at which every simulation begins, in microseconds since the Unix epoch.
const EPOCH: i64 = 1_800_000_000_000_000;

/// How many proofs are remembered.
const PROOFS: usize = 64;

/// How many marks an agent reports: one per part.
pub(crate) const PARTS: usize = 3;

/// Which version of each of its parts an agent has, or the store knows; zero = never reported.
pub(crate) type Marks = [u64; PARTS];

/// How the end of a connection was shown by the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    /// A Close frame.
    Close,
    /// The transport ended without one.
    Fin,
    /// A reset: it shows that the peer is gone, not since when.
    Reset,
}

/// What the server side of one link, or of the polls of one connection, could know.
#[derive(Clone, Debug)]
pub(crate) struct Contact {
    pub(crate) transport: Transport,
    /// The process that heard it last.
    pub(crate) process: Uuid,
    /// When the report came that opened it.
    pub(crate) opened: Moment,
    /// When anything of it was last read.
    pub(crate) heard: Moment,
    /// When anything of it last arrived, read or not.
    pub(crate) arrived: Moment,
    /// How the peer showed its end: when that arrived.
    pub(crate) shown: Option<(Shown, Moment)>,
    /// When it was heard lately, the newest last, and by which process.
    pub(crate) proofs: VecDeque<(Moment, Uuid)>,
}

/// A link.
#[derive(Debug)]
struct Line {
    /// When anything of it last arrives.
    arrived: Moment,
    shown: Option<(Shown, Moment)>,
    connections: Vec<i64>,
}

/// What is known of one agent from its own side.
#[derive(Clone, Debug, Default)]
pub(crate) struct Own {
    /// What each report said, by run of its process and number.
    pub(crate) said: Vec<BTreeMap<u64, Marks>>,
    /// What its parts are now.
    pub(crate) marks: Marks,
    /// What a server took without asking for more.
    pub(crate) answered: Marks,
    /// When that was.
    pub(crate) acknowledged: Option<Moment>,
    /// When its last poll was read, and by which process.
    pub(crate) polled: Option<(Moment, Uuid)>,
    /// When the store was last asked for its connection and did not answer, and by which process.
    pub(crate) unanswered: Option<(Moment, u64)>,
    /// When reports arrived with which it left.
    pub(crate) farewells: Vec<Moment>,
    /// Something happened after which a server may ask for full state, and when.
    pub(crate) excuse: Option<(&'static str, Moment)>,
    /// It was asked for full state and has not told it yet.
    pub(crate) asked: bool,
    /// Until then too: something of it may still be on its way.
    pub(crate) excused_until: Option<Moment>,
    /// Another agent may use the same uid: little can be said of it.
    pub(crate) cloned: bool,
    /// It stays connected until the end.
    pub(crate) stays: bool,
    /// Since when it is gone for good.
    pub(crate) gone: Option<Moment>,
}

/// Something that must not happen.
#[derive(Clone, Debug)]
pub(crate) struct Contradiction {
    pub(crate) rule: Rule,
    pub(crate) at: Moment,
    pub(crate) text: String,
}

/// The record.
#[derive(Debug)]
pub(crate) struct Truth {
    began: Instant,
    rules: Rules,
    recording: bool,
    expected: Expected,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
pub(crate) struct Inner {
    pub(crate) contacts: HashMap<i64, Contact>,
    /// The links by number.
    links: HashMap<u64, Line>,
    pub(crate) agents: BTreeMap<InstanceUid, Own>,
    names: HashMap<InstanceUid, String>,
    processes: HashMap<Uuid, String>,
    /// When agents were admitted again.
    admitting: Vec<Moment>,
    /// Since when nobody does.
    refusing: Option<Refusing>,
    /// Times of trouble with the store.
    pub(crate) troubles: Vec<(Moment, Moment)>,
    /// Times in which a process was stopped.
    pub(crate) freezes: Vec<(Uuid, Moment, Moment)>,
    /// When processes died.
    pub(crate) deaths: HashMap<Uuid, Moment>,
    timeline: Vec<(Moment, String)>,
    first: Option<Contradiction>,
    fingerprint: u64,
}

/// A time in which nobody admits agents, for one reason after the other.
#[derive(Clone, Copy, Debug)]
struct Refusing {
    /// Since when for the present reason.
    since: Moment,
    /// How much of that no server notices.
    unnoticed: Duration,
    /// True where an earlier reason lasted for longer than goes unnoticed.
    noticed: bool,
}

impl Refusing {
    fn is_noticed(&self, now: Moment) -> bool {
        self.noticed || now.since(self.since) >= self.unnoticed
    }
}

impl Contact {
    fn hear(&mut self, at: Moment, proves: bool) {
        self.heard = self.heard.max(at);
        if proves && self.proofs.back().is_none_or(|(last, _)| *last < at) {
            self.proofs.push_back((at, self.process));
        }
        if self.proofs.len() > PROOFS {
            self.proofs.pop_front();
        }
    }
}

impl Truth {
    pub(crate) fn new(rules: Rules, recording: bool, expected: Expected) -> Self {
        Self { began: Instant::now(), rules, recording, expected, inner: Mutex::default() }
    }

    pub(crate) fn expected(&self) -> Expected {
        self.expected
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long the simulation lasts.
    pub(crate) fn lasted(&self) -> Duration {
        self.began.elapsed()
    }

    pub(crate) fn now(&self) -> Moment {
        self.moment(Instant::now())
    }

    pub(crate) fn moment(&self, instant: Instant) -> Moment {
        let since = instant.saturating_duration_since(self.began);
        Moment::from_micros(EPOCH).after(since)
    }

    /// Puts a line on the timeline.
    pub(crate) fn say(&self, text: fmt::Arguments<'_>) {
        if self.recording {
            let (now, text) = (self.now(), text.to_string());
            self.lock().timeline.push((now, text));
        }
    }

    /// Mixes what happened into the fingerprint of the run.
    pub(crate) fn stir(&self, number: u64) {
        let now = self.now().as_micros().cast_unsigned();
        let mut inner = self.lock();
        inner.fingerprint =
            (inner.fingerprint.rotate_left(5) ^ number ^ now).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    /// Notes a contradiction, unless its rule is not looked at.
    pub(crate) fn contradict(&self, rule: Rule, text: impl FnOnce() -> String) {
        if !self.rules.has(rule) {
            return;
        }
        let at = self.now();
        let text = text();
        self.say(format_args!("!!! {rule:?}: {text}"));
        self.lock().first.get_or_insert(Contradiction { rule, at, text });
    }

    pub(crate) fn first(&self) -> Option<Contradiction> {
        self.lock().first.clone()
    }

    pub(crate) fn fingerprint(&self) -> u64 {
        self.lock().fingerprint
    }

    pub(crate) fn timeline(&self) -> Vec<(Moment, String)> {
        self.lock().timeline.clone()
    }

    pub(crate) fn name(&self, uid: InstanceUid, name: String) {
        self.lock().names.insert(uid, name);
    }

    /// The name of an agent, for people.
    pub(crate) fn who(&self, uid: InstanceUid) -> String {
        self.lock().who(uid)
    }

    pub(crate) fn name_process(&self, node: Uuid, name: String) {
        self.lock().processes.insert(node, name);
    }

    pub(crate) fn process(&self, node: Uuid) -> String {
        self.lock().processes.get(&node).cloned().unwrap_or_else(|| node.to_string())
    }

    /// Changes what is known of an agent.
    pub(crate) fn own<T>(&self, agent: InstanceUid, change: impl FnOnce(&mut Own) -> T) -> T {
        change(self.lock().agents.entry(agent).or_default())
    }

    /// Something of a link will arrive at `due`.
    pub(crate) fn arrives(&self, link: u64, due: Instant, shown: Option<Shown>) {
        let due = self.moment(due);
        let mut inner = self.lock();
        let Inner { links, contacts, .. } = &mut *inner;
        let link = links.entry(link).or_insert(Line { arrived: due, shown: None, connections: Vec::new() });
        link.arrived = due;
        if let Some(shown) = shown {
            link.shown.get_or_insert((shown, due));
        }
        for id in &link.connections {
            if let Some(contact) = contacts.get_mut(id) {
                contact.arrived = due;
                if let Some(shown) = shown {
                    contact.shown.get_or_insert((shown, due));
                }
            }
        }
    }

    /// Something of a link was read just now.
    ///
    /// It proves that the peer was there, unless it may have waited before.
    pub(crate) fn hears(&self, link: u64, proves: bool) {
        let now = self.now();
        let mut inner = self.lock();
        let Inner { links, contacts, .. } = &mut *inner;
        for id in links.get(&link).map(|link| link.connections.as_slice()).unwrap_or_default() {
            if let Some(contact) = contacts.get_mut(id) {
                contact.hear(now, proves);
            }
        }
    }

    /// A report that was read at `heard` was taken by the session of this connection.
    pub(crate) fn taken(
        &self,
        connection: i64,
        transport: Transport,
        process: Uuid,
        link: Option<u64>,
        heard: Moment,
    ) {
        let mut inner = self.lock();
        let Inner { links, contacts, .. } = &mut *inner;
        let link = link.and_then(|link| links.get_mut(&link));
        let (arrived, shown) = link.as_ref().map_or((heard, None), |link| (link.arrived, link.shown));
        let contact = contacts.entry(connection).or_insert_with(|| Contact {
            transport,
            process,
            opened: heard,
            heard,
            arrived,
            shown,
            proofs: VecDeque::new(),
        });
        contact.process = process;
        contact.hear(heard, link.is_none());
        contact.arrived = contact.arrived.max(arrived);
        if let Some(link) = link
            && !link.connections.contains(&connection)
        {
            link.connections.push(connection);
        }
    }

    /// A time in which the store was in trouble.
    pub(crate) fn trouble(&self, from: Moment, until: Moment) {
        self.lock().troubles.push((from, until));
    }

    /// A time in which a process was stopped.
    pub(crate) fn froze(&self, process: Uuid, from: Moment, until: Moment) {
        self.lock().freezes.push((process, from, until));
    }

    /// A process is gone.
    pub(crate) fn died(&self, process: Uuid) {
        let now = self.now();
        self.lock().deaths.entry(process).or_insert(now);
    }
}

impl Inner {
    /// Since when agents were admitted at that moment.
    pub(crate) fn admitting(&self, at: Moment) -> Moment {
        self.admitting.iter().rev().copied().find(|since| *since <= at).unwrap_or_default()
    }

    /// Notes that agents are admitted, or not for a reason that a server notices after a while.
    pub(crate) fn admits(&mut self, now: Moment, unnoticed: Option<Duration>) {
        match (unnoticed, self.refusing) {
            (None, Some(refusing)) => {
                if refusing.is_noticed(now) {
                    self.admitting.push(now);
                }
                self.refusing = None;
            }
            (Some(unnoticed), Some(refusing)) if refusing.unnoticed == unnoticed => {}
            (Some(unnoticed), before) => {
                // A short stop beside a short trouble of the store is neither a long stop nor a long trouble.
                let noticed = before.is_some_and(|before| before.is_noticed(now));
                self.refusing = Some(Refusing { since: now, unnoticed, noticed });
            }
            (None, None) => {}
        }
    }

    pub(crate) fn who(&self, uid: InstanceUid) -> String {
        self.names.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }

    /// True where the store was in trouble in this time.
    pub(crate) fn troubled(&self, from: Moment, until: Moment) -> bool {
        self.troubles.iter().any(|(begin, end)| *begin <= until && *end >= from)
    }

    /// True where the process was stopped in this time.
    pub(crate) fn froze(&self, process: Uuid, from: Moment, until: Moment) -> bool {
        self.freezes.iter().any(|(which, begin, end)| *which == process && *begin <= until && *end >= from)
    }

    /// The last proof that the process which heard it had `told` the others of, and which process that is: what is read
    /// after a stop proves nothing.
    pub(crate) fn proof(&self, contact: &Contact, told: impl Fn(Uuid) -> Moment) -> (Moment, Uuid) {
        let after_stop = |at: Moment| {
            self.freezes
                .iter()
                .any(|(_, begin, end)| *begin < at && at <= end.after(Duration::from_millis(1_500)))
        };
        let mut proofs = contact.proofs.iter().rev().copied();
        let proof = proofs.find(|(at, process)| *at <= told(*process) && !after_stop(*at));
        // Polls may go on with a row that a process opened which died before it answered.
        let opened = Some(contact.opened).filter(|at| !after_stop(*at)).unwrap_or_default();
        proof.unwrap_or((opened, contact.process))
    }
}

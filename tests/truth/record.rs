//! What the simulator did and what it was answered, by the clock of the host that the servers read too.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use opamp_server::agent::InstanceUid;
use opamp_server::clock::{Moment, host_now};

use crate::wire::Socket;

/// What an agent is: a generation for each part that it reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) description: u32,
    pub(crate) health: u32,
    pub(crate) config: u32,
}

impl Content {
    /// True where no part is older than in `other`.
    pub(crate) fn covers(self, other: Self) -> bool {
        self.description >= other.description && self.health >= other.health && self.config >= other.config
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    WebSocket,
    Http,
}

/// How a stay ended, as the simulator knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The agent said so in a report that was answered.
    Farewell,
    /// The agent sent a Close frame.
    Close,
    /// The agent said nothing more: FIN without a Close frame.
    Finish,
    /// The agent broke off with a reset.
    Reset,
    /// The agent said nothing more and kept its socket, if it had one.
    Silence,
    /// The agent forgot its socket, which stays open and silent, and comes back on another one.
    Abandon,
    /// The server sent a Close frame.
    Told(u16, String),
    /// The link broke at the server's side.
    Broken,
    /// The agent lost patience with a server that did not answer, and broke off.
    Impatience,
    /// A handshake or a first report was refused or failed: the stay never began.
    Refused,
}

impl End {
    /// True for what the agent itself did of its own will.
    pub(crate) fn is_own(&self) -> bool {
        match self {
            Self::Farewell | Self::Close | Self::Finish | Self::Reset | Self::Silence => true,
            Self::Abandon | Self::Told(..) | Self::Broken | Self::Impatience | Self::Refused => false,
        }
    }
}

/// An exchange that was answered with an offer: sent, and answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exchange {
    pub(crate) sent: Moment,
    pub(crate) answered: Moment,
    /// True where the answer asks for full state.
    pub(crate) asked: bool,
}

/// A request for full state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask {
    pub(crate) at: Moment,
    /// When the exchange before it was sent; none for the agent's first.
    pub(crate) previous: Option<Moment>,
    /// True where an earlier report may not have arrived, so that the numbers may show a gap.
    pub(crate) lost: bool,
    /// True where it answers a report that held everything and followed another on the same stay.
    pub(crate) again: bool,
}

/// A time in which the agent was, or tried to be, connected: one WebSocket, or one series of polls.
#[derive(Clone, Debug)]
pub(crate) struct Stay {
    pub(crate) way: Way,
    /// The node of a WebSocket, or of the first poll.
    pub(crate) node: usize,
    /// Our address on it.
    pub(crate) address: String,
    /// Just before its first report was sent.
    pub(crate) hello: Moment,
    pub(crate) exchanges: Vec<Exchange>,
    /// When a poll was not answered.
    pub(crate) failed: Vec<Moment>,
    /// Just before bytes were sent last.
    pub(crate) last_sent: Moment,
    /// When the agent did, or saw, what ended it; before it did it.
    pub(crate) ended: Option<(Moment, End)>,
    /// When nothing of it could reach a server any more.
    pub(crate) gone: Option<Moment>,
    /// When a silent agent gave its socket up.
    pub(crate) released: Option<Moment>,
    /// True where a farewell was sent, answered or not.
    pub(crate) farewell: bool,
    /// The longest time between two reports or polls.
    pub(crate) longest_gap: Duration,
}

/// All there is to know of one agent.
#[derive(Debug)]
pub(crate) struct AgentRecord {
    pub(crate) uid: InstanceUid,
    pub(crate) stays: Vec<Stay>,
    /// What it is now.
    pub(crate) content: Content,
    /// What was answered, part by part.
    pub(crate) acknowledged: Content,
    /// When full state was asked for.
    pub(crate) asked: Vec<Ask>,
    /// Answers that no agent should ever see.
    pub(crate) outrages: Vec<String>,
    /// When a server refused it for now: 503, or the error that says so.
    pub(crate) refusals: Vec<Moment>,
    /// Everything in words.
    pub(crate) notes: Vec<(Moment, String)>,
}

/// The record of an agent, shared with the task that plays it.
#[derive(Clone, Debug)]
pub(crate) struct Record(Arc<Mutex<AgentRecord>>);

impl Record {
    pub(crate) fn new(uid: InstanceUid) -> Self {
        let content = Content { description: 1, health: 1, config: 1 };
        Self(Arc::new(Mutex::new(AgentRecord {
            uid,
            stays: Vec::new(),
            content,
            acknowledged: Content::default(),
            asked: Vec::new(),
            outrages: Vec::new(),
            refusals: Vec::new(),
            notes: Vec::new(),
        })))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, AgentRecord> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn note(&self, text: impl Into<String>) {
        self.lock().notes.push((host_now(), text.into()));
    }

    pub(crate) fn outrage(&self, text: String) {
        self.note(format!("OUTRAGE {text}"));
        self.lock().outrages.push(text);
    }

    /// A stay begins: its first report is about to be sent.
    pub(crate) fn begin(&self, way: Way, node: usize, socket: Option<&Socket>) {
        let (hello, address) = (host_now(), socket.map(Socket::address).unwrap_or_default());
        self.note(format!("comes by {way:?} to node {node} from {address}"));
        self.lock().stays.push(Stay {
            way,
            node,
            address,
            hello,
            exchanges: Vec::new(),
            failed: Vec::new(),
            last_sent: hello,
            ended: None,
            gone: None,
            released: None,
            farewell: false,
            longest_gap: Duration::ZERO,
        });
    }

    /// Changes the present stay.
    pub(crate) fn stay<T>(&self, change: impl FnOnce(&mut Stay) -> T) -> Option<T> {
        self.lock().stays.last_mut().map(change)
    }

    pub(crate) fn sending(&self) {
        let now = host_now();
        self.stay(|stay| {
            stay.longest_gap = stay.longest_gap.max(now.since(stay.last_sent));
            stay.last_sent = now;
        });
    }

    /// A poll was not answered.
    pub(crate) fn failed(&self, text: &str) {
        self.note(text);
        self.stay(|stay| stay.failed.push(host_now()));
    }

    pub(crate) fn ended(&self, end: End) {
        self.note(format!("end of stay: {end:?}"));
        self.stay(|stay| {
            if stay.ended.is_none() {
                stay.ended = Some((host_now(), end));
            }
        });
    }

    pub(crate) fn gone(&self) {
        self.stay(|stay| stay.gone = Some(host_now()));
    }
}

/// What was broken, and of which node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Trouble {
    /// The process is dead, or not yet ready.
    Down,
    /// SIGKILL, until the process is gone.
    Killed,
    /// SIGTERM, until the process is gone.
    Terminated,
    /// SIGSTOP, until SIGCONT.
    Stopped,
    StoreRefused,
    StoreCut,
    StoreFrozen,
    StoreDelayed,
    CommitCut,
    /// Another writer holds the database.
    StoreLocked,
    /// The database ends every session, again and again, as one does that is started anew.
    StoreRestarted,
    /// The host kept the simulator itself from running; the servers say the same of themselves.
    Lag,
}

impl Trouble {
    pub(crate) fn is_of_store(self) -> bool {
        match self {
            Self::StoreRefused
            | Self::StoreCut
            | Self::StoreFrozen
            | Self::StoreDelayed
            | Self::CommitCut
            | Self::StoreLocked
            | Self::StoreRestarted => true,
            Self::Down | Self::Killed | Self::Terminated | Self::Stopped | Self::Lag => false,
        }
    }
}

/// A time of trouble; of every node where it names none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) node: Option<usize>,
    pub(crate) trouble: Trouble,
    pub(crate) from: Moment,
    pub(crate) to: Option<Moment>,
}

impl Window {
    pub(crate) fn overlaps(&self, from: Moment, to: Moment) -> bool {
        self.from <= to && self.to.is_none_or(|end| end >= from)
    }

    /// True where it keeps everybody out: a connection that is cut, or slow, does not.
    pub(crate) fn closes(&self) -> bool {
        !matches!(self.trouble, Trouble::StoreCut | Trouble::CommitCut | Trouble::StoreDelayed)
    }

    pub(crate) fn is_of(&self, node: usize) -> bool {
        self.node.is_none_or(|of| of == node)
    }
}

/// All troubles of a round, and what else the servers did.
#[derive(Debug, Default)]
struct Diary {
    windows: Vec<Window>,
    notes: Vec<(Moment, String)>,
    outrages: Vec<String>,
    faults: BTreeMap<Trouble, u32>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Troubles(Arc<Mutex<Diary>>);

impl Troubles {
    fn lock(&self) -> MutexGuard<'_, Diary> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A trouble begins; answers its number.
    pub(crate) fn begin(&self, node: Option<usize>, trouble: Trouble) -> usize {
        let from = host_now();
        let mut diary = self.lock();
        *diary.faults.entry(trouble).or_default() += 1;
        diary.notes.push((from, format!("node {node:?}: {trouble:?} begins")));
        diary.windows.push(Window { node, trouble, from, to: None });
        diary.windows.len() - 1
    }

    pub(crate) fn end(&self, number: usize) {
        let now = host_now();
        let mut diary = self.lock();
        let Some(window) = diary.windows.get_mut(number) else { return };
        window.to = Some(now);
        let Window { node, trouble, .. } = *window;
        diary.notes.push((now, format!("node {node:?}: {trouble:?} is over")));
    }

    /// A trouble that was noticed afterwards.
    pub(crate) fn past(&self, node: Option<usize>, trouble: Trouble, from: Moment, to: Moment) {
        let mut diary = self.lock();
        diary.notes.push((to, format!("node {node:?}: {trouble:?} for {:?}", to.since(from))));
        diary.windows.push(Window { node, trouble, from, to: Some(to) });
    }

    pub(crate) fn note(&self, text: impl Into<String>) {
        self.lock().notes.push((host_now(), text.into()));
    }

    pub(crate) fn outrage(&self, text: String) {
        self.lock().outrages.push(text);
    }

    pub(crate) fn windows(&self) -> Vec<Window> {
        self.lock().windows.clone()
    }

    pub(crate) fn notes(&self) -> Vec<(Moment, String)> {
        self.lock().notes.clone()
    }

    pub(crate) fn outrages(&self) -> Vec<String> {
        self.lock().outrages.clone()
    }

    pub(crate) fn faults(&self) -> BTreeMap<Trouble, u32> {
        self.lock().faults.clone()
    }
}

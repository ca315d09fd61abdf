//! What a batch is made of, and what each of its writes is answered.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::agent::document::Documents;
use crate::agent::report::KnownAgent;
use crate::agent::{Capabilities, InstanceUid};
use crate::clock::Moment;
use crate::close::CloseReason;
use crate::store::{StatusChange, Transport};

/// One write of a batch. Stages run in this order: updates, ends, openings.
#[derive(Clone, Debug)]
pub enum Write {
    /// Upserts what an agent reported.
    UpdateAgent(Box<AgentUpdate>),
    /// Ends a connection: its row, the agent's status, the reason, last seen.
    UpdateConnection(ConnectionEnd),
    /// Creates a connection, and the agent's record where it is new, with what its first report says.
    CreateConnection(NewConnection),
}

impl Write {
    /// The agent concerned.
    #[must_use]
    pub fn agent(&self) -> InstanceUid {
        match self {
            Self::UpdateAgent(update) => update.agent,
            Self::UpdateConnection(end) => end.agent,
            Self::CreateConnection(new) => new.agent,
        }
    }

    /// The node that writes.
    pub(super) fn node(&self) -> Uuid {
        match self {
            Self::UpdateAgent(update) => update.node_id,
            Self::UpdateConnection(end) => end.node_id,
            Self::CreateConnection(new) => new.node_id,
        }
    }

    /// The stage in which it runs, from 0.
    #[must_use]
    pub fn stage(&self) -> u8 {
        match self {
            Self::UpdateAgent(_) => 0,
            Self::UpdateConnection(_) => 1,
            Self::CreateConnection(_) => 2,
        }
    }
}

/// What an agent reported, to be stored by the connection that holds the fence.
#[derive(Clone, Debug)]
pub struct AgentUpdate {
    /// Whose report.
    pub agent: InstanceUid,
    /// The fence.
    pub connection_id: i64,
    /// When it came, as far as that is proved.
    pub at: Moment,
    /// When it was read; where that was after a stop of the process, when the stop began.
    pub read_at: Moment,
    /// The number that the stored state now stands for; none while something may be missing.
    pub sequence_num: Option<u64>,
    /// The mask.
    pub capabilities: Capabilities,
    /// The parts that changed.
    pub documents: Documents,
    /// True where it waited in memory while the store was away, or on a socket while the process was stopped: it
    /// changes nothing where the agent was seen after `read_at`, because another node may have stored what is newer.
    pub late: bool,
    /// The node that took it.
    pub node_id: Uuid,
}

impl AgentUpdate {
    /// This update and a `newer` one of the same connection as one.
    #[must_use]
    pub fn followed_by(self, newer: Self) -> Self {
        Self {
            at: self.at.max(newer.at),
            read_at: self.read_at.max(newer.read_at),
            documents: self.documents.followed_by(newer.documents),
            ..newer
        }
    }
}

/// The end of a connection.
#[derive(Clone, Debug)]
pub struct ConnectionEnd {
    /// Whose connection.
    pub agent: InstanceUid,
    /// Which connection.
    pub connection_id: i64,
    /// Why it ended.
    pub reason: CloseReason,
    /// The end as seen, or the last proof that it was connected.
    pub disconnected_at: Moment,
    /// For an end that was not seen: when it was known.
    pub disconnected_by: Option<Moment>,
    /// When the agent was last heard.
    pub last_seen_at: Moment,
    /// The number that the stored state stands for.
    pub sequence_num: Option<u64>,
    /// True where a change was on its way to the store: the number on record stands.
    pub unsaved: bool,
    /// For an end that counts as the server's: when the agent goes offline unless it returns; none = at once.
    pub offline_at: Option<Moment>,
    /// For polls: changes nothing where the store saw the agent later than this.
    pub unless_seen_after: Option<Moment>,
    /// The node that ends it, for the status log.
    pub node_id: Uuid,
}

/// What its first report makes of an agent of which nothing is on record.
#[derive(Clone, Debug)]
pub struct FirstReport {
    /// The number that the stored state then stands for; none while something may be missing.
    pub sequence_num: Option<u64>,
    /// The mask.
    pub capabilities: Capabilities,
    /// The parts that it holds.
    pub documents: Documents,
}

/// A connection to open.
#[derive(Clone, Debug)]
pub struct NewConnection {
    /// Whose connection.
    pub agent: InstanceUid,
    /// How its reports travel.
    pub transport: Transport,
    /// The peer's address and port.
    pub remote_addr: String,
    /// The node that opens it.
    pub node_id: Uuid,
    /// A number unique within the node, which makes opening idempotent.
    pub node_seq: i64,
    /// When its first report came.
    pub at: Moment,
    /// What that proves where its row was open before: less, where it was read after a stop of the process.
    pub seen_at: Moment,
    /// The number of its first report.
    pub number: u64,
    /// What this node knows of an older connection that it holds.
    pub older: Option<Older>,
    /// The uid that is given to its agent where two agents share one; none where it would not understand.
    pub spare: Option<InstanceUid>,
    /// For polls: how long a poller may be silent whose pace is not on record. An open connection
    /// over plain HTTP that was heard within its time goes on.
    pub first_poll: Option<Duration>,
    /// For polls: how long a sign of life that another node read may be on its way here.
    pub poll_grace: Duration,
    /// For polls: nobody was silent before this moment, because this node could not have heard it.
    pub excused_until: Option<Moment>,
    /// What is stored with the connection where nothing is on record of the agent: a fleet that comes for the first
    /// time then takes one commit each, not two.
    pub first_report: Option<Arc<FirstReport>>,
}

/// What a node knows better than the store of a connection that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Older {
    /// Which connection.
    pub connection_id: i64,
    /// How its reports travel.
    pub transport: Transport,
    /// The last proof that it was connected.
    pub last_proof: Moment,
    /// The number of its last report.
    pub number: Option<u64>,
}

/// Two agents share an instance uid, and this one of them is to use another (S-049).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rival {
    /// The uid that it is to use.
    pub uid: InstanceUid,
    /// How often it was told so, this time included.
    pub offers: u32,
}

/// An opened connection.
#[derive(Clone, Debug)]
pub struct Opened {
    /// Its id, the fence of all later writes.
    pub connection_id: i64,
    /// True where it goes on with a row that was open: polls, or an opening that was done before.
    pub continued: bool,
    /// When it began.
    pub connected_at: Moment,
    /// The sign of life that was stored with it.
    pub seen_at: Moment,
    /// For polls that go on: how long this poller may be silent, if that is on record.
    pub poll_silence: Option<Duration>,
    /// What the store knew of the agent.
    pub agent: KnownAgent,
    /// True where its first report was stored with it.
    pub stored: bool,
    /// The connection it displaced.
    pub displaced: Option<Displaced>,
    /// The change of status it brought.
    pub status: Option<StatusChange>,
}

/// An older connection that a newcomer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Displaced {
    /// Its id.
    pub connection_id: i64,
    /// Why it ended.
    pub reason: CloseReason,
    /// How long it lasted, in seconds.
    pub duration_seconds: i64,
}

/// What became of an end.
#[derive(Clone, Debug, Default)]
pub struct Ended {
    /// How long the connection lasted, in seconds; none where its row was ended before.
    pub duration_seconds: Option<i64>,
    /// The change of status it brought.
    pub status: Option<StatusChange>,
}

/// The answer to one [`Write`], of the same kind.
#[derive(Clone, Debug)]
pub enum Written {
    /// True where the update was stored; false where a newer connection holds the fence.
    Agent(bool),
    /// What became of the end.
    Connection(Ended),
    /// The opened connection.
    Created(Box<Opened>),
    /// Nothing was opened: it comes from another agent than the connected one.
    Rival(Rival),
}

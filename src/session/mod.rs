//! One agent's conversation, without any socket: reports in, offers out.
//!
//! [`exchange()`] is the whole of it: it opens the session at the first report, absorbs, saves what
//! changed before it answers (a new agent's with its connection), and ends the session when the agent leaves or is given another uid.
//! It returns what to send and sends nothing. Whoever holds a [`Session`] holds its connection
//! open: dropped without an end, the connection ends as `internal_error`.

pub mod ends;
mod exchange;
pub mod flush;
pub mod hub;
mod inbound;
mod question;
mod services;

use std::sync::Arc;

use crate::agent::offer::{Answer, Refusal, compose};
use crate::agent::report::{AgentState, Change, Kind, Outline, PartSet};
use crate::agent::{InstanceUid, is_legacy};
use crate::clock::{Moment, Tick};
use crate::close::CloseReason;
use crate::history::{EndTicket, Noticed, OpenConnection, Opening, Opens, Saved};
use crate::metrics::{DecodeFailure, Refused};
use crate::proto::{AgentCapabilities, AgentToServer, ServerToAgent};
use crate::pulse::Pulse;
use crate::store::{AgentUpdate, Rival, StoreError, Transport};
use exchange::kind_of;
pub use exchange::{Exchange, Exchanged, exchange, introduce, reject, sender};
pub use inbound::{Inbound, Origin};
use question::Question;
pub use services::Services;

/// How many agents are asked for their full state in a second: after a crash many are to be, and each
/// answers with a large report. Who is not asked at once is asked later.
pub const QUESTIONS_PER_SECOND: usize = 500;

/// How long an agent is told to stay away when the store cannot take its report, in seconds.
const RETRY_AFTER_SECONDS: u64 = 30;

/// The live conversation with one agent.
#[derive(Debug)]
pub struct Session {
    services: Arc<Services>,
    connection: Arc<OpenConnection>,
    state: AgentState,
    /// The last answer, which a repeated report gets once more.
    answered: Answer,
    /// The other agent that speaks under the same uid on the same link.
    rival: Option<Box<Rival>>,
    /// Whether its full state is to be asked for.
    question: Question,
    standing: Standing,
    /// Of a poller: when its last poll came of which the store said that its row is open.
    sure_at: Tick,
}

/// Whether a poller is still this node's: between its polls, another node may have taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It missed none of its polls here since the store said so.
    Sure,
    /// It may have polled elsewhere; it came back within its time.
    Unsure,
    /// Another node may conclude that it was silent: a poll of it was read late, and the store is to be told.
    Untold,
    /// It was away for longer than that, and nobody could say so far.
    Doubtful,
}

/// What a report finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrival {
    /// A connection that it has just made.
    Newcomer,
    /// The same, of an agent of which nothing was on record: what it changed is stored already.
    Stored(Change),
    /// A row with which its session goes on from now. This node has told the store of no later sign of life than this.
    Continued(Moment),
    /// A session that knows its agent.
    Known,
}

/// Whose conversation a first report opened.
enum Opened {
    Session(Session, Arrival),
    /// Another agent's, which is to use the uid in here.
    Rival(Rival),
}

impl Session {
    /// Opens the connection of `agent`; its row is durable when this returns.
    async fn open(
        services: &Arc<Services>,
        origin: &Origin,
        agent: InstanceUid,
        inbound: &mut Inbound,
    ) -> Result<Opened, StoreError> {
        let older = services.hub.get(agent);
        let heard = origin.link.last_byte();
        // Who is known here, or told what nobody took, goes on from there.
        let unknown = older.is_none() && !origin.link.has_refused();
        let first = if unknown { inbound.as_first() } else { None };
        let report = &inbound.report;
        let opening = Opening {
            agent,
            transport: origin.transport,
            remote_addr: &origin.remote_addr.to_string(),
            heard,
            number: report.sequence_num,
            older: older.as_deref(),
            spare: (!is_legacy(&report.instance_uid)).then(InstanceUid::generate),
            // Who is about to be lost may have heard it and told nobody.
            poll_grace: services.watch.poll_grace(),
            peer_lost: if services.peers.is_unsure(services.clock.tick()) {
                Some(heard)
            } else {
                services.peers.lost_at()
            },
            first_report: first.as_ref().map(|(.., report)| Arc::clone(report)),
        };
        let (mut opened, told) = match services.history.open(opening, &mut inbound.share).await? {
            Opens::Connection { opened, told } => (opened, told),
            Opens::Rival(rival) => return Ok(Opened::Rival(rival)),
        };
        let before_it = older.as_ref().filter(|older| older.id == opened.connection_id);
        let told = before_it.map_or(told, |older| told.max(older.sighted()));
        let before = opened.displaced.map_or(opened.connection_id, |displaced| displaced.connection_id);
        if let Some(older) = older.filter(|older| before == older.id) {
            // Signs of life that were not flushed yet: who continues them is not asked for full state.
            opened.agent.sequence_num = older.pulse.number().max(opened.agent.sequence_num);
        }
        let (state, arrival) = match first {
            Some((state, change, _)) if opened.stored => (state, Arrival::Stored(change)),
            _ if opened.continued => (AgentState::restore(&opened.agent), Arrival::Continued(told)),
            _ => (AgentState::restore(&opened.agent), Arrival::Newcomer),
        };
        let pulse = Pulse::resuming(heard, state.stored_number(), opened.poll_silence);
        let link = Arc::clone(&origin.link);
        let connection = OpenConnection::new(agent, opened.connection_id, origin.transport, link, pulse);
        connection.note_sighting(opened.seen_at);
        let connection = Arc::new(connection);
        let services = Arc::clone(services);
        let mut session = Self {
            services,
            connection,
            state,
            answered: Answer::default(),
            rival: None,
            question: Question::new(heard),
            standing: Standing::Sure,
            sure_at: heard,
        };
        if opened.continued && session.is_read_late(heard) {
            // On record it is as silent as before: whoever judges it now is told by its next poll, not by the flush.
            session.standing = Standing::Untold;
        }
        session.services.hub.enter(&session.connection);
        session.services.watch.over(Arc::clone(&session.connection), Tick::default()).await;
        Ok(Opened::Session(session, arrival))
    }

    /// Makes sure that a poller which may have been at another node since its last poll here still has its row.
    /// False where its row must be asked for anew: after so long, another node may be about to end it.
    async fn make_sure(&mut self, heard: Tick, number: u64) -> Result<bool, Refusal> {
        if self.connection.transport != Transport::Http {
            return Ok(true);
        }
        let (services, pulse) = (&self.services, &self.connection.pulse);
        // What looks like a repetition may be the first poll after a restart that another node was told of.
        let follows = pulse.is_followed_by(number);
        let missed = (!follows || pulse.missed_polls(heard)) && self.peers_may_be_there();
        if self.standing == Standing::Sure && !missed && !self.may_be_given_up() {
            return Ok(true);
        }
        // What lay on a socket while this process was stopped came in time, if it came before that.
        let late = self.standing == Standing::Doubtful
            || self.connection.proof(&services.sight, heard) > self.deadline();
        if services.outage.is_away() {
            // A poll that is refused counts as a sign of life, and makes nothing sure.
            self.standing = match self.standing {
                _ if late => Standing::Doubtful,
                Standing::Untold => Standing::Untold,
                Standing::Sure | Standing::Unsure | Standing::Doubtful => Standing::Unsure,
            };
            // Who was away for longer than its time comes like a newcomer.
            return if late { Err(unavailable()) } else { Ok(true) };
        }
        let doubtful = late || !(follows || pulse.is_repeated_by(number));
        if doubtful || self.standing == Standing::Untold || self.is_read_late(heard) {
            // Until that is done, nothing is sure. Who was elsewhere has its number on record. And of whom this node could
            // not hear for a while another one is told now, before it concludes that nobody did.
            self.standing = if doubtful { Standing::Doubtful } else { Standing::Untold };
            return Ok(false);
        }
        let on_record = self.is_on_record().await;
        self.standing = if on_record.is_ok() { Standing::Sure } else { Standing::Unsure };
        if on_record.is_ok() {
            self.sure_at = heard;
        }
        if on_record == Ok(false) {
            self.connection.abandon(CloseReason::Superseded);
        }
        Ok(true)
    }

    /// True where the agent's polls may land on another node as well.
    fn peers_may_be_there(&self) -> bool {
        let Services { peers, sight, clock, .. } = &*self.services;
        peers.may_be_there(sight.resumed(clock.tick()))
    }

    /// True for a poll that was read after this process was stopped, while others may have heard its agent.
    fn is_read_late(&self, heard: Tick) -> bool {
        self.connection.transport == Transport::Http
            && self.connection.proof(&self.services.sight, heard) < heard
            && self.peers_may_be_there()
    }

    /// True where another node may have ended a poller's row although all its polls came here: while this node did not
    /// reach the store, nobody else heard of them.
    fn may_be_given_up(&self) -> bool {
        let Services { peers, sight, clock, .. } = &*self.services;
        sight.resumed(clock.tick()) > self.sure_at
            && (self.peers_may_be_there() || peers.lost_at().is_some_and(|lost| lost > self.sure_at))
    }

    /// For a poll that was read after this process was stopped: whoever heard its agent later than this may have been
    /// told what is newer. None where nobody can have been.
    fn overtaken_after(&self, arrival: Arrival, heard: Tick) -> Option<Moment> {
        let late = matches!(arrival, Arrival::Known | Arrival::Continued(_)) && self.is_read_late(heard);
        let proof = self.connection.proof(&self.services.sight, heard);
        // What this node told the store itself overtakes nothing. What the row said at its opening does.
        let told = match arrival {
            Arrival::Known => self.connection.sighted(),
            Arrival::Continued(told) => told,
            Arrival::Newcomer | Arrival::Stored(_) => Moment::default(),
        };
        late.then(|| self.services.clock.moment(proof).max(told))
    }

    /// True where the store says that this very connection is open.
    async fn is_on_record(&self) -> Result<bool, StoreError> {
        let open = self.services.store.get_active_connection(self.connection.agent).await?;
        Ok(open.is_some_and(|row| row.id == self.connection.id))
    }

    /// By when the agent was to be heard again.
    fn deadline(&self) -> Tick {
        let Session { connection, services, .. } = self;
        connection.pulse.beat().deadline(connection.transport, &connection.link, services.history.expected())
    }

    /// The open connection.
    #[must_use]
    pub fn connection(&self) -> &Arc<OpenConnection> {
        &self.connection
    }

    /// Ends the connection, unless it has ended before; the ticket tells when that is on record.
    #[must_use]
    pub fn end(&self, reason: CloseReason, noticed: Noticed) -> Option<EndTicket> {
        self.services.history.end(&self.connection, reason, noticed)
    }

    /// Takes a mere sign of life, or the last report once more, and touches nothing but this session.
    ///
    /// `None` where the report wants more: nothing has happened then.
    #[must_use]
    pub fn beat(&mut self, report: &AgentToServer, outline: &Outline) -> Option<ServerToAgent> {
        if self.connection.ended().is_some() || self.connection.forgot() || self.question.is_owed() {
            return None;
        }
        let (next, change) = self.state.absorb(outline);
        let quiet = !change.must_save && !change.leaves && !change.requests_uid && !change.ask_full_state;
        if !quiet || change.kind == Kind::Rival || self.is_to_be_reminded(&next, change.kind) {
            return None;
        }
        self.connection.pulse.reported(self.services.clock.tick(), false);
        if change.kind == Kind::Repeat {
            self.services.metrics.reports.of(Kind::Repeat).increment(1);
            self.services.metrics.offers.of(kind_of(self.answered)).increment(1);
        } else {
            self.adopt(next, change, true);
        }
        Some(compose(&report.instance_uid, self.answered))
    }

    /// True where the answer that asked the agent may be lost: a minute later it has not told what it told before. A
    /// report of nothing but the uid asks nothing.
    fn is_to_be_reminded(&self, state: &AgentState, kind: Kind) -> bool {
        let missing = kind != Kind::Bare && state.owes_known_parts();
        missing && self.question.is_due_again(self.services.clock.tick())
    }

    /// True where the agent is asked for its full state now: whoever needs it is asked, a few at a time.
    fn asks(&mut self) -> bool {
        if !self.question.is_owed() {
            return false;
        }
        let Services { questions, clock, .. } = &*self.services;
        let now = clock.tick();
        self.question.put(now, || questions.take(now))
    }

    /// The question for full state, where it is owed and its turn has come.
    pub fn overdue_question(&mut self) -> Option<ServerToAgent> {
        let question = Answer { ask_full_state: true, new_uid: None };
        self.asks().then(|| compose(self.connection.agent.as_bytes(), question))
    }

    /// Takes over a state whose changes, if any, are stored.
    fn adopt(&mut self, next: AgentState, change: Change, quiet: bool) {
        let heartbeats = next.capabilities().has(AgentCapabilities::ReportsHeartbeat);
        self.connection.pulse.settled(next.stored_number(), next.number(), heartbeats, quiet);
        self.state = next;
        if self.state.stored_number().is_some() {
            self.question.settle();
        }
        if change.ask_full_state {
            self.question.owe();
        } else if self.is_to_be_reminded(&next, change.kind) {
            self.question.remind();
        }
        self.answered = Answer { ask_full_state: self.asks(), new_uid: None };
    }

    /// Takes one report.
    async fn on_report(
        &mut self,
        inbound: &mut Inbound,
        heard: Tick,
        arrival: Arrival,
    ) -> Result<Taken, Refusal> {
        if let Arrival::Stored(change) = arrival {
            self.services.metrics.reports.of(change.kind).increment(1);
            self.connection.pulse.reported(heard, false);
            self.adopt(self.state, change, false);
            return Ok(Taken::Answered(self.answered));
        }
        if self.connection.forgot() {
            self.connection.asked();
            self.state.forget();
        }
        let (mut next, mut change) = self.state.absorb(&inbound.outline);
        let report = &inbound.report;
        self.services.metrics.reports.of(change.kind).increment(1);
        if change.kind == Kind::Rival && !is_legacy(&report.instance_uid) {
            self.state.set_aside(report.sequence_num);
            return Ok(Taken::Rival(self.tell_rival()));
        }
        self.connection.pulse.reported(heard, change.must_save);
        if change.kind == Kind::Repeat {
            return Ok(Taken::Answered(self.answered));
        }
        let late =
            if change.must_save || change.leaves { self.overtaken_after(arrival, heard) } else { None };
        if change.must_save && !Box::pin(self.save(inbound, &next, change.parts, heard, late)).await? {
            next = self.state.past(inbound.report.sequence_num);
            change.ask_full_state = true;
        }
        self.adopt(next, change, false);
        if change.leaves || change.requests_uid {
            let noticed = late.map_or(Noticed::SeenAt(heard), Noticed::Late);
            Box::pin(self.finish(&inbound.report, change, noticed)).await?;
        }
        Ok(Taken::Answered(self.answered))
    }

    /// The uid of the other agent on this link, counted as told once more.
    fn tell_rival(&mut self) -> Rival {
        let rival =
            self.rival.get_or_insert_with(|| Box::new(Rival { uid: InstanceUid::generate(), offers: 0 }));
        rival.offers += 1;
        self.services.metrics.clones.increment(u64::from(rival.offers == 1));
        **rival
    }

    /// Stores what changed, before it is answered. False where it came late, and another node was told what is newer
    /// after that moment.
    async fn save(
        &mut self,
        inbound: &mut Inbound,
        next: &AgentState,
        parts: PartSet,
        heard: Tick,
        late: Option<Moment>,
    ) -> Result<bool, Refusal> {
        let at = self.services.clock.moment(self.connection.proof(&self.services.sight, heard));
        let read_at =
            late.unwrap_or_else(|| self.services.clock.moment(heard).max(self.connection.sighted()));
        self.connection.note_sighting(at);
        let update = AgentUpdate {
            agent: self.connection.agent,
            connection_id: self.connection.id,
            at,
            read_at,
            sequence_num: next.stored_number(),
            capabilities: next.capabilities(),
            documents: inbound.documents(parts).await,
            late: late.is_some(),
            node_id: self.services.history.node_id(),
        };
        match self.services.history.save(&self.connection, update, inbound.share.take()).await {
            // A change that is kept is answered as if it were stored: should the process crash before it is,
            // the stored number does not continue, and full state is asked for.
            Ok(Saved::Stored | Saved::Kept) => Ok(true),
            Ok(Saved::Superseded) if late.is_some() && self.is_on_record().await == Ok(true) => Ok(false),
            Ok(Saved::Superseded) => {
                // Another node opened a newer connection of this agent.
                self.connection.abandon(CloseReason::Superseded);
                Err(unavailable())
            }
            Err(error) => {
                self.connection.pulse.unsettled();
                self.state.missed(inbound.report.sequence_num);
                Err(refusal(&self.services, &error))
            }
        }
    }

    /// The agent leaves, or is given another uid.
    async fn finish(
        &mut self,
        report: &AgentToServer,
        change: Change,
        noticed: Noticed,
    ) -> Result<(), Refusal> {
        let ticket = if change.leaves {
            self.end(CloseReason::AgentDisconnect, noticed)
        } else if is_legacy(&report.instance_uid) {
            None
        } else {
            let (store, now) = (&self.services.store, self.services.clock.now());
            let assigned = store.assign_uid(self.connection.agent, InstanceUid::generate(), now).await;
            let uid = assigned.map_err(|error| refusal(&self.services, &error))?;
            self.answered = Answer { ask_full_state: true, new_uid: Some(uid) };
            self.end(CloseReason::UidReassigned, Noticed::Concluded)
        };
        let Some(ticket) = ticket else { return Ok(()) };
        // None: it is not on record, and never will be by this node.
        ticket.recorded().await.map(drop).ok_or_else(unavailable)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.services.metrics.count_quiet(self.connection.pulse.harvest());
        // Every orderly way out has ended the connection by now; this is the panic's way.
        let _unwaited = self.end(CloseReason::InternalError, Noticed::Concluded);
        self.services.hub.leave(&self.connection);
    }
}

/// Whose report it was.
enum Taken {
    /// The agent's own: what it is answered.
    Answered(Answer),
    /// Another agent's, which is to use the uid in here.
    Rival(Rival),
}

fn unavailable() -> Refusal {
    Refusal::Unavailable { retry_after_seconds: RETRY_AFTER_SECONDS }
}

/// What a failure of the store means to the agent whose report met it.
fn refusal(services: &Services, error: &StoreError) -> Refusal {
    match error {
        StoreError::Rejected(_) => {
            services.metrics.decode_failures.of(DecodeFailure::Refused).increment(1);
            Refusal::BadRequest("the report holds data that cannot be stored".to_owned())
        }
        StoreError::Unavailable(_)
        | StoreError::Conflict
        | StoreError::NodeEnded
        | StoreError::Corrupt(_)
        | StoreError::Schema(_) => {
            services.note_refusal(Refused::Store);
            unavailable()
        }
    }
}

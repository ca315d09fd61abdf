//! One report in, one offer out: which session it belongs to, and what it is answered.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Arrival, Inbound, Opened, Origin, Services, Session, Taken, refusal, unavailable};
use crate::agent::offer::{Answer, Refusal, compose, refuse};
use crate::agent::{InstanceUid, Sender};
use crate::close::{Cause, CloseReason};
use crate::history::Noticed;
use crate::metrics::{DecodeFailure, OfferKind};
use crate::proto::{AgentToServer, ServerToAgent};
use crate::store::{Rival, Transport};

/// How often an agent is told to use another uid before its reports are refused.
const OFFERS: u32 = 3;

/// What an exchange came to.
#[derive(Debug)]
pub enum Exchange {
    /// It is answered.
    Done(Box<Exchanged>),
    /// The report comes from another agent with the same uid (S-049…S-052): it is to be taken once
    /// more, as one of the agent with this uid.
    Rival(InstanceUid),
}

/// What one report is answered.
#[derive(Debug)]
pub struct Exchanged {
    /// What to answer.
    pub offer: ServerToAgent,
    /// Why the report was not processed, if it was not.
    pub refusal: Option<Refusal>,
}

/// Answers one report of the agent `agent` whose session, if it has one on this link, is in `slot`.
/// An agent that still calls itself otherwise is told its uid.
///
/// The slot is empty afterwards where the agent has left. A session that something else ended stays in its slot on a
/// WebSocket: whoever holds the link closes it, and nothing is taken back from a newer connection.
pub async fn exchange(
    services: &Arc<Services>,
    slot: &mut Option<Session>,
    origin: &Origin,
    agent: InstanceUid,
    inbound: &mut Inbound,
) -> Exchange {
    let heard = origin.link.last_byte();
    let sure = match slot {
        Some(session) => session.make_sure(heard, inbound.report.sequence_num).await,
        None => Ok(true),
    };
    slot.take_if(|session| session.connection.ended().is_some_and(|reason| may_return(origin, reason)));
    let closing = services.closing.load(Ordering::Relaxed);
    let result = match (slot.as_mut(), sure) {
        (_, Err(refusal)) => Err(refusal),
        (Some(session), _) if session.connection.ended().is_some() => Err(unavailable()),
        (Some(session), Ok(true)) => session.on_report(inbound, heard, Arrival::Known).await,
        (Some(_), Ok(false)) | (None, _) if closing => Err(unavailable()),
        (Some(_), Ok(false)) | (None, _) => {
            Box::pin(first_report(services, slot, origin, agent, inbound)).await
        }
    };
    let report = &inbound.report;
    let ended = slot.as_ref().and_then(|session| session.connection.ended());
    slot.take_if(|_| ended.is_some_and(|reason| is_farewell(reason) || may_return(origin, reason)));
    let result = match (ended, result) {
        (Some(reason), _) if !is_farewell(reason) => Err(unavailable()),
        (_, Ok(Taken::Rival(Rival { offers, .. }))) if offers > OFFERS => Err(uid_in_use()),
        (_, Ok(Taken::Rival(rival))) => return Exchange::Rival(rival.uid),
        (_, Ok(Taken::Answered(answer))) if Sender::of(report) == Ok(Sender::Agent(agent)) => Ok(answer),
        (_, Ok(Taken::Answered(answer))) => Ok(Answer { new_uid: answer.new_uid.or(Some(agent)), ..answer }),
        (_, Err(refusal)) => Err(refusal),
    };
    Exchange::Done(Box::new(answer(services, &report.instance_uid, result)))
}

/// True for the ends that a report itself asked for: it is answered, and the link goes on without the agent.
fn is_farewell(reason: CloseReason) -> bool {
    matches!(reason, CloseReason::AgentDisconnect | CloseReason::UidReassigned)
}

/// True where an agent whose connection ended so may open the next one from here: each poll stands
/// for itself; a WebSocket that the server closes must not be used again. One whose row was lost is not closed.
fn may_return(origin: &Origin, reason: CloseReason) -> bool {
    origin.transport == Transport::Http || reason.cause() == Cause::Agent || reason == CloseReason::ServerLost
}

/// The first report of an agent on a link opens its session, unless it is a farewell.
async fn first_report(
    services: &Arc<Services>,
    slot: &mut Option<Session>,
    origin: &Origin,
    agent: InstanceUid,
    inbound: &mut Inbound,
) -> Result<Taken, Refusal> {
    let report = &inbound.report;
    if report.agent_disconnect.is_some() && !polls_on(services, origin, agent).await? {
        return Ok(Taken::Answered(Answer::default()));
    }
    let (session, arrival) = match Session::open(services, origin, agent, inbound).await {
        Ok(Opened::Session(session, arrival)) => (slot.insert(session), arrival),
        Ok(Opened::Rival(rival)) => return Ok(Taken::Rival(rival)),
        Err(error) => {
            origin.link.refuse();
            return Err(refusal(services, &error));
        }
    };
    if origin.link.has_refused() {
        session.state.forget();
    }
    // Once it is in the hub, a stop sees it; a stop that had looked before is seen here.
    if services.closing.load(Ordering::Relaxed) {
        if let Some(ticket) = session.end(CloseReason::ServerShutdown, Noticed::Concluded) {
            ticket.recorded().await;
        }
        return Err(unavailable());
    }
    session.on_report(inbound, origin.link.last_byte(), arrival).await
}

/// True where this is a poll of an agent whose polls are on record as an open connection.
async fn polls_on(services: &Services, origin: &Origin, agent: InstanceUid) -> Result<bool, Refusal> {
    if origin.transport != Transport::Http {
        return Ok(false);
    }
    let open =
        services.store.get_active_connection(agent).await.map_err(|error| refusal(services, &error))?;
    Ok(open.is_some_and(|row| row.transport == Transport::Http))
}

/// Answers a report whose sender has no uid yet: it is given one, and nothing is kept of it before it uses that.
#[must_use]
pub fn introduce(services: &Services, report: &AgentToServer) -> Exchanged {
    let uid = InstanceUid::generate();
    answer(services, &report.instance_uid, Ok(Answer { ask_full_state: true, new_uid: Some(uid) }))
}

/// Answers a report that was refused before it reached a session.
#[must_use]
pub fn reject(services: &Services, uid: &[u8], refusal: Refusal) -> Exchanged {
    answer(services, uid, Err(refusal))
}

/// Reads who sent a report; the error is the answer to it.
pub fn sender(services: &Services, report: &AgentToServer) -> Result<Sender, Box<Exchanged>> {
    Sender::of(report).map_err(|text| {
        services.metrics.decode_failures.of(DecodeFailure::InstanceUid).increment(1);
        Box::new(reject(services, &report.instance_uid, Refusal::BadRequest(text)))
    })
}

/// What kind of offer an answer is.
pub(super) fn kind_of(answer: Answer) -> OfferKind {
    match answer {
        Answer { new_uid: Some(_), .. } => OfferKind::Identification,
        Answer { ask_full_state: true, .. } => OfferKind::FullStateRequest,
        Answer { .. } => OfferKind::Acknowledgement,
    }
}

fn answer(services: &Services, uid: &[u8], result: Result<Answer, Refusal>) -> Exchanged {
    let kind = result.as_ref().map_or(OfferKind::Error, |answer| kind_of(*answer));
    services.metrics.offers.of(kind).increment(1);
    match result {
        Ok(answer) => Exchanged { offer: compose(uid, answer), refusal: None },
        Err(refusal) => Exchanged { offer: refuse(uid, &refusal), refusal: Some(refusal) },
    }
}

fn uid_in_use() -> Refusal {
    Refusal::BadRequest(
        "this instance_uid belongs to another agent that is connected; use the new_instance_uid that was offered"
            .to_owned(),
    )
}

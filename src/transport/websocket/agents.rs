//! The agents on a link, and their turns: each message goes to the session of its agent.
//!
//! It must not know the socket: it answers frames, and says when the link ends.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Sleep;
use tokio_tungstenite::tungstenite::Bytes;

use super::{End, LONELY};
use crate::agent::offer::{Answer, Refusal, compose};
use crate::agent::report::Outline;
use crate::agent::{InstanceUid, Sender};
use crate::burden::Share;
use crate::clock::Tick;
use crate::close::CloseReason;
use crate::history::{EndTicket, Noticed};
use crate::metrics::{DecodeFailure, Refused};
use crate::proto::ServerToAgent;
use crate::session::ends::{Outlook, look_around};
use crate::session::{Exchange, Inbound, Origin, Services, Session, exchange, introduce, reject, sender};
use crate::transport::admission::Admission;
use crate::transport::intake::{self, Light, Unfit};
use crate::wire::{self, WireError};

/// Malformed messages in a row after which a link is closed.
const MALFORMED_LIMIT: u32 = 5;

/// The agents on a link.
pub(super) struct Agents {
    pub(super) services: Arc<Services>,
    pub(super) admission: Arc<Admission>,
    pub(super) origin: Origin,
    /// Sorted by uid.
    sessions: Vec<(InstanceUid, Option<Session>)>,
    /// Who spoke last: a protocol error is theirs.
    speaker: Option<InstanceUid>,
    /// Malformed messages in a row.
    malformed: u32,
    /// Since when nobody is on the link.
    lonely_since: Option<Tick>,
    /// True where a session is to be asked something before it reports by itself.
    pub(super) curious: bool,
}

/// What to do about a message.
pub(super) enum Take {
    /// Send this frame: it answers a mere sign of life, or what is no report.
    Answer(Vec<u8>),
    /// The report wants more than a look at its session.
    Process(Box<Light>),
    /// It is too heavy to be looked at here and now.
    Unfold,
}

impl Agents {
    /// A link without agents.
    pub(super) fn new(services: Arc<Services>, admission: Arc<Admission>, origin: Origin) -> Self {
        let lonely_since = Some(services.clock.tick());
        Self {
            services,
            admission,
            origin,
            sessions: Vec::with_capacity(1),
            speaker: None,
            malformed: 0,
            lonely_since,
            curious: false,
        }
    }

    /// Lets go of sessions that were ended elsewhere; a link that lost its last one that way ends.
    pub(super) fn look_around(&mut self) -> Result<(), End> {
        match look_around(&self.services, &self.origin.link, &mut self.sessions) {
            Outlook::Open { adrift } => {
                self.curious |= adrift;
                self.note_company();
                Ok(())
            }
            Outlook::Close(reason) => Err(End::Close(reason)),
            Outlook::Break => Err(End::Unwritable),
        }
    }

    /// The questions for those who are to be asked for their full state.
    pub(super) fn questions(&mut self) -> Vec<ServerToAgent> {
        let asked = self.sessions.iter_mut().filter_map(|(agent, session)| match session {
            None => Some(compose(agent.as_bytes(), Answer { ask_full_state: true, new_uid: None })),
            Some(session) => session.overdue_question(),
        });
        asked.collect()
    }

    /// Looks at a message without waiting for anything.
    pub(super) fn take(&mut self, body: &[u8]) -> Take {
        let Some(elements) = intake::light(body) else { return Take::Unfold };
        let report = match wire::decode_body(body) {
            Ok(report) => report,
            Err(error) => return Take::Answer(self.malformed(&error)),
        };
        let outline = Outline::of(&report, body);
        self.malformed = 0;
        if let Ok(Sender::Agent(agent)) = Sender::of(&report)
            && let Ok(index) = self.sessions.binary_search_by_key(&agent, |(uid, _)| *uid)
            && let Some((_, Some(session))) = self.sessions.get_mut(index)
            && let Some(offer) = session.beat(&report, &outline)
        {
            self.speaker = Some(agent);
            return Take::Answer(wire::encode_frame(&offer));
        }
        Take::Process(Box::new(Light { report, outline, bytes: body.len(), elements }))
    }

    /// Takes a message in that asks for more than a look; answers the frame to send.
    pub(super) async fn process(
        &mut self,
        report: Option<Box<Light>>,
        body: Bytes,
        share: Option<Box<Share>>,
    ) -> Result<Vec<u8>, End> {
        let link = Arc::clone(&self.origin.link);
        let turned_away = self.services.clock.tick();
        link.turn_away();
        let frame = match self.unfold(report, body, share).await {
            Ok(Ok(inbound)) => {
                self.malformed = 0;
                Ok(wire::encode_frame(&self.converse(inbound).await))
            }
            Ok(Err(Unfit::Wire(error))) => Ok(self.malformed(&error)),
            Ok(Err(Unfit::Crowded)) => {
                self.services.note_refusal(Refused::Memory);
                Ok(wire::encode_frame(&reject(&self.services, &self.only_uid(), come_later()).offer))
            }
            Err(end) => Err(end),
        };
        link.attend(turned_away, self.services.clock.tick());
        frame
    }

    /// Takes a message apart once there is memory for it; gives up when everybody on the link was ended.
    async fn unfold(
        &mut self,
        report: Option<Box<Light>>,
        body: Bytes,
        share: Option<Box<Share>>,
    ) -> Result<Result<Inbound, Unfit>, End> {
        let (admission, link) = (Arc::clone(&self.admission), Arc::clone(&self.origin.link));
        let budget = admission.budget();
        let unfolding = async {
            if let Some(report) = report {
                return intake::weighed(*report, budget).await;
            }
            intake::unfold(body, share.map(|share| *share), budget).await
        };
        let mut unfolding = pin!(unfolding);
        loop {
            tokio::select! {
                biased;
                unfolded = &mut unfolding => return Ok(unfolded),
                () = link.woken() => self.look_around()?,
            }
        }
    }

    /// Takes a report through the session of its agent, which its first report opens.
    async fn converse(&mut self, mut inbound: Inbound) -> ServerToAgent {
        let mut agent = match sender(&self.services, &inbound.report) {
            Ok(Sender::Agent(agent)) => agent,
            Ok(Sender::Anonymous) => return introduce(&self.services, &inbound.report).offer,
            Err(exchanged) => return exchanged.offer,
        };
        loop {
            match self.take_through(agent, &mut inbound).await {
                Exchange::Done(exchanged) => return exchanged.offer,
                Exchange::Rival(uid) => agent = uid,
            }
        }
    }

    /// Takes a report through the session of `agent`.
    async fn take_through(&mut self, agent: InstanceUid, inbound: &mut Inbound) -> Exchange {
        let uid = &inbound.report.instance_uid;
        self.speaker = Some(agent);
        let index = match self.sessions.binary_search_by_key(&agent, |(uid, _)| *uid) {
            Ok(index) => index,
            Err(_) if self.sessions.len() >= self.admission.limits().max_per_link => {
                self.services.note_refusal(Refused::PerLink);
                return Exchange::Done(Box::new(reject(&self.services, uid, come_later())));
            }
            // The first agent of a link was admitted with it.
            Err(_)
                if !self.sessions.is_empty() && !self.admission.admits_newcomer(&self.services.history) =>
            {
                self.services.note_refusal(Refused::Rate);
                return Exchange::Done(Box::new(reject(&self.services, uid, come_later())));
            }
            Err(index) => {
                self.sessions.insert(index, (agent, None));
                index
            }
        };
        let slot = &mut self.sessions[index].1;
        let exchange = exchange(&self.services, slot, &self.origin, agent, inbound).await;
        if slot.is_none() {
            self.sessions.remove(index);
        }
        exchange
    }

    /// Answers what is no report; the sequence state stays as it is, so that the next good one shows the gap.
    pub(super) fn malformed(&mut self, error: &WireError) -> Vec<u8> {
        self.malformed += 1;
        let cause = match error {
            WireError::HeaderMissing | WireError::HeaderNotZero => DecodeFailure::Header,
            WireError::Protobuf(_) | WireError::Gzip => DecodeFailure::Protobuf,
            WireError::TooMany => DecodeFailure::TooMany,
            WireError::TooLarge { .. } => DecodeFailure::TooLarge,
        };
        self.services.metrics.decode_failures.of(cause).increment(1);
        let refusal = Refusal::BadRequest(error.to_string());
        wire::encode_frame(&reject(&self.services, &self.only_uid(), refusal).offer)
    }

    /// Gives up a link on which only nonsense comes.
    pub(super) fn refuse_nonsense(&self) -> Result<(), End> {
        if self.malformed >= MALFORMED_LIMIT { Err(End::Close(CloseReason::ProtocolError)) } else { Ok(()) }
    }

    /// The uid of the agent on a link of one: whoever sent what cannot be read.
    fn only_uid(&self) -> Vec<u8> {
        match self.sessions.as_slice() {
            [(only, _)] => only.as_bytes().to_vec(),
            _ => Vec::new(),
        }
    }

    /// True where no session is on the link.
    pub(super) fn is_lonely(&self) -> bool {
        self.sessions.iter().all(|(_, session)| session.is_none())
    }

    /// Notes since when nobody is on the link.
    pub(super) fn note_company(&mut self) {
        if !self.is_lonely() {
            self.lonely_since = None;
        } else if self.lonely_since.is_none() {
            self.lonely_since = Some(self.services.clock.tick());
        }
    }

    /// True where it is time to ping: a link that was silent for a while, then every third of that.
    pub(super) fn on_timer(&self, timer: Pin<&mut Sleep>) -> Result<bool, End> {
        let clock = &self.services.clock;
        let now = clock.tick();
        let patience = self.patience();
        if let Some(since) = self.lonely_since {
            // A first message that is on its way has a limit of its own.
            let since = if self.origin.link.is_receiving() { now } else { since };
            timer.reset(clock.instant(since.after(LONELY).min(now.after(patience))));
            return if now.since(since) >= LONELY { Err(End::Lonely) } else { Ok(false) };
        }
        let due = self.origin.link.last_byte().after(patience);
        let ping = now >= due;
        timer.reset(clock.instant(if ping { now.after(patience / 3) } else { due }));
        Ok(ping)
    }

    /// How long a link may be silent before it is pinged: three fifths of the time-out.
    pub(super) fn patience(&self) -> Duration {
        self.services.history.expected().timeout / 5 * 3
    }

    /// Ends the connections that are still open; answers what to wait for until that is on record.
    pub(super) fn end(&mut self, end: End) -> Vec<EndTicket> {
        let (reason, noticed) = match end {
            End::Close(reason @ (CloseReason::ProtocolError | CloseReason::MessageTooLarge)) => {
                (reason, Noticed::Seen)
            }
            End::Close(reason) => (reason, Noticed::Concluded),
            End::Text => (CloseReason::ProtocolError, Noticed::Seen),
            End::Stalled => (CloseReason::ProtocolError, Noticed::Concluded),
            End::ClosedByPeer => (CloseReason::ClosedByAgent, Noticed::Seen),
            End::Lonely | End::Broken => (CloseReason::ConnectionLost, Noticed::Seen),
            End::Unwritable => (CloseReason::ConnectionLost, Noticed::Concluded),
        };
        let offence = matches!(reason, CloseReason::ProtocolError | CloseReason::MessageTooLarge);
        let shared = self.sessions.len() > 1;
        let mut tickets = Vec::new();
        for (agent, session) in self.sessions.drain(..) {
            // One agent's offence on a shared link is not the others': for them the server hangs up.
            let bystander = offence && shared && self.speaker != Some(agent);
            let (reason, noticed) =
                if bystander { (CloseReason::InternalError, Noticed::Concluded) } else { (reason, noticed) };
            tickets.extend(session.and_then(|session| session.end(reason, noticed)));
        }
        tickets
    }
}

fn come_later() -> Refusal {
    Refusal::Unavailable { retry_after_seconds: 30 }
}

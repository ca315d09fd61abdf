//! What is on record, held against what really happened.

use std::time::Duration;

use opamp_server::agent::InstanceUid;
use opamp_server::clock::Moment;
use opamp_server::close::{Cause, CloseReason};
use opamp_server::session::Exchange;
use opamp_server::store::{Status, Transport};

use crate::node::Process;
use crate::rules::Rule;
use crate::store::{Agent, EndedBy, Records, Row, RowEnd};
use crate::truth::{Contact, Inner, Own, Shown, Truth};

/// How far a stored moment may be from the true one.
const NEAR: Duration = Duration::from_millis(100);

/// As `NEAR`, beside a stop: how far the looks by which a node notices one are apart, and as much again.
const LOOK: Duration = Duration::from_millis(400);

/// How late a node may read what has arrived and still call it seen.
const PROMPT: Duration = Duration::from_millis(1_500);

/// What the checker must know of the server's settings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expected {
    pub(crate) timeout: Duration,
    pub(crate) flush: Duration,
    /// True where there is more than one node.
    pub(crate) several: bool,
}

/// A found contradiction: the rule and what is wrong.
type Found = (Rule, String);

/// Looks at an agent's record after a transaction that wrote it.
pub(crate) fn records(truth: &Truth, records: &Records, uid: InstanceUid) {
    let Some(agent) = records.agents.get(&uid) else { return };
    let mut found = Vec::new();
    shape(records, uid, agent, &mut found);
    log(agent, &mut found);
    {
        let now = truth.now();
        let inner = truth.lock();
        let own = inner.agents.get(&uid);
        if let Some(own) = own.filter(|own| !own.cloned && !own.said.is_empty()) {
            number(agent, own, &mut found);
            let last = agent.rows.iter().rev().filter_map(|id| records.row(*id)).take(2);
            for row in last {
                if let Some(end) = row.end.filter(|end| end.known().after(NEAR * 4) >= now.before(NEAR * 100))
                {
                    ended(&inner, own, row, &end, truth.expected(), &mut found);
                }
            }
            verdict(&inner, records, agent, truth.expected(), &mut found);
        }
    }
    for (rule, text) in found {
        truth.contradict(rule, || format!("{}: {text}", truth.who(uid)));
    }
}

/// Rows of an agent: one after the other, at most one open, and that is the fence.
fn shape(records: &Records, uid: InstanceUid, agent: &Agent, found: &mut Vec<Found>) {
    let rows: Vec<&Row> = agent.rows.iter().filter_map(|id| records.row(*id)).collect();
    let open: Vec<i64> = rows.iter().filter(|row| row.end.is_none()).map(|row| row.id).collect();
    if open.len() > 1 || agent.connection != open.first().copied() {
        found.push((Rule::Shape, format!("open rows {open:?}, the fence is {:?}", agent.connection)));
    }
    if agent.connection.is_some() && (agent.status != Status::Online || agent.offline_at.is_some()) {
        found.push((
            Rule::Shape,
            format!("connected, {} and a verdict at {:?}", agent.status, agent.offline_at),
        ));
    }
    for pair in rows.windows(2) {
        let Some(end) = pair[0].end else { continue };
        if end.at > pair[1].connected_at {
            found.push((Rule::Shape, format!("rows {} and {} overlap", pair[0].id, pair[1].id)));
        }
    }
    for row in rows {
        if row.agent != uid {
            found.push((Rule::Shape, format!("row {} is another agent's", row.id)));
        }
        if let Some(end) = row.end
            && (end.at < row.connected_at || end.by.is_some_and(|by| by < end.at))
        {
            found.push((Rule::Order, format!("row {} from {} to {end:?}", row.id, row.connected_at)));
        }
    }
}

/// Changes of status: each follows from the one before, and no connection is judged twice.
fn log(agent: &Agent, found: &mut Vec<Found>) {
    for pair in agent.log.windows(2) {
        if pair[1].1.from != Some(pair[0].1.to) {
            found.push((Rule::Log, format!("{:?} after {:?}", pair[1], pair[0])));
        }
        if pair[1].0 < pair[0].0 {
            found.push((Rule::Order, format!("{:?} before {:?}", pair[1], pair[0])));
        }
    }
    let Some((_, last)) = agent.log.last() else { return };
    if last.to != agent.status {
        found.push((Rule::Log, format!("the last change is {last:?}, the status {}", agent.status)));
    }
    let offline = |connection: Option<i64>| {
        let judged = agent.log.iter().filter(|(_, change)| {
            change.to == Status::Offline && connection.is_some() && change.connection_id == connection
        });
        judged.count()
    };
    if offline(last.connection_id) > 1 {
        found.push((Rule::Twice, format!("two verdicts for connection {:?}", last.connection_id)));
    }
}

/// The stored number does not pass the stored state: everything said until then is stored.
fn number(agent: &Agent, own: &Own, found: &mut Vec<Found>) {
    let Some(number) = agent.seen.and_then(|seen| seen.number) else { return };
    let mut said = own.said.iter().rev().filter_map(|run| run.get(&number)).peekable();
    if said.peek().is_none() {
        found.push((Rule::Number, format!("the stored number {number} was never sent")));
    } else if !said.any(|marks| marks.iter().zip(&agent.marks).all(|(said, stored)| said <= stored)) {
        let own = own.said.iter().rev().find_map(|run| run.get(&number));
        found.push((
            Rule::Number,
            format!("the stored number {number} stands for {own:?}, stored is {:?}", agent.marks),
        ));
    }
}

/// An ended row against what its holder heard.
fn ended(truth: &Inner, own: &Own, row: &Row, end: &RowEnd, expected: Expected, found: &mut Vec<Found>) {
    let Some(contact) = truth.contacts.get(&row.id) else { return };
    let what = || {
        format!(
            "row {} ({}) from {} ended {} as {} at {} by {}; heard {}, arrived {}, shown {:?}",
            row.id,
            row.transport.label(),
            row.connected_at,
            match end.ended_by {
                EndedBy::Holder => "by its holder",
                EndedBy::NewcomerThere => "by a newcomer there",
                EndedBy::NewcomerElsewhere => "by a newcomer elsewhere",
                EndedBy::Finder => "by a finder",
            },
            end.reason,
            end.at,
            end.by.map_or_else(|| "itself".to_owned(), |by| by.to_string()),
            contact.heard,
            contact.arrived,
            contact.shown
        )
    };
    let polls = row.transport == Transport::Http;
    let heard =
        if polls { contact.heard.max(own.polled.map_or(contact.heard, |(at, _)| at)) } else { contact.heard };
    match end.by {
        Some(by) => {
            if end.at > heard.after(NEAR) && end.at > row.connected_at {
                found.push((Rule::Claim, format!("connected beyond the last proof: {}", what())));
            }
            let prompt = match end.ended_by {
                EndedBy::Holder | EndedBy::NewcomerThere => !polls,
                EndedBy::NewcomerElsewhere | EndedBy::Finder => false,
            };
            // What was not told yet is lost with its process, and unknown elsewhere.
            let lag = expected.flush + Duration::from_millis(1_500);
            let told = |process| {
                let died = truth.deaths.get(&process).copied().unwrap_or(by).min(by);
                if prompt { by.before(NEAR) } else { died.before(lag) }
            };
            // Where one node alone loses the store, nobody knows what it heard (contract, section 4).
            let (proof, process) = truth.proof(contact, told);
            let since = told(process).before(lag);
            let excused = !prompt && (truth.troubled(since, by) || truth.froze(process, since, by));
            // A stop is noticed by the look that comes late: it may have begun at any moment since the one before.
            let slack = if truth.froze(contact.process, end.at, by) { LOOK } else { NEAR };
            if !excused && end.at.after(slack) < proof {
                found.push((Rule::Proof, format!("ended before the last proof: {}", what())));
            }
        }
        None => seen(truth, own, contact, end, what, found),
    }
    cause(own, contact, end, what, found);
    if end.reason == CloseReason::HeartbeatTimeout {
        silence(truth, own, contact, end, expected, what, found);
    }
}

/// An end that is said to have been seen.
fn seen(
    truth: &Inner,
    own: &Own,
    contact: &Contact,
    end: &RowEnd,
    what: impl Fn() -> String,
    found: &mut Vec<Found>,
) {
    let mut shown: Vec<Moment> = contact.shown.iter().map(|(_, at)| *at).collect();
    shown.extend(&own.farewells);
    let prompt = |at: &Moment| end.at.after(NEAR) >= *at && end.at <= at.after(PROMPT);
    if shown.iter().any(prompt) {
        return;
    }
    let last = shown.iter().rev().find(|at| **at <= end.at.after(NEAR)).copied();
    // A link that waits for the store reads late what has come meanwhile.
    let waited =
        last.is_some_and(|at| truth.troubled(at, end.at) && !truth.froze(contact.process, at, end.at));
    let rule = if waited { Rule::Late } else { Rule::Seen };
    found.push((rule, format!("nothing was seen then: {}", what())));
}

/// An end names what really was.
fn cause(own: &Own, contact: &Contact, end: &RowEnd, what: impl Fn() -> String, found: &mut Vec<Found>) {
    let shown = contact.shown.map(|(shown, _)| shown);
    let fits = match end.reason {
        CloseReason::AgentDisconnect => !own.farewells.is_empty(),
        CloseReason::ClosedByAgent => shown == Some(Shown::Close),
        CloseReason::ConnectionLost => matches!(shown, Some(Shown::Fin | Shown::Reset)),
        // The safety net: the answer to its opening was lost, and nobody spoke on it.
        CloseReason::InternalError => contact.heard <= contact.opened,
        CloseReason::ProtocolError
        | CloseReason::MessageTooLarge
        | CloseReason::SlowReader
        | CloseReason::UidRefused
        | CloseReason::CredentialsRevoked => false,
        CloseReason::HeartbeatTimeout
        | CloseReason::Superseded
        | CloseReason::UidReassigned
        | CloseReason::ReconnectRequested
        | CloseReason::Deleted
        | CloseReason::ServerShutdown
        | CloseReason::ServerLost => true,
    };
    if !fits {
        found.push((Rule::Cause, format!("not what happened: {}", what())));
    }
}

/// Who is called silent was silent for as long as that takes.
fn silence(
    truth: &Inner,
    own: &Own,
    contact: &Contact,
    end: &RowEnd,
    expected: Expected,
    what: impl Fn() -> String,
    found: &mut Vec<Found>,
) {
    let arrived = match contact.transport {
        Transport::Websocket => contact.arrived,
        // The poll that comes after the end is a newcomer, and what a stopped process read nobody else knows.
        Transport::Http => {
            // What a node heard that does not reach the store the others cannot know.
            let cut_off = |process| {
                expected.several
                    && (truth.froze(process, contact.heard, end.known())
                        || truth.troubled(contact.heard, end.known()))
            };
            if cut_off(contact.process) {
                return;
            }
            // The others know of a poller what is in the store (contract, section 3). A process that reads what lay there
            // while it was stopped, and is gone before the next flush because it was taken for lost, tells it nothing.
            let lost = |at: Moment, process| {
                let gone = truth.deaths.get(&process).is_some_and(|died| *died <= at.after(expected.flush));
                let other = expected.several && process != contact.process;
                other && gone && truth.froze(process, at.before(PROMPT), at)
            };
            // The poll that came too late is the one that ended it.
            let in_time = |&(at, process): &(Moment, _)| at.after(NEAR) < end.known() && !lost(at, process);
            let known = |proof: &(Moment, _)| in_time(proof) && !cut_off(proof.1);
            let before = contact.proofs.iter().rev().copied().find(in_time).map(|(at, _)| at);
            let heard = before.unwrap_or(contact.opened);
            heard.max(own.polled.filter(known).map(|(at, _)| at).unwrap_or_default())
        }
    };
    // What arrives after the verdict proves nothing, and what arrived before it must have been read.
    if arrived <= end.known() && end.known().after(NEAR) < arrived.after(expected.timeout) {
        found.push((Rule::Silence, format!("it was not silent for {:?}: {}", expected.timeout, what())));
    }
}

/// A pending verdict that just fell: not before the return time had passed.
fn verdict(truth: &Inner, records: &Records, agent: &Agent, expected: Expected, found: &mut Vec<Found>) {
    let Some((at, change)) = agent.log.last() else { return };
    let reason = CloseReason::from_label(&change.reason);
    if change.to != Status::Offline || !reason.is_some_and(|reason| reason.cause() == Cause::Server) {
        return;
    }
    let return_time = expected.timeout * 2;
    let end = agent.rows.last().and_then(|id| records.row(*id)).and_then(|row| row.end);
    if let Some(end) = end
        && at.after(NEAR) < end.known().after(return_time)
    {
        found.push((Rule::Return, format!("offline at {at}, {return_time:?} after {end:?} have not passed")));
    }
    let admitting = truth.admitting(*at);
    if at.after(NEAR) < admitting.after(return_time) {
        found.push((
            Rule::Return,
            format!("offline at {at} ({}), agents are admitted since {admitting} only", change.reason),
        ));
    }
}

/// An answer that is about to be sent: its connection is on record, and so is the moment of the report.
pub(crate) fn answered(process: &Process, uid: InstanceUid, id: i64, heard: Moment, exchange: &Exchange) {
    if !matches!(exchange, Exchange::Done(exchanged) if exchanged.refusal.is_none()) {
        return;
    }
    let records = process.database().records();
    if records.row(id).is_none() {
        process.truth.contradict(Rule::Durable, || format!("an offer, and no row {id}"));
        return;
    }
    let Some(agent) = records.agents.get(&uid).filter(|_| !process.truth.own(uid, |own| own.cloned)) else {
        return;
    };
    // Who was taken for lost, or is about to be, keeps its links open and answers until it learns that.
    if records.is_lost(process.node_id, process.truth.now()) {
        return;
    }
    let opened = process.truth.lock().contacts.get(&id).map(|contact| contact.opened);
    let covers = |row: &&Row| {
        // An opening that waited for the store goes on with the row that a later poll has opened elsewhere
        // meanwhile: for one agent moments never go back (contract, section 2).
        let polls = row.id == id && row.transport == Transport::Http;
        let overtaken = polls && row.end.is_none() && opened.is_some_and(|opened| opened > heard);
        let lost = row.end.is_some_and(|end| end.reason == CloseReason::ServerLost && row.id == id);
        (overtaken || row.created_at <= heard.after(NEAR))
            && (lost || row.end.is_none_or(|end| end.known().after(NEAR) >= heard))
    };
    if !agent.rows.iter().rev().filter_map(|id| records.row(*id)).any(|row| covers(&row)) {
        let ended_elsewhere =
            records.row(id).is_some_and(|row| row.transport == Transport::Http && row.end.is_some());
        // While the store is away from a node, agents are answered normally (contract, section 5): it cannot know. So
        // it is where the node has asked for this row since the report came, and was not answered.
        let unanswered = process.truth.own(uid, |own| own.unanswered);
        let asked = unanswered.is_some_and(|(at, by)| by == process.number && at >= heard);
        if ended_elsewhere && (asked || process.services.outage.is_away()) {
            return;
        }
        // An older link whose opening comes late takes the place of the newest one: its node opens a row again once its
        // safety net has looked (contract, section 4), and that takes longer while the store is away.
        let displaced_at = records.row(id).and_then(|row| row.end).filter(|end| {
            end.ended_by == EndedBy::NewcomerElsewhere && end.reason == CloseReason::Superseded
        });
        let looks = process.check_interval + NEAR;
        if displaced_at
            .is_some_and(|end| heard.since(end.known()) <= looks || process.services.outage.is_away())
        {
            return;
        }
        let rule = if ended_elsewhere { Rule::Stale } else { Rule::Covered };
        process.truth.contradict(rule, || {
            format!(
                "{}: answered a report of {heard} on connection {id}, no row covers it",
                process.truth.who(uid)
            )
        });
    }
}

/// After a long calm: the record is what is.
pub(crate) fn converged(truth: &Truth, records: &Records, processes: &[std::sync::Arc<Process>]) {
    for row in records.all_rows().iter().filter(|row| row.end.is_none()) {
        let holders = processes.iter().filter(|process| {
            let connection = process.services.hub.get(row.agent);
            connection.is_some_and(|one| one.id == row.id && one.ended().is_none())
        });
        let held = match row.node {
            Some(node) => holders.filter(|process| process.node_id == node).count(),
            None => holders.count(),
        };
        if held == 0 {
            truth.contradict(Rule::Owner, || {
                format!(
                    "{}: row {} is open since {}, nobody holds it",
                    truth.who(row.agent),
                    row.id,
                    row.connected_at
                )
            });
        }
    }
    for process in processes {
        let mut connections = process.services.hub.connections();
        connections.sort_by_key(|connection| connection.id);
        for connection in connections.iter().filter(|connection| connection.ended().is_none()) {
            let open = records.row(connection.id).is_some_and(|row| row.end.is_none());
            if !open {
                truth.contradict(Rule::Owner, || {
                    let who = truth.who(connection.agent);
                    format!(
                        "{who}: {} holds connection {}, whose row is not open",
                        truth.process(process.node_id),
                        connection.id
                    )
                });
            }
        }
    }
    let agents: Vec<_> = truth.lock().agents.iter().map(|(uid, own)| (*uid, own.clone())).collect();
    for (uid, own) in agents.into_iter().filter(|(_, own)| !own.cloned && !own.said.is_empty()) {
        settled(truth, records, uid, &own);
    }
}

/// After a long calm: one agent's record is what it is.
fn settled(truth: &Truth, records: &Records, uid: InstanceUid, own: &Own) {
    let Some(agent) = records.agents.get(&uid) else {
        if own.stays {
            truth.contradict(Rule::Converged, || format!("{} is connected and unknown", truth.who(uid)));
        }
        return;
    };
    let open = records.open_row(uid).map(|row| row.id);
    let wrong = if own.stays {
        if open.is_none() || agent.status != Status::Online {
            Some(format!("connected, on record {} with {open:?} open", agent.status))
        } else if agent.marks != own.marks {
            Some(format!("its state is {:?}, on record {:?}", own.marks, agent.marks))
        } else {
            None
        }
    } else if own.gone.is_some() && (open.is_some() || agent.status == Status::Online) {
        Some(format!("gone since {:?}, on record {} with {open:?} open", own.gone, agent.status))
    } else {
        None
    };
    if let Some(wrong) = wrong {
        truth.contradict(Rule::Converged, || format!("{}: {wrong}", truth.who(uid)));
    }
}

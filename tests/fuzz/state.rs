//! Sequences of reports: what they make of an agent's state, its documents and its answers.
//!
//! An input is a list of steps, each a byte, a length of two bytes and so many bytes of a message. The byte says
//! what happens to the message: the store takes or refuses what it changed, or the agent is back after a crash.
//! Beside the state stands a much simpler model of what may be missing, and the two must not contradict.

use std::collections::BTreeMap;
use std::time::Duration;

use fastrand::Rng;
use opamp_server::agent::document::{Documents, INDEXED_ATTRIBUTES, INDEXED_LENGTH};
use opamp_server::agent::offer::{Answer, Refusal, SERVER_CAPABILITIES, compose, refuse};
use opamp_server::agent::report::{AgentState, Change, Kind, KnownAgent, Outline, Part, PartSet};
use opamp_server::agent::{Capabilities, InstanceUid, Sender, is_legacy, requests_uid};
use opamp_server::proto::{AgentToServer, ServerToAgent};
use opamp_server::wire;
use prost::Message as _;
use serde_json::Value;

use crate::engine::{Happened, Outcome, Target, guarded};
use crate::mutate;

/// The target.
pub(crate) struct State;

/// How deep a document may be: the reader of JSON refuses 128, and an answer adds a few levels around it.
const DEEPEST: usize = 116;

impl Target for State {
    const NAME: &'static str = "state";
    const LARGEST: usize = 256 << 10;
    const PATIENCE: Duration = Duration::from_secs(1);

    fn mutate(&self, rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
        mutate(rng, input, other)
    }

    fn run(&mut self, inputs: &[Vec<u8>]) -> Vec<Outcome> {
        inputs.iter().map(|input| guarded(|happened| check(input, happened))).collect()
    }
}

/// What happens to a step's message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Fate {
    /// What it changed is stored.
    Stored,
    /// The store refuses it.
    Refused,
    /// The agent is on a new connection, and the last signs of life were stored.
    Reconnected,
    /// The agent is on a new connection, and what was not stored with a change is lost.
    Crashed,
}

/// One step of an input.
struct Step<'a> {
    control: u8,
    message: &'a [u8],
}

fn steps(mut input: &[u8]) -> Vec<Step<'_>> {
    let mut found = Vec::new();
    while let Some((&[control, high, low], rest)) = input.split_first_chunk::<3>() {
        let length = usize::from(u16::from_be_bytes([high, low])) | usize::from(control >> 7) << 16;
        let (message, rest) = rest.split_at(length.min(rest.len()));
        found.push(Step { control, message });
        input = rest;
    }
    found
}

/// An input of these messages.
pub(crate) fn written<'a>(steps: impl IntoIterator<Item = (u8, &'a [u8])>) -> Vec<u8> {
    let mut input = Vec::new();
    for (control, message) in steps {
        let message = &message[..message.len().min(0x1_ffff)];
        let length = u32::try_from(message.len()).unwrap_or_default().to_be_bytes();
        input.extend([control & 0x7f | length[1] << 7, length[2], length[3]]);
        input.extend(message);
    }
    input
}

/// One agent as the server sees it.
struct Seen {
    state: AgentState,
    stored: KnownAgent,
    /// The model: true while something may be missing.
    missing: bool,
    /// The model: the number that the next one continues.
    number: Option<u64>,
    /// The model: every part heard so far.
    heard: PartSet,
    /// The model: every part heard since the last gap.
    fresh: PartSet,
    /// The model: true where the last report was lost although it had told of a gap.
    lost: bool,
}

fn check(input: &[u8], happened: &mut Happened) -> Result<(), String> {
    let mut agents: BTreeMap<InstanceUid, Seen> = BTreeMap::new();
    let mut before = None;
    for step in steps(input) {
        let fate = match step.control & 7 {
            0..=4 => Fate::Stored,
            5 => Fate::Refused,
            6 => Fate::Reconnected,
            _ => Fate::Crashed,
        };
        let report = match wire::decode_body(step.message) {
            Ok(report) => report,
            Err(error) => {
                happened.note(std::mem::discriminant(&error));
                continue;
            }
        };
        let Some(agent) = sender(&report, happened)? else { continue };
        let seen = agents.entry(agent).or_insert_with(|| Seen {
            state: AgentState::restore(&KnownAgent::default()),
            stored: KnownAgent { known: true, ..KnownAgent::default() },
            missing: false,
            number: None,
            heard: PartSet::EMPTY,
            fresh: PartSet::EMPTY,
            lost: false,
        });
        match fate {
            Fate::Reconnected => seen.reconnect(true),
            Fate::Crashed => seen.reconnect(false),
            Fate::Stored | Fate::Refused => {}
        }
        let kind = seen.take(&report, step.message, fate == Fate::Refused, happened)?;
        happened.note((before, kind, fate));
        before = Some((kind, fate));
    }
    Ok(())
}

/// Who sent it; none where nobody with a uid did, which is answered.
fn sender(report: &AgentToServer, happened: &mut Happened) -> Result<Option<InstanceUid>, String> {
    let uid = report.instance_uid.as_slice();
    match Sender::of(report) {
        Ok(Sender::Agent(agent)) => {
            if uid.len() == 16 && uid != agent.as_bytes() {
                return Err("a uid of 16 bytes was read as another".to_owned());
            }
            if uid.len() != 16 && !is_legacy(uid) {
                return Err(format!("a uid of {} bytes was taken", uid.len()));
            }
            Ok(Some(agent))
        }
        Ok(Sender::Anonymous) => {
            happened.note("anonymous");
            let new_uid = Some(InstanceUid::from_bytes([7; 16]));
            let offer = compose(uid, Answer { ask_full_state: true, new_uid });
            whole(&offer, uid)?;
            requests_uid(report).then_some(None).ok_or_else(|| "nobody was taken without asking".to_owned())
        }
        Err(text) => {
            happened.note(("uid", text.len(), uid.len().min(70)));
            let offer = refuse(uid, &Refusal::BadRequest(text));
            let alone = ServerToAgent {
                instance_uid: if uid.len() <= 64 { uid.to_vec() } else { Vec::new() },
                error_response: offer.error_response.clone(),
                ..ServerToAgent::default()
            };
            if offer != alone || offer.error_response.is_none() {
                return Err(format!("an error does not travel alone: {offer:?}"));
            }
            Ok(None)
        }
    }
}

/// An answer that is no error carries uid and mask, and is read as it was written.
fn whole(offer: &ServerToAgent, uid: &[u8]) -> Result<(), String> {
    let frame = wire::encode_frame(offer);
    let read = frame.get(1..).and_then(|body| ServerToAgent::decode(body).ok());
    if offer.instance_uid != uid
        || offer.capabilities != SERVER_CAPABILITIES
        || offer.error_response.is_some()
        || frame.first() != Some(&0)
        || read.as_ref() != Some(offer)
    {
        return Err(format!("a wrong answer to {uid:?}: {offer:?}"));
    }
    Ok(())
}

/// The parts that a report carries.
fn present(report: &AgentToServer) -> PartSet {
    let carries = [
        (Part::Description, report.agent_description.is_some()),
        (Part::Health, report.health.is_some()),
        (Part::EffectiveConfig, report.effective_config.is_some()),
        (Part::RemoteConfigStatus, report.remote_config_status.is_some()),
        (Part::PackageStatuses, report.package_statuses.is_some()),
        (Part::CustomCapabilities, report.custom_capabilities.is_some()),
        (Part::AvailableComponents, report.available_components.is_some()),
        (Part::ConnectionSettingsStatus, report.connection_settings_status.is_some()),
    ];
    PartSet::of(carries.into_iter().filter(|(_, carries)| *carries).map(|(part, _)| part))
}

impl Seen {
    fn reconnect(&mut self, flushed: bool) {
        if flushed {
            self.stored.sequence_num = self.state.stored_number();
        }
        self.state = AgentState::restore(&self.stored);
        self.number = self.stored.sequence_num;
        self.missing = self.number.is_none();
        (self.heard, self.fresh) = (self.stored.parts, PartSet::EMPTY);
        self.lost = false;
    }

    /// Takes a report, and holds what comes of it against the model.
    fn take(
        &mut self,
        report: &AgentToServer,
        bytes: &[u8],
        refused: bool,
        happened: &mut Happened,
    ) -> Result<Kind, String> {
        let outline = Outline::of(report, bytes);
        let (next, change) = self.state.absorb(&outline);
        let (again, same) = self.state.absorb(&outline);
        if change != same || again.stored_number() != next.stored_number() {
            return Err("the same report changes different things".to_owned());
        }
        self.plausible(report, &next, change)?;
        let documents = Documents::take(&mut report.clone(), change.parts);
        documented(&documents, change.parts, happened)?;
        whole(
            &compose(&report.instance_uid, Answer { ask_full_state: change.ask_full_state, new_uid: None }),
            &report.instance_uid,
        )?;
        happened.note((format!("{:?}", change.parts), change.must_save, change.ask_full_state, refused));
        if change.must_save && refused {
            self.refuse(report, &outline)?;
            return Ok(change.kind);
        }
        self.adopt(report, next, change)?;
        Ok(change.kind)
    }

    /// What holds of any change, whatever was before.
    fn plausible(&self, report: &AgentToServer, next: &AgentState, change: Change) -> Result<(), String> {
        let wrong = |what: &str| Err(format!("{what}: {change:?} after {:?}, now {next:?}", self.state));
        if !present(report).covers(change.parts) {
            return wrong("a part changed that the report does not carry");
        }
        let is_news = matches!(change.kind, Kind::Continued | Kind::Gap);
        if !is_news && (!change.parts.is_empty() || change.must_save) {
            return wrong("a report without news changed something");
        }
        if change.kind == Kind::Gap && (!change.ask_full_state || next.stored_number().is_some()) {
            return wrong("after a gap nobody asks, or a number would be stored");
        }
        if change.kind == Kind::Continued {
            if next.stored_number().is_some_and(|number| number != report.sequence_num) {
                return wrong("another number than the report's would be stored");
            }
            if self.lost
                || self.number.map_or(self.missing, |number| number.wrapping_add(1) != report.sequence_num)
            {
                return wrong("numbers that do not continue were taken for continued");
            }
        }
        if next.capabilities() != self.state.capabilities()
            && (!change.must_save || next.capabilities() != Capabilities(report.capabilities))
        {
            return wrong("a mask that is not to be saved, or not the report's");
        }
        if change.requests_uid != requests_uid(report) || change.leaves != report.agent_disconnect.is_some() {
            return wrong("an event that is not the report's");
        }
        Ok(())
    }

    fn adopt(&mut self, report: &AgentToServer, next: AgentState, change: Change) -> Result<(), String> {
        let before = self.number;
        if matches!(change.kind, Kind::Continued | Kind::Gap) {
            let carried = present(report);
            self.heard = self.heard.union(carried);
            self.fresh = if change.kind == Kind::Gap { carried } else { self.fresh.union(carried) };
            let needed = self.heard.union(promised(next.capabilities()));
            self.missing = if change.kind == Kind::Gap {
                true
            } else if before.is_none() {
                !carried.covers(promised(next.capabilities()))
            } else {
                self.missing && !self.fresh.covers(needed)
            };
            self.number = Some(report.sequence_num);
            self.lost = false;
        }
        self.state = next;
        let expected = if self.missing { None } else { self.number };
        if self.state.stored_number() != expected {
            return Err(format!(
                "the number to store is {:?}, should be {expected:?}: {change:?}, {:?}",
                self.state.stored_number(),
                self.state
            ));
        }
        if change.must_save {
            self.stored = KnownAgent {
                known: true,
                sequence_num: self.state.stored_number(),
                capabilities: self.state.capabilities(),
                parts: self.stored.parts.union(change.parts),
            };
        }
        Ok(())
    }

    /// The store does not take the change: nothing of it may be believed, and whatever follows shows the gap.
    fn refuse(&mut self, report: &AgentToServer, outline: &Outline) -> Result<(), String> {
        let (capabilities, number) = (self.state.capabilities(), self.state.stored_number());
        let refused = self.state.absorb(outline).1.kind;
        self.state.missed(report.sequence_num);
        if self.state.capabilities() != capabilities || self.state.stored_number() != number {
            return Err(format!("a refused state was adopted: {:?}", self.state));
        }
        let following = AgentToServer {
            instance_uid: report.instance_uid.clone(),
            sequence_num: report.sequence_num.wrapping_add(1),
            flags: 1 << 40,
            ..AgentToServer::default()
        };
        let (_, change) = self.state.absorb(&Outline::of(&following, &following.encode_to_vec()));
        if change.kind != Kind::Gap {
            return Err(format!(
                "number {} was refused, and the next one is {:?}: nobody will ask for what is lost, {:?}",
                report.sequence_num, change.kind, self.state
            ));
        }
        let (_, change) = self.state.absorb(outline);
        if !change.must_save {
            return Err(format!("what was refused is not saved when it comes again: {change:?}"));
        }
        self.lost |= refused == Kind::Gap;
        self.missing |= self.number.is_none();
        Ok(())
    }
}

/// The parts that an agent with this mask promises to report.
fn promised(capabilities: Capabilities) -> PartSet {
    let bits = [
        (Part::Health, 0x800),
        (Part::EffectiveConfig, 0x4),
        (Part::RemoteConfigStatus, 0x1000),
        (Part::PackageStatuses, 0x10),
        (Part::AvailableComponents, 0x4000),
        (Part::ConnectionSettingsStatus, 0x8000),
    ];
    let stated = bits.into_iter().filter(|(_, bit)| capabilities.0 & bit != 0).map(|(part, _)| part);
    PartSet::of(stated).with(Part::Description)
}

/// Documents are there for the parts that changed, and any database takes them.
fn documented(documents: &Documents, parts: PartSet, happened: &mut Happened) -> Result<(), String> {
    let there = [
        (Part::Description, documents.description.is_some()),
        (Part::Health, documents.health.is_some() && documents.healthy.is_some()),
        (Part::EffectiveConfig, documents.effective_config.is_some()),
        (Part::RemoteConfigStatus, documents.remote_config_status.is_some()),
        (Part::PackageStatuses, documents.package_statuses.is_some()),
        (Part::CustomCapabilities, documents.custom_capabilities.is_some()),
        (Part::AvailableComponents, documents.components_hash.is_some()),
        (Part::ConnectionSettingsStatus, documents.connection_settings_status.is_some()),
    ];
    if let Some((part, there)) = there.into_iter().find(|(part, there)| *there != parts.has(*part)) {
        return Err(format!("{part:?} changed: {}, document: {there}", parts.has(part)));
    }
    if documents.components.is_some() && documents.components_hash.is_none() {
        return Err("components without their hash".to_owned());
    }
    let texts = [&documents.sync_revision, &documents.components_hash];
    if texts.into_iter().flatten().any(|hex| !hex.bytes().all(|digit| digit.is_ascii_hexdigit())) {
        return Err("a hash that is no hex".to_owned());
    }
    if let Some(described) = &documents.description {
        let indexed =
            described.attributes.iter().flat_map(|(key, value)| [Some(key.as_str()), value.as_str()]);
        let texts = indexed.chain([described.name.as_deref(), described.host.as_deref()]).flatten();
        for text in texts {
            if text.contains('\0') || text.chars().count() > INDEXED_LENGTH {
                return Err(format!("an indexed text that no index takes: {text:?}"));
            }
        }
        if described.attributes.len() > INDEXED_ATTRIBUTES
            || described.attributes.values().any(|value| !value.is_string())
            || !(0..=i64::from(i32::MAX)).contains(&described.clients_count)
        {
            return Err(format!("a description that no index takes: {described:?}"));
        }
        readable(described.document.text(), "description", happened)?;
        readable(&described.groups.to_string(), "groups", happened)?;
    }
    let named = [
        ("health", &documents.health),
        ("effective_config", &documents.effective_config),
        ("remote_config_status", &documents.remote_config_status),
        ("package_statuses", &documents.package_statuses),
        ("custom_capabilities", &documents.custom_capabilities),
        ("components", &documents.components),
        ("connection_settings_status", &documents.connection_settings_status),
    ];
    for (name, document) in named {
        if let Some(document) = document {
            readable(document.text(), name, happened)?;
        }
    }
    Ok(())
}

/// A document that anybody can read: JSON that is not too deep, without NUL.
fn readable(text: &str, name: &'static str, happened: &mut Happened) -> Result<(), String> {
    let read: Value = serde_json::from_str(text).map_err(|error| format!("{name} is not read: {error}"))?;
    let depth = walk(&read, name, 0, happened)?;
    if depth > DEEPEST {
        return Err(format!("{name} is {depth} levels deep"));
    }
    Ok(())
}

fn walk(value: &Value, name: &'static str, level: usize, happened: &mut Happened) -> Result<usize, String> {
    let clean = |text: &str| {
        if text.contains('\0') { Err(format!("NUL in {name}: {text:?}")) } else { Ok(()) }
    };
    let size = |length: usize| length.checked_ilog2();
    Ok(match value {
        Value::String(text) => {
            clean(text)?;
            happened.note((name, level, "text", size(text.len())));
            level
        }
        Value::Array(list) => {
            happened.note((name, level, "list", size(list.len())));
            list.iter().try_fold(level + 1, |deepest, inner| {
                walk(inner, name, level + 1, happened).map(|depth| deepest.max(depth))
            })?
        }
        Value::Object(map) => {
            happened.note((name, level, "map", size(map.len())));
            map.iter().try_fold(level + 1, |deepest, (key, inner)| {
                clean(key)?;
                walk(inner, name, level + 1, happened).map(|depth| deepest.max(depth))
            })?
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {
            happened.note((name, level, value.to_string().len()));
            level
        }
    })
}

/// One mutation of a list of steps.
fn mutate(rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
    if rng.u8(0..20) == 0 {
        return mutate::bytes(rng, input, other);
    }
    let mut list: Vec<(u8, Vec<u8>)> =
        steps(input).into_iter().map(|step| (step.control, step.message.to_vec())).collect();
    let donors = steps(other);
    if list.is_empty() {
        list.push((0, Vec::new()));
    }
    let at = rng.usize(0..list.len());
    match rng.u8(0..12) {
        0..=4 => {
            let donor = rng.choice(&donors).map(|step| step.message).unwrap_or_default();
            list[at].1 = mutate::message(rng, &list[at].1, donor);
        }
        5 => list[at].0 = rng.u8(0..8),
        6 => {
            let (mut copy, to) = (list[at].clone(), rng.usize(0..=list.len()));
            copy.0 = rng.u8(0..8);
            list.insert(to, copy);
        }
        7 => {
            list.remove(at);
        }
        8 => {
            for donor in donors.iter().take(rng.usize(1..4)) {
                list.insert(at, (donor.control, donor.message.to_vec()));
            }
        }
        9 => {
            let to = rng.usize(0..list.len());
            list.swap(at, to);
        }
        _ => renumber(rng, &mut list),
    }
    list.truncate(40);
    written(list.iter().map(|(control, message)| (*control, message.as_slice())))
}

/// Gives the reports one sender and numbers that continue, mostly.
fn renumber(rng: &mut Rng, list: &mut [(u8, Vec<u8>)]) {
    let mut number = mutate::number(rng);
    let uid = vec![rng.u8(1..4); 16];
    for (_, message) in list {
        let Ok(mut report) = AgentToServer::decode(message.as_slice()) else { continue };
        report.sequence_num = number;
        report.instance_uid.clone_from(&uid);
        *message = report.encode_to_vec();
        number = match rng.u8(0..12) {
            0 => number,
            1 => number.wrapping_add(2),
            2 => number.wrapping_sub(1),
            _ => number.wrapping_add(1),
        };
    }
}

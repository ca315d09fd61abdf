//! What happened, by whoever made it happen: kept beside the store and never read from it.
//!
//! The rules of what can be known are spelt here once more, as plainly as possible: a list of facts is gone through for
//! every question. Nothing of `timeline` is used.

use opamp_server::agent::InstanceUid;
use opamp_server::clock::Moment;
use opamp_server::store::{Status, StatusChange};
use uuid::Uuid;

/// How a stay ended, as far as it could be known.
#[derive(Clone, Debug)]
pub(super) struct End {
    /// As seen, or the last proof.
    pub(super) at: Moment,
    /// When an end that was not seen was known.
    pub(super) by: Option<Moment>,
    pub(super) reason: &'static str,
}

/// One stay of an agent.
#[derive(Clone, Debug)]
pub(super) struct Fact {
    pub(super) agent: InstanceUid,
    pub(super) id: i64,
    pub(super) polls: bool,
    /// The node that held it.
    pub(super) node: Uuid,
    pub(super) begun: Moment,
    /// The last sign of life that was stored.
    pub(super) proof: Moment,
    pub(super) end: Option<End>,
    /// When it was really over, whoever knew.
    pub(super) truly_over: Option<Moment>,
    pub(super) forgotten: bool,
}

impl Fact {
    /// The last moment that its row speaks of.
    fn last_word(&self) -> Option<Moment> {
        self.end.as_ref().map(|end| end.by.unwrap_or(end.at))
    }
}

/// One life of a node.
#[derive(Clone, Debug)]
pub(super) struct Life {
    pub(super) id: Uuid,
    pub(super) name: String,
    pub(super) from: Moment,
    pub(super) renewed: Moment,
    /// True while its process runs.
    pub(super) runs: bool,
    /// True once it is marked as ended, by itself or by others.
    pub(super) marked: bool,
}

/// What is known of an agent at a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) state: &'static str,
    pub(super) connection: Option<i64>,
    pub(super) reason: Option<&'static str>,
    pub(super) watched: bool,
}

/// Everything that happened.
#[derive(Debug, Default)]
pub(super) struct Record {
    pub(super) agents: Vec<InstanceUid>,
    pub(super) facts: Vec<Fact>,
    pub(super) lives: Vec<Life>,
    /// Whose, when, to which; none for an agent that was forgotten altogether.
    pub(super) statuses: Vec<(InstanceUid, Moment, Option<Status>)>,
    pub(super) horizon: Option<Moment>,
}

impl Record {
    pub(super) fn open_of(&mut self, agent: InstanceUid) -> Option<&mut Fact> {
        self.facts.iter_mut().rfind(|fact| fact.agent == agent && fact.end.is_none())
    }

    pub(super) fn life(&mut self, id: Uuid) -> &mut Life {
        self.lives.iter_mut().find(|life| life.id == id).expect("the node is on record")
    }

    /// A status changed, by the answer of the call that changed it.
    pub(super) fn changed(&mut self, change: &StatusChange, at: Moment) {
        if change.from.is_none() {
            // It begins anew: nothing of before is on record.
            self.statuses.retain(|(agent, ..)| *agent != change.agent);
        }
        self.statuses.push((change.agent, at, Some(change.to)));
    }

    /// A node was found to be gone: what it held is over, and who fled from it fled for that reason.
    pub(super) fn lost(&mut self, node: Uuid, at: Moment) {
        let life = self.life(node);
        life.marked = true;
        let renewed = life.renewed;
        for fact in self.facts.iter_mut().filter(|fact| fact.node == node && !fact.polls) {
            match &mut fact.end {
                None => fact.end = Some(End { at: fact.proof, by: Some(at), reason: "server_lost" }),
                Some(end) if end.reason == "superseded" && end.by.is_some_and(|by| by > renewed) => {
                    end.reason = "server_lost";
                }
                Some(_) => {}
            }
        }
    }

    /// Everything before this moment was forgotten; answers how many stays that were.
    pub(super) fn forget(&mut self, before: Moment) -> u64 {
        let mut gone = 0;
        for fact in self.facts.iter_mut().filter(|fact| !fact.forgotten) {
            let over = fact.end.as_ref().is_some_and(|end| end.at < before);
            if over && fact.last_word().is_some_and(|last| last < before) {
                fact.forgotten = true;
                gone += 1;
            }
        }
        self.horizon = self.horizon.max(Some(before));
        for agent in self.agents.clone() {
            let kept = self.facts.iter().any(|fact| fact.agent == agent && !fact.forgotten);
            let last = self.statuses.iter().rfind(|(whose, ..)| *whose == agent);
            if !kept && last.is_some_and(|(_, at, status)| *status == Some(Status::Retired) && *at < before) {
                self.statuses.push((agent, before, None));
            }
        }
        gone
    }

    /// True where a node was alive and what it wrote is still there.
    pub(super) fn watched(&self, at: Moment) -> bool {
        let alive = self.lives.iter().any(|life| life.from <= at && at < life.renewed);
        alive && self.horizon.is_none_or(|horizon| at >= horizon)
    }

    /// What can be known of an agent at a moment.
    pub(super) fn known(&self, agent: InstanceUid, at: Moment) -> Known {
        let watched = self.watched(at);
        let begun = |fact: &&Fact| fact.agent == agent && !fact.forgotten && fact.begun <= at;
        let absent = if watched { "disconnected" } else { "unknown" };
        // Whatever an earlier row left open was settled when the last one began.
        let Some(fact) = self.facts.iter().rfind(begun) else {
            return Known { state: absent, connection: None, reason: None, watched };
        };
        let reason = fact.end.as_ref().map(|end| end.reason);
        let proven_until = fact.end.as_ref().map_or(fact.proof, |end| end.at);
        if at < proven_until {
            let sure = watched || !fact.polls;
            let state = if sure { "connected" } else { "unknown" };
            return Known { state, connection: Some(fact.id), reason: None, watched: sure };
        }
        if fact.last_word().is_none_or(|until| at < until) {
            return Known { state: "unknown", connection: Some(fact.id), reason, watched };
        }
        Known { state: absent, connection: None, reason, watched }
    }

    /// The status of an agent at a moment and since when; none where it is not on record, or was not known yet.
    pub(super) fn status(&self, agent: InstanceUid, at: Moment) -> Option<(Status, Option<Moment>)> {
        let on_record = self.statuses.iter().rfind(|(whose, ..)| *whose == agent)?.2.is_some();
        let last = self.statuses.iter().rfind(|(whose, when, _)| *whose == agent && *when <= at);
        let (_, since, status) = last.filter(|_| on_record)?;
        let kept = self.horizon.is_none_or(|horizon| *since >= horizon);
        status.map(|status| (status, kept.then_some(*since)))
    }

    /// True where the agent was really connected: for who holds a link, which is there or is not.
    pub(super) fn truly_connected(&self, agent: InstanceUid, at: Moment) -> bool {
        self.facts
            .iter()
            .filter(|fact| fact.agent == agent && !fact.polls)
            .any(|fact| fact.begun <= at && fact.truly_over.is_none_or(|over| at < over))
    }

    /// Every moment at which something that is known of an agent may change.
    pub(super) fn moments_of(&self, agent: InstanceUid) -> Vec<Moment> {
        let of_facts = self.facts.iter().filter(|fact| fact.agent == agent).flat_map(|fact| {
            let end = fact.end.as_ref();
            [Some(fact.begun), Some(fact.proof), end.map(|end| end.at), end.and_then(|end| end.by)]
        });
        let of_lives = self.lives.iter().flat_map(|life| [Some(life.from), Some(life.renewed)]);
        of_facts.chain(of_lives).chain([self.horizon]).flatten().collect()
    }
}

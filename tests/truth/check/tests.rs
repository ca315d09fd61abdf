//! A checker that finds nothing proves nothing: here each rule is shown the lie that it is there for.

use std::time::Duration;

use opamp_server::agent::InstanceUid;
use opamp_server::clock::Moment;
use uuid::Uuid;

use super::Evidence;
use crate::database::{AgentRow, Books, Change, Kind, Row};
use crate::record::{AgentRecord, Ask, Content, End, Exchange, Stay, Trouble, Way, Window};

/// A moment so many milliseconds after the beginning.
fn at(millis: u64) -> Moment {
    Moment::from_micros(1_000_000_000_000_000).after(Duration::from_millis(millis))
}

const UID: [u8; 16] = [7; 16];
const ADDRESS: &str = "127.0.0.1:40000";

/// What happened, and what is on record of it.
struct Story {
    agent: AgentRecord,
    evidence: Evidence,
}

fn exchange(sent: u64) -> Exchange {
    Exchange { sent: at(sent), answered: at(sent + 10), asked: false }
}

/// An agent that came at 1 s by WebSocket, reported until 9 s, and sent a Close frame at 10 s; all of it is on record as it was.
fn story() -> Story {
    let stay = Stay {
        way: Way::WebSocket,
        node: 0,
        address: ADDRESS.to_owned(),
        hello: at(1_000),
        exchanges: (1..=9).map(|second| exchange(second * 1_000)).collect(),
        failed: Vec::new(),
        last_sent: at(9_000),
        ended: Some((at(10_000), End::Close)),
        gone: Some(at(10_001)),
        released: None,
        farewell: false,
        longest_gap: Duration::from_secs(1),
    };
    let (id, content) = (InstanceUid::from_bytes(UID), Content { description: 1, health: 1, config: 1 });
    let agent = AgentRecord {
        uid: id,
        stays: vec![stay],
        content,
        acknowledged: content,
        asked: Vec::new(),
        outrages: Vec::new(),
        refusals: Vec::new(),
        notes: Vec::new(),
    };
    let row = Row {
        id: 1,
        agent_id: id.as_uuid(),
        connected_at: at(1_002),
        disconnected_at: Some(at(10_003)),
        disconnected_by: None,
        disconnect_reason: Some("closed_by_agent".to_owned()),
        seconds: Some(9),
        remote_addr: Some(ADDRESS.to_owned()),
        transport: "websocket".to_owned(),
        node_id: Some(Uuid::nil()),
    };
    let change = |time, from: Option<&str>, to: &str, reason: &str| Change {
        agent_id: id.as_uuid(),
        at: time,
        from_status: from.map(str::to_owned),
        to_status: to.to_owned(),
        reason: reason.to_owned(),
        connection_id: Some(1),
    };
    let changes = vec![
        change(at(1_002), None, "online", "first_report"),
        change(at(10_003), Some("online"), "offline", "closed_by_agent"),
    ];
    let record = AgentRow {
        id: id.as_uuid(),
        status: "offline".to_owned(),
        connection_id: None,
        last_connected_at: Some(row.connected_at),
        last_disconnected_at: row.disconnected_at,
        disconnect_reason: row.disconnect_reason.clone(),
    };
    let books = Books { rows: vec![row], changes, agents: vec![record], nodes: Vec::new() };
    Story { agent, evidence: Evidence { kind: Kind::Sqlite, windows: Vec::new(), books, now: at(30_000) } }
}

impl Story {
    /// The end of the row, and what its agent's record says of it.
    fn end(&mut self, time: Moment, by: Option<Moment>, reason: &str) {
        let row = &mut self.evidence.books.rows[0];
        (row.disconnected_at, row.disconnected_by) = (Some(time), by);
        row.disconnect_reason = Some(reason.to_owned());
        row.seconds = i64::try_from(time.since(row.connected_at).as_secs()).ok();
        let record = &mut self.evidence.books.agents[0];
        (record.last_disconnected_at, record.disconnect_reason) = (Some(time), Some(reason.to_owned()));
        let change = &mut self.evidence.books.changes[1];
        (change.at, change.reason) = (by.unwrap_or(time), reason.to_owned());
    }

    fn stay(&mut self) -> &mut Stay {
        &mut self.agent.stays[0]
    }

    fn trouble(&mut self, trouble: Trouble, from: u64, to: u64) {
        self.evidence.windows.push(Window { node: Some(0), trouble, from: at(from), to: Some(at(to)) });
    }

    /// The rules that are broken.
    fn broken(&self) -> Vec<String> {
        let found = self.evidence.contradictions(&self.agent, &[]);
        let mut rules: Vec<String> =
            found.iter().filter_map(|text| Some(text.split_once(':')?.0.to_owned())).collect();
        rules.dedup();
        rules
    }
}

/// The rules that are broken once the story is changed.
fn broken(change: impl FnOnce(&mut Story)) -> Vec<String> {
    let mut story = story();
    change(&mut story);
    story.broken()
}

#[test]
fn the_truth_contradicts_nothing() {
    assert_eq!(broken(|_| {}), [""; 0]);
}

#[test]
fn an_end_that_is_too_late_is_found() {
    assert_eq!(broken(|story| story.end(at(12_500), None, "closed_by_agent")), ["away", "seen"]);
}

#[test]
fn an_end_that_is_too_early_is_found() {
    assert_eq!(broken(|story| story.end(at(7_000), None, "closed_by_agent")), ["covered", "accused", "seen"]);
}

#[test]
fn a_predecessor_that_was_forgotten_is_found() {
    let left = |story: &mut Story| {
        story.stay().ended = Some((at(10_000), End::Broken));
        story.trouble(Trouble::Killed, 9_900, 10_000);
        story.trouble(Trouble::Down, 10_000, 11_000);
    };
    let ended = |by: u64| {
        broken(|story| {
            left(story);
            story.end(at(9_500), Some(at(by)), "server_lost");
            story.evidence.books.changes[1].at = at(by + 8_000);
        })
    };
    assert_eq!(ended(10_900), [""; 0]);
    assert_eq!(ended(12_000), ["inherited"]);
}

#[test]
fn an_open_row_of_nobody_is_found() {
    let found = broken(|story| {
        let row = &mut story.evidence.books.rows[0];
        (row.disconnected_at, row.disconnect_reason, row.seconds) = (None, None, None);
        story.evidence.books.agents[0].connection_id = Some(1);
        story.evidence.books.agents[0].last_disconnected_at = None;
        story.evidence.books.agents[0].disconnect_reason = None;
    });
    assert_eq!(found, ["away", "log"]);
}

#[test]
fn a_missing_row_is_found() {
    let found = broken(|story| story.evidence.books.rows.clear());
    assert!(found.contains(&"covered".to_owned()) && found.contains(&"record".to_owned()), "{found:?}");
}

#[test]
fn a_beginning_before_the_first_report_is_found() {
    let found = broken(|story| {
        let row = &mut story.evidence.books.rows[0];
        (row.connected_at, row.seconds) = (at(500), Some(9));
        story.evidence.books.agents[0].last_connected_at = Some(at(500));
    });
    assert_eq!(found, ["away"]);
}

#[test]
fn rows_that_overlap_are_found() {
    let found = broken(|story| {
        let mut second = story.evidence.books.rows[0].clone();
        (second.id, second.connected_at, second.seconds) = (2, at(9_000), Some(1));
        story.evidence.books.agents[0].last_connected_at = Some(at(9_000));
        story.evidence.books.rows.push(second);
    });
    assert_eq!(found, ["shape"]);
}

#[test]
fn a_wrong_reason_is_found() {
    assert_eq!(broken(|story| story.end(at(10_003), None, "connection_lost")), ["reasons"]);
    assert_eq!(
        broken(|story| story.end(at(9_000), Some(at(10_003)), "server_lost")),
        ["log", "reasons", "inherited"]
    );
}

#[test]
fn an_agent_that_never_left_must_not_be_blamed() {
    let blamed = |story: &mut Story| {
        story.stay().ended = Some((at(10_000), End::Broken));
        story.trouble(Trouble::Killed, 10_000, 10_001);
    };
    let found = broken(|story| {
        blamed(story);
        story.end(at(9_000), Some(at(12_000)), "heartbeat_timeout");
    });
    assert_eq!(found, ["accused", "reasons"]);
    let told = broken(|story| {
        story.stay().ended = Some((at(10_000), End::Told(1001, "heartbeat_timeout".to_owned())));
        story.end(at(9_000), Some(at(9_990)), "heartbeat_timeout");
    });
    assert_eq!(told, ["accused", "reasons"]);
}

#[test]
fn a_verdict_before_the_return_time_is_found() {
    let told = |story: &mut Story| {
        story.stay().ended = Some((at(10_000), End::Told(1012, "server_shutdown".to_owned())));
        story.trouble(Trouble::Terminated, 9_900, 11_000);
        story.end(at(9_000), Some(at(9_990)), "server_shutdown");
    };
    let verdict = |story: &mut Story, time| story.evidence.books.changes[1].at = at(time);
    assert_eq!(
        broken(|story| {
            told(story);
            verdict(story, 15_000);
        }),
        ["accused", "log"]
    );
    assert_eq!(
        broken(|story| {
            told(story);
            verdict(story, 16_500);
        }),
        ["accused"],
        "the server was away until 11 s"
    );
    assert_eq!(
        broken(|story| {
            told(story);
            verdict(story, 17_200);
        }),
        [""; 0]
    );
}

#[test]
fn an_unknown_time_without_a_reason_is_found() {
    let silent = |story: &mut Story| story.stay().ended = Some((at(9_500), End::Silence));
    let found = broken(|story| {
        silent(story);
        story.end(at(9_001), Some(at(14_000)), "heartbeat_timeout");
    });
    assert_eq!(found, ["unknown"]);
    let stopped = broken(|story| {
        silent(story);
        story.trouble(Trouble::Stopped, 9_600, 12_900);
        story.end(at(9_001), Some(at(14_000)), "heartbeat_timeout");
    });
    assert_eq!(stopped, [""; 0]);
}

#[test]
fn a_needless_question_is_found() {
    let ask = |lost| Ask { at: at(5_010), previous: Some(at(4_000)), lost, again: false };
    assert_eq!(broken(|story| story.agent.asked.push(ask(false))), ["asked"]);
    assert_eq!(broken(|story| story.agent.asked.push(ask(true))), [""; 0]);
}

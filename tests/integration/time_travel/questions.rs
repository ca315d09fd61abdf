//! The questions, asked as an operator asks them: over HTTP.

use std::collections::BTreeSet;
use std::time::Duration;

use fastrand::Rng;
use opamp_server::agent::InstanceUid;
use opamp_server::clock::Moment;
use opamp_server::store::Status;
use serde_json::{Value, json};
use uuid::Uuid;

use super::days::{DAYS, Days};
use super::record::Record;
use crate::harness::Database;
use crate::harness::http::Http;
use crate::harness::server::{Ports, TestServer, moment};

/// How many random spans of random agents.
const SPANS: usize = 500;

/// How many random instants, each of one agent, of a list and of a summary.
const INSTANTS: usize = 500;

/// The days of a fleet, a server on what they left, and who asks.
struct Inquiry {
    days: Days,
    client: Http,
    rng: Rng,
}

/// Lives through the days and asks everything.
pub(super) async fn ask_everything(database: &Database, seed: u64) {
    let store = database.open().await;
    let mut days = Days::live(store.clone(), database.kind(), seed).await;
    store.close().await;
    drop(store);
    let name = days.last_name.clone();
    let server = TestServer::on(database, |config| config.node.name = Some(name)).await;
    let (id, at) = newest_node(database).await;
    days.restarted(id, at);
    let mut inquiry = Inquiry {
        days,
        client: Http::connect(Ports::clone(&server).operators).await,
        rng: Rng::with_seed(seed),
    };
    inquiry.check_the_days();
    for _ in 0..SPANS {
        inquiry.ask_for_a_span().await;
    }
    for _ in 0..INSTANTS {
        inquiry.ask_for_an_instant().await;
    }
    for step in ["5m", "17m", "1h", "90s"] {
        inquiry.ask_for_the_fleet(step).await;
    }
    for _ in 0..10 {
        inquiry.ask_for_an_export().await;
    }
    drop(inquiry);
    server.stop().await.expect("it stops");
}

/// The process that started last.
async fn newest_node(database: &Database) -> (Uuid, Moment) {
    let raw = database.raw().await;
    let rows: Vec<(Uuid, Moment)> =
        raw.rows("SELECT id, started_at FROM nodes ORDER BY started_at DESC LIMIT 1").await;
    rows[0]
}

fn expected_state(known: &super::record::Known) -> Value {
    json!([known.state, known.connection, known.reason, known.watched])
}

fn connected(known: &super::record::Known) -> Value {
    match known.state {
        "connected" => json!(true),
        "disconnected" => json!(false),
        _ => Value::Null,
    }
}

impl Inquiry {
    fn record(&self) -> &Record {
        &self.days.record
    }

    /// The days were what they are meant to be: with crashes, losses, silence, and time nobody watched.
    fn check_the_days(&self) {
        let record = self.record();
        let reasons: BTreeSet<&str> =
            record.facts.iter().filter_map(|fact| Some(fact.end.as_ref()?.reason)).collect();
        for reason in ["server_lost", "superseded", "heartbeat_timeout", "server_shutdown", "closed_by_agent"]
        {
            assert!(reasons.contains(reason), "no {reason} in {reasons:?}");
        }
        assert!(record.facts.len() > 400, "{}", record.facts.len());
        assert!(record.facts.iter().any(|fact| fact.forgotten));
        let statuses: BTreeSet<Option<&str>> =
            record.statuses.iter().map(|(_, _, status)| status.map(Status::label)).collect();
        assert!(statuses.len() >= 4, "{statuses:?}");
        let mut states = BTreeSet::new();
        for part in 0..DAYS.as_secs() / 400 {
            let at = self.days.begun.after(Duration::from_secs(part * 400));
            for agent in &record.agents {
                let known = record.known(*agent, at);
                states.insert((known.state, known.watched));
                // What can be known is never wrong.
                let really = record.truly_connected(*agent, at);
                let polls = record.facts.iter().any(|fact| fact.agent == *agent && fact.polls);
                assert!(known.state != "connected" || really || polls, "{agent} at {at}: {known:?}");
                let forgotten = record.horizon.is_some_and(|horizon| at < horizon);
                assert!(known.state != "disconnected" || !really && !forgotten, "{agent} at {at}: {known:?}");
            }
        }
        let all = [("connected", true), ("disconnected", true), ("unknown", false), ("unknown", true)];
        assert_eq!(states, all.into());
    }

    /// Any millisecond of the days, and a little before.
    fn some_moment(&mut self) -> Moment {
        let early = self.days.begun.before(Duration::from_mins(30));
        let length = u64::try_from(self.days.end().since(early).as_millis()).expect("days are short");
        early.after(Duration::from_millis(self.rng.u64(0..length)))
    }

    fn some_agent(&mut self) -> InstanceUid {
        let agents = &self.days.record.agents;
        agents[self.rng.usize(0..agents.len())]
    }

    async fn get(&mut self, target: &str) -> (u16, Value) {
        let answer = self.client.send("GET", target, &[], &[]).await;
        (answer.status, answer.json())
    }

    /// True where an agent is on record at all.
    fn is_on_record(&self, agent: InstanceUid) -> bool {
        let last = self.record().statuses.iter().rfind(|(whose, ..)| *whose == agent);
        last.is_some_and(|(_, _, status)| status.is_some())
    }

    async fn ask_for_a_span(&mut self) {
        let (agent, one, other) = (self.some_agent(), self.some_moment(), self.some_moment());
        let (from, to) = (one.min(other), one.max(other).after(Duration::from_millis(1)));
        let target = format!("/api/v1/agents/{agent}/timeline?from={from}&to={to}");
        let (status, told) = self.get(&target).await;
        if !self.is_on_record(agent) {
            assert_eq!(status, 404, "{target}: {told}");
            return;
        }
        assert_eq!(status, 200, "{target}: {told}");
        assert_eq!((moment(&told["from"]), moment(&told["to"])), (from, to));
        let intervals = told["intervals"].as_array().expect("a list");
        let bounds = |interval: &Value| (moment(&interval["from"]), moment(&interval["to"]));
        assert_eq!(bounds(&intervals[0]).0, from);
        assert_eq!(bounds(&intervals[intervals.len() - 1]).1, to);
        let says = |i: &Value| json!([i["state"], i["connection_id"], i["reason"], i["watched"]]);
        for pair in intervals.windows(2) {
            assert_eq!(bounds(&pair[0]).1, bounds(&pair[1]).0, "{target}: {told}");
            assert_ne!(says(&pair[0]), says(&pair[1]), "{target}: {told}");
        }
        let mut moments = self.record().moments_of(agent);
        moments.extend(intervals.iter().map(|interval| bounds(interval).0));
        moments.extend((0..20).map(|_| self.some_moment()));
        for at in moments.into_iter().filter(|at| from <= *at && *at < to) {
            let holding = intervals.partition_point(|interval| bounds(interval).0 <= at) - 1;
            let known = self.record().known(agent, at);
            assert_eq!(says(&intervals[holding]), expected_state(&known), "{target} at {at}: {told}");
        }
    }

    async fn ask_for_an_instant(&mut self) {
        let (agent, at) = (self.some_agent(), self.some_moment());
        let target = format!("/api/v1/agents/{agent}/status?as_of={at}");
        let (status, told) = self.get(&target).await;
        if self.record().horizon.is_some_and(|horizon| at < horizon) {
            assert_eq!((status, &told["parameter"]), (400, &json!("as_of")), "{target}: {told}");
            return;
        }
        let known = self.record().known(agent, at);
        match self.record().status(agent, at) {
            None => assert_eq!((status, &told["type"]), (404, &json!("agent-not-found")), "{target}: {told}"),
            Some((verdict, since)) => {
                let expected = json!({
                    "agent_id": agent, "as_of": at, "status": verdict.label(), "since": since,
                    "connected": connected(&known), "connection_id": known.connection,
                    "reason": known.reason, "watched": known.watched,
                });
                assert_eq!((status, &told), (200, &expected), "{target}");
            }
        }
        self.ask_for_lists(at).await;
        let target = format!("/api/v1/agents/summary?as_of={at}");
        let (_, told) = self.get(&target).await;
        assert_eq!(told, self.counts(at), "{target}");
    }

    /// Everybody who is on record and was known at a moment, with status and connectedness.
    fn everybody(&self, at: Moment) -> Vec<(InstanceUid, Status, Value)> {
        let record = self.record();
        let known = |agent: &InstanceUid| {
            Some((*agent, record.status(*agent, at)?.0, connected(&record.known(*agent, at))))
        };
        record.agents.iter().filter_map(known).collect()
    }

    fn counts(&self, at: Moment) -> Value {
        let everybody = self.everybody(at);
        let with = |status: Status| everybody.iter().filter(|(_, found, _)| *found == status).count();
        let listed = || everybody.iter().filter(|(_, status, _)| *status != Status::Retired);
        let so = |state: Value| listed().filter(|(_, _, found)| *found == state).count();
        json!({
            "as_of": at, "total": listed().count(), "online": with(Status::Online),
            "offline": with(Status::Offline), "error": with(Status::Error), "retired": with(Status::Retired),
            "connected": so(json!(true)), "disconnected": so(json!(false)), "unknown": so(Value::Null),
        })
    }

    /// Lists with every filter that has a past, page by page.
    async fn ask_for_lists(&mut self, at: Moment) {
        let everybody = self.everybody(at);
        let (path, query, keep): (&str, &str, fn(Status, &Value) -> bool) = match self.rng.u32(0..7) {
            0 => ("", "", |status, _| status != Status::Retired),
            1 => ("", "&include=retired", |_, _| true),
            2 => ("", "&connected=true", |status, so| status != Status::Retired && *so == json!(true)),
            3 => ("", "&connected=false", |status, so| status != Status::Retired && *so == json!(false)),
            4 => ("/offline", "", |status, _| status == Status::Offline),
            5 => ("/error", "", |status, _| status == Status::Error),
            _ => ("", "&status=online&connected=true", |status, so| {
                status == Status::Online && *so == json!(true)
            }),
        };
        let expected: Vec<Value> = everybody
            .into_iter()
            .filter(|(_, status, so)| keep(*status, so))
            .map(|(agent, status, so)| json!([agent, status.label(), so]))
            .collect();
        let (mut found, mut cursor) = (Vec::new(), String::new());
        loop {
            let target = format!("/api/v1/agents{path}?as_of={at}&limit=7{query}{cursor}");
            let (status, page) = self.get(&target).await;
            assert_eq!((status, &page["total"]), (200, &json!(expected.len())), "{target}: {page}");
            assert_eq!(page["as_of"], json!(at));
            let agents = page["agents"].as_array().expect("a list");
            found.extend(agents.iter().map(|row| json!([row["id"], row["status"], row["connected"]])));
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        assert_eq!(found, expected, "as of {at}{path}{query}");
    }

    async fn ask_for_the_fleet(&mut self, step: &str) {
        let horizon = self.record().horizon.expect("something was forgotten");
        let from = horizon.after(Duration::from_millis(self.rng.u64(1..3_600_000)));
        let to = self.days.end().before(Duration::from_millis(self.rng.u64(1..3_600_000)));
        let from = Moment::from_micros(from.as_micros() / 1_000 * 1_000);
        let target = format!("/api/v1/fleet/timeline?from={from}&to={to}&step={step}");
        let (status, told) = self.get(&target).await;
        assert_eq!(status, 200, "{target}: {told}");
        let length = humantime_serde::re::humantime::parse_duration(step).expect("a duration");
        let steps = told["steps"].as_array().expect("a list");
        let mut at = from;
        for step in steps {
            let next = at.after(length).min(to);
            let counts = self.counts(at);
            let facts = || self.record().facts.iter().filter(|fact| !fact.forgotten);
            let came = facts().filter(|fact| at <= fact.begun && fact.begun < next).count();
            let ends = facts().filter_map(|fact| Some(fact.end.as_ref()?.at));
            let went = ends.filter(|end| at <= *end && *end < next).count();
            let expected = json!({
                "at": at, "online": counts["online"], "offline": counts["offline"], "error": counts["error"],
                "unknown": counts["unknown"], "came": came, "went": went,
            });
            assert_eq!(*step, expected, "{target}");
            at = at.after(length);
        }
        assert!(at >= to && at.before(length) < to, "the steps cover the span: {target}");
    }

    /// What is exported is what the pages say, line by line.
    async fn ask_for_an_export(&mut self) {
        let (one, other) = (self.some_moment(), self.some_moment());
        let (from, to) = (one.min(other), one.max(other).after(Duration::from_millis(1)));
        let agent = self.some_agent();
        let fleet = format!("/api/v1/connection-history?from={from}&to={to}");
        let mut targets = vec![(fleet, "connections")];
        if self.is_on_record(agent) {
            targets.push((
                format!("/api/v1/agents/{agent}/connection-history?from={from}&to={to}"),
                "connections",
            ));
            targets.push((format!("/api/v1/agents/{agent}/timeline?from={from}&to={to}"), "intervals"));
        }
        for (target, name) in targets {
            let (mut rows, mut cursor) = (Vec::new(), String::new());
            loop {
                let limit = if name == "connections" { "&limit=7" } else { "" };
                let (status, page) = self.get(&format!("{target}{limit}{cursor}")).await;
                assert_eq!(status, 200, "{target}: {page}");
                rows.extend(page[name].as_array().expect("a list").clone());
                match page.get("next_cursor").and_then(Value::as_str) {
                    Some(next) => cursor = format!("&cursor={next}"),
                    None => break,
                }
            }
            self.compare_forms(&target, &rows).await;
            if target.contains("/v1/connection-history") {
                self.compare_with_the_record(&rows, from, to);
            }
        }
    }

    async fn compare_forms(&mut self, target: &str, rows: &[Value]) {
        let answer = self.client.send("GET", target, &[("Accept", "application/x-ndjson")], &[]).await;
        assert_eq!(answer.header("content-type"), Some("application/x-ndjson"));
        let text = answer.text();
        let lines: Vec<Value> =
            text.lines().map(|line| serde_json::from_str(line).expect("a document a line")).collect();
        assert_eq!(lines, rows, "{target}");
        let answer = self.client.send("GET", target, &[("Accept", "text/csv")], &[]).await;
        assert_eq!(answer.header("vary"), Some("Accept"));
        let text = answer.text();
        let mut lines = text.split_terminator("\r\n");
        let names: Vec<&str> = lines.next().expect("a header").split(',').collect();
        let shown = |value: &Value| match value {
            Value::Null => String::new(),
            Value::String(word) => word.clone(),
            Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
        };
        let expected: Vec<String> = rows
            .iter()
            .map(|row| names.iter().map(|name| shown(&row[*name])).collect::<Vec<_>>().join(","))
            .collect();
        assert_eq!(lines.collect::<Vec<_>>(), expected, "{target}");
    }

    fn compare_with_the_record(&self, rows: &[Value], from: Moment, to: Moment) {
        let mut expected: Vec<_> = self
            .record()
            .facts
            .iter()
            .filter(|fact| !fact.forgotten && fact.begun < to)
            .filter(|fact| fact.end.as_ref().is_none_or(|end| end.by.unwrap_or(end.at) >= from))
            .collect();
        expected.sort_by_key(|fact| (fact.begun, fact.id));
        let expected: Vec<Value> = expected.iter().map(|fact| json!(fact.id)).collect();
        let found: Vec<Value> = rows.iter().map(|row| row["id"].clone()).collect();
        assert_eq!(found, expected, "{from} to {to}");
    }
}

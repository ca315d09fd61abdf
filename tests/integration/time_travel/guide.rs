//! The calls of `docs/time-travel.md` are made, and answered as they are printed there.

use std::sync::Arc;
use std::time::Duration;

use opamp_server::agent::InstanceUid;
use opamp_server::clock::Moment;
use opamp_server::close::CloseReason;
use opamp_server::config::Ephemeral;
use opamp_server::store::{ConnectionEnd, NewNode, Opened, Sighting, Store};
use serde_json::Value;
use uuid::Uuid;

use crate::harness::Database;
use crate::harness::server::TestServer;
use crate::store::scene::{Node, create, end, new_node, uid};

const PAGE: &str = include_str!("../../../docs/time-travel.md");

/// A time of the night that the page tells of; before noon it is the 31st, else the 30th.
fn clock(time: &str) -> Moment {
    let day = if time < "12" { 31 } else { 30 };
    Moment::parse(&format!("2026-01-{day}T{time}Z")).expect("a time")
}

async fn start(store: &Arc<dyn Store>, number: u128, time: &str) -> Node {
    let id = Uuid::from_u128(0x019b_0000_0000_7000_8000_0000_0000_0000 + number);
    Node::start_as(store, NewNode { id, ..new_node("edge-a", clock(time)) }).await.0
}

async fn open(node: &Node, agent: InstanceUid, time: &str) -> Opened {
    let mut new = node.arrival(agent, clock(time));
    let host = agent.as_uuid().as_u128() & 0xff;
    new.remote_addr = format!("10.7.0.{host}:41234");
    create(&node.store, new).await
}

async fn see(store: &Arc<dyn Store>, seen: &[(InstanceUid, &Opened)], time: &str) {
    let sighting = |(agent, opened): &(InstanceUid, &Opened)| Sighting {
        agent: *agent,
        connection_id: opened.connection_id,
        at: clock(time),
        sequence_num: None,
        poll_silence: None,
    };
    let sightings: Vec<Sighting> = seen.iter().map(sighting).collect();
    assert_eq!(store.update_last_seen(&sightings).await, Ok(seen.len() as u64));
}

/// The night: an agent leaves, rack 7 loses power, the server crashes and is started again.
async fn live_through_the_night(store: &Arc<dyn Store>) {
    let (crashed, rack_7, gone, idle) = (uid(1), [uid(2), uid(3)], uid(4), uid(5));
    let [b, c] = rack_7;
    let first = start(store, 1, "18:00:00").await;
    // Long forgotten.
    first.visit(idle, clock("18:00:01"), clock("18:30:00")).await;
    let (one, two, three) = (
        open(&first, crashed, "22:10:00").await,
        open(&first, b, "22:11:00").await,
        open(&first, c, "22:11:02").await,
    );
    let four = open(&first, gone, "22:12:00").await;
    store.forget(clock("20:00:00")).await.expect("the store answers");
    first.end(&four, gone, CloseReason::AgentDisconnect, clock("01:00:00")).await;
    let stale = store.retire_stale_agents(clock("01:10:05"), Duration::from_mins(10), Ephemeral::None).await;
    assert_eq!(stale.expect("the store answers").len(), 2);
    // Racks have no power, and links say nothing.
    for (agent, opened, last, known) in
        [(b, &two, "02:14:41.250", "02:15:41.250"), (c, &three, "02:14:47.500", "02:15:47.500")]
    {
        let unseen = ConnectionEnd {
            disconnected_by: Some(clock(known)),
            ..first.end_of(opened, agent, CloseReason::HeartbeatTimeout, clock(last))
        };
        end(store, unseen).await;
    }
    let two = open(&first, b, "02:31:07").await;
    assert_eq!(store.renew_node(first.id, clock("03:39:58")).await, Ok(true));
    see(store, &[(crashed, &one), (b, &two)], "03:39:55").await;
    // It crashes.
    let second = start(store, 2, "03:45:10").await;
    let one = open(&second, crashed, "03:46:02").await;
    let two = open(&second, b, "03:46:40").await;
    for (agent, opened) in [(crashed, &one), (b, &two)] {
        second.end(opened, agent, CloseReason::ServerShutdown, clock("06:30:00")).await;
    }
    store.end_node(second.id, clock("06:30:00")).await.expect("the store answers");
}

/// A call of the page: its target, what it accepts, and the answer that is printed.
struct Call {
    target: String,
    accept: Option<String>,
    answer: String,
}

fn calls() -> Vec<Call> {
    let mut blocks = PAGE.split("\n```").skip(1).step_by(2).map(|block| block.split_once('\n'));
    let mut found = Vec::new();
    while let Some(Some((kind, text))) = blocks.next() {
        let Some(call) = text.lines().find(|line| kind == "sh" && line.starts_with("curl -s ")) else {
            continue;
        };
        let quoted = |before: &str| call.split_once(before)?.1.split(['"', '\'']).next().map(str::to_owned);
        let answer = blocks.next().flatten().expect("an answer follows").1.to_owned();
        let target = quoted("\"$O").expect("a target");
        found.push(Call { target, accept: quoted("-H 'Accept: "), answer });
    }
    found
}

/// Every call is answered as printed.
#[tokio::test]
async fn the_page_shows_what_is_answered() {
    let database = Database::sqlite();
    let store = database.open().await;
    live_through_the_night(&store).await;
    store.close().await;
    let server = TestServer::on(&database, |config| config.node.name = Some("edge-a".to_owned())).await;
    let calls = calls();
    assert_eq!(calls.len(), 11, "eleven questions");
    let mut wrong = Vec::new();
    for Call { target, accept, answer } in calls {
        let headers: Vec<(&str, &str)> = accept.iter().map(|form| ("Accept", form.as_str())).collect();
        let told = server.ask("GET", &target, &headers).await.text();
        let same = match (serde_json::from_str::<Value>(&told), serde_json::from_str::<Value>(&answer)) {
            (Ok(told), Ok(printed)) => told == printed,
            _ => told.lines().eq(answer.lines()),
        };
        if !same {
            wrong.push(format!("{target}\n{told}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    server.stop().await.expect("it stops");
}

//! Coming to rest: what the books say of every agent against where the simulator has it, until both agree.

use std::collections::HashMap;

use opamp_server::clock::{Moment, host_now};
use opamp_server::close::{Cause, CloseReason};
use uuid::Uuid;

use crate::agent::generation;
use crate::bounds::READ;
use crate::check::longest_silence;
use crate::database::{Books, Row};
use crate::node::{Place, name_of};
use crate::record::{AgentRecord, Content, End, Record, Way};
use crate::wire::Socket;

/// Where an agent is.
enum Whereabouts {
    /// Connected, by this way and from this address.
    There(Way, String, usize),
    /// A poller that may come again within its time.
    Between,
    /// It left of its own will.
    Away,
    /// It tries to come.
    Trying,
}

fn whereabouts(agent: &AgentRecord, now: Moment) -> Whereabouts {
    let Some(stay) = agent.stays.last() else { return Whereabouts::Trying };
    match &stay.ended {
        None if stay.exchanges.is_empty() => Whereabouts::Trying,
        None => Whereabouts::There(stay.way, stay.address.clone(), stay.node),
        Some((_, End::Silence)) if stay.way == Way::Http => {
            let until = stay.last_sent.after(longest_silence(agent)).after(READ);
            if now < until { Whereabouts::Between } else { Whereabouts::Away }
        }
        Some((_, end)) if end.is_own() => Whereabouts::Away,
        Some(_) => Whereabouts::Trying,
    }
}

/// What keeps the books from agreeing with the simulator, agent by agent; empty where they do.
pub(crate) fn disagreements(books: &Books, records: &[Record], now: Moment) -> Vec<(usize, String)> {
    let mut open: HashMap<_, Vec<&Row>> = HashMap::new();
    for row in books.rows.iter().filter(|row| row.disconnected_at.is_none()) {
        open.entry(row.agent_id).or_default().push(row);
    }
    let refused = records.iter().any(|record| !record.lock().refusals.is_empty());
    let mut found = Vec::new();
    for (index, record) in records.iter().enumerate() {
        let agent = record.lock();
        let id = agent.uid.as_uuid();
        let rows = open.get(&id).map_or(&[][..], Vec::as_slice);
        let row = books.agents.iter().find(|row| row.id == id);
        let status = row.map_or("unknown", |row| &*row.status);
        let connected = row.is_some_and(|row| row.connection_id.is_some());
        let wrong = match whereabouts(&agent, now) {
            Whereabouts::Trying => Some("it tries to come and is not let in".to_owned()),
            Whereabouts::Away if !rows.is_empty() || connected => {
                Some(format!("it is away, and a row is open: {rows:?}"))
            }
            Whereabouts::Away if status != "offline" && own_end(books, id, refused) => {
                Some(format!("it left, and is {status}"))
            }
            Whereabouts::Away | Whereabouts::Between => None,
            Whereabouts::There(way, address, node) => {
                let transport = if way == Way::Http { "http" } else { "websocket" };
                match rows {
                    [row] if row.transport != transport => {
                        Some(format!("its open row is another's: {row:?}"))
                    }
                    [row] if way == Way::WebSocket && row.remote_addr.as_deref() != Some(&*address) => {
                        Some(format!("it is there from {address}, and its open row is another's: {row:?}"))
                    }
                    [row] if way == Way::WebSocket && !is_held_by(books, row, node) => Some(format!(
                        "it is at node {node}, and its row is held by another or by nobody: {row:?}"
                    )),
                    [_] if status != "online" || !connected => Some(format!("it is there, and {status}")),
                    [_] => None,
                    _ => Some(format!("it is there, and has {} open rows", rows.len())),
                }
            }
        };
        found.extend(wrong.map(|wrong| (index, wrong)));
    }
    found
}

/// True where a row belongs to the living process of a node.
fn is_held_by(books: &Books, row: &Row, node: usize) -> bool {
    let holder = books.nodes.iter().find(|holder| Some(holder.id) == row.node_id);
    holder.is_some_and(|holder| holder.ended_at.is_none() && holder.name == name_of(node))
}

/// True where the agent's last row says that the agent ended it; after an end of the server's the verdict may be pending
/// for longer than anybody waits here, because refused agents were told to come back in a minute. While they are on
/// their way, an end without a Close frame counts as the server's too.
fn own_end(books: &Books, id: Uuid, refused: bool) -> bool {
    let last = books.rows.iter().rev().find(|row| row.agent_id == id);
    let reason = last.and_then(|row| CloseReason::from_label(row.disconnect_reason.as_deref()?));
    reason.is_some_and(|reason| {
        reason.cause() == Cause::Agent && !(refused && reason == CloseReason::ConnectionLost)
    })
}

/// True where the agent is connected.
pub(crate) fn is_there(record: &Record) -> bool {
    matches!(whereabouts(&record.lock(), host_now()), Whereabouts::There(..))
}

/// What a server shows of an agent; none where it does not know it.
pub(crate) async fn shown(
    place: &Place,
    agent: &str,
) -> std::io::Result<Option<(Content, serde_json::Value)>> {
    let mut socket = Socket::dial(place.operators).await?;
    let head = format!("GET /api/v1/agents/{agent} HTTP/1.1\r\nHost: {}\r\n", place.operators);
    let answer = socket.request(&head, &[]).await?;
    let body: serde_json::Value = serde_json::from_slice(&answer.body)?;
    if answer.status != 200 {
        return Ok(None);
    }
    let content = Content {
        description: generation(&body["description"]).unwrap_or_default(),
        health: generation(&body["health"]).unwrap_or_default(),
        config: generation(&body["effective_config"]).unwrap_or_default(),
    };
    Ok(Some((content, body)))
}

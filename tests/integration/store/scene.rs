//! The scene of a case: moments, agents, nodes, and builders with defaults.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use opamp_server::agent::document::{Described, Document, Documents};
use opamp_server::agent::{Capabilities, InstanceUid};
use opamp_server::clock::Moment;
use opamp_server::close::{Cause, CloseReason};
use opamp_server::store::{
    AgentFilter, AgentRow, AgentUpdate, ConnectionEnd, ConnectionRow, Deleted, Deletion, Ended, FirstReport,
    HistoryFilter, NewConnection, NewNode, NodeStart, Opened, PageRequest, Store, StoreError, Transport,
    Write, Written,
};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::harness::Raw;

/// How long an agent has to return after an end the server caused.
pub(crate) const RETURN_TIME: Duration = Duration::from_mins(2);

/// The silence after which polls are over.
pub(crate) const POLL_DEADLINE: Duration = Duration::from_secs(90);

/// A page that holds everything a case makes.
pub(crate) const ALL: PageRequest<i64> = PageRequest { after: None, limit: 1_000 };

/// The moment `seconds` after the case began.
pub(crate) fn at(seconds: i64) -> Moment {
    Moment::from_micros((1_767_225_600 + seconds) * 1_000_000)
}

/// The uid with this number, in the order of the numbers.
pub(crate) fn uid(number: u32) -> InstanceUid {
    Uuid::from_u128(0x0190_d3c2_7a10_7b3e_9c41_0000_0000_0000 + u128::from(number)).into()
}

/// A node as it starts.
pub(crate) fn new_node(name: &str, at: Moment) -> NewNode {
    NewNode {
        id: Uuid::now_v7(),
        name: name.to_owned(),
        version: "1.2.3".to_owned(),
        lease: Duration::from_secs(10),
        at,
        return_time: RETURN_TIME,
        first_poll: POLL_DEADLINE,
    }
}

/// A node of a case, at work on its store.
pub(crate) struct Node {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) id: Uuid,
    openings: AtomicI64,
}

impl Node {
    /// Starts a node.
    pub(crate) async fn start(store: &Arc<dyn Store>, name: &str, at: Moment) -> Self {
        Self::start_as(store, new_node(name, at)).await.0
    }

    /// Starts this very node; answers what it found, too.
    pub(crate) async fn start_as(store: &Arc<dyn Store>, node: NewNode) -> (Self, NodeStart) {
        let found = store.start_node(&node).await.expect("the node starts");
        (Self { store: Arc::clone(store), id: node.id, openings: AtomicI64::new(0) }, found)
    }

    /// An agent that arrives by WebSocket.
    pub(crate) fn arrival(&self, agent: InstanceUid, at: Moment) -> NewConnection {
        NewConnection {
            agent,
            transport: Transport::Websocket,
            remote_addr: "192.0.2.1:40001".to_owned(),
            node_id: self.id,
            node_seq: self.openings.fetch_add(1, Ordering::Relaxed),
            at,
            seen_at: at,
            number: 0,
            older: None,
            spare: Some(InstanceUid::generate()),
            first_poll: None,
            poll_grace: Duration::ZERO,
            excused_until: None,
            first_report: None,
        }
    }

    /// An agent that arrives with a report of everything, a bulky config among it.
    pub(crate) fn reporting(&self, agent: InstanceUid, at: Moment) -> NewConnection {
        let documents = Documents {
            description: Some(description(&[("service.name", "edge"), ("zone", "eu")])),
            health: Some(json!({ "healthy": true }).into()),
            healthy: Some(true),
            effective_config: Some(json!({ "": { "body": "x".repeat(80_000), "content_type": "" } }).into()),
            components_hash: Some("cc".to_owned()),
            components: Some(json!({ "receivers": {} }).into()),
            ..Documents::default()
        };
        let report = FirstReport { sequence_num: Some(0), capabilities: Capabilities(7), documents };
        NewConnection { first_report: Some(Arc::new(report)), ..self.arrival(agent, at) }
    }

    /// An agent that polls.
    pub(crate) fn poll(&self, agent: InstanceUid, at: Moment) -> NewConnection {
        NewConnection {
            transport: Transport::Http,
            first_poll: Some(POLL_DEADLINE),
            ..self.arrival(agent, at)
        }
    }

    /// A report with nothing but its number.
    pub(crate) fn report(&self, opened: &Opened, agent: InstanceUid, at: Moment) -> AgentUpdate {
        AgentUpdate {
            agent,
            connection_id: opened.connection_id,
            at,
            read_at: at,
            sequence_num: Some(1),
            capabilities: Capabilities(1),
            documents: Documents::default(),
            late: false,
            node_id: self.id,
        }
    }

    /// A report with a description of these attributes.
    pub(crate) fn described(
        &self,
        opened: &Opened,
        agent: InstanceUid,
        at: Moment,
        attributes: &[(&str, &str)],
    ) -> AgentUpdate {
        let mut update = self.report(opened, agent, at);
        update.documents.description = Some(description(attributes));
        update
    }

    /// An end that was seen.
    pub(crate) fn end_of(
        &self,
        opened: &Opened,
        agent: InstanceUid,
        reason: CloseReason,
        at: Moment,
    ) -> ConnectionEnd {
        ConnectionEnd {
            agent,
            connection_id: opened.connection_id,
            reason,
            disconnected_at: at,
            disconnected_by: None,
            last_seen_at: at,
            sequence_num: None,
            unsaved: false,
            offline_at: (reason.cause() == Cause::Server).then(|| at.after(RETURN_TIME)),
            unless_seen_after: None,
            node_id: self.id,
        }
    }

    /// Opens a connection by WebSocket.
    pub(crate) async fn open(&self, agent: InstanceUid, at: Moment) -> Opened {
        create(&self.store, self.arrival(agent, at)).await
    }

    /// Ends a connection.
    pub(crate) async fn end(
        &self,
        opened: &Opened,
        agent: InstanceUid,
        reason: CloseReason,
        at: Moment,
    ) -> Ended {
        end(&self.store, self.end_of(opened, agent, reason, at)).await
    }

    /// Opens and ends a connection as the agent's own end.
    pub(crate) async fn visit(&self, agent: InstanceUid, from: Moment, to: Moment) -> Opened {
        let opened = self.open(agent, from).await;
        self.end(&opened, agent, CloseReason::ClosedByAgent, to).await;
        opened
    }
}

/// The description with these attributes.
pub(crate) fn description(attributes: &[(&str, &str)]) -> Described {
    let attributes: Map<String, Value> =
        attributes.iter().map(|(key, value)| ((*key).to_owned(), Value::from(*value))).collect();
    let text = |key: &str| attributes.get(key).and_then(Value::as_str).map(str::to_owned);
    Described {
        document: json!({ "identifying_attributes": attributes, "non_identifying_attributes": {} }).into(),
        name: text("service.name"),
        host: text("host.name"),
        groups: json!([]),
        ephemeral: attributes.contains_key("k8s.pod.uid"),
        clients_count: 0,
        attributes,
    }
}

/// A document as readers see it.
pub(crate) fn shown(document: Option<Document>) -> Option<Value> {
    document.map(|document| serde_json::to_value(document).expect("a document is JSON"))
}

/// Writes one thing.
pub(crate) async fn write_one(store: &Arc<dyn Store>, write: Write) -> Result<Written, StoreError> {
    let mut written = store.write(&[write]).await?;
    assert_eq!(written.len(), 1, "one answer to one write");
    Ok(written.remove(0))
}

/// Opens a connection.
pub(crate) async fn create(store: &Arc<dyn Store>, new: NewConnection) -> Opened {
    opened(write_one(store, Write::CreateConnection(new)).await.expect("the connection opens"))
}

/// Ends a connection.
pub(crate) async fn end(store: &Arc<dyn Store>, end: ConnectionEnd) -> Ended {
    ended(write_one(store, Write::UpdateConnection(end)).await.expect("the connection ends"))
}

/// Stores a report; answers whether it was stored.
pub(crate) async fn update(store: &Arc<dyn Store>, update: AgentUpdate) -> bool {
    match write_one(store, Write::UpdateAgent(Box::new(update))).await {
        Ok(Written::Agent(stored)) => stored,
        other => panic!("an update was answered by {other:?}"),
    }
}

/// The answer to an opening.
pub(crate) fn opened(written: Written) -> Opened {
    let Written::Created(opened) = written else { panic!("an opening was answered by {written:?}") };
    *opened
}

/// The answer to an end.
pub(crate) fn ended(written: Written) -> Ended {
    let Written::Connection(ended) = written else { panic!("an end was answered by {written:?}") };
    ended
}

/// Deletes this one agent, by force or not.
pub(crate) async fn delete(store: &Arc<dyn Store>, agent: InstanceUid, at: Moment, force: bool) -> Deleted {
    let filter = AgentFilter { id: Some(agent), include_retired: true, ..AgentFilter::default() };
    let deletion = Deletion { filter, force, at, node_id: Uuid::nil() };
    store.delete_agents(&deletion, None).await.expect("the store answers")
}

/// The record of an agent.
pub(crate) async fn row(store: &Arc<dyn Store>, agent: InstanceUid) -> AgentRow {
    store.get_agent_row(agent).await.expect("the store answers").expect("the agent is on record")
}

/// The connections of an agent, oldest first.
pub(crate) async fn history(store: &Arc<dyn Store>, agent: InstanceUid) -> Vec<ConnectionRow> {
    let page = store.list_connection_history(agent, HistoryFilter::default(), ALL).await;
    let mut rows = page.expect("the store answers").items;
    rows.reverse();
    rows
}

/// The connection of an agent that is the only one.
pub(crate) async fn only_row(store: &Arc<dyn Store>, agent: InstanceUid) -> ConnectionRow {
    let mut rows = history(store, agent).await;
    assert_eq!(rows.len(), 1, "{rows:?}");
    rows.remove(0)
}

/// One row of the status log: when, from, to, why, by which connection.
pub(crate) type Logged = (Moment, Option<String>, String, String, Option<i64>);

/// The status log of an agent, oldest first.
pub(crate) async fn status_log(raw: &Raw, agent: InstanceUid) -> Vec<Logged> {
    let agent = raw.literal(agent);
    raw.rows(format!(
        "SELECT at, from_status, to_status, reason, connection_id FROM agent_status_log WHERE agent_id = {agent} ORDER BY id"
    ))
    .await
}

/// Fails unless the history of an agent is a true one.
pub(crate) async fn assert_true_history(store: &Arc<dyn Store>, agent: InstanceUid) {
    let rows = history(store, agent).await;
    if let Some(fault) = fault_of(&rows, &row(store, agent).await) {
        panic!("{fault}: {rows:?}");
    }
}

/// What is wrong with a history: rows follow each other without overlap, and the fence is the open one.
pub(crate) fn fault_of(rows: &[ConnectionRow], record: &AgentRow) -> Option<&'static str> {
    let known = |row: &ConnectionRow| row.disconnected_by.or(row.disconnected_at);
    let before_the_next =
        |pair: &[ConnectionRow]| known(&pair[0]).is_some_and(|by| by <= pair[1].connected_at);
    let in_order = |row: &ConnectionRow| {
        row.disconnected_at.is_none_or(|left| row.connected_at <= left && Some(left) <= known(row))
    };
    let open = rows.iter().find(|row| row.disconnected_at.is_none()).map(|row| row.id);
    let explained = |row: &ConnectionRow| row.disconnected_at.is_some() == row.disconnect_reason.is_some();
    let checks = [
        (rows.windows(2).all(before_the_next), "rows overlap, or two are open"),
        (rows.iter().all(in_order), "a row ends before it begins"),
        (rows.iter().all(explained), "an end has no reason, or a reason no end"),
        (record.connection_id == open, "the fence is not the open row"),
    ];
    checks.into_iter().find(|(holds, _)| !holds).map(|(_, fault)| fault)
}

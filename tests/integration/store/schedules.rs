//! Random schedules of one agent and two nodes: whatever happens in whatever order, the history stays true.

use std::collections::BTreeSet;
use std::sync::Arc;

use opamp_server::agent::InstanceUid;
use opamp_server::clock::Moment;
use opamp_server::close::CloseReason;
use opamp_server::store::{NewConnection, Opened, Sighting, Status, Store, Transport, Write};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use serde_json::Value;

use super::scene::{Node, at, create, end, fault_of, history, new_node, row, shown, status_log, update};
use crate::harness::{Database, Kind, Raw};

/// One event of a schedule; numbers choose among what there is at that moment.
#[derive(Clone, Debug)]
enum Event {
    /// The agent arrives at a node, whose clock is off by `skew` seconds.
    Open { node: usize, polls: bool, skew: i64 },
    /// A node ends a connection, which may be long over.
    End { connection: usize, reason: usize, unseen: bool, skew: i64 },
    /// A node ends a connection and opens the next one in one batch.
    Turn { connection: usize, node: usize },
    /// A flush stores a sign of life of a connection, which may be long over.
    Flush { connection: usize },
    /// A connection, which may be long over, stores a report.
    Update { connection: usize },
    /// A node crashes and starts again.
    Restart { node: usize },
    /// Pending verdicts that are due fall.
    Overdue,
    /// Time passes.
    Wait { seconds: i64 },
}

fn event() -> impl Strategy<Value = Event> {
    let skew = -20..20_i64;
    let connection = || 0..100_usize;
    prop_oneof![
        4 => (0..2_usize, any::<bool>(), skew.clone()).prop_map(|(node, polls, skew)| Event::Open { node, polls, skew }),
        4 => (connection(), 0..CloseReason::ALL.len(), any::<bool>(), skew)
            .prop_map(|(connection, reason, unseen, skew)| Event::End { connection, reason, unseen, skew }),
        1 => (connection(), 0..2_usize).prop_map(|(connection, node)| Event::Turn { connection, node }),
        2 => connection().prop_map(|connection| Event::Flush { connection }),
        2 => connection().prop_map(|connection| Event::Update { connection }),
        1 => (0..2_usize).prop_map(|node| Event::Restart { node }),
        1 => Just(Event::Overdue),
        3 => (0..150_i64).prop_map(|seconds| Event::Wait { seconds }),
    ]
}

/// One agent, two nodes, and what they know.
struct World {
    store: Arc<dyn Store>,
    raw: Raw,
    agent: InstanceUid,
    nodes: [Node; 2],
    names: [String; 2],
    held: Vec<Opened>,
    ids: BTreeSet<i64>,
    now: i64,
}

impl World {
    async fn new(store: &Arc<dyn Store>, raw: &Raw) -> Self {
        let agent = InstanceUid::generate();
        let names = ["a", "b"].map(|name| format!("{name}-{agent}"));
        let nodes = [Node::start(store, &names[0], at(0)).await, Node::start(store, &names[1], at(0)).await];
        let (store, raw) = (Arc::clone(store), raw.clone());
        Self { store, raw, agent, nodes, names, held: Vec::new(), ids: BTreeSet::new(), now: 0 }
    }

    fn connection(&self, choice: usize) -> Option<&Opened> {
        // The newest ones are the likeliest, but any may be meant.
        self.held
            .iter()
            .rev()
            .cycle()
            .nth(choice % self.held.len().max(1).saturating_mul(2))
            .or(self.held.last())
    }

    async fn happen(&mut self, event: &Event) -> Result<(), TestCaseError> {
        self.now += 1;
        match *event {
            Event::Wait { seconds } => self.now += seconds,
            Event::Overdue => {
                self.store.update_overdue_status(at(self.now)).await.expect("the verdicts fall");
            }
            Event::Restart { node } => {
                let again = new_node(&self.names[node], at(self.now));
                let gone =
                    std::mem::replace(&mut self.nodes[node], Node::start_as(&self.store, again).await.0);
                let rows = history(&self.store, self.agent).await;
                let left =
                    rows.iter().find(|row| row.node_id == Some(gone.id) && row.disconnected_at.is_none());
                prop_assert!(left.is_none(), "a restart forgot its predecessor's {left:?}");
            }
            Event::Open { node, polls, skew } => {
                let node = &self.nodes[node];
                let when = at((self.now + skew).max(0));
                let new = if polls { node.poll(self.agent, when) } else { node.arrival(self.agent, when) };
                self.open(new).await?;
            }
            Event::End { connection, reason, unseen, skew } => {
                self.end(connection, CloseReason::ALL[reason], unseen, at(self.now + skew)).await?;
            }
            Event::Turn { connection, node } => self.turn(connection, node).await?,
            Event::Flush { connection } => self.flush(connection).await?,
            Event::Update { connection } => self.update(connection).await?,
        }
        self.check().await
    }

    async fn open(&mut self, new: NewConnection) -> Result<(), TestCaseError> {
        let transport = new.transport;
        let opened = create(&self.store, new).await;
        self.admit(opened, transport)
    }

    fn admit(&mut self, opened: Opened, transport: Transport) -> Result<(), TestCaseError> {
        let new = self.ids.insert(opened.connection_id);
        prop_assert!(new || transport == Transport::Http, "only polls go on with a row");
        self.held.push(opened);
        Ok(())
    }

    /// Ends a connection; where it does not hold the fence, nothing at all may change.
    async fn end(
        &self,
        choice: usize,
        reason: CloseReason,
        unseen: bool,
        when: Moment,
    ) -> Result<(), TestCaseError> {
        let Some(held) = self.connection(choice) else { return Ok(()) };
        let mut over = self.nodes[0].end_of(held, self.agent, reason, when);
        over.disconnected_by = unseen.then_some(at(self.now + 5));
        let before = self.everything().await;
        let ended = end(&self.store, over).await;
        let was_open =
            before.1.as_ref().is_some_and(|agent| agent.row.connection_id == Some(held.connection_id));
        prop_assert_eq!(ended.duration_seconds.is_some(), was_open);
        if !was_open {
            prop_assert_eq!(before, self.everything().await);
        }
        Ok(())
    }

    async fn everything(
        &self,
    ) -> (Vec<opamp_server::store::ConnectionRow>, Option<opamp_server::store::AgentDetail>) {
        (
            history(&self.store, self.agent).await,
            self.store.get_agent(self.agent).await.expect("the store answers"),
        )
    }

    async fn turn(&mut self, choice: usize, node: usize) -> Result<(), TestCaseError> {
        let arrival = Write::CreateConnection(self.nodes[node].arrival(self.agent, at(self.now)));
        let mut batch = vec![arrival];
        if let Some(held) = self.connection(choice) {
            let over = self.nodes[node].end_of(held, self.agent, CloseReason::ConnectionLost, at(self.now));
            batch.push(Write::UpdateConnection(over));
        }
        let written = self.store.write(&batch).await.expect("the batch is written").remove(0);
        self.admit(super::scene::opened(written), Transport::Websocket)
    }

    async fn flush(&self, choice: usize) -> Result<(), TestCaseError> {
        let Some(held) = self.connection(choice) else { return Ok(()) };
        let (connection_id, when) = (held.connection_id, at(self.now));
        let before = row(&self.store, self.agent).await;
        let counts = before.connection_id == Some(connection_id) && before.last_seen_at <= Some(when);
        let seen = Sighting {
            agent: self.agent,
            connection_id,
            at: when,
            sequence_num: Some(7),
            poll_silence: None,
        };
        let changed = self.store.update_last_seen(&[seen]).await.expect("the flush is written");
        prop_assert_eq!(changed, u64::from(counts));
        Ok(())
    }

    async fn update(&self, choice: usize) -> Result<(), TestCaseError> {
        let Some(held) = self.connection(choice) else { return Ok(()) };
        let fence = row(&self.store, self.agent).await.connection_id;
        let number = self.now.to_string();
        let attributes = [("service.name", "edge"), (number.as_str(), "x")];
        let mut change = self.nodes[0].described(held, self.agent, at(self.now), &attributes);
        change.sequence_num = (self.now % 2 == 0).then(|| self.now.unsigned_abs());
        change.documents.health = Some(Value::from(self.now).into());
        let stored = update(&self.store, change.clone()).await;
        prop_assert_eq!(stored, fence == Some(held.connection_id));
        if stored {
            let kept = self.store.get_agent(self.agent).await.expect("the store answers");
            let kept = kept.expect("the agent is on record");
            let described = change.documents.description.map(|described| described.document);
            prop_assert_eq!(
                (kept.description, kept.health),
                (shown(described), shown(change.documents.health))
            );
            prop_assert_eq!(kept.sequence_num, change.sequence_num.map(u64::cast_signed));
            let agent = self.raw.literal(self.agent);
            let keys = format!("SELECT key FROM agent_attributes WHERE agent_id = {agent} ORDER BY key");
            let keys: Vec<(String,)> = self.raw.rows(keys).await;
            prop_assert_eq!(keys, [(number,), ("service.name".to_owned(),)]);
        }
        Ok(())
    }

    /// What holds after every event.
    async fn check(&self) -> Result<(), TestCaseError> {
        if self.ids.is_empty() {
            return Ok(());
        }
        let (rows, agent) = (history(&self.store, self.agent).await, row(&self.store, self.agent).await);
        prop_assert_eq!(fault_of(&rows, &agent), None, "{:?}", rows);
        let ids: BTreeSet<i64> = rows.iter().map(|row| row.id).collect();
        prop_assert_eq!(&ids, &self.ids, "one row per opening, none is missing");
        prop_assert!(
            agent.connection_id.is_none() || agent.status == Status::Online,
            "who is connected is online"
        );
        prop_assert!(
            agent.connection_id.is_none() || agent.offline_at.is_none(),
            "and no verdict is pending"
        );
        let log = status_log(&self.raw, self.agent).await;
        prop_assert!(log.windows(2).all(|pair| pair[0].0 <= pair[1].0), "the log goes back: {log:?}");
        prop_assert!(
            log.windows(2).all(|pair| Some(&pair[0].2) == pair[1].1.as_ref()),
            "the log has a gap: {log:?}"
        );
        prop_assert_eq!(log.last().map(|last| last.2.as_str()), Some(agent.status.label()));
        Ok(())
    }
}

/// Rows never overlap, at most one is open, none is missing, the fence is the open row, the log has no gap.
pub(super) async fn any_schedule_keeps_the_history_true(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let cases = match database.kind() {
        Kind::Sqlite => 96,
        Kind::Postgres => 32,
    };
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let handle = tokio::runtime::Handle::current();
    let run = move || {
        TestRunner::new(config).run(&vec(event(), 1..25), |events| {
            handle.block_on(async {
                let mut world = World::new(&store, &raw).await;
                for event in &events {
                    world.happen(event).await?;
                }
                Ok(())
            })
        })
    };
    let outcome = tokio::task::spawn_blocking(run).await.expect("the schedules run");
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

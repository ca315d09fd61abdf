//! One process's way to the database: the store's traits, call by call.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use opamp_server::agent::InstanceUid;
use opamp_server::clock::Moment;
use opamp_server::config::Ephemeral;
use opamp_server::incidents::Observation;
use opamp_server::store::{
    AgentDetail, AgentFilter, AgentRow, AgentStore, AgentSummary, CALL_DEADLINE, CloseOrder, ConnectionRow,
    ConnectionStore, Deleted, Deletion, FleetPast, Forgotten, Heir, Held, HistoryFilter, NewNode, NodeStart,
    NodeStore, ObservationStore, Observer, OrderStore, Page, PageRequest, PastAgents, PastFilter, PastStore,
    PastSummary, Peer, PolledConnection, Reconnect, RetentionStore, Sighting, Span, StatusChange, StayPlace,
    Stays, Store, StoreError, Transition, Watch, Write, Written,
};
use uuid::Uuid;

use super::{Call, Database, Row};
use crate::truth::Truth;

/// How long it may take to end what a node left open.
const TAKE_OVER: Duration = Duration::from_mins(1);

/// One process's way to the database.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(super) database: Arc<Database>,
    /// The place of the node, which outlives its processes.
    pub(super) place: usize,
    /// Which process.
    pub(super) process: u64,
    /// False once the process is gone.
    pub(super) alive: Arc<AtomicBool>,
}

impl Handle {
    pub(crate) fn new(database: Arc<Database>, place: usize, process: u64, alive: Arc<AtomicBool>) -> Self {
        Self { database, place, process, alive }
    }

    pub(crate) fn database(&self) -> &Database {
        &self.database
    }

    /// The process is gone, and its locks with it.
    pub(crate) fn release(&self) {
        self.database.release(self.process);
    }
}

fn reads(name: &'static str) -> Call {
    Call { name, key: 0, writes: false, deadline: CALL_DEADLINE, locks: false }
}

/// One statement that changes what is on record.
fn writes(name: &'static str, key: u64) -> Call {
    Call { name, key, writes: true, deadline: CALL_DEADLINE, locks: false }
}

/// A transaction of several statements: whoever else wants one waits until it is over.
fn transacts(name: &'static str, key: u64) -> Call {
    Call { name, key, writes: true, deadline: CALL_DEADLINE, locks: true }
}

/// A transaction that ends what a node left open: its whole fleet.
fn takes_over(name: &'static str) -> Call {
    Call { deadline: TAKE_OVER, ..transacts(name, 0) }
}

fn shown(row: &Row) -> ConnectionRow {
    let length = row.end.map(|end| end.at.since(row.connected_at).as_secs());
    ConnectionRow {
        id: row.id,
        agent_id: row.agent,
        connected_at: row.connected_at,
        disconnected_at: row.end.map(|end| end.at),
        disconnected_by: row.end.and_then(|end| end.by),
        duration_seconds: length.and_then(|length| length.try_into().ok()),
        disconnect_reason: row.end.map(|end| end.reason.label().to_owned()),
        remote_addr: Some(row.remote_addr.clone()),
        transport: row.transport,
        node_id: row.node,
        node_seq: row.seq,
        created_at: row.created_at,
        confirmed_until: None,
    }
}

/// Puts what a batch did to connections on the timeline.
fn tell(truth: &Truth, batch: &[Write], written: &[Written]) {
    for (write, written) in batch.iter().zip(written) {
        match (write, written) {
            (Write::CreateConnection(new), Written::Created(opened)) => truth.say(format_args!(
                "{} has row {} ({}{}), number {:?}, displaced {:?}",
                truth.who(new.agent),
                opened.connection_id,
                new.transport.label(),
                if opened.continued { ", goes on" } else { "" },
                opened.agent.sequence_num,
                opened.displaced.map(|displaced| (displaced.connection_id, displaced.reason.label()))
            )),
            (Write::UpdateConnection(end), Written::Connection(ended)) => truth.say(format_args!(
                "{} ends row {} as {}, number {:?}{}",
                truth.who(end.agent),
                end.connection_id,
                end.reason,
                end.sequence_num,
                if ended.duration_seconds.is_none() { ": not any more" } else { "" }
            )),
            _ => {}
        }
    }
}

#[async_trait]
impl AgentStore for Handle {
    async fn get_agent(&self, _agent: InstanceUid) -> Result<Option<AgentDetail>, StoreError> {
        Ok(None)
    }

    async fn get_agent_row(&self, _agent: InstanceUid) -> Result<Option<AgentRow>, StoreError> {
        Ok(None)
    }

    async fn list_agents(
        &self,
        _filter: &AgentFilter,
        _page: PageRequest<InstanceUid>,
    ) -> Result<Page<AgentRow>, StoreError> {
        Ok(Page { items: Vec::new(), total: 0, more: false })
    }

    async fn next_agents(
        &self,
        _filter: &AgentFilter,
        _page: PageRequest<InstanceUid>,
    ) -> Result<Vec<AgentRow>, StoreError> {
        Ok(Vec::new())
    }

    async fn summarize_agents(&self) -> Result<AgentSummary, StoreError> {
        Ok(AgentSummary::default())
    }

    async fn list_status_history(
        &self,
        _agent: InstanceUid,
        _page: PageRequest<i64>,
    ) -> Result<Page<Transition>, StoreError> {
        Ok(Page { items: Vec::new(), total: 0, more: false })
    }

    async fn update_last_seen(&self, sightings: &[Sighting]) -> Result<u64, StoreError> {
        let sightings = sightings.to_vec();
        self.call(writes("flush", 0), move |records| records.see(&sightings)).await
    }

    async fn update_overdue_status(&self, now: Moment) -> Result<Vec<StatusChange>, StoreError> {
        self.call(transacts("verdicts", 0), move |records| records.overdue(now)).await
    }

    async fn next_overdue(&self) -> Result<Option<Moment>, StoreError> {
        self.call(reads("next verdict"), |records| records.next_overdue()).await
    }

    async fn retire_stale_agents(
        &self,
        now: Moment,
        stale_after: Duration,
        _ephemeral: Ephemeral,
    ) -> Result<Vec<StatusChange>, StoreError> {
        self.call(transacts("sweep", 0), move |records| records.retire(now, stale_after)).await
    }

    async fn assign_uid(
        &self,
        temporary: InstanceUid,
        candidate: InstanceUid,
        at: Moment,
    ) -> Result<InstanceUid, StoreError> {
        self.call(transacts("assign", 0), move |records| records.assign(temporary, candidate, at)).await
    }
}

#[async_trait]
impl ConnectionStore for Handle {
    async fn write(&self, batch: &[Write]) -> Result<Vec<Written>, StoreError> {
        let (batch, single) = (batch.to_vec(), self.database.single);
        let truth = Arc::clone(&self.database.truth);
        let written = self.call(transacts("write", batch.len() as u64), move |records| {
            if !single && !records.may_write(&batch) {
                return Err(StoreError::NodeEnded);
            }
            if records.has_opened_before(&batch) {
                return Err(StoreError::Rejected("two rows of one opening".to_owned()));
            }
            let written = records.write(&batch);
            tell(&truth, &batch, &written);
            Ok(written)
        });
        written.await?
    }

    async fn get_active_connection(&self, agent: InstanceUid) -> Result<Option<ConnectionRow>, StoreError> {
        let row =
            self.call(reads("active connection"), move |records| records.open_row(agent).map(shown)).await;
        if row.is_err() {
            let truth = &self.database.truth;
            let now = truth.now();
            truth.own(agent, |own| own.unanswered = Some((now, self.process)));
        }
        row
    }

    async fn list_connection_history(
        &self,
        _agent: InstanceUid,
        _filter: HistoryFilter,
        _page: PageRequest<i64>,
    ) -> Result<Page<ConnectionRow>, StoreError> {
        Ok(Page { items: Vec::new(), total: 0, more: false })
    }

    async fn list_polled_connections(&self) -> Result<Vec<PolledConnection>, StoreError> {
        self.call(reads("polled connections"), |records| {
            let polled = records.polled().into_iter().map(|(row, seen)| PolledConnection {
                agent_id: row.agent,
                id: row.id,
                connected_at: row.connected_at,
                last_seen_at: seen.at,
                sequence_num: seen.number.map(u64::cast_signed),
                poll_silence_ms: seen.silence_ms(),
            });
            polled.collect()
        })
        .await
    }
}

#[async_trait]
impl OrderStore for Handle {
    async fn order_reconnect(&self, agent: InstanceUid) -> Result<Option<Reconnect>, StoreError> {
        self.call(writes("order", 0), move |records| {
            Some(records.order(agent).map_or(Reconnect::NotConnected, Reconnect::Ordered))
        })
        .await
    }

    async fn delete_agents(
        &self,
        _deletion: &Deletion,
        _after: Option<InstanceUid>,
    ) -> Result<Deleted, StoreError> {
        Ok(Deleted::default())
    }

    async fn list_close_orders(&self, node: Uuid) -> Result<Vec<CloseOrder>, StoreError> {
        self.call(reads("close orders"), move |records| {
            let orders = records.orders(node).into_iter();
            orders.map(|(agent, connection_id, reason)| CloseOrder { agent, connection_id, reason }).collect()
        })
        .await
    }

    async fn list_ended_connections(&self, connections: &[i64]) -> Result<Vec<i64>, StoreError> {
        let mut connections = connections.to_vec();
        connections.sort_unstable();
        self.call(reads("ended connections"), move |records| {
            connections.retain(|id| records.row(*id).is_some_and(|row| row.end.is_some()));
            connections
        })
        .await
    }
}

#[async_trait]
impl NodeStore for Handle {
    async fn now(&self) -> Result<Moment, StoreError> {
        let database = Arc::clone(&self.database);
        self.call(reads("time"), move |_| database.truth.now()).await
    }

    async fn lock_node_name(&self, name: &str) -> Result<bool, StoreError> {
        let (database, name, process) = (Arc::clone(&self.database), name.to_owned(), self.process);
        let alive = Arc::clone(&self.alive);
        // A lock ends with the session that took it.
        let lock = move |_: &mut _| alive.load(Ordering::Relaxed) && database.lock_name(&name, process);
        self.call(writes("lock", 0), lock).await
    }

    async fn start_node(&self, node: &NewNode) -> Result<NodeStart, StoreError> {
        let (node, single) = (node.clone(), self.database.single);
        self.call(takes_over("start"), move |records| records.start(&node, single)).await
    }

    async fn postpone_verdicts(&self, now: Moment, return_time: Duration) -> Result<(), StoreError> {
        self.call(transacts("postpone", 0), move |records| records.postpone(now, return_time)).await
    }

    async fn renew_node(&self, node: Uuid, at: Moment) -> Result<bool, StoreError> {
        self.call(writes("renew", 0), move |records| records.renew(node, at)).await
    }

    async fn list_peers(&self, node: Uuid) -> Result<Vec<Peer>, StoreError> {
        self.call(reads("peers"), move |records| records.peers(node)).await
    }

    async fn end_lost_node(&self, lost: &Peer, heir: &Heir) -> Result<Option<u64>, StoreError> {
        let (lost, heir) = (lost.clone(), *heir);
        self.call(takes_over("end lost"), move |records| records.end_lost(&lost, &heir)).await
    }

    async fn end_strays(&self, heir: &Heir) -> Result<u64, StoreError> {
        let heir = *heir;
        self.call(transacts("end strays", 0), move |records| records.inherit(&heir, false)).await
    }

    async fn list_held_connections(&self, node: Uuid) -> Result<Vec<Held>, StoreError> {
        self.call(reads("held connections"), move |records| records.held(node)).await
    }

    async fn end_node(&self, node: Uuid, at: Moment) -> Result<(), StoreError> {
        self.call(writes("end node", 0), move |records| records.end_node(node, at)).await
    }
}

/// The simulation looks at the present: nobody asks it about the past.
#[async_trait]
impl PastStore for Handle {
    async fn watch(&self, _observer: Observer) -> Result<Watch, StoreError> {
        Ok(Watch::default())
    }

    async fn list_stays(
        &self,
        _agent: InstanceUid,
        _span: Span,
        _after: Option<StayPlace>,
        _limit: u32,
        _observer: Observer,
    ) -> Result<Stays, StoreError> {
        Ok(Stays { stays: Vec::new(), more: false, watch: Watch::default() })
    }

    async fn list_agents_as_of(
        &self,
        _filter: &PastFilter,
        _at: Moment,
        _page: PageRequest<InstanceUid>,
        _observer: Observer,
    ) -> Result<PastAgents, StoreError> {
        Ok(PastAgents { agents: Vec::new(), total: 0, more: false, watch: Watch::default() })
    }

    async fn summarize_as_of(
        &self,
        _at: Moment,
        _observer: Observer,
    ) -> Result<(PastSummary, Watch), StoreError> {
        Ok((PastSummary::default(), Watch::default()))
    }

    async fn read_fleet(&self, _span: Span, _observer: Observer) -> Result<Option<FleetPast>, StoreError> {
        Ok(None)
    }

    async fn next_connections(
        &self,
        _agent: InstanceUid,
        _filter: HistoryFilter,
        _page: PageRequest<i64>,
    ) -> Result<Vec<ConnectionRow>, StoreError> {
        Ok(Vec::new())
    }

    async fn next_connections_of_all(
        &self,
        _span: Span,
        _after: Option<StayPlace>,
        _limit: u32,
    ) -> Result<Vec<ConnectionRow>, StoreError> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl RetentionStore for Handle {
    async fn forget(&self, _before: Moment) -> Result<Forgotten, StoreError> {
        Ok(Forgotten::default())
    }
}

#[async_trait]
impl ObservationStore for Handle {
    async fn observe(&self, begins: Moment, ends: Moment, _most: u32) -> Result<Observation, StoreError> {
        Ok(Observation::new(begins, ends))
    }
}

#[async_trait]
impl Store for Handle {
    async fn check(&self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn hear_orders(&self, _url: Option<&str>, heard: &(dyn Fn() + Send + Sync)) -> StoreError {
        heard();
        std::future::pending().await
    }

    async fn close(&self) {}
}

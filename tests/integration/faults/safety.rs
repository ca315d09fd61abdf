//! The safety net: rows that nobody holds, and connections that no row stands for.

use opamp_server::proto::ServerToAgentFlags;

use crate::harness::Database;
use crate::harness::agent::{Agent, Poller, Socket, assert_acknowledged};
use crate::harness::server::{TestServer, eventually};

/// An open row of this node without a connection is ended as the server's fault.
pub(super) async fn a_row_that_nobody_holds_is_ended(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    let raw = database.raw().await;
    let (mut gone, mut other) = (Agent::new(), Agent::new());
    let (mut socket, _) = Socket::greet(&server, &gone.full()).await;
    socket.say_goodbye().await;
    server.until_ended(gone.uid).await;
    let (mut witness, _) = Socket::greet(&server, &other.full()).await;
    // As if an opening had been committed whose answer never came.
    let agent = raw.literal(gone.uid);
    raw.execute(format!(
        "INSERT INTO agent_connection_history (agent_id, connected_at, remote_addr, transport, node_id, node_seq, created_at)
         SELECT {agent}, c.connected_at, c.remote_addr, c.transport, c.node_id, 1000000, c.created_at
         FROM agent_connection_history c WHERE c.agent_id = {};
         UPDATE agents SET connection_id = (SELECT max(id) FROM agent_connection_history) WHERE id = {agent}",
        raw.literal(other.uid)
    ))
    .await;
    let row = server.until_ended(gone.uid).await;
    assert_eq!(row["disconnect_reason"], "internal_error");
    assert_eq!(server.status(gone.uid).await["connected"], false);
    assert_acknowledged(&witness.exchange(&other.report()).await, other.uid);
    assert_eq!(server.history(other.uid).await.len(), 1, "who is connected is left alone");
    server.stop().await.expect("it stops");
}

/// Ends the open row of an agent behind the server's back.
fn lose_row(agent: &str) -> String {
    format!(
        "UPDATE agent_connection_history SET disconnected_at = connected_at, disconnected_by = connected_at,
             duration_seconds = 0, disconnect_reason = 'server_lost' WHERE agent_id = {agent};
         UPDATE agents SET connection_id = NULL WHERE id = {agent}"
    )
}

/// A link whose row was ended by mistake stays open: its agent is asked to report and gets a new row.
pub(super) async fn a_connection_without_a_row_gets_a_new_one(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    let raw = database.raw().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    raw.execute(lose_row(&raw.literal(agent.uid))).await;
    let question = socket.offer().await;
    assert_ne!(question.flags & ServerToAgentFlags::ReportFullState as u64, 0, "{question:?}");
    assert_acknowledged(&socket.exchange(&agent.full()).await, agent.uid);
    let rows = server.history(agent.uid).await;
    assert_eq!(rows.len(), 2, "{rows:?}");
    assert!(
        rows[0]["disconnected_at"].is_null() && rows[1]["disconnect_reason"] == "server_lost",
        "{rows:?}"
    );
    assert_eq!(server.status(agent.uid).await["connected"], true);
    server.stop().await.expect("it stops");
}

/// The same over plain HTTP: the next poll opens a new row.
pub(super) async fn polls_without_a_row_get_a_new_one(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    let raw = database.raw().await;
    let mut agent = Agent::new();
    Poller::once(&server, &agent.full()).await;
    raw.execute(lose_row(&raw.literal(agent.uid))).await;
    eventually("a poll opens a new row", async || {
        Poller::once(&server, &agent.report()).await;
        (server.history(agent.uid).await.len() == 2).then_some(())
    })
    .await;
    assert_eq!(server.status(agent.uid).await["connected"], true);
    server.stop().await.expect("it stops");
}

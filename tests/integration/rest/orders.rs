//! Orders of operators: to reconnect, to be deleted.

use opamp_server::proto::{AgentToServer, ServerErrorResponseType};
use serde_json::{Value, json};

use super::assert_problem;
use crate::harness::Database;
use crate::harness::agent::{Agent, Poller, Socket, description, error_of};
use crate::harness::http::{Http, Response};
use crate::harness::server::{Ports, TestServer, eventually};

async fn reconnect(server: &Ports, agent: &Agent) -> Response {
    server.ask("POST", &format!("/api/v1/agents/{}/reconnect", agent.uid), &[]).await
}

async fn delete(server: &Ports, agent: &Agent, query: &str) -> Response {
    server.ask("DELETE", &format!("/api/v1/agents/{}{query}", agent.uid), &[]).await
}

/// The last change of an agent's status.
async fn last_change(server: &Ports, agent: &Agent) -> Value {
    server.read(&format!("/api/v1/agents/{}/status-history?limit=1", agent.uid)).await["transitions"][0]
        .clone()
}

async fn assert_one(server: &Ports, series: &str) {
    let value = server.metrics().await.value(series);
    assert!((value - 1.0).abs() < 0.5, "{series} is {value}");
}

/// A report under a name of its own.
fn named(agent: &mut Agent, name: &str) -> AgentToServer {
    AgentToServer { agent_description: Some(description(&[("service.name", name)])), ..agent.full() }
}

/// The order is on record when it is answered; the end is on record before the Close frame.
pub(super) async fn a_websocket_agent_reconnects(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let open = server.status(agent.uid).await["active_connection"]["id"].clone();
    let answer = reconnect(&server, &agent).await;
    assert_eq!((answer.status, answer.json()), (202, json!({ "connection_id": open })));
    assert_eq!(socket.closed().await, (1012, "reconnect_requested".to_owned()));
    let rows = server.history(agent.uid).await;
    assert_eq!((&rows[0]["id"], &rows[0]["disconnect_reason"]), (&open, &json!("reconnect_requested")));
    let status = server.status(agent.uid).await;
    assert_eq!((&status["status"], &status["connected"]), (&json!("online"), &json!(false)));
    let (socket, _) = Socket::greet(&server, &agent.report()).await;
    let status = server.status(agent.uid).await;
    assert_eq!((&status["status"], &status["connected"]), (&json!("online"), &json!(true)));
    assert_one(&server, "opamp_connections_ended_total{reason=\"reconnect_requested\"}").await;
    drop(socket);
    server.stop().await.expect("it stops");
}

/// Whoever shares the link stays on it.
pub(super) async fn an_order_ends_one_connection_of_a_shared_link(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    let (mut one, mut two) = (Agent::new(), Agent::new());
    let (mut socket, _) = Socket::greet(&server, &one.full()).await;
    socket.exchange(&two.full()).await;
    assert_eq!(reconnect(&server, &one).await.status, 202);
    assert_eq!(server.until_ended(one.uid).await["disconnect_reason"], "reconnect_requested");
    assert!(socket.exchange(&two.report()).await.error_response.is_none());
    assert_eq!(server.history(two.uid).await.len(), 1);
    assert_eq!(reconnect(&server, &two).await.status, 202);
    assert_eq!(socket.closed().await, (1012, "reconnect_requested".to_owned()));
    server.stop().await.expect("it stops");
}

/// What cannot be closed is a conflict, who is not known is not found.
pub(super) async fn who_has_no_websocket_is_not_made_to_reconnect(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    let (mut polling, mut left, unknown) = (Agent::new(), Agent::new(), Agent::new());
    Poller::once(&server, &polling.full()).await;
    let (mut socket, _) = Socket::greet(&server, &left.full()).await;
    socket.exchange(&left.farewell()).await;
    assert_problem(&reconnect(&server, &polling).await, 409, "not-a-websocket-agent");
    assert_problem(&reconnect(&server, &left).await, 409, "not-connected");
    assert_problem(&reconnect(&server, &unknown).await, 404, "agent-not-found");
    let answer = server.ask("POST", "/api/v1/agents/nonsense/reconnect", &[]).await;
    assert_eq!(assert_problem(&answer, 400, "bad-parameter")["parameter"], "id");
    let target = format!("/api/v1/agents/{}/reconnect?force=true", polling.uid);
    let answer = server.ask("POST", &target, &[]).await;
    assert_eq!(assert_problem(&answer, 400, "bad-parameter")["parameter"], "force");
    assert_eq!(server.status(polling.uid).await["connected"], true, "nothing happened to it");
    drop(socket);
    server.stop().await.expect("it stops");
}

/// A report that meets the order opens nothing on the link that is about to close.
pub(super) async fn a_report_that_meets_the_order_opens_nothing(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    let raw = database.raw().await;
    if !raw.locks_rows() {
        // There the order itself would wait for whoever delays the end.
        return;
    }
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let held = raw.hold(&["UPDATE agent_connection_history SET node_seq = node_seq".to_owned()]).await;
    assert_eq!(reconnect(&server, &agent).await.status, 202);
    raw.until_somebody_waits().await;
    let offer = socket.exchange(&agent.report()).await;
    error_of(&offer, ServerErrorResponseType::Unavailable);
    held.commit().await;
    assert_eq!(socket.closed().await, (1012, "reconnect_requested".to_owned()));
    assert_eq!(server.history(agent.uid).await.len(), 1);
    server.stop().await.expect("it stops");
}

/// A connected agent is deleted by force only; it is retired by the end of its connection, and may return.
pub(super) async fn a_connected_agent_is_deleted_by_force(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    for query in ["", "?force=false"] {
        assert_problem(&delete(&server, &agent, query).await, 409, "agent-connected");
    }
    let answer = delete(&server, &agent, "?force=perhaps").await;
    assert_eq!(assert_problem(&answer, 400, "bad-parameter")["parameter"], "force");
    let answer = delete(&server, &agent, "?force=true").await;
    assert_eq!((answer.status, answer.text().as_str()), (204, ""));
    assert_eq!(socket.closed().await, (1008, "deleted".to_owned()));
    assert_eq!(server.status(agent.uid).await["status"], "retired");
    assert_eq!(server.history(agent.uid).await[0]["disconnect_reason"], "deleted");
    let change = last_change(&server, &agent).await;
    assert_eq!((&change["from"], &change["to"]), (&json!("online"), &json!("retired")));
    assert_eq!(change["reason"], "deleted");
    assert_eq!(server.read("/api/v1/agents").await["total"], 0);
    let (socket, _) = Socket::greet(&server, &agent.report()).await;
    assert_eq!(server.status(agent.uid).await["status"], "online", "deleting does not bar");
    drop(socket);
    server.stop().await.expect("it stops");
}

/// Polls have no link: the connection is on record as ended when the delete is answered, and a later poll is a return.
pub(super) async fn a_polling_agent_is_deleted_by_force(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    let mut agent = Agent::new();
    let mut poller = Poller::connect(&server).await;
    poller.exchange(&agent.full()).await;
    assert_problem(&delete(&server, &agent, "").await, 409, "agent-connected");
    assert_eq!(delete(&server, &agent, "?force=true").await.status, 204);
    let row = &server.history(agent.uid).await[0];
    assert_eq!(row["disconnect_reason"], "deleted");
    assert!(!row["disconnected_by"].is_null(), "the end was decided, not seen: {row}");
    assert_eq!(server.status(agent.uid).await["status"], "retired");
    assert_one(&server, "opamp_connections_ended_total{reason=\"deleted\"}").await;
    eventually("its poll opens a new connection", async || {
        poller.exchange(&agent.report()).await;
        (server.history(agent.uid).await.len() == 2).then_some(())
    })
    .await;
    assert_eq!(server.status(agent.uid).await["status"], "online");
    assert_one(&server, "opamp_connections_open{transport=\"http\"}").await;
    drop(poller);
    server.stop().await.expect("it stops");
}

/// Who is not connected is retired at once, once and for all.
pub(super) async fn an_agent_that_left_is_deleted(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    let (mut agent, unknown) = (Agent::new(), Agent::new());
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    socket.exchange(&agent.farewell()).await;
    for _ in 0..2 {
        assert_eq!(delete(&server, &agent, "").await.status, 204);
        assert_eq!(server.status(agent.uid).await["status"], "retired");
    }
    let changes = server.read(&format!("/api/v1/agents/{}/status-history", agent.uid)).await;
    assert_eq!(changes["total"], 3, "{changes}");
    assert_problem(&delete(&server, &unknown, "").await, 404, "agent-not-found");
    assert_problem(&delete(&server, &unknown, "?force=true").await, 404, "agent-not-found");
    let answer = server.ask("DELETE", "/api/v1/agents/nonsense", &[]).await;
    assert_eq!(assert_problem(&answer, 400, "bad-parameter")["parameter"], "id");
    drop(socket);
    server.stop().await.expect("it stops");
}

/// Many are deleted by filter, never by accident.
pub(super) async fn many_are_deleted_by_filter(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    let mut agents: Vec<Agent> = (0..4).map(|_| Agent::new()).collect();
    let mut sockets = Vec::new();
    for (agent, name) in agents.iter_mut().zip(["edge-1", "edge-2", "edge-3", "core"]) {
        sockets.push(Socket::greet(&server, &named(agent, name)).await.0);
    }
    for (agent, socket) in agents.iter_mut().zip(&mut sockets).skip(2) {
        socket.exchange(&agent.farewell()).await;
    }
    let many = async |query: &str| server.ask("DELETE", &format!("/api/v1/agents{query}"), &[]).await;
    for query in ["", "?q=", "?include=retired", "?force=true"] {
        let problem = assert_problem(&many(query).await, 400, "filter-missing");
        assert!(problem["detail"].as_str().expect("a text").contains("status"), "{problem}");
    }
    for name in ["limit", "cursor", "statsu"] {
        let answer = many(&format!("?q=edge&{name}=1")).await;
        assert_eq!(assert_problem(&answer, 400, "bad-parameter")["parameter"], name);
    }
    assert_eq!(server.read("/api/v1/agents").await["total"], 4, "nothing was deleted");
    assert_eq!(many("?q=nobody").await.json(), json!({ "deleted": 0, "skipped_connected": 0 }));
    let every_filter =
        "?attr.service.name=core&transport=websocket&healthy=true&status=online&connected=true";
    assert_eq!(many(every_filter).await.json(), json!({ "deleted": 0, "skipped_connected": 0 }));
    assert_eq!(many("?q=edge").await.json(), json!({ "deleted": 1, "skipped_connected": 2 }));
    assert_eq!(server.read("/api/v1/agents").await["total"], 3);
    assert_eq!(
        many("?q=edge&connected=true&force=true").await.json(),
        json!({ "deleted": 2, "skipped_connected": 0 })
    );
    for socket in &mut sockets[..2] {
        assert_eq!(socket.closed().await, (1008, "deleted".to_owned()));
    }
    let left = server.read("/api/v1/agents?include=retired").await;
    let statuses: Vec<_> =
        left["agents"].as_array().expect("a list").iter().map(|agent| &agent["status"]).collect();
    assert_eq!(statuses.iter().filter(|status| ***status == json!("retired")).count(), 3, "{left}");
    assert_eq!(many("?status=retired").await.json(), json!({ "deleted": 0, "skipped_connected": 0 }));
    drop(sockets);
    server.stop().await.expect("it stops");
}

/// A body that is not JSON is refused before anything happens.
pub(super) async fn a_body_of_another_type_is_refused(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    let mut agent = Agent::new();
    let (socket, _) = Socket::greet(&server, &agent.full()).await;
    let one = format!("/api/v1/agents/{}", agent.uid);
    let mut http = Http::connect(server.operators).await;
    for (method, target) in [
        ("POST", format!("{one}/reconnect")),
        ("DELETE", format!("{one}?force=true")),
        ("DELETE", "/api/v1/agents?q=c".to_owned()),
    ] {
        for headers in [
            &[][..],
            &[("Content-Type", "text/plain")],
            &[("Content-Type", "application/x-www-form-urlencoded")],
        ] {
            assert_problem(&http.send(method, &target, headers, b"{}").await, 415, "unsupported-media-type");
            let answer = http.send_chunked(method, &target, headers, b"{}").await;
            assert_problem(&answer, 415, "unsupported-media-type");
        }
    }
    assert_eq!(server.status(agent.uid).await["connected"], true);
    let json = [("Content-Type", "application/json; charset=utf-8")];
    assert_eq!(http.send("POST", &format!("{one}/reconnect"), &json, b"{}").await.status, 202);
    drop(socket);
    server.stop().await.expect("it stops");
}

/// An order that the store does not take in time is refused, and nothing of it happens later.
pub(super) async fn orders_need_the_store(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let raw = database.raw().await;
    let stuck = if raw.locks_rows() { vec!["LOCK TABLE agents".to_owned()] } else { Vec::new() };
    let held = raw.hold(&stuck).await;
    let one = format!("/api/v1/agents/{}", agent.uid);
    let (reconnect, delete, many) =
        (format!("{one}/reconnect"), format!("{one}?force=true"), "/api/v1/agents?q=c");
    let mut requests = vec![("POST", reconnect.as_str()), ("DELETE", delete.as_str()), ("DELETE", many)];
    if raw.locks_rows() {
        requests.extend([
            ("GET", one.as_str()),
            ("GET", "/api/v1/agents/summary"),
            ("GET", "/api/agent/nodes"),
        ]);
    }
    let ask = async |(method, target): (&str, &str)| {
        let answer = server.ask(method, target, &[]).await;
        assert_problem(&answer, 503, "store-unavailable");
    };
    futures_util::future::join_all(requests.into_iter().map(ask)).await;
    held.commit().await;
    assert!(socket.exchange(&agent.report()).await.error_response.is_none());
    assert_eq!(server.status(agent.uid).await["connected"], true);
    drop(socket);
    server.stop().await.expect("it stops");
}

/// An order given at one node closes the link that another one holds.
async fn reaches_the_other_node(database: &Database, listen_url: Option<String>) {
    let node = async |name: &str| {
        TestServer::on(database, |config| {
            config.node.name = Some(name.to_owned());
            // Far longer than the test: only a wake, or the pace of a deaf node, is quick enough.
            config.heartbeat.check_interval = std::time::Duration::from_hours(1);
            config.store.listen_url = listen_url.clone().map(Into::into);
        })
        .await
    };
    let (one, two) = (node("one").await, node("two").await);
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&one, &agent.full()).await;
    assert_eq!(reconnect(&two, &agent).await.status, 202);
    assert_eq!(socket.closed().await, (1012, "reconnect_requested".to_owned()));
    let (mut socket, _) = Socket::greet(&two, &agent.report()).await;
    assert_eq!(delete(&one, &agent, "?force=true").await.status, 204);
    assert_eq!(socket.closed().await, (1008, "deleted".to_owned()));
    assert_eq!(one.status(agent.uid).await["status"], "retired");
    let mut poller = Poller::connect(&one).await;
    poller.exchange(&agent.report()).await;
    assert_eq!(delete(&two, &agent, "?force=true").await.status, 204);
    eventually("the next poll is a return", async || {
        poller.exchange(&agent.report()).await;
        (one.status(agent.uid).await["status"] == "online").then_some(())
    })
    .await;
    assert_eq!(one.history(agent.uid).await.len(), 4);
    drop(poller);
    one.stop().await.expect("it stops");
    two.stop().await.expect("it stops");
}

#[tokio::test]
async fn an_order_reaches_the_node_that_holds_the_link() {
    let Some(database) = Database::postgres().await else { return };
    reaches_the_other_node(&database, None).await;
}

/// Where nothing is heard of the other nodes, orders are looked for.
#[tokio::test]
async fn an_order_reaches_a_node_that_cannot_listen() {
    let Some(database) = Database::postgres().await else { return };
    reaches_the_other_node(&database, Some("postgres://nobody@127.0.0.1:1/nowhere".to_owned())).await;
}

/// A node that lost the connection on which it listens does so again, and finds what it missed.
#[tokio::test]
async fn a_node_listens_again() {
    let Some(database) = Database::postgres().await else { return };
    let raw = database.raw().await;
    let server = TestServer::on(&database, |config| {
        config.heartbeat.check_interval = std::time::Duration::from_hours(1);
    })
    .await;
    let listeners = "FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'";
    let listens = async || {
        eventually("it listens", async || {
            (raw.number(format!("SELECT count(*) {listeners}")).await == 1).then_some(())
        })
        .await;
    };
    listens().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    raw.execute(format!("SELECT pg_terminate_backend(pid) {listeners}")).await;
    // As another node would write it while nobody listens.
    raw.execute("UPDATE agents SET close_connection = connection_id, close_reason = 'reconnect_requested'")
        .await;
    assert_eq!(socket.closed().await, (1012, "reconnect_requested".to_owned()));
    listens().await;
    let (mut socket, _) = Socket::greet(&server, &agent.report()).await;
    raw.execute(
        "UPDATE agents SET close_connection = connection_id, close_reason = 'reconnect_requested';
         SELECT pg_notify('opamp_orders', '')",
    )
    .await;
    assert_eq!(socket.closed().await, (1012, "reconnect_requested".to_owned()));
    drop(socket);
    server.stop().await.expect("it stops");
}

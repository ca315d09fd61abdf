//! What operators see: the shapes of all routes, their problems, and who may look.
//!
//! What changes something, or reads more than a page, is a plain function over a database and runs
//! on `SQLite` and on Postgres; the list below is complete.

#![expect(clippy::expect_used, reason = "in a test a panic with a sentence is the report")]

mod access;
mod description;
mod incidents;
mod nodes;
mod orders;
mod pages;
mod past;

use std::collections::BTreeSet;

use opamp_server::agent::InstanceUid;
use opamp_server::proto::{AgentToServer, ComponentHealth};
use serde_json::{Value, json};

use crate::harness::Database;
use crate::harness::agent::{Agent, HEALTH, Poller, STATUS, Socket, description, effective_config};
use crate::harness::http::Response;
use crate::harness::server::{Process, TestServer, moment};

macro_rules! on_both {
    ($($module:ident { $($case:ident,)* })*) => {
        mod sqlite {
            use crate::harness::Database;
            $($(
                #[tokio::test]
                async fn $case() {
                    super::$module::$case(&Database::sqlite()).await;
                }
            )*)*
        }

        mod postgres {
            use crate::harness::Database;
            $($(
                #[tokio::test]
                async fn $case() {
                    let Some(database) = Database::postgres().await else { return };
                    super::$module::$case(&database).await;
                }
            )*)*
        }
    };
}

on_both! {
    orders {
        a_websocket_agent_reconnects,
        an_order_ends_one_connection_of_a_shared_link,
        who_has_no_websocket_is_not_made_to_reconnect,
        a_report_that_meets_the_order_opens_nothing,
        a_connected_agent_is_deleted_by_force,
        a_polling_agent_is_deleted_by_force,
        an_agent_that_left_is_deleted,
        many_are_deleted_by_filter,
        a_body_of_another_type_is_refused,
        orders_need_the_store,
    }
    nodes {
        all_agents_come_in_one_array,
        a_failure_in_the_middle_breaks_the_array_off,
    }
    incidents {
        what_belongs_together_is_one_incident,
        a_span_has_its_limits,
    }
    pages {
        pages_miss_nobody_who_stays,
    }
    past {
        a_long_history_is_streamed_whole_or_broken_off,
    }
    description {
        every_wrong_parameter_is_named,
    }
}

/// The names of an object's fields.
fn fields(value: &Value) -> BTreeSet<&str> {
    value.as_object().unwrap_or_else(|| panic!("no object: {value}")).keys().map(String::as_str).collect()
}

fn set<const N: usize>(names: [&'static str; N]) -> BTreeSet<&'static str> {
    names.into()
}

/// Checks a problem: its media type, its stable type, and that it says what is wrong.
fn assert_problem(response: &Response, status: u16, kind: &str) -> Value {
    assert_eq!(response.status, status, "{}", response.text());
    assert_eq!(response.header("content-type"), Some("application/problem+json"), "{}", response.text());
    let body = response.json();
    assert_eq!(body["type"], kind);
    assert_eq!(body["status"], status);
    for text in ["title", "detail"] {
        assert!(body[text].as_str().is_some_and(|text| !text.is_empty()), "{body}");
    }
    body
}

const ITEM: [&str; 21] = [
    "id",
    "name",
    "host",
    "status",
    "since",
    "connected",
    "healthy",
    "transport",
    "remote_addr",
    "groups",
    "clients_count",
    "sync_revision",
    "ephemeral",
    "last_seen_at",
    "last_connected_at",
    "last_disconnected_at",
    "disconnect_reason",
    "previous_id",
    "retired_at",
    "created_at",
    "updated_at",
];

const DOCUMENT: [&str; 11] = [
    "capabilities",
    "description",
    "health",
    "effective_config",
    "remote_config_status",
    "package_statuses",
    "custom_capabilities",
    "components_hash",
    "available_components",
    "connection_settings_status",
    "sequence_num",
];

const CONNECTION: [&str; 12] = [
    "id",
    "agent_id",
    "connected_at",
    "disconnected_at",
    "disconnected_by",
    "duration_seconds",
    "disconnect_reason",
    "remote_addr",
    "transport",
    "node_id",
    "node_seq",
    "created_at",
];

/// The fields of every answer, so that none comes or goes unnoticed.
#[tokio::test]
async fn every_answer_has_its_fields() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::with(STATUS | HEALTH);
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let list = server.read("/api/v1/agents").await;
    assert_eq!(fields(&list), set(["agents", "total", "next_cursor"]));
    assert_eq!(fields(&list["agents"][0]), set(ITEM));
    let document = server.agent(agent.uid).await.unwrap();
    let expected: BTreeSet<&str> = ITEM.into_iter().chain(DOCUMENT).collect();
    assert_eq!(fields(&document), expected);
    for moment_of in ["since", "last_seen_at", "last_connected_at", "created_at", "updated_at"] {
        moment(&document[moment_of]);
    }
    let status = server.status(agent.uid).await;
    let expected = set([
        "agent_id",
        "status",
        "connected",
        "healthy",
        "since",
        "deadline_at",
        "last_seen_at",
        "last_connected_at",
        "last_disconnected_at",
        "disconnect_reason",
        "active_connection",
    ]);
    assert_eq!(fields(&status), expected);
    let open: BTreeSet<&str> = CONNECTION.into_iter().chain(["confirmed_until"]).collect();
    assert_eq!(fields(&status["active_connection"]), open);
    assert!(moment(&status["deadline_at"]) > moment(&status["last_seen_at"]));
    socket.exchange(&agent.farewell()).await;
    let page = server.read(&format!("/api/v1/agents/{}/connection-history", agent.uid)).await;
    assert_eq!(fields(&page), set(["connections", "total", "next_cursor"]));
    assert_eq!(fields(&page["connections"][0]), set(CONNECTION));
    let summary = server.read("/api/v1/agents/summary").await;
    let expected = json!({
        "total": 1, "online": 0, "offline": 1, "error": 0, "retired": 0,
        "connected": 0, "healthy": 1, "unhealthy": 0,
    });
    assert_eq!(summary, expected);
}

/// A small fleet: two online (one healthy over a WebSocket, one unhealthy by polls), one offline.
async fn fleet(server: &TestServer) -> ([InstanceUid; 3], Socket) {
    let mut agents = [Agent::new(), Agent::new(), Agent::new()];
    let named = |agent: &mut Agent, name: &str, zone: &str, healthy: bool| AgentToServer {
        agent_description: Some(description(&[("service.name", name), ("host.name", "h1"), ("zone", zone)])),
        health: Some(ComponentHealth { healthy, ..ComponentHealth::default() }),
        ..agent.full()
    };
    let [one, two, three] = &mut agents;
    let (mut socket, _) = Socket::greet(server, &named(one, "edge-one", "north", true)).await;
    Poller::once(server, &named(two, "Edge-two", "south", false)).await;
    socket.exchange(&named(three, "core", "north", true)).await;
    socket.exchange(&three.farewell()).await;
    (agents.map(|agent| agent.uid), socket)
}

/// Every filter narrows the list, they combine, and the named lists are the same list, filtered.
#[tokio::test]
async fn lists_are_narrowed_by_their_filters() {
    let server =
        TestServer::with(|config| config.sweep.stale_after = std::time::Duration::from_millis(10)).await;
    let ([one, two, three], _socket) = fleet(&server).await;
    let everybody = [one, two, three];
    let id = one.to_string().to_uppercase();
    for (query, expected) in [
        ("", &everybody[..]),
        ("?status=online", &[one, two]),
        ("?status=offline", &[three]),
        ("?status=error", &[]),
        ("?connected=true", &[one, two]),
        ("?connected=false", &[three]),
        ("?healthy=true", &[one, three]),
        ("?healthy=false", &[two]),
        ("?transport=http", &[two]),
        ("?transport=websocket", &[one]),
        ("?attr.zone=north", &[one, three]),
        ("?attr.zone=north&attr.service.name=core", &[three]),
        ("?attr.zone=west", &[]),
        ("?q=edge", &[one, two]),
        ("?q=H1&healthy=true", &[one, three]),
        (&format!("?q={}", &id[..30]), &[one]),
        ("?q=%25", &[]),
        ("?include=retired", &everybody),
        ("/online", &[one, two]),
        ("/online?healthy=true", &[one]),
        ("/offline", &[three]),
        ("/error", &[]),
    ] {
        let list = server.read(&format!("/api/v1/agents{query}")).await;
        let found: BTreeSet<String> = list["agents"]
            .as_array()
            .unwrap()
            .iter()
            .map(|agent| agent["id"].as_str().unwrap().to_owned())
            .collect();
        let expected: BTreeSet<String> = expected.iter().map(ToString::to_string).collect();
        assert_eq!(found, expected, "{query}");
        assert_eq!(list["total"], expected.len(), "{query}");
    }
    crate::harness::server::eventually("the one that left is stale", async || {
        let stale = server.read("/api/v1/agents/stale").await;
        (stale["total"] == 1 && stale["agents"][0]["id"] == json!(three)).then_some(())
    })
    .await;
}

/// Pages follow each other by cursor, without a gap, a double or a wrong total.
#[tokio::test]
async fn pages_follow_by_cursor() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    let mut expected = BTreeSet::new();
    for _ in 0..7 {
        let mut agent = Agent::new();
        poller.exchange(&agent.full()).await;
        expected.insert(agent.uid.to_string());
    }
    let (mut found, mut cursor, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let page = server.read(&format!("/api/v1/agents?limit=3{cursor}")).await;
        assert_eq!(page["total"], 7);
        let ids =
            page["agents"].as_array().unwrap().iter().map(|agent| agent["id"].as_str().unwrap().to_owned());
        found.extend(ids);
        pages += 1;
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(pages, 3);
    assert!(found.is_sorted(), "ordered by id");
    assert_eq!(found.len(), 7, "no double");
    assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), expected);
}

/// The history is paged, newest first, and cut by `from` and `to`.
#[tokio::test]
async fn a_history_is_paged_and_cut() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    for _ in 0..4 {
        socket.exchange(&agent.farewell()).await;
        socket.exchange(&agent.report()).await;
    }
    let rows = server.history(agent.uid).await;
    assert_eq!(rows.len(), 5);
    let path = format!("/api/v1/agents/{}/connection-history", agent.uid);
    let first = server.read(&format!("{path}?limit=2")).await;
    assert_eq!(first["connections"], json!(rows[..2]));
    assert_eq!(first["total"], 5);
    let second =
        server.read(&format!("{path}?limit=2&cursor={}", first["next_cursor"].as_str().unwrap())).await;
    assert_eq!(second["connections"], json!(rows[2..4]));
    let last =
        server.read(&format!("{path}?limit=2&cursor={}", second["next_cursor"].as_str().unwrap())).await;
    assert_eq!(last["connections"], json!(rows[4..]));
    assert!(last["next_cursor"].is_null());
    assert_eq!(server.read(&format!("{path}?to=2020-01-01T00:00:00Z")).await["total"], 0);
    assert_eq!(server.read(&format!("{path}?from=2020-01-01T00:00:00Z")).await["total"], 5);
    assert_eq!(server.read(&format!("{path}?from=2100-01-01T00:00:00Z")).await["total"], 1, "the open one");
}

/// What is wrong is a problem that names it, everywhere.
#[tokio::test]
async fn problems_are_problem_json_and_name_what_is_wrong() {
    let server = TestServer::fresh().await;
    let unknown = "/api/v1/agents/0190d3c2-7a10-7b3e-9c41-5d2e8f60a1b2";
    for path in ["", "/status", "/connection-history"] {
        let answer = server.ask("GET", &format!("{unknown}{path}"), &[]).await;
        assert_problem(&answer, 404, "agent-not-found");
        let answer = server.ask("GET", &format!("/api/v1/agents/nonsense{path}"), &[]).await;
        assert_eq!(assert_problem(&answer, 400, "bad-parameter")["parameter"], "id");
    }
    for (query, name) in [
        ("limit=0", "limit"),
        ("q=%00", "q"),
        ("attr.os=a%00b", "attr.os"),
        ("limit=1001", "limit"),
        ("limit=ten", "limit"),
        ("cursor=nonsense", "cursor"),
        ("status=gone", "status"),
        ("connected=1", "connected"),
        ("healthy=maybe", "healthy"),
        ("transport=pigeon", "transport"),
        ("include=everything", "include"),
        ("limit=1&limit=2", "limit"),
        ("statsu=online", "statsu"),
    ] {
        let answer = server.ask("GET", &format!("/api/v1/agents?{query}"), &[]).await;
        let problem = assert_problem(&answer, 400, "bad-parameter");
        assert_eq!(problem["parameter"], name, "{query}");
        assert!(problem["detail"].as_str().unwrap().contains(name), "{problem}");
    }
    for target in ["/api/v1/agents/summary?x=1", "/api/v1/agents/online?x=1", &format!("{unknown}?x=1")] {
        assert_eq!(
            assert_problem(&server.ask("GET", target, &[]).await, 400, "bad-parameter")["parameter"],
            "x"
        );
    }
    let history = format!("{unknown}/connection-history?from=yesterday");
    assert_eq!(
        assert_problem(&server.ask("GET", &history, &[]).await, 400, "bad-parameter")["parameter"],
        "from"
    );
    for target in ["/", "/api", "/api/v1", "/api/v1/agent", "/api/v2/agents", "/v1/opamp"] {
        assert_problem(&server.ask("GET", target, &[]).await, 404, "not-found");
    }
    for target in ["/api/v1/agents", "/api/v1/agents/summary", "/metrics"] {
        for method in ["POST", "PUT", "PATCH"] {
            assert_problem(&server.ask(method, target, &[]).await, 405, "method-not-allowed");
        }
    }
    for target in ["/healthz", "/readyz"] {
        assert_problem(&server.ask("POST", target, &[]).await, 405, "method-not-allowed");
    }
}

/// With a token set, everything needs it but the probes.
#[tokio::test]
async fn with_a_token_everything_needs_it_but_the_probes() {
    let server = TestServer::with(|config| config.operators.token = Some("987654".into())).await;
    let guarded = ["/api/v1/agents", "/api/v1/agents/summary", "/metrics", "/openapi.json", "/nowhere"];
    for target in guarded {
        let answer = server.ask("GET", target, &[]).await;
        assert_problem(&answer, 401, "token-required");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        let answer = server.ask("GET", target, &[("Authorization", "Bearer 98765")]).await;
        assert_problem(&answer, 401, "invalid-token");
        let answer = server.ask("GET", target, &[("Authorization", "Bearer 987654")]).await;
        assert_ne!(answer.status, 401, "{target}");
    }
    for probe in ["/healthz", "/readyz"] {
        assert_eq!(server.get(probe).await, (200, json!({"status": "ok"})));
    }
}

/// Secrets of an effective config are masked, the rest is shown as it is.
#[tokio::test]
async fn secrets_in_an_effective_config_are_masked() {
    const CONFIG: &str = "
exporters:
  otlp:
    endpoint: https://user:hunter2@collector.example:4317
    headers:
      authorization: Bearer hunter2
      x-tenant: blue
    api_key: hunter2
    tls: {password: hunter2, ca_file: /etc/ca.pem}
receivers:
  token: \"hunter2\"
";
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let report = AgentToServer { effective_config: Some(effective_config(CONFIG)), ..agent.full() };
    let (_socket, _) = Socket::greet(&server, &report).await;
    let shown = server.agent(agent.uid).await.unwrap()["effective_config"].to_string();
    assert!(!shown.contains("hunter2"), "{shown}");
    for word in ["collector.example:4317", "x-tenant", "blue", "ca_file", "/etc/ca.pem", "api_key"] {
        assert!(shown.contains(word), "{word} is no secret: {shown}");
    }
}

/// The fixed names are there, and the gauges of the fleet are what the store knows.
#[tokio::test]
async fn metrics_have_their_fixed_names() {
    let server = TestServer::fresh().await;
    let ([_, _, _], _socket) = fleet(&server).await;
    let metrics = server.metrics().await;
    for (name, kind) in [
        ("opamp_agents_online_total", "gauge"),
        ("opamp_agents_offline_total", "gauge"),
        ("opamp_agent_connection_duration_seconds", "histogram"),
        ("opamp_agent_heartbeat_missed_total", "counter"),
    ] {
        assert!(metrics.0.contains(&format!("# TYPE {name} {kind}\n")), "{name}: {}", metrics.0);
        assert!(metrics.0.contains(&format!("# HELP {name} ")), "{name}");
    }
    for (series, value) in [
        ("opamp_agents_online_total", 2.0),
        ("opamp_agents_offline_total", 1.0),
        ("opamp_agents_error_total", 0.0),
        ("opamp_agent_connection_duration_seconds_count{reason=\"agent_disconnect\"}", 1.0),
        ("opamp_connections_open{transport=\"websocket\"}", 1.0),
        ("opamp_connections_open{transport=\"http\"}", 1.0),
    ] {
        assert!((metrics.value(series) - value).abs() < 0.5, "{series} is {}", metrics.value(series));
    }
}

/// secrets appear in no log line: neither the tokens nor the password of the store.
#[tokio::test]
async fn secrets_appear_in_no_log_line() {
    let database = Database::sqlite();
    let environment = [
        ("OPAMP_AGENTS_TOKEN", "hunter2-agents"),
        ("OPAMP_OPERATORS_TOKEN", "hunter2-operators"),
        ("OPAMP_LOG_LEVEL", "debug"),
    ];
    let server = Process::start(&database, &environment).await;
    let Err(refusal) = Socket::open(&server, "/v1/opamp", &[("secret-key", "hunter2-wrong")]).await else {
        panic!("it was let in")
    };
    assert_eq!(refusal.status, 401);
    server.ask("GET", "/api/v1/agents", &[("Authorization", "Bearer hunter2-operators")]).await;
    server.signal(rustix::process::Signal::TERM);
    let (_, logs) = server.exit().await;
    assert!(!logs.is_empty());
    for entry in logs {
        assert!(!entry.to_string().contains("hunter2"), "{entry}");
    }
}

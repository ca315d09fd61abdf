//! What is kept of an agent: parts left out, replaced as a whole, numbers and masks.

use opamp_server::proto::{
    AgentConfigMap, AgentDescription, AgentToServer, AvailableComponents, ComponentDetails, ComponentHealth,
    ConnectionSettingsStatus, CustomCapabilities, EffectiveConfig, PackageStatus, PackageStatuses,
    RemoteConfigStatus, RemoteConfigStatuses,
};
use serde_json::{Value, json};

use crate::harness::Database;
use crate::harness::agent::{
    Agent, EFFECTIVE_CONFIG, FULL_STATE, HEALTH, HEARTBEATS, Poller, STATUS, Socket, assert_acknowledged,
    description, effective_config, pair,
};
use crate::harness::server::TestServer;

/// A report with all eight parts.
fn everything(agent: &mut Agent) -> AgentToServer {
    let mut report = agent.full();
    report.health = Some(ComponentHealth { healthy: true, ..ComponentHealth::default() });
    report.effective_config = Some(effective_config("receivers: {otlp: {}}"));
    report.remote_config_status = Some(RemoteConfigStatus {
        last_remote_config_hash: vec![0xab, 0xcd],
        status: RemoteConfigStatuses::Applied.into(),
        error_message: String::new(),
    });
    let package = PackageStatus { name: "addon".to_owned(), ..PackageStatus::default() };
    report.package_statuses = Some(PackageStatuses {
        packages: [("addon".to_owned(), package)].into(),
        ..PackageStatuses::default()
    });
    report.custom_capabilities =
        Some(CustomCapabilities { capabilities: vec!["com.example.pause/v2".to_owned()] });
    report.available_components = Some(inventory(&["otlp"], 1));
    report.connection_settings_status =
        Some(ConnectionSettingsStatus { last_connection_settings_hash: vec![9], ..Default::default() });
    report
}

fn inventory(names: &[&str], hash: u8) -> AvailableComponents {
    let components = names.iter().map(|name| ((*name).to_owned(), ComponentDetails::default())).collect();
    AvailableComponents { components, hash: vec![hash; 4] }
}

/// The parts of an agent's document.
const PARTS: [&str; 8] = [
    "description",
    "health",
    "effective_config",
    "remote_config_status",
    "package_statuses",
    "custom_capabilities",
    "available_components",
    "connection_settings_status",
];

fn parts(document: &Value) -> Value {
    PARTS
        .iter()
        .map(|part| ((*part).to_owned(), document[part].clone()))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// S-042: all eight parts are kept, and a part that is left out is unchanged, over reports and over connections.
#[tokio::test]
async fn s_042_a_part_left_out_is_unchanged() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &everything(&mut agent)).await;
    let known = server.agent(agent.uid).await.unwrap();
    for part in PARTS {
        assert!(!known[part].is_null(), "{part} is kept: {known}");
    }
    assert_eq!(known["description"]["identifying_attributes"]["service.name"], "collector");
    assert_eq!(known["healthy"], true);
    assert_eq!(known["sync_revision"], "abcd");
    for _ in 0..3 {
        socket.exchange(&agent.report()).await;
    }
    assert_eq!(parts(&server.agent(agent.uid).await.unwrap()), parts(&known));
    socket.exchange(&agent.farewell()).await;
    let (_socket, offer) = Socket::greet(&server, &agent.report()).await;
    assert_acknowledged(&offer, agent.uid);
    assert_eq!(parts(&server.agent(agent.uid).await.unwrap()), parts(&known));
}

/// S-043: a part that comes replaces the stored one completely; one that comes empty leaves nothing of it.
#[tokio::test]
async fn s_043_a_part_that_comes_replaces_the_whole_part() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut first = everything(&mut agent);
    first.agent_description = Some(description(&[("service.name", "collector"), ("team", "edge")]));
    let (mut socket, _) = Socket::greet(&server, &first).await;
    assert_eq!(server.read("/api/v1/agents?attr.team=edge").await["total"], 1);
    let second = AgentToServer {
        agent_description: Some(AgentDescription {
            identifying_attributes: vec![pair("service.name", "gateway")],
            ..AgentDescription::default()
        }),
        effective_config: Some(EffectiveConfig { config_map: Some(AgentConfigMap::default()) }),
        health: Some(ComponentHealth { last_error: "disk full".to_owned(), ..ComponentHealth::default() }),
        package_statuses: Some(PackageStatuses::default()),
        ..agent.report()
    };
    assert_acknowledged(&socket.exchange(&second).await, agent.uid);
    let known = server.agent(agent.uid).await.unwrap();
    assert_eq!(known["name"], "gateway");
    assert_eq!(known["description"]["identifying_attributes"], json!({"service.name": "gateway"}));
    assert_eq!(server.read("/api/v1/agents?attr.team=edge").await["total"], 0, "no attribute is left behind");
    assert_eq!(known["healthy"], false);
    assert_eq!(known["health"]["last_error"], "disk full");
    assert!(!known["effective_config"].to_string().contains("otlp"), "{}", known["effective_config"]);
    assert!(!known["package_statuses"].to_string().contains("addon"), "{}", known["package_statuses"]);
    assert_eq!(known["sync_revision"], "abcd", "what was left out stays");
    let empty = AgentToServer { agent_description: Some(AgentDescription::default()), ..agent.report() };
    socket.exchange(&empty).await;
    let known = server.agent(agent.uid).await.unwrap();
    assert_eq!(known["description"]["identifying_attributes"], json!({}));
    assert!(known["name"].is_null(), "{known}");
}

/// S-044, R-003: any jump of the number is answered by asking for full state, once.
#[tokio::test]
async fn s_044_a_jump_of_the_number_asks_for_full_state_once() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    for jump in [2, 1_000, 1] {
        agent.number += jump;
        assert_eq!(socket.exchange(&agent.report()).await.flags, FULL_STATE, "forwards by {jump}");
        assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
        assert_acknowledged(&socket.exchange(&agent.full()).await, agent.uid);
    }
    agent.number = 0;
    assert_eq!(socket.exchange(&agent.full()).await.flags, FULL_STATE, "backwards");
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
}

/// the numbers may start anywhere and wrap.
#[tokio::test]
async fn r_006_numbers_start_anywhere_and_wrap() {
    let server = TestServer::fresh().await;
    let mut agent = Agent { number: u64::MAX - 1, ..Agent::new() };
    let (mut socket, offer) = Socket::greet(&server, &agent.full()).await;
    assert_acknowledged(&offer, agent.uid);
    for number in [u64::MAX, 0, 1] {
        assert_eq!(agent.number, number);
        assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    }
}

/// S-045, S-046: after a reconnect the first report may leave everything out, if its number continues.
#[tokio::test]
async fn s_045_a_reconnect_that_continues_is_not_asked_and_another_is() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::with(STATUS | HEALTH | EFFECTIVE_CONFIG);
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    socket.exchange(&agent.report()).await;
    socket.break_off();
    server.until_ended(agent.uid).await;
    let (mut socket, offer) = Socket::greet(&server, &agent.report()).await;
    assert_acknowledged(&offer, agent.uid);
    socket.say_goodbye().await;
    server.until_ended(agent.uid).await;
    agent.number += 1;
    let (_socket, offer) = Socket::greet(&server, &agent.report()).await;
    assert_eq!(offer.flags, FULL_STATE, "a report was lost in between");
    assert_eq!(server.agent(agent.uid).await.unwrap()["name"], "collector", "what was known stays");
}

/// S-046: an unknown agent without a description gets a record and is asked, on both transports.
#[tokio::test]
async fn s_046_an_unknown_agent_that_says_nothing_is_asked() {
    let server = TestServer::fresh().await;
    let (mut one, mut other) = (Agent::new(), Agent::new());
    one.number = 17;
    let (mut socket, offer) = Socket::greet(&server, &one.report()).await;
    assert_eq!(offer.flags, FULL_STATE);
    assert_eq!(server.status(one.uid).await["status"], "online");
    assert_acknowledged(&socket.exchange(&one.full()).await, one.uid);
    assert_eq!(Poller::once(&server, &other.report()).await.flags, FULL_STATE);
    assert_eq!(server.status(other.uid).await["status"], "online");
}

/// R-035, AMB-03: a report of nothing but the uid is a sign of life and leaves the numbers alone.
#[tokio::test]
async fn r_035_a_bare_report_leaves_the_numbers_alone() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::with(STATUS | HEARTBEATS);
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let mut poller = Poller::connect(&server).await;
    for _ in 0..3 {
        assert_acknowledged(&socket.exchange(&agent.bare()).await, agent.uid);
        assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    }
    socket.exchange(&agent.farewell()).await;
    for _ in 0..3 {
        assert_acknowledged(&poller.exchange(&agent.bare()).await, agent.uid);
        assert_acknowledged(&poller.exchange(&agent.report()).await, agent.uid);
    }
    let known = server.agent(agent.uid).await.unwrap();
    assert_eq!(known["capabilities"], json!(["ReportsStatus", "ReportsHeartbeat"]), "R-002");
}

/// S-039, R-002: a changed mask counts from the report it comes in; 0 means that none was stated.
#[tokio::test]
async fn s_039_a_changed_mask_is_followed_and_r_002_zero_keeps_the_last() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::with(STATUS | HEALTH);
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let names = async || server.agent(agent.uid).await.unwrap()["capabilities"].clone();
    assert_eq!(names().await, json!(["ReportsStatus", "ReportsHealth"]));
    let mut speaker = agent.clone();
    speaker.capabilities = 0;
    assert_acknowledged(&socket.exchange(&speaker.report()).await, agent.uid);
    assert_eq!(names().await, json!(["ReportsStatus", "ReportsHealth"]));
    speaker.capabilities = STATUS | HEARTBEATS;
    assert_acknowledged(&socket.exchange(&speaker.report()).await, agent.uid);
    assert_eq!(names().await, json!(["ReportsStatus", "ReportsHeartbeat"]));
}

/// S-047: events belong to the report they come in: an `agent_disconnect` or a flag is never remembered.
#[tokio::test]
async fn s_047_events_belong_to_their_report_alone() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    socket.exchange(&agent.farewell()).await;
    assert_eq!(server.status(agent.uid).await["status"], "offline");
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    let status = server.status(agent.uid).await;
    assert_eq!((&status["status"], &status["connected"]), (&json!("online"), &json!(true)));
}

/// S-128: the list of custom capabilities is replaced by each that comes.
#[tokio::test]
async fn s_128_custom_capabilities_are_replaced() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let stated = async || server.agent(agent.uid).await.unwrap()["custom_capabilities"].clone();
    assert!(stated().await.is_null(), "before any came there is none");
    let mut speaker = agent.clone();
    for list in [&["a.b.c", "a.b.d/v1"][..], &["a.b.e"], &[]] {
        let capabilities = list.iter().map(|name| (*name).to_owned()).collect();
        let report = AgentToServer {
            custom_capabilities: Some(CustomCapabilities { capabilities }),
            ..speaker.report()
        };
        assert_acknowledged(&socket.exchange(&report).await, agent.uid);
        assert_eq!(stated().await, json!(list));
    }
}

/// S-133, S-134: a message with the inventory's hash alone does not say that there are no components.
#[tokio::test]
async fn s_134_a_hash_alone_clears_no_inventory() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let mut first = agent.full();
    first.available_components = Some(inventory(&["otlp", "batch"], 1));
    let (mut socket, _) = Socket::greet(&server, &first).await;
    let known = server.agent(agent.uid).await.unwrap();
    assert_eq!(known["components_hash"], "01010101");
    let report = AgentToServer { available_components: Some(inventory(&[], 1)), ..agent.report() };
    socket.exchange(&report).await;
    let after = server.agent(agent.uid).await.unwrap();
    assert!(after["available_components"].to_string().contains("batch"), "{after}");
    assert_eq!(after["available_components"], known["available_components"]);
    let mut other = Agent::new();
    let mut first = other.full();
    first.available_components = Some(inventory(&[], 1));
    let (_socket, _) = Socket::greet(&server, &first).await;
    let shared = server.agent(other.uid).await.unwrap();
    assert_eq!(shared["available_components"], known["available_components"], "S-133: shared by hash");
}

/// A report that changed state is durable before it is answered: another process sees it at once.
#[tokio::test]
async fn a_change_is_durable_before_it_is_answered() {
    let database = Database::sqlite();
    let server = TestServer::on(&database, |_| {}).await;
    let mut agent = Agent::new();
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let raw = database.raw().await;
    for name in ["one", "two", "three"] {
        let mut report = agent.report();
        report.agent_description = Some(description(&[("service.name", name)]));
        socket.exchange(&report).await;
        let stored: Vec<(String, i64)> = raw
            .rows("SELECT a.name, l.sequence_num FROM agents a JOIN agent_liveness l ON l.agent_id = a.id")
            .await;
        let number = i64::try_from(agent.number).unwrap() - 1;
        assert_eq!(stored, [(name.to_owned(), number)], "the number stands for the stored state");
    }
}

/// Times of observation alone are folded: a health that differs only there is not saved again.
#[tokio::test]
async fn a_change_of_times_alone_is_no_change() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::with(STATUS | HEALTH);
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let before = server.agent(agent.uid).await.unwrap();
    for time in 1..=5 {
        let mut report = agent.full();
        report.health.as_mut().unwrap().status_time_unix_nano = time;
        assert_acknowledged(&socket.exchange(&report).await, agent.uid);
    }
    let after = server.agent(agent.uid).await.unwrap();
    assert_eq!(after["health"], before["health"]);
    assert_eq!(after["updated_at"], before["updated_at"]);
}

//! Capability masks: every bit, unknown bits, none, and what they gate.

use opamp_server::proto::{
    AgentToServer, AvailableComponents, ConnectionSettingsStatus, PackageStatuses, RemoteConfigStatus,
};
use serde_json::json;

use crate::harness::agent::{
    Agent, EFFECTIVE_CONFIG, FULL_STATE, HEALTH, Poller, STATUS, Socket, assert_acknowledged,
};
use crate::harness::server::TestServer;

/// The bits of an agent's mask, by name.
const BITS: [(u64, &str); 16] = [
    (0x1, "ReportsStatus"),
    (0x2, "AcceptsRemoteConfig"),
    (0x4, "ReportsEffectiveConfig"),
    (0x8, "AcceptsPackages"),
    (0x10, "ReportsPackageStatuses"),
    (0x20, "ReportsOwnTraces"),
    (0x40, "ReportsOwnMetrics"),
    (0x80, "ReportsOwnLogs"),
    (0x100, "AcceptsOpAMPConnectionSettings"),
    (0x200, "AcceptsOtherConnectionSettings"),
    (0x400, "AcceptsRestartCommand"),
    (0x800, "ReportsHealth"),
    (0x1000, "ReportsRemoteConfig"),
    (0x2000, "ReportsHeartbeat"),
    (0x4000, "ReportsAvailableComponents"),
    (0x8000, "ReportsConnectionSettingsStatus"),
];

/// A report with every part a mask can promise.
fn promised(agent: &mut Agent) -> AgentToServer {
    AgentToServer {
        remote_config_status: Some(RemoteConfigStatus::default()),
        package_statuses: Some(PackageStatuses::default()),
        available_components: Some(AvailableComponents { hash: vec![1], ..Default::default() }),
        connection_settings_status: Some(ConnectionSettingsStatus::default()),
        ..agent.full()
    }
}

/// S-041: each capability, alone or with all others, is known by its name and nothing depends on it.
#[tokio::test]
async fn s_041_each_capability_is_known_by_its_name() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    for (bit, name) in BITS {
        let mut agent = Agent::with(bit);
        assert_acknowledged(&poller.exchange(&promised(&mut agent)).await, agent.uid);
        assert_eq!(server.agent(agent.uid).await.unwrap()["capabilities"], json!([name]), "{bit:#x}");
    }
    let mut agent = Agent::with(0xffff);
    assert_acknowledged(&poller.exchange(&promised(&mut agent)).await, agent.uid);
    assert_eq!(server.agent(agent.uid).await.unwrap()["capabilities"], json!(BITS.map(|(_, name)| name)));
}

/// S-142: unknown bits, alone and all at once, are no error and no capability.
#[tokio::test]
async fn s_142_unknown_bits_of_a_mask_are_no_error_and_no_capability() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    for bit in 16..64 {
        let mut agent = Agent::with(1 << bit);
        assert_acknowledged(&poller.exchange(&agent.full()).await, agent.uid);
        assert_eq!(server.agent(agent.uid).await.unwrap()["capabilities"], json!([]), "bit {bit}");
    }
    let mut agent = Agent::with(u64::MAX);
    assert_acknowledged(&poller.exchange(&promised(&mut agent)).await, agent.uid);
    let names = server.agent(agent.uid).await.unwrap()["capabilities"].clone();
    assert_eq!(names.as_array().unwrap().len(), 16);
}

/// S-142: unknown flags of a report are no error and ask for nothing.
#[tokio::test]
async fn s_142_unknown_flags_of_a_report_ask_for_nothing() {
    let server = TestServer::fresh().await;
    let mut poller = Poller::connect(&server).await;
    let mut agent = Agent::new();
    for bit in 1..64 {
        let report = AgentToServer { flags: 1 << bit, ..agent.full() };
        assert_acknowledged(&poller.exchange(&report).await, agent.uid);
    }
}

/// S-038: whatever a mask allows, an agent is sent nothing that this server does not offer yet.
#[tokio::test]
async fn s_038_nothing_gated_is_sent_for_any_mask() {
    let server = TestServer::fresh().await;
    for mask in BITS.map(|(bit, _)| STATUS | bit).into_iter().chain([0, 0xffff, u64::MAX]) {
        let mut agent = Agent::with(mask);
        let (mut socket, offer) = Socket::greet(&server, &promised(&mut agent)).await;
        assert_acknowledged(&offer, agent.uid);
        assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
        agent.number += 1;
        let offer = socket.exchange(&agent.report()).await;
        let without_flags = opamp_server::proto::ServerToAgent { flags: 0, ..offer.clone() };
        assert_eq!(offer.flags, FULL_STATE, "{mask:#x}");
        assert_acknowledged(&without_flags, agent.uid);
    }
}

/// R-004, S-055: each part a mask promises is asked for where the first report lacks it, and only then.
#[tokio::test]
async fn r_004_each_promised_part_is_asked_for_where_it_is_missing() {
    type Forget = fn(&mut AgentToServer);
    let parts: [(u64, Forget); 6] = [
        (0x4, |report| report.effective_config = None),
        (0x10, |report| report.package_statuses = None),
        (0x800, |report| report.health = None),
        (0x1000, |report| report.remote_config_status = None),
        (0x4000, |report| report.available_components = None),
        (0x8000, |report| report.connection_settings_status = None),
    ];
    let server = TestServer::fresh().await;
    for (bit, forget) in parts {
        let mut agent = Agent::with(STATUS | bit);
        let mut first = promised(&mut agent);
        assert_acknowledged(&Poller::once(&server, &first).await, agent.uid);
        let mut agent = Agent::with(STATUS | bit);
        first = promised(&mut agent);
        forget(&mut first);
        assert_eq!(Poller::once(&server, &first).await.flags, FULL_STATE, "{bit:#x} is promised");
        let mut agent = Agent::with(0xffff & !bit);
        first = promised(&mut agent);
        forget(&mut first);
        let offer = Poller::once(&server, &first).await;
        assert_eq!(offer.flags, 0, "without {bit:#x} nobody waits for it");
    }
}

/// S-072: an agent that does not promise its effective config is never asked for it.
#[tokio::test]
async fn s_072_an_effective_config_nobody_promised_is_not_expected() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::with(STATUS | HEALTH);
    let (mut socket, offer) = Socket::greet(&server, &agent.full()).await;
    assert_acknowledged(&offer, agent.uid);
    for _ in 0..3 {
        assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    }
    assert_eq!(server.agent(agent.uid).await.unwrap()["effective_config"], json!(null));
}

/// S-035, AMB-02, AMB-09: the mask is in the first offer of every connection; an error has none, the next offer has.
#[tokio::test]
async fn s_035_the_mask_is_in_the_first_offer_of_every_connection() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    for _ in 0..3 {
        let mut socket = Socket::connect(&server).await;
        let nameless = AgentToServer { instance_uid: vec![1], ..AgentToServer::default() };
        assert_eq!(socket.exchange(&nameless).await.capabilities, 0, "an error travels alone");
        assert_eq!(socket.exchange(&agent.full()).await.capabilities, 0x15);
        socket.exchange(&agent.farewell()).await;
        let mut poller = Poller::connect(&server).await;
        assert_eq!(poller.exchange(&nameless).await.capabilities, 0);
        assert_eq!(poller.exchange(&agent.full()).await.capabilities, 0x15);
        poller.exchange(&agent.farewell()).await;
    }
}

/// S-040: the mask states what is served: status, effective config and package statuses are taken and shown.
#[tokio::test]
async fn s_040_what_the_mask_states_is_served() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::with(STATUS | EFFECTIVE_CONFIG | 0x10);
    let offer = Poller::once(&server, &promised(&mut agent)).await;
    assert_eq!(offer.capabilities, 0x1 | 0x4 | 0x10);
    let known = server.agent(agent.uid).await.unwrap();
    for part in ["description", "effective_config", "package_statuses"] {
        assert!(!known[part].is_null(), "{part}: {known}");
    }
}

/// S-039, S-143: the mask of the present connection counts, from the very report it comes in, on either transport.
#[tokio::test]
async fn s_143_the_mask_of_the_present_connection_counts() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    let names = async |agent: &Agent| server.agent(agent.uid).await.unwrap()["capabilities"].clone();
    for (mask, expected) in [
        (STATUS | HEALTH, json!(["ReportsStatus", "ReportsHealth"])),
        (STATUS, json!(["ReportsStatus"])),
        (STATUS | EFFECTIVE_CONFIG, json!(["ReportsStatus", "ReportsEffectiveConfig"])),
    ] {
        agent.capabilities = mask;
        let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
        assert_eq!(names(&agent).await, expected);
        socket.exchange(&agent.farewell()).await;
        agent.capabilities = 0;
        let mut poller = Poller::connect(&server).await;
        poller.exchange(&agent.report()).await;
        assert_eq!(names(&agent).await, expected, "R-002: 0 states nothing");
        agent.capabilities = 0x2000;
        poller.exchange(&agent.report()).await;
        assert_eq!(names(&agent).await, json!(["ReportsHeartbeat"]));
        poller.exchange(&agent.farewell()).await;
    }
}

/// AMB-01, S-041: an agent that never states a mask is served like one that reports status alone.
#[tokio::test]
async fn amb_01_an_agent_that_never_states_a_mask_is_served() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::with(0);
    let (mut socket, offer) = Socket::greet(&server, &agent.full()).await;
    assert_acknowledged(&offer, agent.uid);
    assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    let known = server.agent(agent.uid).await.unwrap();
    assert_eq!((&known["status"], &known["capabilities"]), (&json!("online"), &json!([])));
}

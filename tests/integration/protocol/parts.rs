//! Each part of the status: present, absent, empty, with every enum value, and how it is shown.

use std::collections::BTreeMap;

use opamp_server::proto::any_value::Value as Kind;
use opamp_server::proto::{
    AgentConfigFile, AgentConfigMap, AgentDescription, AgentToServer, AnyValue, ArrayValue,
    AvailableComponents, ComponentDetails, ComponentHealth, ConnectionSettingsStatus, CustomCapabilities,
    EffectiveConfig, KeyValue, KeyValueList, PackageDownloadDetails, PackageStatus, PackageStatuses,
    RemoteConfigStatus,
};
use serde_json::{Value, json};

use crate::harness::agent::{
    Agent, FULL_STATE, HEALTH, Poller, STATUS, Socket, assert_acknowledged, description, effective_config,
    pair,
};
use crate::harness::server::TestServer;

/// A poller that reports, and looks at what became of it.
struct Reporter {
    server: TestServer,
    agent: Agent,
    poller: Poller,
}

#[expect(clippy::unwrap_used, reason = "an agent nobody knows fails the test")]
impl Reporter {
    async fn new() -> Self {
        let server = TestServer::fresh().await;
        let (mut agent, mut poller) = (Agent::new(), Poller::connect(&server).await);
        assert_acknowledged(&poller.exchange(&agent.full()).await, agent.uid);
        Self { server, agent, poller }
    }

    /// Reports what `fill` adds to a heartbeat; answers everything known afterwards.
    async fn report(&mut self, fill: impl FnOnce(&mut AgentToServer)) -> Value {
        let mut report = self.agent.report();
        fill(&mut report);
        assert_acknowledged(&self.poller.exchange(&report).await, self.agent.uid);
        self.server.agent(self.agent.uid).await.unwrap()
    }
}

fn value(kind: Kind) -> AnyValue {
    AnyValue { value: Some(kind) }
}

fn attribute(key: &str, value: impl Into<Option<AnyValue>>) -> KeyValue {
    KeyValue { key: key.to_owned(), value: value.into() }
}

fn health(last_error: &str, parts: &[(&str, ComponentHealth)]) -> ComponentHealth {
    ComponentHealth {
        healthy: last_error.is_empty(),
        last_error: last_error.to_owned(),
        component_health_map: parts.iter().map(|(name, part)| ((*name).to_owned(), part.clone())).collect(),
        ..ComponentHealth::default()
    }
}

/// S-042: a part that was never reported is unknown, not empty.
#[tokio::test]
async fn s_042_a_part_that_never_came_is_unknown() {
    let mut reporter = Reporter::new().await;
    let known = reporter.report(|_| {}).await;
    for part in [
        "health",
        "healthy",
        "effective_config",
        "remote_config_status",
        "sync_revision",
        "package_statuses",
        "custom_capabilities",
        "components_hash",
        "available_components",
        "connection_settings_status",
    ] {
        assert!(known[part].is_null(), "{part}: {known}");
    }
}

/// S-043: a part that comes empty replaces the full one by an empty one; every other part stays as it was.
#[tokio::test]
async fn s_043_each_part_that_comes_empty_leaves_an_empty_one_and_the_others_alone() {
    type Fill = fn(&mut AgentToServer);
    let empties: [(&str, Fill, Value); 6] = [
        (
            "description",
            |report| report.agent_description = Some(AgentDescription::default()),
            json!({ "identifying_attributes": {}, "non_identifying_attributes": {} }),
        ),
        (
            "health",
            |report| report.health = Some(ComponentHealth::default()),
            json!({ "healthy": false, "status": "", "last_error": "", "start_time": null,
                    "status_time": null, "attributes": {}, "component_health_map": {} }),
        ),
        ("effective_config", |report| report.effective_config = Some(EffectiveConfig::default()), json!({})),
        (
            "package_statuses",
            |report| report.package_statuses = Some(PackageStatuses::default()),
            json!({ "packages": {}, "server_provided_all_packages_hash": "", "error_message": "" }),
        ),
        (
            "custom_capabilities",
            |report| report.custom_capabilities = Some(CustomCapabilities::default()),
            json!([]),
        ),
        (
            "connection_settings_status",
            |report| report.connection_settings_status = Some(ConnectionSettingsStatus::default()),
            json!({ "last_connection_settings_hash": "", "status": "UNSET", "error_message": "" }),
        ),
    ];
    for (part, fill, empty) in empties {
        let mut reporter = Reporter::new().await;
        let before = reporter
            .report(|report| {
                report.health = Some(health("down", &[("pipeline", health("", &[]))]));
                report.effective_config = Some(effective_config("receivers: {}"));
                let packages = [("core".to_owned(), PackageStatus::default())].into();
                report.package_statuses = Some(PackageStatuses { packages, ..PackageStatuses::default() });
                let capabilities = vec!["com.example.x".to_owned()];
                report.custom_capabilities = Some(CustomCapabilities { capabilities });
                report.connection_settings_status =
                    Some(ConnectionSettingsStatus { status: 1, ..ConnectionSettingsStatus::default() });
            })
            .await;
        assert_ne!(before[part], empty, "{part}");
        let after = reporter.report(fill).await;
        assert_eq!(after[part], empty, "{part}");
        for other in ["description", "health", "effective_config", "package_statuses", "custom_capabilities"]
        {
            assert!(other == part || after[other] == before[other], "{part} touched {other}: {after}");
        }
    }
}

/// S-042: a health tree is kept as it came, with its times, words and attributes, at every level.
#[tokio::test]
async fn s_042_a_health_tree_is_shown_as_it_came() {
    let mut reporter = Reporter::new().await;
    let known = reporter
        .report(|report| {
            let mut receiver = health("port taken", &[]);
            receiver.status = "StatusRecoverableError".to_owned();
            receiver.status_time_unix_nano = 1_700_000_000_123_456_789;
            receiver.attributes = vec![pair("component.kind", "receiver")];
            let mut root = health("", &[("pipeline:logs", health("", &[("receiver:otlp", receiver)]))]);
            root.start_time_unix_nano = 1_700_000_000_000_000_000;
            report.health = Some(root);
        })
        .await;
    let root = &known["health"];
    assert_eq!((&known["healthy"], &root["healthy"]), (&json!(true), &json!(true)));
    assert!(root["start_time"].as_str().unwrap().starts_with("2023-11-14T22:13:20"), "{root}");
    assert!(root["status_time"].is_null(), "0 means that it is not known: {root}");
    let receiver = &root["component_health_map"]["pipeline:logs"]["component_health_map"]["receiver:otlp"];
    assert_eq!(receiver["healthy"], false);
    assert_eq!(receiver["last_error"], "port taken");
    assert_eq!(receiver["status"], "StatusRecoverableError");
    assert!(receiver["status_time"].as_str().unwrap().starts_with("2023-11-14T22:13:20.123"), "{receiver}");
    assert_eq!(receiver["attributes"], json!({ "component.kind": "receiver" }));
}

/// S-042: times of any size are shown, to the last nanosecond that a report can hold.
#[tokio::test]
async fn s_042_times_of_any_size_are_shown() {
    let mut reporter = Reporter::new().await;
    for (nanoseconds, shown) in [
        (1, "1970-01-01T00:00:00"),
        (i64::MAX as u64, "2262-04-11T23:47:16"),
        (i64::MAX as u64 + 1, "2262-04-11T23:47:16"),
        (u64::MAX, "2554-07-21T23:34:33"),
    ] {
        let known = reporter
            .report(|report| {
                let tree = ComponentHealth { start_time_unix_nano: nanoseconds, ..health("", &[]) };
                report.health = Some(tree);
            })
            .await;
        let time = known["health"]["start_time"].as_str().unwrap();
        assert!(time.starts_with(shown) && time.ends_with('Z'), "{nanoseconds}: {time}");
    }
}

/// S-043: a component that is missing from a new health tree is gone from the stored one.
#[tokio::test]
async fn s_043_a_component_missing_from_a_new_health_tree_is_gone() {
    let mut reporter = Reporter::new().await;
    let tree = |names: &[&str]| {
        let parts: Vec<_> = names.iter().map(|name| (*name, health("", &[]))).collect();
        Some(health("", &parts))
    };
    reporter.report(|report| report.health = tree(&["a", "b"])).await;
    let known = reporter.report(|report| report.health = tree(&["b", "c"])).await;
    let map = known["health"]["component_health_map"].as_object().unwrap();
    assert_eq!(map.keys().collect::<Vec<_>>(), ["b", "c"]);
}

/// Times of observation are no news, at any depth; a start time is.
#[tokio::test]
async fn s_042_a_start_time_is_news_and_an_observation_time_is_not() {
    let mut reporter = Reporter::new().await;
    let tree = |started: u64, seen: u64| {
        let part =
            ComponentHealth { start_time_unix_nano: started, status_time_unix_nano: seen, ..health("", &[]) };
        Some(ComponentHealth {
            status_time_unix_nano: seen,
            ..health("", &[("deep", health("", &[("deeper", part)]))])
        })
    };
    let first = reporter.report(|report| report.health = tree(1_000_000, 1_000_000)).await;
    for seen in 2..5 {
        let next = reporter.report(|report| report.health = tree(1_000_000, seen * 1_000_000)).await;
        assert_eq!((&next["updated_at"], &next["health"]), (&first["updated_at"], &first["health"]));
    }
    let last = reporter.report(|report| report.health = tree(9_000_000, 9_000_000)).await;
    assert_ne!(last["updated_at"], first["updated_at"]);
    assert_ne!(last["health"], first["health"]);
}

/// S-073, S-075: an effective config is shown as it came: every file and its content type, whatever was offered.
#[tokio::test]
async fn s_073_an_effective_config_is_shown_as_it_came() {
    let mut reporter = Reporter::new().await;
    let files: [(&str, &[u8], &str); 4] = [
        ("", b"receivers: {}", "text/yaml"),
        ("extra.json", b"{\"a\": 1}", "application/json"),
        ("binary", &[0xff, 0x00, 0xfe], "application/octet-stream"),
        ("empty", b"", ""),
    ];
    let config_map = files
        .iter()
        .map(|(name, body, kind)| {
            let file = AgentConfigFile { body: body.to_vec(), content_type: (*kind).to_owned() };
            ((*name).to_owned(), file)
        })
        .collect();
    let known = reporter
        .report(|report| {
            report.effective_config =
                Some(EffectiveConfig { config_map: Some(AgentConfigMap { config_map }) });
        })
        .await;
    assert_eq!(
        known["effective_config"],
        json!({
            "": { "body": "receivers: {}", "content_type": "text/yaml" },
            "extra.json": { "body": "{\"a\": 1}", "content_type": "application/json" },
            // What is no text cannot be searched for secrets: it is masked as a whole.
            "binary": { "body_base64": "***", "content_type": "application/octet-stream" },
            "empty": { "body": "", "content_type": "" },
        })
    );
}

/// S-042, S-141: a remote config's outcome is shown for every status, known or not yet invented.
#[tokio::test]
async fn s_042_every_outcome_of_a_remote_config_is_shown() {
    let mut reporter = Reporter::new().await;
    for (status, word) in [
        (0, "UNSET"),
        (2, "APPLYING"),
        (1, "APPLIED"),
        (3, "FAILED"),
        (4, "4"),
        (-1, "-1"),
        (i32::MAX, "2147483647"),
    ] {
        let known = reporter
            .report(|report| {
                report.remote_config_status = Some(RemoteConfigStatus {
                    last_remote_config_hash: vec![0xc0, 0xfe],
                    status,
                    error_message: format!("said {word}"),
                });
            })
            .await;
        let shown = &known["remote_config_status"];
        assert_eq!(shown["status"], word);
        assert_eq!(shown["error_message"], format!("said {word}"));
        assert_eq!(shown["last_remote_config_hash"], "c0fe", "S-076: the hash is the last received: {shown}");
    }
}

/// S-076: a hash is what was received last, whatever became of it; in sync is an agent only with one it applied.
#[tokio::test]
async fn s_076_a_received_hash_is_an_applied_one_only_where_the_status_says_so() {
    let mut reporter = Reporter::new().await;
    for (hash, status, in_sync) in
        [(1, 2, None), (1, 1, Some("01")), (2, 2, Some("01")), (2, 3, Some("01")), (3, 1, Some("03"))]
    {
        let known = reporter
            .report(|report| {
                let last_remote_config_hash = vec![hash];
                report.remote_config_status =
                    Some(RemoteConfigStatus { last_remote_config_hash, status, ..Default::default() });
            })
            .await;
        assert_eq!(known["remote_config_status"]["last_remote_config_hash"], format!("{hash:02x}"));
        assert_eq!(known["sync_revision"], json!(in_sync), "hash {hash}, status {status}");
    }
}

/// S-042, S-141: connection settings' outcomes are shown likewise.
#[tokio::test]
async fn s_042_every_outcome_of_connection_settings_is_shown() {
    let mut reporter = Reporter::new().await;
    for (status, word) in [(0, "UNSET"), (1, "APPLIED"), (2, "APPLYING"), (3, "FAILED"), (77, "77")] {
        let known = reporter
            .report(|report| {
                report.connection_settings_status = Some(ConnectionSettingsStatus {
                    last_connection_settings_hash: vec![0xab],
                    status,
                    error_message: word.to_lowercase(),
                });
            })
            .await;
        assert_eq!(
            known["connection_settings_status"],
            json!({ "last_connection_settings_hash": "ab", "status": word, "error_message": word.to_lowercase() })
        );
    }
}

/// S-042, S-141, AMB-20: every state of a package is shown, known or not yet invented, with its progress.
#[tokio::test]
async fn s_042_every_state_of_a_package_is_shown() {
    let mut reporter = Reporter::new().await;
    let words = ["INSTALLED", "INSTALLPENDING", "INSTALLING", "INSTALLFAILED", "DOWNLOADING", "5", "99"];
    let packages: BTreeMap<String, PackageStatus> = [0, 1, 2, 3, 4, 5, 99]
        .into_iter()
        .map(|status| {
            let details =
                PackageDownloadDetails { download_percent: 12.5, download_bytes_per_second: f64::INFINITY };
            let package = PackageStatus {
                name: format!("p{status}"),
                server_offered_version: "2".to_owned(),
                server_offered_hash: vec![2],
                status,
                download_details: (status == 4).then_some(details),
                ..PackageStatus::default()
            };
            (package.name.clone(), package)
        })
        .collect();
    let known = reporter
        .report(|report| {
            report.package_statuses = Some(PackageStatuses {
                packages: packages.clone().into_iter().collect(),
                server_provided_all_packages_hash: vec![0xaa],
                error_message: "no room".to_owned(),
            });
        })
        .await;
    let shown = &known["package_statuses"];
    assert_eq!(shown["server_provided_all_packages_hash"], "aa");
    assert_eq!(shown["error_message"], "no room");
    for (name, word) in ["p0", "p1", "p2", "p3", "p4", "p5", "p99"].into_iter().zip(words) {
        assert_eq!(shown["packages"][name]["status"], word, "{name}");
    }
    let details = &shown["packages"]["p4"]["download_details"];
    assert_eq!(details, &json!({ "download_percent": 12.5, "download_bytes_per_second": "inf" }));
    assert!(shown["packages"]["p2"]["download_details"].is_null());
}

/// S-090: a package nobody offered is shown like any other, and one that is gone from the list is gone.
#[tokio::test]
async fn s_090_a_local_package_is_shown_and_s_043_a_removed_one_is_gone() {
    let mut reporter = Reporter::new().await;
    let local = PackageStatus {
        name: "local".to_owned(),
        agent_has_version: "1.0".to_owned(),
        agent_has_hash: vec![1],
        ..PackageStatus::default()
    };
    let list = |packages: &[(&str, &PackageStatus)]| {
        let packages =
            packages.iter().map(|(name, package)| ((*name).to_owned(), (*package).clone())).collect();
        Some(PackageStatuses { packages, ..PackageStatuses::default() })
    };
    let known =
        reporter.report(|report| report.package_statuses = list(&[("", &local), ("local", &local)])).await;
    let shown = &known["package_statuses"]["packages"];
    assert_eq!(shown["local"]["agent_has_version"], "1.0");
    assert_eq!(
        (&shown["local"]["server_offered_version"], &shown["local"]["server_offered_hash"]),
        (&json!(""), &json!(""))
    );
    assert_eq!(shown[""]["agent_has_hash"], "01", "the sole package may have no name");
    let known = reporter.report(|report| report.package_statuses = list(&[("local", &local)])).await;
    assert_eq!(known["package_statuses"]["packages"].as_object().unwrap().len(), 1);
}

/// S-133, S-134: a hash alone is kept; another hash alone says that the inventory is another, not that there is none.
#[tokio::test]
async fn s_134_an_inventory_belongs_to_its_hash() {
    let mut reporter = Reporter::new().await;
    let inventory = |hash: u8, names: &[&str]| {
        let inner = ComponentDetails {
            metadata: vec![pair("code.namespace", "otlp")],
            ..ComponentDetails::default()
        };
        let details = ComponentDetails {
            sub_component_map: [("inner".to_owned(), inner)].into(),
            ..ComponentDetails::default()
        };
        let components = names.iter().map(|name| ((*name).to_owned(), details.clone())).collect();
        Some(AvailableComponents { components, hash: vec![hash; 2] })
    };
    let known = reporter.report(|report| report.available_components = inventory(1, &[])).await;
    assert_eq!((&known["components_hash"], &known["available_components"]), (&json!("0101"), &Value::Null));
    let known = reporter.report(|report| report.available_components = inventory(1, &["receivers"])).await;
    let shown = known["available_components"].clone();
    assert_eq!(
        shown["receivers"]["sub_component_map"]["inner"]["metadata"],
        json!({ "code.namespace": "otlp" })
    );
    let known = reporter.report(|report| report.available_components = inventory(2, &[])).await;
    assert_eq!((&known["components_hash"], &known["available_components"]), (&json!("0202"), &Value::Null));
    let known = reporter.report(|report| report.available_components = inventory(1, &[])).await;
    assert_eq!(known["available_components"], shown, "S-133: it is known by its hash");
}

/// S-128: until a list of custom capabilities comes there is none; each one replaces the last, in its order.
#[tokio::test]
async fn s_128_the_last_list_of_custom_capabilities_counts() {
    let mut reporter = Reporter::new().await;
    for list in [&["org.b/v2", "org.a", "org.b/v2"][..], &["org.a"], &[""], &[]] {
        let known = reporter
            .report(|report| {
                let capabilities = list.iter().map(|name| (*name).to_owned()).collect();
                report.custom_capabilities = Some(CustomCapabilities { capabilities });
            })
            .await;
        assert_eq!(known["custom_capabilities"], json!(list));
        assert_eq!(
            reporter.report(|_| {}).await["custom_capabilities"],
            json!(list),
            "left out is unchanged"
        );
    }
}

/// S-042: an attribute may have a value of every kind, none included, and is shown as what it is.
#[tokio::test]
async fn s_042_attributes_of_every_kind_are_shown() {
    let mut reporter = Reporter::new().await;
    let list = |values: Vec<AnyValue>| ArrayValue { values };
    let known = reporter
        .report(|report| {
            let nested = KeyValueList { values: vec![pair("inner", "text"), attribute("null", None)] };
            report.agent_description = Some(AgentDescription {
                identifying_attributes: vec![pair("service.name", "collector")],
                non_identifying_attributes: vec![
                    attribute("true", value(Kind::BoolValue(true))),
                    attribute("least", value(Kind::IntValue(i64::MIN))),
                    attribute("most", value(Kind::IntValue(i64::MAX))),
                    attribute("half", value(Kind::DoubleValue(0.5))),
                    attribute("nan", value(Kind::DoubleValue(f64::NAN))),
                    attribute("huge", value(Kind::DoubleValue(f64::NEG_INFINITY))),
                    attribute("bytes", value(Kind::BytesValue(vec![0, 0xff]))),
                    attribute("none", value(Kind::ArrayValue(ArrayValue::default()))),
                    attribute(
                        "list",
                        value(Kind::ArrayValue(list(vec![
                            value(Kind::IntValue(1)),
                            value(Kind::BoolValue(false)),
                        ]))),
                    ),
                    attribute("object", value(Kind::KvlistValue(nested))),
                    attribute("unset", Some(AnyValue { value: None })),
                    attribute("absent", None),
                    pair("", "no key"),
                    pair("twice", "first"),
                    pair("twice", "last"),
                ],
            });
        })
        .await;
    assert_eq!(
        known["description"]["non_identifying_attributes"],
        json!({
            "true": true, "least": i64::MIN, "most": i64::MAX, "half": 0.5, "nan": "NaN", "huge": "-inf",
            "bytes": "AP8=", "none": [], "list": [1, false], "object": { "inner": "text", "null": null },
            "unset": null, "absent": null, "": "no key", "twice": "last",
        })
    );
}

/// S-031: a report with several parts and events is processed as a whole: the parts are kept and the farewell counts.
#[tokio::test]
async fn s_031_parts_that_come_with_a_farewell_are_kept() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::with(STATUS | HEALTH);
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    let last = AgentToServer {
        health: Some(health("stopped by hand", &[])),
        agent_description: Some(description(&[("service.name", "last words")])),
        ..agent.farewell()
    };
    assert_acknowledged(&socket.exchange(&last).await, agent.uid);
    let known = server.agent(agent.uid).await.unwrap();
    assert_eq!((&known["status"], &known["name"]), (&json!("offline"), &json!("last words")));
    assert_eq!(known["health"]["last_error"], "stopped by hand");
    let (_socket, offer) = Socket::greet(&server, &agent.report()).await;
    assert_acknowledged(&offer, agent.uid);
}

/// S-042: parts reported before a gap stay while full state is missing, and are replaced when it comes.
#[tokio::test]
async fn s_042_parts_stay_until_full_state_replaces_them() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::with(STATUS | HEALTH);
    let (mut socket, _) = Socket::greet(&server, &agent.full()).await;
    agent.number += 5;
    assert_eq!(socket.exchange(&agent.report()).await.flags, FULL_STATE);
    assert_eq!(server.agent(agent.uid).await.unwrap()["healthy"], true);
    let full = AgentToServer { health: Some(health("worse", &[])), ..agent.full() };
    assert_acknowledged(&socket.exchange(&full).await, agent.uid);
    assert_eq!(server.agent(agent.uid).await.unwrap()["health"]["last_error"], "worse");
}

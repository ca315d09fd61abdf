//! `/openapi.json` is what the server does, and `/docs` shows it.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{assert_problem, fields, set};
use crate::harness::Database;
use crate::harness::agent::{Agent, Poller, Socket};
use crate::harness::server::{Ports, TestServer};

/// One operation of the description: method, path, and what is said of it.
fn operations(description: &Value) -> Vec<(String, String, Value)> {
    let mut found = Vec::new();
    for (path, item) in description["paths"].as_object().expect("paths") {
        for method in ["get", "post", "put", "patch", "delete"] {
            if let Some(operation) = item.get(method) {
                found.push((method.to_uppercase(), path.clone(), operation.clone()));
            }
        }
    }
    found
}

/// The values a parameter must not have, by its schema.
fn bad_values(parameter: &Value) -> Vec<String> {
    let schema = &parameter["schema"];
    let kinds = schema["type"].to_string();
    let mut values = vec!["%00".to_owned()];
    if kinds.contains("integer") {
        values.push("ten".to_owned());
        values.extend(schema["minimum"].as_i64().map(|least| (least - 1).to_string()));
        values.extend(schema["maximum"].as_i64().map(|most| (most + 1).to_string()));
        assert_eq!(values.len(), 4, "a number has a range: {parameter}");
    }
    if parameter["name"] == "cursor" {
        values.push("-3".to_owned());
    }
    let free = ["q", "attr.<key>"].contains(&parameter["name"].as_str().expect("a name"));
    if !free {
        values.push("nonsense".to_owned());
    }
    values
}

async fn assert_named(server: &Ports, method: &str, target: &str, name: &str) {
    let answer = server.ask(method, target, &[]).await;
    let problem = assert_problem(&answer, 400, "bad-parameter");
    assert_eq!(problem["parameter"], name, "{method} {target}");
    assert!(problem["detail"].as_str().expect("a text").contains(name), "{problem}");
}

/// Every parameter of every route, given a value it must not have, is a problem that names it.
pub(super) async fn every_wrong_parameter_is_named(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    let mut agent = Agent::new();
    let (socket, _) = Socket::greet(&server, &agent.full()).await;
    let mut checked = 0;
    for (method, path, operation) in operations(&server.read("/openapi.json").await) {
        let target = path.replace("{id}", &agent.uid.to_string());
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let name = parameter["name"].as_str().expect("a name");
            for value in bad_values(parameter) {
                let target = match parameter["in"].as_str() {
                    Some("path") => path.replace(&format!("{{{name}}}"), &value),
                    _ => format!("{target}?{}={value}", name.replace('<', "%3C").replace('>', "%3E")),
                };
                assert_named(&server, &method, &target, name).await;
                checked += 1;
            }
        }
        if !["/healthz", "/readyz", "/metrics"].contains(&path.as_str()) {
            assert_named(&server, &method, &format!("{target}?unheard-of=1"), "unheard-of").await;
        }
    }
    assert!(checked > 100, "{checked}");
    assert_eq!(server.status(agent.uid).await["connected"], true, "nothing was done");
    drop(socket);
    server.stop().await.expect("it stops");
}

/// Everything that can be called is described, with examples, ranges and every problem it can answer.
#[tokio::test]
async fn every_route_is_described() {
    let server = TestServer::fresh().await;
    let description = server.read("/openapi.json").await;
    let operations = operations(&description);
    let described: BTreeSet<String> =
        operations.iter().map(|(method, path, _)| format!("{method} {path}")).collect();
    let expected = [
        "GET /api/v1/agents",
        "DELETE /api/v1/agents",
        "GET /api/v1/agents/online",
        "GET /api/v1/agents/offline",
        "GET /api/v1/agents/error",
        "GET /api/v1/agents/stale",
        "GET /api/v1/agents/summary",
        "GET /api/v1/agents/{id}",
        "DELETE /api/v1/agents/{id}",
        "POST /api/v1/agents/{id}/reconnect",
        "GET /api/v1/agents/{id}/status",
        "GET /api/v1/agents/{id}/connection-history",
        "GET /api/v1/agents/{id}/status-history",
        "GET /api/v1/agents/{id}/timeline",
        "GET /api/v1/connection-history",
        "GET /api/v1/fleet/timeline",
        "GET /api/v1/fleet/incidents",
        "GET /api/agent/nodes",
        "GET /metrics",
        "GET /healthz",
        "GET /readyz",
    ];
    assert_eq!(described, expected.map(ToOwned::to_owned).into());
    for (method, path, operation) in &operations {
        let place = format!("{method} {path}");
        for text in ["summary", "description"] {
            assert!(operation[text].as_str().is_some_and(|text| text.len() > 10), "{place} has no {text}");
        }
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            assert!(
                parameter["description"].as_str().is_some_and(|text| !text.is_empty()),
                "{place}: {parameter}"
            );
            let example = !parameter["example"].is_null() || parameter["name"] == "cursor";
            assert!(example, "{place}: no example of {parameter}");
        }
        let probe = ["/healthz", "/readyz"].contains(&path.as_str());
        let store = !probe && path != "/metrics";
        let codes = fields(&operation["responses"]);
        let wanted = [
            ("403", true),
            ("401", !probe),
            ("400", store),
            ("500", store),
            ("503", store || path == "/readyz"),
            ("404", path.contains("{id}")),
            ("409", path.ends_with("/reconnect") || (method == "DELETE" && path.contains("{id}"))),
            ("415", method != "GET"),
            ("406", path.ends_with("/connection-history") || path.ends_with("{id}/timeline")),
        ];
        for (code, expected) in wanted {
            assert_eq!(codes.contains(code), expected, "{place}: {code} of {codes:?}");
        }
        for (code, response) in operation["responses"].as_object().expect("responses") {
            if code.starts_with('2') || (path == "/readyz" && code == "503") {
                continue;
            }
            let problem = &response["content"]["application/problem+json"];
            assert_eq!(problem["schema"]["$ref"], "#/components/schemas/Problem", "{place}: {code}");
            for (kind, example) in problem["examples"].as_object().expect("examples") {
                assert_eq!(example["value"]["type"], kind.as_str());
                assert_eq!(example["value"]["status"].to_string(), *code);
            }
        }
    }
    assert_eq!(description["info"]["title"], "opamp-server");
    assert_eq!(description["info"]["version"], env!("CARGO_PKG_VERSION"));
    let problem = &description["components"]["schemas"]["Problem"]["properties"];
    assert!(
        fields(problem).is_superset(&set(["type", "title", "status", "detail", "parameter"])),
        "{problem}"
    );
}

/// What is described is served.
#[tokio::test]
async fn every_described_route_answers() {
    let server = TestServer::fresh().await;
    let mut agent = Agent::new();
    Poller::once(&server, &agent.full()).await;
    for (method, path, _) in operations(&server.read("/openapi.json").await) {
        let answer = server.ask(&method, &path.replace("{id}", &agent.uid.to_string()), &[]).await;
        let expected = match (method.as_str(), path.as_str()) {
            ("GET", _) => 200,
            ("DELETE", "/api/v1/agents") => 400,
            _ => 409,
        };
        assert_eq!(answer.status, expected, "{method} {path}: {}", answer.text());
    }
}

/// The page for people needs no other host, and the token where one is set.
#[tokio::test]
async fn the_page_asks_no_other_host() {
    let server = TestServer::fresh().await;
    let answer = server.ask("GET", "/docs", &[]).await;
    assert_eq!((answer.status, answer.header("location")), (303, Some("/docs/")));
    let page = server.ask("GET", "/docs/", &[]).await;
    assert_eq!(page.status, 200);
    let page = page.text();
    let mut loaded = 0;
    let files = page.split(['"', '\'']).filter(|part| {
        let extension = part.rsplit_once('.').map_or("", |(_, extension)| extension);
        ["js", "css", "png"].contains(&extension)
    });
    for part in files {
        assert!(part.starts_with("./") || !part.contains('/'), "{part} is elsewhere");
        let answer = server.ask("GET", &format!("/docs/{}", part.trim_start_matches("./")), &[]).await;
        assert_eq!(answer.status, 200, "{part}");
        loaded += 1;
    }
    assert!(loaded >= 4, "{page}");
    assert!(!page.contains("://"), "{page}");
    let script = server.ask("GET", "/docs/swagger-initializer.js", &[]).await.text();
    assert!(script.contains("/openapi.json"), "{script}");
    assert!(script.contains("\"validatorUrl\": \"none\""), "{script}");
    assert!(!script.contains("://"), "{script}");
    let guarded = TestServer::with(|config| config.operators.token = Some("987654".into())).await;
    for target in ["/docs", "/docs/", "/docs/swagger-ui.css", "/openapi.json"] {
        assert_problem(&guarded.ask("GET", target, &[]).await, 401, "token-required");
        let answer = guarded.ask("GET", target, &[("Authorization", "Bearer 987654")]).await;
        assert!([200, 303].contains(&answer.status), "{target}: {}", answer.status);
    }
}

//! Who may call: pages of other sites may not, on neither listener.

use super::assert_problem;
use crate::harness::agent::{Agent, PROTOBUF, Poller, Socket};
use crate::harness::http::Http;
use crate::harness::server::TestServer;

/// The operators' listener answers no page of another site, and without token no other name than this machine's.
#[tokio::test]
async fn operators_are_not_reached_through_a_page_of_another_site() {
    let server = TestServer::fresh().await;
    let own = format!("http://{}", server.operators);
    for target in ["/api/v1/agents", "/healthz", "/metrics", "/openapi.json", "/docs/", "/nowhere"] {
        for (header, value, kind) in [
            ("Origin", "http://evil.example", "foreign-origin"),
            ("Origin", "http://localhost:1", "foreign-origin"),
            ("Origin", "null", "foreign-origin"),
            ("Sec-Fetch-Site", "cross-site", "cross-site"),
            ("Host", "evil.example", "foreign-host"),
            ("Host", "192.0.2.1:4321", "foreign-host"),
        ] {
            let answer = server.ask("GET", target, &[(header, value)]).await;
            assert_problem(&answer, 403, kind);
        }
        for (header, value) in [
            ("Origin", own.as_str()),
            ("Sec-Fetch-Site", "same-origin"),
            ("Host", "localhost"),
            ("Host", "[::1]:4321"),
        ] {
            let answer = server.ask("GET", target, &[(header, value)]).await;
            assert_ne!(answer.status, 403, "{target} {header}: {value}");
        }
    }
    let mut agent = Agent::new();
    let (_socket, _) = Socket::greet(&server, &agent.full()).await;
    let target = format!("/api/v1/agents/{}?force=true", agent.uid);
    let answer = server.ask("DELETE", &target, &[("Origin", "http://evil.example")]).await;
    assert_problem(&answer, 403, "foreign-origin");
    assert_eq!(server.status(agent.uid).await["connected"], true, "nothing was done");
}

/// With a token, or where everybody is let in by name, other hosts are answered; other origins never.
#[tokio::test]
async fn a_guarded_listener_answers_to_every_name() {
    let token = [("Authorization", "Bearer 987654"), ("Host", "fleet.example")];
    let server = TestServer::with(|config| config.operators.token = Some("987654".into())).await;
    assert_eq!(server.ask("GET", "/api/v1/agents", &token).await.status, 200);
    let foreign = [token[0], ("Origin", "https://evil.example")];
    assert_problem(&server.ask("GET", "/api/v1/agents", &foreign).await, 403, "foreign-origin");
    let server = TestServer::with(|config| {
        config.operators.allow_anonymous = true;
        config.agents.allow_anonymous = true;
    })
    .await;
    let own = [("Host", "fleet.example"), ("Origin", "https://fleet.example")];
    assert_eq!(server.ask("GET", "/api/v1/agents", &own).await.status, 200);
    let foreign = [("Host", "fleet.example"), ("Origin", "https://evil.example")];
    assert_problem(&server.ask("GET", "/api/v1/agents", &foreign).await, 403, "foreign-origin");
    let mut agent = Agent::new();
    let body = prost::Message::encode_to_vec(&agent.full());
    let mut http = Http::connect(server.agents).await;
    assert_eq!(
        http.send("POST", "/v1/opamp", &[PROTOBUF, ("Host", "fleet.example")], &body).await.status,
        200
    );
}

/// the agents' listener refuses a browser before the upgrade, and counts it.
#[tokio::test]
async fn agents_are_not_impersonated_by_a_page_of_another_site() {
    let server = TestServer::fresh().await;
    let own = format!("http://{}", server.agents);
    let cases = [
        ("origin", "http://evil.example", "foreign_origin"),
        ("sec-fetch-site", "cross-site", "cross_site"),
        ("host", "evil.example", "foreign_host"),
    ];
    for (header, value, _) in cases {
        let mut agent = Agent::new();
        let body = prost::Message::encode_to_vec(&agent.full());
        let answer = Poller::connect(&server).await.post(&[(header, value)], &body).await;
        assert_eq!((answer.status, answer.header("content-type")), (403, Some("text/plain; charset=utf-8")));
        assert!(!answer.text().is_empty());
        if header != "host" {
            // The client of this handshake sets its host by itself.
            let Err(refused) = Socket::open(&server, "/v1/opamp", &[(header, value)]).await else {
                panic!("it was let in")
            };
            assert_eq!(refused.status, 403);
        }
    }
    let metrics = server.metrics().await;
    for (_, _, cause) in cases {
        let refused = metrics.value(&format!("opamp_refused_total{{cause=\"{cause}\"}}"));
        assert!(refused >= 1.0, "{cause}: {refused}");
    }
    assert_eq!(server.read("/api/v1/agents").await["total"], 0);
    let mut agent = Agent::new();
    assert!(
        Socket::open(&server, "/v1/opamp", &[("origin", &own)]).await.is_ok(),
        "an equal origin is an agent's own"
    );
    let (_socket, _) = Socket::greet(&server, &agent.full()).await;
}

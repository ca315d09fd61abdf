//! A server to test: in this process, or as the real binary that can be killed, seen through its ports.

use std::net::SocketAddr;
use std::ops::Deref;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use opamp_server::agent::InstanceUid;
use opamp_server::clock::Moment;
use opamp_server::config::{Config, Secret};
use opamp_server::server::{Server, ServerError};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::Database;
use super::http::{Http, Response};

/// How long a condition may take that holds at once on an idle machine.
pub(crate) const SOON: Duration = Duration::from_secs(15);

/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Waits until `look` finds what it looks for.
pub(crate) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "in {SOON:?} it did not come to this: {what}");
        tokio::time::sleep(LOOK).await;
    }
}

/// The two ports of a server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ports {
    pub(crate) agents: SocketAddr,
    pub(crate) operators: SocketAddr,
}

impl Ports {
    /// Asks the operators' listener.
    pub(crate) async fn ask(&self, method: &str, target: &str, headers: &[(&str, &str)]) -> Response {
        Http::connect(self.operators).await.send(method, target, headers, &[]).await
    }

    /// Status and body of what the operators' listener answers.
    pub(crate) async fn get(&self, target: &str) -> (u16, Value) {
        let response = self.ask("GET", target, &[]).await;
        (response.status, response.json())
    }

    /// The body of what the operators' listener answers with 200.
    pub(crate) async fn read(&self, target: &str) -> Value {
        let (status, body) = self.get(target).await;
        assert_eq!(status, 200, "{target}: {body}");
        body
    }

    /// Everything known of an agent; none where it is not known.
    pub(crate) async fn agent(&self, agent: InstanceUid) -> Option<Value> {
        match self.get(&format!("/api/v1/agents/{agent}")).await {
            (200, body) => Some(body),
            (404, _) => None,
            (status, body) => panic!("{status}: {body}"),
        }
    }

    /// The status of an agent and what it rests on.
    pub(crate) async fn status(&self, agent: InstanceUid) -> Value {
        self.read(&format!("/api/v1/agents/{agent}/status")).await
    }

    /// The connections of an agent, newest first.
    pub(crate) async fn history(&self, agent: InstanceUid) -> Vec<Value> {
        let page = self.read(&format!("/api/v1/agents/{agent}/connection-history")).await;
        let connections = page["connections"].as_array().expect("a list");
        assert_eq!(page["total"], connections.len(), "{page}");
        check_history(connections);
        connections.clone()
    }

    /// Waits until the agent has this status.
    pub(crate) async fn until_status(&self, agent: InstanceUid, status: &str) -> Value {
        eventually(&format!("{agent} is {status}"), async || {
            Some(self.status(agent).await).filter(|row| row["status"] == status)
        })
        .await
    }

    /// Waits until the newest connection of the agent has ended, and answers its row.
    pub(crate) async fn until_ended(&self, agent: InstanceUid) -> Value {
        eventually(&format!("the connection of {agent} has ended"), async || {
            let newest = self.history(agent).await.into_iter().next()?;
            (!newest["disconnected_at"].is_null()).then_some(newest)
        })
        .await
    }

    /// The text of `/metrics`.
    pub(crate) async fn metrics(&self) -> Metrics {
        let response = self.ask("GET", "/metrics", &[]).await;
        assert_eq!(response.status, 200);
        Metrics(response.text())
    }
}

/// What must hold in every history: rows do not overlap, at most one is open, each tells the bounds of its end.
fn check_history(newest_first: &[Value]) {
    for row in newest_first {
        let closed = !row["disconnected_at"].is_null();
        assert_eq!(closed, !row["disconnect_reason"].is_null(), "{row}");
        assert_eq!(closed, !row["duration_seconds"].is_null(), "{row}");
        assert_eq!(closed, row.get("confirmed_until").is_none(), "{row}");
        assert_eq!(row["transport"] == "http", row["node_id"].is_null(), "{row}");
        if closed {
            assert!(moment(&row["connected_at"]) <= moment(&row["disconnected_at"]), "{row}");
        }
        if !row["disconnected_by"].is_null() {
            assert!(moment(&row["disconnected_at"]) <= moment(&row["disconnected_by"]), "{row}");
        }
    }
    for pair in newest_first.windows(2) {
        let end = moment(&pair[1]["disconnected_at"]);
        assert!(end <= moment(&pair[0]["connected_at"]), "rows overlap: {pair:?}");
    }
}

/// A time as the API writes it.
pub(crate) fn moment(value: &Value) -> Moment {
    let text = value.as_str().unwrap_or_else(|| panic!("no time: {value}"));
    let parsed = Moment::parse(text).unwrap_or_else(|| panic!("no RFC 3339: {text}"));
    assert!(
        text.ends_with('Z') && text.len() == "2026-01-31T03:42:00.000Z".len(),
        "UTC, milliseconds: {text}"
    );
    parsed
}

/// The text of `/metrics`.
#[derive(Debug)]
pub(crate) struct Metrics(pub(crate) String);

impl Metrics {
    /// The value of a series such as `name` or `name{label="word"}`; 0 where it is not there yet.
    pub(crate) fn value(&self, series: &str) -> f64 {
        let line = self.0.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().expect("a metric is a number"))
    }
}

/// What a test may turn: defaults are quick, so that tests need not wait, and never in the way.
pub(crate) fn config(database: &Database) -> Config {
    let mut config = Config::default();
    config.agents.listen = SocketAddr::from(([127, 0, 0, 1], 0));
    config.operators.listen = SocketAddr::from(([127, 0, 0, 1], 0));
    config.store.url = Secret::from(database.url());
    config.store.max_connections = 5;
    config.store.flush_interval = Duration::from_millis(50);
    config.heartbeat.check_interval = Duration::from_millis(100);
    config.node.name = Some("node".to_owned());
    config.shutdown.drain = Duration::from_secs(5);
    config
}

/// A server in this process.
#[derive(Debug)]
pub(crate) struct TestServer {
    ports: Ports,
    stop: oneshot::Sender<()>,
    running: JoinHandle<Result<(), ServerError>>,
    _database: Option<Database>,
}

impl Deref for TestServer {
    type Target = Ports;

    fn deref(&self) -> &Ports {
        &self.ports
    }
}

impl TestServer {
    /// A server with a `SQLite` database of its own.
    pub(crate) async fn fresh() -> Self {
        Self::with(|_| {}).await
    }

    /// A server with a `SQLite` database of its own, its configuration turned by `knobs`.
    pub(crate) async fn with(knobs: impl FnOnce(&mut Config)) -> Self {
        let database = Database::sqlite();
        let server = Self::on(&database, knobs).await;
        Self { _database: Some(database), ..server }
    }

    /// A server on this database, its configuration turned by `knobs`.
    #[expect(clippy::disallowed_methods, reason = "the server under test is stopped by its test")]
    pub(crate) async fn on(database: &Database, knobs: impl FnOnce(&mut Config)) -> Self {
        let mut config = config(database);
        knobs(&mut config);
        let server = Server::start(&config, true).await.expect("the server starts");
        let ports = Ports { agents: server.agents_address(), operators: server.operators_address() };
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(server.run(async {
            if stopped.await.is_err() {
                // Nobody stops this one; it ends with its test.
                std::future::pending::<()>().await;
            }
        }));
        Self { ports, stop, running, _database: None }
    }

    /// Stops it in an orderly way.
    pub(crate) async fn stop(self) -> Result<(), ServerError> {
        self.stop.send(()).expect("it is running");
        self.running.await.expect("it does not panic")
    }
}

/// The real binary as a process of its own.
#[derive(Debug)]
pub(crate) struct Process {
    ports: Ports,
    child: Child,
    logs: Arc<Mutex<Vec<Value>>>,
    reading: JoinHandle<()>,
}

impl Deref for Process {
    type Target = Ports;

    fn deref(&self) -> &Ports {
        &self.ports
    }
}

impl Process {
    /// Starts the binary on this database, with `environment` such as `("OPAMP_HEARTBEAT_TIMEOUT", "1s")`.
    pub(crate) async fn start(database: &Database, environment: &[(&str, &str)]) -> Self {
        let (child, logs, reading) = Self::spawn(database, environment);
        let agents = listener(&logs, "agents connect at ").await;
        let operators = listener(&logs, "operators look at ").await;
        Self { ports: Ports { agents, operators }, child, logs, reading }
    }

    /// Starts the binary where it refuses to run; answers its exit code and everything it logged.
    pub(crate) async fn refused(
        database: &Database,
        environment: &[(&str, &str)],
    ) -> (Option<i32>, Vec<Value>) {
        let (child, logs, reading) = Self::spawn(database, environment);
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        Self { ports: Ports { agents: nowhere, operators: nowhere }, child, logs, reading }.exit().await
    }

    #[expect(clippy::disallowed_methods, reason = "reads the logs until the process ends")]
    fn spawn(
        database: &Database,
        environment: &[(&str, &str)],
    ) -> (Child, Arc<Mutex<Vec<Value>>>, JoinHandle<()>) {
        let mut child = Command::new(env!("CARGO_BIN_EXE_opamp-server"))
            .args(["--agents-listen", "127.0.0.1:0", "--operators-listen", "127.0.0.1:0"])
            .args(["--store-url", database.url()])
            .env_clear()
            .envs([("OPAMP_NODE_NAME", "node"), ("OPAMP_STORE_FLUSH_INTERVAL", "50ms")])
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the binary runs");
        let mut lines = BufReader::new(child.stderr.take().expect("it is piped")).lines();
        let logs: Arc<Mutex<Vec<Value>>> = Arc::default();
        let sink = Arc::clone(&logs);
        let reading = tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                let entry = serde_json::from_str(&line).unwrap_or(Value::String(line));
                sink.lock().expect("no reader panics").push(entry);
            }
        });
        (child, logs, reading)
    }

    /// The log entries with this message so far.
    pub(crate) fn logged(&self, message: &str) -> Vec<Value> {
        let logs = self.logs.lock().expect("no reader panics");
        logs.iter().filter(|entry| entry["message"] == message).cloned().collect()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let id = self.child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?)).expect("it is running");
        kill_process(id, signal).expect("it is ours");
    }

    /// Ends it as a power failure would.
    pub(crate) async fn kill(mut self) {
        self.child.kill().await.expect("it is ours");
    }

    /// Waits for its end; answers its exit code and everything it logged.
    pub(crate) async fn exit(mut self) -> (Option<i32>, Vec<Value>) {
        let status = tokio::time::timeout(SOON, self.child.wait()).await.expect("it ends in time");
        self.reading.await.expect("the logs are read");
        let logs = self.logs.lock().expect("no reader panics").clone();
        (status.expect("it is ours").code(), logs)
    }
}

/// The address behind `words` in the logs.
async fn listener(logs: &Mutex<Vec<Value>>, words: &str) -> SocketAddr {
    eventually(words, async || {
        let logs = logs.lock().expect("no reader panics");
        let message = logs.iter().find_map(|entry| entry["message"].as_str()?.strip_prefix(words))?;
        message.split("://").nth(1)?.split('/').next()?.parse().ok()
    })
    .await
}

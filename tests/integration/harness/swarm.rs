//! A fleet in a process of its own: `opamp-swarm`, told what to do line by line.

use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// How long it may take to do as told.
const PATIENCE: Duration = Duration::from_mins(1);

/// A fleet that obeys until it is told to quit.
pub(crate) struct Swarm {
    child: Child,
    orders: ChildStdin,
    events: Lines<BufReader<ChildStdout>>,
}

impl Swarm {
    /// The agents connect to `url` all at once.
    pub(crate) fn start(url: &str, options: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_opamp-swarm"))
            .args(["--url", url, "--control", "--connect-rate", "0", "--redial-pause", "50ms"])
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the swarm starts");
        let orders = child.stdin.take().expect("stdin is piped");
        let events = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        Self { child, orders, events }
    }

    /// Waits for an event.
    pub(crate) async fn event(&mut self, name: &str) -> Value {
        let waiting = async {
            while let Some(line) = self.events.next_line().await.expect("the swarm writes lines") {
                let event: Value = serde_json::from_str(&line).expect("each line is JSON");
                if event["event"] == name {
                    return event;
                }
            }
            panic!("the swarm ended before it said {name}");
        };
        let said = tokio::time::timeout(PATIENCE, waiting).await;
        said.unwrap_or_else(|_| panic!("no {name} in {PATIENCE:?}"))
    }

    /// Gives an order.
    pub(crate) async fn order(&mut self, order: &str) {
        self.orders.write_all(format!("{order}\n").as_bytes()).await.expect("the swarm takes orders");
    }

    /// Lets the fleet go home; what it has seen.
    pub(crate) async fn quit(mut self) -> Value {
        self.order("quit").await;
        let result = self.event("result").await;
        assert!(self.child.wait().await.expect("it is ours").success(), "{result}");
        result
    }
}

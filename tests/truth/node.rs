//! One server as a process: started, killed, stopped and continued, told to end, and started again.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use opamp_server::clock::host_now;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::bounds::{AFTERMATH, SETTINGS, STOP};
use crate::record::{Trouble, Troubles};

/// What is done to a process.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Blow {
    /// SIGKILL, and a start after so long.
    Kill(Duration),
    /// SIGSTOP, and SIGCONT after so long.
    Stop(Duration),
    /// SIGTERM, and a start so long after its end.
    Terminate(Duration),
}

/// Where a node is, whether it is up and left alone, and how it is dealt a blow.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) agents: SocketAddr,
    pub(crate) operators: SocketAddr,
    pub(crate) ready: watch::Receiver<bool>,
    pub(crate) blows: mpsc::Sender<Blow>,
}

/// How long until a process is started again that ended by itself, as a supervisor does it.
const RESTART: Duration = Duration::from_millis(500);

/// How many lines of a log are kept to explain an end.
const LAST_WORDS: usize = 5;

/// What a server says that another node ended.
const TAKEN_FOR_LOST: &str = "another node took this one for lost";

/// What a server may say that does not start: its predecessor's lock is still there, or the store is away.
const NO_START: [&str; 2] = ["in use by another opamp-server", "the store is unavailable"];

/// Ports below those that the system gives to sockets that connect: nobody else takes them between two starts.
fn free_port() -> SocketAddr {
    loop {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, fastrand::u16(10_000..20_000)));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

/// The name of a node.
pub(crate) fn name_of(number: usize) -> String {
    format!("node-{number}")
}

/// A node and its supervisor.
#[derive(Debug)]
pub(crate) struct Node {
    number: usize,
    store_url: String,
    agents: SocketAddr,
    operators: SocketAddr,
    ready: watch::Sender<bool>,
    blows: mpsc::Receiver<Blow>,
    troubles: Troubles,
}

/// A process and what it said last.
struct Life {
    child: Child,
    started: watch::Receiver<bool>,
    last_words: Arc<Mutex<Vec<String>>>,
    reading: JoinSet<()>,
}

impl Node {
    pub(crate) fn new(number: usize, store_url: String, troubles: Troubles) -> (Self, Place) {
        let (agents, operators) = (free_port(), free_port());
        let (ready, looking) = watch::channel(false);
        let (sender, blows) = mpsc::channel(1);
        let place = Place { agents, operators, ready: looking, blows: sender };
        (Self { number, store_url, agents, operators, ready, blows, troubles }, place)
    }

    fn start(&self) -> io::Result<Life> {
        let mut child = Command::new(env!("CARGO_BIN_EXE_opamp-server"))
            .args(["--agents-listen", &self.agents.to_string()])
            .args(["--operators-listen", &self.operators.to_string()])
            .args(["--store-url", &self.store_url])
            .env_clear()
            .env("OPAMP_NODE_NAME", name_of(self.number))
            .envs(SETTINGS)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stderr = child.stderr.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let (ready, started) = watch::channel(false);
        let last_words = Arc::default();
        let mut reading = JoinSet::new();
        let log = Log {
            node: self.number,
            troubles: self.troubles.clone(),
            ready,
            last_words: Arc::clone(&last_words),
        };
        reading.spawn(log.read(stderr));
        Ok(Life { child, started, last_words, reading })
    }

    /// Keeps the node running for ever, but for the blows it is dealt.
    pub(crate) async fn run(mut self) {
        loop {
            let down = self.troubles.begin(Some(self.number), Trouble::Down);
            let pause = self.live(down).await.unwrap_or_else(|error| {
                self.troubles.outrage(format!("node {} cannot be run: {error}", self.number));
                RESTART
            });
            self.ready.send_replace(false);
            // Until the next life notes it anew there is no gap: the window of `down` ends with readiness alone.
            let gap = self.troubles.begin(Some(self.number), Trouble::Down);
            tokio::time::sleep(pause).await;
            self.troubles.end(gap);
        }
    }

    /// One life of the process; answers how long to wait before the next.
    async fn live(&mut self, down: usize) -> io::Result<Duration> {
        let mut life = self.start()?;
        let started = tokio::select! {
            ready = life.started.wait_for(|ready| *ready) => ready.is_ok(),
            _ended = life.child.wait() => false,
        };
        if !started {
            let status = life.child.wait().await?;
            self.troubles.end(down);
            self.fell(life, status, &NO_START).await;
            return Ok(RESTART);
        }
        self.troubles.end(down);
        self.ready.send_replace(true);
        loop {
            tokio::select! {
                status = life.child.wait() => {
                    self.fell(life, status?, &[TAKEN_FOR_LOST]).await;
                    return Ok(RESTART);
                }
                Some(blow) = self.blows.recv() => match blow {
                    Blow::Stop(time) => {
                        let stopped = self.troubles.begin(Some(self.number), Trouble::Stopped);
                        self.ready.send_replace(false);
                        signal(&life.child, Signal::STOP)?;
                        tokio::time::sleep(time).await;
                        signal(&life.child, Signal::CONT)?;
                        self.troubles.end(stopped);
                        self.ready.send_replace(true);
                    }
                    Blow::Kill(pause) => {
                        let killed = self.troubles.begin(Some(self.number), Trouble::Killed);
                        self.ready.send_replace(false);
                        life.child.kill().await?;
                        self.troubles.end(killed);
                        return Ok(pause);
                    }
                    Blow::Terminate(pause) => {
                        let terminated = self.troubles.begin(Some(self.number), Trouble::Terminated);
                        self.ready.send_replace(false);
                        signal(&life.child, Signal::TERM)?;
                        let ended = tokio::time::timeout(STOP, life.child.wait()).await;
                        self.troubles.end(terminated);
                        self.stopped(life, ended).await?;
                        return Ok(pause);
                    }
                },
            }
        }
    }

    /// Judges an orderly stop: in time, and with exit code 0 where the store was there.
    async fn stopped(
        &self,
        mut life: Life,
        ended: Result<io::Result<ExitStatus>, tokio::time::error::Elapsed>,
    ) -> io::Result<()> {
        match ended {
            Ok(status) => {
                let status = status?;
                let now = host_now();
                let trouble = self.troubles.windows().into_iter().any(|window| {
                    window.is_of(self.number)
                        && (window.trouble.is_of_store() || window.trouble == Trouble::Stopped)
                        && window.overlaps(now.before(AFTERMATH), now)
                });
                if !status.success() && !trouble {
                    let words = life.words().await;
                    self.troubles
                        .outrage(format!("node {}: SIGTERM ended in {status}: {words}", self.number));
                }
            }
            Err(_elapsed) => {
                self.troubles
                    .outrage(format!("node {} did not stop within {STOP:?} of SIGTERM", self.number));
                life.child.kill().await?;
            }
        }
        Ok(())
    }

    /// The process ended by itself: it must have had one of these reasons.
    async fn fell(&self, mut life: Life, status: ExitStatus, reasons: &[&str]) {
        let words = life.words().await;
        self.troubles.note(format!("node {} ended by itself, {status}: {words}", self.number));
        if !reasons.iter().any(|reason| words.contains(reason)) {
            self.troubles.outrage(format!("node {} ended by itself, {status}: {words}", self.number));
        }
    }
}

impl Life {
    /// What it said last.
    async fn words(&mut self) -> String {
        // The pipe ends with the process.
        while self.reading.join_next().await.is_some() {}
        self.last_words.lock().unwrap_or_else(PoisonError::into_inner).join(" / ")
    }
}

fn signal(child: &Child, signal: Signal) -> io::Result<()> {
    let id = child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?));
    let Some(id) = id else { return Ok(()) };
    kill_process(id, signal).map_err(io::Error::from)
}

/// A reader of a process' log.
struct Log {
    node: usize,
    troubles: Troubles,
    ready: watch::Sender<bool>,
    last_words: Arc<Mutex<Vec<String>>>,
}

impl Log {
    async fn read(self, stderr: ChildStderr) {
        let mut lines = BufReader::new(stderr).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            self.take(&line);
        }
    }

    fn take(&self, line: &str) {
        let entry: Value = serde_json::from_str(line).unwrap_or_default();
        let message = entry["message"].as_str().unwrap_or(line);
        if message.starts_with("agents connect at ") {
            self.ready.send_replace(true);
        }
        if message.starts_with("this server was blind") {
            let now = host_now();
            let seconds = Duration::from_secs_f64(entry["seconds"].as_f64().unwrap_or_default());
            if entry["cause"].as_str().is_some_and(|cause| cause.contains("starved")) {
                self.troubles.past(Some(self.node), Trouble::Lag, now.before(seconds), now);
            }
        }
        if entry["level"] == "WARN" || entry["level"] == "ERROR" || entry["level"].is_null() {
            let error = entry["error"].as_str().unwrap_or_default();
            self.troubles.note(format!("node {} says: {message} {error}", self.node));
            let mut words = self.last_words.lock().unwrap_or_else(PoisonError::into_inner);
            words.push(format!("{message} {error}"));
            let beyond = words.len().saturating_sub(LAST_WORDS);
            words.drain(..beyond);
        }
    }
}

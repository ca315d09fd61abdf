//! What an idle agent costs in memory and a heartbeat in allocations: counted, not timed.
//!
//! A binary of its own, because it counts through the global allocator. The agents live in another
//! process, so that only the server is counted.

#![expect(clippy::expect_used, reason = "a test says what it expected")]
#![expect(clippy::print_stdout, reason = "the figures are the point")]
#![expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]

#[path = "integration/harness/swarm.rs"]
mod swarm;

use std::time::Duration;

use opamp_server::config::{Config, Secret};
use opamp_server::server::Server;
use stats_alloc::{INSTRUMENTED_SYSTEM, Stats, StatsAlloc};
use swarm::Swarm;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

/// How many agents are counted.
const AGENTS: u32 = 1_000;

/// How many heartbeats of each agent are counted.
const HEARTBEATS: u32 = 50;

/// The most heap bytes an idle WebSocket agent may hold after a first report of 2 KiB. Measured: 5,741 to 5,768.
const BYTES_PER_IDLE_AGENT: f64 = 6_144.0;

/// The most allocations and reallocations one heartbeat may cause, its answer included. Measured: 4.00.
const ALLOCATIONS_PER_HEARTBEAT: f64 = 4.2;

fn in_use(stats: &Stats) -> f64 {
    stats.bytes_allocated as f64 - stats.bytes_deallocated as f64
}

fn allocations(stats: &Stats) -> f64 {
    (stats.allocations + stats.reallocations) as f64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_agent_and_a_heartbeat_stay_within_their_bounds() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut config = Config::default();
    config.agents.listen = "127.0.0.1:0".parse().expect("an address");
    config.operators.listen = "127.0.0.1:0".parse().expect("an address");
    config.store.url = Secret::from(format!("sqlite://{}", folder.path().join("fleet.db").display()));
    // Neither pings nor the flush shall fall into the counted span.
    config.store.flush_interval = Duration::from_mins(10);
    config.heartbeat.timeout = Duration::from_mins(10);
    let server = Server::start(&config, true).await.expect("the server starts");
    let url = format!("ws://{}/v1/opamp", server.agents_address());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let mut running = tokio::task::JoinSet::new();
    running.spawn(server.run(async {
        let _stopped = stopped.await;
    }));

    let before = in_use(&ALLOCATOR.stats());
    let agents = AGENTS.to_string();
    let mut fleet = Swarm::start(&url, &["--interval", "0s", "--report-bytes", "2048", "--agents", &agents]);
    fleet.event("connected").await;
    let idle = (in_use(&ALLOCATOR.stats()) - before) / f64::from(AGENTS);

    // The first round lets buffers grow to their working size.
    fleet.order("beat 2").await;
    fleet.event("beaten").await;
    let before = allocations(&ALLOCATOR.stats());
    fleet.order(&format!("beat {HEARTBEATS}")).await;
    let beaten = fleet.event("beaten").await;
    let heartbeats = f64::from(AGENTS * HEARTBEATS);
    assert_eq!(beaten["reports"].as_f64(), Some(heartbeats), "every heartbeat was answered");
    let per_heartbeat = (allocations(&ALLOCATOR.stats()) - before) / heartbeats;

    println!("heap bytes per idle agent: {idle:.0} (at most {BYTES_PER_IDLE_AGENT})");
    println!("allocations per heartbeat: {per_heartbeat:.2} (at most {ALLOCATIONS_PER_HEARTBEAT})");
    assert!(idle <= BYTES_PER_IDLE_AGENT, "{idle:.0} bytes per idle agent");
    assert!(per_heartbeat <= ALLOCATIONS_PER_HEARTBEAT, "{per_heartbeat:.2} allocations per heartbeat");

    fleet.quit().await;
    drop(stop);
    let ended = running.join_next().await.expect("the server was started");
    ended.expect("the server does not panic").expect("the server stops in an orderly way");
}

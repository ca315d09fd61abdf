//! Simulation: the server's real parts under a virtual clock, with agents, nodes and a store that all may fail.
//!
//! A seed is a whole world: what agents do, what befalls nodes and store, and when. Days pass in
//! seconds, without a socket. The simulator keeps a record of what really happened, and what is on
//! record in the store must never contradict it. `scripts/simulate` runs more; docs/simulation.md
//! says how.

#![expect(clippy::expect_used, reason = "in a test a panic with a sentence is the report")]

mod agent;
mod check;
mod gate;
mod link;
mod node;
mod pipe;
mod rules;
mod store;
mod truth;
mod world;

use std::time::Instant;

use rules::Rules;
use world::Outcome;

/// Seeds of the short run.
const SEEDS: u64 = 24;

fn simulate(seed: u64, rules: Rules, recording: bool) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime needs nothing");
    runtime.block_on(world::run(seed, rules, recording))
}

/// What the environment says: `scripts/simulate` sets it from its arguments.
struct Settings {
    seeds: u64,
    from: u64,
    rules: Rules,
    /// Go on after a contradiction.
    go_on: bool,
}

impl Settings {
    #[expect(clippy::disallowed_methods, reason = "the environment tells a test how long to run")]
    fn read() -> Self {
        let read = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let number = |name: &str| read(name).map(|value| value.parse().expect("a whole number"));
        Self {
            seeds: number("SIMULATE_SEEDS").unwrap_or(SEEDS),
            from: number("SIMULATE_FROM").unwrap_or(1),
            rules: Rules::without(&read("SIMULATE_SKIP").unwrap_or_default()).expect("names of rules"),
            go_on: read("SIMULATE_GO_ON").is_some(),
        }
    }
}

/// Prints the story of a seed whose record contradicts the truth.
#[expect(clippy::print_stdout, reason = "the report of a test")]
fn tell(seed: u64, rules: Rules, first: &Outcome) {
    let told = simulate(seed, rules, true);
    for (at, text) in &told.timeline {
        println!("{at} {text}");
    }
    if told.fingerprint != first.fingerprint {
        println!("seed {seed} did not go the same way twice");
    }
}

/// What a seed means does not depend on anything but the seed.
#[test]
fn a_seed_goes_the_same_way_twice() {
    let rules = Rules::without("").expect("no names");
    for seed in 1..=5 {
        let (once, again) = (simulate(seed, rules, false), simulate(seed, rules, true));
        assert_eq!(once.fingerprint, again.fingerprint, "seed {seed}");
    }
}

#[test]
#[expect(clippy::print_stdout, reason = "the report of a test")]
fn the_record_never_contradicts_what_happened() {
    let settings = Settings::read();
    let started = Instant::now();
    let (mut virtually, mut contradictions) = (std::time::Duration::ZERO, 0);
    for seed in settings.from..settings.from + settings.seeds {
        let outcome = simulate(seed, settings.rules, false);
        virtually += outcome.lasted;
        let Some(contradiction) = &outcome.contradiction else { continue };
        contradictions += 1;
        if !settings.go_on {
            tell(seed, settings.rules, &outcome);
        }
        println!(
            "seed {seed} ({} nodes), {}: {:?}: {}",
            outcome.places, contradiction.at, contradiction.rule, contradiction.text
        );
        assert!(settings.go_on, "seed {seed} contradicts {:?}", contradiction.rule);
    }
    let took = started.elapsed().as_secs_f64();
    println!(
        "{} seeds in {took:.1} s, {} hours passed, {contradictions} contradictions",
        settings.seeds,
        virtually.as_secs() / 3_600
    );
}

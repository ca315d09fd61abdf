//! How many instructions a heartbeat takes from its frame to the frame of its answer: counted by
//! callgrind, not timed, so that the same code gives the same figure on a busy machine.
//!
//! Only the pure parts are counted: what the runtime and the kernel do depends on who runs beside.
//! The figure is that of an unoptimised build and says nothing about speed; it is there to be compared
//! with itself. Without valgrind on the PATH the test says that it is skipped.

#![expect(clippy::expect_used, reason = "a test says what it expected")]
#![expect(clippy::print_stdout, reason = "the figure is the point")]

use std::hint::black_box;
use std::process::Command;

use opamp_server::agent::offer::{Answer, compose};
use opamp_server::agent::report::{AgentState, KnownAgent, Outline};
use opamp_server::proto::AgentToServer;
use opamp_server::wire;
use prost::Message;

/// How many heartbeats are counted.
const HEARTBEATS: u64 = 1_000;

/// The most instructions one heartbeat may take. Measured: 18,603.
const INSTRUCTIONS_PER_HEARTBEAT: u64 = 22_000;

/// An agent whose number is 0 by now, and the frames of its next heartbeats.
fn scene(heartbeats: u64) -> (AgentState, Vec<Vec<u8>>) {
    let report = |sequence_num| AgentToServer {
        instance_uid: vec![7; 16],
        sequence_num,
        capabilities: 0x2805,
        ..AgentToServer::default()
    };
    let first = report(0);
    let outline = Outline::of(&first, &first.encode_to_vec());
    let (state, _) = AgentState::restore(&KnownAgent::default()).absorb(&outline);
    let frame = |number| [vec![0], report(number).encode_to_vec()].concat();
    (state, (1..=heartbeats).map(frame).collect())
}

/// One heartbeat, as a link and its session treat it.
fn heartbeat(state: &AgentState, frame: &[u8]) -> (AgentState, Vec<u8>) {
    let body = wire::body_of_frame(frame).expect("a header");
    let report = wire::decode_body(body).expect("a report");
    let (next, change) = state.absorb(&Outline::of(&report, body));
    assert!(!change.must_save, "a mere heartbeat");
    let answer = Answer { ask_full_state: change.ask_full_state, new_uid: None };
    (next, wire::encode_frame(&compose(&report.instance_uid, answer)))
}

#[test]
#[ignore = "what the other one does besides heartbeats; run by the test that counts"]
fn the_scene_alone() {
    let (state, frames) = scene(HEARTBEATS);
    black_box((state, frames));
}

#[test]
#[ignore = "run by the test that counts"]
fn the_scene_and_heartbeats() {
    let (mut state, frames) = scene(HEARTBEATS);
    for frame in black_box(&frames) {
        let (next, answer) = heartbeat(&state, frame);
        state = next;
        black_box(answer);
    }
    assert_eq!(state.number(), Some(HEARTBEATS));
}

/// Instructions that this binary takes to run one of its tests.
fn instructions_of(test: &str) -> u64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().expect("this binary has a path"))
        .args(["--exact", test, "--ignored", "--test-threads=1"])
        .output()
        .expect("valgrind runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let passed = String::from_utf8_lossy(&output.stdout).contains("1 passed");
    assert!(passed, "exactly {test} ran");
    let counted = said.lines().find_map(|line| line.split("Collected :").nth(1)?.trim().parse().ok());
    counted.unwrap_or_else(|| panic!("callgrind says how many it collected: {said}"))
}

#[test]
fn a_heartbeat_takes_a_bounded_number_of_instructions() {
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("SKIPPED: valgrind is not on the PATH");
        return;
    }
    let alone = instructions_of("the_scene_alone");
    let all = instructions_of("the_scene_and_heartbeats");
    let each = all.checked_sub(alone).expect("heartbeats take instructions") / HEARTBEATS;
    println!("instructions per heartbeat: {each} (at most {INSTRUCTIONS_PER_HEARTBEAT})");
    assert!(each > 0, "they were not optimised away");
    assert!(each <= INSTRUCTIONS_PER_HEARTBEAT, "{each} instructions per heartbeat");
}

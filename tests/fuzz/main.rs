//! Fuzzing: hostile bytes at the three places where a stranger's bytes come in.
//!
//! As a normal test each target replays the corpus and adds a short run with a fixed seed. `scripts/fuzz` runs
//! longer; docs/fuzzing.md says how. It needs no nightly compiler: what is mutated next is guided by what an
//! input made the code *do* (verdicts, shapes, sequences of answers), which the targets tell the engine.

#![expect(clippy::expect_used, reason = "in a test a panic with a sentence is the report")]

mod corpus;
mod engine;
mod frame;
/// The follower itself, private to the transport: taken as a source, so that the product opens nothing for it.
#[path = "../../src/transport/frames.rs"]
mod frames;
mod http;
mod mutate;
mod state;

/// A WebSocket's bytes: the header, the decoder, and the frame follower beside the library's own parser.
#[test]
fn frame() {
    engine::drive(&mut frame::Frame, engine::Plan { runs: 1_000 });
}

/// Sequences of reports: what they make of an agent's state, its documents and its answers.
#[test]
fn state() {
    engine::drive(&mut state::State, engine::Plan { runs: 1_000 });
}

/// Raw bytes on the agents' listener of a whole server.
#[test]
fn http() {
    engine::drive(&mut http::Http::start(), engine::Plan { runs: 500 });
}

//! The OpAMP rules this server keeps, each held by a test that bears its number, over real sockets.

mod bodies;
mod clones;
mod crowds;
mod ends;
mod farewells;
mod frames;
mod framing;
mod handshakes;
mod identity;
mod inputs;
mod liveness;
mod masks;
mod multiplexing;
mod numbers;
mod parts;
mod plain_http;
mod replies;
mod state;
mod uids;
mod verdicts;

use std::time::Duration;

use opamp_server::config::Config;

/// A server that gives up on silent agents after a second.
fn impatient(config: &mut Config) {
    config.heartbeat.timeout = Duration::from_secs(1);
    config.heartbeat.interval = Duration::from_millis(100);
}

/// The bytes behind hexadecimal digits.
fn unhex(text: &str) -> Vec<u8> {
    let digits = |at| u8::from_str_radix(&text[at..at + 2], 16);
    (0..text.len()).step_by(2).map(digits).collect::<Result<_, _>>().unwrap_or_else(|_| panic!("{text}"))
}

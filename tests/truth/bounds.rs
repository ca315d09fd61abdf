//! The times of the servers under test, and how far what they say may be from what happened: all in one place.

use std::time::Duration;

/// `heartbeat.timeout`.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(3);

/// How long an agent has to return after an end that the server caused: twice the time-out.
pub(crate) const RETURN_TIME: Duration = Duration::from_secs(6);

/// What every server is told beside its addresses, its name and its store.
pub(crate) const SETTINGS: [(&str, &str); 8] = [
    ("OPAMP_HEARTBEAT_TIMEOUT", "3s"),
    ("OPAMP_HEARTBEAT_INTERVAL", "1s"),
    ("OPAMP_HEARTBEAT_CHECK_INTERVAL", "1s"),
    ("OPAMP_STORE_FLUSH_INTERVAL", "300ms"),
    ("OPAMP_STORE_MAX_CONNECTIONS", "6"),
    ("OPAMP_NODE_LEASE", "2s"),
    ("OPAMP_SHUTDOWN_DRAIN", "1s"),
    ("OPAMP_LOG_LEVEL", "info"),
];

/// How long a stop may take: `shutdown.drain`, the five seconds beside it, and a busy machine.
pub(crate) const STOP: Duration = Duration::from_secs(8);

/// How late a living server may read what an agent did: it notices itself that it was starved for longer than
/// a second, looks for that every 200 ms, and a busy machine adds its own.
pub(crate) const READ: Duration = Duration::from_millis(1_500);

/// Two clocks of one host, one of them anchored to a database by a measurement that takes a few milliseconds.
pub(crate) const CLOCK: Duration = Duration::from_millis(100);

/// The time-out, less the difference of two clocks: no verdict falls earlier.
pub(crate) const EARLIEST: Duration = Duration::from_millis(2_900);

/// A pause of an agent that a server may take for the time-out when the host is slow.
pub(crate) const LONG_PAUSE: Duration = Duration::from_millis(2_500);

/// How long a busy machine may keep the simulator from looking before its own record counts as blurred.
pub(crate) const LAG: Duration = Duration::from_millis(500);

/// How long the traces of a trouble may last beyond it: retries of the store, a call's deadline of ten
/// seconds that had begun, and what was read late.
pub(crate) const AFTERMATH: Duration = Duration::from_secs(12);

/// How long an agent waits for an answer before it gives the connection up: longer than the deadline of a
/// call to the store, so that a server that hangs with its store is not left too early.
pub(crate) const PATIENCE: Duration = Duration::from_secs(15);

/// How long all may take to come to rest once every fault is over: a call that hangs (10 s), a lease, the
/// return time and a look of the safety net.
pub(crate) const SETTLE: Duration = Duration::from_secs(30);

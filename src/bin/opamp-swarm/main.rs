//! `opamp-swarm`: a fleet of simulated agents in one process, for load, faults and measurements.
//!
//! It knows the server only through its ports: of the library it uses nothing but the messages of
//! the protocol, so whatever it sees, a real agent would see too. Every agent is one small task
//! that connects, reports, sends heartbeats and counts what comes back.
//!
//! Exit code 0: every agent's first report was answered; 1: not so; 2: wrong use.

mod agent;
mod args;
mod conduct;
mod control;
mod counts;
mod endpoint;
mod fleet;
mod histogram;
mod identity;
mod limits;
mod link;
mod loss;
mod manners;
mod orders;
mod output;
mod report;

use std::process::ExitCode;

use crate::args::Args;

const WRONG_USE: u8 = 2;

fn main() -> ExitCode {
    let args = Args::from_command_line();
    if let Err(error) = limits::raise_open_files(args.links()) {
        eprintln!("opamp-swarm: {error:#}");
        return ExitCode::from(WRONG_USE);
    }
    match start(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("opamp-swarm: {error:#}");
            ExitCode::from(WRONG_USE)
        }
    }
}

fn start(args: Args) -> anyhow::Result<bool> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(conduct::run(args))
}

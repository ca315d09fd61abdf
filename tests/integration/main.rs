//! The integration tests, in one binary: each module holds the server, or a part of it, to its promises.

mod blindness;
mod conformance;
mod crowd;
mod defects;
mod faults;
mod golden;
mod harness;
mod layers;
mod limits;
mod observability;
mod protocol;
mod rest;
mod shutdown;
mod store;
mod swarm;
mod time_travel;

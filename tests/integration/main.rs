//! The integration tests, in one binary: each module holds the server, or a part of it, to its promises.

mod conformance;
mod crowd;
mod defects;
mod golden;
mod harness;
mod layers;
mod protocol;
mod rest;
mod shutdown;
mod store;

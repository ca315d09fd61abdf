//! The OpAMP messages, generated from `proto/opamp.proto`; no logic.
#![expect(clippy::doc_markdown, clippy::must_use_candidate, reason = "generated code")]

include!(concat!(env!("OUT_DIR"), "/opamp.proto.v1.rs"));

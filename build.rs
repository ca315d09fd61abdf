//! Compiles `proto/opamp.proto` with a pure-Rust compiler; no system `protoc` is needed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/opamp.proto"], ["proto"])?;
    prost_build::Config::new()
        // Sorted maps make a part's canonical encoding, and so its digest, independent of wire order.
        .btree_map(["."])
        .compile_fds(descriptors)?;
    Ok(())
}

//! Generates the RPC types and services from `proto/` (feature `rpc`).
//!
//! `protox` parses the files in Rust, so no `protoc` is needed; the generated code stays in the
//! build directory and is never committed.

fn main() {
    println!("cargo::rerun-if-changed=proto");
    #[cfg(feature = "rpc")]
    generate();
}

#[cfg(feature = "rpc")]
fn generate() {
    const FILES: [&str; 3] = ["process.proto", "filesystem.proto", "node.proto"];
    let out = std::path::PathBuf::from(
        std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts"),
    );
    let descriptors = out.join("descriptors.bin");
    let mut compiler = protox::Compiler::new(["proto"]).expect("proto/ is a folder of this crate");
    compiler.include_imports(true);
    compiler.include_source_info(true);
    compiler.open_files(FILES).unwrap_or_else(|e| panic!("failed to parse proto/: {e:?}"));
    std::fs::write(&descriptors, compiler.encode_file_descriptor_set())
        .expect("OUT_DIR is writable");
    connectrpc_build::Config::new()
        .files(&FILES)
        .descriptor_set(&descriptors)
        .gate_client_feature(true)
        .include_file("rpc.rs")
        .compile()
        .unwrap_or_else(|e| panic!("failed to generate RPC code: {e:?}"));
}

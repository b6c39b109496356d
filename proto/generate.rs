//! `make proto`: Rust from the .proto files beside this, into `src/proto/`. `tests/it/proto.rs` compares the two.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result};

/// Each file of ours, and what prost calls its output: it names one after the package.
const SOURCES: &[(&str, &str)] = &[("istio_ca", "istio.v1.auth.rs"), ("workload", "_.rs")];

fn main() -> Result<()> {
    for (name, text) in generate()? {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(&name);
        fs::write(path, text).context(name)?;
    }
    Ok(())
}

/// The files by their path in the tree. Google's own types are those of `envoy-types`, as everywhere in the crate.
pub(crate) fn generate() -> Result<BTreeMap<String, String>> {
    let protos = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let sources = SOURCES.iter().map(|(name, _)| format!("{name}.proto"));
    let parsed = protox::compile(sources, [protos]).context("the .proto files")?;
    let output = tempfile::tempdir().context("a directory for the output")?;
    tonic_prost_build::configure()
        .out_dir(output.path())
        .compile_well_known_types(true)
        .extern_path(".google.protobuf", "::envoy_types::pb::google::protobuf")
        .compile_fds(parsed)
        .context("Rust from the .proto files")?;
    let read = |&(name, written): &(&'static str, &'static str)| {
        let text = fs::read_to_string(output.path().join(written)).context(written)?;
        Ok((format!("src/proto/{name}.rs"), text))
    };
    SOURCES.iter().map(read).collect()
}

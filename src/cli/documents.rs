//! Manifests in and out: files, directories and standard input become documents, and documents become text again.

use std::path::PathBuf;

/// What `-f` names.
#[derive(Debug, clap::Args)]
pub(super) struct InputArgs {
    /// A file, a directory (its *.yaml, *.yml and *.json), or - for standard input; may be repeated.
    #[arg(short, long = "filename", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
}

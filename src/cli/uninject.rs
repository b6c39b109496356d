//! `malha uninject`: the inverse of `malha inject`.

use super::{Exit, Failure, Terminal, documents::InputArgs};

/// Print manifests as they were before their sidecar.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    input: InputArgs,
}

pub(super) fn run(args: Args, _terminal: &mut Terminal) -> Result<Exit, Failure> {
    Err(Exit::Internal.because(anyhow::anyhow!("not joined yet: {args:?}")))
}

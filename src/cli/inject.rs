//! `malha inject`: what the webhook would do, offline.

use super::{Exit, Failure, Terminal, documents::InputArgs};

/// Print manifests with the sidecar that the webhook would give them.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    input: InputArgs,
}

pub(super) fn run(args: Args, _terminal: &mut Terminal) -> Result<Exit, Failure> {
    Err(Exit::Internal.because(anyhow::anyhow!("not joined yet: {args:?}")))
}

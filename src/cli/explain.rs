//! `malha explain`: gate by gate, why a pod is or is not injected.

use super::{Exit, Failure, Terminal, documents::InputArgs};

/// Say gate by gate why a pod gets a sidecar, or why not.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    input: InputArgs,
}

pub(super) fn run(args: Args, _terminal: &mut Terminal) -> Result<Exit, Failure> {
    Err(Exit::Internal.because(anyhow::anyhow!("not joined yet: {args:?}")))
}

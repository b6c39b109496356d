//! `malha serve`: the control plane.

use std::path::PathBuf;

use super::{Exit, Failure, Terminal};

/// Run the control plane: admission webhook, certificate authority, controllers.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Keep all state in this directory instead of a cluster.
    #[arg(long, value_name = "DIR")]
    standalone: Option<PathBuf>,
}

pub(super) fn run(_args: Args, _terminal: &mut Terminal) -> Result<Exit, Failure> {
    Err(Exit::Internal.because(anyhow::anyhow!("not joined yet")))
}

//! `malha token`: a short-lived token of a standalone control plane, for one service account.

use std::path::PathBuf;

use super::{Exit, Failure, Terminal};

/// Make a short-lived service-account token for a standalone control plane.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The directory of `malha serve --standalone DIR`.
    #[arg(long, value_name = "DIR")]
    standalone: PathBuf,
}

pub(super) fn run(args: Args, _terminal: &mut Terminal) -> Result<Exit, Failure> {
    Err(Exit::Internal.because(anyhow::anyhow!("not joined yet: {args:?}")))
}

//! `malha ca`: the state of the certificate authority, and its rotation by hand or by the CronJob.

use std::path::PathBuf;

use super::{Exit, Failure, Terminal};

/// See and rotate the certificate authority.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The directory of `malha serve --standalone DIR`, instead of a cluster.
    #[arg(long, value_name = "DIR")]
    standalone: Option<PathBuf>,
}

pub(super) fn run(args: Args, _terminal: &mut Terminal) -> Result<Exit, Failure> {
    Err(Exit::Internal.because(anyhow::anyhow!("not joined yet: {args:?}")))
}

//! `malha cert`: what a certificate says, and whether it is time for the next one.

use super::{Exit, Failure, Terminal};

/// Look at certificates.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A PEM file, or HOST:PORT of a TLS server.
    target: String,
}

pub(super) fn run(args: Args, _terminal: &mut Terminal) -> Result<Exit, Failure> {
    Err(Exit::Internal.because(anyhow::anyhow!("not joined yet: {args:?}")))
}

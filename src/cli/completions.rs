//! `malha completions`: a script that completes verbs and flags.

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::{Cli, Exit, Failure, Terminal};

/// Print a completion script for a shell.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The shell that will read the script.
    shell: Shell,
}

pub(super) fn run(args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "malha", &mut script);
    terminal.result(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Done)
}

//! The operator's verbs: one file per verb, and the conventions they share.
//!
//! argv -> [`Cli`] -> a verb's `run(args, &mut Terminal)` -> [`Exit`]
//!
//! Standard output carries the result and nothing else; hints, warnings and progress go to standard error.
//! A verb returns its [`Exit`], or a [`Failure`] which names the object, the act, the reason and what to try.

mod ca;
mod cert;
mod check;
mod cluster;
mod completions;
mod config;
mod doc;
mod documents;
mod edges;
mod exit;
mod explain;
mod inject;
mod install;
mod membership;
mod mesh;
mod ps;
mod rendering;
mod rollout;
mod serve;
mod settings;
mod terminal;
mod token;
mod tour;
mod uninject;
mod uninstall;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub use exit::{Exit, Failure};
pub use terminal::Terminal;

/// Runs the program: reads the command line, runs the verb, says what went wrong, and gives the exit code.
pub fn main() -> ExitCode {
    // kube's client takes the process' default provider; the first one installed stays.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(refused) => return usage(&refused).into(),
    };
    let mut terminal = Terminal::detect();
    let end = cli.verb.run(&mut terminal);
    terminal.finish(end).into()
}

/// Malha, a service mesh: sidecar injection and SPIFFE identities for Kubernetes.
#[derive(Debug, Parser)]
#[command(
    name = "malha",
    version,
    propagate_version = true,
    max_term_width = 110
)]
#[command(
    after_help = "`malha doc WORD` says what an alert, a check or a code means, and what to do.\n\nExit codes: 0 done; 1 a check failed or an object was denied; 2 only warnings, with --strict; \
64 usage; 65 input that cannot be read or is not what it claims to be; 69 cluster or control plane not reachable; \
70 a fault of malha's own; 75 lost every race for a write."
)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Serve(serve::Args),
    Tour(tour::Args),
    Inject(inject::Args),
    Uninject(uninject::Args),
    Explain(explain::Args),
    Check(check::Args),
    Install(install::Args),
    Uninstall(uninstall::Args),
    Mesh(membership::Mesh),
    Unmesh(membership::Unmesh),
    Ps(ps::Args),
    Config(config::Args),
    Edges(edges::Args),
    Cert(cert::Args),
    Ca(ca::Args),
    Token(token::Args),
    Doc(doc::Args),
    Completions(completions::Args),
}

impl Verb {
    fn run(self, terminal: &mut Terminal) -> Result<Exit, Failure> {
        match self {
            Self::Serve(args) => serve::run(args, terminal),
            Self::Tour(args) => tour::run(args, terminal),
            Self::Inject(args) => inject::run(args, terminal),
            Self::Uninject(args) => uninject::run(args, terminal),
            Self::Explain(args) => explain::run(args, terminal),
            Self::Check(args) => check::run(args, terminal),
            Self::Install(args) => install::run(args, terminal),
            Self::Uninstall(args) => uninstall::run(args, terminal),
            Self::Mesh(args) => membership::mesh(&args, terminal),
            Self::Unmesh(args) => membership::unmesh(&args, terminal),
            Self::Ps(args) => ps::run(args, terminal),
            Self::Config(args) => config::run(args, terminal),
            Self::Edges(args) => edges::run(args, terminal),
            Self::Cert(args) => cert::run(args, terminal),
            Self::Ca(args) => ca::run(args, terminal),
            Self::Token(args) => token::run(args, terminal),
            Self::Doc(args) => doc::run(args, terminal),
            Self::Completions(args) => completions::run(args, terminal),
        }
    }
}

/// Prints what clap has to say. Help and version are results and end well; clap's own 2 for everything else is
/// [`Exit::Usage`], because 2 means "only warnings" here.
fn usage(said: &clap::Error) -> Exit {
    // A reader that has gone away (`malha --help | head -1`) is no fault of ours.
    let _ = said.print();
    if said.use_stderr() {
        Exit::Usage
    } else {
        Exit::Done
    }
}

/// Reads manifests as `-f` does, and writes all of them anew as `-o yaml` does. A fuzz target asks whether it reads the
/// same.
#[doc(hidden)]
pub fn reprint(manifests: &str) -> anyhow::Result<String> {
    documents::reprint(manifests)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_tree_is_sound() {
        super::Cli::command().debug_assert();
    }
}

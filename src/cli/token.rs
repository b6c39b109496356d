//! `malha token`: a short-lived token of a standalone control plane, for one service account.

use std::{collections::BTreeMap, io::IsTerminal as _, path::PathBuf, time::Duration};

use super::{Exit, Failure, Terminal, exit::OrExit as _, settings::SettingsArgs, terminal::span};
use crate::{
    config::parse_duration,
    runtime::clock,
    standalone::{Directory, MintError, TokenMaker},
};

/// Make a short-lived service-account token for a standalone control plane.
///
/// Whoever holds it can have certificates signed for that service account until it ends. In a cluster Kubernetes makes
/// these tokens: kubectl create token.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The directory of `malha serve --standalone DIR`.
    #[arg(long, value_name = "DIR")]
    standalone: PathBuf,
    /// The namespace of the service account.
    #[arg(short, long, value_name = "NAME")]
    namespace: String,
    /// The service account.
    #[arg(short, long, value_name = "NAME")]
    service_account: String,
    /// How long the token is good for, from 1s to 24h.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse_duration)]
    ttl: Duration,
    #[command(flatten)]
    settings: SettingsArgs,
}

pub(super) fn run(args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let settings = args.settings.read(BTreeMap::new())?;
    let directory = Directory::open_existing(&args.standalone).or_exit(Exit::BadInput)?;
    let maker = TokenMaker::open(&directory, settings.trust_domain).or_exit(Exit::BadInput)?;
    let now = clock::system().now();
    let token = maker
        .mint(&args.namespace, &args.service_account, args.ttl, now)
        .map_err(|error| exit_of(&error).because(error))?;
    terminal.result(&format!("{token}\n"))?;
    if std::io::stderr().is_terminal() {
        let end = now.saturating_add(args.ttl).unwrap_or(now);
        terminal.note(&format!(
            "good for {}, as service account {}/{}",
            span(now, end),
            args.namespace,
            args.service_account
        ));
    }
    Ok(Exit::Done)
}

fn exit_of(error: &MintError) -> Exit {
    match error {
        MintError::Name(_) | MintError::Life(_) => Exit::Usage,
        MintError::Randomness | MintError::Sign(_) => Exit::Internal,
    }
}

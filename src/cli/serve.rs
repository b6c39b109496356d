//! `malha serve`: joins the rooms into a control plane.
//!
//! flags, environment, file -> settings -> ports -> state (a cluster's or a directory's) -> [`plane`] -> a signal

mod cluster;
mod local;
pub(super) mod overrides;
mod plane;
mod sanity;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Write},
    path::PathBuf,
};

use anyhow::Context as _;
use clap::{ArgMatches, Command, FromArgMatches};

use super::{Exit, Failure, Terminal, exit::OrExit as _, settings};
use crate::{
    config::{KEYS, Layers, Settings, Source},
    k8s::Access,
    runtime::{hardening, shutdown::Shutdown, telemetry},
};

/// Run the control plane: admission webhook, certificate authority, controllers.
///
/// Without --standalone its state lives in the cluster that kubectl would talk to, or that the pod runs in. An API server
/// that is away is waited for. Each setting below may also come from the environment (MALHA_TRUST_DOMAIN for
/// --trust-domain) or from the file of --config, in this order.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Keep all state in this directory instead of a cluster, and listen on loopback
    #[arg(long, value_name = "DIR")]
    standalone: Option<PathBuf>,
    /// Settings file: a flat YAML map of the names below
    #[arg(long, value_name = "FILE", env = "MALHA_CONFIG")]
    config: Option<PathBuf>,
    /// Kubeconfig of the cluster
    #[arg(long, value_name = "FILE", conflicts_with = "standalone")]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig
    #[arg(long, value_name = "NAME", conflicts_with = "standalone")]
    context: Option<String>,
    #[command(flatten)]
    flags: Flags,
    /// Where `malha tour` keeps the audit records, and itself says what to try.
    #[arg(skip)]
    pub(super) audit: Option<File>,
}

pub(super) fn run(mut args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let layers = args.layers()?;
    let settings = settings::parse(&layers)?;
    let hints = args.audit.is_none();
    let audit: Box<dyn Write + Send> = match args.audit.take() {
        Some(file) => Box::new(file),
        None => Box::new(io::stderr()),
    };
    telemetry::init(Some(&settings.log), audit).or_exit(Exit::Usage)?;
    hardening::harden()
        .context("cannot forbid core dumps, which would hold private keys")
        .or_exit(Exit::Internal)?;
    log_effective(&layers);
    let ended = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")
        .or_exit(Exit::Internal)?
        .block_on(serve(args, settings, hints, terminal));
    telemetry::flush();
    ended
}

async fn serve(
    args: Args,
    settings: Settings,
    hints: bool,
    terminal: &mut Terminal,
) -> Result<Exit, Failure> {
    let shutdown = Shutdown::install()
        .context("cannot listen to signals")
        .or_exit(Exit::Internal)?;
    let stop = shutdown.stop();
    let plane = async {
        match args.standalone {
            Some(directory) => local::serve(&directory, settings, stop, hints, terminal).await,
            None => {
                let access = Access {
                    kubeconfig: args.kubeconfig,
                    context: args.context,
                };
                cluster::serve(&access, settings, stop).await
            }
        }
    };
    tokio::select! {
        ended = plane => ended.map(|()| Exit::Done),
        second = shutdown.second() => {
            telemetry::flush();
            std::process::exit(second.exit_code().into())
        }
    }
}

impl Args {
    fn layers(&self) -> Result<Layers, Failure> {
        let mut layers = Layers {
            flags: self.flags.0.clone(),
            ..Layers::default()
        }
        .with_environment(|name| std::env::var(name).ok());
        if self.standalone.is_some() {
            layers = layers.with_defaults(&local::DEFAULTS);
        }
        settings::with_file(layers, self.config.as_deref())
    }
}

/// For a log: a record that names the object and not what the API server said of it helps nobody.
fn whole(error: impl Into<anyhow::Error>) -> String {
    super::terminal::whole(&error.into())
}

/// One line that tells what is in force and who said it.
fn log_effective(layers: &Layers) {
    let settings: Vec<_> = layers
        .effective()
        .map(|(name, text, source)| match source {
            Source::Default => format!("{name}={text:?}"),
            _ => format!("{name}={text:?} ({source})"),
        })
        .collect();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        settings = settings.join(" "),
        "starting"
    );
}

/// One flag for each of [`KEYS`], as text: the texts of all layers are parsed in one place.
#[derive(Debug)]
struct Flags(BTreeMap<String, String>);

impl clap::Args for Flags {
    fn augment_args(command: Command) -> Command {
        KEYS.iter().fold(command, |command, key| {
            let help = match key.default {
                "" => key.help.to_owned(),
                default => format!("{} [default: {default}]", key.help),
            };
            let flag = clap::Arg::new(key.name)
                .long(key.name)
                .value_name(key.value)
                .help(help);
            command.arg(flag.help_heading("Settings"))
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |name: &str| Some((name.to_owned(), matches.get_one::<String>(name)?.clone()));
        Ok(Self(
            KEYS.iter().filter_map(|key| given(key.name)).collect(),
        ))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.extend(Self::from_arg_matches(matches)?.0);
        Ok(())
    }
}

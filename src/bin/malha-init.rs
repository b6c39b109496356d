//! The init container: installs the redirection of a pod's traffic into its proxy, or checks that it is there.

use std::{env, error::Error, fmt, net::SocketAddr, process::ExitCode};

use malha::{
    netlink::{self, Capability, Difference, NetlinkError, Trial, Why},
    redirect::{ArgumentError, Families, Family, Redirection},
};

const HELP: &str = "\
Installs the redirection of a pod's TCP traffic into its proxy: table inet malha, by nf_tables, for IPv4 and IPv6.
It can be run again; the rules are replaced in one step.

Usage: malha-init [--check | --print] SETTINGS

  SETTINGS   the capture settings as one JSON object, as the injector writes them
  --check    change nothing; succeed if the redirection is in force. With CAP_NET_ADMIN the rules are compared one
             by one; without it a connection is tried, which shows what leaves the pod and not what enters it
  --print    change nothing; print the rules as `nft list table inet malha` would
  --help, --version

Installing needs CAP_NET_ADMIN, for a user other than root as a capability of this file:
  setcap cap_net_admin+p malha-init

Exit codes: 0 done; 1 the redirection is not in force; 64 wrong usage; 65 wrong settings;
69 the kernel lacks a feature or refused; 77 no permission
";

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let arguments: Option<Vec<_>> = arguments.iter().map(|argument| argument.to_str()).collect();
    match run(&arguments.unwrap_or_default()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say(&failure);
            let mut cause = failure.source();
            while let Some(error) = cause {
                say(&format_args!("  because: {error}"));
                cause = error.source();
            }
            failure.code()
        }
    }
}

fn run(arguments: &[&str]) -> Result<(), Failure> {
    match arguments {
        ["--help" | "-h"] => print!("{HELP}"),
        ["--version" | "-V"] => println!("malha-init {}", env!("CARGO_PKG_VERSION")),
        ["--check", settings] if !settings.starts_with('-') => check(&parse(settings)?)?,
        ["--print", settings] if !settings.starts_with('-') => {
            print!("{}", parse(settings)?.rule_set(Families::BOTH));
        }
        [settings] if !settings.starts_with('-') => install(&parse(settings)?)?,
        _ => return Err(Failure::Usage),
    }
    Ok(())
}

fn parse(settings: &str) -> Result<Redirection, Failure> {
    Redirection::parse(settings).map_err(Failure::Settings)
}

fn install(settings: &Redirection) -> Result<(), Failure> {
    if let Capability::Missing(why) = netlink::net_admin() {
        return Err(Failure::Capability(why));
    }
    let families = netlink::families();
    let rules = settings.rule_set(families);
    netlink::install(&rules, families).map_err(Failure::Netlink)?;
    tell(settings, families, "redirected");
    Ok(())
}

fn check(settings: &Redirection) -> Result<(), Failure> {
    let families = netlink::families();
    let rules = settings.rule_set(families);
    match netlink::net_admin() {
        Capability::Held => match netlink::check(&rules, families).map_err(Failure::Netlink)? {
            None => tell(settings, families, "checked"),
            Some(difference) => return Err(Failure::Different(difference)),
        },
        Capability::Missing(_) => {
            for (family, trial) in netlink::trials(&rules, families, settings.outbound_port) {
                judge(family, trial, settings.outbound_port)?;
            }
        }
    }
    Ok(())
}

fn judge(family: Family, trial: Trial, outbound_port: u16) -> Result<(), Failure> {
    match trial {
        Trial::Redirected(to) => say(&format_args!(
            "{family}: a connection to {to} came to port {outbound_port}; what enters the pod was not tried"
        )),
        Trial::Untried(why) => say(&format_args!("{family}: not checked, {why}")),
        Trial::NotRedirected(to) => return Err(Failure::NotRedirected(family, to)),
    }
    Ok(())
}

/// One line a family.
fn tell(settings: &Redirection, families: Families, done: &str) {
    for family in [Family::V4, Family::V6] {
        match families.has(family) {
            true => say(&format_args!(
                "{family} {done}: inbound to port {}, outbound to port {}",
                settings.inbound_port, settings.outbound_port
            )),
            false => say(&format_args!(
                "{family} is not there; its rules are left out"
            )),
        }
    }
}

fn say(line: &dyn fmt::Display) {
    eprintln!("malha-init: {line}");
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("usage: malha-init [--check | --print] SETTINGS; see malha-init --help")]
    Usage,
    #[error("wrong settings")]
    Settings(#[source] ArgumentError),
    #[error("CAP_NET_ADMIN is missing; {}", way_out(*.0))]
    Capability(Why),
    #[error("the redirection could not be set up or read")]
    Netlink(#[source] NetlinkError),
    #[error("the redirection is not in force: {0}; run malha-init without --check to put it right")]
    Different(Difference),
    #[error(
        "the redirection is not in force: a connection to {1} over {0} did not come to the proxy's port; does the node's component that installs the rules run?"
    )]
    NotRedirected(Family, SocketAddr),
}

fn way_out(why: Why) -> &'static str {
    match why {
        Why::NotInContainer => {
            "the container must not have it: add NET_ADMIN to its securityContext.capabilities, in a namespace whose Pod Security level allows that (privileged), or set redirect: external"
        }
        Why::NotInFile => {
            "the container may have it, but this program's file does not carry it: setcap cap_net_admin+p malha-init in the image, and start it without a shell"
        }
    }
}

impl Failure {
    /// `sysexits.h`, as far as it has a word for it.
    fn code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Different(_)
            | Self::NotRedirected(..)
            | Self::Netlink(NetlinkError::Unstable(_)) => 1,
            Self::Usage => 64,
            Self::Settings(_) => 65,
            Self::Netlink(NetlinkError::Kernel { .. }) => 69,
            Self::Capability(_) | Self::Netlink(NetlinkError::Permission { .. }) => 77,
        })
    }
}

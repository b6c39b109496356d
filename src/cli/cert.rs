//! `malha cert`: what a certificate says, and whether it is time for the next one.

mod facts;
mod list;
mod server;

use std::{fmt::Write as _, fs, io::Read as _, path::PathBuf, time::Duration};

use anyhow::{Context as _, anyhow};
use jiff::Timestamp;
use serde_json::{Value, json};

use self::facts::Facts;
use super::{
    Exit, Failure, Terminal,
    exit::OrExit as _,
    terminal::{Mark, table, time_left},
};
use crate::{
    ca::{
        bundle::Bundle,
        peer::{self, Side},
        pem,
    },
    config::parse_duration,
    runtime::clock,
};

/// Look at certificates.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    Ls(list::Args),
    Inspect(Inspect),
    NeedsRenewal(NeedsRenewal),
}

/// Show what certificates say, of a file or of a TLS server.
///
/// Exit codes: 0; 1 where --bundle is given and does not verify the chain; 65 where there is no certificate; 69 where
/// the server does not answer.
#[derive(Debug, clap::Args)]
struct Inspect {
    /// A PEM file (- for standard input), or HOST:PORT of a TLS 1.3 server.
    target: String,
    /// Check the chain against these roots (PEM).
    #[arg(long, value_name = "FILE")]
    bundle: Option<PathBuf>,
    /// The name to ask a server for, where it differs from HOST.
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    /// How the result is written.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// One row a certificate.
    Table,
    /// With key ids, usages and names.
    Wide,
    /// One object.
    Json,
    /// The certificates themselves.
    Pem,
}

/// Say whether a certificate should be renewed now: exit code 0 renew now, 1 not yet.
#[derive(Debug, clap::Args)]
struct NeedsRenewal {
    /// A PEM file whose first certificate is looked at (- for standard input), or HOST:PORT.
    target: String,
    /// Renew when less than this is left: a share of its life, or a time such as 2h.
    #[arg(long, value_name = "SHARE|TIME", default_value = "50%", value_parser = parse_threshold)]
    expires_in: Threshold,
    /// How the result is written.
    #[arg(short, long, value_enum, default_value_t = Brief::Table)]
    output: Brief,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Brief {
    /// One line.
    Table,
    /// One object.
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Threshold {
    Share(f64),
    Time(Duration),
}

pub(super) fn run(args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    match args.verb {
        Verb::Ls(args) => list::run(&args, terminal),
        Verb::Inspect(args) => inspect(&args, terminal),
        Verb::NeedsRenewal(args) => needs_renewal(&args, terminal),
    }
}

fn inspect(args: &Inspect, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let now = clock::system().now();
    let chain = certificates(&args.target, args.server_name.as_deref())?;
    let facts = chain
        .iter()
        .map(|der| Facts::read(der).with_context(|| args.target.clone()))
        .collect::<Result<Vec<_>, _>>()
        .or_exit(Exit::BadInput)?;
    let verdict = args
        .bundle
        .as_ref()
        .map(|path| Verdict::of(path, &chain, &facts, now))
        .transpose()
        .or_exit(Exit::BadInput)?;
    let text = match args.output {
        Format::Pem => chain
            .iter()
            .map(|der| pem::encode("CERTIFICATE", der))
            .collect(),
        Format::Json => {
            let report = json!({
                "apiVersion": "malha/v1",
                "kind": "CertificateReport",
                "source": args.target,
                "certificates": facts.iter().map(|facts| facts.to_json(now)).collect::<Vec<_>>(),
                "verdict": verdict.as_ref().map(Verdict::to_json),
            });
            format!("{report:#}\n")
        }
        Format::Table | Format::Wide => {
            let mut text = table(&rows(&facts, args.output == Format::Wide, now));
            if let Some(verdict) = &verdict {
                let _ = writeln!(text, "\n{}", verdict.line(terminal));
            }
            text
        }
    };
    match args.output {
        Format::Table | Format::Wide => terminal.styled(&text)?,
        Format::Json | Format::Pem => terminal.result(&text)?,
    }
    Ok(match verdict {
        Some(Verdict { fault: Some(_), .. }) => Exit::Refused,
        _ => Exit::Done,
    })
}

fn rows(facts: &[Facts], wide: bool, now: Timestamp) -> Vec<Vec<String>> {
    let mut head = vec![
        "KIND",
        "IDENTITY",
        "ISSUER",
        "SERIAL",
        "NOT AFTER",
        "LEFT",
        "KEY",
    ];
    if wide {
        head.extend(["NOT BEFORE", "SUBJECT KEY ID", "AUTHORITY KEY ID", "USAGE"]);
    }
    let mut rows = vec![head.into_iter().map(str::to_owned).collect()];
    rows.extend(facts.iter().map(|facts| {
        let mut row = vec![
            facts.kind.to_string(),
            facts.identity(),
            facts.issuer.clone(),
            facts.serial.clone(),
            facts.validity.not_after.to_string(),
            time_left(facts.validity, now),
            facts.key.clone(),
        ];
        if wide {
            row.extend([
                facts.validity.not_before.to_string(),
                facts.subject_key_id.clone().unwrap_or_else(dash),
                facts.authority_key_id.clone().unwrap_or_else(dash),
                facts.usages.join(","),
            ]);
        }
        row
    }));
    rows
}

fn dash() -> String {
    "-".to_owned()
}

/// Whether a peer with this bundle would accept the chain.
struct Verdict {
    bundle: String,
    roots: usize,
    fault: Option<String>,
}

impl Verdict {
    fn of(
        path: &PathBuf,
        chain: &[Vec<u8>],
        facts: &[Facts],
        now: Timestamp,
    ) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        let text = fs::read(path).with_context(|| format!("cannot read bundle {name}"))?;
        let bundle = Bundle::parse_pem(&text).with_context(|| format!("bundle {name}"))?;
        // A server's certificate, such as the webhook's, is not for clients, and a client's not for servers.
        let side = match facts.first() {
            Some(leaf) if !leaf.usages.iter().any(|usage| usage == "serverAuth") => Side::Client,
            _ => Side::Server,
        };
        Ok(Self {
            roots: bundle.certificates().count(),
            fault: peer::verify(chain, &bundle, side, now)
                .err()
                .map(|fault| fault.to_string()),
            bundle: name,
        })
    }

    fn line(&self, terminal: &Terminal) -> String {
        let Self {
            bundle,
            roots,
            fault,
        } = self;
        let roots = if *roots == 1 {
            "1 root".to_owned()
        } else {
            format!("{roots} roots")
        };
        match fault {
            None => format!(
                "{} the chain verifies with {bundle} ({roots})",
                terminal.mark(Mark::Pass)
            ),
            Some(fault) => format!(
                "{} the chain does not verify with {bundle} ({roots}): {fault}",
                terminal.mark(Mark::Fail)
            ),
        }
    }

    fn to_json(&self) -> Value {
        json!({ "bundle": self.bundle, "roots": self.roots, "verified": self.fault.is_none(), "fault": self.fault })
    }
}

fn needs_renewal(args: &NeedsRenewal, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let now = clock::system().now();
    let chain = certificates(&args.target, None)?;
    let leaf = chain
        .first()
        .context("no certificate")
        .and_then(|der| Facts::read(der))
        .or_exit(Exit::BadInput)?;
    let left =
        Duration::try_from(leaf.validity.not_after.duration_since(now)).unwrap_or(Duration::ZERO);
    let due = args.expires_in.is_reached(left, leaf.validity.life());
    let share = 100.0 * left.as_secs_f64() / leaf.validity.life().as_secs_f64().max(1.0);
    let text = match args.output {
        Brief::Json => {
            let report = json!({
                "apiVersion": "malha/v1",
                "kind": "RenewalReport",
                "source": args.target,
                "identity": leaf.identity(),
                "notAfter": leaf.validity.not_after,
                "secondsLeft": left.as_secs(),
                "renewNow": due,
            });
            format!("{report:#}\n")
        }
        Brief::Table => format!(
            "{}: {}, {} left ({share:.0} % of its life)\n",
            if due { "renew now" } else { "not yet" },
            leaf.identity(),
            time_left(leaf.validity, now),
        ),
    };
    terminal.result(&text)?;
    Ok(if due { Exit::Done } else { Exit::Refused })
}

impl Threshold {
    fn is_reached(self, left: Duration, life: Duration) -> bool {
        match self {
            Self::Share(share) => left.as_secs_f64() < life.as_secs_f64() * share,
            Self::Time(time) => left < time,
        }
    }
}

fn parse_threshold(text: &str) -> Result<Threshold, String> {
    let Some(percent) = text.strip_suffix('%') else {
        return parse_duration(text)
            .map(Threshold::Time)
            .map_err(|fault| format!("{fault}; say a share such as 50% or a time such as 2h"));
    };
    match percent.parse::<f64>() {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(Threshold::Share(percent / 100.0)),
        _ => Err("a share lies between 0% and 100%".to_owned()),
    }
}

/// The certificates of a file, of standard input or of a server, DER, in the order they stand; at least one.
fn certificates(target: &str, server_name: Option<&str>) -> Result<Vec<Vec<u8>>, Failure> {
    if let Some((host, port)) = host_and_port(target) {
        return server::chain_of(host, port, server_name.unwrap_or(host));
    }
    in_file(target).or_exit(Exit::BadInput)
}

/// `HOST:PORT` or `[IPv6]:PORT`, unless there is a file of that name.
fn host_and_port(target: &str) -> Option<(&str, u16)> {
    let (host, port) = target.rsplit_once(':')?;
    let port = port.parse().ok()?;
    let host = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    let is_host = !host.is_empty() && !host.contains('/') && !fs::exists(target).unwrap_or(false);
    is_host.then_some((host, port))
}

fn in_file(target: &str) -> anyhow::Result<Vec<Vec<u8>>> {
    let (name, text) = if target == "-" {
        let mut text = Vec::new();
        std::io::stdin()
            .lock()
            .read_to_end(&mut text)
            .context("cannot read standard input")?;
        ("standard input", text)
    } else {
        (
            target,
            fs::read(target).with_context(|| format!("cannot read {target}"))?,
        )
    };
    let read = pem::parse(&text).with_context(|| format!("{name} is not PEM"))?;
    let (certificates, others): (Vec<_>, Vec<_>) = read
        .blocks
        .into_iter()
        .partition(|block| block.label == "CERTIFICATE");
    if certificates.is_empty() {
        return Err(match others.first() {
            Some(other) => anyhow!("{name} holds a {}, but no CERTIFICATE", other.label),
            None => anyhow!("{name} holds no PEM block CERTIFICATE"),
        });
    }
    Ok(certificates.into_iter().map(|block| block.der).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threshold_is_a_share_or_a_time() {
        assert_eq!(parse_threshold("50%"), Ok(Threshold::Share(0.5)));
        assert_eq!(parse_threshold("12.5%"), Ok(Threshold::Share(0.125)));
        assert_eq!(
            parse_threshold("2h"),
            Ok(Threshold::Time(Duration::from_secs(7200)))
        );
        for wrong in ["", "%", "101%", "-1%", "NaN%", "half", "50"] {
            assert!(parse_threshold(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_threshold_is_reached_below_it_and_not_on_it() {
        let day = Duration::from_secs(86_400);
        let half = Threshold::Share(0.5);
        assert!(!half.is_reached(day / 2, day));
        assert!(half.is_reached(day / 2 - Duration::from_secs(1), day));
        assert!(half.is_reached(Duration::ZERO, day));
        assert!(Threshold::Time(day).is_reached(day / 2, day * 30));
    }

    #[test]
    fn a_target_with_a_port_is_a_server() {
        assert_eq!(host_and_port("localhost:15017"), Some(("localhost", 15017)));
        assert_eq!(host_and_port("[::1]:443"), Some(("::1", 443)));
        for file in [
            "cert.pem",
            "./a:1",
            "a:b",
            "localhost:",
            ":443",
            "localhost:99999",
        ] {
            assert_eq!(host_and_port(file), None, "{file}");
        }
    }
}

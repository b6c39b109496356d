//! `malha check`: whether the cluster is ready for the install, and afterwards whether everything is as it should be.
//!
//! cluster -> [`Facts`](facts::Facts) -> [`verdicts`](verdict::verdicts) -> lines, exit code

pub(super) mod admission;
mod facts;
pub(super) mod issuance;
mod look;
mod verdict;

use std::{fmt::Write as _, time::Duration};

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

pub(super) use self::look::bundle as trusted_by_the_journal;
#[cfg(test)]
pub(super) use self::verdict::IDS;
use self::verdict::{Finding, verdicts};
use super::{
    Exit, Failure, Terminal,
    cluster::{self, ClusterArgs},
    terminal::Mark,
};
use crate::config::parse_duration;

/// Check the cluster before the install (--pre), and the installation after it.
///
/// Each line has an id that stays the same between versions, and what is not in order says how to put it right. A pod is
/// tried by the API server in a dry run, of which nothing is stored, and a certificate is issued, of which the key is
/// forgotten. `malha doc ID` says more about each.
///
/// Exit codes: 0; 1 where something is wrong; 2 with --strict where something is worth knowing; 69 where the cluster does
/// not answer.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Before the install: version, rights, clocks, others' webhooks and CRDs.
    #[arg(long)]
    pre: bool,
    /// Look again until nothing is wrong, at most so long.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    wait: Option<Duration>,
    /// End with 2 where something is worth knowing.
    #[arg(long)]
    strict: bool,
    /// How the result is written.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// One line a check, with the way out below it.
    Table,
    /// Only what is not in order.
    Short,
    /// One object.
    Json,
}

pub(super) fn run(args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let findings = cluster::block_on(check(&args, terminal))?;
    let text = match args.output {
        Format::Json => format!("{:#}\n", to_json(&findings)),
        Format::Table => to_text(&findings, terminal),
        Format::Short => {
            let wrong: Vec<_> = findings
                .iter()
                .filter(|finding| finding.mark != Mark::Pass)
                .cloned()
                .collect();
            to_text(&wrong, terminal)
        }
    };
    terminal.styled(&text)?;
    let any = |mark| findings.iter().any(|finding| finding.mark == mark);
    Ok(if any(Mark::Fail) {
        Exit::Refused
    } else if args.strict && any(Mark::Warn) {
        Exit::Warned
    } else {
        Exit::Done
    })
}

async fn check(args: &Args, terminal: &mut Terminal) -> Result<Vec<Finding>, Failure> {
    let cluster = args.cluster.connect().await?;
    let deadline = Instant::now() + args.wait.unwrap_or_default();
    loop {
        let findings = verdicts(&look::look(&cluster, args.pre).await?);
        let wrong = findings.iter().find(|finding| finding.mark == Mark::Fail);
        let Some(wrong) = wrong.filter(|_| Instant::now() < deadline) else {
            return Ok(findings);
        };
        terminal.progress(&format!("waiting: {}: {}", wrong.id, wrong.text));
        sleep(Duration::from_secs(1)).await;
    }
}

fn to_text(findings: &[Finding], terminal: &Terminal) -> String {
    let mut text = String::new();
    for Finding {
        id,
        mark,
        text: said,
        hint,
    } in findings
    {
        let _ = writeln!(text, "{} {id}: {said}", terminal.mark(*mark));
        if !hint.is_empty() {
            let _ = writeln!(text, "    {hint} (malha doc {id})");
        }
    }
    text
}

fn to_json(findings: &[Finding]) -> Value {
    let items: Vec<_> = findings
        .iter()
        .map(|finding| {
            let state = match finding.mark {
                Mark::Pass => "pass",
                Mark::Warn => "warn",
                Mark::Fail => "fail",
            };
            json!({
                "id": finding.id, "state": state, "text": finding.text, "hint": finding.hint,
                "doc": format!("docs/codes.md#{}", finding.id),
            })
        })
        .collect();
    json!({ "apiVersion": "malha/v1", "kind": "CheckReport", "items": items })
}

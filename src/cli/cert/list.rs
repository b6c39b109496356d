//! `malha cert ls`: which certificate each proxy connects with, and how long it still lives.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    cli::{Exit, Failure, Terminal, ps, terminal::table},
    config::parse_duration,
    runtime::clock,
};

/// Show the certificate that each proxy is connected with.
///
/// A proxy that is connected to no replica has none that could be seen; `malha ps` lists it.
///
/// Exit codes: 0; 69 where no replica of the control plane can be asked.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: ps::Source,
    /// Only what ends within this time, such as 2h.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    expiring_in: Option<Duration>,
    /// How the result is written.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// One row a certificate, the next to end first.
    Table,
    /// One object.
    Json,
}

/// A proxy's certificate, as its connection shows it.
struct Row {
    namespace: String,
    pod: String,
    identity: Option<String>,
    not_after: Timestamp,
}

pub(super) fn run(args: &Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let now = clock::system().now();
    let (report, nobody) = args.source.ask(terminal)?;
    let none = report.proxies.is_empty();
    let rows = rows(report.proxies, args.expiring_in, now);
    match args.output {
        Format::Json => terminal.result(&format!("{:#}\n", to_json(&rows, now)))?,
        Format::Table if none => terminal.note(&nobody),
        Format::Table if rows.is_empty() => terminal.note("no such certificate"),
        Format::Table => terminal.styled(&to_table(&rows, now))?,
    }
    Ok(Exit::Done)
}

fn rows(proxies: Vec<ps::Proxy>, within: Option<Duration>, now: Timestamp) -> Vec<Row> {
    let last = within.map(|within| now.saturating_add(within).unwrap_or(Timestamp::MAX));
    let seen = proxies.into_iter().filter_map(|proxy| {
        Some(Row {
            not_after: proxy.certificate_not_after?,
            namespace: proxy.namespace,
            pod: proxy.pod,
            identity: proxy.identity,
        })
    });
    let mut rows: Vec<Row> = seen
        .filter(|row| last.is_none_or(|last| row.not_after <= last))
        .collect();
    rows.sort_by_key(|row| row.not_after);
    rows
}

fn to_table(rows: &[Row], now: Timestamp) -> String {
    let head = ["POD", "IDENTITY", "NOT AFTER", "LEFT"].map(str::to_owned);
    let rows = rows.iter().map(|row| {
        vec![
            format!("{}/{}", row.namespace, row.pod),
            row.identity.clone().unwrap_or_else(|| "-".to_owned()),
            row.not_after.to_string(),
            ps::left(row.not_after, now),
        ]
    });
    table(
        &std::iter::once(head.to_vec())
            .chain(rows)
            .collect::<Vec<_>>(),
    )
}

fn to_json(rows: &[Row], now: Timestamp) -> Value {
    let items = rows.iter().map(|row| {
        json!({
            "namespace": row.namespace,
            "pod": row.pod,
            "identity": row.identity,
            "notAfter": row.not_after,
            "secondsLeft": row.not_after.duration_since(now).as_secs().max(0),
        })
    });
    json!({
        "apiVersion": "malha/v1",
        "kind": "CertificateList",
        "items": items.collect::<Vec<_>>(),
    })
}

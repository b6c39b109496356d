//! `malha ca status --audit-verify FILE`: whether the records of a log follow each other, and who got which certificate.
//!
//! a log's lines -> records (what else the log holds is passed over) -> [`verify_chain`] -> [`Report`]

use std::{collections::BTreeMap, fmt::Write as _, fs, io::Read as _};

use anyhow::{Context as _, anyhow};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    cli::{Exit, Failure, exit::OrExit as _, terminal::table},
    identity::SpiffeId,
    signing::{AuditError, verify_chain},
};

/// What a log says, once its records were found to follow each other.
#[derive(Debug)]
pub(super) struct Report {
    records: usize,
    /// One chain for each life of a process.
    chains: BTreeMap<(String, String), Chain>,
    issued: Vec<Issued>,
}

/// The records of one process from its start to its end. What was cut off at either end cannot be missed, so the first
/// and the last number are told.
#[derive(Debug)]
struct Chain {
    first: u64,
    last: u64,
    from: String,
    until: String,
}

#[derive(Clone, Debug)]
struct Issued {
    record: Record,
    whole: Value,
}

#[derive(Clone, Debug, Deserialize)]
struct Record {
    time: String,
    replica: String,
    run: String,
    sequence: u64,
    result: String,
    spiffe_id: Option<String>,
    serial: Option<String>,
    not_after: Option<String>,
    method: Option<String>,
    pod: Option<Named>,
    node: Option<Named>,
    peer: Option<String>,
    #[serde(default)]
    stale: bool,
}

#[derive(Clone, Debug, Deserialize)]
struct Named {
    name: String,
}

/// Reads a log (`-` is standard input) and checks it.
///
/// # Errors
/// [`Exit::BadInput`] where it cannot be read or holds no record, [`Exit::Refused`] where records are missing or changed.
pub(super) fn read(file: &str, issued_to: Option<&SpiffeId>) -> Result<Report, Failure> {
    let text = text_of(file).or_exit(Exit::BadInput)?;
    let records: Vec<(usize, &str)> = (1..)
        .zip(text.lines())
        .filter(|(_, line)| is_record(line))
        .map(|(number, line)| (number, line.trim()))
        .collect();
    if records.is_empty() {
        return Err(Exit::BadInput.because(anyhow!(
            "{file} holds no audit record: a line of JSON that begins with {{\"target\":\"audit\""
        )));
    }
    verify_chain(records.iter().map(|(_, line)| *line)).map_err(|error| {
        let at = match error {
            AuditError::NotARecord(at) | AuditError::Broken { line: at, .. } => at,
        };
        let line = at.checked_sub(1).and_then(|at| records.get(at));
        let line = line.map_or(at, |(number, _)| *number);
        Exit::Refused.because(anyhow!("{file}, line {line}: {}", fault(&error)))
    })?;
    let mut report = Report {
        records: records.len(),
        chains: BTreeMap::new(),
        issued: Vec::new(),
    };
    for (number, line) in records {
        let record = serde_json::from_str(line).and_then(|record| {
            let whole = serde_json::from_str(line)?;
            Ok(Issued { record, whole })
        });
        let record = record.with_context(|| format!("{file}, line {number} is no audit record"));
        report.add(record.or_exit(Exit::BadInput)?, issued_to);
    }
    Ok(report)
}

/// The library counts records, and a log holds other lines, too.
fn fault(error: &AuditError) -> String {
    match error {
        AuditError::NotARecord(_) => "not an audit record".to_owned(),
        AuditError::Broken {
            replica, sequence, ..
        } => format!(
            "record {sequence} of {replica} does not follow the one before it; records are missing or were changed"
        ),
    }
}

fn text_of(file: &str) -> anyhow::Result<String> {
    if file == "-" {
        let mut text = String::new();
        std::io::stdin()
            .lock()
            .read_to_string(&mut text)
            .context("cannot read standard input")?;
        return Ok(text);
    }
    fs::read_to_string(file).with_context(|| format!("cannot read {file}"))
}

/// A record that was damaged beyond JSON is passed over here, and missed by the one that follows it.
fn is_record(line: &str) -> bool {
    #[derive(Deserialize)]
    struct Marked {
        target: String,
        previous: Option<String>,
    }
    serde_json::from_str(line)
        .is_ok_and(|Marked { target, previous }| target == "audit" && previous.is_some())
}

impl Report {
    fn add(&mut self, issued: Issued, to: Option<&SpiffeId>) {
        let record = &issued.record;
        let key = (record.replica.clone(), record.run.clone());
        let chain = self.chains.entry(key).or_insert_with(|| Chain {
            first: record.sequence,
            last: record.sequence,
            from: record.time.clone(),
            until: String::new(),
        });
        chain.last = record.sequence;
        chain.until.clone_from(&record.time);
        let is_theirs = to.is_some_and(|to| record.spiffe_id.as_deref() == Some(&to.to_string()));
        if is_theirs && record.result == "issued" {
            self.issued.push(issued);
        }
    }

    pub(super) fn to_json(&self, issued_to: Option<&SpiffeId>) -> Value {
        let chains = self.chains.iter().map(|((replica, run), chain)| {
            json!({
                "replica": replica,
                "run": run,
                "first": chain.first,
                "last": chain.last,
                "from": chain.from,
                "until": chain.until,
            })
        });
        let issued = self.issued.iter().map(|issued| &issued.whole);
        json!({
            "apiVersion": "malha/v1",
            "kind": "AuditReport",
            "records": self.records,
            "chains": chains.collect::<Vec<_>>(),
            "issuedTo": issued_to.map(ToString::to_string),
            "issued": issued_to.map(|_| issued.collect::<Vec<_>>()),
        })
    }

    pub(super) fn to_text(&self, issued_to: Option<&SpiffeId>) -> String {
        let mut text = format!(
            "{} records follow each other: none is missing or changed between the first and the last\n",
            self.records
        );
        let head = ["REPLICA", "RUN", "FIRST", "LAST", "FROM", "UNTIL"];
        let rows = self.chains.iter().map(|((replica, run), chain)| {
            [
                replica.clone(),
                run.clone(),
                chain.first.to_string(),
                chain.last.to_string(),
                chain.from.clone(),
                chain.until.clone(),
            ]
        });
        text.push_str(&in_columns(head, rows));
        let Some(to) = issued_to else { return text };
        if self.issued.is_empty() {
            let _ = writeln!(text, "\nnothing was issued to {to}");
            return text;
        }
        let _ = writeln!(text, "\nissued to {to}:");
        let head = ["TIME", "SERIAL", "NOT AFTER", "BY", "POD", "NODE", "PEER"];
        let rows = self.issued.iter().map(|issued| issued.record.row());
        text.push_str(&in_columns(head, rows));
        text
    }
}

impl Record {
    fn row(&self) -> [String; 7] {
        let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        let name = |named: &Option<Named>| or_dash(&named.as_ref().map(|named| named.name.clone()));
        let by = or_dash(&self.method);
        [
            self.time.clone(),
            or_dash(&self.serial),
            or_dash(&self.not_after),
            match self.stale {
                true => format!("{by} (stale)"),
                false => by,
            },
            name(&self.pod),
            name(&self.node),
            or_dash(&self.peer),
        ]
    }
}

fn in_columns<const N: usize>(head: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let head = head.map(str::to_owned).to_vec();
    let rows = rows.map(|row| row.to_vec());
    table(&std::iter::once(head).chain(rows).collect::<Vec<_>>())
}

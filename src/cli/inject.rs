//! `malha inject`: what the webhook would do, offline.

use json_patch::{PatchOperation, jsonptr::PointerBuf};
use serde_json::Value;

use super::{
    Exit, Failure, Terminal,
    documents::{Document, Format, InputArgs, render},
    exit::OrExit as _,
    mesh::MeshArgs,
};
use crate::inject::{
    Verdict,
    workload::{self, Outcome},
};

/// Print manifests with the sidecar that the webhook would give them.
///
/// Pods, Deployments, StatefulSets, DaemonSets, ReplicaSets, ReplicationControllers, Jobs, CronJobs, and Lists of them;
/// everything else passes unchanged. What the webhook would leave alone is printed as it is, with the reason on
/// standard error. Namespaces among the input decide about their pods; in any other namespace every pod is taken to be
/// selected, or as --namespace-labels says.
///
/// Exit codes: 0; 1 where an object is denied (nothing is printed then, so that nothing is applied without its sidecar);
/// 65 where the input cannot be read.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    input: InputArgs,
    #[command(flatten)]
    mesh: MeshArgs,
    /// How the result is written.
    #[arg(short, long, value_enum, default_value_t = Output::Yaml)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    /// YAML documents.
    Yaml,
    /// JSON, one object after the other.
    Json,
    /// JSON Patch (RFC 6902), one array for each document.
    Patch,
}

pub(super) fn run(args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let mut documents = args.input.read()?;
    let injector = args.mesh.injector()?;
    let surroundings = args.mesh.surroundings(&documents)?;
    let mut outcomes = Vec::new();
    for document in &mut documents {
        let injected = workload::inject(&injector, &mut document.value, &surroundings);
        outcomes.push(
            injected
                .map_err(|fault| document.fault(fault))
                .or_exit(Exit::BadInput)?,
        );
    }
    let mut denied = false;
    for (document, outcomes) in documents.iter().zip(&outcomes) {
        for outcome in outcomes {
            report(document, outcome, terminal);
            denied |= matches!(outcome.answer.verdict, Verdict::Deny(_));
        }
    }
    if denied {
        return Ok(Exit::Refused);
    }
    if outcomes.iter().all(Vec::is_empty) {
        terminal.note("nothing to inject: no pod and no workload in the input");
    }
    let text = match args.output {
        Output::Patch => outcomes
            .iter()
            .map(|outcomes| patch_of(outcomes))
            .collect::<Result<String, _>>(),
        Output::Yaml | Output::Json => {
            let format = if args.output == Output::Json {
                Format::Json
            } else {
                Format::Yaml
            };
            let changed = outcomes
                .iter()
                .map(|outcomes| outcomes.iter().any(is_patched));
            render(
                &documents.into_iter().zip(changed).collect::<Vec<_>>(),
                format,
            )
        }
    };
    terminal.result(&text.or_exit(Exit::Internal)?)?;
    Ok(Exit::Done)
}

fn is_patched(outcome: &Outcome) -> bool {
    matches!(outcome.answer.verdict, Verdict::Patch(_))
}

/// What an author should know: why nothing happens, what is refused, and every warning.
fn report(document: &Document, outcome: &Outcome, terminal: &mut Terminal) {
    let Outcome {
        template,
        namespace,
        answer,
    } = outcome;
    let object = format!(
        "{}: {} {namespace}/{}",
        document.origin, template.kind, template.name
    );
    let reason = answer.verdict.reason();
    match &answer.verdict {
        Verdict::Patch(_) => {}
        Verdict::Skip(_) => match reason.fix() {
            Some(fix) => terminal.note(&format!(
                "{object}: skipped: {reason}: to have it injected, {fix}"
            )),
            None => terminal.note(&format!("{object}: skipped: {reason}")),
        },
        Verdict::Deny(denial) => {
            terminal.note(&format!("{object}: denied: {reason}: {}", denial.message))
        }
    }
    for warning in &answer.warnings {
        terminal.note(&format!("{object}: warning: {}", warning.text));
    }
}

/// The operations on one document: those on its templates, with paths from the document's root.
fn patch_of(outcomes: &[Outcome]) -> anyhow::Result<String> {
    let mut all = Vec::new();
    for outcome in outcomes {
        let Verdict::Patch(patch) = &outcome.answer.verdict else {
            continue;
        };
        let base = PointerBuf::parse(outcome.template.pointer.clone())?;
        let operations: Vec<PatchOperation> = serde_json::from_slice(&patch.json)?;
        for operation in operations {
            let mut operation = serde_json::to_value(operation)?;
            for field in ["path", "from"] {
                if let Some(path) = operation.get(field).and_then(Value::as_str) {
                    let mut whole = base.clone();
                    whole.append(PointerBuf::parse(path.to_owned())?);
                    operation[field] = whole.to_string().into();
                }
            }
            all.push(operation);
        }
    }
    Ok(serde_json::to_string_pretty(&all)? + "\n")
}

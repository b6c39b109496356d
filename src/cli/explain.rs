//! `malha explain`: gate by gate, why a pod is or is not injected.

use std::fmt::Write as _;

use anstyle::Style;
use anyhow::anyhow;
use serde_json::{Value, json};

use super::{
    Exit, Failure, Terminal,
    documents::{Document, InputArgs},
    exit::OrExit as _,
    mesh::MeshArgs,
    terminal::{Mark, paint},
};
use crate::inject::{
    NamespaceFacts, Reason,
    explain::{Explanation, explain},
    workload::{Template, templates},
};

/// Say gate by gate why a pod gets a sidecar, or why not.
///
/// Give the namespace with -f, too: without it every pod is taken to be selected, or as --namespace-labels says.
///
/// Exit codes: 0 whatever the verdict; 2 with --strict where a pod is not injected; 65 where the input holds no pod or
/// workload.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    input: InputArgs,
    #[command(flatten)]
    mesh: MeshArgs,
    /// How the result is written.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// End with 2 where a pod is not injected.
    #[arg(long)]
    strict: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// A line for each gate.
    Table,
    /// One object.
    Json,
}

/// One pod or template, and its way.
struct Subject<'a> {
    document: &'a Document,
    template: Template,
    namespace: NamespaceFacts,
    /// The namespace's labels are an assumption.
    assumed: bool,
    way: Explanation,
}

pub(super) fn run(args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let documents = args.input.read()?;
    let injector = args.mesh.injector()?;
    let surroundings = args.mesh.surroundings(&documents)?;
    let mut subjects = Vec::new();
    for document in &documents {
        for template in templates(&document.value) {
            let namespace = surroundings.namespace_of(&template);
            let pod = template
                .pod(&document.value)
                .unwrap_or(&Value::Null)
                .to_string();
            let way = explain(
                &injector,
                pod.as_bytes(),
                &namespace,
                surroundings.oldest_kubelet,
                template.owner().as_ref(),
            );
            let way = way
                .map_err(|fault| document.fault(fault))
                .or_exit(Exit::BadInput)?;
            let assumed = !surroundings
                .namespaces
                .iter()
                .any(|known| known.name == namespace.name);
            subjects.push(Subject {
                document,
                template,
                namespace,
                assumed,
                way,
            });
        }
    }
    if subjects.is_empty() {
        return Err(Exit::BadInput.because(anyhow!(
            "the input holds no pod and no workload with a pod template"
        )));
    }
    let text = match args.output {
        Format::Json => {
            let items: Vec<_> = subjects.iter().map(Subject::to_json).collect();
            let list =
                json!({ "apiVersion": "malha/v1", "kind": "ExplanationList", "items": items });
            format!("{list:#}\n")
        }
        Format::Table => {
            let texts: Vec<_> = subjects
                .iter()
                .map(|subject| subject.text(terminal))
                .collect();
            texts.join("\n")
        }
    };
    match args.output {
        Format::Json => terminal.result(&text)?,
        Format::Table => terminal.styled(&text)?,
    }
    let all_meshed = subjects.iter().all(|subject| is_meshed(subject.way.reason));
    Ok(if args.strict && !all_meshed {
        Exit::Warned
    } else {
        Exit::Done
    })
}

/// Whether the pod has its sidecar in the end.
fn is_meshed(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::Injected | Reason::Reinvoked | Reason::AlreadyInjected
    )
}

impl Subject<'_> {
    fn text(&self, terminal: &Terminal) -> String {
        let Self {
            document,
            template,
            namespace,
            way,
            ..
        } = self;
        let bold = Style::new().bold();
        let title = format!("{} {}/{}", template.kind, namespace.name, template.name);
        let mut text = format!("{} ({})\n", paint(bold, &title), document.origin);
        let longest = way
            .gates
            .iter()
            .map(|gate| gate.question.chars().count())
            .max()
            .unwrap_or(0);
        for gate in &way.gates {
            let mark = terminal.mark(if gate.passed { Mark::Pass } else { Mark::Fail });
            // Which entry matched, and by which selector, has a line of its own.
            let saw = gate.saw.replace(
                "; matched ",
                "
      matched ",
            );
            let line = format!("  {mark} {:longest$}   {saw}", gate.question);
            let _ = writeln!(text, "{}", line.trim_end());
        }
        let _ = writeln!(text, "verdict: {}", paint(bold, &self.verdict()));
        if let Some(message) = &way.message {
            let _ = writeln!(text, "why: {message}");
        }
        if let Some(fix) = way.fix {
            let _ = writeln!(text, "fix: {fix}");
        }
        for warning in &way.warnings {
            let _ = writeln!(text, "{} {}", terminal.mark(Mark::Warn), warning.text);
        }
        for note in &way.notes {
            let _ = writeln!(text, "note: {note}");
        }
        if self.assumed {
            let _ = writeln!(
                text,
                "note: namespace {} is not among the input, and is taken to be labelled istio-injection=enabled",
                namespace.name
            );
        }
        text
    }

    fn verdict(&self) -> String {
        format!("{}: {}", self.result(), self.way.reason)
    }

    fn result(&self) -> &'static str {
        match (is_meshed(self.way.reason), &self.way.message) {
            (true, _) => "injected",
            (false, Some(_)) => "denied",
            (false, None) => "skipped",
        }
    }

    fn to_json(&self) -> Value {
        let Self {
            document,
            template,
            namespace,
            assumed,
            way,
        } = self;
        let warnings: Vec<_> = way
            .warnings
            .iter()
            .map(|warning| json!({ "code": warning.code.as_str(), "text": warning.text }))
            .collect();
        json!({
            "object": {
                "apiVersion": template.api_version,
                "kind": template.kind,
                "namespace": namespace.name,
                "name": template.name,
                "origin": document.origin.to_string(),
            },
            "namespaceLabels": namespace.labels,
            "namespaceAssumed": assumed,
            "gates": way.gates,
            "result": self.result(),
            "reason": way.reason.as_str(),
            "message": way.message,
            "fix": way.fix,
            "warnings": warnings,
            "notes": way.notes,
        })
    }
}

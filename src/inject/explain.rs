//! Says gate by gate why a pod is or is not injected, by asking the decision's own gates.

use super::{
    Injector, NamespaceFacts, Owner, PodError, Reason, Verdict, Warning,
    annotations::shown,
    capture::Capture,
    gates::{self, Candidate, Gate as Asked},
    judge::Judgement,
    pod::PodView,
    select::{self, LabelSelector, Operator, PodFacts},
};
use crate::redirect::Include;
use serde::Serialize;

/// One question, and how the pod answered it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gate {
    /// Its row in the table of selection.
    pub row: u8,
    /// What a pod must be to pass.
    pub question: &'static str,
    /// Whether it is.
    pub passed: bool,
    /// What was looked at.
    pub saw: String,
}

/// The whole way of one pod.
#[derive(Debug)]
pub struct Explanation {
    /// The gates in order, up to the one that decided.
    pub gates: Vec<Gate>,
    /// The code of the verdict.
    pub reason: Reason,
    /// What a refused pod's author is told.
    pub message: Option<String>,
    /// What to do to have the pod injected, in one line.
    pub fix: Option<&'static str>,
    /// What its author should know.
    pub warnings: Vec<Warning>,
    /// What follows for the pod's traffic.
    pub notes: Vec<String>,
    /// What of the pod's traffic would be captured, where a sidecar would be added.
    pub capture: Option<Capture>,
}

/// Explains what happens to a pod, or to the pods of `owner`'s template, in this namespace.
///
/// # Errors
/// As [`Injector::inject`].
pub fn explain(
    injector: &Injector,
    pod: &[u8],
    namespace: &NamespaceFacts,
    oldest_kubelet: Option<u32>,
    owner: Option<&Owner>,
) -> Result<Explanation, PodError> {
    let answer = injector.rehearse(pod, namespace, oldest_kubelet, owner)?;
    let view = PodView::parse(pod)?;
    let reason = answer.verdict.reason();
    let (notes, capture) = traffic(injector, &view, namespace, oldest_kubelet);
    Ok(Explanation {
        gates: walk(injector, &view, namespace, oldest_kubelet),
        reason,
        message: match answer.verdict {
            Verdict::Deny(denial) => Some(denial.message),
            Verdict::Patch(_) | Verdict::Skip(_) => None,
        },
        fix: reason.fix(),
        notes,
        capture,
        warnings: answer.warnings,
    })
}

/// Asks every gate until one stops the pod.
fn walk(
    injector: &Injector,
    pod: &PodView<'_>,
    namespace: &NamespaceFacts,
    oldest_kubelet: Option<u32>,
) -> Vec<Gate> {
    let call = super::Call {
        entry: select::Entry::Namespace,
        namespace: &namespace.name,
        oldest_kubelet,
    };
    let candidate = Candidate { pod, call: &call };
    let mut gates = Vec::new();
    let (outside, inside) = gates::FIRST.split_at(gates::BEFORE_SELECTION);
    let passed = ask(outside, &candidate, &mut gates)
        && push(&mut gates, selection(injector, &pod.facts(), namespace))
        && ask(inside, &candidate, &mut gates)
        && push(&mut gates, presence(injector, pod))
        && push(&mut gates, annotations(injector, &candidate))
        && ask(&gates::LAST, &candidate, &mut gates);
    debug_assert!(passed || gates.last().is_some_and(|gate| !gate.passed));
    gates
}

fn ask(asked: &[Asked], candidate: &Candidate<'_, '_>, gates: &mut Vec<Gate>) -> bool {
    asked.iter().all(|gate| {
        let passed = (gate.ask)(candidate).is_ok();
        push(
            gates,
            Gate {
                row: gate.row,
                question: gate.question,
                passed,
                saw: (gate.saw)(candidate),
            },
        )
    })
}

fn push(gates: &mut Vec<Gate>, gate: Gate) -> bool {
    let passed = gate.passed;
    gates.push(gate);
    passed
}

fn selection(injector: &Injector, pod: &PodFacts<'_>, namespace: &NamespaceFacts) -> Gate {
    let revision = &injector.settings().revision;
    let selection = select::select(namespace, pod, revision);
    let label = |value: Option<&str>| value.map_or_else(|| "absent".to_owned(), shown);
    let of_namespace = |key: &str| label(namespace.labels.get(key).map(String::as_str));
    let looked_at = format!(
        "namespace: {}={}, {}={}; pod: {}={}, {}={}",
        select::INJECTION,
        of_namespace(select::INJECTION),
        select::REVISION,
        of_namespace(select::REVISION),
        select::INJECT,
        label(pod.inject),
        select::REVISION,
        label(pod.revision),
    );
    let entries = select::webhook_entries(revision);
    let matched = selection
        .outcome
        .ok()
        .and_then(|entry| entries.iter().find(|e| e.name == entry.webhook_name()));
    let saw = match matched {
        Some(entry) => format!(
            "{looked_at}; matched {}: namespaces {}, pods {}",
            entry.name,
            written(&entry.namespace_selector),
            written(&entry.object_selector)
        ),
        None => looked_at,
    };
    Gate {
        row: selection.row,
        question: "an entry of the webhook selects the pod",
        passed: matched.is_some(),
        saw,
    }
}

/// A selector as `kubectl -l` writes it.
fn written(selector: &LabelSelector) -> String {
    let one = |requirement: &select::Requirement| {
        let values = requirement.values.join(",");
        match requirement.operator {
            Operator::In => format!("{} in ({values})", requirement.key),
            Operator::NotIn => format!("{} notin ({values})", requirement.key),
            Operator::Exists => requirement.key.to_owned(),
            Operator::DoesNotExist => format!("!{}", requirement.key),
        }
    };
    selector
        .match_expressions
        .iter()
        .map(one)
        .collect::<Vec<_>>()
        .join(",")
}

fn presence(injector: &Injector, pod: &PodView<'_>) -> Gate {
    let question = "nothing in the pod has a name of ours";
    let (row, passed, saw) = match injector.presence(pod) {
        Ok((None, _)) => (19, true, "no malha-proxy, no malha-init".to_owned()),
        Ok((Some(_), _)) => (18, false, "malha-proxy and malha-init are there".to_owned()),
        Err(denial) => (19, false, denial.message),
    };
    Gate {
        row,
        question,
        passed,
        saw,
    }
}

fn annotations(injector: &Injector, candidate: &Candidate<'_, '_>) -> Gate {
    let question = "every annotation that is read can be honoured";
    let accepted = injector.accept(candidate.pod, candidate.call, Vec::new(), &mut Vec::new());
    let saw = match &accepted {
        Ok(_) => {
            let keys: Vec<_> = candidate
                .pod
                .annotations()
                .map(|(key, _)| key)
                .filter(|key| super::annotations::is_read(key))
                .collect();
            if keys.is_empty() {
                "none".to_owned()
            } else {
                keys.join(", ").escape_debug().to_string()
            }
        }
        Err(denial) => denial.message.clone(),
    };
    Gate {
        row: 20,
        question,
        passed: accepted.is_ok(),
        saw,
    }
}

/// What an injected pod's author may not expect, and what is captured.
fn traffic(
    injector: &Injector,
    pod: &PodView<'_>,
    namespace: &NamespaceFacts,
    oldest_kubelet: Option<u32>,
) -> (Vec<String>, Option<Capture>) {
    let call = super::Call {
        entry: select::Entry::Namespace,
        namespace: &namespace.name,
        oldest_kubelet,
    };
    let Ok(Judgement::First(accepted)) = injector.judge(pod, &call, &mut Vec::new()) else {
        return (Vec::new(), None);
    };
    let capture = &accepted.wishes.capture;
    let mut notes = vec![match accepted.native {
        true => {
            "order: native sidecar; init containers of the application have the network of the mesh"
                .to_owned()
        }
        false => {
            "order: classic; init containers of the application run outside the mesh".to_owned()
        }
    }];
    if !capture.exclude_inbound_ports.is_empty() {
        let ports: Vec<_> = capture
            .exclude_inbound_ports
            .iter()
            .map(u16::to_string)
            .collect();
        notes.push(format!(
            "ports excluded inbound are outside mutual TLS: {}",
            ports.join(", ")
        ));
    }
    if let Include::Only(ports) = &capture.include_inbound_ports {
        let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
        notes.push(format!(
            "only these ports are captured inbound, all others are outside mutual TLS: {}",
            ports.join(", ")
        ));
    }
    (notes, Some(capture.clone()))
}

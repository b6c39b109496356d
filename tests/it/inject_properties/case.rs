//! One pod through the injector, and through a strict RFC 6902 engine.

use std::fmt;

use json_patch::PatchOperation;
use malha::inject::{
    Answer, Call, DenyReason, Entry, Injector, PodError, Reason, SkipReason, Verdict, WarningCode,
};
use serde_json::Value;

use super::strict;

pub(crate) type Inject = Box<dyn Fn(&[u8], &Call<'_>) -> Result<Answer, PodError> + Send + Sync>;

pub(crate) type Uninject = Box<dyn Fn(Value) -> Result<Value, String> + Send + Sync>;

/// The injector under test. A closure, so that the checks can also be shown injectors that are broken on purpose.
pub(crate) struct Subject {
    pub(crate) name: &'static str,
    pub(crate) inject: Inject,
    pub(crate) uninject: Uninject,
}

impl Subject {
    pub(crate) fn new(name: &'static str, injector: Injector) -> Self {
        Self {
            name,
            inject: Box::new(move |pod, call| injector.inject(pod, call)),
            uninject: Box::new(super::uninjected),
        }
    }
}

/// What a call says besides the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Setup {
    pub(crate) entry: Entry,
    pub(crate) namespace: &'static str,
    pub(crate) oldest_kubelet: Option<u32>,
}

/// The usual call.
pub(crate) const USUAL: Setup = Setup {
    entry: Entry::Namespace,
    namespace: "shop",
    oldest_kubelet: Some(34),
};

/// The input pod, what the injector did with it, and what came of it.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) setup: Setup,
    pub(crate) before: Value,
    pub(crate) outcome: Outcome,
    pub(crate) warnings: Vec<(WarningCode, String)>,
    /// The pod after the patch; the input where there is none.
    pub(crate) after: Value,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Patched { reason: Reason, json: String },
    Skipped(SkipReason),
    Denied { reason: DenyReason, message: String },
}

impl Case {
    /// Runs one pod. `Err` says what P1 says: the patch is not one, or does not apply.
    pub(crate) fn run(subject: &Subject, setup: Setup, before: Value) -> Result<Self, String> {
        let call = Call {
            entry: setup.entry,
            namespace: setup.namespace,
            oldest_kubelet: setup.oldest_kubelet,
        };
        let bytes = before.to_string().into_bytes();
        let answer = (subject.inject)(&bytes, &call)
            .map_err(|fault| format!("the pod was not read: {fault}"))?;
        let warnings = answer
            .warnings
            .into_iter()
            .map(|warning| (warning.code, warning.text))
            .collect();
        let mut after = before.clone();
        let outcome = match answer.verdict {
            Verdict::Skip(reason) => Outcome::Skipped(reason),
            Verdict::Deny(denial) => Outcome::Denied {
                reason: denial.reason,
                message: denial.message,
            },
            Verdict::Patch(patch) => {
                let json = String::from_utf8(patch.json)
                    .map_err(|fault| format!("the patch is not text: {fault}"))?;
                after = apply(&before, &json)?;
                Outcome::Patched {
                    reason: patch.reason,
                    json,
                }
            }
        };
        Ok(Self {
            setup,
            before,
            outcome,
            warnings,
            after,
        })
    }

    pub(crate) fn is_patched(&self) -> bool {
        matches!(self.outcome, Outcome::Patched { .. })
    }

    pub(crate) fn warned(&self, code: WarningCode) -> bool {
        self.warnings.iter().any(|(warned, _)| *warned == code)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?}", self.setup)?;
        writeln!(f, "pod: {}", self.before)?;
        match &self.outcome {
            Outcome::Patched { json, .. } => writeln!(f, "patch: {json}")?,
            other => writeln!(f, "{other:?}")?,
        }
        for (code, text) in &self.warnings {
            writeln!(f, "warning {code}: {text}")?;
        }
        Ok(())
    }
}

/// Applies a patch as strictly as RFC 6902 allows: the shape of each operation and pointer first, then json-patch,
/// which refuses missing parents and positions outside a list.
pub(crate) fn apply(document: &Value, json: &str) -> Result<Value, String> {
    let operations = strict::parse(json)?;
    let Value::Array(operations) = &operations else {
        return Err("the patch is not a list".into());
    };
    for operation in operations {
        well_formed(operation).map_err(|fault| format!("{fault}: {operation}"))?;
    }
    let operations: Vec<PatchOperation> =
        serde_json::from_str(json).map_err(|fault| format!("not a JSON Patch: {fault}"))?;
    let before = document;
    let mut after = before.clone();
    json_patch::patch(&mut after, &operations)
        .map_err(|fault| format!("does not apply: {fault}"))?;
    if *before == after {
        return Err("a patch that changes nothing is sent as none".into());
    }
    Ok(after)
}

fn well_formed(operation: &Value) -> Result<(), &'static str> {
    let fields = operation
        .as_object()
        .ok_or("an operation is not an object")?;
    let members: &[&str] = match fields.get("op").and_then(Value::as_str) {
        Some("add" | "replace") => &["op", "path", "value"],
        Some("remove") => &["op", "path"],
        Some("move") => &["op", "path", "from"],
        Some("test") => return Err("a `test` could only turn a fault of ours into a refusal"),
        _ => return Err("only add, replace, remove and move are needed"),
    };
    if fields.len() != members.len() || members.iter().any(|member| !fields.contains_key(*member)) {
        return Err("other members than the operation has");
    }
    ["path", "from"]
        .into_iter()
        .filter_map(|member| fields.get(member))
        .try_for_each(pointer)
}

fn pointer(text: &Value) -> Result<(), &'static str> {
    let path = text.as_str().ok_or("a pointer is not text")?;
    if !path.starts_with('/') {
        return Err("a pointer below the root starts with /");
    }
    let escapes_well = path
        .split('~')
        .skip(1)
        .all(|after| after.starts_with('0') || after.starts_with('1'));
    if !escapes_well {
        return Err("a ~ that is neither ~0 nor ~1");
    }
    Ok(())
}

//! What the author of a workload is told when it is applied: whether its pods will be injected, and if not, why.
//!
//! A pod's warnings reach only the controller that creates it; the author of a Deployment never sees them.

use super::{
    Injector, NamespaceFacts, PodError, Reason, Verdict, Warning, WarningCode, annotations,
    settings::Redirect,
    workload::{self, Template},
};
use serde_json::Value;

const POD_SECURITY: &str = "pod-security.kubernetes.io/enforce";

/// Advice about one workload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Advice {
    /// What happens to its pods; `None` if the object has no pod template.
    pub reason: Option<Reason>,
    /// Lines of at most 120 characters, each beginning with its code.
    pub warnings: Vec<String>,
}

/// Advises about a workload, given as raw JSON, in this namespace.
///
/// # Errors
/// When the bytes are not one JSON value.
pub fn advise(
    injector: &Injector,
    object: &[u8],
    namespace: &NamespaceFacts,
    oldest_kubelet: Option<u32>,
) -> Result<Advice, PodError> {
    let document: Value = serde_json::from_slice(object)?;
    let templates = workload::templates(&document);
    let Some((template, pod)) = templates
        .first()
        .and_then(|template| Some((template, template.pod(&document)?)))
    else {
        return Ok(Advice::default());
    };
    let owner = template.owner();
    let answer = injector.rehearse(
        pod.to_string().as_bytes(),
        namespace,
        oldest_kubelet,
        owner.as_ref(),
    )?;
    let mut warnings: Vec<String> = verdict_line(&answer.verdict, template, pod)
        .into_iter()
        .collect();
    warnings.extend(answer.warnings.into_iter().map(|warning| warning.text));
    if matches!(answer.verdict, Verdict::Patch(_)) {
        warnings.extend(pod_security(injector, namespace).map(|warning| warning.text));
    }
    Ok(Advice {
        reason: Some(answer.verdict.reason()),
        warnings,
    })
}

/// Nothing for pods that are injected, nor for those that nobody asked to be: a warning is for what may surprise.
fn verdict_line(verdict: &Verdict, template: &Template, pod: &Value) -> Option<String> {
    let reason = verdict.reason();
    let kind = &template.kind;
    match verdict {
        Verdict::Patch(_) => None,
        Verdict::Skip(_) if reason == Reason::NotSelected && !asks_for_something(pod) => None,
        Verdict::Skip(_) => {
            let fix = reason.fix().unwrap_or("nothing needs to be done");
            Some(Warning::line(
                reason.as_str(),
                format_args!("pods of this {kind} get no sidecar: {fix}"),
            ))
        }
        Verdict::Deny(denial) => Some(Warning::line(
            reason.as_str(),
            format_args!("pods will be refused: {}", denial.message),
        )),
    }
}

/// A label or annotation that we read.
fn asks_for_something(pod: &Value) -> bool {
    ["labels", "annotations"].iter().any(|map| {
        let map = pod
            .get("metadata")
            .and_then(|metadata| metadata.get(map)?.as_object());
        map.is_some_and(|map| {
            map.keys()
                .any(|key| annotations::is_read(key) || key == super::select::REVISION)
        })
    })
}

/// Whether the namespace's Pod Security level will refuse a pod that is injected here: both levels above `privileged`
/// forbid `NET_ADMIN`. The API server's own refusal is exact and knows the exemptions; this comes earlier.
pub fn pod_security(injector: &Injector, namespace: &NamespaceFacts) -> Option<Warning> {
    let level = namespace.labels.get(POD_SECURITY)?;
    let forbids = level == "baseline" || level == "restricted";
    (forbids && injector.settings.redirect == Redirect::Init).then(|| {
        Warning::new(
            WarningCode::PodSecurityForbidsInit,
            format_args!(
                "level {level} of this namespace forbids NET_ADMIN, which malha-init needs"
            ),
        )
    })
}

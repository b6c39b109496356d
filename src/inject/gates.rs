//! The questions that a pod must pass, one after the other, before it is patched.
//!
//! The decision asks them in order and stops at the first that fails; `malha explain` asks the same ones and shows what
//! each looked at.

use super::{
    Call, Denial, Verdict,
    annotations::shown,
    capture::OUR_PORTS,
    lax::Slot,
    ours,
    pod::{Container, PodView, SecurityContext},
    reason::{DenyReason, SkipReason},
    select,
};
use crate::redirect::PROXY_GID;

/// Sidecars of other meshes.
const FOREIGN: [&str; 2] = ["istio-proxy", "linkerd-proxy"];
const OS_LABEL: &str = "kubernetes.io/os";

/// A pod on its way.
pub(super) struct Candidate<'c, 'a> {
    pub(super) pod: &'c PodView<'a>,
    pub(super) call: &'c Call<'c>,
}

/// One question.
pub(super) struct Gate {
    /// Its row in the table of selection.
    pub(super) row: u8,
    /// What a pod must be to pass.
    pub(super) question: &'static str,
    /// The answer; `Err` stops the pod.
    pub(super) ask: fn(&Candidate<'_, '_>) -> Result<(), Verdict>,
    /// What it looked at.
    pub(super) saw: fn(&Candidate<'_, '_>) -> String,
}

/// Before the containers of ours are looked for. Rows 1 to 5 hold in the selectors already; they are asked again
/// because other callers have none.
///
/// The first [`BEFORE_SELECTION`] come before the table's rows about labels.
pub(super) const FIRST: [Gate; 9] = [
    Gate {
        row: 1,
        question: "the namespace is none of the cluster's own",
        ask: |c| {
            skip_if(
                select::is_protected(c.call.namespace),
                SkipReason::ProtectedNamespace,
            )
        },
        saw: |c| format!("namespace {}", shown(c.call.namespace)),
    },
    Gate {
        row: 2,
        question: "the pod has a network of its own",
        ask: |c| skip_if(on_host_network(c.pod), SkipReason::HostNetwork),
        saw: |c| format!("spec.hostNetwork: {}", on_host_network(c.pod)),
    },
    Gate {
        row: 3,
        question: "the pod is no mirror of a static pod",
        ask: |c| skip_if(c.pod.has_annotation(select::MIRROR), SkipReason::MirrorPod),
        saw: |c| {
            presence_of(
                "annotation",
                select::MIRROR,
                c.pod.annotation(select::MIRROR),
            )
        },
    },
    Gate {
        row: 5,
        question: "the pod's label does not opt out",
        ask: |c| {
            skip_if(
                c.pod.label(select::INJECT) == Some("false"),
                SkipReason::OptedOutByLabel,
            )
        },
        saw: |c| presence_of("label", select::INJECT, c.pod.label(select::INJECT)),
    },
    Gate {
        row: 13,
        question: "the pod has containers that can be read",
        ask: |c| skip_if(!is_readable(c.pod), SkipReason::InvalidPod),
        saw: |c| {
            format!(
                "spec.containers: {}",
                names_of(c.pod.containers().iter().filter_map(Slot::present))
            )
        },
    },
    Gate {
        row: 14,
        question: "the pod runs on Linux",
        ask: |c| skip_if(is_windows(c.pod), SkipReason::WindowsPod),
        saw: |c| {
            format!(
                "spec.os.name: {}, nodeSelector: {}",
                or_absent(os_name(c.pod)),
                or_absent(os_selected(c.pod))
            )
        },
    },
    Gate {
        row: 15,
        question: "no other mesh has its sidecar in the pod",
        ask: |c| skip_if(foreign(c.pod).is_some(), SkipReason::ForeignSidecar),
        saw: |c| format!("containers: {}", names_of(c.pod.all_containers())),
    },
    Gate {
        row: 16,
        question: "the pod's label is true or false",
        ask: |c| match c.pod.label(select::INJECT) {
            None | Some("true" | "false") => Ok(()),
            Some(other) => Err(bad_inject_value("label", other)),
        },
        saw: |c| presence_of("label", select::INJECT, c.pod.label(select::INJECT)),
    },
    Gate {
        row: 17,
        question: "the pod's annotation does not opt out",
        ask: |c| match (
            c.pod.label(select::INJECT),
            c.pod.annotation(select::INJECT),
        ) {
            (Some(_), _) | (None, None | Some("true")) => Ok(()),
            (None, Some("false")) => Err(Verdict::Skip(SkipReason::OptedOutByAnnotation)),
            (None, Some(other)) => Err(bad_inject_value("annotation", other)),
        },
        saw: |c| {
            presence_of(
                "annotation",
                select::INJECT,
                c.pod.annotation(select::INJECT),
            )
        },
    },
];

/// Rows 1 to 3.
pub(super) const BEFORE_SELECTION: usize = 3;

/// After the annotations are read.
pub(super) const LAST: [Gate; 2] = [
    Gate {
        row: 21,
        question: "no process of the application's has the proxy's group",
        ask: |c| proxy_gid_taken(c.pod).map_or(Ok(()), |denial| Err(Verdict::Deny(denial))),
        saw: |_| format!("runAsGroup of the pod and its containers, against {PROXY_GID}"),
    },
    Gate {
        row: 22,
        question: "no port of the application's is the sidecar's",
        ask: |c| port_taken(c.pod).map_or(Ok(()), |denial| Err(Verdict::Deny(denial))),
        saw: |_| format!("container ports, against {OUR_PORTS:?}"),
    },
];

/// Asks each gate in turn.
///
/// # Errors
/// The answer of the first that fails.
pub(super) fn pass(gates: &[Gate], candidate: &Candidate<'_, '_>) -> Result<(), Verdict> {
    gates.iter().try_for_each(|gate| (gate.ask)(candidate))
}

fn skip_if(condition: bool, reason: SkipReason) -> Result<(), Verdict> {
    if condition {
        Err(Verdict::Skip(reason))
    } else {
        Ok(())
    }
}

fn on_host_network(pod: &PodView<'_>) -> bool {
    pod.spec
        .present()
        .is_some_and(|spec| spec.host_network.present() == Some(&true))
}

/// At least one container has a name, and everything that we would write under is of a pod's types.
fn is_readable(pod: &PodView<'_>) -> bool {
    let mut containers = pod.containers().iter().filter_map(Slot::present);
    !pod.is_unwritable() && containers.any(|container| container.name().is_some())
}

fn is_windows(pod: &PodView<'_>) -> bool {
    os_name(pod) == Some("windows") || os_selected(pod) == Some("windows")
}

fn os_name<'p>(pod: &'p PodView<'_>) -> Option<&'p str> {
    pod.spec.present()?.os.present()?.name.text()
}

fn os_selected<'p>(pod: &'p PodView<'_>) -> Option<&'p str> {
    pod.spec
        .present()?
        .node_selector
        .present()?
        .find(OS_LABEL)?
        .text()
}

fn foreign<'p>(pod: &'p PodView<'_>) -> Option<&'p str> {
    pod.all_containers()
        .filter_map(Container::name)
        .find(|name| FOREIGN.contains(name))
}

fn bad_inject_value(kind: &str, value: &str) -> Verdict {
    Verdict::Deny(Denial {
        reason: DenyReason::InvalidInjectValue,
        message: format!(
            "{kind} {} is {}; allowed: true or false",
            select::INJECT,
            shown(value)
        ),
    })
}

/// A process with the proxy's group would not be redirected and so would speak past mutual TLS.
fn proxy_gid_taken(pod: &PodView<'_>) -> Option<Denial> {
    let has_it = |context: &Slot<SecurityContext<'_>>| {
        context
            .present()
            .and_then(|context| context.run_as_group.present())
            == Some(&i64::from(PROXY_GID))
    };
    let place = if pod
        .spec
        .present()
        .is_some_and(|spec| has_it(&spec.security_context))
    {
        "the pod".to_owned()
    } else {
        let mut theirs = pod
            .all_containers()
            .filter(|container| !ours::is_ours(container));
        let container = theirs.find(|container| has_it(&container.security_context))?;
        format!("container {}", shown(container.name().unwrap_or_default()))
    };
    Some(Denial {
        reason: DenyReason::AppUsesProxyGid,
        message: format!(
            "securityContext.runAsGroup of {place} is {PROXY_GID}, the sidecar's own, and would bypass mutual TLS; choose another group"
        ),
    })
}

fn port_taken(pod: &PodView<'_>) -> Option<Denial> {
    let theirs = pod
        .all_containers()
        .filter(|container| !ours::is_ours(container));
    let mut ports =
        theirs.flat_map(|container| container.ports().map(move |port| (container, port)));
    let (container, port) = ports.find_map(|(container, port)| {
        let number = u16::try_from(*port.number.present()?).ok()?;
        OUR_PORTS.contains(&number).then_some((container, number))
    })?;
    Some(Denial {
        reason: DenyReason::PortConflict,
        message: format!(
            "container {} has port {port}, which is the sidecar's; the sidecar needs 15001, 15006, 15020, 15021 and 15090",
            shown(container.name().unwrap_or_default())
        ),
    })
}

fn names_of<'r, 'a: 'r>(containers: impl Iterator<Item = &'r Container<'a>>) -> String {
    let names: Vec<_> = containers
        .filter_map(Container::name)
        .map(|name| name.escape_debug().to_string())
        .collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

fn presence_of(kind: &str, key: &str, value: Option<&str>) -> String {
    format!("{kind} {key}: {}", or_absent(value))
}

fn or_absent(value: Option<&str>) -> String {
    value.map_or_else(|| "absent".to_owned(), shown)
}

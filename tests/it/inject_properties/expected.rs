//! What the injector must decide about a pod, and which handlers it must rewrite: the specification once more, written
//! without a look at the code.

use std::collections::BTreeSet;

use malha::inject::{DenyReason, SkipReason};
use serde_json::Value;

use super::{case::Setup, quantity::nano};
use crate::pods;

pub(crate) const PROXY: &str = "malha-proxy";
pub(crate) const INIT: &str = "malha-init";
pub(crate) const VOLUMES: [&str; 4] = ["malha-run", "malha-token", "malha-ca", "malha-podinfo"];

/// The one decision, or the set of those that the specification leaves open.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    Skip(SkipReason),
    /// Two faults of one row may be told in either order.
    Deny(BTreeSet<DenyReason>),
    Patch,
}

pub(crate) fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

pub(crate) fn annotation<'a>(pod: &'a Value, key: &str) -> Option<&'a str> {
    pod["metadata"]["annotations"][key].as_str()
}

/// Containers of both lists, init containers first.
pub(crate) fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    list(&pod["spec"]["initContainers"]).chain(list(&pod["spec"]["containers"]))
}

/// The table of decisions, for a pod that is not ours yet.
pub(crate) fn decision(pod: &Value, setup: Setup) -> Expected {
    let (meta, spec) = (&pod["metadata"], &pod["spec"]);
    let label = meta["labels"]["sidecar.istio.io/inject"].as_str();
    let named = |name: &str| containers(pod).any(|container| container["name"] == name);
    let deny = |reason| Expected::Deny(BTreeSet::from([reason]));
    if [
        "malha-system",
        "kube-system",
        "kube-public",
        "kube-node-lease",
    ]
    .contains(&setup.namespace)
    {
        return Expected::Skip(SkipReason::ProtectedNamespace);
    }
    if spec["hostNetwork"] == true {
        return Expected::Skip(SkipReason::HostNetwork);
    }
    if annotation(pod, "kubernetes.io/config.mirror").is_some() {
        return Expected::Skip(SkipReason::MirrorPod);
    }
    if label == Some("false") {
        return Expected::Skip(SkipReason::OptedOutByLabel);
    }
    if !list(&spec["containers"]).any(|container| container["name"].is_string()) {
        return Expected::Skip(SkipReason::InvalidPod);
    }
    if spec["os"]["name"] == "windows" || spec["nodeSelector"]["kubernetes.io/os"] == "windows" {
        return Expected::Skip(SkipReason::WindowsPod);
    }
    if named("istio-proxy") || named("linkerd-proxy") {
        return Expected::Skip(SkipReason::ForeignSidecar);
    }
    match (label, annotation(pod, "sidecar.istio.io/inject")) {
        (Some(value), _) if value != "true" => return deny(DenyReason::InvalidInjectValue),
        (None, Some("false")) => return Expected::Skip(SkipReason::OptedOutByAnnotation),
        (None, Some(value)) if value != "true" => return deny(DenyReason::InvalidInjectValue),
        _ => {}
    }
    let our_volume =
        list(&spec["volumes"]).any(|volume| VOLUMES.iter().any(|ours| volume["name"] == *ours));
    if named(PROXY) || named(INIT) || our_volume {
        return deny(DenyReason::NameConflict);
    }
    let faults = annotation_faults(pod);
    if !faults.is_empty() {
        return Expected::Deny(faults);
    }
    let gid = |context: &Value| context["runAsGroup"] == 1337;
    if gid(&spec["securityContext"])
        || containers(pod).any(|container| gid(&container["securityContext"]))
    {
        return deny(DenyReason::AppUsesProxyGid);
    }
    let taken = |port: &Value| {
        pods::OUR_PORTS
            .iter()
            .any(|ours| port["containerPort"] == *ours)
    };
    if containers(pod).any(|container| list(&container["ports"]).any(taken)) {
        return deny(DenyReason::PortConflict);
    }
    Expected::Patch
}

fn annotation_faults(pod: &Value) -> BTreeSet<DenyReason> {
    let mut faults = BTreeSet::new();
    for known in pods::ANNOTATIONS {
        if let Some(value) = annotation(pod, known.key)
            && (known.bad.contains(&value) || value.len() > 4096)
        {
            faults.insert(DenyReason::InvalidAnnotation);
        }
    }
    for (key, value) in pods::REFUSED {
        if annotation(pod, key) == Some(*value) {
            faults.insert(DenyReason::UnsupportedAnnotation);
        }
    }
    for (request, limit) in [
        ("proxyCPU", "proxyCPULimit"),
        ("proxyMemory", "proxyMemoryLimit"),
    ] {
        let given =
            |name: &str| annotation(pod, &format!("sidecar.istio.io/{name}")).and_then(nano);
        if let (Some(request), Some(limit)) = (given(request), given(limit))
            && limit != 0
            && request > limit
        {
            faults.insert(DenyReason::InvalidAnnotation);
        }
    }
    faults
}

/// Whether the proxy is a native sidecar, under the embedded settings (`native: auto`).
pub(crate) fn native(pod: &Value, setup: Setup) -> bool {
    match annotation(pod, "sidecar.istio.io/nativeSidecar") {
        Some(value) => value == "true",
        None => {
            let ends = !matches!(pod["spec"]["restartPolicy"].as_str(), None | Some("Always"));
            let since = if ends { 29 } else { 33 };
            setup.oldest_kubelet.is_none_or(|minor| minor >= since)
        }
    }
}

/// One handler that the kubelet runs, and what must become of it.
#[derive(Debug)]
pub(crate) struct Handler<'a> {
    pub(crate) container: &'a str,
    /// Where it stands in the container, such as `["lifecycle", "preStop"]`.
    pub(crate) place: &'static [&'static str],
    /// The whole probe or hook.
    pub(crate) value: &'a Value,
    pub(crate) fate: Fate,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Rewritten to the agent under this path; the record holds this port.
    Rewritten {
        path: String,
        port: i64,
    },
    Left,
    /// Left, with the warning `ProbePortUnresolved`.
    Unresolved,
    /// Left, with the warning `ProbeHostExternal`.
    External,
}

const PLACES: [(&[&str], &str); 5] = [
    (&["livenessProbe"], "app-health/{}/livez"),
    (&["readinessProbe"], "app-health/{}/readyz"),
    (&["startupProbe"], "app-health/{}/startupz"),
    (&["lifecycle", "postStart"], "app-lifecycle/{}/poststart"),
    (&["lifecycle", "preStop"], "app-lifecycle/{}/prestop"),
];

/// The fate of every handler of the pod's own containers. `patched` tells which init containers come after the proxy,
/// and whether there is one.
pub(crate) fn handlers<'a>(pod: &'a Value, patched: &Value) -> Vec<Handler<'a>> {
    let off = annotation(pod, "sidecar.istio.io/rewriteAppHTTPProbers") == Some("false")
        || !containers(patched).any(|container| container["name"] == PROXY)
        || !containers(patched).any(|container| container["name"] == INIT);
    let after_proxy: BTreeSet<&str> = list(&patched["spec"]["initContainers"])
        .skip_while(|container| container["name"] != PROXY)
        .filter_map(|container| container["name"].as_str())
        .collect();
    let mut found = Vec::new();
    for (init, list_name) in [(true, "initContainers"), (false, "containers")] {
        for container in list(&pod["spec"][list_name]) {
            let Some(name) = container["name"]
                .as_str()
                .filter(|name| *name != PROXY && *name != INIT)
            else {
                continue;
            };
            let reached =
                !init || (container["restartPolicy"] == "Always" && after_proxy.contains(name));
            for (place, path) in PLACES {
                let value = place.iter().fold(container, |inner, step| &inner[*step]);
                if !value.is_object() {
                    continue;
                }
                let fate = if reached && !off {
                    fate(
                        container,
                        value,
                        place[0] == "lifecycle",
                        path.replace("{}", name),
                    )
                } else {
                    Fate::Left
                };
                found.push(Handler {
                    container: name,
                    place,
                    value,
                    fate,
                });
            }
        }
    }
    found
}

fn fate(container: &Value, value: &Value, hook: bool, path: String) -> Fate {
    let kinds: &[&str] = if hook {
        &["httpGet"]
    } else {
        &["httpGet", "tcpSocket", "grpc"]
    };
    let Some(handler) = kinds
        .iter()
        .map(|kind| &value[*kind])
        .find(|handler| handler.is_object())
    else {
        return Fate::Left;
    };
    let host = handler["host"].as_str().unwrap_or("");
    if !["", "127.0.0.1", "localhost", "::1"].contains(&host) {
        return Fate::External;
    }
    let port = match &handler["port"] {
        Value::String(name) => list(&container["ports"])
            .find(|port| port["name"] == **name)
            .and_then(|port| port["containerPort"].as_i64()),
        other => other.as_i64(),
    };
    match port {
        Some(port @ 1..=65535) => Fate::Rewritten {
            path: format!("/{path}"),
            port,
        },
        _ => Fate::Unresolved,
    }
}

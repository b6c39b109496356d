//! Writes the two containers and the four volumes.
//!
//! What does not depend on the pod is serialised once, when the settings are read; a pod costs only what is its own.

use serde_json::json;

use super::{
    annotations::Wishes,
    capture::{AGENT_PORT, ENVOY_METRICS_PORT, STATUS_PORT},
    lax::{write_text, write_text_unexpanded},
    ours,
    resources::{self, Shares},
    settings::{InjectSettings, PullPolicy, Redirect},
};
use crate::redirect::PROXY_GID;

/// Where every container is given the application's API token, unless something is mounted there already.
const SERVICE_ACCOUNT_DIRECTORY: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// An id that owns nothing.
const NOBODY: u32 = 65534;

/// What does not depend on the pod.
#[derive(Debug)]
pub(super) struct Fragments {
    /// Each volume of ours, by name.
    pub(super) volumes: Vec<(&'static str, String)>,
    /// From the command to the environment, and what follows the environment.
    proxy_head: String,
    proxy_tail: String,
    /// The variables between those of a pod's own.
    env: Vec<(&'static str, Variable)>,
    init_head: String,
    init_tail: String,
    init_checks: bool,
}

/// Where a variable's value comes from.
#[derive(Debug)]
enum Variable {
    /// The whole JSON object.
    Fixed(String),
    /// The pod.
    Own(for<'a> fn(&Own<'a>) -> &'a str),
}

/// What a pod's sidecar is told about its own pod: the values of its variables.
#[derive(Debug)]
pub(super) struct Own<'a> {
    /// `MALHA_APP_CONTAINERS`: a JSON list of names.
    pub(super) app_containers: &'a str,
    /// `MALHA_LOG`: levels as JSON.
    pub(super) log: &'a str,
    /// `MALHA_OWNER`: `<apiVersion>/<kind>/<name>`.
    pub(super) owner: &'a str,
    /// `MALHA_PORTS`: a JSON list.
    pub(super) ports: &'a str,
    /// `MALHA_PROBES`.
    pub(super) probes: &'a str,
    /// `MALHA_PROMETHEUS`.
    pub(super) prometheus: &'a str,
    /// `MALHA_RESTORE`.
    pub(super) restore: &'a str,
    /// `MALHA_WORKLOAD`.
    pub(super) workload: &'a str,
}

impl Fragments {
    pub(super) fn new(settings: &InjectSettings) -> Self {
        Self {
            volumes: volumes(settings),
            proxy_head: format!(
                "{},\"command\":[\"malha-agent\"],\"args\":[\"run\"]",
                pull_policy(settings.image.pull_policy)
            ),
            proxy_tail: members(&proxy_constants(settings)),
            env: environment(settings),
            init_head: format!(
                "{},\"command\":[\"malha-init\"]",
                head(ours::INIT, &settings.image.init) + &pull_policy(settings.image.pull_policy)
            ),
            init_tail: members(&init_constants(settings)),
            init_checks: settings.redirect == Redirect::External,
        }
    }

    /// The sidecar.
    pub(super) fn proxy(
        &self,
        wishes: &Wishes<'_>,
        native: bool,
        shares: &Shares,
        own: &Own<'_>,
    ) -> String {
        let mut out = head(ours::PROXY, &wishes.proxy_image);
        out.reserve(4096);
        out.push_str(&self.proxy_head);
        if native {
            out.push_str(",\"restartPolicy\":\"Always\"");
        } else if wishes.hold {
            out.push_str(concat!(
                ",\"lifecycle\":{\"postStart\":{\"exec\":{\"command\":",
                "[\"malha-agent\",\"wait\",\"--timeout\",\"60s\"]}}}"
            ));
        }
        out.push_str(",\"env\":[");
        for (at, (name, variable)) in self.env.iter().enumerate() {
            if at > 0 {
                out.push(',');
            }
            match variable {
                Variable::Fixed(json) => out.push_str(json),
                Variable::Own(value) => out.push_str(&plain(name, value(own))),
            }
        }
        out.push_str("],\"readinessProbe\":");
        out.push_str(&readiness(wishes));
        out.push_str(",\"resources\":");
        resources::write(&shares.proxy, &mut out);
        out.push_str(&self.proxy_tail);
        out
    }

    /// The init container, with its one argument.
    pub(super) fn init(&self, capture: &str, shares: &Shares) -> String {
        let mut out = self.init_head.clone();
        out.push_str(",\"args\":[");
        if self.init_checks {
            out.push_str("\"--check\",");
        }
        write_text(capture, &mut out);
        out.push_str("],\"resources\":");
        resources::write(&shares.init, &mut out);
        out.push_str(&self.init_tail);
        out
    }
}

fn head(name: &str, image: &str) -> String {
    let mut out = String::from("{\"name\":");
    write_text(name, &mut out);
    out.push_str(",\"image\":");
    write_text(image, &mut out);
    out
}

fn pull_policy(policy: PullPolicy) -> String {
    match policy {
        PullPolicy::ByTag => String::new(),
        policy => format!(",\"imagePullPolicy\":\"{policy:?}\""),
    }
}

/// The members of an object, to follow others.
fn members(object: &serde_json::Value) -> String {
    let json = object.to_string();
    json.replacen('{', ",", 1)
}

fn proxy_constants(settings: &InjectSettings) -> serde_json::Value {
    json!({
        "ports": [
            {"name": "http-envoy-prom", "containerPort": ENVOY_METRICS_PORT, "protocol": "TCP"},
            {"name": "malha-status", "containerPort": STATUS_PORT, "protocol": "TCP"},
            {"name": "malha-agent", "containerPort": AGENT_PORT, "protocol": "TCP"},
        ],
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": {"drop": ["ALL"]},
            "privileged": false,
            "readOnlyRootFilesystem": true,
            "runAsGroup": PROXY_GID,
            "runAsNonRoot": true,
            "runAsUser": settings.proxy.uid,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "startupProbe": {
            "httpGet": {"path": "/healthz/ready", "port": STATUS_PORT, "scheme": "HTTP"},
            "failureThreshold": 600,
            "periodSeconds": 1,
            "timeoutSeconds": 3,
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": ours::RUN_VOLUME, "mountPath": "/run/malha"},
            {"name": ours::TOKEN_VOLUME, "mountPath": SERVICE_ACCOUNT_DIRECTORY, "readOnly": true},
            {"name": ours::CA_VOLUME, "mountPath": "/etc/malha/ca", "readOnly": true},
            {"name": ours::PODINFO_VOLUME, "mountPath": "/etc/malha/podinfo", "readOnly": true},
        ],
    })
}

fn init_constants(settings: &InjectSettings) -> serde_json::Value {
    // A process that is not root gets the added capability through a file capability of the program itself.
    let capabilities = match settings.redirect {
        Redirect::Init => json!({"add": ["NET_ADMIN"], "drop": ["ALL"]}),
        Redirect::External => json!({"drop": ["ALL"]}),
    };
    json!({
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": capabilities,
            "privileged": false,
            "readOnlyRootFilesystem": true,
            "runAsGroup": NOBODY,
            "runAsNonRoot": true,
            "runAsUser": NOBODY,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": ours::PODINFO_VOLUME, "mountPath": SERVICE_ACCOUNT_DIRECTORY, "readOnly": true},
        ],
    })
}

fn volumes(settings: &InjectSettings) -> Vec<(&'static str, String)> {
    let trust = &settings.trust_bundle;
    let ca = match trust.cluster_trust_bundle.as_str() {
        "" => json!({"name": ours::CA_VOLUME, "configMap": {
            "name": trust.config_map, "items": [{"key": "root-cert.pem", "path": "root-cert.pem"}], "optional": false
        }}),
        bundle => json!({"name": ours::CA_VOLUME, "projected": {"sources": [
            {"clusterTrustBundle": {"name": bundle, "path": "root-cert.pem"}}
        ]}}),
    };
    let token = json!({"name": ours::TOKEN_VOLUME, "projected": {"defaultMode": 0o644, "sources": [
        {"serviceAccountToken": {
            "audience": settings.token.audience,
            "expirationSeconds": settings.token.expiration_seconds,
            "path": "token",
        }}
    ]}});
    let podinfo = json!({"name": ours::PODINFO_VOLUME, "downwardAPI": {"items": [
        {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
        {"path": "annotations", "fieldRef": {"fieldPath": "metadata.annotations"}},
    ]}});
    let run =
        json!({"name": ours::RUN_VOLUME, "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}});
    let all = [run, token, ca, podinfo];
    ours::VOLUMES
        .into_iter()
        .zip(all.map(|volume| volume.to_string()))
        .collect()
}

/// Sorted by name, so that equal pods get equal bytes whoever reads the list.
fn environment(settings: &InjectSettings) -> Vec<(&'static str, Variable)> {
    let field = |name: &'static str, path: &str| {
        let json = json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
        (name, Variable::Fixed(json.to_string()))
    };
    let fixed = |name: &'static str, value: &str| (name, Variable::Fixed(plain(name, value)));
    let cpu =
        json!({"name": "CPU_LIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}});
    vec![
        ("CPU_LIMIT", Variable::Fixed(cpu.to_string())),
        field("HOST_IP", "status.hostIP"),
        (
            "MALHA_APP_CONTAINERS",
            Variable::Own(|own| own.app_containers),
        ),
        fixed("MALHA_CLUSTER", &settings.cluster),
        fixed("MALHA_CONTROL_PLANE", &settings.control_plane),
        ("MALHA_LOG", Variable::Own(|own| own.log)),
        fixed("MALHA_NETWORK", &settings.network),
        ("MALHA_OWNER", Variable::Own(|own| own.owner)),
        ("MALHA_PORTS", Variable::Own(|own| own.ports)),
        (ours::PROBES_VARIABLE, Variable::Own(|own| own.probes)),
        (
            ours::PROMETHEUS_VARIABLE,
            Variable::Own(|own| own.prometheus),
        ),
        (ours::RESTORE_VARIABLE, Variable::Own(|own| own.restore)),
        fixed("MALHA_REVISION", &settings.revision),
        fixed("MALHA_TRUST_DOMAIN", &settings.trust_domain),
        ("MALHA_WORKLOAD", Variable::Own(|own| own.workload)),
        field("NODE_NAME", "spec.nodeName"),
        field("POD_IPS", "status.podIPs"),
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
    ]
}

/// A variable with a value. The kubelet reads `$$` as `$`, and would expand `$(NAME)`; JSON values come with their `$`
/// escaped and are not touched here.
fn plain(name: &str, value: &str) -> String {
    let mut out = String::from("{\"name\":");
    write_text(name, &mut out);
    out.push_str(",\"value\":");
    write_text(&value.replace('$', "$$"), &mut out);
    out.push('}');
    out
}

fn readiness(wishes: &Wishes<'_>) -> String {
    json!({
        "httpGet": {"path": "/healthz/ready", "port": STATUS_PORT, "scheme": "HTTP"},
        "failureThreshold": wishes.failure_threshold,
        "initialDelaySeconds": wishes.initial_delay_seconds,
        "periodSeconds": wishes.period_seconds,
        "timeoutSeconds": 3,
    })
    .to_string()
}

/// `MALHA_LOG`.
pub(super) fn log_levels(wishes: &Wishes<'_>) -> String {
    let mut out = String::from("{\"agent\":");
    write_text_unexpanded(&wishes.agent_log_level, &mut out);
    if !wishes.component_log_level.is_empty() {
        out.push_str(",\"components\":");
        write_text_unexpanded(&wishes.component_log_level, &mut out);
    }
    out.push_str(",\"envoy\":");
    write_text_unexpanded(&wishes.log_level, &mut out);
    out.push('}');
    out
}

//! Pod Security's level `restricted`, as far as a pod's JSON decides it
//! (<https://kubernetes.io/docs/concepts/security/pod-security-standards/>).

use serde_json::Value;

/// What keeps a pod from the level; empty when nothing does. `without` is a container that is not looked at.
pub(crate) fn violations(pod: &Value, without: Option<&str>) -> Vec<String> {
    let spec = &pod["spec"];
    let mut found = Vec::new();
    for field in ["hostNetwork", "hostPID", "hostIPC"] {
        if spec[field] == true {
            found.push(format!("spec.{field}"));
        }
    }
    for volume in list(&spec["volumes"]) {
        let allowed = [
            "configMap",
            "csi",
            "downwardAPI",
            "emptyDir",
            "ephemeral",
            "persistentVolumeClaim",
            "projected",
            "secret",
        ];
        let fields = volume.as_object().into_iter().flatten();
        for (kind, _) in fields.filter(|(key, value)| *key != "name" && !value.is_null()) {
            if !allowed.contains(&kind.as_str()) {
                found.push(format!("volume {} is a {kind}", volume["name"]));
            }
        }
    }
    let context = &spec["securityContext"];
    if context["runAsUser"] == 0 {
        found.push("spec.securityContext.runAsUser".into());
    }
    if list(&context["sysctls"]).next().is_some() {
        found.push("spec.securityContext.sysctls".into());
    }
    for name in ["containers", "initContainers", "ephemeralContainers"] {
        for container in list(&spec[name]) {
            if without.is_none() || container["name"].as_str() != without {
                container_violations(container, context, &mut found);
            }
        }
    }
    found
}

fn container_violations(container: &Value, pod: &Value, found: &mut Vec<String>) {
    let name = &container["name"];
    let own = &container["securityContext"];
    let mut fault = |what: &str| found.push(format!("container {name}: {what}"));
    let either = |field: &str| {
        if own[field].is_null() {
            &pod[field]
        } else {
            &own[field]
        }
    };
    if own["privileged"] == true {
        fault("privileged");
    }
    if own["allowPrivilegeEscalation"] != false {
        fault("allowPrivilegeEscalation is not false");
    }
    if either("runAsNonRoot") != true {
        fault("runAsNonRoot is not true");
    }
    if either("runAsUser") == 0 {
        fault("runAsUser is 0");
    }
    if !matches!(
        either("seccompProfile")["type"].as_str(),
        Some("RuntimeDefault" | "Localhost")
    ) {
        fault("no seccompProfile");
    }
    if !list(&own["capabilities"]["drop"]).any(|dropped| dropped == "ALL") {
        fault("does not drop ALL");
    }
    if list(&own["capabilities"]["add"]).any(|added| added != "NET_BIND_SERVICE") {
        fault("adds capabilities");
    }
    if !matches!(own["procMount"].as_str(), None | Some("Default" | "")) {
        fault("procMount");
    }
    if list(&container["ports"]).any(|port| port["hostPort"].as_i64().unwrap_or(0) != 0) {
        fault("hostPort");
    }
    for (holder, handler) in [
        (container, "livenessProbe"),
        (container, "readinessProbe"),
        (container, "startupProbe"),
        (&container["lifecycle"], "postStart"),
        (&container["lifecycle"], "preStop"),
    ] {
        for kind in ["httpGet", "tcpSocket"] {
            if !matches!(holder[handler][kind]["host"].as_str(), None | Some("")) {
                fault("a handler names a host");
            }
        }
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

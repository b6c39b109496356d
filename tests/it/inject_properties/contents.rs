//! What stands in the containers, volumes and annotations that are added: the table of the specification, row by row.

use malha::inject::DenyReason;
use serde_json::{Value, json};

use super::{
    SUBJECT, answered,
    case::{Case, Outcome, Setup, USUAL},
    expected::{INIT, PROXY, containers, list},
};

fn pod(annotations: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "annotations": annotations},
        "spec": {"containers": [{"name": "app", "image": "a:1", "resources": {"requests": {"cpu": "1"}}}]},
    })
}

fn injected(pod: Value) -> Case {
    let case = answered(&SUBJECT, USUAL, pod).expect("readable");
    assert!(case.is_patched(), "{case}");
    case
}

fn ours<'a>(case: &'a Case, name: &str) -> &'a Value {
    containers(&case.after)
        .find(|container| container["name"] == name)
        .expect("it was injected")
}

fn variable<'a>(case: &'a Case, name: &str) -> &'a Value {
    list(&ours(case, PROXY)["env"])
        .find(|variable| variable["name"] == name)
        .unwrap_or_else(|| panic!("no variable {name}: {case}"))
}

/// The capture settings, as `malha-init` reads them.
fn capture(case: &Case) -> Value {
    let arguments = ours(case, INIT)["args"].as_array().expect("arguments");
    assert_eq!(arguments.len(), 1, "one JSON argument: {case}");
    serde_json::from_str(arguments[0].as_str().expect("text")).expect("JSON")
}

#[test]
fn each_of_the_four_amounts_is_merged_by_itself() {
    type Row = (
        &'static [(&'static str, &'static str)],
        [Option<&'static str>; 4],
    );
    // requests cpu, memory; limits cpu, memory
    let rows: &[Row] = &[
        (&[], [Some("100m"), Some("128Mi"), Some("2"), Some("1Gi")]),
        (
            &[("proxyCPU", "500m")],
            [Some("500m"), Some("128Mi"), Some("2"), Some("1Gi")],
        ),
        (
            &[("proxyCPU", "3")],
            [Some("3"), Some("128Mi"), Some("3"), Some("1Gi")],
        ),
        (
            &[("proxyCPULimit", "50m")],
            [Some("50m"), Some("128Mi"), Some("50m"), Some("1Gi")],
        ),
        (
            &[("proxyCPULimit", "4")],
            [Some("100m"), Some("128Mi"), Some("4"), Some("1Gi")],
        ),
        (
            &[("proxyMemory", "2Gi")],
            [Some("100m"), Some("2Gi"), Some("2"), Some("2Gi")],
        ),
        (
            &[("proxyMemoryLimit", "64Mi")],
            [Some("100m"), Some("64Mi"), Some("2"), Some("64Mi")],
        ),
        (
            &[("proxyMemoryLimit", "0")],
            [Some("100m"), Some("128Mi"), Some("2"), None],
        ),
        (
            &[("proxyCPU", "5"), ("proxyCPULimit", "0")],
            [Some("5"), Some("128Mi"), None, Some("1Gi")],
        ),
        (
            &[("proxyCPU", "1"), ("proxyCPULimit", "1000m")],
            [Some("1"), Some("128Mi"), Some("1000m"), Some("1Gi")],
        ),
    ];
    for (given, wanted) in rows {
        let annotations: Value = given
            .iter()
            .map(|(name, value)| (format!("sidecar.istio.io/{name}"), json!(value)))
            .collect::<serde_json::Map<_, _>>()
            .into();
        let case = injected(pod(annotations));
        let resources = &ours(&case, PROXY)["resources"];
        let found = [
            ("requests", "cpu"),
            ("requests", "memory"),
            ("limits", "cpu"),
            ("limits", "memory"),
        ]
        .map(|(side, resource)| resources[side][resource].as_str());
        assert_eq!(found, *wanted, "{given:?}");
    }
}

#[test]
fn amounts_that_contradict_each_other_are_refused() {
    for (request, limit) in [
        ("proxyCPU", "proxyCPULimit"),
        ("proxyMemory", "proxyMemoryLimit"),
    ] {
        let (request, limit) = (
            format!("sidecar.istio.io/{request}"),
            format!("sidecar.istio.io/{limit}"),
        );
        let case =
            answered(&SUBJECT, USUAL, pod(json!({request: "2", limit: "1"}))).expect("readable");
        let Outcome::Denied {
            reason: DenyReason::InvalidAnnotation,
            ..
        } = case.outcome
        else {
            panic!("{case}");
        };
    }
}

#[test]
fn a_guaranteed_pod_gets_a_pair_of_its_own() {
    let mut pod = pod(json!({}));
    pod["spec"]["containers"][0]["resources"] = json!({"limits": {"cpu": "1", "memory": "1Gi"}});
    let case = injected(pod);
    let pair = json!({"cpu": "500m", "memory": "256Mi"});
    assert_eq!(
        ours(&case, PROXY)["resources"],
        json!({"requests": pair, "limits": pair})
    );
}

#[test]
fn the_sidecar_is_probed_where_it_says_that_it_is_ready() {
    let case = injected(pod(json!({
        "readiness.status.sidecar.istio.io/initialDelaySeconds": "7", "readiness.status.sidecar.istio.io/periodSeconds": "8",
        "readiness.status.sidecar.istio.io/failureThreshold": "9",
    })));
    let usual = injected(pod(json!({})));
    for case in [&case, &usual] {
        let proxy = ours(case, PROXY);
        assert!(proxy["livenessProbe"].is_null(), "{case}");
        for probe in ["startupProbe", "readinessProbe"] {
            assert_eq!(proxy[probe]["httpGet"]["path"], "/healthz/ready");
            assert_eq!(proxy[probe]["httpGet"]["port"], 15021);
            assert_eq!(proxy[probe]["timeoutSeconds"], 3);
        }
        assert_eq!(
            (
                &proxy["startupProbe"]["periodSeconds"],
                &proxy["startupProbe"]["failureThreshold"]
            ),
            (&json!(1), &json!(600))
        );
        let mut ports: Vec<(i64, &str)> = list(&proxy["ports"])
            .map(|port| {
                (
                    port["containerPort"].as_i64().expect("a number"),
                    port["name"].as_str().expect("a name"),
                )
            })
            .collect();
        ports.sort_unstable();
        assert_eq!(
            ports,
            [
                (15020, "malha-agent"),
                (15021, "malha-status"),
                (15090, "http-envoy-prom")
            ]
        );
    }
    let readiness = |case: &Case, field: &str| {
        ours(case, PROXY)["readinessProbe"][field]
            .as_i64()
            .unwrap_or(0)
    };
    let of = |case: &Case| {
        ["initialDelaySeconds", "periodSeconds", "failureThreshold"]
            .map(|field| readiness(case, field))
    };
    assert_eq!(of(&case), [7, 8, 9]);
    assert_eq!(of(&usual), [0, 15, 4]);
}

#[test]
fn the_sidecar_is_told_who_it_is() {
    let mut pod = pod(json!({}));
    pod["metadata"] = json!({
        "generateName": "web-6d4cf56db6-", "labels": {"pod-template-hash": "6d4cf56db6"},
        "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-6d4cf56db6", "uid": "u", "controller": true}],
    });
    pod["spec"]["containers"][0]["ports"] = json!([{"containerPort": 8080, "name": "http"}]);
    let case = injected(pod);
    for (name, field) in [
        ("POD_NAME", "metadata.name"),
        ("POD_NAMESPACE", "metadata.namespace"),
        ("POD_IPS", "status.podIPs"),
        ("NODE_NAME", "spec.nodeName"),
        ("HOST_IP", "status.hostIP"),
        ("SERVICE_ACCOUNT", "spec.serviceAccountName"),
    ] {
        assert_eq!(
            variable(&case, name)["valueFrom"]["fieldRef"]["fieldPath"],
            field,
            "{name}"
        );
    }
    assert_eq!(
        variable(&case, "CPU_LIMIT")["valueFrom"]["resourceFieldRef"]["resource"],
        "limits.cpu"
    );
    let text = |name: &str| {
        variable(&case, name)["value"]
            .as_str()
            .expect("text")
            .to_owned()
    };
    assert_eq!(text("MALHA_TRUST_DOMAIN"), "cluster.local");
    assert_eq!(text("MALHA_REVISION"), "default");
    assert_eq!(text("MALHA_CONTROL_PLANE"), "malha.malha-system.svc:15012");
    assert_eq!(text("MALHA_WORKLOAD"), "web");
    assert!(
        text("MALHA_OWNER").ends_with("Deployment/web"),
        "{}",
        text("MALHA_OWNER")
    );
    assert!(text("MALHA_APP_CONTAINERS").contains("app"));
    assert!(text("MALHA_PORTS").contains("8080"));
    for name in [
        "MALHA_CLUSTER",
        "MALHA_NETWORK",
        "MALHA_PROBES",
        "MALHA_PROMETHEUS",
        "MALHA_LOG",
    ] {
        variable(&case, name);
    }
}

#[test]
fn the_apis_token_stays_out_of_ours_and_a_token_for_the_authority_is_there() {
    let case = injected(pod(json!({})));
    let mount = |name: &str| {
        list(&ours(&case, name)["volumeMounts"])
            .find(|mount| mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount")
            .map(|mount| mount["name"].clone())
    };
    assert_eq!(mount(PROXY), Some(json!("malha-token")));
    assert_eq!(mount(INIT), Some(json!("malha-podinfo")));
    let volume = |name: &str| {
        list(&case.after["spec"]["volumes"])
            .find(|volume| volume["name"] == name)
            .expect("a volume of ours")
    };
    assert_eq!(
        volume("malha-run")["emptyDir"],
        json!({"medium": "Memory", "sizeLimit": "16Mi"})
    );
    let token = &volume("malha-token")["projected"];
    assert_eq!(token["defaultMode"], 0o644);
    assert_eq!(
        token["sources"],
        json!([{"serviceAccountToken": {"audience": "malha-ca", "expirationSeconds": 43200, "path": "token"}}])
    );
    let roots = &volume("malha-ca")["configMap"];
    assert_eq!(roots["name"], "malha-ca-root-cert");
    assert_ne!(roots["optional"], true);
    assert!(roots["items"].to_string().contains("root-cert.pem"));
    assert!(volume("malha-podinfo").get("downwardAPI").is_some());
    let run = list(&ours(&case, PROXY)["volumeMounts"])
        .find(|mount| mount["name"] == "malha-run")
        .expect("a mount");
    assert_eq!(run["mountPath"], "/run/malha");
}

#[test]
fn ours_run_with_the_least_that_they_need() {
    let case = injected(pod(json!({})));
    let proxy = &ours(&case, PROXY)["securityContext"];
    for (field, wanted) in [
        ("runAsUser", json!(1337)),
        ("runAsGroup", json!(1337)),
        ("runAsNonRoot", json!(true)),
        ("privileged", json!(false)),
        ("readOnlyRootFilesystem", json!(true)),
        ("allowPrivilegeEscalation", json!(false)),
        ("capabilities", json!({"drop": ["ALL"]})),
        ("seccompProfile", json!({"type": "RuntimeDefault"})),
    ] {
        assert_eq!(proxy[field], wanted, "{field}");
    }
    let init = &ours(&case, INIT)["securityContext"];
    assert_eq!(
        (&init["runAsUser"], &init["runAsGroup"]),
        (&json!(65534), &json!(65534))
    );
    assert_eq!(init["readOnlyRootFilesystem"], true);
    assert!(
        case.after["spec"].get("securityContext").is_none(),
        "nothing pod-wide, no fsGroup: {case}"
    );
}

#[test]
fn capture_is_what_the_annotations_say() {
    let usual = capture(&injected(pod(json!({}))));
    assert_eq!(usual["excludeInboundPorts"], json!([15020, 15021, 15090]));
    assert_eq!(usual["proxyGid"], 1337);
    let key = |name: &str| format!("traffic.sidecar.istio.io/{name}");
    let said = capture(&injected(pod(json!({
        key("includeInboundPorts"): "80,8443", key("excludeInboundPorts"): "9090", key("excludeOutboundPorts"): "53,3306",
        key("includeOutboundPorts"): "5432", key("includeOutboundIPRanges"): "10.0.0.0/8,fd00::/8",
        key("excludeOutboundIPRanges"): "169.254.169.254/32", key("excludeInterfaces"): "net1", "malha.io/exclude-outbound-uids": "1000",
    }))));
    assert_eq!(said["includeInboundPorts"], json!([80, 8443]));
    assert_eq!(
        said["excludeInboundPorts"],
        json!([9090, 15020, 15021, 15090])
    );
    assert_eq!(said["excludeOutboundPorts"], json!([53, 3306]));
    assert_eq!(said["includeOutboundPorts"], json!([5432]));
    assert_eq!(
        said["includeOutboundIPRanges"],
        json!(["10.0.0.0/8", "fd00::/8"])
    );
    assert_eq!(
        said["excludeOutboundIPRanges"],
        json!(["169.254.169.254/32"])
    );
    assert_eq!(said["excludeInterfaces"], json!(["net1"]));
    assert_eq!(said["excludeOutboundUids"], json!([1000]));
}

#[test]
fn what_runs_before_us_is_probed_raw_and_its_ports_are_not_captured() {
    let mut pod = pod(json!({"malha.io/run-before": "vpn"}));
    let probe = json!({"httpGet": {"port": "adm", "path": "/up"}});
    pod["spec"]["initContainers"] = json!([
        {"name": "vpn", "image": "v:1", "restartPolicy": "Always", "ports": [{"name": "adm", "containerPort": 9100}], "startupProbe": probe},
        {"name": "prepare", "image": "p:1"},
    ]);
    let case = injected(pod);
    let names: Vec<&Value> = list(&case.after["spec"]["initContainers"])
        .map(|container| &container["name"])
        .collect();
    assert_eq!(names, ["vpn", INIT, PROXY, "prepare"]);
    assert_eq!(
        case.after["spec"]["initContainers"][0]["startupProbe"],
        probe
    );
    assert_eq!(
        capture(&case)["excludeInboundPorts"],
        json!([9100, 15020, 15021, 15090])
    );
}

#[test]
fn scraping_moves_to_the_agent_unless_it_is_off() {
    let scrape = |key: &str| format!("prometheus.io/{key}");
    let case = injected(pod(
        json!({scrape("scrape"): "true", scrape("port"): "9102", scrape("path"): "/m", scrape("scheme"): "https"}),
    ));
    for (key, wanted) in [
        ("scrape", "true"),
        ("port", "15020"),
        ("path", "/stats/prometheus"),
        ("scheme", "http"),
    ] {
        assert_eq!(
            case.after["metadata"]["annotations"][scrape(key)],
            wanted,
            "{key}"
        );
    }
    let moved = variable(&case, "MALHA_PROMETHEUS")["value"]
        .as_str()
        .expect("text")
        .to_owned();
    for part in ["9102", "/m", "https"] {
        assert!(moved.contains(part), "{part}: {moved}");
    }
    for off in [
        json!({scrape("scrape"): "false", scrape("port"): "9102"}),
        json!({scrape("port"): "9102", "prometheus.istio.io/merge-metrics": "false"}),
    ] {
        let case = injected(pod(off.clone()));
        assert_eq!(
            case.after["metadata"]["annotations"][scrape("port")],
            "9102",
            "{off}"
        );
        assert_eq!(
            case.after["metadata"]["annotations"].get(scrape("path")),
            None,
            "{off}"
        );
    }
}

#[test]
fn kubectl_goes_to_the_application() {
    let case = injected(pod(
        json!({"kubectl.kubernetes.io/default-logs-container": "mine"}),
    ));
    let annotations = &case.after["metadata"]["annotations"];
    assert_eq!(
        annotations["kubectl.kubernetes.io/default-container"],
        "app"
    );
    assert_eq!(
        annotations["kubectl.kubernetes.io/default-logs-container"],
        "mine"
    );
    assert_eq!(
        case.after["metadata"]["labels"]["security.istio.io/tlsMode"],
        "istio"
    );
    let evictable = annotations["cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes"]
        .as_str()
        .expect("text");
    assert!(
        evictable.split(',').any(|name| name == "malha-run"),
        "{evictable}"
    );
}

#[test]
fn the_order_is_the_oldest_kubelets() {
    for (oldest_kubelet, restart, wanted) in [
        (None, "Always", true),
        (Some(33), "Always", true),
        (Some(32), "Always", false),
        (Some(32), "Never", true),
        (Some(29), "OnFailure", true),
        (Some(28), "OnFailure", false),
    ] {
        let mut pod = pod(json!({}));
        pod["spec"]["restartPolicy"] = json!(restart);
        let case = answered(
            &SUBJECT,
            Setup {
                oldest_kubelet,
                ..USUAL
            },
            pod,
        )
        .expect("readable");
        let native =
            list(&case.after["spec"]["initContainers"]).any(|container| container["name"] == PROXY);
        assert_eq!(native, wanted, "{oldest_kubelet:?} {restart}");
        if !native {
            let hook = ours(&case, PROXY)["lifecycle"]["postStart"]["exec"]["command"].to_string();
            assert!(hook.contains("wait") && hook.contains("60s"), "{hook}");
        }
    }
}

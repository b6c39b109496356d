//! What becomes of pods that a real API server sends through the real webhook.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Node};
use kube::api::{Api, ListParams, PostParams};
use serde_json::{Value, json};

use crate::rig::pods::{
    INIT, MESH, PROXY, assert_equal, audited_reason, container, containers, create, explained,
    injector_calls, merge, names, pod, raw_pods, without_ours,
};
use crate::rig::{self, Cluster, eventually, outside};

/// Time for controllers to make a pod on a machine whose cores are all busy.
const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_every_kind_of_workload_come_back_with_a_sidecar_and_otherwise_unchanged() {
    let Some(_plane) = outside::shared().await else {
        return;
    };
    let cluster = rig::shared().await.expect("the control plane runs in it");
    node_by_hand(cluster).await;
    let meshed = cluster.namespace("meshed", MESH).await;
    let plain = cluster.namespace("plain", &[]).await;
    for kind in WORKLOADS {
        for namespace in [&meshed, &plain] {
            create_workload(cluster, namespace, kind).await;
        }
    }
    for kind in WORKLOADS {
        let with = pod_of(cluster, &meshed, kind).await;
        let without = pod_of(cluster, &plain, kind).await;
        assert_eq!(
            names(&with, "initContainers"),
            [INIT, PROXY, "prepare"],
            "{kind}: the user's init containers have the mesh's network, in the native order"
        );
        assert_eq!(names(&with, "containers"), ["app", "helper"], "{kind}");
        assert_eq!(
            names(&without, "initContainers"),
            ["prepare"],
            "{kind}: an unlabelled namespace"
        );
        assert_equal(
            &without_ours(with),
            &without_ours(without),
            &format!("{kind}: everything else is unchanged"),
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_that_are_not_meshed_stay_as_they_are_and_say_why() {
    let Some(_plane) = outside::shared().await else {
        return;
    };
    let cluster = rig::shared().await.expect("the control plane runs in it");
    let meshed = cluster.namespace("meshed", MESH).await;
    let plain = cluster.namespace("plain", &[]).await;
    let disabled = cluster
        .namespace("disabled", &[("istio-injection", "disabled")])
        .await;
    let other = cluster
        .namespace("other", &[("istio.io/rev", "another")])
        .await;
    let opted_out = json!({ "labels": { "sidecar.istio.io/inject": "false" } });
    let by_annotation = json!({ "annotations": { "sidecar.istio.io/inject": "false" } });
    let host_network = json!({ "hostNetwork": true });
    let foreign = json!({ "containers": [
        { "name": "app", "image": "example.com/app:1" },
        { "name": "istio-proxy", "image": "example.com/proxy:1" },
    ] });
    let windows = json!({ "os": { "name": "windows" } });
    let cases = [
        (&plain, Value::Null, Value::Null, "NotSelected"),
        (&disabled, Value::Null, Value::Null, "NamespaceDisabled"),
        (&other, Value::Null, Value::Null, "OtherRevision"),
        (
            &"kube-system".to_owned(),
            Value::Null,
            Value::Null,
            "ProtectedNamespace",
        ),
        (&meshed, opted_out, Value::Null, "OptedOutByLabel"),
        (&meshed, by_annotation, Value::Null, "OptedOutByAnnotation"),
        (&meshed, Value::Null, host_network, "HostNetwork"),
        (&meshed, Value::Null, foreign, "ForeignSidecar"),
        (&meshed, Value::Null, windows, "WindowsPod"),
    ];
    for (namespace, metadata, spec, reason) in cases {
        let mut pod = pod(&format!("skipped-{}", reason.to_lowercase()));
        merge(&mut pod["metadata"], metadata);
        merge(&mut pod["spec"], spec);
        let stored = create(cluster, namespace, &pod)
            .await
            .unwrap_or_else(|refused| {
                panic!("{reason}: {refused}");
            });
        assert_eq!(
            names(&stored, "initContainers").len() + names(&stored, "containers").len(),
            pod["spec"]["containers"].as_array().map_or(0, Vec::len),
            "{reason}: nothing is added: {stored:#}"
        );
        assert_eq!(
            explained(cluster, namespace, &stored).await,
            reason,
            "malha explain"
        );
        if let Some(audited) = audited_reason(cluster, namespace, &stored).await {
            assert_eq!(audited, reason, "the audit log");
        } else {
            // Never sent to us: then the API server itself decided, by selector or matchCondition.
            assert!(
                !matches!(
                    reason,
                    "OptedOutByAnnotation" | "ForeignSidecar" | "WindowsPod"
                ),
                "{reason} is decided by the injector and must be in the audit log"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_of_a_plain_namespace_is_meshed_by_its_own_label_and_a_revision_selects_both_ways() {
    let Some(_plane) = outside::shared().await else {
        return;
    };
    let cluster = rig::shared().await.expect("the control plane runs in it");
    let plain = cluster.namespace("plain", &[]).await;
    let revision = cluster
        .namespace("revision", &[("istio.io/rev", "default")])
        .await;
    let cases = [
        (
            &plain,
            json!({ "labels": { "sidecar.istio.io/inject": "true" } }),
            "pod",
        ),
        (
            &plain,
            json!({ "labels": { "istio.io/rev": "default" } }),
            "rev-pod",
        ),
        (&revision, Value::Null, "rev-namespace"),
    ];
    for (namespace, metadata, entry) in cases {
        let mut pod = pod(&format!("by-{entry}"));
        merge(&mut pod["metadata"], metadata);
        let stored = create(cluster, namespace, &pod)
            .await
            .expect("it is admitted");
        assert_eq!(names(&stored, "initContainers"), [INIT, PROXY], "{entry}");
        let calls = injector_calls(cluster, namespace, &stored).await;
        assert_eq!(
            calls,
            [format!("{entry}.injector.malha.io")],
            "the entries are disjoint: a pod is sent once (re-invocation counts as the same entry)"
        );
        assert_eq!(
            audited_reason(cluster, namespace, &stored).await.as_deref(),
            Some("Injected")
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_cannot_be_meshed_is_refused_with_the_code_and_the_way_out() {
    let Some(_plane) = outside::shared().await else {
        return;
    };
    let cluster = rig::shared().await.expect("the control plane runs in it");
    let meshed = cluster.namespace("meshed", MESH).await;
    let label = json!({ "labels": { "sidecar.istio.io/inject": "yes" } });
    let annotation = json!({ "annotations": { "sidecar.istio.io/proxyCPU": "a lot" } });
    let templates = json!({ "annotations": { "inject.istio.io/templates": "gateway" } });
    let gid = json!({ "securityContext": { "runAsGroup": 1337 } });
    let port = json!({ "containers": [
        { "name": "app", "image": "example.com/app:1", "ports": [{ "containerPort": 15001 }] },
    ] });
    let half = json!({ "containers": [
        { "name": "app", "image": "example.com/app:1" },
        { "name": PROXY, "image": "example.com/app:1" },
    ] });
    let cases = [
        (
            label,
            Value::Null,
            "InvalidInjectValue",
            "sidecar.istio.io/inject",
        ),
        (
            annotation,
            Value::Null,
            "InvalidAnnotation",
            "sidecar.istio.io/proxyCPU",
        ),
        (
            templates,
            Value::Null,
            "UnsupportedAnnotation",
            "inject.istio.io/templates",
        ),
        (Value::Null, gid, "AppUsesProxyGid", "1337"),
        (Value::Null, port, "PortConflict", "15001"),
        (Value::Null, half, "NameConflict", PROXY),
    ];
    for (metadata, spec, reason, names_the) in cases {
        let mut pod = pod(&format!("refused-{}", reason.to_lowercase()));
        merge(&mut pod["metadata"], metadata);
        merge(&mut pod["spec"], spec);
        let refused = create(cluster, &meshed, &pod).await.expect_err(reason);
        assert_eq!(
            (refused.code, refused.reason.as_str()),
            (400, reason),
            "{refused:?}"
        );
        assert!(
            refused.message.contains(names_the),
            "{reason}: {}",
            refused.message
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stored_pod_gives_our_containers_no_token_of_the_api_server() {
    let Some(_plane) = outside::shared().await else {
        return;
    };
    let cluster = rig::shared().await.expect("the control plane runs in it");
    let meshed = cluster.namespace("meshed", MESH).await;
    let stored = create(cluster, &meshed, &pod("tokens"))
        .await
        .expect("it is admitted");
    let audience_of = |volume: &str| {
        let volumes = stored["spec"]["volumes"].as_array().expect("volumes");
        let volume = volumes
            .iter()
            .find(|candidate| candidate["name"] == volume)
            .expect("the mount's volume");
        let sources = volume["projected"]["sources"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let tokens: Vec<_> = sources
            .iter()
            .filter_map(|source| source.get("serviceAccountToken"))
            .map(|token| {
                token["audience"]
                    .as_str()
                    .unwrap_or("the API server")
                    .to_owned()
            })
            .collect();
        tokens
    };
    let mut seen = 0;
    for container in containers(&stored) {
        let ours = [INIT, PROXY].contains(&container["name"].as_str().unwrap_or_default());
        let mounts = container["volumeMounts"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let audiences: Vec<_> = mounts
            .iter()
            .flat_map(|mount| audience_of(mount["name"].as_str().expect("a mount names a volume")))
            .collect();
        if ours {
            seen += 1;
            assert!(
                !audiences.contains(&"the API server".to_owned()),
                "{container:#}"
            );
        } else {
            assert_eq!(
                audiences,
                ["the API server"],
                "the app keeps its own: {container:#}"
            );
        }
    }
    assert_eq!(seen, 2, "both containers of ours are there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_counts_the_sidecar_and_a_limit_range_accepts_it() {
    let Some(_plane) = outside::shared().await else {
        return;
    };
    let cluster = rig::shared().await.expect("the control plane runs in it");
    let meshed = cluster.namespace("quota", MESH).await;
    let limits = json!({
        "apiVersion": "v1", "kind": "LimitRange", "metadata": { "name": "limits" },
        "spec": { "limits": [{
            "type": "Container",
            "default": { "cpu": "300m", "memory": "64Mi" },
            "defaultRequest": { "cpu": "50m", "memory": "32Mi" },
            "max": { "cpu": "4", "memory": "2Gi" },
            "min": { "cpu": "5m", "memory": "8Mi" },
        }] },
    });
    let quota = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": { "name": "quota" },
        "spec": { "hard": {
            "requests.cpu": "10", "requests.memory": "10Gi", "limits.cpu": "20", "limits.memory": "20Gi",
        } },
    });
    for object in [&limits, &quota] {
        let output = cluster
            .kubectl(
                ["create", "-n", &meshed, "-f", "-"],
                Some(&object.to_string()),
            )
            .await;
        assert!(output.status.success(), "{output:?}");
    }
    let used = async || {
        let output = cluster
            .kubectl(
                ["get", "resourcequota", "quota", "-n", &meshed, "-o", "json"],
                None,
            )
            .await;
        let quota: Value =
            serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())?;
        let used = quota["status"]["used"].as_object().cloned();
        used.ok_or_else(|| "not counted yet".to_owned())
    };
    eventually(PATIENCE, "the quota is counted", used).await;
    // Without the LimitRange's defaults the quota would refuse this pod's own container; with them only a sidecar
    // without requests and limits of its own could be refused.
    let stored = create(cluster, &meshed, &pod("counted"))
        .await
        .expect("quota and limits accept the sidecar");
    for container in containers(&stored) {
        for kind in ["requests", "limits"] {
            for resource in ["cpu", "memory"] {
                assert!(
                    container["resources"][kind][resource].is_string(),
                    "{}: {kind}.{resource} is set: {container:#}",
                    container["name"]
                );
            }
        }
    }
    let proxy = container(&stored, PROXY);
    assert_ne!(
        proxy["resources"]["limits"]["cpu"], "300m",
        "ours are not the LimitRange's defaults"
    );
    let counted = used().await.expect("the quota");
    // app 50m + proxy 100m: a native sidecar runs beside the app and is added; malha-init's 10m is less than both.
    assert_eq!(counted["requests.cpu"], "150m", "{counted:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pod_security_refuses_only_the_init_container_and_the_author_is_warned() {
    let Some(_plane) = outside::shared().await else {
        return;
    };
    let cluster = rig::shared().await.expect("the control plane runs in it");
    let labels = [
        MESH[0],
        ("pod-security.kubernetes.io/enforce", "restricted"),
    ];
    let restricted = cluster.namespace("restricted", &labels).await;
    let mut pod = pod("strict");
    merge(
        &mut pod["spec"],
        json!({
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": { "type": "RuntimeDefault" },
            },
            "containers": [{
                "name": "app", "image": "example.com/app:1",
                "securityContext": {
                    "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] },
                },
            }],
        }),
    );
    let output = cluster
        .kubectl(
            ["create", "-n", &restricted, "-f", "-"],
            Some(&pod.to_string()),
        )
        .await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success(),
        "restricted refuses NET_ADMIN: {output:?}"
    );
    assert!(
        said.contains("violates PodSecurity \"restricted:latest\""),
        "{said}"
    );
    assert!(said.contains(INIT) && said.contains("NET_ADMIN"), "{said}");
    assert!(
        !said.contains(PROXY),
        "the sidecar alone satisfies restricted: {said}"
    );
    assert!(
        said.contains("Warning: PodSecurityForbidsInit"),
        "the reason beside the refusal: {said}"
    );

    // A workload's author hears of it at apply time, before any pod is refused.
    let output = cluster
        .kubectl(
            ["apply", "-n", &restricted, "-f", "-"],
            Some(&workload("Deployment").to_string()),
        )
        .await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{output:?}");
    assert!(
        said.contains("NET_ADMIN") && said.contains(INIT),
        "the advice: {said}"
    );

    pod["metadata"]["labels"] = json!({ "sidecar.istio.io/inject": "false" });
    create(cluster, &restricted, &pod)
        .await
        .expect("the same pod without a sidecar");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_author_is_told_at_apply_time_what_will_become_of_a_workloads_pods() {
    let Some(_plane) = outside::shared().await else {
        return;
    };
    let cluster = rig::shared().await.expect("the control plane runs in it");
    let meshed = cluster.namespace("meshed", MESH).await;
    let mut deployment = workload("Deployment");
    deployment["spec"]["template"]["metadata"]["annotations"] =
        json!({ "sidecar.istio.io/proxyCpu": "100m" });
    let said = async |deployment: &Value| {
        let output = cluster
            .kubectl(
                ["apply", "-n", &meshed, "-f", "-"],
                Some(&deployment.to_string()),
            )
            .await;
        assert!(output.status.success(), "advice never refuses: {output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let warned = said(&deployment).await;
    assert!(
        warned.contains("sidecar.istio.io/proxyCPU"),
        "the nearest known name: {warned}"
    );
    deployment["spec"]["replicas"] = json!(2);
    let scaled = said(&deployment).await;
    assert!(
        !scaled.contains("sidecar.istio.io"),
        "only a changed template is looked at: {scaled}"
    );
    deployment["spec"]["template"]["metadata"]["annotations"] =
        json!({ "sidecar.istio.io/inject": "maybe" });
    let warned = said(&deployment).await;
    assert!(
        warned.contains("InvalidInjectValue"),
        "its pods would be refused: {warned}"
    );
}

// -- workloads --

/// Every kind of controller that makes pods, and the bare pod.
const WORKLOADS: &[&str] = &[
    "Pod",
    "ReplicationController",
    "ReplicaSet",
    "Deployment",
    "StatefulSet",
    "DaemonSet",
    "Job",
    "CronJob",
];

/// One workload whose pods have an init container, two containers, odd but legal fields, and a probe that the sidecar
/// has no business with.
fn workload(kind: &str) -> Value {
    let template = json!({
        "metadata": { "labels": { "app": kind.to_lowercase(), "team": "x" }, "annotations": { "example.com/a_b": "\"{{quoted}}\"" } },
        "spec": {
            "terminationGracePeriodSeconds": 7,
            "tolerations": [{ "operator": "Exists" }],
            "dnsConfig": { "options": [{ "name": "ndots", "value": "2" }] },
            "volumes": [{ "name": "scratch", "emptyDir": {} }],
            "initContainers": [{ "name": "prepare", "image": "example.com/prepare:1" }],
            "containers": [
                {
                    "name": "app",
                    "image": "example.com/app:1",
                    "env": [{ "name": "GREETING", "value": "$(HOST) says \"hi\"" }],
                    "readinessProbe": { "exec": { "command": ["true"] }, "periodSeconds": 3 },
                    "volumeMounts": [{ "name": "scratch", "mountPath": "/scratch" }],
                },
                { "name": "helper", "image": "example.com/helper:1" },
            ],
        },
    });
    let selector = json!({ "matchLabels": { "app": kind.to_lowercase() } });
    let never = |mut template: Value| {
        template["spec"]["restartPolicy"] = json!("Never");
        template
    };
    let (api_version, spec) = match kind {
        "Pod" => {
            let mut pod = template;
            pod["apiVersion"] = json!("v1");
            pod["kind"] = json!("Pod");
            pod["metadata"]["name"] = json!("pod");
            return pod;
        }
        "ReplicationController" => (
            "v1",
            json!({ "replicas": 1, "selector": { "app": kind.to_lowercase() }, "template": template }),
        ),
        "StatefulSet" => (
            "apps/v1",
            json!({ "serviceName": "x", "replicas": 1, "selector": selector, "template": template }),
        ),
        "DaemonSet" => (
            "apps/v1",
            json!({ "selector": selector, "template": template }),
        ),
        "Job" => ("batch/v1", json!({ "template": never(template) })),
        "CronJob" => (
            "batch/v1",
            json!({ "schedule": "* * * * *", "jobTemplate": { "spec": { "template": never(template) } } }),
        ),
        _ => (
            "apps/v1",
            json!({ "replicas": 1, "selector": selector, "template": template }),
        ),
    };
    json!({
        "apiVersion": api_version, "kind": kind, "metadata": { "name": kind.to_lowercase() }, "spec": spec,
    })
}

async fn create_workload(cluster: &Cluster, namespace: &str, kind: &str) {
    let object = workload(kind);
    let output = cluster
        .kubectl(
            ["create", "-n", namespace, "-f", "-"],
            Some(&object.to_string()),
        )
        .await;
    assert!(output.status.success(), "{kind}: {output:?}");
    if kind == "CronJob" {
        // Due a minute ago, as far as its controller knows: otherwise the test would wait for the next full minute.
        let past = three_minutes_ago(cluster).await;
        let output = cluster
            .kubectl(
                [
                    "patch",
                    "cronjob",
                    "cronjob",
                    "-n",
                    namespace,
                    "--subresource=status",
                    "--type=merge",
                    "-p",
                    &json!({ "status": { "lastScheduleTime": past } }).to_string(),
                ],
                None,
            )
            .await;
        assert!(output.status.success(), "{output:?}");
    }
}

/// Three minutes before the API server made the namespace `default`, in its own words.
async fn three_minutes_ago(cluster: &Cluster) -> String {
    let namespaces: Api<Namespace> = Api::all(cluster.client().await);
    let made = namespaces
        .get("default")
        .await
        .expect("it is there")
        .metadata
        .creation_timestamp;
    let made = made.expect("every object has one").0;
    (made - Duration::from_secs(180)).to_string()
}

/// The pod that the controller of a workload has made.
async fn pod_of(cluster: &Cluster, namespace: &str, kind: &str) -> Value {
    let pods = raw_pods(&cluster.client().await, namespace);
    let mine = ListParams::default().labels(&format!("app={}", kind.to_lowercase()));
    eventually(
        PATIENCE,
        &format!("a pod of {kind} in {namespace}"),
        || async {
            let list = pods.list(&mine).await.map_err(|error| error.to_string())?;
            match list.items.into_iter().next() {
                Some(pod) => Ok(serde_json::to_value(pod).expect("a pod is JSON")),
                None => Err(events(cluster, namespace).await),
            }
        },
    )
    .await
}

/// What controllers complain about, for when they make no pod.
async fn events(cluster: &Cluster, namespace: &str) -> String {
    let output = cluster
        .kubectl(["get", "events", "-n", namespace, "-o", "name"], None)
        .await;
    let output_messages = cluster
        .kubectl(
            [
                "get",
                "events",
                "-n",
                namespace,
                "-o",
                "jsonpath={.items[*].message}",
            ],
            None,
        )
        .await;
    format!(
        "no pod; events: {} {}",
        String::from_utf8_lossy(&output.stdout).lines().count(),
        String::from_utf8_lossy(&output_messages.stdout)
    )
}

/// A node for the DaemonSet controller; nothing runs on it.
async fn node_by_hand(cluster: &Cluster) {
    let nodes: Api<Node> = Api::all(cluster.client().await);
    let node = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": "by-hand" },
        "status": { "nodeInfo": {
            "architecture": "amd64", "bootID": "", "containerRuntimeVersion": "", "kernelVersion": "",
            "kubeProxyVersion": "", "kubeletVersion": "v1.36.3", "machineID": "", "operatingSystem": "linux",
            "osImage": "", "systemUUID": "",
        } },
    });
    let node: Node = serde_json::from_value(node).expect("a node");
    match nodes.create(&PostParams::default(), &node).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        Err(error) => panic!("a node by hand: {error}"),
    }
}

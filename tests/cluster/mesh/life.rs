//! Pods of the mesh begin and end, and nobody who calls them notices; in both orders of their containers.

use serde_json::Value;

use super::{STRICT, curl, until};
use crate::{
    containers,
    load::Load,
    node::{self, Namespace, Node},
};

const MESH: [(&str, &str); 1] = [("istio-injection", "enabled")];

/// Two servers that end as soon as they are told to, and somebody who calls them.
const ROLLED: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: rig.local/agnhost:1
        args: [netexec, --http-port=8080]
        ports: [{name: http, containerPort: 8080}]
        readinessProbe: {httpGet: {path: /healthz, port: http}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: client, image: "rig.local/tools:1", command: [sleep, "100000"]}
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_at_200_requests_a_second_loses_none() {
    let Some(node) = node::shared().await else {
        return;
    };
    let mesh = node.namespace("rolled", &MESH).await;
    mesh.apply(STRICT).await;
    mesh.apply(ROLLED).await;
    mesh.ready("deployment/web").await;
    mesh.ready("pod/client").await;
    answers(&mesh).await;

    let containers = containers::of(node, &mesh).await;
    let client = containers::find(&containers, "client", "client");
    let kept = Load::to(&mesh, "web").await;
    let new = Load {
        rate: 50,
        keeps_connections: false,
        ..kept.clone()
    };
    let loads = [kept, new].map(|load| load.start(client.network()));
    let before = names(&mesh, "app=web").await;
    mesh.kubectl(&["rollout", "restart", "deployment/web"])
        .await;
    mesh.ready("deployment/web").await;
    until(
        "the old pods are gone",
        |now: &Vec<String>| now.iter().all(|name| !before.contains(name)),
        async || names(&mesh, "app=web").await,
    )
    .await;
    for load in loads {
        let told = load.stop();
        assert!(!told.micros.is_empty());
        assert!(
            told.failures.is_empty(),
            "{} of {}: {:?}",
            told.failures.len(),
            told.micros.len(),
            told.failures
        );
    }
}

async fn names(mesh: &Namespace, selector: &str) -> Vec<String> {
    let pods = ["get", "pods", "-l", selector, "-o", "name"];
    let pods = mesh.kubectl(&pods).await;
    pods.lines().map(str::to_owned).collect()
}

async fn answers(mesh: &Namespace) {
    until(
        "the server answers",
        |answer: &Result<_, _>| answer.is_ok(),
        async || curl(mesh, "pod/client", "client", &["http://web/hostname"]).await,
    )
    .await;
}

/// In which order containers start and end.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    Native,
    Classic,
}

/// A server whose `preStop` is a call that ends it by itself, with 7: by a signal it is 0. The finalizer keeps what
/// became of its containers.
fn server(name: &str, order: Order, lifecycle: &str) -> String {
    let native = order == Order::Native;
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  labels: {{app: {name}}}
  annotations: {{sidecar.istio.io/nativeSidecar: "{native}"}}
  finalizers: [malha.io/test]
spec:
  terminationGracePeriodSeconds: 60
  containers:
  - name: web
    image: rig.local/agnhost:1
    args: [netexec, --http-port=8080]
    ports: [{{name: http, containerPort: 8080}}]
    readinessProbe: {{httpGet: {{path: /healthz, port: http}}, periodSeconds: 1}}
    lifecycle: {lifecycle}
"#
    )
}

/// How the containers of a pod ended that was told to: application, sidecar.
async fn ended(mesh: &Namespace, name: &str) -> [i64; 2] {
    let pod = format!("pod/{name}");
    let ended = async || {
        let pod = mesh.kubectl(&["get", &pod, "-o", "json"]).await;
        let pod: Value = serde_json::from_str(&pod).expect("JSON");
        let code = |wanted: &str| {
            let lists = ["initContainerStatuses", "containerStatuses"];
            let mut statuses = lists
                .iter()
                .flat_map(|list| pod["status"][*list].as_array().into_iter().flatten());
            let status = statuses.find(|status| status["name"] == wanted)?;
            status["state"]["terminated"]["exitCode"].as_i64()
        };
        Some([code("web")?, code("malha-proxy")?])
    };
    let mut codes = None;
    until(
        &format!("{name} ends"),
        |codes: &Option<_>| codes.is_some(),
        async || {
            codes = ended().await;
            codes
        },
    )
    .await;
    let free = r#"{"metadata":{"finalizers":null}}"#;
    mesh.kubectl(&["patch", &pod, "--type=merge", "-p", free])
        .await;
    codes.expect("it ended")
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_end_in_time_and_by_themselves_however_they_are_told_to() {
    let Some(node) = node::shared().await else {
        return;
    };
    let mesh = node.namespace("ends", &MESH).await;
    mesh.apply(STRICT).await;
    let told = r#"{preStop: {httpGet: {path: "/exit?code=7", port: http}}}"#;
    let pods = [
        ("evicted", Order::Native, "{}", 0),
        ("evicted-classic", Order::Classic, "{}", 0),
        ("short", Order::Native, "{}", 0),
        ("short-classic", Order::Classic, "{}", 0),
        ("told", Order::Native, told, 7),
        ("told-classic", Order::Classic, told, 7),
    ];
    for (name, order, lifecycle, _) in pods {
        mesh.apply(&server(name, order, lifecycle)).await;
    }
    for (name, ..) in pods {
        mesh.ready(&format!("pod/{name}")).await;
    }
    for (name, ..) in pods {
        if name.starts_with("evicted") {
            evict(node, &mesh, name).await;
        } else {
            let grace = if name.starts_with("short") {
                "--grace-period=10"
            } else {
                "--grace-period=60"
            };
            mesh.kubectl(&["delete", "pod", name, grace, "--wait=false"])
                .await;
        }
    }
    // Whoever is late is killed by the kubelet, with 137.
    for (name, .., code) in pods {
        assert_eq!(ended(&mesh, name).await, [code, 0], "{name}");
    }
}

async fn evict(node: &Node, mesh: &Namespace, name: &str) {
    let eviction = serde_json::json!({
        "apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": mesh.name()},
    });
    let path = format!("/api/v1/namespaces/{}/pods/{name}/eviction", mesh.name());
    let args = ["create", "--raw", &path, "-f", "-"];
    let evicted = node.try_kubectl(&args, Some(&eviction.to_string())).await;
    assert!(evicted.status.success(), "{evicted:?}");
}

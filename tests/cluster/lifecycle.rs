//! `malha install`, `mesh`, `unmesh` and `uninstall` on a real API server, and on a real node an upgrade under load.

use std::process::Output;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, api::PostParams};
use serde_json::{Value, json};

use crate::rig::{Cluster, Setup, eventually, http_get, run};
use crate::{monitoring, node};

const PATIENCE: Duration = Duration::from_secs(90);

struct Operator<'a>(&'a Cluster);

impl Operator<'_> {
    async fn malha(&self, args: &[&str]) -> Output {
        let mut malha = tokio::process::Command::new(env!("CARGO_BIN_EXE_malha"));
        malha
            .env("KUBECONFIG", self.0.admin_kubeconfig())
            .args(args);
        run(malha, None).await
    }

    async fn kubectl(&self, args: &[&str], input: Option<&str>) -> String {
        let output = self.0.kubectl(args, input).await;
        let said = text(&output.stderr);
        assert!(output.status.success(), "kubectl {args:?}: {said}");
        text(&output.stdout)
    }

    async fn is_there(&self, what: &[&str]) -> bool {
        let get = ["get", "--ignore-not-found", "-o", "name"];
        !self.kubectl(&[&get, what].concat(), None).await.is_empty()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_installed_is_applied_server_side_and_taken_away_in_an_order_that_blocks_nobody() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let operator = Operator(&cluster);
    // No node: everything is applied, and the wait for a ready Deployment ends with what is left.
    let install = ["install", "--apply", "--timeout", "1s"];
    let output = operator.malha(&install).await;
    let (applied, said) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("the rollout of Deployment malha-system/malha: not within 1 s"),
        "{said}"
    );
    assert!(
        !said.contains("waiting for the control plane"),
        "progress is for terminals: {said}"
    );
    let names = operator.malha(&["install", "-o", "name"]).await;
    assert_eq!(applied, text(&names.stdout), "{said}");
    let manager = operator
        .kubectl(
            &[
                "get",
                "deployment/malha",
                "-n",
                "malha-system",
                "--show-managed-fields",
                "-o",
                "jsonpath={.metadata.managedFields[?(@.operation=='Apply')].manager}",
            ],
            None,
        )
        .await;
    assert_eq!(manager, "malha-install");

    // Somebody else's field is not taken silently.
    let scale = [
        "scale",
        "deployment/malha",
        "-n",
        "malha-system",
        "--replicas=5",
    ];
    operator.kubectl(&scale, None).await;
    let output = operator.malha(&install).await;
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains(".spec.replicas") && said.contains("--force"),
        "{said}"
    );
    let forced = operator.malha(&[&install[..], &["--force"]].concat()).await;
    assert!(
        text(&forced.stderr).contains("the rollout of"),
        "{forced:?}"
    );

    // Without the operator's kinds nothing is half applied.
    let monitored = [&install[..], &["--monitoring"]].concat();
    let output = operator.malha(&monitored).await;
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("podmonitors.monitoring.coreos.com") && output.stdout.is_empty(),
        "{output:?}"
    );
    for (kind, plural) in [
        ("PodMonitor", "podmonitors"),
        ("PrometheusRule", "prometheusrules"),
    ] {
        let crd = crd_of_the_operator(kind, plural).to_string();
        operator.kubectl(&["create", "-f", "-"], Some(&crd)).await;
    }
    eventually(PATIENCE, "monitoring is applied", || async {
        let output = operator.malha(&monitored).await;
        let (applied, said) = (text(&output.stdout), text(&output.stderr));
        let all = applied.ends_with("prometheusrule.monitoring.coreos.com/malha\n");
        all.then_some(()).ok_or(applied + &said)
    })
    .await;
    // What is there may be applied in any other form.
    for file in ["install.yaml", "install-ha.yaml", "monitoring.yaml"] {
        let file = format!("{}/manifests/{file}", env!("CARGO_MANIFEST_DIR"));
        operator
            .kubectl(&["apply", "--dry-run=server", "-f", &file], None)
            .await;
    }

    // Nobody answers the webhook: a pod of the mesh cannot be made. Then it can.
    let shop = cluster
        .namespace("shop", &[("istio-injection", "enabled")])
        .await;
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "web", "namespace": shop },
        "spec": { "containers": [{ "name": "app", "image": "example.com/app:1" }] },
    })
    .to_string();
    eventually(PATIENCE, "the webhook is in force", || async {
        let made = cluster
            .kubectl(["create", "--dry-run=server", "-f", "-"], Some(&pod))
            .await;
        if made.status.success() {
            Err("a pod may be made".to_owned())
        } else {
            Ok(())
        }
    })
    .await;
    let planned = operator.malha(&["uninstall", "--emergency"]).await;
    assert_eq!(planned.status.code(), Some(0), "{planned:?}");
    let told = operator
        .malha(&["uninstall", "--emergency", "-o", "json"])
        .await;
    let told: Value = serde_json::from_slice(&told.stdout).expect("JSON");
    assert_eq!(told["applied"], false);
    assert_eq!(
        told["deleted"][0],
        json!({ "kind": "MutatingWebhookConfiguration", "namespace": null, "name": "malha-injector" })
    );
    assert!(
        operator
            .is_there(&["mutatingwebhookconfiguration/malha-injector"])
            .await
    );
    let done = operator
        .malha(&["uninstall", "--emergency", "--apply"])
        .await;
    assert_eq!(
        text(&done.stdout),
        text(&planned.stdout),
        "what was said is done"
    );
    assert_eq!(text(&done.stdout).lines().count(), 7, "{done:?}");
    assert!(
        operator
            .is_there(&["deployment/malha", "-n", "malha-system"])
            .await
    );
    eventually(PATIENCE, "a pod may be made", || async {
        let made = cluster
            .kubectl(["create", "--dry-run=server", "-f", "-"], Some(&pod))
            .await;
        made.status
            .success()
            .then_some(())
            .ok_or_else(|| text(&made.stderr))
    })
    .await;

    // The rest; and what cannot be made again stays.
    let secret = [
        "create",
        "secret",
        "generic",
        "malha-ca",
        "-n",
        "malha-system",
    ];
    operator.kubectl(&secret, None).await;
    let trust = ["create", "configmap", "malha-ca-root-cert", "-n", &shop];
    operator.kubectl(&trust, None).await;
    let done = operator.malha(&["uninstall", "--apply"]).await;
    let said = text(&done.stderr);
    assert_eq!(done.status.code(), Some(0), "{said}");
    assert!(
        said.contains("kept without --purge: CustomResourceDefinition"),
        "{said}"
    );
    assert!(
        !operator
            .is_there(&["deployment/malha", "-n", "malha-system"])
            .await
    );
    assert!(!operator.is_there(&["clusterrole/malha"]).await);
    let rule = ["prometheusrule/malha", "-n", "malha-system"];
    assert!(!operator.is_there(&rule).await);
    assert!(
        operator
            .is_there(&["secret/malha-ca", "-n", "malha-system"])
            .await
    );
    let crd = ["crd/peerauthentications.security.istio.io"];
    assert!(operator.is_there(&crd).await);

    let done = operator.malha(&["uninstall", "--purge", "--apply"]).await;
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    assert!(
        !operator
            .is_there(&["configmap/malha-ca-root-cert", "-n", &shop])
            .await
    );
    eventually(PATIENCE, "namespace and CRD are gone", || async {
        let left =
            operator.is_there(&["namespace/malha-system"]).await || operator.is_there(&crd).await;
        if left {
            Err("not yet".to_owned())
        } else {
            Ok(())
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_goes_in_and_out_and_the_cluster_itself_never() {
    let Some(cluster) = crate::rig::shared().await else {
        return;
    };
    let operator = Operator(cluster);
    let shop = cluster
        .namespace("member", &[("istio-injection", "disabled")])
        .await;
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "web", "namespace": shop },
        "spec": {
            "selector": { "matchLabels": { "app": "web" } },
            "template": {
                "metadata": { "labels": { "app": "web" } },
                "spec": { "containers": [{ "name": "app", "image": "example.com/app:1" }] },
            },
        },
    });
    operator
        .kubectl(&["create", "-f", "-"], Some(&deployment.to_string()))
        .await;
    let plan = async |args: &[&str]| {
        let output = operator
            .malha(&[args, &[shop.as_str(), "-o", "json"]].concat())
            .await;
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).expect("JSON")
    };
    eventually(PATIENCE, "a pod of the Deployment", || async {
        let told = plan(&["mesh", "--dry-run"]).await;
        let row = json!([{ "name": "deployment.apps/web", "pods": 1, "ready": 0, "withSidecar": 0, "toRestart": told["items"][0]["toRestart"], "restartable": true }]);
        let pods = told["items"][0]["toRestart"].as_array();
        let named = pods.is_some_and(|pods| pods.len() == 1 && pods[0].to_string().contains("web-"));
        (told["items"] == row && named).then_some(()).ok_or_else(|| told.to_string())
    })
    .await;
    let label = async || {
        let path = "jsonpath={.metadata.labels.istio-injection}";
        operator
            .kubectl(&["get", "namespace", &shop, "-o", path], None)
            .await
    };
    assert_eq!(label().await, "disabled", "a dry run changes nothing");
    plan(&["mesh"]).await;
    assert_eq!(label().await, "enabled");
    plan(&["unmesh"]).await;
    assert_eq!(label().await, "");

    for (args, exit, words) in [
        (["mesh", "kube-system"], 1, "never in the mesh"),
        (["mesh", "nowhere"], 65, "there is no namespace nowhere"),
    ] {
        let output = operator.malha(&args).await;
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{args:?}: {said}");
        assert!(said.contains(words), "{args:?}: {said}");
    }
    // Who may not is told so, and it is not taken for a cluster that is away.
    let limited = cluster.service_account(&shop, "default").await;
    let limited = limited.to_str().expect("UTF-8");
    for args in [
        &["mesh", &shop][..],
        &["uninstall"],
        &["install", "--apply"],
    ] {
        let output = operator
            .malha(&[args, &["--kubeconfig", limited]].concat())
            .await;
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.contains("forbidden"), "{args:?}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn helm_installs_what_it_can_take_away_again_but_for_the_keys_and_the_users_objects() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let operator = Operator(&cluster);
    let helm = async |args: &[&str]| {
        let mut helm = tokio::process::Command::new(cluster.program("helm"));
        helm.env("KUBECONFIG", cluster.admin_kubeconfig())
            .env("HOME", cluster.dir())
            .args(["--namespace", "malha-system"])
            .args(args);
        let output = run(helm, None).await;
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(output.status.success(), "helm {args:?}: {said}");
    };
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/manifests/chart");
    let install = [
        "install",
        "malha",
        chart,
        "--create-namespace",
        "--take-ownership",
    ];
    helm(&install).await;
    let replicas = async || {
        let path = "jsonpath={.spec.replicas}";
        let get = ["get", "deployment/malha", "-n", "malha-system", "-o", path];
        operator.kubectl(&get, None).await
    };
    assert_eq!(replicas().await, "2");
    helm(&["upgrade", "malha", chart, "--set", "ha=true"]).await;
    assert_eq!(replicas().await, "3");
    helm(&["uninstall", "malha"]).await;
    assert!(
        !operator
            .is_there(&["deployment/malha", "-n", "malha-system"])
            .await
    );
    assert!(
        !operator
            .is_there(&["mutatingwebhookconfiguration/malha-injector"])
            .await
    );
    assert!(operator.is_there(&["namespace/malha-system"]).await);
    assert!(
        operator
            .is_there(&["crd/peerauthentications.security.istio.io"])
            .await
    );
}

/// The control plane is restarted under load, taken away and brought back, which no other test could live with.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a node to itself: make test-node"]
async fn on_a_node_an_upgrade_fails_no_request_and_what_was_uninstalled_comes_back() {
    let Some(node) = node::shared().await else {
        return;
    };
    let malha = async |args: &[&str]| {
        let mut malha = tokio::process::Command::new(env!("CARGO_BIN_EXE_malha"));
        malha.env("KUBECONFIG", node.kubeconfig()).args(args);
        let output = run(malha, None).await;
        let said = text(&output.stdout) + &text(&output.stderr);
        (output.status.code(), said)
    };
    let succeeds = async |args: &[&str]| {
        let (code, said) = malha(args).await;
        assert_eq!(code, Some(0), "malha {args:?}: {said}");
        said
    };
    let sound = async || succeeds(&["check", "--strict", "--wait", "2m"]).await;
    sound().await;

    // In by a restart, and out again.
    let shop = node.namespace("shop", &[]).await;
    shop.apply(DEPLOYMENT).await;
    shop.ready("deployment/web").await;
    let said = succeeds(&["mesh", shop.name(), "--restart"]).await;
    assert!(said.contains("1/1 pods have a sidecar"), "{said}");
    let said = succeeds(&["unmesh", shop.name(), "--restart"]).await;
    assert!(said.contains("0/1 pods have a sidecar"), "{said}");

    let mesh = node
        .namespace("mesh", &[("istio-injection", "enabled")])
        .await;
    mesh.apply(node::WEB_AND_CLIENT).await;
    mesh.ready("pod/web").await;
    mesh.ready("pod/client").await;
    let url = format!("http://web.{}/hostname", mesh.name());
    let call = async || {
        mesh.exec("pod/client", "client", &["curl", "-sSf", &url])
            .await
    };
    eventually(PATIENCE, "web answering", call).await;

    // Upgraded to images of another place, with other settings of the injector, while the client calls and pods are made;
    // the install waits until the new replicas are there.
    let registry = "rig.local/next";
    node.pull_from(registry);
    let calls = "n=0; lost=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); \
        curl -sSf -o /dev/null --max-time 20 $0 || lost=$((lost+1)); sleep 0.02; done; echo $n $lost";
    let load = ["sh", "-c", calls, &url];
    let over = AtomicBool::new(false);
    let upgrade = async {
        let upgraded = malha(&["install", "--apply", "--image-registry", registry]).await;
        over.store(true, Ordering::Relaxed);
        let stop = ["touch", "/tmp/stop"];
        mesh.exec("pod/client", "client", &stop)
            .await
            .expect("the load ends");
        upgraded
    };
    let (calls, admitted, (code, said)) = tokio::join!(
        mesh.exec("pod/client", "client", &load),
        admissions(node.client().await, mesh.name(), &over),
        upgrade
    );
    assert_eq!(code, Some(0), "{said}");
    let calls = calls.expect("counts");
    let counts: Vec<u32> = calls
        .split_whitespace()
        .filter_map(|n| n.parse().ok())
        .collect();
    let [made, lost] = counts[..] else {
        panic!("{calls}");
    };
    assert!(made > 20 && lost == 0, "{lost} of {made} requests failed");
    let faults: Vec<_> = admitted.iter().filter_map(|it| it.as_ref().err()).collect();
    let images: Vec<_> = admitted.iter().filter_map(|it| it.as_ref().ok()).collect();
    assert!(
        admitted.len() > 20 && faults.is_empty(),
        "{} of {} pods: {faults:?}",
        faults.len(),
        admitted.len()
    );
    let new = format!("{registry}/malha-proxy:{}", env!("CARGO_PKG_VERSION"));
    assert!(
        images.first() != images.last() && images.last() == Some(&&new),
        "{images:?}"
    );
    let path = "jsonpath={.spec.template.spec.containers[0].image}";
    let get = ["get", "deployment/malha", "-n", "malha-system", "-o", path];
    assert!(node.kubectl(&get).await.starts_with(registry));
    sound().await;

    // Everything that dashboards and alerts ask for is told by somebody.
    let ours = |name: &str| !name.starts_with("apiserver_");
    eventually(PATIENCE, "every series", || async {
        let scrapes = scrapes(node, &mesh).await?;
        match monitoring::missing(&scrapes, ours) {
            missing if missing.is_empty() => Ok(()),
            missing => Err(format!("{missing:?}")),
        }
    })
    .await;

    // Away: who has a sidecar goes on, who is new gets none, and nobody is refused.
    let said = succeeds(&["uninstall", "--apply"]).await;
    for carrying in ["web", "client"] {
        let pod = format!("{}/{carrying}", mesh.name());
        assert!(said.contains(&pod), "{pod} carries a sidecar: {said}");
    }
    eventually(PATIENCE, "a pod without a sidecar", || async {
        let made = mesh.try_apply(PLAIN).await;
        made.status
            .success()
            .then_some(())
            .ok_or_else(|| text(&made.stderr))
    })
    .await;
    mesh.ready("pod/plain").await;
    eventually(PATIENCE, "sidecars go on", call).await;
    let (code, said) = malha(&["check"]).await;
    assert_eq!(code, Some(1), "{said}");

    // And back, with the same keys: the sidecars of before still talk to each other and to new ones.
    succeeds(&["install", "--apply"]).await;
    sound().await;
    let new = ["delete", "pod/web", "--now"];
    mesh.kubectl(&new).await;
    mesh.apply(node::WEB_AND_CLIENT).await;
    mesh.ready("pod/web").await;
    eventually(PATIENCE, "an old sidecar calls a new one", call).await;
}

/// A kind of the Prometheus operator that takes everything.
fn crd_of_the_operator(kind: &str, plural: &str) -> Value {
    let group = "monitoring.coreos.com";
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": { "name": format!("{plural}.{group}") },
        "spec": {
            "group": group, "scope": "Namespaced",
            "names": { "kind": kind, "plural": plural, "singular": kind.to_lowercase() },
            "versions": [{
                "name": "v1", "served": true, "storage": true,
                "schema": { "openAPIV3Schema": { "type": "object", "x-kubernetes-preserve-unknown-fields": true } },
            }],
        },
    })
}

/// Pods in a dry run, one after the other until it is `over`: the image of the sidecar that each would have.
async fn admissions(
    client: kube::Client,
    namespace: &str,
    over: &AtomicBool,
) -> Vec<Result<String, String>> {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": { "name": "new" },
        "spec": { "containers": [{ "name": "app", "image": "example.com/app:1" }] },
    }))
    .expect("a pod");
    let pods: Api<Pod> = Api::namespaced(client, namespace);
    let dry = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    let mut all = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let made = pods
            .create(&dry, &pod)
            .await
            .map_err(|error| error.to_string());
        all.push(made.and_then(|pod| sidecar_image(&pod).ok_or_else(|| "a plain pod".to_owned())));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    all
}

fn sidecar_image(pod: &Pod) -> Option<String> {
    let native = pod.spec.as_ref()?.init_containers.iter().flatten();
    let mut sidecar = native.filter(|container| container.name == "malha-proxy");
    sidecar.next()?.image.clone()
}

/// What every replica of the control plane and both sidecars tell a scraper.
async fn scrapes(node: &node::Node, mesh: &node::Namespace) -> Result<Vec<String>, String> {
    let client = node.client().await;
    let replicas = node
        .kubectl(&[
            "get",
            "pods",
            "-n",
            "malha-system",
            "-l",
            CONTROL_PLANE,
            "-o",
            "name",
        ])
        .await;
    let replicas = replicas.lines().map(|pod| {
        let name = pod.trim_start_matches("pod/");
        format!("malha-system/pods/{name}:15014/proxy/metrics")
    });
    let sidecars = ["web", "client"]
        .map(|name| format!("{}/pods/{name}:15020/proxy/stats/prometheus", mesh.name()));
    let mut all = Vec::new();
    for path in replicas.chain(sidecars) {
        let request = http_get(&format!("/api/v1/namespaces/{path}"));
        let text = client.request_text(request).await;
        all.push(text.map_err(|error| format!("{path}: {error}"))?);
    }
    Ok(all)
}

const CONTROL_PLANE: &str =
    "app.kubernetes.io/name=malha,app.kubernetes.io/component=control-plane";

const DEPLOYMENT: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: web, image: "rig.local/agnhost:1", args: [netexec, --http-port=8080]}
"#;

const PLAIN: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: plain}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: plain, image: "rig.local/tools:1", command: [sleep, "100000"]}
"#;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

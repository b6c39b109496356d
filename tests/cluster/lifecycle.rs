//! `malha install`, `mesh`, `unmesh` and `uninstall` on a real API server, and on a real node an upgrade under load.

use std::process::Output;
use std::time::Duration;

use serde_json::{Value, json};

use crate::node;
use crate::rig::{Cluster, Setup, eventually, run};

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
        let row = json!([{ "name": "deployment.apps/web", "pods": 1, "withSidecar": 0, "toRestart": 1, "restartable": true }]);
        (told["items"] == row).then_some(()).ok_or_else(|| told.to_string())
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

    // New pods of the control plane while the client calls; the install waits until they are there.
    let calls = "n=0; lost=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); \
        curl -sSf -o /dev/null --max-time 20 $0 || lost=$((lost+1)); sleep 0.02; done; echo $n $lost";
    let load = ["sh", "-c", calls, &url];
    let upgrade = async {
        let restart = [
            "rollout",
            "restart",
            "-n",
            "malha-system",
            "deployment/malha",
        ];
        node.kubectl(&restart).await;
        let upgraded = malha(&["install", "--apply"]).await;
        let stop = ["touch", "/tmp/stop"];
        mesh.exec("pod/client", "client", &stop)
            .await
            .expect("the load ends");
        upgraded
    };
    let (calls, (code, said)) = tokio::join!(mesh.exec("pod/client", "client", &load), upgrade);
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
    sound().await;

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

//! `malha check` on a real API server: each fault is planted for real, and found by its id with the way out.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::monitoring;
use crate::rig::outside::{self, ControlPlane};
use crate::rig::{self, Cluster, Setup, eventually, http_get, run};

/// How long a change may take to reach the API server's own admission, on busy cores.
const PATIENCE: Duration = Duration::from_secs(90);

/// `malha check` as an operator runs it.
struct Check {
    exit: Option<i32>,
    items: Vec<Value>,
    told: String,
}

async fn check_as(kubeconfig: &Path, flags: &[&str]) -> Check {
    let mut malha = tokio::process::Command::new(env!("CARGO_BIN_EXE_malha"));
    malha
        .env("KUBECONFIG", kubeconfig)
        .args(["check", "-o", "json"])
        .args(flags);
    let output = run(malha, None).await;
    let told: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    Check {
        exit: output.status.code(),
        items: told["items"].as_array().cloned().unwrap_or_default(),
        told: format!("{told:#}{}", String::from_utf8_lossy(&output.stderr)),
    }
}

impl Check {
    /// Whether a finding of this id and state says both.
    fn says(&self, id: &str, state: &str, text: &str, hint: &str) -> bool {
        let has = |item: &Value, field: &str, words: &str| {
            item[field]
                .as_str()
                .is_some_and(|said| said.contains(words))
        };
        let mut items = self.items.iter();
        items.any(|item| {
            item["id"] == id
                && item["state"] == state
                && has(item, "text", text)
                && has(item, "hint", hint)
        })
    }

    /// The ids that do not pass.
    fn wrong(&self) -> Vec<&str> {
        let wrong = self.items.iter().filter(|item| item["state"] != "pass");
        wrong.filter_map(|item| item["id"].as_str()).collect()
    }
}

/// Looks until the fault is found: admission takes a change up by itself.
async fn found(cluster: &Cluster, flags: &[&str], id: &str, state: &str, text: &str, hint: &str) {
    eventually(PATIENCE, &format!("{id} {state}"), || async {
        let check = check_as(&cluster.admin_kubeconfig(), flags).await;
        let exit = if state == "fail" { Some(1) } else { check.exit };
        (check.exit == exit && check.says(id, state, text, hint))
            .then_some(())
            .ok_or_else(|| format!("{:?} {}", check.exit, check.told))
    })
    .await;
}

/// Looks until nothing is wrong but what a cluster without nodes cannot have.
async fn sound(cluster: &Cluster) {
    eventually(PATIENCE, "nothing else is wrong", || async {
        let check = check_as(&cluster.admin_kubeconfig(), &[]).await;
        (check.wrong() == ["control-plane"])
            .then_some(())
            .ok_or(check.told)
    })
    .await;
}

async fn kubectl(cluster: &Cluster, args: &[&str], input: Option<&str>) {
    let output = cluster.kubectl(args, input).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "kubectl {args:?}: {said}");
}

async fn create(cluster: &Cluster, object: &Value) {
    kubectl(cluster, &["create", "-f", "-"], Some(&object.to_string())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn before_the_install_rights_and_rivals_are_found() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let admin = cluster.admin_kubeconfig();
    let check = check_as(&admin, &["--pre", "--strict"]).await;
    assert_eq!(check.exit, Some(0), "{}", check.told);
    for id in ["api-version", "clock", "rights", "crds", "foreign-webhooks"] {
        assert!(check.says(id, "pass", "", ""), "{id}: {}", check.told);
    }
    found(
        &cluster,
        &[],
        "installed",
        "fail",
        "malha-system",
        "install --apply",
    )
    .await;

    let namespace = cluster.namespace("limited", &[]).await;
    let limited = cluster.service_account(&namespace, "default").await;
    let check = check_as(&limited, &["--pre"]).await;
    assert_eq!(check.exit, Some(1), "{}", check.told);
    let missing = "create customresourcedefinitions";
    assert!(
        check.says("rights", "fail", missing, "administrator"),
        "{}",
        check.told
    );
    // What may not be read is said, and is not taken for absent.
    assert!(
        check.says("foreign-webhooks", "warn", "forbidden", "rights"),
        "{}",
        check.told
    );

    create(
        &cluster,
        &json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
            "metadata": { "name": "istio-sidecar-injector" },
            "webhooks": [{
                "name": "namespace.sidecar-injector.istio.io",
                "namespaceSelector": { "matchLabels": { "istio-injection": "enabled" } },
                "rules": [{ "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"] }],
                "clientConfig": { "url": "https://127.0.0.1:1/inject" },
                "sideEffects": "None", "admissionReviewVersions": ["v1"],
            }],
        }),
    )
    .await;
    let rival = "istio-sidecar-injector (namespace.sidecar-injector.istio.io)";
    found(
        &cluster,
        &["--pre"],
        "foreign-webhooks",
        "fail",
        rival,
        "one sidecar",
    )
    .await;

    create(
        &cluster,
        &json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": { "name": "peerauthentications.security.istio.io", "labels": { "app": "istio-pilot" } },
            "spec": {
                "group": "security.istio.io", "scope": "Namespaced",
                "names": { "kind": "PeerAuthentication", "plural": "peerauthentications", "singular": "peerauthentication" },
                "versions": [{
                    "name": "v1", "served": true, "storage": true,
                    "schema": { "openAPIV3Schema": { "type": "object", "x-kubernetes-preserve-unknown-fields": true } },
                }],
            },
        }),
    )
    .await;
    found(
        &cluster,
        &["--pre"],
        "crds",
        "warn",
        "istio-pilot",
        "--force",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_install_each_planted_fault_is_found_with_the_way_out() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let Some(plane) = ControlPlane::install(&cluster, 1).await else {
        return;
    };
    let shop = cluster
        .namespace("shop", &[("istio-injection", "enabled")])
        .await;
    sound(&cluster).await;
    // The Deployment's own pods wait for a node.
    found(
        &cluster,
        &[],
        "control-plane",
        "fail",
        "0 of 2",
        "describe pods",
    )
    .await;

    let injector = "mutatingwebhookconfiguration/malha-injector";
    let open = r#"[{"op": "replace", "path": "/webhooks/0/failurePolicy", "value": "Ignore"}]"#;
    kubectl(
        &cluster,
        &["patch", injector, "--type=json", "-p", open],
        None,
    )
    .await;
    let edited = "webhooks[namespace.injector.malha.io].failurePolicy is \"Ignore\"";
    found(&cluster, &[], "webhooks", "warn", edited, "install --apply").await;

    let binding = "validatingadmissionpolicybinding/malha-sidecar-present-pod";
    kubectl(&cluster, &["delete", binding], None).await;
    found(
        &cluster,
        &[],
        "admission-policy",
        "fail",
        "malha-sidecar-present-pod is gone",
        "install --apply",
    )
    .await;

    let crd = "crd/peerauthentications.security.istio.io";
    kubectl(&cluster, &["delete", crd], None).await;
    found(
        &cluster,
        &[],
        "crds",
        "fail",
        "peerauthentications",
        "install --apply",
    )
    .await;
    outside::apply_base(&cluster).await;
    sound(&cluster).await;

    // From here on nobody repairs, and nobody answers: as behind a firewall that drops.
    let replica = plane.replicas()[0].process();
    replica.pause().expect("it runs");
    found(&cluster, &[], "admission", "fail", &shop, "TCP 15017").await;
    // The API server counts that, and in the names that the alerts ask for; advice fails open.
    let create = [
        "create",
        "deployment",
        "web",
        "--image=example.com/app:1",
        "-n",
        &shop,
    ];
    kubectl(&cluster, &create, None).await;
    let metrics = cluster
        .client()
        .await
        .request_text(http_get("/metrics"))
        .await;
    let metrics = [metrics.expect("metrics of the API server")];
    let missing = monitoring::missing(&metrics, |name| name.starts_with("apiserver_"));
    assert_eq!(missing, [""; 0]);

    let bundle = serde_json::to_string(&k8s_openapi::ByteString(cluster.certificate_authority()));
    let bundle = bundle.expect("text");
    let other = format!(
        r#"[{{"op": "replace", "path": "/webhooks/0/clientConfig/caBundle", "value": {bundle}}}]"#
    );
    kubectl(
        &cluster,
        &["patch", injector, "--type=json", "-p", &other],
        None,
    )
    .await;
    let another = "namespace.injector.malha.io (another's)";
    found(&cluster, &[], "ca-bundle", "fail", another, "control-plane").await;

    let trust = ["delete", "configmap/malha-ca-root-cert", "-n", &shop];
    kubectl(&cluster, &trust, None).await;
    found(&cluster, &[], "trust-bundles", "fail", &shop, "leader").await;

    replica.kill();
    found(
        &cluster,
        &[],
        "admission",
        "fail",
        "connection refused",
        "nobody listens",
    )
    .await;

    kubectl(&cluster, &["delete", injector], None).await;
    found(
        &cluster,
        &[],
        "webhooks",
        "fail",
        "malha-injector is gone",
        "install --apply",
    )
    .await;
    found(
        &cluster,
        &[],
        "admission",
        "fail",
        "malha-sidecar-present",
        "see webhooks",
    )
    .await;

    kubectl(
        &cluster,
        &["delete", "secret/malha-ca", "-n", "malha-system"],
        None,
    )
    .await;
    found(
        &cluster,
        &[],
        "authority",
        "fail",
        "no Secret malha-system/malha-ca",
        "backup",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_shows_marks_and_ways_out_and_short_only_what_is_wrong() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let table = |format: &'static str| async move {
        let mut malha = tokio::process::Command::new(env!("CARGO_BIN_EXE_malha"));
        malha
            .env("KUBECONFIG", cluster.admin_kubeconfig())
            .env("LC_ALL", "C.UTF-8")
            .env("NO_COLOR", "1")
            .args(["check", "--pre", "-o", format]);
        let output = run(malha, None).await;
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    assert!(
        table("table")
            .await
            .contains("√ api-version: the API server is 1.")
    );
    assert!(!table("short").await.contains('√'));
}

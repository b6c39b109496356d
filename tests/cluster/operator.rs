//! The operator's verbs against a real API server: what they read of it, and what they say where it has nothing to tell.

use std::process::Output;

use serde_json::{Value, json};

use crate::{
    node,
    rig::{self, Cluster, run},
};

/// Enough of the kind to keep objects of it; where the real one is there already, that one stays.
const PEER_AUTHENTICATION: &str = r#"{
  "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
  "metadata": {"name": "peerauthentications.security.istio.io"},
  "spec": {
    "group": "security.istio.io", "scope": "Namespaced",
    "names": {"kind": "PeerAuthentication", "plural": "peerauthentications", "singular": "peerauthentication"},
    "versions": [{
      "name": "v1", "served": true, "storage": true,
      "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}
    }]
  }
}"#;

struct Operator {
    cluster: &'static Cluster,
    namespace: String,
}

impl Operator {
    /// An operator with all rights and a namespace of the mesh.
    async fn new() -> Option<Self> {
        let cluster = rig::shared().await?;
        let namespace = cluster.namespace("operator", &[]).await;
        Some(Self { cluster, namespace })
    }

    async fn malha(&self, args: &[&str], input: Option<&str>) -> Output {
        let mut malha = tokio::process::Command::new(env!("CARGO_BIN_EXE_malha"));
        malha
            .env("KUBECONFIG", self.cluster.admin_kubeconfig())
            .env("LC_ALL", "C.UTF-8")
            .env("NO_COLOR", "1")
            .args(args);
        run(malha, input).await
    }

    async fn kubectl(&self, args: &[&str], input: Option<&str>) -> String {
        let output = self.cluster.kubectl(args, input).await;
        let said = text(&output.stderr);
        assert!(output.status.success(), "kubectl {args:?}: {said}");
        text(&output.stdout)
    }

    /// Makes pods, the ones that `meshed` says with the sidecar that the webhook would give them.
    async fn pod(&self, name: &str, meshed: bool) {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name, "namespace": self.namespace, "labels": {"app": name},
                "annotations": {"traffic.sidecar.istio.io/excludeInboundPorts": "9100"},
            },
            "spec": {"containers": [{
                "name": "app", "image": "example.com/app:1",
                "ports": [{"name": "http", "containerPort": 8080}, {"containerPort": 9100}],
            }]},
        });
        let injected = match meshed {
            false => pod.to_string(),
            true => {
                let pod = pod.to_string();
                let inject = ["inject", "-f", "-", "-o", "json"];
                stdout(self.malha(&inject, Some(&pod)).await)
            }
        };
        self.kubectl(&["create", "-f", "-"], Some(&injected)).await;
    }

    /// The same as the API server's answer to a real webhook: the pods are made before the namespace is labelled.
    async fn label(&self) {
        self.kubectl(
            &[
                "label",
                "namespace",
                &self.namespace,
                "istio-injection=enabled",
            ],
            None,
        )
        .await;
    }

    async fn strict(&self) {
        let made = self
            .cluster
            .kubectl(["create", "-f", "-"], Some(PEER_AUTHENTICATION))
            .await;
        let said = text(&made.stderr);
        assert!(
            made.status.success() || said.contains("AlreadyExists"),
            "{said}"
        );
        let named = "crd/peerauthentications.security.istio.io";
        self.kubectl(&["wait", "--for=condition=Established", named], None)
            .await;
        let policy = json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": "default", "namespace": self.namespace},
            "spec": {"mtls": {"mode": "STRICT"}},
        });
        self.kubectl(&["create", "-f", "-"], Some(&policy.to_string()))
            .await;
    }

    async fn explain(&self, object: &str) -> Value {
        // A namespace in which nothing of a control plane is.
        let system = ["--system-namespace", &self.namespace];
        let args = ["explain", object, "-n", &self.namespace, "-o", "json"];
        let list = stdout(self.malha(&[&args[..], &system].concat(), None).await);
        let mut list: Value = serde_json::from_str(&list).expect("JSON");
        list["items"][0].take()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_of_the_cluster_is_explained_with_the_object_that_decides_for_each_port() {
    let Some(operator) = Operator::new().await else {
        return;
    };
    operator.pod("web", true).await;
    operator.pod("plain", false).await;
    operator.label().await;
    operator.strict().await;

    let web = operator.explain("pod/web").await;
    let namespace = &operator.namespace;
    assert_eq!(web["result"], "injected", "{web:#}");
    assert_eq!(web["sidecar"], true);
    let gates = web["gates"].as_array().expect("gates");
    assert!(gates.iter().all(|gate| gate["passed"] == true), "{web:#}");
    assert_eq!(
        web["identity"],
        format!("spiffe://cluster.local/ns/{namespace}/sa/default")
    );
    let by = json!({"kind": "PeerAuthentication", "namespace": namespace, "name": "default"});
    let ports: Vec<_> = web["mtls"]["ports"]
        .as_array()
        .expect("ports")
        .iter()
        .map(|port| {
            (
                port["port"].clone(),
                port["mode"].clone(),
                port["decidedBy"].clone(),
            )
        })
        .collect();
    assert_eq!(
        ports,
        [
            (json!(8080), json!("STRICT"), by.clone()),
            (json!(9100), Value::Null, Value::Null),
            (Value::Null, json!("STRICT"), by),
        ]
    );

    let plain = operator.explain("plain").await;
    assert_eq!(plain["sidecar"], false);
    assert_eq!(plain["result"], "injected", "one created now would be");
    assert_eq!(plain["mtls"], Value::Null);

    let strict = ["explain", "pod/plain", "-n", namespace, "--strict"];
    let output = operator.malha(&strict, None).await;
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("sidecar: not in the pod"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_named_with_what_to_try() {
    let Some(operator) = Operator::new().await else {
        return;
    };
    operator.pod("plain", false).await;
    let namespace = operator.namespace.as_str();
    let own = ["-n", namespace, "--system-namespace", namespace];
    for (verb, exit, words) in [
        (
            &["explain", "deploy/web"][..],
            65,
            format!("there is no deployment {namespace}/web;"),
        ),
        (
            &["explain", "ns/nowhere"],
            65,
            "namespace nowhere".to_owned(),
        ),
        (
            &["config", "plain"],
            65,
            format!("pod {namespace}/plain has no container malha-proxy;"),
        ),
        (
            &["config", "gone"],
            65,
            format!("there is no pod {namespace}/gone;"),
        ),
        (
            &["ps"],
            69,
            format!("no control-plane pod is ready in namespace {namespace}"),
        ),
    ] {
        let output = operator.malha(&[verb, &own].concat(), None).await;
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{verb:?}: {said}");
        assert!(said.contains(&words), "{verb:?}: {said}");
    }
    let edges = operator.malha(&["edges", "-n", namespace], None).await;
    assert_eq!(edges.status.code(), Some(0));
    assert!(text(&edges.stderr).contains("0 proxies tell of no HTTP call yet"));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_look_is_told_what_was_left_out() {
    let Some(operator) = Operator::new().await else {
        return;
    };
    operator.pod("web", true).await;
    operator.label().await;
    let namespace = &operator.namespace;
    let account = ["-n", namespace, "create", "serviceaccount", "looker"];
    operator.kubectl(&account, None).await;
    let kubeconfig = operator.cluster.service_account(namespace, "looker").await;
    let rules = ["--verb=get", "--verb=list", "--resource=pods"];
    let role = ["-n", namespace, "create", "role", "look"];
    operator.kubectl(&[&role[..], &rules].concat(), None).await;
    let subject = format!("--serviceaccount={namespace}:looker");
    let binding = [
        "-n",
        namespace,
        "create",
        "rolebinding",
        "look",
        "--role=look",
    ];
    operator
        .kubectl(&[&binding[..], &[subject.as_str()]].concat(), None)
        .await;
    let cluster_role = [
        "create",
        "clusterrole",
        namespace,
        "--verb=get",
        "--resource=namespaces",
    ];
    operator.kubectl(&cluster_role, None).await;
    let role = format!("--clusterrole={namespace}");
    let binding = ["create", "clusterrolebinding", namespace, &role, &subject];
    operator.kubectl(&binding, None).await;

    let kubeconfig = kubeconfig.to_str().expect("UTF-8");
    let args = [
        "explain",
        "web",
        "-n",
        namespace,
        "--kubeconfig",
        kubeconfig,
    ];
    let output = operator.malha(&args, None).await;
    let (shown, said) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{said}");
    for words in [
        "what ports accept is left out: ",
        "kubelets are taken to be of 1.33 or later: ",
        "the control plane's settings are taken to be the defaults: ",
        "the certificate's end is not known: ",
    ] {
        assert!(said.contains(words), "no {words:?} in\n{said}");
    }
    assert!(shown.contains("verdict: injected: Injected"), "{shown}");
    // What nobody may read about is not told as if nothing were there.
    assert!(!shown.contains("PERMISSIVE"), "{shown}");
}

/// On a real node every way is real: port-forward to the control plane, exec into the sidecar, the pod proxy.
#[tokio::test(flavor = "multi_thread")]
async fn on_a_node_the_verbs_tell_of_two_pods_that_call_each_other() {
    let Some(node) = node::shared().await else {
        return;
    };
    let mesh = node
        .namespace("verbs", &[("istio-injection", "enabled")])
        .await;
    mesh.apply(node::WEB_AND_CLIENT).await;
    mesh.ready("pod/web").await;
    mesh.ready("pod/client").await;
    let name = mesh.name();
    let url = format!("http://web.{name}/echo?msg=hello");
    let malha = async |args: &[&str]| {
        let mut malha = tokio::process::Command::new(env!("CARGO_BIN_EXE_malha"));
        malha
            .env("KUBECONFIG", node.kubeconfig())
            .args(args)
            .args(["-n", name, "-o", "json"]);
        let output = run(malha, None).await;
        let told = serde_json::from_slice::<Value>(&output.stdout).unwrap_or_default();
        (output.status.code(), told, text(&output.stderr))
    };

    let ps = rig::eventually(PATIENCE, "both proxies synced", || async {
        let (code, ps, said) = malha(&["ps", "--strict"]).await;
        (code == Some(0) && ps["items"].as_array().is_some_and(|items| items.len() == 2))
            .then(|| ps.clone())
            .ok_or_else(|| format!("{code:?} {said} {ps:#}"))
    })
    .await;
    let identity = format!("spiffe://cluster.local/ns/{name}/sa/default");
    for proxy in ps["items"].as_array().expect("a list") {
        assert_eq!(proxy["identity"], *identity, "{proxy:#}");
        assert_eq!(proxy["state"], "synced", "{proxy:#}");
        assert!(proxy["certificateNotAfter"].is_string(), "{proxy:#}");
    }

    rig::eventually(PATIENCE, "web answering", || async {
        mesh.exec("pod/client", "client", &["curl", "-sSf", &url])
            .await
    })
    .await;
    rig::eventually(PATIENCE, "Envoy holding what was sent", || async {
        let (code, config, said) = malha(&["config", "client"]).await;
        let resources = config["resources"].as_array().map_or(0, Vec::len);
        assert!(!config.to_string().contains("PRIVATE KEY"));
        (code == Some(0) && resources > 3)
            .then_some(())
            .ok_or_else(|| format!("{code:?} {said} {config:#}"))
    })
    .await;

    let (code, explained, said) = malha(&["explain", "web"]).await;
    let web = &explained["items"][0];
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(web["identity"], *identity, "{web:#}");
    assert!(web["certificateNotAfter"].is_string(), "{said}{web:#}");
    assert_eq!(web["mtls"]["ports"][0]["port"], 8080, "{web:#}");

    let calls = "for i in $(seq 40); do curl -sSf -o /dev/null $0 || exit 1; sleep 0.1; done";
    let (calls, edges) = (["sh", "-c", calls, &url], ["edges", "--window", "2s"]);
    let (called, told) = tokio::join!(mesh.exec("pod/client", "client", &calls), malha(&edges));
    called.expect("every call is answered");
    let (code, edges, said) = told;
    assert_eq!(code, Some(0), "{said}");
    let items = edges["items"].as_array().expect("a list");
    let edge = items
        .iter()
        .find(|edge| edge["server"] == format!("{name}/web"));
    let edge = edge.unwrap_or_else(|| panic!("no edge to web in {edges:#}"));
    assert_eq!(edge["client"], format!("{name}/client"), "{edges:#}");
    assert_eq!(edge["mtls"], "yes", "{edges:#}");
    assert_eq!(edge["success"], 1.0, "{edges:#}");
    assert!(edge["requestsPerSecond"].as_f64() > Some(0.5), "{edges:#}");
}

const PATIENCE: std::time::Duration = std::time::Duration::from_secs(90);

fn stdout(output: Output) -> String {
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

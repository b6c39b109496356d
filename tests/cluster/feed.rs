//! The mesh from a real API server: what is written there reaches proxies, and what became of a user's object is written
//! back.

use std::time::Duration;

use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::{Value, json};

use crate::{
    authority::ca_bundle,
    delta::{CDS, Client, EDS, Held, NAME, certified, connect},
    rig::{
        self, Cluster, TokenOf, eventually,
        outside::{self, Replica},
        pods::{MESH, create, pod},
    },
};

const PATIENCE: Duration = Duration::from_secs(60);
const QUIET: Duration = Duration::from_millis(700);

/// `explained-04` of the user's documents, as it was written.
const EXPLAINED_04: &str = "# Service Mesh criptografa automaticamente
apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata:
  name: default
spec:
  mtls:
    mode: STRICT  # Força mTLS entre todos os serviços
";

/// The PeerAuthentication of `planning-03`, as it was written.
const PLANNING_03: &str = "# Enable mTLS globally
apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata:
  name: default
  namespace: default
spec:
  mtls:
    mode: STRICT
";

async fn policy(cluster: &Cluster, namespace: &str) -> Value {
    let kind = GroupVersionKind::gvk("security.istio.io", "v1", "PeerAuthentication");
    let kind = ApiResource::from_gvk_with_plural(&kind, "peerauthentications");
    let api: Api<DynamicObject> = Api::namespaced_with(cluster.client().await, namespace, &kind);
    let found = api.get("default").await.expect("the object was stored");
    serde_json::to_value(found).expect("JSON")
}

/// Waits for a condition of the PeerAuthentication `default`, and gives its message.
async fn condition(cluster: &Cluster, namespace: &str, kind: &str, reason: &str) -> String {
    eventually(
        PATIENCE,
        &format!("{kind}={reason} in {namespace}"),
        async || {
            let object = policy(cluster, namespace).await;
            let conditions = object
                .pointer("/status/conditions")
                .and_then(Value::as_array);
            let found = conditions
                .into_iter()
                .flatten()
                .find(|it| it["type"] == kind);
            match found {
                Some(it) if it["reason"] == reason => {
                    assert_eq!(it["observedGeneration"], object["metadata"]["generation"]);
                    Ok(it["message"].as_str().unwrap_or_default().to_owned())
                }
                other => Err(format!("{other:?}")),
            }
        },
    )
    .await
}

async fn apply(cluster: &Cluster, namespace: &str, text: &str) {
    let output = cluster
        .kubectl(["apply", "--namespace", namespace, "-f", "-"], Some(text))
        .await;
    assert!(output.status.success(), "{output:?}");
    assert!(
        output.stderr.is_empty(),
        "a warning: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a4_b4_the_users_documents_apply_unchanged_and_say_what_became_of_them() {
    let Some(_plane) = outside::shared().await else {
        return;
    };
    let cluster = rig::shared().await.expect("the control plane runs in it");
    let namespace = cluster.namespace("jobs", MESH).await;
    for (namespace, document) in [(&*namespace, EXPLAINED_04), ("default", PLANNING_03)] {
        apply(cluster, namespace, document).await;
        let stored = policy(cluster, namespace).await;
        assert_eq!(stored["spec"], json!({"mtls": {"mode": "STRICT"}}));
        condition(cluster, namespace, "Accepted", "Accepted").await;
        condition(cluster, namespace, "Programmed", "NoProxies").await;
    }

    // what nobody knows is kept, and named
    let misspelt = EXPLAINED_04.replace("  mtls:\n", "  mtlz: {}\n  mtls:\n");
    let output = cluster
        .kubectl(
            [
                "apply",
                "--validate=ignore",
                "--namespace",
                &namespace,
                "-f",
                "-",
            ],
            Some(&misspelt),
        )
        .await;
    assert!(output.status.success(), "{output:?}");
    let stored = policy(cluster, &namespace).await;
    assert_eq!(stored["spec"]["mtlz"], json!({}), "not pruned");
    let message = condition(cluster, &namespace, "Accepted", "PartiallyAccepted").await;
    assert!(message.contains("spec.mtlz"), "{message}");
    let removed = cluster
        .kubectl(
            [
                "delete",
                "peerauthentication",
                "default",
                "--namespace",
                "default",
            ],
            None,
        )
        .await;
    assert!(removed.status.success(), "{removed:?}");
}

/// A stream of a pod's proxy to a replica.
async fn stream(cluster: &Cluster, replica: &Replica, namespace: &str, pod: &str) -> Client {
    let of_pod = TokenOf::Pod(pod);
    let token = cluster
        .token(namespace, "default", &of_pod, &["malha-ca"], 600)
        .await;
    let bundle = ca_bundle(cluster).await;
    let roots: Vec<_> = CertificateDer::pem_slice_iter(bundle.as_bytes())
        .collect::<Result<_, _>>()
        .expect("PEM");
    let shown = certified(replica.ca, &roots, &token).await;
    let channel = connect(replica.ca, NAME, &roots, Some(shown)).await;
    Client::open(channel, &format!("{pod}.{namespace}"), Held::default())
        .await
        .expect("its own pod")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_to_the_api_server_reaches_the_proxies_of_every_replica() {
    let Some(plane) = outside::shared().await else {
        return;
    };
    let cluster = rig::shared().await.expect("the control plane runs in it");
    let namespace = cluster.namespace("shop", MESH).await;
    create(cluster, &namespace, &pod("web"))
        .await
        .expect("a meshed pod");
    let pods: Api<DynamicObject> = rig::pods::raw_pods(&cluster.client().await, &namespace);
    let status = json!({"status": {"podIP": "10.244.9.9", "podIPs": [{"ip": "10.244.9.9"}], "phase": "Running"}});
    pods.patch_status("web", &PatchParams::default(), &Patch::Merge(status))
        .await
        .expect("an address");

    let mut clients = Vec::new();
    for replica in plane.replicas() {
        let mut client = stream(cluster, replica, &namespace, "web").await;
        client.settle(QUIET).await;
        clients.push(client);
    }
    let service = "apiVersion: v1
kind: Service
metadata: {name: cart}
spec:
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: cart-1
  labels: {kubernetes.io/service-name: cart}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints:
- addresses: [10.244.9.1]
";
    apply(cluster, &namespace, service).await;
    let mine = |name: &String| name.contains("cart") && name.contains(&namespace);
    for client in &mut clients {
        let knows = |client: &Client, kind| {
            client
                .held
                .versions
                .keys()
                .any(|(of, name)| *of == kind && mine(name))
        };
        while !(knows(client, CDS) && knows(client, EDS)) {
            client
                .step(PATIENCE)
                .await
                .expect("it is told")
                .expect("the stream goes on");
        }
        client.settle(QUIET).await;
    }

    let more = service.replace(
        "- addresses: [10.244.9.1]",
        "- addresses: [10.244.9.1]\n- addresses: [10.244.9.2]",
    );
    apply(cluster, &namespace, &more).await;
    for client in &mut clients {
        let before = client.held.versions.clone();
        let differs = |client: &Client| {
            client.held.versions.iter().any(|(key, version)| {
                key.0 == EDS && mine(&key.1) && before.get(key) != Some(version)
            })
        };
        while !differs(client) {
            client
                .step(PATIENCE)
                .await
                .expect("it is told")
                .expect("the stream goes on");
        }
        client.settle(QUIET).await;
    }

    // the leader counts the proxies that are connected to it
    apply(cluster, &namespace, EXPLAINED_04).await;
    let told = async {
        for client in &mut clients {
            client.settle(Duration::from_secs(3)).await;
        }
    };
    let acked = condition(cluster, &namespace, "Programmed", "Acked");
    let ((), message) = tokio::join!(told, acked);
    assert!(
        message.starts_with("1/1 proxies (of those connected to "),
        "{message}"
    );
}

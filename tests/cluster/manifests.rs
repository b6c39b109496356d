//! `kubectl apply -k manifests/base` on a real API server, and the admission policy in it.

use std::{collections::BTreeMap, path::Path, time::Duration};

use k8s_openapi::{
    ByteString,
    api::{
        admissionregistration::v1::MutatingWebhookConfiguration,
        core::v1::{Namespace, Pod},
    },
};
use kube::{
    Api,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use malha::inject::{
    NamespaceFacts,
    select::{PodFacts, select},
};
use serde_json::{Value, json};

use crate::rig::{Cluster, Setup, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn the_base_is_applied_twice_without_a_difference_and_keeps_the_ca_bundle() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let said = apply(&cluster, &["-k", &tree("manifests/base")]).await;
    assert!(!said.contains("Warning"), "{said}");

    // What the control plane writes: one field, as a field manager of its own.
    let bundle = a_certificate();
    let configurations: Api<MutatingWebhookConfiguration> = Api::all(cluster.client().await);
    let applied = configurations.get("malha-injector").await.expect("applied");
    let names: Vec<_> = applied
        .webhooks
        .unwrap_or_default()
        .into_iter()
        .map(|webhook| webhook.name)
        .collect();
    assert_eq!(names.len(), 4);
    let field = json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": { "name": "malha-injector" },
        "webhooks": names.iter().map(|name| json!({
            "name": name,
            "clientConfig": { "caBundle": ByteString(bundle.clone()) },
        })).collect::<Vec<_>>(),
    });
    let write = PatchParams::apply("malha-ca-bundle").force();
    configurations
        .patch("malha-injector", &write, &Patch::Apply(&field))
        .await
        .expect("the bundle is written");

    let said = apply(&cluster, &["-k", &tree("manifests/base")]).await;
    // kubectl sends a budget's selector each time (its type says `patchStrategy: replace`), and nothing changes by it.
    let budget = "poddisruptionbudget.policy/malha configured";
    for line in said.lines().filter(|&line| line != budget) {
        assert!(
            line.ends_with("unchanged"),
            "applied twice, and yet: {line}"
        );
    }
    for webhook in configurations
        .get("malha-injector")
        .await
        .expect("there")
        .webhooks
        .unwrap_or_default()
    {
        assert_eq!(
            webhook.client_config.ca_bundle,
            Some(ByteString(bundle.clone())),
            "{}",
            webhook.name
        );
    }

    // Pod Security `restricted` and our own webhooks, which nobody answers here, let the control plane's pods be made.
    let pods: Api<Pod> = Api::namespaced(cluster.client().await, "malha-system");
    let own = ListParams::default().labels("app.kubernetes.io/component=control-plane");
    eventually(
        Duration::from_secs(20),
        "two pods of the control plane",
        || async {
            let found = pods
                .list(&own)
                .await
                .map_err(|error| error.to_string())?
                .items
                .len();
            if found == 2 {
                Ok(())
            } else {
                Err(format!("{found} pods"))
            }
        },
    )
    .await;

    for overlay in ["manifests/overlays/ha", "manifests/overlays/dev"] {
        let said = apply(&cluster, &["-k", &tree(overlay)]).await;
        assert!(!said.contains("Warning"), "{overlay}: {said}");
    }
}

/// The policy alone, without any webhook: it refuses exactly the pods that the injector would have patched.
#[tokio::test(flavor = "multi_thread")]
async fn the_admission_policy_agrees_with_the_injector() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    apply(
        &cluster,
        &["-f", &tree("manifests/base/sidecar-present.yaml")],
    )
    .await;
    let namespaces = namespaces(&cluster).await;
    let pods = pods();

    // The API server takes each binding up by itself.
    for (namespace, labels) in [
        ("injection-enabled", json!({})),
        ("injection-absent-rev-default", json!({})),
        (
            "injection-absent-rev-absent",
            json!({ "istio.io/rev": "default" }),
        ),
        (
            "injection-absent-rev-absent",
            json!({ "sidecar.istio.io/inject": "true" }),
        ),
    ] {
        let api: Api<Pod> = Api::namespaced(cluster.client().await, namespace);
        let plain = pod(json!({ "labels": labels }), json!({}));
        eventually(Duration::from_secs(30), "the policy in force", || async {
            match api.create(&dry_run(), &plain).await {
                Err(kube::Error::Api(status)) if status.message.contains("malha-proxy") => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }

    let mut outcomes = BTreeMap::from([(true, 0), (false, 0)]);
    for namespace in &namespaces {
        let api: Api<Pod> = Api::namespaced(cluster.client().await, &namespace.name);
        for (name, pod, exempt) in &pods {
            let must_be_refused = !exempt && selected(namespace, pod);
            let answer = api.create(&dry_run(), pod).await;
            let refused = match &answer {
                Ok(_) => false,
                Err(kube::Error::Api(status))
                    if status.message.contains("malha-sidecar-present") =>
                {
                    true
                }
                Err(other) => panic!("{name} in {}: {other}", namespace.name),
            };
            assert_eq!(refused, must_be_refused, "{name} in {}", namespace.name);
            *outcomes.entry(refused).or_default() += 1;
        }
    }
    assert!(outcomes.values().all(|&count| count > 20), "{outcomes:?}");
}

/// The labels of a namespace that selection looks at, in every combination.
async fn namespaces(cluster: &Cluster) -> Vec<NamespaceFacts> {
    let mut all = vec![NamespaceFacts {
        name: "kube-system".to_owned(),
        ..NamespaceFacts::default()
    }];
    for injection in [None, Some("enabled"), Some("disabled"), Some("")] {
        for revision in [None, Some("default"), Some("other")] {
            let labels: Vec<_> = [("istio-injection", injection), ("istio.io/rev", revision)]
                .into_iter()
                .filter_map(|(key, value)| Some((key, value?)))
                .collect();
            let name = match (injection, revision) {
                (Some("enabled"), None) => "injection-enabled".to_owned(),
                _ => format!(
                    "injection-{}-rev-{}",
                    injection.map_or("absent", |value| if value.is_empty() {
                        "empty"
                    } else {
                        value
                    }),
                    revision.unwrap_or("absent")
                ),
            };
            cluster.named_namespace(&name, &labels).await;
            let labels = labels
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .collect();
            all.push(NamespaceFacts { name, labels });
        }
    }
    let api: Api<Namespace> = Api::all(cluster.client().await);
    let marked = json!({ "metadata": { "labels": { "istio-injection": "enabled" } } });
    api.patch(
        "kube-system",
        &PatchParams::default(),
        &Patch::Merge(&marked),
    )
    .await
    .expect("labelled");
    all[0]
        .labels
        .insert("istio-injection".to_owned(), "enabled".to_owned());
    all
}

/// Pods by what decides about them; the last says whether the injector lets such a pod go in without a sidecar although
/// its labels select it.
fn pods() -> Vec<(String, Pod, bool)> {
    let mut all = Vec::new();
    for inject in [None, Some("true"), Some("false"), Some("yes")] {
        for revision in [None, Some("default"), Some("other")] {
            let mut labels = serde_json::Map::new();
            for (key, value) in [
                ("sidecar.istio.io/inject", inject),
                ("istio.io/rev", revision),
            ] {
                if let Some(value) = value {
                    labels.insert(key.to_owned(), value.into());
                }
            }
            all.push((
                format!("labels {inject:?} {revision:?}"),
                pod(json!({ "labels": labels }), json!({})),
                false,
            ));
        }
    }
    let container = |name: &str| json!({ "name": name, "image": "example.com/app:1" });
    let containers = |names: &[&str]| names.iter().map(|name| container(name)).collect::<Vec<_>>();
    let annotated = |value: &str| json!({ "annotations": { "sidecar.istio.io/inject": value } });
    let both = json!({ "labels": { "sidecar.istio.io/inject": "true" }, "annotations": { "sidecar.istio.io/inject": "false" } });
    let cases = [
        (
            "own proxy",
            json!({}),
            json!({ "containers": containers(&["app", "malha-proxy"]) }),
            true,
        ),
        (
            "own native proxy",
            json!({}),
            json!({ "initContainers": containers(&["malha-init", "malha-proxy"]) }),
            true,
        ),
        (
            "almost own proxy",
            json!({}),
            json!({ "containers": containers(&["app", "malha-proxy2"]) }),
            false,
        ),
        (
            "other init container",
            json!({}),
            json!({ "initContainers": containers(&["setup"]) }),
            false,
        ),
        (
            "Istio's proxy",
            json!({}),
            json!({ "containers": containers(&["app", "istio-proxy"]) }),
            true,
        ),
        (
            "Linkerd's proxy",
            json!({}),
            json!({ "initContainers": containers(&["linkerd-proxy"]) }),
            true,
        ),
        (
            "Windows by os",
            json!({}),
            json!({ "os": { "name": "windows" } }),
            true,
        ),
        (
            "Linux by os",
            json!({}),
            json!({ "os": { "name": "linux" } }),
            false,
        ),
        (
            "Windows by selector",
            json!({}),
            json!({ "nodeSelector": { "kubernetes.io/os": "windows" } }),
            true,
        ),
        (
            "other selector",
            json!({}),
            json!({ "nodeSelector": { "disk": "windows" } }),
            false,
        ),
        ("annotation false", annotated("false"), json!({}), true),
        ("annotation true", annotated("true"), json!({}), false),
        ("annotation garbage", annotated("no"), json!({}), false),
        ("label true, annotation false", both, json!({}), false),
        (
            "host network",
            json!({}),
            json!({ "hostNetwork": true }),
            false,
        ),
        (
            "host network off",
            json!({}),
            json!({ "hostNetwork": false }),
            false,
        ),
        (
            "control plane",
            json!({ "labels": { "malha.io/control-plane": "true" } }),
            json!({}),
            false,
        ),
    ];
    all.extend(
        cases.map(|(name, metadata, spec, exempt)| (name.to_owned(), pod(metadata, spec), exempt)),
    );
    all
}

fn pod(metadata: Value, spec: Value) -> Pod {
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "generateName": "probe-" },
        "spec": { "containers": [{ "name": "app", "image": "example.com/app:1" }] },
    });
    for (part, added) in [("metadata", metadata), ("spec", spec)] {
        let part = pod[part].as_object_mut().expect("an object");
        part.extend(added.as_object().expect("an object").clone());
    }
    serde_json::from_value(pod).expect("a pod")
}

fn selected(namespace: &NamespaceFacts, pod: &Pod) -> bool {
    let labels = pod.metadata.labels.clone().unwrap_or_default();
    let facts = PodFacts {
        host_network: pod
            .spec
            .as_ref()
            .and_then(|spec| spec.host_network)
            .unwrap_or_default(),
        ..PodFacts::from_labels(&labels)
    };
    select(namespace, &facts, "default").outcome.is_ok()
}

fn dry_run() -> PostParams {
    PostParams {
        dry_run: true,
        ..PostParams::default()
    }
}

fn a_certificate() -> Vec<u8> {
    let made = rcgen::generate_simple_self_signed(["test".to_owned()]).expect("a certificate");
    made.cert.pem().into_bytes()
}

async fn apply(cluster: &Cluster, what: &[&str]) -> String {
    let output = cluster.kubectl([&["apply"], what].concat(), None).await;
    let said = [output.stdout, output.stderr]
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .concat();
    assert!(output.status.success(), "kubectl apply {what:?}: {said}");
    said
}

fn tree(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(path)
        .display()
        .to_string()
}

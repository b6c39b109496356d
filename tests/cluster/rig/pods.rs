//! Pods as a real API server takes, stores and audits them. Raw JSON throughout: a typed struct in between could lose
//! the very field that a test is about.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Output;
use std::time::Duration;

use kube::Client;
use kube::api::{Api, DynamicObject, PostParams};
use kube::core::{ApiResource, GroupVersionKind, Status};
use serde_json::{Value, json};

use super::{Cluster, eventually};

/// The sidecar.
pub(crate) const PROXY: &str = "malha-proxy";
/// The init container.
pub(crate) const INIT: &str = "malha-init";
/// Labels of a namespace of the mesh.
pub(crate) const MESH: &[(&str, &str)] = &[("istio-injection", "enabled")];

/// How long the audit log may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The smallest pod.
pub(crate) fn pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name },
        "spec": { "containers": [{ "name": "app", "image": "example.com/app:1" }] },
    })
}

/// Fields of `with` over those of `object`, one level deep.
pub(crate) fn merge(object: &mut Value, with: Value) {
    if let Value::Object(with) = with {
        for (field, value) in with {
            object[field] = value;
        }
    }
}

/// Pods as they are on the wire: no typed struct in between that could lose a field.
pub(crate) fn raw_pods(client: &Client, namespace: &str) -> Api<DynamicObject> {
    let pods = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Pod"));
    Api::namespaced_with(client.clone(), namespace, &pods)
}

/// Creates a pod as it stands; the stored pod, or the API server's refusal.
pub(crate) async fn create(
    cluster: &Cluster,
    namespace: &str,
    pod: &Value,
) -> Result<Value, Box<Status>> {
    let pods = raw_pods(&cluster.client().await, namespace);
    send(&pods, pod, &PostParams::default()).await
}

/// Whether the API server would take a pod, and what it would store: everything happens but the last write.
pub(crate) async fn dry_run(pods: &Api<DynamicObject>, pod: &Value) -> Result<Value, Box<Status>> {
    let params = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    send(pods, pod, &params).await
}

async fn send(
    pods: &Api<DynamicObject>,
    pod: &Value,
    params: &PostParams,
) -> Result<Value, Box<Status>> {
    let object: DynamicObject = serde_json::from_value(pod.clone()).expect("a pod is an object");
    match pods.create(params, &object).await {
        Ok(stored) => Ok(serde_json::to_value(stored).expect("a pod is JSON")),
        Err(kube::Error::Api(status)) => Err(status),
        Err(error) => panic!("the API server does not answer: {error}"),
    }
}

pub(crate) fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    ["initContainers", "containers"]
        .into_iter()
        .flat_map(|list| pod["spec"][list].as_array().into_iter().flatten())
}

pub(crate) fn container<'a>(pod: &'a Value, name: &str) -> &'a Value {
    containers(pod)
        .find(|container| container["name"] == name)
        .unwrap_or_else(|| panic!("no container {name} in {pod:#}"))
}

pub(crate) fn names<'a>(pod: &'a Value, list: &str) -> Vec<&'a str> {
    let list = pod["spec"][list].as_array().into_iter().flatten();
    list.filter_map(|container| container["name"].as_str())
        .collect()
}

/// A stored pod without what the injector adds and without what differs between any two pods of equal templates.
/// Written from the specification and not with `malha uninject`, which is itself under test elsewhere.
pub(crate) fn without_ours(mut pod: Value) -> Value {
    let metadata = pod["metadata"].as_object_mut().expect("metadata");
    for field in OF_THE_SERVER {
        metadata.remove(field);
    }
    if metadata.remove("generateName").is_some() {
        metadata.remove("name");
    }
    for owner in metadata
        .get_mut("ownerReferences")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        // A Deployment's ReplicaSet is named by a hash of the template; equal templates, equal names.
        owner["uid"] = Value::Null;
    }
    let ours = |key: &str| {
        key.starts_with("malha.io/")
            || key.starts_with("kubectl.kubernetes.io/default-")
            || key.starts_with("prometheus.io/")
            || key == "security.istio.io/tlsMode"
            || key == "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes"
    };
    for map in ["labels", "annotations"] {
        if let Some(map) = metadata.get_mut(map).and_then(Value::as_object_mut) {
            // Job controllers put the Job's uid into labels.
            map.retain(|key, _| !ours(key) && !key.ends_with("controller-uid"));
            // A CronJob's Job is named by its minute.
            for (key, value) in map.iter_mut() {
                if key.ends_with("job-name") {
                    *value = Value::Null;
                }
            }
        }
    }
    for list in ["initContainers", "containers", "volumes"] {
        if let Some(list) = pod["spec"][list].as_array_mut() {
            list.retain(|item| {
                !item["name"]
                    .as_str()
                    .is_some_and(|name| name.starts_with("malha-"))
            });
        }
    }
    if let Some(object) = pod.as_object_mut() {
        object.remove("status");
    }
    without_chance(&pod)
}

/// A stored pod as somebody would send it again.
pub(crate) fn as_sent(mut pod: Value) -> Value {
    if let Some(object) = pod.as_object_mut() {
        object.remove("status");
    }
    if let Some(metadata) = pod["metadata"].as_object_mut() {
        for field in OF_THE_SERVER {
            metadata.remove(field);
        }
        if metadata.contains_key("generateName") {
            metadata.remove("name");
        }
    }
    pod
}

/// A stored pod such that two that mean the same are equal: nothing of the server's, nothing of chance, and the lists
/// whose order means nothing in order (ServiceAccount admission appends to them, before or after the injector).
pub(crate) fn comparable(pod: Value) -> Value {
    let mut pod = without_chance(&as_sent(pod));
    let by = |list: &mut Value, field: &str| {
        if let Some(list) = list.as_array_mut() {
            list.sort_by_key(|item| item[field].as_str().map(str::to_owned));
        }
    };
    by(&mut pod["spec"]["volumes"], "name");
    for list in ["initContainers", "containers"] {
        for container in pod["spec"][list].as_array_mut().into_iter().flatten() {
            by(&mut container["volumeMounts"], "mountPath");
        }
    }
    pod
}

/// Panics where two values differ, with the places and not with two pages of JSON.
pub(crate) fn assert_equal(left: &Value, right: &Value, what: &str) {
    let mut places = Vec::new();
    differences("", left, right, &mut places);
    assert!(places.is_empty(), "{what}:\n{}", places.join("\n"));
}

fn differences(path: &str, left: &Value, right: &Value, places: &mut Vec<String>) {
    match (left, right) {
        (Value::Object(left), Value::Object(right)) => {
            let keys: BTreeSet<_> = left.keys().chain(right.keys()).collect();
            for key in keys {
                let none = Value::Null;
                let (left, right) = (
                    left.get(key).unwrap_or(&none),
                    right.get(key).unwrap_or(&none),
                );
                differences(&format!("{path}/{key}"), left, right, places);
            }
        }
        (Value::Array(left), Value::Array(right)) if left.len() == right.len() => {
            for (at, (left, right)) in left.iter().zip(right).enumerate() {
                differences(&format!("{path}/{at}"), left, right, places);
            }
        }
        _ if left == right => {}
        _ => places.push(format!("{path}: {left} and {right}")),
    }
}

/// Metadata that the API server writes.
const OF_THE_SERVER: [&str; 6] = [
    "uid",
    "resourceVersion",
    "creationTimestamp",
    "managedFields",
    "namespace",
    "generation",
];

/// ServiceAccount admission ends the name of its volume in five characters of chance.
fn without_chance(pod: &Value) -> Value {
    let text = pod.to_string();
    let mut parts = text.split("kube-api-access-");
    let mut anonymous = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        anonymous.push_str("kube-api-access");
        anonymous.push_str(part.get(5..).unwrap_or_default());
    }
    serde_json::from_str(&anonymous).expect("still JSON")
}

/// The audit event of a pod's creation.
pub(crate) async fn audit_event(cluster: &Cluster, namespace: &str, pod: &Value) -> Value {
    eventually(PATIENCE, "the audit event of a pod's creation", || async {
        cluster
            .audit()
            .into_iter()
            .find(|event| {
                event["verb"] == "create"
                    && event["objectRef"]["resource"] == "pods"
                    && event["objectRef"]["namespace"] == namespace
                    && event["responseObject"]["metadata"]["uid"] == pod["metadata"]["uid"]
            })
            .ok_or_else(|| "not in the log".to_owned())
    })
    .await
}

/// The injector's annotations in the audit log, the last part of the key first: `reason` -> (webhook, value).
pub(crate) async fn audit_annotations(
    cluster: &Cluster,
    namespace: &str,
    pod: &Value,
) -> BTreeMap<String, (String, String)> {
    let event = audit_event(cluster, namespace, pod).await;
    let annotations = event["annotations"]
        .as_object()
        .cloned()
        .unwrap_or_default();
    annotations
        .into_iter()
        .filter_map(|(key, value)| {
            let (webhook, key) = key.split_once('/')?;
            webhook.ends_with(".injector.malha.io").then_some(())?;
            Some((
                key.to_owned(),
                (webhook.to_owned(), value.as_str()?.to_owned()),
            ))
        })
        .collect()
}

/// The reason that the injector gave for a pod, if it was asked.
pub(crate) async fn audited_reason(
    cluster: &Cluster,
    namespace: &str,
    pod: &Value,
) -> Option<String> {
    let annotations = audit_annotations(cluster, namespace, pod).await;
    annotations.get("reason").map(|(_, reason)| reason.clone())
}

/// Which entries of the injector were called for a pod, by what the API server itself writes about mutations.
pub(crate) async fn injector_calls(cluster: &Cluster, namespace: &str, pod: &Value) -> Vec<String> {
    let event = audit_event(cluster, namespace, pod).await;
    let annotations = event["annotations"]
        .as_object()
        .cloned()
        .unwrap_or_default();
    let mut webhooks: Vec<String> = annotations
        .iter()
        .filter(|(key, _)| key.starts_with("mutation.webhook.admission.k8s.io/"))
        .filter_map(|(_, value)| {
            let told: Value = serde_json::from_str(value.as_str()?).ok()?;
            Some(told["webhook"].as_str()?.to_owned())
        })
        .filter(|webhook| webhook.ends_with(".injector.malha.io"))
        .collect();
    webhooks.sort();
    webhooks.dedup();
    webhooks
}

/// What `malha explain` says about a pod as it is stored: the code of its verdict.
pub(crate) async fn explained(cluster: &Cluster, namespace: &str, pod: &Value) -> String {
    let output = cluster
        .kubectl(["get", "namespace", namespace, "-o", "json"], None)
        .await;
    let namespace: Value = serde_json::from_slice(&output.stdout).expect("the namespace");
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": [pod, namespace] });
    let output = malha(&["explain", "-f", "-", "-o", "json"], &list.to_string()).await;
    let explained: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("malha explain: {error}: {output:?}"));
    explained["items"][0]["reason"]
        .as_str()
        .unwrap_or_else(|| panic!("no reason in {explained:#}"))
        .to_owned()
}

/// Runs a verb of the real program, without a cluster.
pub(crate) async fn malha(args: &[&str], input: &str) -> Output {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_malha"));
    command.args(args).env_remove("KUBECONFIG");
    super::run(command, Some(input)).await
}

//! What is kept of an object, and how it is read: only the fields that are kept are parsed, and a shape that nobody
//! expected is a fact less, never an error.

use std::{
    borrow::Cow, collections::BTreeMap, fmt::Debug, marker::PhantomData, net::IpAddr, sync::Arc,
};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1 as core,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time},
};
use kube::Resource;
use serde::{Deserialize, Deserializer};

use super::kept::Names;
use crate::inject::select::MIRROR;

/// What is kept of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// Whether it is being deleted.
    pub terminating: bool,
}

/// What is kept of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.uid`.
    pub uid: Box<str>,
    /// `spec.serviceAccountName`.
    pub service_account: Arc<str>,
    /// `spec.nodeName`, once it is bound.
    pub node: Option<Arc<str>>,
    /// `metadata.creationTimestamp`.
    pub created: Option<Timestamp>,
    /// `metadata.deletionTimestamp`: the end of its grace period, once it is being deleted.
    pub deletion: Option<Timestamp>,
    /// Succeeded or Failed: nothing of it runs any more.
    pub finished: bool,
    /// Its labels that say something about injection.
    pub labels: BTreeMap<String, String>,
    /// `status.podIPs`.
    pub addresses: Box<[IpAddr]>,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// The kubelet's image of a static pod.
    pub mirror: bool,
    /// Its annotations choose the sidecar's image.
    pub chosen_image: bool,
    /// The image of its container `malha-proxy`, where it has one.
    pub proxy_image: Option<Arc<str>>,
    /// The controller that made it.
    pub owner: Option<Owner>,
}

/// The controller that made a pod, and which of its templates.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// Such as `apps/v1`.
    pub api_version: Arc<str>,
    /// Such as `ReplicaSet`.
    pub kind: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its UID.
    pub uid: Arc<str>,
    /// `controller-revision-hash` or `pod-template-hash`, another for each generation of the owner's template; empty
    /// where the owner has only one.
    pub template: Arc<str>,
}

/// A kind of the cluster, read as far as it is kept.
#[derive(Clone, Debug, Deserialize)]
#[serde(bound = "S: Deserialize<'de>, T: Deserialize<'de>")]
pub(super) struct View<K, S, T> {
    #[serde(default, deserialize_with = "metadata")]
    metadata: ObjectMeta,
    spec: Option<S>,
    status: Option<T>,
    #[serde(skip)]
    kind: PhantomData<fn() -> K>,
}

pub(super) type PodView = View<core::Pod, PodSpec, PodStatus>;
pub(super) type NodeView = View<core::Node, NodeSpec, NodeStatus>;
pub(super) type NamespaceView = View<core::Namespace, NoSpec, NoStatus>;
pub(super) type ServiceAccountView = View<core::ServiceAccount, NoSpec, NoStatus>;

/// What of an object is read beside its metadata.
pub(super) trait Spec {
    /// Nothing: the API server is asked for the metadata alone.
    const METADATA_ONLY: bool = false;
}

impl Spec for PodSpec {}
impl Spec for NodeSpec {}
impl Spec for NoSpec {
    const METADATA_ONLY: bool = true;
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct NoSpec {}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct NoStatus {}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodSpec {
    service_account_name: Option<String>,
    node_name: Option<String>,
    host_network: Option<bool>,
    containers: Option<Vec<Container>>,
    init_containers: Option<Vec<Container>>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Container {
    name: Option<String>,
    image: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodStatus {
    phase: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
}

#[derive(Clone, Debug, Deserialize)]
struct PodIp {
    ip: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct NodeSpec {}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NodeStatus {
    node_info: Option<NodeInfo>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct NodeInfo {
    kubelet_version: Option<String>,
}

/// `metadata` without what nobody here needs, `managedFields` above all: it is often the larger half of an object.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    owner_references: Option<Vec<OwnerReference>>,
    creation_timestamp: Option<String>,
    deletion_timestamp: Option<String>,
}

fn metadata<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    let read = Metadata::deserialize(deserializer)?;
    Ok(ObjectMeta {
        name: read.name,
        namespace: read.namespace,
        uid: read.uid,
        resource_version: read.resource_version,
        labels: read.labels,
        annotations: read.annotations,
        owner_references: read.owner_references,
        creation_timestamp: read.creation_timestamp.as_deref().map(time),
        deletion_timestamp: read.deletion_timestamp.as_deref().map(time),
        ..ObjectMeta::default()
    })
}

/// A pod's author chooses its grace period and with it the deletion time, up to the end of the year 9999, a day later than
/// what a [`Timestamp`] holds. One such pod must not make the list of all pods unreadable.
fn time(text: &str) -> Time {
    Time(text.parse().unwrap_or(Timestamp::MAX))
}

impl<K, S, T> View<K, S, T> {
    /// The metadata, as far as it was read.
    pub(super) fn into_metadata(self) -> ObjectMeta {
        self.metadata
    }
}

impl<K, S, T> Resource for View<K, S, T>
where
    K: Resource<DynamicType = ()>,
    S: Spec,
{
    type DynamicType = ();
    type Scope = K::Scope;

    fn metadata_api() -> bool {
        S::METADATA_ONLY
    }

    fn kind(dt: &()) -> Cow<'_, str> {
        K::kind(dt)
    }
    fn group(dt: &()) -> Cow<'_, str> {
        K::group(dt)
    }
    fn version(dt: &()) -> Cow<'_, str> {
        K::version(dt)
    }
    fn plural(dt: &()) -> Cow<'_, str> {
        K::plural(dt)
    }
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl Namespace {
    pub(super) fn of(metadata: ObjectMeta) -> Self {
        Self {
            labels: metadata.labels.unwrap_or_default(),
            terminating: metadata.deletion_timestamp.is_some(),
        }
    }
}

impl Pod {
    pub(super) fn of(view: PodView, names: &mut Names) -> Self {
        let metadata = view.metadata;
        let spec = view.spec.unwrap_or_default();
        let (phase, addresses) = match view.status {
            Some(status) => (status.phase, status.pod_ips.unwrap_or_default()),
            None => (None, Vec::new()),
        };
        let addresses = addresses
            .iter()
            .filter_map(|it| it.ip.as_deref()?.parse().ok());
        let annotations = metadata.annotations.as_ref();
        Self {
            deletion: metadata.deletion_timestamp.as_ref().map(|time| time.0),
            created: metadata.creation_timestamp.as_ref().map(|time| time.0),
            chosen_image: annotations.is_some_and(|all| all.contains_key("malha.io/proxy-image")),
            mirror: annotations.is_some_and(|all| all.contains_key(MIRROR)),
            addresses: addresses.collect(),
            host_network: spec.host_network.unwrap_or_default(),
            finished: matches!(phase.as_deref(), Some("Succeeded" | "Failed")),
            service_account: names.share(spec.service_account_name.as_deref().unwrap_or_default()),
            node: spec.node_name.as_deref().map(|node| names.share(node)),
            proxy_image: proxy_image(&spec).map(|image| names.share(image)),
            owner: owner(&metadata, names),
            uid: metadata.uid.unwrap_or_default().into(),
            labels: marks(metadata.labels),
        }
    }
}

fn proxy_image(spec: &PodSpec) -> Option<&str> {
    let containers = spec
        .init_containers
        .iter()
        .chain(&spec.containers)
        .flatten();
    let mut proxies =
        containers.filter(|container| container.name.as_deref() == Some("malha-proxy"));
    Some(proxies.next()?.image.as_deref().unwrap_or_default())
}

/// The labels that the selectors of the webhook read, and ours.
fn marks(labels: Option<BTreeMap<String, String>>) -> BTreeMap<String, String> {
    let mut labels = labels.unwrap_or_default();
    labels.retain(|key, _| {
        let prefix = key.split_once('/').map(|(prefix, _)| prefix);
        matches!(prefix, Some("istio.io" | "sidecar.istio.io" | "malha.io"))
    });
    labels
}

fn owner(metadata: &ObjectMeta, names: &mut Names) -> Option<Owner> {
    let owners = metadata.owner_references.as_deref().unwrap_or_default();
    let controller = |owner: &&OwnerReference| owner.controller == Some(true);
    let owner = owners.iter().find(controller)?;
    let label = |key| metadata.labels.as_ref().and_then(|labels| labels.get(key));
    let template = label("controller-revision-hash").or_else(|| label("pod-template-hash"));
    Some(Owner {
        api_version: names.share(&owner.api_version),
        kind: names.share(&owner.kind),
        name: names.share(&owner.name),
        uid: names.share(&owner.uid),
        template: names.share(template.map_or("", String::as_str)),
    })
}

/// The minor version of a node's kubelet; none where it says something else than `v1.<minor>`.
pub(super) fn kubelet_minor(node: &NodeView) -> Option<u32> {
    let info = node.status.as_ref()?.node_info.as_ref()?;
    minor(info.kubelet_version.as_deref()?)
}

fn minor(version: &str) -> Option<u32> {
    let rest = version.strip_prefix("v1.")?;
    let digits = rest
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(rest.len());
    rest.get(..digits)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(json: serde_json::Value) -> Pod {
        let view: PodView = serde_json::from_value(json).expect("readable");
        Pod::of(view, &mut Names::default())
    }

    #[test]
    fn a_pod_is_reduced_to_what_is_kept() {
        let pod = pod(json!({
            "metadata": {
                "name": "web-0", "namespace": "shop", "uid": "u-1",
                "labels": {"app": "web", "istio.io/rev": "blue", "controller-revision-hash": "web-7f"},
                "creationTimestamp": "2026-11-22T10:00:00Z",
                "deletionTimestamp": "2026-11-22T10:05:30Z", "deletionGracePeriodSeconds": 30,
                "ownerReferences": [
                    {"apiVersion": "v1", "kind": "Other", "name": "x", "uid": "o-0"},
                    {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "web", "uid": "o-1", "controller": true},
                ],
            },
            "spec": {
                "serviceAccountName": "web", "nodeName": "n1",
                "initContainers": [{"name": "malha-init"}, {"name": "malha-proxy", "image": "malha-proxy@sha256:1"}],
                "containers": [{"name": "web", "image": "web:1", "futureField": {"a": 1}}],
            },
            "status": {"phase": "Running"},
        }));
        assert_eq!(&*pod.uid, "u-1");
        assert_eq!(&*pod.service_account, "web");
        assert_eq!(pod.node.as_deref(), Some("n1"));
        assert_eq!(pod.proxy_image.as_deref(), Some("malha-proxy@sha256:1"));
        let end = "2026-11-22T10:05:30Z".parse().expect("a literal instant");
        assert_eq!(pod.deletion, Some(end));
        assert_eq!(
            pod.labels.len(),
            1,
            "only labels about injection: {:?}",
            pod.labels
        );
        let owner = pod.owner.expect("a controller");
        assert_eq!(
            (&*owner.kind, &*owner.name, &*owner.template),
            ("StatefulSet", "web", "web-7f")
        );
        assert!(!pod.finished && !pod.mirror && !pod.host_network);
    }

    #[test]
    fn empty_and_null_parts_are_facts_less_and_no_error() {
        for json in [
            json!({}),
            json!({"metadata": {}, "spec": null, "status": null}),
            json!({"metadata": {"name": "p"}, "spec": {"containers": null, "initContainers": null}}),
            json!({"metadata": {"name": "p"}, "spec": {"containers": [{}]}, "status": {"phase": null}}),
            json!({"metadata": {"name": "p", "labels": null, "ownerReferences": null, "creationTimestamp": null}}),
        ] {
            let pod = pod(json);
            assert_eq!(pod.proxy_image, None);
            assert_eq!(pod.owner, None);
        }
    }

    /// k8s-openapi's own `Time` refuses the last day of the year 9999, and with it the whole list.
    #[test]
    fn a_deletion_at_the_end_of_time_is_a_deletion() {
        for end in ["9999-12-31T23:59:59Z", "10000-01-01T00:00:00Z", "soon"] {
            let pod = pod(json!({"metadata": {"name": "p", "deletionTimestamp": end}}));
            assert_eq!(pod.deletion, Some(Timestamp::MAX), "{end}");
        }
    }

    #[test]
    fn kubelet_versions_of_all_makers_are_read() {
        for (version, want) in [
            ("v1.33.2", Some(33)),
            ("v1.29.8-gke.1031000", Some(29)),
            ("v1.30.0-eks-036c24b", Some(30)),
            ("v1.31+", Some(31)),
            ("v0.0.0-master+$Format:%H$", None),
            ("v2.1.0", None),
            ("v1.", None),
            ("1.33.2", None),
            ("v1.99999999999999999999", None),
            ("", None),
        ] {
            assert_eq!(minor(version), want, "{version}");
        }
    }
}

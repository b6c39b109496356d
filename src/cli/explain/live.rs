//! What a cluster says about the object that is asked for, and about all that bears on it.
//!
//! What the operator may not read is noted and left out; only the object itself must be readable.

use std::collections::BTreeMap;

use anyhow::anyhow;
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet},
    batch::v1::{CronJob, Job},
    core::v1::{ConfigMap, Namespace, Node, Pod, ReplicationController, Service},
};
use kube::{
    Resource,
    api::{ApiResource, GroupVersionKind},
};
use serde_json::Value;

use crate::{
    cli::{
        Exit, Failure,
        cluster::{Cluster, ControlPlane, ControlPlaneArgs},
        exit::OrExit as _,
        mesh::{Written, namespace_facts, parse_kubelet},
        ps,
        terminal::whole,
    },
    inject::NamespaceFacts,
};

/// Where `malha serve` reads its settings.
const CONFIG_MAP: &str = "malha-config";

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    kind: Kind,
    name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pod,
    Deployment,
    StatefulSet,
    DaemonSet,
    ReplicaSet,
    ReplicationController,
    Job,
    CronJob,
    Namespace,
}

/// The words of `kubectl` for each kind: singular, plural, short.
const KINDS: [(Kind, [&str; 3]); 9] = [
    (Kind::Pod, ["pod", "pods", "po"]),
    (Kind::Deployment, ["deployment", "deployments", "deploy"]),
    (Kind::StatefulSet, ["statefulset", "statefulsets", "sts"]),
    (Kind::DaemonSet, ["daemonset", "daemonsets", "ds"]),
    (Kind::ReplicaSet, ["replicaset", "replicasets", "rs"]),
    (
        Kind::ReplicationController,
        ["replicationcontroller", "replicationcontrollers", "rc"],
    ),
    (Kind::Job, ["job", "jobs", "job"]),
    (Kind::CronJob, ["cronjob", "cronjobs", "cj"]),
    (Kind::Namespace, ["namespace", "namespaces", "ns"]),
];

impl Kind {
    fn parse(word: &str) -> Option<Self> {
        // `deployments.apps` is what kubectl prints.
        let word = word.split('.').next()?.to_ascii_lowercase();
        let mut kinds = KINDS.iter();
        kinds.find_map(|(kind, words)| words.contains(&word.as_str()).then_some(*kind))
    }

    fn word(self) -> &'static str {
        let found = KINDS.iter().find(|(kind, _)| *kind == self);
        found.map_or("object", |(_, words)| words[0])
    }

    fn resource(self) -> ApiResource {
        fn of<K: Resource<DynamicType = ()>>() -> ApiResource {
            ApiResource::erase::<K>(&())
        }
        match self {
            Self::Pod => of::<Pod>(),
            Self::Deployment => of::<Deployment>(),
            Self::StatefulSet => of::<StatefulSet>(),
            Self::DaemonSet => of::<DaemonSet>(),
            Self::ReplicaSet => of::<ReplicaSet>(),
            Self::ReplicationController => of::<ReplicationController>(),
            Self::Job => of::<Job>(),
            Self::CronJob => of::<CronJob>(),
            Self::Namespace => of::<Namespace>(),
        }
    }
}

/// `POD` or `KIND/NAME`.
pub(super) fn parse_target(text: &str) -> Result<Target, String> {
    let (kind, name) = match text.split_once('/') {
        None => (Kind::Pod, text),
        Some((word, name)) => {
            let kind = Kind::parse(word).ok_or_else(|| {
                let words: Vec<_> = KINDS.iter().map(|(_, words)| words[0]).collect();
                format!("{word:?} is none of {}", words.join(", "))
            })?;
            (kind, name)
        }
    };
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
    if name.is_empty() || name.len() > 253 || !name.chars().all(legal) {
        return Err(format!("{name:?} is not the name of an object"));
    }
    let name = name.to_owned();
    Ok(Target { kind, name })
}

/// All that a cluster says.
pub(super) struct Live {
    /// What to explain.
    pub(super) objects: Vec<Value>,
    /// The namespace they are in.
    pub(super) namespace: NamespaceFacts,
    /// PeerAuthentications and Services that bear on them; `None` where they may not be read.
    pub(super) rules: Option<Vec<Value>>,
    /// The oldest kubelet's minor version.
    pub(super) oldest_kubelet: Option<u32>,
    /// The control plane's settings.
    pub(super) written: Option<Written>,
    /// Until when each pod's certificate is good, as far as the control plane knows.
    pub(super) certificates: BTreeMap<(String, String), Timestamp>,
    /// What could not be looked at.
    pub(super) notes: Vec<String>,
}

/// Looks everything up.
pub(super) async fn look(
    place: &ControlPlaneArgs,
    namespace: Option<&str>,
    target: &Target,
) -> Result<Live, Failure> {
    let cluster = place.cluster.connect().await?;
    let namespace = match target.kind {
        Kind::Namespace => target.name.clone(),
        _ => namespace.unwrap_or_else(|| cluster.namespace()).to_owned(),
    };
    let facts = namespace_of(&cluster, &namespace).await?;
    let objects = objects(&cluster, &namespace, target).await?;
    let mut notes = Vec::new();
    let nodes = ApiResource::erase::<Node>(&());
    let (rules, nodes, written) = tokio::join!(
        rules(&cluster, &namespace, &place.system_namespace),
        cluster.objects(&nodes, None),
        settings(&cluster, &place.system_namespace),
    );
    let rules = rules.map(Some).unwrap_or_else(|why| {
        notes.push(format!("what ports accept is left out: {}", whole(&why)));
        None
    });
    let oldest_kubelet = nodes.map_or_else(
        |why| {
            notes.push(format!(
                "kubelets are taken to be of 1.33 or later: {}",
                whole(&why)
            ));
            None
        },
        |nodes| oldest(&nodes),
    );
    let written = written.unwrap_or_else(|why| {
        notes.push(format!(
            "the control plane's settings are taken to be the defaults: {}",
            whole(&why)
        ));
        None
    });
    let certificates = match objects.iter().any(carries_sidecar) {
        false => BTreeMap::new(),
        true => certificates(&cluster, &place.system_namespace)
            .await
            .unwrap_or_else(|why| {
                notes.push(format!(
                    "the certificate's end is not known: {}",
                    whole(&why.error)
                ));
                BTreeMap::new()
            }),
    };
    Ok(Live {
        objects,
        namespace: facts,
        rules,
        oldest_kubelet,
        written,
        certificates,
        notes,
    })
}

/// Whether our sidecar is in a pod.
pub(super) fn carries_sidecar(pod: &Value) -> bool {
    let lists = ["initContainers", "containers"].map(|list| pod["spec"][list].as_array());
    let mut containers = lists.into_iter().flatten().flatten();
    pod["kind"] == "Pod" && containers.any(|container| container["name"] == "malha-proxy")
}

async fn objects(
    cluster: &Cluster,
    namespace: &str,
    target: &Target,
) -> Result<Vec<Value>, Failure> {
    if target.kind == Kind::Namespace {
        let pods = cluster
            .objects(&Kind::Pod.resource(), Some(namespace))
            .await;
        let pods = pods.or_exit(Exit::Unreachable)?;
        if pods.is_empty() {
            return Err(Exit::BadInput.because(anyhow!("namespace {namespace} holds no pod")));
        }
        return Ok(pods);
    }
    let found = cluster
        .object(&target.kind.resource(), Some(namespace), &target.name)
        .await
        .or_exit(Exit::Unreachable)?;
    let (kind, name) = (target.kind.word(), &target.name);
    found.map(|object| vec![object]).ok_or_else(|| {
        Exit::BadInput.because(anyhow!(
            "there is no {kind} {namespace}/{name}; -n names another namespace, KIND/NAME another kind"
        ))
    })
}

async fn namespace_of(cluster: &Cluster, name: &str) -> Result<NamespaceFacts, Failure> {
    let object = cluster
        .object(&Kind::Namespace.resource(), None, name)
        .await
        .or_exit(Exit::Unreachable)?;
    let object = object.ok_or_else(|| {
        Exit::BadInput.because(anyhow!(
            "there is no namespace {name}; -n names another one"
        ))
    })?;
    namespace_facts(&object).or_exit(Exit::Internal)
}

async fn rules(cluster: &Cluster, namespace: &str, root: &str) -> anyhow::Result<Vec<Value>> {
    let kind = GroupVersionKind::gvk("security.istio.io", "v1", "PeerAuthentication");
    let policies = ApiResource::from_gvk_with_plural(&kind, "peerauthentications");
    let services = ApiResource::erase::<Service>(&());
    let (own, of_mesh, services) = tokio::join!(
        cluster.objects(&policies, Some(namespace)),
        cluster.objects(&policies, Some(root)),
        cluster.objects(&services, Some(namespace)),
    );
    let mut rules = own?;
    if root != namespace {
        rules.extend(of_mesh?);
    }
    rules.extend(services?);
    Ok(rules)
}

async fn settings(cluster: &Cluster, namespace: &str) -> anyhow::Result<Option<Written>> {
    let resource = ApiResource::erase::<ConfigMap>(&());
    let found = cluster
        .object(&resource, Some(namespace), CONFIG_MAP)
        .await?;
    let found = found.ok_or_else(|| anyhow!("there is no ConfigMap {namespace}/{CONFIG_MAP}"))?;
    let text = |key: &str| found["data"][key].as_str().unwrap_or_default().to_owned();
    Ok(Some(Written {
        origin: format!("ConfigMap {namespace}/{CONFIG_MAP}"),
        settings: text("malha.yaml"),
        injector: text("injector.yaml"),
    }))
}

fn oldest(nodes: &[Value]) -> Option<u32> {
    let version = |node: &Value| {
        parse_kubelet(node.pointer("/status/nodeInfo/kubeletVersion")?.as_str()?).ok()
    };
    nodes.iter().filter_map(version).min()
}

async fn certificates(
    cluster: &Cluster,
    namespace: &str,
) -> Result<BTreeMap<(String, String), Timestamp>, Failure> {
    let plane = ControlPlane::find(cluster, namespace).await?;
    let report = ps::Report::of(plane.ask(ps::PATH).await, &[])?;
    let ends = report.proxies.into_iter().filter_map(|proxy| {
        let end = proxy.certificate_not_after?;
        Some(((proxy.namespace, proxy.pod), end))
    });
    Ok(ends.collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn kinds_are_named_as_kubectl_names_them() {
        for (text, kind, name) in [
            ("web-1", Kind::Pod, "web-1"),
            ("po/web-1", Kind::Pod, "web-1"),
            ("Deployment/web", Kind::Deployment, "web"),
            ("deployments.apps/web", Kind::Deployment, "web"),
            ("sts/db", Kind::StatefulSet, "db"),
            ("ns/shop", Kind::Namespace, "shop"),
        ] {
            let name = name.to_owned();
            assert_eq!(parse_target(text), Ok(Target { kind, name }), "{text}");
        }
        for wrong in ["", "svc/web", "pod/", "pod/a/b", "pod/A", "/web"] {
            assert!(parse_target(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_oldest_kubelet_decides() {
        let node =
            |version: &str| json!({ "status": { "nodeInfo": { "kubeletVersion": version } } });
        assert_eq!(
            oldest(&[node("v1.33.1"), node("v1.29.4"), json!({})]),
            Some(29)
        );
        assert_eq!(oldest(&[]), None);
    }

    #[test]
    fn only_a_pod_carries_a_sidecar() {
        let with = |kind: &str, list: &str| json!({ "kind": kind, "spec": { list: [{ "name": "malha-proxy" }] } });
        assert!(carries_sidecar(&with("Pod", "initContainers")));
        assert!(carries_sidecar(&with("Pod", "containers")));
        assert!(!carries_sidecar(&with("Deployment", "containers")));
        assert!(!carries_sidecar(&json!({ "kind": "Pod", "spec": {} })));
    }
}

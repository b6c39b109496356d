//! The parts of a pod that a decision looks at, borrowed from its JSON.

use std::{borrow::Cow, collections::BTreeSet};

use super::{
    PodError,
    lax::{Fields, Lax, Lazy, Raw, Slot, Table, Text, reads},
    select::{self, PodFacts},
};

/// Labels or annotations.
pub(super) type Labels<'a> = Table<'a, Slot<Text<'a>>>;
/// A list of objects, some of which may be unreadable.
pub(super) type ListOf<T> = Slot<Vec<Slot<T>>>;

reads! {
    /// A pod, or a pod template.
    struct PodView {
        "metadata" => metadata: Slot<Metadata<'a>>,
        "spec" => spec: Slot<Spec<'a>>,
    }
    struct Metadata {
        "name" => name: Slot<Text<'a>>,
        "generateName" => generate_name: Slot<Text<'a>>,
        "labels" => labels: Slot<Labels<'a>>,
        "annotations" => annotations: Slot<Labels<'a>>,
        "ownerReferences" => owners: ListOf<OwnerReference<'a>>,
    }
    struct OwnerReference {
        "apiVersion" => api_version: Slot<Text<'a>>,
        "kind" => kind: Slot<Text<'a>>,
        "name" => name: Slot<Text<'a>>,
        "controller" => controller: Slot<bool>,
    }
    struct Spec {
        "hostNetwork" => host_network: Slot<bool>,
        "os" => os: Slot<Os<'a>>,
        "nodeSelector" => node_selector: Slot<Labels<'a>>,
        "restartPolicy" => restart_policy: Slot<Text<'a>>,
        "securityContext" => security_context: Slot<SecurityContext<'a>>,
        "resources" => resources: Slot<Resources<'a>>,
        "containers" => containers: ListOf<Container<'a>>,
        "initContainers" => init_containers: ListOf<Container<'a>>,
        "volumes" => volumes: ListOf<Fields<'a>>,
        "imagePullSecrets" => pull_secrets: ListOf<Named<'a>>,
    }
    struct Os {
        "name" => name: Slot<Text<'a>>,
    }
    struct Named {
        "name" => name: Slot<Text<'a>>,
    }
    struct SecurityContext {
        "runAsGroup" => run_as_group: Slot<i64>,
    }
    /// Requests and limits, by resource.
    struct Resources {
        "requests" => requests: Slot<Amounts<'a>>,
        "limits" => limits: Slot<Amounts<'a>>,
    }
    struct Container {
        "name" => name: Slot<Text<'a>>,
        "image" => image: Slot<Text<'a>>,
        "restartPolicy" => restart_policy: Slot<Text<'a>>,
        "args" => args: Option<Raw<'a>>,
        "ports" => ports: Lazy<'a, Vec<Slot<Port<'a>>>>,
        "env" => env: Option<Raw<'a>>,
        "volumeMounts" => volume_mounts: Option<Raw<'a>>,
        "resources" => resources: Slot<Resources<'a>>,
        "securityContext" => security_context: Slot<SecurityContext<'a>>,
        "livenessProbe" => liveness: Lazy<'a, Handlers<'a>>,
        "readinessProbe" => readiness: Lazy<'a, Handlers<'a>>,
        "startupProbe" => startup: Lazy<'a, Handlers<'a>>,
        "lifecycle" => lifecycle: Lazy<'a, Lifecycle<'a>>,
    }
    struct Port {
        "name" => name: Slot<Text<'a>>,
        "containerPort" => number: Slot<i64>,
        "protocol" => protocol: Slot<Text<'a>>,
    }
    struct Lifecycle {
        "postStart" => post_start: Slot<Handlers<'a>>,
        "preStop" => pre_stop: Slot<Handlers<'a>>,
    }
    /// A probe or a lifecycle handler.
    struct Handlers {
        "exec" => exec: Option<Raw<'a>>,
        "sleep" => sleep: Option<Raw<'a>>,
        "httpGet" => http_get: Slot<Fields<'a>>,
        "tcpSocket" => tcp_socket: Slot<Fields<'a>>,
        "grpc" => grpc: Slot<Fields<'a>>,
        "timeoutSeconds" => timeout_seconds: Slot<i64>,
    }
    struct EnvVar {
        "name" => name: Slot<Text<'a>>,
        "value" => value: Slot<Text<'a>>,
    }
    struct VolumeMount {
        "mountPath" => path: Slot<Text<'a>>,
    }
}

/// Amounts by resource; a number is as good as a string.
pub(super) type Amounts<'a> = Table<'a, Amount<'a>>;

/// A quantity as it stands there.
#[derive(Debug, Clone)]
pub(super) struct Amount<'a> {
    pub(super) text: Text<'a>,
    raw: Raw<'a>,
}

impl Amount<'_> {
    /// A string or a number, as its author wrote it.
    pub(super) fn value(&self) -> serde_json::Value {
        serde_json::from_str(self.raw.0.get()).unwrap_or_default()
    }
}

impl<'a> Lax<'a> for Amounts<'a> {
    fn object<A: serde::de::MapAccess<'a>>(entries: A) -> Result<Option<Self>, A::Error> {
        Ok(<Fields<'a> as Lax>::object(entries)?.map(|fields| fields.map(amount)))
    }
}

fn amount(raw: Raw<'_>) -> Amount<'_> {
    let text = raw.read::<Text<'_>>().into_present();
    Amount {
        text: text.unwrap_or_else(|| Cow::Borrowed(raw.0.get())),
        raw,
    }
}

impl<'a> PodView<'a> {
    /// Reads a pod; anything but one JSON object is a pod without anything.
    pub(super) fn parse(json: &'a [u8]) -> Result<Self, PodError> {
        let text = std::str::from_utf8(json)?;
        Ok(match serde_json::from_str(text)? {
            Slot::Present(pod) => pod,
            Slot::Missing | Slot::Odd => Self::default(),
        })
    }

    /// What selection looks at.
    pub(super) fn facts(&self) -> PodFacts<'_> {
        PodFacts {
            inject: self.label(select::INJECT),
            revision: self.label(select::REVISION),
            control_plane: self.has_label(select::CONTROL_PLANE),
            host_network: self
                .spec
                .present()
                .is_some_and(|spec| spec.host_network.present() == Some(&true)),
            mirror: self.has_annotation(select::MIRROR),
        }
    }

    /// Every annotation that is text, sorted by key.
    pub(super) fn annotations(&self) -> impl Iterator<Item = (&str, &str)> {
        let annotations = self
            .metadata
            .present()
            .and_then(|metadata| metadata.annotations.present());
        let annotations = annotations
            .into_iter()
            .flat_map(|annotations| annotations.iter());
        annotations.filter_map(|(key, value)| Some((key, value.text()?)))
    }

    pub(super) fn label(&self, key: &str) -> Option<&str> {
        text_of(&self.metadata.present()?.labels, key)
    }

    pub(super) fn annotation(&self, key: &str) -> Option<&str> {
        text_of(&self.metadata.present()?.annotations, key)
    }

    /// Whether the key is there, with whatever value.
    pub(super) fn has_label(&self, key: &str) -> bool {
        let labels = self.metadata.present().and_then(|m| m.labels.present());
        labels
            .and_then(|labels| labels.find(key))
            .is_some_and(|value| !value.is_missing())
    }

    pub(super) fn has_annotation(&self, key: &str) -> bool {
        let annotations = self
            .metadata
            .present()
            .and_then(|m| m.annotations.present());
        annotations
            .and_then(|annotations| annotations.find(key))
            .is_some_and(|value| !value.is_missing())
    }

    pub(super) fn containers(&self) -> &[Slot<Container<'a>>] {
        self.spec
            .present()
            .map_or(&[], |spec| spec.containers.items())
    }

    pub(super) fn init_containers(&self) -> &[Slot<Container<'a>>] {
        self.spec
            .present()
            .map_or(&[], |spec| spec.init_containers.items())
    }

    /// Init containers, then containers.
    pub(super) fn all_containers(&self) -> impl Iterator<Item = &Container<'a>> {
        let all = self.init_containers().iter().chain(self.containers());
        all.filter_map(Slot::present)
    }

    pub(super) fn volumes(&self) -> impl Iterator<Item = &Fields<'a>> {
        let volumes = self
            .spec
            .present()
            .map_or(&[][..], |spec| spec.volumes.items());
        volumes.iter().filter_map(Slot::present)
    }

    pub(super) fn init_names(&self) -> BTreeSet<&str> {
        self.init_containers()
            .iter()
            .filter_map(Slot::present)
            .filter_map(Container::name)
            .collect()
    }

    /// The pod is done when its containers are; a sidecar among them would keep it for ever.
    pub(super) fn ends(&self) -> bool {
        let policy = self
            .spec
            .present()
            .and_then(|spec| spec.restart_policy.text());
        policy.is_some_and(|policy| policy != "Always")
    }

    /// The pod, or something that we would have to write under, is of a type that is no pod's.
    pub(super) fn is_unwritable(&self) -> bool {
        let Some(spec) = self.spec.present() else {
            return true;
        };
        let metadata = match &self.metadata {
            Slot::Odd => return true,
            Slot::Missing => &Metadata::default(),
            Slot::Present(metadata) => metadata,
        };
        metadata.labels.is_odd()
            || metadata.annotations.is_odd()
            || spec.containers.is_odd()
            || spec.init_containers.is_odd()
            || spec.volumes.is_odd()
            || spec.pull_secrets.is_odd()
    }
}

fn text_of<'s>(labels: &'s Slot<Labels<'_>>, key: &str) -> Option<&'s str> {
    labels.present()?.find(key)?.text()
}

impl<'a> Container<'a> {
    /// The name; an empty one is none.
    pub(super) fn name(&self) -> Option<&str> {
        self.name.text().filter(|name| !name.is_empty())
    }

    pub(super) fn is_named(&self, name: &str) -> bool {
        self.name.text() == Some(name)
    }

    /// An init container that stays (KEP-753).
    pub(super) fn is_native_sidecar(&self) -> bool {
        self.restart_policy.text() == Some("Always")
    }

    pub(super) fn ports(&self) -> impl Iterator<Item = Port<'a>> {
        let ports = self.ports.read().into_present().unwrap_or_default();
        ports.into_iter().filter_map(Slot::into_present)
    }

    /// The environment, read only when it is looked at: it may hold thousands of variables.
    pub(super) fn env(&self) -> Slot<Vec<Slot<EnvVar<'a>>>> {
        self.env.map_or(Slot::Missing, Raw::read)
    }

    pub(super) fn args(&self) -> Slot<Vec<Slot<Text<'a>>>> {
        self.args.map_or(Slot::Missing, Raw::read)
    }

    pub(super) fn volume_mounts(&self) -> Slot<Vec<Slot<VolumeMount<'a>>>> {
        self.volume_mounts.map_or(Slot::Missing, Raw::read)
    }
}

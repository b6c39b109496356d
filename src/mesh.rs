//! The mesh as data: what the cluster, or a directory, says about services, endpoints, workloads and policies.
//!
//! Kubernetes and Istio objects -> parsers ([`kubernetes`], [`istio`]) -> [`Event`] -> [`World::apply`] -> `xds`
//!
//! Nothing here knows Envoy. Names are compared as types; no string is joined and split again.

pub mod crd;
pub mod istio;
pub mod kubernetes;
pub mod modes;

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

/// A namespaced object's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl ObjectName {
    /// A name from its two parts.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// An object that a user wrote, to name in conditions, Events and messages.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectRef {
    /// `PeerAuthentication`, `Service`, ..
    pub kind: &'static str,
    /// Which one.
    pub name: ObjectName,
}

/// One thing became so, or (`None`) is no more.
#[derive(Clone, Debug)]
pub enum Event {
    /// A namespace's labels and annotations.
    Namespace(Arc<str>, Option<Namespace>),
    /// A Service.
    Service(ObjectName, Option<Service>),
    /// An EndpointSlice.
    Slice(ObjectName, Option<Slice>),
    /// A pod.
    Workload(ObjectName, Option<Workload>),
    /// A PeerAuthentication.
    PeerAuthentication(ObjectName, Option<PeerAuthentication>),
}

/// What a feed tells at once.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// In their order.
    pub events: Vec<Event>,
    /// Whether with these everything has been told that there was at the start. Before, nobody may be answered: what is
    /// not known yet would be taken for what is no more.
    pub whole: bool,
}

/// A namespace, as far as the mesh asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// A Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Where callers find it.
    pub address: Address,
    /// Its ports, UDP left out.
    pub ports: Vec<ServicePort>,
    /// Whose endpoints it selects; empty where somebody else writes its EndpointSlices.
    pub selector: BTreeMap<String, String>,
    /// Namespaces that see it (`networking.istio.io/exportTo`).
    pub export_to: ExportTo,
}

/// How a Service is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Its virtual addresses, one per family.
    ClusterIps(Vec<IpAddr>),
    /// `clusterIP: None`: names resolve to the pods themselves.
    Headless,
    /// `type: ExternalName`.
    External(String),
}

/// Who sees a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ExportTo {
    /// `*`, or nothing said.
    #[default]
    Everyone,
    /// These namespaces (`.` is already its own); none of them: nobody (`~`).
    Only(Vec<Arc<str>>),
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name; empty where there is only one.
    pub name: String,
    /// Its number.
    pub number: u16,
    /// The port of the pods behind it.
    pub target: TargetPort,
    /// What is spoken there.
    pub protocol: Protocol,
}

/// `targetPort`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    /// The same in every pod.
    Number(u16),
    /// The name of a port that a pod's containers declare.
    Name(String),
}

/// What is spoken on a port: `appProtocol`, else the prefix of the port's name, as Istio reads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// `http`.
    Http,
    /// `http2`.
    Http2,
    /// `grpc`, `grpc-web`.
    Grpc,
    /// `tcp`, `tls`, `https`, protocols that are not taken apart (`mongo`, `mysql`, `redis`), and ports where servers
    /// are known to speak first.
    Tcp,
    /// Nothing is said: looked at on the wire.
    Undeclared,
}

/// An EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Its Service (`kubernetes.io/service-name`), in the same namespace.
    pub service: Arc<str>,
    /// Port name of the Service -> number in the pods.
    pub ports: BTreeMap<String, u16>,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it is.
    pub address: IpAddr,
    /// Its pod, if it is one.
    pub pod: Option<ObjectName>,
    /// Whether it takes requests.
    pub health: Health,
    /// `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// `hostname`, by which a headless Service's pod has a name of its own.
    pub hostname: Option<Arc<str>>,
}

/// Conditions of an endpoint (`xds.md` 3.3.6); one that does not serve is no endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Ready.
    Healthy,
    /// Serving and terminating.
    Draining,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// `spec.serviceAccountName`; `default` where nothing is said.
    pub account: Arc<str>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Whether our sidecar (or Istio's) is in it.
    pub sidecar: bool,
    /// Whether it shares its node's network.
    pub host_network: bool,
    /// Whether it ended (`Succeeded`, `Failed`).
    pub ended: bool,
    /// Ports that its containers declare.
    pub ports: Vec<ContainerPort>,
}

/// A port that a container declares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerPort {
    /// Its name; may be empty.
    pub name: String,
    /// Its number.
    pub number: u16,
}

/// A PeerAuthentication: which transport a workload's ports accept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAuthentication {
    /// The labels of the workloads it binds; `None` is the whole namespace, or the whole mesh in the root namespace.
    pub selector: Option<BTreeMap<String, String>>,
    /// `None` is inherited (`UNSET`).
    pub mode: Option<Mode>,
    /// Modes of single ports of the pod.
    pub ports: BTreeMap<u16, Mode>,
    /// When it was created; the oldest wins, then the name.
    pub created: Option<jiff::Timestamp>,
}

/// What a port accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// Mutual TLS only.
    Strict,
    /// Mutual TLS and plaintext.
    Permissive,
    /// Plaintext only.
    Disable,
}

impl Mode {
    /// As it stands in a PeerAuthentication.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Strict => "STRICT",
            Self::Permissive => "PERMISSIVE",
            Self::Disable => "DISABLE",
        }
    }
}

/// What is wrong or worth saying about an object that a user wrote. One code serves `lint`, conditions, Events and logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Its class.
    pub reason: FindingReason,
    /// Where in the object: `spec.mtls.mode`.
    pub path: String,
    /// What is wrong there, and what is done about it.
    pub text: String,
}

/// Classes of findings, as `Accepted` conditions name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FindingReason {
    /// A field that nobody reads.
    UnknownField,
    /// A value that cannot be read; what it guards is closed.
    InvalidValue,
    /// An API version that is not served.
    NotServed,
}

impl FindingReason {
    /// The stable code.
    pub fn code(self) -> &'static str {
        match self {
            Self::UnknownField => "UnknownField",
            Self::InvalidValue => "InvalidValue",
            Self::NotServed => "NotServed",
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.text)
    }
}

/// Everything that is known.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// By name.
    pub namespaces: BTreeMap<Arc<str>, Namespace>,
    /// By name.
    pub services: BTreeMap<ObjectName, Service>,
    /// By name.
    pub slices: BTreeMap<ObjectName, Slice>,
    /// By name.
    pub workloads: BTreeMap<ObjectName, Workload>,
    /// By name.
    pub peer_authentications: BTreeMap<ObjectName, PeerAuthentication>,
}

impl World {
    /// Takes one thing over.
    pub fn apply(&mut self, event: Event) {
        fn put<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: Option<V>) {
            match value {
                Some(value) => map.insert(key, value),
                None => map.remove(&key),
            };
        }
        match event {
            Event::Namespace(name, new) => put(&mut self.namespaces, name, new),
            Event::Service(name, new) => put(&mut self.services, name, new),
            Event::Slice(name, new) => put(&mut self.slices, name, new),
            Event::Workload(name, new) => put(&mut self.workloads, name, new),
            Event::PeerAuthentication(name, new) => put(&mut self.peer_authentications, name, new),
        }
    }
}

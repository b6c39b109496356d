//! A running mesh, asked with the operator's own rights: what the verbs share that look at pods and the control plane.
//!
//! kubeconfig -> [`Cluster`] <-> objects; [`ControlPlane`] -> the documents of port 15016, from every replica
//!
//! Port 15016 listens on loopback only, so it is reached by port-forward; whoever may not forward ports of the control
//! plane's pods is told so by the API server.

mod forward;
mod loopback;
mod questions;
mod writes;

use std::{fmt::Debug, future::Future, time::Duration};

use anyhow::{Context as _, anyhow};
use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::{ApiResource, AttachParams, DynamicObject, ListParams},
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::{io::AsyncReadExt as _, net::TcpStream, time::timeout};

use self::loopback::{exchange, request};
use super::{Exit, Failure, exit::OrExit as _};
use crate::{
    inject::capture::AGENT_PORT,
    k8s::{self, Access, ApiError},
};

/// What is told about proxies, on loopback of each control-plane pod.
const QUESTIONS_PORT: u16 = 15016;
/// The sidecar's container.
const SIDECAR: &str = "malha-proxy";
/// Which pods are the control plane's.
pub(super) const CONTROL_PLANE: &str =
    "app.kubernetes.io/name=malha,app.kubernetes.io/component=control-plane";
/// How long one question may take, the way through the API server included.
const PATIENCE: Duration = Duration::from_secs(10);
/// More than any answer: 15 000 proxies with 1 KB each, or what one Envoy holds of 10 000 services.
const ANSWER_LIMIT: usize = 64 << 20;

/// Flags that name the cluster.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ClusterArgs {
    /// Kubeconfig of the cluster.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<std::path::PathBuf>,
    /// Context of the kubeconfig.
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
}

/// Flags that name the control plane.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ControlPlaneArgs {
    #[command(flatten)]
    pub(super) cluster: ClusterArgs,
    /// The control plane's namespace.
    #[arg(long, value_name = "NAME", default_value = "malha-system")]
    pub(super) system_namespace: String,
}

/// Which namespaces a verb is about.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ScopeArgs {
    /// The namespace; without it the kubeconfig's.
    #[arg(short, long, value_name = "NAME")]
    namespace: Option<String>,
    /// All namespaces.
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,
}

impl ScopeArgs {
    /// The one namespace that is asked about, where it is not all of them.
    pub(super) fn of(&self, otherwise: Option<&str>) -> Option<String> {
        match (&self.namespace, self.all_namespaces) {
            (_, true) => None,
            (Some(named), false) => Some(named.clone()),
            (None, false) => otherwise.map(str::to_owned),
        }
    }
}

/// Runs what a verb awaits.
pub(super) fn block_on<T>(ask: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")
        .or_exit(Exit::Internal)?
        .block_on(ask)
}

/// A cluster with the operator's rights.
#[derive(Clone)]
pub(super) struct Cluster {
    client: Client,
}

impl ClusterArgs {
    pub(super) async fn connect(&self) -> Result<Cluster, Failure> {
        let access = Access {
            kubeconfig: self.kubeconfig.clone(),
            context: self.context.clone(),
        };
        let client = k8s::connect(&access).await.or_exit(Exit::Unreachable)?;
        Ok(Cluster { client })
    }
}

impl Cluster {
    /// The namespace of the kubeconfig's context.
    pub(super) fn namespace(&self) -> &str {
        self.client.default_namespace()
    }

    /// The pods of a namespace, or of all.
    pub(super) async fn pods(&self, namespace: Option<&str>) -> anyhow::Result<Vec<Pod>> {
        self.list("pods", namespace, &ListParams::default()).await
    }

    /// One pod.
    pub(super) async fn pod(&self, namespace: &str, name: &str) -> Result<Pod, Failure> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let found = ask(api.get_opt(name))
            .await
            .with_context(|| format!("cannot read pod {namespace}/{name}"))
            .or_exit(Exit::Unreachable)?;
        found.ok_or_else(|| {
            Exit::BadInput.because(anyhow!(
                "there is no pod {namespace}/{name}; -n names another namespace, and `kubectl get pods -A` lists all"
            ))
        })
    }

    async fn list<K>(
        &self,
        what: &str,
        namespace: Option<&str>,
        which: &ListParams,
    ) -> anyhow::Result<Vec<K>>
    where
        K: Clone + Debug + DeserializeOwned,
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        let api: Api<K> = match namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        };
        let list = ask(api.list(which))
            .await
            .with_context(|| match namespace {
                Some(namespace) => format!("cannot list the {what} of namespace {namespace}"),
                None => format!("cannot list the {what} of all namespaces"),
            })?;
        Ok(list.items)
    }

    /// One object as JSON; `None` where it is not there, its kind being unknown to the cluster included.
    pub(super) async fn object(
        &self,
        resource: &ApiResource,
        namespace: Option<&str>,
        name: &str,
    ) -> anyhow::Result<Option<Value>> {
        let kind = &resource.kind;
        let found = match ask(self.dynamic(resource, namespace).get_opt(name)).await {
            // a path that the API server does not have
            Err(ApiError::Refused(kube::Error::Api(status))) if status.code == 404 => None,
            found => found.with_context(|| match namespace {
                Some(namespace) => format!("cannot read {kind} {namespace}/{name}"),
                None => format!("cannot read {kind} {name}"),
            })?,
        };
        found.map(|object| to_value(object, resource)).transpose()
    }

    /// The objects of a kind in a namespace, or everywhere; none where the cluster does not know the kind.
    pub(super) async fn objects(
        &self,
        resource: &ApiResource,
        namespace: Option<&str>,
    ) -> anyhow::Result<Vec<Value>> {
        self.objects_that(resource, namespace, &ListParams::default())
            .await
    }

    /// [`Cluster::objects`] that selectors choose.
    pub(super) async fn objects_that(
        &self,
        resource: &ApiResource,
        namespace: Option<&str>,
        which: &ListParams,
    ) -> anyhow::Result<Vec<Value>> {
        let api = self.dynamic(resource, namespace);
        let list = match ask(api.list(which)).await {
            Err(ApiError::Refused(kube::Error::Api(status))) if status.code == 404 => {
                return Ok(Vec::new());
            }
            list => {
                list.with_context(|| format!("cannot list objects of kind {}", resource.kind))?
            }
        };
        let objects = list.items.into_iter();
        objects.map(|object| to_value(object, resource)).collect()
    }

    fn dynamic(&self, resource: &ApiResource, namespace: Option<&str>) -> Api<DynamicObject> {
        match namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, resource),
            None => Api::all_with(self.client.clone(), resource),
        }
    }

    /// `GET path` on a pod's loopback, by port-forward: the status and the body.
    async fn ask_pod(
        &self,
        pod: &PodName,
        port: u16,
        path: &str,
    ) -> anyhow::Result<(u16, Vec<u8>)> {
        let request = request(path)?;
        self.forward(pod, port).await?.exchange(None, request).await
    }

    /// The control plane's pods in `namespace`, ready or not.
    pub(super) async fn replicas(&self, namespace: &str) -> anyhow::Result<Vec<Pod>> {
        let which = ListParams::default().labels(CONTROL_PLANE);
        self.list("pods", Some(namespace), &which).await
    }

    /// The metrics of a pod's agent, through the API server's proxy.
    pub(super) async fn metrics(&self, pod: &PodName) -> anyhow::Result<String> {
        let PodName { namespace, name } = pod;
        let path = format!(
            "/api/v1/namespaces/{namespace}/pods/{name}:{AGENT_PORT}/proxy/stats/prometheus"
        );
        let request = hyper::Request::get(path).body(Vec::new())?;
        let text = ask(self.client.request_text(request)).await;
        text.with_context(|| format!("cannot read the metrics of pod {pod}"))
    }

    /// What a command in a pod's sidecar prints.
    pub(super) async fn run_in_sidecar(
        &self,
        pod: &PodName,
        command: &[&str],
    ) -> anyhow::Result<Vec<u8>> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace);
        let how = AttachParams::default()
            .container(SIDECAR)
            .stdin(false)
            .stderr(true);
        let told = || {
            format!(
                "cannot run `{}` in {SIDECAR} of pod {pod}",
                command.join(" ")
            )
        };
        let mut process = ask(api.exec(&pod.name, command.iter().copied(), &how))
            .await
            .with_context(told)?;
        let stdout = process.stdout().context("no standard output")?;
        let stderr = process.stderr().context("no standard error")?;
        let status = process.take_status().context("no status")?;
        let read = async {
            let (mut out, mut err) = (Vec::new(), Vec::new());
            let mut stdout = stdout.take(ANSWER_LIMIT as u64);
            let mut stderr = stderr.take(4096);
            let (read, told) =
                tokio::join!(stdout.read_to_end(&mut out), stderr.read_to_end(&mut err));
            read.and(told).map(|_| (out, err))
        };
        let (out, err) = timeout(PATIENCE, read)
            .await
            .map_err(|_| anyhow!("no end within {PATIENCE:?}"))
            .and_then(|read| read.map_err(Into::into))
            .with_context(told)?;
        let status = timeout(PATIENCE, status).await.ok().flatten();
        let failed = status.filter(|status| status.status.as_deref() == Some("Failure"));
        match failed {
            None => Ok(out),
            Some(status) => {
                let words = String::from_utf8_lossy(&err);
                let words = match words.trim() {
                    "" => status.message.unwrap_or_default(),
                    words => words.to_owned(),
                };
                Err(anyhow!(words)).with_context(told)
            }
        }
    }
}

/// Items of a list do not say their kind.
fn to_value(object: DynamicObject, resource: &ApiResource) -> anyhow::Result<Value> {
    let mut object = serde_json::to_value(object).context("an object that is no JSON")?;
    object["apiVersion"] = resource.api_version.clone().into();
    object["kind"] = resource.kind.clone().into();
    Ok(object)
}

/// One question to the API server, bounded, with our words for its refusals.
async fn ask<T>(question: impl Future<Output = kube::Result<T>>) -> Result<T, ApiError> {
    match timeout(PATIENCE, question).await {
        Ok(answer) => answer.map_err(ApiError::Refused),
        Err(_) => Err(ApiError::Silent(PATIENCE)),
    }
}

/// Gives the error of a question to the API server the code that a verb ends with: [`Exit::Refused`] where it answered
/// that this may not be, [`Exit::Unreachable`] where it did not answer.
pub(super) trait Answered<T> {
    /// `result`, or a [`Failure`] with its code.
    fn answered(self) -> Result<T, Failure>;
}

impl<T> Answered<T> for anyhow::Result<T> {
    fn answered(self) -> Result<T, Failure> {
        self.map_err(|error| match error.downcast_ref() {
            Some(ApiError::Refused(kube::Error::Api(_))) => Exit::Refused.because(error),
            _ => Exit::Unreachable.because(error.context(
                "no answer of an API server (`kubectl cluster-info` looks closer, --context and --kubeconfig name another)",
            )),
        })
    }
}

/// A pod by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PodName {
    pub(super) namespace: String,
    pub(super) name: String,
}

impl PodName {
    pub(super) fn of(pod: &Pod) -> Self {
        Self {
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
        }
    }
}

impl std::fmt::Display for PodName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// `web`, `pod/web`: a pod's name on the command line.
pub(super) fn parse_pod(text: &str) -> Result<String, String> {
    let name = ["pod/", "pods/", "po/"]
        .iter()
        .find_map(|kind| text.strip_prefix(kind))
        .unwrap_or(text);
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    if !name.is_empty() && name.len() <= 253 && name.chars().all(fits) {
        Ok(name.to_owned())
    } else {
        Err(format!("{text:?} is not the name of a pod"))
    }
}

/// A running pod with our sidecar.
pub(super) fn runs_in_mesh(pod: &Pod) -> bool {
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    phase == Some("Running") && pod.metadata.deletion_timestamp.is_none() && has_sidecar(pod)
}

/// Whether our sidecar is in the pod.
pub(super) fn has_sidecar(pod: &Pod) -> bool {
    pod.spec.as_ref().is_some_and(|spec| {
        let native = spec.init_containers.iter().flatten();
        native
            .chain(&spec.containers)
            .any(|container| container.name == SIDECAR)
    })
}

/// Every replica of the control plane that could be asked, or one at an address.
pub(super) enum ControlPlane<'a> {
    /// In a cluster: its ready pods.
    Replicas(&'a Cluster, Vec<PodName>),
    /// A process that this machine reaches, such as `malha serve --standalone`.
    Address(&'a str),
}

/// What one replica said.
#[derive(Debug)]
pub(super) struct Said {
    /// The replica's pod, or its address.
    pub(super) replica: String,
    /// The document; `None` where it knows nothing about what was asked (404).
    pub(super) document: anyhow::Result<Option<Vec<u8>>>,
}

impl<'a> ControlPlane<'a> {
    /// The ready replicas in `namespace`.
    ///
    /// # Errors
    /// [`Exit::Unreachable`] where there is none.
    pub(super) async fn find(cluster: &'a Cluster, namespace: &str) -> Result<Self, Failure> {
        let pods = cluster
            .replicas(namespace)
            .await
            .or_exit(Exit::Unreachable)?;
        let ready: Vec<_> = pods
            .iter()
            .filter(|pod| is_ready(pod))
            .map(PodName::of)
            .collect();
        if ready.is_empty() {
            return Err(Exit::Unreachable.because(anyhow!(
                "no control-plane pod is ready in namespace {namespace} ({} with the labels {CONTROL_PLANE}); \
                 `kubectl -n {namespace} get pods` shows why, --system-namespace names another place",
                pods.len()
            )));
        }
        Ok(Self::Replicas(cluster, ready))
    }

    /// Asks every replica at once.
    pub(super) async fn ask(&self, path: &str) -> Vec<Said> {
        match self {
            Self::Replicas(cluster, pods) => {
                join_all(pods.iter().map(|pod| async move {
                    let answer = cluster.ask_pod(pod, QUESTIONS_PORT, path).await;
                    Said::new(pod.to_string(), path, answer)
                }))
                .await
            }
            Self::Address(address) => {
                let answer = timeout(PATIENCE, ask_address(address, path)).await;
                let answer =
                    answer.unwrap_or_else(|_| Err(anyhow!("no answer within {PATIENCE:?}")));
                vec![Said::new((*address).to_owned(), path, answer)]
            }
        }
    }
}

impl Said {
    fn new(replica: String, path: &str, answer: anyhow::Result<(u16, Vec<u8>)>) -> Self {
        let document = answer.and_then(|(status, body)| match status {
            200 => Ok(Some(body)),
            404 => Ok(None),
            status => Err(anyhow!("GET {path} was answered with {status}")),
        });
        Self { replica, document }
    }
}

async fn ask_address(address: &str, path: &str) -> anyhow::Result<(u16, Vec<u8>)> {
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("cannot connect to {address}"))?;
    exchange(stream, request(path)?).await
}

/// Whether a pod is ready and is not going away.
pub(super) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten());
    let mut ready = conditions.filter(|condition| condition.type_ == "Ready");
    pod.metadata.deletion_timestamp.is_none() && ready.any(|condition| condition.status == "True")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_is_named_as_kubectl_names_it() {
        for (text, name) in [("web-0", "web-0"), ("pod/web", "web"), ("po/a.b", "a.b")] {
            assert_eq!(parse_pod(text), Ok(name.to_owned()));
        }
        for wrong in ["", "pod/", "deploy/web", "../x", "a b", "Web", "a?b"] {
            assert!(parse_pod(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_running_pods_with_our_sidecar_are_in_the_mesh() {
        let pod = |sidecar: &str, list: &str, phase: &str| -> Pod {
            let mut pod = json!({
                "metadata": {"name": "a"},
                "spec": {"containers": [{"name": "app"}]},
                "status": {"phase": phase},
            });
            let container = json!({"name": sidecar});
            match list {
                "containers" => pod["spec"][list][1] = container,
                list => pod["spec"][list] = json!([container]),
            }
            serde_json::from_value(pod).expect("a pod")
        };
        assert!(runs_in_mesh(&pod(
            "malha-proxy",
            "initContainers",
            "Running"
        )));
        assert!(!runs_in_mesh(&pod(
            "malha-proxy",
            "initContainers",
            "Pending"
        )));
        assert!(!runs_in_mesh(&pod(
            "istio-proxy",
            "initContainers",
            "Running"
        )));
    }

    #[test]
    fn a_replica_that_is_going_away_is_not_asked() {
        let pod = |ready: &str, deleted: bool| -> Pod {
            let mut pod = json!({
                "metadata": {"name": "malha-0"},
                "status": {"conditions": [{"type": "Ready", "status": ready}]},
            });
            if deleted {
                pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            }
            serde_json::from_value(pod).expect("a pod")
        };
        assert!(is_ready(&pod("True", false)));
        assert!(!is_ready(&pod("False", false)));
        assert!(!is_ready(&pod("True", true)));
    }
}

//! `malha mesh` and `malha unmesh`: a namespace in and out of the mesh.
//!
//! namespace, its pods and workloads -> [`Plan`] -> one label, restarts -> what carries a sidecar then

use std::time::Duration;

use anyhow::anyhow;
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet},
    core::v1::{Namespace, Pod},
};
use kube::api::ApiResource;
use serde_json::{Value, json};

use super::{
    Exit, Failure, Terminal,
    cluster::{self, Answered as _, Cluster, ClusterArgs, has_sidecar, is_ready},
    exit::OrExit as _,
    mesh::namespace_facts,
    rendering::ObjectName,
    rollout,
    terminal::table,
};
use crate::{
    config::parse_duration,
    inject::{
        NamespaceFacts,
        select::{INJECTION, PodFacts, REVISION, is_protected, select},
    },
    runtime::clock,
};

/// Bring a namespace into the mesh: label it istio-injection=enabled.
///
/// Pods get their sidecar when they are made: those that have none yet are named, and --restart rolls their workloads over
/// and waits. `malha explain pod/NAME` says why one gets none.
///
/// Exit codes: 0; 1 where it was refused or a workload did not become ready; 65 where there is no such namespace; 69 where
/// the cluster does not answer.
#[derive(Debug, clap::Args)]
pub(super) struct Mesh {
    #[command(flatten)]
    args: Args,
}

/// Take a namespace out of the mesh: remove the labels that ask for sidecars.
///
/// Pods lose their sidecar when they are made anew; --restart rolls the workloads over whose pods still have one, and waits.
/// A pod or a workload that asks by a label of its own still gets one.
///
/// Exit codes: as of `malha mesh`.
#[derive(Debug, clap::Args)]
pub(super) struct Unmesh {
    #[command(flatten)]
    args: Args,
}

#[derive(Debug, clap::Args)]
struct Args {
    /// The namespace.
    #[arg(value_name = "NAMESPACE")]
    namespace: String,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Restart what must be made anew, one workload after the other, and wait until each is ready.
    #[arg(long)]
    restart: bool,
    /// How long each restart may take.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_duration, requires = "restart")]
    timeout: Duration,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// How the result is written.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// One row a workload.
    Table,
    /// One object.
    Json,
}

/// Which way a namespace goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    In,
    Out,
}

pub(super) fn mesh(mesh: &Mesh, terminal: &mut Terminal) -> Result<Exit, Failure> {
    cluster::block_on(go(Way::In, &mesh.args, terminal))
}

pub(super) fn unmesh(unmesh: &Unmesh, terminal: &mut Terminal) -> Result<Exit, Failure> {
    cluster::block_on(go(Way::Out, &unmesh.args, terminal))
}

async fn go(way: Way, args: &Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let cluster = args.cluster.connect().await?;
    let name = &args.namespace;
    let resource = ApiResource::erase::<Namespace>(&());
    let found = cluster.object(&resource, None, name).await;
    let found = found.answered()?.ok_or_else(|| {
        Exit::BadInput.because(anyhow!(
            "there is no namespace {name}; `kubectl get namespaces` lists all"
        ))
    })?;
    let facts = namespace_facts(&found).or_exit(Exit::Internal)?;
    if is_protected(name) {
        return Err(Exit::Refused.because(anyhow!(
            "namespace {name} is never in the mesh: the cluster itself, or the control plane, must start without it"
        )));
    }
    let (labels, after) = labels(way, &facts);
    if !labels.is_empty() && !args.dry_run {
        let object = ObjectName::new(("", "v1", "Namespace"), None, name);
        let patch = json!({ "metadata": { "labels": labels } });
        cluster.merge(&object, &patch).await?;
    }
    let plan = Plan::of(&workloads(&cluster, name).await?, &after);
    if args.restart && !args.dry_run {
        for row in plan.rows.iter().filter(|row| !row.wrong.is_empty()) {
            if let Some(workload) = &row.workload {
                restart(&cluster, workload, args.timeout, terminal).await?;
            }
        }
    }
    let plan = match args.restart && !args.dry_run {
        true => Plan::of(&workloads(&cluster, name).await?, &after),
        false => plan,
    };
    let label = match (labels.is_empty(), args.dry_run) {
        (true, _) => "its labels say so already",
        (false, true) => "its labels would be changed",
        (false, false) => "its labels were changed",
    };
    match args.output {
        Format::Json => terminal.result(&format!("{:#}\n", plan.to_json(name, &labels)))?,
        Format::Table => {
            terminal.result(&plan.to_text())?;
            terminal.note(&format!(
                "namespace {name}: {label}; {}",
                plan.coverage(way)
            ));
        }
    }
    Ok(Exit::Done)
}

type Labels = serde_json::Map<String, Value>;

/// The labels that change (null: that go), and the namespace as it is then.
fn labels(way: Way, before: &NamespaceFacts) -> (Labels, NamespaceFacts) {
    let mut change = Labels::new();
    let mut after = before.clone();
    let has = |key: &str, value: &str| before.labels.get(key).is_some_and(|is| is == value);
    match way {
        Way::In if !has(INJECTION, "enabled") => {
            change.insert(INJECTION.to_owned(), "enabled".into());
            after
                .labels
                .insert(INJECTION.to_owned(), "enabled".to_owned());
        }
        Way::In => {}
        Way::Out => {
            for (key, value) in [(INJECTION, "enabled"), (REVISION, "default")] {
                if has(key, value) {
                    change.insert(key.to_owned(), Value::Null);
                    after.labels.remove(key);
                }
            }
        }
    }
    (change, after)
}

/// A pod and what it belongs to.
struct Owned {
    pod: Pod,
    /// What can be restarted, where there is something.
    workload: Option<ObjectName>,
}

/// The living pods of a namespace.
async fn workloads(cluster: &Cluster, namespace: &str) -> Result<Vec<Owned>, Failure> {
    let sets = ApiResource::erase::<ReplicaSet>(&());
    let (pods, sets) = tokio::join!(
        cluster.pods(Some(namespace)),
        cluster.objects(&sets, Some(namespace))
    );
    let (pods, sets) = (pods.answered()?, sets.answered()?);
    let lives = |pod: &Pod| {
        let phase = pod
            .status
            .as_ref()
            .and_then(|status| status.phase.as_deref());
        pod.metadata.deletion_timestamp.is_none() && !matches!(phase, Some("Succeeded" | "Failed"))
    };
    Ok(pods
        .into_iter()
        .filter(lives)
        .map(|pod| Owned {
            workload: owner(&pod, &sets),
            pod,
        })
        .collect())
}

/// The Deployment, StatefulSet or DaemonSet that makes the pod anew.
fn owner(pod: &Pod, sets: &[Value]) -> Option<ObjectName> {
    let namespace = pod.metadata.namespace.as_deref();
    let mut owners = pod.metadata.owner_references.iter().flatten();
    let controller = owners.find(|owner| owner.controller == Some(true))?;
    let (kind, name) = match controller.kind.as_str() {
        "ReplicaSet" => {
            let set = sets
                .iter()
                .find(|set| set["metadata"]["name"] == controller.name.as_str())?;
            let mut owners = set["metadata"]["ownerReferences"].as_array()?.iter();
            let deployment = owners.find(|owner| owner["kind"] == "Deployment")?;
            (
                ApiResource::erase::<Deployment>(&()),
                deployment["name"].as_str()?,
            )
        }
        "StatefulSet" => (
            ApiResource::erase::<StatefulSet>(&()),
            controller.name.as_str(),
        ),
        "DaemonSet" => (
            ApiResource::erase::<DaemonSet>(&()),
            controller.name.as_str(),
        ),
        _ => return None,
    };
    Some(ObjectName {
        resource: kind,
        namespace: namespace.map(str::to_owned),
        name: name.to_owned(),
    })
}

/// What must be made anew.
#[derive(Debug)]
struct Plan {
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    /// `deployment.apps/web`, `pod/debug`.
    name: String,
    /// `None`: nobody makes it anew but its author.
    workload: Option<ObjectName>,
    pods: usize,
    /// Pods that are ready, their sidecar included.
    ready: usize,
    /// Pods with a sidecar.
    meshed: usize,
    /// Names of the pods that would be made otherwise today.
    wrong: Vec<String>,
}

impl Plan {
    fn of(pods: &[Owned], namespace: &NamespaceFacts) -> Self {
        let mut rows: Vec<Row> = Vec::new();
        for Owned { pod, workload } in pods {
            let pod_name = pod.metadata.name.as_deref().unwrap_or_default();
            let name = match workload {
                Some(workload) => workload.as_kubectl(),
                None => format!("pod/{pod_name}"),
            };
            let index = rows.iter().position(|row| row.name == name);
            let index = index.unwrap_or_else(|| {
                rows.push(Row {
                    name,
                    workload: workload.clone(),
                    pods: 0,
                    ready: 0,
                    meshed: 0,
                    wrong: Vec::new(),
                });
                rows.len() - 1
            });
            let row = &mut rows[index];
            let has = has_sidecar(pod);
            row.pods += 1;
            row.ready += usize::from(is_ready(pod));
            row.meshed += usize::from(has);
            if has != would_have(pod, namespace) {
                row.wrong.push(pod_name.to_owned());
            }
        }
        rows.sort_by(|a, b| a.name.cmp(&b.name));
        Self { rows }
    }

    fn to_text(&self) -> String {
        let head = ["WORKLOAD", "PODS", "READY", "WITH SIDECAR", "TO RESTART"].map(str::to_owned);
        let rows = self.rows.iter().map(|row| {
            let restart = match (row.wrong.as_slice(), &row.workload) {
                ([], _) => "-".to_owned(),
                (wrong, Some(_)) if wrong.len() > 3 => {
                    format!("{} and {} more", wrong[..2].join(", "), wrong.len() - 2)
                }
                (wrong, Some(_)) => wrong.join(", "),
                (_, None) => "by hand".to_owned(),
            };
            vec![
                row.name.clone(),
                row.pods.to_string(),
                row.ready.to_string(),
                row.meshed.to_string(),
                restart,
            ]
        });
        table(
            &std::iter::once(head.to_vec())
                .chain(rows)
                .collect::<Vec<_>>(),
        )
    }

    fn coverage(&self, way: Way) -> String {
        let sum = |count: fn(&Row) -> usize| self.rows.iter().map(count).sum::<usize>();
        let (pods, meshed, wrong) = (
            sum(|row| row.pods),
            sum(|row| row.meshed),
            sum(|row| row.wrong.len()),
        );
        let mut text = format!("{meshed}/{pods} pods have a sidecar");
        match (wrong, way) {
            (0, _) => {}
            (_, Way::In) => {
                text += &format!("; {wrong} get theirs when they are restarted (--restart)")
            }
            (_, Way::Out) => {
                text += &format!("; {wrong} lose theirs when they are restarted (--restart)")
            }
        }
        text
    }

    fn to_json(&self, namespace: &str, labels: &Labels) -> Value {
        let items: Vec<_> = self
            .rows
            .iter()
            .map(|row| {
                json!({
                    "name": row.name, "pods": row.pods, "ready": row.ready, "withSidecar": row.meshed,
                    "toRestart": row.wrong, "restartable": row.workload.is_some(),
                })
            })
            .collect();
        json!({
            "apiVersion": "malha/v1", "kind": "Membership", "namespace": namespace, "labels": labels,
            "items": items,
        })
    }
}

/// Whether a pod like this would be given a sidecar in the namespace as it is then. The labels decide it; what the injector
/// itself skips (a sidecar of another mesh, Windows) is counted as wanted, and stays in the list.
fn would_have(pod: &Pod, namespace: &NamespaceFacts) -> bool {
    let empty = Default::default();
    let labels = pod.metadata.labels.as_ref().unwrap_or(&empty);
    let host_network = pod.spec.as_ref().and_then(|spec| spec.host_network);
    let facts = PodFacts {
        host_network: host_network.unwrap_or_default(),
        ..PodFacts::from_labels(labels)
    };
    select(namespace, &facts, "default").outcome.is_ok()
}

/// As `kubectl rollout restart`, and `kubectl rollout status`.
async fn restart(
    cluster: &Cluster,
    workload: &ObjectName,
    patience: Duration,
    terminal: &mut Terminal,
) -> Result<(), Failure> {
    terminal.progress(&format!("restarting {workload}"));
    let now: Timestamp = clock::system().now();
    let stamp = json!({ "kubectl.kubernetes.io/restartedAt": now.to_string() });
    let patch = json!({ "spec": { "template": { "metadata": { "annotations": stamp } } } });
    cluster.merge(workload, &patch).await?;
    rollout::finished(cluster, workload, patience).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(labels: &[(&str, &str)]) -> NamespaceFacts {
        NamespaceFacts {
            name: "shop".to_owned(),
            labels: labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
        }
    }

    #[test]
    fn only_labels_that_decide_are_changed() {
        let change = |way, before: &[(&str, &str)]| {
            let (change, after) = labels(way, &namespace(before));
            let meshed = select(&after, &PodFacts::default(), "default")
                .outcome
                .is_ok();
            assert_eq!(meshed, way == Way::In, "{before:?}");
            Value::from(change)
        };
        let (enabled, other) = (("istio-injection", "enabled"), ("team", "a"));
        assert_eq!(
            change(Way::In, &[other]),
            json!({ "istio-injection": "enabled" })
        );
        assert_eq!(
            change(Way::In, &[("istio-injection", "disabled")]),
            json!({ "istio-injection": "enabled" })
        );
        assert_eq!(change(Way::In, &[enabled]), json!({}));
        assert_eq!(
            change(Way::Out, &[enabled, other]),
            json!({ "istio-injection": null })
        );
        assert_eq!(
            change(Way::Out, &[("istio.io/rev", "default")]),
            json!({ "istio.io/rev": null })
        );
        assert_eq!(
            change(Way::Out, &[("istio-injection", "disabled")]),
            json!({})
        );
        assert_eq!(change(Way::Out, &[("istio.io/rev", "other")]), json!({}));
    }

    #[test]
    fn what_must_be_made_anew_is_told_by_workload() {
        let owned = |name: &str, workload: bool, sidecar: bool, labels: Value| {
            Owned {
            pod: serde_json::from_value(json!({
                "metadata": { "name": name, "labels": labels },
                "spec": { "containers": [{ "name": if sidecar { "malha-proxy" } else { "app" } }] },
                "status": { "conditions": [{ "type": "Ready", "status": if name == "web-1" { "False" } else { "True" } }] },
            }))
            .expect("a pod"),
            workload: workload
                .then(|| ObjectName::new(("apps", "v1", "Deployment"), Some("shop"), "web")),
        }
        };
        let pods = [
            owned("web-1", true, true, json!({})),
            owned("web-2", true, false, json!({})),
            owned("debug", false, false, json!({})),
            owned(
                "out",
                false,
                false,
                json!({ "sidecar.istio.io/inject": "false" }),
            ),
        ];
        let plan = Plan::of(&pods, &namespace(&[("istio-injection", "enabled")]));
        assert_eq!(
            plan.to_text(),
            "\
WORKLOAD              PODS   READY   WITH SIDECAR   TO RESTART
deployment.apps/web   2      1       1              web-2
pod/debug             1      1       0              by hand
pod/out               1      1       0              -
"
        );
        assert!(
            plan.coverage(Way::In)
                .starts_with("1/4 pods have a sidecar; 2 get theirs")
        );
        let plan = Plan::of(&pods, &namespace(&[]));
        assert!(plan.coverage(Way::Out).contains("1 lose theirs"));
    }

    #[test]
    fn a_pod_of_a_deployment_is_found_through_its_replica_set() {
        let pod = |kind: &str, name: &str| -> Pod {
            serde_json::from_value(json!({ "metadata": { "name": "p", "namespace": "shop", "ownerReferences": [
                { "apiVersion": "apps/v1", "kind": kind, "name": name, "uid": "1", "controller": true },
            ] } }))
            .expect("a pod")
        };
        let sets = [
            json!({ "metadata": { "name": "web-1", "ownerReferences": [{ "kind": "Deployment", "name": "web" }] } }),
        ];
        let found =
            |kind: &str, name: &str| owner(&pod(kind, name), &sets).map(|name| name.as_kubectl());
        assert_eq!(
            found("ReplicaSet", "web-1").as_deref(),
            Some("deployment.apps/web")
        );
        assert_eq!(
            found("StatefulSet", "db").as_deref(),
            Some("statefulset.apps/db")
        );
        assert_eq!(found("ReplicaSet", "lonely"), None);
        assert_eq!(found("Job", "once"), None);
    }
}

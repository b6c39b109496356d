//! What is known of the cluster is what is there, within a second.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use malha::{
    caller::Liveness,
    inject::ClusterFacts,
    k8s::world::{self, World},
    runtime::clock,
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::rig::{self, Cluster, Setup, eventually};

/// How long after a change the world must know.
const LAG: Duration = Duration::from_secs(1);

/// A world that follows the cluster until it is dropped.
pub(crate) struct Followed {
    pub(crate) world: Arc<World>,
    stop: CancellationToken,
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

pub(crate) async fn follow(client: Client) -> Followed {
    let world = World::new();
    let stop = CancellationToken::new();
    let metrics = world::Metrics::default();
    tokio::spawn(
        world
            .clone()
            .follow(client, clock::system(), metrics, stop.clone()),
    );
    eventually(Duration::from_secs(20), "the world is known", || async {
        let missing: Vec<_> = world.missing().collect();
        missing
            .is_empty()
            .then_some(())
            .ok_or_else(|| format!("{missing:?}"))
    })
    .await;
    Followed { world, stop }
}

/// A pod that no kubelet runs.
pub(crate) fn pod(name: &str, account: &str) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {
            "serviceAccountName": account,
            "containers": [{"name": "app", "image": "example.com/app:1"}],
        },
    }))
    .expect("a pod")
}

pub(crate) async fn make_account(cluster: &Cluster, namespace: &str, name: &str) -> String {
    let accounts: Api<ServiceAccount> = Api::namespaced(cluster.client().await, namespace);
    let account = serde_json::from_value(json!({"metadata": {"name": name}})).expect("an account");
    let made = accounts
        .create(&PostParams::default(), &account)
        .await
        .expect("an account");
    made.uid().expect("a stored object has a UID")
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_are_known_and_forgotten_within_a_second() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let client = cluster.client().await;
    let followed = follow(client.clone()).await;
    let world = &followed.world;
    let namespace = cluster
        .namespace("world", &[("istio-injection", "enabled")])
        .await;

    eventually(LAG, "the namespace and its labels", || async {
        let facts = ClusterFacts::namespace(&**world, &namespace).ok_or("unknown")?;
        (facts.labels.get("istio-injection").map(String::as_str) == Some("enabled"))
            .then_some(())
            .ok_or_else(|| format!("{facts:?}"))
    })
    .await;

    let uid = make_account(cluster, &namespace, "web").await;
    eventually(LAG, "the service account", || async {
        (Liveness::service_account(&**world, &namespace, "web") == Some(uid.clone()))
            .then_some(())
            .ok_or_else(|| "unknown".to_owned())
    })
    .await;

    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let made = pods
        .create(&PostParams::default(), &pod("p", "web"))
        .await
        .expect("a pod");
    let fact = eventually(LAG, "the pod", || async {
        Liveness::pod(&**world, &namespace, "p").ok_or_else(|| "unknown".to_owned())
    })
    .await;
    assert_eq!(Some(fact.uid), made.uid());
    assert_eq!(fact.service_account, "web");
    assert_eq!((fact.node, fact.deletion), (None, None));

    let finalize = json!({"metadata": {"finalizers": ["malha.io/test"]}});
    pods.patch("p", &PatchParams::default(), &Patch::Merge(&finalize))
        .await
        .expect("a finalizer");
    pods.delete("p", &DeleteParams::default())
        .await
        .expect("deleted");
    eventually(LAG, "the pod is being deleted", || async {
        let fact = Liveness::pod(&**world, &namespace, "p").ok_or("unknown")?;
        fact.deletion
            .map(drop)
            .ok_or_else(|| "not deleting".to_owned())
    })
    .await;
    let finalize = json!({"metadata": {"finalizers": null}});
    pods.patch("p", &PatchParams::default(), &Patch::Merge(&finalize))
        .await
        .expect("no finalizer");
    eventually(LAG, "the pod is forgotten", || async {
        let fact = Liveness::pod(&**world, &namespace, "p");
        fact.is_none()
            .then_some(())
            .ok_or_else(|| format!("{fact:?}"))
    })
    .await;

    let namespaces: Api<Namespace> = Api::all(client);
    assert!(!world.namespace_terminating(&namespace));
    namespaces
        .delete(&namespace, &DeleteParams::default())
        .await
        .expect("deleted");
    eventually(LAG, "the namespace ends", || async {
        world
            .namespace_terminating(&namespace)
            .then_some(())
            .ok_or_else(|| "not yet".to_owned())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_oldest_kubelet_follows_the_nodes() {
    // Nodes are the whole cluster's, so this test has one of its own.
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let client = cluster.client().await;
    let followed = follow(client.clone()).await;
    let oldest = |want: Option<u32>| {
        let world = followed.world.clone();
        async move {
            eventually(LAG, "the oldest kubelet", || async {
                let oldest = world.oldest_kubelet();
                (oldest == want)
                    .then_some(())
                    .ok_or_else(|| format!("{oldest:?}, not {want:?}"))
            })
            .await;
        }
    };
    oldest(None).await;
    let nodes: Api<Node> = Api::all(client);
    for (name, version) in [
        ("a", "v1.34.1"),
        ("b", "v1.29.8-gke.1"),
        ("c", "virtual-kubelet"),
    ] {
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
        let node = serde_json::from_value(node).expect("a node");
        nodes
            .create(&PostParams::default(), &node)
            .await
            .expect("a node");
        let status = json!({"status": {"nodeInfo": {
            "kubeletVersion": version, "architecture": "", "bootID": "", "containerRuntimeVersion": "", "kernelVersion": "",
            "kubeProxyVersion": "", "machineID": "", "operatingSystem": "", "osImage": "", "systemUUID": ""}}});
        nodes
            .patch_status(name, &PatchParams::default(), &Patch::Merge(&status))
            .await
            .expect("a status");
    }
    oldest(Some(29)).await;
    nodes
        .delete("b", &DeleteParams::default())
        .await
        .expect("deleted");
    oldest(Some(34)).await;
    nodes
        .delete("a", &DeleteParams::default())
        .await
        .expect("deleted");
    oldest(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_pods_are_listed_page_by_page() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let client = cluster.client().await;
    let namespace = cluster.namespace("many", &[]).await;
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    for number in 0..450 {
        let pod = pod(&format!("p-{number}"), "default");
        pods.create(&PostParams::default(), &pod)
            .await
            .expect("a pod");
    }
    let followed = follow(client).await;
    let mut known = 0;
    followed.world.each_namespace(|here, pods| {
        if here == namespace {
            known = pods.count();
        }
    });
    assert_eq!(known, 450);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_world_outlives_its_api_server() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let client = malha::k8s::connect(&malha::k8s::Access {
        kubeconfig: Some(cluster.admin_kubeconfig()),
        context: None,
    })
    .await
    .expect("a client");
    let namespace = cluster.namespace("outage", &[]).await;
    let followed = follow(client).await;
    let world = &followed.world;
    let skew = eventually(Duration::from_secs(5), "clocks are compared", || async {
        world.clock_skew().ok_or_else(|| "not yet".to_owned())
    })
    .await;
    assert!(
        skew.ahead.abs().as_secs() <= 1,
        "one machine, one clock: {skew:?}"
    );

    cluster.api_server().kill();
    eventually(
        Duration::from_secs(20),
        "the silence is noticed",
        || async {
            let silence = world.silence().ok_or("never heard")?;
            (silence > Duration::from_secs(3))
                .then_some(())
                .ok_or_else(|| format!("{silence:?}"))
        },
    )
    .await;
    assert!(world.synced(), "what was known stays known");
    assert!(world.find_namespace(&namespace).is_some());

    tokio::time::sleep(Duration::from_secs(5)).await;
    cluster.api_server().start().expect("started again");
    cluster.api_server_ready().await.expect("ready again");
    make_account(&cluster, &namespace, "later").await;
    eventually(
        Duration::from_secs(15),
        "what happened since is known",
        || async {
            Liveness::service_account(&**world, &namespace, "later")
                .ok_or_else(|| "unknown".to_owned())
        },
    )
    .await;
    let silence = world.silence().expect("heard");
    assert!(silence < Duration::from_secs(12), "{silence:?}");
}

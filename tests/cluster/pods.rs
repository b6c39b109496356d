//! Which pods of the mesh run without a sidecar, told once to those who can do something about it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod, events::v1::Event};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, PostParams},
};
use malha::{
    inject::{InjectSettings, Injector},
    k8s::{
        events,
        lease::Claim,
        pods::{self, Watch, keep},
    },
    runtime::clock,
};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{
    rig::{self, eventually},
    world::{Followed, follow},
};

struct Bench {
    client: Client,
    namespace: String,
    image: String,
    registry: Registry,
    stop: CancellationToken,
    _followed: Followed,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Bench {
    async fn new() -> Option<Self> {
        let cluster = rig::shared().await?;
        let client = cluster.client().await;
        // a revision of its own, so that no control plane of another test injects here
        let settings = InjectSettings {
            revision: format!("survey-{}", cluster.next()),
            ..InjectSettings::default()
        };
        let image = settings.image.proxy.clone();
        let labels = [("istio.io/rev", settings.revision.as_str())];
        let namespace = cluster.namespace("survey", &labels).await;
        let followed = follow(client.clone()).await;
        let stop = CancellationToken::new();
        let (notes, writing) = events::write(
            client.clone(),
            clock::system(),
            "malha-0".to_owned(),
            stop.clone(),
        );
        tokio::spawn(writing);
        let mut registry = Registry::default();
        let metrics = pods::Metrics::default();
        metrics.register(&mut registry);
        tokio::spawn(keep(Watch {
            client: client.clone(),
            world: followed.world.clone(),
            injector: Arc::new(ArcSwap::from_pointee(Injector::new(settings))),
            claim: Claim::unrivalled(),
            notes,
            metrics,
            clock: clock::system(),
            stop: stop.clone(),
        }));
        Some(Self {
            client,
            namespace,
            image,
            registry,
            stop,
            _followed: followed,
        })
    }

    async fn deploy(&self, name: &str, replicas: u32, pod: Value) {
        let deployment = json!({
            "metadata": {"name": name},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": {"app": name}},
                "template": {"metadata": {"labels": {"app": name}}, "spec": pod},
            },
        });
        let deployment: Deployment = serde_json::from_value(deployment).expect("a Deployment");
        let deployments: Api<Deployment> = Api::namespaced(self.client.clone(), &self.namespace);
        deployments
            .create(&PostParams::default(), &deployment)
            .await
            .expect("made");
    }

    async fn pod(&self, name: &str, metadata: Value, spec: Value) {
        let mut pod = json!({"metadata": metadata, "spec": spec});
        pod["metadata"]["name"] = json!(name);
        let pod: Pod = serde_json::from_value(pod).expect("a Pod");
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        pods.create(&PostParams::default(), &pod)
            .await
            .expect("made");
    }

    fn counts(&self) -> BTreeMap<&'static str, i64> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).expect("a text");
        let states = ["injected", "missing", "stale"];
        let count = |state| {
            let line = format!(
                "malha_injector_pods{{state=\"{state}\",namespace=\"{}\"}} ",
                self.namespace
            );
            let value = text.lines().find_map(|it| it.strip_prefix(&line))?;
            Some((state, value.parse().ok()?))
        };
        states.into_iter().filter_map(count).collect()
    }

    async fn counted(&self, injected: i64, missing: i64, stale: i64) {
        let want = BTreeMap::from([
            ("injected", injected),
            ("missing", missing),
            ("stale", stale),
        ]);
        eventually(Duration::from_secs(15), "the pods are counted", || async {
            let counts = self.counts();
            (counts == want)
                .then_some(())
                .ok_or_else(|| format!("{counts:?}, not {want:?}"))
        })
        .await;
    }

    /// (kind of the owner, name up to the template's hash, reason, note) of each Event of ours.
    async fn events(&self) -> Vec<(String, String, String, String)> {
        let events: Api<Event> = Api::namespaced(self.client.clone(), &self.namespace);
        let all = events
            .list(&ListParams::default())
            .await
            .expect("a list")
            .items;
        let ours = all.into_iter().filter(|event| {
            event.reporting_controller.as_deref() == Some("malha.io/control-plane")
        });
        let mut told: Vec<_> = ours
            .map(|event| {
                let regarding = event.regarding.unwrap_or_default();
                let name = regarding.name.unwrap_or_default();
                let stem = name.split('-').next().unwrap_or_default().to_owned();
                (
                    regarding.kind.unwrap_or_default(),
                    stem,
                    event.reason.unwrap_or_default(),
                    event.note.unwrap_or_default(),
                )
            })
            .collect();
        told.sort();
        told
    }

    async fn told(&self, want: &[(&str, &str, &str, &str)]) {
        eventually(Duration::from_secs(15), "the Events are told", || async {
            let told = self.events().await;
            let fits = told.len() == want.len()
                && told.iter().zip(want).all(|(told, want)| {
                    (told.0.as_str(), told.1.as_str(), told.2.as_str()) == (want.0, want.1, want.2)
                        && told.3.contains(want.3)
                });
            fits.then_some(())
                .ok_or_else(|| format!("{told:#?}, not {want:#?}"))
        })
        .await;
    }
}

fn app() -> Value {
    json!({"containers": [{"name": "app", "image": "example.com/app:1"}]})
}

fn with_proxy(image: &str) -> Value {
    json!({
        "initContainers": [
            {"name": "malha-init", "image": "example.com/init:1"},
            {"name": "malha-proxy", "image": image, "restartPolicy": "Always"},
        ],
        "containers": [{"name": "app", "image": "example.com/app:1"}],
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn owners_are_told_once_and_pods_are_counted_by_state() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    bench.deploy("meshed", 3, with_proxy(&bench.image)).await;
    bench
        .deploy("old", 2, with_proxy("example.com/proxy:0.0.1"))
        .await;
    bench.deploy("plain", 2, app()).await;
    let mut refused = app();
    refused["containers"][0]["ports"] = json!([{"containerPort": 15001}]);
    bench.deploy("refused", 1, refused).await;
    bench.counted(3, 3, 2).await;
    let out = json!({"labels": {"sidecar.istio.io/inject": "false"}});
    bench.pod("out", out, app()).await;
    let out = json!({"annotations": {"sidecar.istio.io/inject": "false"}});
    bench.pod("noted", out, app()).await;
    let mut host = app();
    host["hostNetwork"] = json!(true);
    bench.pod("host", json!({}), host).await;

    let want = [
        ("Pod", "host", "InjectionSkipped", "HostNetwork"),
        ("Pod", "noted", "InjectionSkipped", "OptedOutByAnnotation"),
        ("Pod", "out", "InjectionSkipped", "OptedOutByLabel"),
        (
            "ReplicaSet",
            "meshed",
            "SidecarInjected",
            "run with Malha's sidecar",
        ),
        ("ReplicaSet", "old", "SidecarInjected", ""),
        ("ReplicaSet", "plain", "InjectionFailed", "Create it anew"),
        ("ReplicaSet", "refused", "InjectionFailed", "PortConflict"),
    ];
    bench.told(&want).await;
    bench.counted(3, 3, 2).await;

    // more pods of the same templates are counted, and nobody is told again
    let scale = json!({"spec": {"replicas": 5}});
    let deployments: Api<Deployment> = Api::namespaced(bench.client.clone(), &bench.namespace);
    let params = kube::api::PatchParams::default();
    for name in ["meshed", "plain"] {
        let patch = kube::api::Patch::Merge(&scale);
        deployments
            .patch(name, &params, &patch)
            .await
            .expect("scaled");
    }
    bench.counted(5, 6, 2).await;
    bench.told(&want).await;

    deployments
        .delete("plain", &DeleteParams::background())
        .await
        .expect("deleted");
    deployments
        .delete("refused", &DeleteParams::background())
        .await
        .expect("deleted");
    bench.counted(5, 0, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_outside_the_mesh_are_nobodys_business() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let cluster = rig::shared().await.expect("there, just now");
    let outside = cluster.namespace("outside", &[]).await;
    let pods: Api<Pod> = Api::namespaced(bench.client.clone(), &outside);
    let out = json!({"metadata": {"name": "out", "labels": {"sidecar.istio.io/inject": "false"}}, "spec": app()});
    let pod: Pod = serde_json::from_value(out).expect("a Pod");
    pods.create(&PostParams::default(), &pod)
        .await
        .expect("made");
    bench.deploy("meshed", 1, with_proxy(&bench.image)).await;
    bench.counted(1, 0, 0).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let events: Api<Event> = Api::namespaced(bench.client.clone(), &outside);
    let told = events
        .list(&ListParams::default())
        .await
        .expect("a list")
        .items;
    let ours =
        |event: &&Event| event.reporting_controller.as_deref() == Some("malha.io/control-plane");
    assert_eq!(told.iter().filter(ours).count(), 0, "{told:?}");
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &bench.registry).expect("a text");
    assert!(
        !text.contains(&format!("namespace=\"{outside}\"")),
        "{text}"
    );
}

//! The trust bundle in every namespace: there before a pod needs it, put back when somebody takes it away.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::api::{
    core::v1::{ConfigMap, Namespace},
    events::v1::Event,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use malha::{
    ca::{Authority, bundle::Bundle},
    custody::Custody,
    k8s::{
        events,
        journal::SecretHome,
        lease::{self, Candidate, Claim},
        trust_bundle::{self, FIELD_MANAGER, KEY, Keeper, keep},
    },
    runtime::clock,
};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{
    journal,
    plugged::Operator,
    rig::{self, Cluster, eventually, outside},
    world::{Followed, follow},
};

/// How soon it is there, and there again.
const AT_ONCE: Duration = Duration::from_secs(1);

/// What busy cores may add to it before a test gives up.
const PATIENCE: Duration = Duration::from_secs(15);

struct Bench {
    cluster: &'static Cluster,
    client: Client,
    /// The ConfigMap's name: one of this test's own, since namespaces are shared with other tests.
    name: String,
    home: String,
    custody: Arc<Custody<SecretHome>>,
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
        Self::with(|_| Claim::unrivalled()).await
    }

    async fn with(claim: impl FnOnce(Client) -> Claim) -> Option<Self> {
        let cluster = rig::shared().await?;
        let client = cluster.client().await;
        let home = cluster.namespace("trust-home", &[]).await;
        let custody = journal::open(client.clone(), &home).await;
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
        let metrics = trust_bundle::Metrics::default();
        metrics.register(&mut registry);
        let name = format!("trust-{}", cluster.next());
        let told = name.clone();
        tokio::spawn(keep(Keeper {
            client: client.clone(),
            world: followed.world.clone(),
            home: home.clone(),
            name: Box::new(move || told.clone()),
            wanted: custody.watch(),
            bundle_of: |authority: &Arc<Authority>| authority.bundle().clone(),
            claim: claim(client.clone()),
            notes,
            metrics,
            stop: stop.clone(),
        }));
        Some(Self {
            cluster,
            client,
            name,
            home,
            custody,
            registry,
            stop,
            _followed: followed,
        })
    }

    fn config_maps(&self, namespace: &str) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), namespace)
    }

    fn wanted(&self) -> Bundle {
        self.custody.authority().bundle().clone()
    }

    /// Waits until the namespace has the wanted bundle; how long it took.
    async fn filled(&self, namespace: &str) -> Duration {
        let start = Instant::now();
        let (config_maps, wanted) = (self.config_maps(namespace), self.wanted());
        eventually(PATIENCE, "the bundle is there", || async {
            let found = config_maps.get_opt(&self.name).await;
            let found = found.map_err(|error| error.to_string())?;
            let data = found.and_then(|found| found.data).unwrap_or_default();
            let text = data.get(KEY).cloned().unwrap_or_default();
            let live = Bundle::parse_pem(text.as_bytes());
            match live {
                Ok(live) if live == wanted => Ok(()),
                _ => Err(format!("{data:?}")),
            }
        })
        .await;
        start.elapsed()
    }

    /// Our writes of a namespace's ConfigMap, as the API server saw them.
    fn writes(&self, namespace: &str) -> usize {
        let ours = |event: &&Value| {
            let uri = event["requestURI"].as_str().unwrap_or_default();
            event["verb"] == "patch"
                && event["objectRef"]["name"] == self.name
                && event["objectRef"]["namespace"] == namespace
                && uri.contains(&format!("fieldManager={FIELD_MANAGER}"))
        };
        self.cluster.audit().iter().filter(ours).count()
    }

    async fn edit(&self, namespace: &str, change: Value) {
        let params = PatchParams {
            field_manager: Some("somebody".to_owned()),
            ..PatchParams::default()
        };
        let edited = self
            .config_maps(namespace)
            .patch(&self.name, &params, &Patch::Merge(change))
            .await;
        edited.expect("edited");
    }

    fn metric(&self, line: &str) -> Option<i64> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).expect("a text");
        let value = text
            .lines()
            .find_map(|it| it.strip_prefix(line)?.strip_prefix(' '));
        value?.parse().ok()
    }

    fn written(&self, cause: &str) -> i64 {
        let line = format!("malha_trust_bundle_writes_total{{cause=\"{cause}\"}}");
        self.metric(&line).expect("a counter")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_namespace_has_the_bundle_at_once_and_a_protected_one_never() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    // those that were there before
    bench.filled("default").await;
    bench.filled(&bench.home).await;
    let mut took = Vec::new();
    for n in 0..5 {
        let name = format!("{}-new-{n}", bench.name);
        let namespace = json!({"metadata": {"name": name}});
        let namespace: Namespace = serde_json::from_value(namespace).expect("a namespace");
        let namespaces: Api<Namespace> = Api::all(bench.client.clone());
        namespaces
            .create(&PostParams::default(), &namespace)
            .await
            .expect("made");
        took.push(bench.filled(&name).await);
    }
    took.sort();
    assert!(took[2] < AT_ONCE, "{took:?}");
    for protected in ["kube-system", "kube-public", "kube-node-lease"] {
        let found = bench.config_maps(protected).get_opt(&bench.name).await;
        assert!(found.expect("an answer").is_none(), "{protected}");
    }
    let found = bench.config_maps("default").get(&bench.name).await;
    let found = found.expect("there");
    assert_eq!(found.annotations()["malha.io/authority"], bench.home);
    assert_eq!(found.data.expect("data").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_edited_or_deleted_is_put_back_and_what_means_the_same_is_left() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let namespace = bench.cluster.namespace("trust", &[]).await;
    bench.filled(&namespace).await;
    let foreign = String::from_utf8(bench.cluster.certificate_authority()).expect("PEM");
    let pem = bench.wanted().to_pem();
    let mut took = Vec::new();
    for text in [
        json!(""),
        json!("garbage"),
        json!(foreign),
        json!(format!("{pem}{foreign}")),
        json!(null),
    ] {
        settle().await;
        bench.edit(&namespace, json!({"data": {KEY: text}})).await;
        took.push(bench.filled(&namespace).await);
    }
    assert_eq!(bench.written("foreign"), 5);
    for _ in 0..2 {
        settle().await;
        bench
            .config_maps(&namespace)
            .delete(&bench.name, &DeleteParams::default())
            .await
            .expect("deleted");
        took.push(bench.filled(&namespace).await);
    }
    assert_eq!(bench.written("deleted"), 2);
    took.sort();
    assert!(took[took.len() / 2] < AT_ONCE, "{took:?}");

    let writes = bench.writes(&namespace);
    assert_eq!(writes, 8, "the first, and one for each");
    let same = format!("# the mesh's root\n\n{}", pem.trim_end());
    let change = json!({"data": {KEY: same, "other": "theirs"}});
    bench.edit(&namespace, change).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(bench.writes(&namespace), writes, "the same certificates");
    let good = bench.metric("malha_trust_bundle_namespaces{state=\"good\"}");
    assert!(good > Some(1), "{good:?}");

    let events: Api<Event> = Api::namespaced(bench.client.clone(), &namespace);
    eventually(PATIENCE, "the repairs are told", || async {
        let all = events.list(&ListParams::default()).await;
        let all = all.map_err(|error| error.to_string())?.items;
        let told = all.iter().filter(|event| {
            let regarding = event.regarding.as_ref().and_then(|it| it.name.as_ref());
            event.reason.as_deref() == Some("TrustBundleRepaired") && regarding == Some(&bench.name)
        });
        match told.count() {
            7 => Ok(()),
            _ => Err(format!("{all:?}")),
        }
    })
    .await;
}

/// An operator's root joins the trust set while namespaces come into being, and others have the old set already.
#[tokio::test(flavor = "multi_thread")]
async fn namespaces_made_while_a_root_is_added_get_every_root() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let mut namespaces = vec![bench.cluster.namespace("trust", &[]).await];
    bench.filled(&namespaces[0]).await;
    let dir = tempfile::tempdir().expect("a directory");
    let operator = Operator::new(bench.cluster, &bench.home, dir.path()).await;
    operator.put(&operator.issuer("new").await, &[]).await;
    let making = async {
        let mut made = Vec::new();
        for _ in 0..8 {
            made.push(bench.cluster.namespace("trust", &[]).await);
        }
        made
    };
    let (made, ticked) = tokio::join!(making, bench.custody.tick());
    ticked.expect("the root is trusted");
    namespaces.extend(made);
    namespaces.push(bench.cluster.namespace("trust", &[]).await);
    assert_eq!(bench.wanted().len(), 2, "the old root stays");
    for namespace in &namespaces {
        bench.filled(namespace).await;
    }
}

/// Whoever undoes a write in the moment it is made meets growing pauses, and is no test of this one.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(500)).await;
}

/// By the rights of `manifests/base` alone: server-side apply makes a ConfigMap that a rule names.
#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_with_the_rights_of_its_manifests_fills_new_namespaces() {
    let Some(_control_plane) = outside::shared().await else {
        return;
    };
    let cluster = rig::shared().await.expect("it runs there");
    let namespace = cluster.namespace("trust", &[]).await;
    let there = async |namespace: &str| {
        let config_maps: Api<ConfigMap> = Api::namespaced(cluster.client().await, namespace);
        eventually(PATIENCE, "the bundle is there", || async {
            let found = config_maps.get_opt("malha-ca-root-cert").await;
            let found = found.map_err(|error| error.to_string())?;
            let data = found.and_then(|found| found.data).unwrap_or_default();
            let text = data.get(KEY).ok_or_else(|| format!("{data:?}"))?;
            Bundle::parse_pem(text.as_bytes()).map_err(|error| error.to_string())
        })
        .await
    };
    let bundle = there(&namespace).await;
    assert_eq!(there(outside::NAMESPACE).await, bundle);
    assert!(!bundle.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_who_does_not_lead_writes_nothing() {
    let Some(bench) = Bench::with(|client| {
        let candidate = Candidate {
            namespace: "default".to_owned(),
            name: "nobody-runs-for-this".to_owned(),
            identity: "malha-1".to_owned(),
        };
        // never held: the future that would is dropped
        let stop = CancellationToken::new();
        lease::hold(
            client,
            candidate,
            clock::system(),
            lease::Metrics::default(),
            stop,
        )
        .0
    })
    .await
    else {
        return;
    };
    let namespace = bench.cluster.namespace("trust", &[]).await;
    eventually(PATIENCE, "the namespaces are counted", || async {
        let bad = bench.metric("malha_trust_bundle_namespaces{state=\"bad\"}");
        match bad {
            Some(bad) if bad > 1 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(bench.writes(&namespace), 0);
}

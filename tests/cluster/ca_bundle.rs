//! The caBundle of the webhook configurations: filled, repaired, never fought over.

use std::{
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt;
use k8s_openapi::{
    ByteString,
    api::{
        admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration},
        events::v1::Event,
    },
};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
    runtime::watcher::watch_object,
};
use malha::{
    ca::{Authority, KeyedChain, bundle::Bundle, profile::Profile},
    custody::{Custody, keep_serving},
    k8s::{
        ca_bundle::{self, FIELD_MANAGER, Keeper, Live, Targets, keep},
        events,
        journal::SecretHome,
        lease::{self, Candidate, Claim},
    },
    runtime::clock,
};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    journal,
    rig::{self, Cluster, eventually},
};

/// How soon a drift is repaired.
const REPAIR: Duration = Duration::from_secs(2);

const DNS_NAME: &str = "malha.malha-system.svc";

struct Bench {
    cluster: &'static Cluster,
    name: String,
    custody: Arc<Custody<SecretHome>>,
    webhooks: Api<MutatingWebhookConfiguration>,
    registry: Registry,
    live: Live,
    stop: CancellationToken,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Bench {
    /// A leader without rivals.
    async fn new() -> Option<Self> {
        Self::with(|_| Claim::unrivalled()).await
    }

    async fn with(claim: impl FnOnce(Client) -> Claim) -> Option<Self> {
        let cluster = rig::shared().await?;
        let client = cluster.client().await;
        let namespace = cluster.namespace("bundle", &[]).await;
        let custody = journal::open(client.clone(), &namespace).await;
        let (live, stop, registry) = start(
            client.clone(),
            &namespace,
            custody.watch(),
            |authority: &Arc<Authority>| authority.bundle().clone(),
            claim(client.clone()),
        );
        Some(Self {
            cluster,
            name: namespace,
            custody,
            webhooks: Api::all(client),
            registry,
            live,
            stop,
        })
    }

    fn wanted(&self) -> Bundle {
        self.custody.authority().bundle().clone()
    }

    async fn install(&self, entries: &[&str]) -> MutatingWebhookConfiguration {
        let configuration = configuration(&self.name, entries);
        let made = self
            .webhooks
            .create(&PostParams::default(), &configuration)
            .await;
        made.expect("a configuration")
    }

    /// Waits until every entry holds the wanted bundle; how long it took.
    async fn filled(&self, within: Duration) -> Duration {
        let start = Instant::now();
        let wanted = self.wanted();
        eventually(within, "every entry holds the wanted bundle", || async {
            let now = self
                .webhooks
                .get(&self.name)
                .await
                .map_err(|error| error.to_string())?;
            let all_good = now.webhooks.iter().flatten().all(|webhook| {
                let bundle = webhook.client_config.ca_bundle.as_ref();
                bundle.is_some_and(|bundle| {
                    Bundle::parse_pem(&bundle.0).is_ok_and(|live| live == wanted)
                })
            });
            all_good
                .then_some(())
                .ok_or_else(|| format!("{:?}", now.webhooks))
        })
        .await;
        start.elapsed()
    }

    /// Overwrites the bundle of every entry, as somebody else.
    async fn overwrite(&self, bundle: Value) {
        let current = self.webhooks.get(&self.name).await.expect("there");
        let edits: Vec<Value> = (0..current.webhooks.map_or(0, |all| all.len()))
            .map(|index| {
                json!({"op": "add", "path": format!("/webhooks/{index}/clientConfig/caBundle"), "value": bundle})
            })
            .collect();
        let edits: json_patch::Patch = serde_json::from_value(json!(edits)).expect("a patch");
        let params = PatchParams {
            field_manager: Some("somebody".to_owned()),
            ..PatchParams::default()
        };
        let edited = self
            .webhooks
            .patch(&self.name, &params, &Patch::Json::<()>(edits))
            .await;
        edited.expect("overwritten");
    }

    /// Our writes of the injector's configuration that changed it, as the API server saw them.
    fn writes(&self) -> usize {
        let ours = |event: &&Value| {
            let uri = event["requestURI"].as_str().unwrap_or_default();
            event["verb"] == "patch"
                && event["objectRef"]["resource"] == "mutatingwebhookconfigurations"
                && event["objectRef"]["name"] == self.name
                && uri.contains(&format!("fieldManager={FIELD_MANAGER}"))
                && event["responseStatus"]["code"] == 200
        };
        self.cluster.audit().iter().filter(ours).count()
    }

    fn metric(&self, line: &str) -> Option<String> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).expect("a text");
        let value = text
            .lines()
            .find_map(|it| it.strip_prefix(line)?.strip_prefix(' '));
        value.map(str::to_owned)
    }

    async fn events(&self) -> Vec<Event> {
        let events: Api<Event> = Api::namespaced(self.cluster.client().await, "default");
        let all = events
            .list(&ListParams::default())
            .await
            .expect("a list")
            .items;
        let about = |event: &Event| {
            let regarding = event.regarding.as_ref();
            regarding.and_then(|it| it.name.as_deref()) == Some(&self.name)
        };
        all.into_iter().filter(about).collect()
    }
}

fn start<T: Clone + Send + Sync + 'static>(
    client: Client,
    name: &str,
    wanted: watch::Receiver<T>,
    bundle_of: fn(&T) -> Bundle,
    claim: Claim,
) -> (Live, CancellationToken, Registry) {
    let stop = CancellationToken::new();
    let mut registry = Registry::default();
    let metrics = ca_bundle::Metrics::default();
    metrics.register(&mut registry);
    let (notes, writing) = events::write(
        client.clone(),
        clock::system(),
        "malha-0".to_owned(),
        stop.clone(),
    );
    tokio::spawn(writing);
    let targets = Targets {
        injector: name.to_owned(),
        advice: name.to_owned(),
    };
    let (live, keeping) = keep(Keeper {
        client,
        targets,
        wanted,
        bundle_of,
        claim,
        notes,
        metrics,
        stop: stop.clone(),
    });
    tokio::spawn(keeping);
    (live, stop, registry)
}

/// Entries that select nothing, so that no other test's pods meet them.
fn entry(name: &str) -> Value {
    json!({
        "name": name, "sideEffects": "None", "admissionReviewVersions": ["v1"], "failurePolicy": "Ignore",
        "clientConfig": {"service": {"name": "malha", "namespace": "malha-system", "path": "/inject/ns"}},
        "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}],
        "objectSelector": {"matchLabels": {"selects": "nothing"}},
    })
}

fn configuration(name: &str, entries: &[&str]) -> MutatingWebhookConfiguration {
    let entries: Vec<Value> = entries.iter().map(|name| entry(name)).collect();
    serde_json::from_value(json!({"metadata": {"name": name}, "webhooks": entries}))
        .expect("a configuration")
}

const TWO: [&str; 2] = ["ns.injector.malha.io", "pod.injector.malha.io"];

async fn leaf(custody: &Arc<Custody<SecretHome>>) -> Arc<KeyedChain> {
    let (tell, mut told) = watch::channel(None);
    let profile = Profile::Webhook {
        dns_names: vec![DNS_NAME.to_owned()],
    };
    let stop = CancellationToken::new();
    tokio::spawn(keep_serving(
        custody.clone(),
        profile,
        clock::system(),
        tell,
        stop.clone(),
    ));
    let leaf = told
        .wait_for(Option::is_some)
        .await
        .expect("a leaf")
        .clone();
    stop.cancel();
    leaf.expect("just seen")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_installed_configuration_is_filled_and_verifies_what_is_served() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let leaf = leaf(&bench.custody).await;
    let now = || clock::system().now();
    let absent = bench
        .live
        .verifies(&leaf.chain, DNS_NAME, now())
        .expect_err("nobody installed it");
    assert!(absent.to_string().contains("does not exist"), "{absent}");

    let before = bench.install(&TWO).await;
    bench.filled(REPAIR).await;
    eventually(REPAIR, "the live bundle verifies the leaf", || async {
        bench
            .live
            .verifies(&leaf.chain, DNS_NAME, now())
            .map_err(|error| error.to_string())
    })
    .await;
    let other_name = bench
        .live
        .verifies(&leaf.chain, "kubernetes.default.svc", now());
    assert!(other_name.is_err(), "{other_name:?}");
    let expired = now() + jiff::SignedDuration::from_hours(48);
    assert!(bench.live.verifies(&leaf.chain, DNS_NAME, expired).is_err());
    assert!(bench.live.verifies(&[], DNS_NAME, now()).is_err());

    let mut after = bench.webhooks.get(&bench.name).await.expect("there");
    for webhook in after.webhooks.iter_mut().flatten() {
        webhook.client_config.ca_bundle = None;
    }
    assert_eq!(
        after.webhooks, before.webhooks,
        "nothing but the bundle was touched"
    );
    assert_eq!(bench.writes(), 1, "one write for both entries");
    let matches = format!(
        "malha_webhook_ca_bundle_matches{{webhook=\"{}\"}}",
        bench.name
    );
    assert_eq!(bench.metric(&matches).as_deref(), Some("1"));
    for cause in ["blank", "foreign", "stale"] {
        let repairs = format!("malha_webhook_repairs_total{{cause=\"{cause}\"}}");
        assert_eq!(
            bench.metric(&repairs).as_deref(),
            Some("0"),
            "a first write is no repair"
        );
    }
    assert!(bench.events().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_drift_is_repaired_in_two_seconds_by_one_write() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    bench.install(&TWO).await;
    bench.filled(REPAIR).await;
    let foreign = bench.cluster.certificate_authority();
    let mut writes = bench.writes();
    let mut ours_and_theirs = bench.wanted().to_pem().into_bytes();
    ours_and_theirs.extend_from_slice(&foreign);
    for (what, cause, bundle) in [
        ("blank", "blank", json!("")),
        ("absent", "blank", json!(null)),
        ("garbage", "foreign", json!(ByteString(b"garbage".to_vec()))),
        ("another authority's", "foreign", json!(ByteString(foreign))),
        (
            "ours and another's",
            "foreign",
            json!(ByteString(ours_and_theirs)),
        ),
    ] {
        let repairs = format!("malha_webhook_repairs_total{{cause=\"{cause}\"}}");
        let count = || {
            bench
                .metric(&repairs)
                .and_then(|value| value.parse::<u64>().ok())
        };
        let before = count().expect("a counter");
        bench.overwrite(bundle).await;
        let took = bench.filled(REPAIR).await;
        writes += 1;
        tokio::time::sleep(Duration::from_millis(1200)).await;
        assert_eq!(
            bench.writes(),
            writes,
            "{what}: repaired in {took:?} by one write"
        );
        assert_eq!(count(), Some(before + 1), "{what}");
    }
    let events = eventually(Duration::from_secs(5), "the repairs are told", || async {
        let events = bench.events().await;
        (events.len() == 5)
            .then_some(events.clone())
            .ok_or_else(|| format!("{events:?}"))
    })
    .await;
    for event in events {
        assert_eq!(event.reason.as_deref(), Some("WebhookRepaired"));
        assert_eq!(event.type_.as_deref(), Some("Warning"));
    }
}

/// Order, comments and blanks are no drift, and a configuration that is deleted and installed anew is filled anew.
#[tokio::test(flavor = "multi_thread")]
async fn equal_sets_are_left_alone_and_new_entries_are_filled() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    bench.install(&TWO).await;
    bench.filled(REPAIR).await;
    let pem = bench.wanted().to_pem();
    let written = bench.writes();
    let commented = format!("# the mesh's root\n\n{}\n\n{pem}", pem.trim_end());
    bench
        .overwrite(json!(ByteString(commented.clone().into_bytes())))
        .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(bench.writes(), written, "the same certificates");

    let add =
        json!([{"op": "add", "path": "/webhooks/-", "value": entry("late.injector.malha.io")}]);
    let add: json_patch::Patch = serde_json::from_value(add).expect("a patch");
    let params = PatchParams::default();
    bench
        .webhooks
        .patch(&bench.name, &params, &Patch::Json::<()>(add))
        .await
        .expect("added");
    bench.filled(REPAIR).await;

    let remove = json!([{"op": "remove", "path": "/webhooks/0"}]);
    let remove: json_patch::Patch = serde_json::from_value(remove).expect("a patch");
    bench
        .webhooks
        .patch(&bench.name, &params, &Patch::Json::<()>(remove))
        .await
        .expect("removed");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let now = bench.webhooks.get(&bench.name).await.expect("there");
    assert_eq!(
        now.webhooks.map(|all| all.len()),
        Some(2),
        "an entry that was removed stays removed"
    );

    bench
        .webhooks
        .delete(&bench.name, &DeleteParams::default())
        .await
        .expect("deleted");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let gone = bench
        .webhooks
        .get_opt(&bench.name)
        .await
        .expect("an answer");
    assert!(
        gone.is_none(),
        "a configuration that was deleted stays deleted"
    );
    bench.install(&TWO).await;
    bench.filled(REPAIR).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_who_applies_it_every_second_is_answered_each_time() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    bench.install(&TWO).await;
    bench.filled(REPAIR).await;
    let before = bench.writes();
    let foreign = json!(ByteString(bench.cluster.certificate_authority()));
    let entries: Vec<Value> = TWO
        .iter()
        .map(|name| {
            let mut entry = entry(name);
            entry["clientConfig"]["caBundle"] = foreign.clone();
            entry
        })
        .collect();
    let apply = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": bench.name}, "webhooks": entries,
    });
    let mut clock = tokio::time::interval(Duration::from_secs(1));
    let rounds = 12;
    for _ in 0..rounds {
        clock.tick().await;
        let params = PatchParams::apply("gitops").force();
        bench
            .webhooks
            .patch(&bench.name, &params, &Patch::Apply(&apply))
            .await
            .expect("applied");
    }
    bench.filled(REPAIR).await;
    let writes = bench.writes() - before;
    assert!(
        (rounds - 2..=rounds).contains(&writes),
        "{writes} writes for {rounds} drifts"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_who_undoes_each_write_at_once_is_not_fought() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    bench.install(&TWO).await;
    bench.filled(REPAIR).await;
    let before = bench.writes();
    let mut undone = 0;
    let undoing = async {
        let watched = watch_object(bench.webhooks.clone(), &bench.name);
        let mut watched = pin!(watched);
        while let Some(seen) = watched.next().await {
            let webhooks = seen.ok().flatten().and_then(|it| it.webhooks);
            let filled = webhooks.into_iter().flatten().any(|webhook| {
                let bundle = webhook.client_config.ca_bundle;
                bundle.is_some_and(|bundle| !bundle.0.is_empty())
            });
            if filled {
                bench.overwrite(json!("")).await;
                undone += 1;
            }
        }
    };
    let fight = Duration::from_secs(15);
    tokio::time::timeout(fight, undoing)
        .await
        .expect_err("to the end");
    let writes = bench.writes() - before;
    assert!(
        (5..=12).contains(&writes),
        "4 at once, then after 1, 2, 4 .. s: {writes} writes, {undone} undone"
    );
    // nobody undoes it any more: it is repaired when the pause is over, and the next drift at once
    bench.filled(Duration::from_secs(20)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    bench.overwrite(json!("")).await;
    bench.filled(REPAIR).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_leader_writes_but_everyone_knows() {
    let stop = CancellationToken::new();
    let mut holding = None;
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let namespace = cluster.namespace("bundle", &[]).await;
    let Some(bench) = Bench::with(|client| {
        let candidate = Candidate {
            namespace: namespace.clone(),
            name: "malha-leader".to_owned(),
            identity: "malha-0".to_owned(),
        };
        let metrics = lease::Metrics::default();
        let (claim, hold) = lease::hold(client, candidate, clock::system(), metrics, stop.clone());
        holding = Some(hold);
        claim
    })
    .await
    else {
        return;
    };
    bench.install(&TWO).await;
    let leaf = leaf(&bench.custody).await;
    let refused = eventually(REPAIR, "the follower knows what is there", || async {
        match bench
            .live
            .verifies(&leaf.chain, DNS_NAME, clock::system().now())
        {
            Err(error) if !error.to_string().contains("does not exist") => Ok(error),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert!(refused.to_string().contains(TWO[0]), "{refused}");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(bench.writes(), 0, "a follower writes nothing");

    tokio::spawn(holding.take().expect("not started yet"));
    bench.filled(Duration::from_secs(5)).await;
    stop.cancel();
    tokio::time::sleep(Duration::from_secs(1)).await;
    bench.overwrite(json!("")).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(bench.writes(), 1, "who leads no longer writes nothing");
}

/// Two leaders at once (one was paused and does not know yet) write the same bytes, and neither undoes the other.
#[tokio::test(flavor = "multi_thread")]
async fn two_writers_agree() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let (_live, stop, _registry) = start(
        bench.cluster.client().await,
        &bench.name,
        bench.custody.watch(),
        |authority: &Arc<Authority>| authority.bundle().clone(),
        Claim::unrivalled(),
    );
    bench.install(&TWO).await;
    bench.filled(REPAIR).await;
    for _ in 0..5 {
        bench.overwrite(json!("")).await;
        bench.filled(REPAIR).await;
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
    assert_eq!(
        bench.writes(),
        6,
        "one write for each drift, whoever made it"
    );
    stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_in_rotation_is_published_to_both_configurations() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let client = cluster.client().await;
    let name = cluster.namespace("bundle", &[]).await;
    let second = cluster.namespace("bundle", &[]).await;
    let old = journal::open(client.clone(), &name)
        .await
        .authority()
        .bundle()
        .clone();
    let new = journal::open(client.clone(), &second)
        .await
        .authority()
        .bundle()
        .clone();
    let both =
        Bundle::parse_pem(format!("{}{}", old.to_pem(), new.to_pem()).as_bytes()).expect("two");
    let (tell, wanted) = watch::channel(Bundle::default());
    let (_live, stop, registry) = start(
        client.clone(),
        &name,
        wanted,
        Bundle::clone,
        Claim::unrivalled(),
    );

    let webhooks: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    let advice: Api<ValidatingWebhookConfiguration> = Api::all(client);
    webhooks
        .create(&PostParams::default(), &configuration(&name, &TWO))
        .await
        .expect("made");
    let advising = json!({"metadata": {"name": name}, "webhooks": [entry("advice.malha.io")]});
    let advising: ValidatingWebhookConfiguration =
        serde_json::from_value(advising).expect("a configuration");
    advice
        .create(&PostParams::default(), &advising)
        .await
        .expect("made");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let untouched = webhooks.get(&name).await.expect("there");
    assert_eq!(
        untouched.metadata.generation,
        Some(1),
        "no bundle yet, nothing written"
    );

    for bundle in [old, both, new] {
        tell.send_replace(bundle.clone());
        eventually(REPAIR, "the bundle of the moment", || async {
            let injector = webhooks
                .get(&name)
                .await
                .map_err(|error| error.to_string())?;
            let advice = advice.get(&name).await.map_err(|error| error.to_string())?;
            let configs = injector
                .webhooks
                .into_iter()
                .flatten()
                .map(|it| it.client_config);
            let all = configs.chain(
                advice
                    .webhooks
                    .into_iter()
                    .flatten()
                    .map(|it| it.client_config),
            );
            for config in all {
                let live = config.ca_bundle.ok_or("blank")?;
                if Bundle::parse_pem(&live.0).map_err(|error| error.to_string())? != bundle {
                    return Err("another".to_owned());
                }
            }
            Ok(())
        })
        .await;
    }
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).expect("a text");
    assert!(
        text.contains("malha_webhook_repairs_total{cause=\"stale\"} 4"),
        "{text}"
    );
    assert!(
        text.contains("malha_webhook_repairs_total{cause=\"foreign\"} 0"),
        "{text}"
    );
    stop.cancel();
}

/// With server-side apply an entry belongs to everyone who wrote to it: whoever installs the configuration this way cannot
/// take an entry out while our bundle is in it. The API server says so, nothing breaks, and the other ways work.
#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_a_server_side_apply_leaves_out_is_refused_and_nothing_breaks() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let apply = |entries: &[&str]| {
        let entries: Vec<Value> = entries.iter().map(|name| entry(name)).collect();
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
            "metadata": {"name": bench.name}, "webhooks": entries,
        })
    };
    let params = PatchParams::apply("kubectl");
    let both = Patch::Apply(apply(&TWO));
    bench
        .webhooks
        .patch(&bench.name, &params, &both)
        .await
        .expect("installed");
    bench.filled(REPAIR).await;
    bench
        .webhooks
        .patch(&bench.name, &params, &both)
        .await
        .expect("applied again, no conflict");
    bench.filled(REPAIR).await;

    let one = Patch::Apply(apply(&TWO[..1]));
    let refused = bench
        .webhooks
        .patch(&bench.name, &params, &one)
        .await
        .expect_err("half an entry");
    assert!(
        matches!(&refused, kube::Error::Api(status) if status.code == 422),
        "{refused}"
    );
    bench.filled(REPAIR).await;

    let less = json!({"webhooks": [{"$patch": "delete", "name": TWO[1]}]});
    let less = Patch::Strategic(less);
    let left = bench
        .webhooks
        .patch(&bench.name, &PatchParams::default(), &less)
        .await;
    let left = left.expect("as kubectl apply does it").webhooks;
    assert_eq!(left.map(|all| all.len()), Some(1));
    bench
        .webhooks
        .patch(&bench.name, &params, &one)
        .await
        .expect("applied");
    tokio::time::sleep(Duration::from_secs(1)).await;
    bench.filled(REPAIR).await;
}

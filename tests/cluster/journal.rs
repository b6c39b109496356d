//! The journal's home in a Secret: one root whatever happens.

use std::{collections::BTreeSet, time::Duration};

use jiff::SignedDuration;
use k8s_openapi::{
    ByteString,
    api::{
        admissionregistration::v1::MutatingWebhookConfiguration,
        core::v1::{ConfigMap, Secret},
    },
};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use malha::{
    ca::{
        journal::{HomeError, JournalHome},
        rotation::RotationPolicy,
    },
    clock::Clock,
    custody::{Custody, CustodyError, Metrics},
    k8s::journal::{JOURNAL_KEY, JOURNAL_TYPE, SecretHome, Traces},
    runtime::clock,
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::rig::{self, Cluster, Setup, eventually};

const SECRET: &str = "malha-ca";
/// Not the name that control planes of other tests write into every namespace.
const TRUST: &str = "trust-of-a-journal";

fn home(client: Client, namespace: &str) -> SecretHome {
    let traces = Traces {
        config_map: TRUST.to_owned(),
        webhook: format!("injector-{namespace}"),
    };
    SecretHome::new(client, namespace, SECRET, traces)
}

pub(crate) async fn open(client: Client, namespace: &str) -> std::sync::Arc<Custody<SecretHome>> {
    try_open(home(client, namespace), clock::system())
        .await
        .expect("an authority")
}

async fn try_open(
    home: SecretHome,
    clock: Clock,
) -> Result<std::sync::Arc<Custody<SecretHome>>, CustodyError> {
    let trust_domain = "cluster.local".parse().expect("a trust domain");
    Custody::open(
        home,
        RotationPolicy::default(),
        trust_domain,
        clock,
        Metrics::default(),
    )
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_replicas_that_start_at_once_make_one_root() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    for _ in 0..5 {
        let namespace = cluster.namespace("roots", &[]).await;
        let mut opening = tokio::task::JoinSet::new();
        for _ in 0..50 {
            let home = home(cluster.client().await, &namespace);
            opening.spawn(try_open(home, clock::system()));
        }
        let mut bundles = BTreeSet::new();
        while let Some(opened) = opening.join_next().await {
            let custody = opened
                .expect("no panic")
                .expect("every replica has an authority");
            bundles.insert(custody.authority().bundle().to_pem());
        }
        assert_eq!(bundles.len(), 1, "one root");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_secret_changes_only_from_the_version_that_was_seen() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let namespace = cluster.namespace("journal", &[]).await;
    let home = home(cluster.client().await, &namespace);
    assert!(home.load().await.expect("readable").is_none());
    open(cluster.client().await, &namespace).await;
    let first = home.load().await.expect("readable").expect("made");

    let error = home
        .create(&first.journal)
        .await
        .expect_err("there is one already");
    assert!(matches!(error, HomeError::Conflict { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains(&format!("Secret {namespace}/malha-ca")),
        "{error}"
    );

    // what others wrote into the Secret stays
    let secrets: Api<Secret> = Api::namespaced(cluster.client().await, &namespace);
    let mark =
        json!({"metadata": {"annotations": {"backup": "tonight"}}, "data": {"other": "eA=="}});
    secrets
        .patch(SECRET, &PatchParams::default(), &Patch::Merge(&mark))
        .await
        .expect("marked");
    let error = home
        .replace(&first.version, &first.journal)
        .await
        .expect_err("changed since");
    assert!(matches!(error, HomeError::Conflict { .. }), "{error}");

    let seen = home.load().await.expect("readable").expect("there");
    let (one, other) = tokio::join!(
        home.replace(&seen.version, &seen.journal),
        home.replace("1", &seen.journal)
    );
    let written = one.expect("seen and unchanged");
    assert!(written.journal == seen.journal);
    assert!(
        matches!(other, Err(HomeError::Conflict { .. })),
        "a version of long ago"
    );
    let secret = secrets.get(SECRET).await.expect("there");
    assert_eq!(secret.type_.as_deref(), Some(JOURNAL_TYPE));
    let annotations = secret.metadata.annotations.expect("marked");
    assert_eq!(
        annotations.get("backup").map(String::as_str),
        Some("tonight")
    );
    assert!(secret.data.expect("data").contains_key("other"));

    secrets
        .delete(SECRET, &DeleteParams::default())
        .await
        .expect("deleted");
    let gone = home.replace(&written.version, &written.journal).await;
    assert!(
        matches!(gone, Err(HomeError::Conflict { .. })),
        "deleted since: read again"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_holds_no_journal_is_named_and_left_alone() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let namespace = cluster.namespace("journal", &[]).await;
    let secrets: Api<Secret> = Api::namespaced(cluster.client().await, &namespace);
    let home = home(cluster.client().await, &namespace);
    for data in [
        json!(null),
        json!({}),
        json!({JOURNAL_KEY: ""}),
        json!({JOURNAL_KEY: "e30="}),
        json!({JOURNAL_KEY: "/////w=="}),
        json!({"tls.crt": "eA=="}),
    ] {
        let secret = json!({"metadata": {"name": SECRET}, "data": data});
        let secret: Secret = serde_json::from_value(secret).expect("a Secret");
        secrets
            .create(&PostParams::default(), &secret)
            .await
            .expect("made");
        let error = home.load().await.expect_err("no journal");
        assert!(matches!(error, HomeError::Unreadable { .. }), "{error}");
        assert!(
            error
                .to_string()
                .starts_with(&format!("Secret {namespace}/malha-ca")),
            "{error}"
        );
        assert!(
            try_open(home.clone(), clock::system()).await.is_err(),
            "no new root over it"
        );
        let after = secrets.get(SECRET).await.expect("there");
        assert_eq!(
            after.data,
            secret.data.filter(|data| !data.is_empty()),
            "left alone"
        );
        secrets
            .delete(SECRET, &DeleteParams::default())
            .await
            .expect("deleted");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_journal_beside_traces_of_an_earlier_life_is_a_loss() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let client = cluster.client().await;
    let namespace = cluster.namespace("journal", &[]).await;
    let home = home(client.clone(), &namespace);
    assert!(!home.has_earlier_life().await.expect("readable"));

    let config_maps: Api<ConfigMap> = Api::namespaced(client.clone(), &namespace);
    let trust = json!({"metadata": {"name": TRUST}, "data": {"root-cert.pem": ""}});
    let trust: ConfigMap = serde_json::from_value(trust).expect("a ConfigMap");
    config_maps
        .create(&PostParams::default(), &trust)
        .await
        .expect("made");
    assert!(home.has_earlier_life().await.expect("readable"));
    let lost = try_open(home.clone(), clock::system()).await;
    assert!(matches!(lost, Err(CustodyError::JournalLost)));
    config_maps
        .delete(TRUST, &DeleteParams::default())
        .await
        .expect("deleted");

    let webhooks: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    let name = format!("injector-{namespace}");
    let placeholder = b"\n".to_vec();
    let pem = cluster.certificate_authority();
    for (bundle, trace) in [(placeholder, false), (pem, true)] {
        let webhook: MutatingWebhookConfiguration = serde_json::from_value(json!({
            "metadata": {"name": name},
            "webhooks": [{
                "name": "a.injector.malha.io", "sideEffects": "None", "admissionReviewVersions": ["v1"],
                "clientConfig": {"url": "https://127.0.0.1:1", "caBundle": ByteString(bundle)},
                "rules": [],
            }],
        }))
        .expect("a configuration");
        webhooks
            .create(&PostParams::default(), &webhook)
            .await
            .expect("made");
        assert_eq!(home.has_earlier_life().await.expect("readable"), trace);
        webhooks
            .delete(&name, &DeleteParams::default())
            .await
            .expect("deleted");
    }
    try_open(home, clock::system())
        .await
        .expect("no trace, a first start");
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_the_secret_are_heard_and_read_by_every_replica() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let namespace = cluster.namespace("journal", &[]).await;
    let follower_home = home(cluster.client().await, &namespace);
    let stop = CancellationToken::new();
    let (mut changes, listening) = follower_home.changes(stop.clone());
    let listening = tokio::spawn(listening);
    let heard = |wait: Duration| {
        let mut changes = changes.clone();
        async move { tokio::time::timeout(wait, changes.changed()).await }
    };
    assert!(
        heard(Duration::from_millis(500)).await.is_err(),
        "nothing there, nothing to hear"
    );

    open(cluster.client().await, &namespace).await;
    changes.changed().await.expect("the listener lives");
    assert!(changes.borrow_and_update().is_some());
    let follower = open(cluster.client().await, &namespace).await;
    let before = follower.authority().issuer_key_id().clone();

    // half of the intermediate's life later, another replica rotates it
    let later = Clock::new(|| clock::system().now() + SignedDuration::from_hours(16 * 24));
    let leader = try_open(home(cluster.client().await, &namespace), later)
        .await
        .expect("an authority");
    let ticked = leader.tick().await.expect("rotated");
    let after = leader.authority().issuer_key_id().clone();
    assert_ne!(before, after, "{:?}", ticked.done);
    tokio::time::timeout(Duration::from_secs(1), changes.changed())
        .await
        .expect("heard within a second")
        .expect("the listener lives");
    follower.refresh().await.expect("readable");
    assert_eq!(follower.authority().issuer_key_id(), &after);

    let secrets: Api<Secret> = Api::namespaced(cluster.client().await, &namespace);
    secrets
        .delete(SECRET, &DeleteParams::default())
        .await
        .expect("deleted");
    tokio::time::timeout(Duration::from_secs(1), changes.wait_for(Option::is_none))
        .await
        .expect("a deletion is heard")
        .expect("the listener lives");
    stop.cancel();
    listening.await.expect("a future that ends on stop");
}

/// While nobody answers nothing is made and nothing is lost, and the error says which Secret.
#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_is_away_is_unreachable_and_nothing_else() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let namespace = cluster.namespace("journal", &[]).await;
    let custody = open(cluster.client().await, &namespace).await;
    let root = custody.authority().bundle().to_pem();
    let home = home(cluster.client().await, &namespace);
    let stored = home.load().await.expect("readable").expect("there");
    let stop = CancellationToken::new();
    let (mut changes, listening) = home.changes(stop.clone());
    let listening = tokio::spawn(listening);
    changes.wait_for(Option::is_some).await.expect("heard");

    cluster.api_server().kill();
    for result in [
        home.load().await.map(drop),
        home.create(&stored.journal).await.map(drop),
        home.replace(&stored.version, &stored.journal)
            .await
            .map(drop),
        home.has_earlier_life().await.map(drop),
    ] {
        let error = result.expect_err("nobody answers");
        assert!(matches!(error, HomeError::Unreachable { .. }), "{error}");
        assert_eq!(
            error.to_string(),
            format!("Secret {namespace}/malha-ca cannot be reached")
        );
    }
    assert!(custody.refresh().await.is_err());
    assert_eq!(
        custody.authority().bundle().to_pem(),
        root,
        "the last good one stays"
    );

    cluster.api_server().start().expect("started again");
    cluster.api_server_ready().await.expect("ready again");
    custody.refresh().await.expect("readable again");
    let mark = json!({"metadata": {"annotations": {"seen": "again"}}});
    let secrets: Api<Secret> = Api::namespaced(cluster.client().await, &namespace);
    let marked = secrets
        .patch(SECRET, &PatchParams::default(), &Patch::Merge(&mark))
        .await;
    let version = marked.expect("marked").metadata.resource_version;
    eventually(
        Duration::from_secs(10),
        "changes are heard again",
        || async {
            let heard = changes.borrow().clone();
            (heard == version)
                .then_some(())
                .ok_or_else(|| format!("{heard:?}, not {version:?}"))
        },
    )
    .await;
    stop.cancel();
    listening.await.expect("a future that ends on stop");
}

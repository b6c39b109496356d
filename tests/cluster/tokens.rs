//! Whose token is this: every way in which the answer is no, and the one in which it is yes.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, Secret, ServiceAccount};
use kube::{
    Api,
    api::{DeleteParams, PostParams},
};
use malha::{
    caller::{Authenticate, CallerError, Gone, Method, NodeProxies},
    k8s::{
        tokens::{ClusterTokens, Options, Validation},
        world::World,
    },
    runtime::clock,
};

use crate::{
    rig::{self, Cluster, Setup, TokenOf, eventually},
    world::{Followed, follow, make_account, pod},
};

const AUDIENCE: &str = "malha-ca";

fn options(validation: Validation) -> Options {
    Options {
        trust_domain: "cluster.local".parse().expect("a trust domain"),
        audiences: vec![AUDIENCE.to_owned()],
        require_bound_pod: true,
        validation,
        node_proxies: NodeProxies::default(),
        own_namespace: "malha-system".to_owned(),
    }
}

fn now() -> Timestamp {
    clock::system().now()
}

struct Bench {
    cluster: &'static Cluster,
    namespace: String,
    followed: Followed,
    auto: ClusterTokens,
    reviewed: ClusterTokens,
}

impl Bench {
    async fn new() -> Option<Self> {
        let cluster = rig::shared().await?;
        let client = cluster.client().await;
        let namespace = cluster.namespace("tokens", &[]).await;
        let followed = follow(client.clone()).await;
        let world = followed.world.clone();
        Some(Self {
            auto: ClusterTokens::new(client.clone(), world.clone(), options(Validation::Auto)),
            reviewed: ClusterTokens::new(client, world, options(Validation::TokenReview)),
            cluster,
            namespace,
            followed,
        })
    }

    async fn pod(&self, name: &str, account: &str) {
        let pods: Api<Pod> = Api::namespaced(self.cluster.client().await, &self.namespace);
        pods.create(&PostParams::default(), &pod(name, account))
            .await
            .expect("a pod");
        eventually(Duration::from_secs(2), "the pod is known", || async {
            self.followed
                .world
                .find_pod(&self.namespace, name)
                .map(drop)
                .ok_or_else(|| "unknown".to_owned())
        })
        .await;
    }

    async fn token(&self, account: &str, of: &TokenOf<'_>, audiences: &[&str]) -> String {
        self.cluster
            .token(&self.namespace, account, of, audiences, 3600)
            .await
    }

    async fn error(&self, tokens: &ClusterTokens, token: &str) -> CallerError {
        tokens
            .authenticate(token, now())
            .await
            .expect_err("refused")
            .error
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_own_token_is_its_identity_offline_and_by_review() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    make_account(bench.cluster, &bench.namespace, "web").await;
    bench.pod("p", "web").await;
    let token = bench.token("web", &TokenOf::Pod("p"), &[AUDIENCE]).await;
    let want = format!("spiffe://cluster.local/ns/{}/sa/web", bench.namespace);
    for (tokens, method) in [
        (&bench.auto, Method::Jwks),
        (&bench.reviewed, Method::TokenReview),
    ] {
        let caller = tokens
            .authenticate(&token, now())
            .await
            .expect("a good token");
        assert_eq!(caller.identity.to_string(), want);
        assert_eq!(caller.method, method);
        assert_eq!(caller.pod.expect("bound").name, "p");
        assert!(caller.token_id.is_some());
        assert!(!caller.stale);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_wrong_token_has_its_code() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    make_account(bench.cluster, &bench.namespace, "web").await;
    bench.pod("p", "web").await;

    let api_audience = bench.token("web", &TokenOf::Pod("p"), &[]).await;
    let other_audience = bench.token("web", &TokenOf::Pod("p"), &["vault"]).await;
    for token in [&api_audience, &other_audience] {
        assert_eq!(
            bench.error(&bench.auto, token).await.code(),
            "AudienceMismatch"
        );
        let error = bench.error(&bench.reviewed, token).await;
        assert!(
            matches!(error.code(), "AudienceMismatch" | "TokenInvalid"),
            "{error}"
        );
    }

    let unbound = bench.token("web", &TokenOf::Account, &[AUDIENCE]).await;
    assert_eq!(
        bench.error(&bench.auto, &unbound).await,
        CallerError::NotBound
    );
    assert_eq!(
        bench.error(&bench.reviewed, &unbound).await,
        CallerError::NotBound
    );

    let good = bench.token("web", &TokenOf::Pod("p"), &[AUDIENCE]).await;
    let later = now() + SignedDuration::from_secs(3600 + 61);
    let error = bench
        .auto
        .authenticate(&good, later)
        .await
        .expect_err("expired")
        .error;
    assert_eq!(error.code(), "TokenExpired");
    let earlier = now() - SignedDuration::from_secs(120);
    let error = bench
        .auto
        .authenticate(&good, earlier)
        .await
        .expect_err("too early")
        .error;
    assert_eq!(error.code(), "TokenNotYetValid");

    let (signed, signature) = good.rsplit_once('.').expect("a JWS");
    let mut broken: Vec<char> = signature.chars().collect();
    broken[10] = if broken[10] == 'A' { 'B' } else { 'A' };
    let broken = format!("{signed}.{}", broken.iter().collect::<String>());
    for token in [
        broken.as_str(),
        "",
        "a.b.c",
        "not a token",
        &"x".repeat(100_000),
    ] {
        for tokens in [&bench.auto, &bench.reviewed] {
            let error = bench.error(tokens, token).await;
            assert_eq!(error.code(), "TokenInvalid", "{error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_pod_and_a_made_anew_account_are_refused_within_a_second() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    make_account(bench.cluster, &bench.namespace, "web").await;
    bench.pod("p", "web").await;
    bench.pod("q", "web").await;
    let of_p = bench.token("web", &TokenOf::Pod("p"), &[AUDIENCE]).await;
    let of_q = bench.token("web", &TokenOf::Pod("q"), &[AUDIENCE]).await;
    for token in [&of_p, &of_q] {
        bench.auto.authenticate(token, now()).await.expect("alive");
    }

    let client = bench.cluster.client().await;
    let pods: Api<Pod> = Api::namespaced(client.clone(), &bench.namespace);
    pods.delete("p", &DeleteParams::default().grace_period(0))
        .await
        .expect("deleted");
    let gone = |error: &CallerError| matches!(error, CallerError::CallerGone(Gone::PodUnknown(_)));
    refused_within_a_second(&bench.auto, &of_p, gone).await;

    pods.create(&PostParams::default(), &pod("p", "web"))
        .await
        .expect("a pod of the same name");
    let replaced =
        |error: &CallerError| matches!(error, CallerError::CallerGone(Gone::PodReplaced(_)));
    refused_within_a_second(&bench.auto, &of_p, replaced).await;

    let accounts: Api<ServiceAccount> = Api::namespaced(client, &bench.namespace);
    accounts
        .delete("web", &DeleteParams::default())
        .await
        .expect("deleted");
    let gone = |error: &CallerError| error.code() == "CallerGone";
    refused_within_a_second(&bench.auto, &of_q, gone).await;
    make_account(bench.cluster, &bench.namespace, "web").await;
    let anew = |error: &CallerError| {
        matches!(
            error,
            CallerError::CallerGone(Gone::ServiceAccountReplaced(_))
        )
    };
    refused_within_a_second(&bench.auto, &of_q, anew).await;
    assert_eq!(
        bench.error(&bench.reviewed, &of_q).await.code(),
        "TokenInvalid"
    );
}

async fn refused_within_a_second(
    tokens: &ClusterTokens,
    token: &str,
    want: impl Fn(&CallerError) -> bool,
) {
    eventually(Duration::from_secs(1), "refused", || async {
        match tokens.authenticate(token, now()).await {
            Err(denial) if want(&denial.error) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

/// Before the first lists have arrived nothing is accepted on their word; the API server is asked.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_world_asks_the_api_server_and_never_guesses() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    make_account(bench.cluster, &bench.namespace, "web").await;
    bench.pod("p", "web").await;
    let token = bench.token("web", &TokenOf::Pod("p"), &[AUDIENCE]).await;
    let client = bench.cluster.client().await;
    let tokens = |validation| ClusterTokens::new(client.clone(), World::new(), options(validation));

    let caller = tokens(Validation::Auto)
        .authenticate(&token, now())
        .await
        .expect("asked");
    assert_eq!(caller.method, Method::TokenReview);
    let denial = tokens(Validation::Jwks)
        .authenticate(&token, now())
        .await
        .expect_err("not asked");
    assert_eq!(denial.error.code(), "VerifierUnavailable");

    // what needs no list is refused all the same, and by ourselves
    let unbound = bench.token("web", &TokenOf::Account, &[AUDIENCE]).await;
    let denial = tokens(Validation::Auto)
        .authenticate(&unbound, now())
        .await
        .expect_err("unbound");
    assert_eq!(
        (denial.method, denial.error),
        (Method::Jwks, CallerError::NotBound)
    );
}

/// While the API server is away known callers go on, unknown ones are told to come again, and nobody is refused for it.
#[tokio::test(flavor = "multi_thread")]
async fn without_an_api_server_known_callers_go_on_and_others_wait() {
    let Some(cluster) = Cluster::start(Setup::default()).await else {
        return;
    };
    let client = cluster.client().await;
    let namespace = cluster.namespace("tokens", &[]).await;
    let followed = follow(client.clone()).await;
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    pods.create(&PostParams::default(), &pod("p", "default"))
        .await
        .expect("a pod");
    let token = cluster
        .token(&namespace, "default", &TokenOf::Pod("p"), &[AUDIENCE], 3600)
        .await;
    let warm = ClusterTokens::new(
        client.clone(),
        followed.world.clone(),
        options(Validation::Auto),
    );
    eventually(Duration::from_secs(2), "known", || async {
        warm.authenticate(&token, now())
            .await
            .map_err(|denial| format!("{denial:?}"))
    })
    .await;
    let cold = ClusterTokens::new(client, followed.world.clone(), options(Validation::Auto));

    cluster.api_server().kill();
    let caller = warm
        .authenticate(&token, now())
        .await
        .expect("known callers go on");
    assert_eq!(caller.method, Method::Jwks);
    let denial = cold
        .authenticate(&token, now())
        .await
        .expect_err("no keys, no review");
    assert_eq!(denial.error.code(), "VerifierUnavailable");
    // keys are good for a day without news, and no longer
    let tomorrow = now() + SignedDuration::from_hours(25);
    let denial = warm
        .authenticate(&token, tomorrow)
        .await
        .expect_err("too old");
    assert_eq!(denial.error.code(), "VerifierUnavailable");
}

/// Another cluster signs in the same issuer's name: no key of its is ours, and the API server does not know it either.
#[tokio::test(flavor = "multi_thread")]
async fn another_clusters_token_is_nobodys() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    let Some(other) = Cluster::start(Setup::default()).await else {
        return;
    };
    let namespace = other.namespace("tokens", &[]).await;
    let pods: Api<Pod> = Api::namespaced(other.client().await, &namespace);
    pods.create(&PostParams::default(), &pod("p", "default"))
        .await
        .expect("a pod");
    let token = other
        .token(&namespace, "default", &TokenOf::Pod("p"), &[AUDIENCE], 3600)
        .await;
    for _ in 0..3 {
        for tokens in [&bench.auto, &bench.reviewed] {
            let error = bench.error(tokens, &token).await;
            assert_eq!(error.code(), "TokenInvalid", "{error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_issuers_token_is_named_after_its_issuer() {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
    let Some(bench) = Bench::new().await else {
        return;
    };
    let part = |json: serde_json::Value| BASE64.encode(json.to_string());
    let header = part(serde_json::json!({"alg": "RS256", "kid": "theirs"}));
    let claims = part(
        serde_json::json!({"iss": "https://other.example", "aud": [AUDIENCE], "exp": 4_000_000_000_u32}),
    );
    let token = format!("{header}.{claims}.{}", BASE64.encode([7; 256]));
    let denial = bench
        .auto
        .authenticate(&token, now())
        .await
        .expect_err("foreign");
    assert_eq!(
        denial.error,
        CallerError::UnknownIssuer("https://other.example".to_owned())
    );
    assert_eq!(
        denial.method,
        Method::TokenReview,
        "the API server may know more issuers"
    );
}

/// The tokens of Secrets, from before there were audiences: they never end and are bound to nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_legacy_token_from_a_secret_is_refused() {
    let Some(bench) = Bench::new().await else {
        return;
    };
    make_account(bench.cluster, &bench.namespace, "web").await;
    let client = bench.cluster.client().await;
    let secrets: Api<Secret> = Api::namespaced(client, &bench.namespace);
    let secret = serde_json::json!({
        "metadata": {"name": "legacy", "annotations": {"kubernetes.io/service-account.name": "web"}},
        "type": "kubernetes.io/service-account-token",
    });
    let secret: Secret = serde_json::from_value(secret).expect("a Secret");
    secrets
        .create(&PostParams::default(), &secret)
        .await
        .expect("made");
    let token = eventually(
        Duration::from_secs(20),
        "the controllers write the token",
        || async {
            let secret = secrets
                .get("legacy")
                .await
                .map_err(|error| error.to_string())?;
            let token = secret
                .data
                .and_then(|mut data| data.remove("token"))
                .ok_or("not yet")?;
            String::from_utf8(token.0).map_err(|error| error.to_string())
        },
    )
    .await;
    let error = bench.error(&bench.auto, &token).await;
    assert_eq!(error.code(), "UnknownIssuer", "{error}");
    let error = bench.error(&bench.reviewed, &token).await;
    assert_eq!(error.code(), "TokenInvalid", "{error}");
}

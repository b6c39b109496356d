//! Bytes from outside -> what reads them: no panic, and what is promised of every answer.
//!
//! `make fuzz` looks for inputs that break this, with libFuzzer; `tests/it/fuzz.rs` runs the corpora and inputs near them
//! in `make test`.

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
};

use arc_swap::ArcSwap;
use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use axum::body::Body;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use jiff::Timestamp;
use malha::{
    ca::{
        bundle::Bundle,
        csr::{Csr, KeyPolicy},
        journal::Journal,
    },
    caller::{self, CallerError, KeySet, TokenClaims, TokenPolicy},
    config::{Layers, Settings},
    identity::{SpiffeId, TrustDomain},
    inject::{ClusterFacts, Injector, NamespaceFacts, Verdict},
    mesh,
    webhook::{self, Webhook},
    xds::{
        Kind, Resource,
        delta::{self, Pace, Session, View},
    },
};
use prost::Message as _;
use serde_json::{Value, json};
use tower::Service as _;

/// What an input is given to.
pub(crate) type Target = fn(&[u8]);

/// All of them, by the names of their corpora.
pub(crate) const TARGETS: [(&str, Target); 14] = [
    ("admission_review", admission_review),
    ("pod_annotations", pod_annotations),
    ("csr_der", csr_der),
    ("csr_pem", csr_pem),
    ("jwt", jwt),
    ("jwt_claims", jwt_claims),
    ("jwks", jwks),
    ("spiffe_id", spiffe_id),
    ("bundle", bundle),
    ("journal", journal),
    ("discovery_request", discovery_request),
    ("mesh_resources", mesh_resources),
    ("cli_yaml", cli_yaml),
    ("config_file", config_file),
];

/// A body on port 15017.
fn admission_review(input: &[u8]) {
    static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_time().build().expect("a runtime")
    });
    static ROUTER: LazyLock<axum::Router> = LazyLock::new(|| {
        webhook::router(Webhook {
            injector: Arc::new(ArcSwap::from_pointee(Injector::default())),
            cluster: Arc::new(NothingKnown),
            metrics: webhook::Metrics::default(),
            limits: webhook::Limits::default(),
        })
    });
    for path in ["/inject/ns", "/advise"] {
        let request = axum::http::Request::post(path)
            .header("content-type", "application/json")
            .body(Body::from(input.to_vec()))
            .expect("a request");
        let response = RUNTIME.block_on(ROUTER.clone().call(request));
        let status = response.expect("the router cannot fail").status();
        // a panic is caught there, and answered so
        assert_ne!(status, 500, "{path}");
    }
}

struct NothingKnown;

impl ClusterFacts for NothingKnown {
    fn oldest_kubelet(&self) -> Option<u32> {
        None
    }

    fn namespace(&self, _: &str) -> Option<NamespaceFacts> {
        None
    }
}

/// Lines `key: value` as a pod's annotations: the patch applies, and takes nothing away.
fn pod_annotations(input: &[u8]) {
    static INJECTOR: LazyLock<Injector> = LazyLock::new(Injector::default);
    let text = String::from_utf8_lossy(input);
    let annotations: BTreeMap<_, _> = text
        .lines()
        .map(|line| line.split_once(": ").unwrap_or((line, "")))
        .collect();
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "cart", "namespace": "shop", "annotations": annotations},
        "spec": {"containers": [{"name": "app", "image": "app", "ports": [{"containerPort": 8080}]}]},
    });
    let namespace = NamespaceFacts::enabled("shop");
    let answer = INJECTOR
        .rehearse(pod.to_string().as_bytes(), &namespace, Some(33), None)
        .expect("it is JSON");
    if let Verdict::Patch(patch) = answer.verdict {
        let patch: json_patch::Patch = serde_json::from_slice(&patch.json).expect("a patch");
        json_patch::patch(&mut pod, &patch).expect("it fits the pod that it was made for");
        for key in annotations.keys() {
            assert!(pod["metadata"]["annotations"].get(key).is_some(), "{key}");
        }
        let containers = pod["spec"]["containers"].as_array().expect("a list");
        assert!(containers.iter().any(|it| it["name"] == "app"));
    }
}

fn csr_der(input: &[u8]) {
    let _ = Csr::parse_der(input, KeyPolicy { ed25519: true });
}

fn csr_pem(input: &[u8]) {
    let _ = Csr::parse_pem(input, KeyPolicy { ed25519: true });
}

/// A bearer token as it comes: nobody has signed it, so nobody is it.
fn jwt(input: &[u8]) {
    let token = String::from_utf8_lossy(input);
    let verdict = caller::verify(&token, &ISSUER.keys, &ISSUER.policy, Timestamp::UNIX_EPOCH);
    assert!(verdict.is_err());
}

/// Claims that the issuer did sign: whoever is named has a name.
fn jwt_claims(input: &[u8]) {
    if let Ok(claims) = ISSUER.claims(input) {
        let domain = "cluster.local".parse().expect("a trust domain");
        if let Ok(caller) = claims.into_caller(&domain) {
            let text = caller.identity.to_string();
            assert_eq!(text.parse(), Ok(caller.identity));
        }
    }
}

static ISSUER: LazyLock<Issuer> = LazyLock::new(Issuer::new);

/// Signs as an API server does.
struct Issuer {
    key: EcdsaKeyPair,
    keys: KeySet,
    policy: TokenPolicy,
}

impl Issuer {
    fn new() -> Self {
        let random = SystemRandom::new();
        let pkcs8 =
            EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).expect("a key");
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref())
            .expect("the key just made");
        // an uncompressed point: 4, x, y
        let (x, y) = key.public_key().as_ref()[1..].split_at(32);
        let [x, y] = [x, y].map(|half| URL_SAFE_NO_PAD.encode(half));
        let jwk = json!({"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": "k", "x": x, "y": y});
        let keys = KeySet::parse(json!({"keys": [jwk]}).to_string().as_bytes());
        Self {
            key,
            keys: keys.expect("a key set"),
            policy: TokenPolicy {
                issuer: "https://kubernetes.default.svc".to_owned(),
                audiences: vec!["malha-ca".to_owned()],
                require_bound_pod: true,
            },
        }
    }

    /// Signs claims, and reads them as they come with a request.
    fn claims(&self, claims: &[u8]) -> Result<TokenClaims, CallerError> {
        let now = Timestamp::from_second(1_800_000_000).expect("a year");
        caller::verify(&self.sign(claims), &self.keys, &self.policy, now)
    }

    fn sign(&self, claims: &[u8]) -> String {
        let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"ES256","kid":"k"}"#);
        let signed = format!("{header}.{}", URL_SAFE_NO_PAD.encode(claims));
        let signature = self.key.sign(&SystemRandom::new(), signed.as_bytes());
        let signature = URL_SAFE_NO_PAD.encode(signature.expect("a signature"));
        format!("{signed}.{signature}")
    }
}

fn jwks(input: &[u8]) {
    let _ = KeySet::parse(input);
}

/// What is an identity is written as it was read, is made of its parts, and holds no character that paths or certificates
/// could trip over.
fn spiffe_id(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    if let Ok(id) = text.parse::<SpiffeId>() {
        let parts = SpiffeId::new(id.trust_domain(), id.namespace(), id.service_account());
        assert_eq!(parts.as_ref(), Ok(&id));
        assert_eq!(id.to_string(), text);
        let harmless = |c: char| c.is_ascii_alphanumeric() || "._-/:".contains(c);
        assert!(text.chars().all(harmless));
        // A trust domain may be dots; it is no segment of a path.
        let path = &text["spiffe://".len()..];
        assert!(!path.contains("/../") && !path.ends_with("/.."));
    }
    let _ = text.parse::<TrustDomain>();
}

/// What is a bundle is written as one that is equal.
fn bundle(input: &[u8]) {
    if let Ok(bundle) = Bundle::parse_pem(input) {
        assert_eq!(Bundle::parse_pem(bundle.to_pem().as_bytes()), Ok(bundle));
    }
}

/// What is a journal is written as one that is equal.
fn journal(input: &[u8]) {
    if let Ok(journal) = Journal::from_json(input) {
        let again = Journal::from_json(&journal.to_json()).expect("what was written is read");
        assert!(again == journal);
    }
}

/// Requests of a stream, each with its length (one byte: up to 255) before it: the stream comes to rest.
fn discovery_request(mut input: &[u8]) {
    let mut session = Session::default();
    while let Some((&length, rest)) = input.split_first() {
        let (request, rest) = rest.split_at(rest.len().min(length.into()));
        input = rest;
        let Ok(request) = DeltaDiscoveryRequest::decode(request) else {
            continue;
        };
        let Some(kind) = Kind::of_type_url(&request.type_url) else {
            continue;
        };
        let heard = delta::Request {
            subscribe: request
                .resource_names_subscribe
                .iter()
                .map(String::as_str)
                .collect(),
            unsubscribe: request
                .resource_names_unsubscribe
                .iter()
                .map(String::as_str)
                .collect(),
            held: request
                .initial_resource_versions
                .iter()
                .map(|(name, version)| (name.as_str(), version.as_str()))
                .collect(),
            nonce: &request.response_nonce,
            error: request.error_detail.as_ref().map(|it| it.message.as_str()),
        };
        session.hear(kind, &heard, &Two);
        let pace = Pace {
            bytes: 1,
            wait_for_clusters: false,
        };
        let said = std::iter::from_fn(|| session.next(&Two, pace)).take(100);
        assert!(said.count() < 100, "it never stops talking");
    }
}

/// A cluster and a listener.
struct Two;

impl View for Two {
    fn find(&self, kind: Kind, name: &str) -> Option<Arc<Resource>> {
        self.all(kind).into_iter().find(|it| &*it.name == name)
    }

    fn all(&self, kind: Kind) -> Vec<Arc<Resource>> {
        let resource = || Resource {
            name: Arc::from("a"),
            version: 1,
            body: Bytes::from_static(b"\x0a\x01a"),
            source: None,
        };
        match kind {
            Kind::Cluster | Kind::Listener => vec![Arc::new(resource())],
            Kind::Secret | Kind::Endpoints | Kind::Route => Vec::new(),
        }
    }
}

/// An object of an API server or of a file.
fn mesh_resources(input: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(input) else {
        return;
    };
    let _ = mesh::istio::peer_authentication(&value);
    if let Ok(object) = serde_json::from_value(value.clone()) {
        let _ = mesh::kubernetes::namespace(&object);
    }
    if let Ok(object) = serde_json::from_value(value.clone()) {
        let _ = mesh::kubernetes::service(&object);
    }
    if let Ok(object) = serde_json::from_value(value.clone()) {
        let _ = mesh::kubernetes::slice(&object);
    }
    if let Ok(object) = serde_json::from_value(value) {
        let _ = mesh::kubernetes::workload(&object);
    }
}

/// `-f`: what is read is written as YAML that reads the same.
fn cli_yaml(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    if let Ok(written) = malha::cli::reprint(&text) {
        let again = malha::cli::reprint(&written).expect("what was written is read");
        assert_eq!(again, written);
    }
}

fn config_file(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    if let Ok(layers) = Layers::default().with_file(&text) {
        let _ = Settings::parse(&layers);
    }
}

/// Whether what follows a good signature is reached at all.
#[test]
fn the_claims_to_begin_at_are_taken() {
    let claims = ISSUER.claims(include_bytes!("corpus/jwt_claims/bound"));
    let claims = claims.expect("good claims");
    assert_eq!(claims.namespace, "shop");
}

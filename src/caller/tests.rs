use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use jsonwebtoken::{Algorithm, EncodingKey};
use k8s_openapi::api::authentication::v1::{TokenReviewStatus, UserInfo};
use serde_json::{Value, json};

use super::*;
use crate::identity::TrustDomain;

const ISSUER: &str = "https://kubernetes.default.svc";

/// An issuer with a P-256 key, and a cluster in which `web-0` runs as `prod/web` on `node-1`.
struct Scene {
    key: rcgen::KeyPair,
    now: Timestamp,
    header: Value,
    claims: Value,
    policy: TokenPolicy,
    cluster: Cluster,
}

#[derive(Clone)]
struct Cluster {
    synced: bool,
    pod: Option<PodFact>,
    account: Option<String>,
    terminating: bool,
}

impl Liveness for Cluster {
    fn pods_of(&self, namespace: &str, account: &str) -> Vec<PodFact> {
        let pod = self.pod.clone();
        let pod = pod.filter(|pod| namespace == "prod" && pod.service_account == account);
        pod.into_iter().collect()
    }
    fn pod_at(&self, _: IpAddr) -> Option<(String, String)> {
        None
    }
    fn synced(&self) -> bool {
        self.synced
    }
    fn pod(&self, namespace: &str, name: &str) -> Option<PodFact> {
        self.pod
            .clone()
            .filter(|_| (namespace, name) == ("prod", "web-0"))
    }
    fn service_account(&self, namespace: &str, name: &str) -> Option<String> {
        self.account
            .clone()
            .filter(|_| (namespace, name) == ("prod", "web"))
    }
    fn namespace_terminating(&self, namespace: &str) -> bool {
        self.terminating && namespace == "prod"
    }
}

impl Scene {
    fn new() -> Self {
        let now: Timestamp = "2026-11-22T10:00:00Z".parse().unwrap();
        let seconds = now.as_second();
        Self {
            key: rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap(),
            now,
            header: json!({ "alg": "ES256", "kid": "one" }),
            claims: json!({
                "iss": ISSUER,
                "aud": ["malha-ca"],
                "sub": "system:serviceaccount:prod:web",
                "iat": seconds, "nbf": seconds, "exp": seconds + 3600,
                "jti": "3b1f",
                "kubernetes.io": {
                    "namespace": "prod",
                    "serviceaccount": { "name": "web", "uid": "sa-1" },
                    "pod": { "name": "web-0", "uid": "pod-1" },
                    "node": { "name": "node-1", "uid": "n-1" },
                },
            }),
            policy: TokenPolicy {
                issuer: ISSUER.to_owned(),
                audiences: vec!["malha-ca".to_owned()],
                require_bound_pod: true,
            },
            cluster: Cluster {
                synced: true,
                pod: Some(PodFact {
                    uid: "pod-1".to_owned(),
                    service_account: "web".to_owned(),
                    node: Some("node-1".to_owned()),
                    deletion: None,
                    finished: false,
                }),
                account: Some("sa-1".to_owned()),
                terminating: false,
            },
        }
    }

    fn jwk(&self) -> Value {
        let point = self.key.public_key_raw();
        json!({ "kty": "EC", "crv": "P-256", "kid": "one", "use": "sig",
            "x": URL_SAFE_NO_PAD.encode(&point[1..33]), "y": URL_SAFE_NO_PAD.encode(&point[33..]) })
    }

    fn keys(&self) -> KeySet {
        KeySet::parse(json!({ "keys": [self.jwk()] }).to_string().as_bytes()).unwrap()
    }

    fn signed_part(&self) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        format!("{}.{}", part(&self.header), part(&self.claims))
    }

    fn token(&self) -> String {
        let signed = self.signed_part();
        let key = EncodingKey::from_ec_der(self.key.serialized_der());
        let signature =
            jsonwebtoken::crypto::sign(signed.as_bytes(), &key, Algorithm::ES256).unwrap();
        format!("{signed}.{signature}")
    }

    fn check(&self, token: &str) -> Result<TokenClaims, CallerError> {
        verify(token, &self.keys(), &self.policy, self.now)
    }

    fn outcome(&self) -> Result<Caller, CallerError> {
        bind(self.check(&self.token())?, &self.cluster, &mesh(), self.now)
    }

    fn later(&mut self, seconds: i64) {
        self.now = self
            .now
            .checked_add(SignedDuration::from_secs(seconds))
            .unwrap();
    }
}

fn mesh() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

fn code<T: std::fmt::Debug>(outcome: Result<T, CallerError>) -> &'static str {
    outcome.unwrap_err().code()
}

#[test]
fn a_bound_token_of_a_running_pod_is_its_service_account() {
    let caller = Scene::new().outcome().unwrap();
    assert_eq!(
        caller.identity.to_string(),
        "spiffe://cluster.local/ns/prod/sa/web"
    );
    let object = |name: &str, uid: &str| BoundObject {
        name: name.into(),
        uid: uid.into(),
    };
    assert_eq!(caller.pod, Some(object("web-0", "pod-1")));
    assert_eq!(caller.node, Some(object("node-1", "n-1")));
    assert_eq!(caller.token_id.as_deref(), Some("3b1f"));
    assert_eq!((caller.method, caller.stale), (Method::Jwks, false));
}

#[test]
fn each_wrong_claim_has_its_code() {
    type Spoil = fn(&mut Scene);
    let cases: &[(&str, Spoil, &str)] = &[
        (
            "another issuer",
            |s| s.claims["iss"] = json!("https://other"),
            "UnknownIssuer",
        ),
        (
            "issuer with a slash",
            |s| s.claims["iss"] = json!(format!("{ISSUER}/")),
            "UnknownIssuer",
        ),
        (
            "no issuer",
            |s| s.claims["iss"] = Value::Null,
            "UnknownIssuer",
        ),
        (
            "issuer a list",
            |s| s.claims["iss"] = json!([ISSUER]),
            "TokenInvalid",
        ),
        (
            "another audience",
            |s| s.claims["aud"] = json!(["api"]),
            "AudienceMismatch",
        ),
        (
            "audience as a prefix",
            |s| s.claims["aud"] = json!("malha-ca2"),
            "AudienceMismatch",
        ),
        (
            "audience in capitals",
            |s| s.claims["aud"] = json!("MALHA-CA"),
            "AudienceMismatch",
        ),
        (
            "empty audience",
            |s| s.claims["aud"] = json!([]),
            "AudienceMismatch",
        ),
        (
            "no audience",
            |s| s.claims["aud"] = Value::Null,
            "AudienceMismatch",
        ),
        (
            "audience a number",
            |s| s.claims["aud"] = json!(7),
            "TokenInvalid",
        ),
        (
            "no expiry",
            |s| s.claims["exp"] = Value::Null,
            "TokenInvalid",
        ),
        (
            "expiry a text",
            |s| s.claims["exp"] = json!("never"),
            "TokenInvalid",
        ),
        (
            "expiry beyond all years",
            |s| s.claims["exp"] = json!(u64::MAX),
            "TokenInvalid",
        ),
        (
            "expiry without end",
            |s| s.claims["exp"] = json!(1e300),
            "TokenInvalid",
        ),
        ("expired", |s| s.later(3600 + 60), "TokenExpired"),
        ("not yet valid", |s| s.later(-61), "TokenNotYetValid"),
        (
            "issued in the future",
            |s| s.claims["iat"] = json!(s.now.as_second() + 61),
            "TokenNotYetValid",
        ),
        (
            "no subject",
            |s| s.claims["sub"] = Value::Null,
            "TokenInvalid",
        ),
        (
            "a user",
            |s| s.claims["sub"] = json!("admin"),
            "TokenInvalid",
        ),
        (
            "a node",
            |s| s.claims["sub"] = json!("system:node:n"),
            "TokenInvalid",
        ),
        (
            "five parts",
            |s| s.claims["sub"] = json!("system:serviceaccount:prod:web:x"),
            "TokenInvalid",
        ),
        (
            "three parts",
            |s| s.claims["sub"] = json!("system:serviceaccount:prod"),
            "TokenInvalid",
        ),
        (
            "an empty part",
            |s| s.claims["sub"] = json!("system:serviceaccount::web"),
            "TokenInvalid",
        ),
        (
            "another account in the subject",
            |s| s.claims["sub"] = json!("system:serviceaccount:prod:db"),
            "IdentityConflict",
        ),
        (
            "another namespace in the claim",
            |s| s.claims["kubernetes.io"]["namespace"] = json!("dev"),
            "IdentityConflict",
        ),
        (
            "no claim of Kubernetes",
            |s| s.claims["kubernetes.io"] = Value::Null,
            "NotBound",
        ),
        (
            "no pod",
            |s| s.claims["kubernetes.io"]["pod"] = Value::Null,
            "NotBound",
        ),
        (
            "a pod without a uid",
            |s| s.claims["kubernetes.io"]["pod"] = json!({ "name": "web-0" }),
            "TokenInvalid",
        ),
        (
            "names that are none",
            |s| {
                s.claims["sub"] = json!("system:serviceaccount:prod:../x");
                s.claims["kubernetes.io"]["serviceaccount"]["name"] = json!("../x");
                s.cluster.pod = None;
            },
            "CallerGone",
        ),
    ];
    for (case, spoil, want) in cases {
        let mut scene = Scene::new();
        spoil(&mut scene);
        assert_eq!(code(scene.outcome()), *want, "{case}");
    }
}

#[test]
fn each_dead_thing_has_its_code() {
    type Spoil = fn(&mut Scene);
    fn pod(scene: &mut Scene) -> &mut PodFact {
        scene.cluster.pod.as_mut().unwrap()
    }
    let cases: &[(&str, Spoil, &str, bool)] = &[
        (
            "lists not there",
            |s| s.cluster.synced = false,
            "VerifierUnavailable",
            false,
        ),
        ("pod deleted", |s| s.cluster.pod = None, "CallerGone", true),
        (
            "pod made anew",
            |s| pod(s).uid = "pod-2".into(),
            "CallerGone",
            false,
        ),
        (
            "pod of another account",
            |s| pod(s).service_account = "db".into(),
            "IdentityConflict",
            false,
        ),
        (
            "pod on another node",
            |s| pod(s).node = Some("node-2".into()),
            "CallerGone",
            false,
        ),
        (
            "pod on no node yet",
            |s| pod(s).node = None,
            "CallerGone",
            true,
        ),
        (
            "account deleted",
            |s| s.cluster.account = None,
            "CallerGone",
            true,
        ),
        (
            "account made anew",
            |s| s.cluster.account = Some("sa-2".into()),
            "CallerGone",
            false,
        ),
        (
            "namespace terminating",
            |s| s.cluster.terminating = true,
            "CallerGone",
            false,
        ),
        (
            "pod deleted over a minute ago",
            |s| {
                pod(s).deletion = Some(s.now);
                s.later(61);
            },
            "CallerGone",
            false,
        ),
    ];
    for (case, spoil, want, may_be_lag) in cases {
        let mut scene = Scene::new();
        spoil(&mut scene);
        let error = scene.outcome().unwrap_err();
        assert_eq!(error.code(), *want, "{case}");
        let lag = matches!(&error, CallerError::CallerGone(gone) if gone.may_be_lag());
        assert_eq!(lag, *may_be_lag, "{case}");
    }
}

#[test]
fn clocks_may_be_a_minute_apart_and_a_pod_may_drain_for_one() {
    let mut scene = Scene::new();
    scene.later(3600 + 59);
    scene.outcome().unwrap();
    let mut scene = Scene::new();
    scene.later(-60);
    scene.outcome().unwrap();
    let mut scene = Scene::new();
    scene.cluster.pod.as_mut().unwrap().deletion = Some(scene.now);
    scene.later(60);
    scene.outcome().unwrap();
}

#[test]
fn an_audience_may_be_one_text_and_a_date_may_have_a_fraction() {
    let mut scene = Scene::new();
    scene.claims["aud"] = json!("malha-ca");
    scene.claims["exp"] = json!(scene.now.as_second() as f64 + 0.5);
    scene.outcome().unwrap();
}

#[test]
fn an_older_cluster_names_no_node() {
    let mut scene = Scene::new();
    scene.claims["kubernetes.io"]
        .as_object_mut()
        .unwrap()
        .remove("node");
    assert_eq!(scene.outcome().unwrap().node, None);
}

#[test]
fn a_standalone_mesh_needs_no_pod() {
    let mut scene = Scene::new();
    scene.policy.require_bound_pod = false;
    scene.claims["kubernetes.io"]
        .as_object_mut()
        .unwrap()
        .remove("pod");
    let claims = scene.check(&scene.token()).unwrap();
    let caller = claims.into_caller(&mesh()).unwrap();
    assert_eq!(
        (caller.identity.service_account(), caller.pod),
        ("web", None)
    );
}

#[test]
fn no_algorithm_but_ours_is_tried() {
    let unsigned = |scene: &Scene| format!("{}.", scene.signed_part());
    for alg in [
        "none", "None", "NONE", "", "HS256", "HS512", "ES512", "PS256", "EdDSA", "RS1",
    ] {
        let mut scene = Scene::new();
        scene.header["alg"] = json!(alg);
        assert_eq!(
            code(scene.check(&unsigned(&scene))),
            "TokenInvalid",
            "{alg}"
        );
        assert_eq!(
            code(scene.check(&scene.token())),
            "TokenInvalid",
            "{alg}, signed"
        );
    }
    // the public key as an HMAC secret, in each form in which somebody may have it at hand
    let scene = Scene::new();
    let secrets = [
        scene.key.public_key_raw().to_vec(),
        scene.key.public_key_pem().into_bytes(),
        scene.jwk().to_string().into_bytes(),
    ];
    for secret in secrets {
        let mut scene = Scene {
            header: json!({ "alg": "HS256", "kid": "one" }),
            ..Scene::new()
        };
        scene.key = rcgen::KeyPair::generate().unwrap();
        let signed = scene.signed_part();
        let key = EncodingKey::from_secret(&secret);
        let signature =
            jsonwebtoken::crypto::sign(signed.as_bytes(), &key, Algorithm::HS256).unwrap();
        assert_eq!(
            code(scene.check(&format!("{signed}.{signature}"))),
            "TokenInvalid"
        );
    }
}

#[test]
fn a_key_is_never_used_with_another_algorithm_than_its_own() {
    for alg in ["RS256", "ES384"] {
        let mut scene = Scene::new();
        scene.header["alg"] = json!(alg);
        assert_eq!(
            scene.check(&scene.token()),
            Err(CallerError::UnknownKey("one".into())),
            "{alg}"
        );
    }
}

/// Kubernetes signs with RSA unless it is told otherwise.
#[test]
fn every_allowed_algorithm_is_accepted_with_its_own_hash_only() {
    use aws_lc_rs::{
        rand::SystemRandom,
        signature::{
            ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384,
            RSA_PKCS1_SHA512, RSA_PSS_SHA256, RsaEncoding, RsaKeyPair,
        },
    };
    use x509_parser::{prelude::FromDer, public_key::PublicKey, x509::SubjectPublicKeyInfo};

    let rsa = rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048);
    let rsa = rsa.unwrap();
    let p384 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let spki = rcgen::PublicKeyData::subject_public_key_info(&rsa);
    let (_, spki) = SubjectPublicKeyInfo::from_der(&spki).unwrap();
    let PublicKey::RSA(public) = spki.parsed().unwrap() else {
        panic!("an RSA key")
    };
    let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let modulus = public.modulus.strip_prefix(&[0]).unwrap_or(public.modulus);
    let point = p384.public_key_raw();
    let jwks = json!({ "keys": [
        { "kty": "RSA", "kid": "one", "n": text(modulus), "e": text(public.exponent) },
        { "kty": "EC", "crv": "P-384", "kid": "one", "x": text(&point[1..49]), "y": text(&point[49..]) },
    ]});
    let keys = KeySet::parse(jwks.to_string().as_bytes()).unwrap();
    assert_eq!(keys.len(), 2, "one id, two kinds");

    let scene = |alg: &str| Scene {
        header: json!({ "alg": alg, "kid": "one" }),
        ..Scene::new()
    };
    let check = |scene: &Scene, signature: &[u8]| {
        let token = format!("{}.{}", scene.signed_part(), text(signature));
        verify(&token, &keys, &scene.policy, scene.now).map(|claims| claims.namespace)
    };
    let signer = RsaKeyPair::from_pkcs8(rsa.serialized_der()).unwrap();
    let paddings: [(&str, &'static dyn RsaEncoding); 4] = [
        ("RS256", &RSA_PKCS1_SHA256),
        ("RS384", &RSA_PKCS1_SHA384),
        ("RS512", &RSA_PKCS1_SHA512),
        ("PS256", &RSA_PSS_SHA256),
    ];
    for (signed_as, padding) in paddings {
        for alg in ["RS256", "RS384", "RS512"] {
            let scene = scene(alg);
            let mut signature = vec![0; signer.public_modulus_len()];
            let signed = scene.signed_part();
            signer
                .sign(
                    padding,
                    &SystemRandom::new(),
                    signed.as_bytes(),
                    &mut signature,
                )
                .unwrap();
            let outcome = check(&scene, &signature);
            match signed_as == alg {
                true => assert_eq!(outcome.unwrap(), "prod"),
                false => assert_eq!(code(outcome), "TokenInvalid", "{signed_as} sent as {alg}"),
            }
        }
    }
    let signer =
        EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, p384.serialized_der()).unwrap();
    let scene = scene("ES384");
    let signature = signer
        .sign(&SystemRandom::new(), scene.signed_part().as_bytes())
        .unwrap();
    assert_eq!(check(&scene, signature.as_ref()).unwrap(), "prod");
}

#[test]
fn an_unknown_key_says_whether_a_new_key_set_could_help() {
    let mut scene = Scene::new();
    scene.header["kid"] = json!("two");
    assert_eq!(
        scene.check(&scene.token()),
        Err(CallerError::UnknownKey("two".into()))
    );
    scene.claims["iss"] = json!("https://other");
    assert_eq!(
        scene.check(&scene.token()),
        Err(CallerError::UnknownIssuer("https://other".into()))
    );
    scene.header = json!({ "alg": "ES256" });
    assert_eq!(code(scene.check(&scene.token())), "TokenInvalid", "no kid");
}

#[test]
fn any_flipped_bit_is_noticed() {
    let scene = Scene::new();
    let token = scene.token();
    assert!(scene.check(&token).is_ok());
    for at in 0..token.len() {
        for bit in 0..7 {
            let mut bytes = token.clone().into_bytes();
            bytes[at] ^= 1 << bit;
            let Ok(changed) = String::from_utf8(bytes) else {
                continue;
            };
            let outcome = scene.check(&changed);
            assert!(outcome.is_err(), "byte {at}, bit {bit}: {changed}");
        }
    }
}

#[test]
fn a_critical_extension_and_a_doubled_claim_are_refused() {
    let mut scene = Scene::new();
    scene.header["crit"] = json!(["b64"]);
    assert_eq!(code(scene.check(&scene.token())), "TokenInvalid");
    // one parser takes the first, another the last: neither is right
    let scene = Scene::new();
    let twice = format!(
        r#"{{"sub":"system:serviceaccount:prod:db",{}"#,
        &scene.claims.to_string()[1..]
    );
    let signed = format!(
        "{}.{}",
        URL_SAFE_NO_PAD.encode(scene.header.to_string()),
        URL_SAFE_NO_PAD.encode(twice)
    );
    let key = EncodingKey::from_ec_der(scene.key.serialized_der());
    let signature = jsonwebtoken::crypto::sign(signed.as_bytes(), &key, Algorithm::ES256).unwrap();
    assert_eq!(
        code(scene.check(&format!("{signed}.{signature}"))),
        "TokenInvalid"
    );
}

#[test]
fn what_is_no_token_is_refused_without_a_panic() {
    let scene = Scene::new();
    let token = scene.token();
    let long = format!("{token}{}", "A".repeat(MAX_TOKEN));
    let texts = [
        "",
        ".",
        "..",
        "...",
        "a.b",
        "a.b.c",
        "a.b.c.d",
        "é.é.é",
        " ",
        "\0",
        "e30.e30.",
        "e30.e30.e30",
        &long,
        &format!("{token}."),
        &format!(".{token}"),
        &format!("{token} "),
        &token[1..],
    ];
    for text in texts {
        assert_eq!(code(scene.check(text)), "TokenInvalid", "{text:.40}");
    }
}

#[test]
fn details_are_only_for_those_whose_signature_was_good() {
    let mut scene = Scene::new();
    scene.later(2 * 3600);
    let expired = scene.outcome().unwrap_err();
    assert_eq!(
        expired.client_text(),
        "the token expired at 2026-11-22T11:00:00Z; the clock here says 2026-11-22T12:00:00Z"
    );
    // the same token with a broken signature tells nothing of that
    let token = scene.token();
    let (signed, _) = token.rsplit_once('.').unwrap();
    let forged = scene
        .check(&format!("{signed}.{}", "A".repeat(86)))
        .unwrap_err();
    assert_eq!(forged.client_text(), "caller could not be authenticated");
    assert_eq!(
        CallerError::NoCredential.client_text(),
        "caller could not be authenticated"
    );
}

#[test]
fn a_key_set_keeps_what_it_can_use_and_refuses_to_be_empty_or_ambiguous() {
    let scene = Scene::new();
    let good = scene.jwk();
    let with = |field: &str, value: Value| {
        let mut jwk = good.clone();
        jwk[field] = value;
        jwk
    };
    let useless = [
        json!({ "kty": "oct", "k": "c2VjcmV0", "kid": "one" }),
        json!({ "kty": "OKP", "crv": "Ed25519", "x": "AA", "kid": "one" }),
        with("use", json!("enc")),
        with("alg", json!("HS256")),
        with("alg", json!("ES384")),
        with("crv", json!("P-384")),
        with("crv", json!("P-521")),
        with("x", json!("AA")),
        with("x", json!("not base64!")),
        with("kid", Value::Null),
        json!({ "kty": "RSA", "kid": "small", "e": "AQAB", "n": URL_SAFE_NO_PAD.encode([0xff; 128]) }),
        json!("not even an object"),
    ];
    let parse = |keys: &[Value]| KeySet::parse(json!({ "keys": keys }).to_string().as_bytes());
    for jwk in &useless {
        assert_eq!(
            parse(std::slice::from_ref(jwk)).unwrap_err(),
            KeySetError::Empty,
            "{jwk}"
        );
    }
    let mut mixed = useless.to_vec();
    mixed.push(good.clone());
    assert_eq!(parse(&mixed).unwrap().len(), 1);
    assert_eq!(
        parse(&[good.clone(), with("alg", json!("ES256"))]).unwrap_err(),
        KeySetError::Ambiguous("one".into())
    );
    for text in ["", "{}", "[]", "{\"keys\":7}", "{\"keys\":[]}", "<html>"] {
        assert!(KeySet::parse(text.as_bytes()).is_err(), "{text}");
    }
}

fn reviewed() -> TokenReviewStatus {
    let one = |value: &str| vec![value.to_owned()];
    let extra = [
        ("authentication.kubernetes.io/pod-name", one("web-0")),
        ("authentication.kubernetes.io/pod-uid", one("pod-1")),
        ("authentication.kubernetes.io/node-name", one("node-1")),
        ("authentication.kubernetes.io/node-uid", one("n-1")),
        (
            "authentication.kubernetes.io/credential-id",
            one("JTI=3b1f"),
        ),
    ];
    TokenReviewStatus {
        authenticated: Some(true),
        audiences: Some(one("malha-ca")),
        error: None,
        user: Some(UserInfo {
            username: Some("system:serviceaccount:prod:web".into()),
            uid: Some("sa-1".into()),
            groups: Some(vec![
                "system:serviceaccounts".into(),
                "system:authenticated".into(),
            ]),
            extra: Some(
                extra
                    .into_iter()
                    .map(|(key, value)| (key.to_owned(), value))
                    .collect(),
            ),
        }),
    }
}

#[test]
fn a_review_says_the_same_as_the_offline_check() {
    let scene = Scene::new();
    let by_review = review(&reviewed(), &scene.policy, &mesh()).unwrap();
    let offline = scene.outcome().unwrap();
    assert_eq!(by_review.method, Method::TokenReview);
    assert_eq!(
        Caller {
            method: Method::Jwks,
            ..by_review
        },
        offline
    );
}

#[test]
fn each_fault_of_a_review_has_its_code() {
    type Spoil = fn(&mut TokenReviewStatus);
    fn user(status: &mut TokenReviewStatus) -> &mut UserInfo {
        status.user.as_mut().unwrap()
    }
    let cases: &[(&str, Spoil, &str)] = &[
        (
            "not authenticated",
            |s| s.authenticated = Some(false),
            "TokenInvalid",
        ),
        (
            "no word about it",
            |s| s.authenticated = None,
            "TokenInvalid",
        ),
        ("no audiences", |s| s.audiences = None, "AudienceMismatch"),
        (
            "other audiences",
            |s| s.audiences = Some(vec!["api".into()]),
            "AudienceMismatch",
        ),
        ("no user", |s| s.user = None, "TokenInvalid"),
        ("no group", |s| user(s).groups = None, "TokenInvalid"),
        (
            "another group",
            |s| user(s).groups = Some(vec!["system:nodes".into()]),
            "TokenInvalid",
        ),
        (
            "a node",
            |s| user(s).username = Some("system:node:a:b".into()),
            "TokenInvalid",
        ),
        (
            "five parts",
            |s| user(s).username = Some("system:serviceaccount:a:b:c".into()),
            "TokenInvalid",
        ),
        (
            "a name that is none",
            |s| user(s).username = Some("system:serviceaccount:a:../b".into()),
            "TokenInvalid",
        ),
        ("no pod", |s| user(s).extra = None, "NotBound"),
    ];
    let policy = Scene::new().policy;
    for (case, spoil, want) in cases {
        let mut status = reviewed();
        spoil(&mut status);
        assert_eq!(code(review(&status, &policy, &mesh())), *want, "{case}");
    }
}

/// `prod/web`'s proxy of `node-1` asks for whoever runs there.
#[test]
fn each_condition_of_impersonation_removed_alone_is_refused() {
    use NotImpersonated as N;
    type Spoil = fn(&mut Scene, &mut Caller, &mut String, &mut NodeProxies);
    let id = "spiffe://cluster.local/ns/prod/sa/web";
    let cases: &[(&str, Spoil, Result<(), N>)] = &[
        ("nothing removed", |_, _, _, _| {}, Ok(())),
        (
            "off by default",
            |_, _, _, list| *list = NodeProxies::default(),
            Err(N::NotAllowed),
        ),
        (
            "another account of the namespace",
            |_, caller, _, _| {
                caller.identity = "spiffe://cluster.local/ns/kube/sa/x".parse().unwrap()
            },
            Err(N::NotAllowed),
        ),
        (
            "the account of another namespace",
            |_, caller, _, _| {
                caller.identity = "spiffe://cluster.local/ns/x/sa/proxy".parse().unwrap();
            },
            Err(N::NotAllowed),
        ),
        (
            "not bound to a pod",
            |_, c, _, _| c.pod = None,
            Err(N::NotBound),
        ),
        ("on no node", |_, c, _, _| c.node = None, Err(N::NotBound)),
        (
            "no identity",
            |_, _, target, _| *target = "spiffe://cluster.local/ns/prod".into(),
            Err(N::NoIdentity),
        ),
        (
            "a byte that no identity has",
            |_, _, target, _| target.push('%'),
            Err(N::NoIdentity),
        ),
        (
            "another trust domain",
            |_, _, target, _| *target = "spiffe://other/ns/prod/sa/web".into(),
            Err(N::OtherTrustDomain),
        ),
        (
            "the control plane",
            |_, _, target, _| *target = "spiffe://cluster.local/ns/malha-system/sa/malha".into(),
            Err(N::ControlPlane),
        ),
        (
            "another node",
            |s, _, _, _| s.cluster.pod.as_mut().unwrap().node = Some("node-2".into()),
            Err(N::NotOnNode),
        ),
        (
            "no node yet",
            |s, _, _, _| s.cluster.pod.as_mut().unwrap().node = None,
            Err(N::NotOnNode),
        ),
        (
            "it has ended",
            |s, _, _, _| s.cluster.pod.as_mut().unwrap().finished = true,
            Err(N::NotOnNode),
        ),
        (
            "it was deleted",
            |s, _, _, _| {
                s.cluster.pod.as_mut().unwrap().deletion = Some(s.now);
                s.later(61);
            },
            Err(N::NotOnNode),
        ),
        (
            "it runs as another",
            |s, _, _, _| s.cluster.pod.as_mut().unwrap().service_account = "db".into(),
            Err(N::NotOnNode),
        ),
        (
            "it is not there",
            |s, _, _, _| s.cluster.pod = None,
            Err(N::NotOnNode),
        ),
    ];
    for (case, spoil, want) in cases {
        let mut scene = Scene::new();
        let mut caller = scene.outcome().unwrap();
        caller.identity = "spiffe://cluster.local/ns/kube/sa/proxy".parse().unwrap();
        let mut target = id.to_owned();
        let mut list = "kube/proxy, other/proxy".parse().unwrap();
        spoil(&mut scene, &mut caller, &mut target, &mut list);
        let verdict = impersonate(
            &caller,
            &target,
            &list,
            "malha-system",
            &scene.cluster,
            scene.now,
        );
        assert_eq!(
            verdict.map(|id| assert_eq!(id.to_string(), target)),
            *want,
            "{case}"
        );
    }
    for wrong in ["proxy", "kube/", "/proxy", "kube/proxy,x"] {
        assert!(wrong.parse::<NodeProxies>().is_err(), "{wrong}");
    }
}

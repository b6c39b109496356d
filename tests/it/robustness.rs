//! No bytes end the process: whatever reads what others wrote is fed with good documents that were broken, with bytes
//! without sense, and with everything in between. The same cases each time; a failure prints its number and its bytes.

mod mutate;
/// What `make fuzz` searches; here only the corpora are walked through, and what is near them.
#[path = "../../fuzz/targets.rs"]
mod targets;

use std::{
    fs,
    panic::{self, AssertUnwindSafe},
    path::Path,
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use axum::{body::Body, http::Request};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use malha::{
    ca::{
        csr::{Csr, KeyPolicy},
        key::SecretKey,
        rotation::{self, RotationPolicy},
    },
    caller::{KeySet, TokenPolicy, verify},
    config::parse_duration,
    identity::TrustDomain,
    inject::{
        Call, ClusterFacts, Entry, InjectSettings, Injector, NamespaceFacts, Verdict,
        quantity::Quantity, uninject,
    },
    webhook::{self, Webhook},
};
use rcgen::{CertificateParams, DnType, KeyPair, SanType};
use serde_json::{Value, json};
use tower::ServiceExt as _;
use zeroize::Zeroizing;

use crate::{
    dice::Dice,
    pods::{self, Mode},
    support::review,
};

/// Cases for each reader.
const CASES: u64 = 10_000;

/// Feeds `eat` with mutations of `corpus`. What `eat` says against an answer is a failure, as is a panic.
fn feed(corpus: &[Vec<u8>], mut eat: impl FnMut(&[u8]) -> Result<(), String>) {
    for document in corpus {
        eat(document).expect("the corpus itself is fine");
    }
    for case in 0..CASES {
        let bytes = mutate::mutated(&mut Dice::new(case), corpus);
        let answer = panic::catch_unwind(AssertUnwindSafe(|| eat(&bytes)))
            .unwrap_or_else(|_| Err("panicked".into()));
        if let Err(fault) = answer {
            panic!("case {case}: {fault}: {}", bytes.escape_ascii());
        }
    }
}

fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

fn small_pods() -> Vec<Value> {
    (0..400)
        .map(|seed| pods::pod(seed, Mode::Anything))
        .filter(|pod| pod.to_string().len() < 1_200)
        .take(12)
        .collect()
}

#[test]
fn no_input_of_a_fuzz_corpus_and_none_near_it_breaks_its_target() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (name, target) in targets::TARGETS {
        let directory = corpora.join(name);
        let found = fs::read_dir(&directory);
        let found = found.unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        let mut files: Vec<_> = found.map(|it| it.expect("an entry").path()).collect();
        files.sort();
        let corpus = files.iter().map(|it| fs::read(it).expect("a file"));
        println!("{name}");
        search(target, &corpus.chain(made(name)).collect::<Vec<_>>());
    }
}

fn search(target: targets::Target, corpus: &[Vec<u8>]) {
    feed(corpus, |bytes| {
        target(bytes);
        Ok(())
    });
}

/// Keys and certificates do not belong into a repository: what a search begins at and holds one.
fn made(target: &str) -> Vec<Vec<u8>> {
    match target {
        "bundle" => bundles(),
        "journal" => vec![journal()],
        "jwks" => {
            let key = KeyPair::generate().expect("a key");
            vec![jwks("key-1", &key).to_string().into_bytes()]
        }
        _ => Vec::new(),
    }
}

fn bundles() -> Vec<Vec<u8>> {
    let certificate = |name: &str| {
        let params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        pem("CERTIFICATE", certificate.der())
    };
    let (one, two) = (certificate("a"), certificate("b"));
    vec![
        one.clone(),
        [one.clone(), two.clone()].concat(),
        [b"# note\n".to_vec(), two, one].concat(),
    ]
}

fn journal() -> Vec<u8> {
    let trust_domain: TrustDomain = "cluster.local".parse().expect("a trust domain");
    let secret = || {
        let key = KeyPair::generate().expect("a key");
        SecretKey::from_pkcs8(Zeroizing::new(key.serialize_der())).expect("a P-256 key")
    };
    let serials = [[1; 16], [2; 16]];
    let policy = RotationPolicy::default();
    let first = rotation::first(&trust_domain, secret(), secret(), serials, now(), &policy);
    let (journal, _) = first.expect("a journal");
    journal.to_json().to_vec()
}

#[test]
fn the_injector_answers_any_bytes() {
    let injector = Injector::new(InjectSettings::default());
    let call = Call {
        entry: Entry::Namespace,
        namespace: "shop",
        oldest_kubelet: Some(34),
    };
    let corpus: Vec<Vec<u8>> = small_pods()
        .iter()
        .map(|pod| pod.to_string().into_bytes())
        .collect();
    assert!(corpus.len() > 5, "too few small pods: {}", corpus.len());
    let mut read = 0;
    feed(&corpus, |bytes| {
        let Ok(answer) = injector.inject(bytes, &call) else {
            return Ok(());
        };
        read += 1;
        let text = String::from_utf8_lossy(bytes);
        if let Verdict::Patch(patch) = answer.verdict {
            // What was read as a pod is one for others too, and the patch fits it. Lone surrogates and endless numbers are
            // let through where nobody reads them, as Go lets them through.
            let mut pod: Value = match serde_json::from_slice(bytes) {
                Ok(pod) => pod,
                Err(_) if ["\\ud", "1e999"].iter().any(|odd| text.contains(odd)) => return Ok(()),
                Err(fault) => return Err(format!("read, but {fault}")),
            };
            let patch = serde_json::from_slice::<json_patch::Patch>(&patch.json)
                .map_err(|fault| fault.to_string())?;
            json_patch::patch(&mut pod, &patch).map_err(|fault| fault.to_string())?;
        }
        Ok(())
    });
    assert!(
        read > CASES / 20,
        "hardly anything was readable ({read}): the mutations are too coarse"
    );
}

#[test]
fn taking_an_injection_back_answers_any_pod() {
    let injector = Injector::new(InjectSettings::default());
    let call = Call {
        entry: Entry::Namespace,
        namespace: "shop",
        oldest_kubelet: None,
    };
    let mut corpus = Vec::new();
    for mut pod in small_pods() {
        let answer = injector
            .inject(pod.to_string().as_bytes(), &call)
            .expect("readable");
        if let Verdict::Patch(patch) = answer.verdict {
            let patch: json_patch::Patch = serde_json::from_slice(&patch.json).expect("a patch");
            json_patch::patch(&mut pod, &patch).expect("it fits");
            corpus.push(pod);
        }
    }
    for case in 0..CASES / 5 {
        let mut dice = Dice::new(case);
        let mut pod = dice.pick(&corpus).clone();
        for _ in 0..1 + dice.below(3) {
            mutate::field(&mut dice, &mut pod);
        }
        let said = pod.to_string();
        let answer =
            panic::catch_unwind(AssertUnwindSafe(|| uninject::uninject(&mut pod).map(drop)));
        match answer {
            Err(_) => panic!("case {case}: panicked: {said}"),
            Ok(Err(_)) => assert_eq!(
                pod.to_string(),
                said,
                "case {case}: refused and yet changed"
            ),
            Ok(Ok(())) => {}
        }
    }
}

/// An AdmissionReview over HTTP, but for the sockets.
#[tokio::test]
async fn the_webhook_answers_any_body() {
    struct Nothing;
    impl ClusterFacts for Nothing {
        fn oldest_kubelet(&self) -> Option<u32> {
            None
        }
        fn namespace(&self, _: &str) -> Option<NamespaceFacts> {
            None
        }
    }
    let router = webhook::router(Webhook {
        injector: Arc::new(ArcSwap::from_pointee(Injector::new(
            InjectSettings::default(),
        ))),
        cluster: Arc::new(Nothing),
        metrics: webhook::Metrics::default(),
        limits: webhook::Limits::default(),
    });
    let corpus: Vec<Vec<u8>> = small_pods()
        .iter()
        .map(|pod| {
            review::of_pod("uid-1", "shop", pod)
                .to_string()
                .into_bytes()
        })
        .collect();
    let (mut good, mut bad) = (0, 0);
    for case in 0..CASES / 2 {
        let mut dice = Dice::new(case);
        let body = mutate::mutated(&mut dice, &corpus);
        let path = *dice.pick(&[
            "/inject/ns",
            "/inject/pod",
            "/inject/rev/default/ns",
            "/advise",
        ]);
        let request = Request::post(path)
            .header("content-type", "application/json")
            .body(Body::from(body.clone()))
            .expect("a request");
        let response = router.clone().oneshot(request).await.expect("infallible");
        let status = response.status().as_u16();
        let answer = axum::body::to_bytes(response.into_body(), 1 << 24)
            .await
            .expect("a body");
        let shown = || {
            format!(
                "case {case}, {path}: {status} {answer:?} for {}",
                body.escape_ascii()
            )
        };
        match status {
            200 => {
                good += 1;
                let answer: Value = serde_json::from_slice(&answer).expect("JSON");
                let response = &answer["response"];
                assert!(
                    response["uid"].as_str().is_some_and(|uid| !uid.is_empty()),
                    "{}",
                    shown()
                );
                assert_eq!(
                    response.get("patch").is_some(),
                    response["patchType"] == "JSONPatch",
                    "{}",
                    shown()
                );
                if response["allowed"] == false {
                    assert_eq!(response["status"]["code"], 400, "{}", shown());
                }
            }
            400 => bad += 1,
            _ => panic!("{}", shown()),
        }
    }
    assert!(
        good > 100 && bad > 100,
        "{good} good, {bad} bad: one side is hardly met"
    );
}

#[test]
fn s13_no_broken_csr_is_taken_for_another_key() {
    let corpus = csrs();
    let keys: Vec<Vec<u8>> = corpus
        .iter()
        .map(|der| {
            Csr::parse_der(der, KeyPolicy::default())
                .expect("a good CSR")
                .public_key
                .spki()
                .to_vec()
        })
        .collect();
    feed(&corpus, |bytes| {
        match Csr::parse_der(bytes, KeyPolicy::default()) {
            Ok(csr) if !keys.contains(&csr.public_key.spki().to_vec()) => {
                Err("a key that nobody has proved".into())
            }
            _ => Ok(()),
        }
    });
}

#[test]
fn s13_one_flipped_bit_anywhere_in_a_csr_fails() {
    for der in csrs().into_iter().take(2) {
        for bit in 0..der.len() * 8 {
            let mut broken = der.clone();
            broken[bit / 8] ^= 1 << (bit % 8);
            let answer = Csr::parse_der(&broken, KeyPolicy::default());
            assert!(answer.is_err(), "bit {bit} of {}", der.escape_ascii());
        }
    }
}

#[test]
fn a_csr_as_pem_is_one_block_and_nothing_else() {
    let corpus: Vec<Vec<u8>> = csrs()
        .iter()
        .map(|der| pem("CERTIFICATE REQUEST", der))
        .collect();
    let keys: Vec<Csr> = corpus
        .iter()
        .map(|text| Csr::parse_pem(text, KeyPolicy::default()).expect("a good CSR"))
        .collect();
    feed(&corpus, |bytes| {
        match Csr::parse_pem(bytes, KeyPolicy::default()) {
            Ok(csr) if !keys.iter().any(|known| known.public_key == csr.public_key) => {
                Err("another key".into())
            }
            Ok(_) if bytes.len() > 16 * 1024 => Err("over 16 KiB".into()),
            _ => Ok(()),
        }
    });
}

#[test]
fn s19_a_token_with_one_character_changed_is_nobodys() {
    let (keys, policy, token) = token();
    assert!(verify(&token, &keys, &policy, now()).is_ok());
    for at in 0..token.len() {
        for other in [b'A', b'_', b'.', b'=', b' '] {
            let mut broken = token.clone().into_bytes();
            if broken[at] == other {
                continue;
            }
            broken[at] = other;
            let broken = String::from_utf8(broken).expect("ASCII");
            assert!(
                verify(&broken, &keys, &policy, now()).is_err(),
                "at {at}: {broken}"
            );
        }
    }
    feed(&[token.clone().into_bytes()], |bytes| {
        let text = String::from_utf8_lossy(bytes);
        match verify(&text, &keys, &policy, now()) {
            Ok(_) if *text != token => Err("another token is accepted".into()),
            _ => Ok(()),
        }
    });
}

#[test]
fn durations_of_any_bytes_are_read_or_refused() {
    let corpus = texts(&["90s", "5m", "24h", "7d", "1825d", "0s"]);
    feed(&corpus, |bytes| {
        if let Ok(text) = std::str::from_utf8(bytes)
            && parse_duration(text).is_ok_and(|life| life == Duration::MAX)
        {
            return Err("an endless time".into());
        }
        Ok(())
    });
}

#[test]
fn injector_settings_of_any_bytes_are_read_or_refused() {
    let corpus = texts(&[
        "native: false\nproxy: {uid: 1337, resources: {limits: {cpu: 4, memory: ''}}}\nimage: {pullSecrets: [a]}\n",
        "capture:\n  excludeInboundPorts: \"9090,1\"\n  includeOutboundIPRanges: 10.0.0.0/8\ntlsModeLabel: false\n",
    ]);
    let mut case = 0;
    feed(&corpus, |bytes| {
        case += 1;
        if let Ok(text) = std::str::from_utf8(bytes)
            && let Ok(settings) = InjectSettings::merged(text)
            && case % 20 == 0
        {
            // what is accepted can also be worked with
            let call = Call {
                entry: Entry::Pod,
                namespace: "shop",
                oldest_kubelet: None,
            };
            let pod = br#"{"spec":{"containers":[{"name":"app"}]}}"#;
            Injector::new(settings)
                .inject(pod, &call)
                .map_err(|fault| fault.to_string())?;
        }
        Ok(())
    });
}

#[test]
fn quantities_of_any_bytes_are_read_or_refused() {
    let corpus = texts(&["100m", "1.5Gi", "12e6", "0.25", "1E", "-1", "+3Ki"]);
    feed(&corpus, |bytes| {
        let Ok(text) = std::str::from_utf8(bytes) else {
            return Ok(());
        };
        let Some(quantity) = Quantity::parse(text) else {
            return Ok(());
        };
        if let Some(sum) = quantity.plus(&quantity)
            && Quantity::parse(&sum.to_string()).is_none()
        {
            return Err(format!("its double, {sum}, is none"));
        }
        Ok(())
    });
}

fn now() -> Timestamp {
    "2026-11-22T00:00:00Z".parse().expect("an instant")
}

fn pem(label: &str, der: &[u8]) -> Vec<u8> {
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in STANDARD.encode(der).as_bytes().chunks(64) {
        text.push_str(std::str::from_utf8(line).expect("base64"));
        text.push('\n');
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text.into_bytes()
}

/// P-256, P-384, and one that asks for a name, a SAN and to be a CA.
fn csrs() -> Vec<Vec<u8>> {
    let mut greedy = CertificateParams::default();
    greedy
        .distinguished_name
        .push(DnType::CommonName, "kubernetes-admin");
    greedy.subject_alt_names = vec![SanType::DnsName(
        "kubernetes.default.svc".try_into().expect("a name"),
    )];
    greedy.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    [
        (CertificateParams::default(), &rcgen::PKCS_ECDSA_P256_SHA256),
        (greedy, &rcgen::PKCS_ECDSA_P256_SHA256),
        (CertificateParams::default(), &rcgen::PKCS_ECDSA_P384_SHA384),
    ]
    .map(|(params, algorithm)| {
        let key = KeyPair::generate_for(algorithm).expect("a key");
        params
            .serialize_request(&key)
            .expect("a CSR")
            .der()
            .to_vec()
    })
    .to_vec()
}

fn jwks(id: &str, key: &KeyPair) -> Value {
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let point = key.public_key_raw();
    json!({"keys": [{
        "kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": id,
        "x": URL_SAFE_NO_PAD.encode(&point[1..33]), "y": URL_SAFE_NO_PAD.encode(&point[33..]),
    }]})
}

fn token() -> (KeySet, TokenPolicy, String) {
    use jsonwebtoken::{Algorithm, EncodingKey, Header};
    let key = KeyPair::generate().expect("a key");
    let keys = KeySet::parse(jwks("key-1", &key).to_string().as_bytes()).expect("a key set");
    let policy = TokenPolicy {
        issuer: "https://kubernetes.default.svc".into(),
        audiences: vec!["malha-ca".into()],
        require_bound_pod: true,
    };
    let start = now().as_second();
    let claims = json!({
        "iss": policy.issuer, "aud": ["malha-ca"], "sub": "system:serviceaccount:shop:cart",
        "iat": start - 10, "nbf": start - 10, "exp": start + 3_600, "jti": "id",
        "kubernetes.io": {
            "namespace": "shop", "serviceaccount": {"name": "cart", "uid": "u1"}, "pod": {"name": "cart-1", "uid": "u2"},
        },
    });
    let header = Header {
        kid: Some("key-1".into()),
        ..Header::new(Algorithm::ES256)
    };
    let signing = EncodingKey::from_ec_der(&key.serialize_der());
    let token = jsonwebtoken::encode(&header, &claims, &signing).expect("a token");
    (keys, policy, token)
}

//! The signing endpoint, end to end behind its router: CSRs that `openssl` makes, tokens of every fault, and what each of
//! them comes to.

mod callers;
mod grpc;
mod renewal;

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, LazyLock, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::ConnectInfo,
    http::{Request, StatusCode, header},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http_body_util::BodyExt;
use jiff::{SignedDuration, Timestamp};
use jsonwebtoken::{Algorithm, EncodingKey};
use malha::{
    ca::{profile::Profile, rotation::RotationPolicy},
    caller::{
        Authenticate, Caller, CallerError, Denial, KeySet, Liveness, NodeProxies, NotImpersonated,
        PodFact, Shown, TokenPolicy, alive, bind, impersonate, verify,
    },
    clock::Clock,
    custody::{Custody, keep_serving},
    identity::{SpiffeId, TrustDomain},
    signing::{Audit, Fault, Gate, Limits, Metrics, Rate, Signing, router, verify_chain},
    standalone::{Directory, FileHome, LocalTokens, TokenMaker},
    tls::{Bound, ClientTrust, ServingCertificate},
};
use prometheus_client::{encoding::text::encode, registry::Registry};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use x509_parser::{
    extensions::{GeneralName, ParsedExtension},
    prelude::{FromDer, X509Certificate},
};

const ISSUER: &str = "https://kubernetes.default.svc";
const WEB: &str = "spiffe://cluster.local/ns/prod/sa/web";

/// A certificate authority with its endpoint, and a cluster in which `web-0` runs as `prod/web` on `node-1`.
struct Scene {
    place: TempDir,
    custody: Arc<Custody<FileHome>>,
    router: Router,
    gate: Gate,
    registry: Registry,
    now: Arc<Mutex<Timestamp>>,
    issuer: Arc<TokenIssuer>,
    cluster: Arc<Mutex<Cluster>>,
}

/// Signs tokens as the API server does.
struct TokenIssuer(rcgen::KeyPair);

#[derive(Clone)]
struct Cluster {
    synced: bool,
    pod: Option<PodFact>,
    account: Option<String>,
    terminating: bool,
    review: Review,
    /// Where `web-0` is.
    address: Option<IpAddr>,
    /// Whom somebody at this address runs as.
    stranger: Option<(IpAddr, &'static str)>,
    node_proxies: NodeProxies,
    /// Whether every other account of `prod` is there, too, with a pod that runs as it.
    second: bool,
}

/// What asking the API server comes to.
#[derive(Clone, Copy, PartialEq)]
enum Review {
    NotAsked,
    Fails,
    Hangs,
}

impl Liveness for Cluster {
    fn synced(&self) -> bool {
        self.synced
    }
    fn pod(&self, namespace: &str, name: &str) -> Option<PodFact> {
        self.pod
            .clone()
            .filter(|_| (namespace, name) == ("prod", "web-0"))
    }
    fn pods_of(&self, namespace: &str, account: &str) -> Vec<PodFact> {
        let pod = self
            .pod
            .clone()
            .filter(|pod| namespace == "prod" && (pod.service_account == account || self.second));
        pod.into_iter().collect()
    }
    fn pod_at(&self, address: IpAddr) -> Option<(String, String)> {
        let stranger = self.stranger.filter(|(at, _)| *at == address);
        let own = self.address.filter(|own| *own == address).map(|_| "web");
        let account = stranger.map(|(_, account)| account).or(own)?;
        Some(("prod".into(), account.into()))
    }
    fn service_account(&self, namespace: &str, name: &str) -> Option<String> {
        self.account
            .clone()
            .filter(|_| namespace == "prod" && (name == "web" || self.second))
    }
    fn namespace_terminating(&self, _: &str) -> bool {
        self.terminating
    }
}

/// The offline check against that cluster.
struct Offline {
    keys: KeySet,
    policy: TokenPolicy,
    cluster: Arc<Mutex<Cluster>>,
}

impl Authenticate for Offline {
    async fn authenticate(&self, token: &str, now: Timestamp) -> Result<Caller, Denial> {
        let claims = verify(token, &self.keys, &self.policy, now)?;
        let cluster = self.cluster.lock().unwrap().clone();
        if cluster.review == Review::Hangs {
            std::future::pending::<()>().await;
        }
        if cluster.review == Review::Fails {
            return Err(Denial::by_review(CallerError::VerifierUnavailable(
                "no answer".into(),
            )));
        }
        Ok(bind(claims, &cluster, &mesh(), now)?)
    }

    fn renew(
        &self,
        shown: Shown,
        address: Option<IpAddr>,
        now: Timestamp,
    ) -> Result<Caller, CallerError> {
        alive(shown, address, &*self.cluster.lock().unwrap(), now)
    }

    fn is_node_proxy(&self, caller: &Caller) -> bool {
        self.cluster
            .lock()
            .unwrap()
            .node_proxies
            .list(&caller.identity)
    }

    fn impersonate(
        &self,
        caller: &Caller,
        target: &str,
        now: Timestamp,
    ) -> Result<SpiffeId, NotImpersonated> {
        let cluster = self.cluster.lock().unwrap();
        impersonate(
            caller,
            target,
            &cluster.node_proxies,
            "malha-system",
            &*cluster,
            now,
        )
    }
}

impl TokenIssuer {
    fn keys(&self) -> KeySet {
        let point = self.0.public_key_raw();
        let jwk = json!({ "kty": "EC", "crv": "P-256", "kid": "one",
            "x": URL_SAFE_NO_PAD.encode(&point[1..33]), "y": URL_SAFE_NO_PAD.encode(&point[33..]) });
        KeySet::parse(json!({ "keys": [jwk] }).to_string().as_bytes()).unwrap()
    }

    fn sign(&self, header: &Value, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(header), part(claims));
        let key = EncodingKey::from_ec_der(self.0.serialized_der());
        let signature =
            jsonwebtoken::crypto::sign(signed.as_bytes(), &key, Algorithm::ES256).unwrap();
        format!("{signed}.{signature}")
    }
}

fn mesh() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

/// Fast callers are another test's subject.
fn no_rates() -> Limits {
    let rate = Rate {
        per_second: 1_000_000,
        burst: 1_000_000,
    };
    Limits {
        per_pod: rate,
        per_account: rate,
        ..Limits::default()
    }
}

impl Scene {
    async fn new() -> Self {
        Self::with(no_rates()).await
    }

    async fn with(limits: Limits) -> Self {
        Self::at("2026-11-22T10:00:00Z".parse().unwrap(), limits).await
    }

    async fn at(now: Timestamp, limits: Limits) -> Self {
        let place = tempfile::tempdir().unwrap();
        let now = Arc::new(Mutex::new(now));
        let told = Arc::clone(&now);
        let clock = Clock::new(move || *told.lock().unwrap());
        let home = FileHome::new(Directory::open(place.path()).unwrap());
        let policy = RotationPolicy::default();
        let custody = Custody::open(
            home,
            policy.clone(),
            mesh(),
            clock.clone(),
            malha::custody::Metrics::default(),
        )
        .await
        .unwrap();
        let issuer = Arc::new(TokenIssuer(
            rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap(),
        ));
        let cluster = Arc::new(Mutex::new(Cluster {
            synced: true,
            pod: Some(PodFact {
                uid: "pod-1".into(),
                service_account: "web".into(),
                node: Some("node-1".into()),
                deletion: None,
                finished: false,
            }),
            account: Some("sa-1".into()),
            terminating: false,
            review: Review::NotAsked,
            address: None,
            stranger: None,
            node_proxies: NodeProxies::default(),
            second: false,
        }));
        let offline = Offline {
            keys: issuer.keys(),
            policy: TokenPolicy {
                issuer: ISSUER.into(),
                audiences: vec!["malha-ca".into()],
                require_bound_pod: true,
            },
            cluster: Arc::clone(&cluster),
        };
        let metrics = Metrics::default();
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        let gate = Gate::default();
        let current = Arc::clone(&custody);
        let signing = Signing::new(
            move || current.authority(),
            offline,
            policy.leaf,
            limits,
            clock,
            metrics,
        )
        .with_gate(gate.clone())
        .with_audit(Audit::new("test".into()))
        .with_cluster("Kubernetes".into());
        let router = router(Arc::new(signing));
        Self {
            place,
            custody,
            router,
            gate,
            registry,
            now,
            issuer,
            cluster,
        }
    }

    fn now(&self) -> Timestamp {
        *self.now.lock().unwrap()
    }

    fn later(&self, seconds: i64) {
        let mut now = self.now.lock().unwrap();
        *now = now.checked_add(SignedDuration::from_secs(seconds)).unwrap();
    }

    fn claims(&self) -> Value {
        let seconds = self.now().as_second();
        json!({
            "iss": ISSUER, "aud": ["malha-ca"], "sub": "system:serviceaccount:prod:web",
            "iat": seconds, "nbf": seconds, "exp": seconds + 3600, "jti": "3b1f",
            "kubernetes.io": {
                "namespace": "prod",
                "serviceaccount": { "name": "web", "uid": "sa-1" },
                "pod": { "name": "web-0", "uid": "pod-1" },
                "node": { "name": "node-1", "uid": "n-1" },
            },
        })
    }

    fn token(&self) -> String {
        self.issuer
            .sign(&json!({ "alg": "ES256", "kid": "one" }), &self.claims())
    }

    async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes().to_vec();
        let answer = Answer {
            status: head.status,
            headers: head.headers,
            body,
        };
        if answer.status.is_client_error() || answer.status.is_server_error() {
            answer.is_a_problem();
        }
        answer
    }

    async fn post(&self, token: &str, kind: &str, body: impl Into<Body>) -> Answer {
        let request = Request::post("/v1/certificates")
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .header(header::CONTENT_TYPE, kind)
            .body(body.into())
            .unwrap();
        self.send(request).await
    }

    async fn ask(&self, csr: &[u8]) -> Answer {
        let body = json!({ "csr": String::from_utf8(csr.to_vec()).unwrap() });
        self.post(&self.token(), "application/json", body.to_string())
            .await
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).unwrap();
        text
    }

    /// What is wrong with the chain in the eyes of somebody else.
    fn openssl_verify(&self, granted: &Value) {
        let path = |name: &str| self.place.path().join(name);
        let chain = text(&granted["certificate_chain"]);
        let (leaf, issuers) = chain.split_at(chain.find("-----END").unwrap() + 26);
        fs::write(path("leaf.pem"), leaf).unwrap();
        fs::write(path("issuers.pem"), issuers).unwrap();
        fs::write(path("roots.pem"), text(&granted["trust_bundle"])).unwrap();
        for purpose in ["sslclient", "sslserver"] {
            let out = Command::new("openssl")
                .args(["verify", "-x509_strict", "-purpose", purpose, "-CAfile"])
                .arg(path("roots.pem"))
                .arg("-untrusted")
                .arg(path("issuers.pem"))
                .args(["-attime", &self.now().as_second().to_string()])
                .arg(path("leaf.pem"))
                .output()
                .unwrap();
            assert!(
                out.status.success(),
                "{}",
                String::from_utf8_lossy(&out.stderr)
            );
        }
    }
}

#[derive(Debug)]
struct Answer {
    status: StatusCode,
    headers: axum::http::HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    fn header(&self, name: header::HeaderName) -> &str {
        self.headers
            .get(&name)
            .map_or("", |value| value.to_str().unwrap())
    }

    fn is_a_problem(&self) {
        assert_eq!(
            self.header(header::CONTENT_TYPE),
            "application/problem+json"
        );
        let problem = self.json();
        let code = text(&problem["code"]);
        assert_eq!(problem["status"], self.status.as_u16());
        assert_eq!(text(&problem["type"]), format!("urn:malha:problem:{code}"));
        assert!(!text(&problem["title"]).is_empty() && !text(&problem["detail"]).is_empty());
    }

    /// Status and code, such as `401 TokenExpired`; of a certificate only the status.
    fn verdict(&self) -> String {
        let status = self.status.as_u16();
        match self.json().get("code") {
            Some(code) => format!("{status} {}", text(code)),
            None => status.to_string(),
        }
    }
}

fn text(value: &Value) -> &str {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is no text"))
}

/// Runs `openssl` in a directory of its own, and gives what it wrote.
fn openssl(args: &[&str]) -> Vec<u8> {
    let out = Command::new("openssl")
        .args(args)
        .stdin(Stdio::null())
        .output();
    let out = out.expect("these tests make their CSRs with the program openssl");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "openssl {}: {said}", args.join(" "));
    out.stdout
}

static KEYS: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());

/// The file of a new private key.
fn key(name: &str, algorithm: &str, options: &[&str]) -> PathBuf {
    let path = KEYS.path().join(format!("{name}.pem"));
    let mut args = vec![
        "genpkey",
        "-algorithm",
        algorithm,
        "-out",
        path.to_str().unwrap(),
    ];
    options
        .iter()
        .for_each(|option| args.extend(["-pkeyopt", option]));
    openssl(&args);
    path
}

fn p256() -> &'static PathBuf {
    static KEY: LazyLock<PathBuf> =
        LazyLock::new(|| key("p256", "EC", &["ec_paramgen_curve:P-256"]));
    &KEY
}

fn rsa() -> &'static PathBuf {
    static KEY: LazyLock<PathBuf> = LazyLock::new(|| key("rsa", "RSA", &["rsa_keygen_bits:2048"]));
    &KEY
}

/// A CSR in PEM.
fn csr(key: &std::path::Path, options: &[&str]) -> Vec<u8> {
    let mut args = vec!["req", "-new", "-batch", "-key", key.to_str().unwrap()];
    if !options.contains(&"-subj") {
        args.extend(["-subj", "/"]);
    }
    args.extend(options);
    openssl(&args)
}

fn der(pem: &[u8]) -> Vec<u8> {
    let block = malha::ca::pem::parse(pem).unwrap();
    block.blocks[0].der.clone()
}

fn pem(label: &str, der: &[u8]) -> String {
    malha::ca::pem::encode(label, der)
}

/// What a leaf of `web` may hold, and nothing else.
fn is_the_leaf_of_web(granted: &Value, key_usage: &str) {
    assert_eq!(granted["spiffe_id"], WEB);
    let leaf = der(text(&granted["certificate_chain"]).as_bytes());
    let (rest, leaf) = X509Certificate::from_der(&leaf).unwrap();
    assert!(rest.is_empty());
    assert_eq!(leaf.subject().iter().count(), 0);
    assert_eq!(
        leaf.raw_serial_as_string().replace(':', ""),
        text(&granted["serial"])
    );
    let mut seen = BTreeSet::new();
    for extension in leaf.extensions() {
        let critical = if extension.critical { ", critical" } else { "" };
        seen.insert(match extension.parsed_extension() {
            ParsedExtension::SubjectAlternativeName(names) => {
                match names.general_names.as_slice() {
                    [GeneralName::URI(uri)] => format!("SAN {uri}{critical}"),
                    other => panic!("{other:?}"),
                }
            }
            ParsedExtension::BasicConstraints(constraints) => {
                format!(
                    "CA {} {:?}{critical}",
                    constraints.ca, constraints.path_len_constraint
                )
            }
            ParsedExtension::KeyUsage(usage) => format!("{usage}{critical}"),
            ParsedExtension::ExtendedKeyUsage(usage) => {
                let others = usage.any || usage.code_signing || !usage.other.is_empty();
                assert!(
                    usage.server_auth && usage.client_auth && !others,
                    "{usage:?}"
                );
                format!("server and client{critical}")
            }
            ParsedExtension::SubjectKeyIdentifier(_) => format!("SKI{critical}"),
            ParsedExtension::AuthorityKeyIdentifier(_) => format!("AKI{critical}"),
            other => panic!("{other:?}"),
        });
    }
    let want = [
        &format!("SAN {WEB}, critical"),
        "CA false None, critical",
        &format!("{key_usage}, critical"),
        "server and client",
        "SKI",
        "AKI",
    ];
    assert_eq!(seen, want.map(str::to_owned).into());
}

const SIGNS: &str = "Digital Signature";

#[tokio::test]
async fn a_csr_gives_a_key_and_nothing_else() {
    let scene = Scene::new().await;
    let p384 = key("p384", "EC", &["ec_paramgen_curve:P-384"]);
    let rsa4096 = key("rsa4096", "RSA", &["rsa_keygen_bits:4096"]);
    let foreign = "subjectAltName=URI:spiffe://cluster.local/ns/kube-system/sa/admin,DNS:malha.malha-system.svc,IP:10.0.0.1,email:a@b.c";
    let plain = String::from_utf8(csr(p256(), &[])).unwrap();
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("plain", plain.clone().into(), SIGNS),
        ("P-384", csr(&p384, &[]), SIGNS),
        (
            "RSA 2048",
            csr(rsa(), &[]),
            "Digital Signature, Key Encipherment",
        ),
        (
            "RSA 4096, SHA-512",
            csr(&rsa4096, &["-sha512"]),
            "Digital Signature, Key Encipherment",
        ),
        ("P-256, SHA-384", csr(p256(), &["-sha384"]), SIGNS),
        ("P-384, SHA-256", csr(&p384, &["-sha256"]), SIGNS),
        (
            "CA:TRUE",
            csr(
                p256(),
                &["-addext", "basicConstraints=critical,CA:TRUE,pathlen:3"],
            ),
            SIGNS,
        ),
        ("foreign names", csr(p256(), &["-addext", foreign]), SIGNS),
        (
            "usages of a CA",
            csr(
                p256(),
                &[
                    "-addext",
                    "keyUsage=critical,keyCertSign,cRLSign",
                    "-addext",
                    "extendedKeyUsage=codeSigning,anyExtendedKeyUsage",
                ],
            ),
            SIGNS,
        ),
        (
            "a subject",
            csr(p256(), &["-subj", "/O=system:masters/CN=kubernetes-admin"]),
            SIGNS,
        ),
        (
            "an unknown extension",
            csr(p256(), &["-addext", "1.2.3.4=critical,ASN1:UTF8String:x"]),
            SIGNS,
        ),
        (
            "a challenge password",
            {
                let config = KEYS.path().join("challenge.cnf");
                fs::write(&config, "[req]\ndistinguished_name=dn\nattributes=at\nprompt=no\n[dn]\nO=x\n[at]\nchallengePassword=secret\n").unwrap();
                openssl(&[
                    "req",
                    "-new",
                    "-key",
                    p256().to_str().unwrap(),
                    "-config",
                    config.to_str().unwrap(),
                ])
            },
            SIGNS,
        ),
        ("the old label", csr(p256(), &["-newhdr"]), SIGNS),
        ("words before it", csr(p256(), &["-text"]), SIGNS),
        (
            "lines of Windows",
            plain.replace('\n', "\r\n").into(),
            SIGNS,
        ),
        ("no last newline", plain.trim_end().into(), SIGNS),
        ("blanks after it", format!("{plain}\n \n").into(), SIGNS),
    ];
    for (case, csr, usage) in cases {
        let answer = scene.ask(csr).await;
        assert_eq!(
            answer.verdict(),
            "201",
            "{case}: {}",
            String::from_utf8_lossy(&answer.body)
        );
        is_the_leaf_of_web(&answer.json(), usage);
        scene.openssl_verify(&answer.json());
    }
    let metrics = scene.metrics();
    assert!(
        metrics.contains(r#"malha_ca_csr_total{result="issued",reason="New"} 17"#),
        "{metrics}"
    );
    assert!(
        metrics.contains("malha_ca_csr_surplus_total 6"),
        "{metrics}"
    );
    assert!(
        metrics.contains("malha_ca_issue_duration_seconds_count 17"),
        "{metrics}"
    );
    assert!(metrics.contains("malha_ca_queue_entries 0"), "{metrics}");
}

#[tokio::test]
async fn each_wrong_csr_has_its_code() {
    let scene = Scene::new().await;
    let good = csr(p256(), &[]);
    let good_der = der(&good);
    let label = "CERTIFICATE REQUEST";
    let curve = |name: &str| {
        csr(
            &key(name, "EC", &[&format!("ec_paramgen_curve:{name}")]),
            &[],
        )
    };
    let bits = |bits: u16, e: u32| {
        let options = [
            format!("rsa_keygen_bits:{bits}"),
            format!("rsa_keygen_pubexp:{e}"),
        ];
        csr(
            &key(
                &format!("rsa{bits}-{e}"),
                "RSA",
                &[&options[0], &options[1]],
            ),
            &[],
        )
    };
    let corrupted = {
        let mut der = good_der.clone();
        *der.last_mut().unwrap() ^= 1;
        pem(label, &der)
    };
    // the key of another, who did not sign
    let stolen = {
        let other = der(&csr(
            &key("victim", "EC", &["ec_paramgen_curve:P-256"]),
            &[],
        ));
        let spki = other
            .windows(2)
            .position(|two| two == [0x03, 0x42])
            .unwrap();
        let mut der = good_der.clone();
        der[spki..spki + 68].copy_from_slice(&other[spki..spki + 68]);
        pem(label, &der)
    };
    let many_names = format!(
        "subjectAltName={}",
        (0..900)
            .map(|n| format!("DNS:name-{n}.example.com"))
            .collect::<Vec<_>>()
            .join(",")
    );
    let explicit = key(
        "explicit",
        "EC",
        &["ec_paramgen_curve:P-256", "ec_param_enc:explicit"],
    );
    let twice = [good.clone(), good.clone()].concat();
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("P-521", curve("P-521"), "UnsupportedKey"),
        ("P-224", curve("P-224"), "UnsupportedKey"),
        ("secp256k1", curve("secp256k1"), "UnsupportedKey"),
        ("brainpool", curve("brainpoolP256r1"), "UnsupportedKey"),
        ("explicit parameters", csr(&explicit, &[]), "UnsupportedKey"),
        ("RSA 1024", bits(1024, 65537), "UnsupportedKey"),
        ("RSA 2047", bits(2047, 65537), "UnsupportedKey"),
        ("RSA with e = 3", bits(2048, 3), "UnsupportedKey"),
        (
            "RSA-PSS",
            csr(&key("pss", "RSA-PSS", &["rsa_keygen_bits:2048"]), &[]),
            "UnsupportedKey",
        ),
        (
            "Ed25519, not enabled",
            csr(&key("ed", "ED25519", &[]), &[]),
            "UnsupportedKey",
        ),
        (
            "Ed448",
            csr(&key("ed448", "ED448", &[]), &[]),
            "UnsupportedKey",
        ),
        (
            "X25519 cannot sign",
            pem(label, b"0\x03\x02\x01\x01").into(),
            "InvalidCsr",
        ),
        ("SHA-1", csr(p256(), &["-sha1"]), "BadProofOfPossession"),
        (
            "RSA and SHA-1",
            csr(rsa(), &["-sha1"]),
            "BadProofOfPossession",
        ),
        ("RSA and MD5", csr(rsa(), &["-md5"]), "BadProofOfPossession"),
        (
            "corrupted signature",
            corrupted.into(),
            "BadProofOfPossession",
        ),
        ("the key of another", stolen.into(), "BadProofOfPossession"),
        (
            "trailing bytes",
            pem(label, &[&good_der[..], b"\0"].concat()).into(),
            "InvalidCsr",
        ),
        (
            "half of it",
            pem(label, &good_der[..good_der.len() / 2]).into(),
            "InvalidCsr",
        ),
        ("nothing in it", pem(label, b"").into(), "InvalidCsr"),
        ("two blocks", twice, "InvalidPem"),
        (
            "text after it",
            [&good[..], b"hello"].concat(),
            "InvalidPem",
        ),
        (
            "another label",
            pem("CERTIFICATE", &good_der).into(),
            "InvalidPem",
        ),
        ("a private key", fs::read(p256()).unwrap(), "InvalidPem"),
        ("no end", good[..good.len() - 30].to_vec(), "InvalidPem"),
        (
            "not base64",
            b"-----BEGIN CERTIFICATE REQUEST-----\n!!!!\n-----END CERTIFICATE REQUEST-----\n"
                .to_vec(),
            "InvalidPem",
        ),
        ("empty", vec![], "InvalidPem"),
        ("words", b"hello".to_vec(), "InvalidPem"),
        (
            "oversized",
            csr(p256(), &["-addext", &many_names]),
            "CsrTooLarge",
        ),
    ];
    for (case, csr, code) in cases {
        let answer = scene.ask(csr).await;
        assert_eq!(answer.verdict(), format!("400 {code}"), "{case}");
        scene.agrees(&scene.token(), csr, &answer, case).await;
    }
    assert!(!scene.metrics().contains(r#"result="issued""#));
}

#[tokio::test]
async fn a_csr_may_come_by_itself_as_der_or_as_pem() {
    let scene = Scene::new().await;
    let good = csr(p256(), &[]);
    for kind in ["application/pkcs10", "Application/PKCS10; charset=binary"] {
        for body in [good.clone(), der(&good)] {
            let answer = scene.post(&scene.token(), kind, body).await;
            assert_eq!(answer.verdict(), "201");
            is_the_leaf_of_web(&answer.json(), SIGNS);
        }
    }
    let trailing = [der(&good), vec![0]].concat();
    let answer = scene
        .post(&scene.token(), "application/pkcs10", trailing)
        .await;
    assert_eq!(answer.verdict(), "400 InvalidCsr");
    let answer = scene.post(&scene.token(), "application/pkcs10", "").await;
    assert_eq!(answer.verdict(), "400 InvalidPem");
}

#[tokio::test]
async fn each_wrong_request_has_its_code() {
    let scene = Scene::new().await;
    let token = scene.token();
    let good = String::from_utf8(csr(p256(), &[])).unwrap();
    let json_with = |more: Value| {
        let mut body = json!({ "csr": good });
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        body.to_string()
    };
    let long = json_with(json!({ "csr": "A".repeat(70_000) }));
    let cases: &[(&str, &str, String, &str)] = &[
        (
            "no JSON",
            "application/json",
            "hello".into(),
            "400 BadRequest",
        ),
        (
            "nothing",
            "application/json",
            String::new(),
            "400 BadRequest",
        ),
        ("a list", "application/json", "[]".into(), "400 BadRequest"),
        ("no csr", "application/json", "{}".into(), "400 BadRequest"),
        (
            "csr a number",
            "application/json",
            r#"{"csr":7}"#.into(),
            "400 BadRequest",
        ),
        (
            "twice",
            "application/json",
            format!(r#"{{"csr":"","csr":{}}}"#, json!(good)),
            "400 BadRequest",
        ),
        (
            "two documents",
            "application/json",
            json_with(json!({})) + "{}",
            "400 BadRequest",
        ),
        (
            "a misspelt field",
            "application/json",
            json_with(json!({ "ttl": 60 })),
            "400 BadRequest",
        ),
        (
            "deep",
            "application/json",
            "[".repeat(60_000),
            "400 BadRequest",
        ),
        (
            "ttl a text",
            "application/json",
            json_with(json!({ "ttl_seconds": "1h" })),
            "400 BadRequest",
        ),
        (
            "ttl zero",
            "application/json",
            json_with(json!({ "ttl_seconds": 0 })),
            "400 TtlOutOfRange",
        ),
        (
            "ttl below",
            "application/json",
            json_with(json!({ "ttl_seconds": 299 })),
            "400 TtlOutOfRange",
        ),
        (
            "ttl above",
            "application/json",
            json_with(json!({ "ttl_seconds": 7 * 24 * 3600 + 1 })),
            "400 TtlOutOfRange",
        ),
        (
            "ttl negative",
            "application/json",
            json_with(json!({ "ttl_seconds": -1 })),
            "400 TtlOutOfRange",
        ),
        (
            "ttl a fraction",
            "application/json",
            json_with(json!({ "ttl_seconds": 600.5 })),
            "400 TtlOutOfRange",
        ),
        (
            "ttl huge",
            "application/json",
            json_with(json!({ "ttl_seconds": u64::MAX })),
            "400 TtlOutOfRange",
        ),
        (
            "ttl beyond",
            "application/json",
            json_with(json!({})).replace('}', r#","ttl_seconds":1e40}"#),
            "400 TtlOutOfRange",
        ),
        (
            "a form",
            "application/x-www-form-urlencoded",
            good.clone(),
            "415 UnsupportedMediaType",
        ),
        ("nothing said", "", good.clone(), "415 UnsupportedMediaType"),
        (
            "too long",
            "application/json",
            long.clone(),
            "400 CsrTooLarge",
        ),
        (
            "too long by itself",
            "application/pkcs10",
            long,
            "400 CsrTooLarge",
        ),
    ];
    for (case, kind, body, want) in cases {
        let answer = scene.post(&token, kind, body.clone()).await;
        assert_eq!(answer.verdict(), *want, "{case}");
    }
    assert!(!scene.metrics().contains(r#"result="issued""#));
}

#[tokio::test]
async fn other_paths_and_methods_are_told_what_there_is() {
    let scene = Scene::new().await;
    let cases = [
        ("GET", "/v1/certificates", "405 MethodNotAllowed", "POST"),
        ("DELETE", "/v1/certificates", "405 MethodNotAllowed", "POST"),
        ("POST", "/v1/bundle", "405 MethodNotAllowed", "GET,HEAD"),
        ("GET", "/", "404 NotFound", ""),
        ("POST", "/v1/certificates/", "404 NotFound", ""),
        ("POST", "/v1/%63ertificates/..", "404 NotFound", ""),
        ("GET", "/metrics", "404 NotFound", ""),
    ];
    for (method, path, want, allow) in cases {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .body(Body::empty())
            .unwrap();
        let answer = scene.send(request).await;
        assert_eq!(answer.verdict(), want, "{method} {path}");
        assert_eq!(answer.header(header::ALLOW), allow, "{method} {path}");
    }
}

#[tokio::test]
async fn the_bundle_is_for_everybody() {
    let scene = Scene::new().await;
    let answer = scene
        .send(Request::get("/v1/bundle").body(Body::empty()).unwrap())
        .await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(
        answer.header(header::CONTENT_TYPE),
        "application/pem-certificate-chain"
    );
    let pem = String::from_utf8(answer.body).unwrap();
    assert_eq!(pem, scene.custody.authority().bundle().to_pem());
    assert!(pem.ends_with("-----END CERTIFICATE-----\n"));
}

#[tokio::test]
async fn each_wrong_token_has_its_code() {
    type Spoil = fn(&Scene, &mut Value, &mut Value);
    fn pod(scene: &Scene, change: impl FnOnce(&mut PodFact)) {
        change(scene.cluster.lock().unwrap().pod.as_mut().unwrap());
    }
    let cases: &[(&str, Spoil, &str)] = &[
        (
            "wrong audience",
            |_, _, c| c["aud"] = json!(["api"]),
            "401 AudienceMismatch",
        ),
        (
            "no audience",
            |_, _, c| c["aud"] = Value::Null,
            "401 AudienceMismatch",
        ),
        (
            "expired",
            |s, _, c| c["exp"] = json!(s.now().as_second() - 60),
            "401 TokenExpired",
        ),
        (
            "not yet valid",
            |s, _, c| c["nbf"] = json!(s.now().as_second() + 61),
            "401 TokenNotYetValid",
        ),
        (
            "other issuer",
            |_, _, c| c["iss"] = json!("https://other"),
            "401 UnknownIssuer",
        ),
        (
            "other issuer's key",
            |_, h, c| {
                c["iss"] = json!("https://other");
                h["kid"] = json!("theirs");
            },
            "401 UnknownIssuer",
        ),
        (
            "unknown key",
            |_, h, _| h["kid"] = json!("two"),
            "401 TokenInvalid",
        ),
        (
            "alg none",
            |_, h, _| h["alg"] = json!("none"),
            "401 TokenInvalid",
        ),
        (
            "alg HS256",
            |_, h, _| h["alg"] = json!("HS256"),
            "401 TokenInvalid",
        ),
        (
            "alg of another key type",
            |_, h, _| h["alg"] = json!("RS256"),
            "401 TokenInvalid",
        ),
        (
            "no bound pod",
            |_, _, c| c["kubernetes.io"]["pod"] = Value::Null,
            "401 NotBound",
        ),
        (
            "a legacy token",
            |_, _, c| {
                *c = json!({ "iss": "kubernetes/serviceaccount", "sub": "system:serviceaccount:prod:web",
                "kubernetes.io/serviceaccount/namespace": "prod" });
            },
            "401 UnknownIssuer",
        ),
        (
            "subject of another",
            |_, _, c| c["sub"] = json!("system:serviceaccount:prod:db"),
            "401 IdentityConflict",
        ),
        (
            "subject of another namespace",
            |_, _, c| c["sub"] = json!("system:serviceaccount:dev:web"),
            "401 IdentityConflict",
        ),
        (
            "a user",
            |_, _, c| c["sub"] = json!("kubernetes-admin"),
            "401 TokenInvalid",
        ),
        (
            "deleted pod",
            |s, _, _| s.cluster.lock().unwrap().pod = None,
            "401 CallerGone",
        ),
        (
            "pod made anew",
            |s, _, _| pod(s, |p| p.uid = "pod-2".into()),
            "401 CallerGone",
        ),
        (
            "pod of another account",
            |s, _, _| pod(s, |p| p.service_account = "db".into()),
            "401 IdentityConflict",
        ),
        (
            "wrong node",
            |s, _, _| pod(s, |p| p.node = Some("node-2".into())),
            "401 CallerGone",
        ),
        (
            "pod deleted long ago",
            |s, _, _| {
                let deleted = s.now();
                pod(s, |p| p.deletion = Some(deleted));
                s.later(61);
            },
            "401 CallerGone",
        ),
        (
            "account made anew",
            |s, _, _| s.cluster.lock().unwrap().account = Some("sa-2".into()),
            "401 CallerGone",
        ),
        (
            "account deleted",
            |s, _, _| s.cluster.lock().unwrap().account = None,
            "401 CallerGone",
        ),
        (
            "namespace terminating",
            |s, _, _| s.cluster.lock().unwrap().terminating = true,
            "401 CallerGone",
        ),
        (
            "lists not there",
            |s, _, _| s.cluster.lock().unwrap().synced = false,
            "503 VerifierUnavailable",
        ),
        (
            "review fails",
            |s, _, _| s.cluster.lock().unwrap().review = Review::Fails,
            "503 VerifierUnavailable",
        ),
    ];
    let good = csr(p256(), &["-addext", &format!("subjectAltName=URI:{WEB}")]);
    for (case, spoil, want) in cases {
        let scene = Scene::new().await;
        let (mut header, mut claims) = (json!({ "alg": "ES256", "kid": "one" }), scene.claims());
        spoil(&scene, &mut header, &mut claims);
        let token = scene.issuer.sign(&header, &claims);
        let answer = scene.post(&token, "application/pkcs10", good.clone()).await;
        assert_eq!(answer.verdict(), *want, "{case}");
        let denied = want.starts_with("401");
        assert_eq!(
            answer
                .header(header::WWW_AUTHENTICATE)
                .starts_with("Bearer"),
            denied,
            "{case}"
        );
        assert_eq!(
            answer.header(header::RETRY_AFTER).is_empty(),
            denied,
            "{case}"
        );
        let metrics = scene.metrics();
        let (result, method) = match *case {
            "review fails" => ("error", "tokenreview"),
            "lists not there" => ("error", "jwks"),
            _ => ("denied", "jwks"),
        };
        let counted =
            format!("malha_ca_token_validation_total{{method=\"{method}\",result=\"{result}\"}} 1");
        assert!(metrics.contains(&counted), "{case}: {metrics}");
        assert!(!metrics.contains("issued"), "{case}: {metrics}");
        scene.agrees(&token, &good, &answer, case).await;
    }
}

#[tokio::test]
async fn a_forged_token_is_nobodys() {
    let scene = Scene::new().await;
    let good = csr(p256(), &[]);
    let forger = TokenIssuer(rcgen::KeyPair::generate().unwrap());
    let header = json!({ "alg": "ES256", "kid": "one" });
    let (real, forged) = (scene.token(), forger.sign(&header, &scene.claims()));
    let (signed, signature) = real.rsplit_once('.').unwrap();
    let admin = {
        let mut claims = scene.claims();
        claims["sub"] = json!("system:serviceaccount:kube-system:admin");
        let payload = URL_SAFE_NO_PAD.encode(claims.to_string());
        let (header, _) = signed.split_once('.').unwrap();
        format!("{header}.{payload}.{signature}")
    };
    let hmac = {
        let secret = EncodingKey::from_secret(scene.issuer.0.public_key_pem().as_bytes());
        let header = jsonwebtoken::Header {
            kid: Some("one".into()),
            ..jsonwebtoken::Header::new(Algorithm::HS256)
        };
        jsonwebtoken::encode(&header, &scene.claims(), &secret).unwrap()
    };
    for token in [
        forged,
        admin,
        hmac,
        format!("{signed}."),
        "x".into(),
        "A".repeat(17_000),
    ] {
        let answer = scene.post(&token, "application/pkcs10", good.clone()).await;
        assert_eq!(answer.verdict(), "401 TokenInvalid", "{token:.60}");
        assert_eq!(answer.json()["detail"], "caller could not be authenticated");
        scene.agrees(&token, &good, &answer, "forged").await;
    }
}

#[tokio::test]
async fn a_credential_is_one_bearer_token() {
    let scene = Scene::new().await;
    let token = scene.token();
    let good = csr(p256(), &[]);
    let with = |values: &[&str]| {
        let mut request =
            Request::post("/v1/certificates").header(header::CONTENT_TYPE, "application/pkcs10");
        for value in values {
            request = request.header(header::AUTHORIZATION, *value);
        }
        request.body(Body::from(good.clone())).unwrap()
    };
    let bearer = format!("Bearer {token}");
    let cases: &[(&[&str], &str)] = &[
        (&[], "401 NoCredential"),
        (&["Basic dTpw"], "401 NoCredential"),
        (&[&token], "401 NoCredential"),
        (&["Bearer"], "401 NoCredential"),
        (&[&bearer, &bearer], "401 TokenInvalid"),
        (&[&format!("{bearer} x")], "401 TokenInvalid"),
        (&[&format!("bearer  {token}")], "201"),
        (&[&bearer], "201"),
    ];
    for (values, want) in cases {
        let answer = scene.send(with(values)).await;
        assert_eq!(answer.verdict(), *want, "{values:.20?}");
    }
}

#[tokio::test]
async fn a_body_is_not_read_before_its_sender_is_known() {
    let scene = Scene::new().await;
    let body = Body::from_stream(futures::stream::pending::<Result<Vec<u8>, std::io::Error>>());
    let answer = scene.post("nobody", "application/json", body).await;
    assert_eq!(answer.verdict(), "401 TokenInvalid");
}

#[tokio::test]
async fn a_life_is_what_was_asked_but_for_a_tenth_and_renewal_is_due_at_half() {
    let scene = Scene::new().await;
    let body = json!({ "csr": String::from_utf8(csr(p256(), &[])).unwrap(), "ttl_seconds": 3600 });
    let mut lives = BTreeSet::new();
    for round in 0..20 {
        // each a request of its own
        let mut claims = scene.claims();
        claims["jti"] = json!(round.to_string());
        let token = scene
            .issuer
            .sign(&json!({ "alg": "ES256", "kid": "one" }), &claims);
        let answer = scene
            .post(&token, "application/json", body.to_string())
            .await
            .json();
        let at = |name: &str| text(&answer[name]).parse::<Timestamp>().unwrap();
        let now = scene.now();
        assert_eq!(now.duration_since(at("not_before")).as_secs(), 300);
        let life = at("not_after").duration_since(now).as_secs();
        assert!((3240..=3600).contains(&life), "{life}");
        let renewal = at("renew_at").duration_since(now).as_secs();
        assert!(
            (life * 45 / 100..=life * 55 / 100 + 1).contains(&renewal),
            "{renewal} of {life}"
        );
        lives.insert(life);
    }
    assert!(lives.len() > 10, "no jitter: {lives:?}");

    let shortest = json!({ "csr": body["csr"], "ttl_seconds": 300 });
    let answer = scene
        .post(&scene.token(), "application/json", shortest.to_string())
        .await
        .json();
    let not_after: Timestamp = text(&answer["not_after"]).parse().unwrap();
    assert_eq!(
        not_after.duration_since(scene.now()).as_secs(),
        300,
        "never below the minimum"
    );
}

#[tokio::test]
async fn a_repeated_request_gets_the_same_certificate_and_another_one_another() {
    let scene = Scene::new().await;
    let (token, one) = (scene.token(), csr(p256(), &[]));
    let first = scene
        .post(&token, "application/pkcs10", one.clone())
        .await
        .json();
    let again = scene
        .post(&token, "application/pkcs10", one.clone())
        .await
        .json();
    assert_eq!(first, again);

    let other_csr = csr(p256(), &["-sha384"]);
    let other_life =
        json!({ "csr": String::from_utf8(one.clone()).unwrap(), "ttl_seconds": 600 }).to_string();
    scene.later(1);
    let other_token = scene.token();
    let mut serials = BTreeSet::from([first["serial"].to_string()]);
    for answer in [
        scene.post(&token, "application/pkcs10", other_csr).await,
        scene.post(&token, "application/json", other_life).await,
        scene
            .post(&other_token, "application/pkcs10", one.clone())
            .await,
    ] {
        assert!(serials.insert(answer.json()["serial"].to_string()));
    }
    // whoever is gone by now gets nothing of what was remembered
    scene.cluster.lock().unwrap().pod = None;
    let answer = scene.post(&token, "application/pkcs10", one).await;
    assert_eq!(answer.verdict(), "401 CallerGone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_thousand_identical_requests_at_once_are_one_issuance() {
    let scene = Arc::new(Scene::new().await);
    let (token, csr) = (scene.token(), csr(p256(), &[]));
    let tasks: Vec<_> = (0..1000)
        .map(|_| {
            let (scene, token, csr) = (Arc::clone(&scene), token.clone(), csr.clone());
            tokio::spawn(async move {
                let answer = scene.post(&token, "application/pkcs10", csr).await;
                assert_eq!(answer.verdict(), "201");
                answer.json()["serial"].to_string()
            })
        })
        .collect();
    let mut serials = BTreeSet::new();
    for task in tasks {
        serials.insert(task.await.unwrap());
    }
    assert_eq!(serials.len(), 1);
    let metrics = scene.metrics();
    assert!(
        metrics.contains(r#"{result="issued",reason="New"} 1"#),
        "{metrics}"
    );
    assert!(
        metrics.contains(r#"{result="issued",reason="Repeated"} 999"#),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_noisy_pod_is_stopped_and_its_neighbour_is_not() {
    let scene = Scene::with(Limits::default()).await;
    let good = csr(p256(), &[]);
    let mut verdicts = Vec::new();
    for _ in 0..12 {
        let answer = scene.ask(&good).await;
        if answer.status == StatusCode::TOO_MANY_REQUESTS {
            assert_eq!(answer.header(header::RETRY_AFTER), "1");
        }
        verdicts.push(answer.verdict());
    }
    assert_eq!(verdicts[..10], vec!["201"; 10]);
    assert_eq!(verdicts[10..], vec!["429 RateLimited"; 2]);
    scene.cluster.lock().unwrap().pod.as_mut().unwrap().uid = "pod-2".into();
    let mut claims = scene.claims();
    claims["kubernetes.io"]["pod"]["uid"] = json!("pod-2");
    let token = scene
        .issuer
        .sign(&json!({ "alg": "ES256", "kid": "one" }), &claims);
    let answer = scene.post(&token, "application/pkcs10", good).await;
    assert_eq!(answer.verdict(), "201");
}

#[tokio::test]
async fn replicas_share_what_their_service_account_may_ask() {
    let rate = Rate {
        per_second: 1,
        burst: 2,
    };
    let scene = Scene::with(Limits {
        per_account: rate,
        ..no_rates()
    })
    .await;
    let good = csr(p256(), &[]);
    let mut verdicts = Vec::new();
    for _ in 0..3 {
        verdicts.push(scene.ask(&good).await.verdict());
    }
    assert_eq!(verdicts, ["201", "201", "429 RateLimited"]);
}

#[tokio::test]
async fn a_full_queue_sheds_and_an_abandoned_place_is_free_at_once() {
    let scene = Arc::new(
        Scene::with(Limits {
            entries: 2,
            ..no_rates()
        })
        .await,
    );
    let good = csr(p256(), &[]);
    // two callers that send no body
    let slow: Vec<_> = (0..2)
        .map(|_| {
            let scene = Arc::clone(&scene);
            let body =
                Body::from_stream(futures::stream::pending::<Result<Vec<u8>, std::io::Error>>());
            tokio::spawn(async move {
                scene
                    .post(&scene.token(), "application/json", body)
                    .await
                    .verdict()
            })
        })
        .collect();
    while !scene.metrics().contains("malha_ca_queue_entries 2") {
        tokio::task::yield_now().await;
    }
    let answer = scene.ask(&good).await;
    assert_eq!(answer.verdict(), "429 QueueFull");
    assert_eq!(answer.header(header::RETRY_AFTER), "1");
    scene.agrees(&scene.token(), &good, &answer, "full").await;
    slow.into_iter().for_each(|task| task.abort());
    while !scene.metrics().contains("malha_ca_queue_entries 0") {
        tokio::task::yield_now().await;
    }
    assert_eq!(scene.ask(&good).await.verdict(), "201");
}

#[tokio::test]
async fn an_api_server_that_hangs_is_unavailable_and_not_the_callers_fault() {
    let scene = Scene::with(Limits {
        patience: Duration::from_millis(100),
        ..no_rates()
    })
    .await;
    scene.cluster.lock().unwrap().review = Review::Hangs;
    let good = csr(p256(), &[]);
    let answer = scene.ask(&good).await;
    assert_eq!(answer.verdict(), "503 VerifierUnavailable");
    scene.agrees(&scene.token(), &good, &answer, "hangs").await;
    assert!(scene.metrics().contains("malha_ca_queue_entries 0"));
}

#[tokio::test]
async fn a_closed_gate_is_unavailable_and_opens_again() {
    let scene = Scene::new().await;
    let good = csr(p256(), &[]);
    scene
        .gate
        .set(Some(Fault::ClockJump("the clock jumped by 3600 s".into())));
    let answer = scene.ask(&good).await;
    assert_eq!(answer.verdict(), "503 ClockJump");
    assert!(!answer.header(header::RETRY_AFTER).is_empty());
    scene.agrees(&scene.token(), &good, &answer, "jump").await;
    scene.gate.set(None);
    assert_eq!(scene.ask(&good).await.verdict(), "201");
    scene.gate.drain();
    let answer = scene.ask(&good).await;
    assert_eq!(answer.verdict(), "503 Draining");
    scene.agrees(&scene.token(), &good, &answer, "drain").await;
    // who only wants to know whom to trust is not sent away
    let answer = scene
        .send(Request::get("/v1/bundle").body(Body::empty()).unwrap())
        .await;
    assert_eq!(answer.status, StatusCode::OK);
}

#[tokio::test]
async fn a_clock_behind_the_journal_and_an_issuer_near_its_end_sign_nothing() {
    let scene = Scene::new().await;
    let good = csr(p256(), &[]);
    let ask = async |want: &str| {
        let answer = scene.ask(&good).await;
        assert_eq!(answer.verdict(), want);
        scene.agrees(&scene.token(), &good, &answer, want).await;
    };
    scene.later(-3600);
    ask("503 ClockJump").await;
    scene.later(3600 + 30 * 24 * 3600 - 60);
    ask("503 JournalStale").await;
    scene.custody.refresh().await.unwrap();
    ask("503 IssuerExpiring").await;
}

#[tokio::test]
async fn serials_are_unique_and_no_leaf_outlives_its_issuer() {
    let scene = Scene::new().await;
    let good = csr(p256(), &[]);
    // a few hours before the intermediate's end, 24 h leaves are cut to it
    scene.later(30 * 24 * 3600 - 4 * 3600);
    scene.custody.refresh().await.unwrap();
    let mut serials = BTreeSet::new();
    for round in 0..500 {
        let mut claims = scene.claims();
        claims["jti"] = json!(round.to_string());
        let token = scene
            .issuer
            .sign(&json!({ "alg": "ES256", "kid": "one" }), &claims);
        let answer = scene
            .post(&token, "application/pkcs10", good.clone())
            .await
            .json();
        assert!(
            serials.insert(text(&answer["serial"]).to_owned()),
            "{answer}"
        );
        let not_after: Timestamp = text(&answer["not_after"]).parse().unwrap();
        assert!(not_after <= scene.custody.authority().issuer_validity().not_after);
    }
}

#[tokio::test]
async fn every_answer_is_on_record_and_holds_no_secret() {
    let (log, _guard) = captured();
    let scene = Scene::new().await;
    let good = csr(p256(), &[]);
    let token = scene.token();
    let request = |token: &str| {
        let mut request = Request::post("/v1/certificates")
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .header(header::CONTENT_TYPE, "application/pkcs10")
            .body(Body::from(good.clone()))
            .unwrap();
        let peer: SocketAddr = "10.0.0.7:4711".parse().unwrap();
        request.extensions_mut().insert(ConnectInfo(peer));
        request
    };
    let granted = scene.send(request(&token)).await.json();
    scene.send(request(&token)).await;
    let mut claims = scene.claims();
    claims["iss"] = json!("\u{1b}[2Jforged\u{202e}\n{");
    let stranger = scene
        .issuer
        .sign(&json!({ "alg": "ES256", "kid": "\u{1b}" }), &claims);
    scene.send(request(&stranger)).await;
    scene.cluster.lock().unwrap().pod = None;
    scene.send(request(&token)).await;

    let log = String::from_utf8(log.lock().unwrap().clone()).unwrap();
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(verify_chain(lines.iter().copied()), Ok(4), "{log}");
    let records: Vec<Value> = lines
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(records.iter().all(|r| r["target"] == "audit"), "{log}");
    let verdicts: Vec<_> = records
        .iter()
        .map(|r| (text(&r["result"]), text(&r["code"])))
        .collect();
    let want = [
        ("issued", "New"),
        ("issued", "Repeated"),
        ("denied", "UnknownIssuer"),
        ("denied", "CallerGone"),
    ];
    assert_eq!(verdicts, want);
    let issued = &records[0];
    assert_eq!(issued["spiffe_id"], WEB);
    assert_eq!(issued["serial"], granted["serial"]);
    assert_eq!(issued["not_after"], granted["not_after"]);
    assert_eq!(issued["pod"], json!({ "name": "web-0", "uid": "pod-1" }));
    assert_eq!(issued["node"], json!({ "name": "node-1", "uid": "n-1" }));
    assert_eq!(
        (text(&issued["token_id"]), text(&issued["method"])),
        ("3b1f", "jwks")
    );
    assert_eq!(issued["peer"], "10.0.0.7:4711");
    assert_eq!(
        text(&issued["issuer_key_id"]),
        scene.custody.authority().issuer_key_id().to_string()
    );
    let (_, signature) = token.rsplit_once('.').unwrap();
    assert!(!log.contains(signature) && !log.contains("PRIVATE"));
    assert!(!log.contains(['\u{1b}', '\u{202e}']), "{log:?}");
}

#[tokio::test]
async fn a_key_under_two_identities_is_marked() {
    let (log, _guard) = captured();
    let scene = Scene::new().await;
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open(place.path()).unwrap();
    let maker = TokenMaker::open(&directory, mesh()).unwrap();
    let tokens = LocalTokens::open(&directory, mesh()).unwrap();
    let (custody, now) = (Arc::clone(&scene.custody), scene.now());
    let signing = Signing::new(
        move || custody.authority(),
        tokens,
        RotationPolicy::default().leaf,
        Limits::default(),
        Clock::new(move || now),
        Metrics::default(),
    );
    let router = router(Arc::new(signing));
    for account in ["web", "web", "db"] {
        let token = maker
            .mint("prod", account, Duration::from_secs(60), now)
            .unwrap();
        let request = Request::post("/v1/certificates")
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .header(header::CONTENT_TYPE, "application/pkcs10")
            .body(Body::from(csr(p256(), &[])))
            .unwrap();
        assert_eq!(
            router.clone().oneshot(request).await.unwrap().status(),
            StatusCode::CREATED
        );
    }
    let log = String::from_utf8(log.lock().unwrap().clone()).unwrap();
    let marked: Vec<bool> = log
        .lines()
        .map(|line| line.contains("\"key_of_another\":true"))
        .collect();
    assert_eq!(marked, [false, false, true]);
}

/// What this thread logs on the target `audit`.
fn captured() -> (Arc<Mutex<Vec<u8>>>, tracing::subscriber::DefaultGuard) {
    #[derive(Clone)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = Arc::new(Mutex::new(Vec::new()));
    let buffer = Buffer(Arc::clone(&log));
    let subscriber = tracing_subscriber::fmt()
        .with_writer(move || buffer.clone())
        .with_env_filter("audit=info")
        .without_time()
        .with_level(false)
        .with_target(false)
        .with_ansi(false)
        .finish();
    // tracing asks the thread that first meets a callsite; without a subscriber there it would be off for all threads
    static LISTENING: std::sync::Once = std::sync::Once::new();
    LISTENING.call_once(|| {
        let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry());
    });
    (log, tracing::subscriber::set_default(subscriber))
}

/// The endpoint behind a real listener, with the certificate that the control plane gives itself.
async fn serving() -> (Scene, SocketAddr, CancellationToken) {
    // programs of others have no other clock
    let now = malha::runtime::clock::system().now();
    let scene = Scene::at(now, no_rates()).await;
    let stop = CancellationToken::new();
    let (keyed, certificates) = watch::channel(None);
    let serving = ServingCertificate::new();
    let control_plane = Profile::ControlPlane {
        id: SpiffeId::new(&mesh(), "malha-system", "malha").unwrap(),
        dns_names: vec!["malha.malha-system.svc".into()],
    };
    let clock = Clock::new(move || now);
    let custody = Arc::clone(&scene.custody);
    tokio::spawn(keep_serving(
        custody,
        control_plane,
        clock,
        keyed,
        stop.clone(),
    ));
    tokio::spawn(Arc::clone(&serving).follow(certificates, stop.clone()));
    let loopback = "127.0.0.1:0".parse().unwrap();
    let clients = ClientTrust::new();
    clients.publish(scene.custody.authority().bundle()).unwrap();
    let listener = Bound::asking(loopback, serving, clients, malha::tls::Limits::default())
        .await
        .unwrap();
    let addr = listener.local_addr();
    tokio::spawn(listener.serve(scene.router.clone(), stop.clone()));
    (scene, addr, stop)
}

/// As users do it: the certificate authority's own certificate, curl over HTTP/2 and HTTP/1.1, nothing below TLS 1.3.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_gets_a_certificate_over_tls_13_and_older_versions_nothing() {
    let (scene, addr, stop) = serving().await;
    let path = |name: &str| scene.place.path().join(name).display().to_string();
    fs::write(
        path("roots.pem"),
        scene.custody.authority().bundle().to_pem(),
    )
    .unwrap();
    fs::write(path("web.csr"), csr(p256(), &[])).unwrap();
    let connect_to = format!("malha.malha-system.svc:443:{addr}");
    let roots = path("roots.pem");
    let token = format!("Authorization: Bearer {}", scene.token());
    let body = format!("@{}", path("web.csr"));
    let common = [
        "-sS",
        "--max-time",
        "20",
        "--cacert",
        &roots,
        "--connect-to",
        &connect_to,
    ];
    let curl = |args: &[&str]| {
        let url = "https://malha.malha-system.svc/v1";
        let args: Vec<String> = args.iter().map(|arg| arg.replace("URL", url)).collect();
        tokio::process::Command::new("curl")
            .args(common)
            .args(args)
            .output()
    };
    for (version, want) in [("--http2", "201 2"), ("--http1.1", "201 1.1")] {
        let kind = "Content-Type: application/pkcs10";
        let report = "\n%{http_code} %{http_version}";
        let args = [
            version,
            "-H",
            &token,
            "-H",
            kind,
            "--data-binary",
            &body,
            "-w",
            report,
        ];
        let out = curl(&[&args[..], &["URL/certificates"]].concat())
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        let fault = String::from_utf8_lossy(&out.stderr);
        let (answer, status) = said.rsplit_once('\n').unwrap_or_else(|| panic!("{fault}"));
        assert_eq!(status, want, "{said} {fault}");
        let granted: Value = serde_json::from_str(answer).unwrap();
        is_the_leaf_of_web(&granted, SIGNS);
        scene.openssl_verify(&granted);
    }
    // whoever is still busy with its body hears the refusal all the same
    for bytes in [100, 60_000, 3 << 20] {
        fs::write(path("body"), "A".repeat(bytes)).unwrap();
        let body = format!("@{}", path("body"));
        for version in ["--http2", "--http1.1"] {
            for (credential, want) in [(token.as_str(), "400"), ("X-None: 1", "401")] {
                let kind = "Content-Type: application/json";
                let args = [
                    version,
                    "-H",
                    credential,
                    "-H",
                    kind,
                    "--data-binary",
                    &body,
                ];
                let more = ["-o", "/dev/null", "-w", "%{http_code}", "URL/certificates"];
                for _ in 0..5 {
                    let out = curl(&[&args[..], &more].concat()).await.unwrap();
                    let fault = String::from_utf8_lossy(&out.stderr);
                    let said = String::from_utf8_lossy(&out.stdout);
                    assert_eq!(said, want, "{bytes} bytes, {version}: {fault}");
                }
            }
        }
    }
    let out = curl(&[
        "--data-binary",
        &body,
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "URL/nothing",
    ]);
    assert_eq!(String::from_utf8_lossy(&out.await.unwrap().stdout), "404");
    let out = curl(&["--tls-max", "1.2", "URL/bundle"]).await.unwrap();
    assert_eq!(out.status.code(), Some(35), "a handshake that fails");
    let out = tokio::process::Command::new("openssl")
        .args(["s_client", "-connect", &addr.to_string(), "-CAfile", &roots])
        .args([
            "-verify_return_error",
            "-verify_hostname",
            "malha.malha-system.svc",
        ])
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(
        said.contains("TLSv1.3") && said.contains("Verify return code: 0 (ok)"),
        "{said}"
    );
    stop.cancel();
}

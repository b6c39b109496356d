//! The same endpoint over gRPC. What both protocols refuse, they refuse alike: the tests of the JSON side call
//! [`Scene::agrees`] for each of their rows. Here stands what gRPC has for itself.

use std::io::Write;

use envoy_types::pb::google::protobuf::{Struct, Value as ProtoValue, value::Kind};
use malha::proto::istio_ca::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};
use tonic::{Code, Status, metadata::AsciiMetadataValue};

use super::*;

impl Scene {
    /// Asks over gRPC, as an agent of Istio does.
    async fn create(
        &self,
        metadata: &[(&'static str, &str)],
        asked: IstioCertificateRequest,
    ) -> Result<Vec<String>, Status> {
        let mut request = tonic::Request::new(asked);
        for (name, value) in metadata {
            let value = AsciiMetadataValue::try_from(*value).expect("ASCII");
            request.metadata_mut().append(*name, value);
        }
        let mut client = IstioCertificateServiceClient::new(self.router.clone());
        let response = client.create_certificate(request).await?;
        Ok(response.into_inner().cert_chain)
    }

    async fn call(&self, token: &str, csr: &[u8]) -> Result<Vec<String>, Status> {
        let bearer = format!("Bearer {token}");
        self.create(&[("authorization", &bearer)], asking_for(csr))
            .await
    }

    /// Whether the same question over gRPC comes to the same as `answer` over JSON.
    pub(super) async fn agrees(&self, token: &str, csr: &[u8], answer: &Answer, case: &str) {
        let Err(status) = self.call(token, csr).await else {
            return assert_eq!(answer.status, StatusCode::CREATED, "{case}");
        };
        let want = match answer.status.as_u16() {
            400 => Code::InvalidArgument,
            401 => Code::Unauthenticated,
            429 => Code::ResourceExhausted,
            500 => Code::Internal,
            503 => Code::Unavailable,
            other => panic!("{case}: gRPC has nothing for {other}: {status:?}"),
        };
        assert_eq!(status.code(), want, "{case}: {status:?}");
        let problem = answer.json();
        assert_eq!(code(&status), text(&problem["code"]), "{case}");
        assert_eq!(status.message(), text(&problem["detail"]), "{case}");
        let millis = match want {
            Code::ResourceExhausted => {
                format!("{}000", answer.header(header::RETRY_AFTER))
            }
            _ => String::new(),
        };
        assert_eq!(pushback(&status), millis, "{case}");
    }
}

fn asking_for(csr: &[u8]) -> IstioCertificateRequest {
    IstioCertificateRequest {
        csr: String::from_utf8(csr.to_vec()).expect("PEM"),
        ..IstioCertificateRequest::default()
    }
}

fn saying(name: &str, kind: Option<Kind>) -> Option<Struct> {
    Some(Struct {
        fields: [(name.to_owned(), ProtoValue { kind })].into(),
    })
}

fn told<'a>(status: &'a Status, name: &str) -> &'a str {
    let value = status.metadata().get(name);
    value.map_or("", |value| value.to_str().expect("ASCII"))
}

pub(super) fn code(status: &Status) -> &str {
    told(status, "malha-code")
}

fn pushback(status: &Status) -> &str {
    told(status, "grpc-retry-pushback-ms")
}

/// The one certificate of a text.
fn only_block(text: &str) -> Vec<u8> {
    assert!(text.ends_with("-----END CERTIFICATE-----\n"), "{text}");
    let blocks = malha::ca::pem::parse(text.as_bytes()).expect("PEM").blocks;
    assert_eq!(blocks.len(), 1, "{text}");
    blocks[0].der.clone()
}

#[tokio::test]
async fn an_agent_of_istio_gets_leaf_intermediate_and_all_roots() {
    let scene = Scene::new().await;
    // its habits: RSA, an organisation, the identity that it hopes for as a name
    let other = "subjectAltName=URI:spiffe://cluster.local/ns/other/sa/db";
    for (csr, usage) in [
        (csr(rsa(), &["-subj", "/O=", "-addext", other]), "RSA"),
        (csr(p256(), &["-addext", other]), "EC"),
    ] {
        let chain = scene
            .call(&scene.token(), &csr)
            .await
            .expect("a certificate");
        let [leaf, intermediate, roots] = &chain[..] else {
            panic!("{} elements", chain.len());
        };
        let bundle = scene.custody.authority().bundle().to_pem();
        assert_eq!(*roots, bundle);
        let (leaf, intermediate) = (only_block(leaf), only_block(intermediate));
        let (_, read) = X509Certificate::from_der(&leaf).expect("X.509");
        assert_eq!(
            malha::ca::peer::verify(
                &[leaf.clone(), intermediate],
                scene.custody.authority().bundle(),
                malha::ca::peer::Side::Client,
                scene.now(),
            )
            .map_err(|error| error.to_string()),
            Ok(())
        );
        let names = read.subject_alternative_name().unwrap().unwrap();
        assert_eq!(
            names.value.general_names,
            [GeneralName::URI(WEB)],
            "{usage}"
        );
        assert_eq!(read.subject().iter().count(), 0, "{usage}");
        scene.openssl_verify(&json!({
            "certificate_chain": chain[..2].concat(),
            "trust_bundle": roots,
        }));
    }
    assert!(scene.metrics().contains("malha_ca_csr_surplus_total 2"));
    let counted = r#"malha_ca_csr_total{result="issued",reason="New"} 2"#;
    assert!(scene.metrics().contains(counted), "{}", scene.metrics());
}

#[tokio::test]
async fn a_life_is_seconds_and_nothing_means_as_long_as_we_like() {
    let scene = Scene::new().await;
    let good = csr(p256(), &[]);
    for (seconds, want) in [
        (0, Ok(24 * 3600)),
        (-5, Ok(24 * 3600)),
        (i64::MIN, Ok(24 * 3600)),
        (3600, Ok(3600)),
        (299, Err("TtlOutOfRange")),
        (7 * 24 * 3600 + 1, Err("TtlOutOfRange")),
        (i64::MAX, Err("TtlOutOfRange")),
    ] {
        let asked = IstioCertificateRequest {
            validity_duration: seconds,
            ..asking_for(&good)
        };
        let bearer = format!("Bearer {}", scene.token());
        let answer = scene.create(&[("authorization", &bearer)], asked).await;
        match (answer, want) {
            (Ok(chain), Ok(most)) => {
                let leaf = only_block(&chain[0]);
                let (_, leaf) = X509Certificate::from_der(&leaf).expect("X.509");
                let life = leaf.validity().not_after.timestamp() - scene.now().as_second();
                assert!(
                    (most * 9 / 10 - 1..=most).contains(&life),
                    "{seconds}: {life}"
                );
            }
            (Err(status), Err(want)) => {
                assert_eq!(status.code(), Code::InvalidArgument, "{seconds}");
                assert_eq!(code(&status), want, "{seconds}");
            }
            (answer, _) => panic!("{seconds}: {answer:?}"),
        }
    }
}

#[tokio::test]
async fn a_caller_of_another_cluster_is_refused() {
    let scene = Scene::new().await;
    let good = csr(p256(), &[]);
    let bearer = format!("Bearer {}", scene.token());
    for (named, want) in [
        (&["Kubernetes"][..], true),
        (&[""], true),
        (&[" "], true),
        (&["kubernetes"], false),
        (&["remote"], false),
        (&["Kubernetes", "remote"], false),
    ] {
        // tonic writes names in lower case, as HTTP/2 demands of everybody
        let mut metadata = vec![("authorization", bearer.as_str())];
        metadata.extend(named.iter().map(|name| ("clusterid", *name)));
        match scene.create(&metadata, asking_for(&good)).await {
            Ok(_) => assert!(want, "{named:?}"),
            Err(status) => {
                assert!(!want, "{named:?}: {status:?}");
                assert_eq!(status.code(), Code::Unauthenticated);
                assert_eq!(code(&status), "UnknownIssuer");
                assert_eq!(status.message(), "caller could not be authenticated");
            }
        }
    }
}

#[tokio::test]
async fn nobody_gets_a_certificate_for_somebody_else() {
    let scene = Scene::new().await;
    let good = csr(p256(), &[]);
    let bearer = format!("Bearer {}", scene.token());
    let text = |text: &str| Some(Kind::StringValue(text.to_owned()));
    let refused = Err((Code::Unauthenticated, "ImpersonationRefused"));
    let invalid = Err((Code::InvalidArgument, "BadRequest"));
    for (name, kind, want) in [
        ("CertSigner", text(""), Ok(())),
        ("CertSigner", None, Ok(())),
        ("CertSigner", Some(Kind::NullValue(0)), Ok(())),
        ("CertSigner", text("clusterissuers/other"), invalid),
        ("ImpersonatedIdentity", text(""), Ok(())),
        ("ImpersonatedIdentity", text(WEB), refused),
        (
            "ImpersonatedIdentity",
            text("spiffe://cluster.local/ns/prod/sa/db"),
            refused,
        ),
        ("ImpersonatedIdentity", Some(Kind::BoolValue(true)), refused),
        ("RunAs", text("root"), invalid),
    ] {
        let asked = IstioCertificateRequest {
            metadata: saying(name, kind),
            ..asking_for(&good)
        };
        let answer = scene.create(&[("authorization", &bearer)], asked).await;
        let answer = answer.map(drop);
        let verdict = match &answer {
            Ok(()) => Ok(()),
            Err(status) => Err((status.code(), code(status))),
        };
        assert_eq!(verdict, want, "{name}");
    }
}

#[tokio::test]
async fn overload_says_when_to_come_back_and_is_never_unauthenticated() {
    let scene = Scene::with(Limits::default()).await;
    let (token, good) = (scene.token(), csr(p256(), &[]));
    for _ in 0..10 {
        scene.call(&token, &good).await.expect("within the burst");
    }
    let status = scene.call(&token, &good).await.expect_err("too often");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!((code(&status), pushback(&status)), ("RateLimited", "1000"));

    let scene = Scene::with(Limits {
        entries: 0,
        ..no_rates()
    })
    .await;
    let status = scene.call(&token, &good).await.expect_err("no place");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!((code(&status), pushback(&status)), ("QueueFull", "1000"));
}

/// One call, of bytes that no client would send.
async fn raw(scene: &Scene, path: &str, token: &str, body: Body) -> Status {
    let request = Request::post(path)
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::AUTHORIZATION, format!("Bearer {token}"))
        .header(header::TE, "trailers")
        .version(axum::http::Version::HTTP_2)
        .body(body)
        .expect("a request");
    let response = scene
        .router
        .clone()
        .oneshot(request)
        .await
        .expect("infallible");
    assert_eq!(
        response.status(),
        StatusCode::OK,
        "gRPC's errors are its own"
    );
    Status::from_header_map(response.headers()).expect("a status without a message")
}

#[tokio::test]
async fn bytes_that_are_no_request_are_refused_in_words() {
    const METHOD: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
    let scene = Scene::new().await;
    let framed = |length: u32, bytes: &[u8]| {
        let length = length.to_be_bytes();
        Body::from([&[0][..], &length[..], bytes].concat())
    };
    for (case, body, want) in [
        ("nothing", Body::empty(), "BadRequest"),
        ("half a frame", framed(10, b"abc"), "BadRequest"),
        ("no message", framed(3, &[0xff; 3]), "BadRequest"),
        (
            "beyond the limit, by its own word",
            framed(64 * 1024 + 1, b""),
            "CsrTooLarge",
        ),
        (
            "endless, by its own word",
            framed(u32::MAX, b""),
            "CsrTooLarge",
        ),
    ] {
        let status = raw(&scene, METHOD, &scene.token(), body).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{case}: {status:?}");
        assert_eq!(code(&status), want, "{case}");
    }
    let never = || Body::from_stream(futures::stream::pending::<Result<Vec<u8>, std::io::Error>>());
    let status = raw(&scene, METHOD, "nobody", never()).await;
    assert_eq!(code(&status), "TokenInvalid", "before any of the message");
    for path in [
        "/istio.v1.auth.IstioCertificateService/DeleteCertificate",
        "/io.linkerd.proxy.identity.Identity/Certify",
        "/x",
    ] {
        let status = raw(&scene, path, &scene.token(), never()).await;
        assert_eq!(status.code(), Code::Unimplemented, "{path}");
        assert!(status.message().contains(path), "{status:?}");
    }
    let counted = r#"malha_ca_csr_total{result="invalid",reason="CsrTooLarge"} 2"#;
    assert!(scene.metrics().contains(counted), "{}", scene.metrics());
}

/// A client that nobody here wrote, with the habits of Istio's agents: the public messages compiled by `protoc`, and gRPC's
/// own C core, over TLS.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpcs_own_client_gets_a_certificate() {
    let Some(python) = python_or_skip() else {
        return;
    };
    let (scene, addr, stop) = serving().await;
    let path = |name: &str| scene.place.path().join(name);
    // its habits: RSA, an organisation without a name, the identity that it hopes for
    let hoped_for = format!("subjectAltName=URI:{WEB}");
    let habits = ["-subj", "/O=", "-addext", &hoped_for];
    fs::write(path("csr.pem"), csr(rsa(), &habits)).unwrap();
    fs::write(path("next.pem"), csr(p256(), &[])).unwrap();
    fs::copy(rsa(), path("key.pem")).unwrap();
    fs::write(path("token"), scene.token()).unwrap();
    fs::write(
        path("roots.pem"),
        scene.custody.authority().bundle().to_pem(),
    )
    .unwrap();
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tokio::process::Command::new(python)
        .arg(root.join("tests/it/signing/client.py"))
        .arg(root.join("proto"))
        .arg(scene.place.path())
        .arg(addr.to_string())
        .output()
        .await
        .expect("started");
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let fault = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}{fault}");
    let said: Value = serde_json::from_str(&said).expect("what the client saw");
    let chain: Vec<&str> = said["chain"].as_array().unwrap().iter().map(text).collect();
    assert_eq!(chain.len(), 3);
    scene.openssl_verify(&json!({
        "certificate_chain": chain[..2].concat(),
        "trust_bundle": chain[2],
    }));
    assert_eq!(
        said["again"], "the same",
        "one token and one CSR: one certificate"
    );
    assert_eq!(
        said["without_token"],
        json!(["UNAUTHENTICATED", "NoCredential"])
    );
    assert_eq!(said["bad_csr"], json!(["INVALID_ARGUMENT", "InvalidPem"]));
    assert_eq!(said["unknown_method"], "UNIMPLEMENTED");
    assert_eq!(
        said["other_cluster"],
        json!(["UNAUTHENTICATED", "UnknownIssuer"])
    );
    // by its certificate alone, for a key of its own
    let renewed: Vec<&str> = said["renewed"]
        .as_array()
        .unwrap()
        .iter()
        .map(text)
        .collect();
    assert_ne!(renewed[0], chain[0]);
    scene.openssl_verify(&json!({
        "certificate_chain": renewed[..2].concat(),
        "trust_bundle": renewed[2],
    }));
    let hour = |leaf: &str| {
        let der = only_block(leaf);
        let (_, leaf) = X509Certificate::from_der(&der).expect("X.509");
        leaf.raw_serial()[..4].to_vec()
    };
    assert_eq!(hour(renewed[0]), hour(chain[0]));
    stop.cancel();
}

/// The interpreter of a virtual environment in the cache, made once; or a word about why there is none.
fn python_or_skip() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    let home = cache.join("malha/grpc-client");
    let python = home.join("bin/python");
    let has_grpc = |python: &PathBuf| {
        let mut ask = Command::new(python);
        ask.args(["-c", "import grpc, grpc_tools"]);
        ask.output().is_ok_and(|out| out.status.success())
    };
    if has_grpc(&python) {
        return Some(python);
    }
    let run = |program: &std::path::Path, args: &[&str]| {
        let out = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .output();
        match out {
            Ok(out) if out.status.success() => Ok(()),
            Ok(out) => Err(String::from_utf8_lossy(&out.stderr).trim().to_owned()),
            Err(error) => Err(error.to_string()),
        }
    };
    let made = run("python3".as_ref(), &["-m", "venv", home.to_str()?]).and_then(|()| {
        run(
            &python,
            &["-m", "pip", "install", "-q", "grpcio", "grpcio-tools"],
        )
    });
    match made {
        Ok(()) => Some(python),
        Err(why) => {
            let why = format!("gRPC's Python client (grpcio, grpcio-tools) cannot be had: {why}");
            let in_ci = std::env::var_os("CI").is_some_and(|ci| !ci.is_empty() && ci != "false");
            assert!(!in_ci, "{why}");
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED grpcs_own_client_gets_a_certificate: {why}"
            );
            None
        }
    }
}

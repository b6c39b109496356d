//! Callers that show a certificate of ours, with a token beside it or without, over both protocols.

use malha::{
    ca::Serial,
    proto::istio_ca::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
    },
    tls::Peer,
};
use rustls_pki_types::CertificateDer;
use tonic::{Code, Status};

use super::{grpc::code, *};

/// What somebody shows, and from where.
#[derive(Clone)]
pub(super) struct Shows {
    pub(super) token: Option<String>,
    /// Empty: no certificate.
    pub(super) leaf: Vec<u8>,
    pub(super) address: IpAddr,
}

impl Shows {
    /// What the listener knows of the connection.
    fn connect(&self, extensions: &mut axum::http::Extensions) {
        let address = SocketAddr::new(self.address, 4711);
        let leaf = Some(&self.leaf).filter(|leaf| !leaf.is_empty());
        let certificates: Vec<_> = leaf
            .cloned()
            .map(CertificateDer::from)
            .into_iter()
            .collect();
        extensions.insert(ConnectInfo(address));
        extensions.insert(Peer {
            address,
            certificates: certificates.into(),
        });
    }
}

impl Scene {
    /// A leaf that was got with a token.
    async fn leaf(&self) -> Vec<u8> {
        let granted = self.ask(&csr(p256(), &[])).await.json();
        blocks(text(&granted["certificate_chain"])).swap_remove(0)
    }

    async fn shown(&self) -> Shows {
        Shows {
            token: None,
            leaf: self.leaf().await,
            address: "10.0.0.7".parse().unwrap(),
        }
    }

    /// The leaf, or the code; the same over both protocols.
    async fn renew(&self, shows: &Shows) -> Result<Vec<u8>, String> {
        let asked = IstioCertificateRequest {
            csr: String::from_utf8(csr(p256(), &[])).unwrap(),
            ..IstioCertificateRequest::default()
        };
        let over_http = self.over_http(shows, &asked).await;
        match self.over_grpc(shows, asked).await {
            Ok(chain) => {
                assert_eq!(over_http.status, StatusCode::CREATED);
                Ok(blocks(&chain[0]).swap_remove(0))
            }
            Err(status) => {
                let code = code(&status).to_owned();
                let problem = over_http.json();
                assert_eq!(problem["code"], code);
                assert_eq!(problem["detail"], status.message());
                Err(code)
            }
        }
    }

    pub(super) async fn over_http(&self, shows: &Shows, asked: &IstioCertificateRequest) -> Answer {
        let mut body = json!({ "csr": asked.csr });
        if asked.validity_duration != 0 {
            body["ttl_seconds"] = json!(asked.validity_duration);
        }
        let mut request =
            Request::post("/v1/certificates").header(header::CONTENT_TYPE, "application/json");
        if let Some(token) = &shows.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let mut request = request.body(Body::from(body.to_string())).unwrap();
        shows.connect(request.extensions_mut());
        self.send(request).await
    }

    pub(super) async fn over_grpc(
        &self,
        shows: &Shows,
        asked: IstioCertificateRequest,
    ) -> Result<Vec<String>, Status> {
        let mut request = tonic::Request::new(asked);
        shows.connect(request.extensions_mut());
        if let Some(token) = &shows.token {
            let value = format!("Bearer {token}").parse().unwrap();
            request.metadata_mut().insert("authorization", value);
        }
        let mut client = IstioCertificateServiceClient::new(self.router.clone());
        let answer = client.create_certificate(request).await;
        answer.map(|answer| answer.into_inner().cert_chain)
    }
}

const HOUR: Duration = Duration::from_secs(3600);

/// A leaf that nobody asked for.
pub(super) fn issued(scene: &Scene, profile: &Profile, life: Duration) -> Vec<u8> {
    let key = malha::ca::csr::Csr::parse_pem(&csr(p256(), &[]), Default::default());
    let serial = match profile {
        Profile::Workload(_) => Serial::for_workload(scene.now(), [7; 12]),
        _ => Serial::random([7; 16]),
    };
    let authority = scene.custody.authority();
    let issued = authority.issue(&key.unwrap().public_key, profile, life, serial, scene.now());
    issued.unwrap().chain.swap_remove(0)
}

fn blocks(pem: &str) -> Vec<Vec<u8>> {
    let read = malha::ca::pem::parse(pem.as_bytes()).expect("PEM");
    read.blocks.into_iter().map(|block| block.der).collect()
}

fn serial(leaf: &[u8]) -> Serial {
    let (_, leaf) = X509Certificate::from_der(leaf).expect("X.509");
    Serial::from_bytes(leaf.raw_serial()).expect("one of ours")
}

#[tokio::test]
async fn a_certificate_renews_itself_for_a_week_and_then_needs_a_token() {
    let scene = Scene::new().await;
    let mut shows = scene.shown().await;
    let proved = scene.now();
    for half_day in 1..=14 {
        scene.later(12 * 3600);
        scene.custody.refresh().await.expect("read again");
        let next = scene
            .renew(&shows)
            .await
            .unwrap_or_else(|code| panic!("{half_day}: {code}"));
        let (_, read) = X509Certificate::from_der(&next).expect("X.509");
        let names = read.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names, [GeneralName::URI(WEB)]);
        assert_ne!(next, shows.leaf);
        assert_eq!(serial(&next).token_proof(), Some(proved), "carried on");
        shows.leaf = next;
    }
    scene.later(3600);
    let over = scene.renew(&shows).await;
    assert_eq!(over, Err("RenewalNeedsToken".to_owned()));
    shows.token = Some(scene.token());
    let next = scene.renew(&shows).await.expect("a token was shown");
    assert_eq!(serial(&next).token_proof(), Some(scene.now()), "begun anew");
    let counted = r#"malha_ca_token_validation_total{method="certificate",result="ok"} 28"#;
    assert!(scene.metrics().contains(counted), "{}", scene.metrics());
}

#[tokio::test]
async fn each_fault_of_a_renewal_has_its_code() {
    type Spoil = fn(&Scene, &mut Shows);
    fn pod(scene: &Scene, change: impl FnOnce(&mut PodFact)) {
        change(scene.cluster.lock().unwrap().pod.as_mut().unwrap());
    }
    fn cluster(scene: &Scene, change: impl FnOnce(&mut Cluster)) {
        change(&mut scene.cluster.lock().unwrap());
    }
    let cases: &[(&str, Spoil, &str)] = &[
        ("nothing", |_, _| {}, ""),
        (
            "from its pod",
            |s, shows| cluster(s, |c| c.address = Some(shows.address)),
            "",
        ),
        (
            "a token of its own",
            |s, shows| shows.token = Some(s.token()),
            "",
        ),
        (
            "a token that ran out",
            |s, shows| {
                shows.token = Some(s.token());
                s.later(2 * 3600);
            },
            "",
        ),
        (
            "a token that nobody can check",
            |s, shows| {
                shows.token = Some(s.token());
                cluster(s, |c| c.review = Review::Fails);
            },
            "",
        ),
        (
            "a token of somebody else",
            |s, shows| {
                let id = SpiffeId::new(&mesh(), "prod", "db").unwrap();
                shows.leaf = issued(s, &Profile::Workload(id), HOUR);
                shows.token = Some(s.token());
                cluster(s, |c| c.second = true);
            },
            "IdentityConflict",
        ),
        (
            "a token that is none",
            |_, shows| shows.token = Some("x".into()),
            "TokenInvalid",
        ),
        (
            "a token for another audience",
            |s, shows| {
                let mut claims = s.claims();
                claims["aud"] = json!(["api"]);
                shows.token = Some(
                    s.issuer
                        .sign(&json!({ "alg": "ES256", "kid": "one" }), &claims),
                );
            },
            "AudienceMismatch",
        ),
        (
            "no pod runs as it",
            |s, _| cluster(s, |c| c.pod = None),
            "CallerGone",
        ),
        (
            "its last pod has ended",
            |s, _| pod(s, |pod| pod.finished = true),
            "CallerGone",
        ),
        (
            "its last pod was deleted",
            |s, _| {
                let now = s.now();
                pod(s, |pod| pod.deletion = Some(now));
                s.later(61);
            },
            "CallerGone",
        ),
        (
            "its account was deleted",
            |s, _| cluster(s, |c| c.account = None),
            "CallerGone",
        ),
        (
            "its namespace is on its way out",
            |s, _| cluster(s, |c| c.terminating = true),
            "CallerGone",
        ),
        (
            "lists not there",
            |s, _| cluster(s, |c| c.synced = false),
            "VerifierUnavailable",
        ),
        (
            "from somebody else's pod",
            |s, shows| cluster(s, |c| c.stranger = Some((shows.address, "db"))),
            "IdentityConflict",
        ),
        (
            "the control plane's own",
            |s, shows| {
                let id = SpiffeId::new(&mesh(), "malha-system", "malha").unwrap();
                let dns_names = vec!["malha.malha-system.svc".into()];
                shows.leaf = issued(s, &Profile::ControlPlane { id, dns_names }, HOUR);
            },
            "RenewalNeedsToken",
        ),
        (
            "a signing certificate",
            |s, shows| {
                let bundle = s.custody.authority().bundle().to_pem();
                shows.leaf = blocks(&bundle).swap_remove(0);
            },
            "CertificateInvalid",
        ),
        (
            "it ended on a connection that is older",
            |s, _| s.later(25 * 3600),
            "CertificateInvalid",
        ),
        (
            "no certificate",
            |_, shows| shows.leaf = vec![0x30, 0],
            "CertificateInvalid",
        ),
    ];
    for (case, spoil, want) in cases {
        let scene = Scene::new().await;
        let mut shows = scene.shown().await;
        spoil(&scene, &mut shows);
        let verdict = scene.renew(&shows).await.map(drop);
        let want = match *want {
            "" => Ok(()),
            code => Err(code.to_owned()),
        };
        assert_eq!(verdict, want, "{case}");
    }
}

#[tokio::test]
async fn a_bad_certificate_beside_a_good_token_is_as_good_as_none() {
    let scene = Scene::new().await;
    let mut shows = scene.shown().await;
    shows.leaf = vec![0x30, 0];
    shows.token = Some(scene.token());
    scene.renew(&shows).await.expect("the token counts");
}

#[tokio::test]
async fn a_denied_certificate_is_not_renewed_with_itself() {
    let scene = Scene::new().await;
    let mut shows = scene.shown().await;
    let journal = scene.place.path().join("journal.json");
    let mut written: Value = serde_json::from_slice(&fs::read(&journal).unwrap()).unwrap();
    let until = "2026-12-31T00:00:00Z";
    written["denied"] = json!([{ "serial": serial(&shows.leaf).to_string(), "until": until }]);
    fs::write(&journal, written.to_string()).unwrap();
    scene.custody.refresh().await.expect("a good journal");
    assert_eq!(scene.renew(&shows).await, Err("Denied".to_owned()));
    shows.token = Some(scene.token());
    scene.renew(&shows).await.expect("a token shows who it is");
}

/// `prod/web` stands on the list, and asks for `prod/web`, the only one on its node; the second identity is of nobody.
#[tokio::test]
async fn a_nodes_proxy_gets_what_is_on_its_node_if_it_may_and_it_is_on_record() {
    use envoy_types::pb::google::protobuf::{Struct, Value as ProtoValue, value::Kind};
    let (log, _guard) = captured();
    let scene = Scene::new().await;
    let ask = async |target: &str| {
        let kind = Some(Kind::StringValue(target.to_owned()));
        let mut request = tonic::Request::new(IstioCertificateRequest {
            csr: String::from_utf8(csr(p256(), &[])).unwrap(),
            metadata: Some(Struct {
                fields: [("ImpersonatedIdentity".to_owned(), ProtoValue { kind })].into(),
            }),
            ..IstioCertificateRequest::default()
        });
        let bearer = format!("Bearer {}", scene.token()).parse().unwrap();
        request.metadata_mut().insert("authorization", bearer);
        let mut client = IstioCertificateServiceClient::new(scene.router.clone());
        let answer = client.create_certificate(request).await;
        answer.map(drop).map_err(|status| status.code())
    };
    assert_eq!(ask(WEB).await, Err(Code::Unauthenticated), "off by default");
    scene.cluster.lock().unwrap().node_proxies = "prod/web".parse().unwrap();
    assert_eq!(ask(WEB).await, Ok(()));
    let nobody = "spiffe://cluster.local/ns/prod/sa/db";
    assert_eq!(ask(nobody).await, Err(Code::Unauthenticated));
    let log = String::from_utf8(log.lock().unwrap().clone()).unwrap();
    let records = log.lines().map(|line| serde_json::from_str(line).unwrap());
    let records: Vec<Value> = records.collect();
    let codes: Vec<_> = records.iter().map(|record| text(&record["code"])).collect();
    assert_eq!(
        codes,
        ["ImpersonationRefused", "New", "ImpersonationRefused"]
    );
    assert_eq!(records[1]["node_proxy"], WEB);
    assert_eq!(records[1]["spiffe_id"], WEB);
}

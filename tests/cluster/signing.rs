//! The main job on a real API server: a pod's own token and a CSR become the certificate of its service account.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::ConnectInfo,
    http::{Request, StatusCode, header},
};
use http_body_util::BodyExt;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{DeleteParams, PostParams},
};
use malha::{
    ca::{pem, rotation::RotationPolicy},
    caller::NodeProxies,
    k8s::tokens::{ClusterTokens, Options, Validation},
    runtime::clock,
    signing::{Limits, Metrics, Signing, router},
    tls::Peer,
};
use rustls::pki_types::{CertificateDer, UnixTime};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::{
    journal,
    rig::{self, Cluster, TokenOf, eventually},
    world::{Followed, follow, make_account, pod},
};

/// One replica: its own journal reader, its own watches, its own router.
struct Replica {
    router: Router,
    followed: Followed,
}

impl Replica {
    async fn new(cluster: &Cluster, namespace: &str) -> Self {
        let client = cluster.client().await;
        let custody = journal::open(client.clone(), namespace).await;
        let followed = follow(client.clone()).await;
        let options = Options {
            trust_domain: "cluster.local".parse().expect("a trust domain"),
            audiences: vec!["malha-ca".to_owned()],
            require_bound_pod: true,
            validation: Validation::Auto,
            node_proxies: NodeProxies::default(),
            own_namespace: namespace.to_owned(),
        };
        let tokens = ClusterTokens::new(client, followed.world.clone(), options);
        let signing = Signing::new(
            move || custody.authority(),
            tokens,
            RotationPolicy::default().leaf,
            Limits::default(),
            clock::system(),
            Metrics::default(),
        );
        Self {
            router: router(Arc::new(signing)),
            followed,
        }
    }

    async fn ask(&self, token: &str, csr: &str) -> (StatusCode, Value) {
        let mut request = asking_for(csr);
        let bearer = format!("Bearer {token}").parse().expect("ASCII");
        request.headers_mut().insert(header::AUTHORIZATION, bearer);
        self.answer(request).await
    }

    /// With a certificate that the listener has verified, and no token.
    async fn renew(&self, chain: &Value, csr: &str) -> (StatusCode, Value) {
        let address = "10.0.0.7:4711".parse().expect("an address");
        let certificates = certificates(chain).into();
        let mut request = asking_for(csr);
        request.extensions_mut().insert(Peer {
            address,
            certificates,
        });
        request.extensions_mut().insert(ConnectInfo(address));
        self.answer(request).await
    }

    async fn answer(&self, request: Request<Body>) -> (StatusCode, Value) {
        let response = self
            .router
            .clone()
            .oneshot(request)
            .await
            .expect("an answer");
        let status = response.status();
        let body = response
            .into_body()
            .collect()
            .await
            .expect("a body")
            .to_bytes();
        (status, serde_json::from_slice(&body).expect("JSON"))
    }
}

fn asking_for(csr: &str) -> Request<Body> {
    Request::post("/v1/certificates")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(json!({ "csr": csr }).to_string()))
        .expect("a request")
}

/// A CSR that also asks to be somebody else, and a certificate authority.
fn greedy_csr() -> String {
    let mut wish = rcgen::CertificateParams::default();
    wish.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let admin = "spiffe://cluster.local/ns/kube-system/sa/admin"
        .try_into()
        .expect("a URI");
    wish.subject_alt_names = vec![rcgen::SanType::URI(admin)];
    let key = rcgen::KeyPair::generate().expect("a key");
    wish.serialize_request(&key)
        .expect("a CSR")
        .pem()
        .expect("PEM")
}

fn certificates(pem: &Value) -> Vec<CertificateDer<'static>> {
    let read = pem::parse(pem.as_str().expect("a text").as_bytes()).expect("PEM");
    read.blocks
        .into_iter()
        .map(|block| block.der.into())
        .collect()
}

/// As a peer sees it: the chain leads to the bundle, is good for both sides, and names exactly one identity.
fn is_accepted_as(granted: &Value, identity: &str) {
    let chain = certificates(&granted["certificate_chain"]);
    let roots = certificates(&granted["trust_bundle"]);
    let anchors: Vec<_> = roots
        .iter()
        .map(|root| webpki::anchor_from_trusted_cert(root).expect("a root"))
        .collect();
    let leaf = webpki::EndEntityCert::try_from(&chain[0]).expect("a leaf");
    for usage in [
        webpki::KeyUsage::server_auth(),
        webpki::KeyUsage::client_auth(),
    ] {
        leaf.verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &anchors,
            &chain[1..],
            UnixTime::now(),
            usage,
            None,
            None,
        )
        .expect("a peer accepts it");
    }
    assert_eq!(leaf.valid_uri_names().collect::<Vec<_>>(), [identity]);
    assert_eq!(leaf.valid_dns_names().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_gets_the_certificate_of_its_service_account_and_a_deleted_pod_none() {
    let Some(cluster) = rig::shared().await else {
        return;
    };
    let namespace = cluster.namespace("signing", &[]).await;
    let replicas = [
        Replica::new(cluster, &namespace).await,
        Replica::new(cluster, &namespace).await,
    ];
    make_account(cluster, &namespace, "web").await;
    let pods: Api<Pod> = Api::namespaced(cluster.client().await, &namespace);
    pods.create(&PostParams::default(), &pod("web-0", "web"))
        .await
        .expect("a pod");
    let bound = TokenOf::Pod("web-0");
    let token = cluster
        .token(&namespace, "web", &bound, &["malha-ca"], 3600)
        .await;

    let identity = format!("spiffe://cluster.local/ns/{namespace}/sa/web");
    let mut answers = Vec::new();
    for replica in &replicas {
        let (status, granted) = replica.ask(&token, &greedy_csr()).await;
        assert_eq!(status, StatusCode::CREATED, "{granted}");
        assert_eq!(granted["spiffe_id"], json!(identity));
        is_accepted_as(&granted, &identity);
        answers.push(granted);
    }
    assert_eq!(
        answers[0]["trust_bundle"], answers[1]["trust_bundle"],
        "one root"
    );
    assert_ne!(answers[0]["serial"], answers[1]["serial"]);

    let other = cluster
        .token(&namespace, "web", &bound, &["somebody-else"], 3600)
        .await;
    let unbound = cluster
        .token(&namespace, "web", &TokenOf::Account, &["malha-ca"], 3600)
        .await;
    for (token, code) in [(&other, "AudienceMismatch"), (&unbound, "NotBound")] {
        let (status, problem) = replicas[0].ask(token, &greedy_csr()).await;
        assert_eq!((status.as_u16(), &problem["code"]), (401, &json!(code)));
    }

    for replica in &replicas {
        eventually(Duration::from_secs(5), "the pod is known", || async {
            let known = replica.followed.world.find_pod(&namespace, "web-0");
            known.map(drop).ok_or_else(|| "unknown".to_owned())
        })
        .await;
    }
    let shown = &answers[0]["certificate_chain"];
    let (status, renewed) = replicas[1].renew(shown, &greedy_csr()).await;
    assert_eq!(status, StatusCode::CREATED, "{renewed}");
    is_accepted_as(&renewed, &identity);
    assert_ne!(renewed["serial"], answers[0]["serial"]);
    assert_eq!(
        renewed["serial"].as_str().map(|serial| &serial[..8]),
        answers[0]["serial"].as_str().map(|serial| &serial[..8]),
        "the hour in which a token was shown"
    );
    let now = DeleteParams::default().grace_period(0);
    pods.delete("web-0", &now).await.expect("deleted");
    for replica in &replicas {
        eventually(
            Duration::from_secs(1),
            "the deleted pod is refused",
            || async {
                for (status, problem) in [
                    replica.ask(&token, &greedy_csr()).await,
                    replica.renew(shown, &greedy_csr()).await,
                ] {
                    if (status.as_u16(), &problem["code"]) != (401, &json!("CallerGone")) {
                        return Err(format!("{status} {problem}"));
                    }
                }
                Ok(())
            },
        )
        .await;
    }
}

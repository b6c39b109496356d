//! The webhook over real sockets: what is answered, what is refused and how, and what a listener endures.

mod clients;
mod crowd;
mod endurance;
mod http2;
mod rows;
mod swap;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use malha::ca::{KeyedChain, Validity};
use malha::inject::{ClusterFacts, InjectSettings, Injector, NamespaceFacts, Reason};
use malha::tls::{Alpn, Bound, Limits, ServingCertificate};
use malha::webhook::{self, Metrics, Webhook};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support::https::{Connection, Response, trusting};
use crate::support::review;

/// The name in the certificate of a test's webhook.
const NAME: &str = "malha.malha-system.svc";

/// A webhook that serves on a port of its own.
struct Served {
    addr: SocketAddr,
    certificate: Arc<ServingCertificate>,
    /// The certificate that is trusted: the first one that was published.
    root: Vec<u8>,
    metrics: Metrics,
    faulty: Arc<AtomicBool>,
    stop: CancellationToken,
    serving: JoinHandle<()>,
}

impl Served {
    async fn start() -> Self {
        Self::with(Limits::default(), webhook::Limits::default()).await
    }

    async fn with(limits: Limits, bodies: webhook::Limits) -> Self {
        let certificate = ServingCertificate::new();
        let first = self_signed(NAME);
        certificate.publish(&first).expect("a good certificate");
        let addr = SocketAddr::from(([127, 0, 0, 1], 0));
        let bound = Bound::new(addr, Arc::clone(&certificate), Alpn::Http1, limits)
            .await
            .expect("a free port");
        let faulty = Arc::new(AtomicBool::new(false));
        let metrics = Metrics::default();
        let app = webhook::router(Webhook {
            injector: Arc::new(ArcSwap::from_pointee(Injector::new(
                InjectSettings::embedded(),
            ))),
            cluster: Arc::new(Cluster(Arc::clone(&faulty))),
            metrics: metrics.clone(),
            limits: bodies,
        });
        let stop = CancellationToken::new();
        Self {
            addr: bound.local_addr(),
            certificate,
            root: first.chain[0].clone(),
            metrics,
            faulty,
            serving: tokio::spawn(bound.serve(app, stop.clone())),
            stop,
        }
    }

    async fn connect(&self) -> Connection {
        self.try_connect().await.expect("a handshake")
    }

    async fn try_connect(&self) -> std::io::Result<Connection> {
        Connection::open(self.addr, NAME, trusting([self.root.as_slice()])).await
    }

    /// How often each reason was counted.
    fn counts(&self) -> Vec<(Reason, u64)> {
        Reason::ALL
            .iter()
            .map(|reason| (*reason, self.metrics.count(*reason)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    /// A review on a connection of its own, answered as it should be.
    async fn is_well(&self) {
        let answer = self
            .connect()
            .await
            .post("/inject/ns", &ordinary("well"))
            .await
            .expect("an answer");
        assert_eq!(answer.status, 200);
        assert_eq!(answer.json()["response"]["uid"], "well");
        assert!(!self.serving.is_finished());
    }
}

/// Knows two meshed namespaces, and panics when told to: the only way to a panic that a test has.
struct Cluster(Arc<AtomicBool>);

impl ClusterFacts for Cluster {
    fn oldest_kubelet(&self) -> Option<u32> {
        assert!(!self.0.load(Ordering::Relaxed), "on purpose");
        None
    }

    fn namespace(&self, name: &str) -> Option<NamespaceFacts> {
        let level = match name {
            "meshed" => "privileged",
            "strict" => "restricted",
            _ => return None,
        };
        let labels = [
            ("istio-injection", "enabled"),
            ("pod-security.kubernetes.io/enforce", level),
        ];
        Some(NamespaceFacts {
            name: name.to_owned(),
            labels: labels
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
        })
    }
}

fn self_signed(name: &str) -> KeyedChain {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate");
    KeyedChain {
        chain: vec![made.cert.der().to_vec()],
        key: made.signing_key.serialize_der().into(),
        validity: Validity {
            not_before: Timestamp::UNIX_EPOCH,
            not_after: Timestamp::MAX,
        },
    }
}

/// An ordinary review, as bytes.
fn ordinary(uid: &str) -> Vec<u8> {
    review::of_pod(uid, "shop", &pod()).to_string().into_bytes()
}

fn pod() -> Value {
    json!({
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {"generateName": "web-6d4cf56db6-", "creationTimestamp": null},
        "spec": {"containers": [{"name": "web", "image": "web:1"}], "restartPolicy": "Always"},
    })
}

/// A request of bytes, as they go over the wire.
fn request(head: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = head.replace('\n', "\r\n").into_bytes();
    bytes.extend_from_slice(b"\r\n\r\n");
    bytes.extend_from_slice(body);
    bytes
}

/// Whether the peer ends the connection; what it still says is thrown away.
async fn ends(stream: &mut (impl AsyncReadExt + Unpin)) -> bool {
    let mut scratch = [0; 4096];
    loop {
        match stream.read(&mut scratch).await {
            Ok(0) | Err(_) => return true,
            Ok(_) => {}
        }
    }
}

fn reason_of(answer: &Response) -> String {
    answer.json()["response"]["auditAnnotations"]["reason"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

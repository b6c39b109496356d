//! The trust bundle that is pushed, from a control plane that does as the test says and hears what the agent answers.

use std::{
    collections::HashMap,
    fs,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use aws_lc_rs::{
    rand::{self, SystemRandom},
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair},
};
use envoy_types::pb::{
    envoy::{
        config::core::v3::{DataSource, data_source::Specifier},
        extensions::transport_sockets::tls::v3::{CertificateValidationContext, Secret, secret},
        service::{
            discovery::v3::{
                DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
                Resource,
                aggregated_discovery_service_server::{
                    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
                },
            },
            secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient,
        },
    },
    google::{protobuf::Any, rpc},
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use malha::{
    ca::{
        Authority, KeyedChain, LeafPolicy, Serial,
        bundle::Bundle,
        csr::{Csr, KeyPolicy},
        key::SecretKey,
        pem,
        profile::Profile,
        rotation::{RotationPolicy, first},
    },
    identity::TrustDomain,
    proto::istio_ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{
            IstioCertificateService, IstioCertificateServiceServer,
        },
    },
};
use prost::Message;
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    server::WebPkiClientVerifier,
    version::TLS13,
};
use tokio::{
    net::{TcpListener, UnixStream},
    sync::mpsc,
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status, Streaming,
    service::Routes,
    transport::{Channel, Endpoint},
};
use tower::service_fn;
use zeroize::Zeroizing;

use super::{
    pod::{Pod, mount},
    soon, until,
};

const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

#[tokio::test]
async fn a_push_is_the_trust_set_at_once_and_acknowledged_when_envoy_has_it() {
    let place = tempfile::tempdir().unwrap();
    let mut plane = Scripted::start().await;
    let pod = plane.pod(place.path());
    let mut envoy = Envoy::connect(&pod).await;
    let first = envoy.roots().await;
    envoy.acknowledge(&first).await;

    let mut stream = plane.stream().await;
    let asked = stream.hear().await;
    assert_eq!(asked.type_url, SECRET);
    assert_eq!(asked.resource_names_subscribe, ["ROOTCA"]);
    assert!(asked.initial_resource_versions.is_empty());
    let node = asked.node.unwrap();
    assert_eq!(node.id, "web-0.shop");
    assert!(node.metadata.unwrap().fields.contains_key("malha.io/agent"));

    let both = joined(&plane.bundle(), &authority().bundle().to_pem());
    stream.push("7", "one", &both).await;
    let second = envoy.roots().await;
    assert_eq!(pod.identity().await.bundle.len(), 2);
    assert_ne!(second.version_info, first.version_info);
    assert!(stream.heard.try_recv().is_err(), "Envoy has said nothing");
    envoy.acknowledge(&second).await;
    let ack = stream.hear().await;
    assert_eq!(
        (ack.response_nonce.as_str(), ack.error_detail),
        ("one", None)
    );

    // The stream breaks; the next one names what is there, so that nothing need be sent again.
    drop(stream);
    let mut stream = plane.stream().await;
    let asked = stream.hear().await;
    let held = HashMap::from([("ROOTCA".to_owned(), "7".to_owned())]);
    assert_eq!(asked.initial_resource_versions, held);
    // What Envoy has already is acknowledged at once.
    stream.push("8", "two", &both).await;
    assert_eq!(stream.hear().await.response_nonce, "two");
    pod.end().await;
}

#[tokio::test]
async fn what_envoy_refuses_is_refused_towards_the_control_plane() {
    let place = tempfile::tempdir().unwrap();
    let mut plane = Scripted::start().await;
    let pod = plane.pod(place.path());
    let mut envoy = Envoy::connect(&pod).await;
    let first = envoy.roots().await;
    envoy.acknowledge(&first).await;
    let mut stream = plane.stream().await;
    stream.hear().await;
    let both = joined(&plane.bundle(), &authority().bundle().to_pem());
    stream.push("2", "one", &both).await;
    let second = envoy.roots().await;
    envoy.refuse(&second, "no room for it").await;
    let nack = stream.hear().await;
    assert_eq!(nack.response_nonce, "one");
    let why = nack.error_detail.unwrap().message;
    assert_eq!(why, "Envoy refused it: no room for it");
    pod.end().await;
}

#[tokio::test]
async fn a_bad_push_is_refused_and_the_good_one_stays() {
    let place = tempfile::tempdir().unwrap();
    let mut plane = Scripted::start().await;
    let pod = plane.pod(place.path());
    let before = pod.identity().await;
    let mut stream = plane.stream().await;
    stream.hear().await;
    let leaf = pem::encode("CERTIFICATE", &before.keyed.chain[0]);
    let intermediate = pem::encode("CERTIFICATE", &before.keyed.chain[1]);
    let bads = [String::new(), leaf, intermediate, "nonsense".to_owned()];
    for (bad, nonce) in bads.iter().zip(["a", "b", "c", "d"]) {
        stream.push("9", nonce, bad).await;
        let nack = stream.hear().await;
        assert_eq!(nack.response_nonce, nonce);
        assert!(nack.error_detail.is_some(), "{bad}");
        assert_eq!(pod.identity().await.bundle, before.bundle);
    }
    pod.end().await;
}

#[tokio::test]
async fn a_pod_whose_root_is_taken_out_gets_a_new_certificate_at_once() {
    let place = tempfile::tempdir().unwrap();
    let mut plane = Scripted::start().await;
    let pod = plane.pod(place.path());
    let before = pod.identity().await;
    let mut stream = plane.stream().await;
    stream.hear().await;
    plane.moves_to(authority());
    stream.push("2", "one", &plane.bundle()).await;
    let after = pod.renewed_after(&before).await;
    assert_eq!(after.bundle.to_pem(), plane.bundle());
    assert_eq!(plane.issued.load(Relaxed), 2, "once at start, once now");
    pod.end().await;
}

#[tokio::test]
async fn a_file_that_lags_behind_a_push_brings_no_root_back() {
    let place = tempfile::tempdir().unwrap();
    let mut plane = Scripted::start().await;
    let pod = plane.pod_that_renews(place.path(), Some(Duration::from_secs(1)));
    pod.identity().await;
    let mut stream = plane.stream().await;
    stream.hear().await;
    let old = plane.bundle();
    plane.moves_to(authority());
    stream.push("2", "one", &plane.bundle()).await;
    let is_new = async || pod.identity().await.bundle.to_pem() == plane.bundle();
    until("the new root", is_new).await;
    // The kubelet is late: it brings the set of a step that has passed. It is read when a certificate is asked for.
    mount(&pod.path(""), &joined(&old, &plane.bundle()));
    let issued = plane.issued.load(Relaxed);
    until("a certificate more", async || {
        plane.issued.load(Relaxed) > issued
    })
    .await;
    assert_eq!(pod.identity().await.bundle.to_pem(), plane.bundle());
    pod.end().await;
}

/// A control plane that signs whatever it is asked to, and pushes what the test says.
struct Scripted {
    port: u16,
    authority: Arc<Mutex<Authority>>,
    issued: Arc<AtomicU64>,
    streams: mpsc::Receiver<Stream>,
    task: JoinHandle<()>,
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One subscription, from the control plane's end.
struct Stream {
    say: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    heard: mpsc::Receiver<DeltaDiscoveryRequest>,
}

impl Stream {
    async fn hear(&mut self) -> DeltaDiscoveryRequest {
        soon("a word of the agent's", self.heard.recv())
            .await
            .unwrap()
    }

    async fn push(&self, version: &str, nonce: &str, pem: &str) {
        let context = CertificateValidationContext {
            trusted_ca: Some(DataSource {
                specifier: Some(Specifier::InlineString(pem.to_owned())),
                ..DataSource::default()
            }),
            ..CertificateValidationContext::default()
        };
        let secret = Secret {
            name: "ROOTCA".to_owned(),
            r#type: Some(secret::Type::ValidationContext(context)),
        };
        let resource = Resource {
            name: "ROOTCA".to_owned(),
            version: version.to_owned(),
            resource: Some(Any {
                type_url: SECRET.to_owned(),
                value: secret.encode_to_vec(),
            }),
            ..Resource::default()
        };
        let answer = DeltaDiscoveryResponse {
            resources: vec![resource],
            type_url: SECRET.to_owned(),
            nonce: nonce.to_owned(),
            ..DeltaDiscoveryResponse::default()
        };
        self.say.send(Ok(answer)).await.unwrap();
    }
}

impl Scripted {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let authority = Arc::new(Mutex::new(authority()));
        let issued = Arc::new(AtomicU64::new(0));
        let (tell, streams) = mpsc::channel(8);
        let speaker = Speaker {
            authority: authority.clone(),
            issued: issued.clone(),
            streams: tell,
        };
        let routes = Routes::new(IstioCertificateServiceServer::new(speaker.clone()))
            .add_service(AggregatedDiscoveryServiceServer::new(speaker))
            .into_axum_router();
        let serving = authority.clone();
        let task = tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let config = tls(&serving.lock().unwrap());
                let service = TowerToHyperService::new(routes.clone());
                tokio::spawn(async move {
                    let Ok(tls) = TlsAcceptor::from(config).accept(tcp).await else {
                        return;
                    };
                    let http = auto::Builder::new(TokioExecutor::new());
                    let _ = http.serve_connection(TokioIo::new(tls), service).await;
                });
            }
        });
        Self {
            port,
            authority,
            issued,
            streams,
            task,
        }
    }

    /// One that renews only when it must.
    fn pod(&self, place: &Path) -> Pod {
        self.pod_that_renews(place, None)
    }

    fn pod_that_renews(&self, place: &Path, every: Option<Duration>) -> Pod {
        let address = format!("localhost:{}", self.port);
        Pod::start_at(place, &address, "web", every, |place| {
            fs::write(place.join("token"), "eyJ.any.token").unwrap();
            mount(place, &self.bundle());
        })
    }

    fn bundle(&self) -> String {
        self.authority.lock().unwrap().bundle().to_pem()
    }

    fn moves_to(&self, authority: Authority) {
        *self.authority.lock().unwrap() = authority;
    }

    async fn stream(&mut self) -> Stream {
        soon("a subscription", self.streams.recv()).await.unwrap()
    }
}

#[derive(Clone)]
struct Speaker {
    authority: Arc<Mutex<Authority>>,
    issued: Arc<AtomicU64>,
    streams: mpsc::Sender<Stream>,
}

#[tonic::async_trait]
impl IstioCertificateService for Speaker {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let token = request.metadata().get("authorization").unwrap();
        assert_eq!(token, "Bearer eyJ.any.token");
        let csr = Csr::parse_pem(request.get_ref().csr.as_bytes(), KeyPolicy::default());
        let csr = csr.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let authority = self.authority.lock().unwrap().clone();
        let id = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        let issued = authority
            .issue(
                &csr.public_key,
                &Profile::Workload(id),
                DAY,
                serial(),
                now(),
            )
            .unwrap();
        let chain = issued
            .chain
            .iter()
            .map(|der| pem::encode("CERTIFICATE", der));
        let mut cert_chain: Vec<_> = chain.collect();
        cert_chain.push(authority.bundle().to_pem());
        self.issued.fetch_add(1, Relaxed);
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Speaker {
    type StreamAggregatedResourcesStream = ReceiverStream<Result<DiscoveryResponse, Status>>;
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("delta alone"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (say, answers) = mpsc::channel(8);
        let (tell, heard) = mpsc::channel(8);
        let mut requests = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                if tell.send(request).await.is_err() {
                    return;
                }
            }
        });
        // A test that looks at no stream does not mind.
        let _ = self.streams.try_send(Stream { say, heard });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

/// Speaks SDS as Envoy does, but says what the test wants.
struct Envoy {
    say: mpsc::Sender<DiscoveryRequest>,
    answers: Streaming<DiscoveryResponse>,
}

impl Envoy {
    async fn connect(pod: &Pod) -> Self {
        let socket = pod.path("sds.sock");
        let dial = service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://sds");
        let channel: Channel = endpoint.connect_with_connector(dial).await.unwrap();
        let (say, requests) = mpsc::channel(8);
        let first = DiscoveryRequest {
            resource_names: vec!["ROOTCA".to_owned()],
            type_url: SECRET.to_owned(),
            ..DiscoveryRequest::default()
        };
        say.send(first).await.unwrap();
        let mut client = SecretDiscoveryServiceClient::new(channel);
        let answers = client.stream_secrets(ReceiverStream::new(requests));
        let answers = soon("an SDS stream", answers).await.unwrap().into_inner();
        Self { say, answers }
    }

    async fn roots(&mut self) -> DiscoveryResponse {
        let answer = soon("a secret", self.answers.message()).await;
        answer.unwrap().unwrap()
    }

    async fn acknowledge(&self, answer: &DiscoveryResponse) {
        self.speak(answer, None).await;
    }

    async fn refuse(&self, answer: &DiscoveryResponse, why: &str) {
        let why = rpc::Status {
            message: why.to_owned(),
            ..rpc::Status::default()
        };
        self.speak(answer, Some(why)).await;
    }

    async fn speak(&self, answer: &DiscoveryResponse, error_detail: Option<rpc::Status>) {
        let request = DiscoveryRequest {
            version_info: answer.version_info.clone(),
            resource_names: vec!["ROOTCA".to_owned()],
            type_url: SECRET.to_owned(),
            response_nonce: answer.nonce.clone(),
            error_detail,
            ..DiscoveryRequest::default()
        };
        self.say.send(request).await.unwrap();
    }
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn now() -> jiff::Timestamp {
    malha::runtime::clock::system().now()
}

fn authority() -> Authority {
    let mesh: TrustDomain = "cluster.local".parse().unwrap();
    let dice = [roll(), roll()];
    let policy = RotationPolicy::default();
    let (journal, _) = first(&mesh, new_key(), new_key(), dice, now(), &policy).unwrap();
    Authority::from_journal(&journal, &LeafPolicy::default()).unwrap()
}

fn joined(one: &str, other: &str) -> String {
    let both = Bundle::parse_pem(format!("{one}{other}").as_bytes());
    both.unwrap().to_pem()
}

fn new_key() -> SecretKey {
    let dice = SystemRandom::new();
    let der = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &dice).unwrap();
    SecretKey::from_pkcs8(Zeroizing::new(der.as_ref().to_vec())).unwrap()
}

fn roll() -> [u8; 16] {
    let mut bytes = [0; 16];
    rand::fill(&mut bytes).unwrap();
    bytes
}

fn serial() -> Serial {
    Serial::random(roll())
}

/// The control plane's own certificate, and client certificates of the mesh where they are shown.
fn tls(authority: &Authority) -> Arc<ServerConfig> {
    let key = new_key();
    let profile = Profile::ControlPlane {
        id: "spiffe://cluster.local/ns/malha-system/sa/malha"
            .parse()
            .unwrap(),
        dns_names: vec!["localhost".to_owned()],
    };
    let issued = authority
        .issue(&key.public_key(), &profile, DAY, serial(), now())
        .unwrap();
    let keyed = KeyedChain::new(issued, &key);
    let mut roots = RootCertStore::empty();
    for root in authority.bundle().certificates() {
        roots.add(CertificateDer::from(root.to_vec())).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
        .allow_unauthenticated()
        .build()
        .unwrap();
    let chain = keyed
        .chain
        .iter()
        .cloned()
        .map(CertificateDer::from)
        .collect();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(keyed.key.to_vec()));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

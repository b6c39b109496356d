//! A client of delta xDS that behaves as Envoy does and keeps nothing but versions: two hundred of them fit into a test.
//!
//! What it speaks with is generated from Envoy's own protos (`envoy-types`), and nothing of ours.
#![allow(
    dead_code,
    reason = "shared by several test programs, none of which uses all of it"
)]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use envoy_types::pb::{
    envoy::{
        config::core::v3::Node,
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse,
            aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
        },
    },
    google::rpc::Status as RpcStatus,
};
use hyper_util::rt::TokioIo;
use malha::proto::istio_ca::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio::{net::TcpStream, sync::mpsc};
use tokio_rustls::TlsConnector;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};

pub(crate) const CDS: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
pub(crate) const EDS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
pub(crate) const LDS: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
pub(crate) const RDS: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";
pub(crate) const SDS: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// What a client shows.
#[derive(Clone)]
pub(crate) struct Credentials {
    /// Leaf first.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: Arc<PrivateKeyDer<'static>>,
}

impl Credentials {
    /// From PEM.
    pub(crate) fn pem(chain: &str, key: &str) -> Self {
        Self {
            chain: CertificateDer::pem_slice_iter(chain.as_bytes())
                .collect::<Result<_, _>>()
                .expect("certificates in PEM"),
            key: Arc::new(PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key in PEM")),
        }
    }
}

/// A certificate for whom a token belongs to, through the door that every pod's agent goes through.
pub(crate) async fn certified(
    addr: SocketAddr,
    roots: &[CertificateDer<'static>],
    token: &str,
) -> Credentials {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("a key");
    let csr = rcgen::CertificateParams::default()
        .serialize_request(&key)
        .and_then(|csr| csr.pem())
        .expect("a CSR");
    let mut request = tonic::Request::new(IstioCertificateRequest {
        csr,
        ..IstioCertificateRequest::default()
    });
    let bearer = format!("Bearer {}", token.trim());
    let bearer = bearer.parse().expect("a token is ASCII");
    request.metadata_mut().insert("authorization", bearer);
    let channel = connect(addr, NAME, roots, None).await;
    let answer = IstioCertificateServiceClient::new(channel)
        .create_certificate(request)
        .await;
    let mut chain = answer.expect("a certificate").into_inner().cert_chain;
    chain.pop(); // the roots
    Credentials::pem(&chain.concat(), &key.serialize_pem())
}

/// By which the control plane is dialled.
pub(crate) const NAME: &str = "malha.malha-system.svc";

/// A connection to the control plane.
pub(crate) async fn connect(
    addr: SocketAddr,
    name: &'static str,
    roots: &[CertificateDer<'static>],
    shown: Option<Credentials>,
) -> Channel {
    let answer = try_connect(addr, name, roots, shown).await;
    answer.expect("the control plane answers over TLS")
}

/// A connection, or why there is none.
pub(crate) async fn try_connect(
    addr: SocketAddr,
    name: &'static str,
    roots: &[CertificateDer<'static>],
    shown: Option<Credentials>,
) -> Result<Channel, tonic::transport::Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone()).expect("a root certificate");
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider speaks TLS 1.3")
        .with_root_certificates(store);
    let mut config = match shown {
        Some(shown) => builder
            .with_client_auth_cert(shown.chain, shown.key.clone_key())
            .expect("key and chain fit"),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tls = TlsConnector::from(Arc::new(config));
    let connector = tower::service_fn(move |_| {
        let tls = tls.clone();
        async move {
            let tcp = TcpStream::connect(addr).await?;
            tcp.set_nodelay(true)?;
            let name = ServerName::try_from(name).expect("a DNS name");
            Ok::<_, io::Error>(TokioIo::new(tls.connect(name, tcp).await?))
        }
    });
    Endpoint::from_static("http://malha")
        .connect_with_connector(connector)
        .await
}

/// What a client knows: it outlives its connections, as Envoy's memory does.
#[derive(Clone, Debug, Default)]
pub(crate) struct Held {
    pub(crate) versions: BTreeMap<(&'static str, String), String>,
    pub(crate) asked: BTreeSet<(&'static str, String)>,
    /// Bodies of the kinds that a test looks into.
    pub(crate) bodies: BTreeMap<(&'static str, String), Vec<u8>>,
}

impl Held {
    pub(crate) fn count(&self, kind: &str) -> usize {
        self.versions.keys().filter(|(of, _)| *of == kind).count()
    }
}

/// One open stream.
pub(crate) struct Client {
    pub(crate) held: Held,
    requests: mpsc::UnboundedSender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
    /// Bytes of all responses on this stream.
    pub(crate) bytes: usize,
    pub(crate) responses_read: usize,
    /// What the last response told of.
    pub(crate) told: Vec<String>,
    /// Whether bodies are kept.
    pub(crate) keeps_bodies: bool,
}

fn kind_of(url: &str) -> &'static str {
    [CDS, EDS, LDS, RDS, SDS]
        .into_iter()
        .find(|kind| *kind == url)
        .expect("a type that was asked for")
}

impl Client {
    /// Opens a stream and asks for clusters and listeners, and for whatever was held before.
    pub(crate) async fn open(channel: Channel, node: &str, held: Held) -> Result<Self, Status> {
        Self::open_with(channel, node, held, &[CDS, LDS]).await
    }

    /// As an agent does.
    pub(crate) async fn open_for_bundle(channel: Channel, node: &str) -> Result<Self, Status> {
        let mut held = Held::default();
        held.asked.insert((SDS, "ROOTCA".to_owned()));
        Self::open_with(channel, node, held, &[]).await
    }

    async fn open_with(
        channel: Channel,
        node: &str,
        held: Held,
        wildcards: &[&'static str],
    ) -> Result<Self, Status> {
        let (requests, sent) = mpsc::unbounded_channel();
        let mut node = Some(Node {
            id: node.to_owned(),
            cluster: "test".to_owned(),
            user_agent_name: "envoy".to_owned(),
            ..Node::default()
        });
        for kind in [CDS, EDS, LDS, RDS, SDS] {
            let asked: Vec<_> = held
                .asked
                .iter()
                .filter(|(of, _)| *of == kind)
                .map(|(_, name)| name.clone())
                .collect();
            if asked.is_empty() && !wildcards.contains(&kind) {
                continue;
            }
            let versions: HashMap<_, _> = held
                .versions
                .iter()
                .filter(|((of, _), _)| *of == kind)
                .map(|((_, name), version)| (name.clone(), version.clone()))
                .collect();
            let request = DeltaDiscoveryRequest {
                node: node.take(),
                type_url: kind.to_owned(),
                resource_names_subscribe: asked,
                initial_resource_versions: versions,
                ..DeltaDiscoveryRequest::default()
            };
            requests.send(request).expect("the stream is not begun yet");
        }
        let sent = tokio_stream::wrappers::UnboundedReceiverStream::new(sent);
        let mut client =
            AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(64 << 20);
        let responses = client.delta_aggregated_resources(sent).await?.into_inner();
        Ok(Self {
            held,
            requests,
            responses,
            bytes: 0,
            responses_read: 0,
            told: Vec::new(),
            keeps_bodies: false,
        })
    }

    /// Reads one response and acknowledges it, asking for the endpoints of clusters and the routes of listeners as it
    /// learns of them; `None` where none comes in time.
    pub(crate) async fn step(&mut self, within: Duration) -> Option<Result<String, Status>> {
        let read = tokio::time::timeout(within, self.responses.message()).await;
        match read.ok()? {
            Ok(Some(response)) => Some(Ok(self.take(response, None))),
            Ok(None) => None,
            Err(status) => Some(Err(status)),
        }
    }

    /// Reads one response and refuses it.
    pub(crate) async fn refuse(&mut self, within: Duration, why: &str) -> Option<String> {
        let read = tokio::time::timeout(within, self.responses.message()).await;
        let response = read.ok()?.ok()??;
        Some(self.take(response, Some(why)))
    }

    /// Reads and acknowledges until nothing comes for `quiet`.
    pub(crate) async fn settle(&mut self, quiet: Duration) {
        while let Some(step) = self.step(quiet).await {
            step.expect("the stream goes on");
        }
    }

    fn take(&mut self, response: DeltaDiscoveryResponse, refused: Option<&str>) -> String {
        self.bytes += prost::Message::encoded_len(&response);
        self.responses_read += 1;
        self.told = response
            .resources
            .iter()
            .map(|it| it.name.clone())
            .collect();
        let kind = kind_of(&response.type_url);
        let mut wanted = Vec::new();
        if refused.is_none() {
            for resource in &response.resources {
                let key = (kind, resource.name.clone());
                self.held
                    .versions
                    .insert(key.clone(), resource.version.clone());
                if self.keeps_bodies
                    && let Some(body) = &resource.resource
                {
                    self.held.bodies.insert(key, body.value.clone());
                }
                if kind == CDS && self.held.asked.insert((EDS, resource.name.clone())) {
                    wanted.push(resource.name.clone());
                }
            }
            for name in &response.removed_resources {
                self.held.versions.remove(&(kind, name.clone()));
                self.held.bodies.remove(&(kind, name.clone()));
            }
        }
        let said = format!(
            "{} +{} -{}",
            kind.rsplit('.').next().unwrap_or_default(),
            response.resources.len(),
            response.removed_resources.len()
        );
        let error = refused.map(|why| RpcStatus {
            code: 13,
            message: why.to_owned(),
            details: Vec::new(),
        });
        self.send(DeltaDiscoveryRequest {
            type_url: kind.to_owned(),
            response_nonce: response.nonce,
            error_detail: error,
            ..DeltaDiscoveryRequest::default()
        });
        if !wanted.is_empty() {
            self.send(DeltaDiscoveryRequest {
                type_url: EDS.to_owned(),
                resource_names_subscribe: wanted,
                ..DeltaDiscoveryRequest::default()
            });
        }
        said
    }

    fn send(&self, request: DeltaDiscoveryRequest) {
        // a stream that ended says so when it is read
        let _ = self.requests.send(request);
    }
}

//! A control plane that a test tells what to say: certificates for whoever asks, and delta-ADS over the same TLS port.

use std::{pin::Pin, sync::Arc, time::Duration};

use aws_lc_rs::{
    rand::{self, SystemRandom},
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair},
};
use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::{
                Cluster,
                cluster::{ClusterDiscoveryType, DiscoveryType},
            },
            core::v3::{
                Address, SocketAddress, TrafficDirection, address, socket_address::PortSpecifier,
            },
            endpoint::v3::{
                ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints,
                lb_endpoint::HostIdentifier,
            },
            listener::v3::{Filter, FilterChain, Listener, filter},
            route::v3::{
                Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost, route,
                route_action::ClusterSpecifier, route_match::PathSpecifier,
            },
        },
        extensions::filters::{
            http::router::v3::Router,
            network::http_connection_manager::v3::{
                HttpConnectionManager, HttpFilter, http_connection_manager::RouteSpecifier,
                http_filter,
            },
        },
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
            Resource,
            aggregated_discovery_service_server::{
                AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
            },
        },
    },
    google::protobuf::Any,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use malha::{
    ca::{
        Authority, LeafPolicy, Serial,
        csr::{Csr, KeyPolicy},
        key::SecretKey,
        pem,
        profile::Profile,
        rotation::{RotationPolicy, first},
    },
    identity::{SpiffeId, TrustDomain},
    proto::istio_ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{
            IstioCertificateService, IstioCertificateServiceServer,
        },
    },
};
use prost::Message;
use tokio::{net::TcpListener, runtime::Runtime, sync::watch};
use tokio_rustls::TlsAcceptor;
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

/// The port that the control plane is asked for, and what is known of it.
pub(crate) struct Plane {
    pub(crate) port: u16,
    pub(crate) roots: String,
    told: watch::Sender<Option<Told>>,
    _runtime: Arc<Runtime>,
}

/// What proxies are told.
#[derive(Clone, Default)]
pub(crate) struct Told {
    pub(crate) clusters: Vec<Cluster>,
    pub(crate) listeners: Vec<Listener>,
}

impl Plane {
    /// A control plane that signs, and says nothing of listeners and clusters yet.
    pub(crate) fn start(runtime: &Arc<Runtime>) -> Self {
        let mesh: TrustDomain = "cluster.local".parse().expect("a trust domain");
        let policy = RotationPolicy::default();
        let now = malha::runtime::clock::system().now();
        let dice = [roll(), roll()];
        let (journal, _) = first(&mesh, key(), key(), dice, now, &policy).expect("a root");
        let authority = Authority::from_journal(&journal, &LeafPolicy::default());
        let authority = Arc::new(authority.expect("an authority"));
        let roots = authority.bundle().to_pem();
        let (told, tell) = watch::channel(None);
        let tls = server(&authority, &mesh, now);
        let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", 0)));
        let listener = listener.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let signing = IstioCertificateServiceServer::new(Signing { authority, now });
        let routes = tonic::service::Routes::new(signing)
            .add_service(AggregatedDiscoveryServiceServer::new(Ads { told: tell }))
            .prepare();
        runtime.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.expect("a connection");
                let (tls, routes) = (tls.clone(), routes.clone());
                tokio::spawn(async move {
                    let stream = tls.accept(stream).await?;
                    auto::Builder::new(TokioExecutor::new())
                        .http2_only()
                        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes))
                        .await
                });
            }
        });
        Self {
            port,
            roots,
            told,
            _runtime: Arc::clone(runtime),
        }
    }

    /// Tells all proxies, those that come later included.
    pub(crate) fn tell(&self, told: Told) {
        self.told.send_replace(Some(told));
    }
}

fn server(authority: &Authority, mesh: &TrustDomain, now: jiff::Timestamp) -> TlsAcceptor {
    let secret = key();
    let id = SpiffeId::new(mesh, "malha-system", "malha").expect("an id");
    let profile = Profile::ControlPlane {
        id,
        dns_names: vec!["localhost".to_owned()],
    };
    let day = Duration::from_secs(24 * 3600);
    let issued = authority.issue(
        &secret.public_key(),
        &profile,
        day,
        Serial::random(roll()),
        now,
    );
    let chain = issued.expect("a certificate").chain;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("a version")
        .with_no_client_auth()
        .with_single_cert(
            chain.into_iter().map(Into::into).collect(),
            rustls_pki_types::PrivatePkcs8KeyDer::from(secret.pkcs8().to_vec()).into(),
        )
        .expect("a pair");
    config.alpn_protocols = vec![b"h2".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

fn key() -> SecretKey {
    let der = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new());
    let der = der.expect("a key").as_ref().to_vec();
    SecretKey::from_pkcs8(zeroize::Zeroizing::new(der)).expect("a key")
}

fn roll<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).expect("dice");
    bytes
}

struct Signing {
    authority: Arc<Authority>,
    now: jiff::Timestamp,
}

#[tonic::async_trait]
impl IstioCertificateService for Signing {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let token = request.metadata().get("authorization");
        assert_eq!(token.expect("a token"), "Bearer the-token");
        let csr = Csr::parse_pem(request.get_ref().csr.as_bytes(), KeyPolicy::default())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let mesh = self.authority.trust_domain();
        let id = SpiffeId::new(mesh, "shop", "web").expect("an id");
        let issued = self.authority.issue(
            &csr.public_key,
            &Profile::Workload(id),
            Duration::from_secs(3600),
            Serial::random(roll()),
            self.now,
        );
        let issued = issued.map_err(|error| Status::internal(error.to_string()))?;
        let roots = self.authority.bundle().to_pem();
        let chain = issued
            .chain
            .iter()
            .map(|der| pem::encode("CERTIFICATE", der));
        Ok(Response::new(IstioCertificateResponse {
            cert_chain: chain.chain([roots]).collect(),
        }))
    }
}

struct Ads {
    told: watch::Receiver<Option<Told>>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type StreamAggregatedResourcesStream = Answers<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("delta only"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let mut requests = request.into_inner();
        let mut told = self.told.clone();
        let (answer, answers) = tokio::sync::mpsc::channel(8);
        tokio::spawn(async move {
            let mut types: Vec<String> = Vec::new();
            let mut nonce = 0;
            loop {
                let mut due = Vec::new();
                tokio::select! {
                    Some(Ok(request)) = requests.next() => {
                        if request.error_detail.is_some() {
                            eprintln!("refused: {:?}", request.error_detail);
                        }
                        if request.response_nonce.is_empty() {
                            types.push(request.type_url.clone());
                            due.push(request.type_url);
                        }
                    }
                    Ok(()) = told.changed() => due.clone_from(&types),
                    else => return,
                }
                let now = told.borrow_and_update().clone();
                let Some(now) = now else { continue };
                for type_url in due {
                    nonce += 1;
                    let response = DeltaDiscoveryResponse {
                        resources: now.resources(&type_url),
                        nonce: nonce.to_string(),
                        type_url,
                        ..Default::default()
                    };
                    if answer.send(Ok(response)).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";

impl Told {
    fn resources(&self, type_url: &str) -> Vec<Resource> {
        let clusters = self.clusters.iter();
        let clusters = clusters.map(|one| (CLUSTER, one.name.clone(), one.encode_to_vec()));
        let listeners = self.listeners.iter();
        let listeners = listeners.map(|one| (LISTENER, one.name.clone(), one.encode_to_vec()));
        clusters
            .chain(listeners)
            .filter(|(kind, ..)| *kind == type_url)
            .map(|(kind, name, value)| Resource {
                name,
                version: "00000000000000ab".to_owned(),
                resource: Some(Any {
                    type_url: kind.to_owned(),
                    value,
                }),
                ..Default::default()
            })
            .collect()
    }

    /// An inbound listener on `port` for an application at `app`, as far as these tests need one.
    pub(crate) fn inbound(port: u16, app: u16) -> Self {
        Self {
            clusters: vec![Cluster {
                name: "inbound|8080||".to_owned(),
                alt_stat_name: "inbound|8080||;".to_owned(),
                cluster_discovery_type: Some(ClusterDiscoveryType::Type(
                    DiscoveryType::Static.into(),
                )),
                load_assignment: Some(ClusterLoadAssignment {
                    cluster_name: "inbound|8080||".to_owned(),
                    endpoints: vec![LocalityLbEndpoints {
                        lb_endpoints: vec![LbEndpoint {
                            host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
                                address: Some(loopback(app)),
                                ..Default::default()
                            })),
                            ..Default::default()
                        }],
                        ..Default::default()
                    }],
                    ..Default::default()
                }),
                ..Default::default()
            }],
            listeners: vec![Listener {
                name: "virtualInbound".to_owned(),
                stat_prefix: "virtualInbound".to_owned(),
                address: Some(loopback(port)),
                traffic_direction: TrafficDirection::Inbound.into(),
                filter_chains: vec![FilterChain {
                    filters: vec![Filter {
                        name: "http".to_owned(),
                        config_type: Some(filter::ConfigType::TypedConfig(http())),
                    }],
                    ..Default::default()
                }],
                ..Default::default()
            }],
        }
    }
}

fn loopback(port: u16) -> Address {
    Address {
        address: Some(address::Address::SocketAddress(SocketAddress {
            address: "127.0.0.1".to_owned(),
            port_specifier: Some(PortSpecifier::PortValue(port.into())),
            ..Default::default()
        })),
    }
}

fn http() -> Any {
    let route = Route {
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
            ..Default::default()
        }),
        action: Some(route::Action::Route(RouteAction {
            cluster_specifier: Some(ClusterSpecifier::Cluster("inbound|8080||".to_owned())),
            ..Default::default()
        })),
        ..Default::default()
    };
    let manager = HttpConnectionManager {
        stat_prefix: "inbound_8080".to_owned(),
        route_specifier: Some(RouteSpecifier::RouteConfig(RouteConfiguration {
            name: "inbound|8080||".to_owned(),
            virtual_hosts: vec![VirtualHost {
                name: "all".to_owned(),
                domains: vec!["*".to_owned()],
                routes: vec![route],
                ..Default::default()
            }],
            ..Default::default()
        })),
        http_filters: vec![HttpFilter {
            name: "envoy.filters.http.router".to_owned(),
            config_type: Some(http_filter::ConfigType::TypedConfig(any(
                "envoy.extensions.filters.http.router.v3.Router",
                &Router::default(),
            ))),
            ..Default::default()
        }],
        ..Default::default()
    };
    any(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        &manager,
    )
}

fn any(name: &str, message: &impl Message) -> Any {
    Any {
        type_url: format!("type.googleapis.com/{name}"),
        value: message.encode_to_vec(),
    }
}

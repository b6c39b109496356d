//! The least that tells Envoy a catalogue: every resource again after every change, and secrets by the state of the world.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex},
};

use envoy_types::pb::envoy::{
    config::core::v3::{DataSource, data_source::Specifier},
    extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, Secret, TlsCertificate, secret,
    },
    service::{
        discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
            Resource,
            aggregated_discovery_service_server::{
                AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
            },
        },
        secret::v3::secret_discovery_service_server::{
            SecretDiscoveryService, SecretDiscoveryServiceServer,
        },
    },
};
use envoy_types::pb::google::protobuf::Any;
use malha::{
    identity::SpiffeId,
    mesh::Event,
    xds::{Catalogue, Kind},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use tokio::{
    net::UnixListener,
    sync::{mpsc, watch},
};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, UnixListenerStream},
};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use super::{super::validate::any, KINDS, proxy};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A root, and leaves of it.
pub(super) struct Authority {
    root: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(super) fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut parameters = CertificateParams::new(vec![]).expect("no names");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // A leaf of the same name would be taken for signed by itself.
        let name = &mut parameters.distinguished_name;
        name.push(rcgen::DnType::CommonName, "root of a test");
        let root = parameters.self_signed(&key).expect("a root").pem();
        let issuer = Issuer::new(parameters, key);
        Self { root, issuer }
    }

    fn secrets(&self, id: &SpiffeId) -> [Secret; 2] {
        let key = KeyPair::generate().expect("a key");
        let mut parameters = CertificateParams::new(vec![]).expect("no names");
        let uri = id.to_string().try_into().expect("ASCII");
        parameters.subject_alt_names = vec![SanType::URI(uri)];
        let leaf = parameters.signed_by(&key, &self.issuer).expect("a leaf");
        let text = |text: String| {
            Some(DataSource {
                specifier: Some(Specifier::InlineString(text)),
                ..DataSource::default()
            })
        };
        let certificate = TlsCertificate {
            certificate_chain: text(leaf.pem()),
            private_key: text(key.serialize_pem()),
            ..TlsCertificate::default()
        };
        let roots = CertificateValidationContext {
            trusted_ca: text(self.root.clone()),
            ..CertificateValidationContext::default()
        };
        [
            Secret {
                name: "default".to_owned(),
                r#type: Some(secret::Type::TlsCertificate(certificate)),
            },
            Secret {
                name: "ROOTCA".to_owned(),
                r#type: Some(secret::Type::ValidationContext(roots)),
            },
        ]
    }
}

/// The catalogue, being told.
pub(super) struct Told {
    shared: Arc<Shared>,
    _runtime: tokio::runtime::Runtime,
}

struct Shared {
    catalogue: Mutex<Catalogue>,
    turn: watch::Sender<u64>,
    secrets: BTreeMap<String, [Secret; 2]>,
    refusals: Mutex<Vec<String>>,
}

impl Told {
    /// Serves everybody at `directory/control`.
    pub(super) fn serve(
        catalogue: Catalogue,
        authority: &Authority,
        identities: [(&str, SpiffeId); 2],
        directory: &Path,
    ) -> Self {
        let secrets = identities.map(|(node, id)| (node.to_owned(), authority.secrets(&id)));
        let shared = Arc::new(Shared {
            catalogue: Mutex::new(catalogue),
            turn: watch::Sender::new(0),
            secrets: secrets.into(),
            refusals: Mutex::default(),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let socket = directory.join("control");
        let guard = runtime.enter();
        let listener = UnixListener::bind(socket).expect("a new socket");
        drop(guard);
        let service = Served(Arc::clone(&shared));
        runtime.spawn(
            Server::builder()
                .add_service(AggregatedDiscoveryServiceServer::new(service.clone()))
                .add_service(SecretDiscoveryServiceServer::new(service))
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        Self {
            shared,
            _runtime: runtime,
        }
    }

    pub(super) fn apply(&self, events: impl IntoIterator<Item = Event>) {
        self.shared
            .catalogue
            .lock()
            .expect("no panic")
            .apply(events);
        self.shared.turn.send_modify(|turn| *turn += 1);
    }

    pub(super) fn refusals(&self) -> Vec<String> {
        self.shared.refusals.lock().expect("no panic").clone()
    }
}

#[derive(Clone)]
struct Served(Arc<Shared>);

/// What one stream asked for, and was sent.
#[derive(Default)]
struct Asked {
    kinds: BTreeMap<Kind, BTreeSet<String>>,
    sent: BTreeMap<Kind, BTreeSet<String>>,
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Served {
    type StreamAggregatedResourcesStream = Answers<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("delta only"))
    }

    async fn delta_aggregated_resources(
        &self,
        requests: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let mut requests = requests.into_inner();
        let shared = Arc::clone(&self.0);
        let (answers, stream) = mpsc::channel(64);
        tokio::spawn(async move {
            let mut turn = shared.turn.subscribe();
            let mut asked = Asked::default();
            let mut node = String::new();
            loop {
                let kinds: Vec<Kind> = tokio::select! {
                    request = requests.message() => {
                        let Ok(Some(request)) = request else { return };
                        if let Some(from) = &request.node {
                            node.clone_from(&from.id);
                        }
                        if let Some(error) = &request.error_detail {
                            let text = format!("{node}: {}", error.message);
                            shared.refusals.lock().expect("no panic").push(text);
                        }
                        let Some(kind) = KINDS.into_iter().find(|kind| type_url(*kind) == request.type_url) else {
                            continue;
                        };
                        let first = !asked.kinds.contains_key(&kind);
                        let names = asked.kinds.entry(kind).or_default();
                        let more = !request.resource_names_subscribe.is_empty();
                        names.extend(request.resource_names_subscribe);
                        for name in request.resource_names_unsubscribe {
                            names.remove(&name);
                        }
                        if !first && !more {
                            continue;
                        }
                        vec![kind]
                    }
                    changed = turn.changed() => {
                        if changed.is_err() { return }
                        KINDS.into_iter().filter(|kind| asked.kinds.contains_key(kind)).collect()
                    }
                };
                for kind in kinds {
                    let answer = asked.answer(&shared, &node, kind);
                    if answers.send(Ok(answer)).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

impl Asked {
    fn answer(&mut self, shared: &Shared, node: &str, kind: Kind) -> DeltaDiscoveryResponse {
        let catalogue = shared.catalogue.lock().expect("no panic");
        let proxy = proxy(node);
        let found = match kind {
            Kind::Cluster | Kind::Listener => catalogue.all(&proxy, kind),
            _ => {
                let names = self.kinds[&kind].iter();
                names
                    .filter_map(|name| catalogue.find(&proxy, kind, name))
                    .collect()
            }
        };
        let now: BTreeSet<String> = found.iter().map(|one| one.name.to_string()).collect();
        let before = self.sent.insert(kind, now.clone()).unwrap_or_default();
        let resource = |one: Arc<malha::xds::Resource>| Resource {
            name: one.name.to_string(),
            version: format!("{:016x}", one.version),
            resource: Some(Any {
                type_url: type_url(kind).to_owned(),
                value: one.body.to_vec(),
            }),
            ..Resource::default()
        };
        DeltaDiscoveryResponse {
            type_url: type_url(kind).to_owned(),
            nonce: "n".to_owned(),
            resources: found.into_iter().map(resource).collect(),
            removed_resources: before.difference(&now).cloned().collect(),
            ..DeltaDiscoveryResponse::default()
        }
    }
}

fn type_url(kind: Kind) -> &'static str {
    kind.type_url()
}

#[tonic::async_trait]
impl SecretDiscoveryService for Served {
    type DeltaSecretsStream = Answers<DeltaDiscoveryResponse>;
    type StreamSecretsStream = Answers<DiscoveryResponse>;

    async fn delta_secrets(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        Err(Status::unimplemented("the state of the world only"))
    }

    async fn stream_secrets(
        &self,
        requests: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        let mut requests = requests.into_inner();
        let shared = Arc::clone(&self.0);
        let (answers, stream) = mpsc::channel(4);
        tokio::spawn(async move {
            let mut node = String::new();
            while let Ok(Some(request)) = requests.message().await {
                if let Some(from) = &request.node {
                    node.clone_from(&from.id);
                }
                if !request.version_info.is_empty() {
                    continue;
                }
                let secrets = shared.secrets[&node].iter();
                let wanted = secrets.filter(|one| request.resource_names.contains(&one.name));
                let answer = DiscoveryResponse {
                    version_info: "1".to_owned(),
                    nonce: "1".to_owned(),
                    type_url: request.type_url,
                    resources: wanted.map(any).collect(),
                    ..DiscoveryResponse::default()
                };
                if answers.send(Ok(answer)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn fetch_secrets(
        &self,
        _: Request<DiscoveryRequest>,
    ) -> Result<Response<DiscoveryResponse>, Status> {
        Err(Status::unimplemented("streams only"))
    }
}

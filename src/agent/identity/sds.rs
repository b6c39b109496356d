//! Envoy's Secret Discovery Service on a Unix socket: certificate and key as `default`, the roots as `ROOTCA`.
//!
//! identity -> [`Subscription`] of each stream -> Envoy; its ACKs and NACKs -> [`Board`] -> readiness, the push's ACK
//!
//! Envoy opens one stream for each secret, state-of-the-world or delta; both are the same conversation in other words.
//! Nothing is answered before there is an identity: Envoy holds its listeners until then (`initial_fetch_timeout: 0s`).

mod board;
mod subscription;

use std::{path::Path, pin::Pin, sync::Arc};

use envoy_types::pb::{
    envoy::{
        config::core::v3::{DataSource, data_source::Specifier},
        extensions::transport_sockets::tls::v3::{
            CertificateValidationContext, Secret, TlsCertificate, secret,
        },
        service::{
            discovery::v3::{
                DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
                Resource,
            },
            secret::v3::secret_discovery_service_server::{
                SecretDiscoveryService, SecretDiscoveryServiceServer,
            },
        },
    },
    google::protobuf::Any,
};
use futures::{Stream, stream};
use prost::Message;
use tokio::{net::UnixListener, sync::watch};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, transport::Server};
use zeroize::Zeroize;

use self::subscription::{Asked, Heard, Subscription};
pub use self::{
    board::{Board, Holding},
    subscription::{SecretName, Version},
};
use super::{Identity, Metrics, socket};
use crate::{agent::identity::SocketError, ca::pem};

/// The type of everything that is served here.
pub(super) const SECRET_TYPE: &str =
    "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// The socket, taken but not served yet.
pub struct Sds {
    listener: UnixListener,
    speaker: Speaker,
}

/// What every stream is given.
#[derive(Clone)]
struct Speaker {
    identities: watch::Receiver<Option<Arc<Identity>>>,
    board: Board,
    metrics: Metrics,
    stop: CancellationToken,
}

impl Sds {
    /// Takes the socket: for its owner alone, since it hands out the private key.
    ///
    /// # Errors
    /// The path that cannot be taken.
    pub fn bind(
        path: &Path,
        identities: watch::Receiver<Option<Arc<Identity>>>,
        board: Board,
        metrics: Metrics,
    ) -> Result<Self, SocketError> {
        Ok(Self {
            listener: socket::bind(path, 0o600)?,
            speaker: Speaker {
                identities,
                board,
                metrics,
                stop: CancellationToken::new(),
            },
        })
    }

    /// Serves until `stop`.
    ///
    /// # Errors
    /// The transport's.
    pub async fn serve(mut self, stop: CancellationToken) -> Result<(), tonic::transport::Error> {
        self.speaker.stop = stop.clone();
        let incoming = UnixListenerStream::new(self.listener);
        Server::builder()
            .max_concurrent_streams(MAX_STREAMS)
            .add_service(SecretDiscoveryServiceServer::new(self.speaker))
            .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
            .await
    }
}

/// Envoy has one for each secret of each cluster and listener that spells the source differently.
const MAX_STREAMS: u32 = 1024;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl SecretDiscoveryService for Speaker {
    type StreamSecretsStream = Answers<DiscoveryResponse>;
    type DeltaSecretsStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        Ok(Response::new(self.converse(request.into_inner())))
    }

    async fn delta_secrets(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        Ok(Response::new(self.converse(request.into_inner())))
    }

    async fn fetch_secrets(
        &self,
        _: Request<DiscoveryRequest>,
    ) -> Result<Response<DiscoveryResponse>, Status> {
        Err(Status::unimplemented(
            "secrets are streamed: set api_type to GRPC or DELTA_GRPC",
        ))
    }
}

impl Speaker {
    fn converse<Q: Ask, A: Answer>(&self, requests: Streaming<Q>) -> Answers<A> {
        let conversation = Conversation {
            requests,
            subscription: Subscription::default(),
            seat: self.board.take_seat(),
            speaker: self.clone(),
        };
        Box::pin(stream::unfold(
            Some(conversation),
            |conversation| async move {
                let mut conversation = conversation?;
                match conversation.next().await {
                    Ok(Some(answer)) => Some((Ok(answer), Some(conversation))),
                    Ok(None) => None,
                    Err(status) => Some((Err(status), None)),
                }
            },
        ))
    }
}

/// One stream.
struct Conversation<Q> {
    requests: Streaming<Q>,
    subscription: Subscription,
    seat: board::Seat,
    speaker: Speaker,
}

impl<Q: Ask> Conversation<Q> {
    /// Waits for the next thing to say; none where the stream ends.
    async fn next<A: Answer>(&mut self) -> Result<Option<A>, Status> {
        loop {
            let identity = self.speaker.identities.borrow_and_update().clone();
            if let Some(answer) = identity.and_then(|identity| self.answer(&identity)) {
                return Ok(Some(answer));
            }
            tokio::select! {
                () = self.speaker.stop.cancelled() => return Ok(None),
                request = self.requests.message() => match request {
                    Ok(Some(request)) => self.hear(&request)?,
                    // Envoy went away; how does not matter.
                    Ok(None) | Err(_) => return Ok(None),
                },
                changed = self.speaker.identities.changed() => if changed.is_err() {
                    return Ok(None);
                },
            }
        }
    }

    fn answer<A: Answer>(&mut self, identity: &Identity) -> Option<A> {
        let told = self.subscription.tell(&identity.versions())?;
        let secrets = told.secrets.iter().map(|(name, version)| {
            self.speaker.metrics.sent(*name);
            (*name, *version, secret(*name, identity))
        });
        Some(A::of(told.nonce.to_string(), secrets.collect()))
    }

    fn hear(&mut self, request: &Q) -> Result<(), Status> {
        if !request.type_url().is_empty() && request.type_url() != SECRET_TYPE {
            return Err(Status::invalid_argument(format!(
                "{} is not served here: this is SDS",
                request.type_url()
            )));
        }
        let metrics = &self.speaker.metrics;
        match self.subscription.hear(&request.asked()) {
            Heard::Asked { unknown } => {
                for name in unknown {
                    tracing::warn!(
                        secret = name,
                        "Envoy asks for a secret that is not served here and will wait for it; the names are `default` and `ROOTCA`"
                    );
                    metrics.unknown();
                }
            }
            Heard::Acknowledged(secrets) => {
                for (name, version) in secrets {
                    tracing::debug!(secret = %name, %version, "Envoy took a secret");
                    metrics.acknowledged(name);
                    self.seat.holds(name, version);
                }
            }
            Heard::Refused(secrets, why) => {
                for (name, version) in secrets {
                    tracing::error!(
                        secret = %name, %version, error = why,
                        "Envoy refused a secret and goes on with the one it has; it is not sent again"
                    );
                    metrics.refused(name);
                    self.seat.refuses(name, version, &why);
                }
            }
            Heard::Late => {}
        }
        Ok(())
    }
}

/// What both protocols ask, in their words.
trait Ask: Send + 'static {
    fn type_url(&self) -> &str;
    fn asked(&self) -> Asked<'_>;
}

/// What both protocols answer, in their words.
trait Answer: Send + 'static {
    fn of(nonce: String, secrets: Vec<(SecretName, Version, Any)>) -> Self;
}

impl Ask for DiscoveryRequest {
    fn type_url(&self) -> &str {
        &self.type_url
    }

    fn asked(&self) -> Asked<'_> {
        Asked {
            whole: Some(&self.resource_names),
            subscribe: &[],
            unsubscribe: &[],
            nonce: &self.response_nonce,
            error: self.error_detail.as_ref().map(|e| e.message.as_str()),
        }
    }
}

impl Ask for DeltaDiscoveryRequest {
    fn type_url(&self) -> &str {
        &self.type_url
    }

    fn asked(&self) -> Asked<'_> {
        Asked {
            whole: None,
            subscribe: &self.resource_names_subscribe,
            unsubscribe: &self.resource_names_unsubscribe,
            nonce: &self.response_nonce,
            error: self.error_detail.as_ref().map(|e| e.message.as_str()),
        }
    }
}

impl Answer for DiscoveryResponse {
    fn of(nonce: String, secrets: Vec<(SecretName, Version, Any)>) -> Self {
        let versions = secrets.iter().map(|(_, version, _)| version.to_string());
        Self {
            version_info: versions.collect::<Vec<_>>().join("-"),
            resources: secrets.into_iter().map(|(_, _, body)| body).collect(),
            type_url: SECRET_TYPE.to_owned(),
            nonce,
            ..Self::default()
        }
    }
}

impl Answer for DeltaDiscoveryResponse {
    fn of(nonce: String, secrets: Vec<(SecretName, Version, Any)>) -> Self {
        let resources = secrets.into_iter().map(|(name, version, body)| Resource {
            name: name.to_string(),
            version: version.to_string(),
            resource: Some(body),
            ..Resource::default()
        });
        Self {
            resources: resources.collect(),
            type_url: SECRET_TYPE.to_owned(),
            nonce,
            ..Self::default()
        }
    }
}

/// A secret as Envoy reads it.
///
/// What is made here on the way is wiped; what the transport does with the bytes is beyond reach, and Envoy, which gets
/// them, is in the same container.
fn secret(name: SecretName, identity: &Identity) -> Any {
    let body = match name {
        SecretName::Default => secret::Type::TlsCertificate(TlsCertificate {
            certificate_chain: Some(inline(chain(identity))),
            private_key: Some(inline(pem::encode("PRIVATE KEY", &identity.keyed.key))),
            ..TlsCertificate::default()
        }),
        SecretName::RootCa => secret::Type::ValidationContext(CertificateValidationContext {
            trusted_ca: Some(inline(identity.bundle.to_pem())),
            ..CertificateValidationContext::default()
        }),
    };
    let mut secret = Secret {
        name: name.to_string(),
        r#type: Some(body),
    };
    let value = secret.encode_to_vec();
    wipe(&mut secret);
    Any {
        type_url: SECRET_TYPE.to_owned(),
        value,
    }
}

fn chain(identity: &Identity) -> String {
    let chain = identity.keyed.chain.iter();
    chain.map(|der| pem::encode("CERTIFICATE", der)).collect()
}

fn inline(pem: String) -> DataSource {
    DataSource {
        specifier: Some(Specifier::InlineBytes(pem.into_bytes())),
        ..DataSource::default()
    }
}

fn wipe(secret: &mut Secret) {
    if let Some(secret::Type::TlsCertificate(certificate)) = &mut secret.r#type
        && let Some(key) = &mut certificate.private_key
        && let Some(Specifier::InlineBytes(bytes)) = &mut key.specifier
    {
        bytes.zeroize();
    }
}

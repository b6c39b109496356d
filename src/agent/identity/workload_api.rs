//! The SPIFFE Workload API on a Unix socket of the pod, X.509 half.
//!
//! identity -> [`svid_response`], [`bundles_response`] -> every program in the pod that asks, again at each change
//!
//! The pod is the attestation: who can reach the socket is in the pod, and is told the pod's identity.

use std::{path::Path, pin::Pin, sync::Arc};

use futures::{Stream, stream};
use tokio::{net::UnixListener, sync::watch};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, transport::Server};

use super::{Identity, SocketError, sds::Version, socket};
use crate::{
    clock::Clock,
    proto::workload::{
        JwtBundlesRequest, JwtBundlesResponse, JwtsvidRequest, JwtsvidResponse,
        ValidateJwtsvidRequest, ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse,
        X509svid, X509svidRequest, X509svidResponse,
        spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer},
    },
};

/// The socket, taken but not served yet.
pub struct WorkloadApi {
    listener: UnixListener,
    speaker: Speaker,
}

struct Speaker {
    identities: watch::Receiver<Option<Arc<Identity>>>,
    clock: Clock,
    stop: CancellationToken,
}

impl WorkloadApi {
    /// Takes the socket, for everybody who can see it: the application runs as a user of its own.
    ///
    /// # Errors
    /// The path that cannot be taken.
    pub fn bind(
        path: &Path,
        identities: watch::Receiver<Option<Arc<Identity>>>,
        clock: Clock,
    ) -> Result<Self, SocketError> {
        Ok(Self {
            listener: socket::bind(path, 0o777)?,
            speaker: Speaker {
                identities,
                clock,
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
        let service =
            SpiffeWorkloadApiServer::new(self.speaker).max_decoding_message_size(LARGEST_REQUEST);
        Server::builder()
            .max_concurrent_streams(MAX_STREAMS)
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
            .await
    }
}

/// Requests of this API are empty, or hold a token.
const LARGEST_REQUEST: usize = 16 * 1024;
/// Of one connection.
const MAX_STREAMS: u32 = 100;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl SpiffeWorkloadApi for Speaker {
    type FetchX509SVIDStream = Answers<X509svidResponse>;
    type FetchX509BundlesStream = Answers<X509BundlesResponse>;
    type FetchJWTBundlesStream = Answers<JwtBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        self.stream(&request, svid_response, |identity| {
            identity.versions().map(|(_, version)| version)
        })
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        self.stream(&request, bundles_response, |identity| {
            let [_, (_, roots)] = identity.versions();
            [roots; 2]
        })
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<JwtsvidRequest>,
    ) -> Result<Response<JwtsvidResponse>, Status> {
        Err(no_tokens(&request))
    }

    async fn fetch_jwt_bundles(
        &self,
        request: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        Err(no_tokens(&request))
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        Err(no_tokens(&request))
    }
}

impl Speaker {
    /// A response now, and a whole one again whenever what `matters` has changed.
    fn stream<Q, A: Send + 'static>(
        &self,
        request: &Request<Q>,
        compose: fn(&Identity) -> A,
        matters: fn(&Identity) -> [Version; 2],
    ) -> Result<Response<Answers<A>>, Status> {
        check(request)?;
        let mut identities = self.identities.clone();
        let first = identities.borrow_and_update().clone();
        let now = self.clock.now();
        let first = first.filter(|identity| identity.keyed.validity.not_after > now);
        let first = first.ok_or_else(no_identity)?;
        let follow = Follow {
            identities,
            next: Some(first),
            told: None,
            matters,
            stop: self.stop.clone(),
        };
        let answers = stream::unfold(follow, move |mut follow| async move {
            let identity = follow.next().await?;
            Some((Ok(compose(&identity)), follow))
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

/// One stream.
struct Follow {
    identities: watch::Receiver<Option<Arc<Identity>>>,
    next: Option<Arc<Identity>>,
    told: Option<[Version; 2]>,
    matters: fn(&Identity) -> [Version; 2],
    stop: CancellationToken,
}

impl Follow {
    /// The next identity that is news to this stream.
    async fn next(&mut self) -> Option<Arc<Identity>> {
        loop {
            if let Some(identity) = self.next.take() {
                let versions = Some((self.matters)(&identity));
                if self.told != versions {
                    self.told = versions;
                    return Some(identity);
                }
            }
            tokio::select! {
                () = self.stop.cancelled() => return None,
                changed = self.identities.changed() => changed.ok()?,
            }
            self.next = self.identities.borrow_and_update().clone();
        }
    }
}

/// SPIFFE Workload Endpoint section 3: a browser or a proxy that is tricked into calling does not know this header.
fn check<Q>(request: &Request<Q>) -> Result<(), Status> {
    match request.metadata().get("workload.spiffe.io") {
        Some(value) if value == "true" => Ok(()),
        _ => Err(Status::invalid_argument(
            "send the metadata workload.spiffe.io: true with each call",
        )),
    }
}

/// SPIFFE Workload API section 4: no identity now; the caller asks again.
fn no_identity() -> Status {
    Status::permission_denied("this pod has no identity yet; ask again")
}

fn no_tokens<Q>(request: &Request<Q>) -> Status {
    match check(request) {
        Ok(()) => Status::unimplemented("JWT-SVIDs are not issued here; use the X.509 calls"),
        Err(status) => status,
    }
}

/// The pod's one identity.
fn svid_response(identity: &Identity) -> X509svidResponse {
    X509svidResponse {
        svids: vec![X509svid {
            spiffe_id: identity.id.to_string(),
            x509_svid: identity.keyed.chain.concat(),
            x509_svid_key: identity.keyed.key.to_vec(),
            bundle: bundle(identity),
            hint: String::new(),
        }],
        ..X509svidResponse::default()
    }
}

/// The bundle of the pod's own trust domain.
fn bundles_response(identity: &Identity) -> X509BundlesResponse {
    let own = identity.id.trust_domain().uri();
    X509BundlesResponse {
        bundles: [(own, bundle(identity))].into(),
        ..X509BundlesResponse::default()
    }
}

fn bundle(identity: &Identity) -> Vec<u8> {
    let roots: Vec<_> = identity.bundle.certificates().collect();
    roots.concat()
}

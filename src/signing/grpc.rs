//! The signing service over gRPC, as Istio's agents, ztunnel and our own agent speak it:
//! `istio.v1.auth.IstioCertificateService/CreateCertificate`.
//!
//! Metadata `authorization: Bearer TOKEN` (or a client certificate, to renew it) and `clusterid`; the message holds the
//! CSR and for how long. The answer is a list of PEM texts: the leaf, each intermediate, last all roots in one. A refusal
//! carries its stable code as metadata
//! `malha-code`, and where time heals it, `grpc-retry-pushback-ms`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderMap, Response, header},
    routing::post,
};
use envoy_types::pb::google::protobuf::{Struct, Value, value};
use http_body_util::BodyExt;
use tokio::time::timeout;
use tonic::{Code, Status, body::Body, metadata::MetadataMap, server::Grpc};
use tonic_prost::ProstCodec;

use super::{
    Admitted, Encoded, Granted, Outcome, Refusal, Signing,
    http::{BODY_TIMEOUT, bearer, credential, read_on},
};
use crate::{
    ca::pem,
    caller::{Authenticate, CallerError, NotImpersonated},
    proto::istio_ca::{IstioCertificateRequest, IstioCertificateResponse},
};

const METHOD: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// The one method; without a fallback, so that other services fit beside it.
pub(super) fn routes<A: Authenticate>(signing: Arc<Signing<A>>) -> Router {
    Router::new()
        .route(METHOD, post(create_certificate::<A>))
        .with_state(signing)
}

/// Whether a request is a call of gRPC, and not of something else over HTTP.
pub(super) fn is_call(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// What a call of anything else is told.
pub(super) fn unimplemented(path: &str) -> Response<axum::body::Body> {
    Status::unimplemented(format!("{path} is not served here")).into_http()
}

/// The credential first, and only then the message: nothing is kept for senders who are not known.
async fn create_certificate<A: Authenticate>(
    State(signing): State<Arc<Signing<A>>>,
    request: Request,
) -> Response<Body> {
    let token = of_our_cluster(request.headers(), &signing.cluster)
        .and_then(|()| bearer(request.headers()));
    let credential = credential(token, request.extensions());
    match signing.admit(credential).await {
        Ok(admitted) => serve(&admitted, signing.limits.body, request).await,
        Err(refusal) => {
            read_on(request.version(), request.into_body());
            status(&refusal).into_http()
        }
    }
}

/// Istio's agents say of which cluster they are. It would choose who verifies their token, and there is one: ours.
fn of_our_cluster(headers: &HeaderMap, ours: &str) -> Result<(), CallerError> {
    let foreign = |named: &&axum::http::HeaderValue| {
        let named = named.as_bytes().trim_ascii();
        !named.is_empty() && named != ours.as_bytes()
    };
    match headers.get_all("clusterid").iter().find(foreign) {
        Some(named) => Err(CallerError::UnknownCluster(
            String::from_utf8_lossy(named.as_bytes()).into_owned(),
        )),
        None => Ok(()),
    }
}

/// tonic reads the message, in time and below its limit, and writes the answer.
async fn serve<A: Authenticate>(
    admitted: &Admitted<'_, A>,
    limit: usize,
    request: Request,
) -> Response<Body> {
    let read = AtomicBool::new(false);
    let asked = tower::service_fn(|asked: tonic::Request<IstioCertificateRequest>| {
        read.store(true, Ordering::Relaxed);
        let answer = certify(admitted, asked.get_ref());
        async move {
            let granted = answer.map_err(|refusal| status(&refusal))?;
            let cert_chain = chain(&granted);
            Ok(tonic::Response::new(IstioCertificateResponse {
                cert_chain,
            }))
        }
    });
    let mut grpc = Grpc::new(ProstCodec::default()).max_decoding_message_size(limit);
    let request = request.map(|body| body.boxed_unsync());
    let answered = timeout(BODY_TIMEOUT, grpc.unary(asked, request)).await;
    let refusal = match answered {
        Ok(response) if read.load(Ordering::Relaxed) => return response,
        Ok(response) => match unread(&response, limit) {
            Some(refusal) => refusal,
            None => return response,
        },
        Err(_) => Refusal::BadRequest("the message took too long to arrive".to_owned()),
    };
    status(&admitted.refuse(refusal)).into_http()
}

/// Why tonic did not come so far as to hand the message on; `None` where it speaks for itself (a compression that nobody
/// offered).
fn unread(response: &Response<Body>, limit: usize) -> Option<Refusal> {
    let status = response.extensions().get::<Status>()?;
    match status.code() {
        Code::Unimplemented => None,
        Code::OutOfRange | Code::ResourceExhausted => Some(Refusal::BodyTooLarge(limit)),
        _ => Some(Refusal::BadRequest(format!(
            "the message cannot be read: {}",
            status.message()
        ))),
    }
}

fn certify<A: Authenticate>(
    admitted: &Admitted<'_, A>,
    asked: &IstioCertificateRequest,
) -> Result<Granted, Refusal> {
    let metadata = asked.metadata.as_ref();
    let target = metadata.map_or(Ok(None), understand);
    let target = target.map_err(|refusal| admitted.refuse(refusal))?;
    // 0 or less: as long as we like
    let life = u64::try_from(asked.validity_duration)
        .ok()
        .filter(|&seconds| seconds > 0)
        .map(Duration::from_secs);
    let csr = Encoded::Pem(asked.csr.as_bytes());
    match target {
        Some(target) => admitted.certify_for(target, csr, life),
        None => admitted.certify(csr, life),
    }
}

/// What else a request may say: for whom the certificate is, if not for the caller. What is not understood is refused: it
/// might mean that somebody else is meant.
fn understand(metadata: &Struct) -> Result<Option<&str>, Refusal> {
    let mut target = None;
    for (name, value) in &metadata.fields {
        match name.as_str() {
            _ if is_empty(value) => {}
            "CertSigner" => {
                return Err(Refusal::BadRequest(
                    "CertSigner names an authority, and there is one here; leave it empty"
                        .to_owned(),
                ));
            }
            "ImpersonatedIdentity" => match &value.kind {
                Some(value::Kind::StringValue(text)) => target = Some(text.as_str()),
                _ => return Err(NotImpersonated::NoIdentity.into()),
            },
            other => {
                let other: String = other.escape_debug().take(64).collect();
                return Err(Refusal::BadRequest(format!(
                    "the metadata {other} is not understood here"
                )));
            }
        }
    }
    Ok(target)
}

fn is_empty(value: &Value) -> bool {
    match &value.kind {
        None | Some(value::Kind::NullValue(_)) => true,
        Some(value::Kind::StringValue(text)) => text.is_empty(),
        Some(_) => false,
    }
}

/// One certificate in each text but the last, which holds all roots: ztunnel reads one from each, and Istio's agents take
/// the last for what to trust.
fn chain(granted: &Granted) -> Vec<String> {
    granted
        .chain
        .iter()
        .map(|der| pem::encode("CERTIFICATE", der))
        .chain([granted.trust_bundle.clone()])
        .collect()
}

fn status(refusal: &Refusal) -> Status {
    let mut metadata = MetadataMap::new();
    if let Ok(code) = refusal.code().parse() {
        metadata.insert("malha-code", code);
    }
    // "try again, and not before": https://github.com/grpc/proposal/blob/master/A6-client-retries.md#pushback
    if refusal.outcome() == Outcome::Throttled
        && let Some(wait) = refusal.retry_after()
        && let Ok(wait) = wait.as_millis().to_string().parse()
    {
        metadata.insert("grpc-retry-pushback-ms", wait);
    }
    Status::with_metadata(code(refusal), refusal.client_text(), metadata)
}

/// Istio's agents try again only after Canceled, DeadlineExceeded, ResourceExhausted, Aborted, Internal and Unavailable:
/// whatever time can heal is among them.
fn code(refusal: &Refusal) -> Code {
    match refusal.outcome() {
        Outcome::Issued => Code::Ok,
        Outcome::Invalid => Code::InvalidArgument,
        Outcome::Denied => Code::Unauthenticated,
        Outcome::Throttled => Code::ResourceExhausted,
        Outcome::Error if refusal.retry_after().is_some() => Code::Unavailable,
        Outcome::Error => Code::Internal,
    }
}

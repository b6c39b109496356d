//! The signing service over HTTP, for curl, cron and everything that speaks no gRPC.
//!
//! `POST /v1/certificates`: bearer token or client certificate, and a CSR, as `application/json` (`{"csr": PEM,
//! "ttl_seconds": 3600}`, where any other field is refused: a misspelt `ttl` that is silently ignored costs somebody a
//! night) or by itself as `application/pkcs10` (DER as RFC 5967 has it, or PEM). 201 with the chain and the bundle, or a
//! problem (RFC 9457).
//!
//! `GET /v1/bundle`: the trust bundle, PEM. It is public, so no credential is asked for.

use std::{borrow::Cow, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes, HttpBody as _},
    extract::{ConnectInfo, Request, State},
    http::{
        Extensions, HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Version, header,
        request::Parts,
    },
    routing::{get, post},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::{Deserialize, Serialize};

use super::{Admitted, Credential, Encoded, Granted, Outcome, Refusal, Signing};
use crate::{
    ca::pem,
    caller::{Authenticate, CallerError},
    tls::Peer,
};

/// How long a body may take. A CSR fits into two packets, and its sender holds a place in the queue meanwhile.
pub(super) const BODY_TIMEOUT: Duration = Duration::from_secs(5);

/// The two resources, and 405 for their other methods; without a fallback, so that other services fit beside them.
pub(super) fn routes<A: Authenticate>(signing: Arc<Signing<A>>) -> Router {
    Router::new()
        .route(
            "/v1/certificates",
            post(certificates::<A>).fallback(method_not_allowed),
        )
        .route("/v1/bundle", get(bundle::<A>).fallback(method_not_allowed))
        .with_state(signing)
}

async fn bundle<A: Authenticate>(State(signing): State<Arc<Signing<A>>>) -> Response<Body> {
    // RFC 8555 9.1 registers the type for PEM texts of certificates
    let kind = HeaderValue::from_static("application/pem-certificate-chain");
    answer(StatusCode::OK, kind, signing.trust_bundle())
}

async fn certificates<A: Authenticate>(
    State(signing): State<Arc<Signing<A>>>,
    request: Request,
) -> Response<Body> {
    let (head, mut body) = request.into_parts();
    match certify(&signing, &head, &mut body).await {
        Ok(granted) => {
            let text = serde_json::to_string(&Certificate::of(&granted))
                .expect("a certificate's answer is texts");
            let kind = HeaderValue::from_static("application/json");
            answer(StatusCode::CREATED, kind, text)
        }
        Err(refusal) => {
            read_on(head.version, body);
            problem(&refusal)
        }
    }
}

async fn certify<A: Authenticate>(
    signing: &Signing<A>,
    head: &Parts,
    body: &mut Body,
) -> Result<Granted, Refusal> {
    let credential = credential(bearer(&head.headers), &head.extensions);
    let admitted = signing.admit(credential).await?;
    let kind = Kind::of(&head.headers).map_err(|e| admitted.refuse(e))?;
    let body = read(body, signing.limits.body)
        .await
        .map_err(|e| admitted.refuse(e))?;
    match kind {
        Kind::Json => certify_json(&admitted, &body),
        Kind::Pkcs10 => admitted.certify(encoded(&body), None),
    }
}

/// Reads on for a while what the sender of a refused request is still busy sending.
///
/// To drop a body that is under way resets its stream, as RFC 9113 8.1 allows. Some clients then report the reset instead
/// of the answer that came before it: curl 7.88 shows `Stream error in the HTTP/2 framing layer` where it should show a
/// 401. (Over HTTP/1.1 it is the listener that reads on before it closes.) Not owned by anybody: it ends by itself.
pub(super) fn read_on(version: Version, mut body: Body) {
    const PATIENCE: Duration = Duration::from_secs(5);
    const MOST: usize = 16 << 20;
    if version != Version::HTTP_2 || body.is_end_stream() {
        return;
    }
    let reading = async move {
        let mut read = 0;
        while let Some(Ok(frame)) = body.frame().await
            && read < MOST
        {
            read += frame.data_ref().map_or(0, Bytes::len);
        }
    };
    // whoever still sends after that will see the reset
    tokio::spawn(tokio::time::timeout(PATIENCE, reading));
}

fn certify_json<A: Authenticate>(
    admitted: &Admitted<'_, A>,
    body: &[u8],
) -> Result<Granted, Refusal> {
    let asked: Asked<'_> = serde_json::from_slice(body).map_err(|e| {
        admitted.refuse(Refusal::BadRequest(format!(
            "the body is not what it should be: {e}"
        )))
    })?;
    // below zero, with a fraction, or beyond 64 bits: outside of any bounds
    let seconds = asked
        .ttl_seconds
        .map(|seconds| seconds.as_u64().unwrap_or(u64::MAX));
    let life = seconds.map(Duration::from_secs);
    admitted.certify(Encoded::Pem(asked.csr.as_bytes()), life)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked<'a> {
    #[serde(borrow)]
    csr: Cow<'a, str>,
    ttl_seconds: Option<serde_json::Number>,
}

/// What the connection knows beside the token.
pub(super) fn credential<'a>(
    token: Result<&'a str, CallerError>,
    extensions: &'a Extensions,
) -> Credential<'a> {
    let address = extensions.get::<ConnectInfo<SocketAddr>>();
    let leaf = extensions
        .get::<Peer>()
        .and_then(|peer| peer.certificates.first());
    Credential {
        token,
        certificate: leaf.map(|leaf| leaf.as_ref()),
        peer: address.map(|info| info.0),
    }
}

/// RFC 6750 2.1; the scheme's case does not matter (RFC 9110 11.1).
pub(super) fn bearer(headers: &HeaderMap) -> Result<&str, CallerError> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let value = values.next().ok_or(CallerError::NoCredential)?;
    if values.next().is_some() {
        return Err(CallerError::TokenInvalid(
            "there are two Authorization headers".to_owned(),
        ));
    }
    let text = value
        .to_str()
        .map_err(|_| CallerError::TokenInvalid("it is not ASCII".to_owned()))?;
    match text.trim().split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => Ok(token.trim()),
        Some(_) | None => Err(CallerError::NoCredential),
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Json,
    Pkcs10,
}

impl Kind {
    fn of(headers: &HeaderMap) -> Result<Self, Refusal> {
        let value = headers
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok());
        let essence = value
            .and_then(|value| value.split(';').next())
            .unwrap_or_default()
            .trim();
        if essence.eq_ignore_ascii_case("application/json") {
            Ok(Self::Json)
        } else if essence.eq_ignore_ascii_case("application/pkcs10") {
            Ok(Self::Pkcs10)
        } else {
            Err(Refusal::UnsupportedMediaType)
        }
    }
}

/// A DER SEQUENCE begins with 0x30, which as text would be the digit 0; no PEM block begins so.
fn encoded(body: &[u8]) -> Encoded<'_> {
    match body.first() {
        Some(0x30) => Encoded::Der(body),
        Some(_) | None => Encoded::Pem(body),
    }
}

async fn read(body: &mut Body, limit: usize) -> Result<Bytes, Refusal> {
    // a length that is announced need not be waited for
    if body.size_hint().lower() > limit as u64 {
        return Err(Refusal::BodyTooLarge(limit));
    }
    let collected = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, limit).collect()).await;
    match collected {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(Refusal::BodyTooLarge(limit)),
        Ok(Err(e)) => Err(Refusal::BadRequest(format!(
            "the body could not be read: {e}"
        ))),
        Err(_) => Err(Refusal::BadRequest(
            "the body took too long to arrive".to_owned(),
        )),
    }
}

#[derive(Serialize)]
struct Certificate<'a> {
    spiffe_id: String,
    serial: String,
    certificate_chain: String,
    trust_bundle: &'a str,
    not_before: String,
    not_after: String,
    renew_at: String,
}

impl<'a> Certificate<'a> {
    fn of(granted: &'a Granted) -> Self {
        Self {
            spiffe_id: granted.caller.identity.to_string(),
            serial: granted.serial.to_string(),
            certificate_chain: granted
                .chain
                .iter()
                .map(|der| pem::encode("CERTIFICATE", der))
                .collect(),
            trust_bundle: &granted.trust_bundle,
            not_before: granted.not_before.to_string(),
            not_after: granted.not_after.to_string(),
            renew_at: granted.renew_at.to_string(),
        }
    }
}

/// RFC 9457.
#[derive(Serialize)]
struct Problem<'a> {
    r#type: String,
    title: &'a str,
    status: u16,
    detail: &'a str,
    code: &'a str,
}

fn problem(refusal: &Refusal) -> Response<Body> {
    let mut response = problem_response(status(refusal), refusal.code(), &refusal.client_text());
    let headers = response.headers_mut();
    if let Some(wait) = refusal.retry_after() {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs()));
    }
    if let Some(challenge) = challenge(refusal) {
        headers.insert(
            header::WWW_AUTHENTICATE,
            HeaderValue::from_static(challenge),
        );
    }
    response
}

fn status(refusal: &Refusal) -> StatusCode {
    match refusal {
        Refusal::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
        _ => match refusal.outcome() {
            Outcome::Issued => StatusCode::CREATED,
            Outcome::Invalid => StatusCode::BAD_REQUEST,
            Outcome::Denied => StatusCode::UNAUTHORIZED,
            Outcome::Throttled => StatusCode::TOO_MANY_REQUESTS,
            // what time can heal says when to come back; the rest is a fault of ours
            Outcome::Error if refusal.retry_after().is_some() => StatusCode::SERVICE_UNAVAILABLE,
            Outcome::Error => StatusCode::INTERNAL_SERVER_ERROR,
        },
    }
}

/// RFC 6750 3: a 401 says how to authenticate, and whether what was sent was wrong.
fn challenge(refusal: &Refusal) -> Option<&'static str> {
    match (refusal.outcome(), refusal) {
        (Outcome::Denied, Refusal::Caller(CallerError::NoCredential)) => {
            Some("Bearer realm=\"malha\"")
        }
        (Outcome::Denied, _) => Some("Bearer realm=\"malha\", error=\"invalid_token\""),
        _ => None,
    }
}

pub(super) async fn not_found(request: Request) -> Response<Body> {
    read_on(request.version(), request.into_body());
    problem_response(
        StatusCode::NOT_FOUND,
        "NotFound",
        "there is POST /v1/certificates and GET /v1/bundle",
    )
}

async fn method_not_allowed(request: Request) -> Response<Body> {
    read_on(request.version(), request.into_body());
    problem_response(
        StatusCode::METHOD_NOT_ALLOWED,
        "MethodNotAllowed",
        "there is POST /v1/certificates and GET /v1/bundle",
    )
}

fn problem_response(status: StatusCode, code: &str, detail: &str) -> Response<Body> {
    let title = status.canonical_reason().unwrap_or_default();
    let problem = Problem {
        r#type: format!("urn:malha:problem:{code}"),
        title,
        status: status.as_u16(),
        detail,
        code,
    };
    let text = serde_json::to_string(&problem).expect("a problem is texts and a number");
    answer(
        status,
        HeaderValue::from_static("application/problem+json"),
        text,
    )
}

fn answer(status: StatusCode, kind: HeaderValue, text: String) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    let fixed: [(HeaderName, HeaderValue); 2] = [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ];
    response.headers_mut().extend(fixed);
    response
}

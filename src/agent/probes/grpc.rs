//! `grpc`: the standard health check over HTTP/2 without TLS.

use std::net::{IpAddr, SocketAddr};

use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    HeaderMap, Request,
    client::conn::http2,
    header::{CONTENT_TYPE, TE, USER_AGENT},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio_util::task::AbortOnDropHandle;

use super::{Answer, Asker, BODY_LIMIT, ProbeError, dial};

/// `grpc.health.v1.HealthCheckRequest`.
#[derive(Clone, PartialEq, Message)]
struct Check {
    #[prost(string, tag = "1")]
    service: String,
}

/// `grpc.health.v1.HealthCheckResponse`.
#[derive(Clone, PartialEq, Message)]
struct Health {
    #[prost(int32, tag = "1")]
    status: i32,
}

const SERVING: i32 = 1;

/// Asks for the health of `service`.
pub(super) async fn check(
    pod: IpAddr,
    port: u16,
    service: &str,
    asker: &Asker,
) -> Result<Answer, ProbeError> {
    let at = SocketAddr::new(pod, port);
    let broken = |source| ProbeError::Broken { at, source };
    let stream = TokioIo::new(dial(pod, port).await?);
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), stream)
        .await
        .map_err(broken)?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(async move {
        let _ = connection.await;
    }));
    let request = Request::post(format!("http://{at}/grpc.health.v1.Health/Check"))
        .header(CONTENT_TYPE, "application/grpc")
        .header(TE, "trailers")
        .header(
            USER_AGENT,
            asker.user_agent.as_deref().unwrap_or("kube-probe/malha"),
        )
        .body(Full::new(framed(&Check {
            service: service.to_owned(),
        })))
        .map_err(|_| ProbeError::Unaskable(format!("health of {service:?}")))?;
    let response = sender.send_request(request).await.map_err(broken)?;
    let head = response.headers().clone();
    let body = Limited::new(response.into_body(), BODY_LIMIT)
        .collect()
        .await
        .map_err(|error| ProbeError::Unhealthy(format!("no whole answer: {error}")))?;
    let trailers = body.trailers().cloned();
    judge(&head, trailers.as_ref(), &body.to_bytes())
}

/// One message, uncompressed, with its length before it.
fn framed(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut frame = BytesMut::with_capacity(5 + length);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    message
        .encode(&mut frame)
        .expect("the buffer has room for what was counted");
    frame.freeze()
}

fn judge(
    head: &HeaderMap,
    trailers: Option<&HeaderMap>,
    body: &[u8],
) -> Result<Answer, ProbeError> {
    let text = |name| {
        let value = trailers
            .and_then(|it| it.get(name))
            .or_else(|| head.get(name));
        value.and_then(|value| value.to_str().ok())
    };
    match text("grpc-status") {
        Some("0") => {}
        Some(code) => {
            let message = text("grpc-message").unwrap_or_default();
            return Err(ProbeError::Unhealthy(format!("code {code} {message}")));
        }
        None => return Err(ProbeError::Unhealthy("no gRPC is spoken here".to_owned())),
    }
    let health = body
        .get(5..)
        .and_then(|message| Health::decode(message).ok());
    match health {
        Some(Health { status: SERVING }) => Ok(Answer::ok("SERVING")),
        Some(Health { status: 0 }) => Err(ProbeError::Unhealthy("UNKNOWN".to_owned())),
        Some(Health { status: 2 }) => Err(ProbeError::Unhealthy("NOT_SERVING".to_owned())),
        Some(Health { status }) => Err(ProbeError::Unhealthy(format!("status {status}"))),
        None => Err(ProbeError::Unhealthy("the answer is unreadable".to_owned())),
    }
}

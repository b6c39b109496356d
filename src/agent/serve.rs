//! The agent's two HTTP ports: readiness, and probes with metrics.

use std::{convert::Infallible, future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderValue, USER_AGENT},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Semaphore,
    time::sleep,
};

use super::{
    metrics::exposition,
    pod::{Pod, Readiness},
    probes::{Answer, Asker, Probe, ProbeError},
};

type Reply = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// A port that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {at}; does the application listen there? The port is the sidecar's")]
pub struct BindError {
    at: SocketAddr,
    source: io::Error,
}

/// Takes a port, on every address of the pod's families.
///
/// # Errors
/// Where it is taken.
pub fn bind(at: SocketAddr) -> Result<TcpListener, BindError> {
    let listener = || {
        let socket = match at {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            // Linux listens for IPv4 on it too, unless told otherwise.
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        socket.set_reuseaddr(true)?;
        socket.bind(at)?;
        socket.listen(128)
    };
    listener().map_err(|source| BindError { at, source })
}

/// The kubelet and a scraper or two; whoever floods the port waits.
const CONNECTIONS: usize = 128;
/// A client that sends no request.
const SILENCE: Duration = Duration::from_secs(10);

/// Answers readiness.
pub async fn status(listener: &TcpListener, pod: &Arc<Pod>) -> Infallible {
    serve(listener, pod, |pod, request| async move {
        Ok(match request.uri().path() {
            "/healthz/ready" => {
                let readiness = pod.readiness().await;
                let status = match readiness {
                    Readiness::Ready => StatusCode::OK,
                    _ => StatusCode::SERVICE_UNAVAILABLE,
                };
                text(status, readiness.text())
            }
            _ => text(StatusCode::NOT_FOUND, "here is /healthz/ready\n"),
        })
    })
    .await
}

/// Answers probes, lifecycle handlers and scrapes.
pub async fn probes(listener: &TcpListener, pod: &Arc<Pod>) -> Infallible {
    serve(listener, pod, |pod, request| async move {
        if let Some(probe) = pod.settings.probes.at(request.uri().path()) {
            return probed(&pod, probe, &request).await;
        }
        Ok(match (request.method(), request.uri().path()) {
            (&Method::GET, "/stats/prometheus" | "/metrics") => scraped(&pod, &request),
            _ => text(StatusCode::NOT_FOUND, what_is_here(&pod)),
        })
    })
    .await
}

/// Serves until it is dropped. A connection's fault, a panic included, ends that connection alone.
async fn serve<F, A>(listener: &TcpListener, pod: &Arc<Pod>, answer: F) -> Infallible
where
    F: Fn(Arc<Pod>, Request<Incoming>) -> A + Clone + Send + 'static,
    A: Future<Output = Result<Reply, ProbeError>> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let permit = Arc::clone(&room)
            .acquire_owned()
            .await
            .expect("a semaphore that we own is never closed");
        let stream = accept(listener).await;
        let (pod, answer) = (Arc::clone(pod), answer.clone());
        tokio::spawn(async move {
            let _held = permit;
            let service = service_fn(move |request| answer(Arc::clone(&pod), request));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(SILENCE)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended");
            }
        });
    }
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let _ = stream.set_nodelay(true);
                return stream;
            }
            Err(error) => {
                // No files left, most likely: whoever holds them needs time.
                tracing::warn!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// # Errors
/// A lifecycle handler that cannot be run: the connection breaks off, because to the kubelet any answer is a success.
async fn probed(
    pod: &Pod,
    probe: &Probe,
    request: &Request<Incoming>,
) -> Result<Reply, ProbeError> {
    let user_agent = request.headers().get(USER_AGENT);
    let asker = Asker {
        user_agent: user_agent.and_then(|it| it.to_str().ok().map(str::to_owned)),
    };
    let path = request.uri().path();
    if path.starts_with("/app-lifecycle/") {
        let answer = probe.run_unbounded(pod.ip(), &asker).await;
        if let Err(error) = &answer {
            tracing::warn!(
                path,
                error = error as &dyn std::error::Error,
                "lifecycle handler failed"
            );
        }
        return answer.map(reply);
    }
    match probe.run(pod.ip(), &asker).await {
        Ok(answer) => Ok(reply(answer)),
        Err(error) => {
            tracing::debug!(
                path,
                error = &error as &dyn std::error::Error,
                "probe failed"
            );
            Ok(text(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("malha-agent: {error}\n"),
            ))
        }
    }
}

fn scraped(pod: &Arc<Pod>, request: &Request<Incoming>) -> Reply {
    let patience = request.headers().get("x-prometheus-scrape-timeout-seconds");
    let patience = patience
        .and_then(|text| text.to_str().ok()?.parse::<f32>().ok())
        .filter(|seconds| (0.1..=600.0).contains(seconds))
        .map_or(SCRAPERS_PATIENCE, Duration::from_secs_f32);
    let mut reply = Response::new(UnsyncBoxBody::new(exposition(Arc::clone(pod), patience)));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    reply.headers_mut().insert(CONTENT_TYPE, kind);
    reply
}

/// Prometheus' default.
const SCRAPERS_PATIENCE: Duration = Duration::from_secs(10);

fn what_is_here(pod: &Pod) -> String {
    let containers = match pod.settings.probes.containers() {
        none if none.is_empty() => "no container".to_owned(),
        some => some.join(", "),
    };
    format!(
        "malha-agent serves metrics at /stats/prometheus, and handlers of {containers} that the kubelet's were replaced by\n"
    )
}

fn reply(answer: Answer) -> Reply {
    let mut reply = text(
        StatusCode::from_u16(answer.status).unwrap_or(StatusCode::BAD_GATEWAY),
        answer.body,
    );
    if let Some(kind) = answer.content_type.and_then(|it| it.parse().ok()) {
        reply.headers_mut().insert(CONTENT_TYPE, kind);
    }
    reply
}

fn text(status: StatusCode, text: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(Full::new(text.into()).boxed_unsync());
    *reply.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    reply.headers_mut().insert(CONTENT_TYPE, kind);
    reply
}

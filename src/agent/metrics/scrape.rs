//! One scrape: asks Envoy and the application at the same time, and passes on what they say as it comes.
//!
//! Nothing is kept whole in memory: with a thousand services Envoy tells megabytes.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper::{
    Request,
    body::{Body, Frame},
    header::{ACCEPT, CONNECTION, CONTENT_TYPE, HOST, USER_AGENT},
};
use rustls_pki_types::ServerName;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tokio_rustls::TlsConnector;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::task::AbortOnDropHandle;

use super::{
    APPLICATION, ENVOY,
    merge::{Dialect, Merged},
};
use crate::agent::{
    client::{self, BodyError, Exchange},
    pod::Pod,
    probes::{dial, unverified},
    settings::AppMetrics,
};

/// What is sent at once.
const CHUNK: usize = 16 << 10;
/// No metric is longer.
const LONGEST_LINE: usize = 64 << 10;
/// An application that tells more has a label that it should not have.
const MOST: usize = 64 << 20;

/// The merged exposition, for a scraper that waits for `patience`.
pub(in crate::agent) fn exposition(
    pod: Arc<Pod>,
    patience: Duration,
) -> impl Body<Data = Bytes, Error = Infallible> + Send + 'static {
    let (out, chunks) = mpsc::channel::<Bytes>(4);
    let scrape = AbortOnDropHandle::new(tokio::spawn(scrape(pod, patience, out)));
    StreamBody::new(ReceiverStream::new(chunks).map(move |chunk| {
        let _ends_with_the_body = &scrape;
        Ok(Frame::data(chunk))
    }))
}

async fn scrape(pod: Arc<Pod>, patience: Duration, out: mpsc::Sender<Bytes>) {
    let start = Instant::now();
    // Envoy is at home and answers at once or not at all; the application has what is left but for the way back.
    let envoys_time = start + patience.mul_f32(0.4);
    let apps_time = start + patience.mul_f32(0.85);
    let app = pod.settings.app_metrics.clone().map(|at| {
        let pod = Arc::clone(&pod);
        AbortOnDropHandle::new(tokio::spawn(async move {
            let asked = timeout_at(apps_time, ask_application(&pod, &at, patience)).await;
            asked.unwrap_or_else(|_| Err("no answer in time".into()))
        }))
    });
    let mut merged = Merged::default();
    let mut out = Out {
        text: String::new(),
        out,
    };
    let envoy = timeout_at(envoys_time, async {
        let exchange = pod.admin.stream("/stats/prometheus").await?;
        Ok::<_, BodyError>((exchange, Dialect::Envoy))
    });
    let envoy = envoy
        .await
        .unwrap_or_else(|_| Err("no answer in time".into()));
    let connected = pass_on(&pod, ENVOY, envoy, envoys_time, &mut merged, &mut out).await;
    pod.metrics.connected(connected == Some(true));
    if let Some(app) = app {
        let asked = app.await.unwrap_or_else(|error| Err(error.into()));
        pass_on(&pod, APPLICATION, asked, apps_time, &mut merged, &mut out).await;
    }
    let mut source = merged.source(Dialect::OpenMetrics);
    let own = pod.own_metrics();
    own.lines()
        .for_each(|line| source.line(line, &mut out.text));
    source.end();
    out.flush().await;
}

/// Passes a source's lines on; what Envoy said of the control plane comes back.
async fn pass_on(
    pod: &Pod,
    name: &'static str,
    asked: Result<(Exchange, Dialect), BodyError>,
    until: Instant,
    merged: &mut Merged,
    out: &mut Out,
) -> Option<bool> {
    let failed = |error: BodyError| {
        pod.metrics.scrape_failed(name);
        tracing::debug!(source = name, %error, "scrape failed");
    };
    let (mut exchange, dialect) = match asked {
        Ok(asked) => asked,
        Err(error) => {
            failed(error);
            return None;
        }
    };
    let mut source = merged.source(dialect);
    let mut lines = Lines::default();
    loop {
        let frame = match timeout_at(until, exchange.response.body_mut().frame()).await {
            Err(_) => break failed("no whole answer in time".into()),
            Ok(None) => {
                lines.end(|line| source.line(line, &mut out.text));
                break;
            }
            Ok(Some(Err(error))) => break failed(error.into()),
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if !lines.feed(&data, |line| source.line(line, &mut out.text)) {
            break failed("more than 64 MiB, or a line of more than 64 KiB".into());
        }
        if out.text.len() >= CHUNK {
            out.flush().await;
        }
    }
    let summary = source.end();
    pod.metrics.dropped(name, summary.dropped);
    summary.connected
}

struct Out {
    text: String,
    out: mpsc::Sender<Bytes>,
}

impl Out {
    async fn flush(&mut self) {
        let text = std::mem::take(&mut self.text);
        // A scraper that has gone ends this task with the body.
        let _ = self.out.send(text.into()).await;
    }
}

/// Bytes as they come, cut at line ends.
#[derive(Default)]
struct Lines {
    begun: Vec<u8>,
    total: usize,
}

impl Lines {
    /// False if there is too much of it.
    fn feed(&mut self, data: &[u8], mut line: impl FnMut(&str)) -> bool {
        self.total += data.len();
        for part in data.split_inclusive(|byte| *byte == b'\n') {
            self.begun.extend_from_slice(part);
            if part.ends_with(b"\n") {
                line(&String::from_utf8_lossy(&self.begun));
                self.begun.clear();
            }
        }
        self.total <= MOST && self.begun.len() <= LONGEST_LINE
    }

    fn end(&mut self, mut line: impl FnMut(&str)) {
        line(&String::from_utf8_lossy(&std::mem::take(&mut self.begun)));
    }
}

async fn ask_application(
    pod: &Pod,
    at: &AppMetrics,
    patience: Duration,
) -> Result<(Exchange, Dialect), BodyError> {
    let ip = pod.settings.primary_ip();
    let request = Request::get(&at.path)
        .header(HOST, std::net::SocketAddr::new(ip, at.port).to_string())
        .header(ACCEPT, "text/plain;version=0.0.4,*/*;q=0.1")
        .header(
            USER_AGENT,
            concat!("malha-agent/", env!("CARGO_PKG_VERSION")),
        )
        .header(CONNECTION, "close")
        .header(SCRAPE_TIMEOUT, patience.as_secs_f32().to_string())
        .body(Empty::new())?;
    let stream = dial(ip, at.port).await?;
    let exchange = match at.https {
        false => client::send(stream, request).await?,
        true => {
            let connector = TlsConnector::from(unverified());
            let name = ServerName::IpAddress(ip.into());
            client::send(connector.connect(name, stream).await?, request).await?
        }
    };
    let status = exchange.response.status();
    if !status.is_success() {
        return Err(format!("the application answers {status}").into());
    }
    let kind = exchange.response.headers().get(CONTENT_TYPE);
    let open =
        kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/openmetrics-text"));
    let dialect = match open {
        true => Dialect::OpenMetrics,
        false => Dialect::Text,
    };
    Ok((exchange, dialect))
}

/// What Prometheus tells of its own patience.
pub(in crate::agent) const SCRAPE_TIMEOUT: &str = "x-prometheus-scrape-timeout-seconds";

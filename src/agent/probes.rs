//! The kubelet's probes and lifecycle handlers, repeated inside the pod.
//!
//! path -> what the author wrote -> the application, dialled at the pod's own address -> the kubelet's answer
//!
//! Every rule of the kubelet's own prober holds here too (`pkg/probe` of Kubernetes): which statuses pass, whom a
//! redirect may lead to, how much of a body is read, that certificates are not verified.

mod dial;
mod grpc;
mod http;
mod tls;

use std::{collections::BTreeMap, fmt, net::IpAddr, time::Duration};

use bytes::Bytes;
use serde::Deserialize;

pub(super) use dial::dial;
pub(super) use tls::unverified;

/// Handlers by the path at which the agent serves them: the value of `MALHA_PROBES`.
#[derive(Clone, Default, PartialEq, Deserialize)]
pub struct Probes(BTreeMap<String, Probe>);

/// One handler as its author wrote it, with its port resolved.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "Wire")]
pub struct Probe {
    pub(super) act: Act,
    /// The kubelet's own, one second unless the author said otherwise.
    pub(super) timeout: Duration,
}

/// What the kubelet would do.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Act {
    /// A request; any status from 200 to 399 passes.
    Http(HttpGet),
    /// A connection, closed at once.
    Tcp {
        /// The port on the pod.
        port: u16,
    },
    /// `grpc.health.v1.Health/Check` without TLS.
    Grpc {
        /// The port on the pod.
        port: u16,
        /// Whose health is asked for; empty for the server's own.
        service: String,
    },
}

/// `httpGet`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct HttpGet {
    pub(super) port: u16,
    #[serde(default)]
    pub(super) path: String,
    #[serde(default)]
    pub(super) scheme: Scheme,
    #[serde(default, rename = "httpHeaders", deserialize_with = "null_is_empty")]
    pub(super) headers: Vec<Header>,
}

/// `HTTP` or `HTTPS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum Scheme {
    /// In the clear.
    #[default]
    #[serde(alias = "", alias = "http")]
    Http,
    /// Over TLS, its certificate unverified.
    #[serde(alias = "https")]
    Https,
}

/// One of `httpHeaders`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Header {
    pub(super) name: String,
    #[serde(default)]
    pub(super) value: String,
}

/// What is known of whoever asks.
#[derive(Clone, Debug, Default)]
pub(super) struct Asker {
    /// The kubelet's version, which some applications look at.
    pub(super) user_agent: Option<String>,
}

/// What the kubelet is told.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) content_type: Option<String>,
    pub(super) body: Bytes,
}

/// Why there is no answer of the application's.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProbeError {
    #[error(
        "{at} refuses connections or cannot be reached; is the application listening on the pod's address and not on loopback alone? ({source})"
    )]
    Unreachable {
        at: std::net::SocketAddr,
        source: std::io::Error,
    },
    #[error("{at} did not answer within {} s", .after.as_secs_f32())]
    Late { at: String, after: Duration },
    #[error("{at} accepts connections, but there is no TLS: {source}")]
    Handshake {
        at: std::net::SocketAddr,
        source: std::io::Error,
    },
    #[error("{at} broke off: {source}")]
    Broken {
        at: std::net::SocketAddr,
        source: hyper::Error,
    },
    #[error("{0} cannot be asked for: no such request can be written")]
    Unaskable(String),
    #[error("stopped after 10 redirects")]
    Redirects,
    #[error("grpc.health.v1.Health/Check: {0}")]
    Unhealthy(String),
}

/// Go's client, and so the kubelet, reads no more of a body.
pub(super) const BODY_LIMIT: usize = 10 << 10;

impl Probes {
    /// The handler at a path, exactly as it was recorded.
    pub(super) fn at(&self, path: &str) -> Option<&Probe> {
        self.0.get(path)
    }

    /// The containers that have any, as paths name them.
    pub(super) fn containers(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self
            .0
            .keys()
            .filter_map(|path| path.split('/').nth(2))
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}

impl Probe {
    /// Does what the kubelet would.
    pub(super) async fn run(&self, pod: IpAddr, asker: &Asker) -> Result<Answer, ProbeError> {
        let act = async {
            match &self.act {
                Act::Http(get) => http::get(pod, get, asker).await,
                Act::Tcp { port } => dial(pod, *port).await.map(|_| Answer::ok("connected")),
                Act::Grpc { port, service } => grpc::check(pod, *port, service, asker).await,
            }
        };
        match tokio::time::timeout(self.timeout, act).await {
            Ok(answer) => answer,
            Err(_) => Err(ProbeError::Late {
                at: std::net::SocketAddr::new(pod, self.act.port()).to_string(),
                after: self.timeout,
            }),
        }
    }

    /// The same without a time limit of ours: the kubelet gives a lifecycle handler the pod's grace period.
    pub(super) async fn run_unbounded(
        &self,
        pod: IpAddr,
        asker: &Asker,
    ) -> Result<Answer, ProbeError> {
        let patient = Self {
            timeout: LIFECYCLE_LIMIT,
            ..self.clone()
        };
        patient.run(pod, asker).await
    }
}

/// Longer than anybody's grace period, so that an application that hangs does not keep a task for ever.
const LIFECYCLE_LIMIT: Duration = Duration::from_secs(24 * 3600);

impl Act {
    fn port(&self) -> u16 {
        match self {
            Self::Http(get) => get.port,
            Self::Tcp { port } | Self::Grpc { port, .. } => *port,
        }
    }
}

impl Answer {
    pub(super) fn ok(text: &'static str) -> Self {
        Self {
            status: 200,
            content_type: None,
            body: Bytes::from_static(text.as_bytes()),
        }
    }
}

/// A probe's headers may hold a password: only where it is served is shown.
impl fmt::Debug for Probes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.keys()).finish()
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    http_get: Option<HttpGet>,
    tcp_socket: Option<Port>,
    grpc: Option<Grpc>,
    timeout_seconds: Option<u64>,
}

#[derive(Deserialize)]
struct Port {
    port: u16,
}

#[derive(Deserialize)]
struct Grpc {
    port: u16,
    service: Option<String>,
}

impl TryFrom<Wire> for Probe {
    type Error = &'static str;

    fn try_from(wire: Wire) -> Result<Self, Self::Error> {
        let act = match (wire.http_get, wire.tcp_socket, wire.grpc) {
            (Some(get), None, None) => Act::Http(get),
            (None, Some(Port { port }), None) => Act::Tcp { port },
            (None, None, Some(Grpc { port, service })) => Act::Grpc {
                port,
                service: service.unwrap_or_default(),
            },
            _ => return Err("one of httpGet, tcpSocket and grpc"),
        };
        Ok(Self {
            act,
            timeout: Duration::from_secs(wire.timeout_seconds.unwrap_or(1).max(1)),
        })
    }
}

fn null_is_empty<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<Header>, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

#[cfg(test)]
mod tests;

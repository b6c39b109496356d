//! One connection to the control plane: HTTP/2 over TLS 1.3, made anew for each use, so that each sees the roots, the
//! certificate and the address as they are then.

use std::{fmt, io, str::FromStr, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::tls::TlsError;

/// Where the control plane is: `host:port`. The host is also the name that its certificate must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlPlane {
    host: String,
    port: u16,
}

impl FromStr for ControlPlane {
    type Err = DialError;

    fn from_str(text: &str) -> Result<Self, DialError> {
        let wrong = || DialError::Address(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        ServerName::try_from(host).map_err(|_| wrong())?;
        Ok(Self {
            host: host.to_owned(),
            port: port.parse().map_err(|_| wrong())?,
        })
    }
}

impl fmt::Display for ControlPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// Connects and shakes hands. The channel never connects again by itself: it would do so with an old certificate.
///
/// # Errors
/// How far it came.
pub(super) async fn dial(
    address: &ControlPlane,
    tls: Arc<ClientConfig>,
) -> Result<Channel, DialError> {
    let name = ServerName::try_from(address.host.clone())
        .map_err(|_| DialError::Address(address.to_string()))?;
    let tcp = TcpStream::connect((address.host.as_str(), address.port))
        .await
        .and_then(|tcp| tcp.set_nodelay(true).map(|()| tcp))
        .map_err(|source| DialError::Unreachable {
            address: address.clone(),
            source,
        })?;
    let stream = TlsConnector::from(tls)
        .connect(name, tcp)
        .await
        .map_err(|source| DialError::Handshake {
            address: address.clone(),
            source,
        })?;
    let mut stream = Some(TokioIo::new(stream));
    let once = service_fn(move |_| {
        let stream = stream.take();
        async move { stream.ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionAborted)) }
    });
    // The scheme only keeps tonic from bringing its own TLS.
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|_| DialError::Address(address.to_string()))?
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    endpoint
        .connect_with_connector(once)
        .await
        .map_err(DialError::Transport)
}

/// A control plane whose machine died says nothing; this notices.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the control plane is not reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Not an address.
    #[error("{0:?} is not host:port; MALHA_CONTROL_PLANE is where the control plane is")]
    Address(String),
    /// No TCP connection, or no such name.
    #[error(
        "cannot connect to the control plane at {address}; is it running, and does a NetworkPolicy let this pod reach it?"
    )]
    Unreachable {
        /// Where.
        address: ControlPlane,
        /// What the system said.
        source: io::Error,
    },
    /// No TLS session.
    #[error(
        "no TLS session with the control plane at {address}; its certificate must be for that name, and signed by the roots that this pod trusts"
    )]
    Handshake {
        /// Where.
        address: ControlPlane,
        /// What was wrong.
        source: io::Error,
    },
    /// Roots or certificate of ours.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// No HTTP/2.
    #[error("the control plane does not speak HTTP/2")]
    Transport(#[source] tonic::transport::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_and_printed() {
        for text in ["malha.malha-system.svc:15012", "127.0.0.1:1", "[::1]:15012"] {
            let read: ControlPlane = text.parse().expect(text);
            assert_eq!(read.to_string(), text);
        }
        for text in [
            "", "malha", "malha:", "malha:x", ":15012", "a b:1", "m:65536",
        ] {
            assert!(text.parse::<ControlPlane>().is_err(), "{text:?}");
        }
    }
}

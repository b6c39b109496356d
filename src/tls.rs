//! Every TLS of the control plane: configurations, the certificate that is swapped while it serves, listeners.
//!
//! [`KeyedChain`](crate::ca::KeyedChain) -> [`ServingCertificate`] -> each new handshake;
//! trust bundle -> [`ClientTrust`] -> each new handshake -> [`Peer`] in each request;
//! [`Bound`] -> accept loop -> axum's `Router`; [`probe`] -> one call through a listener, as a client sees it
//!
//! TLS 1.3 only, on both sides and set on each configuration: another crate of the build turns rustls' TLS 1.2 on,
//! and features unify, so the defaults would speak it.

mod certificate;
mod client;
mod client_trust;
mod connections;
mod listener;
mod watched;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use std::{error, io};

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::NoServerSessionStorage;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

pub use certificate::ServingCertificate;
pub use client::http2_client_config;
pub use client_trust::ClientTrust;
pub use connections::Metrics;
pub use listener::{Bound, Limits};

/// What a listener offers in ALPN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alpn {
    /// `http/1.1` alone: API servers offer nothing else to webhooks (kubernetes/kubernetes#75791).
    Http1,
    /// `h2`, then `http/1.1`.
    Http2,
}

/// Who is at the other end of a connection. A listener puts it into the extensions of each request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Where it is.
    pub address: SocketAddr,
    /// What it showed, leaf first, verified against the bundle that was trusted at the handshake. Empty where it showed
    /// nothing, and on listeners that ask for nothing.
    pub certificates: Arc<[CertificateDer<'static>]>,
}

/// Cancelled when a connection of HTTP/2 is on its way out, by its age or by the end of the process: what would never end
/// by itself should end then, and its client come back on another connection. In the extensions of each request.
#[derive(Clone, Debug)]
pub struct Leaving(pub CancellationToken);

/// Why a listener, a certificate or a call cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The port cannot be taken.
    #[error("cannot listen on {addr}; is another program using the port?")]
    Listen {
        /// What was asked for.
        addr: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// A chain without a certificate.
    #[error("the certificate chain is empty; the certificate in use stays")]
    EmptyChain,
    /// Key and certificate do not belong together, or one of them is unreadable.
    #[error(
        "the certificate and its private key do not fit together; the certificate in use stays"
    )]
    Mismatch(#[source] rustls::Error),
    /// A trusted certificate cannot be read.
    #[error("a certificate of the trust bundle cannot be read")]
    Root(#[source] rustls::Error),
    /// A name that no certificate can carry.
    #[error("`{0}` is not a DNS name or IP address")]
    Name(String),
    /// A call through a listener failed.
    #[error("no answer over TLS from {addr} as {name}")]
    Probe {
        /// Where it was tried.
        addr: SocketAddr,
        /// The name that the certificate should carry.
        name: String,
        /// The cause.
        source: Box<dyn error::Error + Send + Sync>,
    },
}

/// Asks the listener at `addr` for an answer, trusting only `roots` (DER) and expecting the name `name`: what an API
/// server with that bundle would see. Any HTTP answer will do. A wildcard address is reached over loopback.
///
/// # Errors
/// [`TlsError::Probe`] with the cause, be it the network, the certificate, or no answer within five seconds.
pub async fn probe<R: AsRef<[u8]>>(
    addr: SocketAddr,
    name: &str,
    roots: impl IntoIterator<Item = R>,
) -> Result<(), TlsError> {
    let config = client_config(roots)?;
    let server =
        ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name(name.to_owned()))?;
    let failed = |source: Box<dyn error::Error + Send + Sync>| TlsError::Probe {
        addr,
        name: name.to_owned(),
        source,
    };
    match timeout(PROBE_TIMEOUT, ask(reachable(addr), server, config)).await {
        Ok(answered) => answered.map_err(|cause| failed(Box::new(cause))),
        Err(elapsed) => Err(failed(Box::new(elapsed))),
    }
}

const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

async fn ask(
    addr: SocketAddr,
    server: ServerName<'static>,
    config: Arc<ClientConfig>,
) -> io::Result<()> {
    let tcp = TcpStream::connect(addr).await?;
    let mut tls = TlsConnector::from(config).connect(server, tcp).await?;
    // A path that no route has: the call is an answer from the whole stack, and no admission that would be counted.
    tls.write_all(b"GET / HTTP/1.1\r\nhost: malha\r\nconnection: close\r\n\r\n")
        .await?;
    let mut answer = [0; 9];
    tls.read_exact(&mut answer).await?;
    match answer.starts_with(b"HTTP/1.1 ") {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the answer is not HTTP/1.1",
        )),
    }
}

/// A wildcard address is for listening; the same port on loopback is where it is reached. `[::]` is for IPv4 too, and
/// `::1` is missing where a sysctl switches IPv6 off.
fn reachable(addr: SocketAddr) -> SocketAddr {
    let ip = match addr.ip() {
        ip if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, addr.port())
}

/// A client that trusts `roots` (DER) alone and speaks HTTP/1.1 over TLS 1.3.
///
/// # Errors
/// [`TlsError::Root`] where one of them is no certificate.
pub fn client_config<R: AsRef<[u8]>>(
    roots: impl IntoIterator<Item = R>,
) -> Result<Arc<ClientConfig>, TlsError> {
    let mut trusted = RootCertStore::empty();
    for root in roots {
        trusted
            .add(CertificateDer::from(root.as_ref().to_vec()))
            .map_err(TlsError::Root)?;
    }
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites and groups of TLS 1.3")
        .with_root_certificates(trusted)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// The one provider, handed to every configuration, so that no process-wide default decides.
static PROVIDER: LazyLock<Arc<CryptoProvider>> =
    LazyLock::new(|| Arc::new(aws_lc_rs::default_provider()));

fn server_config(
    certificate: Arc<ServingCertificate>,
    clients: Option<Arc<ClientTrust>>,
    alpn: Alpn,
) -> Arc<ServerConfig> {
    let builder = ServerConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites and groups of TLS 1.3");
    let builder = match clients {
        Some(clients) => builder.with_client_cert_verifier(clients),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(certificate);
    config.alpn_protocols = match alpn {
        Alpn::Http1 => vec![b"http/1.1".to_vec()],
        Alpn::Http2 => vec![b"h2".to_vec(), b"http/1.1".to_vec()],
    };
    // No resumption: in a resumed session neither side shows a certificate, so it would outlive one that was replaced or
    // is trusted no more. Clients of ours keep their connections, and a full handshake costs a fraction of a millisecond.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Arc::new(config)
}

//! The chain that a TLS server shows. It is looked at, not trusted, so any chain will do; what the handshake proves is
//! that the server holds the leaf's key.

use std::{net::ToSocketAddrs as _, sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use crate::cli::{Exit, Failure, exit::OrExit as _};

/// A handshake takes milliseconds; whoever takes longer is not there.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the server at `host:port` shows to a client that asks for `name`; leaf first, DER.
pub(super) fn chain_of(host: &str, port: u16, name: &str) -> Result<Vec<Vec<u8>>, Failure> {
    let name = ServerName::try_from(name.to_owned())
        .with_context(|| format!("{name:?} is neither a host name nor an address"))
        .or_exit(Exit::Usage)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")
        .or_exit(Exit::Internal)?;
    let shown = runtime.block_on(async { timeout(PATIENCE, shake_hands(host, port, name)).await });
    shown
        .unwrap_or_else(|_| Err(anyhow!("no answer within {} s", PATIENCE.as_secs())))
        .with_context(|| format!("cannot see the certificate of {host}:{port}"))
        .or_exit(Exit::Unreachable)
}

async fn shake_hands(
    host: &str,
    port: u16,
    name: ServerName<'static>,
) -> anyhow::Result<Vec<Vec<u8>>> {
    let addresses: Vec<_> = (host, port)
        .to_socket_addrs()
        .with_context(|| format!("{host} has no address"))?
        .collect();
    let tcp = TcpStream::connect(addresses.as_slice())
        .await
        .context("no TCP connection")?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites and groups of TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyChain(provider)))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let tls = TlsConnector::from(Arc::new(config))
        .connect(name, tcp)
        .await
        .context("no TLS 1.3 handshake")?;
    let (_, connection) = tls.get_ref();
    let chain = connection
        .peer_certificates()
        .context("the server showed no certificate")?;
    Ok(chain
        .iter()
        .map(|certificate| certificate.to_vec())
        .collect())
}

/// Accepts every chain, and demands the proof that the server holds the leaf's key.
#[derive(Debug)]
struct AnyChain(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyChain {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            leaf,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            leaf,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

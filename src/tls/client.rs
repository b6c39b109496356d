//! The side that dials.

use std::sync::Arc;

use rustls::ClientConfig;
use rustls::RootCertStore;
use rustls::client::Resumption;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::version::TLS13;

use crate::ca::{KeyedChain, bundle::Bundle};
use crate::tls::{PROVIDER, TlsError};

/// A client that trusts `roots` alone, speaks HTTP/2 over TLS 1.3, and shows `identity` where it has one. It resumes no
/// session: each connection shows and sees certificates as they are then.
///
/// # Errors
/// [`TlsError::Root`] where a root is unusable, [`TlsError::Mismatch`] where chain and key are.
pub fn http2_client_config(
    roots: &Bundle,
    identity: Option<&KeyedChain>,
) -> Result<Arc<ClientConfig>, TlsError> {
    let mut trusted = RootCertStore::empty();
    for root in roots.certificates() {
        let root = CertificateDer::from(root.to_vec());
        trusted.add(root).map_err(TlsError::Root)?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites and groups of TLS 1.3")
        .with_root_certificates(trusted);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(keyed) => {
            let chain = keyed.chain.iter().cloned().map(CertificateDer::from);
            let key = PrivatePkcs8KeyDer::from(keyed.key.to_vec());
            builder
                .with_client_auth_cert(chain.collect(), PrivateKeyDer::Pkcs8(key))
                .map_err(TlsError::Mismatch)?
        }
    };
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

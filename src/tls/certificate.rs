//! The certificate of a listener, swapped while the listener serves.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::ca::KeyedChain;
use crate::tls::TlsError;

/// What a listener shows in each new handshake. Connections that are open keep what they were shown.
///
/// Until the first [`publish`](Self::publish) every handshake is refused.
#[derive(Default)]
pub struct ServingCertificate {
    current: ArcSwapOption<CertifiedKey>,
}

impl ServingCertificate {
    /// One that refuses handshakes until a certificate is published.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Serves `keyed` from the next handshake on.
    ///
    /// # Errors
    /// Where the chain is empty, unreadable, or not the key's. Then the last good one stays.
    pub fn publish(&self, keyed: &KeyedChain) -> Result<(), TlsError> {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(keyed.key.as_slice()));
        let chain: Vec<_> = keyed
            .chain
            .iter()
            .map(|der| CertificateDer::from(der.clone()))
            .collect();
        if chain.is_empty() {
            return Err(TlsError::EmptyChain);
        }
        let certified =
            CertifiedKey::new(chain, any_supported_type(&key).map_err(TlsError::Mismatch)?);
        certified.keys_match().map_err(TlsError::Mismatch)?;
        self.current.store(Some(Arc::new(certified)));
        Ok(())
    }

    /// Whether a handshake can succeed at all.
    pub fn is_published(&self) -> bool {
        self.current.load().is_some()
    }

    /// Publishes what `certificates` holds now and every later one, until `stop`. A bad one is logged and skipped.
    pub async fn follow(
        self: Arc<Self>,
        mut certificates: watch::Receiver<Option<Arc<KeyedChain>>>,
        stop: CancellationToken,
    ) {
        loop {
            let latest = certificates.borrow_and_update().clone();
            if let Some(keyed) = latest {
                match self.publish(&keyed) {
                    Ok(()) => {
                        tracing::info!(not_after = %keyed.validity.not_after, "serving certificate published");
                    }
                    Err(error) => tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "serving certificate refused"
                    ),
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                changed = certificates.changed() => if changed.is_err() {
                    // Nobody will publish again; what is served stays until the process ends.
                    return stop.cancelled().await;
                },
            }
        }
    }
}

impl ResolvesServerCert for ServingCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current.load_full()
    }
}

impl fmt::Debug for ServingCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServingCertificate")
            .field("published", &self.is_published())
            .finish()
    }
}

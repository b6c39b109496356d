//! Which client certificates a listener accepts: those of the bundle that is trusted at the moment of the handshake.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    SignatureScheme,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::ca::bundle::Bundle;
use crate::tls::{PROVIDER, TlsError};

/// Asks clients for a certificate and verifies the one that is shown; who shows none is let in without. An expired one,
/// or one of somebody else's root, ends the handshake, and the client may come back without it.
///
/// Until the first [`publish`](Self::publish) no certificate is accepted.
pub struct ClientTrust {
    /// `None` where nothing is trusted yet: rustls' verifier wants a root.
    current: ArcSwap<Option<Arc<dyn ClientCertVerifier>>>,
}

impl ClientTrust {
    /// One that trusts nothing until a bundle is published.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            current: ArcSwap::from_pointee(None),
        })
    }

    /// Trusts `bundle`, and it alone, from the next handshake on.
    ///
    /// # Errors
    /// [`TlsError::Root`] where no certificate of it can be used. Then the last good one stays.
    pub fn publish(&self, bundle: &Bundle) -> Result<(), TlsError> {
        let mut roots = RootCertStore::empty();
        // One that is not usable does not spoil the others, as `ca::peer::verify` has it.
        roots.add_parsable_certificates(
            bundle
                .certificates()
                .map(|der| CertificateDer::from(der.to_vec())),
        );
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&PROVIDER))
                .allow_unauthenticated()
                .build()
                .map_err(|fault| TlsError::Root(Error::General(fault.to_string())))?;
        self.current.store(Arc::new(Some(verifier)));
        Ok(())
    }

    /// Publishes the bundle of what `holders` holds now and of every later one, until `stop`.
    pub async fn follow<T>(
        self: Arc<Self>,
        mut holders: watch::Receiver<T>,
        bundle_of: impl Fn(&T) -> Bundle,
        stop: CancellationToken,
    ) {
        loop {
            let bundle = bundle_of(&holders.borrow_and_update());
            if let Err(error) = self.publish(&bundle) {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "trust bundle refused; clients are verified against the one before"
                );
            }
            tokio::select! {
                () = stop.cancelled() => return,
                changed = holders.changed() => if changed.is_err() {
                    // Nobody will publish again; what is trusted stays until the process ends.
                    return stop.cancelled().await;
                },
            }
        }
    }
}

impl ClientCertVerifier for ClientTrust {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// No hints: a client shows what it has, and the list could not change with the bundle.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        // Parsed first, so that bytes that are no certificate are told apart from one that nobody trusts.
        ParsedCertificate::try_from(end_entity)?;
        match &**self.current.load() {
            Some(verifier) => verifier.verify_client_cert(end_entity, intermediates, now),
            None => Err(CertificateError::UnknownIssuer.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &PROVIDER.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &PROVIDER.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER
            .signature_verification_algorithms
            .supported_schemes()
    }
}

impl fmt::Debug for ClientTrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTrust")
            .field("published", &self.current.load().is_some())
            .finish()
    }
}

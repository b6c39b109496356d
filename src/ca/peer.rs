//! What the other end of a TLS connection will say: chains are verified as rustls verifies them, before they are used.

use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use crate::ca::bundle::Bundle;

use jiff::Timestamp;

/// Which end shows the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The chain is a server's.
    Server,
    /// The chain is a client's.
    Client,
}

/// Whether a peer that trusts `bundle` accepts the chain (leaf first, DER) at `now`.
///
/// # Errors
/// What it would object to.
pub fn verify(
    chain: &[Vec<u8>],
    bundle: &Bundle,
    side: Side,
    now: Timestamp,
) -> Result<(), PeerError> {
    let certificates: Vec<CertificateDer<'_>> =
        chain.iter().map(|der| der.as_slice().into()).collect();
    let (leaf, intermediates) = certificates.split_first().ok_or(PeerError::Empty)?;
    let roots: Vec<CertificateDer<'_>> = bundle.certificates().map(Into::into).collect();
    // A root that is not usable (somebody else's in a shared bundle) does not spoil the others.
    let anchors: Vec<TrustAnchor<'_>> = roots
        .iter()
        .filter_map(|root| anchor_from_trusted_cert(root).ok())
        .collect();
    let usage = match side {
        Side::Server => KeyUsage::server_auth(),
        Side::Client => KeyUsage::client_auth(),
    };
    let seconds = u64::try_from(now.as_second()).unwrap_or(0);
    EndEntityCert::try_from(leaf)?
        .verify_for_usage(
            ALL_VERIFICATION_ALGS,
            &anchors,
            intermediates,
            UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds)),
            usage,
            None,
            None,
        )
        .map(|_| ())
        .map_err(PeerError::from)
}

/// Whether the leaf of a chain answers to a host name or address.
///
/// # Errors
/// It has another name.
pub fn verify_name(chain: &[Vec<u8>], name: &str) -> Result<(), PeerError> {
    let leaf: CertificateDer<'_> = chain.first().ok_or(PeerError::Empty)?.as_slice().into();
    let name = ServerName::try_from(name).map_err(|_| PeerError::Name(name.to_owned()))?;
    Ok(EndEntityCert::try_from(&leaf)?.verify_is_valid_for_subject_name(&name)?)
}

/// Why a peer would refuse a chain.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// No certificate at all.
    #[error("the chain is empty")]
    Empty,
    /// Not something that can be dialled.
    #[error("{0:?} is not a host name")]
    Name(String),
    /// The verifier's own words.
    #[error("a peer would refuse the chain: {0}")]
    Refused(#[from] webpki::Error),
}

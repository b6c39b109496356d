//! The certificate authority as values: what is asked, who asks, what is issued, and when its own keys change.
//!
//! CSR -> [`csr::Csr`]; token -> [`caller::Caller`]; both -> [`Authority::issue`] -> [`Issued`];
//! journal + instant -> [`rotation`] -> next journal

pub mod bundle;
pub mod caller;
pub mod csr;
pub mod journal;
pub mod profile;
pub mod rotation;

use std::time::Duration;

use jiff::Timestamp;

use crate::ca::{bundle::Bundle, journal::Journal, profile::Profile};

/// The active issuer, built once from a journal and shared by all requests.
pub struct Authority {}

/// A span in which a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Not before.
    pub not_before: Timestamp,
    /// Not after.
    pub not_after: Timestamp,
}

/// A certificate and what its receiver needs with it.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Leaf first, then intermediate, then cross-certificates while they serve; each DER. Never the root.
    pub chain: Vec<Vec<u8>>,
    /// The serial number, 16 bytes.
    pub serial: [u8; 16],
    /// When it is valid.
    pub validity: Validity,
}

/// A certificate chain together with its private key: what a TLS listener of ours serves.
pub struct KeyedChain {
    /// Leaf first; each DER.
    pub chain: Vec<Vec<u8>>,
    /// PKCS#8 DER; wiped when dropped.
    pub key: zeroize::Zeroizing<Vec<u8>>,
    /// When the leaf is valid.
    pub validity: Validity,
}

/// Bounds on a leaf's life.
#[derive(Clone, Copy, Debug)]
pub struct LeafPolicy {
    /// Granted when nothing is asked for.
    pub default: Duration,
    /// The shortest.
    pub min: Duration,
    /// The longest.
    pub max: Duration,
}

impl Authority {
    /// The authority that a journal holds, ready to sign at `now`.
    pub fn from_journal(_journal: &Journal, _now: Timestamp) -> Result<Self, AuthorityError> {
        Ok(Self {})
    }
    /// The trust set.
    pub fn bundle(&self) -> &Bundle {
        unimplemented!()
    }
    /// Signs `public_key` (a DER SubjectPublicKeyInfo that was checked by [`csr`] or made by us) with the profile's
    /// names and usages. The validity is clamped into every certificate of the chain.
    pub fn issue(
        &self,
        _public_key: &csr::PublicKey,
        _profile: &Profile,
        _life: Duration,
        _serial: [u8; 16],
        _now: Timestamp,
    ) -> Result<Issued, AuthorityError> {
        unimplemented!()
    }
}

/// Why nothing can be signed.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// `IssuerExpiring`: what is left of the issuer's life is shorter than the shortest leaf.
    #[error(
        "the issuing certificate ends at {0}, too soon for the shortest leaf; it is replaced by itself, try again"
    )]
    IssuerExpiring(Timestamp),
}

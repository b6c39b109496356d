//! The certificate authority as values: what is asked, who asks, what is issued, and when its own keys change.
//!
//! CSR -> [`csr::Csr`]; token -> [`caller::Caller`]; both -> [`Authority::issue`] -> [`Issued`];
//! journal + instant -> [`rotation`] -> next journal

pub mod bundle;
pub mod caller;
pub mod csr;
pub mod journal;
pub mod pem;
pub mod profile;
pub mod rotation;

use std::{fmt, time::Duration};

use jiff::Timestamp;

use crate::{
    ca::{bundle::Bundle, journal::Journal, profile::Profile},
    identity::TrustDomain,
};

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
    /// The serial number.
    pub serial: Serial,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafPolicy {
    /// Granted when nothing is asked for.
    pub default: Duration,
    /// The shortest.
    pub min: Duration,
    /// The longest.
    pub max: Duration,
}

/// A certificate's serial number: 16 bytes, positive, never zero (RFC 5280 4.1.2.2). The dice are the caller's.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Serial([u8; 16]);

impl Serial {
    /// All random but for the sign bit.
    pub fn random(_dice: [u8; 16]) -> Self {
        unimplemented!()
    }
    /// A workload's: 4 bytes for the hour of the last authentication by token, 12 random.
    pub fn for_workload(_token_proof: Timestamp, _dice: [u8; 12]) -> Self {
        unimplemented!()
    }
    /// Big-endian.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

/// Lower-case hex, as `openssl x509 -serial` prints it but for the case.
impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}
impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Authority {
    /// The authority that a journal holds.
    pub fn from_journal(_journal: &Journal, _leaf: &LeafPolicy) -> Result<Self, AuthorityError> {
        unimplemented!()
    }
    /// The trust set.
    pub fn bundle(&self) -> &Bundle {
        unimplemented!()
    }
    /// Counts the changes of the trust set.
    pub fn generation(&self) -> u64 {
        unimplemented!()
    }
    /// The trust domain of everything that is issued here.
    pub fn trust_domain(&self) -> &TrustDomain {
        unimplemented!()
    }
    /// Subject key id of the certificate that signs leaves.
    pub fn issuer_key_id(&self) -> &KeyId {
        unimplemented!()
    }
    /// When the certificate that signs leaves is valid.
    pub fn issuer_validity(&self) -> Validity {
        unimplemented!()
    }
    /// Signs a public key with the profile's names and usages. The validity is clamped into every certificate of the
    /// chain.
    pub fn issue(
        &self,
        _public_key: &csr::PublicKey,
        _profile: &Profile,
        _life: Duration,
        _serial: Serial,
        _now: Timestamp,
    ) -> Result<Issued, AuthorityError> {
        unimplemented!()
    }
}

/// A subject key id (RFC 5280 4.2.1.2); prints as lower-case hex.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(Vec<u8>);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}
impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
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
    /// `ClockJump`: the clock is behind what the journal has seen.
    #[error(
        "this clock says {now}, but the CA journal was written at {newest}; nothing is signed until they agree"
    )]
    ClockJump {
        /// Our clock.
        now: Timestamp,
        /// The newest time in the journal.
        newest: Timestamp,
    },
    /// `JournalStale`: the journal could not be read for too long.
    #[error("the CA journal was last read at {0}, too long ago to sign without it")]
    JournalStale(Timestamp),
    /// `SignFailed`: a fault of ours.
    #[error("cannot sign: {0}")]
    SignFailed(String),
}

impl AuthorityError {
    /// The stable code of the CSR tables: `IssuerExpiring`, `ClockJump`, `JournalStale`, `SignFailed`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::IssuerExpiring(_) => "IssuerExpiring",
            Self::ClockJump { .. } => "ClockJump",
            Self::JournalStale(_) => "JournalStale",
            Self::SignFailed(_) => "SignFailed",
        }
    }
}

//! A CSR is one public key and one proof of possession; everything else in it is ignored (and counted).

use crate::identity::SpiffeId;

/// A public key that passed the checks, or one of our own making.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    spki: Vec<u8>,
}

impl PublicKey {
    /// DER of the SubjectPublicKeyInfo.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }
    /// Its subject key id.
    pub fn key_id(&self) -> super::KeyId {
        unimplemented!()
    }
}

/// A checked CSR (RFC 2986).
#[derive(Clone, Debug)]
pub struct Csr {
    /// The key that is asked to be certified; its proof of possession was checked.
    pub public_key: PublicKey,
}

/// What may be certified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyPolicy {
    /// Whether Ed25519 keys are accepted (not every TLS peer knows them).
    pub ed25519: bool,
}

impl Csr {
    /// One PEM block, at most 16 KiB, nothing after it.
    pub fn parse_pem(_text: &[u8], _policy: KeyPolicy) -> Result<Self, CsrError> {
        unimplemented!()
    }
    /// DER without trailing bytes.
    pub fn parse_der(_der: &[u8], _policy: KeyPolicy) -> Result<Self, CsrError> {
        unimplemented!()
    }
    /// Whether it asks for a name, an extension or a usage that `identity` does not have. All of it is ignored.
    pub fn asks_beyond(&self, _identity: &SpiffeId) -> bool {
        unimplemented!()
    }
}

/// Why a CSR is refused; each has a stable code.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CsrError {
    /// Over 16 KiB.
    #[error("the CSR has {0} bytes, more than 16384")]
    TooLarge(usize),
    /// Not one PEM block of the right label.
    #[error("is not exactly one PEM block CERTIFICATE REQUEST: {0}")]
    InvalidPem(String),
    /// Not a CSR.
    #[error("is not a DER certification request: {0}")]
    InvalidCsr(String),
    /// A key that is not certified here.
    #[error("{0}; use P-256, P-384, or RSA with 2048 to 4096 bits and exponent 65537")]
    UnsupportedKey(String),
    /// Not signed by the key it holds.
    #[error("the CSR is not signed by the key it holds: {0}")]
    BadProofOfPossession(String),
}

impl CsrError {
    /// The stable code: `CsrTooLarge`, `InvalidPem`, `InvalidCsr`, `UnsupportedKey`, `BadProofOfPossession`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooLarge(_) => "CsrTooLarge",
            Self::InvalidPem(_) => "InvalidPem",
            Self::InvalidCsr(_) => "InvalidCsr",
            Self::UnsupportedKey(_) => "UnsupportedKey",
            Self::BadProofOfPossession(_) => "BadProofOfPossession",
        }
    }
}

//! A CSR is one public key and one proof of possession; everything else in it is ignored (and counted).

/// A public key that passed the checks: DER SubjectPublicKeyInfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    /// DER of the SubjectPublicKeyInfo.
    pub spki: Vec<u8>,
    /// RSA keys also get `keyEncipherment`.
    pub is_rsa: bool,
}

/// A checked CSR (RFC 2986).
#[derive(Clone, Debug)]
pub struct Csr {
    /// The key that is asked to be certified; its proof of possession was checked.
    pub public_key: PublicKey,
    /// Whether the CSR also asked for names, extensions or usages, all ignored.
    pub surplus: bool,
}

impl Csr {
    /// One PEM block, at most 16 KiB, nothing after it.
    pub fn parse_pem(_text: &[u8]) -> Result<Self, CsrError> {
        unimplemented!()
    }
    /// DER without trailing bytes.
    pub fn parse_der(_der: &[u8]) -> Result<Self, CsrError> {
        unimplemented!()
    }
}

/// Why a CSR is refused; each has a stable code.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CsrError {
    /// Not one PEM block of the right label.
    #[error("is not exactly one PEM block CERTIFICATE REQUEST: {0}")]
    InvalidPem(String),
}

impl CsrError {
    /// The stable code: `CsrTooLarge`, `InvalidPem`, `InvalidCsr`, `UnsupportedKey`, `BadProofOfPossession`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::InvalidPem(_) => "InvalidPem",
        }
    }
}

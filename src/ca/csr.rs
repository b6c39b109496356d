//! A CSR is one public key and one proof of possession; everything else in it is ignored (and counted).
//!
//! PEM or DER -> [`Csr::parse_pem`], [`Csr::parse_der`] -> [`PublicKey`]; names, extensions and lifetimes are ours
//!
//! The bytes are taken apart once: what the signature is checked over is what the key is taken from.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA384_ASN1, ECDSA_P256_SHA512_ASN1, ECDSA_P384_SHA256_ASN1,
    ECDSA_P384_SHA384_ASN1, ECDSA_P384_SHA512_ASN1, ED25519, ParsedPublicKey,
    RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512,
    VerificationAlgorithm,
};
use x509_parser::{
    certification_request::X509CertificationRequest,
    cri_attributes::ParsedCriAttribute,
    extensions::{ExtendedKeyUsage, GeneralName, KeyUsage, ParsedExtension},
    prelude::FromDer,
};

use crate::{
    ca::{KeyId, der, pem},
    identity::SpiffeId,
};

/// A checked CSR (RFC 2986).
#[derive(Clone, Debug)]
pub struct Csr {
    /// The key that is asked to be certified; its proof of possession was checked.
    pub public_key: PublicKey,
    wants: Wants,
}

/// A public key that passed the checks of [`Csr`], or one of our own making.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    kind: KeyKind,
    spki: Vec<u8>,
    /// What the SubjectPublicKeyInfo's BIT STRING holds: an EC point, or an RSAPublicKey.
    key: Vec<u8>,
}

/// The kinds of keys that are certified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyKind {
    /// NIST P-256.
    P256,
    /// NIST P-384.
    P384,
    /// RSA, 2048 to 4096 bits, exponent 65537.
    Rsa,
    /// Ed25519, where the operator asked for it.
    Ed25519,
}

/// What may be certified beyond P-256, P-384 and RSA.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyPolicy {
    /// Ed25519 keys too. Off by default: not every TLS peer knows them.
    pub ed25519: bool,
}

/// The longest CSR, in bytes, PEM or DER. An RSA-4096 one with a few names has about 2 KiB.
pub const MAX_BYTES: usize = 16 * 1024;

impl Csr {
    /// Reads exactly one PEM block `CERTIFICATE REQUEST` (or `NEW CERTIFICATE REQUEST`), with nothing after it.
    ///
    /// # Errors
    /// The first check that fails, in the order of the variants of [`CsrError`].
    pub fn parse_pem(text: &[u8], policy: KeyPolicy) -> Result<Self, CsrError> {
        if text.len() > MAX_BYTES {
            return Err(CsrError::TooLarge(text.len()));
        }
        Self::parse_der(&one_block(text)?, policy)
    }

    /// Reads DER with nothing after it.
    ///
    /// # Errors
    /// As [`Csr::parse_pem`].
    pub fn parse_der(der: &[u8], policy: KeyPolicy) -> Result<Self, CsrError> {
        if der.len() > MAX_BYTES {
            return Err(CsrError::TooLarge(der.len()));
        }
        let signed = Signed::split(der)?;
        let (_, request) = X509CertificationRequest::from_der(der)
            .map_err(|e| CsrError::InvalidCsr(e.to_string()))?;
        let info = &request.certification_request_info;
        if info.raw != signed.message {
            return Err(CsrError::InvalidCsr(
                "its parts do not add up to the whole".to_owned(),
            ));
        }
        if info.version.0 != 0 {
            return Err(CsrError::InvalidCsr(format!(
                "its version is {}, RFC 2986 knows 0",
                info.version.0
            )));
        }
        let public_key = PublicKey::read(info.subject_pki.raw, policy)?;
        signed.prove(&public_key)?;
        Ok(Self {
            public_key,
            wants: Wants::of(&request),
        })
    }

    /// Whether it asks for a name, an extension or a usage that a workload named `identity` does not get anyway. None
    /// of it has an effect; it is worth counting.
    pub fn asks_beyond(&self, identity: &SpiffeId) -> bool {
        let own = identity.to_string();
        self.wants.more || self.wants.uris.iter().any(|uri| *uri != own)
    }
}

impl PublicKey {
    /// Checks a DER SubjectPublicKeyInfo. It proves nothing about who holds the private half.
    ///
    /// # Errors
    /// [`CsrError::InvalidCsr`] where it is none, [`CsrError::UnsupportedKey`] where it is not certified here.
    pub fn parse(spki: &[u8], policy: KeyPolicy) -> Result<Self, CsrError> {
        let key = Self::read(spki, policy)?;
        key.usable(key.kind.usual_verification())?;
        Ok(key)
    }

    /// Everything but whether a point is on its curve, which the check of a signature finds anyway.
    fn read(spki: &[u8], policy: KeyPolicy) -> Result<Self, CsrError> {
        let malformed = || CsrError::InvalidCsr("its public key is not readable".to_owned());
        let content = der::only(der::SEQUENCE, spki).ok_or_else(malformed)?;
        let algorithm = der::element(der::SEQUENCE, content).ok_or_else(malformed)?;
        let bits = der::only(der::BIT_STRING, algorithm.rest).ok_or_else(malformed)?;
        let key = der::octets(bits).ok_or_else(malformed)?;
        let kind = KeyKind::of(algorithm.whole)
            .filter(|kind| *kind != KeyKind::Ed25519 || policy.ed25519)
            .ok_or_else(|| unsupported(name_of_algorithm(algorithm.content)))?;
        kind.check(key)?;
        Ok(Self {
            kind,
            spki: spki.to_owned(),
            key: key.to_owned(),
        })
    }

    fn usable(
        &self,
        verification: &'static dyn VerificationAlgorithm,
    ) -> Result<ParsedPublicKey, CsrError> {
        ParsedPublicKey::new(verification, &self.key).map_err(|_| {
            unsupported(match self.kind {
                KeyKind::P256 | KeyKind::P384 => {
                    format!("the {} key is no point of its curve", self.kind.name())
                }
                KeyKind::Rsa | KeyKind::Ed25519 => {
                    format!("the {} key is not usable", self.kind.name())
                }
            })
        })
    }

    /// One of our own keys.
    pub(super) fn of_ours(spki: &[u8]) -> Self {
        Self::parse(spki, KeyPolicy::default())
            .expect("a secret key is of a kind that is certified here")
    }

    /// DER of the SubjectPublicKeyInfo.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// What kind of key it is. RSA leaves also get the usage `keyEncipherment`.
    pub fn kind(&self) -> KeyKind {
        self.kind
    }

    /// The subject key id that its certificate carries.
    pub fn key_id(&self) -> KeyId {
        KeyId::of_spki(&self.spki)
    }
}

/// The algorithm comes from the key, never from the signature of the CSR: a P-256 key in a CSR signed with SHA-384 would
/// otherwise be certified as a P-384 key.
impl rcgen::PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.key
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        match self.kind {
            KeyKind::P256 => &rcgen::PKCS_ECDSA_P256_SHA256,
            KeyKind::P384 => &rcgen::PKCS_ECDSA_P384_SHA384,
            KeyKind::Rsa => &rcgen::PKCS_RSA_SHA256,
            KeyKind::Ed25519 => &rcgen::PKCS_ED25519,
        }
    }
}

/// Why a CSR is refused, in the order of the checks; each has a stable code.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CsrError {
    /// Over [`MAX_BYTES`].
    #[error("the CSR has {0} bytes, more than the {MAX_BYTES} that are read")]
    TooLarge(usize),
    /// Not exactly one PEM block of the right label.
    #[error("send exactly one PEM block CERTIFICATE REQUEST and nothing after it: {0}")]
    InvalidPem(String),
    /// Not a CSR.
    #[error("not a DER certification request (RFC 2986): {0}")]
    InvalidCsr(String),
    /// A key that is not certified here.
    #[error("{0}; use P-256, P-384, or RSA with 2048 to 4096 bits and exponent 65537")]
    UnsupportedKey(String),
    /// Not signed, as it should be, by the key that it holds.
    #[error("the CSR is not signed by the key it holds: {0}")]
    BadProofOfPossession(&'static str),
}

impl CsrError {
    /// The stable code: `CsrTooLarge`, `InvalidPem`, `InvalidCsr`, `UnsupportedKey` or `BadProofOfPossession`.
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

fn unsupported(what: String) -> CsrError {
    CsrError::UnsupportedKey(what)
}

/// Two CSRs in one text mean that somebody hopes for the other one.
fn one_block(text: &[u8]) -> Result<Vec<u8>, CsrError> {
    let invalid = |why: String| Err(CsrError::InvalidPem(why));
    let begins = text
        .windows(BEGIN.len())
        .filter(|window| *window == BEGIN)
        .count();
    if begins > 1 {
        return invalid(format!("{begins} blocks begin in it"));
    }
    let read = match pem::parse(text) {
        Ok(read) => read,
        Err(error) => return invalid(error.to_string()),
    };
    let Some(block) = read.blocks.into_iter().next() else {
        return invalid("no block is in it".to_owned());
    };
    if !matches!(
        block.label.as_str(),
        "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST"
    ) {
        return invalid("the block has another label".to_owned());
    }
    if read.text_after {
        return invalid("text follows the block".to_owned());
    }
    Ok(block.der)
}

const BEGIN: &[u8] = b"-----BEGIN";

/// The three parts of a certification request, which together are every byte of it.
struct Signed<'a> {
    /// CertificationRequestInfo, tag and length included: what is signed.
    message: &'a [u8],
    /// AlgorithmIdentifier of the signature, content only.
    algorithm: &'a [u8],
    signature: &'a [u8],
}

impl<'a> Signed<'a> {
    fn split(der: &'a [u8]) -> Result<Self, CsrError> {
        let invalid = |why: &str| CsrError::InvalidCsr(why.to_owned());
        let whole = der::element(der::SEQUENCE, der).ok_or_else(|| invalid("no whole SEQUENCE"))?;
        if !whole.rest.is_empty() {
            return Err(invalid("bytes follow it"));
        }
        let parts = || {
            let message = der::element(der::SEQUENCE, whole.content)?;
            let algorithm = der::element(der::SEQUENCE, message.rest)?;
            let bits = der::only(der::BIT_STRING, algorithm.rest)?;
            Some(Self {
                message: message.whole,
                algorithm: algorithm.content,
                signature: der::octets(bits)?,
            })
        };
        parts().ok_or_else(|| invalid("not a request, an algorithm and a signature"))
    }

    fn prove(&self, key: &PublicKey) -> Result<(), CsrError> {
        let algorithm = SignatureAlgorithm::of(self.algorithm);
        let verification = algorithm.and_then(|algorithm| algorithm.verification(key.kind));
        let usable = key.usable(verification.unwrap_or_else(|| key.kind.usual_verification()))?;
        let refused = |why| Err(CsrError::BadProofOfPossession(why));
        match (algorithm, verification) {
            (None, _) => refused(
                "its signature algorithm is not one of ECDSA or RSA PKCS#1 v1.5 with SHA-256, -384 or -512, or Ed25519",
            ),
            (Some(_), None) => refused("its signature algorithm does not fit its key"),
            (Some(_), Some(_)) => usable
                .verify_sig(self.message, self.signature)
                .or_else(|_| refused("the signature does not verify")),
        }
    }
}

impl KeyKind {
    /// By the exact bytes of the AlgorithmIdentifier (RFC 5480, RFC 3279 2.3.1, RFC 8410): named curves only, and the
    /// NULL that RSA requires.
    fn of(algorithm: &[u8]) -> Option<Self> {
        const P256: &[u8] =
            b"\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07";
        const P384: &[u8] =
            b"\x30\x10\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x22";
        const RSA: &[u8] = b"\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00";
        const ED25519: &[u8] = b"\x30\x05\x06\x03\x2b\x65\x70";
        [
            (P256, Self::P256),
            (P384, Self::P384),
            (RSA, Self::Rsa),
            (ED25519, Self::Ed25519),
        ]
        .into_iter()
        .find_map(|(bytes, kind)| (bytes == algorithm).then_some(kind))
    }

    fn name(self) -> &'static str {
        match self {
            Self::P256 => "P-256",
            Self::P384 => "P-384",
            Self::Rsa => "RSA",
            Self::Ed25519 => "Ed25519",
        }
    }

    fn usual_verification(self) -> &'static dyn VerificationAlgorithm {
        match self {
            Self::P256 => &ECDSA_P256_SHA256_ASN1,
            Self::P384 => &ECDSA_P384_SHA384_ASN1,
            Self::Rsa => &RSA_PKCS1_2048_8192_SHA256,
            Self::Ed25519 => &ED25519,
        }
    }

    fn check(self, key: &[u8]) -> Result<(), CsrError> {
        match self {
            Self::P256 => check_point(self, 32, key),
            Self::P384 => check_point(self, 48, key),
            Self::Rsa => check_rsa(key),
            Self::Ed25519 if key.len() == 32 => Ok(()),
            Self::Ed25519 => Err(unsupported("the Ed25519 key has not 32 bytes".to_owned())),
        }
    }
}

/// Uncompressed, as RFC 5480 2.2 asks of everybody: Go's verifiers refuse the compressed form.
fn check_point(kind: KeyKind, size: usize, point: &[u8]) -> Result<(), CsrError> {
    if point.first() == Some(&4) && point.len() == 1 + 2 * size {
        Ok(())
    } else {
        Err(unsupported(format!(
            "the {} key is not an uncompressed point",
            kind.name()
        )))
    }
}

fn check_rsa(key: &[u8]) -> Result<(), CsrError> {
    let numbers = || {
        let content = der::only(der::SEQUENCE, key)?;
        let modulus = der::element(der::INTEGER, content)?;
        let exponent = der::only(der::INTEGER, modulus.rest)?;
        Some((der::positive(modulus.content)?, der::positive(exponent)?))
    };
    let (modulus, exponent) =
        numbers().ok_or_else(|| unsupported("the RSA key is not readable".to_owned()))?;
    let bits = modulus.first().map_or(0, |first| {
        modulus.len() * 8 - first.leading_zeros() as usize
    });
    if !(2048..=4096).contains(&bits) {
        return Err(unsupported(format!("the RSA key has {bits} bits")));
    }
    if exponent != [1, 0, 1] {
        return Err(unsupported(
            "the RSA key's exponent is not 65537".to_owned(),
        ));
    }
    Ok(())
}

/// For the message: a name where people know one, else the dotted number.
fn name_of_algorithm(algorithm: &[u8]) -> String {
    const KNOWN: [(&str, &str); 10] = [
        ("1.3.132.0.35", "P-521"),
        ("1.3.132.0.33", "P-224"),
        ("1.3.132.0.10", "secp256k1"),
        ("1.2.840.10045.3.1.1", "P-192"),
        ("1.2.840.10040.4.1", "DSA"),
        ("1.2.840.113549.1.1.10", "RSA-PSS"),
        ("1.3.101.112", "Ed25519"),
        ("1.3.101.113", "Ed448"),
        ("1.2.840.10045.2.1", "an elliptic curve without a name"),
        ("1.2.840.113549.1.1.1", "RSA with odd parameters"),
    ];
    let oid = |bytes: &[u8]| x509_parser::der_parser::oid::Oid::new(bytes.into()).to_id_string();
    let Some(algorithm) = der::element(der::OBJECT_IDENTIFIER, algorithm) else {
        return "the key's algorithm is not readable".to_owned();
    };
    let curve = der::only(der::OBJECT_IDENTIFIER, algorithm.rest);
    let number = oid(curve.unwrap_or(algorithm.content));
    let name = KNOWN
        .iter()
        .find_map(|(known, name)| (*known == number).then_some(*name));
    format!("keys of {} are not certified", name.unwrap_or(&number))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum SignatureAlgorithm {
    Ecdsa(Hash),
    RsaPkcs1(Hash),
    Ed25519,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

impl SignatureAlgorithm {
    /// By the content of the AlgorithmIdentifier. ECDSA and Ed25519 have no parameters (RFC 5758 3.2, RFC 8410 3); RSA
    /// has a NULL that readers must also do without (RFC 4055 5).
    fn of(content: &[u8]) -> Option<Self> {
        let oid = der::element(der::OBJECT_IDENTIFIER, content)?;
        let algorithm = match oid.content {
            b"\x2a\x86\x48\xce\x3d\x04\x03\x02" => Self::Ecdsa(Hash::Sha256),
            b"\x2a\x86\x48\xce\x3d\x04\x03\x03" => Self::Ecdsa(Hash::Sha384),
            b"\x2a\x86\x48\xce\x3d\x04\x03\x04" => Self::Ecdsa(Hash::Sha512),
            b"\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0b" => Self::RsaPkcs1(Hash::Sha256),
            b"\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0c" => Self::RsaPkcs1(Hash::Sha384),
            b"\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0d" => Self::RsaPkcs1(Hash::Sha512),
            b"\x2b\x65\x70" => Self::Ed25519,
            _ => return None,
        };
        let null = matches!(algorithm, Self::RsaPkcs1(_)) && oid.rest == b"\x05\x00";
        (oid.rest.is_empty() || null).then_some(algorithm)
    }

    fn verification(self, key: KeyKind) -> Option<&'static dyn VerificationAlgorithm> {
        Some(match (key, self) {
            (KeyKind::P256, Self::Ecdsa(Hash::Sha256)) => &ECDSA_P256_SHA256_ASN1,
            (KeyKind::P256, Self::Ecdsa(Hash::Sha384)) => &ECDSA_P256_SHA384_ASN1,
            (KeyKind::P256, Self::Ecdsa(Hash::Sha512)) => &ECDSA_P256_SHA512_ASN1,
            (KeyKind::P384, Self::Ecdsa(Hash::Sha256)) => &ECDSA_P384_SHA256_ASN1,
            (KeyKind::P384, Self::Ecdsa(Hash::Sha384)) => &ECDSA_P384_SHA384_ASN1,
            (KeyKind::P384, Self::Ecdsa(Hash::Sha512)) => &ECDSA_P384_SHA512_ASN1,
            (KeyKind::Rsa, Self::RsaPkcs1(Hash::Sha256)) => &RSA_PKCS1_2048_8192_SHA256,
            (KeyKind::Rsa, Self::RsaPkcs1(Hash::Sha384)) => &RSA_PKCS1_2048_8192_SHA384,
            (KeyKind::Rsa, Self::RsaPkcs1(Hash::Sha512)) => &RSA_PKCS1_2048_8192_SHA512,
            (KeyKind::Ed25519, Self::Ed25519) => &ED25519,
            _ => return None,
        })
    }
}

/// What a CSR asks for besides its key.
#[derive(Clone, Debug, Default)]
struct Wants {
    uris: Vec<String>,
    /// A subject, another kind of name, or a right that no workload gets.
    more: bool,
}

impl Wants {
    fn of(request: &X509CertificationRequest<'_>) -> Self {
        let info = &request.certification_request_info;
        let mut wants = Self {
            uris: Vec::new(),
            // Istio's agents send an empty O: nobody's name.
            more: info
                .subject
                .iter_attributes()
                .any(|attribute| !attribute.as_slice().is_empty()),
        };
        for attribute in info.iter_attributes() {
            if let ParsedCriAttribute::ExtensionRequest(asked) = attribute.parsed_attribute() {
                for extension in &asked.extensions {
                    wants.note(extension.parsed_extension());
                }
            }
        }
        wants
    }

    fn note(&mut self, extension: &ParsedExtension<'_>) {
        match extension {
            ParsedExtension::SubjectAlternativeName(names) => {
                for name in &names.general_names {
                    match name {
                        GeneralName::URI(uri) => self.uris.push((*uri).to_owned()),
                        _ => self.more = true,
                    }
                }
            }
            ParsedExtension::BasicConstraints(constraints) => self.more |= constraints.ca,
            ParsedExtension::KeyUsage(usage) => self.more |= !is_a_leafs_usage(usage),
            ParsedExtension::ExtendedKeyUsage(usage) => self.more |= !is_a_peers_usage(usage),
            ParsedExtension::SubjectKeyIdentifier(_) => {}
            _ => self.more = true,
        }
    }
}

/// At most digitalSignature (bit 0) and keyEncipherment (bit 2).
fn is_a_leafs_usage(usage: &KeyUsage) -> bool {
    usage.flags & !0b101 == 0
}

fn is_a_peers_usage(usage: &ExtendedKeyUsage<'_>) -> bool {
    !(usage.any
        || usage.code_signing
        || usage.email_protection
        || usage.time_stamping
        || usage.ocsp_signing)
        && usage.other.is_empty()
}

#[cfg(test)]
mod tests;

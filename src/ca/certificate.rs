//! What we must know about a signing certificate, read once from its DER.

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer,
};

use crate::ca::{KeyId, Validity, der};

/// A CA certificate: CA:TRUE, allowed to sign certificates, with a subject key id.
#[derive(Clone, PartialEq, Eq)]
pub struct CaCertificate {
    der: Vec<u8>,
    id: KeyId,
    issuer_id: Option<KeyId>,
    subject: Vec<u8>,
    issuer: Vec<u8>,
    spki: Vec<u8>,
    uris: Vec<String>,
    path_length: Option<u32>,
    validity: Validity,
}

impl CaCertificate {
    /// Reads DER with nothing after it.
    ///
    /// # Errors
    /// Not X.509, or not a certificate that may sign others.
    pub fn parse(der: &[u8]) -> Result<Self, CertificateError> {
        use CertificateError as E;
        let certificate = read(der)?;
        let constraints = certificate.basic_constraints().map_err(|_| E::NotX509)?;
        let Some(constraints) = constraints.filter(|c| c.critical && c.value.ca) else {
            return Err(E::NotACa);
        };
        let usage = certificate.key_usage().map_err(|_| E::NotX509)?;
        if !usage.is_some_and(|u| u.critical && u.value.key_cert_sign()) {
            return Err(E::MayNotSign);
        }
        let names = certificate
            .subject_alternative_name()
            .map_err(|_| E::NotX509)?;
        let uris = names.map_or_else(Vec::new, |names| {
            let names = names.value.general_names.iter();
            names.filter_map(uri).collect()
        });
        Ok(Self {
            der: der.to_owned(),
            id: subject_key_id(&certificate).ok_or(E::NoKeyId)?,
            issuer_id: authority_key_id(&certificate),
            subject: certificate.subject().as_raw().to_owned(),
            issuer: certificate.issuer().as_raw().to_owned(),
            spki: certificate.public_key().raw.to_owned(),
            uris,
            path_length: constraints.value.path_len_constraint,
            validity: validity(&certificate)?,
        })
    }

    /// The whole certificate.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// Its subject key id.
    pub fn id(&self) -> &KeyId {
        &self.id
    }

    /// The subject key id of who signed it.
    pub fn issuer_id(&self) -> Option<&KeyId> {
        self.issuer_id.as_ref()
    }

    /// When it is valid.
    pub fn validity(&self) -> Validity {
        self.validity
    }

    /// Whether it signed itself, as trust anchors do.
    pub fn is_root(&self) -> bool {
        self.is_signed_by(self)
    }

    /// How many certificates of CAs may stand between it and a leaf; `None` is any number (RFC 5280 4.2.1.9).
    pub fn path_length(&self) -> Option<u32> {
        self.path_length
    }

    /// DER of its name.
    pub(super) fn subject(&self) -> &[u8] {
        &self.subject
    }

    /// DER of its public key.
    pub(super) fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// Its URI names.
    pub(super) fn uris(&self) -> &[String] {
        &self.uris
    }

    /// Whether `issuer` signed it: name, key id and signature.
    pub(super) fn is_signed_by(&self, issuer: &Self) -> bool {
        let (Ok(own), Ok(signer)) = (read(&self.der), read(&issuer.der)) else {
            return false;
        };
        self.issuer == issuer.subject
            && self.issuer_id.as_ref().is_none_or(|id| *id == issuer.id)
            && own.verify_signature(Some(signer.public_key())).is_ok()
    }
}

impl fmt::Debug for CaCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaCertificate")
            .field("id", &self.id)
            .field("validity", &self.validity)
            .finish_non_exhaustive()
    }
}

/// Base64 of the DER, as in the `x5c` of a SPIFFE bundle.
impl Serialize for CaCertificate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.der))
    }
}

impl<'de> Deserialize<'de> for CaCertificate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let der = STANDARD
            .decode(text)
            .map_err(|_| de::Error::custom("a certificate is not base64"))?;
        Self::parse(&der).map_err(de::Error::custom)
    }
}

/// Why DER is not a CA certificate.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CertificateError {
    /// Not a certificate, or bytes after it.
    #[error("a certificate is not readable X.509")]
    NotX509,
    /// No critical BasicConstraints with CA:TRUE.
    #[error("a certificate is not a CA's")]
    NotACa,
    /// No critical KeyUsage with keyCertSign.
    #[error("a certificate may not sign certificates")]
    MayNotSign,
    /// No subject key id.
    #[error("a CA certificate has no subject key id")]
    NoKeyId,
}

/// The subject key id of any certificate; where it has none, the one that we would give it.
pub(super) fn key_id(der: &[u8]) -> Result<KeyId, CertificateError> {
    let certificate = read(der)?;
    Ok(
        subject_key_id(&certificate)
            .unwrap_or_else(|| KeyId::of_spki(certificate.public_key().raw)),
    )
}

pub(super) fn read(der: &[u8]) -> Result<X509Certificate<'_>, CertificateError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) if is_strict(der) == Some(true) => Ok(certificate),
        _ => Err(CertificateError::NotX509),
    }
}

/// What no signature covers must be beyond doubt too: the frame, and the algorithm's name that stands outside of it.
/// (The parser lets other tags pass for its OBJECT IDENTIFIER.)
fn is_strict(der: &[u8]) -> Option<bool> {
    let content = der::only(der::SEQUENCE, der)?;
    let signed = der::element(der::SEQUENCE, content)?;
    let algorithm = der::element(der::SEQUENCE, signed.rest)?;
    der::octets(der::only(der::BIT_STRING, algorithm.rest)?)?;
    let version = der::element(der::VERSION, signed.content)?;
    let serial = der::element(der::INTEGER, version.rest)?;
    let inner = der::element(der::SEQUENCE, serial.rest)?;
    Some(inner.whole == algorithm.whole)
}

fn subject_key_id(certificate: &X509Certificate<'_>) -> Option<KeyId> {
    certificate
        .iter_extensions()
        .find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(KeyId(id.0.to_owned())),
            _ => None,
        })
}

fn authority_key_id(certificate: &X509Certificate<'_>) -> Option<KeyId> {
    certificate
        .iter_extensions()
        .find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(id) => {
                id.key_identifier.as_ref().map(|id| KeyId(id.0.to_owned()))
            }
            _ => None,
        })
}

pub(super) fn validity(certificate: &X509Certificate<'_>) -> Result<Validity, CertificateError> {
    let instant = |seconds| Timestamp::from_second(seconds).map_err(|_| CertificateError::NotX509);
    let span = certificate.validity();
    Ok(Validity {
        not_before: instant(span.not_before.timestamp())?,
        not_after: instant(span.not_after.timestamp())?,
    })
}

fn uri(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    }
}

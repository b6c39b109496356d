//! Private keys of ours: P-256 or P-384, PKCS#8, wiped when dropped, never printed.

use std::fmt;

use aws_lc_rs::{
    digest::{self, SHA256, SHA384},
    signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair,
        EcdsaSigningAlgorithm, KeyPair,
    },
};
use base64::{Engine, engine::general_purpose::STANDARD};
use rcgen::{CertificateParams, DistinguishedName};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use zeroize::Zeroizing;

use crate::ca::{csr::PublicKey, pem};

/// A private key as PKCS#8 DER. The bytes are wiped when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretKey(Zeroizing<Vec<u8>>);

impl SecretKey {
    /// Takes a P-256 or P-384 key.
    ///
    /// # Errors
    /// Anything else.
    pub fn from_pkcs8(der: Zeroizing<Vec<u8>>) -> Result<Self, KeyError> {
        Signer::parse(&der)?;
        Ok(Self(der))
    }

    /// PKCS#8 DER. Whoever copies it wipes the copy.
    pub fn pkcs8(&self) -> &[u8] {
        &self.0
    }

    /// Its public half.
    pub fn public_key(&self) -> PublicKey {
        self.signer().public_key()
    }

    /// A CSR for it, PEM: the key and its proof of possession. It asks for no name, since whoever signs takes the name
    /// from the credential.
    ///
    /// # Errors
    /// The crypto library could not sign.
    pub fn request(&self) -> Result<String, KeyError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params
            .serialize_request(&self.signer())
            .map_err(|_| KeyError::SignFailed)?;
        Ok(pem::encode("CERTIFICATE REQUEST", request.der()))
    }

    pub(super) fn signer(&self) -> Signer {
        Signer::parse(&self.0).expect("it was parsed when this key was made")
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(<redacted>)")
    }
}

/// Base64 of the DER: one line without escapes, so that neither side of serde buffers it elsewhere.
impl Serialize for SecretKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&Zeroizing::new(STANDARD.encode(&*self.0)))
    }
}

impl<'de> Deserialize<'de> for SecretKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl de::Visitor<'_> for Text {
            type Value = SecretKey;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a private key in base64")
            }

            /// The message never repeats the text.
            fn visit_str<E: de::Error>(self, text: &str) -> Result<SecretKey, E> {
                let der = STANDARD
                    .decode(text)
                    .map(Zeroizing::new)
                    .map_err(|_| E::custom("a private key is not base64"))?;
                SecretKey::from_pkcs8(der).map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// Why bytes are not a private key of ours.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KeyError {
    /// Not PKCS#8, another algorithm, or halves that do not match.
    #[error("a private key is not a P-256 or P-384 key in PKCS#8")]
    Unsupported,
    /// The crypto library's own fault.
    #[error("a private key cannot sign")]
    SignFailed,
}

/// Signs for rcgen. The library's own key pair keeps a plain copy of the DER, which nothing wipes; this one holds the
/// key inside the crypto library alone, which wipes it.
pub(super) struct Signer {
    pair: EcdsaKeyPair,
    algorithm: &'static rcgen::SignatureAlgorithm,
    hash: &'static digest::Algorithm,
}

impl Signer {
    fn parse(pkcs8: &[u8]) -> Result<Self, KeyError> {
        type Known = (
            &'static EcdsaSigningAlgorithm,
            &'static rcgen::SignatureAlgorithm,
            &'static digest::Algorithm,
        );
        const P256: Known = (
            &ECDSA_P256_SHA256_ASN1_SIGNING,
            &rcgen::PKCS_ECDSA_P256_SHA256,
            &SHA256,
        );
        const P384: Known = (
            &ECDSA_P384_SHA384_ASN1_SIGNING,
            &rcgen::PKCS_ECDSA_P384_SHA384,
            &SHA384,
        );
        [P256, P384]
            .into_iter()
            .find_map(|(signing, algorithm, hash)| {
                let pair = EcdsaKeyPair::from_pkcs8(signing, pkcs8).ok()?;
                Some(Self {
                    pair,
                    algorithm,
                    hash,
                })
            })
            .ok_or(KeyError::Unsupported)
    }

    pub(super) fn public_key(&self) -> PublicKey {
        use rcgen::PublicKeyData;
        PublicKey::of_ours(&self.subject_public_key_info())
    }
}

impl rcgen::PublicKeyData for Signer {
    fn der_bytes(&self) -> &[u8] {
        self.pair.public_key().as_ref()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.algorithm
    }
}

impl rcgen::SigningKey for Signer {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        // The nonce is the crypto library's own affair.
        self.pair
            .sign_digest(&digest::digest(self.hash, message))
            .map(|signature| signature.as_ref().to_vec())
            .map_err(|_| rcgen::Error::RemoteKeyError)
    }
}

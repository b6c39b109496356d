//! Private keys that sign here: our own are P-256, an operator's issuer may also be P-384 or RSA. PKCS#8, wiped when
//! dropped, never printed.

use std::fmt;

use aws_lc_rs::{
    digest::{self, SHA256, SHA384},
    encoding::AsDer as _,
    signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair,
        EcdsaSigningAlgorithm, KeyPair, RSA_PKCS1_SHA256, RsaKeyPair,
    },
};
use base64::{Engine, engine::general_purpose::STANDARD};
use rcgen::{CertificateParams, DistinguishedName};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use zeroize::Zeroizing;

use crate::ca::{
    csr::{KeyPolicy, PublicKey},
    pem,
};

/// A private key as PKCS#8 DER. The bytes are wiped when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretKey(Zeroizing<Vec<u8>>);

impl SecretKey {
    /// Takes a P-256, P-384 or RSA key (2048 to 4096 bits).
    ///
    /// # Errors
    /// Anything else.
    pub fn from_pkcs8(der: Zeroizing<Vec<u8>>) -> Result<Self, KeyError> {
        Signer::parse(&der)?;
        Ok(Self(der))
    }

    /// The one private key of a PEM text, as `openssl` writes it: PKCS#8 (RFC 5958), RSA's own form (RFC 8017 A.1.2) or
    /// that of elliptic curves (RFC 5915), the latter after its parameters where those are there.
    ///
    /// # Errors
    /// Not one key, a key behind a password, or one that [`Self::from_pkcs8`] does not take.
    pub fn from_pem(text: &[u8]) -> Result<Self, KeyError> {
        let read = pem::parse(text).map_err(|_| KeyError::NotPem)?;
        let mut keys = read.blocks.into_iter().map(|block| {
            let der = Zeroizing::new(block.der);
            (block.label, der)
        });
        let mut found = keys.by_ref().filter(|(label, _)| label != "EC PARAMETERS");
        let (Some((label, der)), None) = (found.next(), found.next()) else {
            return Err(KeyError::NotPem);
        };
        let unsupported = |_| KeyError::Unsupported;
        match label.as_str() {
            "PRIVATE KEY" => Self::from_pkcs8(der),
            "RSA PRIVATE KEY" => {
                let pair = RsaKeyPair::from_der(&der).map_err(unsupported)?;
                let pkcs8 = pair.as_der().map_err(|_| KeyError::Unsupported)?;
                Self::from_pkcs8(Zeroizing::new(pkcs8.as_ref().to_vec()))
            }
            "EC PRIVATE KEY" => [
                &ECDSA_P256_SHA256_ASN1_SIGNING,
                &ECDSA_P384_SHA384_ASN1_SIGNING,
            ]
            .into_iter()
            .find_map(|signing| EcdsaKeyPair::from_private_key_der(signing, &der).ok())
            .and_then(|pair| pair.to_pkcs8v1().ok())
            .ok_or(KeyError::Unsupported)
            .and_then(|pkcs8| Self::from_pkcs8(Zeroizing::new(pkcs8.as_ref().to_vec()))),
            "ENCRYPTED PRIVATE KEY" => Err(KeyError::Encrypted),
            _ => Err(KeyError::NotPem),
        }
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
    #[error("a private key is not a P-256, P-384 or RSA key (2048 to 4096 bits) in PKCS#8")]
    Unsupported,
    /// No PEM block with a private key, or more than one.
    #[error("not one PEM block with a private key")]
    NotPem,
    /// Nobody is there to be asked for the password.
    #[error("the private key is encrypted; decrypt it with `openssl pkey` first")]
    Encrypted,
    /// The crypto library's own fault.
    #[error("a private key cannot sign")]
    SignFailed,
}

/// Signs for rcgen. The library's own key pair keeps a plain copy of the DER, which nothing wipes; this one holds the
/// key inside the crypto library alone, which wipes it.
pub(super) struct Signer {
    pair: Pair,
    algorithm: &'static rcgen::SignatureAlgorithm,
}

enum Pair {
    Ecdsa(EcdsaKeyPair, &'static digest::Algorithm),
    Rsa(Box<RsaKeyPair>),
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
        let ecdsa = [P256, P384]
            .into_iter()
            .find_map(|(signing, algorithm, hash)| {
                let pair = EcdsaKeyPair::from_pkcs8(signing, pkcs8).ok()?;
                let pair = Pair::Ecdsa(pair, hash);
                Some(Self { pair, algorithm })
            });
        let rsa = || {
            let pair = RsaKeyPair::from_pkcs8(pkcs8).ok()?;
            let signer = Self {
                pair: Pair::Rsa(Box::new(pair)),
                algorithm: &rcgen::PKCS_RSA_SHA256,
            };
            // The same bounds as for anybody's key: 2048 to 4096 bits, e = 65537.
            let spki = rcgen::PublicKeyData::subject_public_key_info(&signer);
            PublicKey::parse(&spki, KeyPolicy::default()).ok()?;
            Some(signer)
        };
        ecdsa.or_else(rsa).ok_or(KeyError::Unsupported)
    }

    pub(super) fn public_key(&self) -> PublicKey {
        use rcgen::PublicKeyData;
        PublicKey::of_ours(&self.subject_public_key_info())
    }
}

impl rcgen::PublicKeyData for Signer {
    fn der_bytes(&self) -> &[u8] {
        match &self.pair {
            Pair::Ecdsa(pair, _) => pair.public_key().as_ref(),
            Pair::Rsa(pair) => pair.public_key().as_ref(),
        }
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.algorithm
    }
}

impl rcgen::SigningKey for Signer {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        // The nonce is the crypto library's own affair.
        let signed = match &self.pair {
            Pair::Ecdsa(pair, hash) => pair
                .sign_digest(&digest::digest(hash, message))
                .map(|signature| signature.as_ref().to_vec()),
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                let digest = digest::digest(&SHA256, message);
                pair.sign_digest(&RSA_PKCS1_SHA256, &digest, &mut signature)
                    .map(|()| signature)
            }
        };
        signed.map_err(|_| rcgen::Error::RemoteKeyError)
    }
}

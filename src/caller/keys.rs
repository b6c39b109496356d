//! A JSON Web Key Set (RFC 7517), read once and kept ready for verification.

use std::collections::HashMap;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;

/// The issuer's public keys by key id.
///
/// Keys that cannot verify any algorithm we allow (symmetric, P-521, Edwards, for encryption) are left out: a token can
/// name them, but finds no key. A set in which no key is left is refused, so that a wrong document never replaces the
/// last good set.
#[derive(Clone, Default)]
pub struct KeySet(HashMap<String, Vec<(KeyType, DecodingKey)>>);

/// What kind a key is, a part of the look-up: a token that names an RSA key with an ES256 header finds nothing, so a key
/// is never tried with another algorithm's arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum KeyType {
    Rsa,
    P256,
    P384,
}

impl KeyType {
    /// The only kind that fits an allowed algorithm (RFC 7518 3.1); `None` for every other algorithm.
    pub(super) fn of(algorithm: Algorithm) -> Option<Self> {
        match algorithm {
            Algorithm::RS256 | Algorithm::RS384 | Algorithm::RS512 => Some(Self::Rsa),
            Algorithm::ES256 => Some(Self::P256),
            Algorithm::ES384 => Some(Self::P384),
            _ => None,
        }
    }
}

impl KeySet {
    /// Reads a JWKS document.
    ///
    /// # Errors
    /// Not a JWKS, no usable key in it, or two usable keys of one kind under one id.
    pub fn parse(document: &[u8]) -> Result<Self, KeySetError> {
        let document: Document =
            serde_json::from_slice(document).map_err(|e| KeySetError::NotJwks(e.to_string()))?;
        let mut keys: HashMap<String, Vec<(KeyType, DecodingKey)>> = HashMap::new();
        for jwk in document.keys {
            let Ok(jwk) = serde_json::from_value::<Jwk>(jwk) else {
                continue;
            };
            let Some((id, kind, key)) = jwk.usable() else {
                continue;
            };
            let of_this_id = keys.entry(id.clone()).or_default();
            if of_this_id.iter().any(|(other, _)| *other == kind) {
                return Err(KeySetError::Ambiguous(id));
            }
            of_this_id.push((kind, key));
        }
        if keys.is_empty() {
            return Err(KeySetError::Empty);
        }
        Ok(Self(keys))
    }

    /// How many usable keys there are.
    pub fn len(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }

    /// Whether there is none (only [`Self::default`] makes such a set).
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn find(&self, id: &str, kind: KeyType) -> Option<&DecodingKey> {
        let mut keys = self.0.get(id)?.iter();
        keys.find_map(|(other, key)| (*other == kind).then_some(key))
    }
}

impl std::fmt::Debug for KeySet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Why a document is not a key set.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KeySetError {
    /// Not JSON, or no `keys`.
    #[error("is not a JSON Web Key Set: {0}")]
    NotJwks(String),
    /// Nothing to verify with.
    #[error("holds no RSA (2048 bits and more), P-256 or P-384 key with a key id")]
    Empty,
    /// Nobody could say which one is meant.
    #[error("holds two keys of one kind under the id {0:?}")]
    Ambiguous(String),
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    #[serde(rename = "use")]
    purpose: Option<String>,
    alg: Option<String>,
    crv: Option<String>,
    x: Option<String>,
    y: Option<String>,
    n: Option<String>,
    e: Option<String>,
}

impl Jwk {
    fn usable(self) -> Option<(String, KeyType, DecodingKey)> {
        if self.purpose.is_some_and(|purpose| purpose != "sig") {
            return None;
        }
        let (kind, key) = match self.kty.as_str() {
            "RSA" => (KeyType::Rsa, rsa(&self.n?, &self.e?)?),
            "EC" => {
                let (kind, coordinate) = match self.crv.as_deref()? {
                    "P-256" => (KeyType::P256, 32),
                    "P-384" => (KeyType::P384, 48),
                    _ => return None,
                };
                (kind, ec(&self.x?, &self.y?, coordinate)?)
            }
            _ => return None,
        };
        // RFC 7517 4.4: where a key says what it is for, it is for nothing else
        let meant = self
            .alg
            .as_deref()
            .is_none_or(|alg| alg.parse().ok().and_then(KeyType::of) == Some(kind));
        meant.then_some((self.kid?, kind, key))
    }
}

fn rsa(n: &str, e: &str) -> Option<DecodingKey> {
    let modulus = URL_SAFE_NO_PAD.decode(n).ok()?;
    let exponent = URL_SAFE_NO_PAD.decode(e).ok()?;
    let bits = modulus.iter().skip_while(|byte| **byte == 0).count() * 8;
    (bits >= 2048).then(|| DecodingKey::from_rsa_raw_components(&modulus, &exponent))
}

fn ec(x: &str, y: &str, coordinate: usize) -> Option<DecodingKey> {
    let full = |text: &str| {
        URL_SAFE_NO_PAD
            .decode(text)
            .is_ok_and(|bytes| bytes.len() == coordinate)
    };
    (full(x) && full(y)).then(|| DecodingKey::from_ec_components(x, y).ok())?
}

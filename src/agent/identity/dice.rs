//! The dice and the key generator, which the pure parts are handed.

use aws_lc_rs::{
    rand::{self, SystemRandom},
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair},
};
use zeroize::Zeroizing;

use crate::ca::key::SecretKey;

/// A new P-256 key, in memory alone.
pub(super) fn key() -> Option<SecretKey> {
    let der =
        EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new()).ok()?;
    SecretKey::from_pkcs8(Zeroizing::new(der.as_ref().to_vec())).ok()
}

/// From 0 to 1, both included.
pub(super) fn roll() -> f64 {
    let mut bytes = [0; 4];
    // Where the system has no dice, everything else fails with better words.
    let _ = rand::fill(&mut bytes);
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}

//! The dice and the key generator, which the core is handed.

use std::time::Duration;

use aws_lc_rs::{
    rand,
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair},
};
use zeroize::Zeroizing;

use crate::{ca::key::SecretKey, custody::CustodyError};

/// A new P-256 key.
pub(super) fn key() -> Result<SecretKey, CustodyError> {
    let der = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new())
        .map_err(|_| CustodyError::Dice)?;
    SecretKey::from_pkcs8(Zeroizing::new(der.as_ref().to_vec())).map_err(|_| CustodyError::Dice)
}

/// 16 random bytes.
pub(super) fn roll() -> Result<[u8; 16], CustodyError> {
    let mut bytes = [0; 16];
    rand::fill(&mut bytes).map_err(|_| CustodyError::Dice)?;
    Ok(bytes)
}

/// 90 to 110 % of a span, so that replicas that began together do not go on together.
pub(super) fn jitter(span: Duration) -> Duration {
    let [byte, ..] = roll().unwrap_or_default();
    span * 9 / 10 + span / 5 * u32::from(byte) / 255
}

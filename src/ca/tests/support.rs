//! What the tests of this room and of its users have in common.

use aws_lc_rs::{
    rand::{self, SystemRandom},
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair},
};
use zeroize::Zeroizing;

use crate::ca::{
    rotation::{RotationPolicy, first},
    *,
};

pub(crate) const HOUR: Duration = Duration::from_secs(3600);
pub(crate) const DAY: Duration = Duration::from_secs(24 * 3600);

pub(crate) fn at(text: &str) -> Timestamp {
    text.parse().expect("an instant")
}

pub(crate) fn mesh() -> TrustDomain {
    "cluster.local".parse().expect("a trust domain")
}

pub(crate) fn new_key() -> SecretKey {
    let der = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new())
        .expect("a key");
    SecretKey::from_pkcs8(Zeroizing::new(der.as_ref().to_vec())).expect("a key")
}

pub(crate) fn roll<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).expect("dice");
    bytes
}

pub(crate) fn founded(now: Timestamp, policy: &RotationPolicy) -> Journal {
    let dice = [roll(), roll()];
    let (journal, _) =
        first(&mesh(), new_key(), new_key(), dice, now, policy).expect("a first journal");
    journal
}

pub(crate) fn authority(journal: &Journal) -> Authority {
    Authority::from_journal(journal, &LeafPolicy::default()).expect("an authority")
}

pub(crate) fn workload(namespace: &str, account: &str) -> Profile {
    let id = crate::identity::SpiffeId::new(&mesh(), namespace, account).expect("an id");
    Profile::Workload(id)
}

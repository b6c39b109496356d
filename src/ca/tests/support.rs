//! What the tests of this room and of its users have in common.

use aws_lc_rs::{
    rand::{self, SystemRandom},
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair},
};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer as RcgenIssuer, KeyPair,
    KeyUsagePurpose,
};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::ca::{
    plugged::Files,
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

/// A certificate of an operator's own hierarchy, which knows nothing of us.
pub(crate) struct OperatorCa {
    pub(crate) certificate: String,
    pub(crate) key: String,
    issuer: RcgenIssuer<'static, KeyPair>,
}

impl OperatorCa {
    pub(crate) fn root(name: &str, validity: Validity) -> Self {
        Self::made(new_pair(), name, validity, None, None)
    }

    pub(crate) fn below(&self, name: &str, validity: Validity, path_length: Option<u8>) -> Self {
        Self::made(new_pair(), name, validity, path_length, Some(self))
    }

    /// Signs the key of another's certificate.
    pub(crate) fn certify(&self, other: &Self, name: &str, validity: Validity) -> Self {
        let key = KeyPair::from_pem(&other.key).expect("its own PEM");
        Self::made(key, name, validity, Some(0), Some(self))
    }

    fn made(
        key: KeyPair,
        name: &str,
        validity: Validity,
        path_length: Option<u8>,
        above: Option<&Self>,
    ) -> Self {
        let instant = |instant: Timestamp| {
            OffsetDateTime::from_unix_timestamp(instant.as_second()).expect("a year of four digits")
        };
        let mut params = CertificateParams::default();
        params.not_before = instant(validity.not_before);
        params.not_after = instant(validity.not_after);
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, "Corp");
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(match path_length {
            Some(length) => BasicConstraints::Constrained(length),
            None => BasicConstraints::Unconstrained,
        });
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        params.use_authority_key_identifier_extension = true;
        let certificate = match above {
            Some(above) => params.signed_by(&key, &above.issuer),
            None => params.self_signed(&key),
        };
        Self {
            certificate: certificate.expect("signed").pem(),
            key: key.serialize_pem(),
            issuer: RcgenIssuer::new(params, key),
        }
    }
}

fn new_pair() -> KeyPair {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("a key")
}

pub(crate) fn plugged_files(
    issuer: &OperatorCa,
    chain: &[&OperatorCa],
    roots: &[&OperatorCa],
) -> Files {
    let all = |list: &[&OperatorCa]| -> Vec<u8> {
        let texts = list.iter().map(|ca| ca.certificate.as_str());
        texts.collect::<String>().into_bytes()
    };
    Files {
        ca_cert: Some(issuer.certificate.clone().into_bytes()),
        ca_key: Some(Zeroizing::new(issuer.key.clone().into_bytes())),
        cert_chain: Some(all(chain)),
        root_cert: Some(all(roots)),
    }
}

//! A workload's certificate as a SPIFFE peer reads it (X509-SVID sections 2 to 5). Whether it can be trusted is said by
//! [`peer::verify`](crate::ca::peer::verify); this says whose it is.

use x509_parser::extensions::GeneralName;

use crate::{
    ca::{
        Serial, Validity,
        certificate::{read, validity},
    },
    identity::{IdentityError, SpiffeId},
};

/// A leaf of the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Svid {
    /// Who it is for.
    pub id: SpiffeId,
    /// DER of its public key.
    pub spki: Vec<u8>,
    /// When it is valid.
    pub validity: Validity,
    /// Its serial number, where it has the form of ours.
    pub serial: Option<Serial>,
}

impl Svid {
    /// Reads DER with nothing after it.
    ///
    /// # Errors
    /// Not X.509, or not a leaf with exactly one identity.
    pub fn parse(der: &[u8]) -> Result<Self, SvidError> {
        use SvidError as E;
        let certificate = read(der).map_err(|_| E::NotX509)?;
        let constraints = certificate.basic_constraints().map_err(|_| E::NotX509)?;
        if constraints.is_some_and(|constraints| constraints.value.ca) {
            return Err(E::SigningCertificate);
        }
        let usage = certificate.key_usage().map_err(|_| E::NotX509)?;
        let Some(usage) = usage.map(|usage| usage.value) else {
            return Err(E::KeyUsage);
        };
        if usage.key_cert_sign() || usage.crl_sign() || !usage.digital_signature() {
            return Err(E::KeyUsage);
        }
        let names = certificate
            .subject_alternative_name()
            .map_err(|_| E::NotX509)?;
        let names = names.map_or(&[][..], |names| &names.value.general_names);
        let mut uris = names.iter().filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        let (Some(uri), None) = (uris.next(), uris.next()) else {
            return Err(E::Uris);
        };
        Ok(Self {
            id: uri.parse()?,
            spki: certificate.public_key().raw.to_owned(),
            validity: validity(&certificate).map_err(|_| E::NotX509)?,
            serial: Serial::from_bytes(certificate.raw_serial()),
        })
    }
}

/// Why a certificate is no workload's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SvidError {
    /// Not a certificate, or bytes after it.
    #[error("the certificate is not readable X.509")]
    NotX509,
    /// CA:TRUE.
    #[error("the certificate is a CA's, not a workload's")]
    SigningCertificate,
    /// keyCertSign or cRLSign, or no digitalSignature.
    #[error(
        "the certificate's key usage is not a workload's: digitalSignature, and no signing of certificates"
    )]
    KeyUsage,
    /// None or several: never a choice of ours.
    #[error("the certificate does not hold exactly one URI")]
    Uris,
    /// A URI of another form.
    #[error("the certificate's URI is no identity of a mesh: {0}")]
    Identity(#[from] IdentityError),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::{
        Serial,
        profile::Profile,
        rotation::RotationPolicy,
        tests::support::{HOUR, at, authority, founded, new_key, roll, workload},
    };

    #[test]
    fn a_leaf_says_whose_it_is_and_for_which_key() {
        let now = at("2026-11-22T10:00:00Z");
        let authority = authority(&founded(now, &RotationPolicy::default()));
        let key = new_key().public_key();
        let dice = Serial::random(roll());
        let issued = authority
            .issue(&key, &workload("shop", "web"), HOUR, dice, now)
            .expect("issued");
        let svid = Svid::parse(&issued.chain[0]).expect("a leaf");
        assert_eq!(svid.id.to_string(), "spiffe://cluster.local/ns/shop/sa/web");
        assert_eq!(svid.spki, key.spki());
        assert_eq!(svid.validity, issued.validity);
        assert_eq!(
            Svid::parse(&issued.chain[1]),
            Err(SvidError::SigningCertificate)
        );
        assert_eq!(Svid::parse(b"\x30\x00"), Err(SvidError::NotX509));
    }

    #[test]
    fn a_certificate_without_an_identity_is_nobodys() {
        let now = at("2026-11-22T10:00:00Z");
        let authority = authority(&founded(now, &RotationPolicy::default()));
        let webhook = Profile::Webhook {
            dns_names: vec!["malha.malha-system.svc".to_owned()],
        };
        let key = new_key().public_key();
        let dice = Serial::random(roll());
        let issued = authority
            .issue(&key, &webhook, HOUR, dice, now)
            .expect("issued");
        assert_eq!(Svid::parse(&issued.chain[0]), Err(SvidError::Uris));
    }
}

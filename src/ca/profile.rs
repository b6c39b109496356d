//! What kinds of certificates there are, field by field.
//!
//! Every field that rcgen would fill by itself is set here: its defaults are a name of its own, a validity from 1975 to
//! 4096, a serial that repeats with the key, no usages and no authority key id.

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyUsagePurpose, SanType, SerialNumber, string::Ia5String,
};
use rustls_pki_types::ServerName;
use time::OffsetDateTime;

use crate::{
    ca::{
        AuthorityError, KeyId, Serial, Validity,
        certificate::CaCertificate,
        csr::{KeyKind, PublicKey},
        key::{SecretKey, Signer},
    },
    identity::{SpiffeId, TrustDomain},
};

/// A leaf's kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Profile {
    /// A workload's SVID: exactly one URI SAN.
    Workload(SpiffeId),
    /// What we serve on the CA and xDS port: a URI and DNS names.
    ControlPlane {
        /// Our own identity.
        id: SpiffeId,
        /// DNS names that callers dial.
        dns_names: Vec<String>,
    },
    /// What we serve to the API server: DNS names only, never a URI, so that no workload's certificate can pass for it.
    Webhook {
        /// `malha.malha-system.svc`, or the standalone's host names and addresses.
        dns_names: Vec<String>,
    },
}

/// How far before the present instant a leaf begins: nodes' clocks differ (istio/istio#32176).
pub const LEAF_BACKDATE: Duration = Duration::from_secs(5 * 60);

/// How far before the present instant a signing certificate begins: further than any leaf.
pub const CA_BACKDATE: Duration = Duration::from_secs(10 * 60);

impl Profile {
    /// The URI name, where the profile has one.
    pub fn id(&self) -> Option<&SpiffeId> {
        match self {
            Self::Workload(id) | Self::ControlPlane { id, .. } => Some(id),
            Self::Webhook { .. } => None,
        }
    }

    /// The names that a TLS client dials.
    pub fn dns_names(&self) -> &[String] {
        match self {
            Self::Workload(_) => &[],
            Self::ControlPlane { dns_names, .. } | Self::Webhook { dns_names } => dns_names,
        }
    }

    fn usages(&self) -> Vec<ExtendedKeyUsagePurpose> {
        match self {
            Self::Workload(_) | Self::ControlPlane { .. } => vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
            Self::Webhook { .. } => vec![ExtendedKeyUsagePurpose::ServerAuth],
        }
    }

    fn names(&self) -> Result<Vec<SanType>, AuthorityError> {
        let uri = self.id().map(|id| text(&id.to_string()).map(SanType::URI));
        let hosts = self.dns_names().iter().map(|name| host(name));
        let names: Vec<SanType> = uri.into_iter().chain(hosts).collect::<Result<_, _>>()?;
        if names.is_empty() {
            return Err(AuthorityError::SignFailed(
                "a certificate without a name".to_owned(),
            ));
        }
        Ok(names)
    }
}

/// Signs a leaf. The empty subject makes the alternative names critical (RFC 5280 4.1.2.6).
pub(super) fn leaf(
    issuer: &Issuer<'static, Signer>,
    public_key: &PublicKey,
    profile: &Profile,
    validity: Validity,
    serial: Serial,
) -> Result<Vec<u8>, AuthorityError> {
    let mut params = blank(validity, serial, public_key.key_id());
    params.subject_alt_names = profile.names()?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    if public_key.kind() == KeyKind::Rsa {
        params.key_usages.push(KeyUsagePurpose::KeyEncipherment);
    }
    params.extended_key_usages = profile.usages();
    sign(&params, public_key, issuer)
}

/// A self-signed root. Its path length is unset, so that a cross-certificate fits below it.
pub fn root(
    trust_domain: &TrustDomain,
    key: &SecretKey,
    validity: Validity,
    serial: Serial,
) -> Result<CaCertificate, AuthorityError> {
    let public_key = key.public_key();
    let mut params = authority(
        trust_domain,
        "root",
        BasicConstraints::Unconstrained,
        &public_key,
        validity,
        serial,
    )?;
    params.use_authority_key_identifier_extension = false;
    let itself = Issuer::new(params.clone(), key.signer());
    parse(&sign(&params, &public_key, &itself)?)
}

/// An intermediate below `root`, for the key whose public half is given. It signs leaves and nothing else.
pub fn intermediate(
    trust_domain: &TrustDomain,
    root: &CaCertificate,
    root_key: &SecretKey,
    public_key: &PublicKey,
    validity: Validity,
    serial: Serial,
) -> Result<CaCertificate, AuthorityError> {
    let params = authority(
        trust_domain,
        "intermediate",
        BasicConstraints::Constrained(0),
        public_key,
        validity,
        serial,
    )?;
    parse(&sign(&params, public_key, &issuer(root, root_key)?)?)
}

/// What signs as `certificate`. Made once and kept: it costs more than twice a signature.
pub(super) fn issuer(
    certificate: &CaCertificate,
    key: &SecretKey,
) -> Result<Issuer<'static, Signer>, AuthorityError> {
    Issuer::from_ca_cert_der(&certificate.der().into(), key.signer()).map_err(failed)
}

fn authority(
    trust_domain: &TrustDomain,
    kind: &str,
    constraints: BasicConstraints,
    public_key: &PublicKey,
    validity: Validity,
    serial: Serial,
) -> Result<CertificateParams, AuthorityError> {
    let id = public_key.key_id();
    let mut params = blank(validity, serial, id.clone());
    params.distinguished_name = name(trust_domain, kind, &id);
    params.subject_alt_names = vec![SanType::URI(text(&trust_domain.uri())?)];
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// `O=<trust domain>, CN=malha <kind> <first 16 hex digits of the key id>`: unique for each key, since verifiers tire of
/// many roots of one name (spiffe/spire#4415).
fn name(trust_domain: &TrustDomain, kind: &str, id: &KeyId) -> DistinguishedName {
    let organization: String = trust_domain
        .as_str()
        .chars()
        .take(ORGANIZATION_LENGTH)
        .collect();
    let short: String = id.to_string().chars().take(16).collect();
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, organization);
    name.push(DnType::CommonName, format!("malha {kind} {short}"));
    name
}

/// RFC 5280 appendix A.1, `ub-organization-name`.
const ORGANIZATION_LENGTH: usize = 64;

/// Everything that rcgen would choose, chosen.
fn blank(validity: Validity, serial: Serial, id: KeyId) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = moment(validity.not_before);
    params.not_after = moment(validity.not_after);
    params.serial_number = Some(SerialNumber::from_slice(serial.as_bytes()));
    params.subject_alt_names = Vec::new();
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = Vec::new();
    params.extended_key_usages = Vec::new();
    params.name_constraints = None;
    params.crl_distribution_points = Vec::new();
    params.custom_extensions = Vec::new();
    params.use_authority_key_identifier_extension = true;
    params.key_identifier_method = KeyIdMethod::PreSpecified(id.0);
    params
}

fn sign(
    params: &CertificateParams,
    public_key: &PublicKey,
    issuer: &Issuer<'_, Signer>,
) -> Result<Vec<u8>, AuthorityError> {
    let certificate = params.signed_by(public_key, issuer).map_err(failed)?;
    Ok(certificate.der().to_vec())
}

fn parse(der: &[u8]) -> Result<CaCertificate, AuthorityError> {
    CaCertificate::parse(der).map_err(|error| AuthorityError::SignFailed(error.to_string()))
}

fn host(name: &str) -> Result<SanType, AuthorityError> {
    match ServerName::try_from(name) {
        Ok(ServerName::DnsName(_)) => text(name).map(SanType::DnsName),
        Ok(ServerName::IpAddress(address)) => Ok(SanType::IpAddress(address.into())),
        _ => Err(AuthorityError::SignFailed(format!(
            "{name:?} is not a host name"
        ))),
    }
}

fn text(ascii: &str) -> Result<Ia5String, AuthorityError> {
    Ia5String::try_from(ascii).map_err(failed)
}

fn moment(instant: jiff::Timestamp) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(instant.as_second())
        .expect("both types span the years 0 to 9999")
}

fn failed(error: rcgen::Error) -> AuthorityError {
    AuthorityError::SignFailed(error.to_string())
}

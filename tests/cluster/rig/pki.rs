//! Certificates and keys of the test cluster itself, made in memory: nothing of Malha's own is used to judge Malha.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_RSA_SHA256, RsaKeySize, SanType, date_time_ymd,
};

/// The one certificate authority of a test cluster: API server, etcd and every user's client certificate.
pub(crate) struct Pki {
    issuer: Issuer<'static, KeyPair>,
    dir: PathBuf,
}

/// A certificate and its key on disk, for programs that take files.
#[derive(Clone, Debug)]
pub(crate) struct Files {
    /// The certificate, PEM.
    pub(crate) certificate: PathBuf,
    /// Its private key, PEM.
    pub(crate) key: PathBuf,
}

impl Pki {
    /// Makes the authority; `ca.crt` and `ca.key` are written to `dir`.
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        let mut params = params("malha-test-cluster", &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let key = KeyPair::generate()?;
        let files = Files {
            certificate: dir.join("ca.crt"),
            key: dir.join("ca.key"),
        };
        write_private(&files.certificate, &params.self_signed(&key)?.pem())?;
        write_private(&files.key, &key.serialize_pem())?;
        Ok(Self {
            issuer: Issuer::new(params, key),
            dir: dir.to_owned(),
        })
    }

    /// The authority's own files.
    pub(crate) fn authority(&self) -> Files {
        Files {
            certificate: self.dir.join("ca.crt"),
            key: self.dir.join("ca.key"),
        }
    }

    /// A certificate for a server that is called by these names and addresses; it may also call (etcd calls itself).
    pub(crate) fn server(&self, file: &str, names: &[&str], addresses: &[IpAddr]) -> Result<Files> {
        let mut params = params(file, &[]);
        for name in names {
            params
                .subject_alt_names
                .push(SanType::DnsName((*name).try_into()?));
        }
        params
            .subject_alt_names
            .extend(addresses.iter().copied().map(SanType::IpAddress));
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        self.issue(file, params)
    }

    /// A certificate that makes its holder this user in these groups.
    pub(crate) fn client(&self, file: &str, user: &str, groups: &[&str]) -> Result<Files> {
        let mut params = params(user, groups);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(file, params)
    }

    fn issue(&self, file: &str, mut params: CertificateParams) -> Result<Files> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let files = Files {
            certificate: self.dir.join(format!("{file}.crt")),
            key: self.dir.join(format!("{file}.key")),
        };
        write_private(
            &files.certificate,
            &params.signed_by(&key, &self.issuer)?.pem(),
        )?;
        write_private(&files.key, &key.serialize_pem())?;
        Ok(files)
    }
}

/// The key pair that signs service-account tokens. RSA, as kubeadm makes it: most real tokens are RS256.
/// `certificate` holds the bare public key.
pub(crate) fn service_account_key(dir: &Path) -> Result<Files> {
    let key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048)?;
    let files = Files {
        certificate: dir.join("sa.pub"),
        key: dir.join("sa.key"),
    };
    write_private(&files.certificate, &key.public_key_pem())?;
    write_private(&files.key, &key.serialize_pem())?;
    Ok(files)
}

fn params(common_name: &str, organizations: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    // rcgen keeps one value per attribute type, so a user of a test cluster is in at most one group.
    assert!(
        organizations.len() <= 1,
        "one group a user: {organizations:?}"
    );
    for organization in organizations {
        params
            .distinguished_name
            .push(DnType::OrganizationName, *organization);
    }
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    params.not_before = date_time_ymd(2024, 1, 1);
    params.not_after = date_time_ymd(2124, 1, 1);
    params
}

/// Writes a file that only we can read, whatever the umask is.
pub(crate) fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text.as_bytes())?;
    Ok(())
}

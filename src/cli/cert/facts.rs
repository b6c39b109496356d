//! What a certificate says, in the words of whoever reads it.

use std::fmt;

use anyhow::anyhow;
use jiff::Timestamp;
use serde_json::{Value, json};
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer as _,
    public_key::PublicKey,
};

use crate::ca::Validity;

/// One certificate.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) kind: Kind,
    /// Subject alternative names: URIs and DNS names as they stand, addresses in their usual form.
    pub(super) names: Vec<String>,
    pub(super) subject: String,
    pub(super) issuer: String,
    /// Lower-case hex.
    pub(super) serial: String,
    pub(super) validity: Validity,
    /// `P-256`, `RSA-2048`, ..
    pub(super) key: String,
    pub(super) subject_key_id: Option<String>,
    pub(super) authority_key_id: Option<String>,
    /// Names of RFC 5280: `digitalSignature`, `keyCertSign`, `serverAuth`, ..
    pub(super) usages: Vec<String>,
}

/// What a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Leaf,
    Intermediate,
    Root,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Leaf => "leaf",
            Self::Intermediate => "intermediate",
            Self::Root => "root",
        })
    }
}

impl Facts {
    /// Reads DER.
    pub(super) fn read(der: &[u8]) -> anyhow::Result<Self> {
        let (rest, certificate) = X509Certificate::from_der(der)
            .map_err(|fault| anyhow!("a certificate is not readable X.509: {fault}"))?;
        if !rest.is_empty() {
            return Err(anyhow!(
                "a certificate has {} bytes after its end",
                rest.len()
            ));
        }
        let instant = |time: x509_parser::time::ASN1Time| Timestamp::from_second(time.timestamp());
        let validity = certificate.validity();
        let extensions = certificate
            .extensions()
            .iter()
            .map(|extension| extension.parsed_extension());
        let mut facts = Self {
            kind: kind(&certificate),
            names: Vec::new(),
            subject: certificate.subject().to_string(),
            issuer: certificate.issuer().to_string(),
            serial: hex(certificate.raw_serial()),
            validity: Validity {
                not_before: instant(validity.not_before)?,
                not_after: instant(validity.not_after)?,
            },
            key: key(&certificate),
            subject_key_id: None,
            authority_key_id: None,
            usages: Vec::new(),
        };
        for extension in extensions {
            match extension {
                ParsedExtension::SubjectAlternativeName(names) => {
                    facts.names.extend(names.general_names.iter().map(name));
                }
                ParsedExtension::SubjectKeyIdentifier(id) => facts.subject_key_id = Some(hex(id.0)),
                ParsedExtension::AuthorityKeyIdentifier(id) => {
                    facts.authority_key_id = id.key_identifier.as_ref().map(|id| hex(id.0));
                }
                ParsedExtension::KeyUsage(usage) => {
                    let bits = [
                        (usage.digital_signature(), "digitalSignature"),
                        (usage.non_repudiation(), "nonRepudiation"),
                        (usage.key_encipherment(), "keyEncipherment"),
                        (usage.data_encipherment(), "dataEncipherment"),
                        (usage.key_agreement(), "keyAgreement"),
                        (usage.key_cert_sign(), "keyCertSign"),
                        (usage.crl_sign(), "cRLSign"),
                    ];
                    facts.usages.extend(set(&bits));
                }
                ParsedExtension::ExtendedKeyUsage(usage) => {
                    let bits = [
                        (usage.any, "anyExtendedKeyUsage"),
                        (usage.server_auth, "serverAuth"),
                        (usage.client_auth, "clientAuth"),
                        (usage.code_signing, "codeSigning"),
                    ];
                    facts.usages.extend(set(&bits));
                }
                _ => {}
            }
        }
        Ok(facts)
    }

    /// Who it is about: its names, or its subject where it has none.
    pub(super) fn identity(&self) -> String {
        match (self.names.is_empty(), self.subject.is_empty()) {
            (false, _) => self.names.join(","),
            (true, false) => self.subject.clone(),
            (true, true) => "-".to_owned(),
        }
    }

    pub(super) fn to_json(&self, now: Timestamp) -> Value {
        json!({
            "kind": self.kind.to_string(),
            "names": self.names,
            "subject": self.subject,
            "issuer": self.issuer,
            "serial": self.serial,
            "notBefore": self.validity.not_before,
            "notAfter": self.validity.not_after,
            "secondsLeft": self.validity.not_after.duration_since(now).as_secs(),
            "key": self.key,
            "subjectKeyId": self.subject_key_id,
            "authorityKeyId": self.authority_key_id,
            "usages": self.usages,
        })
    }
}

fn kind(certificate: &X509Certificate<'_>) -> Kind {
    match (
        certificate.is_ca(),
        certificate.subject() == certificate.issuer(),
    ) {
        (false, _) => Kind::Leaf,
        (true, false) => Kind::Intermediate,
        (true, true) => Kind::Root,
    }
}

fn name(name: &GeneralName<'_>) -> String {
    match name {
        GeneralName::URI(text) | GeneralName::DNSName(text) | GeneralName::RFC822Name(text) => {
            text.escape_debug().to_string()
        }
        GeneralName::IPAddress(bytes) => address(bytes),
        other => other.to_string(),
    }
}

fn address(bytes: &[u8]) -> String {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        std::net::Ipv4Addr::from(v4).to_string()
    } else if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        std::net::Ipv6Addr::from(v6).to_string()
    } else {
        hex(bytes)
    }
}

fn key(certificate: &X509Certificate<'_>) -> String {
    let info = certificate.public_key();
    match info.parsed() {
        Ok(PublicKey::EC(point)) => format!("P-{}", point.key_size()),
        Ok(PublicKey::RSA(key)) => format!("RSA-{}", key.key_size()),
        _ if info.algorithm.algorithm.to_id_string() == "1.3.101.112" => "Ed25519".to_owned(),
        _ => info.algorithm.algorithm.to_id_string(),
    }
}

fn set(bits: &[(bool, &str)]) -> Vec<String> {
    bits.iter()
        .filter(|(set, _)| *set)
        .map(|(_, name)| (*name).to_owned())
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

//! The live configuration: its entries, and whether what they hold verifies a certificate as the API server would.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    ByteString,
    api::admissionregistration::v1::{
        MutatingWebhookConfiguration, ValidatingWebhookConfiguration, WebhookClientConfig,
    },
    apimachinery::pkg::apis::meta::v1::{ManagedFieldsEntry, ObjectMeta},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use super::drift::{Entry, FIELD_MANAGER, Record};
use crate::ca::bundle::Bundle;

/// A kind whose entries have a `caBundle`.
pub(super) trait Configuration {
    fn entries(&self) -> Vec<Entry>;
}

impl Configuration for MutatingWebhookConfiguration {
    fn entries(&self) -> Vec<Entry> {
        let webhooks = self.webhooks.iter().flatten();
        webhooks
            .map(|webhook| entry(&webhook.name, &webhook.client_config, &self.metadata))
            .collect()
    }
}

impl Configuration for ValidatingWebhookConfiguration {
    fn entries(&self) -> Vec<Entry> {
        let webhooks = self.webhooks.iter().flatten();
        webhooks
            .map(|webhook| entry(&webhook.name, &webhook.client_config, &self.metadata))
            .collect()
    }
}

fn entry(name: &str, config: &WebhookClientConfig, metadata: &ObjectMeta) -> Entry {
    let ca_bundle = config.ca_bundle.clone().map(|ByteString(bytes)| bytes);
    Entry {
        name: name.to_owned(),
        ca_bundle: ca_bundle.unwrap_or_default(),
        record: record(name, metadata.managed_fields.as_deref().unwrap_or_default()),
    }
}

/// Reads who wrote an entry's bundle from the API server's records (`managedFields`, `fieldsV1`).
fn record(name: &str, managers: &[ManagedFieldsEntry]) -> Record {
    let key = format!("k:{}", serde_json::json!({"name": name}));
    let ours = managers
        .iter()
        .filter(|entry| entry.manager.as_deref() == Some(FIELD_MANAGER))
        .filter_map(|entry| entry.fields_v1.as_ref()?.0.get("f:webhooks")?.get(&key));
    let mut record = Record::Fresh;
    for fields in ours {
        let bundle = fields
            .get("f:clientConfig")
            .and_then(|config| config.get("f:caBundle"));
        match bundle {
            Some(_) => return Record::Ours,
            None => record = Record::Overwritten,
        }
    }
    record
}

/// Why the API server would not accept what we serve.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// It was not read yet, or nobody installed it.
    #[error("MutatingWebhookConfiguration {0} does not exist, or could not be read yet")]
    Absent(String),
    /// It calls nobody.
    #[error("MutatingWebhookConfiguration {0} has no entries")]
    Empty(String),
    /// An entry trusts nobody, or somebody else.
    #[error("the caBundle of entry {entry} does not verify what is served as {dns_name}: {fault}")]
    Refused {
        /// The entry.
        entry: String,
        /// The name the API server dials.
        dns_name: String,
        /// What is wrong.
        fault: String,
    },
    /// Nothing is served.
    #[error("there is no serving certificate yet")]
    NoLeaf,
}

pub(super) fn verifies(
    configuration: &str,
    entries: Option<&[Entry]>,
    chain: &[Vec<u8>],
    dns_name: &str,
    now: Timestamp,
) -> Result<(), Mismatch> {
    let entries = entries.ok_or_else(|| Mismatch::Absent(configuration.to_owned()))?;
    if entries.is_empty() {
        return Err(Mismatch::Empty(configuration.to_owned()));
    }
    let (leaf, rest) = chain.split_first().ok_or(Mismatch::NoLeaf)?;
    for entry in entries {
        let verdict = verify(&entry.ca_bundle, leaf, rest, dns_name, now);
        verdict.map_err(|fault| Mismatch::Refused {
            entry: entry.name.clone(),
            dns_name: dns_name.to_owned(),
            fault,
        })?;
    }
    Ok(())
}

/// Verifies as a TLS client does that dials `dns_name` and trusts `bundle` alone.
fn verify(
    bundle: &[u8],
    leaf: &[u8],
    rest: &[Vec<u8>],
    dns_name: &str,
    now: Timestamp,
) -> Result<(), String> {
    let words = |error: webpki::Error| error.to_string();
    let bundle = Bundle::parse_pem(bundle).map_err(|error| format!("it {error}"))?;
    let roots: Vec<CertificateDer<'_>> = bundle.certificates().map(CertificateDer::from).collect();
    let anchors: Vec<_> = roots
        .iter()
        .filter_map(|root| webpki::anchor_from_trusted_cert(root).ok())
        .collect();
    let name = ServerName::try_from(dns_name).map_err(|error| error.to_string())?;
    let seconds = u64::try_from(now.as_second()).unwrap_or_default();
    let time = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
    let intermediates: Vec<_> = rest
        .iter()
        .map(|der| CertificateDer::from(der.as_slice()))
        .collect();
    let leaf = CertificateDer::from(leaf);
    let leaf = EndEntityCert::try_from(&leaf).map_err(words)?;
    leaf.verify_for_usage(
        webpki::ALL_VERIFICATION_ALGS,
        &anchors,
        &intermediates,
        time,
        KeyUsage::server_auth(),
        None,
        None,
    )
    .map_err(words)?;
    leaf.verify_is_valid_for_subject_name(&name).map_err(words)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn managers(json: serde_json::Value) -> Vec<ManagedFieldsEntry> {
        serde_json::from_value(json).expect("managedFields")
    }

    #[test]
    fn the_api_servers_records_say_who_wrote_the_bundle() {
        const NAME: &str = "a.injector.malha.io";
        let entry = r#"k:{"name":"a.injector.malha.io"}"#;
        let others = json!({"manager": "kubectl", "operation": "Update", "fieldsType": "FieldsV1",
            "fieldsV1": {"f:webhooks": {entry: {"f:clientConfig": {"f:caBundle": {}}}}}});
        let ours = json!({"manager": FIELD_MANAGER, "operation": "Apply", "fieldsType": "FieldsV1",
            "fieldsV1": {"f:webhooks": {entry: {"f:clientConfig": {"f:caBundle": {}}, "f:name": {}}}}});
        let was_ours = json!({"manager": FIELD_MANAGER, "operation": "Apply", "fieldsType": "FieldsV1",
            "fieldsV1": {"f:webhooks": {entry: {"f:name": {}}}}});
        for (json, want) in [
            (json!([]), Record::Fresh),
            (json!([others]), Record::Fresh),
            (json!([others, ours]), Record::Ours),
            (json!([others, was_ours]), Record::Overwritten),
            (json!([was_ours, ours]), Record::Ours),
            (json!([{"manager": FIELD_MANAGER}]), Record::Fresh),
            (
                json!([{"manager": FIELD_MANAGER, "fieldsV1": "odd"}]),
                Record::Fresh,
            ),
            (
                json!([{"manager": FIELD_MANAGER, "fieldsV1": {"f:webhooks": [entry]}}]),
                Record::Fresh,
            ),
        ] {
            assert_eq!(record(NAME, &managers(json.clone())), want, "{json}");
        }
        assert_eq!(
            record("b", &managers(json!([ours]))),
            Record::Fresh,
            "another entry"
        );
    }

    #[test]
    fn nothing_that_stands_in_a_bundle_makes_verification_panic() {
        let now = Timestamp::UNIX_EPOCH;
        let der = vec![vec![0x30, 0x82, 0xff, 0xff], vec![]];
        for bundle in [
            "",
            "garbage",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ] {
            let entries = [Entry {
                name: "a".to_owned(),
                ca_bundle: bundle.into(),
                record: Record::Fresh,
            }];
            for name in ["malha.malha-system.svc", "", "not a name", "127.0.0.1"] {
                assert!(verifies("c", Some(&entries), &der, name, now).is_err());
                assert!(verifies("c", Some(&entries), &[], name, now).is_err());
            }
        }
        assert_eq!(
            verifies("c", None, &der, "a", now),
            Err(Mismatch::Absent("c".to_owned()))
        );
        assert_eq!(
            verifies("c", Some(&[]), &der, "a", now),
            Err(Mismatch::Empty("c".to_owned()))
        );
    }
}

//! What the pod's identity tells about itself.

use std::sync::atomic::AtomicI64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::{sds::SecretName, trust::Voice};
use crate::ca::Validity;

/// The `malha_agent_*` gauges and counters of certificates and secrets.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    requests: Family<ResultLabel, Counter>,
    expiration: Gauge<i64, AtomicI64>,
    renewal: Gauge<i64, AtomicI64>,
    secrets: Family<SecretLabel, Counter>,
    unknown: Counter,
    bundles: Family<BundleLabel, Counter>,
    connected: Gauge<i64, AtomicI64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SecretLabel {
    secret: &'static str,
    event: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BundleLabel {
    source: String,
    result: &'static str,
}

impl Metrics {
    /// Puts them into a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "malha_agent_renewals",
            "Tries to get a certificate, by result",
            self.requests.clone(),
        );
        registry.register(
            "malha_agent_certificate_expiration_timestamp_seconds",
            "When the pod's certificate ends",
            self.expiration.clone(),
        );
        registry.register(
            "malha_agent_certificate_renewal_timestamp_seconds",
            "When the next certificate is asked for",
            self.renewal.clone(),
        );
        registry.register(
            "malha_agent_sds_secrets",
            "Secrets that were sent to Envoy, and what it said to them",
            self.secrets.clone(),
        );
        registry.register(
            "malha_agent_sds_unknown_secrets",
            "Requests of Envoy's for secrets that are not served",
            self.unknown.clone(),
        );
        registry.register(
            "malha_agent_trust_bundles",
            "Trust bundles that were told, by source and by what became of them",
            self.bundles.clone(),
        );
        registry.register(
            "malha_agent_control_plane_connected",
            "1 while the control plane's push can be heard",
            self.connected.clone(),
        );
    }

    /// Secrets that Envoy refused since the start.
    pub fn refusals(&self) -> u64 {
        SecretName::ALL
            .iter()
            .map(|name| self.event(*name, "refused").get())
            .sum()
    }

    /// Certificates that were received since the start.
    pub fn certificates(&self) -> u64 {
        let received = ResultLabel { result: "received" };
        self.requests.get_or_create(&received).get()
    }

    /// Tries that gave no certificate since the start, by the label of their fault.
    pub fn failures(&self, result: &'static str) -> u64 {
        self.requests.get_or_create(&ResultLabel { result }).get()
    }

    pub(super) fn requested(&self, result: &'static str) {
        self.requests.get_or_create(&ResultLabel { result }).inc();
    }

    pub(super) fn received(&self, validity: Validity, renewal: Option<jiff::Timestamp>) {
        self.requested("received");
        self.expiration.set(validity.not_after.as_second());
        self.renewal
            .set(renewal.map_or(0, jiff::Timestamp::as_second));
    }

    pub(super) fn sent(&self, name: SecretName) {
        self.event(name, "sent").inc();
    }

    pub(super) fn acknowledged(&self, name: SecretName) {
        self.event(name, "acknowledged").inc();
    }

    pub(super) fn refused(&self, name: SecretName) {
        self.event(name, "refused").inc();
    }

    pub(super) fn unknown(&self) {
        self.unknown.inc();
    }

    pub(super) fn bundle(&self, voice: Voice, result: &'static str) {
        let label = BundleLabel {
            source: voice.to_string(),
            result,
        };
        self.bundles.get_or_create(&label).inc();
    }

    pub(super) fn connected(&self, connected: bool) {
        self.connected.set(i64::from(connected));
    }

    fn event(
        &self,
        name: SecretName,
        event: &'static str,
    ) -> impl std::ops::Deref<Target = Counter> + '_ {
        self.secrets.get_or_create(&SecretLabel {
            secret: name.as_str(),
            event,
        })
    }
}

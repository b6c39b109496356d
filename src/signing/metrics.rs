//! What is counted about signing.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::caller::Method;

/// The signing service's metrics. Clones count together.
#[derive(Clone, Debug)]
pub struct Metrics {
    csr: Family<CsrLabels, Counter>,
    tokens: Family<TokenLabels, Counter>,
    surplus: Counter,
    entries: Gauge,
    duration: Histogram,
}

/// Both are words of closed sets: nothing of a request ever becomes a label.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CsrLabels {
    result: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TokenLabels {
    method: &'static str,
    result: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            csr: Family::default(),
            tokens: Family::default(),
            surplus: Counter::default(),
            entries: Gauge::default(),
            // an offline check and a signature take 0.2 ms; a TokenReview's patience ends at 10 s
            duration: Histogram::new([
                0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0,
                2.5, 5.0, 10.0,
            ]),
        }
    }
}

impl Metrics {
    /// Makes them part of what `/metrics` shows.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "malha_ca_csr",
            "Requests for a certificate by result and reason",
            self.csr.clone(),
        );
        registry.register(
            "malha_ca_token_validation",
            "Tokens checked, by how and with what result",
            self.tokens.clone(),
        );
        registry.register(
            "malha_ca_csr_surplus",
            "CSRs that asked for names or usages beyond the caller's identity; what they asked for was ignored",
            self.surplus.clone(),
        );
        registry.register(
            "malha_ca_queue_entries",
            "Requests for a certificate under way",
            self.entries.clone(),
        );
        registry.register(
            "malha_ca_issue_duration_seconds",
            "From the credential to the signed certificate",
            self.duration.clone(),
        );
    }

    pub(super) fn csr(&self, result: &'static str, reason: &'static str) {
        self.csr.get_or_create(&CsrLabels { result, reason }).inc();
    }

    pub(super) fn issued(&self, reason: &'static str, took: Duration) {
        self.csr("issued", reason);
        self.duration.observe(took.as_secs_f64());
    }

    pub(super) fn token(&self, method: Method, result: &'static str) {
        self.tokens
            .get_or_create(&TokenLabels {
                method: method.as_str(),
                result,
            })
            .inc();
    }

    pub(super) fn surplus(&self) {
        self.surplus.inc();
    }

    pub(super) fn enter(&self) -> Entered {
        self.entries.inc();
        Entered(self.entries.clone())
    }
}

/// A request under way, until this is dropped.
pub(super) struct Entered(Gauge);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.dec();
    }
}

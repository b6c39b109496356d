//! What is counted about configuration that is sent.

use std::{sync::atomic::AtomicU64, time::Duration};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::xds::Kind;

/// The metrics of configuration that is sent. Clones count together.
#[derive(Clone, Debug)]
pub struct Metrics {
    clients: Gauge,
    refused: Family<Why, Counter>,
    pushes: Family<Type, Histogram>,
    convergence: Family<Type, Histogram>,
    sent_bytes: Family<Type, Counter<u64, AtomicU64>>,
    sent_resources: Family<Type, Counter>,
    nacks: Family<Type, Counter>,
    late: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Type {
    r#type: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Why {
    reason: &'static str,
}

/// From a write that costs microseconds to a proxy that is out of reach.
const SECONDS: [f64; 15] = [
    0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];

fn histogram() -> Histogram {
    Histogram::new(SECONDS)
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            clients: Gauge::default(),
            refused: Family::default(),
            pushes: Family::new_with_constructor(histogram),
            convergence: Family::new_with_constructor(histogram),
            sent_bytes: Family::default(),
            sent_resources: Family::default(),
            nacks: Family::default(),
            late: Gauge::default(),
        };
        for kind in Kind::ALL {
            // an alert on an increase needs a zero to increase from
            let _ = metrics.nacks.get_or_create(&of(kind));
            let _ = metrics.sent_bytes.get_or_create(&of(kind));
        }
        metrics
    }
}

impl Metrics {
    /// Makes them part of what `/metrics` shows.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "malha_xds_clients",
            "Streams of proxies and agents that are open",
            self.clients.clone(),
        );
        registry.register(
            "malha_xds_late_clients",
            "Streams that have owed an answer for longer than 30 s",
            self.late.clone(),
        );
        registry.register(
            "malha_xds_streams_refused",
            "Streams that were refused or ended by us, by reason",
            self.refused.clone(),
        );
        registry.register(
            "malha_xds_push_duration_seconds",
            "From a change to its sending",
            self.pushes.clone(),
        );
        registry.register(
            "malha_xds_convergence_seconds",
            "From a change until a proxy acknowledged that it is in effect",
            self.convergence.clone(),
        );
        registry.register(
            "malha_xds_sent_bytes",
            "Bytes of responses, before TLS",
            self.sent_bytes.clone(),
        );
        registry.register(
            "malha_xds_sent_resources",
            "Resources and removals in responses",
            self.sent_resources.clone(),
        );
        registry.register(
            "malha_xds_nacks",
            "Responses that a proxy refused",
            self.nacks.clone(),
        );
    }

    pub(super) fn enter(&self) -> Entered {
        self.clients.inc();
        Entered(self.clients.clone())
    }

    pub(super) fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Why { reason }).inc();
    }

    pub(super) fn pushed(
        &self,
        kind: Kind,
        took: Option<Duration>,
        bytes: usize,
        resources: usize,
    ) {
        let of = of(kind);
        if let Some(took) = took {
            self.pushes.get_or_create(&of).observe(took.as_secs_f64());
        }
        self.sent_bytes.get_or_create(&of).inc_by(bytes as u64);
        self.sent_resources
            .get_or_create(&of)
            .inc_by(resources as u64);
    }

    pub(super) fn converged(&self, kind: Kind, took: Duration) {
        let convergence = self.convergence.get_or_create(&of(kind));
        convergence.observe(took.as_secs_f64());
    }

    pub(super) fn nacked(&self, kind: Kind) {
        self.nacks.get_or_create(&of(kind)).inc();
    }

    pub(super) fn late(&self) -> Entered {
        self.late.inc();
        Entered(self.late.clone())
    }
}

fn of(kind: Kind) -> Type {
    Type {
        r#type: kind.label(),
    }
}

/// Counted until this is dropped.
#[derive(Debug)]
pub(super) struct Entered(Gauge);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.dec();
    }
}

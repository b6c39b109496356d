//! What the webhook counts: exactly one reason a request.

use std::array;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::inject::Reason;

/// Counters of the webhook. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    requests: Family<Decision, Counter>,
    /// The same counters, where a decision finds its own without a lock: by reason, then by dry run.
    by_reason: Arc<[[Counter; 2]; REASONS]>,
    duration: Histogram,
    bytes: Histogram,
    in_flight: Gauge<i64, AtomicI64>,
}

const REASONS: usize = Reason::ALL.len();

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Decision {
    result: &'static str,
    reason: &'static str,
    dry_run: &'static str,
}

impl Default for Metrics {
    /// Every series begins at zero, so that the first increment is seen as one.
    fn default() -> Self {
        let requests = Family::<Decision, Counter>::default();
        let by_reason = array::from_fn(|place| {
            let reason = Reason::ALL[place];
            ["false", "true"].map(|dry_run| {
                requests.get_or_create_owned(&Decision {
                    result: result(reason),
                    reason: reason.as_str(),
                    dry_run,
                })
            })
        });
        Self {
            requests,
            by_reason: Arc::new(by_reason),
            duration: Histogram::new(SECONDS),
            bytes: Histogram::new(BYTES),
            in_flight: Gauge::default(),
        }
    }
}

const SECONDS: [f64; 15] = [
    0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// From an ordinary pod to the largest that is read.
const BYTES: [f64; 8] = [
    2048.0,
    4096.0,
    8192.0,
    16384.0,
    65536.0,
    262_144.0,
    1_048_576.0,
    6_291_456.0,
];

impl Metrics {
    /// Adds them to `registry`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "malha_injector_admission_requests",
            "Admission requests by what became of them",
            self.requests.clone(),
        );
        registry.register(
            "malha_injector_admission_duration_seconds",
            "From a request's head to its answer",
            self.duration.clone(),
        );
        registry.register(
            "malha_injector_request_bytes",
            "Size of a request's body",
            self.bytes.clone(),
        );
        registry.register(
            "malha_injector_inflight",
            "Requests that are being read or answered",
            self.in_flight.clone(),
        );
    }

    /// How often `reason` was the answer so far.
    pub fn count(&self, reason: Reason) -> u64 {
        self.counters(reason).iter().map(Counter::get).sum()
    }

    /// Notes a request that has come in; the guard notes that it has left.
    pub(super) fn enter(&self) -> InFlight {
        self.in_flight.inc();
        InFlight(self.in_flight.clone())
    }

    pub(super) fn received(&self, bytes: usize) {
        self.bytes.observe(bytes as f64);
    }

    pub(super) fn decided(&self, reason: Reason, dry_run: bool, took: Duration) {
        self.counters(reason)[usize::from(dry_run)].inc();
        self.duration.observe(took.as_secs_f64());
    }

    fn counters(&self, reason: Reason) -> &[Counter; 2] {
        &self.by_reason[reason as usize]
    }
}

/// A request in flight; also one that its peer abandoned leaves.
#[derive(Debug)]
pub(super) struct InFlight(Gauge<i64, AtomicI64>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The four results that sum the reasons up.
fn result(reason: Reason) -> &'static str {
    match reason {
        Reason::Injected | Reason::Reinvoked => "injected",
        Reason::AlreadyInjected
        | Reason::ProtectedNamespace
        | Reason::HostNetwork
        | Reason::MirrorPod
        | Reason::NamespaceDisabled
        | Reason::OptedOutByLabel
        | Reason::OptedOutByAnnotation
        | Reason::OtherRevision
        | Reason::NotSelected
        | Reason::WindowsPod
        | Reason::ForeignSidecar
        | Reason::InvalidPod
        | Reason::NotAPodCreate => "skipped",
        Reason::InvalidInjectValue
        | Reason::InvalidAnnotation
        | Reason::UnsupportedAnnotation
        | Reason::NameConflict
        | Reason::AppUsesProxyGid
        | Reason::PortConflict => "denied",
        Reason::BadRequest | Reason::Overloaded | Reason::Internal => "error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_counter() {
        let metrics = Metrics::default();
        for (times, reason) in Reason::ALL.iter().enumerate() {
            for _ in 0..times {
                metrics.decided(*reason, times % 2 == 0, Duration::ZERO);
            }
        }
        for (times, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(metrics.count(*reason), times as u64, "{reason}");
        }
    }
}

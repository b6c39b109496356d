//! The sidecar's metrics: Envoy's, the application's and the agent's own, in one exposition.
//!
//! Envoy -> names of ours become Istio's -> one text <- the application, if it wants to be scraped <- the agent

pub mod merge;
mod scrape;

use std::sync::atomic::AtomicI64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

pub(super) use scrape::exposition;

/// The agent's own figures.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    envoy_restarts: Counter,
    task_restarts: Counter,
    xds_connected: Gauge<i64, AtomicI64>,
    scrape_failures: Family<SourceLabel, Counter>,
    dropped_lines: Family<SourceLabel, Counter>,
}

/// Whose metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabel {
    source: &'static str,
}

/// Label of what Envoy says.
const ENVOY: &str = "envoy";
/// Label of what the application says.
const APPLICATION: &str = "application";

impl Metrics {
    /// Puts them into a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "malha_agent_envoy_restarts",
            "Envoys that ended although nobody asked them to",
            self.envoy_restarts.clone(),
        );
        registry.register(
            "malha_agent_task_restarts",
            "Parts of the agent that ended although nobody asked them to",
            self.task_restarts.clone(),
        );
        registry.register(
            "malha_agent_xds_connected",
            "1 while Envoy hears the control plane, as of this scrape",
            self.xds_connected.clone(),
        );
        registry.register(
            "malha_agent_scrape_failures",
            "Scrapes that a source did not answer whole",
            self.scrape_failures.clone(),
        );
        registry.register(
            "malha_agent_scrape_dropped_lines",
            "Lines of a source that are no metrics, or whose name another source has",
            self.dropped_lines.clone(),
        );
        // There from the start, so that the first failure is an increase.
        for source in [ENVOY, APPLICATION] {
            let label = SourceLabel { source };
            drop(self.scrape_failures.get_or_create(&label));
            drop(self.dropped_lines.get_or_create(&label));
        }
    }

    pub(super) fn envoy_restarted(&self) {
        self.envoy_restarts.inc();
    }

    pub(super) fn task_restarted(&self) {
        self.task_restarts.inc();
    }

    fn connected(&self, connected: bool) {
        self.xds_connected.set(i64::from(connected));
    }

    fn scrape_failed(&self, source: &'static str) {
        self.scrape_failures
            .get_or_create(&SourceLabel { source })
            .inc();
    }

    fn dropped(&self, source: &'static str, lines: u64) {
        self.dropped_lines
            .get_or_create(&SourceLabel { source })
            .inc_by(lines);
    }
}

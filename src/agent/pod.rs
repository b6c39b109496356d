//! What the agent's servers share.

use std::{net::IpAddr, time::Duration};

use prometheus_client::{encoding::text, registry::Registry};
use tokio::{sync::Mutex, sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{admin::Admin, envoy::Life, metrics::Metrics, settings::Settings};

/// One pod, as its agent sees it.
#[derive(Debug)]
pub struct Pod {
    /// What the environment said.
    pub settings: Settings,
    /// Envoy's admin interface.
    pub admin: Admin,
    /// Whether Envoy runs.
    pub life: watch::Receiver<Life>,
    /// Cancelled when the pod begins to end.
    pub draining: CancellationToken,
    /// The agent's own figures.
    pub metrics: Metrics,
    registry: Registry,
    /// The last answer about readiness, and when it was given.
    readiness: Mutex<Option<(Instant, Readiness)>>,
}

/// Whether traffic may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Envoy holds its certificate, and all clusters and listeners that it was told of.
    Ready,
    /// The pod ends.
    Draining,
    /// Envoy has not been started, or died.
    Absent,
    /// Envoy waits for certificate, clusters or listeners.
    Warming,
}

/// Envoy's main thread is asked at most four times a second, whoever asks us how often.
const FRESH: Duration = Duration::from_millis(250);

impl Pod {
    /// A pod whose Envoy is told of by `life`; `registry` holds metrics of others, and gets the agent's own.
    pub fn new(
        settings: Settings,
        life: watch::Receiver<Life>,
        draining: CancellationToken,
        metrics: Metrics,
        registry: Registry,
    ) -> Self {
        Self {
            admin: Admin::new(&settings.admin_socket()),
            settings,
            life,
            draining,
            metrics,
            registry,
            readiness: Mutex::default(),
        }
    }

    /// Where the kubelet reaches the application.
    pub fn ip(&self) -> IpAddr {
        self.settings.primary_ip()
    }

    /// Whether traffic may come.
    pub async fn readiness(&self) -> Readiness {
        if self.draining.is_cancelled() {
            return Readiness::Draining;
        }
        let mut last = self.readiness.lock().await;
        if let Some((at, readiness)) = *last
            && at.elapsed() < FRESH
        {
            return readiness;
        }
        let readiness = self.ask_envoy().await;
        *last = Some((Instant::now(), readiness));
        readiness
    }

    async fn ask_envoy(&self) -> Readiness {
        if *self.life.borrow() == Life::Absent {
            return Readiness::Absent;
        }
        match self.admin.is_ready().await {
            Ok(true) => Readiness::Ready,
            Ok(false) => Readiness::Warming,
            Err(error) => {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "Envoy is not ready"
                );
                Readiness::Warming
            }
        }
    }

    /// The agent's own metrics, as OpenMetrics.
    pub fn own_metrics(&self) -> String {
        let mut out = String::new();
        text::encode(&mut out, &self.registry).expect("a string takes everything");
        out
    }
}

impl Readiness {
    /// What whoever asked is told.
    pub fn text(self) -> &'static str {
        match self {
            Self::Ready => "ready\n",
            Self::Draining => "the pod is ending\n",
            Self::Absent => "Envoy does not run\n",
            Self::Warming => {
                "Envoy waits for its certificate or its first configuration; is the control plane reachable?\n"
            }
        }
    }
}

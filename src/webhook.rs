//! AdmissionReview over HTTP: decodes and bounds, asks [`inject`](crate::inject), answers.
//!
//! `POST /inject/...` -> bounded body -> review -> `Injector::inject` -> answer, one log line, one count

mod metrics;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::Router;

use crate::inject::{ClusterFacts, Injector};

pub use metrics::Metrics;

/// What the webhook works with. It holds no client of the cluster and needs none: nothing is read on the way.
#[derive(Clone)]
pub struct Webhook {
    /// What decides; exchanged when the operator's settings change.
    pub injector: Arc<ArcSwap<Injector>>,
    /// What was learned of the cluster beforehand.
    pub cluster: Arc<dyn ClusterFacts>,
    /// What is counted.
    pub metrics: Metrics,
    /// What a request may take.
    pub limits: Limits,
}

/// What a request may take.
#[derive(Clone, Debug)]
pub struct Limits {
    /// One request's body, in bytes.
    pub body_bytes: usize,
    /// All bodies that are being read or answered, in bytes.
    pub in_flight_bytes: usize,
    /// From a request's head to the end of its body.
    pub body: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 6 << 20,
            in_flight_bytes: 64 << 20,
            body: Duration::from_secs(15),
        }
    }
}

/// The webhook's routes: `/inject/ns`, `/inject/pod`, `/inject/rev/<revision>/ns`, `/inject/rev/<revision>/pod` and
/// `/advise`, all of them `POST`.
pub fn router(_webhook: Webhook) -> Router {
    Router::new()
}

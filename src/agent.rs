//! The pod's side of the mesh: what `malha-agent` does as PID 1 of the sidecar.
//!
//! ```text
//! environment -> settings  -> bootstrap.json -> Envoy, watched and started again
//! kubelet     -> 15021 ready? 15020 probes   -> the application, dialled as the kubelet would
//! Prometheus  -> 15020 metrics               -> Envoy's, the application's and the agent's own
//! SIGTERM     -> drain                       -> exit 0
//! ```
//!
//! [`run`] joins the parts, as `cli` does for the control plane.

pub mod admin;
pub mod bootstrap;
pub mod children;
mod client;
pub mod drain;
pub mod dump;
pub mod envoy;
pub mod identity;
pub mod log;
pub mod metrics;
pub mod pod;
pub mod probes;
pub mod run;
pub mod serve;
pub mod settings;
pub mod wait;

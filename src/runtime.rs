//! The process: owned tasks, shutdown, readiness, the admin port, telemetry, the real clock, the memory it may use.
//!
//! signals -> [`shutdown::Shutdown`] -> everyone's `CancellationToken`; [`tasks::Tasks`] -> who ended first;
//! [`readiness::Readiness`] + metrics -> [`admin::router`]

pub mod admin;
pub mod clock;
pub mod hardening;
pub mod memory;
pub mod metrics;
pub mod readiness;
pub mod shutdown;
pub mod tasks;
pub mod telemetry;

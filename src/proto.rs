//! The messages and services that are spoken with programs of others: `proto/*.proto`, turned into Rust by
//! `make proto`. Envoy's own come from the crate `envoy-types`.
//!
//! Data alone: `signing` and the agent bring the sockets.

/// Package `istio.v1.auth`: a CSR becomes a certificate.
#[rustfmt::skip]
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, reason = "generated")]
pub mod istio_ca;
/// The SPIFFE Workload API: a workload asks who it is.
#[rustfmt::skip]
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, reason = "generated")]
pub mod workload;

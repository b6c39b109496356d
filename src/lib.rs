//! Malha: a service-mesh control plane. An HTTPS admission webhook gives labelled pods a proxy sidecar, and an
//! embedded certificate authority signs the SPIFFE identities those sidecars speak with.
//!
//! ```text
//! AdmissionReview -> webhook -> inject -> JSON Patch
//! CSR + token     -> signing -> ca     -> certificate chain
//! Services, endpoints, pods, policies -> mesh -> xds -> ads -> each pod's Envoy
//! token, new key  -> agent::identity -> Envoy's SDS, the SPIFFE Workload API
//! capture settings -> redirect -> netlink -> rules in the pod's kernel (`malha-init`)
//! tick            -> custody -> ca::rotation::step -> journal (Secret or file) -> everyone who holds an authority
//! ```
//!
//! The order of the `mod` lines is the order of dependency: a room may use rooms above it, never below, and an
//! adapter never another adapter but `tls` (`bin/` and `cli/` join them). `tests/it/rooms.rs` keeps it so.

// -- core: values in, values out; no socket, file, clock, generator or cluster client --
#[cfg(any(feature = "controller", feature = "agent"))]
pub mod clock;
#[cfg(any(feature = "controller", feature = "agent"))]
pub mod identity;
pub mod redirect;
#[cfg(feature = "controller")]
pub mod inject;
#[cfg(any(feature = "controller", feature = "agent"))]
pub mod ca;
#[cfg(feature = "controller")]
pub mod caller;
#[cfg(feature = "controller")]
pub mod mesh;
#[cfg(feature = "controller")]
pub mod xds;
#[cfg(feature = "controller")]
pub mod config;

// -- data: the messages of other programs; adapters and shell may use them --
#[cfg(any(feature = "controller", feature = "agent"))]
pub mod proto;

// -- adapters: each owns one protocol or one outside thing, and calls the core --
#[cfg(any(feature = "controller", feature = "agent"))]
pub mod tls;
#[cfg(feature = "controller")]
pub mod webhook;
#[cfg(feature = "controller")]
pub mod signing;
#[cfg(feature = "controller")]
pub mod ads;
#[cfg(feature = "controller")]
pub mod custody;
#[cfg(feature = "controller")]
pub mod k8s;
#[cfg(target_os = "linux")]
pub mod netlink;
#[cfg(feature = "controller")]
pub mod standalone;
#[cfg(feature = "agent")]
pub mod agent;

// -- shell: the process and its verbs --
#[cfg(feature = "controller")]
pub mod runtime;
#[cfg(feature = "controller")]
pub mod cli;

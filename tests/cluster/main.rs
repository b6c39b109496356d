//! Tests against a real API server, in a binary of their own: `rig` starts it, the other modules each hold a subject.
#![cfg(feature = "controller")]

mod admission;
mod alone;
mod authority;
mod bench_mesh;
mod ca_bundle;
mod check;
mod containers;
mod convergence;
#[path = "../support/delta.rs"]
mod delta;
#[path = "../support/dice.rs"]
mod dice;
#[path = "../support/envoy.rs"]
mod envoy;
mod feed;
mod generated;
#[path = "../support/pods.rs"]
mod generator;
mod installed;
mod journal;
mod lease;
mod lifecycle;
mod load;
mod manifests;
mod mesh;
mod monitoring;
mod node;
mod operator;
mod outage;
mod packaging;
mod plugged;
mod pods;
mod programs_build;
mod rbac;
mod rig;
mod rig_holds;
mod signing;
mod tokens;
mod trust_bundle;
mod world;

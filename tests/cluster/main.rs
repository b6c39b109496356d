//! Tests against a real API server, in a binary of their own: `rig` starts it, the other modules each hold a subject.
#![cfg(feature = "controller")]

mod ca_bundle;
mod journal;
mod lease;
mod manifests;
mod pods;
mod programs_build;
mod rig;
mod rig_holds;
mod signing;
mod tokens;
mod world;

//! Integration tests: one binary, one module a subject.

mod ads;
mod agent;
mod agent_identity;
mod ca;
mod cli;
mod cli_live;
mod dependencies;
#[path = "../support/delta.rs"]
mod delta;
#[path = "../support/dice.rs"]
mod dice;
#[path = "../support/envoy.rs"]
mod envoy;
mod inject_golden;
mod inject_properties;
mod manifests;
#[path = "../support/pods.rs"]
mod pods;
mod pods_are_odd;
mod proto;
mod redirect;
mod robustness;
mod rooms;
mod runtime;
mod signing;
mod standalone;
mod support;
mod webhook;
mod xds;

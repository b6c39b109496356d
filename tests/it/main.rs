//! Integration tests: one binary, one module a subject.

#[path = "../support/dice.rs"]
mod dice;
mod inject_golden;
#[path = "../support/pods.rs"]
mod pods;
mod pods_are_odd;
mod manifests;
mod rooms;
mod runtime;
mod signing;
mod standalone;
mod support;
mod webhook;

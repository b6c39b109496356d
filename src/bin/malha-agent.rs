//! PID 1 of the sidecar: gets the pod's identity, serves it to Envoy, supervises Envoy.

use std::process::ExitCode;

fn main() -> ExitCode {
    eprintln!(
        "malha-agent: this release holds the control plane only; the agent comes with a later one"
    );
    ExitCode::from(70)
}

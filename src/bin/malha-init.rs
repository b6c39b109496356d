//! The init container: installs the redirection of a pod's traffic into its proxy.

use std::process::ExitCode;

fn main() -> ExitCode {
    eprintln!(
        "malha-init: this release holds the control plane only; the redirection comes with a later one"
    );
    ExitCode::from(70)
}

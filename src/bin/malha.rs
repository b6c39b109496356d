//! `malha`: the control plane (`malha serve`) and the operator's verbs.

use std::process::ExitCode;

fn main() -> ExitCode {
    malha::cli::main()
}

//! `malha uninject`: the inverse of `malha inject`.

use super::{
    Exit, Failure, Terminal,
    documents::{Format, InputArgs, render},
    exit::OrExit as _,
};
use crate::inject::workload;

/// Print manifests as they were before their sidecar.
///
/// Takes what `malha inject` printed, or what `kubectl get -o yaml` shows of an injected pod; what carries no sidecar of
/// malha's is printed as it is.
///
/// Exit codes: 0; 65 where the input cannot be read, or a sidecar in it cannot be told from the rest.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    input: InputArgs,
    /// How the result is written.
    #[arg(short, long, value_enum, default_value_t = Format::Yaml)]
    output: Format,
}

pub(super) fn run(args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let mut documents = Vec::new();
    let mut restored = 0;
    for mut document in args.input.read()? {
        let count = workload::uninject(&mut document.value)
            .map_err(|fault| document.fault(fault))
            .or_exit(Exit::BadInput)?;
        restored += count;
        documents.push((document, count > 0));
    }
    if restored == 0 {
        terminal.note("nothing to take back: no pod and no workload in the input carries a sidecar of malha's");
    }
    let text = render(&documents, args.output).or_exit(Exit::Internal)?;
    terminal.result(&text)?;
    Ok(Exit::Done)
}

//! What a process that holds signing keys gives up before it makes the first.

use nix::sys::prctl::set_dumpable;
use nix::sys::resource::{Resource, setrlimit};

/// Neither a core file nor another process of the same user gets at the memory: no dumps, no `ptrace`.
///
/// # Errors
/// What the system said. A process that goes on without is no worse than most; log it.
pub fn harden() -> Result<(), nix::Error> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    set_dumpable(false)
}

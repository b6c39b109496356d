//! Whether this process may change the network of its namespace.

use std::fs;

use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

/// What this process holds of `CAP_NET_ADMIN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// It is in force.
    Held,
    /// It is not there, and why.
    Missing(Why),
}

/// Why a process does not hold the capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The container must not have it at all.
    NotInContainer,
    /// The container may have it, but a process that is not root gets it from the program's file only.
    NotInFile,
}

/// Looks for `CAP_NET_ADMIN` and puts it in force if it is permitted.
///
/// A file capability without its effective bit (`cap_net_admin+p`) is enough, and better than `+ep`: a program with `+ep`
/// cannot even be started where the container lacks the capability, and `--check` must run there.
pub fn net_admin() -> Capability {
    let wanted = CapabilitySet::NET_ADMIN;
    if let Ok(mut sets) = capabilities(None) {
        if sets.effective.contains(wanted) {
            return Capability::Held;
        }
        sets.effective |= wanted;
        if sets.permitted.contains(wanted) && set_capabilities(None, sets).is_ok() {
            return Capability::Held;
        }
    }
    Capability::Missing(
        match bounding().is_none_or(|set| set & wanted.bits() != 0) {
            true => Why::NotInFile,
            false => Why::NotInContainer,
        },
    )
}

/// The capabilities that no program may exceed here; `None` without /proc.
fn bounding() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapBnd:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

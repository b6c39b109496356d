//! Where Envoy is: the script `envoy` beside this file knows, and is the only one who does.
#![allow(
    dead_code,
    reason = "shared by several test programs, none of which uses all of it"
)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `MALHA_ENVOY`, or the pinned one where `make rig` has fetched it.
///
/// # Errors
/// There is none; the text says what to run.
pub(crate) fn find() -> Result<PathBuf, String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/envoy");
    let output = Command::new(&script)
        .arg("--where")
        .output()
        .map_err(|error| format!("cannot run {}: {error}", script.display()))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().into())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}

/// Envoy, or a word on standard error about why this test is skipped; with `CI=true` a test without Envoy fails.
pub(crate) fn find_or_skip() -> Option<PathBuf> {
    let why = match find() {
        Ok(envoy) => return Some(envoy),
        Err(why) => why,
    };
    let in_ci = std::env::var_os("CI").is_some_and(|ci| !ci.is_empty() && ci != "false");
    assert!(!in_ci, "{why}");
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    // Not by `eprintln!`, which the harness swallows when the test passes: a skip that nobody sees looks like a proof.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
    None
}

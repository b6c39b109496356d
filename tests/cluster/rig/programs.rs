//! Where the programs of the cluster are: `programs/build` knows, and is the only one who does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The programs of a cluster without nodes, found and executable.
#[derive(Clone, Debug)]
pub(crate) struct Programs(BTreeMap<String, PathBuf>);

impl Programs {
    /// Finds the programs. Builds nothing: minutes of silent compiling inside a test look like a test that hangs.
    ///
    /// # Errors
    /// One is missing; the text says what to run.
    pub(crate) fn find() -> Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster/programs/build");
        let output = Command::new(&script)
            .args(["--where", "cluster"])
            .output()
            .with_context(|| format!("cannot run {}", script.display()))?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        let lines = String::from_utf8(output.stdout).context("paths of the programs")?;
        let programs = lines
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(name, path)| (name.to_owned(), PathBuf::from(path)));
        Ok(Self(programs.collect()))
    }

    /// The program of this name.
    pub(crate) fn path(&self, name: &str) -> &Path {
        self.0
            .get(name)
            .unwrap_or_else(|| panic!("programs/build does not build {name}"))
    }
}

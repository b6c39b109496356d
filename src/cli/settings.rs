//! The settings of the control plane, for verbs that do its work without it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use super::{Exit, Failure, exit::OrExit as _};
use crate::config::{ConfigError, Layers, Settings, Source};

/// The flag that names the settings file.
#[derive(Debug, clap::Args)]
pub(super) struct SettingsArgs {
    /// Settings file of the control plane (key malha.yaml of ConfigMap malha-config)
    #[arg(long, value_name = "FILE", env = "MALHA_CONFIG")]
    config: Option<PathBuf>,
}

impl SettingsArgs {
    /// Whether a settings file is named.
    pub(super) fn is_given(&self) -> bool {
        self.config.is_some()
    }

    /// What the control plane would run with: these flags, the environment, the file, the defaults.
    pub(super) fn read(&self, flags: BTreeMap<String, String>) -> Result<Settings, Failure> {
        let layers = Layers {
            flags,
            ..Layers::default()
        }
        .with_environment(|name| std::env::var(name).ok());
        parse(&with_file(layers, self.config.as_deref())?)
    }
}

/// Adds the settings file, where one is named.
pub(super) fn with_file(layers: Layers, path: Option<&Path>) -> Result<Layers, Failure> {
    let Some(path) = path else { return Ok(layers) };
    let named = || format!("settings file {}", path.display());
    let text = fs::read_to_string(path)
        .with_context(named)
        .or_exit(Exit::BadInput)?;
    layers
        .with_file(&text)
        .with_context(named)
        .or_exit(Exit::BadInput)
}

/// The settings of all layers.
pub(super) fn parse(layers: &Layers) -> Result<Settings, Failure> {
    Settings::parse(layers).map_err(|error| exit_of(&error).because(error))
}

/// A bad flag or variable is a matter of usage, a bad file one of input.
fn exit_of(error: &ConfigError) -> Exit {
    match error {
        ConfigError::Invalid {
            origin: Source::Flag | Source::Environment,
            ..
        } => Exit::Usage,
        ConfigError::Invalid { .. } | ConfigError::NotYaml(_) | ConfigError::UnknownKey { .. } => {
            Exit::BadInput
        }
        ConfigError::Lives(_) => Exit::Usage,
    }
}

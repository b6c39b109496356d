//! What is injected: the embedded defaults, the operator's document over them, and what the settings say.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::{
    config::Settings,
    inject::{InjectSettings, Injector},
};

/// Where the operator's document is, and what stands above it.
pub(in crate::cli) struct Overrides {
    path: Option<PathBuf>,
    trust_domain: String,
    revision: String,
}

/// How often the document is read again. By content and not by file events: a kubelet swaps a mounted ConfigMap behind a
/// symbolic link, which a watch of the file never sees.
const REREAD: Duration = Duration::from_secs(5);

impl Overrides {
    pub(in crate::cli) fn of(settings: &Settings) -> Self {
        Self {
            path: settings.injector_config.clone(),
            trust_domain: settings.trust_domain.to_string(),
            revision: settings.revision.clone(),
        }
    }

    /// Reads the document, where one is named.
    pub(in crate::cli) fn load(&self) -> anyhow::Result<Injector> {
        self.read().and_then(|text| self.injector(&text))
    }

    /// Reads the document again and again, until `stop`; a bad one is told once and the last good one stays.
    pub(super) async fn keep(self, current: Arc<ArcSwap<Injector>>, stop: CancellationToken) {
        let Some(path) = &self.path else {
            return stop.cancelled().await;
        };
        let mut seen = self.read().unwrap_or_default();
        while timeout(REREAD, stop.cancelled()).await.is_err() {
            let Ok(text) = self.read() else { continue };
            if text == seen {
                continue;
            }
            match self.injector(&text) {
                Ok(injector) => {
                    current.store(Arc::new(injector));
                    tracing::info!(file = %path.display(), "injector settings changed");
                }
                Err(error) => {
                    tracing::error!(
                        error = super::whole(error),
                        "bad injector settings; the last good ones stay"
                    );
                }
            }
            seen = text;
        }
    }

    fn read(&self) -> anyhow::Result<String> {
        let Some(path) = &self.path else {
            return Ok(String::new());
        };
        fs::read_to_string(path)
            .with_context(|| format!("cannot read the injector settings {}", path.display()))
    }

    /// The injector with this text as the document.
    pub(in crate::cli) fn injector(&self, text: &str) -> anyhow::Result<Injector> {
        let mut settings = InjectSettings::merged(text).with_context(|| {
            let path = self.path.as_deref().map(|path| path.display().to_string());
            format!("injector settings {}", path.unwrap_or_default())
        })?;
        settings.trust_domain.clone_from(&self.trust_domain);
        settings.revision.clone_from(&self.revision);
        Ok(Injector::new(settings))
    }
}

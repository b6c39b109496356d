//! The CA's journal in a file.

use std::{fmt::Write, io};

use aws_lc_rs::digest;
use tokio::task::spawn_blocking;

use super::{
    Directory, DirectoryError,
    files::{self, Access},
};
use crate::ca::journal::{HomeError, Journal, JournalHome, Stored};

/// `journal.json` of a directory. Its version is the SHA-256 of its bytes, compared under the lock: two writers that
/// read the same version cannot both replace it.
#[derive(Clone, Debug)]
pub struct FileHome(Directory);

impl FileHome {
    /// The journal of this directory.
    pub fn new(directory: Directory) -> Self {
        Self(directory)
    }

    fn read(&self) -> Result<Option<Stored>, HomeError> {
        let Some(text) = files::read_secret(&self.0.journal()).map_err(|e| self.failed(e))? else {
            return Ok(None);
        };
        let journal = Journal::from_json(&text).map_err(|e| HomeError::Unreadable {
            home: self.name(),
            fault: e.to_string(),
        })?;
        Ok(Some(Stored {
            journal,
            version: version(&text),
        }))
    }

    /// Writes if what is there now is what the writer has `seen`.
    fn write(&self, seen: Option<&str>, journal: &Journal) -> Result<Stored, HomeError> {
        let failed = |e| self.failed(e);
        let held = self.0.lock().map_err(failed)?;
        let present = files::read_secret(&self.0.journal()).map_err(failed)?;
        if present.map(|text| version(&text)).as_deref() != seen {
            return Err(HomeError::Conflict { home: self.name() });
        }
        let text = journal.to_json();
        files::replace(&self.0.journal(), &text, Access::Secret, &held).map_err(failed)?;
        Ok(Stored {
            journal: journal.clone(),
            version: version(&text),
        })
    }

    /// A bundle is written only after a journal was, so one without the other means that the journal is lost. The
    /// bundle is looked for first: while another process makes both, the answer is never wrong.
    fn lost(&self) -> Result<bool, HomeError> {
        let exists = |path: std::path::PathBuf| {
            path.try_exists().map_err(|source| {
                self.failed(DirectoryError::Io {
                    act: "look for",
                    path,
                    source,
                })
            })
        };
        Ok(exists(self.0.bundle())? && !exists(self.0.journal())?)
    }

    fn name(&self) -> String {
        self.0.journal().display().to_string()
    }

    /// A disk that fails or another writer may be waited for; what else is wrong stays so until somebody acts.
    fn failed(&self, error: DirectoryError) -> HomeError {
        let home = self.name();
        match error {
            DirectoryError::Io { .. } | DirectoryError::Locked(_) => HomeError::Unreachable {
                home,
                source: Box::new(error),
            },
            _ => HomeError::Unreadable {
                home,
                fault: error.to_string(),
            },
        }
    }

    /// Waiting for a lock and for the disk, away from the async threads.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, HomeError> + Send + 'static,
    ) -> Result<T, HomeError> {
        let home = self.clone();
        match spawn_blocking(move || work(&home)).await {
            Ok(done) => done,
            Err(e) => Err(HomeError::Unreachable {
                home: self.name(),
                source: Box::new(io::Error::other(e)),
            }),
        }
    }
}

impl JournalHome for FileHome {
    async fn load(&self) -> Result<Option<Stored>, HomeError> {
        self.blocking(Self::read).await
    }

    async fn create(&self, journal: &Journal) -> Result<Stored, HomeError> {
        let journal = journal.clone();
        self.blocking(move |home| home.write(None, &journal)).await
    }

    async fn replace(&self, seen: &str, journal: &Journal) -> Result<Stored, HomeError> {
        let (seen, journal) = (seen.to_owned(), journal.clone());
        self.blocking(move |home| home.write(Some(&seen), &journal))
            .await
    }

    async fn has_earlier_life(&self) -> Result<bool, HomeError> {
        self.blocking(Self::lost).await
    }
}

fn version(text: &[u8]) -> String {
    digest::digest(&digest::SHA256, text)
        .as_ref()
        .iter()
        .fold(String::new(), |mut hex, byte| {
            write!(hex, "{byte:02x}").expect("a String takes everything");
            hex
        })
}

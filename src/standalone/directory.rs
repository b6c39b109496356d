//! The directory: opened once, then handed to whoever keeps something in it.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::watch, task::spawn_blocking, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{
    DirectoryError,
    files::{self, Access, Lock},
};
use crate::ca::{Authority, bundle::Bundle};

/// A directory that only its owner can look into. Clones are the same directory.
#[derive(Clone, Debug)]
pub struct Directory(Arc<PathBuf>);

impl Directory {
    /// Makes it where there is none, and looks whether what is there is safe to use.
    ///
    /// # Errors
    /// In words that say what to do: somebody else's directory, or one whose secrets others could read.
    pub fn open(path: &Path) -> Result<Self, DirectoryError> {
        files::private_directory(path)?;
        // a later change of the working directory must not change what is meant
        let path = path.canonicalize().map_err(files::failed("find", path))?;
        let directory = Self(Arc::new(path));
        directory.clean()?;
        for secret in [directory.journal(), directory.token_key()] {
            files::read_secret(&secret)?;
        }
        Ok(directory)
    }

    /// As [`Self::open`], but makes none: for those who want to see what is there, and may have mistyped its name.
    ///
    /// # Errors
    /// Also [`DirectoryError::Missing`].
    pub fn open_existing(path: &Path) -> Result<Self, DirectoryError> {
        match path.try_exists() {
            Ok(false) => Err(DirectoryError::Missing(path.to_owned())),
            Ok(true) => Self::open(path),
            Err(e) => Err(files::failed("look for", path)(e)),
        }
    }

    /// The absolute path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where the trust bundle is written.
    pub fn bundle(&self) -> PathBuf {
        self.0.join("bundle.pem")
    }

    /// Writes the trust bundle beside the journal, where curl's `--cacert` and `openssl verify` find it. It is also the
    /// proof that there was a journal, should that be lost; so it is written after the journal was.
    ///
    /// # Errors
    /// The system's.
    pub fn write_bundle(&self, bundle: &Bundle) -> Result<(), DirectoryError> {
        let pem = bundle.to_pem();
        // most of the time, and by most of the processes that start together, it was written already
        if fs::read(self.bundle()).is_ok_and(|present| present == pem.as_bytes()) {
            return Ok(());
        }
        files::replace(
            &self.bundle(),
            pem.as_bytes(),
            Access::Public,
            &self.lock()?,
        )
    }

    /// Writes the trust bundle now and whenever it changes, until `stop`. What cannot be written is tried again.
    pub async fn keep_bundle(
        self,
        mut authorities: watch::Receiver<Arc<Authority>>,
        stop: CancellationToken,
    ) {
        const PAUSE: Duration = Duration::from_secs(5);
        let mut written = None;
        loop {
            let bundle = authorities.borrow_and_update().bundle().clone();
            let failed = written.as_ref() != Some(&bundle) && !self.wrote(&bundle).await;
            if !failed {
                written = Some(bundle);
            }
            tokio::select! {
                () = stop.cancelled() => return,
                changed = authorities.changed() => if changed.is_err() {
                    // nobody will publish again; what was written stays
                    return stop.cancelled().await;
                },
                () = sleep(PAUSE), if failed => {}
            }
        }
    }

    async fn wrote(&self, bundle: &Bundle) -> bool {
        let (directory, bundle) = (self.clone(), bundle.clone());
        let outcome = match spawn_blocking(move || directory.write_bundle(&bundle)).await {
            Ok(Ok(())) => return true,
            Ok(Err(e)) => e.to_string(),
            Err(e) => e.to_string(),
        };
        tracing::error!(fault = outcome, "the trust bundle was not written");
        false
    }

    /// Makes this process the one that serves the directory, until the answer is dropped or the process ends.
    ///
    /// # Errors
    /// [`DirectoryError::AlreadyServed`].
    pub fn serve(&self) -> Result<Serving, DirectoryError> {
        match Lock::at_once(&self.0.join("serve.lock"))? {
            Some(lock) => Ok(Serving { _lock: lock }),
            None => Err(DirectoryError::AlreadyServed(self.0.to_path_buf())),
        }
    }

    pub(super) fn journal(&self) -> PathBuf {
        self.0.join("journal.json")
    }

    pub(super) fn token_key(&self) -> PathBuf {
        self.0.join("token-key.pem")
    }

    /// The turn to write. Blocks for as long as another process writes.
    pub(super) fn lock(&self) -> Result<Lock, DirectoryError> {
        Lock::wait(&self.0.join("lock"))
    }

    /// What a process left behind that was killed while it wrote: half a file, perhaps with half a key in it.
    fn clean(&self) -> Result<(), DirectoryError> {
        let _held = self.lock()?;
        for path in [self.journal(), self.token_key(), self.bundle()] {
            files::remove_leftover(&path)?;
        }
        Ok(())
    }
}

/// The right to serve a directory.
#[derive(Debug)]
pub struct Serving {
    _lock: Lock,
}

//! The CA's journal: everything the authority must remember, in one object that changes only by compare-and-swap.

use std::future::Future;

/// The journal (format 1).
#[derive(Clone, PartialEq)]
pub struct Journal {}

impl Journal {
    /// Reads what a home holds and checks that it is a journal that can be worked with.
    ///
    /// # Errors
    /// A format that this version does not know, or a broken invariant. Nothing may be written then.
    pub fn from_json(_text: &[u8]) -> Result<Self, JournalError> {
        unimplemented!()
    }
    /// The JSON text that a home keeps; wiped when dropped, for it holds the keys.
    pub fn to_json(&self) -> zeroize::Zeroizing<Vec<u8>> {
        unimplemented!()
    }
}

/// Why a text is not a journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Written by a newer version.
    #[error("its format is {0}, this version knows format 1")]
    UnknownFormat(u64),
    /// Not what the format says.
    #[error("{0}")]
    Broken(String),
}

/// A journal as its home holds it.
#[derive(Clone)]
pub struct Stored {
    /// What was read back.
    pub journal: Journal,
    /// The home's version: `resourceVersion` of the Secret, or the digest of the file.
    pub version: String,
}

/// Where a journal lives: a Secret (`k8s`) or a file in a directory (`standalone`).
pub trait JournalHome: Send + Sync + 'static {
    /// What is there now; `None` where there is nothing yet.
    fn load(&self) -> impl Future<Output = Result<Option<Stored>, HomeError>> + Send;
    /// Makes it; [`HomeError::Conflict`] where somebody else was first.
    fn create(&self, journal: &Journal) -> impl Future<Output = Result<Stored, HomeError>> + Send;
    /// Replaces exactly the version `seen`; [`HomeError::Conflict`] where it was changed since.
    fn replace(
        &self,
        seen: &str,
        journal: &Journal,
    ) -> impl Future<Output = Result<Stored, HomeError>> + Send;
    /// Whether there is any trace of an earlier life (trust ConfigMap, filled caBundle): then a missing journal is a
    /// loss, and no new root is made.
    fn has_earlier_life(&self) -> impl Future<Output = Result<bool, HomeError>> + Send;
}

/// Why a home could not do it.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// Somebody else was first: read again and recompute.
    #[error("{home} was changed by another writer; reading it again")]
    Conflict {
        /// The Secret or file.
        home: String,
    },
    /// There, but not a journal.
    #[error(
        "{home} holds no readable CA journal ({fault}); restore it from a backup: a new root would lock out every running pod"
    )]
    Unreadable {
        /// The Secret or file.
        home: String,
        /// What is wrong with it.
        fault: String,
    },
    /// Cannot be reached now.
    #[error("{home} cannot be reached")]
    Unreachable {
        /// The Secret or file.
        home: String,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

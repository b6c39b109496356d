//! A mesh without a cluster: everything that must be remembered lives in one directory.
//!
//! ```text
//! DIR/ 0700  journal.json   0600  the CA's journal           -> FileHome (JournalHome)
//!            token-key.pem  0600  what signs callers' tokens -> TokenMaker, LocalTokens (Authenticate)
//!            bundle.pem     0644  the trust bundle, for curl --cacert
//!            lock           0600  held while one of these files is replaced
//!            serve.lock     0600  held by the process that serves
//!            mesh/*.yaml          Services, EndpointSlices, Pods, Namespaces, PeerAuthentications -> proxies
//! ```
//!
//! Any number of processes may share a directory (a server, `malha token`, `malha ca rotate`): a file is replaced as a
//! whole, under the lock, and read without it.

mod directory;
mod files;
mod journal;
pub mod mesh;
mod tokens;

use std::{io, path::PathBuf};

pub use self::{
    directory::{Directory, Serving},
    journal::FileHome,
    tokens::{AUDIENCE, LocalTokens, MAX_TOKEN_LIFE, MintError, TokenMaker},
};

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// Nothing stands there.
    #[error("there is no directory {0}; `malha serve --standalone {0}` makes it")]
    Missing(PathBuf),
    /// Something else stands there.
    #[error("{0} is not a directory; name a new one, and it is made")]
    NotADirectory(PathBuf),
    /// Others can look in.
    #[error(
        "{path} may be entered by others (mode {mode:04o}) and is not empty; it is to hold private keys: run `chmod 700 {path}`, or name a new directory"
    )]
    Open {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Others could read a secret.
    #[error(
        "{path} holds private keys and may be read or changed by others (mode {mode:04o}); if nobody did, run `chmod 600 {path}`, else begin anew in another directory"
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A symbolic link, a pipe or the like.
    #[error("{0} is not a regular file; move it away")]
    NotAFile(PathBuf),
    /// Somebody else's.
    #[error(
        "{path} belongs to the user {owner}, not to the user {user} who runs this; name another directory"
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Its owner's uid.
        owner: u32,
        /// Our effective uid.
        user: u32,
    },
    /// Another server.
    #[error("another process already serves {0}; stop it, or name another directory")]
    AlreadyServed(PathBuf),
    /// Another writer does not finish.
    #[error("another process holds {0} for too long; is one of them stopped?")]
    Locked(PathBuf),
    /// The token key is not one.
    #[error(
        "{path} holds no P-256 private key in PEM ({fault}); remove it, and a new one is made (tokens made so far end with it)"
    )]
    BadTokenKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        fault: String,
    },
    /// The system said no.
    #[error("cannot {act} {path}")]
    Io {
        /// What was tried.
        act: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

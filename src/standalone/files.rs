//! Files that are there as a whole or not at all.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use zeroize::Zeroizing;

use super::DirectoryError;

/// How long to wait for another writer: each holds the lock for a few writes to the disk.
const LOCK_PATIENCE: Duration = Duration::from_secs(20);

/// No file of ours is near this size; a longer one is not ours.
const MAX_FILE: u64 = 64 << 20;

/// Who may read a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Secret,
    Public,
}

impl Access {
    fn mode(self) -> u32 {
        match self {
            Self::Secret => 0o600,
            Self::Public => 0o644,
        }
    }
}

/// Makes the directory, or takes an existing one that nobody else can look into.
pub(super) fn private_directory(path: &Path) -> Result<(), DirectoryError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                DirBuilder::new()
                    .recursive(true)
                    .create(parent)
                    .map_err(failed("make", parent))?;
            }
            return private_directory_below(path);
        }
        Err(e) => return Err(failed("make", path)(e)),
    }
    check_directory(path)
}

/// As [`private_directory`], once the parent stands (and another process may have been faster).
fn private_directory_below(path: &Path) -> Result<(), DirectoryError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => check_directory(path),
        Err(e) => Err(failed("make", path)(e)),
    }
}

fn check_directory(path: &Path) -> Result<(), DirectoryError> {
    let found = fs::metadata(path).map_err(failed("look at", path))?;
    if !found.is_dir() {
        return Err(DirectoryError::NotADirectory(path.to_owned()));
    }
    let user = nix::unistd::Uid::effective();
    if found.uid() != user.as_raw() {
        return Err(DirectoryError::Foreign {
            path: path.to_owned(),
            owner: found.uid(),
            user: user.as_raw(),
        });
    }
    let mode = found.mode() & 0o7777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    // Tightened only while it is empty: `--standalone .` in a home directory must not lock others out of it.
    let empty = fs::read_dir(path)
        .map_err(failed("list", path))?
        .next()
        .is_none();
    if !empty {
        return Err(DirectoryError::Open {
            path: path.to_owned(),
            mode,
        });
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(failed("close", path))
}

/// The bytes of a secret; `None` where there is no such file.
///
/// The file that was opened is the one that is looked at, so nobody can swap it in between.
pub(super) fn read_secret(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, DirectoryError> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK)
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) if e.raw_os_error() == Some(nix::libc::ELOOP) => {
            return Err(DirectoryError::NotAFile(path.to_owned()));
        }
        Err(e) => return Err(failed("open", path)(e)),
    };
    let found = file.metadata().map_err(failed("look at", path))?;
    if !found.is_file() {
        return Err(DirectoryError::NotAFile(path.to_owned()));
    }
    let mode = found.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(DirectoryError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    // room for all of it at once: a buffer that grows leaves copies of a key behind
    let room = usize::try_from(found.len().min(MAX_FILE)).unwrap_or(0) + 1;
    let mut bytes = Zeroizing::new(Vec::with_capacity(room));
    file.take(MAX_FILE)
        .read_to_end(&mut bytes)
        .map_err(failed("read", path))?;
    Ok(Some(bytes))
}

/// Replaces a file as a whole: written beside it, on the disk, then renamed over it. Killed at any point, a reader finds
/// the old content or the new one. The lock must be held, for the name beside it is always the same; what an earlier
/// writer left there when it was killed is thrown away.
pub(super) fn replace(
    path: &Path,
    content: &[u8],
    access: Access,
    _held: &Lock,
) -> Result<(), DirectoryError> {
    let beside = beside(path);
    remove_leftover(path)?;
    let written = write_new(&beside, content, access).and_then(|()| {
        fs::rename(&beside, path).map_err(failed("replace", path))?;
        sync_directory_of(path)
    });
    if written.is_err() {
        // a full disk may take no more, but gives back
        let _ = fs::remove_file(&beside);
    }
    written
}

fn write_new(path: &Path, content: &[u8], access: Access) -> Result<(), DirectoryError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(access.mode())
        .open(path)
        .map_err(failed("make", path))?;
    if access == Access::Public {
        // against a strict umask: others are kept out by the directory
        file.set_permissions(fs::Permissions::from_mode(access.mode()))
            .map_err(failed("open to others", path))?;
    }
    file.write_all(content).map_err(failed("write", path))?;
    file.sync_all().map_err(failed("write", path))
}

/// A rename is on the disk when its directory is.
fn sync_directory_of(path: &Path) -> Result<(), DirectoryError> {
    let directory = path.parent().unwrap_or_else(|| Path::new("."));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(failed("write", directory))
}

/// Throws away what a killed writer left beside `path`. The lock must be held.
pub(super) fn remove_leftover(path: &Path) -> Result<(), DirectoryError> {
    let beside = beside(path);
    match fs::remove_file(&beside) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(failed("remove", &beside)(e)),
    }
}

/// `journal.json` -> `journal.json.new`
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

/// A lock on a file, given back when it is dropped or its process dies, however it dies.
#[derive(Debug)]
pub(super) struct Lock(#[expect(dead_code, reason = "closing it gives the lock back")] File);

impl Lock {
    /// Waits for its turn. Blocks: not for an async thread.
    pub(super) fn wait(path: &Path) -> Result<Self, DirectoryError> {
        let patience = Instant::now() + LOCK_PATIENCE;
        let file = lock_file(path)?;
        let mut pause = Duration::from_millis(1);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self(file)),
                Err(TryLockError::WouldBlock) if Instant::now() < patience => thread::sleep(pause),
                Err(TryLockError::WouldBlock) => {
                    return Err(DirectoryError::Locked(path.to_owned()));
                }
                Err(TryLockError::Error(e)) => return Err(failed("lock", path)(e)),
            }
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// `None` where somebody else has it.
    pub(super) fn at_once(path: &Path) -> Result<Option<Self>, DirectoryError> {
        let file = lock_file(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(failed("lock", path)(e)),
        }
    }
}

/// Never removed: a lock on a file that was unlinked is a lock on nothing.
fn lock_file(path: &Path) -> Result<File, DirectoryError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(path)
        .map_err(failed("open", path))
}

pub(super) fn failed(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DirectoryError {
    let path = path.to_owned();
    move |source| DirectoryError::Io { act, path, source }
}

//! Unix sockets that are never open to more people than they are for.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use tokio::net::UnixListener;

/// Listens on a path; what an earlier process left there goes.
///
/// The socket is made in a directory of the owner's alone and moved to its place when its mode is set: made in its place
/// it would be open, for a moment, to whoever the process' umask lets in.
///
/// # Errors
/// The path, and what the system said.
pub(super) fn bind(path: &Path, mode: u32) -> Result<UnixListener, SocketError> {
    make(path, mode).map_err(|source| SocketError {
        path: path.to_owned(),
        source,
    })
}

fn make(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let directory = path.parent().unwrap_or_else(|| Path::new("."));
    fs::create_dir_all(directory)?;
    let nursery = directory.join(format!(".{}", std::process::id()));
    remove(fs::remove_dir_all(&nursery))?;
    DirBuilder::new().mode(0o700).create(&nursery)?;
    let young = nursery.join("s");
    let listener = UnixListener::bind(&young)?;
    fs::set_permissions(&young, Permissions::from_mode(mode))?;
    remove(fs::remove_file(path))?;
    fs::rename(&young, path)?;
    fs::remove_dir(&nursery)?;
    Ok(listener)
}

fn remove(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Nobody can be served there.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot listen on {path}; its directory must be writable for this user, and the path no longer than about 100 bytes"
)]
pub struct SocketError {
    path: PathBuf,
    source: io::Error,
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn a_socket_is_its_owners_alone_and_takes_the_place_of_an_old_one() {
        let place = tempfile::tempdir().expect("a directory");
        let path = place.path().join("below/sds.sock");
        let old = bind(&path, 0o600).expect("bound");
        drop(old);
        let _new = bind(&path, 0o600).expect("bound again");
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(&path).expect("somebody listens");
        let names = fs::read_dir(path.parent().expect("below")).expect("readable");
        assert_eq!(names.count(), 1, "only the socket is left");
    }

    #[tokio::test]
    async fn a_path_that_cannot_be_is_named() {
        let place = tempfile::tempdir().expect("a directory");
        let file = place.path().join("file");
        fs::write(&file, "").expect("writable");
        let error = bind(&file.join("sds.sock"), 0o600).expect_err("no directory");
        assert!(error.to_string().contains("file/sds.sock"), "{error}");
    }
}

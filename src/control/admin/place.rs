//! The path of the admin socket: nothing else is ever overwritten there, and only the daemon's own socket
//! is removed.

use std::fs::{File, FileType, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mio::net::{UnixListener, UnixStream};

use crate::limits;

/// Why there is no admin socket.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another daemon answers there.
    #[error("another polldisk answers at {}; stop it, or use another --admin path", .0.display())]
    InUse(PathBuf),
    /// Something else is there, which is not replaced.
    #[error(
        "{} is {what}, which polldisk does not replace; remove it, or use another --admin path",
        path.display()
    )]
    Occupied {
        /// The path for the socket.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// No socket can have such a path.
    #[error(
        "{} is too long for a socket, whose path has at most {} bytes; use another --admin path",
        .0.display(),
        limits::SOCKET_PATH_MAX
    )]
    TooLong(PathBuf),
    /// It can't be made.
    #[error(
        "cannot make the admin socket {}; check that its folder can be made and written, or use \
         another --admin path",
        path.display()
    )]
    Failed {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// A socket's path while a daemon listens there.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    /// The device and inode of the socket itself.
    identity: (u64, u64),
}

/// Listens at `path`, only for the socket's owner. Replaces a socket that a dead daemon left.
pub fn listen(path: &Path) -> Result<(UnixListener, Place), BindError> {
    if path.as_os_str().len() > limits::SOCKET_PATH_MAX {
        return Err(BindError::TooLong(path.to_owned()));
    }
    let failed = |source| BindError::Failed { path: path.to_owned(), source };
    let folder = make_folder(path).map_err(failed)?;
    // Without the lock, two daemons that find a dead one's socket might each remove the other's new one.
    let _alone = lock(&folder).map_err(failed)?;
    make_room(path)?;
    bind(path).map_err(failed)
}

/// Returns the folder of a path, and makes it if it is missing.
fn make_folder(path: &Path) -> io::Result<PathBuf> {
    let folder = match path.parent() {
        Some(folder) if folder != "" => folder,
        _ => Path::new("."),
    };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    Ok(folder.to_owned())
}

/// Keeps other daemons from setting up a socket in this folder meanwhile; `None` if the folder can't be
/// read, or if its filesystem has no locks.
fn lock(folder: &Path) -> io::Result<Option<File>> {
    let Ok(file) = File::open(folder) else { return Ok(None) };
    let until = Instant::now() + Duration::from_secs(limits::ADMIN_LOCK_SECONDS);
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::Error(_)) => return Ok(None),
            Err(TryLockError::WouldBlock) if Instant::now() >= until => {
                let busy = format!("another program keeps {} locked", folder.display());
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, busy));
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Removes a socket that nobody listens at; fails for anything else.
fn make_room(path: &Path) -> Result<(), BindError> {
    let failed = |source| BindError::Failed { path: path.to_owned(), source };
    let occupied = |what| BindError::Occupied { path: path.to_owned(), what };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(metadata) => return Err(occupied(name(metadata.file_type()))),
    }
    // This connect never waits. EAGAIN: the backlog is full, so somebody listens but does not accept.
    match UnixStream::connect(path).map_err(|error| error.raw_os_error()) {
        Ok(_) | Err(Some(libc::EAGAIN)) => Err(BindError::InUse(path.to_owned())),
        Err(Some(libc::ECONNREFUSED)) => std::fs::remove_file(path).map_err(failed),
        Err(_) => Err(occupied("a socket of another program")),
    }
}

fn name(kind: FileType) -> &'static str {
    if kind.is_file() {
        "a regular file"
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_symlink() {
        "a symbolic link"
    } else {
        "a device or FIFO"
    }
}

fn bind(path: &Path) -> io::Result<(UnixListener, Place)> {
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    let identity = identity(path)?;
    Ok((listener, Place { path: path.to_owned(), identity }))
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Drop for Place {
    fn drop(&mut self) {
        // Somebody may have removed this socket, and another daemon may have made its own.
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            // If this fails, the next daemon replaces the socket.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod test;

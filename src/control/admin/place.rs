//! The place of the admin socket in the filesystem: taken only where nothing of value is, and given
//! back only while it is still ours.

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
    /// Somebody answers there.
    #[error("another polldisk answers at {}; stop it, or use another --admin path", .0.display())]
    InUse(PathBuf),
    /// Something else is there, and stays.
    #[error(
        "{} is {what}, which polldisk does not replace; remove it, or use another --admin path",
        path.display()
    )]
    Occupied {
        /// The path of the socket to be.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// No socket can have such a path.
    #[error(
        "{} is too long for a socket: it may have {} bytes at most; use another --admin path",
        .0.display(),
        limits::SOCKET_PATH_MAX
    )]
    TooLong(PathBuf),
    /// It can't be made.
    #[error(
        "cannot make the admin socket {}; see that its folder can be made and written, or use \
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

/// Listens at `path`, for its owner only. A socket that a dead daemon left is replaced.
pub fn listen(path: &Path) -> Result<(UnixListener, Place), BindError> {
    if path.as_os_str().len() > limits::SOCKET_PATH_MAX {
        return Err(BindError::TooLong(path.to_owned()));
    }
    let failed = |source| BindError::Failed { path: path.to_owned(), source };
    let folder = make_folder(path).map_err(failed)?;
    // Of two daemons that find a dead one's socket, each would remove the other's in its place.
    let _alone = lock(&folder).map_err(failed)?;
    make_room(path)?;
    bind(path).map_err(failed)
}

/// The folder that a path lies in, made where it is missing.
fn make_folder(path: &Path) -> io::Result<PathBuf> {
    let folder = match path.parent() {
        Some(folder) if folder != "" => folder,
        _ => Path::new("."),
    };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    Ok(folder.to_owned())
}

/// Keeps other daemons from looking for a place in this folder; `None` where the folder can't be read, or
/// its filesystem has no locks.
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

/// Removes a socket that nobody listens at; anything else stays, and is an error.
fn make_room(path: &Path) -> Result<(), BindError> {
    let failed = |source| BindError::Failed { path: path.to_owned(), source };
    let occupied = |what| BindError::Occupied { path: path.to_owned(), what };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(metadata) => return Err(occupied(name(metadata.file_type()))),
    }
    // A connect that never waits. EAGAIN: its backlog is full, so somebody listens though nobody accepts.
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
        // Somebody may have removed ours, and another daemon have come there.
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            // Whoever comes next replaces one that stays behind.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod test;

//! The asking side of the admin socket: one request, one reply, waiting for it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::protocol::{Reply, Request};
use crate::limits;

/// Why a request has no good reply.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Nobody answers at the socket.
    #[error(
        "no polldisk answers at {}; start one with `polldisk serve`, or name its socket",
        path.display()
    )]
    NoDaemon {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The socket is not for this user.
    #[error("no permission to use {}; run as root", path.display())]
    NoPermission {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The daemon went away, or is another version that speaks otherwise.
    #[error("polldisk gave no usable answer; see its log")]
    NoAnswer(#[source] io::Error),
    /// The daemon says no.
    #[error("{0}")]
    Refused(String),
}

/// Asks the daemon at `path` and waits for its reply, which is never [`Reply::Error`].
pub fn request(path: &Path, request: &Request) -> Result<Reply, RequestError> {
    let mut stream = UnixStream::connect(path).map_err(|source| {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::PermissionDenied => RequestError::NoPermission { path, source },
            _ => RequestError::NoDaemon { path, source },
        }
    })?;
    match ask(&mut stream, request).map_err(RequestError::NoAnswer)? {
        Reply::Error { message } => Err(RequestError::Refused(message)),
        reply => Ok(reply),
    }
}

fn ask(stream: &mut UnixStream, request: &Request) -> io::Result<Reply> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    line.clear();
    BufReader::new(stream.take(limits::ADMIN_REPLY_MAX)).read_until(b'\n', &mut line)?;
    Ok(serde_json::from_slice(&line)?)
}

//! The client side of the admin socket: sends one request and waits for the reply.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::protocol::{Reply, Request};
use crate::limits;

/// Why a request failed.
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
    /// This user may not use the socket.
    #[error("no permission to use {}; run as root", path.display())]
    NoPermission {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The request is longer than a daemon accepts.
    #[error("the request is too long; give a target of at most 4096 bytes")]
    TooLong,
    /// The daemon hangs.
    #[error(
        "polldisk at {} has not answered in {} s; see its log",
        .0.display(),
        limits::ADMIN_REPLY_SECONDS
    )]
    Silent(PathBuf),
    /// The daemon went away, or its version has another protocol.
    #[error("polldisk gave no usable answer; see its log")]
    NoAnswer(#[source] io::Error),
    /// The daemon refused the request.
    #[error("{0}")]
    Refused(String),
}

/// Asks the daemon at `path` and waits up to `limits::ADMIN_REPLY_SECONDS` for its reply; [`Reply::Error`]
/// becomes an error.
pub fn request(path: &Path, request: &Request) -> Result<Reply, RequestError> {
    let patience = Duration::from_secs(limits::ADMIN_REPLY_SECONDS);
    let failed = |source: io::Error| {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::PermissionDenied => RequestError::NoPermission { path, source },
            io::ErrorKind::WouldBlock => RequestError::Silent(path),
            _ => RequestError::NoDaemon { path, source },
        }
    };
    let mut line =
        serde_json::to_vec(request).map_err(|error| RequestError::NoAnswer(error.into()))?;
    if line.len() > limits::ADMIN_LINE_MAX {
        return Err(RequestError::TooLong);
    }
    line.push(b'\n');
    let mut stream = connect(path, patience).map_err(failed)?;
    let reply = ask(&mut stream, line).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => RequestError::Silent(path.to_owned()),
        _ => RequestError::NoAnswer(error),
    })?;
    match reply {
        Reply::Error { message } => Err(RequestError::Refused(message)),
        reply => Ok(reply),
    }
}

/// Connects, even to a busy daemon. This and later reads and writes fail with `WouldBlock` after `patience`.
fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let until = Instant::now() + patience;
    loop {
        // Unlike the standard library's `connect`, this one never waits for a daemon that hangs.
        match mio::net::UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error),
            Ok(stream) => {
                let stream = UnixStream::from(stream);
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(patience))?;
                stream.set_write_timeout(Some(patience))?;
                return Ok(stream);
            }
        }
    }
}

fn ask(stream: &mut UnixStream, mut line: Vec<u8>) -> io::Result<Reply> {
    match stream.write_all(&line) {
        // A daemon that refuses the client closes the socket early, but has sent the reason.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
        _ => line.clear(),
    }
    BufReader::new(stream.take(limits::ADMIN_REPLY_MAX)).read_until(b'\n', &mut line)?;
    Ok(serde_json::from_slice(&line)?)
}

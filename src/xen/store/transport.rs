//! The byte stream to xenstored: a unix socket or the kernel's device, both non-blocking, or a stand-in's
//! own.

use std::env;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::xen::PlatformError;

/// Where xenstored is looked for, in this order, unless `XENSTORED_PATH` names the one place.
const PLACES: [&str; 4] =
    ["/run/xenstored/socket", "/var/run/xenstored/socket", "/dev/xen/xenbus", "/proc/xen/xenbus"];

/// One end of a stream of messages, which nothing that is called here waits for.
pub trait Transport: fmt::Debug + AsFd {
    /// Sends one whole message, or several if it [takes](Transport::takes_batches) those.
    fn send(&self, messages: &[u8]) -> io::Result<()>;

    /// Reads what is here; `None` if nothing is. The end of the stream is an error.
    fn receive(&self, space: &mut [u8]) -> io::Result<Option<usize>>;

    /// Whether several messages may be sent at once.
    fn takes_batches(&self) -> bool;

    /// Whether a failed send ends the connection.
    fn is_lost_by_failed_send(&self) -> bool;
}

/// To xenstored, or to the stand-in, in the same kernel.
#[derive(Debug)]
pub(super) struct Socket(UnixStream);

/// `/dev/xen/xenbus`: the kernel's own connection, shared. Each message is one `write`, and is answered
/// before the next.
#[derive(Debug)]
pub(super) struct Device(pub(super) File);

impl Socket {
    /// Takes a connected socket.
    pub(super) fn from_stream(stream: UnixStream) -> io::Result<Socket> {
        stream.set_nonblocking(true)?;
        Ok(Socket(stream))
    }
}

impl Transport for Socket {
    /// Messages fit the socket's buffer. If they do not go in at once, this waits like a blocking
    /// socket.
    fn send(&self, messages: &[u8]) -> io::Result<()> {
        send_to_socket(&self.0, messages)
    }

    fn receive(&self, space: &mut [u8]) -> io::Result<Option<usize>> {
        receive(&self.0, space)
    }

    fn takes_batches(&self) -> bool {
        true
    }

    fn is_lost_by_failed_send(&self) -> bool {
        true
    }
}

impl Transport for Device {
    /// The device takes a message or refuses it, and never says EAGAIN.
    fn send(&self, message: &[u8]) -> io::Result<()> {
        send_to_device(&self.0, message)
    }

    fn receive(&self, space: &mut [u8]) -> io::Result<Option<usize>> {
        receive(&self.0, space)
    }

    fn takes_batches(&self) -> bool {
        false
    }

    /// The kernel answers a watch request that it refuses by failing the write; the device stays usable.
    fn is_lost_by_failed_send(&self) -> bool {
        false
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Opens the first place that answers.
pub(super) fn find() -> Result<Box<dyn Transport>, PlatformError> {
    let places = match env::var_os("XENSTORED_PATH") {
        Some(only) => vec![PathBuf::from(only)],
        None => PLACES.map(PathBuf::from).into(),
    };
    find_among(places)
}

fn find_among(places: Vec<PathBuf>) -> Result<Box<dyn Transport>, PlatformError> {
    let mut failures: Vec<(PathBuf, io::Error)> = Vec::new();
    for place in places {
        match open(&place) {
            Ok(transport) => return Ok(transport),
            Err(error) => failures.push((place, error)),
        }
    }
    Err(unreachable_store(failures))
}

fn open(place: &Path) -> io::Result<Box<dyn Transport>> {
    if fs::metadata(place)?.file_type().is_socket() {
        return Ok(Box::new(Socket::from_stream(UnixStream::connect(place)?)?));
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    Ok(Box::new(Device(options.open(place)?)))
}

fn receive(mut stream: impl Read, space: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        return match stream.read(space) {
            Ok(0) => Err(io::Error::new(ErrorKind::UnexpectedEof, "xenstored closed it")),
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => Err(error),
        };
    }
}

fn send_to_socket(mut stream: &UnixStream, mut rest: &[u8]) -> io::Result<()> {
    while !rest.is_empty() {
        match stream.write(rest) {
            Ok(count) => rest = &rest[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                stream.set_nonblocking(false)?;
                let sent = stream.write_all(rest);
                stream.set_nonblocking(true)?;
                return sent;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn send_to_device(mut device: &File, message: &[u8]) -> io::Result<()> {
    loop {
        return match device.write(message) {
            Ok(count) if count == message.len() => Ok(()),
            Ok(_) => Err(ErrorKind::WriteZero.into()),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => Err(error),
        };
    }
}

fn unreachable_store(failures: Vec<(PathBuf, io::Error)>) -> PlatformError {
    let tried: Vec<String> =
        failures.iter().map(|(place, error)| format!("{}: {error}", place.display())).collect();
    // The error that tells most: a place that exists but can't be used.
    let told = |(_, error): &(PathBuf, io::Error)| error.kind() == ErrorKind::NotFound;
    let source = failures.into_iter().min_by_key(told).map(|(_, error)| error);
    let source = source.unwrap_or_else(|| ErrorKind::NotFound.into());
    let remedy = match source.kind() {
        ErrorKind::PermissionDenied => "run polldisk as root",
        _ => {
            "start xenstored (on most systems with the xencommons or xenstored service); \
             on a host without Xen, `polldisk demo` shows the daemon at work"
        }
    };
    PlatformError {
        what: format!("cannot reach xenstore (tried {})", tried.join(", ")),
        remedy: remedy.to_owned(),
        source,
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_store_that_is_nowhere_is_told_with_each_place_and_the_remedy() {
        let home = tempfile::tempdir().unwrap();
        let missing = home.path().join("missing");
        let stale = home.path().join("stale");
        drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
        let error = find_among(vec![missing.clone(), stale.clone()]).unwrap_err();
        let text = error.to_string();
        for place in [missing, stale] {
            assert!(text.contains(&*place.to_string_lossy()), "{text}");
        }
        assert!(text.contains("xenstored") && text.contains("polldisk demo"), "{text}");
        assert_eq!(error.source.kind(), ErrorKind::ConnectionRefused);
    }

    #[test]
    fn a_place_that_answers_is_taken_after_one_that_does_not() {
        let home = tempfile::tempdir().unwrap();
        let socket = home.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let transport = find_among(vec![home.path().join("missing"), socket]).unwrap();
        assert!(transport.takes_batches(), "a socket");
    }

    #[test]
    fn the_systems_error_of_a_lost_connection_is_passed_on() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let socket = Socket::from_stream(ours).unwrap();
        assert_eq!(socket.receive(&mut [0]).unwrap(), None);
        socket.send(b"a request that nobody reads").unwrap();
        drop(theirs);
        let kinds = [(); 2].map(|()| socket.receive(&mut [0]).unwrap_err().kind());
        assert_eq!(kinds, [ErrorKind::ConnectionReset, ErrorKind::UnexpectedEof]);
    }
}

//! How processes talk to the stand-in's hypervisor.
//!
//! `hypervisor.sock` in the run folder is a `SOCK_SEQPACKET` unix socket. A client sends one
//! request and waits for its reply, each one packet of 32-bit words in host byte order. The first
//! word of a request is the operation, that of a reply an errno (0: done). Descriptors travel
//! beside the words (`SCM_RIGHTS`). The first request of a connection is `Attach` or
//! `CreateDomain`; from then on it acts for that domain. All that a connection holds (mappings,
//! ports, its domain) goes when it closes, whether the process ended it or died.
//!
//! | operation | words | reply | descriptors |
//! |---|---|---|---|
//! | 1 `Attach` | domid | | |
//! | 2 `CreateDomain` | domid, pages | | guest memory |
//! | 3 `Memory` | domid | | guest memory |
//! | 4 `Map` | domid, writable (0, 1), references... | mapping, frames... | |
//! | 5 `Unmap` | mapping | | |
//! | 6 `OpenEvents` | | first port | own mailbox, own bell |
//! | 7 `AllocUnbound` | remote domid | port | |
//! | 8 `BindInterdomain` | remote domid, remote port | port | |
//! | 9 `Peer` | port | link, peer's mailbox number, peer's slot | its mailbox, its bell |
//! | 10 `Unbind` | port | | |
//! | 11 `OpenStore` | | | xenstore connection as this domain |
//! | 12 `Close` | | | |
//!
//! Errors are Xen's: `Map` fails with EINVAL if any reference is bad, and then maps nothing;
//! `BindInterdomain` with EINVAL if the port does not wait for this domain. `Close` answers
//! after everything that the connection held has gone, which closing the socket does not.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Once;

use crate::limits::GRANTS_PER_MAP_BATCH;
use crate::units::{DomId, Port};
use crate::xen::PageAccess;

/// The socket's name in the run folder.
pub const SOCKET_NAME: &str = "hypervisor.sock";

/// Words of the longest packet: a map request with its operation, domid and access.
pub const PACKET_WORDS: usize = GRANTS_PER_MAP_BATCH + 3;

/// Most descriptors beside a packet.
pub const PACKET_FDS: usize = 2;

/// What a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Act for this domain.
    Attach { domid: DomId },
    /// Make a domain, which lives as long as this connection, and act for it.
    CreateDomain { domid: DomId, pages: u32 },
    /// Another domain's memory, to map it and to copy.
    Memory { domid: DomId },
    /// Take grants into use.
    Map { domid: DomId, access: PageAccess, refs: &'a [u32] },
    /// End a mapping.
    Unmap { mapping: u32 },
    /// Make this connection an event channel handle.
    OpenEvents,
    /// A port to which `remote` may bind.
    AllocUnbound { remote: DomId },
    /// Bind to a port that `remote` allocated for us.
    BindInterdomain { remote: DomId, port: Port },
    /// Where to signal the other end of a port.
    Peer { port: Port },
    /// Close a port.
    Unbind { port: Port },
    /// A xenstore connection.
    OpenStore,
    /// Let go of everything.
    Close,
}

impl<'a> Request<'a> {
    /// Writes the request's words.
    pub fn encode(&self, words: &mut Vec<u32>) {
        let domain = |domid: &DomId| u32::from(domid.raw());
        words.clear();
        match self {
            Request::Attach { domid } => words.extend([1, domain(domid)]),
            Request::CreateDomain { domid, pages } => words.extend([2, domain(domid), *pages]),
            Request::Memory { domid } => words.extend([3, domain(domid)]),
            Request::Map { domid, access, refs } => {
                let writable = u32::from(*access == PageAccess::ReadWrite);
                words.extend([4, domain(domid), writable]);
                words.extend_from_slice(refs);
            }
            Request::Unmap { mapping } => words.extend([5, *mapping]),
            Request::OpenEvents => words.push(6),
            Request::AllocUnbound { remote } => words.extend([7, domain(remote)]),
            Request::BindInterdomain { remote, port } => {
                words.extend([8, domain(remote), port.0]);
            }
            Request::Peer { port } => words.extend([9, port.0]),
            Request::Unbind { port } => words.extend([10, port.0]),
            Request::OpenStore => words.push(11),
            Request::Close => words.push(12),
        }
    }

    /// Reads a request; `None` if the words are none.
    pub fn decode(words: &'a [u32]) -> Option<Request<'a>> {
        let domain = |raw: &u32| DomId::try_from(*raw).ok();
        Some(match words {
            [1, domid] => Request::Attach { domid: domain(domid)? },
            [2, domid, pages] => Request::CreateDomain { domid: domain(domid)?, pages: *pages },
            [3, domid] => Request::Memory { domid: domain(domid)? },
            [4, domid, writable @ (0 | 1), refs @ ..] if !refs.is_empty() => {
                let access =
                    if *writable == 1 { PageAccess::ReadWrite } else { PageAccess::ReadOnly };
                Request::Map { domid: domain(domid)?, access, refs }
            }
            [5, mapping] => Request::Unmap { mapping: *mapping },
            [6] => Request::OpenEvents,
            [7, remote] => Request::AllocUnbound { remote: domain(remote)? },
            [8, remote, port] => {
                Request::BindInterdomain { remote: domain(remote)?, port: Port(*port) }
            }
            [9, port] => Request::Peer { port: Port(*port) },
            [10, port] => Request::Unbind { port: Port(*port) },
            [11] => Request::OpenStore,
            [12] => Request::Close,
            _ => return None,
        })
    }
}

/// A packet that arrived.
#[derive(Debug, Default)]
pub struct Packet {
    /// Its words.
    pub words: Vec<u32>,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

/// Connects to the hypervisor of a run folder.
pub fn connect(folder: &Path) -> io::Result<OwnedFd> {
    raise_descriptor_limit();
    let socket = seqpacket_socket()?;
    let (address, len) = socket_address(&folder.join(SOCKET_NAME))?;
    // SAFETY: `address` holds `len` bytes of a socket address.
    check(unsafe { libc::connect(socket.as_raw_fd(), std::ptr::from_ref(&address).cast(), len) })?;
    Ok(socket)
}

/// Makes the socket on which the hypervisor listens, non-blocking.
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    let socket = seqpacket_socket()?;
    let (address, len) = socket_address(path)?;
    // SAFETY: `address` holds `len` bytes of a socket address.
    check(unsafe { libc::bind(socket.as_raw_fd(), std::ptr::from_ref(&address).cast(), len) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::listen(socket.as_raw_fd(), libc::SOMAXCONN) })?;
    set_nonblocking(&socket)?;
    Ok(socket)
}

/// Takes the next client, non-blocking.
pub fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    // SAFETY: the client's address is not asked for.
    let raw = check(unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
        )
    })?;
    // SAFETY: freshly made and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Room for [`PACKET_FDS`] descriptors in a control message.
const CONTROL_BYTES: usize = 64;
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

/// Sends one packet.
pub fn send(socket: &OwnedFd, words: &[u32], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    assert!(fds.len() <= PACKET_FDS);
    let mut control = Control([0; CONTROL_BYTES]);
    let mut data =
        libc::iovec { iov_base: words.as_ptr().cast_mut().cast(), iov_len: size_of_val(words) };
    let mut message = message(&mut data, &mut control);
    message.msg_controllen = 0;
    if !fds.is_empty() {
        let bytes =
            libc::c_uint::try_from(fds.len() * size_of::<RawFd>()).map_err(io::Error::other)?;
        // SAFETY: CMSG_SPACE only computes; the control buffer has room for PACKET_FDS
        // descriptors, so its first header and that header's data lie inside.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(bytes) as usize;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(bytes) as usize;
            let places = libc::CMSG_DATA(header).cast::<RawFd>();
            for (index, fd) in fds.iter().enumerate() {
                places.add(index).write_unaligned(fd.as_raw_fd());
            }
        }
    }
    retry(|| {
        // SAFETY: `message` points to `words` and `control`, which outlive the call.
        unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) }
    })?;
    Ok(())
}

/// Receives one packet; `false` if the other end has closed.
pub fn receive(socket: &OwnedFd, packet: &mut Packet) -> io::Result<bool> {
    packet.words.resize(PACKET_WORDS, 0);
    packet.fds.clear();
    let mut control = Control([0; CONTROL_BYTES]);
    let mut data = libc::iovec {
        iov_base: packet.words.as_mut_ptr().cast(),
        iov_len: PACKET_WORDS * size_of::<u32>(),
    };
    let mut message = message(&mut data, &mut control);
    let len = retry(|| {
        // SAFETY: `message` points to the packet's words and `control`, which outlive the call.
        unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) }
    })?;
    take_fds(&message, &mut packet.fds);
    packet.words.truncate(len / size_of::<u32>());
    if message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(len != 0)
}

fn take_fds(message: &libc::msghdr, fds: &mut Vec<OwnedFd>) {
    // SAFETY: the kernel wrote the control buffer and its length; the macros stay inside it.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                let places = libc::CMSG_DATA(header).cast::<RawFd>();
                for index in 0..bytes / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(places.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
}

/// Lets this process have as many descriptors as it may: a thousand disks in one process need
/// several each. If they run out, an error will show it.
pub fn raise_descriptor_limit() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `limit` is writable and outlives both calls.
        unsafe {
            if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
                limit.rlim_cur = limit.rlim_max;
                libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
            }
        }
    });
}

fn message(data: &mut libc::iovec, control: &mut Control) -> libc::msghdr {
    // SAFETY: a message header of zeroes is an empty one.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = data;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = CONTROL_BYTES;
    message
}

fn seqpacket_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers.
    let raw = check(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
    // SAFETY: freshly made and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn set_nonblocking(socket: &OwnedFd) -> io::Result<()> {
    // SAFETY: no pointers.
    let flags = check(unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_GETFL) })?;
    let flags = flags | libc::O_NONBLOCK;
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETFL, flags) })?;
    Ok(())
}

fn socket_address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    let path = path.as_os_str().as_bytes();
    // SAFETY: an address of zeroes is an unnamed one.
    let mut address: libc::sockaddr_un = unsafe { MaybeUninit::zeroed().assume_init() };
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).map_err(io::Error::other)?;
    if path.len() >= address.sun_path.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("the path of a socket has at most {} bytes", address.sun_path.len() - 1),
        ));
    }
    for (place, byte) in address.sun_path.iter_mut().zip(path) {
        *place = byte.cast_signed();
    }
    let len = libc::socklen_t::try_from(size_of_val(&address)).map_err(io::Error::other)?;
    Ok((address, len))
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(len) => return Ok(len),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_request_survives_the_wire() {
        let domid = DomId::try_from(7).unwrap();
        let port = Port(4097);
        let requests = [
            Request::Attach { domid },
            Request::CreateDomain { domid, pages: 64 },
            Request::Memory { domid },
            Request::Map { domid, access: PageAccess::ReadOnly, refs: &[8, 9] },
            Request::Map { domid, access: PageAccess::ReadWrite, refs: &[u32::MAX] },
            Request::Unmap { mapping: 3 },
            Request::OpenEvents,
            Request::AllocUnbound { remote: domid },
            Request::BindInterdomain { remote: domid, port },
            Request::Peer { port },
            Request::Unbind { port },
            Request::OpenStore,
            Request::Close,
        ];
        for request in requests {
            let mut words = Vec::new();
            request.encode(&mut words);
            assert_eq!(Request::decode(&words), Some(request));
        }
    }

    #[test]
    fn words_that_are_no_request_are_refused() {
        let nonsense: [&[u32]; 7] =
            [&[], &[0], &[13], &[1], &[1, 0x7ff0], &[4, 1, 2, 8], &[4, 1, 0]];
        for words in nonsense {
            assert_eq!(Request::decode(words), None, "{words:?}");
        }
    }
}

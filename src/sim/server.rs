//! The stand-in's hypervisor on a socket: a thread that serves one request after the other, in the
//! protocol of [`super::wire`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::thread::JoinHandle;

use mio::unix::SourceFd;
use mio::{Interest, Poll, Token, Waker};
use slab::Slab;

use super::hypervisor::{Hypervisor, Reply};
use super::wire::{self, Packet, Request};
use crate::units::DomId;

/// Connects to xenstore with the rights of a domain.
pub type ConnectStore = Box<dyn Fn(DomId) -> io::Result<UnixStream> + Send>;

/// A hypervisor that is served. Dropping it ends it; clients then get errors.
#[derive(Debug)]
pub struct HypervisorServer {
    socket: PathBuf,
    stop: Waker,
    thread: Option<JoinHandle<()>>,
}

const LISTENER: Token = Token(usize::MAX);
const STOP: Token = Token(usize::MAX - 1);

impl HypervisorServer {
    /// Serves it on `hypervisor.sock` in `folder`, which must exist.
    pub fn start(
        folder: &Path,
        hypervisor: Hypervisor,
        connect_store: ConnectStore,
    ) -> io::Result<HypervisorServer> {
        wire::raise_descriptor_limit();
        let socket = folder.join(wire::SOCKET_NAME);
        let listener = wire::listen(&socket)?;
        let poll = Poll::new()?;
        poll.registry().register(
            &mut SourceFd(&listener.as_raw_fd()),
            LISTENER,
            Interest::READABLE,
        )?;
        let stop = Waker::new(poll.registry(), STOP)?;
        let serve = move || {
            let clients = Slab::new();
            Service { poll, listener, clients, hypervisor, connect_store }.run();
        };
        let thread = std::thread::Builder::new().name("hypervisor".to_owned()).spawn(serve)?;
        Ok(HypervisorServer { socket, stop, thread: Some(thread) })
    }
}

impl Drop for HypervisorServer {
    fn drop(&mut self) {
        // Nothing is left to do about an error in any of these.
        let _ = std::fs::remove_file(&self.socket);
        let _ = self.stop.wake();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A connection, and its number with the hypervisor.
struct Client {
    socket: Rc<OwnedFd>,
    number: usize,
}

/// The thread's own.
struct Service {
    poll: Poll,
    listener: OwnedFd,
    clients: Slab<Client>,
    hypervisor: Hypervisor,
    connect_store: ConnectStore,
}

impl Service {
    fn run(&mut self) {
        let mut events = mio::Events::with_capacity(256);
        let mut packet = Packet::default();
        loop {
            match self.poll.poll(&mut events, None) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    panic!("the stand-in's hypervisor cannot wait for requests: {error}")
                }
                _ => {}
            }
            for event in &events {
                match event.token() {
                    STOP => return,
                    LISTENER => self.accept(),
                    Token(key) => self.serve(key, &mut packet),
                }
            }
        }
    }

    fn accept(&mut self) {
        // An error other than "no more" concerns a client that has gone, or a lack of descriptors
        // that the next client may not meet.
        while let Ok(socket) = wire::accept(&self.listener) {
            let entry = self.clients.vacant_entry();
            let token = Token(entry.key());
            let mut source = SourceFd(&socket.as_raw_fd());
            if self.poll.registry().register(&mut source, token, Interest::READABLE).is_ok() {
                let number = self.hypervisor.connect();
                entry.insert(Client { socket: Rc::new(socket), number });
            }
        }
    }

    /// Answers what a client has sent, and lets go of a client that has gone.
    fn serve(&mut self, key: usize, packet: &mut Packet) {
        let Some(client) = self.clients.get(key) else { return };
        let (socket, number) = (Rc::clone(&client.socket), client.number);
        loop {
            let answered = match wire::receive(&socket, packet) {
                Ok(true) => self.answer(number, &socket, &packet.words),
                Ok(false) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) => Err(error),
            };
            match answered {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => break,
            }
        }
        self.hypervisor.disconnect(number);
        self.clients.remove(key);
    }

    fn answer(&mut self, number: usize, socket: &OwnedFd, words: &[u32]) -> io::Result<()> {
        let handled = match Request::decode(words) {
            Some(Request::OpenStore) => self.open_store(number),
            Some(request) => self.hypervisor.handle(number, request),
            None => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        let reply = match handled {
            Ok(mut reply) => {
                reply.words.insert(0, 0);
                reply
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                Reply { words: vec![errno.cast_unsigned()], fds: Vec::new() }
            }
        };
        let fds: Vec<BorrowedFd<'_>> = reply.fds.iter().map(AsFd::as_fd).collect();
        // A client that does not take its reply is dropped, also if the socket is full.
        wire::send(socket, &reply.words, &fds).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn open_store(&self, number: usize) -> io::Result<Reply> {
        let domid = self.hypervisor.domid_of(number)?;
        Ok(Reply::fd((self.connect_store)(domid)?.into()))
    }
}

//! The stand-in's hypervisor: a thread that knows every domain, mapping and event channel.
//!
//! [`super::wire`] tells the protocol. The thread serves one request after the other, so what it
//! answers has happened for everybody. When a connection closes, its mappings, its ports and the
//! domain it made go with it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::thread::JoinHandle;

use mio::unix::SourceFd;
use mio::{Interest, Poll, Token, Waker};
use rustc_hash::FxHashMap;
use slab::Slab;

use super::channels::Channels;
use super::guest::{Guest, Pinned};
use super::memory::GuestMemory;
use super::wire::{self, Packet, Request};
use crate::units::DomId;
use crate::xen::PageAccess;

/// What the hypervisor leaves to the toolstack. Called in the hypervisor's thread: it must not
/// call the hypervisor.
pub trait Toolstack: Send {
    /// A domain was made. After an error it is destroyed.
    fn created(&mut self, domid: DomId) -> io::Result<()>;
    /// A domain has ended.
    fn destroyed(&mut self, domid: DomId);
    /// Connects to xenstore with the rights of a domain.
    fn connect_store(&mut self, domid: DomId) -> io::Result<UnixStream>;
}

/// A running hypervisor. Dropping it ends it; clients then get errors.
#[derive(Debug)]
pub struct Hypervisor {
    socket: PathBuf,
    stop: Waker,
    thread: Option<JoinHandle<()>>,
}

const LISTENER: Token = Token(usize::MAX);
const STOP: Token = Token(usize::MAX - 1);

impl Hypervisor {
    /// Starts it on `hypervisor.sock` in `folder`, which must exist.
    pub fn start(folder: &Path, toolstack: Box<dyn Toolstack>) -> io::Result<Hypervisor> {
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
        let serve = move || Server::new(poll, listener, toolstack).run();
        let thread = std::thread::Builder::new().name("hypervisor".to_owned()).spawn(serve)?;
        Ok(Hypervisor { socket, stop, thread: Some(thread) })
    }
}

impl Drop for Hypervisor {
    fn drop(&mut self) {
        // Nothing is left to do about an error in any of these.
        let _ = std::fs::remove_file(&self.socket);
        let _ = self.stop.wake();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A connection and what it holds.
struct Client {
    socket: Rc<OwnedFd>,
    /// Whom it acts for; none before its first request and after that domain's end.
    domid: Option<DomId>,
    /// The domain that it made.
    domain: Option<DomId>,
    /// Its number among the event channel handles.
    handle: Option<usize>,
    mappings: Slab<Vec<Pinned>>,
}

/// What a reply carries beside its status.
#[derive(Default)]
struct Reply {
    words: Vec<u32>,
    fds: Vec<OwnedFd>,
}

struct Server {
    poll: Poll,
    listener: OwnedFd,
    toolstack: Box<dyn Toolstack>,
    clients: Slab<Client>,
    guests: FxHashMap<DomId, Rc<Guest>>,
    channels: Channels,
}

impl Server {
    fn new(poll: Poll, listener: OwnedFd, toolstack: Box<dyn Toolstack>) -> Server {
        let (clients, guests, channels) = Default::default();
        Server { poll, listener, toolstack, clients, guests, channels }
    }

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
                entry.insert(Client {
                    socket: Rc::new(socket),
                    domid: None,
                    domain: None,
                    handle: None,
                    mappings: Slab::new(),
                });
            }
        }
    }

    /// Answers what a client has sent, and lets go of a client that has gone.
    fn serve(&mut self, key: usize, packet: &mut Packet) {
        let Some(client) = self.clients.get(key) else { return };
        let socket = Rc::clone(&client.socket);
        loop {
            let answered = match wire::receive(&socket, packet) {
                Ok(true) => self.answer(key, &socket, &packet.words),
                Ok(false) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) => Err(error),
            };
            match answered {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => break,
            }
        }
        self.release(key);
        self.clients.remove(key);
    }

    fn answer(&mut self, key: usize, socket: &OwnedFd, words: &[u32]) -> io::Result<()> {
        let handled = match Request::decode(words) {
            Some(request) => self.handle(key, request),
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
        // A client that does not take its reply is dropped, also where the socket is full.
        wire::send(socket, &reply.words, &fds).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn handle(&mut self, key: usize, request: Request<'_>) -> io::Result<Reply> {
        match request {
            Request::Attach { domid } => self.attach(key, domid),
            Request::CreateDomain { domid, pages } => self.create_domain(key, domid, pages),
            Request::Memory { domid } => Ok(Reply::fd(self.guest(domid)?.file()?)),
            Request::Map { domid, access, refs } => self.map(key, domid, access, refs),
            Request::Unmap { mapping } => self.unmap(key, mapping),
            Request::OpenEvents => self.open_events(key),
            Request::AllocUnbound { remote } => {
                let handle = self.handle_of(key)?;
                self.channels.alloc_unbound(handle, remote).map(Reply::word)
            }
            Request::BindInterdomain { remote, port } => {
                let handle = self.handle_of(key)?;
                self.channels.bind(handle, remote, port.0).map(Reply::word)
            }
            Request::Peer { port } => {
                let (words, fds) = self.channels.peer(self.handle_of(key)?, port.0)?;
                Ok(Reply { words: words.to_vec(), fds })
            }
            Request::Unbind { port } => {
                let handle = self.handle_of(key)?;
                self.channels.unbind(handle, port.0).map(|()| Reply::default())
            }
            Request::OpenStore => {
                let domid = self.domid_of(key)?;
                Ok(Reply::fd(self.toolstack.connect_store(domid)?.into()))
            }
            Request::Close => {
                self.release(key);
                Ok(Reply::default())
            }
        }
    }

    fn attach(&mut self, key: usize, domid: DomId) -> io::Result<Reply> {
        if domid != DomId::DOM0 {
            self.guest(domid)?;
        }
        self.client(key)?.domid = Some(domid);
        Ok(Reply::default())
    }

    fn create_domain(&mut self, key: usize, domid: DomId, pages: u32) -> io::Result<Reply> {
        if self.guests.contains_key(&domid) || self.client(key)?.domain.is_some() {
            return Err(errno(libc::EEXIST));
        }
        let guest = Guest::new(GuestMemory::create(pages)?);
        let file = guest.file()?;
        if let Err(error) = self.toolstack.created(domid) {
            self.toolstack.destroyed(domid);
            return Err(error);
        }
        self.guests.insert(domid, Rc::new(guest));
        let client = self.client(key)?;
        client.domid = Some(domid);
        client.domain = Some(domid);
        Ok(Reply::fd(file))
    }

    fn map(
        &mut self,
        key: usize,
        domid: DomId,
        access: PageAccess,
        refs: &[u32],
    ) -> io::Result<Reply> {
        let by = self.domid_of(key)?;
        let (pinned, frames) = Guest::pin_all(self.guest(domid)?, refs, by, access)?;
        let mapping = self.client(key)?.mappings.insert(pinned);
        let mapping = u32::try_from(mapping).map_err(|_| errno(libc::ENOSPC))?;
        let words = std::iter::once(mapping).chain(frames).collect();
        Ok(Reply { words, fds: Vec::new() })
    }

    fn unmap(&mut self, key: usize, mapping: u32) -> io::Result<Reply> {
        match self.client(key)?.mappings.try_remove(mapping as usize) {
            Some(_) => Ok(Reply::default()),
            None => Err(errno(libc::EINVAL)),
        }
    }

    fn open_events(&mut self, key: usize) -> io::Result<Reply> {
        let by = self.domid_of(key)?;
        if self.client(key)?.handle.is_some() {
            return Err(errno(libc::EBUSY));
        }
        let (handle, first_port, fds) = self.channels.open(by)?;
        self.client(key)?.handle = Some(handle);
        Ok(Reply { words: vec![first_port], fds })
    }

    fn client(&mut self, key: usize) -> io::Result<&mut Client> {
        self.clients.get_mut(key).ok_or_else(|| errno(libc::EIO))
    }

    fn domid_of(&self, key: usize) -> io::Result<DomId> {
        self.clients.get(key).and_then(|client| client.domid).ok_or_else(|| errno(libc::ENOTCONN))
    }

    fn handle_of(&self, key: usize) -> io::Result<usize> {
        self.clients.get(key).and_then(|client| client.handle).ok_or_else(|| errno(libc::EBADF))
    }

    fn guest(&self, domid: DomId) -> io::Result<&Rc<Guest>> {
        self.guests.get(&domid).ok_or_else(|| errno(libc::ESRCH))
    }

    /// Takes everything from a client. The end of its domain takes what the domain's other
    /// connections hold, too.
    fn release(&mut self, key: usize) {
        let Some(client) = self.clients.get_mut(key) else { return };
        let domain = client.domain.take();
        client.let_go(&mut self.channels);
        let Some(domid) = domain else { return };
        for (_, client) in &mut self.clients {
            if client.domid == Some(domid) {
                client.let_go(&mut self.channels);
            }
        }
        if let Some(guest) = self.guests.remove(&domid) {
            guest.memory.set_dead();
        }
        self.toolstack.destroyed(domid);
    }
}

impl Client {
    fn let_go(&mut self, channels: &mut Channels) {
        self.domid = None;
        self.mappings.clear();
        if let Some(handle) = self.handle.take() {
            channels.close(handle);
        }
    }
}

impl Reply {
    fn word(word: u32) -> Reply {
        Reply { words: vec![word], fds: Vec::new() }
    }

    fn fd(fd: OwnedFd) -> Reply {
        Reply { words: Vec::new(), fds: vec![fd] }
    }
}

fn errno(errno: libc::c_int) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

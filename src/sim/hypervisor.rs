//! The stand-in's hypervisor, without I/O: it knows every domain, mapping and event channel.
//!
//! Clients are numbered. What one asks ([`super::wire::Request`]) has happened for everybody once it is
//! answered. When a client disconnects, its mappings, its ports and the domain it made go with it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use slab::Slab;

use super::channels::Channels;
use super::guest::{Guest, Pinned};
use super::memory::GuestMemory;
use super::wire::Request;
use crate::units::DomId;
use crate::xen::PageAccess;

/// What the hypervisor leaves to the toolstack, which must not call the hypervisor meanwhile.
pub trait Toolstack: Send {
    /// A domain was made. After an error it is destroyed.
    fn created(&mut self, domid: DomId) -> io::Result<()>;
    /// A domain has ended.
    fn destroyed(&mut self, domid: DomId);
}

/// A client and what it holds.
#[derive(Default)]
struct Client {
    /// Whom it acts for; none before its first request and after that domain's end.
    domid: Option<DomId>,
    /// The domain that it made.
    domain: Option<DomId>,
    /// Its number among the event channel handles.
    handle: Option<usize>,
    mappings: Slab<Vec<Pinned>>,
}

/// What a reply carries beside its status.
#[derive(Debug, Default)]
pub struct Reply {
    /// As [`super::wire`] lists them.
    pub words: Vec<u32>,
    /// Likewise.
    pub fds: Vec<OwnedFd>,
}

/// Every domain, mapping and event channel.
pub struct Hypervisor {
    toolstack: Box<dyn Toolstack>,
    clients: Slab<Client>,
    guests: FxHashMap<DomId, Arc<Guest>>,
    channels: Channels,
}

impl std::fmt::Debug for Hypervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hypervisor").field("clients", &self.clients.len()).finish_non_exhaustive()
    }
}

impl Hypervisor {
    /// One with dom0 only.
    pub fn new(toolstack: Box<dyn Toolstack>) -> Hypervisor {
        let (clients, guests, channels) = Default::default();
        Hypervisor { toolstack, clients, guests, channels }
    }

    /// A new client's number.
    pub fn connect(&mut self) -> usize {
        self.clients.insert(Client::default())
    }

    /// Lets go of a client and of all that it holds.
    pub fn disconnect(&mut self, key: usize) {
        self.release(key);
        self.clients.try_remove(key);
    }

    /// Does what a client asks; [`Request::OpenStore`] is not the hypervisor's.
    pub fn handle(&mut self, key: usize, request: Request<'_>) -> io::Result<Reply> {
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
            Request::OpenStore => Err(errno(libc::ENOSYS)),
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
        self.guests.insert(domid, Arc::new(guest));
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

    /// Whom a client acts for.
    pub fn domid_of(&self, key: usize) -> io::Result<DomId> {
        self.clients.get(key).and_then(|client| client.domid).ok_or_else(|| errno(libc::ENOTCONN))
    }

    fn handle_of(&self, key: usize) -> io::Result<usize> {
        self.clients.get(key).and_then(|client| client.handle).ok_or_else(|| errno(libc::EBADF))
    }

    fn guest(&self, domid: DomId) -> io::Result<&Arc<Guest>> {
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

    /// With one descriptor.
    pub fn fd(fd: OwnedFd) -> Reply {
        Reply { words: Vec::new(), fds: vec![fd] }
    }
}

fn errno(errno: libc::c_int) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

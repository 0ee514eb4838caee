//! A client's end of the stand-in: by sockets, from any process, or in the caller's own thread.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::XENSTORE_SOCKET;
use super::hypervisor::Hypervisor;
use super::store::LocalStore;
use super::wire::{self, Packet, Request};
use crate::units::DomId;
use crate::xen::store::StoreClient;

/// Where a stand-in is reached.
#[derive(Clone, Debug)]
pub enum Endpoint {
    /// By the sockets in its run folder.
    Folder(PathBuf),
    /// In the caller's process: what is asked has happened when the call returns.
    Local(Local),
}

/// A stand-in without sockets and threads.
#[derive(Clone, Debug)]
pub struct Local {
    /// Its hypervisor.
    pub hypervisor: Arc<Mutex<Hypervisor>>,
    /// Its xenstore.
    pub store: LocalStore,
}

/// A client of the hypervisor. When it is closed, the hypervisor has let go of what it held.
#[derive(Debug)]
pub struct Connection {
    peer: Peer,
    /// Of the last request or reply.
    words: Vec<u32>,
}

#[derive(Debug)]
enum Peer {
    Socket { socket: OwnedFd, reply: Packet },
    Local { hypervisor: Arc<Mutex<Hypervisor>>, number: usize },
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Folder(folder) => write!(f, "the stand-in in {}", folder.display()),
            Endpoint::Local(_) => f.write_str("the stand-in in this process"),
        }
    }
}

impl Endpoint {
    /// The stand-in whose sockets are in `folder`.
    pub fn at(folder: &Path) -> Endpoint {
        Endpoint::Folder(folder.to_owned())
    }

    /// Connects without saying for whom.
    pub fn connect(&self) -> io::Result<Connection> {
        let peer = match self {
            Endpoint::Folder(folder) => {
                Peer::Socket { socket: wire::connect(folder)?, reply: Packet::default() }
            }
            Endpoint::Local(local) => {
                let number = lock(&local.hypervisor).connect();
                Peer::Local { hypervisor: Arc::clone(&local.hypervisor), number }
            }
        };
        Ok(Connection { peer, words: Vec::new() })
    }

    /// Connects and acts for `domid`.
    pub fn attach(&self, domid: DomId) -> io::Result<Connection> {
        let mut connection = self.connect()?;
        connection.call(Request::Attach { domid })?;
        Ok(connection)
    }

    /// Connects to xenstore as dom0.
    pub fn open_store(&self) -> io::Result<StoreClient> {
        match self {
            Endpoint::Folder(folder) => StoreClient::connect_unix(&folder.join(XENSTORE_SOCKET)),
            Endpoint::Local(local) => local.store.connect_as(DomId::DOM0),
        }
    }

    /// Connects to xenstore with the rights of the domain that `connection` acts for.
    pub fn open_store_of(&self, connection: &mut Connection) -> io::Result<StoreClient> {
        if let (Endpoint::Local(local), Peer::Local { number, .. }) = (self, &connection.peer) {
            let domid = lock(&local.hypervisor).domid_of(*number)?;
            return local.store.connect_as(domid);
        }
        let (_, mut fds) = connection.call(Request::OpenStore)?;
        StoreClient::from_stream(fds.pop().ok_or(io::ErrorKind::InvalidData)?.into())
    }
}

impl Connection {
    /// Asks and waits for the answer: its words after the status, and its descriptors.
    pub fn call(&mut self, request: Request<'_>) -> io::Result<(&[u32], Vec<OwnedFd>)> {
        match &mut self.peer {
            Peer::Socket { socket, reply } => {
                request.encode(&mut self.words);
                wire::send(socket, &self.words, &[])?;
                if !wire::receive(socket, reply)? {
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
                match reply.words.as_slice() {
                    [0, words @ ..] => Ok((words, std::mem::take(&mut reply.fds))),
                    [errno, ..] => Err(io::Error::from_raw_os_error(errno.cast_signed())),
                    [] => Err(io::ErrorKind::InvalidData.into()),
                }
            }
            Peer::Local { hypervisor, number } => {
                let reply = lock(hypervisor).handle(*number, request)?;
                self.words = reply.words;
                Ok((&self.words, reply.fds))
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        match &self.peer {
            // If the hypervisor is gone, so is what it held for us.
            Peer::Socket { .. } => drop(self.call(Request::Close)),
            Peer::Local { hypervisor, number } => lock(hypervisor).disconnect(*number),
        }
    }
}

/// It answers whole requests, so it is whole even if a thread panicked while it held the lock.
fn lock(hypervisor: &Mutex<Hypervisor>) -> MutexGuard<'_, Hypervisor> {
    hypervisor.lock().unwrap_or_else(PoisonError::into_inner)
}

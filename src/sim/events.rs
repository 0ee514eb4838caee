//! Event channels of the stand-in: [`SimEvents`], for backends and for guests.
//!
//! A handle's ports are numbered from its own first port on, so that a port names its slot.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use rustc_hash::FxHashMap;

use super::connection::{Connection, Endpoint};
use super::mailbox::Mailbox;
use super::wire::Request;
use crate::limits::SIM_PORTS_PER_HANDLE as SLOTS;
use crate::units::{DomId, Port};
use crate::xen::Events;

/// Event channels of one thread, each end of which any process may hold.
///
/// A notification is one system call if the other end was neither pending nor masked, else
/// none; so is an unmask; taking what is pending is one read.
#[derive(Debug)]
pub struct SimEvents {
    mailbox: Mailbox,
    first_port: u32,
    /// How many slots were ever ports; the others need no look.
    slots: usize,
    peers: RefCell<Peers>,
}

/// What is known of the other ends.
#[derive(Debug)]
struct Peers {
    connection: Connection,
    /// By slot; `None` if the slot is not a port of ours.
    ends: Vec<Option<Peer>>,
    /// By number, so that channels to the same handle share its mailbox.
    mailboxes: FxHashMap<u32, Weak<Mailbox>>,
}

/// The other end of a port, as it was when its link had this value. Link 0 is nobody.
#[derive(Clone, Debug, Default)]
struct Peer {
    link: u32,
    target: Option<(Arc<Mailbox>, usize)>,
}

impl SimEvents {
    /// Opens a handle that acts for `domid`.
    pub fn open(endpoint: &Endpoint, domid: DomId) -> io::Result<SimEvents> {
        let mut connection = endpoint.attach(domid)?;
        let (words, fds) = connection.call(Request::OpenEvents)?;
        let &[first_port] = words else { return Err(io::ErrorKind::InvalidData.into()) };
        let mailbox = Mailbox::open(fds)?;
        let ends = vec![None; SLOTS];
        let peers = RefCell::new(Peers { connection, ends, mailboxes: FxHashMap::default() });
        Ok(SimEvents { mailbox, first_port, slots: 0, peers })
    }

    /// Allocates a port to which `remote` may bind. It is not pending.
    pub fn alloc_unbound(&mut self, remote: DomId) -> io::Result<Port> {
        self.new_port(Request::AllocUnbound { remote })
    }

    /// As [`Events::pending`]: how many ports, and whether the descriptor was readable. It can be
    /// without a port, once, if events cross.
    pub fn take_pending(&mut self, ports: &mut [Port]) -> (usize, bool) {
        let mut count = 0;
        if ports.is_empty() {
            return (0, false);
        }
        let ends = &self.peers.get_mut().ends;
        let rang = self.mailbox.take_pending(self.slots, |slot| {
            // A peer that had not yet seen us unbind may signal a slot that is no port any more.
            if let (Some(Some(_)), Ok(number)) = (ends.get(slot), u32::try_from(slot)) {
                ports[count] = Port(self.first_port + number);
                count += 1;
            }
            count < ports.len()
        });
        (count, rang)
    }

    fn new_port(&mut self, request: Request<'_>) -> io::Result<Port> {
        let peers = self.peers.get_mut();
        let (words, _) = peers.connection.call(request)?;
        let &[port] = words else { return Err(io::ErrorKind::InvalidData.into()) };
        let slot = slot_of(self.first_port, Port(port))?;
        let end = peers.ends.get_mut(slot).ok_or(io::ErrorKind::InvalidData)?;
        *end = Some(Peer::default());
        self.slots = self.slots.max(slot + 1);
        Ok(Port(port))
    }
}

impl Events for SimEvents {
    fn bind_interdomain(&mut self, remote: DomId, port: Port) -> io::Result<Port> {
        let port = self.new_port(Request::BindInterdomain { remote, port })?;
        let slot = slot_of(self.first_port, port)?;
        // Ask now, so that the first notification need not.
        let link = self.mailbox.link(slot).load(Ordering::SeqCst);
        self.peers.get_mut().refresh(port, slot, link)?;
        self.mailbox.notify(slot);
        Ok(port)
    }

    fn unbind(&mut self, port: Port) -> io::Result<()> {
        let slot = slot_of(self.first_port, port)?;
        let peers = self.peers.get_mut();
        peers.connection.call(Request::Unbind { port })?;
        if let Some(end) = peers.ends.get_mut(slot) {
            *end = None;
        }
        peers.mailboxes.retain(|_, mailbox| mailbox.strong_count() != 0);
        Ok(())
    }

    fn notify(&self, port: Port) -> io::Result<()> {
        let slot = slot_of(self.first_port, port)?;
        let link = self.mailbox.link(slot).load(Ordering::Acquire);
        let mut peers = self.peers.borrow_mut();
        let end = peers.ends.get(slot).and_then(Option::as_ref).ok_or_else(not_connected)?;
        if link != end.link {
            peers.refresh(port, slot, link)?;
        }
        if let Some(Some(Peer { target: Some((mailbox, slot)), .. })) = peers.ends.get(slot) {
            mailbox.notify(*slot);
        }
        Ok(())
    }

    fn pending(&mut self, ports: &mut [Port]) -> io::Result<usize> {
        Ok(self.take_pending(ports).0)
    }

    fn unmask(&mut self, ports: &[Port]) -> io::Result<()> {
        for port in ports {
            self.mailbox.unmask(slot_of(self.first_port, *port)?);
        }
        Ok(())
    }
}

impl AsFd for SimEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.mailbox.as_fd()
    }
}

impl Peers {
    /// Learns the other end of a port whose link is now `link`. Nobody there is no error: as on
    /// Xen, what is sent to a port without a peer is lost.
    fn refresh(&mut self, port: Port, slot: usize, link: u32) -> io::Result<()> {
        let mut peer = Peer { link, target: None };
        if link != 0 {
            let (words, fds) = self.connection.call(Request::Peer { port })?;
            let &[link, number, remote_slot] = words else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            let remote_slot = usize::try_from(remote_slot).map_err(io::Error::other)?;
            if link != 0 && remote_slot < SLOTS {
                let known = self.mailboxes.get(&number).and_then(Weak::upgrade);
                let mailbox = match known {
                    Some(mailbox) => mailbox,
                    None => Arc::new(Mailbox::open(fds)?),
                };
                self.mailboxes.insert(number, Arc::downgrade(&mailbox));
                peer = Peer { link, target: Some((mailbox, remote_slot)) };
            }
        }
        if let Some(end) = self.ends.get_mut(slot) {
            *end = Some(peer);
        }
        Ok(())
    }
}

fn slot_of(first_port: u32, port: Port) -> io::Result<usize> {
    match port.0.checked_sub(first_port).map(usize::try_from) {
        Some(Ok(slot)) if slot < SLOTS => Ok(slot),
        _ => Err(not_connected()),
    }
}

/// What evtchn says of a port that is not the handle's own.
fn not_connected() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOTCONN)
}

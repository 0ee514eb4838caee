//! Event channels as the stand-in's hypervisor knows them: which port is whose, bound to what.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use slab::Slab;

use super::mailbox::Mailbox;
use crate::limits::SIM_PORTS_PER_HANDLE as SLOTS;
use crate::units::DomId;

/// All handles with their ports.
#[derive(Debug, Default)]
pub struct Channels {
    handles: Slab<Handle>,
    /// The last number given to a mailbox or a link.
    last_number: u32,
}

#[derive(Debug)]
struct Handle {
    domid: DomId,
    /// Names the mailbox for the life of the hypervisor, as `handles`' own keys do not.
    number: u32,
    mailbox: Mailbox,
    ends: Vec<End>,
}

/// What a slot of a handle is: the states of Xen's event channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Free,
    /// `remote` may bind to it.
    Unbound {
        remote: DomId,
    },
    Bound(Place),
}

/// A handle and a slot of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    handle: usize,
    slot: usize,
}

impl Channels {
    /// Opens a handle: its key, its first port, its mailbox and bell.
    pub fn open(&mut self, domid: DomId) -> io::Result<(usize, u32, Vec<OwnedFd>)> {
        let mailbox = Mailbox::create()?;
        let fds = cloned(&mailbox)?;
        let number = self.fresh_number();
        let handle = self.handles.insert(Handle { domid, number, mailbox, ends: Vec::new() });
        let first_port = port(Place { handle, slot: 0 })?;
        Ok((handle, first_port, fds))
    }

    /// Closes a handle with all its ports.
    pub fn close(&mut self, handle: usize) {
        let slots = self.handles.get(handle).map_or(0, |handle| handle.ends.len());
        for slot in 0..slots {
            self.free(Place { handle, slot });
        }
        self.handles.try_remove(handle);
    }

    /// Makes a port to which `remote` may bind.
    pub fn alloc_unbound(&mut self, handle: usize, remote: DomId) -> io::Result<u32> {
        port(self.take_slot(handle, End::Unbound { remote })?)
    }

    /// Binds to a port that a handle of `remote` allocated for the domain of ours.
    pub fn bind(&mut self, handle: usize, remote: DomId, remote_port: u32) -> io::Result<u32> {
        let by = self.handle(handle)?.domid;
        let there = place(remote_port).ok_or_else(|| errno(libc::EINVAL))?;
        let waits = self.handle(there.handle).is_ok_and(|other| {
            other.domid == remote
                && other.ends.get(there.slot) == Some(&End::Unbound { remote: by })
        });
        if !waits {
            return Err(errno(libc::EINVAL));
        }
        let here = self.take_slot(handle, End::Bound(there))?;
        self.set(there, End::Bound(here));
        let link = self.fresh_number();
        for place in [here, there] {
            self.handle(place.handle)?.mailbox.link(place.slot).store(link, Ordering::SeqCst);
        }
        port(here)
    }

    /// Where to signal the other end of a port of ours: link, mailbox number, slot, and the
    /// mailbox; link 0 and nothing else if it has none.
    pub fn peer(&self, handle: usize, port: u32) -> io::Result<([u32; 3], Vec<OwnedFd>)> {
        let here = own(handle, port)?;
        let ours = self.handle(handle)?;
        match ours.ends.get(here.slot) {
            None | Some(End::Free) => Err(errno(libc::ENOTCONN)),
            Some(End::Unbound { .. }) => Ok(([0; 3], Vec::new())),
            Some(End::Bound(there)) => {
                let link = ours.mailbox.link(here.slot).load(Ordering::SeqCst);
                let theirs = self.handle(there.handle)?;
                let slot = u32::try_from(there.slot).map_err(io::Error::other)?;
                Ok(([link, theirs.number, slot], cloned(&theirs.mailbox)?))
            }
        }
    }

    /// Closes a port of ours. The other end waits again for the same domain to bind.
    pub fn unbind(&mut self, handle: usize, port: u32) -> io::Result<()> {
        let here = own(handle, port)?;
        match self.handle(handle)?.ends.get(here.slot) {
            None | Some(End::Free) => Err(errno(libc::ENOTCONN)),
            Some(_) => {
                self.free(here);
                Ok(())
            }
        }
    }

    fn free(&mut self, here: Place) {
        let Ok(ours) = self.handle(here.handle) else { return };
        let domid = ours.domid;
        ours.mailbox.reset(here.slot);
        if let Some(End::Bound(there)) = ours.ends.get(here.slot).copied() {
            if let Ok(theirs) = self.handle(there.handle) {
                theirs.mailbox.link(there.slot).store(0, Ordering::SeqCst);
            }
            self.set(there, End::Unbound { remote: domid });
        }
        self.set(here, End::Free);
    }

    fn take_slot(&mut self, handle: usize, end: End) -> io::Result<Place> {
        let ours = self.handles.get_mut(handle).ok_or_else(|| errno(libc::EBADF))?;
        let slot = match ours.ends.iter().position(|end| *end == End::Free) {
            Some(slot) => slot,
            None if ours.ends.len() < SLOTS => {
                ours.ends.push(End::Free);
                ours.ends.len() - 1
            }
            None => return Err(errno(libc::ENOSPC)),
        };
        ours.mailbox.reset(slot);
        let place = Place { handle, slot };
        self.set(place, end);
        Ok(place)
    }

    fn set(&mut self, place: Place, end: End) {
        let handle = self.handles.get_mut(place.handle);
        if let Some(slot) = handle.and_then(|handle| handle.ends.get_mut(place.slot)) {
            *slot = end;
        }
    }

    fn handle(&self, handle: usize) -> io::Result<&Handle> {
        self.handles.get(handle).ok_or_else(|| errno(libc::EBADF))
    }

    fn fresh_number(&mut self) -> u32 {
        self.last_number = self.last_number.checked_add(1).unwrap_or(1);
        self.last_number
    }
}

/// The port of a place. Xen keeps port 0 to itself, so that the first handle's begin at [`SLOTS`].
fn port(place: Place) -> io::Result<u32> {
    u32::try_from((place.handle + 1) * SLOTS + place.slot).map_err(|_| errno(libc::ENOSPC))
}

fn place(port: u32) -> Option<Place> {
    let port = port as usize;
    Some(Place { handle: (port / SLOTS).checked_sub(1)?, slot: port % SLOTS })
}

fn own(handle: usize, port: u32) -> io::Result<Place> {
    place(port).filter(|place| place.handle == handle).ok_or_else(|| errno(libc::ENOTCONN))
}

fn cloned(mailbox: &Mailbox) -> io::Result<Vec<OwnedFd>> {
    mailbox.fds().iter().map(|fd| fd.as_fd().try_clone_to_owned()).collect()
}

fn errno(errno: libc::c_int) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

#[cfg(test)]
mod test {
    use super::*;

    fn domid(raw: u32) -> DomId {
        DomId::try_from(raw).unwrap()
    }

    /// A guest's handle with a port for dom0, and a handle of dom0.
    fn guest_and_backend() -> (Channels, usize, u32, usize) {
        let mut channels = Channels::default();
        let (guest, ..) = channels.open(domid(5)).unwrap();
        let (backend, ..) = channels.open(DomId::DOM0).unwrap();
        let port = channels.alloc_unbound(guest, DomId::DOM0).unwrap();
        (channels, guest, port, backend)
    }

    #[test]
    fn only_the_domain_it_waits_for_may_bind_a_port_and_only_once() {
        let (mut channels, guest, port, backend) = guest_and_backend();
        let (stranger, ..) = channels.open(domid(6)).unwrap();
        assert!(channels.bind(stranger, domid(5), port).is_err());
        assert!(channels.bind(backend, domid(6), port).is_err());
        assert!(channels.bind(backend, domid(5), port + 1).is_err());
        assert!(channels.bind(backend, domid(5), 0).is_err());
        let ours = channels.bind(backend, domid(5), port).unwrap();
        assert_eq!(
            channels.peer(backend, ours).unwrap().0,
            channels.peer(backend, ours).unwrap().0
        );
        assert!(channels.bind(backend, domid(5), port).is_err());
        assert!(channels.peer(guest, ours).is_err());
    }

    #[test]
    fn a_port_whose_peer_closed_may_be_bound_again() {
        let (mut channels, guest, port, backend) = guest_and_backend();
        channels.bind(backend, domid(5), port).unwrap();
        let first = channels.peer(guest, port).unwrap().0;
        channels.close(backend);
        assert_eq!(channels.peer(guest, port).unwrap().0, [0; 3]);
        let (backend, ..) = channels.open(DomId::DOM0).unwrap();
        channels.bind(backend, domid(5), port).unwrap();
        assert_ne!(channels.peer(guest, port).unwrap().0[0], first[0]);
    }

    #[test]
    fn a_handle_has_a_bounded_number_of_ports_and_uses_freed_ones_again() {
        let mut channels = Channels::default();
        let (guest, first_port, _) = channels.open(domid(5)).unwrap();
        for _ in 0..SLOTS {
            channels.alloc_unbound(guest, DomId::DOM0).unwrap();
        }
        assert!(channels.alloc_unbound(guest, DomId::DOM0).is_err());
        channels.unbind(guest, first_port + 7).unwrap();
        assert_eq!(channels.alloc_unbound(guest, DomId::DOM0).unwrap(), first_port + 7);
        channels.unbind(guest, first_port + 7).unwrap();
        assert!(channels.unbind(guest, first_port + 7).is_err());
    }
}

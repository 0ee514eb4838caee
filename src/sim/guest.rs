//! A guest as the stand-in's hypervisor knows it: its memory and which of its grants are in use.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

use super::grants::{Faults, permitted};
use super::memory::{Gfn, GuestMemory};
use crate::units::{DomId, GrantRef};
use crate::xen::PageAccess;
use crate::xen::abi::{self, GrantEntryV1};

/// A guest. It outlives its domain while a mapping of it is left, as a zombie does on Xen.
#[derive(Debug)]
pub struct Guest {
    /// Its pages and grant table.
    pub memory: GuestMemory,
    pins: Mutex<FxHashMap<GrantRef, Pins>>,
}

/// How often a grant is mapped.
#[derive(Clone, Copy, Debug, Default)]
struct Pins {
    all: u32,
    writable: u32,
}

/// One use of a grant; ends on drop.
#[derive(Debug)]
pub struct Pinned {
    guest: Arc<Guest>,
    gref: GrantRef,
    access: PageAccess,
}

impl Guest {
    /// A guest whose grants nobody uses.
    pub fn new(memory: GuestMemory) -> Guest {
        Guest { memory, pins: Mutex::default() }
    }

    /// Its memory, for another process.
    pub fn file(&self) -> io::Result<OwnedFd> {
        self.memory.as_fd().try_clone_to_owned()
    }

    /// Takes all of `refs` into use for `by`; the frames are in their order. All or none: as with
    /// gntdev, a bad one fails the batch with EINVAL.
    pub fn pin_all(
        guest: &Arc<Guest>,
        refs: &[u32],
        by: DomId,
        access: PageAccess,
    ) -> io::Result<(Vec<Pinned>, Vec<u32>)> {
        let pin = |gref: &u32| {
            let gref = GrantRef(*gref);
            let frame = guest.pin(gref, by, access)?;
            Ok((Pinned { guest: Arc::clone(guest), gref, access }, frame.0))
        };
        let pinned: Result<(Vec<_>, Vec<_>), i16> = refs.iter().map(pin).collect();
        pinned.map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
    }

    /// They are whole even if a thread panicked while it held them.
    fn pins(&self) -> MutexGuard<'_, FxHashMap<GrantRef, Pins>> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks an entry and marks it as in use, in one step, so that the guest cannot take it back
    /// in between.
    fn pin(&self, gref: GrantRef, by: DomId, access: PageAccess) -> Result<Gfn, i16> {
        let (Some(entry), Some(fault)) = (self.memory.entry(gref), self.memory.fault(gref)) else {
            return Err(abi::GNTST_BAD_GNTREF);
        };
        match Faults::from_byte(fault.load(Ordering::Relaxed)).map {
            abi::GNTST_OKAY => {}
            status => return Err(status),
        }
        let mut word = entry.load(Ordering::Acquire);
        let frame = loop {
            let mut wanted = GrantEntryV1::from_word(word);
            let frame = permitted(wanted, by, access)?;
            self.memory.page(frame).ok_or(abi::GNTST_BAD_PAGE)?;
            wanted.flags |= in_use(access);
            let wanted = wanted.to_word();
            match entry.compare_exchange(word, wanted, Ordering::SeqCst, Ordering::Acquire) {
                Ok(_) => break frame,
                Err(changed) => word = changed,
            }
        };
        let mut pins = self.pins();
        let pins = pins.entry(gref).or_default();
        pins.all += 1;
        pins.writable += u32::from(access == PageAccess::ReadWrite);
        Ok(frame)
    }

    fn unpin(&self, gref: GrantRef, access: PageAccess) {
        let mut pins = self.pins();
        let (Some(left), Some(entry)) = (pins.get_mut(&gref), self.memory.entry(gref)) else {
            return;
        };
        left.all -= 1;
        left.writable -= u32::from(access == PageAccess::ReadWrite);
        let mut ended = 0;
        if left.writable == 0 {
            ended |= abi::GTF_WRITING;
        }
        if left.all == 0 {
            ended |= abi::GTF_READING;
            pins.remove(&gref);
        }
        entry.fetch_and(!u64::from(ended), Ordering::SeqCst);
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.guest.unpin(self.gref, self.access);
    }
}

fn in_use(access: PageAccess) -> u16 {
    match access {
        PageAccess::ReadOnly => abi::GTF_READING,
        PageAccess::ReadWrite => abi::GTF_READING | abi::GTF_WRITING,
    }
}

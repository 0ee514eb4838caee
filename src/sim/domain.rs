//! A domain seen from inside: what a guest's kernel does with its memory and its grant table.
//!
//! # Faults
//! Each is a method, acts at once and for every process, and hits the same requests in every run:
//! - [`Domain::fail_maps`], [`Domain::fail_copies`]: mapping or copying a reference answers a given
//!   `GNTST_*`, until [`Domain::heal`];
//! - [`Domain::revoke`]: the guest takes a grant back although it is mapped, which a kernel under
//!   real Xen would not: later maps and copies fail, what is mapped stays so;
//! - a lost peer: drop the guest's [`SimEvents`] or the whole [`Domain`]. What the backend sends
//!   goes nowhere; its mappings stay valid until it unmaps them.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::connection::{Connection, Endpoint};
use super::events::SimEvents;
use super::grants::Faults;
use super::memory::{Gfn, GuestMemory};
use super::wire::Request;
use crate::limits::SIM_GRANT_ENTRIES;
use crate::units::{DomId, GrantRef};
use crate::xen::PageAccess;
use crate::xen::abi::{self, GrantEntryV1};
use crate::xen::shm::{GuestBuf, GuestPages, SharedPage};
use crate::xen::store::StoreClient;

/// A domain with its memory. It ends when this is dropped or its process dies.
///
/// Threads share it by reference: pages and entries are reached without a lock; only allocating
/// pages or references takes one. Buffers and rings that it hands out must not be used after it
/// was dropped.
#[derive(Debug)]
pub struct Domain {
    domid: DomId,
    endpoint: Endpoint,
    connection: Mutex<Connection>,
    memory: GuestMemory,
    /// By page: whether it is allocated.
    pages: Mutex<Vec<bool>>,
    free_refs: Mutex<Vec<GrantRef>>,
}

/// A grant is still mapped and can't be taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("grant {0} is still mapped")]
pub struct StillMapped(pub GrantRef);

impl Domain {
    /// Makes a domain of `pages` pages with a hypervisor. An existing domid is refused with EEXIST.
    pub fn create(endpoint: &Endpoint, domid: DomId, pages: u32) -> io::Result<Domain> {
        let mut connection = endpoint.connect()?;
        let (_, mut fds) = connection.call(Request::CreateDomain { domid, pages })?;
        let memory = GuestMemory::open(fds.pop().ok_or(io::ErrorKind::InvalidData)?)?;
        Ok(Domain {
            domid,
            endpoint: endpoint.clone(),
            connection: Mutex::new(connection),
            pages: Mutex::new(vec![false; pages as usize]),
            // Taken from the end: the lowest first.
            free_refs: Mutex::new(
                (abi::GNTTAB_RESERVED_ENTRIES..SIM_GRANT_ENTRIES).rev().map(GrantRef).collect(),
            ),
            memory,
        })
    }

    /// Its number.
    pub fn domid(&self) -> DomId {
        self.domid
    }

    /// How many pages it has.
    pub fn pages(&self) -> u32 {
        self.memory.pages()
    }

    /// A set of event channels, one for each thread that wants some.
    pub fn open_events(&self) -> io::Result<SimEvents> {
        SimEvents::open(&self.endpoint, self.domid)
    }

    /// A xenstore connection with the domain's own rights.
    pub fn open_store(&self) -> io::Result<StoreClient> {
        self.endpoint.open_store_of(&mut lock(&self.connection))
    }

    /// Allocates `count` consecutive pages and returns the first; ENOMEM if there are none.
    /// What they hold is left from before.
    pub fn alloc_pages(&self, count: u32) -> io::Result<Gfn> {
        let mut pages = lock(&self.pages);
        let first = pages
            .windows(count as usize)
            .position(|run| run.iter().all(|taken| !taken))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        pages[first..first + count as usize].fill(true);
        u32::try_from(first).map(Gfn).map_err(io::Error::other)
    }

    /// Gives pages back. Their grants must have been ended.
    ///
    /// # Panics
    /// If one of them was not allocated.
    pub fn free_pages(&self, first: Gfn, count: u32) {
        let mut pages = lock(&self.pages);
        let run = &mut pages[first.0 as usize..first.0 as usize + count as usize];
        assert!(run.iter().all(|taken| *taken), "{first:?} was not allocated");
        run.fill(false);
    }

    /// A page, to be read and written.
    ///
    /// # Panics
    /// If the domain has no such page.
    #[inline]
    pub fn page(&self, gfn: Gfn) -> GuestBuf {
        self.memory.page(gfn).expect("a page of this domain")
    }

    /// Consecutive pages seen as words, for a ring.
    ///
    /// # Panics
    /// If the domain has no such pages.
    pub fn shared_pages(&self, first: Gfn, count: u32) -> SharedPage {
        self.memory.shared_pages(first, count).expect("pages of this domain")
    }

    /// Consecutive pages as one range. Not to be given to a `Grants`, which did not map it.
    ///
    /// # Panics
    /// If the domain has no such pages.
    pub fn guest_pages(&self, first: Gfn, count: u32) -> GuestPages {
        self.memory.guest_pages(first, count).expect("pages of this domain")
    }

    /// Takes `count` references out of the pool, for [`Domain::permit`]; ENOSPC if the table
    /// has no more.
    pub fn reserve_refs(&self, count: usize) -> io::Result<Vec<GrantRef>> {
        let mut free = lock(&self.free_refs);
        let left = free
            .len()
            .checked_sub(count)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        Ok(free.drain(left..).rev().collect())
    }

    /// Puts references that grant nothing back into the pool.
    pub fn release_refs(&self, refs: &[GrantRef]) {
        lock(&self.free_refs).extend(refs.iter().rev());
    }

    /// Lets `to` at a page through a reference that was reserved. Takes no lock.
    #[inline]
    pub fn permit(&self, gref: GrantRef, gfn: Gfn, to: DomId, access: PageAccess) {
        let read_only = match access {
            PageAccess::ReadOnly => abi::GTF_READONLY,
            PageAccess::ReadWrite => 0,
        };
        let flags = abi::GTF_PERMIT_ACCESS | read_only;
        let entry = GrantEntryV1 { flags, domid: to.raw(), frame: gfn.0 };
        self.entry(gref).store(entry.to_word(), Ordering::Release);
    }

    /// Takes a grant back and keeps the reference reserved. Takes no lock.
    #[inline]
    pub fn withdraw(&self, gref: GrantRef) -> Result<(), StillMapped> {
        let entry = self.entry(gref);
        let mut word = entry.load(Ordering::Acquire);
        loop {
            if is_mapped(word) {
                return Err(StillMapped(gref));
            }
            match entry.compare_exchange(word, 0, Ordering::SeqCst, Ordering::Acquire) {
                Ok(_) => return Ok(()),
                Err(changed) => word = changed,
            }
        }
    }

    /// Reserves a reference and lets `to` at a page through it.
    pub fn grant(&self, gfn: Gfn, to: DomId, access: PageAccess) -> io::Result<GrantRef> {
        let refs = self.reserve_refs(1)?;
        let gref = *refs.first().ok_or(io::ErrorKind::InvalidData)?;
        self.permit(gref, gfn, to, access);
        Ok(gref)
    }

    /// Takes a grant back and puts its reference back into the pool.
    pub fn end_access(&self, gref: GrantRef) -> Result<(), StillMapped> {
        self.withdraw(gref)?;
        self.release_refs(&[gref]);
        Ok(())
    }

    /// How many grants somebody has mapped.
    pub fn mapped_grants(&self) -> usize {
        let refs = (0..SIM_GRANT_ENTRIES).map(GrantRef);
        refs.filter(|gref| is_mapped(self.entry(*gref).load(Ordering::Acquire))).count()
    }

    /// Fault: takes a grant back although it may be mapped. The reference stays reserved.
    pub fn revoke(&self, gref: GrantRef) {
        self.entry(gref).store(0, Ordering::SeqCst);
    }

    /// Fault: every map of the reference answers `status`, a `GNTST_*`.
    pub fn fail_maps(&self, gref: GrantRef, status: i16) {
        self.change_faults(gref, |faults| Faults { map: status, ..faults });
    }

    /// Fault: every copy through the reference answers `status`, a `GNTST_*`.
    pub fn fail_copies(&self, gref: GrantRef, status: i16) {
        self.change_faults(gref, |faults| Faults { copy: status, ..faults });
    }

    /// Ends the faults of a reference.
    pub fn heal(&self, gref: GrantRef) {
        self.change_faults(gref, |_| Faults::default());
    }

    fn change_faults(&self, gref: GrantRef, change: impl Fn(Faults) -> Faults) {
        let byte = self.memory.fault(gref).expect("a reference of this domain's table");
        let faults = Faults::from_byte(byte.load(Ordering::Relaxed));
        byte.store(change(faults).to_byte(), Ordering::Relaxed);
    }

    #[inline]
    fn entry(&self, gref: GrantRef) -> &std::sync::atomic::AtomicU64 {
        self.memory.entry(gref).expect("a reference of this domain's table")
    }
}

fn is_mapped(entry: u64) -> bool {
    GrantEntryV1::from_word(entry).flags & (abi::GTF_READING | abi::GTF_WRITING) != 0
}

/// A thread that panicked while it held a lock left nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! Where the data of a segment is: in a guest page that stays mapped, or in bounce memory that
//! grant copy fills and empties. Never mapped and unmapped per request.

use std::collections::HashMap;
use std::io;

use rustc_hash::FxBuildHasher;

use crate::limits::{
    BOUNCE_PAGES_PER_WORKER, GRANTS_PER_MAP_BATCH, MAP_REFUSALS_MAX, PERSISTENT_GRANTS_PER_QUEUE,
};
use crate::units::{DomId, GrantRef};
use crate::xen::shm::{GuestBuf, GuestPages, LocalPages, PAGE_BYTES};
use crate::xen::{Grants, PageAccess};

/// A frontend's pages that stay mapped (`feature-persistent`).
///
/// Bounded by `limits::PERSISTENT_GRANTS_PER_QUEUE` (XSA-300); what is beyond is copied. The
/// frontend may give a reference another page only after it ended access to the first, which it
/// cannot while we hold it mapped, so an entry stays right until the queue disconnects.
#[derive(Debug, Default)]
pub struct PersistentGrants {
    pages: HashMap<u32, GuestBuf, FxBuildHasher>,
    batches: Vec<GuestPages>,
    refusals: u32,
}

impl PersistentGrants {
    /// The page of a reference, if it is mapped.
    #[inline]
    pub fn page(&self, gref: u32) -> Option<GuestBuf> {
        self.pages.get(&gref).copied()
    }

    /// Pages mapped.
    pub fn count(&self) -> usize {
        self.pages.len()
    }

    /// Maps as many of `wanted` as the bounds allow, in batches. What can't be mapped stays
    /// unmapped: its data is copied, and the copy's status tells what is wrong with it.
    pub fn map<G: Grants>(&mut self, grants: &mut G, domid: DomId, wanted: &mut Vec<GrantRef>) {
        wanted.sort_unstable();
        wanted.dedup();
        wanted.truncate(PERSISTENT_GRANTS_PER_QUEUE.saturating_sub(self.pages.len()));
        for batch in wanted.chunks(GRANTS_PER_MAP_BATCH) {
            if self.refusals >= MAP_REFUSALS_MAX {
                return;
            }
            if self.map_batch(grants, domid, batch).is_err() {
                self.map_singly(grants, domid, batch);
            }
        }
    }

    /// One bad reference fails a whole batch: find the good ones. A frontend that keeps sending
    /// bad ones is only copied for, so that it can't buy a failing system call per segment.
    fn map_singly<G: Grants>(&mut self, grants: &mut G, domid: DomId, batch: &[GrantRef]) {
        for gref in batch {
            if self.refusals >= MAP_REFUSALS_MAX {
                return;
            }
            if self.map_batch(grants, domid, std::slice::from_ref(gref)).is_err() {
                self.refusals += 1;
            }
        }
    }

    fn map_batch<G: Grants>(
        &mut self,
        grants: &mut G,
        domid: DomId,
        batch: &[GrantRef],
    ) -> io::Result<()> {
        let pages = grants.map(domid, batch, PageAccess::ReadWrite)?;
        for (index, gref) in batch.iter().enumerate() {
            self.pages.insert(gref.0, pages.page(index));
        }
        self.batches.push(pages);
        Ok(())
    }

    /// Unmaps everything; no request may be in flight. An error of one batch does not keep the
    /// others mapped.
    pub fn unmap_all<G: Grants>(&mut self, grants: &mut G) -> io::Result<()> {
        self.pages.clear();
        let mut result = Ok(());
        for pages in self.batches.drain(..) {
            result = result.and(grants.unmap(pages));
        }
        result
    }
}

/// A worker's bounce memory, in pages; allocated when first needed.
#[derive(Debug, Default)]
pub struct BouncePool {
    memory: Option<LocalPages>,
    free: Vec<usize>,
}

impl BouncePool {
    /// Pages that can be had now.
    #[inline]
    pub fn free(&self) -> usize {
        if self.memory.is_some() { self.free.len() } else { BOUNCE_PAGES_PER_WORKER }
    }

    /// A page, with whatever it held before: never show it to a guest unless overwritten.
    ///
    /// # Panics
    /// Where none is free; requests are taken only while there is enough for them.
    pub fn take(&mut self) -> GuestBuf {
        let memory = self.memory.get_or_insert_with(|| {
            self.free = (0..BOUNCE_PAGES_PER_WORKER).rev().collect();
            LocalPages::new(BOUNCE_PAGES_PER_WORKER)
        });
        memory.page(self.free.pop().expect("bounce pages were counted before"))
    }

    /// Gives back the page that a buffer lies in.
    pub fn give_back(&mut self, buffer: GuestBuf) {
        let memory = self.memory.as_ref().expect("a page was taken before");
        let base = memory.page(0).address().as_ptr().addr();
        let index = (buffer.address().as_ptr().addr() - base) / PAGE_BYTES;
        assert!(index < BOUNCE_PAGES_PER_WORKER && self.free.len() < BOUNCE_PAGES_PER_WORKER);
        self.free.push(index);
    }
}

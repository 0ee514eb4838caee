//! Pages that stay mapped, for frontends with persistent grants.

use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::io;

use rustc_hash::FxBuildHasher;
use slab::Slab;

use crate::budget::GrantShare;
use crate::engine::RegisterBuffers;
use crate::limits::{
    GRANTS_PER_MAP_BATCH, MAP_REFUSALS_MAX, PERSISTENT_GRANTS_PER_QUEUE, PERSISTENT_IDLE_SWEEPS,
};
use crate::units::{DomId, GrantRef};
use crate::xen::shm::{GuestBuf, GuestPages};
use crate::xen::{Grants, PageAccess};

/// A frontend's pages that stay mapped (`feature-persistent`).
///
/// They are mapped in batches, each one range of memory, and unmapped in the same batches. Their number is
/// bounded by `limits::PERSISTENT_GRANTS_PER_QUEUE` and by what the domain's other queues and the other
/// domains leave (XSA-300). Batches not used lately make room for new ones; if none can, data is copied. A
/// batch not used for `limits::PERSISTENT_IDLE_SWEEPS` sweeps is unmapped, so that the guest gets its pages
/// back.
///
/// A frontend can reuse a reference for another page only after it ended access to the first page, and it
/// can't do that while we have the page mapped. So an entry stays valid until it is unmapped.
#[derive(Debug)]
pub struct PersistentGrants {
    pages: HashMap<u32, MappedPage, FxBuildHasher>,
    batches: Slab<Batch>,
    refusals: u32,
    /// Between calls, holds as many pages as are mapped.
    share: GrantShare,
}

#[derive(Clone, Copy, Debug)]
struct MappedPage {
    buffer: GuestBuf,
    batch: usize,
}

#[derive(Debug)]
struct Batch {
    pages: GuestPages,
    refs: Vec<GrantRef>,
    /// Used since the last sweep.
    used: Cell<bool>,
    /// How many sweeps in a row found it unused.
    idle_sweeps: u32,
    /// Holds data of a request in flight; valid only during [`PersistentGrants::sweep`] and
    /// [`PersistentGrants::map`].
    busy: bool,
}

/// Maps pages that stay mapped, and registers them with the engine.
#[derive(Debug)]
pub struct Mapper<'a, G, E> {
    /// The frontend's grants.
    pub grants: &'a mut G,
    /// The engine that will read into the pages and write from them.
    pub engine: &'a mut E,
}

impl<G: Grants, E: RegisterBuffers> Mapper<'_, G, E> {
    fn map(&mut self, domid: DomId, refs: &[GrantRef]) -> io::Result<GuestPages> {
        let mut pages = self.grants.map(domid, refs, PageAccess::ReadWrite)?;
        pages.set_registration(self.engine.register(pages.whole()).ok());
        Ok(pages)
    }

    fn unmap(&mut self, pages: GuestPages) {
        if let Some(registration) = pages.registration() {
            self.engine.unregister(registration);
        }
        if let Err(error) = self.grants.unmap(pages) {
            tracing::warn!(%error, "unmapping granted pages failed");
        }
    }
}

impl PersistentGrants {
    /// Nothing is mapped yet.
    pub fn new(share: GrantShare) -> PersistentGrants {
        let (pages, batches) = Default::default();
        PersistentGrants { pages, batches, refusals: 0, share }
    }

    /// The page of a reference, if it is mapped.
    #[inline]
    pub fn page(&self, gref: u32) -> Option<GuestBuf> {
        let page = self.pages.get(&gref)?;
        if let Some(batch) = self.batches.get(page.batch) {
            batch.used.set(true);
        }
        Some(page.buffer)
    }

    /// How many pages are mapped.
    pub fn count(&self) -> usize {
        self.pages.len()
    }

    /// Maps as many of `wanted` as the bounds allow, in batches, and unmaps batches not used lately to make
    /// room. The data of the others is copied; if there is something wrong with a reference, the copy's
    /// status says so. `in_flight` are the references that requests hold.
    pub fn map<G: Grants, E: RegisterBuffers>(
        &mut self,
        mapper: &mut Mapper<'_, G, E>,
        domid: DomId,
        wanted: &mut Vec<GrantRef>,
        in_flight: impl Iterator<Item = u32>,
    ) {
        wanted.sort_unstable();
        wanted.dedup();
        if wanted.len() > self.room() {
            self.make_room(mapper, wanted.len(), in_flight);
        }
        wanted.truncate(self.room());
        wanted.truncate(self.share.take(wanted.len()));
        for batch in wanted.chunks(GRANTS_PER_MAP_BATCH) {
            if self.refusals >= MAP_REFUSALS_MAX || self.share.left_mappings() == 0 {
                break;
            }
            if self.map_batch(mapper, domid, batch).is_err() {
                self.map_singly(mapper, domid, batch);
            }
        }
        self.share.give_back(self.share.pages() - self.pages.len());
    }

    /// How many more pages can be mapped.
    fn room(&self) -> usize {
        PERSISTENT_GRANTS_PER_QUEUE.saturating_sub(self.pages.len()).min(self.share.left())
    }

    /// Unmaps idle batches, the longest idle first, until `wanted` pages fit.
    #[cold]
    fn make_room<G: Grants, E: RegisterBuffers>(
        &mut self,
        mapper: &mut Mapper<'_, G, E>,
        wanted: usize,
        in_flight: impl Iterator<Item = u32>,
    ) {
        if self.batches.is_empty() {
            return;
        }
        self.mark_busy(in_flight);
        let mut idle: Vec<usize> = self
            .batches
            .iter()
            .filter(|(_, batch)| !batch.busy && !batch.used.get())
            .map(|(index, _)| index)
            .collect();
        idle.sort_by_key(|index| Reverse(self.batches[*index].idle_sweeps));
        for index in idle {
            if wanted <= self.room() {
                return;
            }
            self.unmap_batch(mapper, index);
        }
    }

    /// Notes which batches were used since the last sweep, and unmaps those that have long been idle.
    pub fn sweep<G: Grants, E: RegisterBuffers>(
        &mut self,
        mapper: &mut Mapper<'_, G, E>,
        in_flight: impl Iterator<Item = u32>,
    ) {
        self.mark_busy(in_flight);
        let mut idle = Vec::new();
        for (index, batch) in &mut self.batches {
            if batch.used.replace(false) || batch.busy {
                batch.idle_sweeps = 0;
            } else {
                batch.idle_sweeps += 1;
            }
            if batch.idle_sweeps >= PERSISTENT_IDLE_SWEEPS {
                idle.push(index);
            }
        }
        for index in idle {
            self.unmap_batch(mapper, index);
        }
    }

    fn mark_busy(&mut self, in_flight: impl Iterator<Item = u32>) {
        self.batches.iter_mut().for_each(|(_, batch)| batch.busy = false);
        for gref in in_flight {
            if let Some(page) = self.pages.get(&gref)
                && let Some(batch) = self.batches.get_mut(page.batch)
            {
                batch.busy = true;
            }
        }
    }

    /// Maps a failed batch's references one by one, because a single bad one fails them all. If a
    /// frontend keeps sending bad ones, its data is only copied, so that it can't cause a failing system call
    /// per segment.
    fn map_singly<G: Grants, E: RegisterBuffers>(
        &mut self,
        mapper: &mut Mapper<'_, G, E>,
        domid: DomId,
        batch: &[GrantRef],
    ) {
        for gref in batch {
            if self.refusals >= MAP_REFUSALS_MAX || self.share.left_mappings() == 0 {
                return;
            }
            if self.map_batch(mapper, domid, std::slice::from_ref(gref)).is_err() {
                self.refusals += 1;
            }
        }
    }

    fn map_batch<G: Grants, E: RegisterBuffers>(
        &mut self,
        mapper: &mut Mapper<'_, G, E>,
        domid: DomId,
        refs: &[GrantRef],
    ) -> io::Result<()> {
        if !self.share.take_mappings(1) {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let pages = mapper.map(domid, refs).inspect_err(|_| self.share.give_back_mappings(1))?;
        let entry = self.batches.vacant_entry();
        for (index, gref) in refs.iter().enumerate() {
            let page = MappedPage { buffer: pages.page(index), batch: entry.key() };
            self.pages.insert(gref.0, page);
        }
        entry.insert(Batch {
            pages,
            refs: refs.to_vec(),
            used: Cell::new(true),
            idle_sweeps: 0,
            busy: false,
        });
        Ok(())
    }

    /// Unmaps a batch; no request in flight may hold a page of it.
    fn unmap_batch<G: Grants, E: RegisterBuffers>(
        &mut self,
        mapper: &mut Mapper<'_, G, E>,
        index: usize,
    ) {
        let batch = self.batches.remove(index);
        for gref in &batch.refs {
            self.pages.remove(&gref.0);
        }
        mapper.unmap(batch.pages);
        self.share.give_back(batch.refs.len());
        self.share.give_back_mappings(1);
    }

    /// Unmaps everything; no request may be in flight.
    pub fn unmap_all<G: Grants, E: RegisterBuffers>(&mut self, mapper: &mut Mapper<'_, G, E>) {
        let all: Vec<usize> = self.batches.iter().map(|(index, _)| index).collect();
        for index in all {
            self.unmap_batch(mapper, index);
        }
    }
}

#[cfg(test)]
mod test;

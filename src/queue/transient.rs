//! Pages of a frontend that may end access to them with every answer, mapped for the time of one
//! request: the data path `map`, for frontends without `feature-persistent`.
//!
//! Such a frontend may give a reference another page as soon as the answer is there, so nothing may
//! be kept: a request's pages are unmapped before its response is published. Each request has
//! ranges of its own, because gntdev unmaps a range only as a whole: in one that requests share, the
//! answer to each would have to wait for the slowest. That costs four system calls a request, the
//! admin's choice for large requests; one of fewer than `limits::SEGMENTS_MAPPED_MIN` segments is
//! copied all the same.

use super::slots::Slot;
use crate::blkif::request::{Kind, Segment};
use crate::budget::GrantShare;
use crate::limits::{
    GRANTS_PER_MAP_BATCH, MAP_REFUSALS_MAX, PERSISTENT_GRANTS_PER_QUEUE, SEGMENTS_MAPPED_MIN,
};
use crate::units::{DomId, GrantRef};
use crate::xen::{Grants, PageAccess};

/// What a queue has mapped for requests in flight.
#[derive(Debug)]
pub struct TransientGrants {
    /// As many pages as are mapped.
    share: GrantShare,
    refusals: u32,
}

impl TransientGrants {
    /// None mapped yet.
    pub fn new(share: GrantShare) -> TransientGrants {
        TransientGrants { share, refusals: 0 }
    }

    /// Pages mapped.
    pub fn count(&self) -> usize {
        self.share.pages()
    }

    /// Maps all pages of a request and points its segments at them; or none, and its data has to be
    /// copied. `wanted` is a list to be reused.
    pub fn map<G: Grants>(
        &mut self,
        grants: &mut G,
        domid: DomId,
        slot: &mut Slot,
        memory_alignment: u16,
        wanted: &mut Vec<GrantRef>,
    ) {
        let segments = slot.segments();
        let count = segments.len();
        let is_aligned = |segment: &Segment| segment.offset.is_multiple_of(memory_alignment);
        if count < SEGMENTS_MAPPED_MIN
            || self.count() + count > PERSISTENT_GRANTS_PER_QUEUE
            || self.refusals >= MAP_REFUSALS_MAX
            || !segments.iter().all(is_aligned)
            || !self.share.take_all(count, mappings(count))
        {
            return;
        }
        wanted.clear();
        wanted.extend(segments.iter().map(|segment| segment.grant()));
        // A frontend grants what it wants written for reading only.
        let access = match slot.request.kind {
            Kind::Read => PageAccess::ReadWrite,
            _ => PageAccess::ReadOnly,
        };
        for batch in wanted.chunks(GRANTS_PER_MAP_BATCH) {
            match grants.map(domid, batch, access) {
                Ok(pages) => slot.mapped.push(pages),
                Err(_) => {
                    self.refusals += 1;
                    return self.unmap(grants, slot);
                }
            }
        }
        slot.point_at_mapped();
    }

    /// Unmaps what is mapped for a request, which storage must be done with.
    #[inline]
    pub fn release<G: Grants>(&mut self, grants: &mut G, slot: &mut Slot) {
        if !slot.mapped.is_empty() {
            self.unmap(grants, slot);
        }
    }

    /// Gives back all that was taken for a request, even where only some of it was mapped.
    fn unmap<G: Grants>(&mut self, grants: &mut G, slot: &mut Slot) {
        for pages in slot.mapped.drain(..) {
            if let Err(error) = grants.unmap(pages) {
                // That is a host's fault, and no more of this queue are mapped that could share it.
                self.refusals = MAP_REFUSALS_MAX;
                tracing::warn!(%error, "unmapping a request's pages failed: the others are copied");
            }
        }
        let count = slot.segments().len();
        self.share.give_back(count);
        self.share.give_back_mappings(mappings(count));
    }
}

/// How many mappings `pages` pages take.
fn mappings(pages: usize) -> usize {
    pages.div_ceil(GRANTS_PER_MAP_BATCH)
}

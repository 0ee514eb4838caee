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
use crate::limits::{
    GRANTS_PER_MAP_BATCH, MAP_REFUSALS_MAX, PERSISTENT_GRANTS_PER_QUEUE, SEGMENTS_MAPPED_MIN,
};
use crate::units::{DomId, GrantRef};
use crate::xen::{Grants, PageAccess};

/// What a queue has mapped for requests in flight.
#[derive(Debug, Default)]
pub struct TransientGrants {
    count: usize,
    refusals: u32,
}

impl TransientGrants {
    /// Pages mapped.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Maps all pages of a request and points its segments at them; `false`: none is mapped, and its
    /// data has to be copied. `wanted` is a list to be reused.
    pub fn map<G: Grants>(
        &mut self,
        grants: &mut G,
        domid: DomId,
        slot: &mut Slot,
        memory_alignment: u16,
        wanted: &mut Vec<GrantRef>,
    ) -> bool {
        let segments = slot.segments();
        let aligned = |segment: &Segment| segment.offset.is_multiple_of(memory_alignment);
        if segments.len() < SEGMENTS_MAPPED_MIN
            || self.count + segments.len() > PERSISTENT_GRANTS_PER_QUEUE
            || self.refusals >= MAP_REFUSALS_MAX
            || !segments.iter().all(aligned)
        {
            return false;
        }
        wanted.clear();
        wanted.extend(segments.iter().map(|segment| segment.grant()));
        // A frontend grants what it wants written for reading only.
        let access = match slot.request.kind {
            Kind::Read => PageAccess::ReadWrite,
            _ => PageAccess::ReadOnly,
        };
        for batch in wanted.chunks(GRANTS_PER_MAP_BATCH) {
            let Ok(pages) = grants.map(domid, batch, access) else {
                self.refusals += 1;
                self.unmap(grants, slot);
                return false;
            };
            self.count += pages.count();
            slot.mapped.push(pages);
        }
        slot.point_at_mapped();
        true
    }

    /// Unmaps what is mapped for a request, which storage must be done with.
    #[inline]
    pub fn unmap<G: Grants>(&mut self, grants: &mut G, slot: &mut Slot) {
        for pages in slot.mapped.drain(..) {
            self.count -= pages.count();
            if let Err(error) = grants.unmap(pages) {
                tracing::warn!(%error, "unmapping a request's pages failed");
            }
        }
    }
}

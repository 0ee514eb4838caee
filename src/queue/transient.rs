//! Pages mapped for the duration of one request: the data path `map`, for frontends without
//! `feature-persistent`.
//!
//! Such a frontend may end access to a page and reuse its reference for another page as soon as the request
//! is answered. So nothing stays mapped: a request's pages are unmapped before its response is published.
//! Each request has its own ranges, because gntdev unmaps only whole ranges: if requests shared one, every
//! answer would wait for the slowest. This costs four system calls per request and is the admin's choice,
//! for large requests; a request of fewer than `limits::SEGMENTS_MAPPED_MIN` segments is still copied.

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
    /// Holds as many pages as are mapped.
    share: GrantShare,
    refusals: u32,
}

impl TransientGrants {
    /// Nothing is mapped yet.
    pub fn new(share: GrantShare) -> TransientGrants {
        TransientGrants { share, refusals: 0 }
    }

    /// How many pages are mapped.
    pub fn count(&self) -> usize {
        self.share.pages()
    }

    /// Maps all pages of a request and points its segments at them, or maps none if its data is to be
    /// copied. `wanted` is a list to reuse.
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
        // A frontend grants the pages of a write read-only.
        let access = match slot.request.kind {
            Kind::Read => PageAccess::ReadWrite,
            _ => PageAccess::ReadOnly,
        };
        for batch in wanted.chunks(GRANTS_PER_MAP_BATCH) {
            match grants.map(domid, batch, access) {
                Ok(pages) => slot.own_pages.push(pages),
                Err(_) => {
                    self.refusals += 1;
                    return self.unmap(grants, slot);
                }
            }
        }
        slot.point_at_own_pages();
    }

    /// Unmaps a request's pages; storage must be done with them.
    #[inline]
    pub fn release<G: Grants>(&mut self, grants: &mut G, slot: &mut Slot) {
        if !slot.own_pages.is_empty() {
            self.unmap(grants, slot);
        }
    }

    /// Unmaps a request's pages and gives back all of its share, even if only some of them were mapped.
    fn unmap<G: Grants>(&mut self, grants: &mut G, slot: &mut Slot) {
        for pages in slot.own_pages.drain(..) {
            if let Err(error) = grants.unmap(pages) {
                // The host is at fault: map no more for this queue, because that might fail, too.
                self.refusals = MAP_REFUSALS_MAX;
                tracing::warn!(
                    %error,
                    "unmapping a request's pages failed; data of its ring is copied from now on"
                );
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

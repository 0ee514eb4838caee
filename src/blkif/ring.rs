//! The shared ring, seen from either end: indices, publication, notification.
//!
//! Mirrors Xen's `public/io/ring.h`. The first page starts with `req_prod`, `req_event`,
//! `rsp_prod`, `rsp_event`; entries follow from byte 64. Indices run freely modulo 2^32; the
//! entry of an index is that index modulo the ring's size, a power of two. A response takes the entry of a
//! request that was consumed before.

use std::sync::atomic::Ordering;

use crate::blkif::Protocol;
use crate::xen::shm::{SharedPage, full_fence};

use super::codec::{
    Loaded, RawDirect, RawRequest, RawResponse, load_request, load_request_into, load_response,
    store_request, store_response,
};

const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 4;
const RSP_PROD: usize = 8;
const RSP_EVENT: usize = 12;
const ENTRIES: usize = 64;

/// How many entries ahead of the one being taken to prefetch.
const PREFETCH_DISTANCE: u32 = 4;

/// The frontend broke the ring itself. Its disk is closed; nobody else is affected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// More requests than the ring has entries (`RING_REQUEST_PROD_OVERFLOW`).
    #[error(
        "the frontend's req_prod {req_prod} is more than {size} entries ahead of rsp_prod {rsp_prod}"
    )]
    Overflow {
        /// What the frontend published.
        req_prod: u32,
        /// The index of the backend's next response.
        rsp_prod: u32,
        /// The number of entries of the ring.
        size: u32,
    },
}

/// The number of entries of a ring: as many as fit after the header, rounded down to a power of two.
pub const fn ring_entries(ring_bytes: usize, protocol: Protocol) -> u32 {
    let fit = (ring_bytes - ENTRIES) / protocol.entry_bytes();
    assert!(fit > 0 && fit <= 1 << 20);
    #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
    let fit = fit as u32;
    1 << fit.ilog2()
}

#[derive(Debug)]
struct Ring {
    page: SharedPage,
    protocol: Protocol,
    entry_bytes: usize,
    size: u32,
}

impl Ring {
    fn new(page: SharedPage, protocol: Protocol) -> Ring {
        let size = ring_entries(page.len(), protocol);
        Ring { page, protocol, entry_bytes: protocol.entry_bytes(), size }
    }

    #[inline]
    fn entry(&self, index: u32) -> usize {
        ENTRIES + (index & (self.size - 1)) as usize * self.entry_bytes
    }

    #[inline]
    fn load(&self, word: usize) -> u32 {
        self.page.atomic(word).load(Ordering::Acquire)
    }

    #[inline]
    fn store(&self, word: usize, value: u32) {
        self.page.atomic(word).store(value, Ordering::Release);
    }

    /// Publishes a producer index and says whether the other end asked to be notified of it: its
    /// event index lies in the range just published.
    #[inline]
    fn publish(&self, producer: usize, event: usize, old: u32, new: u32) -> bool {
        self.store(producer, new);
        full_fence();
        new.wrapping_sub(self.load(event)) < new.wrapping_sub(old)
    }
}

/// The backend's end of a ring.
#[derive(Debug)]
pub struct BackRing {
    ring: Ring,
    req_cons: u32,
    rsp_prod: u32,
    rsp_published: u32,
}

impl BackRing {
    /// Attaches to a ring at its current `rsp_prod` (`BACK_RING_ATTACH`), which is 0 on a new ring and may be
    /// anything on one that another daemon served before. The backend never initialises the shared page.
    pub fn attach(
        page: SharedPage,
        protocol: Protocol,
    ) -> Result<BackRing, (RingFault, SharedPage)> {
        let ring = Ring::new(page, protocol);
        let rsp_prod = ring.load(RSP_PROD);
        let ring = BackRing { ring, req_cons: rsp_prod, rsp_prod, rsp_published: rsp_prod };
        match ring.requests() {
            Ok(_) => Ok(ring),
            Err(fault) => Err((fault, ring.ring.page)),
        }
    }

    /// How many requests wait to be taken: at most the ring's size.
    #[inline]
    pub fn requests(&self) -> Result<u32, RingFault> {
        let req_prod = self.ring.load(REQ_PROD);
        if req_prod.wrapping_sub(self.rsp_prod) > self.ring.size {
            return Err(RingFault::Overflow {
                req_prod,
                rsp_prod: self.rsp_prod,
                size: self.ring.size,
            });
        }
        let waiting = req_prod.wrapping_sub(self.req_cons);
        // The frontend took requests back, so there are none to take.
        Ok(if waiting > self.ring.size { 0 } else { waiting })
    }

    /// Prefetches a request that will be taken soon, because its cache lines must come from the frontend's
    /// core, which wrote them.
    #[inline]
    pub fn prefetch(&self) {
        let at = self.ring.entry(self.req_cons.wrapping_add(PREFETCH_DISTANCE));
        self.ring.page.prefetch(at);
        // The end of a request with one segment, which may be in the next cache line.
        self.ring.page.prefetch(at + 31);
    }

    /// Takes the next request; call at most as often as [`BackRing::requests`] said.
    pub fn take(&mut self) -> RawRequest {
        let at = self.consume();
        load_request(&self.ring.page, at, self.ring.protocol)
    }

    /// As [`BackRing::take`], with a direct request put into `direct` ([`load_request_into`]).
    #[inline(always)]
    pub fn take_into(&mut self, direct: &mut RawDirect) -> Loaded {
        let at = self.consume();
        load_request_into(&self.ring.page, at, self.ring.protocol, direct)
    }

    /// Consumes the next request; returns where its entry is.
    #[inline(always)]
    fn consume(&mut self) -> usize {
        assert!(self.in_flight() < self.ring.size);
        let at = self.ring.entry(self.req_cons);
        self.req_cons = self.req_cons.wrapping_add(1);
        at
    }

    /// Requests taken and not yet answered.
    #[inline]
    pub fn in_flight(&self) -> u32 {
        self.req_cons.wrapping_sub(self.rsp_prod)
    }

    /// Writes a response, not yet visible to the frontend.
    #[inline]
    pub fn answer(&mut self, response: &RawResponse) {
        assert!(self.in_flight() > 0);
        let at = self.ring.entry(self.rsp_prod);
        store_response(&self.ring.page, at, self.ring.protocol, response);
        self.rsp_prod = self.rsp_prod.wrapping_add(1);
    }

    /// Responses that the frontend can't see yet.
    #[inline]
    pub fn unpublished(&self) -> u32 {
        self.rsp_prod.wrapping_sub(self.rsp_published)
    }

    /// Publishes all responses written since the last call; `true`: notify the frontend.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.unpublished() == 0 {
            return false;
        }
        let old = std::mem::replace(&mut self.rsp_published, self.rsp_prod);
        self.ring.publish(RSP_PROD, RSP_EVENT, old, self.rsp_prod)
    }

    /// Asks the frontend to notify us of its next request, then looks again (the final check of
    /// `RING_FINAL_CHECK_FOR_REQUESTS`). `true`: work has arrived in the meantime.
    pub fn arm(&mut self) -> bool {
        self.ring.store(REQ_EVENT, self.req_cons.wrapping_add(1));
        full_fence();
        !matches!(self.requests(), Ok(0))
    }

    /// Undoes [`BackRing::arm`] for a backend that polls again. Otherwise the frontend would notify it of a
    /// request that it has already taken.
    pub fn disarm(&self) {
        self.ring.store(REQ_EVENT, self.req_cons);
    }

    /// The number of entries.
    pub fn size(&self) -> u32 {
        self.ring.size
    }

    /// Gives back the memory.
    pub fn into_page(self) -> SharedPage {
        self.ring.page
    }
}

/// The frontend's end of a ring, for the stand-in's guest and the load generator.
#[derive(Debug)]
pub struct FrontRing {
    ring: Ring,
    req_prod: u32,
    req_published: u32,
    rsp_cons: u32,
}

impl FrontRing {
    /// Makes an empty ring in these pages (`SHARED_RING_INIT`, `FRONT_RING_INIT`).
    pub fn init(page: SharedPage, protocol: Protocol) -> FrontRing {
        let ring = Ring::new(page, protocol);
        ring.store(REQ_PROD, 0);
        ring.store(RSP_PROD, 0);
        ring.store(REQ_EVENT, 1);
        ring.store(RSP_EVENT, 1);
        FrontRing { ring, req_prod: 0, req_published: 0, rsp_cons: 0 }
    }

    /// How many entries are free for requests.
    #[inline]
    pub fn free(&self) -> u32 {
        self.ring.size - self.req_prod.wrapping_sub(self.rsp_cons)
    }

    /// Writes a request, not yet visible to the backend.
    ///
    /// # Panics
    /// If no entry is free.
    #[inline]
    pub fn put(&mut self, request: &RawRequest) {
        assert!(self.free() > 0);
        let at = self.ring.entry(self.req_prod);
        store_request(&self.ring.page, at, self.ring.protocol, request);
        self.req_prod = self.req_prod.wrapping_add(1);
    }

    /// Publishes all requests written since the last call; `true`: notify the backend.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.req_published == self.req_prod {
            return false;
        }
        let old = std::mem::replace(&mut self.req_published, self.req_prod);
        self.ring.publish(REQ_PROD, REQ_EVENT, old, self.req_prod)
    }

    /// How many responses wait to be taken; more than [`FrontRing::in_flight`] is the backend's fault.
    #[inline]
    pub fn responses(&self) -> u32 {
        self.ring.load(RSP_PROD).wrapping_sub(self.rsp_cons)
    }

    /// Takes the next response; call at most as often as [`FrontRing::responses`] said.
    #[inline]
    pub fn take(&mut self) -> RawResponse {
        let at = self.ring.entry(self.rsp_cons);
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        load_response(&self.ring.page, at, self.ring.protocol)
    }

    /// The next response, if one is there.
    #[inline]
    pub fn next_response(&mut self) -> Option<RawResponse> {
        (self.responses() != 0).then(|| self.take())
    }

    /// Asks the backend to notify us once `after` more responses are there (at least 1), then
    /// looks again. `true`: a response is there.
    pub fn arm(&mut self, after: u32) -> bool {
        self.ring.store(RSP_EVENT, self.rsp_cons.wrapping_add(after.max(1)));
        full_fence();
        self.ring.load(RSP_PROD) != self.rsp_cons
    }

    /// Publishes a `req_prod` of the caller's choice: for tests of hostile frontends.
    pub fn forge_req_prod(&mut self, req_prod: u32) {
        self.ring.store(REQ_PROD, req_prod);
    }

    /// The number of entries.
    pub fn size(&self) -> u32 {
        self.ring.size
    }

    /// Requests written and not yet answered.
    pub fn in_flight(&self) -> u32 {
        self.req_prod.wrapping_sub(self.rsp_cons)
    }
}

#[cfg(test)]
mod test;

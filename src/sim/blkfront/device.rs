//! The data path of a frontend: one ring, its event channel, and buffers granted to the backend.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crate::blkif::codec::{RawDirect, RawRequest, RawResponse, RawSegment};
use crate::blkif::op;
use crate::blkif::ring::FrontRing;
use crate::limits::SEGMENTS_PER_REQUEST;
use crate::msg::Protocol;
use crate::park;
use crate::sim::domain::StillMapped;
use crate::sim::events::SimEvents;
use crate::sim::{Domain, Gfn};
use crate::units::{DomId, GrantRef, Port, SECTOR_BYTES};
use crate::xen::shm::{GuestBuf, PAGE_BYTES};
use crate::xen::{Events, PageAccess};

/// Bytes that a request of the largest size moves.
pub const REQUEST_BYTES_MAX: usize = SEGMENTS_PER_REQUEST * PAGE_BYTES;

/// What a frontend chooses.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The backend's domain.
    pub backend: DomId,
    /// Layout of its ring entries.
    pub protocol: Protocol,
    /// Its buffers are granted once and stay granted; otherwise for each request.
    pub persistent: bool,
    /// Buffers, each for one request of up to [`REQUEST_BYTES_MAX`]; requests in flight at most.
    pub buffers: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options { backend: DomId::DOM0, protocol: Protocol::X86_64, persistent: true, buffers: 32 }
    }
}

/// The frontend's end of one ring.
#[derive(Debug)]
pub struct Device {
    domain: Arc<Domain>,
    options: Options,
    ring: FrontRing,
    ring_page: Gfn,
    ring_ref: GrantRef,
    events: SimEvents,
    port: Port,
    buffers: Vec<Buffer>,
    free: Vec<usize>,
}

/// Pages for the data of one request.
#[derive(Debug)]
struct Buffer {
    first: Gfn,
    refs: Vec<GrantRef>,
    /// Pages of the request in flight, if one is.
    in_flight: Option<usize>,
}

/// A request that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The buffer it used.
    pub buffer: usize,
    /// `BLKIF_RSP_*`.
    pub status: i16,
}

impl Device {
    /// Makes an empty ring, an event channel for the backend to bind to, and the buffers.
    pub fn new(domain: Arc<Domain>, options: Options) -> io::Result<Device> {
        let mut events = domain.open_events()?;
        let port = events.alloc_unbound(options.backend)?;
        let ring_page = domain.alloc_pages(1)?;
        let ring_ref = domain.grant(ring_page, options.backend, PageAccess::ReadWrite)?;
        let ring = FrontRing::init(domain.shared_pages(ring_page, 1), options.protocol);
        let buffers = (0..options.buffers)
            .map(|_| Buffer::new(&domain, &options))
            .collect::<io::Result<Vec<_>>>()?;
        let free = (0..buffers.len()).rev().collect();
        Ok(Device { domain, options, ring, ring_page, ring_ref, events, port, buffers, free })
    }

    /// What `ring-ref` says.
    pub fn ring_ref(&self) -> GrantRef {
        self.ring_ref
    }

    /// What `event-channel` says.
    pub fn port(&self) -> Port {
        self.port
    }

    /// What it was made with.
    pub fn options(&self) -> Options {
        self.options
    }

    /// The page that the ring is in, for tests of hostile frontends.
    pub fn ring_page(&self) -> Gfn {
        self.ring_page
    }

    /// Notifies the backend whether it asked or not, for tests of hostile frontends.
    pub fn notify(&self) -> io::Result<()> {
        self.events.notify(self.port)
    }

    /// The ring itself, for tests of hostile frontends.
    pub fn ring_mut(&mut self) -> &mut FrontRing {
        &mut self.ring
    }

    /// Its domain.
    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    /// Requests on their way.
    pub fn in_flight(&self) -> usize {
        self.buffers.len() - self.free.len()
    }

    /// A buffer for a request; `None` while all are in use or the ring is full.
    pub fn free_buffer(&self) -> Option<usize> {
        self.free.last().copied().filter(|_| self.ring.free() > 0)
    }

    /// Puts data into a buffer, from its start.
    pub fn fill(&self, buffer: usize, data: &[u8]) {
        for (page, part) in self.pages(buffer).zip(data.chunks(PAGE_BYTES)) {
            page.copy_from(part);
        }
    }

    /// Takes data out of a buffer, from its start.
    pub fn drain(&self, buffer: usize, data: &mut [u8]) {
        for (page, part) in self.pages(buffer).zip(data.chunks_mut(PAGE_BYTES)) {
            page.copy_to(part);
        }
    }

    fn pages(&self, buffer: usize) -> impl Iterator<Item = GuestBuf> + '_ {
        let first = self.buffers[buffer].first.0;
        (first..).take(SEGMENTS_PER_REQUEST).map(|gfn| self.domain.page(Gfn(gfn)))
    }

    /// Writes a request for the first `len` bytes (whole sectors; 0: none) of the buffer that
    /// [`Device::free_buffer`] named. [`Device::publish`] makes it visible.
    pub fn put(&mut self, operation: u8, sector: u64, len: usize) -> usize {
        let index = self.free.pop().expect("a free buffer");
        let mut request = RawDirect::new(operation, index as u64, sector);
        let count = len.div_ceil(PAGE_BYTES);
        request.nr_segments = u8::try_from(count).expect("at most a request's segments");
        let access = match operation {
            op::READ => PageAccess::ReadWrite,
            _ => PageAccess::ReadOnly,
        };
        let buffer = &mut self.buffers[index];
        let segments = request.segments.iter_mut().zip(&buffer.refs).take(count);
        for (page, (segment, gref)) in segments.enumerate() {
            let bytes = (len - page * PAGE_BYTES).min(PAGE_BYTES);
            let sectors = u8::try_from(bytes as u64 / SECTOR_BYTES).expect("at most 8 in a page");
            *segment = RawSegment { gref: gref.0, first: 0, last: sectors - 1 };
            if !self.options.persistent {
                let gfn = Gfn(buffer.first.0 + index_of(page));
                self.domain.permit(*gref, gfn, self.options.backend, access);
            }
        }
        buffer.in_flight = Some(count);
        self.ring.put(&RawRequest::Direct(request));
        index
    }

    /// Writes any request at all, for tests of hostile frontends; its answers are not expected by
    /// [`Device::next_answer`].
    pub fn put_raw(&mut self, request: impl Into<RawRequest>) {
        self.ring.put(&request.into());
    }

    /// Makes the requests written visible, and notifies the backend if it asked.
    pub fn publish(&mut self) -> io::Result<()> {
        if self.ring.publish() { self.events.notify(self.port) } else { Ok(()) }
    }

    /// The next response as it stands on the ring.
    pub fn next_response(&mut self) -> Option<RawResponse> {
        self.ring.next_response()
    }

    /// The next request that came back. An error is the backend's: an unknown id, or a page that
    /// it keeps although it must not.
    pub fn next_answer(&mut self) -> Result<Option<Answer>, BackendFault> {
        let Some(response) = self.ring.next_response() else { return Ok(None) };
        let index = usize::try_from(response.id).unwrap_or(usize::MAX);
        let Some((buffer, pages)) = self
            .buffers
            .get_mut(index)
            .and_then(|buffer| buffer.in_flight.take().map(|pages| (buffer, pages)))
        else {
            return Err(BackendFault::UnknownId(response.id));
        };
        if !self.options.persistent {
            for gref in buffer.refs.iter().take(pages) {
                self.domain.withdraw(*gref)?;
            }
        }
        self.free.push(index);
        Ok(Some(Answer { buffer: index, status: response.status }))
    }

    /// Waits until a response is there or `timeout` is over.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        if self.ring.arm(1) {
            return Ok(());
        }
        park::sleep(&[self.events.as_fd()], Some(timeout));
        let mut ports = [Port(0); 4];
        let count = self.events.pending(&mut ports)?;
        self.events.unmask(&ports[..count])
    }

    /// Takes everything back from the backend; an error names a page that it still has mapped.
    pub fn close(mut self) -> Result<(), StillMapped> {
        // Closing a channel fails only where the hypervisor is gone, and then it is closed.
        let _ = self.events.unbind(self.port);
        self.domain.end_access(self.ring_ref)?;
        self.domain.free_pages(self.ring_page, 1);
        for buffer in self.buffers.drain(..) {
            buffer.free(&self.domain)?;
        }
        Ok(())
    }
}

/// What only a faulty backend does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackendFault {
    /// A response to no request in flight.
    #[error("a response with the id {0:#x}, which is not in flight")]
    UnknownId(u64),
    /// A page still mapped after its request was answered.
    #[error(transparent)]
    StillMapped(#[from] StillMapped),
}

impl Buffer {
    fn new(domain: &Domain, options: &Options) -> io::Result<Buffer> {
        let first = domain.alloc_pages(index_of(SEGMENTS_PER_REQUEST))?;
        let refs = domain.reserve_refs(SEGMENTS_PER_REQUEST)?;
        if options.persistent {
            for (gfn, gref) in (first.0..).zip(&refs) {
                domain.permit(*gref, Gfn(gfn), options.backend, PageAccess::ReadWrite);
            }
        }
        Ok(Buffer { first, refs, in_flight: None })
    }

    fn free(self, domain: &Domain) -> Result<(), StillMapped> {
        for gref in &self.refs {
            domain.end_access(*gref)?;
        }
        domain.free_pages(self.first, index_of(SEGMENTS_PER_REQUEST));
        Ok(())
    }
}

fn index_of(page: usize) -> u32 {
    u32::try_from(page).expect("a page of one request")
}

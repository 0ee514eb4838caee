//! The data path of a frontend: one ring, its event channel, and buffers granted to the backend.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crate::blkif::codec::{
    RawDirect, RawIndirect, RawRequest, RawResponse, RawSegment, SEGMENT_BYTES,
};
use crate::blkif::op;
use crate::blkif::ring::FrontRing;
use crate::limits::{INDIRECT_PAGES_PER_REQUEST, SEGMENTS_PER_INDIRECT_PAGE, SEGMENTS_PER_REQUEST};
use crate::msg::Protocol;
use crate::park;
use crate::sim::domain::StillMapped;
use crate::sim::events::SimEvents;
use crate::sim::{Domain, Gfn};
use crate::units::{DomId, GrantRef, Port, SECTOR_BYTES};
use crate::xen::shm::{GuestBuf, PAGE_BYTES};
use crate::xen::{Events, PageAccess};

/// What a frontend chooses.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The backend's domain.
    pub backend: DomId,
    /// Layout of its ring entries.
    pub protocol: Protocol,
    /// Its buffers are granted once and stay granted; otherwise for each request.
    pub persistent: bool,
    /// With `persistent`: with an answer it takes back what the backend has not mapped, and gives
    /// the reference another page later, as Linux does.
    pub ends_unmapped: bool,
    /// Buffers, each for one request of `segments` pages; requests in flight at most.
    pub buffers: usize,
    /// log2 of the ring in pages.
    pub ring_order: u32,
    /// Segments of a request at most. A request of more than [`SEGMENTS_PER_REQUEST`] is indirect.
    pub segments: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            backend: DomId::DOM0,
            protocol: Protocol::X86_64,
            persistent: true,
            ends_unmapped: false,
            buffers: 32,
            ring_order: 0,
            segments: SEGMENTS_PER_REQUEST,
        }
    }
}

impl Options {
    /// Bytes that a request moves at most.
    pub fn request_bytes_max(&self) -> usize {
        self.segments * PAGE_BYTES
    }

    /// Pages of the ring.
    fn ring_pages(&self) -> u32 {
        1 << self.ring_order
    }

    /// Pages for the segments of an indirect request.
    fn segment_pages(&self) -> usize {
        match self.segments {
            ..=SEGMENTS_PER_REQUEST => 0,
            segments => segments.div_ceil(SEGMENTS_PER_INDIRECT_PAGE),
        }
    }

    /// Pages of one buffer that are granted.
    fn buffer_pages(&self) -> usize {
        self.segments + self.segment_pages()
    }

    /// Whether a buffer has a page to give to a reference that it took back.
    fn has_spares(&self) -> bool {
        self.persistent && self.ends_unmapped
    }

    /// Pages of the domain that a device takes.
    pub fn device_pages(&self) -> usize {
        let pages = self.buffer_pages() + usize::from(self.has_spares());
        self.ring_pages() as usize + self.buffers * pages
    }
}

/// The frontend's end of one ring.
#[derive(Debug)]
pub struct Device {
    domain: Arc<Domain>,
    options: Options,
    ring: FrontRing,
    ring_page: Gfn,
    ring_refs: Vec<GrantRef>,
    events: SimEvents,
    port: Port,
    buffers: Vec<Buffer>,
    free: Vec<usize>,
    /// The buffer of the last answer.
    answered: Option<usize>,
    /// Reused by [`Device::put`].
    segments: Vec<RawSegment>,
}

/// Pages for one request: those of its data, then those of its segments if it is an indirect one.
#[derive(Debug)]
struct Buffer {
    first: Gfn,
    /// The page of each reference, and the spare one.
    pages: Vec<Gfn>,
    refs: Vec<GrantRef>,
    /// References that were taken back.
    ended: Vec<usize>,
    in_flight: bool,
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
        let ring_page = domain.alloc_pages(options.ring_pages())?;
        let ring_refs = (ring_page.0..)
            .take(1 << options.ring_order)
            .map(|gfn| domain.grant(Gfn(gfn), options.backend, PageAccess::ReadWrite))
            .collect::<io::Result<Vec<_>>>()?;
        let ring_memory = domain.shared_pages(ring_page, options.ring_pages());
        let ring = FrontRing::init(ring_memory, options.protocol);
        let buffers = (0..options.buffers)
            .map(|_| Buffer::new(&domain, &options))
            .collect::<io::Result<Vec<_>>>()?;
        let free = (0..buffers.len()).rev().collect();
        let segments = Vec::new();
        Ok(Device {
            domain,
            options,
            ring,
            ring_page,
            ring_refs,
            events,
            port,
            buffers,
            free,
            answered: None,
            segments,
        })
    }

    /// What `ring-ref` says of a one-page ring.
    pub fn ring_ref(&self) -> GrantRef {
        self.ring_refs[0]
    }

    /// What `ring-ref0` and the following say of a larger one.
    pub fn ring_refs(&self) -> &[GrantRef] {
        &self.ring_refs
    }

    /// What `event-channel` says.
    pub fn port(&self) -> Port {
        self.port
    }

    /// What it was made with.
    pub fn options(&self) -> Options {
        self.options
    }

    /// The first page that the ring is in, for tests of hostile frontends.
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
        for (page, part) in data.chunks(PAGE_BYTES).enumerate() {
            self.page(buffer, page).copy_from(part);
        }
    }

    /// Takes data out of a buffer, from its start.
    pub fn drain(&self, buffer: usize, data: &mut [u8]) {
        for (page, part) in data.chunks_mut(PAGE_BYTES).enumerate() {
            self.page(buffer, page).copy_to(part);
        }
    }

    /// A page of a buffer.
    pub fn page(&self, buffer: usize, page: usize) -> GuestBuf {
        self.domain.page(self.buffers[buffer].gfn(page))
    }

    /// A segment of sectors `first` to `last` of a page of a buffer.
    pub fn segment(&self, buffer: usize, page: usize, first: u8, last: u8) -> RawSegment {
        RawSegment { gref: self.buffers[buffer].refs[page].0, first, last }
    }

    /// Writes a request for the first `len` bytes (whole sectors; 0: none) of the buffer that
    /// [`Device::free_buffer`] named. [`Device::publish`] makes it visible.
    pub fn put(&mut self, operation: u8, sector: u64, len: usize) -> usize {
        let buffer = self.free_buffer().expect("a free buffer");
        let mut segments = std::mem::take(&mut self.segments);
        segments.clear();
        segments.extend((0..len.div_ceil(PAGE_BYTES)).map(|page| {
            let bytes = (len - page * PAGE_BYTES).min(PAGE_BYTES);
            let sectors = u8::try_from(bytes as u64 / SECTOR_BYTES).expect("at most 8 in a page");
            self.segment(buffer, page, 0, sectors - 1)
        }));
        let request = match segments.len() {
            ..=SEGMENTS_PER_REQUEST => self.direct(operation, sector, &segments).into(),
            _ => self.indirect(operation, sector, &segments).into(),
        };
        self.put_request(&request, segments.len());
        self.segments = segments;
        buffer
    }

    /// A request in its entry, for [`Device::put_request`].
    pub fn direct(&self, operation: u8, sector: u64, segments: &[RawSegment]) -> RawDirect {
        let mut request = RawDirect::new(operation, self.next_id(), sector);
        request.nr_segments = u8::try_from(segments.len()).expect("at most a request's segments");
        request.segments[..segments.len()].copy_from_slice(segments);
        request
    }

    /// A request whose segments are in pages of its buffer now, for [`Device::put_request`].
    pub fn indirect(&self, operation: u8, sector: u64, segments: &[RawSegment]) -> RawIndirect {
        let id = self.next_id();
        let buffer = self.free_buffer().expect("a free buffer");
        let mut pages = [0; INDIRECT_PAGES_PER_REQUEST];
        let places = pages.iter_mut().zip(self.options.segments..);
        for (part, (gref, page)) in segments.chunks(SEGMENTS_PER_INDIRECT_PAGE).zip(places) {
            *gref = self.buffers[buffer].refs[page].0;
            let memory = self.page(buffer, page);
            for (segment, at) in part.iter().zip((0..).step_by(SEGMENT_BYTES)) {
                let place = memory.part(at, 8).expect("512 segments in a page");
                place.copy_from(&segment.to_word().to_le_bytes());
            }
        }
        let nr_segments = u16::try_from(segments.len()).expect("at most 8 pages of segments");
        RawIndirect { operation, nr_segments, id, sector, handle: 0, pages }
    }

    /// The id of the next request: the buffer it uses.
    fn next_id(&self) -> u64 {
        self.free_buffer().expect("a free buffer") as u64
    }

    /// Writes a request that [`Device::direct`] or [`Device::indirect`] made, however it was
    /// changed since, with the first `pages` pages of its buffer; returns the buffer.
    pub fn put_request(&mut self, request: &RawRequest, pages: usize) -> usize {
        let index = self.free.pop().expect("a free buffer");
        assert_eq!(request.id(), index as u64, "a request of this buffer");
        if !self.options.persistent {
            let data = match request.operation() {
                op::READ => PageAccess::ReadWrite,
                _ => PageAccess::ReadOnly,
            };
            let grants = (0..pages).map(|page| (page, data));
            let segment_pages = self.options.segments..self.options.buffer_pages();
            let all = grants.chain(segment_pages.map(|page| (page, PageAccess::ReadOnly)));
            let buffer = &self.buffers[index];
            for (page, access) in all {
                let (gref, gfn) = (buffer.refs[page], buffer.gfn(page));
                self.domain.permit(gref, gfn, self.options.backend, access);
            }
        }
        let buffer = &mut self.buffers[index];
        for page in buffer.ended.drain(..) {
            let (gref, gfn) = (buffer.refs[page], buffer.pages[page]);
            self.domain.permit(gref, gfn, self.options.backend, PageAccess::ReadWrite);
        }
        buffer.in_flight = true;
        self.ring.put(request);
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
        self.replace_ended();
        let Some(response) = self.ring.next_response() else { return Ok(None) };
        let index = usize::try_from(response.id).unwrap_or(usize::MAX);
        let buffer = self.buffers.get_mut(index).filter(|buffer| buffer.in_flight);
        let Some(buffer) = buffer else { return Err(BackendFault::UnknownId(response.id)) };
        buffer.in_flight = false;
        if !self.options.persistent {
            for gref in &buffer.refs {
                self.domain.withdraw(*gref)?;
            }
        }
        if self.options.has_spares() {
            let withdrawn = |page: &usize| self.domain.withdraw(buffer.refs[*page]).is_ok();
            buffer.ended.extend((0..buffer.refs.len()).filter(withdrawn));
            self.answered = Some(index);
        }
        self.free.push(index);
        Ok(Some(Answer { buffer: index, status: response.status }))
    }

    /// Gives other pages to the references that were taken back with the last answer: now that
    /// its data has been looked at, and unless the buffer has been put to use meanwhile.
    fn replace_ended(&mut self) {
        let Some(index) = self.answered.take() else { return };
        let Buffer { pages, ended, in_flight, .. } = &mut self.buffers[index];
        if !*in_flight && let Some(spare) = pages.len().checked_sub(1) {
            ended.iter().for_each(|page| pages.swap(*page, spare));
        }
    }

    /// Waits until a response is there or `timeout` is over.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        if self.ring.arm(1) {
            return Ok(());
        }
        park::sleep(&[self.events.as_fd()], Some(timeout));
        self.take_events()
    }

    /// Asks to be notified of the next response, and lets the next notification come; without waiting.
    pub fn arm(&mut self) -> io::Result<()> {
        self.ring.arm(1);
        self.take_events()
    }

    fn take_events(&mut self) -> io::Result<()> {
        let mut ports = [Port(0); 4];
        let count = self.events.pending(&mut ports)?;
        self.events.unmask(&ports[..count])
    }

    /// Takes everything back from the backend; an error names a page that it still has mapped.
    pub fn close(mut self) -> Result<(), StillMapped> {
        // Closing a channel fails only if the hypervisor is gone, and then it is closed.
        let _ = self.events.unbind(self.port);
        self.ring_refs.iter().try_for_each(|gref| self.domain.end_access(*gref))?;
        self.domain.free_pages(self.ring_page, self.options.ring_pages());
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
        let refs = domain.reserve_refs(options.buffer_pages())?;
        let count = count_u32(refs.len() + usize::from(options.has_spares()));
        let first = domain.alloc_pages(count)?;
        let pages: Vec<Gfn> = (first.0..first.0 + count).map(Gfn).collect();
        if options.persistent {
            for (gfn, gref) in pages.iter().zip(&refs) {
                domain.permit(*gref, *gfn, options.backend, PageAccess::ReadWrite);
            }
        }
        Ok(Buffer { first, pages, refs, ended: Vec::new(), in_flight: false })
    }

    fn gfn(&self, page: usize) -> Gfn {
        self.pages[page]
    }

    fn free(self, domain: &Domain) -> Result<(), StillMapped> {
        for gref in &self.refs {
            domain.end_access(*gref)?;
        }
        domain.free_pages(self.first, count_u32(self.pages.len()));
        Ok(())
    }
}

fn count_u32(pages: usize) -> u32 {
    u32::try_from(pages).expect("pages of one domain")
}

//! One ring with its event channel, and one prepared request for each slot.
//!
//! A request's segments never change: its pages are granted once and always hold the same data. So
//! starting a request only sets its operation and sector and copies it onto the ring. A frontend without
//! persistent grants grants its pages in the same way and just does not announce the feature: granting
//! them again for each request would only cost the guest time, and make no difference to the backend.

use polldisk::blkif::codec::{
    RawDirect, RawDiscard, RawIndirect, RawRequest, RawResponse, RawSegment, SEGMENT_BYTES,
};
use polldisk::blkif::op;
use polldisk::blkif::ring::FrontRing;
use polldisk::limits::{
    INDIRECT_PAGES_PER_REQUEST, SEGMENTS_PER_INDIRECT_PAGE, SEGMENTS_PER_REQUEST,
};
use polldisk::sim::blkfront::device::Options;
use polldisk::sim::blkfront::xenbus::Published;
use polldisk::units::{GrantRef, Port, SECTOR_BYTES};
use polldisk::xen::Events;
use polldisk::xen::shm::{PAGE_BYTES, SharedPage};

use crate::kernel::{Granted, Kernel};

/// The frontend's end of one ring, and its requests.
#[derive(Debug)]
pub struct Queue<E> {
    ring: FrontRing,
    ring_refs: Vec<GrantRef>,
    events: E,
    port: Port,
    slots: Vec<Slot>,
    /// Slots without a request in flight.
    free: Vec<u16>,
}

/// What a request is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reads a block, by an indirect request if the block is too large for a direct one.
    Read,
    /// Writes a block, in the same way.
    Write,
    /// Reads a block by an indirect request, even if the block is small.
    ReadIndirect,
    /// Writes a block by an indirect request, even if the block is small.
    WriteIndirect,
    /// Makes earlier writes durable.
    Flush,
    /// Gives a block back to storage.
    Discard,
}

impl Operation {
    /// Whether the operation needs an indirect request for a block.
    pub fn is_indirect(self, block_bytes: usize) -> bool {
        match self {
            Operation::Read | Operation::Write => block_bytes > SEGMENTS_PER_REQUEST * PAGE_BYTES,
            Operation::ReadIndirect | Operation::WriteIndirect => true,
            Operation::Flush | Operation::Discard => false,
        }
    }
}

#[derive(Debug)]
struct Slot {
    request: RawRequest,
    /// `None` if it is not in flight.
    started: Option<Started>,
}

/// What the queue remembers of a request in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    /// When it started, or was due.
    pub at_ns: u64,
    /// Whether it is a read; otherwise a write.
    pub is_read: bool,
}

/// A request that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What the queue remembered of it.
    pub started: Started,
    /// `BLKIF_RSP_*`.
    pub status: i16,
    /// Its first sector, for the text of an error.
    pub sector: u64,
}

/// A fault that only a broken backend has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackendFault {
    /// A response to a request that is not in flight.
    #[error("the backend answered a request with the id {0:#x}, which is not in flight")]
    UnknownId(u64),
    /// More responses than requests.
    #[error("the backend published {responses} responses to {in_flight} requests")]
    Overflow {
        /// Published and not yet taken.
        responses: u32,
        /// Requests on the ring.
        in_flight: u32,
    },
}

impl<E: Events> Queue<E> {
    /// Makes the ring, the event channel and the granted pages for the negotiated options. Requests are of
    /// `block_bytes`, and made for each of `operations` in turn.
    pub fn new<K: Kernel<Events = E>>(
        kernel: &K,
        options: &Options,
        block_bytes: usize,
        operations: &[Operation],
    ) -> anyhow::Result<Queue<E>> {
        let (events, port) = kernel.open_events(options.backend)?;
        let ring = kernel.grant(options.backend, 1 << options.ring_order)?;
        let slots = (0..options.buffers)
            .zip(operations.iter().cycle())
            .map(|(slot, operation)| {
                let request = prepare(kernel, options, block_bytes, *operation, slot as u64)?;
                Ok(Slot { request, started: None })
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let free = (0..u16::try_from(slots.len())?).rev().collect();
        let ring_memory = SharedPage::over(ring.pages);
        let ring_refs = ring.refs;
        let ring = FrontRing::init(ring_memory, options.protocol);
        Ok(Queue { ring, ring_refs, events, port, slots, free })
    }

    /// Whether another request could start.
    #[inline]
    pub fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Requests in flight.
    #[inline]
    pub fn in_flight(&self) -> u32 {
        self.ring.in_flight()
    }

    /// Number of responses that wait to be taken.
    #[inline]
    pub fn responses(&self) -> Result<u32, BackendFault> {
        let responses = self.ring.responses();
        let in_flight = self.ring.in_flight();
        if responses > in_flight {
            return Err(BackendFault::Overflow { responses, in_flight });
        }
        Ok(responses)
    }

    /// Takes a response; call only as often as [`Queue::responses`] said.
    #[inline]
    pub fn take(&mut self) -> Result<Answer, BackendFault> {
        let RawResponse { id, status, .. } = self.ring.take();
        let unknown = BackendFault::UnknownId(id);
        let index = u16::try_from(id).map_err(|_| unknown)?;
        let slot = self.slots.get_mut(usize::from(index)).ok_or(unknown)?;
        let started = slot.started.take().ok_or(unknown)?;
        self.free.push(index);
        Ok(Answer { started, status, sector: sector_of(&slot.request) })
    }

    /// Writes a read or a write of a block; [`Queue::publish`] makes it visible.
    ///
    /// # Panics
    /// If no request is free.
    #[inline]
    pub fn start(&mut self, at_ns: u64, operation: u8, sector: u64) {
        let started = Started { at_ns, is_read: operation == op::READ };
        self.put(started, Some(operation), sector);
    }

    /// Writes a request with the operation that it was made for; otherwise like [`Queue::start`]. Its
    /// latency is not measured.
    #[inline]
    pub fn start_as_made(&mut self, sector: u64) {
        let started = Started { at_ns: 0, is_read: false };
        self.put(started, None, sector);
    }

    #[inline]
    fn put(&mut self, started: Started, operation: Option<u8>, sector: u64) {
        let index = self.free.pop().expect("a free request");
        let slot = &mut self.slots[usize::from(index)];
        slot.started = Some(started);
        aim(&mut slot.request, operation, sector);
        self.ring.put(&slot.request);
    }

    /// Makes the written requests visible, and notifies the backend if it asked for it. Returns whether it
    /// did.
    #[inline]
    pub fn publish(&mut self) -> std::io::Result<bool> {
        if !self.ring.publish() {
            return Ok(false);
        }
        self.events.notify(self.port).map(|()| true)
    }

    /// Notifies the backend, even if it did not ask.
    #[inline]
    pub fn notify(&self) -> std::io::Result<()> {
        self.events.notify(self.port)
    }

    /// Asks to be notified of the next response. Returns `true` if there is one already.
    pub fn arm(&mut self) -> bool {
        self.ring.arm(1)
    }

    /// Its event channel.
    pub fn events(&mut self) -> &mut E {
        &mut self.events
    }
}

impl<E> Published for Queue<E> {
    fn ring_refs(&self) -> &[GrantRef] {
        &self.ring_refs
    }

    fn port(&self) -> Port {
        self.port
    }
}

#[inline]
fn aim(request: &mut RawRequest, operation: Option<u8>, to: u64) {
    match request {
        RawRequest::Direct(RawDirect { operation: op, sector, .. })
        | RawRequest::Indirect(RawIndirect { operation: op, sector, .. }) => {
            (*op, *sector) = (operation.unwrap_or(*op), to);
        }
        RawRequest::Discard(discard) => discard.sector = to,
    }
}

fn sector_of(request: &RawRequest) -> u64 {
    match request {
        RawRequest::Direct(RawDirect { sector, .. })
        | RawRequest::Indirect(RawIndirect { sector, .. }) => *sector,
        RawRequest::Discard(discard) => discard.sector,
    }
}

/// Makes a request. If it moves data, it gets its own pages, with data that does not compress.
fn prepare<K: Kernel>(
    kernel: &K,
    options: &Options,
    block_bytes: usize,
    operation: Operation,
    id: u64,
) -> anyhow::Result<RawRequest> {
    let code = match operation {
        Operation::Read | Operation::ReadIndirect => op::READ,
        Operation::Write | Operation::WriteIndirect => op::WRITE,
        Operation::Flush => return Ok(RawDirect::new(op::FLUSH_DISKCACHE, id, 0).into()),
        Operation::Discard => {
            let nr_sectors = block_bytes as u64 / SECTOR_BYTES;
            let discard = RawDiscard { flag: 0, handle: 0, id, sector: 0, nr_sectors };
            return Ok(RawRequest::Discard(discard));
        }
    };
    let pages = block_bytes.div_ceil(PAGE_BYTES);
    if !operation.is_indirect(block_bytes) {
        let granted = kernel.grant(options.backend, pages)?;
        fill(&granted, pages, id);
        let segments = segments(&granted.refs, block_bytes)?;
        let mut direct = RawDirect::new(code, id, 0);
        direct.nr_segments = u8::try_from(pages)?;
        direct.segments[..pages].copy_from_slice(&segments);
        return Ok(direct.into());
    }
    let segment_pages = pages.div_ceil(SEGMENTS_PER_INDIRECT_PAGE);
    let granted = kernel.grant(options.backend, pages + segment_pages)?;
    fill(&granted, pages, id);
    let (data, tables) = granted.refs.split_at(pages);
    let segments = segments(data, block_bytes)?;
    let mut indirect = RawIndirect {
        operation: code,
        nr_segments: u16::try_from(pages)?,
        id,
        sector: 0,
        handle: 0,
        pages: [0; INDIRECT_PAGES_PER_REQUEST],
    };
    for (place, gref) in indirect.pages.iter_mut().zip(tables) {
        *place = gref.0;
    }
    for (part, page) in segments.chunks(SEGMENTS_PER_INDIRECT_PAGE).zip(pages..) {
        let words: Vec<u8> = part.iter().flat_map(|one| one.to_word().to_le_bytes()).collect();
        debug_assert_eq!(words.len(), part.len() * SEGMENT_BYTES);
        granted.pages.page(page).copy_from(&words);
    }
    Ok(indirect.into())
}

/// Segments for the first `bytes` of these pages.
fn segments(refs: &[GrantRef], bytes: usize) -> anyhow::Result<Vec<RawSegment>> {
    let lengths = (0..bytes).step_by(PAGE_BYTES).map(|at| (bytes - at).min(PAGE_BYTES));
    refs.iter()
        .zip(lengths)
        .map(|(gref, len)| {
            let sectors = u8::try_from(len as u64 / SECTOR_BYTES)?;
            Ok(RawSegment { gref: gref.0, first: 0, last: sectors - 1 })
        })
        .collect()
}

fn fill(granted: &Granted, pages: usize, seed: u64) {
    let mut word = seed;
    let mut data = [0; PAGE_BYTES];
    for page in 0..pages {
        for bytes in data.as_chunks_mut::<8>().0 {
            word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            *bytes = (word ^ (word >> 29)).to_le_bytes();
        }
        granted.pages.page(page).copy_from(&data);
    }
}

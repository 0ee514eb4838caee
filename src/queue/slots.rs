//! Requests of one queue that were taken and not yet answered.
//!
//! Slots are made when the queue connects, with room for the segments of a direct request; the
//! larger tables of indirect requests are a worker's and lent for the time of a request. So nothing
//! allocates per request.

use super::bounce::BouncePool;
use crate::blkif::request::{Kind, Request, Segment};
use crate::limits::{GRANTS_PER_MAP_BATCH, INDIRECT_REQUESTS_PER_WORKER, SEGMENTS_PER_REQUEST};
use crate::xen::shm::{GuestBuf, GuestPages, PAGE_BYTES};

/// One request on its way.
#[derive(Debug)]
pub struct Slot {
    /// What the guest asked.
    pub request: Request,
    /// When it was taken, by the worker's clock.
    pub taken_ns: u64,
    /// A grant copy of it failed: it is answered with an error.
    pub failed: bool,
    /// Pages mapped for this request only, in the order of its segments: ranges of
    /// `limits::GRANTS_PER_MAP_BATCH`, and the rest.
    pub mapped: Vec<GuestPages>,
    in_use: bool,
    /// Bytes that storage has moved so far.
    moved_bytes: u32,
    /// What is left of its plan.
    steps: &'static [Step],
    bounced: Bounced,
    count: u16,
    inline: Table<SEGMENTS_PER_REQUEST>,
    large: Option<Box<LargeTable>>,
}

/// Where the data of a direct request is.
#[derive(Debug)]
struct Table<const N: usize> {
    segments: [Segment; N],
    buffers: [GuestBuf; N],
}

/// Where the data of an indirect request is; its lists have one length.
#[derive(Debug)]
pub struct LargeTable {
    segments: Vec<Segment>,
    buffers: Vec<GuestBuf>,
}

/// Whether all data of a request is in bounce memory, and how it lies there.
#[derive(Clone, Copy, Debug)]
enum Bounced {
    No,
    /// One segment after the other in this run of pages.
    Run(GuestBuf),
    /// Each segment in a page of its own.
    Pages,
}

impl LargeTable {
    /// Room for `count` segments, to be filled.
    pub fn segments_mut(&mut self, count: usize) -> &mut [Segment] {
        self.segments.resize(count, Segment::default());
        self.buffers.resize(count, GuestBuf::EMPTY);
        &mut self.segments
    }
}

/// A worker's tables for indirect requests; each is made when it is first needed.
#[derive(Debug, Default)]
pub struct LargeTables {
    // Boxed, so that lending one moves a pointer.
    #[expect(clippy::vec_box, reason = "lent as boxes")]
    idle: Vec<Box<LargeTable>>,
    lent: usize,
}

impl LargeTables {
    /// Tables that can be had now.
    #[inline]
    pub fn free(&self) -> usize {
        INDIRECT_REQUESTS_PER_WORKER - self.lent
    }

    /// A table.
    ///
    /// # Panics
    /// Where none is free; requests are taken only while there is one for each.
    pub fn take(&mut self) -> Box<LargeTable> {
        assert!(self.free() > 0);
        self.lent += 1;
        self.idle
            .pop()
            .unwrap_or_else(|| Box::new(LargeTable { segments: Vec::new(), buffers: Vec::new() }))
    }

    /// Takes a table back.
    pub fn give_back(&mut self, table: Box<LargeTable>) {
        self.lent -= 1;
        self.idle.push(table);
    }
}

impl Slot {
    fn empty() -> Slot {
        Slot {
            request: Request {
                id: 0,
                operation: 0,
                kind: Kind::Flush,
                offset_bytes: 0,
                len_bytes: 0,
            },
            taken_ns: 0,
            failed: false,
            mapped: Vec::new(),
            in_use: false,
            moved_bytes: 0,
            steps: &[],
            bounced: Bounced::No,
            count: 0,
            inline: Table {
                segments: [Segment::default(); SEGMENTS_PER_REQUEST],
                buffers: [GuestBuf::EMPTY; SEGMENTS_PER_REQUEST],
            },
            large: None,
        }
    }

    /// Room for the segments of a direct request, to be filled before [`Slot::begin`].
    #[inline]
    pub fn inline_segments_mut(&mut self) -> &mut [Segment; SEGMENTS_PER_REQUEST] {
        &mut self.inline.segments
    }

    /// Begins a request whose `count` segments are in place: in `large`, or else inline.
    #[inline]
    pub fn begin(
        &mut self,
        request: Request,
        count: usize,
        large: Option<Box<LargeTable>>,
        taken_ns: u64,
    ) {
        self.request = request;
        self.taken_ns = taken_ns;
        self.failed = false;
        self.moved_bytes = 0;
        self.steps = plan(request.kind);
        self.bounced = Bounced::No;
        self.count = u16::try_from(count).expect("at most the segments of an indirect request");
        self.large = large;
    }

    /// Where its data is in the guest's pages.
    #[inline]
    pub fn segments(&self) -> &[Segment] {
        match &self.large {
            None => &self.inline.segments[..usize::from(self.count)],
            Some(large) => &large.segments,
        }
    }

    /// The same, with where that is in our memory, to be set.
    #[inline]
    pub fn segments_and_buffers(&mut self) -> (&[Segment], &mut [GuestBuf]) {
        let count = usize::from(self.count);
        match &mut self.large {
            None => (&self.inline.segments[..count], &mut self.inline.buffers[..count]),
            Some(large) => (&large.segments, &mut large.buffers),
        }
    }

    #[inline]
    fn buffers(&self) -> &[GuestBuf] {
        match &self.large {
            None => &self.inline.buffers[..usize::from(self.count)],
            Some(large) => &large.buffers,
        }
    }

    /// Sets where segment `index` has its data.
    #[inline]
    pub fn set_buffer(&mut self, index: usize, buffer: GuestBuf) {
        match &mut self.large {
            None => self.inline.buffers[index] = buffer,
            Some(large) => large.buffers[index] = buffer,
        }
    }

    /// Points every segment at its page in [`Slot::mapped`].
    pub fn point_at_mapped(&mut self) {
        for index in 0..self.segments().len() {
            let segment = self.segments()[index];
            let page = self.mapped[index / GRANTS_PER_MAP_BATCH].page(index % GRANTS_PER_MAP_BATCH);
            let buffer = page.part(segment.offset.into(), segment.len.into());
            self.set_buffer(index, buffer.expect("a segment lies within its page"));
        }
    }

    /// Finds bounce memory for all of its data, in one run of pages if there is one; `false`: there
    /// is not enough now.
    pub fn bounce(&mut self, pool: &mut BouncePool) -> bool {
        let count = self.segments().len();
        let bytes = usize::try_from(self.request.len_bytes).unwrap_or(usize::MAX);
        if let Some(run) = pool.take(bytes.div_ceil(PAGE_BYTES)) {
            let mut at = 0;
            for index in 0..count {
                let len = self.segments()[index].len.into();
                self.set_buffer(index, run.part(at, len).expect("the segments are its length"));
                at += len;
            }
            self.bounced = Bounced::Run(run);
            return true;
        }
        if pool.free() < count {
            return false;
        }
        for index in 0..count {
            let page = pool.take(1).expect("counted before");
            let len = self.segments()[index].len.into();
            self.set_buffer(index, page.part(0, len).expect("a segment is no longer than a page"));
        }
        self.bounced = Bounced::Pages;
        true
    }

    /// Gives its bounce memory back.
    pub fn give_back_bounced(&mut self, pool: &mut BouncePool) {
        match std::mem::replace(&mut self.bounced, Bounced::No) {
            Bounced::No => {}
            Bounced::Run(run) => pool.give_back(run),
            Bounced::Pages => self.buffers().iter().for_each(|buffer| pool.give_back(*buffer)),
        }
    }

    /// Its segments, with where their data is.
    pub fn located(&self) -> impl Iterator<Item = (Segment, GuestBuf)> + '_ {
        self.segments().iter().copied().zip(self.buffers().iter().copied())
    }

    /// Whether its data is in bounce memory.
    #[inline]
    pub fn is_bounced(&self) -> bool {
        !matches!(self.bounced, Bounced::No)
    }

    /// What to ask of the engine next.
    #[inline]
    pub fn step(&self) -> Step {
        self.steps[0]
    }

    /// Where the rest of the transfer starts on the disk.
    #[inline]
    pub fn offset_bytes(&self) -> u64 {
        self.request.offset_bytes + u64::from(self.moved_bytes)
    }

    /// Shows the buffers of the rest of the transfer.
    #[inline(always)]
    pub fn with_buffers<R>(&self, show: impl FnOnce(&[GuestBuf]) -> R) -> R {
        let rest;
        // One call only, which can then be inlined.
        show(match self.moved_bytes {
            0 => self.buffers(),
            _ => {
                rest = self.rest();
                &rest
            }
        })
    }

    /// What is left after a short transfer, which is rare.
    #[cold]
    fn rest(&self) -> Vec<GuestBuf> {
        let mut skip = self.moved_bytes;
        let left = |buffer: &GuestBuf| {
            let skipped = skip.min(buffer.len());
            skip -= skipped;
            buffer.part(skipped, buffer.len() - skipped).filter(|part| !part.is_empty())
        };
        self.buffers().iter().filter_map(left).collect()
    }

    /// Takes note of a step's result: bytes moved, or a negative errno.
    #[inline]
    pub fn advance(&mut self, result: i32) -> Advance {
        let Ok(moved) = u32::try_from(result) else { return Advance::Failed(-result) };
        if matches!(self.step(), Step::Read | Step::Write) {
            self.moved_bytes += moved;
            let left = self.request.len_bytes.checked_sub(self.moved_bytes.into());
            match left {
                Some(0) => {}
                Some(_) if moved > 0 => return Advance::Again,
                // The file ends inside the disk: it was made shorter under us.
                _ => return Advance::Failed(libc::EIO),
            }
        }
        self.steps = &self.steps[1..];
        if self.steps.is_empty() { Advance::Done } else { Advance::Again }
    }
}

/// What a request takes, in order.
#[inline]
fn plan(kind: Kind) -> &'static [Step] {
    match kind {
        Kind::Read => &[Step::Read],
        Kind::Write => &[Step::Write],
        Kind::Flush => &[Step::Flush],
        Kind::FlushThenWrite => &[Step::Flush, Step::Write],
        Kind::FlushedWrite => &[Step::Flush, Step::Write, Step::Flush],
        Kind::Discard => &[Step::Discard { secure: false }],
        Kind::SecureDiscard => &[Step::Discard { secure: true }],
    }
}

/// The next operation of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Storage to buffers.
    Read,
    /// Buffers to storage.
    Write,
    /// Make completed writes durable.
    Flush,
    /// Forget.
    Discard {
        /// Beyond recovery.
        secure: bool,
    },
}

/// What an engine's result means for its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advance {
    /// Nothing is left to do.
    Done,
    /// Submit the next [`Step`].
    Again,
    /// It failed with this errno.
    Failed(i32),
}

/// The slots of one queue: as many as its ring has entries.
#[derive(Debug)]
pub struct Slots {
    slots: Box<[Slot]>,
    free: Vec<u32>,
}

impl Slots {
    /// `count` free slots.
    pub fn new(count: u32) -> Slots {
        Slots {
            slots: (0..count).map(|_| Slot::empty()).collect(),
            free: (0..count).rev().collect(),
        }
    }

    /// Takes a free slot.
    ///
    /// # Panics
    /// Where none is free: there is one for every entry of the ring.
    #[inline]
    pub fn take(&mut self) -> (u32, &mut Slot) {
        let index = self.free.pop().expect("a slot for every ring entry");
        let slot = &mut self.slots[index as usize];
        slot.in_use = true;
        (index, slot)
    }

    /// The request in a slot.
    ///
    /// # Panics
    /// Where the slot is free: a ticket comes back once.
    #[inline]
    pub fn get_mut(&mut self, index: u32) -> &mut Slot {
        let slot = &mut self.slots[index as usize];
        assert!(slot.in_use);
        slot
    }

    /// Grant references of all requests in the slots.
    pub fn refs(&self) -> impl Iterator<Item = u32> + '_ {
        let in_use = self.slots.iter().filter(|slot| slot.in_use);
        in_use.flat_map(|slot| slot.segments().iter().map(|segment| segment.gref))
    }

    /// Frees a slot; a table lent for it goes back to `tables`.
    ///
    /// # Panics
    /// Where the slot is free already.
    #[inline]
    pub fn give_back(&mut self, index: u32, tables: &mut LargeTables) {
        let slot = self.get_mut(index);
        slot.in_use = false;
        if let Some(large) = slot.large.take() {
            tables.give_back(large);
        }
        self.free.push(index);
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::blkif::op;
    use crate::xen::shm::LocalPages;

    fn slot(kind: Kind, pages: &LocalPages) -> Slot {
        let mut slot = Slot::empty();
        let count = pages.count();
        let len_bytes = count as u64 * 4096;
        let request = Request { id: 1, operation: op::READ, kind, offset_bytes: 4096, len_bytes };
        *slot.inline_segments_mut() = [Segment { gref: 1, offset: 0, len: 4096 }; 11];
        slot.begin(request, count, None, 0);
        for index in 0..count {
            slot.set_buffer(index, pages.page(index));
        }
        slot
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_stopped() {
        let pages = LocalPages::new(3);
        let mut slot = slot(Kind::Read, &pages);
        assert_eq!(slot.advance(4096 + 1024), Advance::Again);
        assert_eq!(slot.offset_bytes(), 4096 + 4096 + 1024);
        let lens = |slot: &Slot| -> Vec<u32> {
            slot.with_buffers(|buffers| buffers.iter().map(|buffer| buffer.len()).collect())
        };
        assert_eq!(lens(&slot), [3072, 4096]);
        assert_eq!(slot.advance(3072), Advance::Again);
        assert_eq!(lens(&slot), [4096]);
        assert_eq!(slot.advance(4096), Advance::Done);
    }

    #[test]
    fn a_transfer_that_moves_nothing_fails_instead_of_looping() {
        let pages = LocalPages::new(1);
        assert_eq!(slot(Kind::Read, &pages).advance(0), Advance::Failed(libc::EIO));
        let refused = slot(Kind::Read, &pages).advance(-libc::ENOSPC);
        assert_eq!(refused, Advance::Failed(libc::ENOSPC));
    }

    #[test]
    fn a_flush_with_data_flushes_first_and_writes_then() {
        let pages = LocalPages::new(1);
        let mut slot = slot(Kind::FlushThenWrite, &pages);
        assert_eq!(slot.step(), Step::Flush);
        assert_eq!(slot.advance(0), Advance::Again);
        assert_eq!(slot.step(), Step::Write);
        assert_eq!(slot.advance(4096), Advance::Done);
    }

    #[test]
    fn a_barrier_flushes_before_and_after_its_write() {
        let pages = LocalPages::new(1);
        let mut slot = slot(Kind::FlushedWrite, &pages);
        for (step, result) in [(Step::Flush, 0), (Step::Write, 4096), (Step::Flush, 0)] {
            assert_eq!(slot.step(), step);
            let last = slot.advance(result);
            assert_eq!(last == Advance::Done, slot.steps.is_empty());
        }
    }

    #[test]
    fn a_failed_flush_never_writes() {
        let pages = LocalPages::new(1);
        let mut slot = slot(Kind::FlushThenWrite, &pages);
        assert_eq!(slot.advance(-libc::EIO), Advance::Failed(libc::EIO));
    }

    #[test]
    fn a_table_is_lent_for_the_time_of_a_request() {
        let mut tables = LargeTables::default();
        let mut slots = Slots::new(2);
        let all = tables.free();
        let (index, _) = slots.take();
        let mut large = tables.take();
        large.segments_mut(200).fill(Segment { gref: 7, offset: 0, len: 512 });
        let request = Request {
            id: 1,
            operation: op::READ,
            kind: Kind::Read,
            offset_bytes: 0,
            len_bytes: 200 * 512,
        };
        slots.get_mut(index).begin(request, 200, Some(large), 0);
        assert_eq!(slots.get_mut(index).segments().len(), 200);
        assert_eq!(tables.free(), all - 1);
        slots.give_back(index, &mut tables);
        assert_eq!(tables.free(), all);
    }

    #[test]
    fn bounced_data_is_one_run_where_there_is_one_and_comes_back_either_way() {
        let pages = LocalPages::new(3);
        let mut slot = slot(Kind::Read, &pages);
        let mut pool = BouncePool::default();
        pool.allocate();
        let all = pool.free();
        for segment in &mut slot.inline.segments {
            *segment = Segment { gref: 1, offset: 512, len: 1536 };
        }
        slot.request.len_bytes = 3 * 1536;
        assert!(slot.bounce(&mut pool) && slot.is_bounced());
        assert_eq!(pool.free(), all - 2, "one after the other, over the end of a page");
        let first = slot.buffers()[0].address();
        assert!(slot.buffers().iter().zip(0..).all(|(buffer, index)| {
            buffer.address().addr().get() == first.addr().get() + index * 1536
        }));
        slot.give_back_bounced(&mut pool);
        assert!(!slot.is_bounced());

        let single: Vec<_> = (0..all).map(|_| pool.take(1).unwrap()).collect();
        single.iter().step_by(2).take(2).for_each(|page| pool.give_back(*page));
        assert!(!slot.bounce(&mut pool) && !slot.is_bounced(), "not enough");
        single.iter().skip(4).step_by(2).for_each(|page| pool.give_back(*page));
        assert!(slot.bounce(&mut pool));
        assert_eq!(pool.free(), all / 2 - 3, "each in a page of its own");
        slot.give_back_bounced(&mut pool);
        assert_eq!(pool.free(), all / 2);
    }
}

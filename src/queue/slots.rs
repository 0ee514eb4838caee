//! Slots for the requests of one queue that were taken and not yet answered.
//!
//! Slots are allocated when the queue connects, with room for the segments of a direct request. The larger
//! tables of indirect requests belong to the worker, which lends one to each such request. So nothing is
//! allocated per request.

use std::borrow::Cow;

use super::bounce::{BouncePool, Whose};
use crate::blkif::request::{Kind, Request, Segment};
use crate::limits::{GRANTS_PER_MAP_BATCH, SEGMENTS_PER_REQUEST, TABLES_COMMON, TABLES_PER_QUEUE};
use crate::pool::{Pool, Share};
use crate::xen::shm::{GuestBuf, GuestPages, PAGE_BYTES};

/// One request in flight.
#[derive(Debug)]
pub struct Slot {
    /// What the guest asked for.
    pub request: Request,
    /// When it was taken, by the worker's clock.
    pub taken_ns: u64,
    /// A grant copy failed: the request is answered with an error.
    pub failed: bool,
    /// Pages mapped for this request only, in the order of its segments, in ranges of
    /// `limits::GRANTS_PER_MAP_BATCH` pages; the last one may be shorter.
    pub own_pages: Vec<GuestPages>,
    in_use: bool,
    /// Bytes that storage has moved so far.
    moved_bytes: u32,
    /// Steps that are left to do.
    steps: &'static [Step],
    bounced: Bounced,
    /// How many of its bounced segments were copied to or from the guest.
    copied: u16,
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

/// Where the data of an indirect request is; both lists have the same length.
#[derive(Debug)]
pub struct LargeTable {
    segments: Vec<Segment>,
    buffers: Vec<GuestBuf>,
}

/// Whether a request's data is in bounce memory, and how it is laid out there.
#[derive(Clone, Copy, Debug)]
enum Bounced {
    No,
    /// One segment after another, in this run of pages.
    Run(GuestBuf, Whose),
    /// Each segment in a page of its own.
    Pages(Whose),
}

impl LargeTable {
    /// Room for `count` segments, to be filled.
    pub fn segments_mut(&mut self, count: usize) -> &mut [Segment] {
        self.segments.resize(count, Segment::default());
        self.buffers.resize(count, GuestBuf::EMPTY);
        &mut self.segments
    }
}

/// A worker's tables for indirect requests. Some are guaranteed to each queue; each is allocated when first
/// needed.
#[derive(Debug)]
pub struct LargeTables {
    pool: Pool,
    // Boxed, so that lending one moves a pointer.
    #[expect(clippy::vec_box, reason = "lent as boxes")]
    idle: Vec<Box<LargeTable>>,
}

impl Default for LargeTables {
    fn default() -> LargeTables {
        LargeTables { pool: Pool::new(TABLES_PER_QUEUE, TABLES_COMMON), idle: Vec::new() }
    }
}

impl LargeTables {
    /// Takes a table for the queue whose share this is; `None`: none is left now.
    pub fn take(&mut self, share: &mut Share) -> Option<Box<LargeTable>> {
        let new = || Box::new(LargeTable { segments: Vec::new(), buffers: Vec::new() });
        self.pool.take(share, 1).then(|| self.idle.pop().unwrap_or_else(new))
    }

    /// Takes a table back.
    pub fn give_back(&mut self, table: Box<LargeTable>, share: &mut Share) {
        self.pool.give_back(share, 1);
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
            own_pages: Vec::new(),
            in_use: false,
            moved_bytes: 0,
            steps: &[],
            bounced: Bounced::No,
            copied: 0,
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
        self.copied = 0;
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

    /// Its segments, and the buffers in our memory to be set for them.
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

    /// Sets the buffer that holds the data of segment `index`.
    #[inline]
    pub fn set_buffer(&mut self, index: usize, buffer: GuestBuf) {
        match &mut self.large {
            None => self.inline.buffers[index] = buffer,
            Some(large) => large.buffers[index] = buffer,
        }
    }

    /// Points every segment at its page in [`Slot::own_pages`].
    pub fn point_at_own_pages(&mut self) {
        for index in 0..self.segments().len() {
            let segment = self.segments()[index];
            let page =
                self.own_pages[index / GRANTS_PER_MAP_BATCH].page(index % GRANTS_PER_MAP_BATCH);
            let buffer = page.part(segment.offset.into(), segment.len.into());
            self.set_buffer(index, buffer.expect("a segment lies within its page"));
        }
    }

    /// Takes bounce memory for all of its data from a pool, the worker's or the queue's own, in one run of
    /// pages if there is one; `false`: there is not enough now.
    pub fn bounce(&mut self, pool: &mut BouncePool, whose: Whose) -> bool {
        let count = self.segments().len();
        let bytes = usize::try_from(self.request.len_bytes).unwrap_or(usize::MAX);
        if let Some(run) = pool.take(bytes.div_ceil(PAGE_BYTES)) {
            let mut at = 0;
            for index in 0..count {
                let len = self.segments()[index].len.into();
                self.set_buffer(index, run.part(at, len).expect("the segments are its length"));
                at += len;
            }
            self.bounced = Bounced::Run(run, whose);
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
        self.bounced = Bounced::Pages(whose);
        true
    }

    /// Gives its bounce memory back to the pool that it came from.
    pub fn give_back_bounced(&mut self, common: &mut BouncePool, own: &mut BouncePool) {
        let pool = |whose| match whose {
            Whose::Common => common,
            Whose::Own => own,
        };
        match std::mem::replace(&mut self.bounced, Bounced::No) {
            Bounced::No => {}
            Bounced::Run(run, whose) => pool(whose).give_back(run),
            Bounced::Pages(whose) => {
                let pool = pool(whose);
                self.buffers().iter().for_each(|buffer| pool.give_back(*buffer));
            }
        }
    }

    /// Returns its next bounced segments to copy, at most `count`, and counts them as copied.
    pub fn take_uncopied(
        &mut self,
        count: usize,
    ) -> impl ExactSizeIterator<Item = (Segment, GuestBuf)> + '_ {
        let first = usize::from(self.copied);
        let end = self.segments().len().min(first.saturating_add(count));
        self.copied = u16::try_from(end).expect("at most the segments of an indirect request");
        let segments = self.segments()[first..end].iter().copied();
        segments.zip(self.buffers()[first..end].iter().copied())
    }

    /// Whether all of its bounced segments have been copied.
    pub fn is_copied(&self) -> bool {
        usize::from(self.copied) == self.segments().len()
    }

    /// Fills its buffers with zeroes.
    pub fn zero(&self) {
        self.buffers().iter().for_each(|buffer| buffer.zero());
    }

    /// Whether its data is in bounce memory.
    #[inline]
    pub fn is_bounced(&self) -> bool {
        !matches!(self.bounced, Bounced::No)
    }

    /// Whether some of its data has yet to be copied from the guest.
    #[inline]
    pub fn is_to_be_fetched(&self) -> bool {
        self.is_bounced() && self.request.kind != Kind::Read && !self.is_copied()
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

    /// Calls `show` with the buffers of the rest of the transfer, at most `count` of them.
    #[inline(always)]
    pub fn with_buffers<R>(&self, count: usize, show: impl FnOnce(&[GuestBuf]) -> R) -> R {
        let rest;
        // `show` is called in one place only, so that it can be inlined.
        let buffers = match self.moved_bytes {
            0 => self.buffers(),
            _ => {
                rest = self.rest();
                &rest
            }
        };
        show(&buffers[..count.min(buffers.len())])
    }

    /// The buffers that are left after a short transfer. Their list is copied only if the transfer ended
    /// inside a buffer, which is rare.
    #[cold]
    fn rest(&self) -> Cow<'_, [GuestBuf]> {
        let (buffers, mut skip) = (self.buffers(), self.moved_bytes);
        let whole = buffers.iter().take_while(|buffer| {
            let moved = buffer.len() <= skip;
            skip -= if moved { buffer.len() } else { 0 };
            moved
        });
        let left = &buffers[whole.count()..];
        match left.first() {
            Some(first) if skip > 0 => {
                let mut left = left.to_vec();
                left[0] = first.part(skip, first.len() - skip).expect("the rest lies in it");
                Cow::Owned(left)
            }
            _ => Cow::Borrowed(left),
        }
    }

    /// Records a step's result: bytes moved, or a negative errno.
    #[inline]
    pub fn advance(&mut self, result: i32) -> Advance {
        let Ok(moved) = u32::try_from(result) else { return Advance::Failed(-result) };
        if matches!(self.step(), Step::Read | Step::Write) {
            self.moved_bytes += moved;
            let left = self.request.len_bytes.checked_sub(self.moved_bytes.into());
            match left {
                Some(0) => {}
                Some(_) if moved > 0 => return Advance::Again,
                // The file ends before the disk does: somebody truncated it.
                _ => return Advance::Failed(libc::EIO),
            }
        }
        self.steps = &self.steps[1..];
        if self.steps.is_empty() { Advance::Done } else { Advance::Again }
    }
}

/// The steps of a request, in order.
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
    /// Forget the data.
    Discard {
        /// Erase it beyond recovery.
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
    /// If none is free: there is one for every entry of the ring.
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
    /// If the slot is free: a ticket comes back once.
    #[inline]
    pub fn get_mut(&mut self, index: u32) -> &mut Slot {
        let slot = &mut self.slots[index as usize];
        assert!(slot.in_use);
        slot
    }

    /// Grant references of all requests in the slots.
    pub fn refs(&self) -> impl Iterator<Item = u32> + '_ {
        self.in_use().flat_map(|slot| slot.segments().iter().map(|segment| segment.gref))
    }

    /// The requests in the slots.
    pub fn in_use(&self) -> impl Iterator<Item = &Slot> + '_ {
        self.slots.iter().filter(|slot| slot.in_use)
    }

    /// Frees a slot; returns the table lent for it.
    ///
    /// # Panics
    /// If the slot is free already.
    #[inline]
    #[must_use = "the table goes back to the worker"]
    pub fn give_back(&mut self, index: u32) -> Option<Box<LargeTable>> {
        let slot = self.get_mut(index);
        slot.in_use = false;
        let large = slot.large.take();
        self.free.push(index);
        large
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
            slot.with_buffers(2, |buffers| buffers.iter().map(|buffer| buffer.len()).collect())
        };
        assert_eq!(lens(&slot), [3072, 4096]);
        assert_eq!(slot.advance(3072), Advance::Again);
        assert_eq!(lens(&slot), [4096]);
        assert!(matches!(slot.rest(), Cow::Borrowed(_)), "whole buffers need no copy");
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
    fn a_flush_with_data_flushes_first_then_writes() {
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
    fn a_table_is_lent_for_one_request_and_each_queue_is_guaranteed_some() {
        let (mut tables, mut share) = (LargeTables::default(), Share::default());
        let mut slots = Slots::new(2);
        let (index, _) = slots.take();
        let mut large = tables.take(&mut share).unwrap();
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
        let taken = std::iter::from_fn(|| tables.take(&mut share)).count();
        assert_eq!(1 + taken, TABLES_PER_QUEUE + TABLES_COMMON);
        let mut other = Share::default();
        assert_eq!(std::iter::from_fn(|| tables.take(&mut other)).count(), TABLES_PER_QUEUE);
        tables.give_back(slots.give_back(index).unwrap(), &mut share);
        assert!(tables.take(&mut other).is_some());
    }

    #[test]
    fn segments_are_copied_in_parts_each_once() {
        let pages = LocalPages::new(3);
        let mut slot = slot(Kind::Read, &pages);
        let mut copied = Vec::new();
        for (count, left) in [(2, true), (0, true), (usize::MAX, false)] {
            copied.extend(slot.take_uncopied(count).map(|(_, buffer)| buffer.address()));
            assert_eq!(!slot.is_copied(), left);
        }
        assert_eq!(copied, [0, 1, 2].map(|index| pages.page(index).address()));
    }

    #[test]
    fn bounced_data_is_in_one_run_if_possible_and_is_given_back_either_way() {
        let pages = LocalPages::new(3);
        let mut slot = slot(Kind::Read, &pages);
        let mut pool = BouncePool::new(64);
        let mut own = BouncePool::new(3);
        pool.allocate();
        own.allocate();
        let all = pool.free();
        for segment in &mut slot.inline.segments {
            *segment = Segment { gref: 1, offset: 512, len: 1536 };
        }
        slot.request.len_bytes = 3 * 1536;
        assert!(slot.bounce(&mut pool, Whose::Common) && slot.is_bounced());
        assert_eq!(pool.free(), all - 2, "one after another, across the end of a page");
        let first = slot.buffers()[0].address();
        assert!(slot.buffers().iter().zip(0..).all(|(buffer, index)| {
            buffer.address().addr().get() == first.addr().get() + index * 1536
        }));
        slot.give_back_bounced(&mut pool, &mut own);
        assert!(!slot.is_bounced());

        let single: Vec<_> = (0..all).map(|_| pool.take(1).unwrap()).collect();
        single.iter().step_by(2).take(2).for_each(|page| pool.give_back(*page));
        assert!(!slot.bounce(&mut pool, Whose::Common) && !slot.is_bounced(), "not enough");
        single.iter().skip(4).step_by(2).for_each(|page| pool.give_back(*page));
        assert!(slot.bounce(&mut pool, Whose::Common));
        assert_eq!(pool.free(), all / 2 - 3, "each in a page of its own");
        slot.give_back_bounced(&mut pool, &mut own);
        assert_eq!(pool.free(), all / 2);

        assert!(slot.bounce(&mut own, Whose::Own));
        assert_eq!((pool.free(), own.free()), (all / 2, 1));
        slot.give_back_bounced(&mut pool, &mut own);
        assert_eq!((pool.free(), own.free()), (all / 2, 3));
    }
}

//! Requests of one queue that were taken and not yet answered.
//!
//! Slots are plain data in one block made when the queue connects: nothing allocates per request.

use crate::blkif::request::{Kind, Request, Segment};
use crate::limits::SEGMENTS_PER_REQUEST;
use crate::xen::shm::GuestBuf;

/// One request on its way.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// What the guest asked.
    pub request: Request,
    /// When it was taken, by the worker's clock.
    pub taken_ns: u64,
    /// A grant copy of it failed: it is answered with an error.
    pub failed: bool,
    /// Bytes that storage has moved so far.
    moved_bytes: u32,
    /// The flush of a flush-then-write is still to come.
    flush_first: bool,
    /// Bit i: buffer i is bounce memory, not the guest's page.
    bounced: u16,
    buffers: [GuestBuf; SEGMENTS_PER_REQUEST],
}

const _: () = assert!(SEGMENTS_PER_REQUEST <= u16::BITS as usize);

impl Slot {
    fn new(request: Request, taken_ns: u64) -> Slot {
        Slot {
            request,
            taken_ns,
            failed: false,
            moved_bytes: 0,
            flush_first: matches!(request.kind, Kind::Flush | Kind::FlushThenWrite),
            bounced: 0,
            buffers: [GuestBuf::EMPTY; SEGMENTS_PER_REQUEST],
        }
    }

    /// Sets where segment `index` of the request has its data; `bounced`: not in the guest's page.
    pub fn set_buffer(&mut self, index: usize, buffer: GuestBuf, bounced: bool) {
        self.buffers[index] = buffer;
        self.bounced |= u16::from(bounced) << index;
    }

    /// Segments whose data is in bounce memory, with that memory.
    pub fn bounced(&self) -> impl Iterator<Item = (Segment, GuestBuf)> + '_ {
        let pairs = self.request.segments().iter().zip(&self.buffers).enumerate();
        pairs
            .filter(|(index, _)| self.bounced & (1 << index) != 0)
            .map(|(_, (segment, buffer))| (*segment, *buffer))
    }

    /// Whether any segment is in bounce memory.
    #[inline]
    pub fn has_bounced(&self) -> bool {
        self.bounced != 0
    }

    /// What to ask of the engine next.
    #[inline]
    pub fn step(&self) -> Step {
        match self.request.kind {
            _ if self.flush_first => Step::Flush,
            Kind::Read => Step::Read,
            Kind::Write | Kind::FlushThenWrite | Kind::Flush => Step::Write,
        }
    }

    /// Where the rest of the transfer starts on the disk.
    #[inline]
    pub fn offset_bytes(&self) -> u64 {
        self.request.offset_bytes + u64::from(self.moved_bytes)
    }

    /// Shows the buffers of the rest of the transfer.
    #[inline]
    pub fn with_buffers<R>(&self, show: impl FnOnce(&[GuestBuf]) -> R) -> R {
        let whole = &self.buffers[..self.request.segments().len()];
        if self.moved_bytes == 0 {
            return show(whole);
        }
        let mut rest = [GuestBuf::EMPTY; SEGMENTS_PER_REQUEST];
        let mut count = 0;
        let mut skip = self.moved_bytes;
        for buffer in whole {
            let skipped = skip.min(buffer.len());
            skip -= skipped;
            if let Some(part) = buffer.part(skipped, buffer.len() - skipped)
                && !part.is_empty()
            {
                rest[count] = part;
                count += 1;
            }
        }
        show(&rest[..count])
    }

    /// Takes note of a step's result: bytes moved, or a negative errno.
    #[inline]
    pub fn advance(&mut self, result: i32) -> Advance {
        let Ok(moved) = u32::try_from(result) else { return Advance::Failed(-result) };
        if self.flush_first {
            self.flush_first = false;
            return if self.request.kind == Kind::Flush { Advance::Done } else { Advance::Again };
        }
        let left = self.request.len_bytes - self.moved_bytes;
        if moved == left {
            Advance::Done
        } else if moved == 0 || moved > left {
            // The file ends inside the disk: it was made shorter under us.
            Advance::Failed(libc::EIO)
        } else {
            self.moved_bytes += moved;
            Advance::Again
        }
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
    slots: Box<[Option<Slot>]>,
    free: Vec<u32>,
}

impl Slots {
    /// `count` free slots.
    pub fn new(count: u32) -> Slots {
        Slots { slots: (0..count).map(|_| None).collect(), free: (0..count).rev().collect() }
    }

    /// Puts a request into a free slot.
    ///
    /// # Panics
    /// Where none is free: there is one for every entry of the ring.
    #[inline]
    pub fn insert(&mut self, request: Request, taken_ns: u64) -> u32 {
        let index = self.free.pop().expect("a slot for every ring entry");
        self.slots[index as usize] = Some(Slot::new(request, taken_ns));
        index
    }

    /// The request in a slot.
    ///
    /// # Panics
    /// Where the slot is free: a ticket comes back once.
    #[inline]
    pub fn get_mut(&mut self, index: usize) -> &mut Slot {
        self.slots[index].as_mut().expect("a slot in use")
    }

    /// Frees a slot.
    ///
    /// # Panics
    /// Where the slot is free already.
    #[inline]
    pub fn remove(&mut self, index: usize) -> Slot {
        let slot = self.slots[index].take().expect("a slot in use");
        self.free.push(u32::try_from(index).expect("at most a ring's entries"));
        slot
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::backing::Geometry;
    use crate::blkif::codec::{RawRequest, RawSegment};
    use crate::blkif::op;
    use crate::blkif::request::DiskRules;
    use crate::units::Bytes;
    use crate::xen::shm::LocalPages;

    fn slot(operation: u8, segments: u8, pages: &LocalPages) -> Slot {
        let mut raw = RawRequest::new(operation, 1, 8);
        raw.nr_segments = segments;
        for segment in &mut raw.segments {
            *segment = RawSegment { gref: 1, first: 0, last: 7 };
        }
        let geometry =
            Geometry { size: Bytes(1 << 20), sector_bytes: 512, physical_sector_bytes: 512 };
        let rules = DiskRules { geometry, read_only: false };
        let mut slot = Slot::new(Request::check(&raw, &rules).unwrap(), 0);
        for index in 0..usize::from(segments) {
            slot.set_buffer(index, pages.page(index), false);
        }
        slot
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_stopped() {
        let pages = LocalPages::new(3);
        let mut slot = slot(op::READ, 3, &pages);
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
        assert_eq!(slot(op::READ, 1, &pages).advance(0), Advance::Failed(libc::EIO));
        assert_eq!(slot(op::READ, 1, &pages).advance(-libc::ENOSPC), Advance::Failed(libc::ENOSPC));
    }

    #[test]
    fn a_flush_with_data_flushes_first_and_writes_then() {
        let pages = LocalPages::new(1);
        let mut slot = slot(op::FLUSH_DISKCACHE, 1, &pages);
        assert_eq!(slot.step(), Step::Flush);
        assert_eq!(slot.advance(0), Advance::Again);
        assert_eq!(slot.step(), Step::Write);
        assert_eq!(slot.advance(4096), Advance::Done);
    }

    #[test]
    fn a_failed_flush_never_writes() {
        let pages = LocalPages::new(1);
        let mut slot = slot(op::FLUSH_DISKCACHE, 1, &pages);
        assert_eq!(slot.advance(-libc::EIO), Advance::Failed(libc::EIO));
    }
}

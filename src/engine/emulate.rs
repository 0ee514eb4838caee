//! 512-byte sectors on storage with larger blocks.
//!
//! Storage takes whole blocks, and only if each block is contiguous in memory. Transfers that fit go
//! straight to it. Others go through memory of our own, in pieces: a transfer ends short after one piece,
//! and the queue asks for the rest. A read reads the blocks around it. A write of whole blocks from
//! scattered buffers copies them together. A write of a part of a block reads the block, changes it and
//! writes it back, and no other write or discard uses that block meanwhile ([`BlockLocks`]). It writes
//! one block at a time, so a crash leaves each block as it was before or after, as on a drive that
//! emulates sectors itself.
//!
//! The memory belongs to a worker, and each queue is guaranteed a part of it. An operation that finds no
//! free memory or a locked block is parked until memory or the block is given back, the block perhaps by
//! another worker.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Wake, Waker};

use slab::Slab;

use super::layer::Layer;
use super::tail::{self, Side};
use super::{By, Completion, IoOp, Submitted, Ticket, bytes};
use crate::backing::{BlockLock, BlockLocks, EmulationTarget};
use crate::limits::{EMULATED_COMMON, EMULATED_PAGES, EMULATED_PER_QUEUE};
use crate::park::Doorbell;
use crate::pool::{Lanes, Pool};
use crate::xen::shm::{GuestBuf, LocalPages, PAGE_BYTES, PAGE_LEN};

/// Bytes of a piece at most: whole blocks, which are at most a page.
const PIECE_BYTES: u32 = EMULATED_PAGES * PAGE_LEN;

/// A layer for operations on parts of blocks, over one that takes whole blocks.
#[derive(Debug)]
pub struct Emulated<B: Layer> {
    /// Takes operations on whole blocks.
    pub below: B,
    jobs: Slab<Job<B::Target>>,
    /// Memory for pieces, and the operations that wait for memory or a block.
    lanes: Lanes<Parked<B::Target>>,
    idle: Vec<Memory>,
    /// Jobs whose second operation found no room below.
    owed: Vec<u32>,
    /// Something was given back, or has to be tried again.
    retry: bool,
    /// Tells that another worker has given back a block.
    others: Arc<Others>,
    waker: Waker,
    /// Reused lists: the buffers of an operation below, the buffers before a tail, results from below.
    parts: Vec<GuestBuf>,
    before_tail: Vec<GuestBuf>,
    raw: Vec<Completion>,
}

/// Tells that another worker has given back a block.
#[derive(Debug)]
struct Others {
    gave_back: AtomicBool,
    bell: Doorbell,
}

impl Wake for Others {
    fn wake(self: Arc<Self>) {
        self.gave_back.store(true, Ordering::Release);
        self.bell.ring();
    }
}

/// The blocks that an operation goes to.
struct Blocks<'a, T> {
    locks: &'a Arc<BlockLocks>,
    target: &'a T,
    by: By,
}

/// An operation that has to wait.
#[derive(Debug)]
struct Parked<T> {
    locks: Arc<BlockLocks>,
    target: T,
    operation: Kept,
    ticket: Ticket,
    by: By,
}

/// An operation with its own list of buffers. Of a transfer it keeps only the first piece, because the
/// queue asks for the rest.
#[derive(Debug)]
enum Kept {
    Read { offset: u64, buffers: Vec<GuestBuf> },
    Write { offset: u64, buffers: Vec<GuestBuf> },
    Discard { offset: u64, len: u64, secure: bool },
    Flush,
}

impl Kept {
    fn of(operation: &IoOp<'_>) -> Kept {
        let first_piece = |buffers: &[GuestBuf]| {
            let mut kept = Vec::new();
            cut(buffers, PIECE_BYTES, &mut kept);
            kept
        };
        match *operation {
            IoOp::Read { offset, buffers } => Kept::Read { offset, buffers: first_piece(buffers) },
            IoOp::Write { offset, buffers } => {
                Kept::Write { offset, buffers: first_piece(buffers) }
            }
            IoOp::Discard { offset, len, secure } => Kept::Discard { offset, len, secure },
            IoOp::Flush => Kept::Flush,
        }
    }

    fn operation(&self) -> IoOp<'_> {
        match *self {
            Kept::Read { offset, ref buffers } => IoOp::Read { offset, buffers },
            Kept::Write { offset, ref buffers } => IoOp::Write { offset, buffers },
            Kept::Discard { offset, len, secure } => IoOp::Discard { offset, len, secure },
            Kept::Flush => IoOp::Flush,
        }
    }
}

/// An operation that was submitted, or the ticket of one that has to wait for memory or a block.
type Begun = Result<Submitted, Ticket>;

/// An operation below on behalf of one from above.
#[derive(Debug)]
struct Job<T> {
    /// The operation from above.
    ticket: Ticket,
    target: T,
    by: By,
    work: Work,
    /// `None` for [`Work::Straight`].
    piece: Option<Piece>,
    /// Given back with the job.
    _lock: Option<BlockLock>,
}

#[derive(Clone, Copy, Debug)]
enum Work {
    /// Whole blocks between storage and the buffers.
    Straight,
    /// Blocks on their way to our memory, to be copied to the buffers.
    Read,
    /// Blocks on their way from our memory to storage.
    Write,
    /// A block on its way to our memory, to be changed in part and written back.
    Modify,
}

/// Blocks of the target in our memory: `span` bytes from byte `start` on. The buffers hold `len` of
/// them, from the byte `skip` on.
#[derive(Debug)]
struct Piece {
    memory: Memory,
    start: u64,
    span: u32,
    skip: u32,
    len: u32,
}

/// Memory for a piece, and the buffers that its data comes from or goes to.
#[derive(Debug)]
struct Memory {
    pages: LocalPages,
    buffers: Vec<GuestBuf>,
}

impl<B: Layer> Layer for Emulated<B>
where
    B::Target: Clone,
{
    type Target = EmulationTarget<B::Target>;

    fn submit(
        &mut self,
        target: &EmulationTarget<B::Target>,
        operation: &IoOp<'_>,
        ticket: Ticket,
        by: By,
    ) -> Submitted {
        let Some(locks) = &target.locks else {
            return self.below.submit(&target.below, operation, ticket, by);
        };
        let blocks = Blocks { locks, target: &target.below, by };
        let mut before_tail = std::mem::take(&mut self.before_tail);
        let submitted = match tail::side(operation, target.tail.as_ref(), &mut before_tail) {
            Side::Blocks(operation) => self.submit_to_blocks(&blocks, &operation, ticket),
            Side::Tail(tail) => self.below.submit(tail, operation, ticket, by),
        };
        self.before_tail = before_tail;
        submitted
    }

    #[inline]
    fn kick(&mut self) -> io::Result<()> {
        self.below.kick()
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<Completion>) {
        let first = done.len();
        self.below.reap(done);
        if !self.is_idle() {
            self.complete(done, first);
        }
    }

    fn in_flight(&self) -> usize {
        self.below.in_flight() + self.held_back()
    }

    fn arm(&mut self) -> io::Result<bool> {
        Ok(self.below.arm()? || self.is_ready())
    }
}

impl<B: Layer> Emulated<B>
where
    B::Target: Clone,
{
    /// Nothing under way; `bell` wakes the worker.
    pub fn new(below: B, bell: Doorbell) -> Emulated<B> {
        let others = Arc::new(Others { gave_back: AtomicBool::new(false), bell });
        let (idle, owed, parts, before_tail, raw) = Default::default();
        Emulated {
            below,
            jobs: Slab::new(),
            lanes: Lanes::new(Pool::new(EMULATED_PER_QUEUE, EMULATED_COMMON)),
            idle,
            owed,
            retry: false,
            waker: Waker::from(Arc::clone(&others)),
            others,
            parts,
            before_tail,
            raw,
        }
    }

    fn submit_to_blocks(
        &mut self,
        blocks: &Blocks<'_, B::Target>,
        operation: &IoOp<'_>,
        ticket: Ticket,
    ) -> Submitted {
        self.begin(blocks, operation, ticket).unwrap_or_else(|ticket| {
            let (locks, target, by) = (blocks.locks.clone(), blocks.target.clone(), blocks.by);
            let (queue, operation) = (ticket.queue(), Kept::of(operation));
            self.lanes.park(queue, Parked { locks, target, operation, ticket, by });
            Submitted::Parked
        })
    }

    fn begin(
        &mut self,
        blocks: &Blocks<'_, B::Target>,
        operation: &IoOp<'_>,
        ticket: Ticket,
    ) -> Begun {
        match *operation {
            IoOp::Flush => Ok(self.below.submit(blocks.target, operation, ticket, blocks.by)),
            IoOp::Discard { offset, len, secure } => {
                self.discard(blocks, (offset, len, secure), ticket)
            }
            IoOp::Read { offset, buffers } => self.read(blocks, offset, buffers, ticket),
            IoOp::Write { offset, buffers } => self.write(blocks, offset, buffers, ticket),
        }
    }

    fn read(
        &mut self,
        blocks: &Blocks<'_, B::Target>,
        offset: u64,
        buffers: &[GuestBuf],
        ticket: Ticket,
    ) -> Begun {
        let block = blocks.locks.block_bytes();
        let (skip, total) = (rest(offset, block), bytes(buffers));
        let straight = if skip == 0 { straight_bytes(buffers, block) } else { 0 };
        if straight == total || straight >= PIECE_BYTES {
            cut(buffers, straight, &mut self.parts);
            let read = IoOp::Read { offset, buffers: &self.parts };
            return Ok(self.below.submit(blocks.target, &read, ticket, blocks.by));
        }
        let len = total.min(PIECE_BYTES - skip);
        let span = (skip + len).next_multiple_of(block);
        if !self.lanes.has_room(ticket.queue()) {
            return Err(ticket);
        }
        let piece = self.piece(&ticket, offset, span, skip, len, buffers);
        let offset = piece.start;
        let job = blocks.job(ticket, Work::Read, Some(piece), None);
        Ok(self.start(job, |buffers| IoOp::Read { offset, buffers }))
    }

    fn write(
        &mut self,
        blocks: &Blocks<'_, B::Target>,
        offset: u64,
        buffers: &[GuestBuf],
        ticket: Ticket,
    ) -> Begun {
        let block = blocks.locks.block_bytes();
        let (first, skip, total) = (offset / u64::from(block), rest(offset, block), bytes(buffers));
        if skip > 0 || total < block {
            // Memory is looked for before the lock is taken: giving back the lock would wake others
            // for nothing.
            if !self.lanes.has_room(ticket.queue()) {
                return Err(ticket);
            }
            let Some(lock) = blocks.locks.try_own(first, &self.waker) else {
                return Err(ticket);
            };
            let len = total.min(block - skip);
            let piece = self.piece(&ticket, offset, block, skip, len, buffers);
            let offset = piece.start;
            let job = blocks.job(ticket, Work::Modify, Some(piece), Some(lock));
            return Ok(self.start(job, |buffers| IoOp::Read { offset, buffers }));
        }
        let whole = total / block * block;
        let straight = straight_bytes(buffers, block);
        let goes_straight = straight == whole || straight >= PIECE_BYTES;
        let len = if goes_straight { straight } else { whole.min(PIECE_BYTES) };
        if !goes_straight && !self.lanes.has_room(ticket.queue()) {
            return Err(ticket);
        }
        let range = first..first + u64::from(len / block);
        let Some(lock) = blocks.locks.try_share(range, &self.waker) else {
            return Err(ticket);
        };
        let (work, piece) = if goes_straight {
            cut(buffers, len, &mut self.parts);
            (Work::Straight, None)
        } else {
            let piece = self.piece(&ticket, offset, len, 0, len, buffers);
            piece.fill();
            (Work::Write, Some(piece))
        };
        let job = blocks.job(ticket, work, piece, Some(lock));
        Ok(self.start(job, |buffers| IoOp::Write { offset, buffers }))
    }

    /// Discards whole blocks; the parts of blocks at both ends stay as they are.
    fn discard(
        &mut self,
        blocks: &Blocks<'_, B::Target>,
        (offset, len, secure): (u64, u64, bool),
        ticket: Ticket,
    ) -> Begun {
        let block = u64::from(blocks.locks.block_bytes());
        let (first, end) = (offset.div_ceil(block), (offset + len) / block);
        if first >= end {
            return Ok(Submitted::Done(Completion { ticket, result: 0 }));
        }
        let Some(lock) = blocks.locks.try_share(first..end, &self.waker) else {
            return Err(ticket);
        };
        let (offset, len) = (first * block, (end - first) * block);
        let job = blocks.job(ticket, Work::Straight, None, Some(lock));
        Ok(self.start(job, |_| IoOp::Discard { offset, len, secure }))
    }

    /// A piece for the blocks around `offset`, which is `skip` bytes into them, and the first `len` bytes
    /// of `buffers`; lists its memory in `parts`. There has to be room for it.
    fn piece(
        &mut self,
        ticket: &Ticket,
        offset: u64,
        span: u32,
        skip: u32,
        len: u32,
        buffers: &[GuestBuf],
    ) -> Piece {
        assert!(self.lanes.take(ticket.queue()), "there was room");
        let mut memory = self.idle.pop().unwrap_or_else(|| Memory {
            pages: LocalPages::new(EMULATED_PAGES as usize),
            buffers: Vec::new(),
        });
        cut(buffers, len, &mut memory.buffers);
        let piece = Piece { memory, start: offset - u64::from(skip), span, skip, len };
        piece.list(&mut self.parts);
        piece
    }

    /// Starts a job whose operation below is on the buffers in `parts`.
    fn start(
        &mut self,
        job: Job<B::Target>,
        operation: impl FnOnce(&[GuestBuf]) -> IoOp<'_>,
    ) -> Submitted {
        let index = self.jobs.insert(job);
        let number = u32::try_from(index).expect("bounded by the requests in flight");
        let (job, operation) = (&self.jobs[index], operation(&self.parts));
        match self.below.submit(&job.target, &operation, job.ticket_below(number), job.by) {
            Submitted::Full(_) => Submitted::Full(self.end(number)),
            Submitted::Done(completion) => match self.advance(number, completion.result) {
                Some(result) => Submitted::Done(self.finish(number, result)),
                None => Submitted::Started,
            },
            submitted => submitted,
        }
    }

    /// Forgets a job and gives back what it had; returns the ticket of the operation from above.
    fn end(&mut self, number: u32) -> Ticket {
        let Job { ticket, piece, .. } = self.jobs.remove(number as usize);
        if let Some(piece) = piece {
            self.lanes.give_back(ticket.queue());
            self.idle.push(piece.memory);
        }
        self.retry = true;
        ticket
    }

    /// Ends a job with its result.
    fn finish(&mut self, number: u32, result: i32) -> Completion {
        Completion { ticket: self.end(number), result }
    }

    /// Turns the results from below, in `done` from `first` on, into results for above, and goes on with
    /// what waits.
    fn complete(&mut self, done: &mut Vec<Completion>, first: usize) {
        let mut raw = std::mem::take(&mut self.raw);
        raw.extend(done.drain(first..));
        for Completion { ticket, result } in raw.drain(..) {
            let Some(super::Job::Emulated(number)) = ticket.job() else {
                done.push(Completion { ticket, result });
                continue;
            };
            if let Some(result) = self.advance(number, result) {
                done.push(self.finish(number, result));
            }
        }
        self.raw = raw;
        if self.is_ready() {
            self.go_on(done);
        }
    }

    /// Takes the result of a job's operation. Returns the result of the job, unless another operation
    /// follows.
    fn advance(&mut self, number: u32, result: i32) -> Option<i32> {
        let job = &mut self.jobs[number as usize];
        let (Ok(moved), Some(piece)) = (u32::try_from(result), &mut job.piece) else {
            return Some(result);
        };
        match job.work {
            Work::Straight | Work::Write => Some(piece.result(moved)),
            Work::Read => {
                // Behind what was read, our memory holds data that others read before.
                piece.len = piece.len.min(moved.saturating_sub(piece.skip));
                piece.empty();
                Some(piece.result(moved))
            }
            // The file ends inside the block: someone made it shorter.
            Work::Modify if moved < piece.span => Some(-libc::EIO),
            Work::Modify => {
                piece.fill();
                job.work = Work::Write;
                self.write_back(number)
            }
        }
    }

    /// Writes a changed block, now or when there is room below. Returns the result of the job if the
    /// block was written at once.
    fn write_back(&mut self, number: u32) -> Option<i32> {
        let job = &self.jobs[number as usize];
        let piece = job.piece.as_ref()?;
        piece.list(&mut self.parts);
        let write = IoOp::Write { offset: piece.start, buffers: &self.parts };
        let ticket = job.ticket_below(number);
        match self.below.submit(&job.target, &write, ticket, job.by) {
            Submitted::Done(completion) => return self.advance(number, completion.result),
            Submitted::Full(_) => self.owed.push(number),
            Submitted::Started | Submitted::Parked => {}
        }
        None
    }

    /// Tries again what found no room below, and begins operations that waited for memory or a block.
    fn go_on(&mut self, done: &mut Vec<Completion>) {
        // Reset first: a block that is given back from here on sets it again.
        self.others.gave_back.swap(false, Ordering::AcqRel);
        self.retry = false;
        for _ in 0..self.owed.len() {
            let number = self.owed.remove(0);
            if let Some(result) = self.write_back(number) {
                done.push(self.finish(number, result));
            }
        }
        for queue in self.lanes.waiting() {
            while let Some(parked) = self.lanes.next_of(queue) {
                let Parked { locks, target, operation, ticket, by } = parked;
                let blocks = Blocks { locks: &locks, target: &target, by };
                let ticket = match self.begin(&blocks, &operation.operation(), ticket) {
                    Ok(Submitted::Started | Submitted::Parked) => continue,
                    Ok(Submitted::Done(completion)) => {
                        done.push(completion);
                        continue;
                    }
                    Ok(Submitted::Full(ticket)) => {
                        self.retry = true;
                        ticket
                    }
                    Err(ticket) => ticket,
                };
                self.lanes.put_back(queue, Parked { locks, target, operation, ticket, by });
                break;
            }
        }
    }

    /// Whether there is nothing to complete or to try again.
    #[inline]
    fn is_idle(&self) -> bool {
        self.jobs.is_empty() && self.lanes.parked() == 0
    }

    /// Whether something can be done at once, without an event from below.
    fn is_ready(&self) -> bool {
        let waits = self.lanes.parked() > 0;
        !self.owed.is_empty()
            || (waits && (self.retry || self.others.gave_back.load(Ordering::Acquire)))
    }

    /// Operations of which no part is below.
    fn held_back(&self) -> usize {
        self.owed.len() + self.lanes.parked()
    }
}

impl<T: Clone> Blocks<'_, T> {
    /// An operation on them on behalf of `ticket`.
    fn job(
        &self,
        ticket: Ticket,
        work: Work,
        piece: Option<Piece>,
        lock: Option<BlockLock>,
    ) -> Job<T> {
        Job { ticket, target: self.target.clone(), by: self.by, work, piece, _lock: lock }
    }
}

impl<T> Job<T> {
    /// The ticket of its operation below.
    fn ticket_below(&self, number: u32) -> Ticket {
        Ticket::of_job(self.ticket.queue(), super::Job::Emulated(number))
    }
}

impl Piece {
    /// Lists our memory as buffers: the whole span.
    fn list(&self, parts: &mut Vec<GuestBuf>) {
        parts.clear();
        let starts = (0..self.span).step_by(PAGE_BYTES);
        parts.extend(starts.zip(0..).filter_map(|(start, page)| {
            self.memory.pages.page(page).part(0, (self.span - start).min(PAGE_LEN))
        }));
    }

    /// Copies the buffers' data to its place in our memory.
    fn fill(&self) {
        self.each_part(|ours, theirs| theirs.copy_into(ours));
    }

    /// Copies our data to the buffers.
    fn empty(&self) {
        self.each_part(|ours, theirs| ours.copy_into(theirs));
    }

    /// Calls `show` for each stretch of the data that is in one page of ours and one buffer of theirs.
    fn each_part(&self, mut show: impl FnMut(GuestBuf, GuestBuf)) {
        let (mut at, end) = (self.skip, self.skip + self.len);
        for buffer in &self.memory.buffers {
            let mut done = 0;
            while done < buffer.len() && at < end {
                let (page, inside) = ((at / PAGE_LEN) as usize, at % PAGE_LEN);
                let len = (PAGE_LEN - inside).min(buffer.len() - done).min(end - at);
                let ours = self.memory.pages.page(page).part(inside, len);
                if let (Some(ours), Some(theirs)) = (ours, buffer.part(done, len)) {
                    show(ours, theirs);
                }
                (at, done) = (at + len, done + len);
            }
        }
    }

    /// How many bytes of the buffers were moved, if `moved` bytes of the span were.
    fn result(&self, moved: u32) -> i32 {
        let ours = moved.saturating_sub(self.skip).min(self.len);
        i32::try_from(ours).expect("a piece is far below 2 GiB")
    }
}

fn rest(offset: u64, block: u32) -> u32 {
    u32::try_from(offset % u64::from(block)).expect("below a block")
}

/// The first `len` bytes of `buffers`.
pub fn cut(buffers: &[GuestBuf], len: u32, parts: &mut Vec<GuestBuf>) {
    parts.clear();
    let mut left = len;
    parts.extend(buffers.iter().map_while(|buffer| {
        let part = buffer.part(0, left.min(buffer.len()))?;
        left -= part.len();
        (!part.is_empty()).then_some(part)
    }));
}

/// How many bytes at the start of `buffers` storage can take as they are: each block is contiguous in
/// memory.
fn straight_bytes(buffers: &[GuestBuf], block: u32) -> u32 {
    let end_of = |buffer: &GuestBuf| buffer.address().as_ptr().addr() + buffer.len() as usize;
    let mut straight = 0;
    for stretch in buffers.chunk_by(|one, next| end_of(one) == next.address().as_ptr().addr()) {
        let len = bytes(stretch);
        straight += len / block * block;
        if !len.is_multiple_of(block) {
            break;
        }
    }
    straight
}

#[cfg(test)]
mod test;

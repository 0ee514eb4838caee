//! 512-byte sectors on storage with larger blocks.
//!
//! Storage takes whole blocks, in buffers that are whole blocks, too. What is so goes straight to
//! it. What is not goes through memory of ours, in pieces: a piece that is done is a short transfer,
//! and the queue asks for the rest. A read takes the blocks around it. A write of whole blocks in
//! odd buffers is copied together. A write of a part of a block reads the block, changes it and
//! writes it back, alone on that block ([`BlockLocks`]); it is one block at a time, so a crash in
//! between leaves each block as before or after, as on a drive that does this itself.
//!
//! The memory is a worker's, a part of it guaranteed to each queue. What finds none, or finds its block
//! taken, is parked: it goes on when something was given back, by this worker or, of blocks, another.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Wake, Waker};

use slab::Slab;

use super::transport::Target;
use super::{Completion, IoOp, Submitted, Ticket, bytes};
use crate::backing::{BlockLock, BlockLocks};
use crate::limits::{EMULATED_COMMON, EMULATED_PAGES, EMULATED_PER_QUEUE};
use crate::park::Doorbell;
use crate::pool::{Lanes, Pool};
use crate::xen::shm::{GuestBuf, LocalPages, PAGE_BYTES, PAGE_LEN};

/// Bytes of a piece at most: whole blocks, which are at most a page.
const PIECE_BYTES: u32 = EMULATED_PAGES * PAGE_LEN;

/// Operations on parts of blocks, of one worker.
#[derive(Debug)]
pub struct Emulation {
    jobs: Slab<Job>,
    /// Of the memory for pieces, with what waits for some or for a block.
    lanes: Lanes<Parked>,
    idle: Vec<Memory>,
    /// Jobs whose second operation found no room below.
    owed: Vec<u32>,
    /// Something was given back, or is to be tried again.
    retry: bool,
    /// Tells that another worker has given a block back.
    others: Arc<Others>,
    waker: Waker,
    /// Reused lists: the buffers of an operation below, and results from there.
    parts: Vec<GuestBuf>,
    raw: Vec<Completion>,
}

/// Tells of blocks that another worker has given back.
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

/// An operation that has to wait.
#[derive(Debug)]
struct Parked {
    locks: Arc<BlockLocks>,
    target: Target,
    operation: Kept,
    ticket: Ticket,
}

/// An operation with its buffers; of a transfer only its beginning, for the queue asks for the rest.
#[derive(Debug)]
enum Kept {
    Read { offset: u64, buffers: Vec<GuestBuf> },
    Write { offset: u64, buffers: Vec<GuestBuf> },
    Discard { offset: u64, len: u64, secure: bool },
    Flush,
}

impl Kept {
    fn of(operation: &IoOp<'_>) -> Kept {
        let beginning = |buffers: &[GuestBuf]| {
            let mut kept = Vec::new();
            cut(buffers, PIECE_BYTES, &mut kept);
            kept
        };
        match *operation {
            IoOp::Read { offset, buffers } => Kept::Read { offset, buffers: beginning(buffers) },
            IoOp::Write { offset, buffers } => Kept::Write { offset, buffers: beginning(buffers) },
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
struct Job {
    /// Whose it is.
    ticket: Ticket,
    target: Target,
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
    /// Blocks on their way to our memory, and then to the buffers.
    Read,
    /// Blocks on their way from our memory to storage.
    Write,
    /// A block on its way to our memory, a part of it to be changed and written back.
    Modify,
}

/// Blocks of the target in our memory: `span` bytes from byte `start` on. Of these `len` from
/// `skip` on are what the buffers hold.
#[derive(Debug)]
struct Piece {
    memory: Memory,
    start: u64,
    span: u32,
    skip: u32,
    len: u32,
}

/// Memory for a piece, and where its data comes from or goes to.
#[derive(Debug)]
struct Memory {
    pages: LocalPages,
    buffers: Vec<GuestBuf>,
}

impl Emulation {
    /// Nothing under way; `bell` wakes the worker.
    pub fn new(bell: Doorbell) -> Emulation {
        let others = Arc::new(Others { gave_back: AtomicBool::new(false), bell });
        let (idle, owed, parts, raw) = Default::default();
        Emulation {
            jobs: Slab::new(),
            lanes: Lanes::new(Pool::new(EMULATED_PER_QUEUE, EMULATED_COMMON)),
            idle,
            owed,
            retry: false,
            waker: Waker::from(Arc::clone(&others)),
            others,
            parts,
            raw,
        }
    }

    /// Takes an operation for `target`, whose blocks `locks` are; `below` takes operations on whole
    /// blocks of it.
    pub fn submit(
        &mut self,
        locks: &Arc<BlockLocks>,
        target: &Target,
        operation: &IoOp<'_>,
        ticket: Ticket,
        below: impl FnMut(&Target, &IoOp<'_>, Ticket) -> Submitted,
    ) -> Submitted {
        match self.begin(locks, target, operation, ticket, below) {
            Ok(submitted) => submitted,
            Err(ticket) => {
                let (locks, target) = (locks.clone(), target.clone());
                let (queue, operation) = (ticket.queue(), Kept::of(operation));
                self.lanes.park(queue, Parked { locks, target, operation, ticket });
                Submitted::Parked
            }
        }
    }

    fn begin(
        &mut self,
        locks: &Arc<BlockLocks>,
        target: &Target,
        operation: &IoOp<'_>,
        ticket: Ticket,
        mut below: impl FnMut(&Target, &IoOp<'_>, Ticket) -> Submitted,
    ) -> Begun {
        let mut below = |operation: &IoOp<'_>, ticket| below(target, operation, ticket);
        match *operation {
            IoOp::Flush => Ok(below(operation, ticket)),
            IoOp::Discard { offset, len, secure } => {
                self.discard(locks, target, (offset, len, secure), ticket, below)
            }
            IoOp::Read { offset, buffers } => {
                self.read(locks, target, offset, buffers, ticket, below)
            }
            IoOp::Write { offset, buffers } => {
                self.write(locks, target, offset, buffers, ticket, below)
            }
        }
    }

    fn read(
        &mut self,
        locks: &Arc<BlockLocks>,
        target: &Target,
        offset: u64,
        buffers: &[GuestBuf],
        ticket: Ticket,
        mut below: impl FnMut(&IoOp<'_>, Ticket) -> Submitted,
    ) -> Begun {
        let block = locks.block_bytes();
        let (skip, total) = (rest(offset, block), bytes(buffers));
        let straight = if skip == 0 { straight_bytes(buffers, block) } else { 0 };
        if straight == total || straight >= PIECE_BYTES {
            cut(buffers, straight, &mut self.parts);
            return Ok(below(&IoOp::Read { offset, buffers: &self.parts }, ticket));
        }
        let len = total.min(PIECE_BYTES - skip);
        let span = (skip + len).next_multiple_of(block);
        if !self.lanes.has_room(ticket.queue()) {
            return Err(ticket);
        }
        let piece = self.piece(&ticket, offset, span, skip, len, buffers);
        let offset = piece.start;
        let job = Job {
            ticket,
            target: target.clone(),
            work: Work::Read,
            piece: Some(piece),
            _lock: None,
        };
        Ok(self.start(job, |parts, ticket| below(&IoOp::Read { offset, buffers: parts }, ticket)))
    }

    fn write(
        &mut self,
        locks: &Arc<BlockLocks>,
        target: &Target,
        offset: u64,
        buffers: &[GuestBuf],
        ticket: Ticket,
        mut below: impl FnMut(&IoOp<'_>, Ticket) -> Submitted,
    ) -> Begun {
        let block = locks.block_bytes();
        let (first, skip, total) = (offset / u64::from(block), rest(offset, block), bytes(buffers));
        if skip > 0 || total < block {
            // Looked for before the lock is taken: giving that back would wake others for nothing.
            if !self.lanes.has_room(ticket.queue()) {
                return Err(ticket);
            }
            let Some(lock) = locks.try_own(first, &self.waker) else {
                return Err(ticket);
            };
            let len = total.min(block - skip);
            let piece = self.piece(&ticket, offset, block, skip, len, buffers);
            let offset = piece.start;
            let job = Job {
                ticket,
                target: target.clone(),
                work: Work::Modify,
                piece: Some(piece),
                _lock: Some(lock),
            };
            let below =
                |parts: &[GuestBuf], ticket| below(&IoOp::Read { offset, buffers: parts }, ticket);
            return Ok(self.start(job, below));
        }
        let whole = total / block * block;
        let straight = straight_bytes(buffers, block);
        let goes_straight = straight == whole || straight >= PIECE_BYTES;
        let len = if goes_straight { straight } else { whole.min(PIECE_BYTES) };
        if !goes_straight && !self.lanes.has_room(ticket.queue()) {
            return Err(ticket);
        }
        let blocks = first..first + u64::from(len / block);
        let Some(lock) = locks.try_share(blocks, &self.waker) else {
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
        let job = Job { ticket, target: target.clone(), work, piece, _lock: Some(lock) };
        Ok(self.start(job, |parts, ticket| below(&IoOp::Write { offset, buffers: parts }, ticket)))
    }

    /// Whole blocks are given back; the parts of blocks at both ends stay as they are.
    fn discard(
        &mut self,
        locks: &Arc<BlockLocks>,
        target: &Target,
        (offset, len, secure): (u64, u64, bool),
        ticket: Ticket,
        mut below: impl FnMut(&IoOp<'_>, Ticket) -> Submitted,
    ) -> Begun {
        let block = u64::from(locks.block_bytes());
        let (first, end) = (offset.div_ceil(block), (offset + len) / block);
        if first >= end {
            return Ok(Submitted::Done(Completion { ticket, result: 0 }));
        }
        let Some(lock) = locks.try_share(first..end, &self.waker) else {
            return Err(ticket);
        };
        let (offset, len) = (first * block, (end - first) * block);
        let job = Job {
            ticket,
            target: target.clone(),
            work: Work::Straight,
            piece: None,
            _lock: Some(lock),
        };
        Ok(self.start(job, |_, ticket| below(&IoOp::Discard { offset, len, secure }, ticket)))
    }

    /// Memory for the blocks around `offset`, which stands `skip` bytes into them, listed in
    /// `parts`, and a note of the first `len` bytes of `buffers`. There has to be room for it.
    fn piece(
        &mut self,
        ticket: &Ticket,
        offset: u64,
        span: u32,
        skip: u32,
        len: u32,
        buffers: &[GuestBuf],
    ) -> Piece {
        assert!(self.lanes.take(ticket.queue()), "it was looked for before");
        let mut memory = self.idle.pop().unwrap_or_else(|| Memory {
            pages: LocalPages::new(EMULATED_PAGES as usize),
            buffers: Vec::new(),
        });
        cut(buffers, len, &mut memory.buffers);
        let piece = Piece { memory, start: offset - u64::from(skip), span, skip, len };
        piece.list(&mut self.parts);
        piece
    }

    /// Has `below` start a job on the buffers in `parts`.
    fn start(
        &mut self,
        job: Job,
        below: impl FnOnce(&[GuestBuf], Ticket) -> Submitted,
    ) -> Submitted {
        let queue = job.ticket.queue();
        let index = self.jobs.insert(job);
        let number = u32::try_from(index).expect("bounded by the requests in flight");
        match below(&self.parts, job_ticket(queue, number)) {
            Submitted::Full(_) => Submitted::Full(self.end(number)),
            Submitted::Done(Completion { result, .. }) => {
                unreachable!("storage does nothing at once, and did {result}")
            }
            submitted => submitted,
        }
    }

    /// Forgets a job and gives back what it had; returns the ticket it was for.
    fn end(&mut self, number: u32) -> Ticket {
        let Job { ticket, piece, .. } = self.jobs.remove(number as usize);
        if let Some(piece) = piece {
            self.lanes.give_back(ticket.queue());
            self.idle.push(piece.memory);
        }
        self.retry = true;
        ticket
    }

    /// Makes of the results from below, which stand in `done` from `first` on, those for above, and
    /// goes on with what waits. `below` takes what follows from them.
    pub fn complete(
        &mut self,
        done: &mut Vec<Completion>,
        first: usize,
        mut below: impl FnMut(&Target, &IoOp<'_>, Ticket) -> Submitted,
    ) {
        let mut raw = std::mem::take(&mut self.raw);
        raw.extend(done.drain(first..));
        for Completion { ticket, result } in raw.drain(..) {
            let Some(super::Job::Emulated(number)) = ticket.job() else {
                done.push(Completion { ticket, result });
                continue;
            };
            if let Some(result) = self.advance(number, result, &mut below) {
                done.push(Completion { ticket: self.end(number), result });
            }
        }
        self.raw = raw;
        if self.is_ready() {
            self.go_on(done, below);
        }
    }

    /// Takes the result of a job's operation: the job's own, unless another operation follows.
    fn advance(
        &mut self,
        number: u32,
        result: i32,
        below: impl FnMut(&Target, &IoOp<'_>, Ticket) -> Submitted,
    ) -> Option<i32> {
        let job = &mut self.jobs[number as usize];
        let (Ok(moved), Some(piece)) = (u32::try_from(result), &mut job.piece) else {
            return Some(result);
        };
        match job.work {
            Work::Straight | Work::Write => Some(piece.result(moved)),
            Work::Read => {
                // Beyond what was read our memory holds what others read before.
                piece.len = piece.len.min(moved.saturating_sub(piece.skip));
                piece.empty();
                Some(piece.result(moved))
            }
            // The file ends inside the block: it was made shorter under us.
            Work::Modify if moved < piece.span => Some(-libc::EIO),
            Work::Modify => {
                piece.fill();
                job.work = Work::Write;
                self.write_back(number, below);
                None
            }
        }
    }

    /// Has `below` write a changed block, now or when it has room.
    fn write_back(
        &mut self,
        number: u32,
        mut below: impl FnMut(&Target, &IoOp<'_>, Ticket) -> Submitted,
    ) {
        let job = &self.jobs[number as usize];
        let Some(piece) = &job.piece else { return };
        piece.list(&mut self.parts);
        let write = IoOp::Write { offset: piece.start, buffers: &self.parts };
        let ticket = job_ticket(job.ticket.queue(), number);
        if let Submitted::Full(_) = below(&job.target, &write, ticket) {
            self.owed.push(number);
        }
    }

    /// Tries again what found no room below, and begins what waited for what was given back.
    fn go_on(
        &mut self,
        done: &mut Vec<Completion>,
        mut below: impl FnMut(&Target, &IoOp<'_>, Ticket) -> Submitted,
    ) {
        // Whoever gives back from here on says so again.
        self.others.gave_back.swap(false, Ordering::AcqRel);
        self.retry = false;
        for _ in 0..self.owed.len() {
            let number = self.owed.remove(0);
            self.write_back(number, &mut below);
        }
        for queue in self.lanes.waiting() {
            while let Some(parked) = self.lanes.next_of(queue) {
                let Parked { locks, target, operation, ticket } = parked;
                let begun = self.begin(&locks, &target, &operation.operation(), ticket, &mut below);
                let ticket = match begun {
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
                self.lanes.put_back(queue, Parked { locks, target, operation, ticket });
                break;
            }
        }
    }

    /// Whether there is nothing to complete or to try again.
    #[inline]
    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty() && self.lanes.parked() == 0
    }

    /// Whether something is to be done at once, without an event from below.
    pub fn is_ready(&self) -> bool {
        let waits = self.lanes.parked() > 0;
        !self.owed.is_empty()
            || (waits && (self.retry || self.others.gave_back.load(Ordering::Acquire)))
    }

    /// Operations of which nothing is below.
    pub fn held_back(&self) -> usize {
        self.owed.len() + self.lanes.parked()
    }
}

/// The ticket of a job's operation below.
fn job_ticket(queue: usize, number: u32) -> Ticket {
    Ticket::of_job(queue, super::Job::Emulated(number))
}

impl Piece {
    /// Our memory as buffers: the whole span.
    fn list(&self, parts: &mut Vec<GuestBuf>) {
        parts.clear();
        let starts = (0..self.span).step_by(PAGE_BYTES);
        parts.extend(starts.zip(0..).filter_map(|(start, page)| {
            self.memory.pages.page(page).part(0, (self.span - start).min(PAGE_LEN))
        }));
    }

    /// Copies the buffers' data to where it belongs in our memory.
    fn fill(&self) {
        self.each_part(|ours, theirs| theirs.copy_into(ours));
    }

    /// Copies our data to the buffers.
    fn empty(&self) {
        self.each_part(|ours, theirs| ours.copy_into(theirs));
    }

    /// Shows each stretch of the data that lies in one page of ours and one buffer of theirs.
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

    /// What moving the span means for the buffers: bytes of theirs, from the first on.
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

/// How many bytes from the start on lie in memory as storage takes them: in stretches of whole
/// blocks.
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

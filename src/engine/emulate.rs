//! 512-byte sectors on storage with larger blocks.
//!
//! Storage takes whole blocks, in buffers that are whole blocks, too. What is so goes straight to
//! it. What is not goes through memory of ours, in pieces: a piece that is done is a short transfer,
//! and the queue asks for the rest. A read takes the blocks around it. A write of whole blocks in
//! odd buffers is copied together. A write of a part of a block reads the block, changes it and
//! writes it back, alone on that block ([`BlockLocks`]); it is one block at a time, so a crash in
//! between leaves each block as before or after, as on a drive that does this itself.

use std::os::fd::RawFd;
use std::sync::Arc;

use slab::Slab;

use super::{Completion, IoOp, Ticket, bytes};
use crate::backing::{BlockLock, BlockLocks};
use crate::limits::{EMULATED_PAGES, EMULATED_PER_WORKER};
use crate::xen::shm::{GuestBuf, LocalPages, PAGE_BYTES, PAGE_LEN};

/// Bytes of a piece at most: whole blocks, which are at most a page.
const PIECE_BYTES: u32 = EMULATED_PAGES * PAGE_LEN;

/// Operations on parts of blocks, of one worker.
#[derive(Debug, Default)]
pub struct Emulation {
    jobs: Slab<Job>,
    idle: Vec<Memory>,
    lent: usize,
    /// Jobs whose second operation found no room below.
    waiting: Vec<usize>,
    /// Done without any operation.
    immediate: Vec<Completion>,
    /// Reused lists: the buffers of an operation below, and results from there.
    parts: Vec<GuestBuf>,
    raw: Vec<Completion>,
}

/// An operation below on behalf of one from above.
#[derive(Debug)]
struct Job {
    /// Whose it is.
    ticket: Ticket,
    file: RawFd,
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
    /// Takes an operation for `file`, whose blocks `locks` are; `below` takes operations on whole
    /// blocks of it. `Err`: there is no room now, or somebody writes to a part of the same block.
    pub fn submit(
        &mut self,
        locks: &Arc<BlockLocks>,
        file: RawFd,
        operation: &IoOp<'_>,
        ticket: Ticket,
        mut below: impl FnMut(&IoOp<'_>, Ticket) -> Result<(), Ticket>,
    ) -> Result<(), Ticket> {
        match *operation {
            IoOp::Flush => below(operation, ticket),
            IoOp::Discard { offset, len, secure } => {
                self.discard(locks, file, (offset, len, secure), ticket, below)
            }
            IoOp::Read { offset, buffers } => {
                self.read(locks, file, offset, buffers, ticket, below)
            }
            IoOp::Write { offset, buffers } => {
                self.write(locks, file, offset, buffers, ticket, below)
            }
        }
    }

    fn read(
        &mut self,
        locks: &Arc<BlockLocks>,
        file: RawFd,
        offset: u64,
        buffers: &[GuestBuf],
        ticket: Ticket,
        mut below: impl FnMut(&IoOp<'_>, Ticket) -> Result<(), Ticket>,
    ) -> Result<(), Ticket> {
        let block = locks.block_bytes();
        let (skip, total) = (rest(offset, block), bytes(buffers));
        let straight = if skip == 0 { straight_bytes(buffers, block) } else { 0 };
        if straight == total || straight >= PIECE_BYTES {
            cut(buffers, straight, &mut self.parts);
            return below(&IoOp::Read { offset, buffers: &self.parts }, ticket);
        }
        let len = total.min(PIECE_BYTES - skip);
        let span = (skip + len).next_multiple_of(block);
        let Some(piece) = self.piece(offset, span, skip, len, buffers) else { return Err(ticket) };
        let offset = piece.start;
        self.begin(
            Job { ticket, file, work: Work::Read, piece: Some(piece), _lock: None },
            |parts, ticket| below(&IoOp::Read { offset, buffers: parts }, ticket),
        )
    }

    fn write(
        &mut self,
        locks: &Arc<BlockLocks>,
        file: RawFd,
        offset: u64,
        buffers: &[GuestBuf],
        ticket: Ticket,
        mut below: impl FnMut(&IoOp<'_>, Ticket) -> Result<(), Ticket>,
    ) -> Result<(), Ticket> {
        let block = locks.block_bytes();
        let (first, skip, total) = (offset / u64::from(block), rest(offset, block), bytes(buffers));
        if skip > 0 || total < block {
            let Some(lock) = locks.try_own(first) else { return Err(ticket) };
            let len = total.min(block - skip);
            let Some(piece) = self.piece(offset, block, skip, len, buffers) else {
                return Err(ticket);
            };
            let offset = piece.start;
            let job =
                Job { ticket, file, work: Work::Modify, piece: Some(piece), _lock: Some(lock) };
            return self
                .begin(job, |parts, ticket| below(&IoOp::Read { offset, buffers: parts }, ticket));
        }
        let whole = total / block * block;
        let straight = straight_bytes(buffers, block);
        let goes_straight = straight == whole || straight >= PIECE_BYTES;
        let len = if goes_straight { straight } else { whole.min(PIECE_BYTES) };
        let blocks = first..first + u64::from(len / block);
        let Some(lock) = locks.try_share(blocks) else { return Err(ticket) };
        let (work, piece) = if goes_straight {
            cut(buffers, len, &mut self.parts);
            (Work::Straight, None)
        } else {
            let Some(piece) = self.piece(offset, len, 0, len, buffers) else { return Err(ticket) };
            piece.fill();
            (Work::Write, Some(piece))
        };
        self.begin(Job { ticket, file, work, piece, _lock: Some(lock) }, |parts, ticket| {
            below(&IoOp::Write { offset, buffers: parts }, ticket)
        })
    }

    /// Whole blocks are given back; the parts of blocks at both ends stay as they are.
    fn discard(
        &mut self,
        locks: &Arc<BlockLocks>,
        file: RawFd,
        (offset, len, secure): (u64, u64, bool),
        ticket: Ticket,
        mut below: impl FnMut(&IoOp<'_>, Ticket) -> Result<(), Ticket>,
    ) -> Result<(), Ticket> {
        let block = u64::from(locks.block_bytes());
        let (first, end) = (offset.div_ceil(block), (offset + len) / block);
        if first >= end {
            self.immediate.push(Completion { ticket, result: 0 });
            return Ok(());
        }
        let Some(lock) = locks.try_share(first..end) else { return Err(ticket) };
        let (offset, len) = (first * block, (end - first) * block);
        let job = Job { ticket, file, work: Work::Straight, piece: None, _lock: Some(lock) };
        self.begin(job, |_, ticket| below(&IoOp::Discard { offset, len, secure }, ticket))
    }

    /// Memory for the blocks around `offset`, which stands `skip` bytes into them, listed in
    /// `parts`, and a note of the first `len` bytes of `buffers`.
    fn piece(
        &mut self,
        offset: u64,
        span: u32,
        skip: u32,
        len: u32,
        buffers: &[GuestBuf],
    ) -> Option<Piece> {
        if self.lent == EMULATED_PER_WORKER {
            return None;
        }
        self.lent += 1;
        let mut memory = self.idle.pop().unwrap_or_else(|| Memory {
            pages: LocalPages::new(EMULATED_PAGES as usize),
            buffers: Vec::new(),
        });
        cut(buffers, len, &mut memory.buffers);
        let piece = Piece { memory, start: offset - u64::from(skip), span, skip, len };
        piece.list(&mut self.parts);
        Some(piece)
    }

    /// Has `below` start a job on the buffers in `parts`.
    fn begin(
        &mut self,
        job: Job,
        below: impl FnOnce(&[GuestBuf], Ticket) -> Result<(), Ticket>,
    ) -> Result<(), Ticket> {
        let index = self.jobs.insert(job);
        match below(&self.parts, Ticket::of_job(index)) {
            Ok(()) => Ok(()),
            Err(_) => Err(self.end(index)),
        }
    }

    /// Forgets a job and gives back what it had; returns the ticket it was for.
    fn end(&mut self, index: usize) -> Ticket {
        let Job { ticket, piece, .. } = self.jobs.remove(index);
        if let Some(piece) = piece {
            self.lent -= 1;
            self.idle.push(piece.memory);
        }
        ticket
    }

    /// Makes of the results from below, which stand in `done` from `first` on, those for above.
    /// `below` takes what follows from them.
    pub fn complete(
        &mut self,
        done: &mut Vec<Completion>,
        first: usize,
        mut below: impl FnMut(RawFd, &IoOp<'_>, Ticket) -> Result<(), Ticket>,
    ) {
        let mut raw = std::mem::take(&mut self.raw);
        raw.extend(done.drain(first..));
        for Completion { ticket, result } in raw.drain(..) {
            let Some(index) = ticket.job() else {
                done.push(Completion { ticket, result });
                continue;
            };
            if let Some(result) = self.advance(index, result, &mut below) {
                done.push(Completion { ticket: self.end(index), result });
            }
        }
        self.raw = raw;
        done.append(&mut self.immediate);
    }

    /// Takes the result of a job's operation: the job's own, unless another operation follows.
    fn advance(
        &mut self,
        index: usize,
        result: i32,
        below: impl FnMut(RawFd, &IoOp<'_>, Ticket) -> Result<(), Ticket>,
    ) -> Option<i32> {
        let job = &mut self.jobs[index];
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
                self.write_back(index, below);
                None
            }
        }
    }

    /// Has `below` write a changed block, now or when it has room.
    fn write_back(
        &mut self,
        index: usize,
        mut below: impl FnMut(RawFd, &IoOp<'_>, Ticket) -> Result<(), Ticket>,
    ) {
        let job = &self.jobs[index];
        let Some(piece) = &job.piece else { return };
        piece.list(&mut self.parts);
        let write = IoOp::Write { offset: piece.start, buffers: &self.parts };
        if below(job.file, &write, Ticket::of_job(index)).is_err() {
            self.waiting.push(index);
        }
    }

    /// Tries again what found no room below.
    pub fn retry(&mut self, mut below: impl FnMut(RawFd, &IoOp<'_>, Ticket) -> Result<(), Ticket>) {
        let mut again = std::mem::take(&mut self.waiting);
        for index in again.drain(..) {
            self.write_back(index, &mut below);
        }
        again.append(&mut self.waiting);
        self.waiting = again;
    }

    /// Whether there is nothing to complete or to try again.
    #[inline]
    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty() && self.immediate.is_empty()
    }

    /// Whether something is to be done at once, without an event from below.
    pub fn is_ready(&self) -> bool {
        !self.waiting.is_empty() || !self.immediate.is_empty()
    }

    /// Operations of which nothing is below.
    pub fn held_back(&self) -> usize {
        self.waiting.len() + self.immediate.len()
    }
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

//! Scripted storage: operations complete late, out of order, in part or never; they fail or find no room;
//! and what they cost is counted by a test's clock. No real time passes in here.

use std::cell::RefCell;
use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::random::Random;
use crate::backing::Image;
use crate::engine::{By, Completion, Engine, IoOp, Layer, RegisterBuffers, Submitted, Ticket};
use crate::park::Doorbell;
use crate::xen::shm::{GuestBuf, PAGE_BYTES, Registration};

/// Time that it takes to submit an operation, if there is a clock.
const SUBMIT_NS: u64 = 300;

/// The same for storage with a slow kernel driver.
const SLOW_SUBMIT_NS: u64 = 5_000;

/// What each operation adds to the time of a kick, if [`Script::kick_page_ns`] is set.
const KICK_NS: u64 = 2_000;

/// Transfers in 100 that are done in part only, if chance decides.
const SHORT_PERCENT: u64 = 10;

/// Bytes of what a transfer in part consists of.
const SECTOR: u32 = 512;

/// What storage does, as a test sets it, and the operations that it was given.
#[derive(Debug, Default)]
pub struct Script {
    /// What the disk holds, whichever image names it; workers share it. `None`: data is neither kept nor
    /// made.
    pub contents: Option<Rc<RefCell<Vec<u8>>>>,
    /// Chooses which operations complete with each reap, in which order, and which only in part; `None`: all
    /// do, in order.
    pub random: Option<Random>,
    /// Queues whose operations hang.
    pub hung: HashSet<usize>,
    /// How many operations storage has room for; `None`: all.
    pub room: Option<usize>,
    /// Operations that complete with each reap; `None`: all that do not hang.
    pub per_reap: Option<usize>,
    /// The error that every operation ends with, if any.
    pub errno: Option<i32>,
    /// An operation completes just as the worker falls asleep.
    pub arming_finds_a_completion: bool,
    /// The engine keeps flushes instead of starting them.
    pub parks_flushes: bool,
    /// How kicks fail, if they do.
    pub fails: Option<Failure>,
    /// Queues whose operations are slow to submit.
    pub slow: HashSet<usize>,
    /// Time of a kernel thread for a flush, or for several of one disk at once.
    pub flush_ns: u64,
    /// Time that kernel threads have taken since the test last reset this.
    pub threads_ns: u64,
    /// The worker's time for the next kick.
    pub kick_ns: u64,
    /// What each page submitted adds to it; 0: kicks take no time.
    pub kick_page_ns: u64,
    /// Advances by the time that submitting and kicking take.
    pub clock: Option<Arc<AtomicU64>>,
    /// The engine was dropped.
    pub is_dropped: bool,
    /// Operations taken but not completed, in order.
    pub taken: Vec<Taken>,
    /// Each operation that was taken, in words, if a test wants them.
    pub trace: Option<Vec<String>>,
}

/// How the host fails.
#[derive(Clone, Copy, Debug)]
pub enum Failure {
    /// With an error.
    Error,
    /// With a panic.
    Panic,
}

/// An operation that storage has taken.
#[derive(Debug)]
pub struct Taken {
    /// Whose.
    pub ticket: Ticket,
    /// It is a flush.
    pub is_flush: bool,
    /// How far its buffers begin behind the starts of their pages, or'ed together.
    pub misaligned: usize,
    bytes: i32,
    transfer: Option<Transfer>,
}

/// The data of an operation, if the disk has contents.
#[derive(Debug)]
struct Transfer {
    is_read: bool,
    offset: usize,
    buffers: Vec<GuestBuf>,
}

/// Scripted storage.
#[derive(Debug)]
pub struct ScriptedDisk {
    script: Rc<RefCell<Script>>,
    bell: Doorbell,
}

impl ScriptedDisk {
    /// It, and its script.
    pub fn new(script: Script) -> io::Result<(ScriptedDisk, Rc<RefCell<Script>>)> {
        let script = Rc::new(RefCell::new(script));
        Ok((ScriptedDisk { script: Rc::clone(&script), bell: Doorbell::new()? }, script))
    }
}

impl Drop for ScriptedDisk {
    fn drop(&mut self) {
        self.script.borrow_mut().is_dropped = true;
    }
}

impl RegisterBuffers for ScriptedDisk {
    fn register(&mut self, _memory: GuestBuf) -> io::Result<Registration> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn unregister(&mut self, _registration: Registration) {
        unreachable!("nothing was registered");
    }
}

impl Layer for ScriptedDisk {
    type Target = Image;

    fn submit(&mut self, _: &Image, operation: &IoOp<'_>, ticket: Ticket, _: By) -> Submitted {
        let script = &mut *self.script.borrow_mut();
        if script.room.is_some_and(|room| script.taken.len() >= room) {
            return Submitted::Full(ticket);
        }
        script.take(operation, ticket)
    }

    fn kick(&mut self) -> io::Result<()> {
        let script = &mut *self.script.borrow_mut();
        let kick_ns = std::mem::take(&mut script.kick_ns);
        if let Some(clock) = &script.clock {
            clock.fetch_add(kick_ns, Ordering::Relaxed);
        }
        match script.fails {
            None => Ok(()),
            Some(Failure::Error) => Err(io::Error::other("the host fails")),
            Some(Failure::Panic) => panic!("the host makes its worker panic"),
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.script.borrow_mut().complete(done);
    }

    fn in_flight(&self) -> usize {
        self.script.borrow().taken.len()
    }

    fn arm(&mut self) -> io::Result<bool> {
        Ok(self.script.borrow().arming_finds_a_completion)
    }
}

impl Engine for ScriptedDisk {
    fn disarm(&mut self, _signalled: bool) {}

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl Script {
    fn take(&mut self, operation: &IoOp<'_>, ticket: Ticket) -> Submitted {
        let buffers = match *operation {
            IoOp::Read { buffers, .. } | IoOp::Write { buffers, .. } => buffers,
            IoOp::Flush | IoOp::Discard { .. } => &[],
        };
        let bytes = buffers.iter().map(|buffer| buffer.len().cast_signed()).sum();
        let starts = buffers.iter().map(|buffer| buffer.address().addr().get() % PAGE_BYTES);
        let misaligned = starts.fold(0, |all, start| all | start);
        if let Some(trace) = &mut self.trace {
            trace.push(in_words(operation, &ticket, bytes));
        }
        self.pass_time(&ticket, bytes);
        let is_flush = matches!(operation, IoOp::Flush);
        let transfer = self.contents.is_some().then(|| Transfer::of(operation)).flatten();
        self.taken.push(Taken { ticket, is_flush, misaligned, bytes, transfer });
        match operation {
            IoOp::Flush if self.parks_flushes => Submitted::Parked,
            _ => Submitted::Started,
        }
    }

    fn pass_time(&mut self, ticket: &Ticket, bytes: i32) {
        if let Some(clock) = &self.clock {
            let is_slow = self.slow.contains(&ticket.queue());
            clock.fetch_add(if is_slow { SLOW_SUBMIT_NS } else { SUBMIT_NS }, Ordering::Relaxed);
        }
        if self.kick_page_ns > 0 {
            let pages = u64::from(bytes.unsigned_abs()) / 4096;
            self.kick_ns += KICK_NS + self.kick_page_ns * pages;
        }
    }

    fn complete(&mut self, done: &mut Vec<Completion>) {
        let mut flushed = HashSet::new();
        let mut left = self.per_reap.unwrap_or(usize::MAX);
        let mut taken = std::mem::take(&mut self.taken);
        if let Some(random) = &mut self.random {
            left = left.min(random.between(0, taken.len()));
            random.shuffle(&mut taken);
        }
        for operation in taken {
            if left == 0 || self.hung.contains(&operation.ticket.queue()) {
                self.taken.push(operation);
                continue;
            }
            left -= 1;
            if operation.is_flush && flushed.insert(operation.ticket.queue()) {
                self.threads_ns += self.flush_ns;
            }
            done.push(self.finish(operation));
        }
    }

    fn finish(&mut self, operation: Taken) -> Completion {
        let Taken { ticket, bytes, transfer, .. } = operation;
        if let Some(errno) = self.errno {
            return Completion { ticket, result: -errno };
        }
        let (Some(contents), Some(transfer)) = (&self.contents, transfer) else {
            return Completion { ticket, result: bytes };
        };
        let sectors = bytes.unsigned_abs() / SECTOR;
        let shortened = self.random.as_mut().and_then(|random| {
            let is_short = sectors > 1 && random.chance(SHORT_PERCENT);
            is_short.then(|| random.between(1, sectors - 1))
        });
        let moved = shortened.unwrap_or(sectors) * SECTOR;
        transfer.run(&mut contents.borrow_mut(), moved);
        Completion { ticket, result: moved.cast_signed() }
    }
}

impl Transfer {
    fn of(operation: &IoOp<'_>) -> Option<Transfer> {
        let (is_read, offset, buffers) = match *operation {
            IoOp::Read { offset, buffers } => (true, offset, buffers),
            IoOp::Write { offset, buffers } => (false, offset, buffers),
            IoOp::Flush | IoOp::Discard { .. } => return None,
        };
        let offset = usize::try_from(offset).expect("contents that fit in memory");
        Some(Transfer { is_read, offset, buffers: buffers.to_vec() })
    }

    /// Moves the first `len` bytes.
    fn run(&self, contents: &mut [u8], len: u32) {
        let (mut at, mut left) = (self.offset, len);
        for buffer in &self.buffers {
            let part = buffer.part(0, left.min(buffer.len())).expect("a part of it");
            let place = &mut contents[at..at + part.len() as usize];
            if self.is_read {
                part.copy_from(place)
            } else {
                part.copy_to(place)
            }
            at += place.len();
            left -= part.len();
        }
    }
}

fn in_words(operation: &IoOp<'_>, ticket: &Ticket, bytes: i32) -> String {
    let what = match operation {
        IoOp::Read { offset, .. } => format!("read {bytes} from {offset}"),
        IoOp::Write { offset, .. } => format!("write {bytes} to {offset}"),
        IoOp::Flush => "flush".to_owned(),
        IoOp::Discard { offset, len, .. } => format!("discard {len} from {offset}"),
    };
    format!("queue {} slot {}: {what}", ticket.queue(), ticket.slot())
}

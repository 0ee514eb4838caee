//! HOW a backing's I/O is done: one engine per worker.
//!
//! A queue hands an operation and a [`Ticket`] to the engine and gets the ticket back with the
//! result, once. The engine knows neither rings nor grants; its buffers are [`GuestBuf`]s, which
//! the queue keeps mapped until the ticket is back.
//!
//! The host's engine has layers: emulated sectors ([`emulate`]) over what can't be done at once in any
//! number ([`transport`]: flushes, discards) over io_uring. What a layer keeps until its turn comes is
//! *parked*: the queue does not submit it again, and goes on with its other requests meanwhile.

mod discard;
mod emulate;
mod flush;
mod guarded;
pub mod host;
mod layer;
mod memory;
mod offload;
mod tail;
mod transport;
mod uring;
mod vectors;

use std::io;
use std::os::fd::BorrowedFd;

use crate::limits::QUEUES_PER_WORKER;
use crate::xen::shm::{GuestBuf, Registration};

/// Can prepare for memory that buffers will often be in.
pub trait RegisterBuffers {
    /// Prepares for a range of memory. Buffers in it say so ([`GuestBuf::registered`]) until
    /// [`RegisterBuffers::unregister`]. An error costs only what that saves.
    fn register(&mut self, memory: GuestBuf) -> io::Result<Registration>;

    /// Forgets the range; no operation may be under way with a buffer that names it.
    fn unregister(&mut self, registration: Registration);
}

/// Executes operations on targets of one type.
pub trait Engine: RegisterBuffers {
    /// What operations go to.
    type Target;

    /// Takes one operation, or does it at once, or has no room for it now. Its buffers stay mapped and
    /// its target open until the ticket is back. What it starts is under way at the latest after the
    /// next [`Engine::kick`].
    fn submit(
        &mut self,
        target: &Self::Target,
        operation: &IoOp<'_>,
        ticket: Ticket,
        by: By,
    ) -> Submitted;

    /// Starts everything taken that is not under way: at most one system call. An error means that
    /// nothing was lost and the next call tries again.
    fn kick(&mut self) -> io::Result<()>;

    /// Appends what has completed; never waits.
    fn reap(&mut self, done: &mut Vec<Completion>);

    /// Operations taken and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Before a sleep: makes the next completion visible on [`Engine::completion_fd`], then looks
    /// again. `true`: something has completed, don't sleep.
    fn arm(&mut self) -> io::Result<bool>;

    /// After a sleep; `signalled`: [`Engine::completion_fd`] was readable.
    fn disarm(&mut self, signalled: bool);

    /// Readable when something has completed since [`Engine::arm`].
    fn completion_fd(&self) -> BorrowedFd<'_>;
}

/// Who goes into the kernel with an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The worker itself, as is cheapest.
    Worker,
    /// A thread of the kernel, because whoever does may have to sleep there.
    Thread,
}

/// One operation. Buffers together are as long as the operation.
#[derive(Clone, Copy, Debug)]
pub enum IoOp<'a> {
    /// Storage to buffers.
    Read {
        /// Byte on the target.
        offset: u64,
        /// Where to.
        buffers: &'a [GuestBuf],
    },
    /// Buffers to storage.
    Write {
        /// Byte on the target.
        offset: u64,
        /// Where from.
        buffers: &'a [GuestBuf],
    },
    /// Make all completed writes durable.
    Flush,
    /// Forget what is stored there; what it reads as afterwards is the target's affair.
    Discard {
        /// Byte on the target.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Beyond recovery.
        secure: bool,
    },
}

/// Bytes of buffers together: those of a request are far below 4 GiB.
#[inline]
fn bytes(buffers: &[GuestBuf]) -> u32 {
    buffers.iter().map(|buffer| buffer.len()).sum()
}

/// The right, and the duty, to answer for one operation: where its result belongs.
///
/// Not `Clone`: it goes into the engine once and comes back once. Its 8 bytes are io_uring's
/// `user_data`.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the operation would never be answered"]
pub struct Ticket(u64);

/// Set in tickets of an engine's own jobs, above the queue's number, which has 16 bits.
const JOB: u64 = 1 << 63;
/// Where the kind of a job stands.
const KIND: u32 = 56;
const _: () = assert!(QUEUES_PER_WORKER <= 1 << 16);

/// What an engine does on behalf of operations that were submitted to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    /// Of the emulation: one step of an operation on parts of blocks.
    Emulated(u32),
    /// A flush, for all that waited for it.
    Flush(u32),
    /// A discard of a file's blocks.
    Discard(u32),
}

impl Ticket {
    /// The ticket of a slot of a queue of this worker.
    #[inline]
    pub fn new(queue: u32, slot: u32) -> Ticket {
        Ticket(u64::from(queue) << 32 | u64::from(slot))
    }

    /// Which queue of the worker.
    #[inline]
    pub fn queue(&self) -> usize {
        (self.0 >> 32) as usize & (QUEUES_PER_WORKER - 1)
    }

    /// Which slot of the queue.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
    pub fn slot(&self) -> u32 {
        self.0 as u32
    }

    /// The ticket of a job that an engine does for itself, on behalf of a queue.
    fn of_job(queue: usize, job: Job) -> Ticket {
        let (kind, number) = match job {
            Job::Emulated(number) => (0, number),
            Job::Flush(number) => (1, number),
            Job::Discard(number) => (2, number),
        };
        Ticket(JOB | kind << KIND | (queue as u64) << 32 | u64::from(number))
    }

    /// Which job, for a ticket of [`Ticket::of_job`].
    #[inline]
    fn job(&self) -> Option<Job> {
        if self.0 & JOB == 0 {
            return None;
        }
        let number = self.slot();
        Some(match (self.0 & !JOB) >> KIND {
            0 => Job::Emulated(number),
            1 => Job::Flush(number),
            _ => Job::Discard(number),
        })
    }

    /// As `user_data`; [`Ticket::from_user_data`] leads back.
    #[inline]
    pub(crate) fn into_user_data(self) -> u64 {
        self.0
    }

    /// From `user_data` that the kernel gives back with the completion.
    #[inline]
    pub(crate) fn from_user_data(user_data: u64) -> Ticket {
        Ticket(user_data)
    }
}

/// What became of an operation that was submitted.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the ticket may be inside"]
pub enum Submitted {
    /// It is under way: [`Engine::reap`] will tell its result.
    Started,
    /// It is done already.
    Done(Completion),
    /// There is no room for it now. Come again when something was reaped: there is something in flight.
    Full(Ticket),
    /// The engine keeps it and starts it by itself once what it waits for is there; then
    /// [`Engine::reap`] will tell its result.
    Parked,
}

/// A completed operation.
#[derive(Debug, PartialEq, Eq)]
pub struct Completion {
    /// Whose.
    pub ticket: Ticket,
    /// Bytes moved (0 for a flush), or the negative errno.
    pub result: i32,
}

//! HOW a backing's I/O is done: one engine per worker.
//!
//! A queue hands an operation and a [`Ticket`] to the engine and gets the ticket back with the
//! result, once. The engine knows neither rings nor grants; its buffers are [`GuestBuf`]s, which
//! the queue keeps mapped until the ticket is back.
//!
//! # Layers
//!
//! The host's engine ([`host`]) is a stack of layers with one interface ([`layer::Layer`]). From the top:
//!
//! - [`memory`]: files in memory, which the worker reads and writes itself;
//! - [`emulate`]: 512-byte sectors on storage with larger blocks;
//! - [`transport`]: files and devices, by io_uring or a thread.
//!
//! The target of a layer holds what it needs to know of an image, and the target of the layer below
//! ([`crate::backing::RawTarget`]). Reads and writes that no upper layer has to change skip all of them
//! and go from [`host`] straight to io_uring. An operation that a layer keeps until its turn comes is
//! *parked*: the queue does not submit it again, and goes on with its other requests meanwhile.
//!
//! A *format* (qcow2) will be a layer between emulation and transport. It submits several operations for
//! one: reads of metadata, writes to allocate a cluster, then the data. They run as a job under a new kind
//! of [`Job`], and the operation from above is answered when the last one is done, or with a short
//! transfer at the end of a cluster. The tables that all workers of an image share belong to its
//! target; a worker that finds one locked parks the operation and is woken as by
//! [`crate::backing::BlockLocks`].
//!
//! *Network storage* (NBD, RBD) will be a second lowest layer. A layer that owns both transports, with an
//! enum of their targets as its own target, takes the place of [`transport`] in the stack. A worker
//! sleeps on one descriptor only, so a new transport submits to the same io_uring, or rings its bell for
//! each completion as [`offload`] does.

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

pub use layer::Layer;

use std::io;
use std::os::fd::BorrowedFd;

use crate::limits::QUEUES_PER_WORKER;
use crate::xen::shm::{GuestBuf, Registration};

/// Can prepare for memory that buffers will often lie in.
pub trait RegisterBuffers {
    /// Prepares for a range of memory. Buffers in it carry the registration
    /// ([`GuestBuf::registered`]) until [`RegisterBuffers::unregister`]. After an error everything works
    /// without it, only slower.
    fn register(&mut self, memory: GuestBuf) -> io::Result<Registration>;

    /// Forgets the range. No operation may be under way with a buffer that carries the registration.
    fn unregister(&mut self, registration: Registration);
}

/// What a worker does I/O with: the layers as one, and what it takes to sleep until something completes.
pub trait Engine: Layer + RegisterBuffers {
    /// Ends a sleep. `signalled`: [`Engine::completion_fd`] was readable.
    fn disarm(&mut self, signalled: bool);

    /// Readable when something has completed since [`Layer::arm`].
    fn completion_fd(&self) -> BorrowedFd<'_>;
}

/// Who enters the kernel with an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The worker itself, which is cheapest.
    Worker,
    /// A thread of the kernel, because it may have to sleep there.
    Thread,
}

/// One operation. Its buffers together are as long as the transfer.
#[derive(Clone, Copy, Debug)]
pub enum IoOp<'a> {
    /// Storage to buffers.
    Read {
        /// Byte on the target.
        offset: u64,
        /// Where the data goes.
        buffers: &'a [GuestBuf],
    },
    /// Buffers to storage.
    Write {
        /// Byte on the target.
        offset: u64,
        /// Where the data comes from.
        buffers: &'a [GuestBuf],
    },
    /// Make all completed writes durable.
    Flush,
    /// Give back the storage of a range. What it reads as afterwards depends on the target.
    Discard {
        /// Byte on the target.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Make the data unrecoverable.
        secure: bool,
    },
}

/// The total length of buffers in bytes. A request's are far below 4 GiB.
#[inline]
fn bytes(buffers: &[GuestBuf]) -> u32 {
    buffers.iter().map(|buffer| buffer.len()).sum()
}

/// Says which request the result of an operation belongs to, and that it is still to be answered.
///
/// Not `Clone`: it goes into the engine once and comes back once. Its 8 bytes are io_uring's
/// `user_data`.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the operation would never be answered"]
pub struct Ticket(u64);

/// Set in tickets of an engine's own jobs. The queue's number, which has 16 bits, is below it.
const JOB: u64 = 1 << 63;
/// First bit of the kind of a job.
const KIND: u32 = 56;
const _: () = assert!(QUEUES_PER_WORKER <= 1 << 16);

/// An operation that a layer submits below on behalf of one from above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    /// One step of an operation on parts of blocks, by its number in [`emulate`].
    Emulated(u32),
    /// A flush of a file, by its descriptor, for all operations that waited for it.
    Flush(u32),
    /// A discard of a file's blocks, by its number in [`discard`].
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

    /// The ticket of a job that a layer submits, on behalf of a queue.
    fn of_job(queue: usize, job: Job) -> Ticket {
        let (kind, number) = match job {
            Job::Emulated(number) => (0, number),
            Job::Flush(number) => (1, number),
            Job::Discard(number) => (2, number),
        };
        Ticket(JOB | kind << KIND | (queue as u64) << 32 | u64::from(number))
    }

    /// The job, if it is a ticket of [`Ticket::of_job`].
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

    /// As `user_data`, which [`Ticket::from_user_data`] turns back into a ticket.
    #[inline]
    pub(crate) fn into_user_data(self) -> u64 {
        self.0
    }

    /// From `user_data` that the kernel returns with the completion.
    #[inline]
    pub(crate) fn from_user_data(user_data: u64) -> Ticket {
        Ticket(user_data)
    }
}

/// What became of an operation that was submitted.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the ticket may be inside"]
pub enum Submitted {
    /// It was taken: [`Layer::reap`] will return its result.
    Started,
    /// It is done already.
    Done(Completion),
    /// There is no room for it now. Submit it again after something was reaped: something is in flight.
    Full(Ticket),
    /// The engine keeps it, and starts it by itself when whatever it waits for is there. Then
    /// [`Layer::reap`] returns its result.
    Parked,
}

/// A completed operation.
#[derive(Debug, PartialEq, Eq)]
pub struct Completion {
    /// The ticket that it was submitted with.
    pub ticket: Ticket,
    /// Bytes moved (0 for a flush), or the negative errno.
    pub result: i32,
}

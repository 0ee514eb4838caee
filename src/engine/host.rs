//! The daemon's engine: one match per operation sends it to io_uring or completes it at once.

use std::io;
use std::os::fd::BorrowedFd;

use super::emulate::Emulation;
use super::memory::MemoryFiles;
use super::offload::Offload;
use super::tail::{self, Side};
use super::uring::Uring;
use super::{Completion, Engine, IoOp, RegisterBuffers, Submitted, Ticket, bytes};
use crate::backing::{Image, NullImage, RawImage};
use crate::xen::shm::{GuestBuf, Registration};

/// Serves every kind of [`Image`].
#[derive(Debug)]
pub struct HostEngine {
    uring: Uring,
    offload: Offload,
    emulation: Emulation,
    memory_files: MemoryFiles,
    /// Reused for the buffers of one operation.
    parts: Vec<GuestBuf>,
}

impl HostEngine {
    /// Sets up an io_uring for the calling thread, which must be the one that uses it.
    pub fn new() -> io::Result<HostEngine> {
        let uring = Uring::new()?;
        let offload = Offload::new(uring.bell().clone());
        let emulation = Emulation::default();
        let (memory_files, parts) = (MemoryFiles::new(), Vec::new());
        Ok(HostEngine { uring, offload, emulation, memory_files, parts })
    }

    #[inline(always)]
    fn submit_raw(
        &mut self,
        image: &RawImage,
        operation: &IoOp<'_>,
        ticket: Ticket,
    ) -> Result<Submitted, Ticket> {
        if image.is_in_memory()
            && let Some(result) = self.memory_files.run(image.raw_fd(), image.mapping(), operation)
        {
            return Ok(Submitted::Done(Completion { ticket, result }));
        }
        let taken = match (image.emulation(), operation) {
            (None, IoOp::Read { .. } | IoOp::Write { .. } | IoOp::Flush)
                if !image.always_waits() =>
            {
                self.uring.submit(image.raw_fd(), operation, ticket)
            }
            _ => self.submit_specially(image, operation, ticket),
        };
        taken.map(|()| Submitted::UnderWay)
    }

    /// What io_uring can't do by itself: smaller blocks than the storage has, and discards of devices;
    /// and what it can't do well.
    #[cold]
    fn submit_specially(
        &mut self,
        image: &RawImage,
        operation: &IoOp<'_>,
        ticket: Ticket,
    ) -> Result<(), Ticket> {
        let (uring, offload) = (&mut self.uring, &mut self.offload);
        let mut below = |operation: &IoOp<'_>, ticket| match operation {
            IoOp::Discard { offset, len, secure } if image.is_device() => {
                offload.discard(image, *offset, *len, *secure, ticket)
            }
            _ if image.always_waits() => uring.submit_to_wait(image.raw_fd(), operation, ticket),
            _ => uring.submit(image.raw_fd(), operation, ticket),
        };
        match image.emulation() {
            None => below(operation, ticket),
            Some(locks) => match tail::side(operation, image.tail(), &mut self.parts) {
                Side::Blocks(part) => {
                    self.emulation.submit(locks, image.raw_fd(), &part, ticket, below)
                }
                Side::Tail(file) => uring.submit(file, operation, ticket),
            },
        }
    }
}

impl RegisterBuffers for HostEngine {
    fn register(&mut self, memory: GuestBuf) -> io::Result<Registration> {
        self.uring.register(memory)
    }

    fn unregister(&mut self, registration: Registration) {
        self.uring.unregister(registration);
    }
}

impl Engine for HostEngine {
    type Target = Image;

    #[inline(always)]
    fn submit(
        &mut self,
        target: &Image,
        operation: &IoOp<'_>,
        ticket: Ticket,
    ) -> Result<Submitted, Ticket> {
        let result = match target {
            Image::Raw(image) => return self.submit_raw(image, operation, ticket),
            Image::Null(image) => null(image, operation),
            Image::Empty => match operation {
                IoOp::Flush => 0,
                _ => -libc::ENOMEDIUM,
            },
        };
        Ok(Submitted::Done(Completion { ticket, result }))
    }

    #[inline]
    fn kick(&mut self) -> io::Result<()> {
        if self.emulation.is_ready() {
            self.emulation
                .retry(|file, operation, ticket| self.uring.submit(file, operation, ticket));
        }
        self.uring.kick()
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<Completion>) {
        let first = done.len();
        self.uring.reap(done);
        self.offload.reap(done);
        if !self.emulation.is_idle() {
            self.emulation.complete(done, first, |file, operation, ticket| {
                self.uring.submit(file, operation, ticket)
            });
        }
    }

    fn in_flight(&self) -> usize {
        self.uring.in_flight() + self.offload.in_flight() + self.emulation.held_back()
    }

    fn arm(&mut self) -> io::Result<bool> {
        Ok(self.uring.arm()? || self.offload.has_completed() || self.emulation.is_ready())
    }

    fn disarm(&mut self, signalled: bool) {
        self.uring.disarm(signalled);
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.uring.completion_fd()
    }
}

#[inline]
fn null(image: &NullImage, operation: &IoOp<'_>) -> i32 {
    match operation {
        IoOp::Read { buffers, .. } => {
            if image.read_zeroes() {
                buffers.iter().for_each(|buffer| buffer.zero());
            }
            moved(buffers)
        }
        IoOp::Write { buffers, .. } => moved(buffers),
        IoOp::Flush | IoOp::Discard { .. } => 0,
    }
}

#[inline]
fn moved(buffers: &[GuestBuf]) -> i32 {
    i32::try_from(bytes(buffers)).expect("a request is far below 2 GiB")
}

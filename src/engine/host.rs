//! The daemon's engine: one match per operation sends it to io_uring or completes it at once.

use std::io;
use std::os::fd::BorrowedFd;

use super::emulate::Emulation;
use super::memory::MemoryFiles;
use super::tail::{self, Side};
use super::transport::{Target, Transport};
use super::{By, Completion, Engine, IoOp, RegisterBuffers, Submitted, Ticket, bytes};
use crate::backing::{Image, NullImage, RawImage};
use crate::xen::shm::{GuestBuf, Registration};

/// Serves every kind of [`Image`].
#[derive(Debug)]
pub struct HostEngine {
    transport: Transport,
    emulation: Emulation,
    memory_files: MemoryFiles,
    /// Reused for the buffers of one operation.
    parts: Vec<GuestBuf>,
}

impl HostEngine {
    /// Sets up an io_uring for the calling thread, which must be the one that uses it.
    pub fn new() -> io::Result<HostEngine> {
        let transport = Transport::new()?;
        let emulation = Emulation::new(transport.uring.bell().clone());
        let (memory_files, parts) = (MemoryFiles::new(), Vec::new());
        Ok(HostEngine { transport, emulation, memory_files, parts })
    }

    #[inline(always)]
    fn submit_raw(
        &mut self,
        image: &RawImage,
        operation: &IoOp<'_>,
        ticket: Ticket,
        by: By,
    ) -> Submitted {
        if image.is_in_memory()
            && let Some(result) = self.memory_files.run(image.raw_fd(), image.mapping(), operation)
        {
            return Submitted::Done(Completion { ticket, result });
        }
        match (image.emulation(), operation) {
            (None, IoOp::Read { .. } | IoOp::Write { .. })
                if by == By::Worker && !image.always_waits() =>
            {
                self.transport.uring.submit(image.raw_fd(), operation, ticket)
            }
            (_, IoOp::Flush) => self.transport.flush(image.raw_fd(), ticket),
            _ => self.submit_specially(image, operation, ticket, by),
        }
    }

    /// Discards, reads and writes of guests that see smaller blocks than the storage has, and what
    /// io_uring can't do well.
    #[cold]
    fn submit_specially(
        &mut self,
        image: &RawImage,
        operation: &IoOp<'_>,
        ticket: Ticket,
        by: By,
    ) -> Submitted {
        let (transport, target) = (&mut self.transport, Target::of(image, by));
        let mut below =
            |to: &Target, operation: &IoOp<'_>, ticket| transport.submit(to, operation, ticket);
        match image.emulation() {
            None => below(&target, operation, ticket),
            Some(locks) => match tail::side(operation, image.tail(), &mut self.parts) {
                Side::Blocks(part) => self.emulation.submit(locks, &target, &part, ticket, below),
                Side::Tail(file) => below(&target.through(file), operation, ticket),
            },
        }
    }
}

impl RegisterBuffers for HostEngine {
    fn register(&mut self, memory: GuestBuf) -> io::Result<Registration> {
        self.transport.uring.register(memory)
    }

    fn unregister(&mut self, registration: Registration) {
        self.transport.uring.unregister(registration);
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
        by: By,
    ) -> Submitted {
        let result = match target {
            Image::Raw(image) => return self.submit_raw(image, operation, ticket, by),
            Image::Null(image) => null(image, operation),
            Image::Empty => match operation {
                IoOp::Flush => 0,
                _ => -libc::ENOMEDIUM,
            },
        };
        Submitted::Done(Completion { ticket, result })
    }

    #[inline]
    fn kick(&mut self) -> io::Result<()> {
        self.transport.kick()
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<Completion>) {
        let first = done.len();
        self.transport.reap(done);
        if !self.emulation.is_idle() {
            let transport = &mut self.transport;
            self.emulation.complete(done, first, |to, operation, ticket| {
                transport.submit(to, operation, ticket)
            });
        }
    }

    fn in_flight(&self) -> usize {
        self.transport.in_flight() + self.emulation.held_back()
    }

    fn arm(&mut self) -> io::Result<bool> {
        Ok(self.transport.arm()? || self.emulation.is_ready())
    }

    fn disarm(&mut self, signalled: bool) {
        self.transport.disarm(signalled);
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.transport.completion_fd()
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

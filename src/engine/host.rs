//! The daemon's engine: one match per operation sends it to io_uring, completes it at once, or hands
//! it to the layers.

use std::io;
use std::os::fd::BorrowedFd;

use super::emulate::Emulated;
use super::layer::Layer;
use super::memory::MemoryFiles;
use super::transport::Transport;
use super::{By, Completion, Engine, IoOp, RegisterBuffers, Submitted, Ticket, bytes};
use crate::backing::{Image, NullImage, RawImage};
use crate::xen::shm::{GuestBuf, Registration};

/// All layers of the engine, from the top to the bottom.
type Layers = MemoryFiles<Emulated<Transport>>;

/// Serves every kind of [`Image`].
#[derive(Debug)]
pub struct HostEngine {
    layers: Layers,
}

impl HostEngine {
    /// Sets up an io_uring for the calling thread, which must be the one that uses it.
    pub fn new() -> io::Result<HostEngine> {
        let transport = Transport::new()?;
        let bell = transport.uring.bell().clone();
        Ok(HostEngine { layers: MemoryFiles::new(Emulated::new(transport, bell)) })
    }

    /// The lowest layer, which waits for the kernel.
    #[inline]
    fn transport(&self) -> &Transport {
        &self.layers.below.below
    }

    #[inline]
    fn transport_mut(&mut self) -> &mut Transport {
        &mut self.layers.below.below
    }

    #[inline(always)]
    fn submit_raw(
        &mut self,
        image: &RawImage,
        operation: &IoOp<'_>,
        ticket: Ticket,
        by: By,
    ) -> Submitted {
        let target = image.target();
        if target.file.is_some() {
            return self.layers.submit(target, operation, ticket, by);
        }
        let (blocks, file) = (&target.below, &target.below.below);
        match (&blocks.locks, operation) {
            (None, IoOp::Read { .. } | IoOp::Write { .. })
                if by == By::Worker && !file.always_waits =>
            {
                self.transport_mut().uring.submit(&file.raw_fd, operation, ticket, By::Worker)
            }
            _ => self.submit_specially(image, operation, ticket, by),
        }
    }

    /// Takes what io_uring can't do at once and as it is: discards, flushes, emulated sectors, and what a
    /// thread of the kernel has to do.
    #[cold]
    fn submit_specially(
        &mut self,
        image: &RawImage,
        operation: &IoOp<'_>,
        ticket: Ticket,
        by: By,
    ) -> Submitted {
        self.layers.below.submit(&image.target().below, operation, ticket, by)
    }
}

impl RegisterBuffers for HostEngine {
    fn register(&mut self, memory: GuestBuf) -> io::Result<Registration> {
        self.transport_mut().uring.register(memory)
    }

    fn unregister(&mut self, registration: Registration) {
        self.transport_mut().uring.unregister(registration);
    }
}

impl Layer for HostEngine {
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
        self.layers.kick()
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.layers.reap(done);
    }

    fn in_flight(&self) -> usize {
        self.layers.in_flight()
    }

    fn arm(&mut self) -> io::Result<bool> {
        self.layers.arm()
    }
}

impl Engine for HostEngine {
    fn disarm(&mut self, signalled: bool) {
        self.transport_mut().disarm(signalled);
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.transport().completion_fd()
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

//! Where operations on whole blocks go: to io_uring, or to a thread if the kernel has no asynchronous form.
//!
//! Reads and writes go to the kernel as they come. Flushes and discards take a kernel's thread each
//! for as long as they last, so there are few of them at a time; the others are parked.

use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use super::discard::FileDiscards;
use super::flush::Flushes;
use super::offload::Offload;
use super::uring::Uring;
use super::{By, Completion, IoOp, Job, Submitted, Ticket};
use crate::backing::{DeviceHandle, RawImage};

/// One worker's ways to storage.
#[derive(Debug)]
pub struct Transport {
    /// For reads and writes of those who know that there is no more to it.
    pub uring: Uring,
    flushes: Flushes,
    discards: FileDiscards,
    offload: Offload,
}

/// An open file or device. The queue of each ticket keeps it open until that is back.
#[derive(Clone, Debug)]
pub struct Target {
    /// For io_uring.
    pub file: RawFd,
    /// For a thread, if it is a device.
    pub device: Option<Arc<DeviceHandle>>,
    /// Who transfers its data.
    pub by: By,
}

impl Target {
    /// That of an image. A file of which the kernel can't begin with a transfer and go on later takes a thread.
    pub fn of(image: &RawImage, by: By) -> Target {
        let device = image.is_device().then(|| image.device_handle());
        let by = if image.always_waits() { By::Thread } else { by };
        Target { file: image.raw_fd(), device, by }
    }

    /// The same by another descriptor.
    pub fn through(&self, file: RawFd) -> Target {
        Target { file, ..self.clone() }
    }
}

impl Transport {
    /// Sets up an io_uring for the calling thread, which must be the one that uses it.
    pub fn new() -> io::Result<Transport> {
        let uring = Uring::new()?;
        let offload = Offload::new(uring.bell().clone());
        let (flushes, discards) = (Flushes::new(), FileDiscards::new());
        Ok(Transport { uring, flushes, discards, offload })
    }

    /// Takes one operation.
    pub fn submit(&mut self, to: &Target, operation: &IoOp<'_>, ticket: Ticket) -> Submitted {
        let uring = &mut self.uring;
        match *operation {
            IoOp::Read { .. } | IoOp::Write { .. } if to.by == By::Thread => {
                uring.submit_to_wait(to.file, operation, ticket)
            }
            IoOp::Read { .. } | IoOp::Write { .. } => uring.submit(to.file, operation, ticket),
            IoOp::Flush => self.flush(to.file, ticket),
            IoOp::Discard { offset, len, secure } => match &to.device {
                Some(device) => {
                    self.offload.discard(Arc::clone(device), (offset, len), secure, ticket)
                }
                None => {
                    let below =
                        |file, operation: &IoOp<'_>, ticket| uring.submit(file, operation, ticket);
                    self.discards.submit(to.file, (offset, len), ticket, below)
                }
            },
        }
    }

    /// Takes a flush of a file.
    pub fn flush(&mut self, file: RawFd, ticket: Ticket) -> Submitted {
        let uring = &mut self.uring;
        self.flushes.submit(file, ticket, |operation, ticket| uring.submit(file, operation, ticket))
    }

    /// Starts everything taken that is not under way and need not wait.
    #[inline]
    pub fn kick(&mut self) -> io::Result<()> {
        if self.has_owed() {
            self.retry();
        }
        self.uring.kick()
    }

    fn has_owed(&self) -> bool {
        self.flushes.has_owed() || self.discards.has_owed()
    }

    #[cold]
    fn retry(&mut self) {
        let mut below =
            |file, operation: &IoOp<'_>, ticket| self.uring.submit(file, operation, ticket);
        self.flushes.retry(&mut below);
        self.discards.retry(&mut below);
    }

    /// Appends what has completed.
    #[inline]
    pub fn reap(&mut self, done: &mut Vec<Completion>) {
        let first = done.len();
        self.uring.reap(done);
        if done.len() > first && self.flushes.tickets() + self.discards.begun() > 0 {
            self.finish_jobs(done, first);
        }
        self.offload.reap(done);
    }

    /// Makes of the results of jobs, which stand in `done` from `first` on, those of the operations
    /// that they were for.
    fn finish_jobs(&mut self, done: &mut Vec<Completion>, first: usize) {
        let Transport { uring, flushes, discards, .. } = self;
        let mut at = first;
        while let Some(job) = done.get(at).map(|completion| completion.ticket.job()) {
            match job {
                Some(Job::Flush(file)) => {
                    let (file, result) = (file.cast_signed(), done.swap_remove(at).result);
                    flushes.finish(file, result, done, |operation, ticket| {
                        uring.submit(file, operation, ticket)
                    });
                }
                Some(Job::Discard(index)) => {
                    let result = done.swap_remove(at).result;
                    done.push(discards.finish(index, result, |file, operation, ticket| {
                        uring.submit(file, operation, ticket)
                    }));
                }
                // What is pushed at the end is such, too.
                Some(Job::Emulated(_)) | None => at += 1,
            }
        }
    }

    /// Operations taken and not yet reaped.
    pub fn in_flight(&self) -> usize {
        let joined = self.flushes.tickets() - self.flushes.running();
        self.uring.in_flight() + joined + self.discards.parked() + self.offload.in_flight()
    }

    /// As [`super::Engine::arm`].
    pub fn arm(&mut self) -> io::Result<bool> {
        Ok(self.uring.arm()? || self.offload.has_completed() || self.has_owed())
    }

    /// As [`super::Engine::disarm`].
    pub fn disarm(&mut self, signalled: bool) {
        self.uring.disarm(signalled);
    }

    /// As [`super::Engine::completion_fd`].
    pub fn completion_fd(&self) -> BorrowedFd<'_> {
        self.uring.completion_fd()
    }
}

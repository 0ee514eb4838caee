//! The lowest layer: operations on whole blocks go to io_uring, or to a thread if the kernel has no
//! asynchronous form of them.
//!
//! Reads and writes go to the kernel as they come. A flush or discard occupies a thread of the kernel
//! until it is done, so only a few of them are under way at a time; the others are parked.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::discard::FileDiscards;
use super::flush::Flushes;
use super::layer::Layer;
use super::offload::Offload;
use super::uring::Uring;
use super::{By, Completion, IoOp, Job, Submitted, Ticket};
use crate::backing::OpenFile;

/// One worker's way to files and devices.
#[derive(Debug)]
pub struct Transport {
    /// For reads and writes that need nothing else.
    pub uring: Uring,
    flushes: Flushes,
    discards: FileDiscards,
    offload: Offload,
}

impl Transport {
    /// Sets up an io_uring for the calling thread, which must be the one that uses it.
    pub fn new() -> io::Result<Transport> {
        let uring = Uring::new()?;
        let offload = Offload::new(uring.bell().clone());
        let (flushes, discards) = (Flushes::new(), FileDiscards::new());
        Ok(Transport { uring, flushes, discards, offload })
    }

    fn has_owed(&self) -> bool {
        self.flushes.has_owed() || self.discards.has_owed()
    }

    #[cold]
    fn retry(&mut self) {
        self.flushes.retry(&mut self.uring);
        self.discards.retry(&mut self.uring);
    }

    /// Replaces the results of jobs, in `done` from `first` on, by the results of the operations that
    /// they were for.
    fn finish_jobs(&mut self, done: &mut Vec<Completion>, first: usize) {
        let Transport { uring, flushes, discards, .. } = self;
        let mut at = first;
        while let Some(job) = done.get(at).map(|completion| completion.ticket.job()) {
            match job {
                Some(Job::Flush(file)) => {
                    let (file, result) = (file.cast_signed(), done.swap_remove(at).result);
                    flushes.finish(file, result, done, uring);
                }
                Some(Job::Discard(index)) => {
                    let result = done.swap_remove(at).result;
                    done.push(discards.finish(index, result, uring));
                }
                // Results that were pushed at the end come here, too.
                Some(Job::Emulated(_)) | None => at += 1,
            }
        }
    }

    /// Like [`super::Engine::disarm`].
    pub fn disarm(&mut self, signalled: bool) {
        self.uring.disarm(signalled);
    }

    /// Like [`super::Engine::completion_fd`].
    pub fn completion_fd(&self) -> BorrowedFd<'_> {
        self.uring.completion_fd()
    }
}

impl Layer for Transport {
    type Target = OpenFile;

    fn submit(
        &mut self,
        target: &OpenFile,
        operation: &IoOp<'_>,
        ticket: Ticket,
        by: By,
    ) -> Submitted {
        match *operation {
            IoOp::Read { .. } | IoOp::Write { .. } => {
                let by = if target.always_waits { By::Thread } else { by };
                self.uring.submit(&target.raw_fd, operation, ticket, by)
            }
            IoOp::Flush => self.flushes.submit(target.raw_fd, ticket, &mut self.uring),
            IoOp::Discard { offset, len, secure } => match &target.device {
                Some(device) => {
                    self.offload.discard(Arc::clone(device), (offset, len), secure, ticket)
                }
                None => self.discards.submit(target.raw_fd, (offset, len), ticket, &mut self.uring),
            },
        }
    }

    #[inline]
    fn kick(&mut self) -> io::Result<()> {
        if self.has_owed() {
            self.retry();
        }
        self.uring.kick()
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<Completion>) {
        let first = done.len();
        self.uring.reap(done);
        if done.len() > first && self.flushes.tickets() + self.discards.begun() > 0 {
            self.finish_jobs(done, first);
        }
        self.offload.reap(done);
    }

    fn in_flight(&self) -> usize {
        let joined = self.flushes.tickets() - self.flushes.running();
        self.uring.in_flight() + joined + self.discards.parked() + self.offload.in_flight()
    }

    fn arm(&mut self) -> io::Result<bool> {
        Ok(self.uring.arm()? || self.offload.has_completed() || self.has_owed())
    }
}

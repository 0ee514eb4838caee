//! One flush of a file at a time, for all requests that wait for one.
//!
//! A flush makes durable what was written before it was requested. So a request can't join a flush that
//! is running, which may have missed the newest writes. All requests that come meanwhile are answered by
//! one flush that starts afterwards. However many flushes a guest requests, storage has one at a time,
//! and no request waits for more than two.

use std::os::fd::RawFd;

use rustc_hash::{FxBuildHasher, FxHashMap};

use super::layer::Layer;
use super::{By, Completion, IoOp, Job, Submitted, Ticket};

/// How many files a worker can flush at a time, and requests one flush can answer, without allocating.
const USUAL: usize = 16;

/// Flushes of a worker's files.
#[derive(Debug)]
pub struct Flushes {
    /// Files with a flush running or owed. Their queues keep them open meanwhile.
    files: FxHashMap<RawFd, File>,
    /// Empty lists to be used again.
    spare: Vec<File>,
    /// Files whose next flush found no room below.
    owed: Vec<RawFd>,
    tickets: usize,
}

#[derive(Debug)]
struct File {
    /// Answered by the flush that runs.
    running: Vec<Ticket>,
    /// Answered by the next flush.
    waiting: Vec<Ticket>,
}

impl File {
    fn new() -> File {
        File { running: Vec::with_capacity(USUAL), waiting: Vec::with_capacity(USUAL) }
    }
}

impl Flushes {
    /// None yet.
    pub fn new() -> Flushes {
        Flushes {
            files: FxHashMap::with_capacity_and_hasher(USUAL, FxBuildHasher),
            spare: (0..USUAL).map(|_| File::new()).collect(),
            owed: Vec::new(),
            tickets: 0,
        }
    }

    /// Takes a flush, and starts it unless one is running.
    pub fn submit(
        &mut self,
        file: RawFd,
        ticket: Ticket,
        below: &mut impl Layer<Target = RawFd>,
    ) -> Submitted {
        if let Some(flushed) = self.files.get_mut(&file) {
            flushed.waiting.push(ticket);
            self.tickets += 1;
            return Submitted::Parked;
        }
        let started = below.submit(&file, &IoOp::Flush, job(file, &ticket), By::Worker);
        if let Submitted::Full(_) = started {
            return Submitted::Full(ticket);
        }
        let mut flushed = self.spare.pop().unwrap_or_else(File::new);
        flushed.running.push(ticket);
        self.files.insert(file, flushed);
        self.tickets += 1;
        Submitted::Started
    }

    /// Answers all requests of the flush that ran, and starts the next one if any wait.
    pub fn finish(
        &mut self,
        file: RawFd,
        result: i32,
        done: &mut Vec<Completion>,
        below: &mut impl Layer<Target = RawFd>,
    ) {
        let Some(flushed) = self.files.get_mut(&file) else { return };
        self.tickets -= flushed.running.len();
        done.extend(flushed.running.drain(..).map(|ticket| Completion { ticket, result }));
        if flushed.waiting.is_empty() {
            self.spare.extend(self.files.remove(&file));
        } else {
            std::mem::swap(&mut flushed.running, &mut flushed.waiting);
            self.start(file, below);
        }
    }

    /// Starts the flush that answers the running tickets of a file.
    fn start(&mut self, file: RawFd, below: &mut impl Layer<Target = RawFd>) {
        let Some(first) = self.files.get(&file).and_then(|flushed| flushed.running.first()) else {
            return;
        };
        let ticket = job(file, first);
        if let Submitted::Full(_) = below.submit(&file, &IoOp::Flush, ticket, By::Worker) {
            self.owed.push(file);
        }
    }

    /// Tries again to start those that found no room below.
    pub fn retry(&mut self, below: &mut impl Layer<Target = RawFd>) {
        for _ in 0..self.owed.len() {
            let file = self.owed.remove(0);
            self.start(file, below);
        }
    }

    /// Whether some have to be tried again.
    pub fn has_owed(&self) -> bool {
        !self.owed.is_empty()
    }

    /// Flushes taken and not yet answered.
    #[inline]
    pub fn tickets(&self) -> usize {
        self.tickets
    }

    /// Flushes that storage has.
    #[inline]
    pub fn running(&self) -> usize {
        self.files.len() - self.owed.len()
    }
}

/// The ticket of the flush of a file, on behalf of the queue that asked first.
fn job(file: RawFd, first: &Ticket) -> Ticket {
    Ticket::of_job(first.queue(), Job::Flush(file.unsigned_abs()))
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::engine::layer::test::Below;

    /// The files that storage was asked to flush, in order.
    fn flushed(below: &Below<RawFd>) -> Vec<RawFd> {
        for taken in &below.taken {
            assert_eq!(taken.text, "flush");
            assert_eq!(taken.ticket.job(), Some(Job::Flush(taken.target.unsigned_abs())));
        }
        below.taken.iter().map(|taken| taken.target).collect()
    }

    fn slots(done: &mut Vec<Completion>) -> Vec<(u32, i32)> {
        done.drain(..).map(|completion| (completion.ticket.slot(), completion.result)).collect()
    }

    #[test]
    fn flushes_that_come_while_one_runs_are_all_answered_by_the_next() {
        let (mut flushes, mut below, mut done) = (Flushes::new(), Below::new(), Vec::new());
        for slot in 0..4 {
            let submitted = flushes.submit(7, Ticket::new(1, slot), &mut below);
            assert_eq!(submitted == Submitted::Started, slot == 0);
        }
        assert_eq!(flushes.submit(8, Ticket::new(2, 9), &mut below), Submitted::Started);
        assert_eq!((flushed(&below), flushes.tickets(), flushes.running()), (vec![7, 8], 5, 2));
        flushes.finish(7, 0, &mut done, &mut below);
        assert_eq!(slots(&mut done), [(0, 0)], "a flush covers only requests that came before it");
        assert_eq!(flushed(&below), [7, 8, 7]);
        assert_eq!(flushes.submit(7, Ticket::new(1, 4), &mut below), Submitted::Parked);
        flushes.finish(7, -libc::EIO, &mut done, &mut below);
        assert_eq!(slots(&mut done), [1, 2, 3].map(|slot| (slot, -libc::EIO)));
        flushes.finish(7, 0, &mut done, &mut below);
        flushes.finish(8, 0, &mut done, &mut below);
        assert_eq!(slots(&mut done), [(4, 0), (9, 0)]);
        assert_eq!(flushed(&below), [7, 8, 7, 7]);
        assert_eq!((flushes.tickets(), flushes.running()), (0, 0));
    }

    #[test]
    fn a_flush_that_finds_no_room_is_given_back_and_one_that_is_owed_is_tried_again() {
        let (mut flushes, mut below, mut done) = (Flushes::new(), Below::new(), Vec::new());
        below.is_full = true;
        let full = flushes.submit(7, Ticket::new(1, 0), &mut below);
        assert_eq!((full, flushes.tickets()), (Submitted::Full(Ticket::new(1, 0)), 0));
        below.is_full = false;
        for slot in 0..2 {
            let _ = flushes.submit(7, Ticket::new(1, slot), &mut below);
        }
        below.is_full = true;
        flushes.finish(7, 0, &mut done, &mut below);
        assert!(flushes.has_owed() && flushes.running() == 0);
        flushes.retry(&mut below);
        assert!(flushes.has_owed());
        below.is_full = false;
        flushes.retry(&mut below);
        assert_eq!(flushed(&below), [7, 7]);
        assert!(!flushes.has_owed() && flushes.running() == 1);
        flushes.finish(7, 0, &mut done, &mut below);
        assert_eq!(slots(&mut done), [(0, 0), (1, 0)]);
    }
}

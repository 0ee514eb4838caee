//! One flush of a file at a time, for all who wait for one.
//!
//! A flush makes durable what was written before it was asked for, so it may not join one that is
//! running: that one may have looked already at where the newest write is. What is asked for meanwhile
//! is all answered by the one that starts after it. So however many flushes a guest asks for, storage
//! has one at a time, and none waits for more than two.

use std::os::fd::RawFd;

use rustc_hash::{FxBuildHasher, FxHashMap};

use super::{Completion, IoOp, Job, Submitted, Ticket};

/// Files that a worker flushes at a time, and flushes of one, that need no further memory.
const USUAL: usize = 16;

/// Flushes of a worker's files.
#[derive(Debug)]
pub struct Flushes {
    /// Files with a flush running. Their queues keep them open meanwhile.
    files: FxHashMap<RawFd, File>,
    /// Of files that have none any more, to be used again.
    spare: Vec<File>,
    /// Files whose next flush found no room.
    owed: Vec<RawFd>,
    tickets: usize,
}

#[derive(Debug)]
struct File {
    /// Answered by the one that runs.
    running: Vec<Ticket>,
    /// Answered by the next one.
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

    /// Takes a flush; `below` starts one.
    pub fn submit(
        &mut self,
        file: RawFd,
        ticket: Ticket,
        below: impl FnOnce(&IoOp<'_>, Ticket) -> Submitted,
    ) -> Submitted {
        if let Some(flushed) = self.files.get_mut(&file) {
            flushed.waiting.push(ticket);
            self.tickets += 1;
            return Submitted::Parked;
        }
        let started = below(&IoOp::Flush, job(file, &ticket));
        if let Submitted::Full(_) = started {
            return Submitted::Full(ticket);
        }
        let mut flushed = self.spare.pop().unwrap_or_else(File::new);
        flushed.running.push(ticket);
        self.files.insert(file, flushed);
        self.tickets += 1;
        Submitted::Started
    }

    /// Gives the result of the flush that ran to all that it was for, and has `below` start the next
    /// one if any wait.
    pub fn finish(
        &mut self,
        file: RawFd,
        result: i32,
        done: &mut Vec<Completion>,
        below: impl FnOnce(&IoOp<'_>, Ticket) -> Submitted,
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

    /// Has `below` start the flush that the running tickets of a file wait for.
    fn start(&mut self, file: RawFd, below: impl FnOnce(&IoOp<'_>, Ticket) -> Submitted) {
        let Some(first) = self.files.get(&file).and_then(|flushed| flushed.running.first()) else {
            return;
        };
        if let Submitted::Full(_) = below(&IoOp::Flush, job(file, first)) {
            self.owed.push(file);
        }
    }

    /// Tries again what found no room below.
    pub fn retry(&mut self, mut below: impl FnMut(RawFd, &IoOp<'_>, Ticket) -> Submitted) {
        for _ in 0..self.owed.len() {
            let file = self.owed.remove(0);
            self.start(file, |operation, ticket| below(file, operation, ticket));
        }
    }

    /// Whether something is to be tried again.
    pub fn has_owed(&self) -> bool {
        !self.owed.is_empty()
    }

    /// Flushes taken and not yet answered, whatever number storage has of them.
    #[inline]
    pub fn tickets(&self) -> usize {
        self.tickets
    }

    /// Of these, how many storage has.
    #[inline]
    pub fn running(&self) -> usize {
        self.files.len() - self.owed.len()
    }
}

/// The ticket of the flush of a file, on behalf of the queue that is first.
fn job(file: RawFd, first: &Ticket) -> Ticket {
    Ticket::of_job(first.queue(), Job::Flush(file.unsigned_abs()))
}

#[cfg(test)]
mod test {
    use super::*;

    /// What storage was asked for, by file.
    fn asked(flushes: &mut Vec<RawFd>) -> impl FnMut(&IoOp<'_>, Ticket) -> Submitted {
        |operation, ticket| {
            assert!(matches!(operation, IoOp::Flush));
            let Some(Job::Flush(file)) = ticket.job() else { panic!("{ticket:?}") };
            flushes.push(file.cast_signed());
            Submitted::Started
        }
    }

    fn slots(done: &mut Vec<Completion>) -> Vec<(u32, i32)> {
        done.drain(..).map(|completion| (completion.ticket.slot(), completion.result)).collect()
    }

    #[test]
    fn flushes_that_come_while_one_runs_are_all_answered_by_the_next() {
        let (mut flushes, mut started, mut done) = (Flushes::new(), Vec::new(), Vec::new());
        for slot in 0..4 {
            let submitted = flushes.submit(7, Ticket::new(1, slot), asked(&mut started));
            assert_eq!(submitted == Submitted::Started, slot == 0);
        }
        assert_eq!(flushes.submit(8, Ticket::new(2, 9), asked(&mut started)), Submitted::Started);
        assert_eq!((&started[..], flushes.tickets(), flushes.running()), (&[7, 8][..], 5, 2));
        flushes.finish(7, 0, &mut done, asked(&mut started));
        assert_eq!(slots(&mut done), [(0, 0)], "what ran covers only what was there before it");
        assert_eq!(started, [7, 8, 7]);
        assert_eq!(flushes.submit(7, Ticket::new(1, 4), asked(&mut started)), Submitted::Parked);
        flushes.finish(7, -libc::EIO, &mut done, asked(&mut started));
        assert_eq!(slots(&mut done), [1, 2, 3].map(|slot| (slot, -libc::EIO)));
        flushes.finish(7, 0, &mut done, asked(&mut started));
        flushes.finish(8, 0, &mut done, asked(&mut started));
        assert_eq!(slots(&mut done), [(4, 0), (9, 0)]);
        assert_eq!((&started[..], flushes.tickets(), flushes.running()), (&[7, 8, 7, 7][..], 0, 0));
    }

    #[test]
    fn a_flush_that_finds_no_room_is_given_back_and_one_that_is_owed_is_tried_again() {
        let (mut flushes, mut started, mut done) = (Flushes::new(), Vec::new(), Vec::new());
        let full = flushes.submit(7, Ticket::new(1, 0), |_, ticket| Submitted::Full(ticket));
        assert_eq!((full, flushes.tickets()), (Submitted::Full(Ticket::new(1, 0)), 0));
        for slot in 0..2 {
            let _ = flushes.submit(7, Ticket::new(1, slot), asked(&mut started));
        }
        flushes.finish(7, 0, &mut done, |_, ticket| Submitted::Full(ticket));
        assert!(flushes.has_owed() && flushes.running() == 0);
        flushes.retry(|_, _, ticket| Submitted::Full(ticket));
        assert!(flushes.has_owed());
        flushes.retry(|file, operation, ticket| {
            assert_eq!(file, 7);
            asked(&mut started)(operation, ticket)
        });
        assert!(!flushes.has_owed() && flushes.running() == 1);
        flushes.finish(7, 0, &mut done, asked(&mut started));
        assert_eq!(slots(&mut done), [(0, 0), (1, 0)]);
    }
}

//! A few discards of files at a time, because each occupies a thread of the kernel until it is done.

use std::os::fd::RawFd;

use slab::Slab;

use super::layer::Layer;
use super::{By, Completion, IoOp, Job, Submitted, Ticket};
use crate::limits::FILE_DISCARDS_PER_QUEUE;
use crate::pool::{Lanes, Pool};

/// Discards of a worker's files.
#[derive(Debug)]
pub struct FileDiscards {
    lanes: Lanes<Discard>,
    /// Tickets of those that storage has.
    begun: Slab<Ticket>,
    /// One whose turn came found no room below.
    owed: bool,
}

#[derive(Debug)]
struct Discard {
    file: RawFd,
    offset: u64,
    len: u64,
    ticket: Ticket,
}

impl FileDiscards {
    /// None yet.
    pub fn new() -> FileDiscards {
        let lanes = Lanes::new(Pool::new(FILE_DISCARDS_PER_QUEUE, 0));
        FileDiscards { lanes, begun: Slab::new(), owed: false }
    }

    /// Takes a discard of a range of a file.
    pub fn submit(
        &mut self,
        file: RawFd,
        (offset, len): (u64, u64),
        ticket: Ticket,
        below: &mut impl Layer<Target = RawFd>,
    ) -> Submitted {
        let queue = ticket.queue();
        let discard = Discard { file, offset, len, ticket };
        if !self.lanes.take(queue) {
            self.lanes.park(queue, discard);
            return Submitted::Parked;
        }
        match self.begin(queue, discard, below) {
            Ok(()) => Submitted::Started,
            Err(refused) => Submitted::Full(refused.ticket),
        }
    }

    /// Submits a discard after a place was taken for it.
    fn begin(
        &mut self,
        queue: usize,
        discard: Discard,
        below: &mut impl Layer<Target = RawFd>,
    ) -> Result<(), Discard> {
        let Discard { file, offset, len, ticket } = discard;
        let index = self.begun.insert(ticket);
        let job = Job::Discard(u32::try_from(index).expect("bounded by the requests in flight"));
        let operation = IoOp::Discard { offset, len, secure: false };
        let ticket_below = Ticket::of_job(queue, job);
        if let Submitted::Full(_) = below.submit(&file, &operation, ticket_below, By::Worker) {
            self.lanes.give_back(queue);
            return Err(Discard { file, offset, len, ticket: self.begun.remove(index) });
        }
        Ok(())
    }

    /// Takes the result of one that was begun, and starts the next ones in its place.
    pub fn finish(
        &mut self,
        index: u32,
        result: i32,
        below: &mut impl Layer<Target = RawFd>,
    ) -> Completion {
        let ticket = self.begun.remove(index as usize);
        let queue = ticket.queue();
        self.lanes.give_back(queue);
        self.start_next(queue, below);
        Completion { ticket, result }
    }

    fn start_next(&mut self, queue: usize, below: &mut impl Layer<Target = RawFd>) {
        while let Some(discard) = self.lanes.admit(queue) {
            if let Err(refused) = self.begin(queue, discard, below) {
                self.owed = true;
                return self.lanes.put_back(queue, refused);
            }
        }
    }

    /// Tries again to start those that found no room below.
    pub fn retry(&mut self, below: &mut impl Layer<Target = RawFd>) {
        self.owed = false;
        for queue in self.lanes.waiting() {
            self.start_next(queue, below);
        }
    }

    /// Whether some have to be tried again.
    pub fn has_owed(&self) -> bool {
        self.owed
    }

    /// Discards that storage has.
    #[inline]
    pub fn begun(&self) -> usize {
        self.begun.len()
    }

    /// Discards that wait for their turn.
    #[inline]
    pub fn parked(&self) -> usize {
        self.lanes.parked()
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::engine::layer::test::Below;

    #[test]
    fn few_of_a_queue_are_begun_at_a_time_and_the_others_follow_in_order() {
        const FEW: usize = FILE_DISCARDS_PER_QUEUE;
        let (mut discards, mut below) = (FileDiscards::new(), Below::new());
        for number in 0..FEW as u64 + 3 {
            let ticket = Ticket::new(1, u32::try_from(number).unwrap());
            let submitted = discards.submit(5, (number, 1), ticket, &mut below);
            assert_eq!(submitted == Submitted::Started, number < FEW as u64);
        }
        let other = discards.submit(6, (1000, 1), Ticket::new(2, 0), &mut below);
        assert_eq!(other, Submitted::Started, "another queue has its own part");
        assert_eq!((discards.begun(), discards.parked()), (FEW + 1, 3));
        let completion = discards.finish(0, -5, &mut below);
        assert_eq!(completion, Completion { ticket: Ticket::new(1, 0), result: -5 });
        below.is_full = true;
        let completion = discards.finish(1, 0, &mut below);
        assert_eq!(completion.ticket, Ticket::new(1, 1));
        assert!(discards.has_owed() && discards.parked() == 2);
        below.is_full = false;
        discards.retry(&mut below);
        assert!(!discards.has_owed() && discards.parked() == 1);
        let offsets = (0..FEW as u64).chain([1000, FEW as u64, FEW as u64 + 1]);
        let expected: Vec<String> = offsets.map(|offset| format!("discard {offset}+1")).collect();
        assert_eq!(below.texts(), expected);
        assert!(
            below.taken.iter().all(|taken| matches!(taken.ticket.job(), Some(Job::Discard(_))))
        );
    }
}

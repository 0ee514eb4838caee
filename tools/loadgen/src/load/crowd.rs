//! The requests of [`crate::neighbours`]: a measured ring's thread handles a few at a time.

use polldisk::metrics::Counter;
use polldisk::xen::Events;

use super::LoadError;
use crate::pattern::Pattern;
use crate::queue::Queue;

/// Most answers taken, and most requests started, for one guest in a step. A step takes a microsecond, in
/// which the measured ring has to wait.
const REQUESTS_PER_STEP: u32 = 8;

/// Notifications in a step of a guest that does nothing else.
const NOTIFICATIONS_PER_STEP: u64 = 8;

/// What a guest has counted, for the main thread to read at any moment.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Count {
    started: Counter,
    completed: Counter,
    errors: Counter,
    notified: Counter,
}

/// A [`Count`] at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Requests started.
    pub started: u64,
    /// Requests answered.
    pub completed: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Notifications to the backend.
    pub notified: u64,
}

impl Count {
    /// The current values.
    pub fn read(&self) -> Progress {
        // `started` is read last, so that it is never less than `completed`.
        let completed = self.completed.get();
        let (errors, notified) = (self.errors.get(), self.notified.get());
        Progress { started: self.started.get(), completed, errors, notified }
    }
}

/// A neighbour with a connected disk.
#[derive(Debug)]
pub struct Guest<'a, E> {
    /// Its only ring.
    pub queue: &'a mut Queue<E>,
    /// Where its requests go.
    pub pattern: Pattern,
    /// Whether it notifies the backend all the time.
    pub storms: bool,
    /// Counts what it does.
    pub count: &'a Count,
}

/// All neighbours, in one thread.
#[derive(Debug)]
pub struct Crowd<'a, E> {
    guests: Vec<Guest<'a, E>>,
    next: usize,
}

impl<'a, E: Events> Crowd<'a, E> {
    /// A crowd with nothing in flight.
    pub fn new(guests: Vec<Guest<'a, E>>) -> Crowd<'a, E> {
        Crowd { guests, next: 0 }
    }

    /// Does a little for the next neighbour in turn.
    #[inline]
    pub fn step(&mut self) -> Result<(), LoadError> {
        if self.next == self.guests.len() {
            self.next = 0;
        }
        let Some(guest) = self.guests.get_mut(self.next) else { return Ok(()) };
        self.next += 1;
        guest.step()
    }
}

impl<E: Events> Guest<'_, E> {
    fn step(&mut self) -> Result<(), LoadError> {
        let responses = self.queue.responses()?.min(REQUESTS_PER_STEP);
        for _ in 0..responses {
            let answer = self.queue.take()?;
            self.count.errors.add(u64::from(answer.status != 0));
        }
        let mut started = 0;
        while started < REQUESTS_PER_STEP && self.queue.has_free() {
            let (_, sector) = self.pattern.next_request();
            self.queue.start_as_made(sector);
            started += 1;
        }
        if started > 0 && self.queue.publish()? {
            self.count.notified.add(1);
        }
        self.count.started.add(started.into());
        self.count.completed.add(responses.into());
        if self.storms {
            for _ in 0..NOTIFICATIONS_PER_STEP {
                self.queue.notify()?;
            }
            self.count.notified.add(NOTIFICATIONS_PER_STEP);
        }
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use polldisk::blkif::codec::RawRequest;
    use polldisk::blkif::{Status, op};
    use polldisk::sim::blkfront::device::Options;
    use polldisk::sim::events::SimEvents;
    use polldisk::units::Port;

    use super::*;
    use crate::load::test::{Ends, answer, ends_for};
    use crate::pattern::Shape;
    use crate::queue::Operation;

    const BLOCK_BYTES: usize = 4096;

    fn ends(buffers: usize, operations: &[Operation]) -> Ends {
        ends_for(Options { buffers, ..Options::default() }, BLOCK_BYTES, operations)
    }

    fn guest<'a>(ends: &'a mut Ends, count: &'a Count, storms: bool) -> Guest<'a, SimEvents> {
        let sectors = 0..1 << 20;
        let shape =
            Shape { sectors, block_bytes: BLOCK_BYTES, sequential: true, read_percent: 100 };
        let pattern = shape.pattern(0, 1, 7).unwrap();
        Guest { queue: &mut ends.queue, pattern, storms, count }
    }

    #[test]
    fn each_has_its_turn_and_does_only_a_little_in_it() {
        let mut ends = [ends(20, &[Operation::Read]), ends(4, &[Operation::Read])];
        let counts = [Count::default(), Count::default()];
        let guests = ends.iter_mut().zip(&counts);
        let mut crowd = Crowd::new(guests.map(|(ends, count)| guest(ends, count, false)).collect());
        let mut started = || {
            crowd.step().unwrap();
            counts.each_ref().map(|count| count.read().started)
        };
        assert_eq!([started(), started(), started()], [[8, 0], [8, 4], [16, 4]]);
        assert_eq!([started(), started(), started()], [[16, 4], [20, 4], [20, 4]]);
    }

    #[test]
    fn requests_are_what_they_were_made_for() {
        let operations = [
            Operation::WriteIndirect,
            Operation::Write,
            Operation::Flush,
            Operation::Discard,
            Operation::Read,
        ];
        let (mut ends, count) = (ends(5, &operations), Count::default());
        guest(&mut ends, &count, false).step().unwrap();
        let mut requests = answer(&mut ends.back, Status::Error);
        requests.sort_by_key(RawRequest::id);
        let [
            RawRequest::Indirect(indirect),
            RawRequest::Direct(write),
            RawRequest::Direct(flush),
            RawRequest::Discard(discard),
            RawRequest::Direct(read),
        ] = &requests[..]
        else {
            panic!("{requests:?}")
        };
        assert_eq!((indirect.operation, indirect.nr_segments), (op::WRITE, 1));
        assert_eq!((write.operation, write.nr_segments), (op::WRITE, 1));
        assert_eq!((flush.operation, flush.nr_segments), (op::FLUSH_DISKCACHE, 0));
        assert_eq!(discard.nr_sectors, 8);
        assert_eq!((read.operation, read.nr_segments), (op::READ, 1));
        let mut sectors =
            [indirect.sector, write.sector, flush.sector, discard.sector, read.sector];
        sectors.sort_unstable();
        assert_eq!(sectors, [0, 8, 16, 24, 32]);
        guest(&mut ends, &count, false).step().unwrap();
        let Progress { started, completed, errors, .. } = count.read();
        assert_eq!((started, completed, errors), (10, 5, 5), "it goes on after an error");
    }

    #[test]
    fn a_storm_notifies_without_a_request() {
        let (mut ends, count) = (ends(8, &[]), Count::default());
        // Binding also notifies.
        let mut ports = [Port(0); 1];
        assert_eq!(ends.events.pending(&mut ports).unwrap(), 1);
        ends.events.unmask(&ports).unwrap();
        assert_eq!(ends.events.pending(&mut ports).unwrap(), 0);
        guest(&mut ends, &count, true).step().unwrap();
        assert_eq!(
            count.read(),
            Progress { notified: NOTIFICATIONS_PER_STEP, ..Progress::default() }
        );
        assert!(answer(&mut ends.back, Status::Okay).is_empty());
        assert_eq!(ends.events.pending(&mut ports).unwrap(), 1);
    }
}

//! When requests start.

/// Decides when a queue starts its next request.
#[derive(Clone, Debug)]
pub enum Arrivals {
    /// As soon as one is free: `depth` are always in flight.
    Closed,
    /// At the schedule's times, independent of the backend.
    Open(Schedule),
}

impl Arrivals {
    /// The start of the next request, unless that is in the future. The request's latency counts from then.
    /// Under a schedule it is the time when the request was due, even if the caller is late, so that the
    /// latency includes the wait for a slow backend (no coordinated omission).
    #[inline]
    pub fn next(&mut self, now_ns: u64) -> Option<u64> {
        match self {
            Arrivals::Closed => Some(now_ns),
            Arrivals::Open(schedule) => schedule.take(now_ns),
        }
    }

    /// When [`Arrivals::next`] will return the next start; `None` if it can at any time.
    pub fn due_ns(&self) -> Option<u64> {
        match self {
            Arrivals::Closed => None,
            Arrivals::Open(schedule) => Some(schedule.due_ns),
        }
    }

    /// Number of requests that are due and have not been started.
    pub fn behind(&self, now_ns: u64) -> u64 {
        match self {
            Arrivals::Closed => 0,
            Arrivals::Open(schedule) => schedule.behind(now_ns),
        }
    }
}

/// Start times at equal distances. The times of several queues interleave, so that all of them together
/// are at equal distances, too. Rounding errors do not add up.
#[derive(Clone, Debug)]
pub struct Schedule {
    due_ns: u64,
    /// The distance is `step_ns + step_rest / rate`.
    step_ns: u64,
    step_rest: u64,
    /// The next start is later than `due_ns` by this fraction of a nanosecond, with `rate` as denominator.
    rest: u64,
    rate: u64,
}

const SECOND_NS: u64 = 1_000_000_000;

impl Schedule {
    /// The schedule of queue `queue` out of `queues`, which have `rate` requests per second together, from
    /// `start_ns` on.
    pub fn new(start_ns: u64, rate: u64, queue: u64, queues: u64) -> Schedule {
        let (step, offset) = (queues * SECOND_NS, queue * SECOND_NS);
        Schedule {
            due_ns: start_ns + offset / rate,
            step_ns: step / rate,
            step_rest: step % rate,
            rest: offset % rate,
            rate,
        }
    }

    #[inline]
    fn take(&mut self, now_ns: u64) -> Option<u64> {
        let due_ns = self.due_ns;
        if due_ns > now_ns {
            return None;
        }
        self.due_ns += self.step_ns;
        self.rest += self.step_rest;
        if self.rest >= self.rate {
            self.rest -= self.rate;
            self.due_ns += 1;
        }
        Some(due_ns)
    }

    fn behind(&self, now_ns: u64) -> u64 {
        match now_ns.checked_sub(self.due_ns) {
            Some(late_ns) => 1 + late_ns / self.step_ns.max(1),
            None => 0,
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn starts(mut schedule: Schedule, until_ns: u64) -> Vec<u64> {
        std::iter::from_fn(|| schedule.take(until_ns)).collect()
    }

    #[test]
    fn a_second_holds_as_many_starts_as_the_rate_says() {
        for rate in [1, 3, 7, 1000, 999_999, 12_345_678] {
            let starts = starts(Schedule::new(5, rate, 0, 1), 5 + SECOND_NS - 1);
            assert_eq!(starts.len() as u64, rate);
            assert!(starts.is_sorted());
        }
    }

    #[test]
    fn rounding_does_not_add_up() {
        let mut schedule = Schedule::new(0, 3, 0, 1);
        let hour = std::iter::from_fn(|| schedule.take(3600 * SECOND_NS)).last();
        assert_eq!(hour, Some(3600 * SECOND_NS));
    }

    #[test]
    fn queues_interleave_to_equal_distances() {
        let mut all: Vec<u64> = (0..4)
            .flat_map(|queue| starts(Schedule::new(0, 1000, queue, 4), SECOND_NS - 1))
            .collect();
        all.sort_unstable();
        let expected: Vec<u64> = (0..1000).map(|n| n * 1_000_000).collect();
        assert_eq!(all, expected);
    }

    /// A backend that answers in 1 ms stalls for 50 ms. Every request that was due meanwhile has waited,
    /// although it was sent only after the stall.
    #[test]
    fn a_stall_is_felt_by_all_requests_that_were_due_in_it() {
        const MS: u64 = 1_000_000;
        let mut arrivals = Arrivals::Open(Schedule::new(0, 100, 0, 1));
        assert_eq!(arrivals.next(0), Some(0), "sent at 0, answered only at 50 ms");
        assert_eq!(arrivals.due_ns(), Some(10 * MS));
        let now = 50 * MS;
        assert_eq!(arrivals.behind(now), 5, "due at 10, 20, 30, 40 and 50 ms");
        let mut latencies = Vec::new();
        while let Some(start) = arrivals.next(now) {
            latencies.push(now + MS - start);
        }
        assert_eq!(latencies, [41 * MS, 31 * MS, 21 * MS, 11 * MS, MS]);
        assert_eq!((arrivals.behind(now), arrivals.next(now)), (0, None));
    }

    #[test]
    fn a_closed_loop_starts_whenever_it_is_asked() {
        let mut arrivals = Arrivals::Closed;
        assert_eq!((arrivals.next(7), arrivals.next(7)), (Some(7), Some(7)));
        assert_eq!((arrivals.due_ns(), arrivals.behind(7)), (None, 0));
    }
}

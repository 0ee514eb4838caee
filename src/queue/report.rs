//! What a queue reports: counters, latencies, storage failures, and requests in flight.

use hdrhistogram::Histogram;

use super::slots::Slot;
use super::{Queue, Resources};
use crate::blkif::Status;
use crate::blkif::request::{Kind, Request};
use crate::limits::{IN_FLIGHT_TOLD, SPACE_REPORT_NS};
use crate::msg::{InFlight, InFlightRequest, Report, StorageFailure, is_full};

/// What control was told about a queue's storage.
#[derive(Debug, Default)]
pub struct Reports {
    failures: u64,
    /// Control was told that storage is full, and not yet that a write has succeeded since.
    is_full: bool,
    /// When control was last told one or the other.
    space_told_ns: Option<u64>,
}

impl Reports {
    /// Records a failure; returns the number of failures so far if this one is to be reported.
    fn failed(&mut self, is_full: bool, now_ns: u64) -> Option<u64> {
        self.failures += 1;
        let is_news = is_full && !self.is_full && self.may_tell_space(now_ns);
        let tell = self.failures.is_power_of_two() || is_news;
        if tell && is_full {
            (self.is_full, self.space_told_ns) = (true, Some(now_ns));
        }
        tell.then_some(self.failures)
    }

    /// Records a write that succeeded after storage was full; says whether to report it.
    #[cold]
    fn wrote(&mut self, now_ns: u64) -> bool {
        let tell = self.is_full && self.may_tell_space(now_ns);
        if tell {
            (self.is_full, self.space_told_ns) = (false, Some(now_ns));
        }
        tell
    }

    fn may_tell_space(&self, now_ns: u64) -> bool {
        self.space_told_ns.is_none_or(|told| now_ns.saturating_sub(told) >= SPACE_REPORT_NS)
    }
}

impl Queue {
    /// Hands over the latencies recorded since the last call.
    pub fn take_latency(&mut self) -> Histogram<u64> {
        self.latency.take()
    }

    /// Requests taken and not yet answered, with their ages at `now_ns`.
    pub fn in_flight(&self, now_ns: u64) -> InFlight {
        let mut slots: Vec<&Slot> = self.slots.in_use().collect();
        slots.sort_by_key(|slot| slot.taken_ns);
        let oldest = slots.into_iter().take(IN_FLIGHT_TOLD).map(|slot| InFlightRequest {
            operation: in_words(slot.request.kind),
            offset_bytes: slot.request.offset_bytes,
            len_bytes: slot.request.len_bytes,
            age_ns: now_ns.saturating_sub(slot.taken_ns),
        });
        InFlight { count: self.ring.in_flight() as usize, oldest: oldest.collect() }
    }

    #[inline]
    pub(super) fn count<G, E>(
        &mut self,
        io: &mut Resources<G, E>,
        request: &Request,
        status: Status,
    ) {
        let counters = &self.counters;
        if status != Status::Okay {
            return counters.errors.add(1);
        }
        match request.kind {
            Kind::Read => {
                counters.reads.add(1);
                counters.read_bytes.add(request.len_bytes);
            }
            Kind::Write | Kind::FlushThenWrite | Kind::FlushedWrite => {
                counters.writes.add(1);
                counters.written_bytes.add(request.len_bytes);
                if self.reports.is_full && self.reports.wrote(io.now_ns) {
                    io.outbox.send(Report::SpaceLeft(self.key));
                }
            }
            Kind::Flush => {}
            Kind::Discard | Kind::SecureDiscard => {
                counters.discards.add(1);
                counters.discarded_bytes.add(request.len_bytes);
            }
        }
        if matches!(request.kind, Kind::Flush | Kind::FlushThenWrite | Kind::FlushedWrite) {
            self.counters.flushes.add(1);
        }
    }

    /// Reports a failure to control, ever less often, and returns the status for the guest.
    #[cold]
    pub(super) fn storage_failed<G, E>(
        &mut self,
        io: &mut Resources<G, E>,
        slot: u32,
        errno: i32,
    ) -> Status {
        let request = self.slots.get_mut(slot).request;
        if let Some(errors_so_far) = self.reports.failed(is_full(errno), io.now_ns) {
            let failure = StorageFailure {
                operation: in_words(request.kind),
                offset_bytes: request.offset_bytes,
                len_bytes: request.len_bytes,
                errno,
                errors_so_far,
            };
            io.outbox.send(Report::StorageFailed(self.key, failure));
        }
        match (request.kind, errno) {
            (Kind::Read | Kind::Write, _) => Status::Error,
            (_, libc::EOPNOTSUPP) => Status::NotSupported,
            _ => Status::Error,
        }
    }
}

/// A request's kind in words, for the log.
fn in_words(kind: Kind) -> &'static str {
    match kind {
        Kind::Read => "read",
        Kind::Write => "write",
        Kind::Flush => "flush",
        Kind::FlushThenWrite => "flush and write",
        Kind::FlushedWrite => "barrier write",
        Kind::Discard => "discard",
        Kind::SecureDiscard => "secure discard",
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const SECOND: u64 = SPACE_REPORT_NS;

    #[test]
    fn failures_are_reported_ever_less_often() {
        let mut reports = Reports::default();
        let told: Vec<u64> = (0..100).filter_map(|at| reports.failed(false, at)).collect();
        assert_eq!(told, [1, 2, 4, 8, 16, 32, 64]);
        assert!(!reports.wrote(SECOND), "storage was never full");
    }

    #[test]
    fn the_first_write_that_finds_no_room_is_always_reported() {
        let mut reports = Reports::default();
        (0..2).for_each(|at| assert!(reports.failed(false, at).is_some()));
        assert_eq!([3, 4].map(|at| reports.failed(true, at)), [Some(3), Some(4)]);
        assert_eq!(reports.failed(true, 9 * SECOND), None, "control knows already");
    }

    #[test]
    fn full_storage_and_room_on_it_are_reported_in_turn_at_most_once_a_second() {
        let mut reports = Reports::default();
        assert_eq!(reports.failed(true, 0), Some(1));
        assert!(!reports.wrote(SECOND - 1) && reports.wrote(SECOND) && !reports.wrote(9 * SECOND));
        let told: Vec<_> = (2..=9).filter_map(|at| reports.failed(true, SECOND + at)).collect();
        assert_eq!(told, [2, 4, 8], "powers of two are reported anyway");
        assert!(reports.wrote(3 * SECOND));
        assert_eq!(reports.failed(true, 3 * SECOND + 1), None);
        assert_eq!(reports.failed(true, 4 * SECOND), Some(11), "storage is full again");
        assert!(!reports.wrote(4 * SECOND + 1) && reports.wrote(5 * SECOND));
    }
}

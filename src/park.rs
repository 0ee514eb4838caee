//! How a thread waits: spin, arm, sleep, wake.
//!
//! A worker that finds no work spins for a time that follows the load ([`Patience`]). Then it *arms* every
//! source (asks each guest for a notification, which includes a fence and a second look). Only if that
//! finds nothing does it wait in [`sleep`] until a descriptor is readable. A thread that gives it work
//! first writes the work and then rings the [`Doorbell`], so no wake-up is lost: either the second look
//! sees the work, or the descriptor is readable.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// An eventfd that wakes one thread. Clones ring the same bell.
#[derive(Clone, Debug)]
pub struct Doorbell {
    fd: Arc<OwnedFd>,
}

impl Doorbell {
    /// A bell that nobody has rung.
    pub fn new() -> io::Result<Doorbell> {
        // SAFETY: no pointers; a negative result is an error, otherwise the descriptor is ours.
        let raw = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: freshly made and owned by nobody else.
        Ok(Doorbell { fd: Arc::new(unsafe { OwnedFd::from_raw_fd(raw) }) })
    }

    /// Makes the bell's descriptor readable. Call after the work itself is visible.
    pub fn ring(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: `one` is 8 readable bytes. It fails only if the counter is full, and then the descriptor
        // is readable already.
        unsafe { libc::write(self.fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Clears all rings so far. Call before looking for the work.
    pub fn silence(&self) {
        let mut count = [0u8; 8];
        // SAFETY: `count` is 8 writable bytes; EAGAIN means that nobody rang.
        unsafe { libc::read(self.fd.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Descriptors that one [`sleep`] can wait for.
pub const SOURCES_MAX: usize = 4;

/// Sleeps until one of `sources` is readable or `timeout` has passed (`None`: no timeout), and returns
/// which are readable. It may return early, as after a signal: the caller looks again.
pub fn sleep(sources: &[BorrowedFd<'_>], timeout: Option<Duration>) -> [bool; SOURCES_MAX] {
    assert!(sources.len() <= SOURCES_MAX);
    let mut polled = [libc::pollfd { fd: -1, events: libc::POLLIN, revents: 0 }; SOURCES_MAX];
    for (slot, source) in polled.iter_mut().zip(sources) {
        slot.fd = source.as_raw_fd();
    }
    let timeout = timeout.map(|timeout| libc::timespec {
        tv_sec: timeout.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let count = SOURCES_MAX as libc::nfds_t;
    // SAFETY: `polled` holds SOURCES_MAX entries, of which those without a source are ignored
    // (fd -1); `timeout` is null or points to a timespec that outlives the call.
    unsafe { libc::ppoll(polled.as_mut_ptr(), count, timeout, std::ptr::null()) };
    polled.map(|slot| slot.revents != 0)
}

/// How long a worker looks for work before it sleeps.
///
/// Pauses while requests are in flight at storage are unlike those while none are, so each kind has its own
/// budget. Results from storage are sure to come, and guests often ask for more only after them, so the
/// worker may look for them twice as long.
#[derive(Debug)]
pub struct Patience {
    guests: SpinBudget,
    storage: SpinBudget,
    pause: Option<Begun>,
}

#[derive(Clone, Copy, Debug)]
struct Begun {
    at_ns: u64,
    storage_works: bool,
}

/// A time without work that has not ended yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// How long it has lasted so far.
    pub lasted_ns: u64,
    /// Whether to keep looking for work.
    pub spins: bool,
    /// The longest time to spin in a pause of its kind.
    pub limit_ns: u64,
}

impl Patience {
    /// The limit while storage has requests, as a multiple of that for guests.
    const STORAGE_LIMITS: u32 = 2;

    /// Patience of at most `limit` for guests' requests; zero means never spin.
    pub fn new(limit: Duration) -> Patience {
        let storage = SpinBudget::new(Self::STORAGE_LIMITS * limit);
        Patience { guests: SpinBudget::new(limit), storage, pause: None }
    }

    /// There is no work now. `storage_works` counts only at the beginning of a pause.
    #[inline]
    pub fn goes_on(&mut self, now_ns: u64, storage_works: bool) -> Pause {
        let pause = *self.pause.get_or_insert(Begun { at_ns: now_ns, storage_works });
        let budget = self.budget(pause);
        let lasted_ns = now_ns - pause.at_ns;
        Pause { lasted_ns, spins: lasted_ns < budget.budget_ns, limit_ns: budget.limit_ns }
    }

    /// There was work at `now_ns`, after a pause or not.
    #[inline]
    pub fn ended(&mut self, now_ns: u64) {
        if let Some(pause) = self.pause.take() {
            self.budget(pause).paused(now_ns.saturating_sub(pause.at_ns));
        }
    }

    #[inline]
    fn budget(&mut self, pause: Begun) -> &mut SpinBudget {
        if pause.storage_works { &mut self.storage } else { &mut self.guests }
    }
}

/// How long to spin in pauses of one kind.
///
/// Spinning pays only if work comes before it ends. Falling asleep and waking up cost some microseconds, so
/// a shorter spin saves nothing. So the budget follows the pauses between work: it is twice the last ones,
/// never below that cost, and halves with each pause that was longer than the limit. After several of those
/// in a row it is zero: a loaded worker spins, an idle one costs nothing.
#[derive(Debug)]
struct SpinBudget {
    limit_ns: u64,
    budget_ns: u64,
    /// Pauses in a row that were longer than the limit.
    long_pauses: u32,
}

impl SpinBudget {
    /// About what it costs to fall asleep and to be woken.
    const SLEEP_COST_NS: u64 = 10_000;

    /// After this number of long pauses in a row the worker counts as idle.
    const LONG_PAUSES_MAX: u32 = 8;

    /// A budget of at most `limit`; zero means never spin.
    fn new(limit: Duration) -> SpinBudget {
        let limit_ns = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        SpinBudget { limit_ns, budget_ns: limit_ns, long_pauses: 0 }
    }

    /// Work came after a pause, spun or slept.
    fn paused(&mut self, pause_ns: u64) {
        let least_ns = Self::SLEEP_COST_NS.min(self.limit_ns);
        if pause_ns <= self.limit_ns {
            self.long_pauses = 0;
            let wanted_ns = pause_ns.saturating_mul(2).clamp(least_ns, self.limit_ns);
            self.budget_ns = wanted_ns.max(self.budget_ns - self.budget_ns / 8);
        } else if self.long_pauses < Self::LONG_PAUSES_MAX {
            self.long_pauses += 1;
            self.budget_ns = least_ns.max(self.budget_ns / 2);
        } else {
            self.budget_ns = 0;
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_ring_before_the_sleep_is_not_lost() {
        let bell = Doorbell::new().unwrap();
        bell.ring();
        assert!(sleep(&[bell.as_fd()], None)[0]);
        bell.silence();
        assert!(!sleep(&[bell.as_fd()], Some(Duration::from_millis(1)))[0]);
    }

    #[test]
    fn what_storage_works_on_is_looked_for_longer() {
        let mut patience = Patience::new(Duration::from_micros(50));
        let waits = |patience: &mut Patience, lasted_ns: u64, storage_works: bool| {
            patience.ended(0);
            patience.goes_on(0, storage_works);
            patience.goes_on(lasted_ns, !storage_works)
        };
        for (storage_works, limit_ns) in [(false, 50_000), (true, 100_000)] {
            for (lasted_ns, spins) in [(limit_ns - 1, true), (limit_ns, false)] {
                let pause = waits(&mut patience, lasted_ns, storage_works);
                assert_eq!(pause, Pause { lasted_ns, spins, limit_ns });
            }
        }
    }

    #[test]
    fn each_kind_of_pause_has_its_own_past() {
        let mut patience = Patience::new(Duration::from_micros(50));
        for _ in 0..20 {
            for (storage_works, lasts_ns) in [(true, 1_000_000), (false, 20_000)] {
                patience.goes_on(0, storage_works);
                patience.ended(lasts_ns);
            }
        }
        assert!(!patience.goes_on(0, true).spins, "storage takes its time");
        patience.ended(0);
        patience.goes_on(0, false);
        assert!(patience.goes_on(30_000, false).spins, "guests come within twice 20 us");
    }

    #[test]
    fn work_without_a_pause_tells_nothing() {
        let mut patience = Patience::new(Duration::from_micros(50));
        (0..100).for_each(|at_us| patience.ended(at_us * 1_000_000));
        patience.goes_on(0, false);
        assert!(patience.goes_on(49_999, false).spins);
    }

    #[test]
    fn the_budget_is_twice_the_pauses_and_no_less_than_a_sleep_costs() {
        let mut budget = SpinBudget::new(Duration::from_micros(50));
        assert_eq!(budget.budget_ns, 50_000);
        (0..100).for_each(|_| budget.paused(8_000));
        assert_eq!(budget.budget_ns, 16_000);
        (0..100).for_each(|_| budget.paused(10));
        assert_eq!(budget.budget_ns, 10_000);
        budget.paused(20_000);
        assert_eq!(budget.budget_ns, 40_000);
        budget.paused(50_000);
        assert_eq!(budget.budget_ns, 50_000);
    }

    #[test]
    fn only_a_row_of_long_pauses_ends_all_spinning() {
        let mut budget = SpinBudget::new(Duration::from_micros(50));
        for _ in 0..100 {
            budget.paused(1_000_000);
            budget.paused(1_000);
        }
        assert_eq!(budget.budget_ns, 10_000);
        (0..9).for_each(|_| budget.paused(1_000_000));
        assert_eq!(budget.budget_ns, 0);
        budget.paused(1_000_000);
        assert_eq!(budget.budget_ns, 0);
        budget.paused(5_000);
        assert_eq!(budget.budget_ns, 10_000);
    }

    #[test]
    fn a_limit_of_zero_never_spins() {
        let mut budget = SpinBudget::new(Duration::ZERO);
        budget.paused(0);
        budget.paused(1_000);
        assert_eq!(budget.budget_ns, 0);
    }
}

//! How a thread waits: spin, arm, sleep, wake.
//!
//! A worker that finds no work spins for a time that follows the load ([`crate::patience`]). Then it *arms* every
//! source (asks each guest for a notification, which includes a fence and a second look). Only if that
//! finds nothing does it wait in [`sleep`] until a descriptor is readable. A thread that gives it work
//! first writes the work and then rings the [`Doorbell`], so no wake-up is lost: either the second look
//! sees the work, or the descriptor is readable.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};

use crate::patience::SleepCost;

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

/// Sleeps that [`measure_sleep`] takes the median of.
const MEASURED_SLEEPS: usize = 33;

/// How long each of them is, about: long enough for the core to fall asleep.
const MEASURED_SLEEP: Duration = Duration::from_micros(60);

/// Measures what a sleep costs the calling thread where it runs now: some milliseconds of short sleeps.
pub fn measure_sleep() -> io::Result<SleepCost> {
    let (mut cpu, mut delays) = (Vec::new(), Vec::new());
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    let once = Timespec { tv_nsec: MEASURED_SLEEP.subsec_nanos().into(), ..zero };
    for _ in 0..MEASURED_SLEEPS {
        // Setting it again also makes it unreadable.
        let times = Itimerspec { it_interval: zero, it_value: once };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &times)?;
        let (asleep, used) = (Instant::now(), thread_time());
        sleep(&[timer.as_fd()], None);
        delays.push(asleep.elapsed().saturating_sub(MEASURED_SLEEP));
        cpu.push(thread_time().saturating_sub(used));
    }
    let median_ns = |mut times: Vec<Duration>| {
        times.sort_unstable();
        u64::try_from(times[MEASURED_SLEEPS / 2].as_nanos()).unwrap_or(u64::MAX)
    };
    Ok(SleepCost { cpu_ns: median_ns(cpu), delay_ns: median_ns(delays) })
}

/// CPU time of the calling thread.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.try_into().unwrap_or_default()
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
    fn a_sleep_costs_something() {
        let SleepCost { cpu_ns, .. } = measure_sleep().unwrap();
        assert!(cpu_ns > 0);
    }
}

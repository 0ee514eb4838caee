//! What it costs on this machine to wake a thread that sleeps on another core.
//!
//! A backend has to wake a sleeping guest once for each batch of requests, so this cost is part of every
//! backend's CPU time. In a virtual machine most of it is an exit to the host.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use core_affinity::CoreId;
use figures::Interval;

const WAKE_UPS: usize = 2_000;

/// Pause between two wake-ups: long enough for the other core to fall asleep, too.
const SLEEP: Duration = Duration::from_micros(60);

/// Microseconds that each of many wake-ups takes the waking thread on `cores[0]`; the other thread sleeps on
/// `cores[1]`. `None` if there are fewer than two cores.
pub fn measure(cores: &[usize]) -> Option<Interval> {
    let &[waking, sleeping, ..] = cores else { return None };
    let stop = AtomicBool::new(false);
    let wake_ups = thread::scope(|scope| {
        let sleeper = scope.spawn(|| {
            core_affinity::set_for_current(CoreId { id: sleeping });
            while !stop.load(Ordering::Relaxed) {
                thread::park();
            }
        });
        let sleeper = sleeper.thread().clone();
        let stop = &stop;
        let waker = scope.spawn(move || {
            core_affinity::set_for_current(CoreId { id: waking });
            let wake_ups: Vec<f64> = (0..WAKE_UPS).map(|_| wake(&sleeper)).collect();
            stop.store(true, Ordering::Relaxed);
            sleeper.unpark();
            wake_ups
        });
        waker.join().ok()
    });
    Interval::of(&wake_ups?)
}

fn wake(sleeper: &thread::Thread) -> f64 {
    let start = Instant::now();
    while start.elapsed() < SLEEP {
        std::hint::spin_loop();
    }
    let start = Instant::now();
    sleeper.unpark();
    start.elapsed().as_secs_f64() * 1e6
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_wake_up_takes_some_time_and_needs_two_cores() {
        assert_eq!(measure(&[0]), None);
        // Both on one core, so that it works on any machine.
        let interval = measure(&[0, 0]).unwrap();
        assert!(interval.median > 0.0 && interval.low <= interval.median);
    }
}

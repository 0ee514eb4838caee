//! The load on one ring, in a thread of its own.
//!
//! A pass takes all responses that have arrived, starts all requests that may start, and publishes them
//! together. It reads the clock once, after counting the responses, so that no latency is ever too short.
//! It never allocates or locks. It makes system calls only to notify a backend that asked for it, and to
//! sleep if the load does so.

pub mod crowd;

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;
use polldisk::metrics::Counter;
use polldisk::park;
use polldisk::units::Port;
use polldisk::xen::Events;

use crate::arrivals::Arrivals;
use crate::clock::Clock;
use crate::pattern::Pattern;
use crate::queue::{Answer, BackendFault, Queue};
use crowd::Crowd;

/// How a queue waits for responses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It polls and never asks to be notified.
    Busy,
    /// Like a guest's kernel, it polls for `spin_ns`, asks to be notified, and sleeps.
    Block {
        /// Nanoseconds of polling before each sleep.
        spin_ns: u64,
    },
}

/// The phase of a run. The main thread sets it, and each queue reads it once in a pass.
#[derive(Debug, Default)]
pub struct Phase(AtomicU32);

const STOP: u32 = u32::MAX - 1;
const ABANDON: u32 = u32::MAX;

impl Phase {
    /// From now on, responses count for this sample.
    pub fn sample(&self, index: usize) {
        let number = u32::try_from(index + 1).expect("fewer samples than that");
        self.0.store(number, Ordering::Relaxed);
    }

    /// From now on, no request may be started.
    pub fn stop(&self) {
        self.0.store(STOP, Ordering::Relaxed);
    }

    /// From now on, no answers are waited for either.
    pub fn abandon(&self) {
        self.0.store(ABANDON, Ordering::Relaxed);
    }
}

/// What a queue has counted, for the main thread to read at any moment.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Gauge {
    /// Responses taken.
    pub completed: Counter,
    /// Notifications to the backend.
    pub sent: Counter,
    /// Notifications from the backend that were noticed.
    pub received: Counter,
}

/// Why a load ended early.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The backend broke the protocol.
    #[error(transparent)]
    Backend(#[from] BackendFault),
    /// An event channel failed.
    #[error("the event channel failed")]
    Events(#[from] io::Error),
    /// The backend did not answer.
    #[error("{0} requests were not answered within {PATIENCE_S} s")]
    Silence(u32),
    /// The main thread gave up the run.
    #[error("the run was given up with {0} requests in flight")]
    Abandoned(u32),
}

/// A backend that leaves requests unanswered for this long after the end is broken.
const PATIENCE_S: u64 = 30;

/// Longest sleep before the phase is read again.
const SLEEP_MAX_NS: u64 = 20_000_000;

/// The latencies of one sample, in nanoseconds.
#[derive(Clone, Debug)]
pub struct Latencies {
    /// Reads.
    pub reads: Histogram<u64>,
    /// Writes.
    pub writes: Histogram<u64>,
}

impl Latencies {
    /// Empty ones, from 1 ns to a minute with three digits.
    pub fn new() -> Latencies {
        let empty = Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("constants that fit");
        Latencies { reads: empty.clone(), writes: empty }
    }

    /// Adds other latencies.
    pub fn add(&mut self, other: &Latencies) {
        // The bounds are the same.
        self.reads += &other.reads;
        self.writes += &other.writes;
    }
}

impl Default for Latencies {
    fn default() -> Self {
        Latencies::new()
    }
}

/// A request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed {
    /// `BLKIF_RSP_*`.
    pub status: i16,
    /// Whether it was a read; otherwise a write.
    pub is_read: bool,
    /// Its first sector.
    pub sector: u64,
}

/// A queue's results, handed over at its end.
#[derive(Clone, Debug)]
pub struct Tally {
    /// Latencies by sample.
    pub samples: Vec<Latencies>,
    /// Requests answered with an error, in any phase.
    pub errors: u64,
    /// The first of them.
    pub first_error: Option<Failed>,
    /// Requests started, in all phases.
    pub started: u64,
    /// Requests of the schedule that were due at the end and had not been started.
    pub unsent: u64,
    /// Time from the earliest possible start of a request to the end, in nanoseconds.
    pub lasted_ns: u64,
    /// Longest time between a request's due start and its actual one.
    pub late_max_ns: u64,
}

impl Tally {
    /// An empty one for this number of samples.
    pub fn new(samples: usize) -> Tally {
        Tally {
            samples: vec![Latencies::new(); samples],
            errors: 0,
            first_error: None,
            started: 0,
            unsent: 0,
            lasted_ns: 0,
            late_max_ns: 0,
        }
    }
}

/// A load in progress.
#[derive(Debug)]
pub struct Load<'a, E> {
    queue: &'a mut Queue<E>,
    pattern: Pattern,
    arrivals: Arrivals,
    wait: Wait,
    clock: Clock,
    phase: &'a Phase,
    gauge: &'a Gauge,
    tally: Tally,
    beside: Option<Crowd<'a, E>>,
}

impl<'a, E: Events> Load<'a, E> {
    /// A load that adds to `tally`.
    #[expect(clippy::too_many_arguments, reason = "each is a part of its own, named by the caller")]
    pub fn new(
        queue: &'a mut Queue<E>,
        pattern: Pattern,
        arrivals: Arrivals,
        wait: Wait,
        clock: Clock,
        phase: &'a Phase,
        gauge: &'a Gauge,
        tally: Tally,
    ) -> Load<'a, E> {
        Load { queue, pattern, arrivals, wait, clock, phase, gauge, tally, beside: None }
    }

    /// The load, which also does a little for the neighbours in each pass. It must not be one that sleeps.
    #[must_use]
    pub fn beside(self, neighbours: Option<Crowd<'a, E>>) -> Load<'a, E> {
        Load { beside: neighbours, ..self }
    }

    /// Runs until the phase says stop and everything is answered.
    pub fn run(mut self) -> Result<Tally, LoadError> {
        let start_ns = self.clock.now_ns();
        loop {
            let phase = self.phase.0.load(Ordering::Relaxed);
            if phase >= STOP {
                break;
            }
            let worked = self.pass(phase)?;
            match &mut self.beside {
                Some(neighbours) => neighbours.step()?,
                None if worked => {}
                None => self.idle()?,
            }
        }
        let end_ns = self.clock.now_ns();
        self.tally.unsent = self.arrivals.behind(end_ns);
        self.tally.lasted_ns = end_ns - start_ns;
        self.drain()?;
        Ok(self.tally)
    }

    /// Takes all responses and starts all requests that it can. Returns `false` if there were none.
    #[inline]
    fn pass(&mut self, phase: u32) -> Result<bool, LoadError> {
        let responses = self.queue.responses()?;
        if responses == 0 && !self.queue.has_free() {
            return Ok(false);
        }
        let now_ns = self.clock.now_ns();
        self.take(responses, phase, now_ns)?;
        let started_before = self.tally.started;
        while self.queue.has_free()
            && let Some(start_ns) = self.arrivals.next(now_ns)
        {
            self.tally.late_max_ns = self.tally.late_max_ns.max(now_ns - start_ns);
            let (operation, sector) = self.pattern.next_request();
            self.queue.start(start_ns, operation, sector);
            self.tally.started += 1;
        }
        let started = self.tally.started > started_before;
        if started && self.queue.publish()? {
            self.gauge.sent.add(1);
        }
        Ok(started || responses > 0)
    }

    #[inline]
    fn take(&mut self, responses: u32, phase: u32, now_ns: u64) -> Result<(), LoadError> {
        if responses == 0 {
            return Ok(());
        }
        // Neither phase 0, the warm-up, nor the end belongs to a sample.
        let sample = usize::try_from(phase).map_or(usize::MAX, |phase| phase.wrapping_sub(1));
        let mut sample = self.tally.samples.get_mut(sample);
        for _ in 0..responses {
            let answer = self.queue.take()?;
            if answer.status != 0 {
                self.tally.errors += 1;
                self.tally.first_error.get_or_insert(failed(&answer));
            } else if let Some(latencies) = &mut sample {
                let started = answer.started;
                let latency_ns = now_ns - started.at_ns;
                match started.is_read {
                    true => latencies.reads.saturating_record(latency_ns),
                    false => latencies.writes.saturating_record(latency_ns),
                }
            }
        }
        self.gauge.completed.add(responses.into());
        Ok(())
    }

    /// Waits for all answers.
    fn drain(&mut self) -> Result<(), LoadError> {
        let end_ns = self.clock.now_ns() + PATIENCE_S * 1_000_000_000;
        while self.queue.in_flight() > 0 {
            let responses = self.queue.responses()?;
            if responses > 0 {
                self.take(responses, STOP, self.clock.now_ns())?;
                continue;
            }
            if self.phase.0.load(Ordering::Relaxed) == ABANDON {
                return Err(LoadError::Abandoned(self.queue.in_flight()));
            }
            if self.clock.now_ns() > end_ns {
                return Err(LoadError::Silence(self.queue.in_flight()));
            }
            self.sleep(SLEEP_MAX_NS)?;
        }
        Ok(())
    }

    #[inline]
    fn idle(&mut self) -> Result<(), LoadError> {
        match self.wait {
            Wait::Busy => {
                std::hint::spin_loop();
                Ok(())
            }
            Wait::Block { spin_ns } => self.block(spin_ns),
        }
    }

    fn block(&mut self, spin_ns: u64) -> Result<(), LoadError> {
        let now_ns = self.clock.now_ns();
        // With no free request, the schedule has to wait for a response.
        let due_ns = self.arrivals.due_ns().filter(|_| self.queue.has_free());
        let awake_until_ns = due_ns.unwrap_or(u64::MAX).min(now_ns + spin_ns);
        let mut now_ns = now_ns;
        while now_ns < awake_until_ns {
            if self.queue.responses()? > 0 {
                return Ok(());
            }
            std::hint::spin_loop();
            now_ns = self.clock.now_ns();
        }
        match due_ns.map_or(SLEEP_MAX_NS, |due_ns| due_ns.saturating_sub(now_ns)) {
            0 => Ok(()),
            sleep_ns => self.sleep(sleep_ns.min(SLEEP_MAX_NS)),
        }
    }

    /// Asks for a notification and sleeps until it comes or the time has passed.
    fn sleep(&mut self, sleep_ns: u64) -> Result<(), LoadError> {
        if self.queue.arm() {
            return Ok(());
        }
        let events = self.queue.events();
        park::sleep(&[events.as_fd()], Some(Duration::from_nanos(sleep_ns)));
        let mut ports = [Port(0); 4];
        let count = events.pending(&mut ports)?;
        events.unmask(&ports[..count])?;
        self.gauge.received.add(count as u64);
        Ok(())
    }
}

fn failed(answer: &Answer) -> Failed {
    Failed { status: answer.status, is_read: answer.started.is_read, sector: answer.sector }
}

#[cfg(test)]
pub(crate) mod test;

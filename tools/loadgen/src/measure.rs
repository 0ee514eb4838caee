//! The measurement: a thread for each ring, and the main thread, which reads the counters at each sample's
//! end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use polldisk::xen::Events;

use crate::arrivals::{Arrivals, Schedule};
use crate::clock::Clock;
use crate::disk::{Disk, Negotiated};
use crate::load::crowd::{Count, Crowd, Guest, Progress};
use crate::load::{Gauge, Load, LoadError, Phase, Tally, Wait};
use crate::neighbours::storage::Storage;
use crate::neighbours::{NEIGHBOURS, Neighbour};
use crate::options::Plan;
use crate::pattern::Pattern;
use crate::queue::Queue;
use crate::sys;
use crate::usage::Usage;

/// A backend, watched while the load runs.
pub trait Watched {
    /// Returns an error if the backend has ended.
    fn check(&mut self) -> anyhow::Result<()>;
    /// The process whose CPU time is measured.
    fn pid(&self) -> Option<u32>;
    /// Whether threads of this process serve the disks, so that its CPU time says nothing about the load.
    fn is_here(&self) -> bool {
        false
    }
}

/// All counters, read at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// The moment.
    pub at_ns: u64,
    /// Responses taken.
    pub completed: u64,
    /// Notifications to the backend.
    pub sent: u64,
    /// Notifications from the backend.
    pub received: u64,
    /// What the backend has used.
    pub backend: Option<Usage>,
    /// CPU time of the load, which is that of this process, since it does nothing else.
    pub load_cpu_ns: Option<u64>,
    /// What each neighbour has done.
    pub neighbours: [Progress; NEIGHBOURS],
}

/// The readings and tallies of a run.
#[derive(Debug)]
pub struct Measured {
    /// At the start of the first sample and at the end of each.
    pub readings: Vec<Reading>,
    /// The tallies by ring.
    pub tallies: Vec<Tally>,
}

/// Connected disks that were measured, and closed.
#[derive(Debug)]
pub struct Driven {
    /// What the measurement has shown.
    pub measured: Measured,
    /// What each disk's ends had agreed on.
    pub disks: Vec<Negotiated>,
    /// The same for each neighbour's disk, after what the neighbour does.
    pub neighbours: Vec<(&'static str, Negotiated)>,
}

/// How often the main thread checks for errors.
const LOOK: Duration = Duration::from_millis(100);

/// How often it checks while the last requests are answered.
const DRAIN_LOOK: Duration = Duration::from_millis(1);

/// Runs the load on connected disks, beside neighbours on theirs. At the end it thaws the neighbours'
/// storage, so that requests that hang there do not hold up the load's last answers.
pub fn measure<E: Events + Send>(
    plan: &Plan,
    disks: Vec<&mut Disk<E>>,
    (neighbours, storage): (Vec<(&Neighbour, &mut Disk<E>)>, &mut Storage),
    backend: &mut dyn Watched,
    interrupted: &AtomicBool,
) -> anyhow::Result<Measured> {
    let parts = match plan.options.idle {
        true => Vec::new(),
        false => parts(plan, disks)?,
    };
    let gauges: Vec<Gauge> = parts.iter().map(|_| Gauge::default()).collect();
    let counts: [Count; NEIGHBOURS] = Default::default();
    let mut crowd = crowd(neighbours, &counts)?;
    let (clock, phase) = (Clock::start(), Phase::default());
    std::thread::scope(|scope| {
        let threads: Vec<_> = parts
            .into_iter()
            .zip(&gauges)
            .map(|(part, gauge)| {
                let (phase, crowd) = (&phase, crowd.take());
                let run = move || part.run(plan, clock, phase, gauge, crowd);
                std::thread::Builder::new().name("queue".to_owned()).spawn_scoped(scope, run)
            })
            .collect::<Result<_, _>>()?;
        let observed = observe(plan, clock, &phase, (&gauges, &counts), backend, &|| {
            if interrupted.load(Ordering::Relaxed) {
                bail!("interrupted");
            }
            match threads.iter().any(ScopedJoinHandle::is_finished) {
                true => bail!("a ring's thread ended early"),
                false => Ok(()),
            }
        });
        let observed = observed.and_then(|readings| {
            phase.stop();
            storage.thaw()?;
            // If the backend ends now, some requests are never answered.
            while !threads.iter().all(ScopedJoinHandle::is_finished) {
                backend.check()?;
                std::thread::sleep(DRAIN_LOOK);
            }
            Ok(readings)
        });
        if observed.is_err() {
            phase.abandon();
        }
        let mut tallies = Vec::new();
        let mut failure = None;
        for thread in threads {
            match thread.join().map_err(|_| anyhow!("a ring's thread panicked"))? {
                Ok(tally) => tallies.push(tally),
                Err(LoadError::Abandoned(_)) => {}
                Err(error) => failure = Some(error),
            }
        }
        // An error of a ring's thread is the cause of all others.
        match failure {
            Some(error) => Err(error.into()),
            None => Ok(Measured { readings: observed?, tallies }),
        }
    })
}

/// All that one ring's thread needs.
struct Part<'a, E> {
    queue: &'a mut Queue<E>,
    pattern: Pattern,
    core: Option<usize>,
    /// The ring's number among all rings, and how many there are.
    number: u64,
    count: u64,
}

fn parts<'a, E: Events>(
    plan: &Plan,
    disks: Vec<&'a mut Disk<E>>,
) -> anyhow::Result<Vec<Part<'a, E>>> {
    let mut parts = Vec::new();
    for disk in disks {
        let (queues, shape) = disk.queues(plan);
        let count = queues.len();
        for (index, queue) in queues.iter_mut().enumerate() {
            let number = parts.len();
            let pattern = shape
                .pattern(index, count, 0x706f_6c6c_6469_736b ^ (number as u64) << 32)
                .context("a block does not fit: give a larger --size")?;
            let core = match plan.cores.len() {
                0 => None,
                cores => plan.cores.get(number % cores).copied(),
            };
            parts.push(Part { queue, pattern, core, number: number as u64, count: 0 });
        }
    }
    let count = parts.len() as u64;
    parts.iter_mut().for_each(|part| part.count = count);
    Ok(parts)
}

/// The neighbours with their rings; `None` if there are no neighbours.
fn crowd<'a, E: Events>(
    neighbours: Vec<(&Neighbour, &'a mut Disk<E>)>,
    counts: &'a [Count; NEIGHBOURS],
) -> anyhow::Result<Option<Crowd<'a, E>>> {
    let guests = neighbours
        .into_iter()
        .zip(counts)
        .enumerate()
        .map(|(number, ((neighbour, disk), count))| {
            let (queues, shape) = disk.queues(&neighbour.plan);
            let queue = queues.first_mut().context("a neighbour's disk has no ring")?;
            let pattern = shape.pattern(0, 1, number as u64);
            let pattern = pattern.context("a neighbour's disk has no room for a block")?;
            Ok(Guest { queue, pattern, storms: neighbour.habit.storms, count })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    Ok((!guests.is_empty()).then(|| Crowd::new(guests)))
}

impl<'a, E: Events> Part<'a, E> {
    fn run(
        self,
        plan: &Plan,
        clock: Clock,
        phase: &'a Phase,
        gauge: &'a Gauge,
        crowd: Option<Crowd<'a, E>>,
    ) -> Result<Tally, LoadError> {
        if let Some(id) = self.core {
            core_affinity::set_for_current(core_affinity::CoreId { id });
        }
        if plan.wait != Wait::Busy {
            sys::sleep_exactly();
        }
        // Made before the schedule starts, since it takes time.
        let tally = Tally::new(plan.options.samples);
        let arrivals = match plan.options.rate {
            None => Arrivals::Closed,
            Some(rate) => {
                Arrivals::Open(Schedule::new(clock.now_ns(), rate, self.number, self.count))
            }
        };
        let Part { queue, pattern, .. } = self;
        let load = Load::new(queue, pattern, arrivals, plan.wait, clock, phase, gauge, tally);
        load.beside(crowd).run()
    }
}

/// Sleeps through the warm-up and the samples, and reads the counters at the start and end of each sample.
fn observe(
    plan: &Plan,
    clock: Clock,
    phase: &Phase,
    counters: (&[Gauge], &[Count; NEIGHBOURS]),
    backend: &mut dyn Watched,
    look: &dyn Fn() -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Reading>> {
    let (warmup_ns, sample_ns) = (as_ns(plan.warmup), as_ns(plan.sample));
    let sleep_until = |at_ns: u64, backend: &mut dyn Watched| {
        while clock.now_ns() < at_ns {
            look()?;
            backend.check()?;
            clock.sleep_until(at_ns.min(clock.now_ns() + as_ns(LOOK)));
        }
        anyhow::Ok(())
    };
    sleep_until(warmup_ns, backend)?;
    let mut readings = vec![read(clock, counters, backend)?];
    let start_ns = clock.now_ns();
    for sample in 0..plan.options.samples {
        phase.sample(sample);
        sleep_until(start_ns + (sample as u64 + 1) * sample_ns, backend)?;
        readings.push(read(clock, counters, backend)?);
    }
    look()?;
    Ok(readings)
}

fn read(
    clock: Clock,
    (gauges, counts): (&[Gauge], &[Count; NEIGHBOURS]),
    backend: &mut dyn Watched,
) -> anyhow::Result<Reading> {
    let usage = backend.pid().map(|pid| {
        Usage::of(pid).with_context(|| format!("cannot read what process {pid} has used"))
    });
    if let Some(Err(_)) = usage {
        // If the backend has ended, its own error says more.
        backend.check()?;
    }
    let load_cpu_ns = match backend.is_here() {
        true => None,
        false => Some(sys::process_cpu_ns(std::process::id())?),
    };
    let sum = |of: fn(&Gauge) -> u64| gauges.iter().map(of).sum();
    Ok(Reading {
        backend: usage.transpose()?,
        load_cpu_ns,
        at_ns: clock.now_ns(),
        completed: sum(|gauge| gauge.completed.get()),
        sent: sum(|gauge| gauge.sent.get()),
        received: sum(|gauge| gauge.received.get()),
        neighbours: counts.each_ref().map(Count::read),
    })
}

fn as_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

//! A thread that serves rings: it polls while there is work, and sleeps when there is none.
//!
//! [`Worker::poll_once`] is one pass over the polled queues and can be called from a test with no
//! thread at all; [`spawn`] makes the pinned thread that calls it for ever. A queue is *polled* from
//! its first event or completion until it had no work for the spin budget; then it is *armed*: its
//! frontend notifies again, and its event channel, masked since its last event, is unmasked. A
//! notification storm of a guest therefore costs a busy worker nothing (XSA-332).

mod thread;

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use quanta::Clock;
use slab::Slab;

use crate::backing::Image;
use crate::engine::{Completion, Engine};
use crate::limits::{
    COMMANDS_PER_PASS, EVENT_CHECK_NS, EVENT_CHECK_PASSES, PERSISTENT_SWEEP_SECONDS,
    PORTS_PER_READ, QUEUES_PER_WORKER,
};
use crate::msg::{
    Command, CommandReceiver, Connect, Event, EventSender, InFlight, QueueKey, ReplaceImage,
};
use crate::park::{self, Patience, Pause};
use crate::queue::{BouncePool, LargeTables, Queue, Resources, Scratch};
use crate::units::Port;
use crate::xen::{Events, Platform, PlatformError};

pub use thread::{Setup, SpawnError, WorkerThread, spawn, spawn_all};

const SWEEP_NS: u64 = PERSISTENT_SWEEP_SECONDS * 1_000_000_000;

/// Whether a pass found anything to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It did.
    Worked,
    /// It did not.
    Idle,
}

/// One worker's rings and everything it needs for them.
#[derive(Debug)]
pub struct Worker<P: Platform, E> {
    events: P::Events,
    resources: Resources<P::Grants, E>,
    queues: Slab<Served>,
    by_key: HashMap<QueueKey, usize>,
    by_port: HashMap<Port, usize>,
    /// Queues whose rings are looked at in every pass.
    polled: Vec<usize>,
    /// Queues that are to be disconnected once drained.
    leaving: Vec<usize>,
    /// Queues that get another image once drained.
    replacing: Vec<(usize, Box<ReplaceImage>)>,
    /// Masked ports of queues that were armed in this pass.
    unmask: Vec<Port>,
    done: Vec<Completion>,
    commands: CommandReceiver,
    reports: EventSender,
    patience: Patience,
    last_work_ns: u64,
    last_event_check_ns: u64,
    passes_since_event_check: u32,
    /// The last sleep has told that there are none now.
    no_events: bool,
    next_sweep_ns: u64,
    stopping: bool,
}

/// A queue with what the worker knows of it.
#[derive(Debug)]
struct Served {
    queue: Queue,
    polled: bool,
    /// No event has come since its port was unmasked, as a port is when it is bound.
    unmasked: bool,
    last_work_ns: u64,
}

impl<P: Platform, E: Engine<Target = Image>> Worker<P, E> {
    /// A worker without queues. It opens its own event channels and grant mappings, and belongs to
    /// the calling thread from now on.
    pub fn new(setup: Setup<P>, engine: E) -> Result<Worker<P, E>, PlatformError> {
        Ok(Worker {
            events: setup.platform.open_events()?,
            resources: Resources {
                grants: setup.platform.open_grants()?,
                engine,
                bounce: BouncePool::default(),
                tables: LargeTables::default(),
                scratch: Scratch::default(),
            },
            queues: Slab::new(),
            by_key: HashMap::new(),
            by_port: HashMap::new(),
            polled: Vec::new(),
            leaving: Vec::new(),
            replacing: Vec::new(),
            unmask: Vec::new(),
            done: Vec::new(),
            commands: setup.commands,
            reports: setup.reports,
            patience: Patience::new(setup.poll),
            last_work_ns: 0,
            last_event_check_ns: 0,
            passes_since_event_check: 0,
            no_events: false,
            next_sweep_ns: u64::MAX,
            stopping: false,
        })
    }

    /// Passes and sleeps until [`Command::Stop`] was obeyed.
    pub fn run(&mut self) -> io::Result<()> {
        // Of Linux's own clock each reading is a system call in a PV dom0, unless Xen itself keeps time
        // by the processor's counter.
        let clock = Clock::new();
        let start = clock.raw();
        let clock_ns = || clock.delta_as_nanos(start, clock.raw());
        while !(self.stopping && self.queues.is_empty()) {
            if self.poll_once(clock_ns)? == Progress::Worked {
                self.patience.ended(self.last_work_ns);
                continue;
            }
            let storage_works = self.resources.engine.in_flight() > 0;
            let pause = self.patience.goes_on(clock_ns(), storage_works);
            self.arm_idle(pause)?;
            if self.polled.is_empty() && !pause.spins {
                self.sleep(clock_ns)?;
            } else {
                std::hint::spin_loop();
            }
        }
        Ok(())
    }

    /// Sleeps until a sleeping queue's frontend notifies, storage completes or control commands.
    fn sleep(&mut self, clock_ns: impl Fn() -> u64) -> io::Result<()> {
        let completed = self.resources.engine.arm()?;
        if completed || !self.commands.commands.is_empty() {
            self.resources.engine.disarm(completed);
            return Ok(());
        }
        let asleep_ns = clock_ns();
        let [notified, completed, commanded, _] = park::sleep(
            &[
                self.events.as_fd(),
                self.resources.engine.completion_fd(),
                self.commands.bell.as_fd(),
            ],
            self.until_sweep(asleep_ns),
        );
        self.no_events = !notified;
        self.resources.engine.disarm(completed);
        if commanded {
            self.commands.bell.silence();
        }
        Ok(())
    }

    /// One pass: commands, events, requests, storage, responses. At most one system call each for
    /// events, mapping, copying, submission (a few more where storage was idle); and one notification
    /// per ring. The clock is read once, and once more where something completed. An error is our
    /// own host's (io_uring or the event-channel device fails), never a guest's.
    pub fn poll_once(&mut self, clock_ns: impl Fn() -> u64) -> io::Result<Progress> {
        let now_ns = clock_ns();
        if now_ns >= self.next_sweep_ns {
            self.sweep(now_ns);
        }
        let mut worked = self.take_commands(now_ns);
        if self.event_check_is_due(now_ns) {
            worked |= self.take_events(now_ns)?;
        }
        worked |= self.take_requests(now_ns);
        self.resources.engine.kick()?;
        worked |= self.take_completions(&clock_ns);
        if worked {
            self.finish_pass(now_ns)?;
            self.last_work_ns = now_ns;
        }
        if !self.replacing.is_empty() {
            self.replace_drained(now_ns);
        }
        if !self.leaving.is_empty() {
            self.disconnect_drained();
        }
        Ok(if worked { Progress::Worked } else { Progress::Idle })
    }

    /// Unmaps granted pages that have long been idle. Once none is mapped and no queue is active
    /// there is nothing to come back for, and a worker without work sleeps for ever.
    fn sweep(&mut self, now_ns: u64) {
        let mut some_left = !self.polled.is_empty();
        for (_, served) in &mut self.queues {
            some_left |= served.queue.sweep(&mut self.resources);
        }
        self.next_sweep_ns = if some_left { now_ns + SWEEP_NS } else { u64::MAX };
    }

    fn until_sweep(&self, now_ns: u64) -> Option<Duration> {
        let left = (self.next_sweep_ns != u64::MAX)
            .then(|| self.next_sweep_ns - now_ns.min(self.next_sweep_ns));
        left.map(Duration::from_nanos)
    }

    fn take_commands(&mut self, now_ns: u64) -> bool {
        if self.commands.commands.is_empty() {
            return false;
        }
        for _ in 0..COMMANDS_PER_PASS {
            match self.commands.commands.try_recv() {
                Ok(command) => self.command(command, now_ns),
                Err(_) => break,
            }
        }
        true
    }

    fn command(&mut self, command: Command, now_ns: u64) {
        match command {
            Command::Connect(connect) => self.connect(*connect, now_ns),
            Command::Disconnect(key) => self.leave(key),
            Command::ReplaceImage(replace) => self.replace(replace, now_ns),
            Command::TakeLatency(key) => {
                let queue = self.by_key.get(&key).and_then(|index| self.queues.get_mut(*index));
                let latency = queue.map(|served| Box::new(served.queue.take_latency()));
                self.reports.send(Event::Latency(key, latency));
            }
            Command::TellInFlight(key) => {
                self.reports.send(Event::InFlight(key, InFlight::default()));
            }
            Command::Stop => {
                self.stopping = true;
                let keys: Vec<QueueKey> = self.by_key.keys().copied().collect();
                keys.into_iter().for_each(|key| self.leave(key));
            }
        }
    }

    fn connect(&mut self, connect: Connect, now_ns: u64) {
        let key = connect.key;
        let entry = self.queues.vacant_entry();
        let index = entry.key();
        let connected = match u32::try_from(index) {
            Ok(number) if index < QUEUES_PER_WORKER && !self.stopping => {
                Queue::connect(connect, number, &mut self.resources.grants, &mut self.events)
            }
            _ => Err("the worker takes no more queues".to_owned()),
        };
        match connected {
            Ok(queue) => {
                self.by_key.insert(key, index);
                self.by_port.insert(queue.port(), index);
                entry.insert(Served { queue, polled: false, unmasked: true, last_work_ns: now_ns });
                self.poll_queue(index, now_ns);
                self.reports.send(Event::Connected(key));
            }
            Err(reason) => self.reports.send(Event::ConnectFailed(key, reason)),
        }
    }

    fn leave(&mut self, key: QueueKey) {
        match self.by_key.get(&key) {
            Some(index) => {
                self.queues[*index].queue.stop();
                if !self.leaving.contains(index) {
                    self.leaving.push(*index);
                }
            }
            None => self.reports.send(Event::Disconnected(key)),
        }
    }

    fn replace(&mut self, replace: Box<ReplaceImage>, now_ns: u64) {
        match self.by_key.get(&replace.key).copied() {
            Some(index) => {
                self.queues[index].queue.pause();
                self.poll_queue(index, now_ns);
                self.replacing.push((index, replace));
            }
            None => self.reports.send(Event::ImageReplaced(replace.key)),
        }
    }

    fn replace_drained(&mut self, now_ns: u64) {
        for (index, replace) in std::mem::take(&mut self.replacing) {
            let queue = &mut self.queues[index].queue;
            if !queue.is_paused() {
                self.replacing.push((index, replace));
                continue;
            }
            let ReplaceImage { key, rules, image } = *replace;
            queue.replace_image(image, rules);
            // Requests may have come meanwhile.
            self.poll_queue(index, now_ns);
            self.reports.send(Event::ImageReplaced(key));
        }
    }

    fn disconnect_drained(&mut self) {
        let queues = &self.queues;
        let (drained, leaving) =
            self.leaving.iter().partition(|index| queues[**index].queue.is_drained());
        self.leaving = leaving;
        let drained: Vec<usize> = drained;
        for index in drained {
            let Served { queue, .. } = self.queues.remove(index);
            self.polled.retain(|polled| *polled != index);
            self.by_key.remove(&queue.key());
            self.by_port.remove(&queue.port());
            let key = queue.key();
            queue.disconnect(&mut self.resources, &mut self.events);
            self.reports.send(Event::Disconnected(key));
        }
    }

    /// While every queue is polled no event can tell anything new; otherwise ask now and then for
    /// those that sleep.
    #[inline]
    fn event_check_is_due(&mut self, now_ns: u64) -> bool {
        let no_events = std::mem::take(&mut self.no_events);
        if no_events || self.polled.len() == self.queues.len() {
            return false;
        }
        self.passes_since_event_check += 1;
        self.polled.is_empty()
            || (now_ns.saturating_sub(self.last_event_check_ns) >= EVENT_CHECK_NS
                && self.passes_since_event_check >= EVENT_CHECK_PASSES)
    }

    fn take_events(&mut self, now_ns: u64) -> io::Result<bool> {
        self.last_event_check_ns = now_ns;
        self.passes_since_event_check = 0;
        let mut ports = [Port(0); PORTS_PER_READ];
        let count = self.events.pending(&mut ports)?;
        for port in ports.iter().take(count) {
            if let Some(index) = self.by_port.get(port).copied() {
                self.queues[index].unmasked = false;
                self.poll_queue(index, now_ns);
            }
        }
        Ok(count > 0)
    }

    /// From now on the ring is looked at in every pass, so that nobody need notify us of it.
    fn poll_queue(&mut self, index: usize, now_ns: u64) {
        let served = &mut self.queues[index];
        served.last_work_ns = now_ns;
        if !served.polled {
            served.polled = true;
            served.queue.disarm();
            self.polled.push(index);
            // What it maps now will be idle one day.
            self.next_sweep_ns = self.next_sweep_ns.min(now_ns + SWEEP_NS);
        }
    }

    #[inline]
    fn take_requests(&mut self, now_ns: u64) -> bool {
        let mut worked = false;
        for index in &self.polled {
            let served = &mut self.queues[*index];
            match served.queue.take(&mut self.resources, now_ns) {
                Ok(false) => {}
                Ok(true) => {
                    served.last_work_ns = now_ns;
                    worked = true;
                }
                Err(fault) => {
                    let event = Event::RingFault(served.queue.key(), fault.to_string());
                    self.reports.send(event);
                }
            }
        }
        worked
    }

    #[inline]
    fn take_completions(&mut self, clock_ns: impl Fn() -> u64) -> bool {
        let mut done = std::mem::take(&mut self.done);
        self.resources.engine.reap(&mut done);
        let worked = !done.is_empty();
        let now_ns = if worked { clock_ns() } else { 0 };
        for Completion { ticket, result } in done.drain(..) {
            self.poll_queue(ticket.queue(), now_ns);
            let queue = &mut self.queues[ticket.queue()].queue;
            queue.complete(&mut self.resources, ticket.slot(), result, now_ns);
        }
        self.done = done;
        worked
    }

    #[inline]
    fn finish_pass(&mut self, now_ns: u64) -> io::Result<()> {
        for index in &self.polled {
            let queue = &mut self.queues[*index].queue;
            if queue.finish_pass(&mut self.resources, now_ns) {
                self.events.notify(queue.port())?;
            }
        }
        Ok(())
    }

    /// Arms queues: all of them in a pause in which the worker no longer spins, before that those that
    /// had no work for the longest that there is any spinning.
    fn arm_idle(&mut self, pause: Pause) -> io::Result<()> {
        let last_work_ns = self.last_work_ns;
        let (queues, unmask) = (&mut self.queues, &mut self.unmask);
        self.polled.retain(|index| {
            let served = &mut queues[*index];
            // Both were taken at the start of a pass: how long its last one took doesn't count.
            let quiet_ns = pause.lasted_ns + last_work_ns.saturating_sub(served.last_work_ns);
            if (pause.spins && quiet_ns < pause.limit_ns) || served.queue.arm() {
                return true;
            }
            served.polled = false;
            if !std::mem::replace(&mut served.unmasked, true) {
                unmask.push(served.queue.port());
            }
            false
        });
        if !self.unmask.is_empty() {
            self.events.unmask(&self.unmask)?;
            self.unmask.clear();
        }
        Ok(())
    }
}

//! A thread that serves rings: it polls while there is work, and sleeps when there is none.
//!
//! [`Worker::poll_once`] is one pass over the polled queues; a test can call it without a thread.
//! [`spawn`] starts the pinned thread that calls it in a loop. A queue is *polled* from its first event or
//! completion until it has had no work for the spin budget. Then it is *armed*: its frontend is asked to
//! notify again, and its event channel, masked since its last event, is unmasked. So a guest's notification
//! storm costs a busy worker nothing (XSA-332).
//!
//! A queue that waits for something that other queues hold is neither polled nor armed: it is looked at
//! again once something was given back. If several queues have work, they take turns ([`turns`]).

mod thread;
mod turns;

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use quanta::Clock;
use rustc_hash::FxHashMap;
use slab::Slab;

use crate::backing::Image;
use crate::engine::{Completion, Engine};
use crate::limits::{
    COMMANDS_PER_PASS, EVENT_CHECK_MAX_NS, EVENT_CHECK_NS, EVENT_CHECK_PASSES, OUTBOX_RETRY_MS,
    PERSISTENT_SWEEP_SECONDS, PORTS_PER_READ, QUEUES_PER_WORKER, REQUESTS_COMMON, TURN_EFFORT,
    TURN_EFFORT_AHEAD, TURN_EFFORT_ALONE,
};
use crate::msg::{Command, CommandReceiver, Connect, Outbox, QueueKey, ReplaceImage, Report};
use crate::park;
use crate::patience::{Patience, Pause};
use crate::queue::{Queue, Resources, Turn};
use crate::units::Port;
use crate::xen::shm::PAGE_BYTES;
use crate::xen::{Events, Platform, PlatformError};

pub use thread::{Setup, SpawnError, WorkerThread, serve, spawn, spawn_all};
use turns::{OperationCost, THREAD_NS, TimeUsed, Turns};

const SWEEP_NS: u64 = PERSISTENT_SWEEP_SECONDS * 1_000_000_000;

/// Whether a pass found anything to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It found work.
    Worked,
    /// It found none.
    Idle,
}

/// One worker's rings and everything it needs for them.
#[derive(Debug)]
pub struct Worker<P: Platform, E> {
    events: P::Events,
    resources: Resources<P::Grants, E>,
    queues: Slab<Served>,
    by_key: FxHashMap<QueueKey, usize>,
    by_port: FxHashMap<Port, usize>,
    /// Queues whose rings are looked at in every pass.
    polled: Vec<usize>,
    /// Queues to look at again once something was given back.
    waiting: Vec<usize>,
    /// [`Resources::give_backs`] when they were last looked at.
    give_backs: u64,
    /// Queues that get another image, or are disconnected, once they are drained.
    draining: Vec<usize>,
    turns: Turns,
    /// Masked ports of queues being armed.
    unmask: Vec<Port>,
    done: Vec<Completion>,
    commands: CommandReceiver,
    patience: Patience,
    last_work_ns: u64,
    last_event_check_ns: u64,
    passes_since_event_check: u32,
    /// The last sleep ended without an event.
    no_events: bool,
    next_sweep_ns: u64,
    stopping: bool,
}

/// A queue, and what the worker knows about it.
#[derive(Debug)]
struct Served {
    queue: Queue,
    polled: bool,
    /// It is in [`Worker::waiting`].
    waits: bool,
    /// No event has arrived since its port was unmasked; a port starts out unmasked.
    unmasked: bool,
    last_work_ns: u64,
    used: TimeUsed,
    /// How long its turn in this round took.
    turn_ns: u64,
    operation_cost: OperationCost,
    /// Its weight in [`Worker::charge_parts`]: that of its operations to submit, then its bytes completed.
    part: u64,
    /// The images it goes over to, in order, once it is drained.
    replacements: Vec<ReplaceImage>,
    /// It is to be disconnected once it is drained.
    leaving: bool,
}

impl<P: Platform, E: Engine<Target = Image>> Worker<P, E> {
    /// A worker without queues. It opens its own event channels and grant mappings, and belongs to
    /// the calling thread from now on.
    pub fn new(setup: Setup<P>, engine: E) -> Result<Worker<P, E>, PlatformError> {
        let (events, grants) = (setup.platform.open_events()?, setup.platform.open_grants()?);
        let (polled, waiting, draining, unmask) = Default::default();
        Ok(Worker {
            events,
            resources: Resources::new(grants, engine, Outbox::new(setup.reporter), setup.workers),
            queues: Slab::new(),
            by_key: FxHashMap::default(),
            by_port: FxHashMap::default(),
            polled,
            waiting,
            give_backs: 0,
            draining,
            turns: Turns::default(),
            unmask,
            done: Vec::with_capacity(REQUESTS_COMMON),
            commands: setup.commands,
            patience: Patience::new(setup.policy, setup.sleep_cost),
            last_work_ns: 0,
            last_event_check_ns: 0,
            passes_since_event_check: 0,
            no_events: false,
            next_sweep_ns: u64::MAX,
            stopping: false,
        })
    }

    /// Whether nothing is in flight, so that nobody else still accesses the worker's memory.
    fn is_at_rest(&self) -> bool {
        self.queues.is_empty() && self.resources.engine.in_flight() == 0
    }

    /// Runs passes and sleeps until [`Command::Stop`] was carried out.
    pub fn run(&mut self) -> io::Result<()> {
        // In a PV dom0, each reading of Linux's own clock is a system call unless Xen itself keeps time by
        // the processor's counter.
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
            if self.is_to_sleep(pause)? {
                self.sleep(clock_ns)?;
            } else {
                std::hint::spin_loop();
            }
        }
        self.resources.outbox.close();
        Ok(())
    }

    /// After a pass without work: arms the queues that have been idle for long enough; says whether to sleep
    /// until something happens.
    fn is_to_sleep(&mut self, pause: Pause) -> io::Result<bool> {
        self.arm_idle(pause)?;
        Ok(self.polled.is_empty() && !self.has_new_for_waiting() && !pause.spins)
    }

    /// Whether something was given back since the waiting queues were last looked at.
    #[inline]
    fn has_new_for_waiting(&self) -> bool {
        !self.waiting.is_empty() && self.give_backs != self.resources.give_backs
    }

    /// Does what [`Worker::run`] does after a pass without work, but neither spins nor sleeps; says whether
    /// the worker would sleep now.
    pub fn arm(&mut self) -> io::Result<bool> {
        let pause = Pause { lasted_ns: 0, spins: false, limit_ns: 0 };
        let sleeps = self.is_to_sleep(pause)? && self.arm_engine()?;
        if sleeps {
            self.resources.engine.disarm(false);
        }
        Ok(sleeps)
    }

    /// Asks the engine to signal its next completion. `false`: there is a completion or a command already,
    /// and the engine is disarmed again.
    fn arm_engine(&mut self) -> io::Result<bool> {
        let completed = self.resources.engine.arm()?;
        let nothing = !completed && self.commands.commands.is_empty();
        if !nothing {
            self.resources.engine.disarm(completed);
        }
        Ok(nothing)
    }

    /// Sleeps until an armed queue's frontend notifies, storage completes something, control sends a command,
    /// or [`Worker::longest_sleep`] is over.
    fn sleep(&mut self, clock_ns: impl Fn() -> u64) -> io::Result<()> {
        if !self.arm_engine()? {
            return Ok(());
        }
        self.patience.sleeps();
        let asleep_ns = clock_ns();
        let [notified, completed, commanded, _] = park::sleep(
            &[
                self.events.as_fd(),
                self.resources.engine.completion_fd(),
                self.commands.bell.as_fd(),
            ],
            self.longest_sleep(asleep_ns),
        );
        self.no_events = !notified;
        self.resources.engine.disarm(completed);
        if commanded {
            self.commands.bell.silence();
        }
        Ok(())
    }

    /// Makes one pass: commands, events, requests, storage, responses.
    ///
    /// It makes at most one system call for events and one for submission (a few more if storage was idle),
    /// and for each queue with work one for mapping (more if a batch fails), a few for copying and one for
    /// the notification. It reads the clock once, again if something completed, and, if several queues are
    /// polled, after the work of each. An error is the host's (io_uring or the event-channel device fails),
    /// never a guest's.
    pub fn poll_once(&mut self, clock_ns: impl Fn() -> u64) -> io::Result<Progress> {
        let now_ns = clock_ns();
        self.resources.now_ns = now_ns;
        if now_ns >= self.next_sweep_ns {
            self.sweep(now_ns);
        }
        if !self.resources.outbox.is_empty() {
            self.resources.outbox.offer();
        }
        let mut worked = self.take_commands(now_ns);
        if self.event_check_is_due(now_ns) {
            worked |= self.take_events(now_ns)?;
        }
        if self.has_new_for_waiting() {
            self.look_at_waiting(now_ns);
        }
        worked |= if self.polled.len() > 1 {
            self.serve_in_turns(now_ns, &clock_ns)?
        } else {
            self.serve_alone(now_ns, &clock_ns)?
        };
        if worked {
            self.last_work_ns = now_ns;
        }
        if !self.draining.is_empty() {
            self.tend_drained(now_ns);
        }
        Ok(if worked { Progress::Worked } else { Progress::Idle })
    }

    /// Requests, storage and responses, while at most one queue is polled.
    #[inline]
    fn serve_alone(&mut self, now_ns: u64, clock_ns: impl Fn() -> u64) -> io::Result<bool> {
        let mut worked = self.take_alone(now_ns);
        self.resources.engine.kick()?;
        worked |= self.take_completions(clock_ns);
        if worked {
            self.finish_alone()?;
        }
        Ok(worked)
    }

    /// Requests, storage and responses, while several queues are polled.
    fn serve_in_turns(&mut self, now_ns: u64, clock_ns: impl Fn() -> u64) -> io::Result<bool> {
        let mut watch = Stopwatch { clock_ns: &clock_ns, since_ns: clock_ns() };
        let mut worked = self.take_in_turns(now_ns, &mut watch);
        // The queues are charged for the time to submit by the weight of their operations. A queue whose
        // data the worker itself moves, or that is not backed by storage, submits none.
        self.resources.engine.kick()?;
        self.charge_started(watch.lap_ns());
        if self.take_completions(&clock_ns) {
            worked = true;
            self.charge_threads();
            // They are charged for the time to reap by their bytes, which the engine may have had to copy.
            self.charge_parts(watch.lap_ns(), |_, _, _| {});
        }
        if worked {
            self.finish_in_turns(&mut watch)?;
        }
        Ok(worked)
    }

    /// Unmaps granted pages that have long been idle. Once none is mapped and no queue is polled, there is
    /// nothing left to sweep, and an idle worker sleeps without a timeout.
    fn sweep(&mut self, now_ns: u64) {
        let mut some_left = !self.polled.is_empty();
        for (_, served) in &mut self.queues {
            some_left |= served.queue.sweep(&mut self.resources);
        }
        self.next_sweep_ns = if some_left { now_ns + SWEEP_NS } else { u64::MAX };
    }

    /// How long to sleep if nothing happens; `None`: for ever.
    fn longest_sleep(&self, now_ns: u64) -> Option<Duration> {
        let to_sweep = (self.next_sweep_ns != u64::MAX)
            .then(|| Duration::from_nanos(self.next_sweep_ns.saturating_sub(now_ns)));
        let to_offer =
            (!self.resources.outbox.is_empty()).then(|| Duration::from_millis(OUTBOX_RETRY_MS));
        to_sweep.into_iter().chain(to_offer).min()
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
            Command::ReplaceImage(replace) => self.replace(*replace, now_ns),
            Command::TakeLatency(key) => {
                let latency = self.served_mut(key).map(|served| served.queue.take_latency());
                self.tell(Report::Latency(key, latency.map(Box::new)));
            }
            Command::TellInFlight(key) => {
                let told = self.served_mut(key).map(|served| served.queue.in_flight(now_ns));
                self.tell(Report::InFlight(key, told.unwrap_or_default()));
            }
            Command::Stop => {
                self.stopping = true;
                let keys: Vec<QueueKey> =
                    self.queues.iter().map(|(_, served)| served.queue.key()).collect();
                keys.into_iter().for_each(|key| self.leave(key));
            }
        }
    }

    fn served_mut(&mut self, key: QueueKey) -> Option<&mut Served> {
        self.by_key.get(&key).and_then(|index| self.queues.get_mut(*index))
    }

    fn tell(&mut self, report: Report) {
        self.resources.outbox.send(report);
    }

    fn connect(&mut self, connect: Connect, now_ns: u64) {
        let key = connect.key;
        let entry = self.queues.vacant_entry();
        let index = entry.key();
        let connected = match u32::try_from(index) {
            Ok(number) if index < QUEUES_PER_WORKER && !self.stopping => {
                Queue::connect(connect, number, &mut self.resources, &mut self.events)
            }
            _ => Err("the worker takes no more queues".to_owned()),
        };
        match connected {
            Ok(queue) => {
                self.by_key.insert(key, index);
                self.by_port.insert(queue.port(), index);
                entry.insert(Served::new(queue, now_ns));
                self.poll_queue(index, now_ns);
                self.tell(Report::Connected(key));
            }
            Err(reason) => self.tell(Report::ConnectFailed(key, reason)),
        }
    }

    fn leave(&mut self, key: QueueKey) {
        match self.by_key.get(&key).copied() {
            Some(index) => {
                let served = &mut self.queues[index];
                served.queue.stop();
                served.leaving = true;
                self.drain(index);
            }
            None => self.tell(Report::Disconnected(key)),
        }
    }

    fn replace(&mut self, replace: ReplaceImage, now_ns: u64) {
        match self.by_key.get(&replace.key).copied() {
            Some(index) => {
                let served = &mut self.queues[index];
                served.queue.pause();
                served.replacements.push(replace);
                self.poll_queue(index, now_ns);
                self.drain(index);
            }
            None => self.tell(Report::ImageReplaced(replace.key)),
        }
    }

    fn drain(&mut self, index: usize) {
        if !self.draining.contains(&index) {
            self.draining.push(index);
        }
    }

    /// Replaces the images of drained queues, or disconnects them.
    fn tend_drained(&mut self, now_ns: u64) {
        let mut draining = std::mem::take(&mut self.draining);
        draining.retain(|index| {
            let Served { queue, replacements, .. } = &self.queues[*index];
            if !replacements.is_empty() && queue.is_paused() {
                self.replace_image(*index, now_ns);
            }
            let Served { queue, replacements, leaving, .. } = &self.queues[*index];
            if *leaving && queue.is_drained() {
                self.disconnect(*index);
                return false;
            }
            *leaving || !replacements.is_empty()
        });
        self.draining = draining;
    }

    fn replace_image(&mut self, index: usize, now_ns: u64) {
        let served = &mut self.queues[index];
        for replace in std::mem::take(&mut served.replacements) {
            let ReplaceImage { key, rules, image } = replace;
            served.queue.replace_image(&mut self.resources, image, rules);
            self.resources.outbox.send(Report::ImageReplaced(key));
        }
        // Requests may have arrived meanwhile.
        self.poll_queue(index, now_ns);
    }

    fn disconnect(&mut self, index: usize) {
        let Served { queue, .. } = self.queues.remove(index);
        self.polled.retain(|polled| *polled != index);
        self.waiting.retain(|waiting| *waiting != index);
        let (key, port) = (queue.key(), queue.port());
        self.by_key.remove(&key);
        self.by_port.remove(&port);
        queue.disconnect(&mut self.resources, &mut self.events);
        self.tell(Report::Disconnected(key));
    }

    /// Whether to ask for events now. While every queue is polled, events tell nothing new. Otherwise ask now
    /// and then, because of the queues that are not polled.
    #[inline]
    fn event_check_is_due(&mut self, now_ns: u64) -> bool {
        let no_events = std::mem::take(&mut self.no_events);
        if no_events || self.polled.len() == self.queues.len() {
            return false;
        }
        self.passes_since_event_check += 1;
        let since_ns = now_ns.saturating_sub(self.last_event_check_ns);
        self.polled.is_empty()
            || (since_ns >= EVENT_CHECK_NS && self.passes_since_event_check >= EVENT_CHECK_PASSES)
            || since_ns >= EVENT_CHECK_MAX_NS
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

    /// Looks at the ring in every pass from now on, so that its frontend need not notify us.
    fn poll_queue(&mut self, index: usize, now_ns: u64) {
        let served = &mut self.queues[index];
        served.last_work_ns = now_ns;
        if !served.polled {
            served.polled = true;
            served.queue.disarm();
            self.polled.push(index);
            // Pages that it maps now may become idle.
            self.next_sweep_ns = self.next_sweep_ns.min(now_ns + SWEEP_NS);
        }
    }

    /// Polls those waiting queues again that may go on, now that something was given back.
    #[cold]
    fn look_at_waiting(&mut self, now_ns: u64) {
        self.give_backs = self.resources.give_backs;
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|index| {
            if !self.queues[*index].queue.may_go_on(&self.resources) {
                return true;
            }
            self.queues[*index].waits = false;
            self.poll_queue(*index, now_ns);
            false
        });
        self.waiting = waiting;
    }

    /// Runs the turn of the only polled queue, if there is one.
    #[inline]
    fn take_alone(&mut self, now_ns: u64) -> bool {
        let Some(index) = self.polled.first().copied() else { return false };
        let turn = Turn { effort: TURN_EFFORT_ALONE, operation_effort: 0 };
        self.take_turn(index, turn, now_ns)
    }

    #[inline]
    fn take_turn(&mut self, index: usize, turn: Turn, now_ns: u64) -> bool {
        let served = &mut self.queues[index];
        let taken = served.queue.take(&mut self.resources, turn);
        served.part = u64::from(served.queue.take_started());
        match taken {
            Ok(worked) => {
                if worked {
                    served.last_work_ns = now_ns;
                }
                worked
            }
            Err(fault) => {
                let report = Report::RingFault(served.queue.key(), fault.to_string());
                self.tell(report);
                false
            }
        }
    }

    /// Runs the turns of all polled queues except those that had more than their share. If none of the others
    /// has work, the least served of these has a turn after all.
    fn take_in_turns(&mut self, now_ns: u64, watch: &mut Stopwatch<impl Fn() -> u64>) -> bool {
        let count = self.polled.len();
        self.turns.begin(count);
        let polled = self.polled.iter().map(|index| &self.queues[*index]);
        let limit = self.turns.limit(now_ns, polled.map(|it| (it.used, it.last_work_ns)));
        let mut worked = false;
        let mut put_off: Option<(TimeUsed, usize)> = None;
        for nth in self.turns.order(count) {
            let index = self.polled[nth];
            let served = &mut self.queues[index];
            if served.used > limit {
                served.queue.put_off();
                served.part = 0;
                if put_off.is_none_or(|(used, _)| served.used < used)
                    && served.queue.has_work(self.resources.give_backs)
                {
                    put_off = Some((served.used, index));
                }
            } else if self.take_turn_of_many(index, TURN_EFFORT, now_ns, watch) {
                worked = true;
            }
        }
        match put_off {
            Some((_, index)) if !worked => {
                self.take_turn_of_many(index, TURN_EFFORT_AHEAD, now_ns, watch)
            }
            _ => worked,
        }
    }

    /// Runs a turn and charges the queue for its time.
    fn take_turn_of_many(
        &mut self,
        index: usize,
        effort: u32,
        now_ns: u64,
        watch: &mut Stopwatch<impl Fn() -> u64>,
    ) -> bool {
        let operation_effort = self.queues[index].operation_cost.effort();
        let worked = self.take_turn(index, Turn { effort, operation_effort }, now_ns);
        if worked {
            let turn_ns = watch.lap_ns();
            self.queues[index].turn_ns = turn_ns;
            self.charge(index, turn_ns);
        }
        worked
    }

    /// Charges a queue for time spent on it.
    fn charge(&mut self, index: usize, time_ns: u64) {
        self.turns.charge(&mut self.queues[index].used, time_ns);
    }

    /// Charges all queues for the time to submit, by the weight of their operations.
    fn charge_started(&mut self, time_ns: u64) {
        self.charge_parts(time_ns, |served, weight, part_ns| {
            served.operation_cost.learn(weight, served.turn_ns + part_ns);
        });
    }

    /// Charges all queues for what kernel threads did for them on this host's cores.
    fn charge_threads(&mut self) {
        for index in &self.polled {
            let served = &mut self.queues[*index];
            let threaded = u64::from(served.queue.take_threaded());
            self.turns.charge(&mut served.used, threaded * THREAD_NS);
        }
    }

    /// Divides time between all queues by their parts and charges them; `note` gets each part and its time.
    fn charge_parts(&mut self, time_ns: u64, note: impl Fn(&mut Served, u64, u64)) {
        let all: u64 = self.polled.iter().map(|index| self.queues[*index].part).sum();
        for index in &self.polled {
            let served = &mut self.queues[*index];
            let part = std::mem::take(&mut served.part);
            let part_ns = time_ns.saturating_mul(part) / all.max(1);
            self.turns.charge(&mut served.used, part_ns);
            note(served, part, part_ns);
        }
    }

    #[inline]
    fn take_completions(&mut self, clock_ns: impl Fn() -> u64) -> bool {
        let mut done = std::mem::take(&mut self.done);
        self.resources.engine.reap(&mut done);
        let worked = !done.is_empty();
        if worked {
            let now_ns = clock_ns();
            self.resources.now_ns = now_ns;
            self.resources.give_backs += 1;
            for Completion { ticket, result } in done.drain(..) {
                self.poll_queue(ticket.queue(), now_ns);
                let served = &mut self.queues[ticket.queue()];
                served.part += PAGE_BYTES as u64 + u64::try_from(result).unwrap_or(0);
                served.queue.complete(&mut self.resources, ticket.slot(), result);
            }
        }
        self.done = done;
        worked
    }

    /// Ends the pass for the polled queues, of which there was at most one when it began.
    #[inline]
    fn finish_alone(&mut self) -> io::Result<()> {
        for index in &self.polled {
            let queue = &mut self.queues[*index].queue;
            if queue.finish_pass(&mut self.resources) {
                self.events.notify(queue.port())?;
            }
        }
        Ok(())
    }

    /// Ends the pass for the polled queues, in the order of their turns.
    fn finish_in_turns(&mut self, watch: &mut Stopwatch<impl Fn() -> u64>) -> io::Result<()> {
        for nth in self.turns.order(self.polled.len()) {
            let index = self.polled[nth];
            let queue = &mut self.queues[index].queue;
            let copies = queue.has_copies();
            if queue.finish_pass(&mut self.resources) {
                self.events.notify(queue.port())?;
            } else if !copies {
                continue;
            }
            self.charge(index, watch.lap_ns());
        }
        Ok(())
    }

    /// Arms polled queues: all of them if the worker no longer spins, otherwise those that have been idle for
    /// longer than it ever spins.
    fn arm_idle(&mut self, pause: Pause) -> io::Result<()> {
        let (last_work_ns, give_backs) = (self.last_work_ns, self.resources.give_backs);
        let (queues, unmask, waiting) = (&mut self.queues, &mut self.unmask, &mut self.waiting);
        self.polled.retain(|index| {
            let served = &mut queues[*index];
            // Both are the start of a pass, so that the length of the queue's last pass doesn't count.
            let quiet_ns = pause.lasted_ns + last_work_ns.saturating_sub(served.last_work_ns);
            if (pause.spins && quiet_ns < pause.limit_ns) || served.queue.arm(give_backs) {
                return true;
            }
            served.polled = false;
            if served.queue.waits() && !std::mem::replace(&mut served.waits, true) {
                waiting.push(*index);
            }
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

impl Served {
    fn new(queue: Queue, now_ns: u64) -> Served {
        Served {
            queue,
            polled: false,
            waits: false,
            unmasked: true,
            last_work_ns: now_ns,
            used: TimeUsed::default(),
            turn_ns: 0,
            operation_cost: OperationCost::default(),
            part: 0,
            replacements: Vec::new(),
            leaving: false,
        }
    }
}

/// Measures how long each of several consecutive steps takes.
struct Stopwatch<C> {
    clock_ns: C,
    since_ns: u64,
}

impl<C: Fn() -> u64> Stopwatch<C> {
    /// The time since the last call.
    fn lap_ns(&mut self) -> u64 {
        let since_ns = std::mem::replace(&mut self.since_ns, (self.clock_ns)());
        self.since_ns.saturating_sub(since_ns)
    }
}

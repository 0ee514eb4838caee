//! A whole host in one thread: guests on the stand-in, control and workers on scripted storage. Who goes
//! on next, and how much time has passed since the last step, is chosen by a seed, so a run repeats.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use xenstore_rs::Xs;

use super::disk::{Script, ScriptedDisk};
use super::random::Random;
use super::{Domain, LocalStandIn, SimXen};
use crate::control::{Config, Control, ControlError, Progress};
use crate::msg::{Command, CommandSender, WorkerId, command_channel, report_channel};
use crate::units::DomId;
use crate::worker::{self, Setup, Worker};
use crate::xen::store::StoreClient;
use crate::xen::{Platform, PlatformError, Store};

/// The longest time that passes between two steps.
const STEP_NS_MAX: u64 = 50_000;

/// Steps after which something that has not happened never will.
const STEPS_MAX: usize = 200_000;

/// Control, workers, helpers and time.
#[derive(Debug)]
pub struct World {
    stand_in: LocalStandIn,
    control: Control<SimXen>,
    workers: Vec<Simulated>,
    commands: Vec<CommandSender>,
    /// Sees every change in xenstore.
    watcher: StoreClient,
    start: Instant,
    now_ns: u64,
    random: Random,
    trace: Vec<String>,
}

/// A worker and its storage.
#[derive(Debug)]
struct Simulated {
    worker: Worker<SimXen, ScriptedDisk>,
    script: Rc<RefCell<Script>>,
}

/// Why there is no world, or it does not go on.
#[derive(Debug, thiserror::Error)]
pub enum WorldError {
    /// The stand-in.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// Control can't begin.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The host fails.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What was waited for can't happen any more.
    #[error("it has not happened in {STEPS_MAX} steps: {0}")]
    Hangs(String),
}

/// Who goes on.
#[derive(Clone, Copy, Debug)]
enum Actor {
    Control,
    Helper,
    Worker(usize),
}

impl World {
    /// A host with `workers` workers, no guest yet, and `disk_bytes` zeroes behind whichever image. What
    /// `config` says of the admin socket, signals and helper threads does not count: there are none.
    pub fn new(
        seed: u64,
        workers: usize,
        disk_bytes: usize,
        config: &Config,
    ) -> Result<World, WorldError> {
        let mut random = Random::new(seed);
        let stand_in = LocalStandIn::new()?;
        let platform = stand_in.platform();
        let (reporter, reports) = report_channel()?;
        let (mut commands, mut simulated) = (Vec::new(), Vec::new());
        let contents = Rc::new(RefCell::new(vec![0; disk_bytes]));
        for number in 0..workers {
            let id = WorkerId(number);
            let (sender, receiver) = command_channel(id)?;
            let (disk, script) = ScriptedDisk::new(Script {
                contents: Some(Rc::clone(&contents)),
                random: Some(Random::new(random.next())),
                trace: Some(Vec::new()),
                ..Script::default()
            })?;
            let setup = Setup::stepped(id, workers, platform.clone(), receiver, reporter.clone());
            simulated.push(Simulated { worker: Worker::new(setup, disk)?, script });
            commands.push(sender);
        }
        let config =
            Config { admin_path: None, signals: false, helper_threads: 0, ..config.clone() };
        let instance = format!("seed {seed}");
        let control = Control::new(platform.clone(), &config, commands.clone(), reports, instance)?;
        let watcher = platform.open_store()?;
        watcher.watch("/", "trace")?;
        let start = Instant::now();
        let (now_ns, trace) = Default::default();
        Ok(World {
            stand_in,
            control,
            workers: simulated,
            commands,
            watcher,
            start,
            now_ns,
            random,
            trace,
        })
    }

    /// The hypervisor and xenstore.
    pub fn stand_in(&self) -> &LocalStandIn {
        &self.stand_in
    }

    /// Makes a guest with `pages` pages of memory.
    pub fn create_domain(&self, domid: DomId, pages: u32) -> io::Result<Domain> {
        self.stand_in.create_domain(domid, pages)
    }

    /// The time.
    pub fn now(&self) -> Instant {
        self.start + Duration::from_nanos(self.now_ns)
    }

    /// Everything that has happened so far, a line each.
    pub fn trace(&self) -> &[String] {
        &self.trace
    }

    /// Adds a line of the caller's own to the trace.
    pub fn note(&mut self, line: impl Into<String>) {
        self.trace.push(line.into());
    }

    /// One of them goes on, whether it has something to do or not.
    pub fn step(&mut self) -> io::Result<()> {
        self.now_ns += self.random.between(1, STEP_NS_MAX);
        let actor = match self.random.between(0, 1 + self.workers.len()) {
            0 => Actor::Control,
            1 => Actor::Helper,
            number => Actor::Worker(number - 2),
        };
        let worked = match actor {
            Actor::Control => self.control.poll_once(self.now()) != Progress::Idle,
            Actor::Helper => self.control.help_once(),
            Actor::Worker(number) => self.step_worker(number)?,
        };
        if worked {
            self.trace.push(format!("{} ns: {actor:?}", self.now_ns));
        }
        self.trace_storage();
        self.trace_store()
    }

    /// Steps until `happened`, which is asked after each; `what` names it should it never happen.
    pub fn run_until(
        &mut self,
        what: &str,
        mut happened: impl FnMut(&mut World) -> io::Result<bool>,
    ) -> Result<(), WorldError> {
        for _ in 0..STEPS_MAX {
            if happened(self)? {
                self.trace.push(format!("{} ns: {what}", self.now_ns));
                return Ok(());
            }
            self.step()?;
        }
        Err(WorldError::Hangs(what.to_owned()))
    }

    /// Makes control end, and returns how it did; the workers get the command to stop.
    pub fn end(&mut self) -> Result<Progress, WorldError> {
        self.control.end(self.now());
        let mut ended = Progress::Idle;
        self.run_until("control has ended", |world| {
            ended = world.control.poll_once(world.now());
            Ok(matches!(ended, Progress::Ended(_)))
        })?;
        for sender in &self.commands {
            // One that takes no more commands has ended.
            let _ = sender.send(Command::Stop);
        }
        Ok(ended)
    }

    /// A pass as a worker without spinning does it: after one without work it arms its queues.
    fn step_worker(&mut self, number: usize) -> io::Result<bool> {
        let now_ns = self.now_ns;
        let worker = &mut self.workers[number].worker;
        let worked = worker.poll_once(|| now_ns)? == worker::Progress::Worked;
        if !worked {
            worker.arm()?;
        }
        Ok(worked)
    }

    fn trace_storage(&mut self) {
        for (number, simulated) in self.workers.iter().enumerate() {
            let operations = simulated.script.borrow_mut().trace.replace(Vec::new());
            let lines = operations.into_iter().flatten();
            self.trace.extend(lines.map(|line| format!("  storage of worker {number}: {line}")));
        }
    }

    fn trace_store(&mut self) -> io::Result<()> {
        let mut silences = 0;
        // `next_event` may return `None` once between two events.
        while silences < 2 {
            let Some(event) = self.watcher.next_event()? else {
                silences += 1;
                continue;
            };
            silences = 0;
            let value = self.watcher.read(&event.path);
            let value = value.map_or_else(|error| format!("({})", error.kind()), String::from);
            self.trace.push(format!("  xenstore: {} = {value}", event.path));
        }
        Ok(())
    }
}

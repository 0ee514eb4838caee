//! The thread around a worker: set-up, pinning, the loop of passes and sleeps.

use std::io;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;
use std::time::Duration;

use core_affinity::CoreId;
use crossbeam::channel::bounded;

use super::Worker;
use crate::backing::Image;
use crate::engine::Engine;
use crate::engine::host::HostEngine;
use crate::limits::LINUX_MIN;
use crate::msg::{
    Command, CommandReceiver, CommandSender, Report, ReportSender, WorkerId, command_channel,
};
use crate::park;
use crate::patience::{Policy, SleepCost};
use crate::xen::{Platform, PlatformError};

/// What a worker is made from.
#[derive(Debug)]
pub struct Setup<P> {
    /// Its number.
    pub id: WorkerId,
    /// How many workers share the host's storage.
    pub workers: usize,
    /// The hypervisor.
    pub platform: P,
    /// The core it is pinned to; `None`: wherever the scheduler puts it.
    pub core: Option<CoreId>,
    /// When it spins while it has no work.
    pub policy: Policy,
    /// The cost of sleeping; [`spawn`] measures it if the policy needs it.
    pub sleep_cost: SleepCost,
    /// Commands from control.
    pub commands: CommandReceiver,
    /// Reports to control.
    pub reporter: ReportSender,
}

impl<P> Setup<P> {
    /// For a worker that its owner steps: on any core, and it never spins.
    pub fn stepped(
        id: WorkerId,
        workers: usize,
        platform: P,
        commands: CommandReceiver,
        reporter: ReportSender,
    ) -> Setup<P> {
        let (policy, sleep_cost) = (Policy::UpTo(Duration::ZERO), SleepCost::default());
        Setup { id, workers, platform, core: None, policy, sleep_cost, commands, reporter }
    }
}

/// A running worker.
#[derive(Debug)]
pub struct WorkerThread {
    thread: JoinHandle<()>,
}

impl WorkerThread {
    /// Waits until it has ended, as it does after `Command::Stop`.
    pub fn join(self) {
        // A panic has already been reported as Report::Stopped.
        let _ = self.thread.join();
    }
}

/// Why a worker can't start.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The hypervisor's devices can't be opened.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// io_uring can't be set up.
    #[error(
        "cannot set up io_uring: allow it (sysctl kernel.io_uring_disabled=0), raise the memlock \
         limit (ulimit -l), and use Linux {LINUX_MIN} or later"
    )]
    Engine(#[source] io::Error),
    /// The core can't be used.
    #[error("cannot pin a worker to core {0}: choose from the cores that this process may use")]
    Pin(usize),
    /// The thread itself can't be started.
    #[error("cannot start a worker thread")]
    Thread(#[source] io::Error),
}

/// Starts one worker for each entry of `cores`, pinned to that core if it names one; returns the senders of
/// their commands, in order. If one can't be started, the others are stopped.
pub fn spawn_all<P: Platform>(
    platform: &P,
    cores: &[Option<usize>],
    policy: Policy,
    reporter: &ReportSender,
) -> Result<(Vec<CommandSender>, Vec<WorkerThread>), SpawnError> {
    let mut senders: Vec<CommandSender> = Vec::new();
    let mut threads = Vec::new();
    for (index, core) in cores.iter().enumerate() {
        let id = WorkerId(index);
        let (sender, commands) = command_channel(id).map_err(SpawnError::Thread)?;
        let setup = Setup {
            id,
            workers: cores.len(),
            platform: platform.clone(),
            core: core.map(|id| CoreId { id }),
            policy,
            sleep_cost: SleepCost::default(),
            commands,
            reporter: reporter.clone(),
        };
        match spawn(setup) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                for sender in senders {
                    // A worker that takes no more commands has ended already.
                    let _ = sender.send(Command::Stop);
                }
                return Err(error);
            }
        }
        senders.push(sender);
    }
    Ok((senders, threads))
}

/// Starts a worker's thread; returns once it is set up or has failed.
pub fn spawn<P: Platform>(setup: Setup<P>) -> Result<WorkerThread, SpawnError> {
    let (ready, is_ready) = bounded(1);
    let thread = std::thread::Builder::new()
        .name(format!("worker-{}", setup.id.0))
        .spawn(move || {
            let mut farewell = Farewell::new(setup.id, setup.reporter.clone());
            match prepare(setup) {
                Ok(worker) => {
                    // This can't fail: the caller always waits for it.
                    let _ = ready.send(Ok(()));
                    farewell.reason = serve(worker);
                }
                Err(error) => {
                    farewell.reason = Some(error.to_string());
                    let _ = ready.send(Err(error));
                }
            }
        })
        .map_err(SpawnError::Thread)?;
    match is_ready.recv() {
        Ok(Ok(())) => Ok(WorkerThread { thread }),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(SpawnError::Thread(io::Error::other("it panicked while starting"))),
    }
}

fn prepare<P: Platform>(setup: Setup<P>) -> Result<Worker<P, HostEngine>, SpawnError> {
    if let Some(core) = setup.core
        && !core_affinity::set_for_current(core)
    {
        return Err(SpawnError::Pin(core.id));
    }
    let engine = HostEngine::new().map_err(SpawnError::Engine)?;
    let sleep_cost = match setup.policy {
        Policy::Auto => park::measure_sleep().unwrap_or_default(),
        Policy::UpTo(_) => setup.sleep_cost,
    };
    Ok(Worker::new(Setup { sleep_cost, ..setup }, engine)?)
}

/// Runs a worker to its end; returns why it ended, unless it was told to.
///
/// After an error or a panic, the kernel may still write to the worker's memory for operations in flight. So
/// the worker is never dropped then, and its memory and mappings stay until the process ends.
pub fn serve<P: Platform, E: Engine<Target = Image>>(worker: Worker<P, E>) -> Option<String> {
    let mut worker = ManuallyDrop::new(worker);
    // After a panic nothing of the worker is used any more.
    let ended = catch_unwind(AssertUnwindSafe(|| worker.run()));
    match ended {
        Ok(Ok(())) if worker.is_at_rest() => {
            drop(ManuallyDrop::into_inner(worker));
            None
        }
        Ok(Ok(())) => Some("it ended while storage operations were in flight".to_owned()),
        Ok(Err(error)) => Some(error.to_string()),
        Err(_) => Some(PANICKED.to_owned()),
    }
}

const PANICKED: &str = "it panicked; the log says where";

/// Reports to control that the thread ends, whatever the reason.
struct Farewell {
    id: WorkerId,
    reporter: ReportSender,
    reason: Option<String>,
}

impl Farewell {
    fn new(id: WorkerId, reporter: ReportSender) -> Farewell {
        Farewell { id, reporter, reason: Some(PANICKED.to_owned()) }
    }
}

impl Drop for Farewell {
    fn drop(&mut self) {
        let reason = self.reason.take().unwrap_or_default();
        self.reporter.send(Report::Stopped(self.id, reason));
    }
}

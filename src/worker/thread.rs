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
use crate::msg::{
    Command, CommandReceiver, CommandSender, Report, ReportSender, WorkerId, command_channel,
};
use crate::xen::{Platform, PlatformError};

/// What a worker is made from.
#[derive(Debug)]
pub struct Setup<P> {
    /// Its number.
    pub id: WorkerId,
    /// How many workers serve disks of the same storage.
    pub workers: usize,
    /// The hypervisor.
    pub platform: P,
    /// The core it is pinned to; `None`: wherever the scheduler puts it.
    pub core: Option<CoreId>,
    /// The longest it polls without work before it sleeps.
    pub poll: Duration,
    /// What control wants.
    pub commands: CommandReceiver,
    /// What it tells control.
    pub reporter: ReportSender,
}

/// A running worker.
#[derive(Debug)]
pub struct WorkerThread {
    thread: JoinHandle<()>,
}

impl WorkerThread {
    /// Waits until it has ended, which it does after `Command::Stop`.
    pub fn join(self) {
        // A panic was reported as Report::Stopped already.
        let _ = self.thread.join();
    }
}

/// Why a worker can't start.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The hypervisor's devices.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// io_uring.
    #[error(
        "cannot set up io_uring: allow it (sysctl kernel.io_uring_disabled=0), raise the memlock \
         limit (ulimit -l), and use Linux 5.6 or later"
    )]
    Engine(#[source] io::Error),
    /// The core.
    #[error("cannot pin a worker to core {0}: choose from the cores that this process may use")]
    Pin(usize),
    /// The thread itself.
    #[error("cannot start a worker thread")]
    Thread(#[source] io::Error),
}

/// Starts one worker for each entry of `cores`, pinned to it where one is named; returns the ways
/// to command them, in order. Where one can't be started the others end.
pub fn spawn_all<P: Platform>(
    platform: &P,
    cores: &[Option<usize>],
    poll: Duration,
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
            poll,
            commands,
            reporter: reporter.clone(),
        };
        match spawn(setup) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                for sender in senders {
                    // One that takes no more commands has ended.
                    let _ = sender.send(Command::Stop);
                }
                return Err(error);
            }
        }
        senders.push(sender);
    }
    Ok((senders, threads))
}

/// Starts a worker's thread; returns once it is set up, or why it can't be.
pub fn spawn<P: Platform>(setup: Setup<P>) -> Result<WorkerThread, SpawnError> {
    let (ready, is_ready) = bounded(1);
    let thread = std::thread::Builder::new()
        .name(format!("worker-{}", setup.id.0))
        .spawn(move || {
            let mut farewell = Farewell::new(setup.id, setup.reporter.clone());
            match prepare(setup) {
                Ok(worker) => {
                    // Only a caller that waits can be told; it always waits.
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
    Ok(Worker::new(setup, engine)?)
}

/// Has a worker run to its end; why it ended, unless it was told to.
///
/// If it ended in disorder, by an error or a panic, the kernel may still write to its memory for what
/// is in flight. Then all of it stays, mappings and all, until the process ends.
pub fn serve<P: Platform, E: Engine<Target = Image>>(worker: Worker<P, E>) -> Option<String> {
    let mut worker = ManuallyDrop::new(worker);
    // Nothing of it is used any more after a panic.
    let ended = catch_unwind(AssertUnwindSafe(|| worker.run()));
    match ended {
        Ok(Ok(())) if worker.is_at_rest() => {
            drop(ManuallyDrop::into_inner(worker));
            None
        }
        Ok(Ok(())) => Some("it has ended before its storage has".to_owned()),
        Ok(Err(error)) => Some(error.to_string()),
        Err(_) => Some(PANICKED.to_owned()),
    }
}

const PANICKED: &str = "it panicked; the log tells where";

/// Tells control that the thread ends, however it ends.
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

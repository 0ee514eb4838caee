//! A scenario's boot, steps and logs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use polldisk::output;

use crate::agent::Agent;
use crate::backend::{Backend, Daemon, Storage};
use crate::image::Kernel;
use crate::machine::{Binary, Equipment, Machine};
use crate::report::Step;
use crate::xen::{Boot, Guest, Size};

/// What dom0 is asked after a failure: the log's name, and the command that fills it.
const EVIDENCE: [(&str, &str); 6] = [
    ("xenstore", "xenstore-ls -fp"),
    ("dom0-dmesg", "dmesg"),
    ("hypervisor", "xl debug-keys g; xl dmesg"),
    ("domains", "xl list -v; ps -eLf"),
    ("daemon", "cat /run/polldisk.log"),
    ("toolstack", "tail -n +1 /var/log/xen/*"),
];

/// How a scenario is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Dom0's and the guests' Linux.
    pub kernel: Kernel,
    /// Who serves the disks.
    pub backend: Backend,
    /// The programs that the scenarios need in dom0. polldisk is needed only on the backend of that name.
    pub binaries: Vec<Binary>,
    /// The folder for the logs of all runs.
    pub logs: PathBuf,
    /// Whether to keep the logs of scenarios that pass.
    pub keep_logs: bool,
}

/// A booted dom0 and what happened in it.
#[derive(Debug)]
pub struct Lab {
    /// Who serves the disks.
    pub backend: Backend,
    /// Runs commands in dom0.
    pub dom0: Agent,
    /// The scenario's name. Every printed line starts with it, since scenarios may run side by side.
    name: &'static str,
    machine: Machine,
    steps: Vec<Step>,
    figures: BTreeMap<String, f64>,
}

impl Lab {
    /// Does one step of the scenario and notes how long it took.
    pub fn step<T>(&mut self, name: &str, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = work(self).with_context(|| name.to_owned())?;
        self.note_step(name, start);
        Ok(result)
    }

    /// Adds a figure to the current step.
    pub fn figure(&mut self, name: &str, value: impl Into<f64>) {
        self.figures.insert(name.into(), value.into());
    }

    /// Makes the backend ready for guests.
    pub fn start_backend(&mut self) -> Result<Option<Daemon>> {
        self.backend.start(&mut self.dom0, None)
    }

    /// [`Lab::start_backend`], with this number of queues offered for each disk.
    pub fn start_backend_with_queues(&mut self, queues: u32) -> Result<Option<Daemon>> {
        self.backend.start(&mut self.dom0, Some(queues))
    }

    /// A disk of the lab's backend in xl's syntax.
    pub fn disk(&mut self, vdev: &str, storage: Storage) -> Result<String> {
        self.backend.disk(&mut self.dom0, vdev, storage)
    }

    /// [`Lab::disk`] for a disk that the guest only reads.
    pub fn read_only_disk(&mut self, vdev: &str, storage: Storage) -> Result<String> {
        self.backend.read_only_disk(&mut self.dom0, vdev, storage)
    }

    /// Creates a guest and waits for its agent.
    pub fn create_guest(&mut self, name: &str, disks: &[String]) -> Result<Guest> {
        self.create_guest_of(Size::default(), name, disks)
    }

    /// [`Lab::create_guest`] with processors and memory of the caller's choice.
    pub fn create_guest_of(&mut self, size: Size, name: &str, disks: &[String]) -> Result<Guest> {
        Guest::create(&mut self.machine, &mut self.dom0, name, Boot::Kernel, size, disks)
    }

    /// [`Lab::create_guest`] with a 32-bit boot loader, which must boot a kernel from one of the disks.
    pub fn create_guest_with_grub(&mut self, name: &str, disks: &[String]) -> Result<Guest> {
        let size = Size::default();
        Guest::create(&mut self.machine, &mut self.dom0, name, Boot::Grub32, size, disks)
    }

    fn note_step(&mut self, name: &str, start: Instant) {
        let step = Step {
            name: name.into(),
            seconds: start.elapsed().as_secs_f64(),
            figures: std::mem::take(&mut self.figures),
        };
        tell(format_args!("{}: {}", self.name, step.line()));
        self.steps.push(step);
    }

    /// Saves what dom0 knows. If dom0 no longer answers, only its console is left.
    fn save_evidence(&mut self, logs: &Path) {
        for (name, command) in EVIDENCE {
            let text = match self.dom0.run(command, Duration::from_secs(20)) {
                Ok(output) => output.stdout + &output.stderr,
                Err(error) => format!("{error:#}\n"),
            };
            drop(fs::write(logs.join(name), text));
        }
    }
}

/// Boots a machine and does the work on it. The logs stay in a folder of `options.logs` if the work fails
/// or the options ask to keep them. Returns the steps and the result of the work.
pub(crate) fn on_machine<T>(
    name: &'static str,
    equipment: Equipment,
    options: &Options,
    work: impl FnOnce(&mut Lab) -> Result<T>,
) -> Result<(Vec<Step>, T)> {
    let logs = options.logs.join(name);
    drop(fs::remove_dir_all(&logs));
    fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
    let logs = fs::canonicalize(&logs)?;
    let done = boot_and_work(name, equipment, options, &logs, work)
        .with_context(|| format!("{name}: failed, logs in {}", logs.display()))?;
    if !options.keep_logs {
        fs::remove_dir_all(&logs)?;
    }
    Ok(done)
}

fn boot_and_work<T>(
    name: &'static str,
    equipment: Equipment,
    options: &Options,
    logs: &Path,
    work: impl FnOnce(&mut Lab) -> Result<T>,
) -> Result<(Vec<Step>, T)> {
    let start = Instant::now();
    let (machine, dom0) = Machine::boot(equipment, logs)?;
    let mut lab = Lab {
        backend: options.backend,
        dom0,
        name,
        machine,
        steps: Vec::new(),
        figures: BTreeMap::new(),
    };
    lab.note_step("Xen and dom0 boot", start);
    let result = work(&mut lab);
    if result.is_err() || options.keep_logs {
        lab.save_evidence(logs);
    }
    result.map(|value| (lab.steps, value))
}

/// Prints progress. Failing to print it does not end a run.
pub(crate) fn tell(line: impl std::fmt::Display) {
    let _ = output::print(line);
}

//! One emulated machine from power-on to power-off, and the files that a run brings into it.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use polldisk::output;
use tempfile::TempDir;

use crate::agent::Agent;
use crate::image::{self, Kernel};
use crate::qemu::{self, Console, GUEST_PORTS, Idle};

/// Files that dom0 finds in `/lab`, besides the programs under test.
const PAYLOAD: [(&str, &str); 4] = [
    ("agent", include_str!("../agent/agent")),
    ("block-polldisk", include_str!("../hotplug/block-polldisk")),
    ("inittab", include_str!("../dom0/inittab")),
    ("setup", include_str!("../dom0/setup")),
];

/// Dom0's device with the root with programs for guests, on a machine that has it.
pub const PROGRAMS_DEVICE: &str = "/dev/lab/programs";

/// A program for dom0: the name by which dom0 finds it, and the host's file.
pub type Binary = (&'static str, PathBuf);

/// The parts in which machines differ.
#[derive(Clone, Copy, Debug)]
pub struct Equipment<'a> {
    /// Dom0's and the guests' Linux.
    pub kernel: Kernel,
    /// Programs for dom0.
    pub binaries: &'a [Binary],
    /// Whether it has [`PROGRAMS_DEVICE`], which may have to be built first.
    pub programs: bool,
    /// How its time passes while it has nothing to do.
    pub idle: Idle,
}

/// A running machine. Dropping it switches it off; nothing that it wrote stays.
#[derive(Debug)]
pub struct Machine {
    emulator: Child,
    sockets: TempDir,
    logs: PathBuf,
    guest_ports_used: usize,
}

impl Machine {
    /// Starts the machine and waits for dom0's agent. `logs` receives the consoles as they print.
    pub fn boot(equipment: Equipment, logs: &Path) -> Result<(Self, Agent)> {
        let Equipment { kernel, binaries, programs, idle } = equipment;
        let image = image::ensure_built(kernel)?;
        let programs = programs.then(|| image::ensure_programs_built(&image)).transpose()?;
        let run = tempfile::Builder::new().prefix("lab-").tempdir()?;
        let payload = write_payload(run.path(), binaries)?;
        let console = logs.join("console");
        let mut arguments = qemu::arguments(&payload, run.path(), Console::File(&console), idle);
        arguments.extend(programs.iter().flat_map(|image| qemu::programs_disk(image)));
        let errors = File::create(logs.join("emulator"))?;
        let emulator = emulator(&image, &arguments)
            .stdin(Stdio::null())
            .stdout(errors.try_clone()?)
            .stderr(errors)
            .spawn()
            .with_context(|| format!("cannot run {}", qemu::PROGRAM))?;
        let mut machine =
            Self { emulator, sockets: run, logs: logs.to_owned(), guest_ports_used: 0 };
        let dom0 = machine.wait_for_dom0().with_context(|| {
            format!(
                "dom0 did not boot\n{}\n{}",
                image::tail(&logs.join("emulator")),
                image::tail(&console)
            )
        })?;
        Ok((machine, dom0))
    }

    fn wait_for_dom0(&mut self) -> Result<Agent> {
        let socket = self.sockets.path().join("dom0");
        let mut dom0 = Agent::connect("dom0", &socket, &self.logs.join("dom0-agent"))?;
        dom0.wait_ready()?;
        Ok(dom0)
    }

    /// Gives a new guest a port for its console that no guest has had: dom0's name of the port, and the
    /// agent at its other end.
    pub fn guest_port(&mut self, guest: &str) -> Result<(String, Agent)> {
        let slot = self.guest_ports_used;
        ensure!(slot < GUEST_PORTS, "one boot has consoles for at most {GUEST_PORTS} guests");
        self.guest_ports_used += 1;
        let port = qemu::guest_port(slot);
        let log = self.logs.join(format!("{guest}-console-{slot}"));
        let agent = Agent::connect(guest, &self.sockets.path().join(&port), &log)?;
        Ok((format!("/dev/lab/{port}"), agent))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only if the emulator has already ended.
        drop(self.emulator.kill());
        drop(self.emulator.wait());
    }
}

/// Boots the machine with its console on the caller's terminal and returns when it is switched off.
pub fn shell(kernel: Kernel, binaries: &[Binary]) -> Result<()> {
    let image = image::ensure_built(kernel)?;
    let run = tempfile::Builder::new().prefix("lab-").tempdir()?;
    let payload = write_payload(run.path(), binaries)?;
    let arguments = qemu::arguments(&payload, run.path(), Console::Terminal, Idle::Passes);
    output::print("lab: dom0's shell follows; `poweroff` or Ctrl-A X ends it")?;
    let status = emulator(&image, &arguments)
        .status()
        .with_context(|| format!("cannot run {}", qemu::PROGRAM))?;
    ensure!(status.success(), "the emulator ended with {status}");
    Ok(())
}

/// The emulator's command. The images' folder is its working directory, since the list of multiboot
/// modules has commas and spaces as separators, which the folder's path may contain. The emulator ends
/// when the lab ends, even if the lab is killed.
fn emulator(image: &Path, arguments: &[String]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", qemu::PROGRAM]);
    command.current_dir(image).args(arguments);
    command
}

/// Makes the file system that dom0 mounts at `/lab`.
fn write_payload(run: &Path, binaries: &[Binary]) -> Result<PathBuf> {
    let folder = run.join("payload");
    fs::create_dir(&folder)?;
    for (name, text) in PAYLOAD {
        fs::write(folder.join(name), text)?;
        fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o755))?;
    }
    let mut mebibytes = 16;
    fs::create_dir(folder.join("bin"))?;
    for (name, binary) in binaries {
        let size = fs::copy(binary, folder.join("bin").join(name))
            .with_context(|| format!("cannot read {}", binary.display()))?;
        mebibytes += 2 * (size >> 20);
    }
    let payload = run.join("payload.img");
    let output = Command::new("mkfs.ext4")
        .env("PATH", image::search_path())
        .args(["-q", "-d"])
        .args([&folder, &payload])
        .arg(format!("{mebibytes}M"))
        .output()
        .context("cannot run mkfs.ext4")?;
    ensure!(output.status.success(), "mkfs.ext4: {}", String::from_utf8_lossy(&output.stderr));
    fs::remove_dir_all(&folder)?;
    Ok(payload)
}

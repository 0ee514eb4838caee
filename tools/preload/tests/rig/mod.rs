//! Programs on a stand-in that this process serves.
#![allow(dead_code)]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use polldisk::sim::StandIn;
use polldisk::units::DomId;

/// Longer than anything but a hang takes.
pub const HANG: Duration = Duration::from_secs(60);

pub fn domid(raw: u32) -> DomId {
    DomId::try_from(raw).unwrap()
}

/// The folder of this build's programs, with polldisk and the library in it: cargo does not tell tests where
/// programs of other packages are, nor their own package's shared library.
fn programs() -> &'static Path {
    static PROGRAMS: OnceLock<PathBuf> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--package", "polldisk", "--package", "preload"])
            .args(["--profile", profile])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .stdin(Stdio::null())
            .status();
        assert!(status.unwrap().success());
        Path::new(env!("CARGO_BIN_EXE_stand-in")).parent().unwrap().to_owned()
    })
}

pub fn polldisk() -> PathBuf {
    programs().join("polldisk")
}

pub fn library() -> PathBuf {
    programs().join("libpolldisk_preload.so")
}

/// The command for a program in a stand-in's dom0.
pub fn on(stand_in: &StandIn, system_calls: bool, program: &OsStr) -> Command {
    let mut command = Command::new(programs().join("stand-in"));
    command.arg("run").arg(stand_in.folder());
    if system_calls {
        command.arg("--system-calls");
    }
    command.arg("--").arg(program);
    command
}

/// A process. Dropping this ends it.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends a signal, named as for kill: `-TERM`.
pub fn signal(process: &Child, signal: &str) {
    let sent = Command::new("kill").args([signal, &process.id().to_string()]).status();
    assert!(sent.unwrap().success());
}

/// Waits for a process to end; returns its status.
pub fn ended(process: &mut Child) -> ExitStatus {
    let mut status = None;
    until("the process has ended", || {
        status = process.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

/// Waits until a condition holds.
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < HANG, "still waiting until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

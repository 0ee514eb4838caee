//! What tests need of the host's kernel and tools: loop devices, filesystems, QEMU.
//!
//! A test that lacks one of them says so and passes; in CI, which sets `POLLDISK_REQUIRE_XEN_TOOLS=1`,
//! a missing tool is a failure.
#![allow(dead_code)]

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use polldisk::backing::{Access, Backing, Spec};

/// Runs a tool and returns its output; `None`, with a message, if it is missing or not permitted.
pub fn run(command: &mut Command) -> Option<String> {
    let outcome = command.output();
    judge(command, outcome)
}

fn judge(command: &Command, outcome: io::Result<Output>) -> Option<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    match outcome {
        Err(error) => {
            assert!(!is_required(), "{program}: {error}");
            eprintln!("skipped: {program} is missing ({error})");
            None
        }
        Ok(output) if output.status.success() => {
            Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        }
        Ok(output) => {
            let reason = String::from_utf8_lossy(&output.stderr).into_owned();
            let able = File::options().write(true).open("/dev/loop-control").is_ok();
            assert!(!able, "{command:?} failed: {reason}");
            eprintln!("skipped: this user may not use {program} ({reason})");
            None
        }
    }
}

/// Whether a program is installed; if not, says so, or fails if it is required.
pub fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    assert!(found || !is_required(), "{program} is missing");
    if !found {
        eprintln!("skipped: {program} is missing");
    }
    found
}

/// Whether all tools are required, as in CI.
pub fn is_required() -> bool {
    std::env::var("POLLDISK_REQUIRE_XEN_TOOLS").is_ok_and(|value| value == "1")
}

/// A folder for a test's files, removed when dropped.
pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A file of zeroes.
pub fn file(path: &Path, bytes: u64) {
    File::create(path).unwrap().set_len(bytes).unwrap();
}

/// Opens a target as the daemon does; an error is the reason for a refusal.
pub fn open(target: &str, access: &Access) -> Result<Backing, String> {
    let spec = target.parse::<Spec>().map_err(|error| error.to_string())?;
    spec.open(access).map_err(|error| error.to_string())
}

/// Asserts a refusal whose reason contains all of `parts`, and returns the reason.
pub fn is_refused(opened: Result<Backing, String>, parts: &[&str]) -> String {
    let reason = opened.map(drop).unwrap_err();
    for part in parts {
        assert!(reason.contains(part), "\"{part}\" is missing: {reason}");
    }
    reason
}

/// losetup's options for a disk with 4096-byte blocks.
pub const BLOCKS_4KN: [&str; 2] = ["--sector-size", "4096"];

/// A loop device, detached when dropped.
pub struct LoopDevice {
    pub path: PathBuf,
}

impl LoopDevice {
    /// Sets one up over a file or device, with extra options for losetup.
    pub fn over(file: &Path, options: &[&str]) -> Option<LoopDevice> {
        let path = run(Command::new("losetup").args(options).args(["-f", "--show"]).arg(file))?;
        Some(LoopDevice { path: path.into() })
    }

    /// Sets up a disk with 4096-byte blocks over a new file of zeroes.
    pub fn new_4kn(path: &Path, bytes: u64) -> Option<LoopDevice> {
        file(path, bytes);
        LoopDevice::over(path, &BLOCKS_4KN)
    }

    /// The target that names it to the daemon, with options.
    pub fn target(&self, options: &str) -> String {
        format!("raw{options}:{}", self.path.display())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let name = self.path.file_name().unwrap_or_default();
        let below = Path::new("/sys/block").join(name).join("loop/backing_file");
        let below = || std::fs::read_to_string(&below).ok();
        let before = below();
        let _ = Command::new("losetup").arg("-d").arg(&self.path).status();
        // While another test looks what it is over, the kernel keeps it until that test has closed it.
        for _ in 0..100 {
            if before.is_none() || below() != before {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A mount, undone when dropped.
pub struct Mounted {
    pub folder: PathBuf,
}

impl Mounted {
    /// Mounts `what` at `folder`, created if missing, with extra options for mount.
    pub fn at(folder: &Path, what: &Path, options: &[&str]) -> Option<Mounted> {
        if !folder.exists() {
            std::fs::create_dir(folder).unwrap();
        }
        let mut mount = Command::new("mount");
        mount.args(options).arg(what).arg(folder);
        let is_busy = |outcome: &io::Result<Output>| {
            let said = outcome.as_ref().map(|output| String::from_utf8_lossy(&output.stderr));
            said.is_ok_and(|said| said.contains("busy"))
        };
        let mut outcome = mount.output();
        // A program that another test starts holds our open files between fork and exec.
        for _ in 0..100 {
            if !is_busy(&outcome) {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
            outcome = mount.output();
        }
        judge(&mount, outcome)?;
        Some(Mounted { folder: folder.to_owned() })
    }

    /// Makes a filesystem of this kind on a device and mounts it.
    pub fn new(kind: &str, device: &Path, folder: &Path) -> Option<Mounted> {
        run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(device))?;
        Mounted::at(folder, device, &[])
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A test that failed may have left it in use.
        let unmounted = Command::new("umount").arg(&self.folder).output();
        if !unmounted.is_ok_and(|output| output.status.success()) {
            let _ = Command::new("umount").arg("-l").arg(&self.folder).status();
        }
    }
}

/// A filesystem on a loop device.
pub struct Filesystem {
    // Dropped in this order: first unmounted, then detached.
    mounted: Mounted,
    disk: LoopDevice,
}

impl Filesystem {
    /// Makes one of this kind and size, with its file and its mount in `folder`.
    pub fn new(kind: &str, folder: &Path, bytes: u64, losetup: &[&str]) -> Option<Filesystem> {
        let path = folder.join(format!("{kind}.img"));
        file(&path, bytes);
        let disk = LoopDevice::over(&path, losetup)?;
        let mounted = Mounted::new(kind, &disk.path, &folder.join(kind))?;
        Some(Filesystem { mounted, disk })
    }

    /// Flushes that its disk has done (the 16th figure of `/sys/block/<disk>/stat`).
    pub fn flushes(&self) -> u64 {
        let name = self.disk.path.file_name().unwrap();
        let path = Path::new("/sys/block").join(name).join("stat");
        let stat = std::fs::read_to_string(path).unwrap();
        stat.split_whitespace().nth(15).unwrap().parse().unwrap()
    }

    /// Sets a limit of its disk's queue (`/sys/block/<disk>/queue`) until the guard is dropped: a loop device
    /// would keep it after it is detached.
    pub fn limit(&self, name: &str, value: u32) -> Limit {
        let disk = self.disk.path.file_name().unwrap();
        let path = Path::new("/sys/block").join(disk).join("queue").join(name);
        let before = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, value.to_string()).unwrap();
        Limit { path, before }
    }

    /// Where it is mounted.
    pub fn folder(&self) -> &Path {
        &self.mounted.folder
    }
}

/// A changed limit of a disk's queue, restored when dropped.
pub struct Limit {
    path: PathBuf,
    before: String,
}

impl Drop for Limit {
    fn drop(&mut self) {
        let _ = std::fs::write(&self.path, &self.before);
    }
}

/// A filesystem frozen, as by a snapshot, until this is dropped: writes to it wait inside the kernel.
pub struct Frozen(PathBuf);

/// Freezes the filesystem that is mounted at `folder`.
pub fn freeze(folder: &Path) -> Frozen {
    let frozen = run(Command::new("fsfreeze").arg("--freeze").arg(folder));
    frozen.expect("a filesystem of the test's own can be frozen");
    Frozen(folder.to_owned())
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&self.0).status();
    }
}

//! Slices: all contenders are started, and run in turn for some milliseconds each while the others are
//! stopped.
//!
//! If the speed of storage changes from one second to the next, turns that lie seconds apart cannot be
//! compared. Neighbouring slices see the same speed, and there are enough of them to average out chance.
//!
//! A stopped contender (SIGSTOP) keeps its requests in flight and finds them answered when it continues,
//! so latencies would mean nothing. Slices count only the bytes that the contender read from storage or
//! wrote to it, which the kernel counts in the same way for every process.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use core_affinity::CoreId;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The start of a slice, which does not count: the previous slice's requests come back, and new ones
/// begin to flow.
const LEAD: Duration = Duration::from_millis(3);

/// Pause between two slices.
const GAP: Duration = Duration::from_millis(1);

/// Requests flow once storage was used in this number of looks in a row. A starting program uses storage,
/// too, but not for that long.
const LOOKS: u32 = 20;

/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// How long it may take until requests flow, and until a program ends.
const PATIENCE: Duration = Duration::from_secs(10);

/// How slices are run.
#[derive(Clone, Copy, Debug)]
pub struct Slices {
    /// How long each slice counts.
    pub length: Duration,
    /// Slices of each contender.
    pub count: usize,
    /// Bytes of a request.
    pub request_bytes: u32,
    /// Whether requests write; otherwise they read.
    pub writes: bool,
    /// Core of the thread that stops and continues the contenders. It must not be a backend's.
    pub core: usize,
}

impl Slices {
    /// Starts each of the command lines, which run until SIGTERM, and returns the IOPS of its slices.
    /// Slices with the same number are compared, so every other row runs backwards: no contender always
    /// follows the same other one.
    pub fn run(self, lines: &[Vec<String>], interrupted: &AtomicBool) -> Result<Vec<Vec<f64>>> {
        let run = || {
            core_affinity::set_for_current(CoreId { id: self.core });
            let mut contenders = Vec::new();
            for line in lines {
                contenders.push(Stopped::start(line, self.writes)?);
            }
            let mut iops = vec![Vec::with_capacity(self.count); lines.len()];
            for row in 0..self.count {
                ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
                for at in 0..lines.len() {
                    let at = if row % 2 == 0 { at } else { lines.len() - 1 - at };
                    iops[at].push(self.slice(&mut contenders[at])?);
                }
            }
            Ok(iops)
        };
        thread::scope(|scope| scope.spawn(run).join().expect("slices do not panic"))
    }

    fn slice(self, contender: &mut Stopped) -> Result<f64> {
        contender.signal(Signal::SIGCONT)?;
        thread::sleep(LEAD);
        let (start, before) = (Instant::now(), contender.bytes()?);
        thread::sleep(self.length);
        let (took, after) = (start.elapsed(), contender.bytes()?);
        contender.signal(Signal::SIGSTOP)?;
        thread::sleep(GAP);
        let requests = (after - before) as f64 / f64::from(self.request_bytes);
        Ok(requests / took.as_secs_f64())
    }
}

/// A contender that runs only in its slices. Dropping this ends the process.
#[derive(Debug)]
struct Stopped {
    process: Child,
    /// What the process prints, for the text of an error.
    output: File,
    /// The kernel's counters of the backend's I/O, once the backend is known.
    account: Option<File>,
    /// The name of the counter that is read.
    field: &'static str,
}

impl Stopped {
    /// Starts the contender, waits until its requests flow, and stops it.
    fn start(line: &[String], writes: bool) -> Result<Stopped> {
        let output = tempfile::tempfile()?;
        // If this process is killed, the kernel kills the contender, which may be stopped for ever otherwise.
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .args(line)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output.try_clone()?)
            .spawn()
            .context("cannot run setpriv")?;
        let field = if writes { "write_bytes: " } else { "read_bytes: " };
        let mut contender = Stopped { process, output, account: None, field };
        contender.wait_for_requests()?;
        contender.signal(Signal::SIGSTOP)?;
        Ok(contender)
    }

    fn wait_for_requests(&mut self) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        let (mut known, mut looks) = (0, 0);
        while looks < LOOKS {
            ensure!(Instant::now() < end, "it did not use storage within {PATIENCE:?}");
            if let Some(status) = self.process.try_wait()? {
                bail!("it ended ({status}): {}", self.said());
            }
            thread::sleep(LOOK);
            // In earlier looks the backend may not have been started yet.
            self.account = File::open(format!("/proc/{}/io", self.backend())).ok();
            let bytes = self.bytes().unwrap_or(0);
            looks = if bytes > known { looks + 1 } else { 0 };
            known = bytes;
        }
        Ok(())
    }

    /// The process that uses storage: the child of a load, or the contender itself if it has no child.
    fn backend(&self) -> u32 {
        let process = self.process.id();
        let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
        let first = children.ok().and_then(|list| list.split_whitespace().next()?.parse().ok());
        first.unwrap_or(process)
    }

    /// Bytes that the backend has read or written so far.
    fn bytes(&mut self) -> Result<u64> {
        let account = self.account.as_mut().context("no backend")?;
        let mut text = String::new();
        account.rewind()?;
        account.read_to_string(&mut text).context("the backend has ended")?;
        let value = text.lines().find_map(|line| line.strip_prefix(self.field));
        Ok(value.context("the kernel does not account for I/O")?.parse()?)
    }

    fn said(&mut self) -> String {
        let mut text = String::new();
        let _ = self.output.rewind();
        let _ = self.output.read_to_string(&mut text);
        text.trim().to_owned()
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.process.id().try_into()?);
        kill(pid, signal).with_context(|| format!("cannot send {signal}"))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.signal(Signal::SIGCONT);
        let _ = self.signal(Signal::SIGTERM);
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if !matches!(self.process.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(LOOK);
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[cfg(test)]
mod test {
    use std::fs::OpenOptions;
    use std::os::unix::fs::{FileExt, OpenOptionsExt};

    use nix::errno::Errno;
    use nix::libc::O_DIRECT;

    use super::*;

    const FILE: &str = "POLLDISK_TEST_FILE";

    #[repr(align(4096))]
    struct Block([u8; 4096]);

    /// A program for the other tests: it writes a block again and again.
    #[test]
    #[ignore = "a program for other tests"]
    fn writer() {
        let Some(path) = std::env::var_os(FILE) else { return };
        let file =
            OpenOptions::new().write(true).create(true).custom_flags(O_DIRECT).open(path).unwrap();
        let block = Block([1; 4096]);
        loop {
            file.write_all_at(&block.0, 0).unwrap();
        }
    }

    /// A folder on a disk: that of the programs which cargo builds.
    fn folder() -> tempfile::TempDir {
        tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap()
    }

    fn writer_line(folder: &tempfile::TempDir, name: &str) -> Vec<String> {
        let own = std::env::current_exe().unwrap().display().to_string();
        let file = format!("{FILE}={}", folder.path().join(name).display());
        ["env", &file, &own, "--ignored", "--exact", "slices::test::writer"]
            .map(str::to_owned)
            .into()
    }

    fn shell(script: &str) -> Vec<String> {
        ["sh", "-c", script].map(str::to_owned).into()
    }

    fn wait_for(mut done: impl FnMut() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < end, "not done within {PATIENCE:?}");
            thread::sleep(LOOK);
        }
    }

    #[test]
    fn a_contender_works_only_in_its_slices_and_ends_with_them() {
        let folder = folder();
        let mut writer = Stopped::start(&writer_line(&folder, "x"), true).unwrap();
        let pid = Pid::from_raw(writer.process.id().try_into().unwrap());
        // The signal may take some time to reach the process.
        let mut before = 0;
        wait_for(|| std::mem::replace(&mut before, writer.bytes().unwrap()) == before);
        let stopped = writer.bytes().unwrap();
        thread::sleep(LOOK * 5);
        assert_eq!(writer.bytes().unwrap(), stopped);
        writer.signal(Signal::SIGCONT).unwrap();
        wait_for(|| writer.bytes().unwrap() > stopped);
        writer.signal(Signal::SIGSTOP).unwrap();
        drop(writer);
        assert_eq!(kill(pid, None), Err(Errno::ESRCH));
    }

    #[test]
    fn the_child_of_a_load_is_the_backend() {
        let folder = folder();
        let mut line = shell("\"$@\" & trap \"kill $!\" TERM; wait; wait");
        line.push("sh".to_owned());
        line.extend(writer_line(&folder, "x"));
        let mut load = Stopped::start(&line, true).unwrap();
        assert_ne!(load.backend(), load.process.id());
        let before = load.bytes().unwrap();
        wait_for(|| load.bytes().unwrap() > before);
    }

    #[test]
    fn every_contender_has_as_many_slices_until_an_interrupt() {
        let folder = folder();
        let lines = [writer_line(&folder, "x"), writer_line(&folder, "y")];
        let (length, count) = (Duration::from_millis(20), 3);
        let slices = Slices { length, count, request_bytes: 4096, writes: true, core: 0 };
        let iops = slices.run(&lines, &AtomicBool::new(false)).unwrap();
        assert_eq!(iops.iter().map(Vec::len).collect::<Vec<_>>(), [count, count]);
        assert!(iops.iter().flatten().any(|iops| *iops > 0.0), "{iops:?}");
        let error = slices.run(&lines[..1], &AtomicBool::new(true)).unwrap_err();
        assert_eq!(error.to_string(), "interrupted");
    }

    #[test]
    fn a_contender_that_ends_at_once_is_an_error_with_its_output() {
        let error = Stopped::start(&shell("echo no such disk >&2; exit 3"), true).unwrap_err();
        assert_eq!(error.to_string(), "it ended (exit status: 3): no such disk");
    }
}

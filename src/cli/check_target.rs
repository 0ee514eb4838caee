//! `polldisk check-target`.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, ValueEnum};
use polldisk::backing::{Access, BackingError, Spec};
use polldisk::config::ADMIN_SOCKET;
use polldisk::control::admin::client::request;
use polldisk::control::admin::protocol::{DiskReport, Reply, Request};
use polldisk::text::{printable, with_causes};
use polldisk::{limits, output};
use serde::{Deserialize, Serialize};

/// Check whether a disk could use a target, and if not, say why
///
/// The target is opened as the daemon opens it, and closed again. It is not changed, and no daemon needs to
/// run. Warnings are printed, too. If a daemon already serves the target to the disk named by --domid and
/// --vdev, the daemon is asked instead.
#[derive(Args, Debug)]
pub struct CheckTarget {
    /// The disk's contents, as in `attach --target`
    #[arg(value_name = "SPEC", value_parser = NonEmptyStringValueParser::new())]
    target: String,
    /// The disk's mode, as toolstacks write it: r or w, with ! if others may write, too
    #[arg(long, value_name = "MODE", default_value = "w")]
    mode: Mode,
    /// The guest of the disk
    #[arg(long, value_name = "N", requires = "vdev")]
    domid: Option<u32>,
    /// The disk's name in the guest
    #[arg(long, value_name = "NAME", requires = "domid")]
    vdev: Option<String>,
    /// The daemon's socket
    #[arg(long, value_name = "PATH", default_value = ADMIN_SOCKET)]
    admin: PathBuf,
    /// Open it in this process, however long that takes, and print the result as JSON
    #[arg(long, hide = true)]
    opens: bool,
}

/// The result of opening a target.
#[derive(Debug, Serialize, Deserialize)]
struct Verdict {
    warnings: Vec<String>,
    /// Why it can't be served, on one line.
    refusal: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mode {
    #[value(name = "r")]
    Read,
    #[value(name = "w")]
    Write,
    #[value(name = "r!")]
    ReadShared,
    #[value(name = "w!")]
    WriteShared,
}

impl CheckTarget {
    /// Opens the target, or asks the daemon. An error is one line, as the daemon writes it.
    pub fn run(self) -> anyhow::Result<()> {
        if self.opens {
            output::print(serde_json::to_string(&self.open())?)?;
            return Ok(());
        }
        match self.served() {
            Some(disk) if disk.failure.is_empty() => Ok(()),
            Some(disk) => bail!("{}", disk.failure),
            None => self.tell(ask_child(&self.target)?),
        }
    }

    fn tell(&self, verdict: Verdict) -> anyhow::Result<()> {
        for warning in verdict.warnings {
            output::say(printable(&format!("polldisk: {}: {warning}", self.target)));
        }
        verdict.refusal.map_or(Ok(()), |refusal| bail!(refusal))
    }

    /// The disk, if the daemon serves it with this target.
    fn served(&self) -> Option<DiskReport> {
        let (domid, vdev) = (self.domid?, self.vdev.as_deref()?);
        let Ok(Reply::Disks { disks }) = request(&self.admin, &Request::List) else { return None };
        let is_it = |disk: &DiskReport| {
            disk.domid == domid && disk.vdev == vdev && disk.target == self.target
        };
        disks.into_iter().find(is_it)
    }

    fn open(&self) -> Verdict {
        let access = Access {
            read_only: matches!(self.mode, Mode::Read | Mode::ReadShared),
            shareable: matches!(self.mode, Mode::ReadShared | Mode::WriteShared),
            ..Access::default()
        };
        let opened = self.target.parse::<Spec>().and_then(|spec| spec.open(&access));
        match opened {
            Ok(backing) => Verdict { warnings: backing.warnings().to_vec(), refusal: None },
            Err(error) => Verdict { warnings: Vec::new(), refusal: Some(with_causes(&error)) },
        }
    }
}

/// Opens the target in a child process, for at most `limits::OPEN_SECONDS`. A process that is stuck in hung
/// storage can't even be killed. But nobody waits for the child to end, and it holds none of the caller's
/// descriptors.
fn ask_child(target: &str) -> anyhow::Result<Verdict> {
    let mut child = Command::new("/proc/self/exe")
        .args(["check-target", "--opens"])
        .args(std::env::args_os().skip(2))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start a process that opens the target")?;
    let mut pipe = child.stdout.take().context("a child without standard output")?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut answer = String::new();
        let read = pipe.read_to_string(&mut answer).map(|_| answer);
        // This fails if nobody waits any more.
        let _ = sender.send(read);
    });
    let Ok(answer) = receiver.recv_timeout(Duration::from_secs(limits::OPEN_SECONDS)) else {
        // The child ends once storage lets it.
        let _ = child.kill();
        return Err(BackingError::too_slow(target).into());
    };
    serde_json::from_str(&answer?).context("the process that opens the target has failed")
}

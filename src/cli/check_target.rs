//! `polldisk check-target`.

use std::path::PathBuf;

use anyhow::{anyhow, bail};
use clap::{Args, ValueEnum};
use polldisk::backing::{Access, Spec};
use polldisk::config::ADMIN_SOCKET;
use polldisk::control::admin::client::request;
use polldisk::control::admin::protocol::{DiskReport, Reply, Request};
use polldisk::output;
use polldisk::text::printable;

/// Tell whether a disk could have a target, and if not, why
///
/// The target is opened as the daemon opens it, and closed again: nothing of it is changed, and no
/// daemon needs to run. What polldisk would warn of is printed, too. Where a daemon serves the target
/// to the disk named by --domid and --vdev already, that is asked instead.
#[derive(Args, Debug)]
pub struct CheckTarget {
    /// What the disk shall hold, as in `attach --target`
    #[arg(value_name = "SPEC")]
    target: String,
    /// How the guest uses it, as the toolstack says it: r or w, with ! where others may write, too
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
    /// Opens it, or asks the daemon. The reason is one line, as the daemon writes it.
    pub fn run(self) -> anyhow::Result<()> {
        match self.served() {
            Some(disk) if disk.failure.is_empty() => Ok(()),
            Some(disk) => bail!("{}", disk.failure),
            None => self.open().map_err(|error| anyhow!("{error:#}")),
        }
    }

    /// The disk, where the daemon has the target in it.
    fn served(&self) -> Option<DiskReport> {
        let (domid, vdev) = (self.domid?, self.vdev.as_deref()?);
        let Ok(Reply::Disks { disks }) = request(&self.admin, &Request::List) else { return None };
        let is_it = |disk: &DiskReport| {
            disk.domid == domid && disk.vdev == vdev && disk.target == self.target
        };
        disks.into_iter().find(is_it)
    }

    fn open(&self) -> anyhow::Result<()> {
        let access = Access {
            read_only: matches!(self.mode, Mode::Read | Mode::ReadShared),
            shareable: matches!(self.mode, Mode::ReadShared | Mode::WriteShared),
            ..Access::default()
        };
        let backing = self.target.parse::<Spec>()?.open(&access)?;
        for warning in backing.warnings() {
            output::say(printable(&format!("polldisk: {}: {warning}", self.target)));
        }
        Ok(())
    }
}

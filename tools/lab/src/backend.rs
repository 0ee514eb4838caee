//! The backends: polldisk, and the two that it replaces.
//!
//! If a scenario passes with the other two, its failure is polldisk's and not the lab's.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::agent::{Agent, Job};
use crate::xen::wait_for;

/// Where polldisk's standard error goes in dom0.
pub const DAEMON_LOG: &str = "/run/polldisk.log";

const START_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(30);
const RELEASE_CHECKS: u32 = 10;

/// The backends of the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The daemon under test.
    Polldisk,
    /// QEMU's backend, which libxl starts with each guest.
    Qdisk,
    /// The kernel's backend.
    Blkback,
}

/// What a disk is stored on.
#[derive(Clone, Copy, Debug)]
pub enum Storage<'a> {
    /// A block device of dom0.
    Device(&'a str),
    /// A raw file in dom0.
    File(&'a str),
}

impl Backend {
    /// All backends.
    pub const ALL: [Self; 3] = [Self::Polldisk, Self::Qdisk, Self::Blkback];

    /// Its name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Polldisk => "polldisk",
            Self::Qdisk => "qdisk",
            Self::Blkback => "blkback",
        }
    }

    /// Makes the backend ready for guests. It offers this number of queues, or its default.
    pub fn start(self, dom0: &mut Agent, queues: Option<u32>) -> Result<Option<Daemon>> {
        let option = |name| queues.map_or_else(String::new, |queues| format!("{name}{queues}"));
        match self {
            Self::Polldisk => Daemon::start(dom0, &option("--workers ")).map(Some),
            Self::Qdisk => {
                ensure!(queues.is_none(), "qdisk has one queue for each disk");
                Ok(None)
            }
            Self::Blkback => {
                dom0.ask(&format!("modprobe xen-blkback {}", option("max_queues="))).map(|_| None)
            }
        }
    }

    /// A disk in xl's syntax. Sets up what the backend needs to reach the storage.
    pub fn disk(self, dom0: &mut Agent, vdev: &str, storage: Storage) -> Result<String> {
        Ok(format!("vdev={vdev},access=rw,format=raw,{}", self.place(dom0, storage)?))
    }

    /// [`Backend::disk`] for a disk that the guest only reads.
    pub fn read_only_disk(self, dom0: &mut Agent, vdev: &str, storage: Storage) -> Result<String> {
        Ok(format!("vdev={vdev},access=ro,format=raw,{}", self.place(dom0, storage)?))
    }

    fn place(self, dom0: &mut Agent, storage: Storage) -> Result<String> {
        Ok(match (self, storage) {
            (Self::Polldisk | Self::Blkback, Storage::Device(path)) => {
                format!("backendtype=phy,target={path}")
            }
            (Self::Polldisk, Storage::File(path)) => {
                format!("script=block-polldisk,target=raw:{path}")
            }
            (Self::Blkback, Storage::File(path)) => {
                let attach = format!("modprobe loop && losetup --find --show {path}");
                format!("backendtype=phy,target={}", dom0.ask(&attach)?)
            }
            (Self::Qdisk, Storage::Device(path) | Storage::File(path)) => {
                format!("backendtype=qdisk,target={path}")
            }
        })
    }

    /// The backend's type in the disks' xenstore paths.
    pub fn xenstore_type(self) -> &'static str {
        match self {
            Self::Polldisk | Self::Blkback => "vbd",
            Self::Qdisk => "qdisk",
        }
    }
}

/// A disk as `polldisk list --json` shows it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Disk {
    /// The guest's domain.
    pub domid: u32,
    /// The guest's name of the disk.
    pub vdev: String,
    /// Its xenbus state.
    pub state: String,
    /// Its rings in use.
    pub queues: u32,
    /// Read requests served.
    pub reads: u64,
    /// Write requests served.
    pub writes: u64,
    /// Flush requests served.
    pub flushes: u64,
}

/// The kernel resources that a daemon holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Open file descriptors.
    pub fds: usize,
    /// Threads, except those that start and end as needed.
    pub threads: usize,
    /// Mappings of granted pages.
    pub grant_mappings: usize,
}

/// A running `polldisk serve`.
#[derive(Debug)]
pub struct Daemon {
    pid: u32,
    job: Job,
}

impl Daemon {
    /// Starts the daemon and waits until it answers `polldisk list`.
    pub fn start(dom0: &mut Agent, options: &str) -> Result<Self> {
        let serve = format!(
            "echo $$ >/run/polldisk.pid; exec polldisk serve --log info {options} 2>{DAEMON_LOG}"
        );
        let job = dom0.start(&serve, None)?;
        let ready = wait_for(dom0, "polldisk list --json >/dev/null 2>&1", START_LIMIT);
        if dom0.has_ended(&job) || ready.is_err() {
            bail!("polldisk serve does not answer:\n{}", dom0.ask(&format!("cat {DAEMON_LOG}"))?);
        }
        let pid = dom0.ask("cat /run/polldisk.pid")?.parse().context("the daemon's pid")?;
        Ok(Self { pid, job })
    }

    /// Whether the daemon still runs.
    pub fn is_alive(&self, dom0: &mut Agent) -> bool {
        !dom0.has_ended(&self.job)
    }

    /// The disks that the daemon serves.
    pub fn list(&self, dom0: &mut Agent) -> Result<Vec<Disk>> {
        let text = dom0.ask("polldisk list --json")?;
        serde_json::from_str(&text).with_context(|| format!("polldisk list --json: {text}"))
    }

    /// What the daemon holds now.
    pub fn footprint(&self, dom0: &mut Agent) -> Result<Footprint> {
        let proc = format!("/proc/{}", self.pid);
        // Some threads start when needed and end when they have been idle for a while: the kernel's for
        // io_uring (iou-wrk-N), those that discard, and those that open and close storage.
        let text = dom0.ask(&format!(
            "ls {proc}/fd | wc -l
             grep -LE '^(iou-wrk|discard|storage)' {proc}/task/*/comm | wc -l
             grep -c gntdev {proc}/maps || true"
        ))?;
        parse_footprint(&text).with_context(|| format!("the daemon's footprint: {text}"))
    }

    /// Waits until the daemon holds what it held earlier. The last file may close only after an area in
    /// xenstore is gone.
    pub fn expect_footprint(&self, dom0: &mut Agent, earlier: Footprint) -> Result<()> {
        let mut now = self.footprint(dom0)?;
        for _ in 0..RELEASE_CHECKS {
            if now == earlier {
                return Ok(());
            }
            dom0.ask("sleep 0.5")?;
            now = self.footprint(dom0)?;
        }
        bail!("polldisk holds {now:?}; earlier it held {earlier:?}")
    }

    /// Ends the daemon as a service manager does; it must exit with status 0.
    pub fn stop(self, dom0: &mut Agent) -> Result<()> {
        let pid = self.pid;
        dom0.ask(&format!("kill -TERM {pid}"))?;
        wait_for(dom0, &format!("! kill -0 {pid} 2>/dev/null"), STOP_LIMIT)?;
        let output = dom0.finish(self.job)?;
        ensure!(output.status == 0, "polldisk serve ended with {}", output.status);
        Ok(())
    }
}

fn parse_footprint(text: &str) -> Option<Footprint> {
    let mut counts = text.lines().map(|line| line.trim().parse().ok());
    Some(Footprint {
        fds: counts.next()??,
        threads: counts.next()??,
        grant_mappings: counts.next()??,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_footprint_is_three_counts() {
        let expected = Footprint { fds: 12, threads: 3, grant_mappings: 0 };
        assert_eq!(parse_footprint("12\n3\n0"), Some(expected));
        assert_eq!(parse_footprint("12\n3"), None);
    }

    #[test]
    fn a_list_may_say_more_than_the_lab_reads() {
        let text = r#"[{"domid": 5, "vdev": "xvdb", "state": "Connected", "queues": 2, "backing": "raw:/d",
                        "worker": 0, "reads": 1, "writes": 2, "flushes": 3}]"#;
        let disks: Vec<Disk> = serde_json::from_str(text).expect("a list");
        assert_eq!((disks[0].domid, disks[0].queues, disks[0].flushes), (5, 2, 3));
    }
}

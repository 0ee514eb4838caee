//! dom0 as its own guest: `blkload` is a frontend through `/dev/xen/gntalloc`, with real grants and event
//! channels. `perf/README.md` shows users the same commands.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::{Scenario, end_idle_daemon};
use crate::backend::{Backend, Daemon, Storage};
use crate::lab::Lab;
use crate::xen::{CREATE_LIMIT, wait_for};

pub(super) const SCENARIO: Scenario = Scenario {
    name: "blkload",
    about: "blkload in dom0 measures a disk of dom0, with and without persistent grants",
    programs: false,
    blkload: true,
    run,
};

const VDEV: &str = "xvdz";
const FILE: &str = "/srv/test.img";

/// QEMU's command line for disks of dom0 itself, as Debian's init script has it.
const QEMU: &str = "/usr/libexec/xen-qemu-system-i386 -xen-domid 0 -xen-attach -name dom0 -nographic \
                    -M xenpv -daemonize -monitor none -serial none -parallel none \
                    -pidfile /run/qemu-dom0.pid";

const QEMU_LIMIT: Duration = Duration::from_secs(60);

/// A load, and the features that it needs.
#[derive(Clone, Copy, Debug)]
struct Load {
    about: &'static str,
    options: &'static str,
    persistent: bool,
    indirect: bool,
}

const LOADS: [Load; 4] = [
    Load {
        about: "reads, a frontend that sleeps",
        options: "--wait block",
        persistent: true,
        indirect: false,
    },
    Load {
        about: "reads and writes, a frontend that polls",
        options: "--wait busy --read 50 --cores 0",
        persistent: true,
        indirect: false,
    },
    Load {
        about: "without persistent grants",
        options: "--no-persistent --read 50",
        persistent: false,
        indirect: false,
    },
    Load {
        about: "indirect requests of 256 KiB",
        options: "--block-size 256K --depth 2 --read 50",
        persistent: true,
        indirect: true,
    },
];

fn run(lab: &mut Lab) -> Result<()> {
    // Written in full, since the first write to a hole would allocate blocks.
    lab.step("a file as storage", |lab| {
        lab.dom0.ask(&format!("dd if=/dev/zero of={FILE} bs=1M count=64 conv=fsync"))
    })?;
    lab.step("dom0 can be a frontend", |lab| {
        lab.dom0.ask("modprobe xen-gntalloc && modprobe -r xen-blkfront")
    })?;
    let daemon = lab.step("the backend starts", start)?;
    let idle = daemon.as_ref().map(|daemon| daemon.footprint(&mut lab.dom0)).transpose()?;
    lab.step("dom0 gets a disk", attach)?;
    for load in LOADS {
        // QEMU 7.2 has neither persistent grants nor indirect requests.
        let qdisk = lab.backend == Backend::Qdisk;
        if !(qdisk && load.indirect) {
            lab.step(load.about, |lab| measure(lab, load, load.persistent && !qdisk))?;
        }
    }
    lab.step("the disk goes", detach)?;
    end_idle_daemon(lab, daemon, idle)
}

fn start(lab: &mut Lab) -> Result<Option<Daemon>> {
    if lab.backend == Backend::Qdisk {
        lab.dom0.ask(QEMU)?;
        // libxl attaches disks only if it knows the domain's QEMU and that QEMU is running.
        lab.dom0.ask(
            "xenstore-write /local/domain/0/image/device-model-pid $(cat /run/qemu-dom0.pid)",
        )?;
        let state = "[ \"$(xenstore-read /local/domain/0/device-model/0/state)\" = running ]";
        wait_for(&mut lab.dom0, state, QEMU_LIMIT)?;
    }
    lab.start_backend()
}

fn attach(lab: &mut Lab) -> Result<()> {
    let command = match lab.backend {
        Backend::Polldisk => {
            format!("polldisk attach --domid 0 --vdev {VDEV} --target raw:{FILE}")
        }
        Backend::Qdisk | Backend::Blkback => {
            format!("xl block-attach 0 {}", lab.disk(VDEV, Storage::File(FILE))?)
        }
    };
    lab.dom0.ask_within(&command, CREATE_LIMIT).map(drop)
}

fn detach(lab: &mut Lab) -> Result<()> {
    let command = match lab.backend {
        Backend::Polldisk => format!("polldisk detach --domid 0 --vdev {VDEV}"),
        Backend::Qdisk | Backend::Blkback => format!("xl block-detach 0 {VDEV}"),
    };
    lab.dom0.ask_within(&command, CREATE_LIMIT).map(drop)
}

/// The part of blkload's report that the lab reads.
#[derive(Debug, Deserialize)]
struct Report {
    total: Figures,
    disks: Vec<Disk>,
}

#[derive(Debug, Deserialize)]
struct Figures {
    ios: u32,
}

#[derive(Debug, Deserialize)]
struct Disk {
    persistent: bool,
    indirect: bool,
}

/// Measures a load and checks the features in use. If a request fails, blkload fails.
fn measure(lab: &mut Lab, load: Load, persistent: bool) -> Result<()> {
    let pid = match lab.backend {
        Backend::Polldisk => "--pid $(pidof polldisk)",
        Backend::Qdisk => "--pid $(cat /run/qemu-dom0.pid)",
        Backend::Blkback => "",
    };
    let text = lab.dom0.ask(&format!(
        "blkload --xen --vdev {VDEV} {pid} --warmup 0.1 --seconds 0.5 {} --json -",
        load.options
    ))?;
    let report: Report =
        serde_json::from_str(&text).with_context(|| format!("blkload's report: {text}"))?;
    let [disk] = &report.disks[..] else { anyhow::bail!("not exactly one disk: {report:?}") };
    ensure!((disk.persistent, disk.indirect) == (persistent, load.indirect), "{report:?}");
    ensure!(report.total.ios > 0, "{report:?}");
    lab.figure("requests", report.total.ios);
    Ok(())
}

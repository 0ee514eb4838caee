//! Other projects' programs on the backend's disks: each finds faults in its own way.
//!
//! The programs are in a root of their own, which the backend serves read-only. The suites are the scripts
//! in `suites/`. They run inside that root and end at the first fault.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::guest_io::expect_disk;
use super::{MEMORY_DEVICES, Scenario, end_idle_daemon};
use crate::agent::Agent;
use crate::backend::Storage;
use crate::lab::Lab;
use crate::machine::PROGRAMS_DEVICE;
use crate::xen::{Guest, Size};

pub(super) const SCENARIO: Scenario = Scenario {
    name: "guest-suites",
    about: "badblocks, stress-ng, ext4, xfs, SQLite, PostgreSQL, trims, schedulers, dm-crypt, LVM",
    programs: true,
    blkload: false,
    run,
};

/// Two processors, so that there are two queues. Writes to the root stay in memory.
const GUEST: Size = Size { vcpus: 2, memory_mib: 1024 };

/// mkfs.xfs needs at least 300 MiB. Only written blocks take up space.
const DISK_MIB: u64 = 384;

const FILE: Disk = Disk { vdev: "xvda", storage: Storage::File(IMAGE) };
const DEVICE: Disk = Disk { vdev: "xvdb", storage: Storage::Device("/dev/nullb0") };
const PROGRAMS: Disk = Disk { vdev: "xvdc", storage: Storage::Device(PROGRAMS_DEVICE) };
const IMAGE: &str = "/srv/suites.img";

/// Longest time for a suite, in the guest's own time. A suite takes seconds of it.
const SUITE_LIMIT: Duration = Duration::from_secs(900);

const PRELUDE: &str = include_str!("../../suites/prelude");

/// Suites in two halves: `fill`, and then `free`, which must make the disk's file shrink.
const FREEING: [(&str, &str); 3] = [
    ("LVM thin: snapshot, trims passed down", include_str!("../../suites/lvm-thin")),
    ("blkdiscard frees and reads as zeroes", include_str!("../../suites/discard")),
    ("fstrim frees and keeps the files", include_str!("../../suites/fstrim")),
];

/// A disk of the scenario.
#[derive(Clone, Copy, Debug)]
struct Disk {
    vdev: &'static str,
    storage: Storage<'static>,
}

/// A script for the guest, its argument, and the disk that it may overwrite.
#[derive(Clone, Copy, Debug)]
struct Suite {
    about: &'static str,
    script: &'static str,
    argument: &'static str,
    disk: Disk,
}

const SUITES: [Suite; 8] = [
    Suite {
        about: "badblocks writes and reads patterns",
        script: include_str!("../../suites/badblocks"),
        argument: "",
        disk: FILE,
    },
    Suite {
        about: "stress-ng: hdd, iomix, io-uring, aio",
        script: include_str!("../../suites/stress-ng"),
        argument: "",
        disk: DEVICE,
    },
    Suite {
        about: "ext4 under load, e2fsck",
        script: include_str!("../../suites/filesystem"),
        argument: "ext4",
        disk: FILE,
    },
    Suite {
        about: "xfs under load, xfs_repair",
        script: include_str!("../../suites/filesystem"),
        argument: "xfs",
        disk: DEVICE,
    },
    Suite {
        about: "SQLite, killed among its transactions",
        script: include_str!("../../suites/sqlite"),
        argument: "",
        disk: FILE,
    },
    Suite {
        about: "PostgreSQL: pgbench, checksums, amcheck",
        script: include_str!("../../suites/postgres"),
        argument: "",
        disk: DEVICE,
    },
    Suite {
        about: "schedulers switched under I/O",
        script: include_str!("../../suites/schedulers"),
        argument: "",
        disk: DEVICE,
    },
    Suite {
        about: "dm-crypt: LUKS2 keeps and hides",
        script: include_str!("../../suites/dm-crypt"),
        argument: "",
        disk: FILE,
    },
];

fn run(lab: &mut Lab) -> Result<()> {
    lab.step("a file and a device as storage", make_storage)?;
    let daemon = lab.step("the backend starts", Lab::start_backend)?;
    let idle = daemon.as_ref().map(|daemon| daemon.footprint(&mut lab.dom0)).transpose()?;
    let mut guest = lab.step("a guest boots, its programs on the backend", boot)?;

    for suite in SUITES {
        lab.step(suite.about, |lab| run_suite(lab, &mut guest, suite))?;
    }
    for (about, script) in FREEING {
        lab.step(about, |lab| expect_freed(lab, &mut guest, script))?;
    }
    lab.step("the guest's kernel saw no I/O error", |_| expect_no_errors(&mut guest.agent))?;

    lab.step("the guest shuts down", |lab| guest.shut_down(&mut lab.dom0))?;
    end_idle_daemon(lab, daemon, idle)
}

fn make_storage(lab: &mut Lab) -> Result<()> {
    lab.dom0
        .ask(&format!(
            "set -e
             truncate -s {DISK_MIB}M {IMAGE}
             {MEMORY_DEVICES}
             device nullb0 512 {DISK_MIB}"
        ))
        .map(drop)
}

/// Creates a guest whose `/system` is the root with the programs. Writes to it go to memory.
fn boot(lab: &mut Lab) -> Result<Guest> {
    let mut disks = vec![lab.read_only_disk(PROGRAMS.vdev, PROGRAMS.storage)?];
    for disk in [FILE, DEVICE] {
        disks.push(lab.disk(disk.vdev, disk.storage)?);
    }
    let mut guest = lab.create_guest_of(GUEST, "suites", &disks)?;
    for disk in [FILE, DEVICE] {
        expect_disk(&mut guest.agent, disk.vdev, DISK_MIB << 20)?;
    }
    guest.agent.ask(&format!(
        "set -e
         mkdir /lower /upper /system
         mount -t ext4 -o ro /dev/{} /lower
         insmod /lower/lib/modules/$(uname -r)/kernel/fs/overlayfs/overlay.ko
         mount -t tmpfs upper /upper
         mkdir /upper/root /upper/work
         mount -t overlay -o lowerdir=/lower,upperdir=/upper/root,workdir=/upper/work system /system
         for folder in dev proc sys; do mount -o bind /$folder /system/$folder; done
         mkdir -p /dev/shm
         mount -t tmpfs shm /dev/shm
         mount -t tmpfs run /system/run
         mount -t tmpfs tmp /system/tmp
         ln -sf /proc/self/fd /dev/fd
         # What the kernel runs when it wants a module.
         printf '#!/bin/busybox sh\\nexec chroot /system modprobe \"$@\"\\n' >/sbin/modprobe
         chmod 755 /sbin/modprobe",
        PROGRAMS.vdev
    ))?;
    Ok(guest)
}

fn run_suite(lab: &mut Lab, guest: &mut Guest, suite: Suite) -> Result<()> {
    let Suite { script, argument, disk, .. } = suite;
    for (name, value) in run_script(&mut guest.agent, script, argument, disk)? {
        lab.figure(&name, value);
    }
    Ok(())
}

/// Runs a script in the root with the programs. Returns the figures that it printed.
fn run_script(
    guest: &mut Agent,
    script: &str,
    argument: &str,
    disk: Disk,
) -> Result<Vec<(String, f64)>> {
    let output = guest.ask_within(
        &format!(
            "cat >/system/tmp/suite <<'END-OF-SUITE'\n{PRELUDE}\n{script}END-OF-SUITE\n\
             exec chroot /system bash /tmp/suite /dev/{} {argument}",
            disk.vdev
        ),
        SUITE_LIMIT,
    )?;
    output.lines().filter_map(|line| line.strip_prefix("figure ")).map(parse_figure).collect()
}

fn parse_figure(line: &str) -> Result<(String, f64)> {
    let (name, value) = line.rsplit_once(' ').context("a figure without a value")?;
    Ok((name.into(), value.parse().with_context(|| format!("figure {line}"))?))
}

/// Runs both halves of a script and checks that the second half frees as much of the file as it says.
fn expect_freed(lab: &mut Lab, guest: &mut Guest, script: &str) -> Result<()> {
    run_script(&mut guest.agent, script, "fill", FILE)?;
    let before = allocated_kib(lab)?;
    let figures = run_script(&mut guest.agent, script, "free", FILE)?;
    let after = allocated_kib(lab)?;
    let (_, expected) = figures
        .iter()
        .find(|(name, _)| name == "KiB")
        .context("the script printed no KiB figure")?;
    let freed = before - after;
    lab.figure("KiB freed", freed);
    ensure!(freed >= *expected, "{before} KiB before, {after} after; expected {expected} less");
    Ok(())
}

/// How much space the disk's file takes up on its filesystem.
fn allocated_kib(lab: &mut Lab) -> Result<f64> {
    let blocks: u32 = lab.dom0.ask(&format!("sync {IMAGE} && stat -c %b {IMAGE}"))?.parse()?;
    Ok(f64::from(blocks) / 2.0)
}

fn expect_no_errors(guest: &mut Agent) -> Result<()> {
    let errors = guest.ask(
        "dmesg | grep -E 'I/O error|blk_update_request|Call Trace|blocked for more' || true",
    )?;
    ensure!(errors.is_empty(), "the guest's kernel says\n{errors}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figures_name_may_have_spaces() {
        assert_eq!(parse_figure("KiB read 12").expect("a figure"), ("KiB read".into(), 12.0));
        assert!(parse_figure("KiB").is_err());
        assert!(parse_figure("KiB many").is_err());
    }
}

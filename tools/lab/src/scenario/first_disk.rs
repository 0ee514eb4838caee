//! A guest's two disks from creation to shutdown, twice.

use anyhow::{Context, Result, ensure};

use super::guest_io::{check_file_system, expect_disk, read_pattern, verify, write_pattern};
use super::{Scenario, end_daemon};
use crate::backend::{Daemon, Footprint, Storage};
use crate::lab::Lab;
use crate::xen::{Guest, domains};

pub(super) const SCENARIO: Scenario = Scenario {
    name: "first-disk",
    about: "a guest does verified I/O on a block device and a raw file, and leaves nothing behind",
    programs: false,
    blkload: false,
    run,
};

const MIB: u64 = 1 << 20;
const DISK_MIB: u64 = 64;

/// The guest's names of the disks and what they are stored on.
const DISKS: [(&str, Storage); 2] =
    [("xvda", Storage::Device("/dev/ram0")), ("xvdb", Storage::File("/srv/disk.img"))];

const BLOCK_SIZES: [(&str, u32); 4] = [("512", 48), ("4k", 64), ("64k", 32), ("256k", 16)];
const FEW_BLOCKS: [(&str, u32); 1] = [("4k", 48)];

/// Behind everything that `verify` writes.
const PATTERN_MIB: u32 = 40;

fn run(lab: &mut Lab) -> Result<()> {
    lab.step("a memory disk and a file as storage", make_storage)?;
    let daemon = lab.step("the backend starts", Lab::start_backend)?;
    let disks = lab.step("disks for the guest's config", |lab| {
        DISKS.iter().map(|(vdev, storage)| lab.disk(vdev, *storage)).collect::<Result<Vec<_>>>()
    })?;
    let idle = daemon.as_ref().map(|daemon| daemon.footprint(&mut lab.dom0)).transpose()?;
    let served = daemon.as_ref().zip(idle);

    let mut guest = lab.step("the guest boots", |lab| lab.create_guest("first", &disks))?;
    lab.step("both disks have their size", |_| expect_disks(&mut guest))?;
    if let Some(daemon) = &daemon {
        lab.step("polldisk list shows both connected", |lab| {
            expect_connected(lab, daemon, &guest)
        })?;
    }
    for (vdev, storage) in DISKS {
        lab.step(&format!("{vdev}: verified random I/O"), |lab| {
            note_verified(lab, &mut guest, vdev, &BLOCK_SIZES)
        })?;
        lab.step(&format!("{vdev}: dom0 sees what the guest wrote"), |lab| {
            let written = write_pattern(&mut guest.agent, vdev, PATTERN_MIB)?;
            let found = read_pattern(&mut lab.dom0, path_of(storage), PATTERN_MIB)?;
            ensure!(written == found, "the guest wrote {written}, dom0 reads {found}");
            Ok(())
        })?;
        lab.step(&format!("{vdev}: a file system survives an unmount"), |_| {
            check_file_system(&mut guest.agent, vdev)
        })?;
        if let Some(daemon) = &daemon {
            lab.step(&format!("{vdev}: fsync reaches polldisk"), |lab| {
                expect_flush(lab, daemon, &mut guest, vdev)
            })?;
        }
    }
    lab.step("shutdown leaves nothing behind", |lab| end_guest(lab, guest, served))?;

    let mut guest = lab.step("a second guest boots", |lab| lab.create_guest("second", &disks))?;
    lab.step("both disks serve it", |lab| {
        expect_disks(&mut guest)?;
        DISKS.iter().try_for_each(|(vdev, _)| note_verified(lab, &mut guest, vdev, &FEW_BLOCKS))
    })?;
    lab.step("its shutdown leaves nothing behind", |lab| end_guest(lab, guest, served))?;

    end_daemon(lab, daemon)
}

fn make_storage(lab: &mut Lab) -> Result<()> {
    // The file is written in full, since the first write to a hole would allocate blocks.
    lab.dom0
        .ask(&format!(
            "set -e
             modprobe brd rd_nr=1 rd_size={}
             dd if=/dev/zero of=/srv/disk.img bs=1M count={DISK_MIB} conv=fsync 2>/dev/null",
            DISK_MIB * 1024
        ))
        .map(drop)
}

fn path_of(storage: Storage<'static>) -> &'static str {
    match storage {
        Storage::Device(path) | Storage::File(path) => path,
    }
}

fn expect_disks(guest: &mut Guest) -> Result<()> {
    DISKS.iter().try_for_each(|(vdev, _)| expect_disk(&mut guest.agent, vdev, DISK_MIB * MIB))
}

fn expect_connected(lab: &mut Lab, daemon: &Daemon, guest: &Guest) -> Result<()> {
    let disks = daemon.list(&mut lab.dom0)?;
    for (vdev, _) in DISKS {
        let disk = disks
            .iter()
            .find(|disk| disk.vdev == vdev && disk.domid == guest.domid)
            .with_context(|| format!("no {vdev} of domain {} in {disks:?}", guest.domid))?;
        ensure!(disk.state == "Connected", "{disk:?}");
    }
    Ok(())
}

fn note_verified(
    lab: &mut Lab,
    guest: &mut Guest,
    vdev: &str,
    sizes: &[(&str, u32)],
) -> Result<()> {
    let requests = verify(&mut guest.agent, vdev, sizes, 1)?;
    lab.figure(&format!("{vdev} writes"), requests.writes);
    lab.figure(&format!("{vdev} reads"), requests.reads);
    Ok(())
}

fn expect_flush(lab: &mut Lab, daemon: &Daemon, guest: &mut Guest, vdev: &str) -> Result<()> {
    let flushes = |lab: &mut Lab| {
        let disks = daemon.list(&mut lab.dom0)?;
        let disk = disks.into_iter().find(|disk| disk.vdev == vdev);
        Ok::<_, anyhow::Error>(disk.context("the disk is not listed")?.flushes)
    };
    let before = flushes(lab)?;
    guest.agent.ask(&format!("dd if=/dev/zero of=/dev/{vdev} bs=4k count=1 conv=fsync"))?;
    let after = flushes(lab)?;
    ensure!(after > before, "{before} flushes before, {after} after");
    Ok(())
}

/// Shuts the guest down. Its xenstore areas and its domain, which a mapped grant would keep, must go.
/// polldisk must still run and hold what it held before.
fn end_guest(lab: &mut Lab, guest: Guest, served: Option<(&Daemon, Footprint)>) -> Result<()> {
    let domid = guest.domid;
    let backend = format!("/local/domain/0/backend/{}/{domid}", lab.backend.xenstore_type());
    guest.shut_down(&mut lab.dom0)?;
    for area in [backend, format!("/local/domain/{domid}")] {
        let left = lab.dom0.ask(&format!("xenstore-ls -fp {area} 2>/dev/null || true"))?;
        ensure!(left.is_empty(), "xenstore still holds\n{left}");
    }
    let left = domains(&mut lab.dom0)? - 1;
    ensure!(left == 0, "{left} domains besides dom0 are still there");
    if let Some((daemon, idle)) = served {
        ensure!(daemon.is_alive(&mut lab.dom0), "polldisk has ended");
        daemon.expect_footprint(&mut lab.dom0, idle)?;
        let disks = daemon.list(&mut lab.dom0)?;
        ensure!(disks.is_empty(), "polldisk still lists {disks:?}");
    }
    Ok(())
}

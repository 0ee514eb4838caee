//! A running guest gives its disk back and takes it again.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::guest_io::{expect_disk, verify};
use super::{Scenario, end_daemon};
use crate::backend::Storage;
use crate::lab::Lab;
use crate::xen::{Guest, mapped_grants, wait_for};

pub(super) const SCENARIO: Scenario = Scenario {
    name: "reconnect",
    about: "ten times the guest's driver leaves its disk and takes it again, with verified I/O",
    programs: false,
    blkload: false,
    run,
};

const ROUNDS: usize = 10;
const DISK_MIB: u64 = 32;
const BLOCKS: [(&str, u32); 2] = [("4k", 32), ("64k", 8)];
const STATE_LIMIT: Duration = Duration::from_secs(60);

/// xvda in the guest's sysfs and in xenstore.
const VBD: u32 = 51712;

fn run(lab: &mut Lab) -> Result<()> {
    lab.step("a memory disk as storage", |lab| {
        lab.dom0.ask(&format!("modprobe brd rd_nr=1 rd_size={}", DISK_MIB * 1024))
    })?;
    let daemon = lab.step("the backend starts", Lab::start_backend)?;
    let disk = lab.disk("xvda", Storage::Device("/dev/ram0"))?;
    let mut guest = lab.step("the guest boots", |lab| lab.create_guest("rejoin", &[disk]))?;
    lab.step("the driver leaves its disk once", |lab| unbind(lab, &mut guest))?;
    let unbound = mapped_grants(&mut lab.dom0, guest.domid)?;
    let idle = daemon.as_ref().map(|daemon| daemon.footprint(&mut lab.dom0)).transpose()?;

    for round in 1..=ROUNDS {
        lab.step(&format!("round {round} of {ROUNDS}"), |lab| {
            bind(lab, &mut guest)?;
            let requests = verify(&mut guest.agent, "xvda", &BLOCKS, round)?;
            lab.figure("writes", requests.writes);
            lab.figure("reads", requests.reads);
            unbind(lab, &mut guest)
        })?;
    }
    lab.step("no grant, fd or thread is left over", |lab| {
        let grants = mapped_grants(&mut lab.dom0, guest.domid)?;
        ensure!(grants == unbound, "{grants} grants are mapped; {unbound} were at first");
        daemon
            .as_ref()
            .zip(idle)
            .map_or(Ok(()), |(daemon, idle)| daemon.expect_footprint(&mut lab.dom0, idle))
    })?;
    lab.step("the guest shuts down", |lab| guest.shut_down(&mut lab.dom0))?;
    end_daemon(lab, daemon)
}

/// Makes the driver close, waits for the backend to follow, and makes the guest's kernel forget the device.
///
/// Without forgetting it, `bind` would not work: blkfront leaves the state of a device that it has closed at
/// Closed. Only a device that is new to the kernel starts as Initialising. The kernel drops a device whose
/// area it may no longer read. The backend sees none of this: its next event is the frontend's change to
/// Initialising.
fn unbind(lab: &mut Lab, guest: &mut Guest) -> Result<()> {
    guest.agent.ask(&format!("echo vbd-{VBD} >/sys/bus/xen/drivers/vbd/unbind"))?;
    wait_for_state(lab, guest, "6")?;
    let frontend = frontend(guest);
    lab.dom0.ask(&format!("xenstore-chmod {frontend}/state n0 && xenstore-chmod {frontend} n0"))?;
    wait_for(&mut guest.agent, &format!("[ ! -e /sys/bus/xen/devices/vbd-{VBD} ]"), STATE_LIMIT)
}

/// Makes the device Initialising, waits until the backend offers the disk again, and lets the driver bind.
///
/// The guest may see the device only after that, because a driver that finds the backend still Closed
/// closes, too. The guest's kernel looks for a new device at each change, so the permission to read
/// `state` comes last.
fn bind(lab: &mut Lab, guest: &mut Guest) -> Result<()> {
    let frontend = frontend(guest);
    lab.dom0.ask(&format!("xenstore-write {frontend}/state 1"))?;
    wait_for_state(lab, guest, "2")?;
    let domid = guest.domid;
    lab.dom0.ask(&format!(
        "xenstore-chmod {frontend} n{domid} r0 && xenstore-chmod {frontend}/state n{domid} r0"
    ))?;
    expect_disk(&mut guest.agent, "xvda", DISK_MIB << 20)?;
    wait_for_state(lab, guest, "4")
}

fn frontend(guest: &Guest) -> String {
    format!("/local/domain/{}/device/vbd/{VBD}", guest.domid)
}

fn wait_for_state(lab: &mut Lab, guest: &Guest, state: &str) -> Result<()> {
    let kind = lab.backend.xenstore_type();
    let path = format!("/local/domain/0/backend/{kind}/{}/{VBD}/state", guest.domid);
    let condition = format!("[ \"$(xenstore-read {path})\" = {state} ]");
    wait_for(&mut lab.dom0, &condition, STATE_LIMIT)
}

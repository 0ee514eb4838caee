//! Log lines and xenstore requests that a guest can cause: few, as counted here.

use std::time::Instant;

use polldisk::limits;
use polldisk::msg::{Report, StorageFailure};
use xenstore_rs::Xs;

use super::{XVDA, connected};
use crate::log;
use crate::rig::{Rig, until};

fn failure(errno: i32, errors_so_far: u64) -> StorageFailure {
    StorageFailure {
        operation: "write",
        offset_bytes: 1 << 20,
        len_bytes: 4096,
        errno,
        errors_so_far,
    }
}

/// Lines that a guest may have caused since `start`: the limit for every period begun.
fn lines_allowed(start: Instant) -> usize {
    let periods = start.elapsed().as_secs() / limits::GUEST_LOG_SECONDS + 2;
    usize::try_from(periods).unwrap() * limits::GUEST_LOG_LINES as usize
}

#[test]
fn a_guest_that_reconnects_on_full_storage_does_not_fill_the_log() {
    log::keep();
    let rig = Rig::start();
    let (guest, areas) = connected(&rig, 71);
    let start = Instant::now();
    for _ in 0..100 {
        let queue = rig.queue_of(71);
        for errors_so_far in [1, 2, 4, 8] {
            let failure = failure(libc::ENOSPC, errors_so_far);
            rig.worker_reports.send(Report::StorageFailed(queue, failure));
        }
        guest.close(&rig, &areas);
        guest.set_state(&areas, 1);
        guest.connect(&rig, &areas);
    }
    let lines = log::lines(&["vbd/71/"]).len();
    assert!(lines <= lines_allowed(start) + 2, "{lines} lines");
    // A disk that is made again gets no further lines.
    rig.toolstack_removes(&areas, true);
    until("it is forgotten", || rig.list().is_empty());
    let noisy = |rig: &Rig| rig.worker_reports.send(Report::SpaceLeft(rig.queue_of(71)));
    rig.dom0.rm(&areas.backend).unwrap();
    let areas = rig.toolstack_disk(71, XVDA, "null:1G");
    guest.connect(&rig, &areas);
    (0..1000).for_each(|_| noisy(&rig));
    rig.list();
    let more = log::lines(&["vbd/71/"]).len();
    assert!(more <= lines_allowed(start) + 4, "{more} lines");
}

#[test]
fn a_storage_failure_names_disk_target_operation_place_and_cause() {
    log::keep();
    let rig = Rig::start();
    let guest = rig.guest(72);
    let areas = rig.toolstack_disk(72, XVDA, "null:1G");
    guest.connect(&rig, &areas);
    rig.worker_reports.send(Report::StorageFailed(rig.queue_of(72), failure(libc::EIO, 1)));
    rig.list();
    let lines = log::lines(&[
        "vbd/72/51712 (xvda)",
        "null:1G",
        "failed a write of 4096 bytes at byte 1048576",
        "Input/output error",
    ]);
    assert_eq!(lines.len(), 1, "{:?}", log::lines(&["vbd/72/"]));
}

#[test]
fn full_storage_is_a_state_until_writes_succeed_again() {
    log::keep();
    let rig = Rig::start();
    let (_guest, _areas) = connected(&rig, 73);
    for errno in [libc::ENOSPC, libc::EDQUOT] {
        rig.worker_reports.send(Report::StorageFailed(rig.queue_of(73), failure(errno, 1)));
        until("it is reported", || rig.list()[0].failure.contains("no space is left"));
        assert_eq!(rig.list()[0].state, "Connected", "reads go on");
        rig.worker_reports.send(Report::SpaceLeft(rig.queue_of(73)));
        until("the failure is cleared", || rig.list()[0].failure.is_empty());
    }
    assert_eq!(log::lines(&["vbd/73/", "no space is left"]).len(), 2);
    assert_eq!(log::lines(&["vbd/73/", "has space again"]).len(), 2);
}

#[test]
fn what_storage_failed_is_forgotten_with_the_connection_that_it_failed_for() {
    let rig = Rig::start();
    let (guest, areas) = connected(&rig, 65);
    let (_other, _) = connected(&rig, 66);
    let fail = |queue| {
        rig.worker_reports.send(Report::StorageFailed(queue, failure(libc::ENOSPC, 1)));
    };
    let is_full = |domid| {
        let disks = rig.list();
        let disk = disks.iter().find(|disk| disk.domid == domid).unwrap();
        disk.failure.contains("no space is left")
    };
    let ended = rig.queue_of(65);
    fail(ended);
    until("it is reported", || is_full(65));
    guest.close(&rig, &areas);
    guest.set_state(&areas, 1);
    guest.connect(&rig, &areas);
    assert!(!is_full(65));
    // A worker may have had more to say of it.
    fail(ended);
    fail(rig.queue_of(66));
    until("what came after it is reported", || is_full(66));
    assert!(!is_full(65));
}

#[test]
fn a_guest_that_rewrites_its_state_makes_few_requests_of_xenstore() {
    let rig = Rig::start();
    let (guest, areas) = connected(&rig, 74);
    rig.list();
    const WRITES: u64 = 5_000;
    let (start, before) = (Instant::now(), rig.server().requests());
    for round in 0..WRITES {
        guest.set_state(&areas, [3, 4][usize::from(round % 2 == 0)]);
    }
    let seconds = start.elapsed().as_secs() + 1;
    let requests = rig.server().requests() - before - WRITES;
    // Each look reads three nodes, and all eight of a frontend with one ring if it is Initialised.
    let looks = u64::from(limits::FRONTEND_LOOKS_BURST)
        + seconds * u64::from(limits::FRONTEND_LOOKS_PER_SECOND);
    assert!(requests <= looks * 11, "{requests} requests in {seconds} s");
    assert_eq!(rig.served(74), 1);
    // Its last state is seen.
    guest.set_state(&areas, 6);
    rig.wait_state(&areas.backend, 6);
}

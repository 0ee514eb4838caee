//! Storage that is slow to open: only its own disk waits.

use std::fs::File;

use polldisk::control::Ended;
use polldisk::control::admin::protocol::{Attach, Insert, Request};
use polldisk::limits::HELPERS_PER_FOLDER;
use xenstore_rs::Xs;

use super::XVDA;
use crate::lease::Lease;
use crate::log;
use crate::rig::{Areas, Rig, open_files_of, until, xvd};

/// A file whose open hangs until the lease is dropped, and the target that names it.
pub fn hung_file(rig: &Rig, name: &str) -> (Lease, String) {
    let path = rig.folder().join(name);
    File::create_new(&path).unwrap().set_len(1 << 20).unwrap();
    (Lease::on(&path), format!("raw:{}", path.display()))
}

/// How many opens of these disks took too long, according to the log. A hung open ends like this only
/// if somebody waits for it.
fn opens_given_up(disks: &str) -> usize {
    log::lines(&[disks, "cannot be opened", "within 8 s"]).len()
}

#[test]
fn the_open_of_a_disk_that_was_removed_is_not_begun() {
    let rig = Rig::start();
    rig.guest(5);
    let mut hung: Vec<_> = (0..=HELPERS_PER_FOLDER)
        .map(|number| {
            let (lease, target) = hung_file(&rig, &format!("{number}.img"));
            let areas = rig.toolstack_disk(5, xvd(u32::try_from(number).unwrap()).0, &target);
            until("it is being opened", || rig.list().len() == number + 1);
            (lease, areas)
        })
        .collect();
    // The last one waits for a thread.
    let (lease, removed) = hung.pop().unwrap();
    rig.toolstack_removes(&removed, true);
    until("it is gone", || rig.list().len() == HELPERS_PER_FOLDER);
    File::create_new(rig.folder().join("next.img")).unwrap().set_len(1 << 20).unwrap();
    let target = format!("raw:{}", rig.folder().join("next.img").display());
    let next = rig.toolstack_disk(5, xvd(9).0, &target);
    drop(hung);
    rig.wait_state(&next.backend, 2);
    assert!(lease.is_untouched());
}

#[test]
fn an_open_that_hangs_costs_its_own_disk_only() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    let (lease, target) = hung_file(&rig, "hung.img");
    let hung = rig.toolstack_disk(5, XVDA, &target);
    until("it is being opened", || rig.list().len() == 1);
    // Meanwhile other disks connect, those of the same guest too.
    for round in 0..5 {
        let areas = rig.toolstack_disk(5, xvd(1 + round).0, "null:1G");
        guest.connect(&rig, &areas);
        let other = rig.guest(6 + round);
        rig.attach(6 + round, "xvda", "null:1G").unwrap();
        other.connect(&rig, &Areas::new(6 + round, XVDA));
    }
    assert_eq!(rig.state(&hung.backend), Some(1));
    drop(lease);
    guest.connect(&rig, &hung);
    assert_eq!(rig.node(&hung.backend, "sectors").as_deref(), Some("2048"));
}

#[test]
fn a_hung_file_that_is_opened_over_and_over_holds_up_no_other_in_its_folder() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    let (lease, target) = hung_file(&rig, "hung.img");
    for number in 1..10 {
        rig.toolstack_disk(5, xvd(number).0, &target);
    }
    until("they are being opened", || rig.list().len() == 9);
    let other = rig.folder().join("other.img");
    File::create(&other).unwrap().set_len(1 << 20).unwrap();
    let areas = rig.toolstack_disk(5, XVDA, &format!("raw:{}", other.display()));
    guest.connect(&rig, &areas);
    drop(lease);
}

#[test]
fn an_open_that_takes_too_long_fails_with_a_reason_and_its_late_answer_changes_nothing() {
    log::keep();
    let rig = Rig::start();
    let guest = rig.guest(79);
    let (lease, target) = hung_file(&rig, "hung.img");
    let areas = rig.toolstack_disk(79, XVDA, &target);
    rig.wait_state(&areas.backend, 6);
    let error = rig.read(&areas.error).unwrap();
    assert!(error.starts_with("110 ") && error.contains(&target), "{error}");
    assert!(error.contains("within 8 s") && error.contains("storage answers"), "{error}");
    assert_eq!(opens_given_up("vbd/79/"), 1);
    drop(lease);
    rig.list();
    assert_eq!(rig.state(&areas.backend), Some(6));

    // The toolstack may start the disk over.
    rig.dom0.write(&format!("{}/state", areas.backend), "1").unwrap();
    guest.connect(&rig, &areas);
    assert_eq!(rig.read(&areas.error), None);
}

#[test]
fn a_disk_that_is_removed_while_it_is_being_opened_is_gone_at_once() {
    log::keep();
    let rig = Rig::start();
    let guest = rig.guest(77);
    let leases: Vec<_> =
        (0..3).map(|number| hung_file(&rig, &format!("hung-{number}.img"))).collect();
    let areas: Vec<_> = (0..)
        .zip(&leases)
        .map(|(number, (_, target))| rig.toolstack_disk(77, xvd(number).0, target))
        .collect();
    until("they are being opened", || rig.list().len() == 3);
    rig.toolstack_removes(&areas[0], false);
    rig.wait_state(&areas[0].backend, 6);
    rig.toolstack_removes(&areas[1], true);
    rig.wait_state(&areas[1].backend, 6);
    rig.dom0.rm(&areas[2].backend).unwrap();
    until("all are forgotten", || rig.list().is_empty());
    assert_eq!(rig.read(&areas[2].backend), None, "it is not brought back");
    assert_eq!(opens_given_up("vbd/77/"), 0, "nobody waited for the opens");

    // Another disk at the same place, while the first open still hangs.
    rig.dom0.rm(&areas[0].backend).unwrap();
    rig.dom0.rm(&areas[0].frontend).unwrap();
    let again = rig.toolstack_disk(77, xvd(0).0, "null:1G");
    guest.connect(&rig, &again);
    drop(leases);
    rig.list();
    assert_eq!(rig.node(&again.backend, "sectors").as_deref(), Some("2097152"));
}

#[test]
fn an_attach_whose_storage_hangs_fails_with_a_reason_and_leaves_nothing() {
    let rig = Rig::start();
    rig.guest(5);
    let (lease, target) = hung_file(&rig, "hung.img");
    let refusal = rig.attach(5, "xvda", &target).unwrap_err();
    assert!(refusal.contains("within 8 s") && refusal.contains("hung.img"), "{refusal}");
    let areas = Areas::new(5, XVDA);
    assert_eq!((rig.read(&areas.backend), rig.read(&areas.frontend)), (None, None));
    drop(lease);
    assert_eq!(rig.list(), []);
    rig.attach(5, "xvda", "null:1G").unwrap();
}

#[test]
fn an_attach_goes_on_when_its_storage_answers_and_only_one_of_two_gets_the_place() {
    let rig = Rig::start();
    rig.guest(5);
    let (lease, target) = hung_file(&rig, "slow.img");
    let vdev = "xvda".into();
    let attach = Attach { domid: 5, vdev, target, ..Attach::default() };
    let slow = rig.ask_meanwhile(Request::Attach(attach));
    rig.attach(5, "xvda", "null:1G").unwrap();
    drop(lease);
    let refusal = slow.join().unwrap().unwrap_err().to_string();
    assert!(refusal.contains("already has a disk xvda"), "{refusal}");
    assert_eq!(rig.list()[0].target, "null:1G");
}

#[test]
fn an_image_is_opened_once_and_closed_when_it_is_no_longer_used() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    let path = rig.folder().join("disk.iso");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let target = format!("raw:{}", path.display());
    // Once for I/O, once for the locks (kept from the first open), and on tmpfs once for the mapping.
    let is_open = |what: &str| {
        let count = open_files_of(&path);
        assert!((1..=3).contains(&count), "{what}: {count}");
    };
    rig.attach_cdrom(5, "xvda", &target).unwrap();
    is_open("attached");
    guest.connect(&rig, &Areas::new(5, XVDA));
    for _ in 0..5 {
        rig.insert(5, "xvda", &target).unwrap();
    }
    until("earlier media are closed", || open_files_of(&path) <= 3);
    rig.eject(5, "xvda").unwrap();
    until("it is closed", || open_files_of(&path) == 0);
    rig.insert(5, "xvda", &target).unwrap();
    is_open("inserted");
    rig.detach(5, "xvda", true).unwrap();
    until("it is closed", || open_files_of(&path) == 0);
}

#[test]
fn a_medium_that_hangs_leaves_the_guest_the_one_in_the_drive() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    rig.attach_cdrom(5, "xvda", "null:1G").unwrap();
    let areas = Areas::new(5, XVDA);
    guest.connect(&rig, &areas);
    let (lease, target) = hung_file(&rig, "hung.iso");
    let refusal = rig.insert(5, "xvda", &target).unwrap_err();
    assert!(refusal.contains("within 8 s"), "{refusal}");
    assert_eq!(rig.node(&areas.backend, "sectors").as_deref(), Some("2097152"));
    assert!(rig.plane().media.is_empty());

    // A toolstack that asks for it gets an empty drive and the reason, and then another medium.
    rig.toolstack_sets_medium(&areas, &target);
    until("the drive is empty", || rig.plane().media == [0]);
    until("the reason is reported", || rig.read(&areas.error).is_some());
    rig.toolstack_sets_medium(&areas, "null:2G");
    until("another is in", || rig.plane().media == [0, 2 << 30]);
    drop(lease);
    rig.list();
    assert_eq!(rig.list()[0].target, "null:2G");
}

#[test]
fn a_target_named_while_the_first_one_hangs_is_opened_when_that_fails() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    let (lease, target) = hung_file(&rig, "hung.iso");
    let nodes = [("params", target.as_str()), ("device-type", "cdrom"), ("removable", "1")];
    let areas = rig.toolstack_disk_with(5, XVDA, &nodes);
    until("it is being opened", || rig.list().len() == 1);
    rig.toolstack_sets_medium(&areas, "null:2G");
    guest.connect(&rig, &areas);
    assert_eq!(rig.node(&areas.backend, "sectors").as_deref(), Some("4194304"));
    assert_eq!((rig.list()[0].target.as_str(), rig.read(&areas.error)), ("null:2G", None));
    drop(lease);
}

#[test]
fn media_inserted_while_the_first_one_hangs_are_not_lost() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    rig.attach_cdrom(5, "xvda", "").unwrap();
    let areas = Areas::new(5, XVDA);
    guest.connect(&rig, &areas);
    let (lease, target) = hung_file(&rig, "hung.iso");
    let insert = Insert { domid: 5, vdev: "xvda".into(), target };
    let inserting = rig.ask_meanwhile(Request::Insert(insert));
    rig.insert(5, "xvda", "null:1G").unwrap();
    drop(lease);
    let first = inserting.join().unwrap();
    // The last one to arrive is in the drive; none is lost on the way.
    let target = rig.list()[0].target.clone();
    assert!(first.is_ok() && (target == "null:1G" || target.contains("hung.iso")), "{target}");
}

#[test]
fn the_daemon_ends_although_an_open_hangs() {
    log::keep();
    let mut rig = Rig::start();
    rig.guest(78);
    let (lease, target) = hung_file(&rig, "hung.img");
    let areas = rig.toolstack_disk(78, XVDA, &target);
    until("it is being opened", || rig.list().len() == 1);
    rig.ring_stop();
    assert_eq!(rig.join(), Ended::Drained);
    assert_eq!(opens_given_up("vbd/78/"), 0, "nobody waited for the open");
    assert_eq!(rig.read(&areas.error), None);
    drop(lease);
}

#[test]
fn the_error_of_a_disk_that_is_gone_is_not_taken_for_that_of_the_next_one() {
    let rig = Rig::start();
    rig.guest(5);
    let failing = rig.toolstack_disk(5, XVDA, "raw:/no/such");
    until("the reason is reported", || rig.read(&failing.error).is_some());
    rig.dom0.rm(&failing.backend).unwrap();
    until("it is forgotten", || rig.list().is_empty());
    let next = rig.toolstack_disk(5, XVDA, "null:1G");
    rig.wait_state(&next.backend, 2);
    assert_eq!(rig.read(&next.error), None);
}

#[test]
fn at_its_end_control_waits_for_storage_to_close_until_the_admin_asks_again() {
    let mut rig = Rig::start();
    rig.guest(5);
    let path = rig.folder().join("disk.img");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    rig.attach(5, "xvda", &format!("raw:{}", path.display())).unwrap();
    // These opens take all the helpers that a folder may have, so the disk's close has to wait.
    let hung: Vec<_> = (1..=HELPERS_PER_FOLDER)
        .map(|number| {
            let (lease, target) = hung_file(&rig, &format!("hung-{number}.img"));
            rig.toolstack_disk(5, xvd(u32::try_from(number).unwrap()).0, &target);
            lease
        })
        .collect();
    until("they are being opened", || rig.list().len() == 1 + HELPERS_PER_FOLDER);
    rig.ring_stop();
    until("the disks are gone", || rig.list().is_empty());
    assert_eq!(rig.list(), [], "control still answers");
    assert!(open_files_of(&path) > 0, "it is not closed");
    rig.ring_stop();
    assert_eq!(rig.join(), Ended::GaveUp);
    drop(hung);
}

#[test]
fn warnings_about_storage_appear_in_log_and_list() {
    log::keep();
    let rig = Rig::start();
    rig.guest(76);
    let path = rig.folder().join("odd.img");
    File::create(&path).unwrap().set_len((1 << 20) + 7).unwrap();
    rig.attach(76, "xvda", &format!("raw:{}", path.display())).unwrap();
    let warnings = rig.list()[0].warnings.clone();
    assert!(warnings.len() == 1 && warnings[0].contains("last 7 bytes"), "{warnings:?}");
    assert_eq!(log::lines(&["vbd/76/", "odd.img", "last 7 bytes"]).len(), 1);
    assert_eq!(rig.list()[0].failure, "");
}

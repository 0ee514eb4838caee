//! Drives: empty ones, and media that come and go.

use polldisk::blkif::features::Offer;
use polldisk::control::Config;
use polldisk::control::admin::protocol::{Eject, Insert, Request};

use super::XVDA;
use crate::log;
use crate::rig::{Areas, Guest, Rig, until, xvd};

const CDROM: [(&str, &str); 3] = [("device-type", "cdrom"), ("removable", "1"), ("mode", "r")];

/// A CD-ROM drive of the toolstack's, with a frontend connected to it.
fn connected_drive(rig: &Rig, domid: u32, params: &str) -> (Guest, Areas) {
    let guest = rig.guest(domid);
    let areas = drive(rig, domid, Some(params));
    guest.connect(rig, &areas);
    (guest, areas)
}

fn drive(rig: &Rig, domid: u32, params: Option<&str>) -> Areas {
    let params = params.map(|params| ("params", params));
    let nodes: Vec<_> = CDROM.into_iter().chain(params).collect();
    rig.toolstack_disk_with(domid, XVDA, &nodes)
}

fn sectors(rig: &Rig, areas: &Areas) -> u64 {
    rig.node(&areas.backend, "sectors").unwrap().parse().unwrap()
}

fn wait_sectors(rig: &Rig, areas: &Areas, wanted: u64) {
    let wanted = wanted.to_string();
    let so = || rig.node(&areas.backend, "sectors").as_ref() == Some(&wanted);
    until(&format!("sectors is {wanted}"), so);
}

#[test]
fn an_empty_drive_connects_and_has_no_sectors() {
    let rig = Rig::start();
    // As libxl writes one for a block device, for a file, and without naming any contents.
    for (domid, params) in [(5, Some("")), (6, Some("aio:")), (7, None)] {
        let guest = rig.guest(domid);
        let areas = drive(&rig, domid, params);
        rig.wait_state(&areas.backend, 2);
        assert_eq!(guest.read(&areas.backend, "sector-size").as_deref(), Some("512"));
        assert_eq!(guest.read(&areas.backend, "feature-persistent").as_deref(), Some("1"));
        guest.connect(&rig, &areas);
        assert_eq!(sectors(&rig, &areas), 0);
        assert_eq!(rig.node(&areas.backend, "info").as_deref(), Some("7"));
        assert_eq!((rig.read(&areas.error), rig.served(domid)), (None, 1));
    }
    let disk = &rig.list()[0];
    assert_eq!((disk.backing.as_str(), disk.sectors, disk.failure.as_str()), ("empty", 0, ""));
    assert!(disk.drive && disk.read_only);
}

#[test]
fn a_fixed_disk_without_contents_is_refused() {
    let rig = Rig::start();
    rig.guest(5);
    let areas = rig.toolstack_disk_with(5, XVDA, &[("params", "aio:")]);
    rig.wait_state(&areas.backend, 6);
    let error = rig.read(&areas.error).unwrap();
    assert!(error.contains("names nothing") && error.contains("cdrom"), "{error}");
    let areas = rig.toolstack_disk_with(5, xvd(1).0, &[]);
    rig.wait_state(&areas.backend, 6);
    assert!(rig.read(&areas.error).unwrap().contains("params is missing"));
}

#[test]
fn a_medium_comes_and_goes_as_libxl_changes_it() {
    let rig = Rig::start();
    let (guest, areas) = connected_drive(&rig, 5, "");
    for round in 1..4 {
        rig.toolstack_sets_medium(&areas, "");
        rig.toolstack_sets_medium(&areas, &format!("aio:null:{round}G"));
        wait_sectors(&rig, &areas, round << 21);
        assert_eq!(rig.state(&areas.backend), Some(4));
        rig.toolstack_sets_medium(&areas, "");
        wait_sectors(&rig, &areas, 0);
    }
    assert_eq!(rig.plane().media, [1 << 30, 0, 2 << 30, 0, 3 << 30, 0]);
    assert_eq!(rig.plane().connects, 1, "the ring runs on");
    guest.close(&rig, &areas);
    rig.toolstack_sets_medium(&areas, "null:1G");
    guest.set_state(&areas, 1);
    guest.connect(&rig, &areas);
    assert_eq!(sectors(&rig, &areas), 2 << 20);
}

#[test]
fn the_state_is_written_again_with_the_size_so_that_the_frontend_looks() {
    use polldisk::xen::Store;
    let rig = Rig::start();
    let (guest, areas) = connected_drive(&rig, 5, "");
    guest.store.watch(&format!("{}/state", areas.backend), "it").unwrap();
    let next = || {
        let mut found = None;
        until("an event comes", || {
            found = guest.store.next_event().unwrap();
            found.is_some()
        });
    };
    next();
    for sectors in ["2097152", "0", "4194304"] {
        let target = match sectors {
            "0" => String::new(),
            sectors => format!("null:{}", sectors.parse::<u64>().unwrap() * 512),
        };
        rig.toolstack_sets_medium(&areas, &target);
        next();
        assert_eq!(guest.read(&areas.backend, "sectors").as_deref(), Some(sectors));
    }
}

#[test]
fn replacing_a_medium_ejects_the_old_one_first() {
    let rig = Rig::start();
    let (_guest, areas) = connected_drive(&rig, 5, "null:1G");
    rig.toolstack_sets_medium(&areas, "null:2G");
    wait_sectors(&rig, &areas, 4 << 20);
    assert_eq!(rig.plane().media, [0, 2 << 30]);
}

#[test]
fn every_write_of_params_counts_even_of_the_same_name() {
    let rig = Rig::start();
    let image = rig.folder().join("medium.iso");
    let target = format!("raw:{}", image.display());
    let make = |mib: u64| {
        // A new file renamed to the old name, as a build does it.
        let next = rig.folder().join("next.iso");
        std::fs::File::create(&next).unwrap().set_len(mib << 20).unwrap();
        std::fs::rename(next, &image).unwrap();
    };
    make(1);
    let (_guest, areas) = connected_drive(&rig, 5, &target);
    for mib in 2..42 {
        // Two transactions without a wait in between: control often sees them as one.
        rig.toolstack_sets_medium(&areas, "");
        make(mib);
        rig.toolstack_sets_medium(&areas, &format!("aio:{}", image.display()));
        wait_sectors(&rig, &areas, mib << 11);
    }
}

#[test]
fn params_written_for_the_admin_are_not_taken_for_another_change() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    rig.attach_cdrom(5, "xvda", "null:1G").unwrap();
    guest.connect(&rig, &Areas::new(5, XVDA));
    rig.insert(5, "xvda", "null:2G").unwrap();
    rig.list();
    rig.list();
    assert_eq!(rig.plane().media, [0, 2 << 30]);
}

#[test]
fn a_medium_is_announced_only_when_every_queue_has_it() {
    let offer = Offer { queues: 2, ..Offer::default() };
    let rig = Rig::with(Config { offer, ..Config::default() });
    let guest = rig.guest(5);
    let areas = drive(&rig, 5, Some("null:1G"));
    rig.wait_state(&areas.backend, 2);
    guest.set(&areas, "multi-queue-num-queues", "2");
    for queue in 0..2 {
        for (node, value) in [("ring-ref", 8), ("event-channel", queue)] {
            guest.set(&areas, &format!("queue-{queue}/{node}"), &value.to_string());
        }
    }
    guest.set_state(&areas, 3);
    rig.wait_state(&areas.backend, 4);
    guest.set_state(&areas, 4);

    rig.plane().hold = true;
    rig.toolstack_sets_medium(&areas, "null:2G");
    until("both queues are asked", || rig.plane().media == [0, 0]);
    rig.list();
    assert_eq!(sectors(&rig, &areas), 2 << 20, "the old medium may still be read");
    rig.release();
    wait_sectors(&rig, &areas, 4 << 20);
    assert_eq!(rig.plane().media, [0, 0, 2 << 30, 2 << 30]);
}

#[test]
fn an_unusable_medium_leaves_the_drive_empty_and_is_reported() {
    let rig = Rig::start();
    let (_other, other) = connected_drive(&rig, 6, "null:1G");
    let (_guest, areas) = connected_drive(&rig, 5, "null:1G");
    rig.toolstack_sets_medium(&areas, "aio:/nowhere/at/all.iso");
    wait_sectors(&rig, &areas, 0);
    until("the error is reported", || rig.read(&areas.error).is_some());
    let error = rig.read(&areas.error).unwrap();
    assert!(error.starts_with("2 ") && error.contains("/nowhere/at/all.iso"), "{error}");
    assert!(rig.list()[0].failure.contains("create it or correct the path"));
    assert_eq!((rig.state(&areas.backend), rig.served(5)), (Some(4), 1), "the drive is there");
    assert_eq!(sectors(&rig, &other), 2 << 20);

    rig.toolstack_sets_medium(&areas, "null:2G");
    wait_sectors(&rig, &areas, 4 << 20);
    until("the error is cleared", || rig.read(&areas.error).is_none());
    assert_eq!(rig.list()[0].failure, "");

    rig.toolstack_sets_medium(&areas, "vhd:/nowhere");
    until("the error is reported", || rig.read(&areas.error).is_some());
    rig.toolstack_sets_medium(&areas, "");
    until("nothing is wanted, so nothing is wrong", || rig.read(&areas.error).is_none());
    assert_eq!(rig.list()[0].failure, "");
}

#[test]
fn a_medium_can_change_at_any_time_of_a_connection() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    let areas = drive(&rig, 5, Some(""));
    rig.wait_state(&areas.backend, 2);
    rig.toolstack_sets_medium(&areas, "null:1G");
    until("it is in", || rig.list()[0].backing == "null");
    rig.plane().hold = true;
    guest.publish(&areas, 8);
    until("the worker is asked", || rig.plane().connects == 1);
    rig.toolstack_sets_medium(&areas, "null:2G");
    until("the queue is asked to switch", || rig.plane().media == [0]);
    rig.release();
    wait_sectors(&rig, &areas, 4 << 20);
    guest.set_state(&areas, 4);

    // The guest closes while the medium is being changed.
    rig.plane().hold = true;
    rig.toolstack_sets_medium(&areas, "null:3G");
    until("the queue is asked to switch", || rig.plane().media.len() == 3);
    guest.set_state(&areas, 6);
    rig.wait_state(&areas.backend, 6);
    rig.release();
    until("it is in", || rig.list()[0].sectors == 6 << 20);
    guest.set_state(&areas, 1);
    guest.connect(&rig, &areas);
    assert_eq!(sectors(&rig, &areas), 6 << 20);
}

#[test]
fn the_contents_of_a_fixed_disk_are_not_changed_under_its_guest() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    let areas = rig.toolstack_disk(5, XVDA, "null:1G");
    guest.connect(&rig, &areas);
    rig.toolstack_sets_medium(&areas, "null:2G");
    until("it is reported", || !rig.list()[0].failure.is_empty());
    let failure = &rig.list()[0].failure;
    assert!(failure.contains("null:2G") && failure.contains("detach the disk"), "{failure}");
    assert!(rig.plane().media.is_empty());
    assert_eq!((sectors(&rig, &areas), rig.read(&areas.error)), (2 << 20, None));
    rig.toolstack_sets_medium(&areas, "null:1G");
    until("nothing is wrong any more", || rig.list()[0].failure.is_empty());
}

#[test]
fn the_admin_inserts_and_ejects() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    rig.attach_cdrom(5, "xvda", "").unwrap();
    let areas = Areas::new(5, XVDA);
    assert_eq!(rig.node(&areas.frontend, "device-type").as_deref(), Some("cdrom"));
    assert_eq!(rig.node(&areas.backend, "removable").as_deref(), Some("1"));
    guest.connect(&rig, &areas);
    assert_eq!(rig.node(&areas.backend, "info").as_deref(), Some("7"));
    rig.insert(5, "xvda", "null:1G").unwrap();
    assert_eq!(sectors(&rig, &areas), 2 << 20, "the medium is in before the admin gets an answer");
    assert_eq!(rig.node(&areas.backend, "params").as_deref(), Some("null:1G"));
    // The same name once more: the file behind it may be a new one.
    rig.insert(5, "xvda", "null:1G").unwrap();
    assert_eq!(rig.plane().media, [1 << 30, 0, 1 << 30]);

    let refusal = rig.insert(5, "xvda", "raw:/nowhere.iso").unwrap_err();
    assert!(refusal.contains("/nowhere.iso") && refusal.contains("does not exist"), "{refusal}");
    assert_eq!(sectors(&rig, &areas), 2 << 20, "the medium stays in");
    rig.eject(5, "xvda").unwrap();
    rig.eject(5, "xvda").unwrap();
    assert_eq!(sectors(&rig, &areas), 0);

    rig.attach(5, "xvdb", "null:1G").unwrap();
    for refusal in [rig.insert(5, "xvdb", "null:2G"), rig.eject(5, "xvdb")] {
        let refusal = refusal.unwrap_err();
        assert!(refusal.contains("not a drive") && refusal.contains("--cdrom"), "{refusal}");
    }
    assert!(rig.eject(5, "xvdc").unwrap_err().contains("no disk xvdc"));
    assert!(rig.attach(5, "xvdc", "").unwrap_err().contains("needs a target"));
}

#[test]
fn an_eject_is_answered_only_when_the_medium_is_out() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    rig.attach_cdrom(5, "xvda", "null:1G").unwrap();
    let areas = Areas::new(5, XVDA);
    guest.connect(&rig, &areas);
    rig.plane().hold = true;
    let ejected = rig.ask_meanwhile(Request::Eject(Eject { domid: 5, vdev: "xvda".into() }));
    until("the queue is asked", || rig.plane().media == [0]);
    assert!(!ejected.is_finished());
    rig.release();
    ejected.join().unwrap().unwrap();
    assert_eq!(sectors(&rig, &areas), 0);
}

#[test]
fn a_medium_that_the_toolstack_takes_back_before_it_is_in_is_closed() {
    let rig = Rig::start();
    let (_guest, areas) = connected_drive(&rig, 5, "null:1G");
    rig.guest(6);
    let path = rig.folder().join("disk.iso");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let target = format!("raw:{}", path.display());
    rig.plane().hold = true;
    let insert = Insert { domid: 5, vdev: "xvda".into(), target: target.clone() };
    let inserted = rig.ask_meanwhile(Request::Insert(insert));
    until("the old medium is being ejected", || rig.plane().media == [0]);
    rig.toolstack_sets_medium(&areas, "");
    until("control has seen it", || rig.list()[0].target.is_empty());
    rig.release();
    wait_sectors(&rig, &areas, 0);
    let _ = inserted.join().unwrap();
    let attached = rig.attach(6, "xvda", &target);
    assert!(attached.is_ok(), "{attached:?}");
}

#[test]
fn another_name_in_the_params_of_a_disk_that_is_no_drive_is_told_in_the_log() {
    log::keep();
    let rig = Rig::start();
    rig.guest(77);
    let areas = rig.toolstack_disk(77, XVDA, "null:1G");
    rig.wait_state(&areas.backend, 2);
    rig.toolstack_sets_medium(&areas, "null:77G");
    let words = ["null:77G", "still served"];
    until("it is told", || log::lines(&words).len() == 1);
}

//! The control plane as guests, the toolstack and the admin see it.

#[path = "control/chaos.rs"]
mod chaos;
#[path = "control/drives.rs"]
mod drives;
#[path = "control/endings.rs"]
mod endings;
#[path = "control/lease.rs"]
mod lease;
#[path = "control/log.rs"]
mod log;
#[path = "control/noise.rs"]
mod noise;
#[path = "control/numbers.rs"]
mod numbers;
#[path = "control/opening.rs"]
mod opening;
#[path = "control/rig.rs"]
mod rig;
#[path = "control/shown.rs"]
mod shown;
#[path = "control/stepped.rs"]
mod stepped;

use std::sync::atomic::{AtomicBool, Ordering};

use polldisk::blkif::features::Offer;
use polldisk::control::Config;
use polldisk::control::admin::protocol::{Detach, Request};
use polldisk::msg::{GrantMode, Report, WorkerId};
use polldisk::xen::store::StoreClient;
use polldisk::xen::{NodeAccess, Nodes};
use rig::{Areas, BAD_GRANT, Guest, Rig, domid, owner, reads, until, xvd};
use xenstore_rs::Xs;

const XVDA: u32 = 51712;
const XVDB: u32 = 51728;

fn connected(rig: &Rig, domid: u32) -> (Guest, Areas) {
    let guest = rig.guest(domid);
    let areas = rig.toolstack_disk(domid, XVDA, "null:8G");
    guest.connect(rig, &areas);
    (guest, areas)
}

#[test]
fn a_toolstack_disk_offers_everything_before_init_wait() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    let areas = rig.toolstack_disk(5, XVDA, "null:8G");
    rig.wait_state(&areas.backend, 2);
    for (node, value) in [
        ("feature-persistent", "1"),
        ("feature-flush-cache", "1"),
        ("max-ring-page-order", "4"),
        ("multi-queue-max-queues", "1"),
        ("feature-max-indirect-segments", "256"),
        ("sector-size", "512"),
        ("physical-sector-size", "512"),
        ("hotplug-status", "connected"),
    ] {
        assert_eq!(guest.read(&areas.backend, node).as_deref(), Some(value), "{node}");
    }
    assert_eq!(guest.read(&areas.backend, "sectors"), None);
}

#[test]
fn a_connected_disk_reports_its_size_in_512_byte_sectors() {
    let rig = Rig::start();
    let (guest, areas) = connected(&rig, 5);
    assert_eq!(guest.read(&areas.backend, "sectors").as_deref(), Some("16777216"));
    assert_eq!(guest.read(&areas.backend, "info").as_deref(), Some("0"));
    assert_eq!(rig.served(5), 1);
    assert_eq!(rig.plane().grant_mode, Some(GrantMode::Persistent));
}

#[test]
fn read_only_removable_and_cdrom_are_announced_and_enforced() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    for (index, nodes, info) in [
        (0, &[("mode", "r")][..], "4"),
        (1, &[("removable", "1")], "2"),
        (2, &[("device-type", "cdrom"), ("removable", "1")], "7"),
    ] {
        let nodes = [&[("params", "null:1G")], nodes].concat();
        let areas = rig.toolstack_disk_with(5, xvd(index).0, &nodes);
        guest.connect(&rig, &areas);
        assert_eq!(rig.node(&areas.backend, "info").as_deref(), Some(info));
        assert_eq!(rig.plane().read_only, Some(info != "2"));
    }
}

#[test]
fn a_frontend_reconnects_ten_times() {
    let rig = Rig::start();
    let (guest, areas) = connected(&rig, 5);
    for _ in 0..10 {
        guest.close(&rig, &areas);
        assert_eq!(rig.served(5), 0);
        guest.set_state(&areas, 1);
        guest.connect(&rig, &areas);
        assert_eq!(rig.served(5), 1);
    }
    assert_eq!(rig.plane().connects, 11);
}

#[test]
fn a_removed_disk_is_closed_and_its_area_left_to_the_toolstack() {
    let rig = Rig::start();
    let (guest, areas) = connected(&rig, 5);
    rig.toolstack_removes(&areas, false);
    assert_eq!(rig.served(5), 1, "the guest may still write");
    guest.close(&rig, &areas);
    until("it is forgotten", || rig.list().is_empty());
    assert_eq!(rig.state(&areas.backend), Some(6));
    assert_eq!(rig.served(5), 0);

    // The toolstack makes the same disk once more.
    rig.dom0.rm(&areas.backend).unwrap();
    rig.dom0.rm(&areas.frontend).unwrap();
    let areas = rig.toolstack_disk(5, XVDA, "null:1G");
    guest.connect(&rig, &areas);
}

#[test]
fn a_disk_that_no_guest_took_is_removed_at_once() {
    let rig = Rig::start();
    rig.guest(5);
    let areas = rig.toolstack_disk(5, XVDA, "null:1G");
    rig.wait_state(&areas.backend, 2);
    rig.toolstack_removes(&areas, false);
    rig.wait_state(&areas.backend, 6);
    until("it is forgotten", || rig.list().is_empty());
}

#[test]
fn a_forced_removal_does_not_wait_for_the_guest() {
    let rig = Rig::start();
    let (_guest, areas) = connected(&rig, 5);
    rig.toolstack_removes(&areas, true);
    rig.wait_state(&areas.backend, 6);
    until("it is forgotten", || rig.list().is_empty());
    assert_eq!(rig.served(5), 0);
    assert_eq!(rig.read(&areas.frontend), None, "the guest's area must not come back");
}

#[test]
fn removal_works_in_whatever_order_its_events_come() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    let steps = [("online", "0"), ("state", "5"), ("", "")];
    for (index, order) in
        (0..).zip([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    {
        let areas = rig.toolstack_disk(5, xvd(index).0, "null:1G");
        guest.connect(&rig, &areas);
        for step in order {
            match steps[step] {
                ("", _) => rig.dom0.rm(&areas.frontend).unwrap(),
                (node, value) => {
                    rig.dom0.write(&format!("{}/{node}", areas.backend), value).unwrap();
                }
            }
            // Control sees each step by itself, or several at once: both must work.
            if index % 2 == 0 {
                rig.list();
            }
        }
        until("it is forgotten", || rig.list().is_empty());
        assert_eq!(rig.state(&areas.backend), Some(6), "{order:?}");
    }
    assert_eq!(rig.served(5), 0);
}

#[test]
fn a_backend_area_that_vanishes_is_forgotten_and_not_brought_back() {
    let rig = Rig::start();
    let (_guest, areas) = connected(&rig, 5);
    rig.dom0.rm("/local/domain/0/backend/vbd/5").unwrap();
    until("it is forgotten", || rig.list().is_empty());
    assert_eq!(rig.served(5), 0);
    assert_eq!(rig.read(&areas.backend), None);
}

#[test]
fn a_frontend_that_publishes_nonsense_gets_an_error_and_others_do_not_notice() {
    let rig = Rig::start();
    let (_other, other_areas) = connected(&rig, 6);
    let guest = rig.guest(5);
    let bad_grant = BAD_GRANT.to_string();
    for (index, nodes, missing, named) in [
        (0, &[("ring-ref", bad_grant.as_str())][..], "", "grant 4294967295"),
        (1, &[("ring-ref", "8")], "event-channel", "no event-channel"),
        (2, &[("ring-ref", "8"), ("ring-page-order", "31")], "", "ring-page-order = \"31\""),
        (3, &[("ring-ref", "8"), ("protocol", "foo")], "", "protocol = \"foo\""),
        (4, &[("ring-ref", "4294967296")], "", "ring-ref = \"4294967296\""),
        (5, &[], "", "no ring-ref"),
    ] {
        let areas = rig.toolstack_disk(5, xvd(index).0, "null:1G");
        rig.wait_state(&areas.backend, 2);
        if missing.is_empty() {
            guest.publish_nodes(&areas, nodes);
        } else {
            guest.set(&areas, "ring-ref", "8");
            guest.set_state(&areas, 3);
        }
        rig.wait_state(&areas.backend, 5);
        let error = rig.read(&areas.error).unwrap();
        assert!(error.starts_with("22 ") && error.contains(named), "{error}");

        // It stays down until the frontend starts over with something better.
        guest.set_state(&areas, 4);
        guest.set_state(&areas, 6);
        rig.wait_state(&areas.backend, 6);
        for node in ["ring-page-order", "ring-ref"] {
            guest.store.rm(&format!("{}/{node}", areas.frontend)).ok();
        }
        guest.set_state(&areas, 1);
        guest.connect(&rig, &areas);
        assert_eq!(rig.read(&areas.error), None, "a disk that works has no error");
    }
    assert_eq!(rig.state(&other_areas.backend), Some(4));
    assert_eq!(rig.served(6), 1);
    assert_eq!(rig.plane().doubles, 0);
}

#[test]
fn a_ring_fault_closes_that_disk_only() {
    let rig = Rig::start();
    let (_other, other) = connected(&rig, 6);
    let (guest, areas) = connected(&rig, 5);
    let key = rig.queue_of(5);
    rig.worker_reports.send(Report::RingFault(key, "req_prod ran away".into()));
    rig.wait_state(&areas.backend, 5);
    assert!(rig.read(&areas.error).unwrap().contains("req_prod ran away"));
    until("it is disconnected", || rig.served(5) == 0);
    guest.close(&rig, &areas);
    guest.set_state(&areas, 1);
    guest.connect(&rig, &areas);

    // Reports about the old connection are stale now.
    rig.worker_reports.send(Report::RingFault(key, "again".into()));
    rig.worker_reports.send(Report::Disconnected(key));
    rig.list();
    assert_eq!(rig.state(&areas.backend), Some(4));
    assert_eq!(rig.state(&other.backend), Some(4));
}

#[test]
fn a_frontend_that_closes_while_it_is_being_connected_is_released() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    let areas = rig.toolstack_disk(5, XVDA, "null:1G");
    rig.wait_state(&areas.backend, 2);
    rig.plane().hold = true;
    guest.publish(&areas, 8);
    until("the worker is asked", || rig.plane().connects == 1);
    guest.set_state(&areas, 6);
    rig.wait_state(&areas.backend, 6);
    rig.release();
    rig.list();
    assert_eq!(rig.state(&areas.backend), Some(6));
    assert_eq!(rig.served(5), 0);
}

#[test]
fn a_frontend_that_starts_over_unseen_is_served_on_its_new_ring() {
    let rig = Rig::start();
    let (guest, areas) = connected(&rig, 5);
    // Closed, Initialising and Initialised again, written faster than anybody looks.
    guest.publish(&areas, 77);
    until("it is connected again", || rig.plane().connects == 2 && rig.served(5) == 1);
    until("it is listed", || rig.list()[0].state == "Connected");
    assert_eq!(rig.plane().disconnects, 1);
}

#[test]
fn a_guest_that_toggles_its_state_leaks_nothing() {
    let rig = Rig::start();
    let (_other, other) = connected(&rig, 6);
    let (guest, areas) = connected(&rig, 5);
    for round in 0..1000 {
        guest.set_state(&areas, [3, 6, 1, 5, 4, 0, 2, 7, 3, 1, 6, 4, 8][round % 13]);
    }
    guest.set_state(&areas, 6);
    rig.wait_state(&areas.backend, 6);
    guest.set_state(&areas, 1);
    guest.connect(&rig, &areas);
    assert_eq!(rig.served(5), 1);
    assert_eq!(rig.plane().doubles, 0);
    assert_eq!(rig.state(&other.backend), Some(4));
    guest.close(&rig, &areas);
    assert_eq!(rig.served(5), 0);
}

#[test]
fn a_frontend_state_that_makes_no_sense_closes_the_disk() {
    let rig = Rig::start();
    let (guest, areas) = connected(&rig, 5);
    for text in ["", "four", "4 4", "99999999999999999999"] {
        guest.set(&areas, "state", text);
        rig.wait_state(&areas.backend, 6);
        guest.set_state(&areas, 1);
        guest.connect(&rig, &areas);
    }
}

#[test]
fn a_target_that_cannot_be_opened_is_reported_and_tried_again() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    let image = rig.folder().join("later.img");
    let areas = rig.toolstack_disk(5, XVDA, image.to_str().unwrap());
    rig.wait_state(&areas.backend, 6);
    let error = rig.read(&areas.error).unwrap();
    assert!(error.starts_with("2 ") && error.contains("does not exist"), "{error}");
    assert!(rig.list()[0].failure.contains("does not exist"));

    rig.dom0.write(&format!("{}/params", areas.backend), "null:1G").unwrap();
    rig.dom0.write(&format!("{}/state", areas.backend), "1").unwrap();
    guest.connect(&rig, &areas);
    assert_eq!(rig.read(&areas.error), None);
}

#[test]
fn an_area_that_points_at_another_domain_is_refused() {
    let rig = Rig::start();
    rig.guest(5);
    for (index, node, value) in [
        (0, "frontend", "/local/domain/6/device/vbd/51712"),
        (1, "frontend", "/local/domain/0/device/../../secret"),
        (2, "frontend-id", "6"),
        (3, "params", ""),
        (4, "params", "qcow2:/srv/disk"),
    ] {
        let areas =
            rig.toolstack_disk_with(5, xvd(index).0, &[("params", "null:1G"), (node, value)]);
        rig.wait_state(&areas.backend, 6);
        assert!(
            rig.read(&areas.error).unwrap().contains(node.split('-').next().unwrap()) || index == 4
        );
    }
    assert_eq!(rig.plane().connects, 0);
}

#[test]
fn a_hotplug_script_is_waited_for_and_ours_reports_a_failure() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    for (disk, script) in [(XVDA, "block"), (xvd(2).0, "block-polldisk")] {
        let connected = rig.plane().connects;
        let script = ("script", format!("/etc/xen/scripts/{script}"));
        let params = ("params", "null:1G");
        let areas = rig.toolstack_disk_with(5, disk, &[params, (script.0, &script.1)]);
        rig.wait_state(&areas.backend, 2);
        assert_eq!(rig.node(&areas.backend, "hotplug-status"), None, "the script writes it");
        guest.publish(&areas, 8);
        rig.list();
        assert_eq!(rig.plane().connects, connected, "the script may find the disk in use");
        rig.dom0.write(&format!("{}/hotplug-status", areas.backend), "connected").unwrap();
        rig.wait_state(&areas.backend, 4);
    }

    let script = ("script", "/etc/xen/scripts/block-polldisk");
    let areas = rig.toolstack_disk_with(5, XVDB, &[("params", "raw:/nowhere"), script]);
    rig.wait_state(&areas.backend, 2);
    assert_eq!(rig.node(&areas.backend, "hotplug-status").as_deref(), Some("error"));
    assert!(rig.node(&areas.backend, "hotplug-error").unwrap().contains("raw:/nowhere"));
    rig.toolstack_removes(&areas, false);
    rig.wait_state(&areas.backend, 6);
}

#[test]
fn areas_that_are_not_disks_are_left_alone() {
    let rig = Rig::start();
    rig.guest(5);
    for path in ["vbd/5/abc/state", "vbd/99999/1/state", "vbd/x/1/state", "vif/5/0/state"] {
        rig.dom0.write(&format!("/local/domain/0/backend/{path}"), "1").unwrap();
    }
    let offline = rig.toolstack_disk_with(5, XVDA, &[("params", "null:1G"), ("online", "0")]);
    let elsewhere = rig.toolstack_disk_with(5, XVDB, &[("params", "null:1G"), ("state", "2")]);
    assert_eq!(rig.list(), []);
    assert_eq!((rig.state(&offline.backend), rig.state(&elsewhere.backend)), (Some(1), Some(2)));
}

#[test]
fn attach_makes_both_areas_as_a_toolstack_would() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    rig.attach(5, "xvdb", "null:1G").unwrap();
    let areas = Areas::new(5, XVDB);
    assert_eq!(rig.state(&areas.backend), Some(2));
    assert_eq!(guest.read(&areas.frontend, "backend"), Some(areas.backend.clone()));
    for (node, value) in
        [("backend-id", "0"), ("state", "1"), ("virtual-device", "51728"), ("device-type", "disk")]
    {
        assert_eq!(guest.read(&areas.frontend, node).as_deref(), Some(value), "{node}");
    }
    let permissions = |path: &str| rig.dom0.permissions(path).unwrap();
    for node in ["", "/state", "/backend", "/virtual-device"] {
        let path = format!("{}{node}", areas.frontend);
        assert_eq!(permissions(&path), [owner(5), reads(0)], "{path}");
    }
    for node in ["", "/state", "/params", "/sector-size", "/frontend"] {
        let path = format!("{}{node}", areas.backend);
        assert_eq!(permissions(&path), [owner(0), reads(5)], "{path}");
    }
    assert!(guest.store.write(&format!("{}/state", areas.backend), "4").is_err());
    guest.connect(&rig, &areas);

    let disks = rig.list();
    assert_eq!(disks.len(), 1);
    let disk = &disks[0];
    assert_eq!((disk.domid, disk.vdev.as_str(), disk.devid), (5, "xvdb", XVDB));
    assert_eq!((disk.state.as_str(), disk.backing.as_str()), ("Connected", "null"));
    assert_eq!((disk.sectors, disk.queues, disk.worker), (2 << 20, 1, Some(0)));
    assert_eq!(disk.latency.iter().map(|(_, count)| count).sum::<u64>(), 1);
}

#[test]
fn detach_takes_both_areas_away_once_the_guest_lets_go() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    rig.attach(5, "xvdb", "null:1G").unwrap();
    let areas = Areas::new(5, XVDB);
    guest.connect(&rig, &areas);
    let detach = Detach { domid: 5, vdev: "xvdb".into(), force: false };
    let detached = rig.ask_meanwhile(Request::Detach(detach));
    rig.wait_state(&areas.backend, 5);
    guest.set_state(&areas, 6);
    detached.join().unwrap().unwrap();
    assert_eq!((rig.read(&areas.backend), rig.read(&areas.frontend)), (None, None));
    assert_eq!(rig.served(5), 0);
}

#[test]
fn detach_by_force_does_not_ask_the_guest() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    rig.attach(5, "xvdb", "null:1G").unwrap();
    let areas = Areas::new(5, XVDB);
    guest.connect(&rig, &areas);
    rig.detach(5, "xvdb", true).unwrap();
    assert_eq!((rig.read(&areas.backend), rig.read(&areas.frontend)), (None, None));
    assert_eq!(rig.list(), []);
    rig.attach(5, "xvdb", "null:1G").unwrap();
}

#[test]
fn detach_of_a_disk_in_use_says_so_and_how_to_force_it() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    rig.attach(5, "xvdb", "null:1G").unwrap();
    guest.connect(&rig, &Areas::new(5, XVDB));
    let refusal = rig.detach(5, "xvdb", false).unwrap_err();
    assert!(refusal.contains("has not let go") && refusal.contains("--force"), "{refusal}");
    assert_eq!(rig.served(5), 1, "the guest goes on");
    let refusal = rig.attach(5, "xvdb", "null:1G").unwrap_err();
    assert!(refusal.contains("has not let go") && refusal.contains("--force"), "{refusal}");
}

#[test]
fn what_the_admin_got_wrong_is_named() {
    let rig = Rig::start();
    rig.guest(5);
    rig.attach(5, "xvdb", "null:1G").unwrap();
    rig.toolstack_disk(5, XVDA, "null:1G");
    for (domid, vdev, target, named) in [
        (5, "xvdb", "null:1G", "already"),
        (5, "xvda", "null:1G", "already"),
        (7, "xvdb", "null:1G", "domain 7 does not exist"),
        (40000, "xvdb", "null:1G", "domid"),
        (5, "vda", "null:1G", "vdev"),
        (5, "xvdc", "null:0", "multiple of 512"),
        (5, "xvdc", "raw:/nowhere/at/all", "does not exist"),
    ] {
        let refusal = rig.attach(domid, vdev, target).unwrap_err();
        assert!(refusal.contains(named), "{refusal}");
    }
    assert!(rig.detach(5, "xvdz", false).unwrap_err().contains("no disk xvdz"));
    assert_eq!(rig.read(&Areas::new(5, xvd(2).0).frontend), None);
}

#[test]
fn the_admin_socket_tolerates_nonsense_and_is_for_its_owner_only() {
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;
    let rig = Rig::start();
    let path = rig.admin_path();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    for line in [&b"\n"[..], b"nonsense\n", b"{\"request\":\"format\"}\n", &[b'x'; 1 << 20]] {
        let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let _ = stream.write_all(line);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer, b"");
    }
    // Two requests at once are answered in turn; an idle crowd holds up nobody for ever.
    let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
    stream.write_all(b"{\"request\":\"list\"}\n{\"request\":\"list\"}\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer.lines().count(), 2);
    let crowd: Vec<_> =
        (0..200).filter_map(|_| std::os::unix::net::UnixStream::connect(&path).ok()).collect();
    drop(crowd);
    until("it answers again", || rig.ask(&Request::List).is_ok());
}

#[test]
fn a_thousand_disks_connect() {
    let rig = Rig::start();
    let mut guests = Vec::new();
    for domid in 1..=50 {
        let guest = rig.guest(domid);
        let areas: Vec<_> =
            (0..20).map(|index| rig.toolstack_disk(domid, xvd(index).0, "null:1G")).collect();
        guests.push((guest, areas));
    }
    for (guest, areas) in &guests {
        for areas in areas {
            rig.wait_state(&areas.backend, 2);
            guest.publish(areas, 8);
        }
    }
    for (guest, areas) in &guests {
        for areas in areas {
            rig.wait_state(&areas.backend, 4);
            guest.set_state(areas, 4);
        }
    }
    let disks = rig.list();
    assert_eq!(disks.len(), 1000);
    let on_first = disks.iter().filter(|disk| disk.worker == Some(0)).count();
    assert_eq!(on_first, 500);
    for (_, areas) in &guests {
        for areas in areas {
            rig.toolstack_removes(areas, true);
        }
    }
    until("all are forgotten", || rig.list().is_empty());
    assert!(rig.plane().serving.is_empty());
}

#[test]
fn at_its_end_control_drains_rings_and_removes_only_its_own_areas() {
    let mut rig = Rig::start();
    let (guest, areas) = connected(&rig, 5);
    rig.attach(5, "xvdb", "null:1G").unwrap();
    let ours = Areas::new(5, XVDB);
    guest.connect(&rig, &ours);
    rig.stop();
    assert!(rig.plane().serving.is_empty());
    assert_eq!((rig.read(&ours.backend), rig.read(&ours.frontend)), (None, None));
    assert_eq!(rig.state(&areas.backend), Some(4), "the next daemon finds the disk as it was");
    assert_eq!(rig.state(&areas.frontend), Some(4));
    assert!(!rig.admin_path().exists());
}

#[test]
fn without_xenstored_rings_run_on_and_are_found_again() {
    let mut rig = Rig::start();
    let (_guest, _areas) = connected(&rig, 5);
    rig.kill_server();
    assert_eq!(rig.list()[0].state, "Connected");
    assert_eq!(rig.served(5), 1);
    rig.restart_server();
    // The store came back empty, so the disk is gone from it.
    until("it is forgotten", || rig.list().is_empty());
    let (_guest, _areas) = connected(&rig, 6);
}

#[test]
fn every_backend_type_that_was_named_is_served() {
    let config = Config { backend_types: vec!["qdisk".into(), "vbd3".into()], ..Config::default() };
    let rig = Rig::with(config);
    let guest = rig.guest(5);
    let ignored = rig.toolstack_disk(5, XVDA, "null:1G");
    rig.attach(5, "xvdb", "null:1G").unwrap();
    let areas =
        Areas { backend: "/local/domain/0/backend/qdisk/5/51728".into(), ..Areas::new(5, XVDB) };
    guest.connect(&rig, &areas);
    assert_eq!(rig.state(&ignored.backend), Some(1));
    assert_eq!(rig.list().len(), 1);
    let none = [NodeAccess::None, NodeAccess::Read];
    let access: Vec<_> =
        rig.dom0.permissions(&areas.backend).unwrap().iter().map(|entry| entry.access).collect();
    assert_eq!(access, none);
}

#[test]
fn a_disk_that_a_dead_daemon_left_can_be_removed() {
    let rig = Rig::start();
    rig.guest(5);
    let areas = rig.toolstack_disk_with(5, XVDA, &[("params", "null:1G"), ("state", "4")]);
    assert_eq!(rig.list(), []);
    rig.toolstack_removes(&areas, true);
    rig.wait_state(&areas.backend, 6);
    until("it is forgotten", || rig.list().is_empty());
}

#[test]
fn a_guest_that_rewrites_its_state_without_end_holds_up_nobody() {
    let rig = Rig::start();
    let (guest, areas) = connected(&rig, 5);
    let (_, stormy) = connected(&rig, 6);
    let storm = rig.server().connect_as(domid(6)).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let store = StoreClient::from_stream(storm).unwrap();
            let node = format!("{}/state", stormy.frontend);
            for state in ["5", "4", "3", "4"].iter().cycle() {
                store.write(&node, state).unwrap();
                if over.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        for _ in 0..10 {
            guest.close(&rig, &areas);
            guest.set_state(&areas, 1);
            guest.connect(&rig, &areas);
        }
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(rig.served(6), 1, "its own ring was never disconnected");
}

#[test]
fn the_queues_of_a_disk_are_spread_over_the_workers_and_fail_together() {
    let offer = Offer { ring_page_order: 1, queues: 4, ..Offer::default() };
    let rig = Rig::with(Config { offer, ..Config::default() });
    let guest = rig.guest(5);
    let areas = rig.toolstack_disk(5, XVDA, "null:1G");
    rig.wait_state(&areas.backend, 2);
    assert_eq!(guest.read(&areas.backend, "multi-queue-max-queues").as_deref(), Some("4"));
    assert_eq!(guest.read(&areas.backend, "max-ring-page-order").as_deref(), Some("1"));
    guest.set(&areas, "multi-queue-num-queues", "4");
    guest.set(&areas, "ring-page-order", "1");
    for queue in 0..4 {
        for (node, value) in [("ring-ref0", 8), ("ring-ref1", 9), ("event-channel", queue)] {
            guest.set(&areas, &format!("queue-{queue}/{node}"), &value.to_string());
        }
    }
    guest.set(&areas, "queue-2/ring-ref1", &BAD_GRANT.to_string());
    guest.set_state(&areas, 3);
    rig.wait_state(&areas.backend, 5);
    until("all queues are let go", || rig.served(5) == 0);
    guest.set(&areas, "queue-2/ring-ref1", "9");
    guest.set_state(&areas, 6);
    rig.wait_state(&areas.backend, 6);
    guest.set_state(&areas, 1);
    rig.wait_state(&areas.backend, 2);
    guest.set_state(&areas, 3);
    rig.wait_state(&areas.backend, 4);
    guest.set_state(&areas, 4);
    let disk = &rig.list()[0];
    assert_eq!((disk.queues, &disk.workers[..]), (4, &[0, 1, 0, 1][..]));
    assert_eq!(disk.latency.iter().map(|(_, count)| count).sum::<u64>(), 4);
    guest.close(&rig, &areas);
    assert_eq!(rig.served(5), 0);
}

#[test]
fn a_worker_that_dies_takes_only_its_own_disks_down() {
    let rig = Rig::start();
    let (guest, areas) = connected(&rig, 5);
    let (_other, other) = connected(&rig, 6);
    rig.worker_reports.send(Report::Stopped(WorkerId(0), "it panicked".into()));
    rig.wait_state(&areas.backend, 5);
    assert!(rig.read(&areas.error).unwrap().contains("worker 0"));
    guest.close(&rig, &areas);
    guest.set_state(&areas, 1);
    guest.connect(&rig, &areas);
    assert_eq!(rig.list()[0].worker, Some(1));
    assert_eq!(rig.state(&other.backend), Some(4));
}

#[test]
fn a_signal_ends_control_as_its_caller_does_unless_it_is_sighup() {
    let mut rig = Rig::with(Config { signals: true, ..Config::default() });
    rig.guest(5);
    rig.attach(5, "xvdb", "null:1G").unwrap();
    let send = |signal, to: &str| {
        let sent = std::process::Command::new("kill").args([signal, to]).status().unwrap();
        assert!(sent.success());
    };
    // To the thread itself, whose wait it interrupts.
    send("-HUP", rig.thread());
    assert_eq!(rig.list().len(), 1);
    send("-TERM", &std::process::id().to_string());
    rig.join();
    assert_eq!(rig.read(&Areas::new(5, XVDB).backend), None);
}

#[test]
fn a_second_daemon_is_told_about_the_first() {
    let rig = Rig::start();
    let refusal = rig.start_another().unwrap_err().to_string();
    assert!(refusal.contains("another polldisk answers"), "{refusal}");
    assert_eq!(rig.list(), [], "the first goes on");
}

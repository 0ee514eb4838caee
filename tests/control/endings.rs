//! Disks that end at an awkward moment: nothing loops, nothing is left, nothing reaches another disk.

use polldisk::control::Ended;
use polldisk::control::admin::protocol::{Detach, Request};
use polldisk::xen::Store;
use xenstore_rs::Xs;

use super::{XVDA, XVDB, connected};
use crate::rig::{Areas, Rig, open_files_of, until, xvd};

/// Control answers, and nothing of the disk is left.
fn is_gone(rig: &Rig, areas: &Areas) {
    assert_eq!((rig.read(&areas.backend), rig.read(&areas.frontend)), (None, None));
    assert_eq!(rig.read(&areas.error), None);
    assert_eq!(rig.list(), []);
}

#[test]
fn a_disk_whose_state_somebody_removed_goes_on_and_ends_in_order() {
    let rig = Rig::start();
    let (guest, areas) = super::connected(&rig, 5);
    rig.dom0.rm(&format!("{}/state", areas.backend)).unwrap();
    until("it is seen", || rig.list().iter().any(|disk| disk.state == "Unknown"));
    guest.close(&rig, &areas);
    rig.toolstack_removes(&areas, false);
    until("it is gone", || rig.list().is_empty());
}

#[test]
fn a_disk_detached_before_its_guest_connects_is_gone_at_once() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    let areas = Areas::new(5, XVDB);
    for (force, frontend) in [
        (false, None),
        (false, Some(1)),
        (false, Some(6)),
        (true, None),
        (true, Some(1)),
        (true, Some(2)),
        (true, Some(5)),
    ] {
        rig.attach(5, "xvdb", "null:1G").unwrap();
        if let Some(state) = frontend {
            guest.set_state(&areas, state);
        }
        rig.detach(5, "xvdb", force).unwrap();
        is_gone(&rig, &areas);
    }
}

#[test]
fn a_disk_detached_after_its_guest_went_back_to_init_wait_is_gone_at_once() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    let areas = Areas::new(5, XVDB);
    for force in [false, true] {
        rig.attach(5, "xvdb", "null:1G").unwrap();
        guest.connect(&rig, &areas);
        guest.close(&rig, &areas);
        guest.set_state(&areas, 1);
        rig.wait_state(&areas.backend, 2);
        rig.detach(5, "xvdb", force).unwrap();
        is_gone(&rig, &areas);
    }
}

#[test]
fn a_disk_detached_while_its_ring_is_being_connected_or_disconnected_is_gone_after_it() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    let areas = Areas::new(5, XVDB);
    for state in [3, 4, 5, 6] {
        rig.attach(5, "xvdb", "null:1G").unwrap();
        rig.wait_state(&areas.backend, 2);
        rig.plane().hold = true;
        let connects = rig.plane().connects;
        guest.publish(&areas, 8);
        until("the worker is asked", || rig.plane().connects > connects);
        guest.set_state(&areas, state);
        let detach = Detach { domid: 5, vdev: "xvdb".into(), force: true };
        let detached = rig.ask_meanwhile(Request::Detach(detach));
        rig.release();
        detached.join().unwrap().unwrap();
        is_gone(&rig, &areas);
    }
}

#[test]
fn an_area_that_is_made_again_at_any_moment_gets_nothing_meant_for_the_old_one() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    for round in 0..200 {
        let areas = rig.toolstack_disk(5, XVDA, "null:1G");
        match round % 4 {
            // At some moment of control's first look at the disk.
            0 => {}
            1 => rig.wait_state(&areas.backend, 2),
            2 => guest.connect(&rig, &areas),
            _ => rig.toolstack_removes(&areas, true),
        }
        rig.toolstack_forgets(&areas).unwrap();
        let areas = rig.toolstack_disk(5, XVDA, "null:2G");
        guest.connect(&rig, &areas);
        assert_eq!(rig.node(&areas.backend, "sectors").as_deref(), Some("4194304"));
        rig.toolstack_removes(&areas, true);
        rig.wait_state(&areas.backend, 6);
        rig.dom0.rm(&areas.backend).unwrap();
    }
    until("all are forgotten", || rig.list().is_empty());
    assert!(rig.ask(&Request::List).is_ok());
    assert_eq!((rig.served(5), rig.plane().doubles), (0, 0));
}

#[test]
fn a_disk_is_not_attached_in_place_of_one_that_still_drains() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    let areas = Areas::new(5, XVDB);
    rig.attach(5, "xvdb", "null:1G").unwrap();
    guest.connect(&rig, &areas);
    rig.plane().hangs = true;
    rig.toolstack_removes(&areas, true);
    until("its ring is being drained", || rig.plane().disconnects == 1);
    let refusal = rig.attach(5, "xvdb", "null:2G").unwrap_err();
    assert!(refusal.contains("still has requests in flight"), "{refusal}");
    assert_eq!(rig.read(&areas.frontend), None, "nothing is left half-made");
    rig.release();
    until("it is gone", || rig.list().is_empty());
    rig.attach(5, "xvdb", "null:2G").unwrap();
    guest.connect(&rig, &areas);

    // The same if all of its areas vanish at once.
    rig.plane().hangs = true;
    rig.dom0.rm(&areas.backend).unwrap();
    until("its ring is being drained", || rig.plane().disconnects == 2);
    let refusal = rig.attach(5, "xvdb", "null:1G").unwrap_err();
    assert!(refusal.contains("still has requests in flight"), "{refusal}");
    rig.release();
    until("it is gone", || rig.list().is_empty());
    assert_eq!(rig.read(&areas.frontend), None, "what attach made for the guest goes with it");
    rig.attach(5, "xvdb", "null:1G").unwrap();
}

#[test]
fn a_detach_that_waits_for_storage_says_so_and_does_not_blame_the_guest() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    rig.attach(5, "xvdb", "null:1G").unwrap();
    guest.connect(&rig, &Areas::new(5, XVDB));
    rig.plane().hangs = true;
    let refusal = rig.detach(5, "xvdb", true).unwrap_err();
    assert!(refusal.contains("storage has not answered"), "{refusal}");
    assert!(!refusal.contains("--force"), "{refusal}");
    rig.release();
    until("it is gone", || rig.list().is_empty());
}

#[test]
fn the_disks_of_a_guest_end_with_it_whatever_its_toolstack_leaves() {
    let rig = Rig::start();
    let (guest, other) = (rig.guest(5), rig.guest(6));
    let image = rig.folder().join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    rig.attach(5, "xvdb", &format!("raw:{}", image.display())).unwrap();
    let attached = Areas::new(5, XVDB);
    guest.connect(&rig, &attached);
    let idle = rig.toolstack_disk(5, xvd(2).0, "null:1G");
    rig.wait_state(&idle.backend, 2);
    let made = rig.toolstack_disk(5, XVDA, "null:1G");
    guest.connect(&rig, &made);
    let others = rig.toolstack_disk(6, XVDA, "null:1G");
    other.connect(&rig, &others);

    rig.server().release(crate::rig::domid(5)).unwrap();
    until("only the other guest's is left", || rig.list().len() == 1);
    assert_eq!((rig.served(5), rig.served(6)), (0, 1));
    assert_eq!((rig.read(&attached.backend), rig.read(&attached.frontend)), (None, None));
    assert_eq!((rig.state(&made.backend), rig.state(&idle.backend)), (Some(6), Some(6)));
    until("its image is closed", || open_files_of(&image) == 0);

    // Another domain with that number, and a toolstack that cleans up late.
    rig.toolstack_removes(&made, true);
    rig.wait_state(&made.backend, 6);
    rig.dom0.rm(&made.backend).unwrap();
    let guest = rig.guest(5);
    let again = rig.toolstack_disk(5, XVDA, "null:1G");
    guest.connect(&rig, &again);
}

#[test]
fn the_end_of_another_domain_ends_no_disk_of_one_that_is_still_being_built() {
    let rig = Rig::start();
    rig.guest(7);
    // Its areas exist before xenstored knows the domain, as while a toolstack builds it.
    rig.dom0.write("/local/domain/5/name", "new").unwrap();
    let areas = rig.toolstack_disk(5, XVDA, "null:1G");
    rig.wait_state(&areas.backend, 2);
    rig.server().release(crate::rig::domid(7)).unwrap();
    rig.list();
    rig.list();
    assert_eq!(rig.state(&areas.backend), Some(2));
    let guest = rig.guest(5);
    guest.connect(&rig, &areas);
    rig.server().release(crate::rig::domid(5)).unwrap();
    until("it is gone", || rig.list().is_empty());
}

#[test]
fn a_domid_that_is_used_again_is_not_taken_for_the_domain_that_had_it_before() {
    let rig = Rig::start();
    rig.guest(7);
    // A domain whose toolstack cleaned up before it ended.
    rig.guest(5);
    let areas = rig.toolstack_disk(5, XVDA, "null:1G");
    rig.wait_state(&areas.backend, 2);
    rig.toolstack_removes(&areas, true);
    rig.wait_state(&areas.backend, 6);
    rig.dom0.rm(&areas.backend).unwrap();
    until("it is forgotten", || rig.list().is_empty());
    rig.server().release(crate::rig::domid(5)).unwrap();
    rig.list();
    // Another domain with its number, which is still being built.
    let areas = rig.toolstack_disk(5, XVDA, "null:1G");
    rig.wait_state(&areas.backend, 2);
    rig.server().release(crate::rig::domid(7)).unwrap();
    rig.list();
    rig.list();
    assert_eq!(rig.state(&areas.backend), Some(2));
    let guest = rig.guest(5);
    guest.connect(&rig, &areas);
}

#[test]
fn a_daemon_with_hung_storage_ends_and_says_what_is_left() {
    crate::log::keep();
    let mut rig = Rig::start();
    let guest = rig.guest(75);
    let areas = rig.toolstack_disk(75, XVDA, "null:1G");
    guest.connect(&rig, &areas);
    rig.plane().hangs = true;
    rig.ring_stop();
    until("its ring is being drained", || rig.plane().disconnects == 1);
    rig.ring_stop();
    assert_eq!(rig.join(), Ended::GaveUp);
    let told = crate::log::lines(&["vbd/75/51712 (xvda)", "null:1G", "not answered by storage"]);
    assert_eq!(told.len(), 1);
    assert!(told[0].contains("31.5 s: a write of 4096 bytes at byte 8192"), "{told:?}");
    assert_eq!(crate::log::lines(&["vbd/75/", "6 more requests"]).len(), 1);
}

#[test]
fn a_daemon_that_ends_in_order_says_so() {
    let mut rig = Rig::start();
    let (_guest, _areas) = super::connected(&rig, 5);
    rig.ring_stop();
    assert_eq!(rig.join(), Ended::Drained);
}

#[test]
fn a_connection_that_has_ended_leaves_its_workers_as_free_as_before() {
    let rig = Rig::start();
    let (guest, areas) = connected(&rig, 5);
    for _ in 0..3 {
        assert_eq!(rig.list()[0].workers, [0], "the first of those without queues");
        guest.close(&rig, &areas);
        guest.set_state(&areas, 1);
        guest.connect(&rig, &areas);
    }
}

#[test]
fn a_frontend_that_says_connected_with_another_ring_is_served_on_that() {
    let rig = Rig::start();
    let (guest, areas) = connected(&rig, 5);
    // As if it had closed and started over while nobody looked.
    let anew = [("ring-ref", "78"), ("state", "4")];
    let written = guest.store.atomically(|span| {
        let mut nodes = anew.iter();
        nodes.try_for_each(|(node, value)| span.write(&format!("{}/{node}", areas.frontend), value))
    });
    written.unwrap();
    until("it is connected again", || rig.plane().connects == 2 && rig.served(5) == 1);
    assert_eq!(rig.plane().disconnects, 1);
}

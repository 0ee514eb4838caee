//! Disks that end at an awkward moment: nothing loops, nothing stays, nothing lands in another disk.

use polldisk::control::admin::client::request;
use polldisk::control::admin::protocol::{Detach, Request};
use polldisk::xen::Store;
use xenstore_rs::Xs;

use crate::rig::{Areas, Rig, until, xvd};

const XVDB: u32 = 51728;

/// Control answers, and nothing of the disk is left.
fn is_gone(rig: &Rig, areas: &Areas) {
    assert_eq!((rig.read(&areas.backend), rig.read(&areas.frontend)), (None, None));
    assert_eq!(rig.read(&areas.error), None);
    assert_eq!(rig.list(), []);
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
        let detached = std::thread::spawn({
            let (path, vdev) = (rig.admin_path(), "xvdb".into());
            move || request(&path, &Request::Detach(Detach { domid: 5, vdev, force: true }))
        });
        rig.release();
        detached.join().unwrap().unwrap();
        is_gone(&rig, &areas);
    }
}

#[test]
fn an_area_that_is_made_anew_at_any_moment_gets_nothing_that_was_meant_for_the_old_one() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    for round in 0..200 {
        let areas = rig.toolstack_disk(5, xvd(0).0, "null:1G");
        match round % 4 {
            // At whatever moment of the first look, or once the disk is there.
            0 => {}
            1 => rig.wait_state(&areas.backend, 2),
            2 => guest.connect(&rig, &areas),
            _ => rig.toolstack_removes(&areas, true),
        }
        rig.dom0
            .atomically(|span| {
                span.rm(&areas.backend)?;
                span.rm(&areas.frontend)
            })
            .unwrap();
        let areas = rig.toolstack_disk(5, xvd(0).0, "null:2G");
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

//! Guests that go without closing, and guests whose state makes no sense.

use polldisk::blkif::op;
use polldisk::sim::blkfront::device::{Device, Options};
use polldisk::sim::blkfront::load::Load;
use polldisk::xen::keys::XenbusState;
use xenstore_rs::Xs;

use crate::rig::{Guest, Neighbour, Rig, VBD, load, run_verified, until};

/// Sends a full ring of writes of the largest size.
fn put_many(device: &mut Device) {
    while device.free_buffer().is_some() {
        let sector = 88 * device.in_flight() as u64;
        device.put(op::WRITE, sector, 11 * 4096);
    }
    device.publish().unwrap();
}

#[test]
fn a_domain_that_dies_with_requests_in_flight_is_released() {
    let rig = Rig::start();
    let neighbour = Neighbour::start(&rig, 9);
    for domid in 1..=6 {
        let Guest { domain, xenbus } = rig.guest_on_file(domid);
        let options = Options { persistent: domid % 2 == 0, ..Options::default() };
        let (mut device, _) = xenbus.connect(&domain, options).unwrap();
        put_many(&mut device);
        drop((device, xenbus, domain));
        until("its disk is gone with it", || rig.disk(domid).is_none());
        neighbour.goes_on();
    }
    // Another guest gets the same domid.
    let guest = rig.guest_on_file(1);
    let mut device = guest.connect(Options::default());
    run_verified(&mut device, load(7, 4096), 100);
    guest.close(device);
    neighbour.finish();
}

#[test]
fn a_frontend_area_removed_under_load_ends_the_connection() {
    let rig = Rig::start();
    let neighbour = Neighbour::start(&rig, 9);
    let guest = rig.guest_on_file(1);
    let mut device = guest.connect(Options::default());
    put_many(&mut device);
    rig.dom0.rm(&format!("/local/domain/1/device/vbd/{VBD}")).unwrap();
    until("everything is unmapped", || guest.domain.mapped_grants() == 0);
    guest.xenbus.wait_for(&[XenbusState::Closed, XenbusState::Unknown]).unwrap();
    rig.detach_by_force(1);
    until("its disk is forgotten", || rig.disk(1).is_none());
    neighbour.finish();
}

/// XSA-349, CVE-2010-3699: a state rewritten in a loop, with any values.
#[test]
fn a_state_rewritten_a_thousand_times_harms_nobody() {
    let rig = Rig::start();
    let neighbour = Neighbour::start(&rig, 9);
    let guest = rig.guest_on_file(1);
    let mut device = guest.connect(Options::default());
    put_many(&mut device);
    let states = ["3", "4", "6", "1", "5", "0", "3", "2", "9", "", "4", "x", "6", "1", "3", "5"];
    for state in states.iter().cycle().take(1000) {
        guest.xenbus.store().write(&guest.xenbus.own("state"), state).unwrap();
    }
    neighbour.goes_on();

    // After that, a guest that behaves gets its disk.
    guest.xenbus.set_state(XenbusState::Closed).unwrap();
    until("everything is unmapped", || guest.domain.mapped_grants() == 0);
    guest.xenbus.wait_for(&[XenbusState::Closed]).unwrap();
    device.close().unwrap();
    guest.xenbus.start_over().unwrap();
    let mut device = guest.connect(Options::default());
    run_verified(&mut device, Load { zeroed: false, ..load(7, 4096) }, 100);
    guest.close(device);
    neighbour.finish();
}

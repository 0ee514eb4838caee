//! What a well-behaved guest gets: its data, and the truth about its disk.

use std::fs;

use polldisk::blkif::op;
use polldisk::msg::Protocol;
use polldisk::sim::blkfront::device::{Device, Options};
use polldisk::sim::blkfront::load::Load;
use polldisk::xen::PageAccess;
use polldisk::xen::keys::XenbusState;
use xenstore_rs::Xs;

use crate::rig::{
    Guest, IMAGE_BYTES, Neighbour, Rig, ask, load, raw, raw_request, run_verified, toolstack_disk,
    whole,
};

#[test]
fn every_protocol_and_grant_policy_keeps_data_at_every_block_size() {
    let rig = Rig::start();
    let guest = rig.guest_on_file(1);
    let mut seed = 0;
    for protocol in [Protocol::X86_64, Protocol::X86_32] {
        for persistent in [true, false] {
            let (mut device, disk) =
                guest.connect_and_look(Options { protocol, persistent, ..Options::default() });
            assert_eq!(disk.sectors.0, IMAGE_BYTES / 512);
            for block_bytes in [512, 4096, 45056] {
                seed += 1;
                // The image holds what the last load left, so a load reads only what it has written.
                let load = Load { zeroed: seed == 1, ..load(seed, block_bytes) };
                let report = run_verified(&mut device, load, 2_000);
                assert!(report.verified > 0 && report.writes > 0 && report.flushes > 0);
            }
            let counts = rig.disk(1).unwrap().counts;
            assert_eq!(counts.errors, 0);
            assert_eq!(counts.grants_copied == 0, persistent, "{counts:?}");
            guest.close(device);
            guest.xenbus.start_over().unwrap();
        }
    }
}

#[test]
fn each_data_path_serves_frontends_that_keep_pages_granted_and_others() {
    const PAGES: usize = 8;
    let rig = Rig::start();
    let cases = [
        ("auto", true, "persistent"),
        ("auto", false, "copy"),
        ("map", true, "persistent"),
        ("map", false, "map"),
        ("copy", true, "copy"),
        ("copy", false, "copy"),
    ];
    for (domid, (option, persistent, in_use)) in (1..).zip(cases) {
        let path = rig.image(&format!("{option}-{persistent}.img"));
        let guest = rig.guest(domid, &format!("raw,data-path={option}:{}", path.display()));
        // This frontend ignores what it is offered, and ends the grants of all pages that both sides
        // did not agree to keep mapped.
        let mut device =
            Device::new(guest.domain.clone(), Options { persistent, ..Options::default() })
                .unwrap();
        guest.xenbus.wait_for(&[XenbusState::InitWait]).unwrap();
        assert_eq!(guest.xenbus.offered().unwrap().persistent, option != "copy");
        guest.xenbus.publish(&device).unwrap();
        guest.xenbus.wait_for(&[XenbusState::Connected]).unwrap();
        guest.xenbus.set_state(XenbusState::Connected).unwrap();
        let mut zeroed = true;
        for block_bytes in [4096, PAGES * 4096, 45056] {
            let before = rig.disk(domid).unwrap().counts.grants_copied;
            run_verified(&mut device, Load { zeroed, ..load(domid.into(), block_bytes) }, 1_000);
            zeroed = false;
            let disk = rig.disk(domid).unwrap();
            let copied = disk.counts.grants_copied > before;
            let is_large = block_bytes >= PAGES * 4096;
            assert_eq!(copied, in_use == "copy" || (in_use == "map" && !is_large), "{disk:?}");
            assert_eq!((disk.data_path.as_str(), disk.counts.errors), (in_use, 0));
            assert_eq!(disk.counts.grants_mapped > 0, in_use == "persistent", "{disk:?}");
        }
        guest.close(device);
        assert_eq!(rig.disk(domid).unwrap().data_path, "");
    }
}

#[test]
fn pages_that_cannot_be_mapped_for_a_request_are_copied() {
    let rig = Rig::start();
    let path = rig.image("map.img");
    let guest = rig.guest(1, &format!("raw,data-path=map:{}", path.display()));
    let mut device = guest.connect(Options { persistent: false, ..Options::default() });
    let pages: Vec<_> = (0..8).map(|_| guest.grant(PageAccess::ReadWrite)).collect();
    let segments: Vec<_> = pages.iter().map(|(_, gref)| whole(*gref)).collect();
    for (page, byte) in pages.iter().zip(1..) {
        guest.domain.page(page.0).copy_from(&[byte; 4096]);
    }
    // GNTST_no_device_space: as when the hypervisor's maptrack is used up.
    guest.domain.fail_maps(pages[5].1, -7);
    assert_eq!(ask(&mut device, &[raw_request(op::WRITE, 0, 0, &segments)]), [0]);
    let copied = rig.disk(1).unwrap().counts.grants_copied;
    assert_eq!((copied, guest.domain.mapped_grants()), (8, 1), "only the ring is mapped");
    guest.domain.heal(pages[5].1);
    pages.iter().for_each(|(page, _)| guest.domain.page(*page).zero());
    assert_eq!(ask(&mut device, &[raw_request(op::READ, 0, 0, &segments)]), [0]);
    assert_eq!(rig.disk(1).unwrap().counts.grants_copied, copied, "mapped this time");
    for (page, byte) in pages.iter().zip(1..) {
        let mut data = [0; 4096];
        guest.domain.page(page.0).copy_to(&mut data);
        assert_eq!(data, [byte; 4096]);
    }
    guest.close(device);
}

#[test]
fn a_disk_without_contents_shows_nothing_of_what_others_wrote() {
    let rig = Rig::start();
    let copied = Options { persistent: false, ..Options::default() };
    let writer = rig.guest_on_file(1);
    let reader = rig.guest(2, "null:4M");
    let mut devices = [writer.connect(copied), reader.connect(copied)];
    // What a page that was full of `before` holds after a request.
    let ask_with = |device: &mut Device, guest: &Guest, operation, before| {
        let (page, gref) = guest.grant(PageAccess::ReadWrite);
        guest.domain.page(page).copy_from(&[before; 4096]);
        assert_eq!(ask(device, &[raw_request(operation, 0, 0, &[whole(gref)])]), [0]);
        let mut after = [1; 4096];
        guest.domain.page(page).copy_to(&mut after);
        after
    };
    // Both use the same bounce memory.
    ask_with(&mut devices[0], &writer, op::WRITE, 0x5e);
    let shown = ask_with(&mut devices[1], &reader, op::READ, 0xee);
    assert!(shown.iter().all(|byte| *byte == 0), "{:#x}", shown[0]);
    let [one, other] = devices;
    writer.close(one);
    reader.close(other);
}

#[test]
fn a_flush_with_data_writes_the_data() {
    let rig = Rig::start();
    let guest = rig.guest_on_file(1);
    for persistent in [true, false] {
        let mut device = guest.connect(Options { persistent, ..Options::default() });
        let (page, gref) = guest.grant(PageAccess::ReadWrite);
        let sector = if persistent { 8 } else { 16 };
        guest.domain.page(page).copy_from(&[0x5a; 4096]);
        let statuses = ask(
            &mut device,
            &[
                raw_request(op::FLUSH_DISKCACHE, 0, sector, &[whole(gref)]),
                raw_request(op::FLUSH_DISKCACHE, 1, 0, &[]),
            ],
        );
        assert_eq!(statuses, [0, 0]);
        guest.domain.page(page).zero();
        assert_eq!(ask(&mut device, &[raw_request(op::READ, 0, sector, &[whole(gref)])]), [0]);
        let mut data = [0; 4096];
        guest.domain.page(page).copy_to(&mut data);
        assert_eq!(data, [0x5a; 4096]);
        guest.close(device);
        guest.xenbus.start_over().unwrap();
    }
}

#[test]
fn a_read_only_disk_is_read_and_never_written() {
    let rig = Rig::start();
    let path = rig.image("read-only.img");
    fs::write(&path, vec![0x77; usize::try_from(IMAGE_BYTES).unwrap()]).unwrap();
    let attached = rig.domain(1);
    rig.attach(1, &raw(&path), true);
    let by_toolstack = rig.domain(2);
    toolstack_disk(&rig.dom0, 2, &[("params", &raw(&path)), ("mode", "r")]);
    // Here only the daemon's own check keeps the guest from succeeding.
    let on_null = rig.domain(3);
    rig.attach(3, "null:4M,read-zeroes", true);
    for (guest, byte) in [(attached, 0x77), (by_toolstack, 0x77), (on_null, 0)] {
        let guest = Guest::of(guest);
        let (mut device, disk) = guest.connect_and_look(Options::default());
        assert!(disk.read_only);
        let (page, gref) = guest.grant(PageAccess::ReadWrite);
        let segments = [whole(gref)];
        let statuses = ask(
            &mut device,
            &[
                raw_request(op::WRITE, 0, 0, &segments),
                raw_request(op::FLUSH_DISKCACHE, 1, 8, &segments),
                raw_request(op::FLUSH_DISKCACHE, 2, 0, &[]),
                raw_request(op::READ, 3, 0, &segments),
            ],
        );
        assert_eq!(statuses, [-1, -1, 0, 0]);
        let mut data = [0; 4096];
        guest.domain.page(page).copy_to(&mut data);
        assert_eq!(data, [byte; 4096]);
        guest.close(device);
    }
    assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 0x77));
}

#[test]
fn everything_a_frontend_reads_is_there_when_it_may_read_it() {
    let rig = Rig::start();
    let neighbour = Neighbour::start(&rig, 100);
    for domid in 1..=20 {
        let guest = rig.guest_on_file(domid);
        let there = |node: &str| guest.xenbus.store().read(&guest.xenbus.theirs(node)).unwrap();
        guest.xenbus.wait_for(&[XenbusState::InitWait]).unwrap();
        assert_eq!(&*there("feature-persistent"), "1");
        assert_eq!(&*there("feature-flush-cache"), "1");
        for node in ["sector-size", "physical-sector-size"] {
            assert!(there(node).parse::<u32>().unwrap().is_power_of_two(), "{node}");
        }
        let device = Device::new(guest.domain.clone(), Options::default()).unwrap();
        guest.xenbus.publish(&device).unwrap();
        guest.xenbus.wait_for(&[XenbusState::Connected]).unwrap();
        assert_eq!(&*there("sectors"), (IMAGE_BYTES / 512).to_string());
        assert_eq!(&*there("info"), "0");
        guest.xenbus.set_state(XenbusState::Connected).unwrap();
        guest.close(device);
    }
    neighbour.finish();
}

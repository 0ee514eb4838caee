//! Frontends that break the ring itself, rewrite it while it is read, or send notifications without end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use polldisk::blkif::op;
use polldisk::msg::Protocol;
use polldisk::sim::blkfront::device::{Device, Options};
use polldisk::sim::blkfront::load::Load;
use polldisk::sim::{Domain, Gfn};
use polldisk::units::GrantRef;
use polldisk::xen::PageAccess;
use polldisk::xen::keys::XenbusState;

use crate::rig::{
    HANG, Neighbour, Rig, ask, load, raw_request, run_verified, until, wait_response, whole,
};

/// Where a ring's entries begin.
const ENTRIES: usize = 64;

#[test]
fn an_impossible_req_prod_closes_the_disk_with_a_reason_and_disturbs_nobody() {
    let rig = Rig::start();
    let neighbour = Neighbour::start(&rig, 9);
    let guest = rig.guest_on_file(1);
    for ahead in [1 << 31, 33, u32::MAX] {
        let mut device = guest.connect(Options::default());
        run_verified(&mut device, Load { zeroed: false, ..load(7, 4096) }, 100);
        let rsp_prod = guest.domain.shared_pages(device.ring_page(), 1).load::<u32, 1>(8)[0];
        device.ring_mut().forge_req_prod(rsp_prod.wrapping_add(ahead));
        device.notify().unwrap();
        guest.xenbus.wait_for(&[XenbusState::Closing]).unwrap();
        let error = rig.error_of(1).unwrap();
        assert!(error.contains("req_prod"), "{error}");
        until("the ring is unmapped", || guest.domain.mapped_grants() == 0);
        device.close().unwrap();
        guest.start_over();
    }
    let mut device = guest.connect(Options::default());
    assert_eq!(rig.error_of(1), None);
    run_verified(&mut device, Load { zeroed: false, ..load(8, 4096) }, 100);
    guest.close(device);
    neighbour.finish();
}

#[test]
fn a_ring_that_is_full_of_nonsense_from_the_start_is_refused() {
    let rig = Rig::start();
    let guest = rig.guest_on_file(1);
    guest.xenbus.wait_for(&[XenbusState::InitWait]).unwrap();
    let mut device = Device::new(guest.domain.clone(), Options::default()).unwrap();
    device.ring_mut().forge_req_prod(1 << 31);
    guest.xenbus.publish(&device).unwrap();
    guest.xenbus.wait_for(&[XenbusState::Closing]).unwrap();
    assert!(rig.error_of(1).unwrap().contains("req_prod"));
    until("the ring is unmapped", || guest.domain.mapped_grants() == 0);
}

/// XSA-155: the backend uses what it has checked, however fast the guest changes the ring.
#[test]
fn a_ring_rewritten_while_it_is_read_harms_nobody_else() {
    for protocol in [Protocol::X86_64, Protocol::X86_32] {
        let rig = Rig::start();
        let neighbour = Neighbour::start(&rig, 9);
        let guest = rig.guest_on_file(1);
        let (_, gref) = guest.grant(PageAccess::ReadWrite);
        // The rewriter's small numbers must not name the ring's own page: a read into that page would
        // destroy the ring, and the guest would wait for ever.
        guest.domain.reserve_refs(20_000).unwrap();
        let mut device = guest.connect(Options { protocol, ..Options::default() });
        let stop = Arc::new(AtomicBool::new(false));
        let (domain, page) = (Arc::clone(&guest.domain), device.ring_page());
        let rewriter = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || rewrite(&domain, page, protocol, &stop)
        });
        for _ in 0..300 {
            for id in 0..device.ring_mut().free() {
                device.put_raw(raw_request(op::READ, id.into(), 0, &[whole(gref)]));
            }
            device.publish().unwrap();
            // Ids are rewritten too, so answers are only counted.
            while device.ring_mut().in_flight() > 0 {
                wait_response(&mut device);
            }
        }
        stop.store(true, Ordering::Relaxed);
        rewriter.join().unwrap();
        neighbour.goes_on();
        guest.close(device);
        neighbour.finish();
    }
}

/// Rewrites operation, count of segments, sector and segments of all entries over and over, with valid
/// and invalid values.
fn rewrite(domain: &Domain, page: Gfn, protocol: Protocol, stop: &AtomicBool) {
    let ring = domain.shared_pages(page, 1);
    let mut value = 1u32;
    while !stop.load(Ordering::Relaxed) {
        for entry in 0..32 {
            let at = ENTRIES + entry * protocol.entry_bytes();
            value ^= value << 13;
            value ^= value >> 17;
            value ^= value << 5;
            let operation = value & 3;
            let segments = (value >> 2) & 0xff;
            ring.store(at, &[operation | segments << 8]);
            for word in (12..protocol.entry_bytes()).step_by(4) {
                // Mostly small numbers: those pass the checks more often.
                ring.store(at + word, &[value >> (word % 32)]);
            }
        }
    }
}

#[test]
fn a_storm_of_notifications_holds_up_nobody() {
    let rig = Rig::start();
    let neighbour = Neighbour::start(&rig, 9);
    let guest = rig.guest_on_file(1);
    let mut device = guest.connect(Options::default());
    run_verified(&mut device, load(7, 4096), 100);
    let goal = neighbour.requests() + 2_000;
    let start = Instant::now();
    while neighbour.requests() < goal {
        assert!(start.elapsed() < HANG, "the storm holds the neighbour up");
        device.notify().unwrap();
    }
    run_verified(&mut device, Load { zeroed: false, ..load(8, 4096) }, 100);
    guest.close(device);
    neighbour.finish();
}

/// XSA-216: an answer reveals nothing of the entry's former contents or of the backend's memory.
#[test]
fn an_answer_leaves_no_byte_of_its_padding_unwritten() {
    let rig = Rig::start();
    let guest = rig.guest_on_file(1);
    for protocol in [Protocol::X86_64, Protocol::X86_32] {
        let mut device = guest.connect(Options { protocol, ..Options::default() });
        let (_, gref) = guest.grant(PageAccess::ReadWrite);
        let unknown = 0x7f;
        for (entry, operation) in [op::READ, op::FLUSH_DISKCACHE, unknown].into_iter().enumerate() {
            let count = usize::from(operation == op::READ);
            let mut request = raw_request(operation, u64::MAX, 0, &[whole(gref)][..count]);
            request.handle = u16::MAX;
            device.put_raw(request);
            device.publish().unwrap();
            wait_response(&mut device);
            let ring = guest.domain.shared_pages(device.ring_page(), 1);
            let at = ENTRIES + entry * protocol.entry_bytes();
            let status = if operation == unknown { 0xfffe_0000 } else { 0 };
            let tail = status | u32::from(operation);
            match protocol {
                Protocol::X86_64 => {
                    assert_eq!(ring.load::<u32, 4>(at), [u32::MAX, u32::MAX, tail, 0])
                }
                Protocol::X86_32 => assert_eq!(ring.load::<u32, 3>(at), [u32::MAX, u32::MAX, tail]),
            }
        }
        guest.close(device);
        guest.xenbus.start_over().unwrap();
    }
}

/// Answers overwrite the entries of earlier requests, so the backend must have read these before.
#[test]
fn a_full_ring_is_answered_whole_again_and_again() {
    let rig = Rig::start();
    let guest = rig.guest_on_file(1);
    let mut device = guest.connect(Options::default());
    let grants: Vec<GrantRef> = (0..32).map(|_| guest.grant(PageAccess::ReadWrite).1).collect();
    let requests: Vec<_> = (0..32u64)
        .zip(&grants)
        .map(|(id, gref)| match id % 3 {
            0 => raw_request(op::READ, id, 8 * id, &[whole(*gref)]),
            1 => raw_request(op::WRITE, id, 8 * id, &[whole(*gref)]),
            _ => raw_request(0x55, id, 8 * id, &[]),
        })
        .collect();
    let expected: Vec<i16> = (0..32).map(|id| if id % 3 == 2 { -2 } else { 0 }).collect();
    for _ in 0..50 {
        assert_eq!(ask(&mut device, &requests), expected);
    }
    guest.close(device);
}

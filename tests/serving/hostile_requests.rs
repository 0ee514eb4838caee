//! Requests that can't be executed: each fails alone.

use polldisk::blkif::codec::{RawDirect, RawSegment};
use polldisk::blkif::op;
use polldisk::limits::PERSISTENT_GRANTS_PER_QUEUE;
use polldisk::msg::Protocol;
use polldisk::sim::blkfront::device::{Device, Options};
use polldisk::sim::blkfront::load::Load;
use polldisk::units::{DomId, GrantRef};
use polldisk::xen::PageAccess;
use polldisk::xen::abi;

use crate::rig::{
    Guest, IMAGE_BYTES, Neighbour, Rig, ask, load, raw_request, run_verified, wait_response, whole,
};

const OKAY: i16 = 0;
const ERROR: i16 = -1;
const NOT_SUPPORTED: i16 = -2;

/// Both protocols, each with and without persistent grants.
const ALL: [Options; 4] = {
    const USUAL: Options = Options {
        backend: DomId::DOM0,
        protocol: Protocol::X86_64,
        persistent: true,
        ends_unmapped: false,
        buffers: 32,
        ring_order: 0,
        segments: 11,
    };
    [
        USUAL,
        Options { persistent: false, ..USUAL },
        Options { protocol: Protocol::X86_32, ..USUAL },
        Options { protocol: Protocol::X86_32, persistent: false, ..USUAL },
    ]
};

/// Runs a test on a guest beside a neighbour, with each of the options; then the guest has to work.
fn with_all_options(test: impl Fn(&Guest, &mut Device)) {
    let rig = Rig::start();
    let neighbour = Neighbour::start(&rig, 9);
    let guest = rig.guest_on_file(1);
    for options in ALL {
        let mut device = guest.connect(options);
        test(&guest, &mut device);
        let rest = Load { zeroed: false, ..load(7, 4096) };
        run_verified(&mut device, rest, 100);
        neighbour.goes_on();
        guest.close(device);
        guest.xenbus.start_over().unwrap();
    }
    neighbour.finish();
}

/// Sends bad requests in batches, each followed by a sound one, and checks that only they fail.
fn each_fails(device: &mut Device, sound: &RawDirect, bad: &[RawDirect], status: i16) {
    for batch in bad.chunks(15) {
        let mut requests = Vec::new();
        let mut expected = Vec::new();
        for request in batch {
            requests.extend([*request, *sound]);
            expected.extend([status, OKAY]);
        }
        (0u64..).zip(&mut requests).for_each(|(id, request)| request.id = id);
        assert_eq!(ask(device, &requests), expected, "{batch:?}");
    }
}

#[test]
fn impossible_segments_fail_their_request_only() {
    with_all_options(|guest, device| {
        let (_, gref) = guest.grant(PageAccess::ReadWrite);
        let good = whole(gref);
        let sound = raw_request(op::READ, 0, 0, &[good]);
        let counts = |operation| {
            (12..=u8::MAX).map(move |count| RawDirect {
                nr_segments: count,
                ..raw_request(operation, 0, 0, &[good])
            })
        };
        let mut bad: Vec<RawDirect> =
            [op::READ, op::WRITE].map(|operation| raw_request(operation, 0, 0, &[])).to_vec();
        bad.extend(counts(op::READ).chain(counts(op::WRITE)).chain(counts(op::FLUSH_DISKCACHE)));
        for (first, last) in (8..=u8::MAX).map(|last| (0, last)).chain([(1, 0), (7, 6), (255, 0)]) {
            let segment = RawSegment { first, last, ..good };
            bad.push(raw_request(op::WRITE, 0, 0, &[segment]));
            bad.push(raw_request(op::READ, 0, 0, &[good, segment]));
        }
        each_fails(device, &sound, &bad, ERROR);
    });
}

#[test]
fn places_beyond_the_disk_fail_their_request_only() {
    let end = IMAGE_BYTES / 512;
    with_all_options(|guest, device| {
        let (_, gref) = guest.grant(PageAccess::ReadWrite);
        let good = whole(gref);
        let last = raw_request(op::WRITE, 0, end - 8, &[good]);
        let mut bad = Vec::new();
        for operation in [op::READ, op::WRITE, op::FLUSH_DISKCACHE] {
            for sector in [end - 7, end, end + 1, 1 << 55, u64::MAX / 512, u64::MAX - 7, u64::MAX] {
                bad.push(raw_request(operation, 0, sector, &[good]));
                bad.push(raw_request(operation, 0, sector, &[good; 11]));
            }
        }
        each_fails(device, &last, &bad, ERROR);
    });
}

#[test]
fn unknown_operations_are_not_supported() {
    with_all_options(|guest, device| {
        let (_, gref) = guest.grant(PageAccess::ReadWrite);
        let good = whole(gref);
        let bad: Vec<_> = (0..=u8::MAX)
            .filter(|operation| *operation == 4 || *operation > op::INDIRECT)
            .map(|operation| raw_request(operation, 0, 0, &[good]))
            .collect();
        each_fails(device, &raw_request(op::READ, 0, 0, &[good]), &bad, NOT_SUPPORTED);
    });
}

/// XSA-361, XSA-365: good grants in a batch must not hide bad ones, nor fail because of them.
#[test]
fn bad_grants_fail_their_request_only() {
    with_all_options(|guest, device| {
        let (page, good) = guest.grant(PageAccess::ReadWrite);
        guest.domain.page(page).copy_from(&[0x3c; 4096]);
        // For the read that fails, which may fill it nevertheless.
        let read_into = guest.grant(PageAccess::ReadWrite).1;
        let read_only = guest.grant(PageAccess::ReadOnly).1;
        let never_granted = guest.domain.reserve_refs(1).unwrap()[0];
        let copy_fails = guest.grant(PageAccess::ReadWrite).1;
        guest.domain.fail_maps(copy_fails, abi::GNTST_GENERAL_ERROR);
        guest.domain.fail_copies(copy_fails, abi::GNTST_BAD_PAGE);
        let map_fails = guest.grant(PageAccess::ReadWrite).1;
        guest.domain.fail_maps(map_fails, abi::GNTST_NO_SPACE);
        let request = |operation, id: u64, grefs: &[GrantRef]| {
            let segments: Vec<_> = grefs.iter().map(|gref| whole(*gref)).collect();
            raw_request(operation, id, 128 * id, &segments)
        };
        let requests = [
            request(op::WRITE, 0, &[good; 11]),
            request(op::WRITE, 1, &[good, never_granted, good]),
            request(op::READ, 2, &[read_into, GrantRef(u32::MAX)]),
            request(op::WRITE, 3, &[good]),
            request(op::READ, 4, &[copy_fails]),
            request(op::WRITE, 5, &[copy_fails, good]),
            request(op::READ, 6, &[read_only]),
            request(op::WRITE, 7, &[read_only]),
            request(op::WRITE, 8, &[map_fails]),
            request(op::READ, 9, &[map_fails]),
            request(op::FLUSH_DISKCACHE, 10, &[never_granted]),
            request(op::WRITE, 11, &[good]),
        ];
        let expected =
            [OKAY, ERROR, ERROR, OKAY, ERROR, ERROR, ERROR, OKAY, OKAY, OKAY, ERROR, OKAY];
        for _ in 0..10 {
            assert_eq!(ask(device, &requests), expected);
        }
        guest.domain.page(page).zero();
        assert_eq!(ask(device, &[raw_request(op::READ, 0, 11 * 128, &[whole(good)])]), [OKAY]);
        let mut data = [0; 4096];
        guest.domain.page(page).copy_to(&mut data);
        assert!(data.iter().all(|byte| *byte == 0x3c));
    });
}

/// XSA-71: a request that fails leaks nothing that later requests need.
#[test]
fn a_guest_that_only_ever_sends_bad_grants_uses_nothing_up() {
    with_all_options(|guest, device| {
        let refs = guest.domain.reserve_refs(11).unwrap();
        let segments: Vec<_> = refs.iter().map(|gref| whole(*gref)).collect();
        let requests: Vec<_> = (0..32).map(|id| raw_request(op::WRITE, id, 0, &segments)).collect();
        for _ in 0..100 {
            assert!(ask(device, &requests).iter().all(|status| *status == ERROR));
        }
    });
}

#[test]
fn a_grant_revoked_in_flight_harms_only_its_own_guest() {
    with_all_options(|guest, device| {
        let page = guest.domain.alloc_pages(1).unwrap();
        for round in 0..200 {
            let gref = guest.domain.grant(page, DomId::DOM0, PageAccess::ReadWrite).unwrap();
            let operation = if round % 2 == 0 { op::READ } else { op::WRITE };
            let segments = [whole(gref); 11];
            for id in 0..16 {
                device.put_raw(raw_request(operation, id, 0, &segments));
            }
            device.publish().unwrap();
            guest.domain.revoke(gref);
            for _ in 0..16 {
                assert!([OKAY, ERROR].contains(&wait_response(device).status));
            }
        }
    });
}

/// XSA-300: a guest decides how many pages it grants, and the daemon how many it keeps mapped.
#[test]
fn grants_beyond_the_bound_are_copied_and_not_mapped() {
    let rig = Rig::start();
    let guest = rig.guest_on_file(1);
    let mut device = guest.connect(Options::default());
    let page = guest.domain.alloc_pages(1).unwrap();
    let refs = guest.domain.reserve_refs(2 * PERSISTENT_GRANTS_PER_QUEUE).unwrap();
    for gref in &refs {
        guest.domain.permit(*gref, page, DomId::DOM0, PageAccess::ReadWrite);
    }
    for _ in 0..2 {
        for batch in refs.chunks(32 * 11) {
            let requests: Vec<_> = (0..)
                .zip(batch.chunks(11))
                .map(|(id, refs)| {
                    let segments: Vec<_> = refs.iter().map(|gref| whole(*gref)).collect();
                    raw_request(op::READ, id, 0, &segments)
                })
                .collect();
            assert!(ask(&mut device, &requests).iter().all(|status| *status == OKAY));
        }
        let counts = rig.disk(1).unwrap().counts;
        assert_eq!(counts.grants_mapped, PERSISTENT_GRANTS_PER_QUEUE as u64);
        assert!(counts.grants_copied > 0);
    }
    guest.close(device);
}

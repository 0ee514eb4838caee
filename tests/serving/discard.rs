//! Discards and barriers.

use std::os::unix::fs::MetadataExt;

use polldisk::blkif::codec::{RawDiscard, RawRequest};
use polldisk::blkif::op;
use polldisk::sim::blkfront::device::Options;
use polldisk::xen::PageAccess;
use xenstore_rs::Xs;

use crate::rig::{Rig, ask, raw, raw_request, wait_response, whole};

const NOT_SUPPORTED: i16 = -2;
const ERROR: i16 = -1;

fn discard(id: u64, sector: u64, nr_sectors: u64) -> RawRequest {
    RawRequest::Discard(RawDiscard { flag: 0, handle: 0, id, sector, nr_sectors })
}

#[test]
fn a_discard_gives_the_files_blocks_back_and_leaves_zeroes() {
    const BYTES: u64 = 8 << 20;
    let rig = Rig::start();
    let path = rig.image("full.img");
    std::fs::write(&path, vec![0x55; 8 << 20]).unwrap();
    let guest = rig.guest(1, &raw(&path));
    let mut device = guest.connect(Options::default());
    let there = |node: &str| guest.xenbus.store().read(&guest.xenbus.theirs(node)).unwrap();
    assert_eq!(&*there("feature-discard"), "1");
    assert!(there("discard-granularity").parse::<u32>().unwrap() >= 512);

    let blocks_before = std::fs::metadata(&path).unwrap().blocks();
    let keep = BYTES / 512 / 2;
    assert_eq!(ask(&mut device, &[discard(0, 0, keep)]), [0]);
    let freed = blocks_before - std::fs::metadata(&path).unwrap().blocks();
    assert!(freed >= keep - 64, "{freed} of {keep} sectors were given back");

    let data = std::fs::read(&path).unwrap();
    let (discarded, kept) = data.split_at(usize::try_from(keep * 512).unwrap());
    assert!(discarded.iter().all(|byte| *byte == 0));
    assert!(kept.iter().all(|byte| *byte == 0x55));
    assert_eq!(std::fs::metadata(&path).unwrap().len(), BYTES);
    guest.close(device);
}

#[test]
fn a_discard_beyond_the_disk_or_of_nothing_fails_alone() {
    let rig = Rig::start();
    let guest = rig.guest_on_file(1);
    let mut device = guest.connect(Options::default());
    let statuses = ask(
        &mut device,
        &[discard(0, 0, 1 << 60), discard(1, u64::MAX - 7, 8), discard(2, 0, 0), discard(3, 0, 8)],
    );
    assert_eq!(statuses, [ERROR, ERROR, ERROR, 0]);
    guest.close(device);
}

#[test]
fn a_secure_discard_where_none_is_offered_is_refused_and_discards_nothing() {
    let rig = Rig::start();
    let path = rig.image("full.img");
    std::fs::write(&path, vec![0x55; 1 << 20]).unwrap();
    let guest = rig.guest(1, &raw(&path));
    let mut device = guest.connect(Options::default());
    let offered = guest.xenbus.store().read(&guest.xenbus.theirs("discard-secure")).unwrap();
    assert_eq!(&*offered, "0");
    let secure = RawDiscard { flag: 1, handle: 0, id: 0, sector: 0, nr_sectors: 8 };
    assert_eq!(ask(&mut device, &[RawRequest::Discard(secure)]), [NOT_SUPPORTED]);
    assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0x55));
    guest.close(device);
}

#[test]
fn a_read_only_disk_offers_no_discard_and_keeps_its_data() {
    let rig = Rig::start();
    let path = rig.image("kept.img");
    std::fs::write(&path, vec![0x77; 1 << 20]).unwrap();
    let domain = rig.domain(1);
    rig.attach(1, &raw(&path), true);
    let guest = crate::rig::Guest::of(domain);
    let mut device = guest.connect(Options::default());
    let offered = guest.xenbus.store().read(&guest.xenbus.theirs("feature-discard")).unwrap();
    assert_eq!(&*offered, "0");
    assert_eq!(ask(&mut device, &[discard(0, 0, 8)]), [NOT_SUPPORTED]);
    assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0x77));
    guest.close(device);
}

/// In one batch, requests before a barrier are answered before it and requests after it are answered
/// after it; its answer carries its own operation.
#[test]
fn a_barrier_orders_what_is_before_and_after_it() {
    let rig = Rig::start();
    let guest = rig.guest_on_file(1);
    for persistent in [true, false] {
        let mut device = guest.connect(Options { persistent, ..Options::default() });
        let (page, gref) = guest.grant(PageAccess::ReadWrite);
        guest.domain.page(page).copy_from(&[0x42; 4096]);
        let segments = [whole(gref)];
        for id in 0..30 {
            let operation = match id {
                9 | 20 => op::WRITE_BARRIER,
                _ => op::WRITE,
            };
            // The second barrier has no data.
            let data = if id == 20 { &segments[..0] } else { &segments[..] };
            device.put_raw(raw_request(operation, id, 8 * id, data));
        }
        device.publish().unwrap();
        let answers: Vec<_> = (0..30).map(|_| wait_response(&mut device)).collect();
        assert!(answers.iter().all(|answer| answer.status == 0));
        for barrier in [9, 20] {
            let at = answers.iter().position(|answer| answer.id == barrier).unwrap();
            assert_eq!(answers[at].operation, op::WRITE_BARRIER);
            assert!(answers[..at].iter().all(|answer| answer.id < barrier));
            assert!(answers[at..].iter().all(|answer| answer.id >= barrier));
        }
        assert_eq!(rig.disk(1).unwrap().counts.writes, 29);
        guest.close(device);
        guest.xenbus.start_over().unwrap();
    }
}

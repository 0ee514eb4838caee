//! Disks whose blocks are not 512 bytes, with and without `emulate-512`.

use polldisk::blkif::codec::{RawDiscard, RawRequest, RawSegment};
use polldisk::blkif::op;
use polldisk::sim::blkfront::device::{Device, Options};
use polldisk::sim::blkfront::load::Load;
use polldisk::sim::blkfront::xenbus::Wanted;
use polldisk::units::GrantRef;
use polldisk::xen::PageAccess;
use polldisk::xen::keys::XenbusState;
use xenstore_rs::Xs;

use crate::host::{self, BLOCKS_4KN, Filesystem, LoopDevice};
use crate::rig::{
    Guest, IMAGE_BYTES, Rig, ask, load, raw, raw_request, run_verified, settle, until, whole,
};

const ERROR: i16 = -1;

/// A disk with 4096-byte blocks, as large as an image.
fn disk_4kn(rig: &Rig, name: &str) -> Option<LoopDevice> {
    LoopDevice::new_4kn(&rig.images().join(name), IMAGE_BYTES)
}

fn sector_sizes(guest: &Guest) -> [String; 2] {
    ["sector-size", "physical-sector-size"]
        .map(|node| guest.xenbus.store().read(&guest.xenbus.theirs(node)).unwrap().into())
}

fn sectors(gref: GrantRef, first: u8, last: u8) -> RawSegment {
    RawSegment { gref: gref.0, first, last }
}

#[test]
fn a_disk_with_large_blocks_takes_whole_ones_in_512_byte_units() {
    let rig = Rig::start();
    let Some(disk) = disk_4kn(&rig, "4kn.img") else { return };
    let guest = rig.guest(1, &disk.target(""));
    let (mut device, told) = guest.connect_and_look(Options::default());
    assert_eq!((told.sectors.0, told.sector_bytes), (IMAGE_BYTES / 512, 4096));
    for block_bytes in [4096, 45056] {
        let load = Load { zeroed: block_bytes == 4096, ..load(1, block_bytes) };
        run_verified(&mut device, load, 1_000);
    }
    let (_, gref) = guest.grant(PageAccess::ReadWrite);
    let statuses = ask(
        &mut device,
        &[
            raw_request(op::READ, 0, 8, &[whole(gref)]),
            raw_request(op::READ, 1, 4, &[whole(gref)]),
            raw_request(op::WRITE, 2, 8, &[sectors(gref, 0, 3)]),
            raw_request(op::READ, 3, 8, &[sectors(gref, 4, 7), sectors(gref, 0, 3)]),
        ],
    );
    assert_eq!(statuses, [0, ERROR, ERROR, ERROR]);
    guest.close(device);
}

#[test]
fn emulated_sectors_keep_data_at_every_block_size_and_data_path() {
    let rig = Rig::start();
    let paths = [("auto", true), ("auto", false), ("map", false), ("copy", true)];
    for (domid, (path, persistent)) in (1..).zip(paths) {
        let Some(disk) = disk_4kn(&rig, &format!("{domid}.img")) else { return };
        let guest = rig.guest(domid, &disk.target(&format!(",data-path={path},emulate-512")));
        let (mut device, told) =
            guest.connect_and_look(Options { persistent, ..Options::default() });
        assert_eq!((told.sectors.0, told.sector_bytes), (IMAGE_BYTES / 512, 512));
        assert_eq!(sector_sizes(&guest), ["512", "4096"]);
        for (seed, block_bytes) in (1..).zip([512, 4096, 1536, 45056, 7 * 512]) {
            // Few blocks, so that many requests at a time are for parts of the same ones.
            let (depth, sectors) = (if block_bytes > 4096 { 8 } else { 32 }, 0..2048);
            let places = Load { depth, sectors, flush_every: 500, ..load(seed, block_bytes) };
            let load = Load { zeroed: seed == 1, ..places };
            let report = run_verified(&mut device, load, 1_000);
            assert!(report.verified > 0 && report.writes > 0);
        }
        // Aligned to blocks on the disk, but not in the two pages of its segments.
        let pages = [0xa, 0xb].map(|byte| {
            let (page, gref) = guest.grant(PageAccess::ReadWrite);
            guest.domain.page(page).copy_from(&[byte; 4096]);
            (page, gref)
        });
        let segments = [sectors(pages[0].1, 5, 7), sectors(pages[1].1, 1, 5)];
        assert_eq!(ask(&mut device, &[raw_request(op::WRITE, 0, 16, &segments)]), [0]);
        pages.iter().for_each(|(page, _)| guest.domain.page(*page).zero());
        assert_eq!(ask(&mut device, &[raw_request(op::READ, 0, 16, &[whole(pages[0].1)])]), [0]);
        let mut data = [0; 4096];
        guest.domain.page(pages[0].0).copy_to(&mut data);
        assert!(data[..1536].iter().all(|byte| *byte == 0xa));
        assert!(data[1536..].iter().all(|byte| *byte == 0xb));
        assert_eq!(rig.disk(domid).unwrap().counts.errors, 0);
        guest.close(device);
    }
}

#[test]
fn queues_on_two_workers_share_blocks_and_lose_nothing() {
    const SECTORS: u64 = 32;
    let rig = Rig::with_workers(2);
    let Some(disk) = disk_4kn(&rig, "shared.img") else { return };
    let guest = rig.guest(1, &disk.target(",emulate-512"));
    let options = Options { buffers: 16, segments: 4, ..Options::default() };
    let wanted = Wanted { queues: 2, ..Wanted::one_queue(options) };
    let (mut devices, _) = guest.xenbus.connect_all(&guest.domain, wanted).unwrap();
    assert_eq!(rig.disk(1).unwrap().workers, [0, 1]);
    let tag =
        |sector: u64, round: u8| round.wrapping_mul(67).wrapping_add(u8::try_from(sector).unwrap());
    for round in 0..50 {
        // Even sectors by one queue, odd ones by the other; and now and then whole blocks.
        for (queue, device) in (0..).zip(&mut devices) {
            let blocks = (0..SECTORS / 16).map(|block| (block * 2 + queue) * 8);
            let singles = (queue..SECTORS).step_by(2);
            let (places, len): (Vec<u64>, usize) = match round % 10 {
                9 => (blocks.collect(), 4096),
                _ => (singles.collect(), 512),
            };
            for place in places {
                let buffer = device.free_buffer().unwrap();
                let data: Vec<u8> = (0..len as u64 / 512)
                    .flat_map(|sector| [tag(place + sector, round); 512])
                    .collect();
                device.fill(buffer, &data);
                device.put(op::WRITE, place, len);
            }
            device.publish().unwrap();
        }
        devices.iter_mut().for_each(settle);
        let buffer = devices[0].put(op::READ, 0, usize::try_from(SECTORS * 512).unwrap());
        devices[0].publish().unwrap();
        settle(&mut devices[0]);
        let mut data = vec![0; usize::try_from(SECTORS * 512).unwrap()];
        devices[0].drain(buffer, &mut data);
        for (sector, bytes) in (0..).zip(data.chunks(512)) {
            assert!(bytes.iter().all(|byte| *byte == tag(sector, round)), "sector {sector}");
        }
    }
    guest.xenbus.close_all(devices).unwrap();
}

#[test]
fn a_discard_of_emulated_sectors_leaves_partial_blocks_alone() {
    let rig = Rig::start();
    let Some(disk) = disk_4kn(&rig, "discard.img") else { return };
    let guest = rig.guest(1, &disk.target(",emulate-512"));
    let mut device = guest.connect(Options::default());
    let there = |node: &str| guest.xenbus.store().read(&guest.xenbus.theirs(node)).unwrap();
    assert_eq!((&*there("feature-discard"), &*there("discard-secure")), ("1", "0"));
    assert!(there("discard-granularity").parse::<u32>().unwrap() >= 4096);
    let buffer = device.put(op::WRITE, 0, 24 * 512);
    device.fill(buffer, &[0x5a; 24 * 512]);
    device.publish().unwrap();
    settle(&mut device);
    let discard = |id, sector, nr_sectors| {
        RawRequest::Discard(RawDiscard { flag: 0, handle: 0, id, sector, nr_sectors })
    };
    assert_eq!(ask(&mut device, &[discard(0, 3, 15), discard(1, 17, 6)]), [0, 0]);
    let buffer = device.put(op::READ, 0, 24 * 512);
    device.publish().unwrap();
    settle(&mut device);
    let mut data = [0; 24 * 512];
    device.drain(buffer, &mut data);
    let (before, rest) = data.split_at(8 * 512);
    let (block, after) = rest.split_at(8 * 512);
    assert!(before.iter().chain(after).all(|byte| *byte == 0x5a));
    assert!(block.iter().all(|byte| *byte == 0), "the loop device punches a hole");
    guest.close(device);
}

#[test]
fn emulation_of_sectors_that_storage_has_changes_nothing() {
    let rig = Rig::start();
    let path = rig.image("plain.img");
    let guest = rig.guest(1, &raw(&path));
    let device = guest.connect(Options::default());
    let plain = sector_sizes(&guest);
    guest.close(device);
    rig.detach_by_force(1);
    let guest = rig.guest(2, &format!("raw,emulate-512:{}", path.display()));
    let mut device = guest.connect(Options::default());
    assert_eq!(sector_sizes(&guest)[0], "512");
    if plain[0] == "512" {
        assert_eq!(sector_sizes(&guest), plain);
    }
    run_verified(&mut device, load(1, 512), 1_000);
    guest.close(device);
}

#[test]
fn a_drive_refuses_a_medium_with_larger_blocks_than_its_guest_was_told() {
    let rig = Rig::start();
    let Some(disk) = disk_4kn(&rig, "medium.img") else { return };
    let guest = rig.drive(1, "", false);
    let mut device = guest.connect(Options::default());
    let params = guest.xenbus.theirs("params");
    rig.set(&params, &disk.target(""));
    until("it is refused", || rig.error_of(1).is_some());
    let error = rig.error_of(1).unwrap();
    assert!(error.contains("blocks of 4096 bytes") && error.contains("emulate-512"), "{error}");
    assert_eq!(guest.xenbus.disk().unwrap().sectors.0, 0);
    rig.set(&params, &disk.target(",emulate-512"));
    until("it is in", || guest.xenbus.disk().unwrap().sectors.0 == IMAGE_BYTES / 512);
    run_verified(&mut device, load(1, 512), 1_000);
    guest.close(device);
    rig.detach_by_force(1);

    // The admin is told before the medium in the drive is taken out.
    let told_512 = rig.drive(3, &raw(&rig.image("kept.img")), false);
    let device = told_512.connect(Options::default());
    let refusal = rig.try_changer(3)(&disk.target("")).unwrap_err();
    assert!(refusal.contains("emulate-512"), "{refusal}");
    assert_eq!(told_512.xenbus.disk().unwrap().sectors.0, IMAGE_BYTES / 512);
    told_512.close(device);

    // A drive that was told of large blocks takes media with small ones.
    let guest = rig.drive(2, &disk.target(""), false);
    let mut device = guest.connect(Options::default());
    rig.changer(2)(&raw(&rig.image("small.img")));
    let told = guest.xenbus.disk().unwrap();
    assert_eq!((told.sectors.0, told.sector_bytes), (IMAGE_BYTES / 512, 4096));
    run_verified(&mut device, load(2, 4096), 1_000);
    guest.close(device);

    // The next connection starts with the new sizes.
    rig.changer(3)(&disk.target(""));
    for (guest, sector_bytes) in [(guest, 512), (told_512, 4096)] {
        guest.xenbus.start_over().unwrap();
        guest.xenbus.wait_for(&[XenbusState::InitWait]).unwrap();
        let offered = guest.xenbus.store().read(&guest.xenbus.theirs("sector-size")).unwrap();
        assert_eq!(&*offered, sector_bytes.to_string());
        let (device, told) = guest.connect_and_look(Options::default());
        assert_eq!((told.sectors.0, told.sector_bytes), (IMAGE_BYTES / 512, sector_bytes));
        guest.close(device);
    }
}

#[test]
fn the_end_of_a_file_that_fills_no_block_is_read_and_written() {
    // 7 sectors more than whole blocks.
    const BYTES: u64 = (1 << 20) + 7 * 512;
    const SECTORS: u64 = BYTES / 512;
    for kind in ["ext4", "xfs"] {
        let rig = Rig::start();
        let filesystem = Filesystem::new(kind, rig.images(), 400 << 20, &BLOCKS_4KN);
        let Some(filesystem) = filesystem else { return };
        let path = filesystem.folder().join("odd.img");
        let before: Vec<u8> =
            (0..SECTORS).flat_map(|sector| [u8::try_from(sector % 251).unwrap(); 512]).collect();
        std::fs::write(&path, &before).unwrap();
        let guest = rig.guest(1, &format!("raw,emulate-512:{}", path.display()));
        let (mut device, told) = guest.connect_and_look(Options::default());
        assert_eq!((told.sectors.0, told.sector_bytes), (SECTORS, 512));
        let read = |device: &mut Device, first: u64, count: usize| {
            let buffer = device.put(op::READ, first, count * 512);
            device.publish().unwrap();
            settle(device);
            let mut data = vec![0; count * 512];
            device.drain(buffer, &mut data);
            data
        };
        // Within the tail, all of it, from the middle of the block before it, and both whole.
        for (first, count) in
            [(SECTORS - 1, 1), (SECTORS - 7, 7), (SECTORS - 10, 10), (SECTORS - 15, 15)]
        {
            let from = usize::try_from(first * 512).unwrap();
            assert!(read(&mut device, first, count) == before[from..from + count * 512]);
        }
        let mut expected = before;
        for (round, (first, count)) in
            (1..).zip([(SECTORS - 1, 1), (SECTORS - 10, 5), (SECTORS - 12, 12), (SECTORS - 15, 15)])
        {
            let buffer = device.free_buffer().unwrap();
            let data = vec![0xe0 + round; count * 512];
            device.fill(buffer, &data);
            device.put(op::WRITE, first, count * 512);
            device.publish().unwrap();
            settle(&mut device);
            let from = usize::try_from(first * 512).unwrap();
            expected[from..from + count * 512].copy_from_slice(&data);
            assert!(read(&mut device, SECTORS - 15, 15) == expected[expected.len() - 15 * 512..]);
        }
        let flush = raw_request(op::FLUSH_DISKCACHE, 0, 0, &[]);
        assert_eq!(ask(&mut device, &[flush]), [0]);
        let load = Load { sectors: SECTORS - 64..SECTORS, zeroed: false, depth: 8, ..load(7, 512) };
        run_verified(&mut device, Load { flush_every: 10, ..load }, 2_000);
        assert_eq!(rig.disk(1).unwrap().counts.errors, 0);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), BYTES, "the file keeps its size");
        guest.close(device);
        rig.detach_by_force(1);
        // Reads what is on the disk below, not what is in the page cache.
        let remount = |option| {
            let mut mount = std::process::Command::new("mount");
            host::run(mount.args(["-o", option]).arg(filesystem.folder())).unwrap();
        };
        remount("remount,ro");
        std::fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
        let after = std::fs::read(&path).unwrap();
        let kept = expected.len() - 64 * 512;
        assert!(after.len() == expected.len() && after[..kept] == expected[..kept]);
    }
}

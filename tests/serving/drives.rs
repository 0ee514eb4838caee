//! Drives whose media come and go while their guests read and write.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use polldisk::blkif::op;
use polldisk::sim::blkfront::device::{Device, Options};
use polldisk::xen::PageAccess;

use crate::rig::{Guest, IMAGE_BYTES, Neighbour, Rig, ask, raw, raw_request, settle, until, whole};

const ERROR: i16 = -1;
const SECTORS: u64 = IMAGE_BYTES / 512;

/// An image with `tag` in every byte.
fn medium(rig: &Rig, name: &str, tag: u8) -> String {
    let path = rig.image(name);
    std::fs::write(&path, vec![tag; usize::try_from(IMAGE_BYTES).unwrap()]).unwrap();
    raw(&path)
}

/// The tag of the medium in the drive; `None` if a read fails.
fn tag_of(guest: &Guest, device: &mut Device) -> Option<u8> {
    let (page, gref) = guest.grant(PageAccess::ReadWrite);
    guest.domain.page(page).copy_from(&[0xee; 4096]);
    let statuses = ask(device, &[raw_request(op::READ, 0, SECTORS - 8, &[whole(gref)])]);
    let mut data = [0; 4096];
    guest.domain.page(page).copy_to(&mut data);
    assert!(data.iter().all(|byte| *byte == data[0]));
    assert_eq!(statuses[0] == ERROR, data[0] == 0xee, "a read that fails leaves no data");
    (statuses[0] == 0).then_some(data[0])
}

fn sectors(guest: &Guest) -> u64 {
    guest.xenbus.disk().unwrap().sectors.0
}

#[test]
fn a_drive_starts_empty_and_reads_what_is_put_in() {
    let rig = Rig::start();
    let neighbour = Neighbour::start(&rig, 100);
    for (domid, persistent) in [(1, true), (2, false)] {
        let guest = rig.drive(domid, "", true);
        let change = rig.changer(domid);
        let (mut device, disk) =
            guest.connect_and_look(Options { persistent, ..Options::default() });
        assert_eq!((disk.sectors.0, disk.read_only), (0, true));
        assert_eq!(tag_of(&guest, &mut device), None);
        let flush = raw_request(op::FLUSH_DISKCACHE, 0, 0, &[]);
        assert_eq!(ask(&mut device, &[flush]), [0], "there is nothing to flush");
        for tag in [1, 2, 3] {
            change(&medium(&rig, "medium.iso", tag));
            assert_eq!(sectors(&guest), SECTORS);
            assert_eq!(tag_of(&guest, &mut device), Some(tag));
            change("");
            assert_eq!(sectors(&guest), 0);
            assert_eq!(tag_of(&guest, &mut device), None);
        }
        guest.close(device);
    }
    neighbour.finish();
}

#[test]
fn every_read_is_from_one_medium_while_media_change() {
    let rig = Rig::start();
    let media = [medium(&rig, "a.iso", 0xa1), medium(&rig, "b.iso", 0xb2)];
    for (domid, persistent) in [(1, true), (2, false)] {
        let guest = rig.drive(domid, &media[0], true);
        let change = rig.changer(domid);
        let mut device = guest.connect(Options { persistent, ..Options::default() });
        let (over, changes) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for target in media.iter().cycle() {
                    change(target);
                    changes.fetch_add(1, Ordering::Relaxed);
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            let mut seen = [0; 2];
            let mut read = 0;
            until("both media were read, again and again", || {
                read += 1;
                while let Some(buffer) = device.free_buffer() {
                    device.fill(buffer, &[0xee; 45056]);
                    device.put(op::READ, read * 88 % (SECTORS - 88), 45056);
                }
                device.publish().unwrap();
                look(&mut device, &mut seen);
                seen.iter().all(|count| *count > 100) && changes.load(Ordering::Relaxed) > 20
            });
            over.store(true, Ordering::Relaxed);
            until("all requests are answered", || {
                look(&mut device, &mut seen);
                device.in_flight() == 0
            });
        });
        let last = [0xb2, 0xa1][changes.load(Ordering::Relaxed) % 2];
        assert_eq!(tag_of(&guest, &mut device), Some(last));
        guest.close(device);
    }
}

/// Takes answers to reads of 44 KiB; each is from one of two media, or failed.
fn look(device: &mut Device, seen: &mut [usize; 2]) {
    let mut data = [0; 45056];
    while let Some(answer) = device.next_answer().unwrap() {
        if answer.status == 0 {
            device.drain(answer.buffer, &mut data);
            let which = [0xa1, 0xb2].iter().position(|tag| *tag == data[0]);
            seen[which.expect("data of a medium")] += 1;
            assert!(data.iter().all(|byte| *byte == data[0]), "a read from two media");
        }
    }
}

#[test]
fn every_write_is_on_the_medium_that_it_was_answered_for() {
    let rig = Rig::start();
    let media = [rig.image("a.img"), rig.image("b.img")];
    let guest = rig.drive(1, &raw(&media[0]), false);
    let change = rig.changer(1);
    let mut device = guest.connect(Options::default());
    // What was written to each block; all writes are answered with okay.
    let mut written = Vec::new();
    for block in 0..1000 {
        if block % 100 == 50 {
            change(&raw(&media[block / 100 % 2]));
        }
        let tag = u8::try_from(block % 251 + 1).unwrap();
        until("there is a buffer", || {
            while let Some(answer) = device.next_answer().unwrap() {
                assert_eq!(answer.status, 0);
            }
            device.free_buffer().is_some()
        });
        let buffer = device.free_buffer().unwrap();
        device.fill(buffer, &[tag; 4096]);
        device.put(op::WRITE, block as u64 * 8, 4096);
        device.publish().unwrap();
        written.push(tag);
    }
    settle(&mut device);
    let read = |path: &Path| std::fs::read(path).unwrap();
    let contents = [read(&media[0]), read(&media[1])];
    for (block, tag) in written.iter().enumerate() {
        let bytes = block * 4096..(block + 1) * 4096;
        let holds = contents.each_ref().map(|data| {
            assert!(data[bytes.clone()].iter().all(|byte| *byte == data[bytes.start]));
            data[bytes.start]
        });
        // Writes in flight during a change are on the old medium; each is on exactly one.
        assert!([[*tag, 0], [0, *tag]].contains(&holds), "block {block}: {holds:?}");
    }
    assert!(contents.iter().all(|data| data.iter().any(|byte| *byte != 0)));
    guest.close(device);
}

#[test]
fn an_unusable_medium_leaves_an_empty_drive_that_works() {
    let rig = Rig::start();
    let neighbour = Neighbour::start(&rig, 100);
    let good = medium(&rig, "good.iso", 7);
    let guest = rig.drive(1, &good, true);
    let mut device = guest.connect(Options::default());
    let params = guest.xenbus.theirs("params");
    for bad in ["raw:/nowhere.iso", "vhd:/a", "/dev", "nonsense"] {
        rig.set(&params, bad);
        until("the reason is reported", || {
            rig.error_of(1).is_some_and(|error| error.contains(bad))
        });
        assert_eq!((sectors(&guest), tag_of(&guest, &mut device)), (0, None));
        rig.set(&params, &good);
        until("the error is cleared", || rig.error_of(1).is_none());
        until("the guest is told", || sectors(&guest) == SECTORS);
        assert_eq!(tag_of(&guest, &mut device), Some(7));
    }
    guest.close(device);
    neighbour.finish();
}

//! A filesystem that is frozen, as by a snapshot: operations on it wait inside the kernel.

use std::cell::Cell;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use polldisk::backing::DiskOptions;
use polldisk::blkif::codec::{RawDiscard, RawRequest};
use polldisk::blkif::op;
use polldisk::engine::host::HostEngine;
use polldisk::sim::SimXen;
use polldisk::sim::blkfront::device::Device;

use crate::guest::HANG;
use crate::host::{self, Filesystem, Frozen, LoopDevice};
use crate::scripted::{self, Bench, Shape};
use crate::workers::{opened, opened_with, zeroes};

/// Makes passes until a guest has this many answers.
fn wait(bench: &mut Bench<SimXen, HostEngine>, guest: usize, count: usize) {
    let (start, mut answers) = (Instant::now(), 0);
    while answers < count {
        assert!(start.elapsed() < HANG, "{answers} of {count} answers");
        bench.pass();
        answers += bench.answers(guest);
    }
}

fn shareable() -> DiskOptions {
    DiskOptions { shareable: true, ..DiskOptions::default() }
}

/// Discards of 16 KiB, at different places.
fn put_discards(device: &mut Device, count: usize) {
    for number in 0..count as u64 {
        let id = device.free_buffer().unwrap() as u64;
        let discard = RawDiscard { flag: 0, handle: 0, id, sector: number * 64, nr_sectors: 32 };
        device.put_request(&RawRequest::Discard(discard), 0);
    }
}

/// Reads or writes of a page each, not side by side, so that the kernel does not merge them.
fn put_apart(bench: &mut Bench<SimXen, HostEngine>, guest: usize, operation: u8, count: usize) {
    let device = &mut bench.guests[guest];
    for number in 0..count as u64 {
        device.put(operation, number * 16, 4096);
    }
    device.publish().unwrap();
}

/// A file with data in all of its blocks.
fn full_file(path: &Path, bytes: usize) {
    let mut file = File::create(path).unwrap();
    file.write_all(&vec![7; bytes]).unwrap();
    file.sync_all().unwrap();
}

/// Makes a write of this guest hang, so that its device answers nothing more.
fn hang(bench: &mut Bench<SimXen, HostEngine>, guest: usize) {
    put_apart(bench, guest, op::WRITE, 1);
    bench.pass();
    std::thread::sleep(Duration::from_millis(50));
}

/// Makes passes until a guest on other storage has had some writes answered.
fn is_served(bench: &mut Bench<SimXen, HostEngine>, victim: usize) {
    for _ in 0..20 {
        bench.ask(victim, op::WRITE, 8, 1);
        wait(bench, victim, 8);
    }
}

/// Whether the tools that these tests need are installed.
fn can_freeze() -> bool {
    ["fsfreeze", "umount"].into_iter().all(host::is_there)
}

/// A filesystem whose device can be made to hang: the device is a file on a filesystem that can be frozen.
struct OnHungDevice {
    // Dropped in this order: both unmounted, then the folder removed.
    filesystem: Filesystem,
    below: Filesystem,
    folder: tempfile::TempDir,
}

impl OnHungDevice {
    /// `None` on a machine that cannot have one.
    fn new() -> Option<OnHungDevice> {
        if !can_freeze() {
            return None;
        }
        let folder = host::folder();
        let below = Filesystem::new("ext4", folder.path(), 256 << 20, &[])?;
        let filesystem = Filesystem::new("ext4", below.folder(), 64 << 20, &[])?;
        Some(OnHungDevice { filesystem, below, folder })
    }

    fn folder(&self) -> &Path {
        self.filesystem.folder()
    }

    /// A guest on other storage, which has to be served even so.
    fn victim(&self, bench: &mut Bench<SimXen, HostEngine>) -> usize {
        bench.guest_on(Shape::mapped(32), opened(&zeroes(self.folder.path())))
    }

    /// Does this while the device hangs; `false` if the worker waited for the device.
    fn hangs_during(&self, work: impl FnOnce()) -> bool {
        within(HANG / 2, host::freeze(self.below.folder()), work)
    }
}

#[test]
fn discards_and_writes_on_a_frozen_filesystem_do_not_hold_up_another_guests_flushes() {
    const DISCARDS: usize = 64;
    const WRITES: usize = 64;
    if !can_freeze() {
        return;
    }
    let folder = host::folder();
    let Some(filesystem) = Filesystem::new("ext4", folder.path(), 256 << 20, &[]) else { return };
    let image = filesystem.folder().join("disk.img");
    File::create(&image).unwrap().write_all(&vec![7; 8 << 20]).unwrap();

    let mut bench = Bench::over(HostEngine::new().unwrap());
    let shape = Shape::mapped(DISCARDS + WRITES).indirect(12, 2);
    let slow = bench.guest_on(shape, opened(&image));
    let victim = bench.guest_on(Shape::mapped(32), opened(&zeroes(folder.path())));
    bench.ask(victim, op::FLUSH_DISKCACHE, 1, 0);
    wait(&mut bench, victim, 1);

    let frozen = host::freeze(filesystem.folder());
    put_discards(&mut bench.guests[slow], DISCARDS);
    assert_eq!(bench.ask(slow, op::WRITE, WRITES, 1), WRITES);
    for _ in 0..100 {
        bench.pass();
    }
    for _ in 0..20 {
        bench.ask(victim, op::WRITE, 8, 1);
        bench.ask(victim, op::FLUSH_DISKCACHE, 8, 0);
        wait(&mut bench, victim, 16);
    }
    assert_eq!(bench.answers(slow), 0, "nothing is done on a frozen filesystem");
    drop(frozen);
    wait(&mut bench, slow, DISCARDS + WRITES);
}

/// Thaws a filesystem when the work is done, or after `limit`, since nothing else wakes a worker that
/// waits inside a system call. Returns whether the work was done in time.
fn within(limit: Duration, frozen: Frozen, work: impl FnOnce()) -> bool {
    std::thread::scope(|scope| {
        let (done, is_done) = channel();
        let guard = scope.spawn(move || {
            let in_time = is_done.recv_timeout(limit).is_ok();
            drop(frozen);
            in_time
        });
        work();
        // After the limit, the guard no longer listens.
        let _ = done.send(());
        guard.join().unwrap()
    })
}

/// A thread that submits a request to a file sleeps in the kernel while the file's device has all the
/// requests that it can hold.
#[test]
fn more_writes_than_a_hung_device_takes_do_not_hold_up_another_guest() {
    const WRITES: usize = 512;
    let Some(hung) = OnHungDevice::new() else { return };
    let image = hung.folder().join("disk.img");
    full_file(&image, 8 << 20);

    let mut bench = Bench::over(HostEngine::new().unwrap());
    let deep = Shape::mapped(WRITES).indirect(12, 4);
    let greedy = [(); 2].map(|()| bench.guest_on(deep, opened_with(&image, shareable())));
    let victim = hung.victim(&mut bench);

    let mut early = 0;
    let in_time = hung.hangs_during(|| {
        for guest in greedy {
            put_apart(&mut bench, guest, op::WRITE, WRITES);
        }
        is_served(&mut bench, victim);
        early = greedy.map(|guest| bench.answers(guest)).iter().sum();
    });
    assert!(in_time, "the worker waited for the device");
    assert_eq!(early, 0, "nothing is written to a device that hangs");
    for guest in greedy {
        wait(&mut bench, guest, WRITES);
    }
}

#[test]
fn emulated_writes_and_discards_on_a_hung_device_do_not_hold_up_another_guests() {
    const WRITES: usize = 384;
    const DISCARDS: usize = 128;
    const IMAGE_BYTES: usize = 16 << 20;
    if !can_freeze() {
        return;
    }
    let folder = host::folder();
    let Some(below) = Filesystem::new("ext4", folder.path(), 256 << 20, &[]) else { return };
    let disk_4kn = |folder: &Path| {
        let path = folder.join("4kn.img");
        // With contents, since the discard of a hole does nothing.
        std::fs::write(&path, vec![7; IMAGE_BYTES]).unwrap();
        LoopDevice::over(&path, &host::BLOCKS_4KN)
    };
    let Some(hung) = disk_4kn(below.folder()) else { return };
    let Some(works) = disk_4kn(folder.path()) else { return };

    let mut bench = Bench::over(HostEngine::new().unwrap());
    let emulate = DiskOptions { emulate_512: true, ..DiskOptions::default() };
    let deep = Shape::mapped(WRITES + DISCARDS).indirect(12, 4);
    let greedy = bench.guest_on(deep, opened_with(&hung.path, emulate));
    let victim = bench.guest_on(Shape::mapped(32), opened_with(&works.path, emulate));

    let mut early = 0;
    let in_time = within(HANG / 2, host::freeze(below.folder()), || {
        let device = &mut bench.guests[greedy];
        put_discards(device, DISCARDS);
        // One sector per block, so the rest of the block is read first; beyond the discarded part.
        for number in 0..WRITES as u64 {
            device.put(op::WRITE, (8 << 11) + number * 8 + 3, 512);
        }
        device.publish().unwrap();
        for _ in 0..20 {
            let device = &mut bench.guests[victim];
            put_discards(device, 8);
            for number in 0..8 {
                device.put(op::WRITE, number * 8 + 3, 512);
            }
            device.publish().unwrap();
            wait(&mut bench, victim, 16);
        }
        early = bench.answers(greedy);
    });
    assert!(in_time, "the worker waited for the device");
    // The filesystem below lets a few discards through.
    assert!(early < DISCARDS, "the device hangs: {early} answers");
    wait(&mut bench, greedy, WRITES + DISCARDS - early);
}

#[test]
fn a_flood_of_flushes_becomes_a_few_for_the_device() {
    const FLUSHES: usize = 512;
    if !can_freeze() {
        return;
    }
    let folder = host::folder();
    let Some(filesystem) = Filesystem::new("ext4", folder.path(), 64 << 20, &[]) else { return };
    let mut bench = Bench::over(HostEngine::new().unwrap());
    let image = opened(&zeroes(filesystem.folder()));
    let guest = bench.guest_on(Shape::mapped(FLUSHES).indirect(12, 4), image);
    let before = filesystem.flushes();
    assert_eq!(bench.ask(guest, op::FLUSH_DISKCACHE, FLUSHES, 0), FLUSHES);
    wait(&mut bench, guest, FLUSHES);
    let flushes = filesystem.flushes() - before;
    assert!((1..FLUSHES as u64 / 8).contains(&flushes), "{flushes} flushes for {FLUSHES} requests");
}

/// While it waits for the device, each flush holds a tag of its own, besides those of reads and writes.
#[test]
fn flushes_of_many_files_on_a_hung_device_do_not_hold_up_another_guest() {
    const FLUSHERS: usize = 48;
    let Some(hung) = OnHungDevice::new() else { return };
    let mut bench = Bench::over(HostEngine::new().unwrap());
    let flushers: Vec<usize> = (0..FLUSHERS)
        .map(|number| {
            let image = hung.folder().join(format!("{number}.img"));
            full_file(&image, 256 << 10);
            bench.guest_on(Shape::mapped(8), opened(&image))
        })
        .collect();
    let image = hung.folder().join("large.img");
    full_file(&image, 8 << 20);
    let deep = Shape::mapped(128).indirect(12, 2);
    let greedy = [(); 2].map(|()| bench.guest_on(deep, opened_with(&image, shareable())));
    let victim = hung.victim(&mut bench);

    let in_time = hung.hangs_during(|| {
        hang(&mut bench, greedy[0]);
        for guest in &flushers {
            bench.ask(*guest, op::FLUSH_DISKCACHE, 1, 0);
        }
        for _ in 0..10 {
            bench.pass();
            std::thread::sleep(Duration::from_millis(20));
        }
        put_apart(&mut bench, greedy[0], op::READ, 127);
        put_apart(&mut bench, greedy[1], op::READ, 128);
        for guest in &flushers {
            put_apart(&mut bench, *guest, op::READ, 2);
        }
        is_served(&mut bench, victim);
    });
    assert!(in_time, "the worker waited for the device");
}

/// Each request of the guest then becomes one device request per page.
#[test]
fn large_reads_of_a_fragmented_file_on_a_hung_device_do_not_hold_up_another_guest() {
    let Some(hung) = OnHungDevice::new() else { return };
    // One disk fills the filesystem, then discards every second block.
    let first = hung.folder().join("first.img");
    let mut file = File::create(&first).unwrap();
    while file.write_all(&[7; 65536]).is_ok() {}
    let pages = file.metadata().unwrap().len() / 4096;
    file.set_len(pages * 4096).unwrap();
    file.sync_all().unwrap();
    let second = hung.folder().join("second.img");
    File::create(&second).unwrap().set_len(16 << 20).unwrap();

    let mut bench = Bench::over(HostEngine::new().unwrap());
    let filler = bench.guest_on(Shape::mapped(64).indirect(12, 2), opened(&first));
    let greedy = bench.guest_on(Shape::mapped(16).indirect(256, 2), opened(&second));
    let victim = hung.victim(&mut bench);
    let every_second: Vec<u64> = (0..pages).step_by(2).collect();
    for some in every_second.chunks(64) {
        let device = &mut bench.guests[filler];
        for page in some {
            let id = device.free_buffer().unwrap() as u64;
            let discard = RawDiscard { flag: 0, handle: 0, id, sector: page * 8, nr_sectors: 8 };
            device.put_request(&RawRequest::Discard(discard), 0);
        }
        device.publish().unwrap();
        wait(&mut bench, filler, some.len());
    }
    bench.ask(filler, op::FLUSH_DISKCACHE, 1, 0);
    wait(&mut bench, filler, 1);
    bench.ask(greedy, op::WRITE, 8, 256);
    wait(&mut bench, greedy, 8);
    bench.ask(greedy, op::FLUSH_DISKCACHE, 1, 0);
    wait(&mut bench, greedy, 1);

    let in_time = hung.hangs_during(|| {
        hang(&mut bench, filler);
        bench.ask(greedy, op::READ, 8, 256);
        is_served(&mut bench, victim);
    });
    assert!(in_time, "the worker waited for the device");
}

/// Requests that wait for a frozen filesystem hold no tags of the device.
#[test]
fn a_frozen_filesystem_leaves_another_file_on_the_same_device_its_share() {
    const GREEDY: usize = 20;
    if !can_freeze() {
        return;
    }
    let folder = host::folder();
    let Some(filesystem) = Filesystem::new("ext4", folder.path(), 64 << 20, &[]) else { return };
    let [written, read] = ["written.img", "read.img"].map(|name| filesystem.folder().join(name));
    for image in [&written, &read] {
        full_file(image, 8 << 20);
    }
    let mut bench = Bench::over(HostEngine::new().unwrap());
    let shape = Shape::mapped(128).indirect(12, 2);
    let greedy: Vec<usize> =
        (0..GREEDY).map(|_| bench.guest_on(shape, opened_with(&written, shareable()))).collect();
    let victim = bench.guest_on(Shape::mapped(32), opened(&read));
    let frozen = host::freeze(filesystem.folder());
    for guest in &greedy {
        put_apart(&mut bench, *guest, op::WRITE, 128);
    }
    for _ in 0..50 {
        bench.pass();
    }
    put_apart(&mut bench, victim, op::READ, 32);
    wait(&mut bench, victim, 32);
    drop(frozen);
    for guest in greedy {
        wait(&mut bench, guest, 128);
    }
}

#[test]
fn a_barrier_that_fills_its_device_still_starts() {
    let folder = host::folder();
    let Some(filesystem) = Filesystem::new("ext4", folder.path(), 64 << 20, &[]) else { return };
    let image = filesystem.folder().join("disk.img");
    full_file(&image, 8 << 20);
    let _limits = [filesystem.limit("nr_requests", 4), filesystem.limit("max_sectors_kb", 4)];
    let (mut bench, _script) = scripted::bench();
    let guest = bench.guest_on(Shape::mapped(8), opened(&image));
    bench.ask(guest, op::WRITE_BARRIER, 1, 11);
    assert!(bench.settle());
    assert_eq!(bench.answers(guest), 1);
}

/// If a pass has several rings on its list, it looks at the clock for each.
#[test]
fn rings_that_wait_for_a_hung_device_cost_a_pass_nothing() {
    const WAITING: usize = 50;
    let folder = host::folder();
    let Some(filesystem) = Filesystem::new("ext4", folder.path(), 64 << 20, &[]) else { return };
    let image = filesystem.folder().join("disk.img");
    full_file(&image, 8 << 20);
    let _limit = filesystem.limit("nr_requests", 4);
    let (mut bench, script) = scripted::bench();
    let victim = bench.guest(Shape::mapped(8));
    for _ in 0..WAITING {
        let guest = bench.guest_on(Shape::mapped(8), opened_with(&image, shareable()));
        script.borrow_mut().hung.insert(guest);
        bench.ask(guest, op::READ, 8, 1);
    }
    assert!(bench.settle());
    let looks = Cell::new(0);
    for _ in 0..10 {
        bench.ask(victim, op::READ, 8, 1);
        looks.set(0);
        let now_ns = || {
            looks.set(looks.get() + 1);
            1
        };
        bench.worker.poll_once(now_ns).unwrap();
        assert_eq!(bench.answers(victim), 8);
    }
    assert!(looks.get() <= 3, "{} looks at the clock", looks.get());
}

//! A filesystem that is frozen, as by a snapshot: what is asked of it waits inside of the kernel.

use std::fs::File;
use std::io::Write;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use polldisk::blkif::codec::{RawDiscard, RawRequest};
use polldisk::blkif::op;
use polldisk::engine::host::HostEngine;
use polldisk::sim::SimXen;

use crate::guest::HANG;
use crate::host::{self, Filesystem, Frozen};
use crate::scripted::{Bench, Shape};
use crate::workers::{opened, opened_shared, zeroes};

/// Passes until a guest has this many answers.
fn wait(bench: &mut Bench<SimXen, HostEngine>, guest: usize, count: usize) {
    let (start, mut answers) = (Instant::now(), 0);
    while answers < count {
        assert!(start.elapsed() < HANG, "{answers} of {count} answers");
        bench.pass();
        answers += bench.answers(guest);
    }
}

#[test]
fn discards_and_writes_on_a_frozen_filesystem_leave_anothers_flushes_answered() {
    const DISCARDS: usize = 64;
    const WRITES: usize = 64;
    if !["fsfreeze", "umount"].into_iter().all(host::is_there) {
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
    let device = &mut bench.guests[slow];
    for number in 0..DISCARDS as u64 {
        let id = device.free_buffer().unwrap() as u64;
        let discard = RawDiscard { flag: 0, handle: 0, id, sector: number * 64, nr_sectors: 32 };
        device.put_request(&RawRequest::Discard(discard), 0);
    }
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

/// Thaws a filesystem after a while, since the kernel has no other end for a worker that waits for it
/// inside of a system call. Says whether it had to.
fn within(limit: Duration, frozen: Frozen, work: impl FnOnce()) -> bool {
    std::thread::scope(|scope| {
        let (done, is_done) = channel();
        let guard = scope.spawn(move || {
            let in_time = is_done.recv_timeout(limit).is_ok();
            drop(frozen);
            in_time
        });
        work();
        // One that has thawed it listens no more.
        let _ = done.send(());
        guard.join().unwrap()
    })
}

/// Whoever submits a request to a file of a filesystem sleeps in the kernel while its device has all the
/// requests that it can have.
#[test]
fn more_writes_than_a_device_takes_leave_another_guest_answered_if_it_hangs() {
    const WRITES: usize = 512;
    if !["fsfreeze", "umount"].into_iter().all(host::is_there) {
        return;
    }
    let folder = host::folder();
    let Some(below) = Filesystem::new("ext4", folder.path(), 256 << 20, &[]) else { return };
    // Its disk is a file on the other one.
    let Some(hung) = Filesystem::new("ext4", below.folder(), 64 << 20, &[]) else { return };
    let image = hung.folder().join("disk.img");
    let mut contents = File::create(&image).unwrap();
    contents.write_all(&vec![7; 8 << 20]).unwrap();
    contents.sync_all().unwrap();

    let mut bench = Bench::over(HostEngine::new().unwrap());
    let deep = Shape::mapped(WRITES).indirect(12, 4);
    let greedy = [(); 2].map(|()| bench.guest_on(deep, opened_shared(&image)));
    let victim = bench.guest_on(Shape::mapped(32), opened(&zeroes(folder.path())));

    let mut early = 0;
    let in_time = within(HANG / 2, host::freeze(below.folder()), || {
        for guest in greedy {
            let device = &mut bench.guests[guest];
            // Not side by side, so that the kernel makes no larger ones of them.
            for number in 0..WRITES as u64 {
                device.put(op::WRITE, number * 16, 4096);
            }
            device.publish().unwrap();
        }
        for _ in 0..100 {
            bench.ask(victim, op::WRITE, 8, 1);
            wait(&mut bench, victim, 8);
        }
        early = greedy.map(|guest| bench.answers(guest)).iter().sum();
    });
    assert!(in_time, "the worker waited for the device");
    assert_eq!(early, 0, "nothing is written to a device that hangs");
    for guest in greedy {
        wait(&mut bench, guest, WRITES);
    }
}

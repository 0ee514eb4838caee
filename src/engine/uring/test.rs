use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

use super::*;
use crate::park;
use crate::xen::shm::LocalPages;

/// Kicks and reaps until everything in flight is done.
fn finish(uring: &mut Uring) -> Vec<(u32, i32)> {
    let mut done = Vec::new();
    while uring.in_flight() > 0 {
        let completed = uring.arm().unwrap() || park::sleep(&[uring.completion_fd()], None)[0];
        uring.disarm(completed);
        uring.kick().unwrap();
        uring.reap(&mut done);
    }
    let mut done: Vec<_> =
        done.into_iter().map(|completion| (completion.ticket.slot(), completion.result)).collect();
    done.sort_unstable();
    done
}

fn start(uring: &mut Uring, file: &File, operation: &IoOp<'_>, slot: u32) {
    let submitted = uring.submit(&file.as_raw_fd(), operation, Ticket::new(0, slot), By::Worker);
    assert_eq!(submitted, Submitted::Started);
}

fn direct_file(len: u64) -> (tempfile::TempDir, File) {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = folder.path().join("disk.img");
    File::create(&path).unwrap().write_all(&vec![0; usize::try_from(len).unwrap()]).unwrap();
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
    (folder, file)
}

#[test]
fn scattered_pages_are_written_and_read_back() {
    let (_folder, file) = direct_file(1 << 20);
    let mut uring = Uring::new().unwrap();
    let pages = LocalPages::new(8);
    for index in 0..4u8 {
        pages.page(index.into()).copy_from(&[index + 1; 4096]);
    }
    // Backwards, and only a part of the last page.
    let from = [pages.page(3), pages.page(1), pages.page(0).part(512, 1024).unwrap()];
    let write = IoOp::Write { offset: 8192, buffers: &from };
    start(&mut uring, &file, &write, 7);
    assert_eq!(finish(&mut uring), [(7, 9216)]);

    let into = [pages.page(4), pages.page(5), pages.page(6).part(0, 1024).unwrap()];
    start(&mut uring, &file, &IoOp::Read { offset: 8192, buffers: &into }, 1);
    start(&mut uring, &file, &IoOp::Flush, 2);
    assert_eq!(finish(&mut uring), [(1, 9216), (2, 0)]);
    for (index, byte) in [(4, 4), (5, 2)] {
        let mut copy = [0; 4096];
        pages.page(index).copy_to(&mut copy);
        assert_eq!(copy, [byte; 4096]);
    }
}

#[test]
fn an_error_comes_back_as_its_errno() {
    let (_folder, file) = direct_file(4096);
    let mut uring = Uring::new().unwrap();
    let pages = LocalPages::new(1);
    let misaligned = [pages.page(0).part(1, 512).unwrap()];
    let read = IoOp::Read { offset: 1, buffers: &misaligned };
    start(&mut uring, &file, &read, 0);
    let flush = uring.submit(&-1, &IoOp::Flush, Ticket::new(0, 1), By::Worker);
    assert_eq!(flush, Submitted::Started);
    assert_eq!(finish(&mut uring), [(0, -libc::EINVAL), (1, -libc::EBADF)]);
}

/// The kernel has to be entered in between, and its list of completions overflows.
#[test]
fn more_operations_than_the_ring_has_room_for_are_all_taken_and_answered() {
    const OPERATIONS: u32 = limits::URING_COMPLETIONS + 100;
    const { assert!(OPERATIONS > limits::URING_ENTRIES) };
    let (_folder, file) = direct_file(4096);
    let mut uring = Uring::new().unwrap();
    let pages = LocalPages::new(1);
    let read = IoOp::Read { offset: 0, buffers: &[pages.page(0)] };
    (0..OPERATIONS).for_each(|slot| start(&mut uring, &file, &read, slot));
    assert_eq!(uring.in_flight(), OPERATIONS as usize);
    let slots: Vec<u32> = finish(&mut uring).into_iter().map(|(slot, _)| slot).collect();
    assert_eq!(slots, (0..OPERATIONS).collect::<Vec<_>>());
}

/// Queues what the kernel refuses to begin, after which it takes no more of the same kick.
fn stop_the_kernel(uring: &mut Uring, slot: u32) {
    let user_data = Ticket::new(0, slot).into_user_data();
    let entry = opcode::Nop::new().build().personality(u16::MAX).user_data(user_data);
    // SAFETY: it uses no memory.
    unsafe { uring.ring.submission().push(&entry) }.unwrap();
    uring.in_flight += 1;
}

#[test]
fn what_the_kernel_did_not_take_yet_keeps_its_vectors() {
    let (folder, file) = direct_file(1 << 20);
    let mut uring = Uring::new().unwrap();
    let pages = LocalPages::new(8);
    (0..8u8).for_each(|index| pages.page(index.into()).copy_from(&[index + 1; 4096]));
    // Of pages apart, so that each takes several vectors.
    let write = |uring: &mut Uring, slot: u32| {
        let first = slot as usize;
        let buffers = [pages.page(first), pages.page(first + 4), pages.page(first + 2)];
        let offset = u64::from(slot) * 3 * 4096;
        start(uring, &file, &IoOp::Write { offset, buffers: &buffers }, slot);
    };
    stop_the_kernel(&mut uring, 2);
    write(&mut uring, 0);
    uring.kick().unwrap();
    assert_eq!(uring.ring.submission().len(), 1, "the kernel took the first one only");
    write(&mut uring, 1);
    assert_eq!(finish(&mut uring), [(0, 3 * 4096), (1, 3 * 4096), (2, -libc::EINVAL)]);
    assert!(uring.vectors.is_empty());

    let written = std::fs::read(folder.path().join("disk.img")).unwrap();
    let firsts = written.chunks(4096).take(6).map(|page| page[0]);
    assert_eq!(firsts.collect::<Vec<_>>(), [1, 5, 3, 2, 6, 4]);
}

/// How many operations wait for the kick after each of `count` submissions.
fn waiting_after_each(uring: &mut Uring, file: &File, count: u32) -> Vec<usize> {
    let each = |slot| {
        start(uring, file, &IoOp::Flush, slot);
        uring.ring.submission().len()
    };
    (0..count).map(each).collect()
}

#[test]
fn storage_without_work_gets_it_at_once_and_with_work_at_the_kick() {
    let (_folder, file) = direct_file(4096);
    let mut uring = Uring::new().unwrap();
    for _ in 0..2 {
        let waiting = waiting_after_each(&mut uring, &file, 16);
        assert_eq!(waiting, [1, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]);
        uring.kick().unwrap();
        assert_eq!(waiting_after_each(&mut uring, &file, 16), (1..=16).collect::<Vec<_>>());
        assert_eq!(finish(&mut uring).len(), 32);
    }
}

/// Registers memory of our own, and returns buffers that carry the registration.
fn register<'a>(
    uring: &mut Uring,
    memory: &'a LocalPages,
) -> impl Fn(usize, usize) -> GuestBuf + use<'a> {
    let registration = uring.register(memory.run(0, memory.count())).unwrap();
    move |first, count| memory.run(first, count).registered(Some(registration))
}

#[test]
fn registered_memory_and_other_memory_hold_the_same_data() {
    let (_folder, file) = direct_file(1 << 20);
    let mut uring = Uring::new().unwrap();
    let (one, two, others) = (LocalPages::new(8), LocalPages::new(2), LocalPages::new(3));
    let registered = register(&mut uring, &one);
    let also_registered = register(&mut uring, &two);
    for index in 0..3u8 {
        one.page(index.into()).copy_from(&[index + 1; 4096]);
    }
    let write = IoOp::Write { offset: 4096, buffers: &[registered(0, 3)] };
    start(&mut uring, &file, &write, 0);
    assert_eq!(finish(&mut uring), [(0, 3 * 4096)]);

    let together = [others.run(0, 3)];
    let apart = [registered(7, 1), registered(5, 1), also_registered(1, 1)];
    let neighbours = [registered(3, 1), registered(4, 1)];
    for (slot, buffers) in [(1, &together[..]), (2, &apart), (3, &neighbours)] {
        let read = IoOp::Read { offset: 4096, buffers };
        start(&mut uring, &file, &read, slot);
    }
    assert_eq!(finish(&mut uring), [(1, 3 * 4096), (2, 3 * 4096), (3, 2 * 4096)]);
    let expected = [
        (others.page(0), 1),
        (others.page(2), 3),
        (one.page(7), 1),
        (two.page(1), 3),
        (one.page(3), 1),
        (one.page(4), 2),
    ];
    for (page, byte) in expected {
        let mut copy = [0; 4096];
        page.copy_to(&mut copy);
        assert_eq!(copy, [byte; 4096]);
    }
}

#[test]
fn a_place_in_the_table_that_was_given_back_is_the_next_memorys() {
    let (_folder, file) = direct_file(4096);
    let mut uring = Uring::new().unwrap();
    let places = uring.free.len();
    assert_eq!(places, usize::from(limits::REGISTERED_BUFFERS));
    let first = LocalPages::new(1);
    let registration = uring.register(first.page(0)).unwrap();
    assert_eq!(uring.free.len(), places - 1);
    uring.unregister(registration);
    assert_eq!(uring.free.len(), places);
    let second = LocalPages::new(1);
    second.page(0).copy_from(&[7; 4096]);
    let registered = register(&mut uring, &second);
    let read = IoOp::Read { offset: 0, buffers: &[registered(0, 1)] };
    start(&mut uring, &file, &read, 0);
    assert_eq!(finish(&mut uring), [(0, 4096)]);
    let mut copy = [7; 4096];
    second.page(0).copy_to(&mut copy);
    assert_eq!(copy, [0; 4096]);
}

#[test]
fn if_registering_is_refused_io_works_without_it() {
    let (_folder, file) = direct_file(4096);
    let mut uring = Uring::new().unwrap();
    let pages = LocalPages::new(1);
    let places = uring.free.len();
    // SAFETY: never accessed, which is why the kernel refuses it.
    let nowhere = unsafe { GuestBuf::from_raw(std::ptr::NonNull::dangling(), 4096) };
    assert!(uring.register(nowhere).is_err());
    assert_eq!(uring.free.len(), places);
    uring.free.clear();
    assert!(uring.register(pages.page(0)).is_err(), "the table is full");
    let read = IoOp::Read { offset: 0, buffers: &[pages.page(0)] };
    start(&mut uring, &file, &read, 0);
    assert_eq!(finish(&mut uring), [(0, 4096)]);
}

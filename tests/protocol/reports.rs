//! What a worker tells control, and how it ends.

use polldisk::blkif::op;
use polldisk::limits::{IN_FLIGHT_TOLD, WORKER_REPORTS};
use polldisk::msg::{Command, InFlight, InFlightRequest, Report, StorageFailure, is_full};
use polldisk::worker::serve;

use crate::draw::ERROR;
use crate::scripted::{Shape, bench};
use polldisk::sim::disk::Failure;

const SECOND: u64 = 1_000_000_000;

#[test]
fn requests_in_flight_are_reported_oldest_first() {
    let (mut bench, script) = bench();
    let guest = bench.guest(Shape::mapped(32));
    script.borrow_mut().hung.insert(guest);
    let asked = [(op::FLUSH_DISKCACHE, 1, 0), (op::WRITE, 1, 2), (op::READ, 10, 1)];
    for (number, (operation, count, pages)) in (1..).zip(asked) {
        bench.now_ns = number * SECOND;
        bench.ask(guest, operation, count, pages);
        assert!(bench.settle());
    }
    bench.now_ns = 9 * SECOND;
    for key in [bench.key(guest), bench.key(7)] {
        bench.commands.send(Command::TellInFlight(key)).unwrap();
        assert!(bench.settle());
    }
    let request = |operation, offset_bytes, len_bytes, taken: u64| InFlightRequest {
        operation,
        offset_bytes,
        len_bytes,
        age_ns: (9 - taken) * SECOND,
    };
    let oldest = vec![
        request("flush", 0, 0, 1),
        request("write", 0, 8192, 2),
        request("read", 0, 4096, 3),
        request("read", 4096, 4096, 3),
    ];
    assert_eq!(oldest.len(), IN_FLIGHT_TOLD);
    let Report::InFlight(key, told) = bench.report() else { panic!("an unexpected report") };
    assert_eq!((key, told), (bench.key(guest), InFlight { count: 12, oldest }));
    let Report::InFlight(_, nothing) = bench.report() else { panic!("an unexpected report") };
    assert_eq!(nothing, InFlight::default(), "a queue that is not served");
}

/// What control was told about storage: a failure, or (`None`) that there is room again.
fn told(bench: &crate::scripted::Bench) -> Vec<Option<StorageFailure>> {
    let told = |report| match report {
        Report::StorageFailed(_, failure) => Some(failure),
        Report::SpaceLeft(_) => None,
        other => panic!("{other:?}"),
    };
    bench.reports.reports.try_iter().map(told).collect()
}

#[test]
fn storage_failures_are_reported_ever_more_rarely_and_once_there_is_room_again() {
    let (mut bench, script) = bench();
    let guest = bench.guest(Shape::mapped(32));
    let mut play = |now_ns, errno, operation, count| {
        bench.now_ns = now_ns;
        script.borrow_mut().errno = errno;
        bench.ask(guest, operation, count, 1);
        assert!(bench.settle());
        let status = if errno.is_some() { ERROR } else { 0 };
        assert_eq!(bench.statuses(guest), vec![status; count]);
        told(&bench)
    };
    let failures = play(1, Some(libc::ENOSPC), op::WRITE, 20);
    let numbers: Vec<u64> = failures.iter().flatten().map(|told| told.errors_so_far).collect();
    assert_eq!(numbers, [1, 2, 4, 8, 16]);
    let third = StorageFailure {
        operation: "write",
        offset_bytes: 3 * 4096,
        len_bytes: 4096,
        errno: libc::ENOSPC,
        errors_so_far: 4,
    };
    assert_eq!(failures[2], Some(third));
    assert_eq!(play(SECOND, None, op::WRITE, 20), [], "too soon after the last report");
    assert_eq!(play(SECOND + 1, None, op::READ, 20), [], "a read needs no room");
    assert_eq!(play(SECOND + 1, None, op::WRITE, 20), [None]);
    assert_eq!(play(9 * SECOND, None, op::WRITE, 20), [], "reported only once");
    let failures = play(10 * SECOND, Some(libc::ENOSPC), op::WRITE, 3);
    assert_eq!(failures.len(), 1, "the first failure after that is reported: {failures:?}");
}

#[test]
fn a_later_write_that_succeeds_ends_full_storage_whatever_operation_found_it() {
    for (operation, pages) in [(op::WRITE, 1), (op::FLUSH_DISKCACHE, 0), (op::WRITE_BARRIER, 1)] {
        let (mut bench, script) = bench();
        let guest = bench.guest(Shape::mapped(32));
        script.borrow_mut().errno = Some(libc::ENOSPC);
        bench.ask(guest, operation, 1, pages);
        assert!(bench.settle());
        let [Some(failure)] = &told(&bench)[..] else { panic!("not one failure") };
        assert!(is_full(failure.errno));
        script.borrow_mut().errno = None;
        bench.now_ns = 2 * SECOND;
        bench.ask(guest, op::WRITE, 1, 1);
        assert!(bench.settle());
        assert_eq!(told(&bench), [None], "{}", failure.operation);
    }
}

#[test]
fn a_worker_never_waits_for_control_to_catch_up() {
    let (mut bench, _) = bench();
    let key = bench.key(7);
    for asked in 0..WORKER_REPORTS + 100 {
        bench.commands.send(Command::TakeLatency(key)).unwrap();
        if asked % 1000 == 999 {
            bench.settle();
        }
    }
    bench.settle();
    assert_eq!(bench.reports.reports.len(), WORKER_REPORTS, "the channel to control is full");
    let mut answers = 0;
    while answers < WORKER_REPORTS + 100 {
        answers += bench.reports.reports.try_iter().count();
        bench.settle();
    }
    let guest = bench.guest(Shape::mapped(8));
    bench.ask(guest, op::READ, 8, 1);
    assert!(bench.settle());
    assert_eq!(bench.answers(guest), 8);
}

#[test]
fn a_worker_that_fails_keeps_the_memory_that_storage_may_still_write_to() {
    for (failure, reason) in [(Failure::Error, "the host fails"), (Failure::Panic, "panicked")] {
        let (mut bench, script) = bench();
        let guest = bench.guest(Shape::mapped(8));
        script.borrow_mut().hung.insert(guest);
        bench.ask(guest, op::READ, 8, 1);
        assert!(bench.settle());
        script.borrow_mut().fails = Some(failure);
        let domain = bench.guests[guest].domain().clone();
        let mapped = domain.mapped_grants();
        assert!(mapped > 8, "its ring and its pages");
        let ended = serve(bench.worker).unwrap();
        assert!(ended.contains(reason), "{ended}");
        assert!(!script.borrow().is_dropped, "the engine is still there");
        assert_eq!(domain.mapped_grants(), mapped);
    }
}

#[test]
fn a_worker_that_ends_in_order_leaves_nothing() {
    let (mut bench, script) = bench();
    let guest = bench.guest(Shape::mapped(8));
    bench.ask(guest, op::READ, 8, 1);
    assert!(bench.settle());
    let domain = bench.guests[guest].domain().clone();
    bench.commands.send(Command::Stop).unwrap();
    assert_eq!(serve(bench.worker), None);
    assert!(script.borrow().is_dropped);
    assert_eq!(domain.mapped_grants(), 0);
}

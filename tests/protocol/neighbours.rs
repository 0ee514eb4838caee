//! One guest never costs another its disk: whatever resource it uses up, the others have their share.

use polldisk::blkif::op;
use polldisk::engine::host::HostEngine;
use polldisk::limits::{
    BOUNCE_PAGES_COMMON, MOVED_PAGE_EFFORT, REQUESTS_COMMON, REQUESTS_PER_QUEUE, TABLES_COMMON,
    TURN_EFFORT,
};
use polldisk::msg::Command;

use crate::scripted::{Bench, Shape, bench, null};

#[test]
fn hung_large_reads_by_copy_leave_memory_for_another_guests_small_reads() {
    const PAGES: usize = 256;
    const READS: usize = 32;
    const { assert!(READS * PAGES > 2 * BOUNCE_PAGES_COMMON) };
    let (mut bench, script) = bench();
    let greedy = bench.guest(Shape::copied(READS).indirect(PAGES, 0));
    let victim = bench.guest(Shape::copied(8));
    script.borrow_mut().hung.insert(greedy);
    bench.ask(greedy, op::READ, READS, PAGES);
    assert!(bench.settle());
    for _ in 0..100 {
        assert_eq!(bench.ask(victim, op::READ, 8, 1), 8);
        assert!(bench.settle(), "the worker sleeps even while a queue waits");
        assert_eq!(bench.answers(victim), 8);
    }
    script.borrow_mut().hung.clear();
    assert!(bench.settle());
    assert_eq!(bench.answers(greedy), READS, "requests that waited go on");
}

#[test]
fn a_request_of_the_largest_size_always_finds_bounce_memory() {
    const PAGES: usize = 1024;
    let (mut bench, script) = bench();
    let greedy = bench.guest(Shape::copied(4).indirect(PAGES, 0));
    let victim = bench.guest(Shape::copied(2).indirect(PAGES, 0));
    script.borrow_mut().hung.insert(greedy);
    bench.ask(greedy, op::WRITE, 4, PAGES);
    assert!(bench.settle());
    bench.ask(victim, op::WRITE, 2, PAGES);
    assert!(bench.settle());
    assert_eq!(bench.answers(victim), 2, "one after another");
}

#[test]
fn indirect_requests_that_hang_leave_tables_for_others_and_direct_ones_need_none() {
    const REQUESTS: usize = TABLES_COMMON + 100;
    let (mut bench, script) = bench();
    let greedy = bench.guest(Shape::mapped(REQUESTS).indirect(12, 5));
    let direct = bench.guest(Shape::mapped(32));
    let indirect = bench.guest(Shape::mapped(32).indirect(12, 0));
    script.borrow_mut().hung.insert(greedy);
    bench.ask_indirect(greedy, REQUESTS);
    assert!(bench.settle(), "the worker sleeps even while a queue waits for hung storage");
    assert!(script.borrow().taken.len() < REQUESTS, "some have no table");
    bench.ask(direct, op::READ, 32, 1);
    bench.ask_indirect(indirect, 32);
    assert!(bench.settle());
    assert_eq!([direct, indirect].map(|guest| bench.answers(guest)), [32, 32]);
    script.borrow_mut().hung.clear();
    assert!(bench.settle());
    assert_eq!(bench.answers(greedy), REQUESTS);
}

#[test]
fn requests_in_flight_on_storage_that_hangs_leave_room_for_others() {
    const EACH: usize = 1000;
    const GREEDY: usize = 3;
    const { assert!(GREEDY * EACH > REQUESTS_COMMON + GREEDY * REQUESTS_PER_QUEUE) };
    let (mut bench, script) = bench();
    for _ in 0..GREEDY {
        let greedy = bench.guest(Shape::mapped(EACH).indirect(12, 5));
        script.borrow_mut().hung.insert(greedy);
        bench.ask(greedy, op::READ, EACH, 1);
        assert!(bench.settle());
    }
    let in_flight = script.borrow().taken.len();
    assert_eq!(in_flight, REQUESTS_COMMON + GREEDY * REQUESTS_PER_QUEUE);
    let victim = bench.guest(Shape::mapped(REQUESTS_PER_QUEUE));
    bench.ask(victim, op::READ, REQUESTS_PER_QUEUE, 1);
    assert!(bench.settle());
    assert_eq!(bench.answers(victim), REQUESTS_PER_QUEUE);
    script.borrow_mut().hung.clear();
    assert!(bench.settle());
    assert!((0..GREEDY).all(|greedy| bench.answers(greedy) == EACH));
}

/// Nobody else gives anything back, so its own answers must make the queue look at its ring again.
#[test]
fn a_queue_that_answers_its_whole_share_at_once_goes_on_beside_hung_storage() {
    const GREEDY: usize = 4;
    const EACH: usize = REQUESTS_COMMON / GREEDY + REQUESTS_PER_QUEUE;
    const READS: usize = REQUESTS_PER_QUEUE + 8;
    let (mut bench, script) = bench();
    for _ in 0..GREEDY {
        let greedy = bench.guest(Shape::mapped(EACH).indirect(12, 5));
        script.borrow_mut().hung.insert(greedy);
        assert_eq!(bench.ask(greedy, op::READ, EACH, 1), EACH);
        assert!(bench.settle());
    }
    assert_eq!(
        script.borrow().taken.len(),
        GREEDY * EACH,
        "all that may be in flight are, and no guest waits for more"
    );
    let victim = bench.guest(Shape::copied(READS).indirect(12, 1));
    let leaving = bench.guest(Shape::mapped(8));
    assert!(bench.settle());
    // Beside the other queue, its turn ends before any data is copied; alone, it copies everything.
    bench.ask(victim, op::READ, READS, 1);
    bench.ask(leaving, op::READ, 1, 1);
    bench.commands.send(Command::Disconnect(bench.key(leaving))).unwrap();
    assert!(bench.settle());
    assert_eq!(bench.answers(victim), READS);
}

#[test]
fn queues_that_wait_for_the_same_thing_get_it_in_turn() {
    const GUESTS: usize = 4;
    let (mut bench, script) = bench();
    for _ in 0..GUESTS {
        bench.guest(Shape::mapped(32));
    }
    script.borrow_mut().room = Some(1);
    let mut answers = [0; GUESTS];
    for _ in 0..400 {
        for (guest, answers) in answers.iter_mut().enumerate() {
            bench.ask(guest, op::READ, 32, 1);
            *answers += bench.answers(guest);
        }
        bench.pass();
    }
    let [least, most] = [answers.iter().min(), answers.iter().max()].map(|count| *count.unwrap());
    assert!(least > 0 && most - least <= 2, "{answers:?}");
}

#[test]
fn an_operation_that_the_engine_keeps_does_not_block_its_ring() {
    let (mut bench, script) = bench();
    let guest = bench.guest(Shape::mapped(32));
    script.borrow_mut().parks_flushes = true;
    script.borrow_mut().per_reap = Some(0);
    bench.ask(guest, op::FLUSH_DISKCACHE, 3, 0);
    bench.ask(guest, op::READ, 8, 1);
    assert!(bench.settle(), "nothing that was taken is submitted again");
    let slots: Vec<u32> = script.borrow().taken.iter().map(|taken| taken.ticket.slot()).collect();
    assert_eq!(slots.len(), 11, "each once: {slots:?}");
    script.borrow_mut().taken.drain(..3).for_each(drop);
    script.borrow_mut().per_reap = None;
    assert!(bench.settle());
    assert_eq!(bench.answers(guest), 8);
}

#[test]
fn what_storage_has_no_room_for_is_submitted_again_only_after_a_completion() {
    let (mut bench, script) = bench();
    let guest = bench.guest(Shape::mapped(32));
    script.borrow_mut().room = Some(4);
    script.borrow_mut().hung.insert(guest);
    bench.ask(guest, op::READ, 32, 1);
    assert!(bench.settle(), "a worker with hung storage sleeps");
    assert_eq!(bench.answers(guest), 0);
    script.borrow_mut().hung.clear();
    assert!(bench.settle());
    assert_eq!(bench.answers(guest), 32);
}

#[test]
fn a_barrier_that_storage_has_no_room_for_is_submitted_again_after_another_completion() {
    let (mut bench, script) = bench();
    let [greedy, guest] = [8, 8].map(|buffers| bench.guest(Shape::mapped(buffers)));
    script.borrow_mut().room = Some(1);
    script.borrow_mut().hung.insert(greedy);
    bench.ask(greedy, op::READ, 1, 1);
    assert!(bench.settle());
    bench.ask(guest, op::WRITE_BARRIER, 1, 1);
    bench.ask(guest, op::READ, 4, 1);
    assert!(bench.settle());
    assert_eq!(bench.answers(guest), 0);
    script.borrow_mut().hung.clear();
    assert!(bench.settle());
    assert_eq!([greedy, guest].map(|guest| bench.answers(guest)), [1, 5]);
}

#[test]
fn a_barrier_that_waits_for_storage_lets_the_worker_sleep() {
    let (mut bench, script) = bench();
    let guest = bench.guest(Shape::mapped(8));
    script.borrow_mut().hung.insert(guest);
    for operation in [op::READ, op::WRITE_BARRIER, op::READ] {
        bench.ask(guest, operation, 1, 1);
    }
    assert!(bench.settle());
    assert_eq!(script.borrow().taken.len(), 1, "the barrier and the request after it wait");
    script.borrow_mut().hung.clear();
    assert!(bench.settle());
    assert_eq!(bench.answers(guest), 3);
}

/// While the clock stands still no queue is put off, so each has a turn in every pass.
#[test]
fn a_pass_copies_no_more_for_one_queue_than_a_turn_allows_if_another_is_busy_too() {
    const PAGES: usize = 256;
    let mut bench = Bench::over(HostEngine::new().unwrap());
    let greedy = bench.guest_on(Shape::copied(8).indirect(PAGES, 0), null(true));
    let victim = bench.guest_on(Shape::copied(8), null(true));
    let turn = u64::from(TURN_EFFORT / MOVED_PAGE_EFFORT);
    let mut answered = 0;
    for operation in [op::READ, op::WRITE] {
        // Only after the first pass does the worker know of both.
        bench.ask(victim, operation, 8, 1);
        bench.pass();
        for _ in 0..1000 {
            bench.answers(greedy);
            bench.ask(greedy, operation, 8, PAGES);
            answered += bench.answers(victim);
            bench.ask(victim, operation, 8, 1);
            let before = bench.counters[greedy].read().grants_copied;
            bench.pass();
            let copied = bench.counters[greedy].read().grants_copied - before;
            assert!(copied <= turn + 1, "{copied} pages in one pass, a page of segments included");
        }
    }
    assert!(answered > 2 * 5000, "only {answered} small requests were answered");
    let counts = bench.counters[greedy].read();
    assert!(counts.reads > 10 && counts.writes > 10, "large requests are completed, too");
}

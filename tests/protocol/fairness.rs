//! How much of a worker a modest guest gets beside greedy ones. The worker's clock advances only by what
//! the worker does, so that the same happens on every machine.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use polldisk::blkif::op;
use polldisk::sim::LocalStandIn;
use polldisk::sim::grants::SimGrants;
use polldisk::units::{DomId, GrantRef};
use polldisk::xen::shm::GuestPages;
use polldisk::xen::{GrantCopy, Grants, PageAccess};

use crate::scripted::{Bench, InFront, Shape, WithGrants, storage};
use polldisk::sim::disk::Script;

/// A look at the clock, and whatever else a queue costs in a pass.
const LOOK_NS: u64 = 50;
/// A system call.
const CALL_NS: u64 = 500;
/// A page copied.
const PAGE_NS: u64 = 700;

/// The worker's time.
#[derive(Clone, Default)]
struct Clock(Arc<AtomicU64>);

impl Clock {
    fn add(&self, ns: u64) -> u64 {
        self.0.fetch_add(ns, Ordering::Relaxed) + ns
    }

    fn now_ns(&self) -> u64 {
        self.add(0)
    }
}

/// The stand-in, with maps and copies that advance the clock.
type Timed = WithGrants<Clock>;

struct TimedGrants(SimGrants, Clock);

impl InFront for Clock {
    type Grants = TimedGrants;

    fn put(&self, grants: SimGrants) -> TimedGrants {
        TimedGrants(grants, self.clone())
    }
}

impl Grants for TimedGrants {
    fn map(
        &mut self,
        domid: DomId,
        refs: &[GrantRef],
        access: PageAccess,
    ) -> io::Result<GuestPages> {
        self.1.add(CALL_NS);
        self.0.map(domid, refs, access)
    }

    fn unmap(&mut self, pages: GuestPages) -> io::Result<()> {
        self.1.add(CALL_NS);
        self.0.unmap(pages)
    }

    fn copy(&mut self, domid: DomId, segments: &mut [GrantCopy]) -> io::Result<()> {
        if !segments.is_empty() {
            self.1.add(CALL_NS + PAGE_NS * segments.len() as u64);
        }
        self.0.copy(domid, segments)
    }
}

/// A bench whose worker runs by the returned clock, and the script of its storage.
fn timed() -> (Bench<Timed>, Clock, Rc<RefCell<Script>>) {
    let (stand_in, clock) = (LocalStandIn::new().unwrap(), Clock::default());
    let (engine, script) = storage();
    script.borrow_mut().clock = Some(Arc::clone(&clock.0));
    let platform = WithGrants(stand_in.platform(), clock.clone());
    (Bench::on(platform, engine, stand_in), clock, script)
}

/// One pass of the worker, in which each look at the clock takes time; then kernel threads have its core.
fn pass(bench: &mut Bench<Timed>, clock: &Clock, script: &RefCell<Script>) {
    bench.worker.poll_once(|| clock.add(LOOK_NS)).unwrap();
    clock.add(std::mem::take(&mut script.borrow_mut().threads_ns));
}

/// What a guest does throughout: `depth` requests in flight, each of `pages` pages.
#[derive(Clone, Copy)]
struct Load {
    shape: Shape,
    operation: u8,
    depth: usize,
    pages: usize,
    /// Pause between the last answer and the next requests.
    thinks_ns: u64,
    /// Each operation is slow to submit.
    slow: bool,
}

fn small(thinks_ns: u64) -> Load {
    let shape = Shape::mapped(8);
    Load { shape, operation: op::READ, depth: 8, pages: 1, thinks_ns, slow: false }
}

fn flushes() -> Load {
    let shape = Shape::mapped(32);
    Load { shape, operation: op::FLUSH_DISKCACHE, depth: 32, pages: 0, ..small(0) }
}

fn large(operation: u8) -> Load {
    let shape = Shape::copied(32).indirect(256, 0);
    Load { shape, operation, depth: 32, pages: 256, thinks_ns: 0, slow: false }
}

/// Requests of each guest answered while the worker's clock advances by `lasts_ns`.
fn play(loads: &[Load], lasts_ns: u64) -> Vec<usize> {
    play_with(loads, lasts_ns, |_| ())
}

/// The same on storage that `kind` sets up.
fn play_with(loads: &[Load], lasts_ns: u64, kind: impl FnOnce(&mut Script)) -> Vec<usize> {
    let (mut bench, clock, script) = timed();
    kind(&mut script.borrow_mut());
    for load in loads {
        let guest = bench.guest(load.shape);
        if load.slow {
            script.borrow_mut().slow.insert(guest);
        }
    }
    let (mut answers, mut ready_ns) = (vec![0; loads.len()], vec![0; loads.len()]);
    let start_ns = clock.now_ns();
    while clock.now_ns() - start_ns < lasts_ns {
        for (guest, load) in loads.iter().enumerate() {
            let answered = bench.answers(guest);
            answers[guest] += answered;
            if answered > 0 {
                ready_ns[guest] = clock.now_ns() + load.thinks_ns;
            }
            if clock.now_ns() >= ready_ns[guest] {
                bench.ask(guest, load.operation, load.depth, load.pages);
            }
        }
        pass(&mut bench, &clock, &script);
    }
    answers
}

#[test]
fn small_reads_are_as_fast_beside_greedy_guests_as_beside_modest_ones() {
    const LASTS_NS: u64 = 50_000_000;
    let flushes = flushes();
    let slow = Load { slow: true, depth: 32, shape: Shape::mapped(32), ..small(0) };
    let indirect = Load { shape: Shape::mapped(32).indirect(12, 0), pages: 12, ..slow };
    for thinks_ns in [0, 1_000, 20_000, 100_000, 400_000] {
        let victim = small(thinks_ns);
        let beside = |others: [Load; 4]| {
            let [one, two, three, four] = others;
            play(&[victim, one, two, three, four], LASTS_NS)[0]
        };
        let polite = beside([small(0); 4]);
        let (read, write) = (large(op::READ), large(op::WRITE));
        for (what, others) in [
            ("large reads", [read; 4]),
            ("large writes", [write; 4]),
            ("flushes", [flushes; 4]),
            ("slow storage", [slow; 4]),
            ("slow storage, by indirect requests", [indirect; 4]),
            ("all of that", [read, write, flushes, indirect]),
        ] {
            let greedy = beside(others);
            assert!(
                greedy * 10 >= polite * 8,
                "{what}, {thinks_ns} ns between requests: {greedy} beside {polite}"
            );
        }
    }
}

#[test]
fn the_time_to_submit_large_requests_is_charged_to_the_guest_that_sends_them() {
    const LASTS_NS: u64 = 50_000_000;
    let large = Load { shape: Shape::mapped(4).indirect(256, 0), depth: 4, pages: 256, ..small(0) };
    let pages_in_kick =
        |loads: &[Load]| play_with(loads, LASTS_NS, |script| script.kick_page_ns = 80)[0];
    let polite = pages_in_kick(&[small(0); 5]);
    let beside = pages_in_kick(&[small(0), large, large, large, large]);
    assert!(beside * 10 >= polite * 8, "{beside} beside {polite}");
}

#[test]
fn flushes_are_charged_for_the_time_of_kernel_threads() {
    const LASTS_NS: u64 = 50_000_000;
    let polite = play(&[small(0); 5], LASTS_NS)[0];
    let [one, two, three, four] = [flushes(); 4];
    let loads = [small(0), one, two, three, four];
    // For each, a kernel thread takes the worker's core for a while.
    let beside = play_with(&loads, LASTS_NS, |script| script.flush_ns = 20_000)[0];
    assert!(beside * 10 >= polite * 8, "{beside} beside {polite}");
}

#[test]
fn greedy_guests_get_equal_shares_of_what_others_leave() {
    let (read, write) = (large(op::READ), large(op::WRITE));
    let answers = play(&[small(100_000), read, read, write], 100_000_000);
    let pages: Vec<usize> = answers[1..].iter().map(|count| count * 256).collect();
    let [least, most] = [pages.iter().min(), pages.iter().max()].map(|pages| *pages.unwrap());
    assert!(least * 10 >= most * 7, "{pages:?}");
    let copied = pages.iter().sum::<usize>() as u64;
    assert!(copied * PAGE_NS > 60_000_000, "the worker is kept busy with copies: {copied} pages");
}

#[test]
fn a_queue_without_work_does_not_split_the_turns_of_others() {
    let (mut bench, clock, script) = timed();
    for _ in 0..3 {
        bench.guest(Shape::mapped(32));
    }
    let (idle, busy) = (0, [1, 2]);
    bench.ask(idle, op::READ, 1, 1);
    for round in 0..1000 {
        let answers = busy.map(|guest| {
            let answers = bench.answers(guest);
            bench.ask(guest, op::READ, 32, 1);
            answers
        });
        pass(&mut bench, &clock, &script);
        assert!(round < 100 || answers.iter().all(|count| *count > 0), "{round}: {answers:?}");
    }
}

#[test]
fn a_barrier_has_its_turn_even_if_another_guest_is_about_to_return() {
    let (mut bench, clock, script) = timed();
    let [seldom, busy] = [8, 32].map(|buffers| bench.guest(Shape::mapped(buffers)));
    let (mut asks_ns, mut asked_ns) = (0, clock.now_ns());
    while clock.now_ns() < 50_000_000 {
        bench.answers(seldom);
        if clock.now_ns() >= asks_ns {
            bench.ask(seldom, op::READ, 1, 1);
            asks_ns = clock.now_ns() + 100_000;
        }
        bench.answers(busy);
        if bench.guests[busy].in_flight() == 0 {
            bench.ask(busy, op::READ, 20, 1);
            bench.ask(busy, op::WRITE_BARRIER, 1, 1);
            asked_ns = clock.now_ns();
        }
        pass(&mut bench, &clock, &script);
        let waits_ns = clock.now_ns() - asked_ns;
        assert!(waits_ns < 1_000_000, "a barrier has waited for {waits_ns} ns");
    }
}

use std::sync::Arc;
use std::time::Instant;

use polldisk::blkif::codec::{RawRequest, RawResponse};
use polldisk::blkif::ring::BackRing;
use polldisk::blkif::{Status, op};
use polldisk::sim::blkfront::device::Options;
use polldisk::sim::blkfront::xenbus::Published;
use polldisk::sim::events::SimEvents;
use polldisk::sim::grants::SimGrants;
use polldisk::sim::{SimXen, StandIn};
use polldisk::units::DomId;
use polldisk::xen::shm::SharedPage;
use polldisk::xen::{CopyDirection, GrantCopy, Grants, PageAccess, Platform};

use super::*;
use crate::arrivals::Schedule;
use crate::kernel::SimKernel;
use crate::load::crowd::{Count, Guest, Progress};
use crate::pattern::Shape;
use crate::queue::Operation;

const BLOCK_BYTES: usize = 4096;

/// A queue and its backend's end, in one thread. The rings stay valid as long as this lives.
pub(crate) struct Ends {
    pub(crate) queue: Queue<SimEvents>,
    pub(crate) back: BackRing,
    grants: SimGrants,
    pub(crate) events: SimEvents,
    domid: DomId,
    _kernel: SimKernel,
    _stand_in: StandIn,
}

fn ends(options: Options, block_bytes: usize) -> Ends {
    ends_for(options, block_bytes, &[Operation::Read])
}

pub(crate) fn ends_for(options: Options, block_bytes: usize, operations: &[Operation]) -> Ends {
    let stand_in = StandIn::start_temporary().unwrap();
    let platform: SimXen = stand_in.platform();
    let domid = DomId::try_from(1).unwrap();
    let pages = u32::try_from(options.device_pages()).unwrap();
    let kernel = SimKernel(Arc::new(stand_in.create_domain(domid, pages).unwrap()));
    let queue = Queue::new(&kernel, &options, block_bytes, operations).unwrap();
    let mut grants = platform.open_grants().unwrap();
    let mut events = platform.open_events().unwrap();
    events.bind_interdomain(domid, queue.port()).unwrap();
    let ring = grants.map(domid, queue.ring_refs(), PageAccess::ReadWrite).unwrap();
    let back = BackRing::attach(SharedPage::over(ring), options.protocol).unwrap();
    Ends { queue, back, grants, events, domid, _kernel: kernel, _stand_in: stand_in }
}

fn with_depth(buffers: usize) -> Ends {
    ends(Options { buffers, ..Options::default() }, BLOCK_BYTES)
}

/// Answers all waiting requests and returns them in their order.
pub(crate) fn answer(back: &mut BackRing, status: Status) -> Vec<RawRequest> {
    let requests: Vec<_> = (0..back.requests().unwrap()).map(|_| back.take()).collect();
    for request in &requests {
        back.answer(&RawResponse::new(request.id(), request.operation(), status));
    }
    back.publish();
    requests
}

struct Shared {
    phase: Phase,
    gauge: Gauge,
    clock: Clock,
}

fn shared() -> Shared {
    Shared { phase: Phase::default(), gauge: Gauge::default(), clock: Clock::start() }
}

fn load<'a>(
    queue: &'a mut Queue<SimEvents>,
    shared: &'a Shared,
    arrivals: Arrivals,
    read_percent: u64,
) -> Load<'a, SimEvents> {
    let shape =
        Shape { sectors: 0..1 << 20, block_bytes: BLOCK_BYTES, sequential: true, read_percent };
    let pattern = shape.pattern(0, 1, 7).unwrap();
    let Shared { phase, gauge, clock } = shared;
    Load::new(queue, pattern, arrivals, Wait::Busy, *clock, phase, gauge, Tally::new(1))
}

#[test]
fn a_closed_loop_keeps_the_depth_in_flight_and_counts_only_samples() {
    let mut ends = with_depth(4);
    let shared = shared();
    let mut load = load(&mut ends.queue, &shared, Arrivals::Closed, 50);
    assert!(load.pass(0).unwrap());
    assert!(!load.pass(0).unwrap(), "all requests are in flight");
    let first = answer(&mut ends.back, Status::Okay);
    assert_eq!(first.len(), 4);
    assert!(load.pass(0).unwrap(), "the warm-up");
    answer(&mut ends.back, Status::Okay);
    assert!(load.pass(1).unwrap(), "the sample");
    assert_eq!((load.tally.started, shared.gauge.completed.get()), (12, 8));
    let [sample] = &load.tally.samples[..] else { panic!() };
    assert_eq!(sample.reads.len() + sample.writes.len(), 4);
    assert!(sample.reads.max() < 60_000_000_000);
}

#[test]
fn requests_name_whole_granted_pages_at_places_of_the_pattern() {
    let mut ends = with_depth(3);
    let shared = shared();
    let mut load = load(&mut ends.queue, &shared, Arrivals::Closed, 0);
    load.pass(0).unwrap();
    let mut data = [[0u8; BLOCK_BYTES]; 3];
    let requests = answer(&mut ends.back, Status::Okay);
    for ((request, expected), data) in requests.iter().zip([0, 8, 16]).zip(&mut data) {
        let RawRequest::Direct(direct) = request else { panic!("{request:?}") };
        assert_eq!((direct.operation, direct.nr_segments, direct.sector), (op::WRITE, 1, expected));
        let segment = direct.segments[0];
        assert_eq!((segment.first, segment.last), (0, 7));
        let copy = GrantCopy {
            gref: polldisk::units::GrantRef(segment.gref),
            offset: 0,
            len: 4096,
            local: data.as_mut_ptr(),
            direction: CopyDirection::FromGuest,
            status: -1,
        };
        let mut copies = [copy];
        ends.grants.copy(ends.domid, &mut copies).unwrap();
        assert_eq!(copies[0].status, 0);
    }
    assert!(data[0] != data[1] && data[1] != data[2], "no two buffers hold the same");
}

#[test]
fn indirect_requests_name_their_segments_in_pages() {
    let options = Options { buffers: 1, segments: 600, ..Options::default() };
    let mut ends = ends(options, 600 * 4096 - 512);
    ends.queue.start(1, op::READ, 64);
    ends.queue.publish().unwrap();
    let requests = answer(&mut ends.back, Status::Okay);
    let [RawRequest::Indirect(indirect)] = &requests[..] else { panic!("{requests:?}") };
    assert_eq!((indirect.operation, indirect.nr_segments, indirect.sector), (op::READ, 600, 64));
    let refs = indirect.pages.map(polldisk::units::GrantRef);
    let pages = ends.grants.map(ends.domid, &refs[..2], PageAccess::ReadOnly).unwrap();
    let mut table = vec![0; 600 * 8];
    pages.page(0).copy_to(&mut table[..4096]);
    pages.page(1).copy_to(&mut table[4096..]);
    let lasts: Vec<u8> = table.chunks(8).map(|word| word[5]).collect();
    assert!(lasts[..599].iter().all(|last| *last == 7));
    assert_eq!(lasts[599], 6, "the last page is short of a sector");
    let mut grefs: Vec<_> = table.chunks(8).map(|word| word[..4].to_vec()).collect();
    grefs.sort();
    grefs.dedup();
    assert_eq!(grefs.len(), 600, "each segment has a page of its own");
    assert_eq!(refs[2], polldisk::units::GrantRef(0));
}

#[test]
fn latencies_under_a_schedule_count_from_when_a_request_was_due() {
    let mut ends = with_depth(1);
    let shared = shared();
    let start_ns = shared.clock.now_ns();
    let schedule = Schedule::new(start_ns, 1000, 0, 1);
    let mut load = load(&mut ends.queue, &shared, Arrivals::Open(schedule), 100);
    load.pass(0).unwrap();
    // Ten more become due while the only request is in flight.
    shared.clock.sleep_until(start_ns + 10_500_000);
    for _ in 0..11 {
        assert_eq!(answer(&mut ends.back, Status::Okay).len(), 1);
        load.pass(1).unwrap();
    }
    let [sample] = &load.tally.samples[..] else { panic!() };
    assert_eq!(sample.reads.len(), 11);
    // The first was due at 0, the last at 10 ms.
    assert!(sample.reads.max() >= 10_400_000 && sample.reads.min() >= 400_000);
    assert!(sample.reads.mean() >= 5_000_000.0, "every request's wait counts");
    assert!(load.tally.late_max_ns >= 9_000_000);
}

#[test]
fn failed_requests_are_counted_and_the_first_is_kept() {
    let mut ends = with_depth(2);
    let shared = shared();
    let mut load = load(&mut ends.queue, &shared, Arrivals::Closed, 100);
    load.pass(0).unwrap();
    answer(&mut ends.back, Status::Error);
    load.pass(1).unwrap();
    assert_eq!(load.tally.errors, 2);
    assert_eq!(load.tally.first_error, Some(Failed { status: -1, is_read: true, sector: 0 }));
    assert_eq!(load.tally.samples[0].reads.len(), 0, "its latency does not count");
}

#[test]
fn an_idle_load_still_drives_its_neighbours() {
    let mut ends = with_depth(1);
    let mut neighbour = with_depth(20);
    let (shared, count) = (shared(), Count::default());
    let pattern = Shape { sectors: 0..64, block_bytes: 512, sequential: true, read_percent: 100 };
    let guest = Guest {
        queue: &mut neighbour.queue,
        pattern: pattern.pattern(0, 1, 7).unwrap(),
        storms: false,
        count: &count,
    };
    let load =
        load(&mut ends.queue, &shared, Arrivals::Closed, 100).beside(Some(Crowd::new(vec![guest])));
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| load.run());
        while count.read().started < 20 {
            std::thread::yield_now();
        }
        answer(&mut neighbour.back, Status::Okay);
        while count.read().started < 40 {
            std::thread::yield_now();
        }
        shared.phase.stop();
        // The load may start one more request before it sees the stop. It does not wait for the neighbour's
        // requests.
        while !thread.is_finished() {
            answer(&mut ends.back, Status::Okay);
            std::thread::yield_now();
        }
        assert!((1..=2).contains(&thread.join().unwrap().unwrap().started));
    });
    assert_eq!(count.read(), Progress { started: 40, completed: 20, errors: 0, notified: 1 });
}

#[test]
fn an_answer_to_no_request_is_an_error() {
    let mut ends = with_depth(2);
    let shared = shared();
    let mut load = load(&mut ends.queue, &shared, Arrivals::Closed, 100);
    load.pass(0).unwrap();
    let id = ends.back.take().id();
    ends.back.take();
    for _ in 0..2 {
        ends.back.answer(&RawResponse::new(id, op::READ, Status::Okay));
    }
    ends.back.publish();
    let error = load.pass(0).unwrap_err().to_string();
    assert_eq!(
        error,
        format!("the backend answered a request with the id {id:#x}, which is not in flight")
    );
}

#[test]
fn the_end_waits_for_all_answers_unless_the_run_is_given_up() {
    let mut ends = with_depth(4);
    let shared = shared();
    let mut first = load(&mut ends.queue, &shared, Arrivals::Closed, 100);
    first.pass(0).unwrap();
    answer(&mut ends.back, Status::Okay);
    shared.phase.stop();
    let tally = first.run().unwrap();
    assert_eq!((tally.started, shared.gauge.completed.get()), (4, 4));
    let mut second = load(&mut ends.queue, &shared, Arrivals::Closed, 100);
    second.pass(0).unwrap();
    shared.phase.abandon();
    assert!(matches!(second.run(), Err(LoadError::Abandoned(4))));
}

/// Measures what a request costs both ends in one thread: `cargo test --release -p loadgen --lib
/// -- --ignored --nocapture`. `blkload --echo` measures them on two cores.
#[test]
#[ignore = "a measurement, for a quiet machine"]
fn cost_of_a_request() {
    let mut ends = with_depth(32);
    let shared = shared();
    let mut load = load(&mut ends.queue, &shared, Arrivals::Closed, 70);
    let mut best = f64::INFINITY;
    for _ in 0..200 {
        let start = Instant::now();
        for _ in 0..1000 {
            load.pass(1).unwrap();
            for _ in 0..ends.back.requests().unwrap() {
                let request = ends.back.take();
                ends.back.answer(&RawResponse::new(
                    request.id(),
                    request.operation(),
                    Status::Okay,
                ));
            }
            ends.back.publish();
        }
        best = best.min(start.elapsed().as_secs_f64() * 1e9 / 32_000.0);
    }
    println!("{best:.1} ns per request for the load and the echo together");
}

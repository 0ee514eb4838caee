use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::blkif::codec::RawDirect;
use crate::blkif::{Status, op};
use crate::xen::shm::{LocalPages, PAGE_BYTES};

/// The two ends of one ring over the same memory.
struct Ends {
    front: FrontRing,
    back: BackRing,
    _memory: LocalPages,
}

#[allow(unsafe_code)]
fn ends(pages: usize, protocol: Protocol) -> Ends {
    let memory = LocalPages::new(pages);
    // SAFETY: the memory is kept beside both views.
    let view = || unsafe { SharedPage::from_raw(memory.page(0).address(), pages * PAGE_BYTES) };
    let front = FrontRing::init(view(), protocol);
    let back = BackRing::attach(view(), protocol).unwrap();
    Ends { front, back, _memory: memory }
}

fn read(id: u64) -> RawRequest {
    RawRequest::Direct(RawDirect::new(op::READ, id, 8 * id))
}

fn okay(id: u64) -> RawResponse {
    RawResponse::new(id, op::READ, Status::Okay)
}

#[test]
fn ring_sizes_are_those_of_the_header() {
    for protocol in [Protocol::X86_64, Protocol::X86_32] {
        let sizes = [1, 2, 4, 8, 16, 32].map(|pages| ring_entries(pages * PAGE_BYTES, protocol));
        assert_eq!(sizes, [32, 64, 128, 256, 512, 1024]);
    }
}

#[test]
fn one_publication_makes_at_most_one_notification() {
    let mut ends = ends(1, Protocol::X86_64);
    for id in 0..10 {
        ends.front.put(&read(id));
    }
    assert!(ends.front.publish(), "req_event is 1 on a new ring");
    assert_eq!(ends.back.requests(), Ok(10));
    for _ in 0..10 {
        let raw = ends.back.take();
        ends.back.answer(&okay(raw.id()));
    }
    assert!(ends.back.publish(), "rsp_event is 1 on a new ring");
    assert!(!ends.back.publish(), "nothing new to publish");
}

#[test]
fn a_backend_that_polls_is_never_notified() {
    let mut ends = ends(1, Protocol::X86_64);
    ends.front.put(&read(0));
    ends.front.publish();
    for id in 1..100 {
        ends.back.take();
        ends.back.answer(&okay(id - 1));
        ends.back.publish();
        ends.front.next_response().unwrap();
        ends.front.put(&read(id));
        assert!(!ends.front.publish(), "req_event is stale while the backend polls");
    }
    ends.back.take();
    assert!(!ends.back.arm(), "nothing waits");
    ends.front.put(&read(100));
    assert!(ends.front.publish(), "an armed backend is notified");
}

#[test]
fn a_backend_that_disarmed_is_not_notified() {
    let mut ends = ends(1, Protocol::X86_64);
    ends.front.put(&read(0));
    ends.front.publish();
    ends.back.take();
    assert!(!ends.back.arm());
    ends.back.disarm();
    for id in 1..20 {
        ends.front.put(&read(id));
        assert!(!ends.front.publish(), "request {id}");
    }
    assert_eq!(ends.back.requests(), Ok(19));
}

#[test]
fn arming_sees_what_came_in_between() {
    let mut ends = ends(1, Protocol::X86_64);
    ends.front.put(&read(0));
    ends.front.publish();
    assert!(ends.back.arm());
}

#[test]
fn a_req_prod_too_far_ahead_is_a_fault_and_not_a_loop() {
    for ahead in [33, 1 << 31, u32::MAX] {
        let mut ends = ends(1, Protocol::X86_64);
        ends.front.forge_req_prod(ahead);
        assert!(matches!(ends.back.requests(), Err(RingFault::Overflow { .. })), "{ahead}");
        assert!(ends.back.arm(), "a fault is work: the next pass reports it");
    }
}

#[test]
fn a_req_prod_that_goes_back_yields_no_request() {
    let mut ends = ends(1, Protocol::X86_64);
    for id in 0..4 {
        ends.front.put(&read(id));
    }
    ends.front.publish();
    for _ in 0..4 {
        ends.back.take();
    }
    ends.front.forge_req_prod(2);
    assert_eq!(ends.back.requests(), Ok(0));
}

#[test]
fn a_new_backend_goes_on_where_the_old_one_stopped() {
    let memory = LocalPages::new(1);
    #[allow(unsafe_code)]
    // SAFETY: the memory outlives both views.
    let view = || unsafe { SharedPage::from_raw(memory.page(0).address(), PAGE_BYTES) };
    let mut front = FrontRing::init(view(), Protocol::X86_64);
    let mut old = BackRing::attach(view(), Protocol::X86_64).unwrap();
    for id in 0..3 {
        front.put(&read(id));
    }
    front.publish();
    let first = old.take();
    old.answer(&okay(first.id()));
    old.publish();
    let mut new = BackRing::attach(old.into_page(), Protocol::X86_64).unwrap();
    assert_eq!(new.requests(), Ok(2));
    assert_eq!(new.take().id(), 1);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Put,
    PublishRequests,
    Take,
    Answer,
    PublishResponses,
    Receive,
    Disarm,
}

proptest! {
    /// Any order of steps at the two ends moves every request and response across once, in order,
    /// and neither end ever sees more than was published.
    #[test]
    fn nothing_is_lost_or_duplicated(
        steps in prop::collection::vec(
            prop::sample::select(vec![
                Step::Put, Step::PublishRequests, Step::Take, Step::Answer,
                Step::PublishResponses, Step::Receive, Step::Disarm,
            ]),
            0..600,
        ),
        protocol in prop_oneof![Just(Protocol::X86_64), Just(Protocol::X86_32)],
    ) {
        let mut ends = ends(1, protocol);
        let (mut next_id, mut taken) = (0u64, VecDeque::new());
        let (mut put, mut on_ring) = (VecDeque::new(), VecDeque::new());
        let (mut answered, mut back_on_ring) = (VecDeque::new(), VecDeque::new());
        for step in steps {
            match step {
                Step::Put if ends.front.free() > 0 => {
                    ends.front.put(&read(next_id));
                    put.push_back(next_id);
                    next_id += 1;
                }
                Step::PublishRequests => {
                    ends.front.publish();
                    on_ring.append(&mut put);
                }
                Step::Take if ends.back.requests().unwrap() > 0 => {
                    let id = ends.back.take().id();
                    prop_assert_eq!(Some(id), on_ring.pop_front());
                    taken.push_back(id);
                }
                Step::Answer => if let Some(id) = taken.pop_front() {
                    ends.back.answer(&okay(id));
                    answered.push_back(id);
                },
                Step::PublishResponses => {
                    ends.back.publish();
                    back_on_ring.append(&mut answered);
                }
                Step::Receive => {
                    let response = ends.front.next_response();
                    prop_assert_eq!(response, back_on_ring.pop_front().map(okay));
                }
                Step::Disarm => ends.back.disarm(),
                Step::Put | Step::Take => {}
            }
            prop_assert_eq!(ends.back.requests().unwrap() as usize, on_ring.len());
            prop_assert_eq!(ends.back.in_flight() as usize, taken.len());
            let unanswered = put.len() + on_ring.len() + taken.len();
            let on_their_way = answered.len() + back_on_ring.len();
            prop_assert_eq!(ends.front.in_flight() as usize, unanswered + on_their_way);
        }
    }
}

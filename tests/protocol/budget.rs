//! What all queues of a domain may map together.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use polldisk::backing::{Image, NullImage};
use polldisk::blkif::op;
use polldisk::budget::{GrantBudget, HostBudget};
use polldisk::engine::host::HostEngine;
use polldisk::engine::{By, Completion, Engine, IoOp, Layer, RegisterBuffers, Submitted, Ticket};
use polldisk::limits::{PERSISTENT_IDLE_SWEEPS, PERSISTENT_SWEEP_SECONDS};
use polldisk::msg::GrantMode;
use polldisk::sim::LocalStandIn;
use polldisk::sim::blkfront::device::Options;
use polldisk::sim::grants::SimGrants;
use polldisk::units::{Bytes, DomId, GrantRef};
use polldisk::xen::shm::{GuestBuf, GuestPages, Registration};
use polldisk::xen::{GrantCopy, Grants, PageAccess};

use crate::alone;
use crate::draw::{Combination, Request, SECTORS};
use crate::guest::{Disk, Guest, HANG};
use crate::scripted::{Bench, InFront, Shape, WithGrants, bench, null, storage};
use crate::workers::Rig;

/// Far below what four queues of large requests would map.
const BUDGET: usize = 300;

#[test]
fn the_queues_of_a_domain_map_no_more_than_its_budget_and_copy_the_rest() {
    const QUEUES: usize = 4;
    const PAGES: usize = 64;
    let mut rig = Rig::start();
    let bad_gref = rig.domain.reserve_refs(1).unwrap()[0];
    let mut disk = Disk::new(1, bad_gref);
    for grant_mode in [GrantMode::Persistent, GrantMode::Map] {
        let persistent = grant_mode == GrantMode::Persistent;
        let options = Options { persistent, buffers: 8, segments: PAGES, ..Options::default() };
        let combination = Combination {
            queues: QUEUES,
            options,
            grant_mode,
            offered_segments: 256,
            budget: BUDGET,
            ..Combination::default()
        };
        let devices = rig.connect(&combination);
        let rings = QUEUES << options.ring_order;
        let mut guest = Guest::new(&mut disk, combination, devices);
        let places = SECTORS / 8 / PAGES as u64;
        for operation in [op::WRITE, op::READ] {
            let requests = (0..places).map(|place| Request {
                operation,
                ..Request::read(
                    usize::try_from(place).unwrap() % QUEUES,
                    place * 8 * PAGES as u64,
                    PAGES,
                    true,
                )
            });
            for request in requests {
                guest.begin_one(request);
                assert!(rig.domain.mapped_grants() <= BUDGET + rings);
            }
            guest.play([]);
        }
        if persistent {
            assert_eq!(rig.domain.mapped_grants(), BUDGET + rings, "all of it was used");
        }
        rig.disconnect(guest.into_devices());
    }
}

#[test]
fn pages_that_a_guest_no_longer_uses_are_unmapped() {
    let (mut bench, _) = bench();
    let budget = Arc::new(GrantBudget::new(BUDGET));
    let guest = bench.guest_with(Shape::mapped(8), null(false), Arc::clone(&budget));
    bench.ask(guest, op::READ, 8, 1);
    assert!(bench.settle());
    assert_eq!((bench.answers(guest), budget.left()), (8, BUDGET - 8));
    // The first sweep finds that they were used, and all that follow that they were not.
    for _ in 0..=PERSISTENT_IDLE_SWEEPS {
        assert_eq!(budget.left(), BUDGET - 8);
        bench.now_ns += PERSISTENT_SWEEP_SECONDS * 1_000_000_000;
        assert!(bench.settle());
    }
    assert_eq!(budget.left(), BUDGET);
}

#[test]
fn a_request_is_copied_while_others_have_all_mappings() {
    let (mut bench, script) = bench();
    let host = Arc::new(HostBudget::new(BUDGET, 1));
    let budget = Arc::new(GrantBudget::within(host, BUDGET));
    let shape = Shape { grant_mode: GrantMode::Map, ..Shape::copied(2) };
    let guest = bench.guest_with(shape, null(false), Arc::clone(&budget));
    for _ in 0..2 {
        script.borrow_mut().hung.insert(guest);
        bench.ask(guest, op::READ, 2, 11);
        assert!(bench.settle());
        assert_eq!(budget.left(), BUDGET - 11);
        script.borrow_mut().hung.clear();
        assert!(bench.settle());
        assert_eq!((bench.answers(guest), budget.left()), (2, BUDGET));
    }
}

/// The number of mappings that a process may have, whatever their size.
const MAX_MAP_COUNT: usize = 400;

/// Grants of a process with at most [`MAX_MAP_COUNT`] mappings.
#[derive(Clone)]
struct FewMappings;

struct FewGrants {
    grants: SimGrants,
    mappings: usize,
}

impl InFront for FewMappings {
    type Grants = FewGrants;

    fn put(&self, grants: SimGrants) -> FewGrants {
        FewGrants { grants, mappings: 0 }
    }
}

impl Grants for FewGrants {
    fn map(
        &mut self,
        domid: DomId,
        refs: &[GrantRef],
        access: PageAccess,
    ) -> io::Result<GuestPages> {
        if self.mappings == MAX_MAP_COUNT {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        let pages = self.grants.map(domid, refs, access)?;
        self.mappings += 1;
        Ok(pages)
    }

    fn unmap(&mut self, pages: GuestPages) -> io::Result<()> {
        self.mappings -= 1;
        self.grants.unmap(pages)
    }

    fn copy(&mut self, domid: DomId, segments: &mut [GrantCopy]) -> io::Result<()> {
        self.grants.copy(domid, segments)
    }
}

#[test]
fn guests_that_map_page_by_page_leave_mappings_for_the_next_guests_ring() {
    const GUESTS: usize = 10;
    const READS: usize = 64;
    const RINGS: usize = 20;
    const { assert!(GUESTS * READS > MAX_MAP_COUNT) };
    let stand_in = LocalStandIn::new().unwrap();
    let (engine, script) = storage();
    let mut bench = Bench::on(WithGrants(stand_in.platform(), FewMappings), engine, stand_in);
    let host = Arc::new(HostBudget::new(usize::MAX, MAX_MAP_COUNT - RINGS));
    for number in 0..GUESTS {
        let budget = Arc::new(GrantBudget::within(Arc::clone(&host), 16 * READS));
        let shape = Shape::mapped(READS).indirect(12, 1);
        let guest = bench.guest_with(shape, null(true), budget);
        script.borrow_mut().hung.insert(number);
        // One after the other, each in a page that was not used before.
        for _ in 0..READS {
            assert_eq!(bench.ask(guest, op::READ, 1, 1), 1);
            assert!(bench.settle());
        }
    }
    script.borrow_mut().hung.clear();
    assert!(bench.settle());
    let answers: usize = (0..GUESTS).map(|guest| bench.answers(guest)).sum();
    assert_eq!(answers, GUESTS * READS);
    let counts = bench.counters.iter().map(|counters| counters.read());
    let (mapped, copied) = counts.fold((0, 0), |(mapped, copied), counts| {
        (mapped + counts.grants_mapped, copied + counts.grants_copied)
    });
    assert_eq!(mapped, (MAX_MAP_COUNT - RINGS) as u64, "all mappings that are not for rings");
    assert_eq!(mapped + copied, (GUESTS * READS) as u64, "the rest is copied");
}

/// An engine whose host fails after a flush was submitted.
struct Failing {
    engine: HostEngine,
    fails: bool,
}

impl RegisterBuffers for Failing {
    fn register(&mut self, memory: GuestBuf) -> io::Result<Registration> {
        self.engine.register(memory)
    }

    fn unregister(&mut self, registration: Registration) {
        self.engine.unregister(registration);
    }
}

impl Layer for Failing {
    type Target = Image;

    fn submit(&mut self, target: &Image, op: &IoOp<'_>, ticket: Ticket, by: By) -> Submitted {
        self.fails = matches!(op, IoOp::Flush);
        self.engine.submit(target, op, ticket, by)
    }

    fn kick(&mut self) -> io::Result<()> {
        if self.fails { Err(io::Error::other("the host fails")) } else { self.engine.kick() }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.engine.reap(done);
    }

    fn in_flight(&self) -> usize {
        self.engine.in_flight()
    }

    fn arm(&mut self) -> io::Result<bool> {
        self.engine.arm()
    }
}

impl Engine for Failing {
    fn disarm(&mut self, signalled: bool) {
        self.engine.disarm(signalled);
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.engine.completion_fd()
    }
}

#[test]
fn a_worker_that_dies_gives_its_part_of_the_budget_back() {
    let stand_in = LocalStandIn::new().unwrap();
    let mut device = alone::device(&stand_in);
    let engine = Failing { engine: HostEngine::new().unwrap(), fails: false };
    let image = Image::Null(NullImage::new(Bytes(1 << 20), true));
    let alone = alone::worker(stand_in.platform(), engine, &device, image, BUDGET);
    let (mut worker, budget) = (alone.worker, alone.budget);
    for (operation, len) in [(op::WRITE, 11 * 4096), (op::FLUSH_DISKCACHE, 0)] {
        device.put(operation, 0, len);
        device.publish().unwrap();
        let start = std::time::Instant::now();
        while device.next_answer().unwrap().is_none() {
            assert!(start.elapsed() < HANG);
            if let Err(error) = worker.poll_once(|| 1) {
                assert_eq!(error.to_string(), "the host fails");
                break;
            }
        }
        assert_eq!(budget.left(), BUDGET - 11);
    }
    drop(worker);
    assert_eq!(budget.left(), BUDGET);
}

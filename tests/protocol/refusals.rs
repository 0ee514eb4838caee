//! A hypervisor that refuses calls: nothing that failed counts as done, and nothing stays mapped.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use polldisk::blkif::op;
use polldisk::msg::GrantMode;
use polldisk::sim::LocalStandIn;
use polldisk::sim::grants::SimGrants;
use polldisk::units::{DomId, GrantRef};
use polldisk::xen::shm::GuestPages;
use polldisk::xen::{GrantCopy, Grants, PageAccess};

use crate::scripted::{Bench, InFront, Shape, WithGrants, storage};
use polldisk::sim::disk::{self, ScriptedDisk};

const ERROR: i16 = -1;

/// What is refused, and what is mapped.
#[derive(Debug)]
struct Script {
    copies_refused: AtomicBool,
    /// Calls to map that succeed before one is refused.
    maps_left: AtomicUsize,
    mappings: AtomicUsize,
}

/// The stand-in with scripted refusals.
type Refusing = WithGrants<Arc<Script>>;

struct RefusingGrants(SimGrants, Arc<Script>);

impl InFront for Arc<Script> {
    type Grants = RefusingGrants;

    fn put(&self, grants: SimGrants) -> RefusingGrants {
        RefusingGrants(grants, Arc::clone(self))
    }
}

impl Grants for RefusingGrants {
    fn map(
        &mut self,
        domid: DomId,
        refs: &[GrantRef],
        access: PageAccess,
    ) -> io::Result<GuestPages> {
        let left = self.1.maps_left.load(Ordering::Relaxed);
        self.1.maps_left.store(left.checked_sub(1).ok_or_else(refused)?, Ordering::Relaxed);
        let pages = self.0.map(domid, refs, access)?;
        self.1.mappings.fetch_add(1, Ordering::Relaxed);
        Ok(pages)
    }

    fn unmap(&mut self, pages: GuestPages) -> io::Result<()> {
        self.1.mappings.fetch_sub(1, Ordering::Relaxed);
        self.0.unmap(pages)
    }

    fn copy(&mut self, domid: DomId, segments: &mut [GrantCopy]) -> io::Result<()> {
        match self.1.copies_refused.load(Ordering::Relaxed) {
            true => Err(refused()),
            false => self.0.copy(domid, segments),
        }
    }
}

fn refused() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOMEM)
}

fn refusing() -> (Bench<Refusing, ScriptedDisk>, Arc<Script>, Rc<RefCell<disk::Script>>) {
    let stand_in = LocalStandIn::new().unwrap();
    let (engine, of_storage) = storage();
    let script = Arc::new(Script {
        copies_refused: AtomicBool::new(false),
        maps_left: AtomicUsize::new(usize::MAX),
        mappings: AtomicUsize::new(0),
    });
    let platform = WithGrants(stand_in.platform(), Arc::clone(&script));
    (Bench::on(platform, engine, stand_in), script, of_storage)
}

#[test]
fn a_grant_copy_that_is_refused_as_a_whole_fails_its_requests() {
    let (mut bench, script, storage) = refusing();
    let guest = bench.guest(Shape::copied(4));
    for operation in [op::WRITE, op::READ] {
        script.copies_refused.store(true, Ordering::Relaxed);
        // A write that reached storage would hang there.
        storage.borrow_mut().hung.extend((operation == op::WRITE).then_some(guest));
        bench.ask(guest, operation, 3, 2);
        assert!(bench.settle());
        assert_eq!(bench.statuses(guest), [ERROR; 3], "operation {operation}");
        script.copies_refused.store(false, Ordering::Relaxed);
        storage.borrow_mut().hung.clear();
        bench.ask(guest, operation, 3, 2);
        assert!(bench.settle());
        assert_eq!(bench.statuses(guest), [0; 3], "operation {operation}, again");
    }
}

#[test]
fn a_request_that_is_only_partly_mapped_is_unmapped_and_copied() {
    const PAGES: usize = 400;
    let (mut bench, script, _) = refusing();
    let shape = Shape { grant_mode: GrantMode::Map, ..Shape::copied(2).indirect(PAGES, 0) };
    let guest = bench.guest(shape);
    let ring = script.mappings.load(Ordering::Relaxed);
    for operation in [op::WRITE, op::READ] {
        script.maps_left.store(1, Ordering::Relaxed);
        bench.ask(guest, operation, 1, PAGES);
        assert!(bench.settle());
        assert_eq!(script.maps_left.load(Ordering::Relaxed), 0, "the first batch was mapped");
        assert_eq!(bench.statuses(guest), [0]);
        assert_eq!(script.mappings.load(Ordering::Relaxed), ring);
        assert_eq!(bench.counters[guest].grants_mapped.get(), 0);
    }
}

/// Otherwise it would go on with whatever is in the memory meant for its segments.
#[test]
fn an_indirect_request_whose_segments_cannot_be_read_does_not_reach_storage() {
    let (mut bench, script, storage) = refusing();
    let guest = bench.guest(Shape::copied(4).indirect(12, 0));
    storage.borrow_mut().hung.insert(guest);
    script.copies_refused.store(true, Ordering::Relaxed);
    bench.ask_indirect(guest, 3);
    assert!(bench.settle());
    assert_eq!(bench.statuses(guest), [ERROR; 3]);
    assert!(storage.borrow().taken.is_empty());
}

#[test]
fn an_operation_not_supported_by_storage_is_answered_so_unless_it_is_a_read_or_write() {
    const NOT_SUPPORTED: i16 = -2;
    let (mut bench, _, storage) = refusing();
    let guest = bench.guest(Shape::copied(4));
    storage.borrow_mut().errno = Some(libc::EOPNOTSUPP);
    for (operation, pages, status) in
        [(op::FLUSH_DISKCACHE, 0, NOT_SUPPORTED), (op::READ, 1, ERROR), (op::WRITE, 1, ERROR)]
    {
        bench.ask(guest, operation, 1, pages);
        assert!(bench.settle());
        assert_eq!(bench.statuses(guest), [status], "operation {operation}");
    }
}

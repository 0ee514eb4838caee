use std::collections::HashSet;
use std::num::NonZeroU16;
use std::ptr::NonNull;
use std::sync::Arc;

use super::*;
use crate::budget::GrantBudget;
use crate::xen::GrantCopy;
use crate::xen::shm::{LocalPages, Registration};

/// Grants without a hypervisor: every mapping is memory of our own.
#[derive(Debug, Default)]
struct FakeGrants {
    memory: HashMap<u64, LocalPages>,
    next: u64,
    refused: HashSet<u32>,
}

impl Grants for FakeGrants {
    #[allow(unsafe_code)]
    fn map(&mut self, _: DomId, refs: &[GrantRef], _: PageAccess) -> io::Result<GuestPages> {
        if refs.iter().any(|gref| self.refused.contains(&gref.0)) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let memory = LocalPages::new(refs.len());
        let base: NonNull<u8> = memory.page(0).address();
        self.next += 1;
        self.memory.insert(self.next, memory);
        // SAFETY: the memory is kept until it is unmapped.
        Ok(unsafe { GuestPages::from_raw(base, refs.len(), self.next) })
    }

    fn unmap(&mut self, pages: GuestPages) -> io::Result<()> {
        assert!(self.memory.remove(&pages.cookie()).is_some());
        Ok(())
    }

    fn copy(&mut self, _: DomId, _: &mut [GrantCopy]) -> io::Result<()> {
        Ok(())
    }
}

/// An engine that registers ranges of memory and does nothing else.
#[derive(Debug, Default)]
struct FakeEngine {
    /// The address of each range's first byte.
    registered: HashMap<NonZeroU16, NonNull<u8>>,
    full: bool,
}

impl RegisterBuffers for FakeEngine {
    fn register(&mut self, memory: GuestBuf) -> io::Result<Registration> {
        if self.full {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let mut numbers = (1..=u16::MAX).filter_map(NonZeroU16::new);
        let number = numbers.find(|number| !self.registered.contains_key(number)).unwrap();
        self.registered.insert(number, memory.address());
        Ok(Registration(number))
    }

    fn unregister(&mut self, registration: Registration) {
        assert!(self.registered.remove(&registration.0).is_some());
    }
}

/// A worker's grants and engine.
#[derive(Debug, Default)]
struct Host {
    grants: FakeGrants,
    engine: FakeEngine,
}

impl Host {
    fn mapper(&mut self) -> Mapper<'_, FakeGrants, FakeEngine> {
        Mapper { grants: &mut self.grants, engine: &mut self.engine }
    }
}

const GUEST: DomId = DomId::DOM0;

/// The pages of a queue that shares its budget with no other.
fn alone() -> PersistentGrants {
    PersistentGrants::new(GrantShare::of(Arc::new(GrantBudget::new(usize::MAX))))
}

fn map(persistent: &mut PersistentGrants, host: &mut Host, refs: std::ops::Range<u32>) {
    let mut wanted = refs.map(GrantRef).collect();
    persistent.map(&mut host.mapper(), GUEST, &mut wanted, std::iter::empty());
}

#[test]
fn batches_that_are_long_idle_are_unmapped_and_those_in_use_stay() {
    let (mut persistent, mut host) = (alone(), Host::default());
    map(&mut persistent, &mut host, 0..10);
    map(&mut persistent, &mut host, 10..20);
    map(&mut persistent, &mut host, 20..30);
    for _ in 0..=PERSISTENT_IDLE_SWEEPS {
        // 5 is used repeatedly; 25 belongs to a request that storage takes long to complete.
        persistent.page(5).unwrap();
        persistent.sweep(&mut host.mapper(), [25].into_iter());
    }
    assert!(persistent.page(5).is_some() && persistent.page(25).is_some());
    assert!(persistent.page(15).is_none());
    assert_eq!((persistent.count(), host.grants.memory.len()), (20, 2));
    persistent.unmap_all(&mut host.mapper());
    assert_eq!((persistent.count(), host.grants.memory.len()), (0, 0));
}

#[test]
fn a_full_cache_makes_room_by_unmapping_idle_batches_and_never_those_in_flight() {
    let (mut persistent, mut host) = (alone(), Host::default());
    let full = u32::try_from(PERSISTENT_GRANTS_PER_QUEUE).unwrap();
    let third = full / 3;
    for start in 0..3 {
        map(&mut persistent, &mut host, start * third..(start + 1) * third);
    }
    map(&mut persistent, &mut host, full..full + 10);
    assert!(persistent.page(full).is_none(), "all the others were used just now");
    assert_eq!(persistent.count(), PERSISTENT_GRANTS_PER_QUEUE);

    persistent.sweep(&mut host.mapper(), std::iter::empty());
    persistent.page(0).unwrap();
    let mut wanted: Vec<GrantRef> = (2000..2010).map(GrantRef).collect();
    persistent.map(&mut host.mapper(), GUEST, &mut wanted, [third].into_iter());
    assert!(persistent.page(2000).is_some(), "the idle third made room");
    assert!(persistent.page(0).is_some(), "used since the sweep");
    assert!(persistent.page(third).is_some(), "in flight");
    assert!(persistent.page(2 * third).is_none());
    assert!(persistent.count() <= PERSISTENT_GRANTS_PER_QUEUE);
}

#[test]
fn one_bad_reference_does_not_keep_good_ones_from_being_mapped() {
    let (mut persistent, mut host) = (alone(), Host::default());
    host.grants.refused.insert(7);
    map(&mut persistent, &mut host, 0..10);
    assert_eq!(persistent.count(), 9);
    assert!(persistent.page(7).is_none());
}

#[test]
fn a_frontend_that_keeps_sending_bad_references_gets_no_more_mappings() {
    let (mut persistent, mut host) = (alone(), Host::default());
    host.grants.refused.extend(0..1000);
    map(&mut persistent, &mut host, 0..1000);
    map(&mut persistent, &mut host, 2000..2010);
    assert_eq!(persistent.count(), 0, "not even good ones are mapped any more");
}

#[test]
fn queues_of_one_domain_share_its_budget_and_give_back_what_they_unmap() {
    let (budget, mut host) = (Arc::new(GrantBudget::new(30)), Host::default());
    let queue = || PersistentGrants::new(GrantShare::of(Arc::clone(&budget)));
    let (mut one, mut other) = (queue(), queue());
    host.grants.refused.insert(7);
    map(&mut one, &mut host, 0..20);
    map(&mut other, &mut host, 0..20);
    assert_eq!((one.count(), other.count(), budget.left()), (19, 10, 1), "7 is refused");
    map(&mut other, &mut host, 20..25);
    assert_eq!((other.count(), budget.left()), (11, 0));

    one.sweep(&mut host.mapper(), std::iter::empty());
    map(&mut one, &mut host, 30..40);
    assert_eq!((one.count(), budget.left()), (19, 0));
    assert!(one.page(39).is_some(), "its idle pages made room");
    one.unmap_all(&mut host.mapper());
    assert_eq!(budget.left(), 19);
    drop(other);
    assert_eq!(budget.left(), 30);
}

#[test]
fn the_engine_knows_each_batch_for_as_long_as_it_is_mapped() {
    let (mut persistent, mut host) = (alone(), Host::default());
    map(&mut persistent, &mut host, 0..10);
    map(&mut persistent, &mut host, 10..12);
    host.engine.full = true;
    map(&mut persistent, &mut host, 12..14);
    let of = |gref| persistent.page(gref).unwrap().registration();
    assert!(of(0).is_some() && of(0) == of(9));
    assert!(of(10).is_some() && of(10) != of(0));
    assert_eq!(of(12), None, "mapped without a registration");
    let start = host.engine.registered[&of(10).unwrap().0];
    assert_eq!(start, persistent.page(10).unwrap().address());
    persistent.unmap_all(&mut host.mapper());
    assert!(host.engine.registered.is_empty() && host.grants.memory.is_empty());
}

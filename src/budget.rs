//! How many pages of guests are kept mapped: for each domain, across its disks and workers, and for the
//! process, across all domains.
//!
//! Each domain has a [`GrantBudget`], within the [`HostBudget`] of all. Each of its queues takes a
//! [`GrantShare`] of both before it maps. Nobody waits: if nothing is left, the data is copied.
//!
//! The process has two bounds: on pages, because Xen limits what dom0 can map, and on mappings, because
//! Linux limits them and each mmap makes one, however few pages it has. A reserve of both is kept for
//! rings, which can't be copied.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::limits::{MAPPINGS_RESERVED, PAGES_FOR_DATA};

/// What all queues of the process may still map for data, together.
#[derive(Debug)]
pub struct HostBudget {
    pages: AtomicUsize,
    mappings: AtomicUsize,
}

/// Pages that the queues of one domain may still map, all together.
#[derive(Debug)]
pub struct GrantBudget {
    left: AtomicUsize,
    host: Arc<HostBudget>,
}

/// How many mappings a process may have unless the host says otherwise: `DEFAULT_MAX_MAP_COUNT` of Linux.
const MAX_MAP_COUNT: usize = 65530;

impl HostBudget {
    /// A budget of `pages`, in at most `mappings`.
    pub fn new(pages: usize, mappings: usize) -> HostBudget {
        HostBudget { pages: AtomicUsize::new(pages), mappings: AtomicUsize::new(mappings) }
    }

    /// What this host's kernel allows (`vm.max_map_count`), less the reserves.
    pub fn of_this_host() -> HostBudget {
        let told = std::fs::read_to_string("/proc/sys/vm/max_map_count");
        let told = told.ok().and_then(|text| text.trim().parse().ok());
        let mappings = told.unwrap_or(MAX_MAP_COUNT).saturating_sub(MAPPINGS_RESERVED);
        HostBudget::new(PAGES_FOR_DATA, mappings)
    }
}

impl GrantBudget {
    /// A budget of which nothing is taken, with no bound for the host.
    pub fn new(pages: usize) -> GrantBudget {
        GrantBudget::within(Arc::new(HostBudget::new(usize::MAX, usize::MAX)), pages)
    }

    /// A budget of which nothing is taken, within the host's.
    pub fn within(host: Arc<HostBudget>, pages: usize) -> GrantBudget {
        GrantBudget { left: AtomicUsize::new(pages), host }
    }

    /// Pages that could be taken now.
    pub fn left(&self) -> usize {
        self.left.load(Ordering::Relaxed).min(self.host.pages.load(Ordering::Relaxed))
    }
}

/// Takes `wanted`, or as many as there are; returns how many.
fn take(left: &AtomicUsize, wanted: usize) -> usize {
    let mut found = left.load(Ordering::Relaxed);
    loop {
        let taken = wanted.min(found);
        let exchanged =
            left.compare_exchange_weak(found, found - taken, Ordering::Acquire, Ordering::Relaxed);
        match exchanged {
            Ok(_) => return taken,
            Err(changed) => found = changed,
        }
    }
}

/// What one queue has taken of its domain's and its host's budget. All of it goes back on drop, so that
/// nothing is lost if the queue's worker dies.
#[derive(Debug)]
pub struct GrantShare {
    budget: Arc<GrantBudget>,
    pages: usize,
    mappings: usize,
}

impl GrantShare {
    /// An empty share of `budget`.
    pub fn of(budget: Arc<GrantBudget>) -> GrantShare {
        GrantShare { budget, pages: 0, mappings: 0 }
    }

    /// Pages taken.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Pages that it could take now, together with a mapping for them.
    pub fn left(&self) -> usize {
        if self.left_mappings() == 0 { 0 } else { self.budget.left() }
    }

    /// Mappings that it could take now.
    pub fn left_mappings(&self) -> usize {
        self.budget.host.mappings.load(Ordering::Relaxed)
    }

    /// Takes `wanted` pages, or as many as there are; returns how many.
    pub fn take(&mut self, wanted: usize) -> usize {
        let taken = take(&self.budget.left, wanted);
        let allowed = take(&self.budget.host.pages, taken);
        self.budget.left.fetch_add(taken - allowed, Ordering::Release);
        self.pages += allowed;
        allowed
    }

    /// Takes `wanted` pages and `mappings` for them, or nothing; returns whether it did.
    pub fn take_all(&mut self, wanted: usize, mappings: usize) -> bool {
        let taken = self.take(wanted);
        let enough = taken == wanted && self.take_mappings(mappings);
        if !enough {
            self.give_back(taken);
        }
        enough
    }

    /// Takes `wanted` mappings for pages that it has, or none; returns whether it did.
    pub fn take_mappings(&mut self, wanted: usize) -> bool {
        let taken = take(&self.budget.host.mappings, wanted);
        self.mappings += taken;
        if taken < wanted {
            self.give_back_mappings(taken);
        }
        taken == wanted
    }

    /// Gives back pages that are no longer mapped.
    ///
    /// # Panics
    /// If it does not have that many.
    pub fn give_back(&mut self, pages: usize) {
        self.pages = self.pages.checked_sub(pages).expect("pages are given back once");
        self.budget.host.pages.fetch_add(pages, Ordering::Release);
        self.budget.left.fetch_add(pages, Ordering::Release);
    }

    /// Gives back mappings that no longer exist.
    ///
    /// # Panics
    /// If it does not have that many.
    pub fn give_back_mappings(&mut self, count: usize) {
        self.mappings = self.mappings.checked_sub(count).expect("mappings are given back once");
        self.budget.host.mappings.fetch_add(count, Ordering::Release);
    }
}

impl Drop for GrantShare {
    fn drop(&mut self) {
        self.give_back(self.pages);
        self.give_back_mappings(self.mappings);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_share_gets_what_is_left_and_its_drop_gives_it_back() {
        let budget = Arc::new(GrantBudget::new(10));
        let (mut one, mut other) = (GrantShare::of(budget.clone()), GrantShare::of(budget.clone()));
        assert_eq!((one.take(7), other.take(7)), (7, 3));
        assert!(!other.take_all(1, 1));
        one.give_back(2);
        assert!(!other.take_all(3, 1) && other.take_all(2, 1));
        assert_eq!((one.pages(), other.pages(), budget.left()), (5, 5, 0));
        drop(one);
        assert_eq!((other.left(), budget.left()), (5, 5));
        drop(other);
        assert_eq!(budget.left(), 10);
    }

    #[test]
    fn domains_share_what_the_host_has_and_no_failing_take_keeps_anything() {
        let host = Arc::new(HostBudget::new(10, 3));
        let domain = || GrantShare::of(Arc::new(GrantBudget::within(Arc::clone(&host), 8)));
        let (mut one, mut other) = (domain(), domain());
        assert_eq!((one.take(9), other.take(9)), (8, 2));
        assert_eq!((one.budget.left(), other.budget.left()), (0, 0), "the host has none either");
        other.give_back(2);
        assert!(!other.take_all(3, 1) && !other.take_all(2, 4) && other.take_all(2, 2));
        assert!(one.take_mappings(1) && !one.take_mappings(1));
        one.give_back(1);
        assert_eq!((one.left(), other.left()), (0, 0), "there is a page, and no mapping for it");
        drop(other);
        assert_eq!((one.left(), host.mappings.load(Ordering::Relaxed)), (1, 2));
        drop(one);
        assert_eq!((host.pages.load(Ordering::Relaxed), domain().left()), (10, 8));
    }

    #[test]
    fn this_host_allows_mappings_beside_its_reserve() {
        let mappings = HostBudget::of_this_host().mappings.into_inner();
        assert!(mappings > MAPPINGS_RESERVED, "{mappings}");
    }

    #[test]
    fn threads_never_take_more_than_there_is() {
        let budget = Arc::new(GrantBudget::new(100));
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let mut share = GrantShare::of(budget.clone());
                scope.spawn(move || {
                    for round in 0..10_000 {
                        let taken = share.take((thread * 31 + round) % 60);
                        assert!(share.pages() <= 100 && share.left() <= 100);
                        share.give_back(taken);
                    }
                });
            }
        });
        assert_eq!(budget.left(), 100);
    }
}

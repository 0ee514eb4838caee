//! How many pages of one domain are kept mapped, whatever disks and workers it has.
//!
//! A [`GrantBudget`] is a domain's, and each of its queues takes a [`GrantShare`] of it before it maps.
//! Nobody waits: where nothing is left, the data is copied.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Pages that the queues of one domain may still map, all together.
#[derive(Debug)]
pub struct GrantBudget {
    left: AtomicUsize,
}

impl GrantBudget {
    /// A budget of which nothing is taken.
    pub fn new(pages: usize) -> GrantBudget {
        GrantBudget { left: AtomicUsize::new(pages) }
    }

    /// Pages that can be had now.
    pub fn left(&self) -> usize {
        self.left.load(Ordering::Relaxed)
    }
}

/// What one queue has taken of its domain's budget. All of it goes back on drop, so that a queue
/// whose worker dies takes nothing along.
#[derive(Debug)]
pub struct GrantShare {
    budget: Arc<GrantBudget>,
    taken: usize,
}

impl GrantShare {
    /// Nothing of `budget` yet.
    pub fn of(budget: Arc<GrantBudget>) -> GrantShare {
        GrantShare { budget, taken: 0 }
    }

    /// Pages taken.
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// Pages that can be had now.
    pub fn left(&self) -> usize {
        self.budget.left()
    }

    /// Takes `wanted` pages, or as many as there are; says how many.
    pub fn take(&mut self, wanted: usize) -> usize {
        let mut left = self.budget.left();
        loop {
            let taken = wanted.min(left);
            let found = self.budget.left.compare_exchange_weak(
                left,
                left - taken,
                Ordering::Acquire,
                Ordering::Relaxed,
            );
            match found {
                Ok(_) => {
                    self.taken += taken;
                    return taken;
                }
                Err(changed) => left = changed,
            }
        }
    }

    /// Takes `wanted` pages, or none; says whether.
    pub fn take_all(&mut self, wanted: usize) -> bool {
        let taken = self.take(wanted);
        let enough = taken == wanted;
        if !enough {
            self.give_back(taken);
        }
        enough
    }

    /// Gives back pages, which are mapped no more.
    ///
    /// # Panics
    /// Where it has not so many.
    pub fn give_back(&mut self, pages: usize) {
        self.taken = self.taken.checked_sub(pages).expect("pages are given back once");
        self.budget.left.fetch_add(pages, Ordering::Release);
    }
}

impl Drop for GrantShare {
    fn drop(&mut self) {
        self.give_back(self.taken);
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
        assert!(!other.take_all(1));
        one.give_back(2);
        assert!(!other.take_all(3) && other.take_all(2));
        assert_eq!((one.taken(), other.taken(), budget.left()), (5, 5, 0));
        drop(one);
        assert_eq!((other.left(), budget.left()), (5, 5));
        drop(other);
        assert_eq!(budget.left(), 10);
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
                        assert!(share.taken() <= 100 && share.left() <= 100);
                        share.give_back(taken);
                    }
                });
            }
        });
        assert_eq!(budget.left(), 100);
    }
}

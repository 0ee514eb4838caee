//! Bounce memory: buffers that grant copies fill and empty.
//!
//! A worker has some for all of its queues, registered with the engine. If too little of it is left, a queue
//! uses its own, which has room for its largest request. So a queue that has nothing bounced can always
//! bounce one request, however much the others hold.

use crate::xen::shm::{GuestBuf, LocalPages, PAGE_BYTES, Registration};

/// Bounce memory in pages, handed out in runs; allocated when first needed.
#[derive(Debug)]
pub struct BouncePool {
    memory: Option<LocalPages>,
    registration: Option<Registration>,
    pages: usize,
    /// One bit for each page: whether it is free.
    free: Box<[u64]>,
    free_count: usize,
}

/// Whose bounce memory a request's data is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The worker's.
    Common,
    /// The queue's own.
    Own,
}

impl BouncePool {
    /// A pool of `pages` pages.
    pub fn new(pages: usize) -> BouncePool {
        let bits = |word: usize| u64::MAX >> (64 - (pages - word * 64).min(64));
        let free = (0..pages.div_ceil(64)).map(bits).collect();
        BouncePool { memory: None, registration: None, pages, free, free_count: pages }
    }

    /// How many pages it has in all.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// How many pages are free.
    #[inline]
    pub fn free(&self) -> usize {
        self.free_count
    }

    /// Allocates the memory and returns all of it; `None`: it is allocated already.
    pub fn allocate(&mut self) -> Option<GuestBuf> {
        if self.memory.is_some() {
            return None;
        }
        let memory = self.memory.insert(LocalPages::new(self.pages));
        Some(memory.run(0, self.pages))
    }

    /// Sets the name by which the engine knows the memory.
    pub fn set_registration(&mut self, registration: Registration) {
        self.registration = Some(registration);
    }

    /// Takes `count` contiguous pages. They still hold old data: never show them to a guest unless
    /// overwritten. `None`: there is no such run now.
    ///
    /// # Panics
    /// If [`BouncePool::allocate`] was not called.
    pub fn take(&mut self, count: usize) -> Option<GuestBuf> {
        let first = self.find_run(count)?;
        self.set(first, count, false);
        self.free_count -= count;
        let memory = self.memory.as_ref().expect("allocated before");
        Some(memory.run(first, count).registered(self.registration))
    }

    /// Gives back the pages that a buffer lies in.
    pub fn give_back(&mut self, buffer: GuestBuf) {
        let memory = self.memory.as_ref().expect("a page was taken before");
        let start = buffer.address().as_ptr().addr() - memory.page(0).address().as_ptr().addr();
        let first = start / PAGE_BYTES;
        let end = (start + buffer.len() as usize).div_ceil(PAGE_BYTES);
        self.set(first, end - first, true);
        self.free_count += end - first;
    }

    /// The first run of `count` free pages.
    fn find_run(&self, count: usize) -> Option<usize> {
        let mut first = self.next(0, true);
        if count == 1 {
            return (first < self.pages).then_some(first);
        }
        while first + count <= self.pages {
            let end = self.next(first, false);
            if end - first >= count {
                return Some(first);
            }
            first = self.next(end, true);
        }
        None
    }

    /// The first page from `from` on that is free, or is not, as `free` says; the end if there is none.
    #[inline]
    fn next(&self, from: usize, free: bool) -> usize {
        let mut at = from;
        while at < self.pages {
            let word = if free { self.free[at / 64] } else { !self.free[at / 64] };
            let rest = word >> (at % 64);
            if rest != 0 {
                return at + rest.trailing_zeros() as usize;
            }
            at = (at / 64 + 1) * 64;
        }
        self.pages
    }

    /// Marks pages as free or not; until now all of them must be the opposite.
    fn set(&mut self, first: usize, count: usize, free: bool) {
        let (mut at, end) = (first, first + count);
        while at < end {
            let bits = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - bits)) << (at % 64);
            let word = &mut self.free[at / 64];
            assert!(*word & mask == if free { 0 } else { mask }, "each page has one user");
            *word ^= mask;
            at += bits;
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    /// Not a multiple of the bits in a word.
    const PAGES: usize = 2010;

    #[test]
    fn runs_are_contiguous_and_pages_come_back() {
        let mut pool = BouncePool::new(PAGES);
        let whole = pool.allocate().unwrap();
        assert!(pool.allocate().is_none());
        let runs = [1, 63, 1, 64, 65, 300].map(|count| (count, pool.take(count).unwrap()));
        let mut at = whole.address();
        for (count, run) in runs {
            assert_eq!((run.address(), run.len() as usize), (at, count * PAGE_BYTES));
            at = at.map_addr(|addr| addr.saturating_add(count * PAGE_BYTES));
        }
        assert_eq!(pool.free(), PAGES - 494);
        pool.give_back(runs[3].1);
        assert_eq!(pool.take(64).unwrap().address(), runs[3].1.address(), "the first that fits");
        // A buffer may be part of a page; the whole page is given back.
        pool.give_back(runs[2].1.part(0, 512).unwrap());
        assert_eq!(pool.take(1).unwrap().address(), runs[2].1.address());
    }

    #[test]
    fn memory_in_pieces_has_no_long_run() {
        let mut pool = BouncePool::new(PAGES);
        pool.allocate();
        let pages: Vec<_> = (0..PAGES).map(|_| pool.take(1).unwrap()).collect();
        assert!(pool.take(1).is_none());
        pages.iter().step_by(2).for_each(|page| pool.give_back(*page));
        assert_eq!(pool.free(), PAGES / 2);
        assert!(pool.take(2).is_none());
        pool.give_back(pages[1001]);
        assert_eq!(pool.take(3).unwrap().address(), pages[1000].address());
    }

    #[test]
    #[should_panic(expected = "each page has one user")]
    fn a_page_comes_back_once() {
        let mut pool = BouncePool::new(PAGES);
        pool.allocate();
        let page = pool.take(1).unwrap();
        pool.give_back(page);
        pool.give_back(page);
    }
}

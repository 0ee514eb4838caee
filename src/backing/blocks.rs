//! Which blocks of an image are being written, for images whose guests may write parts of blocks.
//!
//! A part is written by reading its block, changing it and writing the whole block back. Meanwhile no other
//! queue or worker may write that block. Writes of whole blocks don't exclude each other: if a guest has
//! two writes to one place in flight, either may win.
//!
//! Nobody waits while holding a block, and each operation takes one lock, so there is no deadlock. If a
//! lock is not free, the caller's [`Waker`] is kept and woken when any lock is released.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use slab::Slab;

/// The blocks of one image, shared by all workers.
#[derive(Debug)]
pub struct BlockLocks {
    block_bytes: u32,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    /// Blocks of which a part is being written, one entry for each such write.
    owned: Slab<u64>,
    /// Blocks that are being written as a whole.
    shared: Slab<Range<u64>>,
    /// Workers that found a block locked, each once.
    waiting: Vec<Waker>,
}

/// A lock on some blocks; released when it is dropped.
#[derive(Debug)]
pub struct BlockLock {
    locks: Arc<BlockLocks>,
    key: Key,
}

#[derive(Clone, Copy, Debug)]
enum Key {
    Owned(usize),
    Shared(usize),
}

impl BlockLocks {
    /// Locks of which none is held; `block_bytes` is the size of a block, a power of two.
    pub fn new(block_bytes: u32) -> Arc<BlockLocks> {
        assert!(block_bytes.is_power_of_two());
        Arc::new(BlockLocks { block_bytes, held: Mutex::default() })
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// Locks one block to write a part of it. `None` while anybody writes there; `waker` is then woken when
    /// another try makes sense.
    pub fn try_own(self: &Arc<Self>, block: u64, waker: &Waker) -> Option<BlockLock> {
        let mut held = self.held();
        let taken = held.owned.iter().any(|(_, owned)| *owned == block)
            || held.shared.iter().any(|(_, shared)| shared.contains(&block));
        if taken {
            held.wait(waker);
            return None;
        }
        let key = Key::Owned(held.owned.insert(block));
        Some(BlockLock { locks: self.clone(), key })
    }

    /// Locks whole blocks to write them. `None` while somebody writes a part of one, as for
    /// [`BlockLocks::try_own`].
    pub fn try_share(self: &Arc<Self>, blocks: Range<u64>, waker: &Waker) -> Option<BlockLock> {
        let mut held = self.held();
        if held.owned.iter().any(|(_, owned)| blocks.contains(owned)) {
            held.wait(waker);
            return None;
        }
        let key = Key::Shared(held.shared.insert(blocks));
        Some(BlockLock { locks: self.clone(), key })
    }

    /// The lists are consistent even if a thread panicked while it held the lock.
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn wait(&mut self, waker: &Waker) {
        if !self.waiting.iter().any(|waiting| waiting.will_wake(waker)) {
            self.waiting.push(waker.clone());
        }
    }
}

impl Drop for BlockLock {
    fn drop(&mut self) {
        let mut held = self.locks.held();
        match self.key {
            Key::Owned(index) => drop(held.owned.remove(index)),
            Key::Shared(index) => drop(held.shared.remove(index)),
        }
        let waiting = std::mem::take(&mut held.waiting);
        drop(held);
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod test {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    fn own(locks: &Arc<BlockLocks>, block: u64) -> Option<BlockLock> {
        locks.try_own(block, Waker::noop())
    }

    fn share(locks: &Arc<BlockLocks>, blocks: Range<u64>) -> Option<BlockLock> {
        locks.try_share(blocks, Waker::noop())
    }

    #[test]
    fn a_part_of_a_block_is_written_alone() {
        let locks = BlockLocks::new(4096);
        let owned = own(&locks, 7).unwrap();
        assert!(own(&locks, 7).is_none());
        for (blocks, free) in [(0..7, true), (0..8, false), (7..9, false), (8..20, true)] {
            assert_eq!(share(&locks, blocks.clone()).is_some(), free, "{blocks:?}");
        }
        let other = own(&locks, 8).unwrap();
        drop(owned);
        assert!(share(&locks, 0..8).is_some() && share(&locks, 0..9).is_none());
        drop(other);
        assert!(share(&locks, 0..9).is_some());
    }

    #[test]
    fn writers_of_whole_blocks_do_not_mind_each_other() {
        let locks = BlockLocks::new(4096);
        let writers = [share(&locks, 0..8).unwrap(), share(&locks, 4..5).unwrap()];
        assert!(own(&locks, 4).is_none() && own(&locks, 8).is_some());
        let [long, short] = writers;
        drop(long);
        assert!(own(&locks, 3).is_some() && own(&locks, 4).is_none());
        drop(short);
        assert!(own(&locks, 4).is_some());
    }

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn who_found_a_block_taken_is_woken_once_when_it_is_given_back() {
        let locks = BlockLocks::new(4096);
        let workers: [Arc<Woken>; 2] = Default::default();
        let wakers = workers.each_ref().map(|worker| Waker::from(Arc::clone(worker)));
        let woken = || workers.each_ref().map(|worker| worker.0.load(Ordering::Relaxed));
        let owned = locks.try_own(7, &wakers[0]).unwrap();
        assert!((0..3).all(|_| locks.try_own(7, &wakers[0]).is_none()));
        assert!((0..3).all(|_| locks.try_share(0..9, &wakers[1]).is_none()));
        assert_eq!(woken(), [0, 0]);
        drop(owned);
        assert_eq!(woken(), [1, 1]);
        drop(locks.try_share(0..9, &wakers[1]));
        assert_eq!(woken(), [1, 1], "nobody waits any more");
    }
}

//! Which blocks of an image are being written, where a guest may write parts of blocks.
//!
//! A part is written by reading its block, changing it and writing all of it back. Meanwhile nobody
//! else may write that block, whichever queue or worker it is for. Writers of whole blocks need not
//! mind each other: a guest that has two writes to one place in flight may get either.
//!
//! Nobody waits with a block in hand: what can't be had now is asked for again later, and each
//! operation asks for one thing. So there is no deadlock.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slab::Slab;

/// The blocks of one image, shared by all workers.
#[derive(Debug)]
pub struct BlockLocks {
    block_bytes: u32,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    /// Blocks a part of which is being written: as many as there are such writes.
    owned: Slab<u64>,
    /// Blocks that are being written as a whole.
    shared: Slab<Range<u64>>,
}

/// Leave to write some blocks; given back when it is dropped.
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
    /// Nothing is being written; `block_bytes` is the size of a block, a power of two.
    pub fn new(block_bytes: u32) -> Arc<BlockLocks> {
        assert!(block_bytes.is_power_of_two());
        Arc::new(BlockLocks { block_bytes, held: Mutex::default() })
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// Leave to write a part of one block; `None` while anybody writes there.
    pub fn try_own(self: &Arc<Self>, block: u64) -> Option<BlockLock> {
        let mut held = self.held();
        let taken = held.owned.iter().any(|(_, owned)| *owned == block)
            || held.shared.iter().any(|(_, shared)| shared.contains(&block));
        let key = (!taken).then(|| Key::Owned(held.owned.insert(block)))?;
        Some(BlockLock { locks: self.clone(), key })
    }

    /// Leave to write all of these blocks; `None` while somebody writes a part of one.
    pub fn try_share(self: &Arc<Self>, blocks: Range<u64>) -> Option<BlockLock> {
        let mut held = self.held();
        let taken = held.owned.iter().any(|(_, owned)| blocks.contains(owned));
        let key = (!taken).then(|| Key::Shared(held.shared.insert(blocks)))?;
        Some(BlockLock { locks: self.clone(), key })
    }

    /// The lists are whole whatever happened to who held them last.
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for BlockLock {
    fn drop(&mut self) {
        let mut held = self.locks.held();
        match self.key {
            Key::Owned(index) => drop(held.owned.remove(index)),
            Key::Shared(index) => drop(held.shared.remove(index)),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_part_of_a_block_is_written_alone() {
        let locks = BlockLocks::new(4096);
        let owned = locks.try_own(7).unwrap();
        assert!(locks.try_own(7).is_none());
        for (blocks, free) in [(0..7, true), (0..8, false), (7..9, false), (8..20, true)] {
            assert_eq!(locks.try_share(blocks.clone()).is_some(), free, "{blocks:?}");
        }
        let other = locks.try_own(8).unwrap();
        drop(owned);
        assert!(locks.try_share(0..8).is_some() && locks.try_share(0..9).is_none());
        drop(other);
        assert!(locks.try_share(0..9).is_some());
    }

    #[test]
    fn writers_of_whole_blocks_do_not_mind_each_other() {
        let locks = BlockLocks::new(4096);
        let writers = [locks.try_share(0..8).unwrap(), locks.try_share(4..5).unwrap()];
        assert!(locks.try_own(4).is_none() && locks.try_own(8).is_some());
        let [long, short] = writers;
        drop(long);
        assert!(locks.try_own(3).is_some() && locks.try_own(4).is_none());
        drop(short);
        assert!(locks.try_own(4).is_some());
    }
}

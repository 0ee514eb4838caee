//! Grant copies, many by one system call, each with its owner.

use crate::limits::SEGMENTS_PER_COPY_BATCH;
use crate::units::DomId;
use crate::xen::abi::GNTST_GENERAL_ERROR;
use crate::xen::{GrantCopy, Grants};

/// Copies to make, and the slot or indirect head that each belongs to.
#[derive(Debug)]
pub struct CopyBatch {
    copies: Vec<GrantCopy>,
    owners: Vec<u32>,
}

impl Default for CopyBatch {
    /// An empty batch, with room for what one system call copies.
    fn default() -> CopyBatch {
        let room = SEGMENTS_PER_COPY_BATCH;
        CopyBatch { copies: Vec::with_capacity(room), owners: Vec::with_capacity(room) }
    }
}

impl CopyBatch {
    /// Adds a copy.
    pub fn push(&mut self, owner: u32, copy: GrantCopy) {
        self.copies.push(copy);
        self.owners.push(owner);
    }

    /// Makes all copies and returns how many there were. If a whole system call fails, each of its copies
    /// has failed.
    pub fn run<G: Grants>(&mut self, grants: &mut G, frontend: DomId) -> usize {
        for batch in self.copies.chunks_mut(SEGMENTS_PER_COPY_BATCH) {
            if grants.copy(frontend, batch).is_err() {
                batch.iter_mut().for_each(|copy| copy.status = GNTST_GENERAL_ERROR);
            }
        }
        self.copies.len()
    }

    /// The owner of each copy that failed, in order.
    pub fn failed(&self) -> impl Iterator<Item = u32> + '_ {
        let each = self.owners.iter().zip(&self.copies);
        each.filter(|(_, copy)| copy.status != 0).map(|(owner, _)| *owner)
    }

    /// Empties the batch.
    pub fn clear(&mut self) {
        self.copies.clear();
        self.owners.clear();
    }
}

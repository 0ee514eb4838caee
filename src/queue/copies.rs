//! Grant copies, many by one system call, and whose each is.

use crate::limits::SEGMENTS_PER_COPY_BATCH;
use crate::units::DomId;
use crate::xen::abi::GNTST_GENERAL_ERROR;
use crate::xen::{GrantCopy, Grants};

/// Copies to do, and the slot or head that each is for.
#[derive(Debug)]
pub struct CopyBatch {
    copies: Vec<GrantCopy>,
    owners: Vec<u32>,
}

impl Default for CopyBatch {
    /// None, and room for what one system call does.
    fn default() -> CopyBatch {
        let room = SEGMENTS_PER_COPY_BATCH;
        CopyBatch { copies: Vec::with_capacity(room), owners: Vec::with_capacity(room) }
    }
}

impl CopyBatch {
    /// Adds one.
    pub fn push(&mut self, owner: u32, copy: GrantCopy) {
        self.copies.push(copy);
        self.owners.push(owner);
    }

    /// Does all of them, and says how many that were. If a whole system call is refused, each copy of
    /// it has failed.
    pub fn run<G: Grants>(&mut self, grants: &mut G, frontend: DomId) -> usize {
        for batch in self.copies.chunks_mut(SEGMENTS_PER_COPY_BATCH) {
            if grants.copy(frontend, batch).is_err() {
                batch.iter_mut().for_each(|copy| copy.status = GNTST_GENERAL_ERROR);
            }
        }
        self.copies.len()
    }

    /// Owners of copies that failed, in order, once for each.
    pub fn failed(&self) -> impl Iterator<Item = u32> + '_ {
        let each = self.owners.iter().zip(&self.copies);
        each.filter(|(_, copy)| copy.status != 0).map(|(owner, _)| *owner)
    }

    /// Forgets them.
    pub fn clear(&mut self) {
        self.copies.clear();
        self.owners.clear();
    }
}

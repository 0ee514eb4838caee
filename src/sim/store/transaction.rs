//! Transactions: a snapshot, what was done to it, and whether it can still be done to the tree.

use super::Errno;
use super::access::Caller;
use super::quota::Quota;
use super::session::{Footprint, Session};
use super::tree::Tree;
use super::watch::Change;
use crate::xen::store::wire::Op;

/// A transaction under way.
#[derive(Debug)]
pub(super) struct Transaction {
    base: Tree,
    tree: Tree,
    footprint: Footprint,
    overgrown: bool,
}

impl Transaction {
    /// One that sees the tree as it is now.
    pub(super) fn begin(live: &Tree) -> Transaction {
        Transaction {
            base: live.clone(),
            tree: live.clone(),
            footprint: Footprint::default(),
            overgrown: false,
        }
    }

    /// Serves a request within it.
    pub(super) fn serve(
        &mut self,
        caller: Caller,
        quota: &Quota,
        op: Op,
        payload: &[u8],
    ) -> Result<Vec<u8>, Errno> {
        if self.overgrown {
            return Err(libc::ENOSPC);
        }
        let (tree, footprint) = (&mut self.tree, &mut self.footprint);
        let answer = Session { caller, quota, tree, footprint }.serve(op, payload);
        if !caller.is_privileged() && self.footprint.seen.len() > quota.transaction_nodes {
            self.overgrown = true;
            return Err(libc::ENOSPC);
        }
        answer
    }

    /// Makes its changes to the tree and returns them for the watches. EAGAIN if a node that it
    /// looked at has changed since it began.
    ///
    /// The nodes are merged by their final state, not by repeating the requests, so that a
    /// transaction costs no more than the nodes that it touched. Whatever it relied on is
    /// unchanged, so each node that it leaves behind finds its parent in place.
    pub(super) fn commit(
        self,
        live: &mut Tree,
        caller: Caller,
        quota: &Quota,
    ) -> Result<Vec<Change>, Errno> {
        if self.overgrown {
            return Err(libc::ENOMEM);
        }
        let Transaction { base, tree, footprint, .. } = self;
        if footprint.seen.iter().any(|path| base.generation(path) != live.generation(path)) {
            return Err(libc::EAGAIN);
        }
        let mut merged = live.clone();
        let gone = footprint.modified.iter().filter(|path| tree.get(path).is_none());
        gone.for_each(|path| merged.remove(path));
        for path in &footprint.modified {
            if let Some(node) = tree.get(path) {
                merged.create(path, b"", node.permissions.clone());
                merged.set_value(path, &node.value);
                merged.set_permissions(path, node.permissions.clone());
            }
        }
        let (before, after) = (live.owned(caller.domid), merged.owned(caller.domid));
        if !caller.is_privileged() && after > before && after > quota.nodes {
            return Err(libc::ENOSPC);
        }
        *live = merged;
        let mut changes = footprint.into_changes();
        for change in &mut changes {
            // What was readable only between its own steps, nobody has seen.
            change.readers_before = base.readers(&change.path);
        }
        Ok(changes)
    }
}

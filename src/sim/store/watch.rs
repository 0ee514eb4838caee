//! Watches and the changes that fire them.

use super::access::{Caller, Permissions, Right};
use super::path::NodePath;
use crate::xen::store::events::covers;

/// One change of one node, as watches see it.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) path: NodePath,
    pub(super) reach: Reach,
    /// Who could read it before: someone who no longer can still learns of that.
    pub(super) readers_before: Vec<Permissions>,
}

/// Which watches a change fires.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reach {
    /// Those on the very node: it went because a node above was removed, for which those further
    /// up get their own event.
    Exact,
    /// Those on the node or on one above.
    Subtree,
}

/// One watch of one client.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) path: NodePath,
    pub(super) token: String,
    /// Bytes that a relative watch does not show of its domain's home.
    hidden: usize,
}

impl Watch {
    /// A watch that the client named by `given`, which means `path`.
    pub(super) fn new(path: NodePath, token: String, given: &[u8]) -> Watch {
        let hidden = path.as_str().len() - given.len();
        Watch { path, token, hidden }
    }

    pub(super) fn sees(&self, change: &Change) -> bool {
        match change.reach {
            Reach::Exact => self.path == change.path,
            Reach::Subtree => covers(self.path.as_str(), change.path.as_str()),
        }
    }

    /// A path at or below the watched one as the client knows it.
    pub(super) fn shown<'a>(&self, path: &'a NodePath) -> &'a str {
        &path.as_str()[self.hidden..]
    }
}

/// Whether `caller` may learn of a change to a node with these readers, before or after it.
pub(super) fn may_see(caller: Caller, readers: &[Permissions]) -> bool {
    readers.iter().any(|permissions| caller.may(Right::Read, permissions))
}

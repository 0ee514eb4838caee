//! Who may do what with a node.

use std::sync::Arc;

use crate::units::DomId;
use crate::xen::{NodeAccess, Permission};

/// A node's permissions, never empty: the first entry names the owner and what anybody else may do
/// who has no entry of his own.
pub(super) type Permissions = Arc<[Permission]>;

/// What a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Right {
    Read,
    Write,
    Own,
}

/// The domain that asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    pub(super) domid: DomId,
    /// The domain whose rights it has too (SET_TARGET).
    pub(super) target: Option<DomId>,
}

impl Caller {
    /// Whether everything is allowed and no quota holds.
    pub(super) fn is_privileged(self) -> bool {
        self.domid == DomId::DOM0
    }

    pub(super) fn may(self, right: Right, permissions: &[Permission]) -> bool {
        let is_mine =
            |entry: &&Permission| entry.domid == self.domid || Some(entry.domid) == self.target;
        let Some((first, others)) = permissions.split_first() else {
            return self.is_privileged();
        };
        if self.is_privileged() || is_mine(&first) {
            return true;
        }
        let access = others.iter().find(is_mine).unwrap_or(first).access;
        match right {
            Right::Read => matches!(access, NodeAccess::Read | NodeAccess::Both),
            Right::Write => matches!(access, NodeAccess::Write | NodeAccess::Both),
            Right::Own => false,
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::xen::store::wire::parse_permission;

    #[test]
    fn the_owner_may_all_an_entry_overrides_the_rest_and_the_first_is_for_the_rest() {
        let permissions: Vec<Permission> =
            ["r1", "n2", "b3", "w4"].map(|text| parse_permission(text.as_bytes()).unwrap()).into();
        let rights = |domid: u32, target: Option<u32>| {
            let domain = |raw| DomId::try_from(raw).unwrap();
            let caller = Caller { domid: domain(domid), target: target.map(domain) };
            [Right::Read, Right::Write, Right::Own].map(|right| caller.may(right, &permissions))
        };
        assert_eq!(rights(0, None), [true, true, true]);
        assert_eq!(rights(1, None), [true, true, true]);
        assert_eq!(rights(2, None), [false, false, false]);
        assert_eq!(rights(3, None), [true, true, false]);
        assert_eq!(rights(4, None), [false, true, false]);
        assert_eq!(rights(5, None), [true, false, false]);
        assert_eq!(rights(2, Some(1)), [true, true, true]);
    }
}

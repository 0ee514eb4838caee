//! The name of a disk throughout control.

use std::fmt;
use std::sync::Arc;

use crate::units::{DomId, VbdId};
use crate::xen::keys;
use crate::xen::vdev::Vdev;

/// Identifies a disk: the end of its backend area's path.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DiskKey {
    /// The backend type, such as `vbd`.
    pub kind: Arc<str>,
    /// The frontend's domain.
    pub domid: DomId,
    /// Its number in that domain.
    pub vbd: VbdId,
}

impl DiskKey {
    /// Its backend area.
    pub fn backend_area(&self, own: DomId) -> String {
        keys::backend_area(own, &self.kind, self.domid, self.vbd)
    }

    /// Its frontend area.
    pub fn frontend_area(&self) -> String {
        keys::frontend_area(self.domid, self.vbd)
    }

    /// Its name in errors for others that want the same storage.
    pub fn user(&self) -> String {
        format!("disk {} of domain {}", Vdev::from(self.vbd), self.domid)
    }

    /// The area of its `error` node.
    pub fn error_area(&self, own: DomId) -> String {
        keys::error_area(own, &self.kind, self.domid, self.vbd)
    }
}

impl fmt::Display for DiskKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{} ({})", self.kind, self.domid, self.vbd, Vdev::from(self.vbd))
    }
}

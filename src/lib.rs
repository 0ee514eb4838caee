//! polldisk: a Xen PV block backend in user space.

pub mod backing;
pub mod limits;
pub mod metrics;
pub mod msg;
pub mod park;
pub mod sim;
pub mod units;
pub mod xen;

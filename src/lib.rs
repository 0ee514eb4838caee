//! polldisk: a Xen PV block backend in user space.

pub mod backing;
pub mod blkif;
pub mod config;
pub mod control;
pub mod engine;
pub mod limits;
pub mod metrics;
pub mod msg;
pub mod park;
pub mod queue;
pub mod sim;
pub mod units;
pub mod worker;
pub mod xen;

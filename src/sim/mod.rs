//! The embedded stand-in for Xen.
//!
//! A run folder holds `hypervisor.sock` and `xenstore.sock`. [`StandIn`] serves both; [`SimXen`] is
//! the platform that a backend gets, [`Domain`] is a guest. All of them may be in one process or
//! each in its own.

pub mod blkfront;
mod channels;
pub mod domain;
pub mod events;
pub mod grants;
mod guest;
pub mod hypervisor;
mod mailbox;
mod memory;
mod wire;

pub use domain::Domain;
pub use memory::Gfn;

//! The stand-in for Xen.
//!
//! - [`store`]: a xenstore server.

pub mod store;

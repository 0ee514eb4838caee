//! The stand-in's guest: a blkfront that negotiates through xenstore, drives a ring, and knows
//! what every sector it reads must hold.
//!
//! [`device`] is the data path over one ring, [`xenbus`] the negotiation, [`oracle`] the memory of
//! what was written, [`load`] a loop over all three that verifies every byte.

pub mod device;
pub mod load;
pub mod oracle;
pub mod xenbus;

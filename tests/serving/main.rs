//! The whole daemon as guests and admins see it, on the stand-in for Xen.

mod cli;
mod discard;
mod drives;
mod fuse;
mod guests_that_vanish;
#[path = "../host/mod.rs"]
mod host;
mod hostile_nodes;
mod hostile_requests;
mod hostile_rings;
mod hotplug_script;
mod idle;
mod in_memory;
mod io;
mod kinds_of_storage;
mod reconnect;
mod rig;
mod sector_sizes;
mod sharing;
mod targets;

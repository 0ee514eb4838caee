//! Real Xen in an emulator: builds it, boots it, and runs polldisk under it.
//!
//! A [`scenario`] gets a [`lab::Lab`]: a fresh dom0 under a real hypervisor, in which it starts a
//! [`backend`], creates guests and runs commands on both sides. [`machine`] boots the [`image`] in the
//! emulator, with the command line from [`qemu`], and [`agent`] carries the commands.
//!
//! Everything is emulated instruction by instruction, so the lab proves behaviour, not speed. But
//! instructions can be counted, and [`compare`] counts them.

pub mod agent;
pub mod backend;
pub mod compare;
pub mod image;
pub mod lab;
pub mod machine;
pub mod qemu;
pub mod report;
pub mod scenario;
pub mod xen;

//! Real Xen in an emulator: builds it, boots it, and runs polldisk under it.
//!
//! A [`scenario`] gets a [`lab::Lab`]: a fresh dom0 under a real hypervisor, in which it starts a
//! [`backend`], creates guests and runs commands on both sides. Below it, [`machine`] boots the
//! [`image`] in the emulator whose command line [`qemu`] writes, and [`agent`] carries the commands.
//!
//! Everything here is emulated instruction by instruction: it proves behaviour, not speed. But
//! instructions can be counted, and [`compare`] does.

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

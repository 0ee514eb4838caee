//! Xen's devices on the stand-in, for programs that were built for real Xen.
//!
//! Loaded before the C library by `LD_PRELOAD`, this library handles open, ioctl, mmap, munmap, read,
//! write and close on `/dev/xen/gntdev` and `/dev/xen/evtchn`, and passes all other calls on. It is an
//! ordinary client of the stand-in (`polldisk::sim`) that acts as dom0.
//!
//! | module | what it does |
//! |---|---|
//! | `symbols` | the functions that programs call instead of the C library's |
//! | `next` | the C library's own functions |
//! | `handles` | which descriptors are intercepted devices |
//! | `evtchn`, `gntdev` | the devices |
//! | `mappings` | granted pages in the program's memory |
//! | `hypercalls` | a symbol that the linker needs |
//! | `settings` | settings from the environment |
//!
//! While this library serves a call, its own calls of the C library also reach its functions, since
//! programs and libraries share one name space. `handles::Inside` makes them pass through.

mod evtchn;
mod gntdev;
mod handles;
mod hypercalls;
mod mappings;
mod next;
mod settings;
mod symbols;

//! Xen's devices for programs that were built for them, played by the stand-in.
//!
//! Put in front of the C library by `LD_PRELOAD`, this library answers for `/dev/xen/gntdev` and
//! `/dev/xen/evtchn` at the level of open, ioctl, mmap, munmap, read, write and close, and passes
//! everything else on. It is a client of the stand-in like any other (`polldisk::sim`), in the
//! place of dom0.
//!
//! | module | what it does |
//! |---|---|
//! | `symbols` | the C library's functions as programs see them |
//! | `next` | the same functions as the C library has them |
//! | `handles` | which descriptors are devices of ours |
//! | `evtchn`, `gntdev` | the devices |
//! | `mappings` | granted pages in the program's memory |
//! | `hypercalls` | what the linker wants |
//! | `settings` | what the environment says |
//!
//! A function of the C library that a device of ours calls while it serves the program comes back
//! here, since programs and libraries share one name space; `handles::Inside` lets it through.

mod evtchn;
mod gntdev;
mod handles;
mod hypercalls;
mod mappings;
mod next;
mod settings;
mod symbols;

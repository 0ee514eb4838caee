//! polldisk: a Xen PV block backend in user space.
//!
//! # Planes
//!
//! The *control plane* ([`control`]) is one thread. It watches xenstore, runs the xenbus state
//! machine of each disk, opens images, and places rings on workers. The *data plane* ([`worker`],
//! [`queue`], [`blkif`], [`engine`]) is a set of pinned threads. Each owns its event channels,
//! grant mappings, rings and io_uring, and shares nothing. Between them go only the messages of
//! [`msg`]: numbers, an opened image, results.
//!
//! A request's way: the guest writes it to its ring; a worker's pass copies it off
//! ([`blkif::codec`]), checks the copy ([`blkif::request`]), finds the guest's pages
//! ([`queue`]), hands them to storage ([`engine`]), and puts the response on the ring. A pass does
//! this for a batch of each ring, with a publication for several responses and at most one
//! notification per ring.
//!
//! # Who may import whom
//!
//! ```text
//! units limits text park metrics budget pool
//!   └─ output                                  (the binary and tools)
//!   └─ backing ─ msg
//!   └─ xen (traits, shm, keys, store) ─ blkif ─┐
//!         └─ engine ───────────────────────────┴─ queue ─ worker
//!   control: xen, backing, msg, park          (never queue, worker)
//!   sim: xen, blkif                           (only tests, benches, tools and the demo name it)
//!   xen::linux                                (only the binary and tools name it)
//! ```
//!
//! `tests/tidy.rs` holds this up.
//!
//! # Words
//!
//! *Queue*: one ring of a disk. *Worker*: a pinned thread. *Backing*: what is stored. *Engine*: how
//! I/O is done. *Platform*: who plays the hypervisor, real Xen or the stand-in of [`sim`]. *Link*:
//! one connection of a disk to the data plane. All other words are Xen's own.

pub mod backing;
pub mod blkif;
pub mod budget;
pub mod config;
pub mod control;
pub mod engine;
pub mod limits;
pub mod metrics;
pub mod msg;
pub mod output;
pub mod park;
pub mod pool;
pub mod queue;
pub mod sim;
pub mod text;
pub mod units;
pub mod worker;
pub mod xen;

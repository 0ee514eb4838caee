//! polldisk: a Xen PV block backend in user space.
//!
//! # Planes
//!
//! The *control plane* ([`control`]) is one thread. It watches xenstore, runs the xenbus state
//! machine of each disk, opens images, and places rings on workers. The *data plane* ([`worker`],
//! [`queue`], [`blkif`], [`engine`]) is a set of pinned threads. Each owns its event channels,
//! grant mappings, rings and io_uring. Between control and workers go only the messages of [`msg`]:
//! numbers, an opened image, results. Workers share only an image that several of them serve, the counters
//! that control reads, and each domain's [`budget`] of mappings.
//!
//! Neither plane reads a clock, sleeps or depends on the order of a hash table: each pass gets the time as
//! an argument (`Worker::poll_once`, `Control::poll_once`), and a thin shell around it waits.
//!
//! The path of a request: the guest writes it to its ring; a worker's pass copies it off
//! ([`blkif::codec`]), checks the copy ([`blkif::request`]), finds the guest's pages ([`queue`]), hands
//! them to storage ([`engine`]), and puts the response on the ring. A pass does this for a batch from each
//! ring, publishes several responses at once, and sends at most one notification per ring.
//!
//! # Who may import whom
//!
//! From the bottom to the top, each part and what it imports:
//!
//! ```text
//! units
//! limits
//! text
//! patience
//! park     patience
//! metrics
//! pool
//! budget   limits
//! output   limits text
//! backing  limits text units
//! xen      limits park units
//! blkif    backing limits units xen
//! config   backing blkif limits patience text
//! msg      backing blkif budget limits metrics park units
//! engine   backing limits park pool xen
//! queue    backing blkif budget engine limits metrics msg pool units xen
//! worker   backing engine limits metrics msg park patience queue units xen
//! control  backing blkif budget limits metrics msg park text units xen
//! sim      backing blkif control engine limits msg park units worker xen
//! ```
//!
//! So `control` and `worker` share only `msg`. [`sim`] and [`xen::linux`] provide the hypervisor's side;
//! only the binary, tests, benches and tools name them. `tests/tidy.rs` checks this.
//!
//! # Where to change what
//!
//! | | |
//! |---|---|
//! | another image format or transport | the plan in [`engine`]; `backing::Contents` names and opens it, `backing::Image` is what workers get |
//! | a resource that queues share | [`pool`] |
//! | what a disk does when its guest or toolstack does something | `TABLE` in `control/machine.rs` |
//! | a bound | [`limits`] |
//! | an option of `polldisk serve` | [`config`], then `cli/serve.rs` of the binary |
//! | a column of `polldisk list` | `DiskReport` in `control/admin/protocol.rs`; `control/admin/mod.rs` fills it, `cli/list.rs` shows it |
//! | a feature of the protocol | `FEATURES` in [`blkif::features`], `control/frontend.rs` for what frontends answer |
//! | a test of a whole guest, stepped | `tests/simulation.rs` with [`sim::world`] |
//!
//! # Words
//!
//! *Queue*: one ring of a disk. *Worker*: a pinned thread. *Backing*: where a disk's data is stored.
//! *Engine*: how I/O is done. *Platform*: what provides the hypervisor, real Xen or the stand-in of
//! [`sim`]. *Connection*: the rings of a disk being served, from Connected to Closed. All other terms are
//! Xen's.

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
pub mod patience;
pub mod pool;
pub mod queue;
pub mod sim;
pub mod text;
pub mod units;
pub mod worker;
pub mod xen;

//! The control plane: one thread that keeps xenstore and the workers in step.
//!
//! ```text
//!  xenstore --events--> registry --inputs--> disk: machine --effects--> xenstore
//!  admin socket ------>    |                                      \---> commands to workers
//!  workers' reports ------'
//! ```
//!
//! `registry` finds the disks and routes; `machine` decides, from a table; `disk` carries out;
//! `area` and `frontend` read and write the two ends in xenstore, `ahead` in few round trips;
//! `connection` takes a disk's queues together; `drive` knows the medium in a drive; `helpers` are the
//! threads that open and close storage; `guests` bounds what each guest may cost; [`admin`] answers the
//! command line. Nothing here waits for a worker, a guest or storage. [`Control`] does all of that in
//! passes, at times that it is told; [`run`](run()) sleeps between them.
//!
//! # What happens at the end
//!
//! On SIGTERM or SIGINT, or when the caller's bell rings, every queue is disconnected (its requests
//! in flight finish first; those that storage has not answered after `limits::DRAIN_SECONDS`, or when
//! a second signal comes, are given up, and the log names the oldest of them). Areas that `attach` made
//! are removed at both ends. The toolstack's areas keep their state, Connected ones too: unlike QEMU
//! polldisk does not take disks away from guests that run on, and whoever serves them next finds what
//! was there. The guest's I/O waits until then.
//!
//! # When xenstored goes away
//!
//! Connected rings need no xenstore, so they run on. Nothing can be attached, detached or
//! connected until xenstored answers again; then everything is read afresh.

pub mod admin;
mod ahead;
mod area;
mod attach;
mod connection;
mod disk;
mod drive;
mod frontend;
mod guests;
mod helpers;
mod key;
mod machine;
mod placement;
mod plane;
mod registry;
mod run;
mod workers;

pub use plane::{Control, Ended, Progress};
pub use run::{Config, ControlError, run};

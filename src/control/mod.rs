//! The control plane: one thread that keeps xenstore and the workers in step.
//!
//! ```text
//!  xenstore --events--> registry --inputs--> disk: machine --effects--> xenstore
//!  admin socket ------>    |                                      \---> commands to workers
//!  workers' reports ------'
//! ```
//!
//! `registry` finds the disks and routes events to them; `machine` decides, from a table; `disk` carries
//! the decisions out; `area` and `frontend` read and write the two ends in xenstore, with few round trips
//! thanks to `ahead`; `connection` handles a disk's queues together; `drive` tracks the medium in a drive;
//! `helpers` are the threads that open and close storage; `guests` bounds what each guest may cost;
//! [`admin`] answers the command line. Nothing here waits for a worker, a guest or storage. [`Control`]
//! does all of this in passes, which get the time as an argument; [`run`](run()) sleeps between them.
//!
//! # What happens at the end
//!
//! On SIGTERM or SIGINT, or when the caller's bell rings, every queue is disconnected. Its requests in
//! flight finish first; those that storage has not answered after `limits::DRAIN_SECONDS`, or when a second
//! signal comes, are given up, and the log names the oldest of them. Areas that `attach` made are removed
//! at both ends. The toolstack's areas keep their state, even Connected: unlike QEMU, polldisk does not
//! take disks away from running guests, so that the next backend finds the areas as they were. The guests'
//! I/O waits until then.
//!
//! # When xenstored goes away
//!
//! Connected rings don't need xenstore, so they keep running. Nothing can be attached, detached or
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

//! A frontend that measures any Xen block backend.
//!
//! [`run`] brings up the platform and the disks and connects them, whoever the backend is: a child
//! process on a stand-in for Xen, a process that is there already, or a backend on real Xen.
//! [`measure`] then runs a [`load`] on each ring, in a thread of its own, and reads all counters
//! at the ends of the samples. [`report`] makes figures of that.
//!
//! ```text
//! options -> run -> toolstack, child | echo          who serves the disks
//!             |---> disk -> queue -> kernel          what a frontend is made of
//!             |---> measure -> load -> arrivals, pattern, queue
//!             '---> report
//! ```
//!
//! What a figure means: a latency lasts from a request's start to the moment its response is seen;
//! under a schedule (`--rate`) it starts when the request was due. Counters and CPU times are read
//! by the main thread, all at one moment, so that a figure per I/O is a quotient of two
//! differences over the same time.

pub mod arrivals;
pub mod child;
pub mod clock;
pub mod disk;
pub mod echo;
pub mod kernel;
pub mod load;
pub mod measure;
pub mod neighbours;
pub mod options;
pub mod pattern;
pub mod queue;
pub mod report;
pub mod run;
pub mod sys;
pub mod toolstack;
pub mod usage;

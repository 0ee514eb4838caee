//! A frontend that measures any Xen block backend.
//!
//! [`run`] starts the platform and connects the disks. The backend may be a child process on a stand-in
//! for Xen, a process that already runs, or a backend on real Xen. [`measure`] then runs a [`load`] on
//! each ring, in a thread of its own, and reads all counters at the ends of the samples. [`report`] turns
//! them into figures.
//!
//! ```text
//! options -> run -> toolstack, child | echo          the backend and its disks
//!             |---> disk -> queue -> kernel          the frontend
//!             |---> measure -> load -> arrivals, pattern, queue
//!             '---> report
//! ```
//!
//! A latency lasts from a request's start to the moment when its response is seen; under a schedule
//! (`--rate`) it starts when the request was due. The main thread reads all counters and CPU times at one
//! moment, so a figure per I/O is a quotient of two differences over the same time.

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

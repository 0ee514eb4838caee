//! polldisk beside other backends: the same loads, on the same machine, in turn.
//!
//! A [`scenario`] names the contenders, their [`load`] and the goals. [`run`] lets the [`contender`]s
//! take turns, round after round, each under the same load on the same cores; [`slices`] are turns of
//! milliseconds, for storage whose speed changes from one second to the next. [`verdict`] compares the
//! contenders within rounds, so that noise which all of them share cancels out, and says if the rounds
//! differ too much to tell. [`report`] and [`plot`] show the results.
//!
//! ```text
//! scenario -> run -> contender -> blkload or fio -> sample, slices
//!              '---> verdict -> report, plot
//! ```

pub mod contender;
pub mod load;
pub mod machine;
pub mod plot;
pub mod programs;
pub mod report;
pub mod run;
pub mod sample;
pub mod scenario;
pub mod slices;
pub mod storage;
pub mod verdict;
pub mod wakeup;

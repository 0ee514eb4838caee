//! polldisk beside other backends: the same loads, on the same machine, in turn.
//!
//! A [`scenario`] says what is measured and what is aimed at. [`run`] lets its [`contender`]s take
//! turns, round after round, each under the same load on the same cores; [`slices`] are turns of
//! milliseconds, for storage that is not the same one second later. [`verdict`] compares them
//! within rounds, so that what the machine does to all of them cancels out, and says where the
//! rounds differ too much to tell. [`report`] and [`plot`] show it all.
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

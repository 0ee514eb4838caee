//! Medians, spreads and verdicts, and how reports write them.
//!
//! A crate of its own because `compare`, the lab and `blkload` share it, and none of them should pull in
//! what another needs: plots, an emulator or a frontend.

mod interval;
mod text;
mod verdict;

pub use interval::{Interval, within_rounds};
pub use text::{Table, count, duration, figure, or_dash};
pub use verdict::Verdict;

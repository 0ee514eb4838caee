//! The subcommands: each a set of options and a `run`.

pub mod admin;
pub mod check_target;
pub mod demo;
pub mod list;
mod log;
pub mod rates;
pub mod serve;

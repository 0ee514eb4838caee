//! The one developer entry point: `cargo xtask <command>`.

fn main() {}

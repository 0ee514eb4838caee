//! The one developer entry point: `cargo xtask <command>`.

mod lab;

use anyhow::Result;
use clap::Parser;

/// What developers and CI run in this repository.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Command {
    Lab(lab::Arguments),
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Lab(arguments) => lab::run(arguments),
    }
}

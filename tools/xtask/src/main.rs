//! The developers' single entry point: `cargo xtask <command>`.

mod abi_check;
mod compare;
mod lab;
mod mutants;

use std::process::ExitCode;

use clap::Parser;
use polldisk::output;

/// Commands for developers and CI.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Command {
    AbiCheck(abi_check::Arguments),
    Compare(compare::Arguments),
    Lab(lab::Arguments),
    Mutants(mutants::Arguments),
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::AbiCheck(arguments) => abi_check::run(&arguments),
        Command::Compare(arguments) => compare::run(&arguments),
        Command::Lab(arguments) => lab::run(arguments),
        Command::Mutants(arguments) => mutants::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::say(format_args!("xtask: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

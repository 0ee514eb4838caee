//! `polldisk`: serves guests' virtual disks under Xen, and the commands around that.

mod cli;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A Xen PV block backend in user space: serves guests' virtual disks from files and block devices.
///
/// `polldisk serve` runs in dom0 or a driver domain. `polldisk demo` needs neither Xen nor root.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(cli::serve::Serve),
    Demo(cli::demo::Demo),
    Attach(cli::admin::Attach),
    Detach(cli::admin::Detach),
    Insert(cli::admin::Insert),
    Eject(cli::admin::Eject),
    List(cli::list::List),
    CheckTarget(cli::check_target::CheckTarget),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(serve) => serve.run(),
        Command::Demo(demo) => demo.run(),
        Command::Attach(attach) => attach.run(),
        Command::Detach(detach) => detach.run(),
        Command::Insert(insert) => insert.run(),
        Command::Eject(eject) => eject.run(),
        Command::List(list) => list.run(),
        Command::CheckTarget(check) => check.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("polldisk: {error}");
            error.chain().skip(1).for_each(|cause| eprintln!("  because: {cause}"));
            ExitCode::FAILURE
        }
    }
}

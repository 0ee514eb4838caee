//! `polldisk`: serves guests' virtual disks under Xen, and has the commands that manage them.

mod cli;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use polldisk::output;
use polldisk::text::printable;

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
    output::tell_panics();
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) => return output::usage(&error),
    };
    let result = match command {
        Command::Serve(serve) => serve.run(),
        Command::Demo(demo) => demo.run(),
        Command::Attach(attach) => attach.run(),
        Command::Detach(detach) => detach.run(),
        Command::Insert(insert) => insert.run(),
        Command::Eject(eject) => eject.run(),
        Command::List(list) => list.run(),
        Command::CheckTarget(check) => check.run(),
    };
    if let Err(error) = &result {
        tell(error);
    }
    output::finish_queue();
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Prints an error and its causes, one per line. Some errors repeat their cause, which is printed once.
fn tell(error: &anyhow::Error) {
    let mut causes: Vec<String> = error.chain().map(ToString::to_string).collect();
    causes.dedup();
    for (index, cause) in causes.iter().enumerate() {
        let lead = if index == 0 { "polldisk:" } else { "  because:" };
        output::say(format_args!("{lead} {}", printable(cause)));
    }
}

#[cfg(test)]
mod test {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn help_says_what_was_written() {
        let mut cli = Cli::command();
        cli.build();
        for command in cli.get_subcommands_mut() {
            let words = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
            let page = words(command.render_long_help().to_string());
            for argument in command.get_arguments().filter(|it| !it.is_hide_set()) {
                let help = argument.get_long_help().or(argument.get_help());
                let help = words(help.map(ToString::to_string).unwrap_or_default());
                assert!(page.contains(&help), "{} --help lacks \"{help}\"", command.get_name());
            }
        }
    }
}

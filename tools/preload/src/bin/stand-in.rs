//! Runs the stand-in for Xen as a process of its own, and programs on it.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser};
use polldisk::output;
use polldisk::sim::{StandIn, XENSTORE_SOCKET};
use signal_hook::consts::{SIGINT, SIGTERM};

/// The stand-in for Xen, for programs that know only real Xen
#[derive(Debug, Parser)]
#[command(name = "stand-in")]
enum Arguments {
    Serve(Serve),
    Run(Run),
}

/// Serve hypervisor and xenstore on sockets in a folder until SIGTERM or SIGINT
#[derive(Args, Debug)]
struct Serve {
    /// The run folder; created if it is missing
    folder: PathBuf,
}

/// Run a program as if in dom0: /dev/xen/gntdev, /dev/xen/evtchn and xenstore are the stand-in's
#[derive(Args, Debug)]
struct Run {
    /// The run folder of a running stand-in
    folder: PathBuf,
    /// Make grant copy, notify and unmask cost a system call each, as on Xen
    #[arg(long)]
    system_calls: bool,
    /// The program and its arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

fn main() -> ExitCode {
    let result = match Arguments::parse() {
        Arguments::Serve(serve) => serve.run(),
        Arguments::Run(run) => run.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::say(format_args!("stand-in: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

impl Serve {
    fn run(&self) -> Result<()> {
        let folder = self.folder.display();
        std::fs::create_dir_all(&self.folder).with_context(|| format!("cannot create {folder}"))?;
        let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
        let _stand_in = StandIn::start(&self.folder).with_context(|| {
            format!("cannot serve in {folder}: a stand-in may be running there already")
        })?;
        output::print(format_args!("serving in {folder}"))?;
        signals.forever().next();
        Ok(())
    }
}

impl Run {
    /// Replaces this process with the program.
    fn run(&self) -> Result<()> {
        let folder = self.folder.canonicalize().unwrap_or_else(|_| self.folder.clone());
        let store = folder.join(XENSTORE_SOCKET);
        if !store.exists() {
            bail!("no stand-in runs in {}: start one with `stand-in serve`", folder.display());
        }
        let [program, arguments @ ..] = self.command.as_slice() else { bail!("no program") };
        let error = Command::new(program)
            .args(arguments)
            .env("LD_PRELOAD", library()?)
            .env("POLLDISK_STAND_IN", &folder)
            .env("POLLDISK_STAND_IN_SYSTEM_CALLS", if self.system_calls { "1" } else { "0" })
            .env("XENSTORED_PATH", &store)
            .exec();
        Err(error).with_context(|| format!("cannot run {program}"))
    }
}

/// The preload library, which is built in the same folder as this program.
fn library() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let folder = program.parent().unwrap_or(Path::new("/"));
    let library = folder.join("libpolldisk_preload.so");
    if !library.exists() {
        bail!("{} is missing: cargo build --package preload", library.display());
    }
    Ok(library)
}

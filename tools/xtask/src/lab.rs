//! `cargo xtask lab`: polldisk under real Xen.

use std::collections::BTreeSet;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};
use lab::backend::Backend;
use lab::compare;
use lab::image::{self, Kernel};
use lab::lab::Options;
use lab::machine::Binary;
use lab::scenario::{self, SCENARIOS, Scenario};
use polldisk::output;

/// Runs scenarios under real Xen in an emulator.
///
/// Each boots a machine of its own. The first run builds the machine's images, which takes some
/// minutes, a network and root; they are kept in the user's cache folder.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Arguments {
    #[command(subcommand)]
    mode: Option<Mode>,

    /// The scenarios to run, or `all`
    #[arg(required_unless_present_any = ["list", "shell"])]
    scenarios: Vec<String>,

    /// List the scenarios
    #[arg(long)]
    list: bool,

    /// Run no scenario, but boot dom0 with its console on this terminal
    #[arg(long, conflicts_with = "scenarios")]
    shell: bool,

    /// The backend that serves the disks
    #[arg(long, default_value = "polldisk", value_parser = backend_names())]
    backend: String,

    /// The Debian release whose Linux dom0 and the guests run: bookworm, 6.1, or trixie, 6.12
    #[arg(long, value_name = "RELEASE", default_value = "bookworm", value_parser = kernel)]
    kernel: Kernel,

    /// The polldisk to test, instead of one built from this checkout
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,

    /// Run this many scenarios at a time, each in a machine of up to 6 GiB that keeps one core busy
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..))]
    jobs: u8,

    /// Keep all logs and the report in this folder, even if a scenario passes
    #[arg(long, value_name = "DIR")]
    keep_logs: Option<PathBuf>,
}

/// What the lab does besides running scenarios.
#[derive(Debug, Subcommand)]
enum Mode {
    Compare(CompareArguments),
}

/// Measures what a request costs on polldisk, qdisk and blkback, in instructions of the whole
/// machine.
///
/// Boots real Xen once, in an emulator that counts instructions, and takes some ten minutes. The exit
/// status is 0 if polldisk's targets are met.
#[derive(Debug, Args)]
struct CompareArguments {
    /// Turns of each backend under each job
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// The Debian release whose Linux dom0 and the guest run: bookworm, 6.1, or trixie, 6.12
    #[arg(long, value_name = "RELEASE", default_value = "trixie", value_parser = kernel)]
    kernel: Kernel,

    /// Where report.md and results.json go [default: target/compare/xen]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Options of `polldisk serve`, to see what they change
    #[arg(long, value_name = "OPTIONS", default_value = "", allow_hyphen_values = true)]
    serve: String,

    /// The polldisk to measure, instead of one built from this checkout
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,

    /// Keep all logs in this folder, even if nothing fails
    #[arg(long, value_name = "DIR")]
    keep_logs: Option<PathBuf>,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<()> {
    if let Some(Mode::Compare(arguments)) = arguments.mode {
        return compare(arguments);
    }
    if arguments.list {
        for Scenario { name, about, .. } in SCENARIOS {
            output::print(format_args!("{name:<12} {about}"))?;
        }
        return Ok(());
    }
    let scenarios = choose(&arguments.scenarios)?;
    let backend = Backend::ALL
        .into_iter()
        .find(|backend| backend.name() == arguments.backend)
        .context("no such backend")?;
    let mut binaries = Vec::new();
    if backend == Backend::Polldisk || arguments.binary.is_some() {
        binaries.push(polldisk(arguments.binary)?);
    }
    if scenarios.iter().any(|scenario| scenario.blkload) {
        binaries.push(("blkload", build("loadgen", "blkload")?));
    }
    if arguments.shell {
        return lab::machine::shell(arguments.kernel, &binaries);
    }
    let options = Options {
        kernel: arguments.kernel,
        backend,
        binaries,
        keep_logs: arguments.keep_logs.is_some(),
        logs: arguments.keep_logs.unwrap_or_else(|| target_folder().join("lab")),
    };
    // Done before the first machine, since otherwise each of the first machines would build them.
    image::ensure_built(options.kernel)?;
    run_all(&scenarios, arguments.jobs, |scenario| scenario::run(scenario, &options).map(drop))
}

fn compare(arguments: CompareArguments) -> Result<()> {
    let origin = match &arguments.binary {
        Some(binary) => binary.display().to_string(),
        None => commit(),
    };
    let binaries = vec![polldisk(arguments.binary)?];
    let options = compare::Options {
        lab: Options {
            kernel: arguments.kernel,
            backend: Backend::Polldisk,
            binaries,
            keep_logs: arguments.keep_logs.is_some(),
            logs: arguments.keep_logs.unwrap_or_else(|| target_folder().join("lab")),
        },
        origin,
        rounds: arguments.rounds,
        serve: arguments.serve,
    };
    let out = arguments.out.unwrap_or_else(|| target_folder().join("compare/xen"));
    let comparison = compare::run(&options)?;
    comparison.write(&out)?;
    output::print(format_args!("\n{}\n{}", comparison.table(), comparison.verdicts()))?;
    output::print(format_args!("the full report is {}", out.join("report.md").display()))?;
    ensure!(comparison.is_met(), "not every target is met");
    Ok(())
}

/// The checkout's commit, with `-dirty` if files differ from it.
fn commit() -> String {
    let git = Command::new("git")
        .args(["describe", "--always", "--dirty"])
        .current_dir(workspace())
        .output();
    let output = git.map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).lines().next().unwrap_or("unknown").to_owned()
}

/// Runs all scenarios, at most `jobs` at a time. If one fails, the others still run.
fn run_all(
    scenarios: &[Scenario],
    jobs: u8,
    run: impl Fn(&Scenario) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let work = || {
        while let Some(scenario) = scenarios.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = run(scenario) {
                output::say(format_args!("{error:#}"));
                failures.lock().expect("no job panics with it").push(scenario.name);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(work);
        }
    });
    let failures = failures.into_inner()?;
    ensure!(failures.is_empty(), "lab: failed: {}", failures.join(", "));
    Ok(())
}

fn kernel(release: &str) -> Result<Kernel> {
    let mut kernels = Kernel::ALL.into_iter();
    kernels.find(|kernel| kernel.release() == release).context("choose bookworm or trixie")
}

fn backend_names() -> PossibleValuesParser {
    PossibleValuesParser::new(Backend::ALL.map(Backend::name))
}

fn choose(names: &[String]) -> Result<Vec<Scenario>> {
    if names == ["all"] {
        return Ok(SCENARIOS.to_vec());
    }
    // A scenario has only one folder for its logs.
    let distinct: BTreeSet<&String> = names.iter().collect();
    ensure!(distinct.len() == names.len(), "a scenario is named twice");
    names
        .iter()
        .map(|name| match scenario::find(name) {
            Some(scenario) => Ok(scenario),
            None => bail!("no scenario {name}: cargo xtask lab --list shows them"),
        })
        .collect()
}

fn polldisk(given: Option<PathBuf>) -> Result<Binary> {
    Ok(("polldisk", given.map_or_else(|| build("polldisk", "polldisk"), Ok)?))
}

/// Builds a program of this checkout.
fn build(package: &str, program: &str) -> Result<PathBuf> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--release", "--package", package, "--bin", program])
        .current_dir(workspace())
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "{program} does not build");
    Ok(target_folder().join("release").join(program))
}

/// The folder of the workspace's manifest.
pub fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// The folder in which cargo builds.
pub fn target_folder() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    fn names(names: &[&str]) -> Result<Vec<&'static str>> {
        let names: Vec<String> = names.iter().map(|name| (*name).into()).collect();
        Ok(choose(&names)?.iter().map(|scenario| scenario.name).collect())
    }

    #[test]
    fn all_is_every_scenario() {
        assert_eq!(names(&["all"]).expect("all").len(), SCENARIOS.len());
    }

    #[test]
    fn an_unknown_scenario_is_refused_before_anything_runs() {
        assert!(names(&["first-disk", "nonsense"]).is_err());
    }

    #[test]
    fn a_scenario_cannot_run_twice_at_a_time() {
        assert!(names(&["first-disk", "reconnect", "first-disk"]).is_err());
    }

    #[test]
    fn a_failure_is_named_and_stops_no_other() {
        for jobs in [1, 2, 8] {
            let ran = AtomicUsize::new(0);
            let result = run_all(&SCENARIOS, jobs, |scenario| {
                ran.fetch_add(1, Ordering::Relaxed);
                ensure!(scenario.name != SCENARIOS[0].name, "by design");
                Ok(())
            });
            let error = result.expect_err("the first fails").to_string();
            assert!(error.ends_with(&format!("failed: {}", SCENARIOS[0].name)), "{error}");
            assert_eq!(ran.into_inner(), SCENARIOS.len());
        }
    }

    #[test]
    fn two_jobs_are_two_scenarios_at_a_time() {
        let both = Barrier::new(2);
        run_all(&SCENARIOS[..2], 2, |_| {
            both.wait();
            Ok(())
        })
        .expect("both pass");
    }
}

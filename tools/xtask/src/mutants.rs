//! `cargo xtask mutants`: whether the tests notice faults that are put into the code.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::iter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;
use polldisk::output;

use crate::lab::{target_folder, workspace};

/// What changes the code, and what runs the tests until one fails.
const TOOLS: [(&str, &str); 2] = [("mutants", "27.1.0"), ("nextest", "0.9.143")];

/// Least share of the viable mutants that the tests have to catch.
const CAUGHT_MIN_PERCENT: usize = 95;

/// Puts faults into the code, one at a time, and tells which of them no test notices.
///
/// Each of these mutants is built and tested, so a sample takes long. The status is 0 when 95 % of
/// those that build are caught. Everything about each is in target/mutants/mutants.out.
#[derive(Debug, Args)]
pub struct Arguments {
    /// About how many mutants to try, spread evenly over the files
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = sample)]
    sample: usize,

    /// Which sample of that size; no two of them have a mutant in common
    #[arg(long, value_name = "K", default_value_t = 0)]
    nth: usize,

    /// Try all mutants
    #[arg(long, conflicts_with_all = ["sample", "nth"])]
    all: bool,

    /// Files to put them in
    #[arg(long, value_name = "GLOB", default_values = FILES)]
    file: Vec<String>,

    /// Only list the mutants
    #[arg(long)]
    list: bool,

    /// More options of cargo-mutants, such as --in-place or --re
    #[arg(last = true)]
    options: Vec<OsString>,
}

const FILES: [&str; 6] = [
    "src/blkif/**",
    "src/control/**",
    "src/engine/**",
    "src/queue/**",
    "src/worker/**",
    "src/xen/**",
];

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<()> {
    for (tool, version) in TOOLS {
        install(tool, version)?;
    }
    let mut command = mutants(arguments)?;
    if !arguments.all {
        command.args(["--sharding=round-robin", "--shard", &shard(arguments)?]);
    }
    if arguments.list {
        ensure!(command.arg("--list").status()?.success(), "cargo-mutants failed");
        return Ok(());
    }
    let out = target_folder().join("mutants");
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let status = command.arg("--output").arg(&out).status()?;
    // 2 and 3: some are missed or timed out.
    ensure!(matches!(status.code(), Some(0 | 2 | 3)), "cargo-mutants failed");
    let score = Score::read(&out.join("mutants.out"))?;
    output::print(format_args!("{score}"))?;
    ensure!(score.is_met(), "the tests caught less than {CAUGHT_MIN_PERCENT} %");
    Ok(())
}

/// Installs a command of cargo, unless it is there in this version.
fn install(tool: &str, version: &str) -> Result<()> {
    let name = format!("cargo-{tool}");
    let output = cargo()?.args([tool, "--version"]).output().context("cannot run cargo")?;
    if output.stdout.starts_with(format!("{name} {version}").as_bytes()) {
        return Ok(());
    }
    let status = cargo()?
        .args(["install", "--quiet", "--locked", "--root"])
        .arg(tools())
        .arg(format!("{name}@{version}"))
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "cannot install {name}");
    Ok(())
}

/// Where commands are installed.
fn tools() -> PathBuf {
    target_folder().join("tools")
}

/// Cargo, with those commands.
fn cargo() -> Result<Command> {
    let path = env::var_os("PATH").unwrap_or_default();
    let path = iter::once(tools().join("bin")).chain(env::split_paths(&path));
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.env("PATH", env::join_paths(path)?).current_dir(workspace());
    Ok(cargo)
}

/// `cargo mutants` for the files that are asked for.
fn mutants(arguments: &Arguments) -> Result<Command> {
    let mut command = cargo()?;
    command.arg("mutants");
    command.args(arguments.file.iter().flat_map(|glob| ["--file", glob]));
    command.args(&arguments.options);
    Ok(command)
}

/// Which part of the mutants the sample is, as `k/n`.
fn shard(arguments: &Arguments) -> Result<String> {
    let list = mutants(arguments)?.arg("--list").output()?;
    ensure!(list.status.success(), "{}", String::from_utf8_lossy(&list.stderr));
    let number = list.stdout.iter().filter(|byte| **byte == b'\n').count();
    part(number, arguments.sample, arguments.nth)
}

fn part(number: usize, sample: usize, nth: usize) -> Result<String> {
    let samples = number.div_ceil(sample);
    ensure!(nth < samples, "there are {number} mutants: --nth has to be less than {samples}");
    Ok(format!("{nth}/{samples}"))
}

fn sample(text: &str) -> Result<usize> {
    let sample = text.parse()?;
    ensure!(sample > 0, "a sample has one mutant at least");
    Ok(sample)
}

/// What became of the mutants.
#[derive(Debug, Default)]
struct Score {
    caught: usize,
    missed: usize,
    timed_out: usize,
    unviable: usize,
}

impl Score {
    /// Counts what cargo-mutants left in its folder.
    fn read(folder: &Path) -> Result<Self> {
        let lines = |name: &str| {
            let path = folder.join(name);
            let text = fs::read_to_string(&path);
            let text = text.with_context(|| format!("cannot read {}", path.display()))?;
            anyhow::Ok(text.lines().count())
        };
        Ok(Self {
            caught: lines("caught.txt")?,
            missed: lines("missed.txt")?,
            timed_out: lines("timeout.txt")?,
            unviable: lines("unviable.txt")?,
        })
    }

    fn viable(&self) -> usize {
        self.caught + self.missed + self.timed_out
    }

    /// A loop without end is noticed, too.
    fn noticed_percent(&self) -> usize {
        100 * (self.caught + self.timed_out) / self.viable().max(1)
    }

    fn is_met(&self) -> bool {
        self.missed == 0 || self.noticed_percent() >= CAUGHT_MIN_PERCENT
    }
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { caught, missed, timed_out, unviable } = self;
        let percent = self.noticed_percent();
        write!(
            f,
            "{caught} caught, {missed} missed, {timed_out} timed out, {unviable} do not build: \
             {percent} % of {} are noticed",
            self.viable()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_about_as_large_as_asked_for_and_together_all() {
        assert_eq!(part(3062, 100, 0).unwrap(), "0/31");
        assert_eq!(part(3062, 100, 30).unwrap(), "30/31");
        assert!(part(3062, 100, 31).is_err());
        assert_eq!(part(5, 100, 0).unwrap(), "0/1");
    }

    #[test]
    fn a_score_counts_what_cargo_mutants_wrote() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("caught.txt", "a\nb\nc\n"),
            ("missed.txt", "d\n"),
            ("timeout.txt", "e\nf\n"),
            ("unviable.txt", ""),
        ] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let score = Score::read(folder.path()).unwrap();
        let told = "3 caught, 1 missed, 2 timed out, 0 do not build: 83 % of 6 are noticed";
        assert_eq!(score.to_string(), told);
        assert!(!score.is_met());
    }

    #[test]
    fn at_least_95_of_100_are_to_be_noticed() {
        let score = |caught, missed| Score { caught, missed, ..Score::default() };
        assert!(score(94, 5).noticed_percent() < 95 && !score(94, 5).is_met());
        assert!(score(90, 5).noticed_percent() < 95 && !score(90, 5).is_met());
        assert!(Score { timed_out: 5, ..score(90, 5) }.is_met());
        assert!(score(0, 0).is_met());
    }
}

//! `cargo xtask compare`: polldisk beside other backends.

use std::env;
use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

/// Measures polldisk beside QEMU and fio, and judges its targets.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub struct Arguments {
    /// See `cargo xtask compare --help`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Builds all programs in release mode, as they are deployed, and runs the comparison.
pub fn run(arguments: &Arguments) -> Result<()> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let packages = ["polldisk", "preload", "loadgen", "compare"];
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--release", "--bins", "--lib"])
        .args(packages.iter().flat_map(|package| ["--package", package]))
        .current_dir(crate::lab::workspace())
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "the comparison's programs do not build");
    let program = crate::lab::target_folder().join("release/compare");
    let status = Command::new(&program)
        .args(&arguments.arguments)
        .current_dir(crate::lab::workspace())
        .status()
        .with_context(|| format!("cannot run {}", program.display()))?;
    // The program has printed the error.
    if !status.success() {
        bail!("compare failed");
    }
    Ok(())
}

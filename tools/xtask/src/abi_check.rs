//! `cargo xtask abi-check`: polldisk's layouts and constants beside Xen's C headers.

use std::env;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;

/// Compares polldisk's layouts and constants with Xen's C headers.
///
/// Needs a C compiler and the headers of Debian's package libxen-dev.
#[derive(Debug, Args)]
pub struct Arguments {}

/// Runs the command, through cargo, so that xtask need not be rebuilt whenever polldisk changes.
pub fn run(_arguments: &Arguments) -> Result<()> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["run", "--quiet", "--package", "abi-check"])
        .current_dir(crate::lab::workspace())
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "abi-check failed");
    Ok(())
}

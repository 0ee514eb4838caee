//! `cargo xtask abi-check`: see the library's documentation.

use anyhow::{Result, bail, ensure};
use polldisk::output;

fn main() -> Result<()> {
    if let Some(what) = abi_check::missing() {
        bail!("abi-check needs {what}");
    }
    let report = abi_check::compare()?;
    output::print(&report)?;
    ensure!(report.differences.is_empty(), "polldisk and Xen's headers disagree");
    Ok(())
}

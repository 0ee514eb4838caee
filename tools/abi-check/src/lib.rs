//! Compares polldisk's definitions of Xen's interfaces with Xen's own C headers.
//!
//! polldisk's structures and constants are written by hand. Tests would not notice a mistake in them,
//! since the guest's side of the tests uses the same code. So the C compiler judges: a [`table::Table`]
//! pairs C expressions with polldisk's values, [`compile`] turns the C half into data, and [`compare`]
//! reports the differences.

pub mod compile;
pub mod host;
pub mod ring;
pub mod table;

use std::fmt;

use anyhow::Result;
use polldisk::blkif::Protocol;

/// The result of a comparison.
#[derive(Debug, Default)]
pub struct Report {
    /// How many values and examples were compared.
    pub checks: usize,
    /// Descriptions of those that were not equal.
    pub differences: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for difference in &self.differences {
            writeln!(f, "DIFFERENCE {difference}")?;
        }
        write!(f, "abi-check: {} checks, {} differences", self.checks, self.differences.len())
    }
}

/// Describes what this machine lacks for a comparison; `None` if it lacks nothing.
pub fn missing() -> Option<String> {
    if !cfg!(target_arch = "x86_64") {
        return Some("an x86_64 machine, since its C compiler knows both layouts of blkif".into());
    }
    compile::missing()
}

/// Compares everything.
pub fn compare() -> Result<Report> {
    let mut report = Report::default();
    for table in [host::table(), ring::table(Protocol::X86_64), ring::table(Protocol::X86_32)] {
        let data = compile::data(&table.source(), table.flags)?;
        report.checks += table.checks();
        report.differences.extend(table.differences(&data)?);
    }
    Ok(report)
}

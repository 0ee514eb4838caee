//! Compares what polldisk says about Xen's interfaces with Xen's own C headers.
//!
//! polldisk writes each structure and constant down by hand. A mistake there would be made alike
//! by the backend and by the tests that use the same code as the guest's side, so the C compiler
//! judges: a [`table::Table`] pairs C expressions with polldisk's values, [`compile`] turns the C
//! half into data, and [`compare`] reports what differs.

pub mod compile;
pub mod host;
pub mod ring;
pub mod table;

use std::fmt;

use anyhow::Result;
use polldisk::blkif::Protocol;

/// How a comparison ended.
#[derive(Debug, Default)]
pub struct Report {
    /// How many values and examples were compared.
    pub checks: usize,
    /// Those that were not equal, in words.
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

/// What a comparison lacks on this machine, in words; `None` where it can run.
pub fn missing() -> Option<String> {
    if !cfg!(target_arch = "x86_64") {
        return Some("an x86_64 machine, whose C compiler knows both layouts of blkif".into());
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

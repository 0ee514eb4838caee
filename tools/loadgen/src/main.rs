//! `blkload`: see `--help`.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, bail};
use clap::Parser;
use loadgen::options::Options;
use loadgen::report::Report;

fn main() -> ExitCode {
    match measure(Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blkload: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: Options) -> anyhow::Result<()> {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let available: Vec<usize> = cores.into_iter().map(|core| core.id).collect();
    let plan = options.check(&available)?;
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
    }
    let report = loadgen::run::run(&plan, &interrupted)?;
    print(&report, plan.options.json.as_deref())?;
    match report.first_error {
        None => Ok(()),
        Some(first) => bail!(
            "{} requests failed; the first was a {} of sector {}, answered with {}",
            report.errors,
            if first.is_read { "read" } else { "write" },
            first.sector,
            first.status
        ),
    }
}

fn print(report: &Report, json: Option<&Path>) -> anyhow::Result<()> {
    let text = || serde_json::to_string_pretty(report).map(|text| text + "\n");
    match json {
        Some(path) if path == Path::new("-") => show(&text()?)?,
        Some(path) => {
            show(&format!("{report}\n"))?;
            std::fs::write(path, text()?)
                .with_context(|| format!("--json: cannot write {}", path.display()))?;
        }
        None => show(&format!("{report}\n"))?,
    }
    Ok(())
}

/// On standard output, which may end before we do.
fn show(text: &str) -> anyhow::Result<()> {
    std::io::stdout().write_all(text.as_bytes()).context("cannot print")
}

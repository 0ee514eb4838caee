//! `blkload`: see `--help`.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, bail};
use clap::Parser;
use loadgen::options::Options;
use loadgen::report::Report;
use polldisk::output;

fn main() -> ExitCode {
    match measure(Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::say(format_args!("blkload: {error:#}"));
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
    let text = || serde_json::to_string_pretty(report);
    match json {
        Some(path) if path == Path::new("-") => output::print(text()?)?,
        Some(path) => {
            output::print(report)?;
            std::fs::write(path, text()? + "\n")
                .with_context(|| format!("--json: cannot write {}", path.display()))?;
        }
        None => output::print(report)?,
    }
    Ok(())
}

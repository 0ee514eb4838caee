//! `cargo xtask compare`: see `--help`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Parser;
use compare::contender::Kind;
use compare::machine::{self, Machine, Quietness, Ticks};
use compare::programs::{FIO, Program, QEMU};
use compare::report::{Report, ScenarioReport};
use compare::run::{Bench, Extent};
use compare::scenario::Scenario;
use compare::{plot, verdict, wakeup};
use polldisk::output;
use signal_hook::consts::{SIGINT, SIGTERM};

/// Measure polldisk beside QEMU and fio, and judge its targets
///
/// Contenders take turns under the same load on the same cores, on the stand-in for Xen. The exit
/// status is 0 if every target is met. perf/README.md describes the method.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask compare", bin_name = "cargo xtask compare")]
struct Arguments {
    /// The scenarios to run, from perf/scenarios [default: all]
    scenarios: Vec<String>,

    /// List the scenarios
    #[arg(long)]
    list: bool,

    /// Fewer and shorter rounds, and only the scenarios with targets
    #[arg(long)]
    quick: bool,

    /// Turns of each contender under each load; scenarios without targets have half of them [default:
    /// 8, or 3 with --quick]
    #[arg(long, value_name = "N")]
    rounds: Option<u32>,

    /// Seconds of each turn that count [default: 1.5, or 1 with --quick]
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,

    /// Make grant copy, notify and unmask as cheap as the stand-in can: without a system call
    #[arg(long)]
    no_system_calls: bool,

    /// Folder for the report [default: perf/results for a full run, otherwise target/compare]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

fn main() -> ExitCode {
    match compare(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            output::say(format_args!("compare: not every target is met"));
            ExitCode::FAILURE
        }
        Err(error) => {
            output::say(format_args!("compare: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Must run in the checkout's root. Returns `false` if a target is not met.
fn compare(arguments: &Arguments) -> Result<bool> {
    let scenarios = Scenario::read_all(Path::new("perf/scenarios"))?;
    if arguments.list {
        for Scenario { name, about, .. } in scenarios {
            output::print(format_args!("{name:<24} {about}"))?;
        }
        return Ok(true);
    }
    let chosen = choose(scenarios, arguments)?;
    let programs = std::env::current_exe()?.parent().context("no folder")?.to_owned();
    let scratch = programs.parent().unwrap_or(&programs).join("compare");
    let out = match (&arguments.out, arguments.quick || !arguments.scenarios.is_empty()) {
        (Some(out), _) => out.clone(),
        (None, true) => scratch.clone(),
        (None, false) => PathBuf::from("perf/results"),
    };
    std::fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let report = measure(&chosen, arguments, &programs, scratch)?;
    let plots = plot::draw_all(&report, &out)?;
    std::fs::write(out.join("report.md"), report.markdown(&plots))?;
    std::fs::write(out.join("results.json"), serde_json::to_string_pretty(&report)? + "\n")?;
    output::print(format_args!("\n{}", report.verdicts()))?;
    output::print(format_args!("the full report is {}", out.join("report.md").display()))?;
    Ok(report.all_met())
}

fn choose(scenarios: Vec<Scenario>, arguments: &Arguments) -> Result<Vec<Scenario>> {
    for name in &arguments.scenarios {
        if !scenarios.iter().any(|scenario| scenario.name == *name) {
            bail!("no scenario {name}: cargo xtask compare --list shows them");
        }
    }
    let is_chosen = |scenario: &Scenario| match arguments.scenarios.is_empty() {
        true => scenario.quick || !arguments.quick,
        false => arguments.scenarios.contains(&scenario.name),
    };
    Ok(scenarios.into_iter().filter(is_chosen).collect())
}

fn measure(
    scenarios: &[Scenario],
    arguments: &Arguments,
    programs: &Path,
    scratch: PathBuf,
) -> Result<Report> {
    let extent = Extent {
        rounds: arguments.rounds.unwrap_or(if arguments.quick { 3 } else { 8 }).max(1),
        seconds: arguments.seconds.unwrap_or(if arguments.quick { 1.0 } else { 1.5 }),
        warmup_s: if arguments.quick { 0.3 } else { 0.5 },
        system_calls: !arguments.no_system_calls,
    };
    let needs = |kind| {
        let mut contenders = scenarios.iter().flat_map(|scenario| &scenario.contenders);
        contenders.any(|contender| contender.kind() == kind)
    };
    let find = |kind, wanted| match needs(kind) {
        true => Program::find(wanted),
        false => bail!("not needed"),
    };
    let others = [find(Kind::Qemu, QEMU), find(Kind::Fio, FIO)];
    for error in others.iter().filter_map(|found| found.as_ref().err()) {
        if error.to_string() != "not needed" {
            output::say(format_args!("compare: {error:#}"));
        }
    }
    let machine = Machine::look(&others.iter().flatten().collect::<Vec<_>>());
    let wake_up_us = wakeup::measure(&machine.threads());
    let (others_percent, start) = (machine::others_percent(), Ticks::now());
    let mut bench = Bench::new(programs, others, &machine, extent, scratch);
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&bench.interrupted))?;
    }
    let mut reports = Vec::new();
    for scenario in scenarios {
        let outcome = bench.run(scenario)?;
        reports.push(ScenarioReport { goals: verdict::judge(&outcome), outcome });
    }
    let stolen_percent = start.stolen_percent_until(Ticks::now());
    Ok(Report {
        quietness: Quietness { others_percent, stolen_percent },
        extent,
        places: std::mem::take(&mut bench.places),
        machine: machine.clone(),
        wake_up_us,
        scenarios: reports,
    })
}

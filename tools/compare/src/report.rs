//! The report of a whole run: JSON with everything, and Markdown for people.

use std::fmt::Write;

use figures::{Interval, Table, Verdict, figure, or_dash};
use serde::Serialize;

use crate::contender::Contender;
use crate::machine::{Machine, Quietness};
use crate::run::{CaseOutcome, Extent, LeftOut, Outcome};
use crate::sample::Metric;
use crate::storage::Place;
use crate::verdict::Judged;

/// Everything that is known about a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The machine it ran on.
    pub machine: Machine,
    /// How quiet the machine was.
    pub quietness: Quietness,
    /// How much was measured.
    pub extent: Extent,
    /// Where the disks' files were.
    pub places: Vec<Place>,
    /// Microseconds that it takes to wake a thread on another core.
    pub wake_up_us: Option<Interval>,
    /// The results by scenario.
    pub scenarios: Vec<ScenarioReport>,
}

/// A scenario, measured and judged.
#[derive(Clone, Debug, Serialize)]
pub struct ScenarioReport {
    /// The goals, judged.
    pub goals: Vec<Judged>,
    /// The turns.
    pub outcome: Outcome,
}

/// A plot that was drawn.
#[derive(Clone, Debug)]
pub struct Plot {
    /// The file's name, in the report's folder.
    pub file: String,
    /// What it shows.
    pub title: String,
}

/// Above this use of the cores by other programs, the report warns that the machine was not quiet.
const BUSY_OTHERS_PERCENT: f64 = 5.0;

/// Above this stolen time it warns, too.
const BUSY_STOLEN_PERCENT: f64 = 1.0;

impl Report {
    /// Whether every goal that this machine can measure is met.
    pub fn all_met(&self) -> bool {
        let mut goals = self.scenarios.iter().flat_map(|s| &s.goals);
        goals.all(|judged| matches!(judged.verdict, Verdict::Met | Verdict::NotPossible))
    }

    /// The table of goals and verdicts.
    pub fn verdicts(&self) -> Table {
        let mut table = Table::new([
            "scenario",
            "figure",
            "target",
            "measured",
            "polldisk",
            "compared with",
            "verdict",
        ]);
        for ScenarioReport { goals, outcome } in &self.scenarios {
            for judged in goals {
                table.row(verdict_cells(outcome, judged));
            }
        }
        table
    }

    /// The whole report, which links to the plots.
    pub fn markdown(&self, plots: &[Plot]) -> String {
        let mut text = format!("# polldisk beside other backends\n\n{}\n", self.circumstances());
        let _ = write!(
            text,
            "\n## Targets\n\nMedian of the rounds' figures, and in brackets the range that holds the true \
             median with a confidence of\n90 % (see perf/README.md). A figure \"times\" or \"of\" \
             another is the ratio within a round, or of\nneighbouring slices.\n\n{}",
            self.verdicts()
        );
        if !plots.is_empty() {
            text.push_str("\n## Plots\n");
        }
        for Plot { file, title } in plots {
            let _ = write!(text, "\n![{title}]({file})\n");
        }
        text.push_str("\n## Figures\n");
        for ScenarioReport { outcome, .. } in &self.scenarios {
            let scenario = &outcome.scenario;
            let _ = write!(text, "\n### {}\n\n{}", scenario.name, scenario.about);
            if let Some(length) = scenario.slice() {
                let count = self.extent.slices(length);
                let _ = write!(
                    text,
                    " The verdict is from slices of {length:?}, {count} in each round; the table is \
                     from turns."
                );
            }
            text.push('\n');
            outcome.cases.iter().for_each(|case| text.push_str(&case_table(case)));
            text.push_str(&left_out(&outcome.left_out));
        }
        text
    }

    fn circumstances(&self) -> String {
        let Report { machine, quietness, extent, places, .. } = self;
        let programs: Vec<&str> =
            [&machine.commit].into_iter().chain(&machine.versions).map(String::as_str).collect();
        let mut text = format!(
            "- Machine: {}{}, {} cores{}, {} MiB of memory, Linux {}.\n- polldisk {}.\n",
            machine.cpu,
            if machine.is_virtual { " (virtual)" } else { "" },
            machine.cores.len(),
            machine.with_threads(),
            machine.memory_mib,
            machine.kernel,
            programs.join("; ")
        );
        for place in places {
            let name = format!("{:?}", place.backing).to_lowercase();
            let _ = writeln!(text, "- The file of {name} backing lies on {}.", place.filesystem);
        }
        let _ = writeln!(
            text,
            "- {} rounds, {} in scenarios without a target; each contender's turn counts for {} s after \
             {} s of warm-up.",
            extent.rounds,
            extent.rounds.div_ceil(2),
            extent.seconds,
            extent.warmup_s
        );
        if let Some(wake_up_us) = &self.wake_up_us {
            let _ = writeln!(
                text,
                "- Waking a thread that sleeps on another core takes {} us of CPU time. A backend spends \
                 this on each batch of requests from a guest that sleeps.",
                figure(wake_up_us.median)
            );
        }
        let tolls = match extent.system_calls {
            true => "cost a system call each, and no hypercall",
            false => "cost no system call and no hypercall",
        };
        let _ = writeln!(
            text,
            "- All backends run on the stand-in for Xen, where grant copy, notify and unmask {tolls}."
        );
        let _ = writeln!(
            text,
            "- Other programs used {:.1} % of the cores' time before the start; during the run the host took \
             {:.2} % of it.",
            quietness.others_percent, quietness.stolen_percent
        );
        if quietness.others_percent > BUSY_OTHERS_PERCENT
            || quietness.stolen_percent > BUSY_STOLEN_PERCENT
        {
            text.push_str("- **The machine was not quiet: these figures are rough.**\n");
        }
        text
    }
}

fn verdict_cells(outcome: &Outcome, judged: &Judged) -> [String; 7] {
    let goal = &judged.goal;
    let compared = match &judged.reference {
        Some((contender, theirs)) => format!("{contender}: {}", theirs.show(figure)),
        None => goal.reference().unwrap_or_default().to_owned(),
    };
    let of = match goal.of == Contender::default() {
        true => String::new(),
        false => format!("{}: ", goal.of),
    };
    let mut verdict = judged.verdict.to_string();
    if judged.verdict == Verdict::NotPossible {
        verdict += &format!(": {}", outcome.impossible().unwrap_or_default());
    }
    if outcome.cases.first().is_some_and(|case| case.shares_cores) {
        verdict.push_str(", but load and backend shared cores");
    }
    [
        outcome.scenario.name.clone(),
        goal.metric.title().to_owned(),
        goal.describe(),
        with_range(judged.figure),
        format!("{of}{}", with_range(judged.own)),
        compared,
        verdict,
    ]
}

fn case_table(case: &CaseOutcome) -> String {
    const COLUMNS: [Metric; 11] = [
        Metric::Iops,
        Metric::MbPerS,
        Metric::MeanUs,
        Metric::P50Us,
        Metric::P99Us,
        Metric::P999Us,
        Metric::CpuUsPerIo,
        Metric::CpuPercent,
        Metric::OwnKibPerDisk,
        Metric::ConnectS,
        Metric::NeighbourIops,
    ];
    let load = &case.case.load;
    let samples = || case.entries.iter().flat_map(|entry| &entry.samples);
    let is_known = |metric| samples().any(|sample| sample.figures.contains_key(&metric));
    let columns: Vec<Metric> = COLUMNS
        .into_iter()
        .filter(|metric| is_shown(*metric, load.idle))
        .filter(|metric| *metric != Metric::NeighbourIops || is_known(*metric))
        .collect();
    let mut table = Table::new([""].into_iter().chain(columns.iter().map(|metric| metric.title())));
    for entry in &case.entries {
        let cells = match &entry.failed {
            Some(why) => {
                let why = why.lines().last().unwrap_or_default().replace('|', "/");
                vec![format!("left out: {why}")]
            }
            None => {
                let cell = |metric: &Metric| with_range(Interval::of(&entry.figures(*metric)));
                columns.iter().map(cell).collect()
            }
        };
        table.row([entry.contender.to_string()].into_iter().chain(cells));
    }
    let heading = case.case.at.map(|at| format!("\nAt {at}:\n")).unwrap_or_default();
    let mut text = format!("{heading}\n{table}");
    if case.shares_cores {
        text.push_str(
            "\nLoad and backend shared cores: there are enough threads, but not enough cores.\n",
        );
    }
    text
}

fn left_out(loads: &[LeftOut]) -> String {
    let load = |LeftOut { at, why }: &LeftOut| match at {
        Some(at) => format!("at {at} ({why})"),
        None => why.clone(),
    };
    match loads.iter().map(load).collect::<Vec<_>>() {
        loads if loads.is_empty() => String::new(),
        loads => format!("\nNot possible here: {}.\n", loads.join(", ")),
    }
}

/// Whether a table shows this figure: an idle load has other figures than one with requests.
fn is_shown(metric: Metric, idle: bool) -> bool {
    match metric {
        Metric::CpuPercent => true,
        Metric::OwnKibPerDisk | Metric::ConnectS => idle,
        _ => !idle,
    }
}

fn with_range(interval: Option<Interval>) -> String {
    or_dash(interval, |interval| interval.show(figure))
}

#[cfg(test)]
mod test {
    use std::collections::BTreeMap;

    use super::*;
    use crate::run::Entry;
    use crate::sample::Sample;
    use crate::scenario::Scenario;
    use crate::verdict;

    const SCENARIO: &str = r#"
        about = "Reads of nothing."
        backing = "null"
        contenders = ["polldisk", "qemu:iothread", "qemu:iothread,native"]
        goals = [
            { metric = "iops", over = "qemu", at_least = 8 },
            { metric = "mean_us", at_most = 1.5 },
        ]
        load = {}
    "#;

    fn report(iops: f64) -> Report {
        let scenario = Scenario::parse("null-read", SCENARIO).unwrap();
        let sample = |iops| Sample {
            figures: BTreeMap::from([(Metric::Iops, iops), (Metric::MeanUs, 1.25)]),
            latency_cdf: Vec::new(),
        };
        let entries = [(iops, None), (100_000.0, None), (0.0, Some("no\nnative|AIO".to_owned()))]
            .into_iter()
            .zip(&scenario.contenders)
            .map(|((iops, failed), contender)| Entry {
                samples: if failed.is_some() { Vec::new() } else { vec![sample(iops); 3] },
                failed,
                ..Entry::new(contender.clone())
            })
            .collect();
        let case = CaseOutcome { case: scenario.cases().remove(0), shares_cores: false, entries };
        let outcome =
            Outcome { scenario, cases: vec![case], left_out: Vec::new(), stolen_percent: 0.0 };
        Report {
            machine: Machine::look(&[]),
            quietness: Quietness { others_percent: 0.0, stolen_percent: 5.0 },
            extent: Extent { rounds: 3, seconds: 1.0, warmup_s: 0.5, system_calls: true },
            places: Vec::new(),
            wake_up_us: Interval::of(&[12.34]),
            scenarios: vec![ScenarioReport { goals: verdict::judge(&outcome), outcome }],
        }
    }

    #[test]
    fn a_row_says_target_figure_and_verdict() {
        let text = report(1e6).verdicts().to_string();
        let rows: Vec<&str> = text.lines().skip(2).collect();
        assert_eq!(
            rows,
            [
                "| null-read | IOPS | at least 8 times qemu | 10.0 (10.0 to 10.0) | 1.00M (1.00M to \
                 1.00M) | qemu:iothread: 100.0k (100.0k to 100.0k) | met |",
                "| null-read | mean latency, us | at most 1.5 | 1.25 (1.25 to 1.25) | 1.25 (1.25 to \
                 1.25) |  | met |",
            ]
        );
    }

    #[test]
    fn one_goal_that_is_not_met_fails_the_run() {
        assert!(report(1e6).all_met());
        assert!(!report(7e5).all_met());
        let mut nothing = report(1e6);
        nothing.scenarios[0].outcome.cases.clear();
        nothing.scenarios[0].goals = verdict::judge(&nothing.scenarios[0].outcome);
        assert!(!nothing.all_met(), "a goal that was not measured is not met");
        nothing.scenarios[0].outcome.left_out.push(too_few_cores(None));
        nothing.scenarios[0].goals = verdict::judge(&nothing.scenarios[0].outcome);
        assert!(nothing.all_met(), "a goal that this machine can't measure is no failure");
        let text = nothing.verdicts().to_string();
        assert!(text.ends_with("| not possible here: needs 4 cores, there are 2 |\n"), "{text}");
        let text = nothing.markdown(&[]);
        assert!(text.ends_with("nothing.\n\nNot possible here: needs 4 cores, there are 2.\n"));
    }

    fn too_few_cores(at: Option<u32>) -> LeftOut {
        LeftOut { at, why: "needs 4 cores, there are 2".to_owned() }
    }

    #[test]
    fn the_report_says_which_loads_had_too_few_cores() {
        let mut report = report(1e6);
        report.machine.cores = vec![vec![0, 2], vec![1, 3]];
        report.scenarios[0].outcome.cases[0].shares_cores = true;
        report.scenarios[0].outcome.left_out = [4, 8].map(|at| too_few_cores(Some(at))).into();
        let text = report.markdown(&[]);
        for part in [
            " 2 cores with 4 threads, ",
            "| met, but load and backend shared cores |",
            " |\n\nLoad and backend shared cores: there are enough threads, but not enough cores.\n",
            "\n\nNot possible here: at 4 (needs 4 cores, there are 2), at 8 (needs 4 cores, there are 2).\n",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn the_report_says_under_what_circumstances() {
        let text = report(1e6).markdown(&[Plot { file: "x.svg".into(), title: "X".into() }]);
        for part in [
            "cost a system call each",
            "another core takes 12.3 us of CPU",
            "3 rounds, 2 in scenarios without a target",
            "was not quiet",
            "![X](x.svg)",
            "| left out: native/AIO |",
            "Reads of nothing.",
        ] {
            let part = part.trim_start_matches("| ");
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn neighbours_are_named_in_verdicts_and_have_a_column() {
        let text = "about = 'x'\nbacking = 'null'\nload = {}\n\
                    contenders = ['polldisk:beside=polite', 'polldisk:beside=copies']\n\
                    goals = [{ metric = 'iops', of = 'polldisk:beside=copies', \
                    over = 'polldisk:beside=polite', at_least = 0.8 }]";
        let scenario = Scenario::parse("hostile", text).unwrap();
        let mut report = report(1e6);
        let outcome = &mut report.scenarios[0].outcome;
        assert!(!case_table(&outcome.cases[0]).contains("neighbours"));
        outcome.cases[0].entries.truncate(2);
        for (entry, contender) in outcome.cases[0].entries.iter_mut().zip(&scenario.contenders) {
            entry.contender = contender.clone();
            for sample in &mut entry.samples {
                sample.figures.insert(Metric::NeighbourIops, 77.0);
            }
        }
        outcome.scenario = scenario;
        let row = verdict_cells(outcome, &verdict::judge(outcome)[0]).join(" | ");
        assert_eq!(
            row,
            "hostile | IOPS | at least 80 % of polldisk:beside=polite | 0.100 (0.100 to 0.100) | \
             polldisk:beside=copies: 100.0k (100.0k to 100.0k) | polldisk:beside=polite: 1.00M \
             (1.00M to 1.00M) | **missed**"
        );
        let table = case_table(&outcome.cases[0]);
        assert!(table.contains(" neighbours' IOPS |\n"), "{table}");
        assert_eq!(table.matches("| 77.0 (77.0 to 77.0) |\n").count(), 2, "{table}");
    }
}

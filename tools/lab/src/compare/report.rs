//! The comparison's figures and judged targets, as Markdown and JSON.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use figures::{Interval, Table, Verdict, figure, or_dash, within_rounds};
use serde::Serialize;

use super::fio::JOBS;

/// Everything that is known about a comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// What it ran on and how.
    pub setting: Setting,
    /// Each job on each backend, in the order of the jobs.
    pub cases: Vec<Case>,
    /// The targets, judged.
    pub judged: Vec<Judged>,
}

/// What a comparison ran on and how.
#[derive(Clone, Debug, Serialize)]
pub struct Setting {
    /// Which polldisk was measured.
    pub polldisk: String,
    /// Extra options of `polldisk serve`.
    pub serve: String,
    /// The emulator's version.
    pub emulator: String,
    /// What dom0 runs.
    pub dom0: Dom0,
    /// What the guest runs.
    pub guest: InGuest,
    /// Turns of each backend under each job.
    pub rounds: u32,
    /// Warm-up of each turn, in milliseconds of the machine's time.
    pub warmup_ms: u32,
    /// Measured time of each turn, in milliseconds of the machine's time.
    pub turn_ms: u32,
}

/// Versions and processors of dom0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dom0 {
    /// The hypervisor's version.
    pub xen: String,
    /// The release of its Linux, which contains blkback.
    pub kernel: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// The first line of the version of QEMU, which is qdisk.
    pub qemu: String,
}

/// Versions and processors of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InGuest {
    /// The release of its Linux, which contains the frontend.
    pub kernel: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// fio's version.
    pub fio: String,
}

/// One job on one backend.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    /// The job.
    pub job: String,
    /// The backend's name.
    pub backend: &'static str,
    /// Instructions of the whole machine per request, by round.
    pub instructions: Vec<f64>,
}

/// A bound for polldisk's instructions under the first job.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Target {
    /// The backend by whose instructions polldisk's are divided.
    pub backend: &'static str,
    /// The quotient must be below this.
    pub below: f64,
}

/// The targets: fewer instructions than the kernel's backend, and below six tenths of QEMU's.
pub const TARGETS: [Target; 2] =
    [Target { backend: "blkback", below: 1.0 }, Target { backend: "qdisk", below: 0.6 }];

/// A target, judged.
#[derive(Clone, Debug, Serialize)]
pub struct Judged {
    /// The target.
    pub target: Target,
    /// polldisk's instructions divided by the other's, within each round.
    pub ratio: Option<Interval>,
    /// Whether the target is met.
    pub verdict: Verdict,
}

impl Case {
    /// A case without rounds.
    pub(super) fn new(job: String, backend: &'static str) -> Self {
        Self { job, backend, instructions: Vec::new() }
    }

    pub(super) fn is(&self, job: &str, backend: &str) -> bool {
        self.job == job && self.backend == backend
    }
}

impl Dom0 {
    /// Parses dom0's four lines.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines().map(|line| line.trim().to_owned());
        Some(Self {
            xen: lines.next()?,
            kernel: lines.next()?,
            vcpus: lines.next()?.parse().ok()?,
            qemu: lines.next()?,
        })
    }
}

impl InGuest {
    /// Parses the guest's three lines.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines().map(|line| line.trim().to_owned());
        Some(Self { kernel: lines.next()?, vcpus: lines.next()?.parse().ok()?, fio: lines.next()? })
    }
}

impl Comparison {
    /// Judges the cases.
    pub fn new(setting: Setting, cases: Vec<Case>) -> Self {
        let judged = TARGETS.map(|target| judge(target, &cases)).to_vec();
        Self { setting, cases, judged }
    }

    /// Whether every target is met.
    pub fn is_met(&self) -> bool {
        self.judged.iter().all(|judged| judged.verdict == Verdict::Met)
    }

    /// Writes `report.md` and `results.json`.
    pub fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let json = serde_json::to_string_pretty(self)? + "\n";
        for (name, text) in [("report.md", self.markdown()), ("results.json", json)] {
            let file = folder.join(name);
            fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(())
    }

    /// The targets as a table.
    pub fn verdicts(&self) -> Table {
        let mut table = Table::new(["target", "measured", "verdict"]);
        for Judged { target: Target { backend, below }, ratio, verdict } in &self.judged {
            table.row([
                format!("below {below} of {backend}'s instructions"),
                or_dash(*ratio, |ratio| ratio.show(quotient)),
                verdict.to_string(),
            ]);
        }
        table
    }

    /// All cases as a table.
    pub fn table(&self) -> Table {
        let mut table = Table::new([
            "job",
            "backend",
            "instructions for each request",
            "of qdisk's",
            "of blkback's",
        ]);
        for case in &self.cases {
            let of = |backend| {
                let ratio = ratio(&self.cases, &case.job, case.backend, backend);
                or_dash(ratio, |ratio| quotient(ratio.median))
            };
            table.row([
                case.job.clone(),
                case.backend.to_owned(),
                or_dash(Interval::of_all(&case.instructions), |range| range.show(figure)),
                of("qdisk"),
                of("blkback"),
            ]);
        }
        table
    }

    /// The whole report, for readers who know nothing about the run.
    pub fn markdown(&self) -> String {
        format!(
            "# polldisk beside qdisk and blkback under real Xen: instructions for each request\n\n\
             {}\n## Targets\n\n{}, polldisk's instructions divided by the other's, within each \
             round.\n\n{}\n## Figures\n\n{}",
            self.circumstances(),
            JOBS[0].name(),
            self.verdicts(),
            self.table()
        )
    }

    fn circumstances(&self) -> String {
        let Setting { polldisk, serve, emulator, dom0, guest, rounds, warmup_ms, turn_ms } =
            &self.setting;
        let options = match serve.trim() {
            "" => "with its default options".to_owned(),
            serve => format!("with `{serve}`"),
        };
        format!(
            "What a guest's 4 KiB request costs on each backend: the instructions that the whole machine \
             executes\nfor it, which is the guest with its load, dom0 and Xen. The emulator counts them, \
             and its time is that\ncount, so no figure depends on the host. The figures are not seconds: \
             on hardware, waiting for memory,\nhypercalls and interrupts cost more than their \
             instructions.\n\n\
             - Xen {}, dom0 with {} vCPUs and Linux {}, one PV guest with {} vCPU and Linux {}.\n\
             - Emulator: {emulator}, one thread, `-icount shift=0,sleep=off`, two processors.\n\
             - polldisk {polldisk} {options}; qdisk is {}, started by libxl; blkback is dom0's.\n\
             - All backends serve the guest in one boot, each with a disk on its own null_blk device \
             (`queue_mode=2 irqmode=0`),\n  which answers at once and stores nothing.\n\
             - The load is {} in the guest: libaio, direct. There are {rounds} rounds. In each, every \
             backend has a turn under every\n  job: {turn_ms} ms of the machine's time after {warmup_ms} \
             ms of warm-up.\n\
             - A figure is the median of the rounds, with the least and the greatest in brackets. Ratios \
             are taken within a round.\n\
             - qdisk uses dom0's page cache, as libxl sets it up by default. Debian's version does not \
             know `direct-io-safe`.\n",
            dom0.xen, dom0.vcpus, dom0.kernel, guest.vcpus, guest.kernel, dom0.qemu, guest.fio
        )
    }
}

fn judge(target: Target, cases: &[Case]) -> Judged {
    let ratio = ratio(cases, &JOBS[0].name(), "polldisk", target.backend);
    Judged { target, ratio, verdict: Verdict::of(ratio, |ratio| ratio < target.below) }
}

/// One backend's instructions divided by another's, within each round.
fn ratio(cases: &[Case], job: &str, of: &str, to: &str) -> Option<Interval> {
    let rounds = |backend| {
        let case = cases.iter().find(|case| case.is(job, backend))?;
        Some(&case.instructions)
    };
    Interval::of_all(&within_rounds(rounds(of)?, rounds(to)?, |of, to| of / to))
}

fn quotient(value: f64) -> String {
    format!("{value:.2}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(backend: &'static str, instructions: &[f64]) -> Case {
        Case { instructions: instructions.to_vec(), ..Case::new(JOBS[0].name(), backend) }
    }

    fn comparison(polldisk: &[f64]) -> Comparison {
        let setting = Setting {
            polldisk: "0.1.0".into(),
            serve: String::new(),
            emulator: "QEMU emulator version 7.2".into(),
            dom0: Dom0::parse("4.17.5\n6.1.0\n2\nQEMU 7.2\n").expect("four lines"),
            guest: InGuest::parse("6.1.1\n1\nfio-3.33").expect("three lines"),
            rounds: 3,
            warmup_ms: 50,
            turn_ms: 250,
        };
        let cases = vec![
            case("polldisk", polldisk),
            case("qdisk", &[90e3; 3]),
            case("blkback", &[60e3; 3]),
        ];
        Comparison::new(setting, cases)
    }

    fn verdicts(polldisk: &[f64]) -> Vec<Verdict> {
        comparison(polldisk).judged.iter().map(|judged| judged.verdict).collect()
    }

    #[test]
    fn a_target_is_met_when_every_round_meets_it() {
        assert_eq!(verdicts(&[53e3, 50e3, 51e3]), [Verdict::Met, Verdict::Met]);
        assert_eq!(verdicts(&[55e3, 56e3, 58e3]), [Verdict::Met, Verdict::Missed]);
        assert_eq!(verdicts(&[60e3, 61e3, 62e3]), [Verdict::Missed, Verdict::Missed]);
        assert_eq!(verdicts(&[59e3, 50e3, 61e3]), [Verdict::Noisy, Verdict::Noisy]);
        assert_eq!(verdicts(&[]), [Verdict::NotMeasured, Verdict::NotMeasured]);
        assert!(comparison(&[50e3; 3]).is_met());
        assert!(!comparison(&[55e3; 3]).is_met());
        assert!(!comparison(&[]).is_met(), "a target that was not measured is not met");
    }

    #[test]
    fn a_bound_itself_is_not_below_it() {
        assert_eq!(verdicts(&[54e3; 3])[1], Verdict::Missed);
    }

    #[test]
    fn ratios_are_taken_within_rounds() {
        let mut cases = comparison(&[50e3, 500e3, 5e3]).cases;
        cases[2].instructions = vec![100e3, 1000e3, 10e3];
        let judged = judge(TARGETS[0], &cases);
        assert_eq!(judged.ratio, Some(Interval { median: 0.5, low: 0.5, high: 0.5 }));
    }

    #[test]
    fn the_report_explains_itself() {
        let text = comparison(&[45e3, 44e3, 46e3]).markdown();
        for part in [
            "Xen 4.17.5, dom0 with 2 vCPUs and Linux 6.1.0,",
            "QEMU emulator version 7.2, one thread, `-icount shift=0,sleep=off`",
            "polldisk 0.1.0 with its default options",
            "There are 3 rounds",
            "4 KiB random read, 32 in flight, polldisk's",
            "| below 0.6 of qdisk's instructions | 0.50 (0.49 to 0.51) | met |",
            "| 4 KiB random read, 32 in flight | polldisk | 45.0k (44.0k to 46.0k) | 0.50 | 0.75 |",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn versions_need_all_their_lines() {
        assert_eq!(Dom0::parse("4.17.5\n6.1.0\ntwo\nQEMU"), None);
        assert_eq!(InGuest::parse("6.1.0\n1"), None);
    }
}

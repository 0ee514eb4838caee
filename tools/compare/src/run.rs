//! Rounds. In each, every contender has one turn under the same load, and also its slices if goals are
//! judged by slices.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry::{Occupied, Vacant};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use figures::Interval;
use polldisk::output;
use serde::Serialize;
use serde_json::Value;

use crate::contender::{self, Contender, Contents, Kind};
use crate::load::Load;
use crate::machine::{self, Machine, Ticks};
use crate::programs::Program;
use crate::sample::{Metric, Sample};
use crate::scenario::{Backing, Case, Scenario};
use crate::slices::Slices;
use crate::storage::{self, Image, Place};

/// Least seconds that count of an idle load: telling a low cost from none takes some time.
const IDLE_S: f64 = 3.0;

/// Seconds of warm-up after which connected disks are idle.
const IDLE_WARMUP_S: f64 = 2.0;

/// How long a contender's slices in a round last together, in turns.
const SLICED_TURNS: f64 = 4.0;

/// Longer than all slices take.
const ENDLESS_S: f64 = 1e5;

/// How often fio is started to measure what its start costs.
const FIO_STARTS: usize = 5;

/// How much is measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Extent {
    /// Turns of each contender under each load.
    pub rounds: u32,
    /// Seconds of a turn that count.
    pub seconds: f64,
    /// Seconds of warm-up in each turn.
    pub warmup_s: f64,
    /// Whether grant copy, notify and unmask cost a system call on the stand-in, as on Xen.
    pub system_calls: bool,
}

impl Extent {
    /// Rounds of one scenario: half as many if it has no goals.
    pub fn rounds_of(self, scenario: &Scenario) -> u32 {
        if scenario.goals.is_empty() { self.rounds.div_ceil(2) } else { self.rounds }
    }

    /// Slices of each contender in a round.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small number")]
    pub fn slices(self, length: Duration) -> usize {
        (SLICED_TURNS * self.seconds / length.as_secs_f64()).ceil() as usize
    }
}

/// Everything that turns need.
#[derive(Debug)]
pub struct Bench<'a> {
    /// Folder in which polldisk, blkload and the stand-in are built.
    pub programs: &'a Path,
    /// QEMU, or why it is missing.
    pub qemu: Result<Program>,
    /// fio, or why it is missing.
    pub fio: Result<Program>,
    /// The machine whose cores are used.
    pub machine: &'a Machine,
    /// How much is measured.
    pub extent: Extent,
    /// Folder for the file of [`Backing::Ext4`] and for other files.
    pub scratch: PathBuf,
    /// Set to end the run early.
    pub interrupted: Arc<AtomicBool>,
    /// What [`Bench::fio_start_us`] has measured.
    fio_start_us: OnceCell<f64>,
    images: BTreeMap<Backing, Image>,
    /// Where the disks' files were made.
    pub places: Vec<Place>,
}

/// What a scenario's turns have shown.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The scenario.
    pub scenario: Scenario,
    /// The turns by load.
    pub cases: Vec<CaseOutcome>,
    /// Loads for which this machine has too few cores.
    pub left_out: Vec<LeftOut>,
    /// Percent of the time that the host took from this virtual machine.
    pub stolen_percent: f64,
}

/// A load that was not run.
#[derive(Clone, Debug, Serialize)]
pub struct LeftOut {
    /// The varying value.
    pub at: Option<u32>,
    /// What is missing.
    pub why: String,
}

/// Turns under one load.
#[derive(Clone, Debug, Serialize)]
pub struct CaseOutcome {
    /// The load.
    pub case: Case,
    /// Whether threads of the load and of backends had to share cores.
    pub shares_cores: bool,
    /// The turns by contender, in the scenario's order.
    pub entries: Vec<Entry>,
}

/// A contender's turns.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// The contender.
    pub contender: Contender,
    /// One for each round.
    pub samples: Vec<Sample>,
    /// IOPS of all rounds' slices. Not in the JSON, since there are thousands.
    #[serde(skip)]
    pub slices: Vec<f64>,
    /// Why its turns ended early, if they did.
    pub failed: Option<String>,
}

impl Entry {
    /// A contender without turns.
    pub fn new(contender: Contender) -> Entry {
        Entry { contender, samples: Vec::new(), slices: Vec::new(), failed: None }
    }

    /// The figures that goals are judged by: those of the slices if there are any, otherwise one for each
    /// round.
    pub fn judged_figures(&self, metric: Metric) -> Vec<f64> {
        match metric {
            Metric::Iops if !self.slices.is_empty() => self.slices.clone(),
            _ => self.figures(metric),
        }
    }

    /// One figure for each round.
    pub fn figures(&self, metric: Metric) -> Vec<f64> {
        self.samples.iter().filter_map(|sample| sample.figures.get(&metric).copied()).collect()
    }
}

impl Outcome {
    /// Why this machine could not measure any of the scenario's loads; `None` if it could.
    pub fn impossible(&self) -> Option<&str> {
        let first = self.left_out.first().filter(|_| self.cases.is_empty());
        first.map(|left_out| left_out.why.as_str())
    }
}

impl<'a> Bench<'a> {
    /// A bench that has made no files yet.
    pub fn new(
        programs: &'a Path,
        [qemu, fio]: [Result<Program>; 2],
        machine: &'a Machine,
        extent: Extent,
        scratch: PathBuf,
    ) -> Bench<'a> {
        Bench {
            programs,
            qemu,
            fio,
            machine,
            extent,
            scratch,
            interrupted: Arc::default(),
            fio_start_us: OnceCell::new(),
            images: BTreeMap::new(),
            places: Vec::new(),
        }
    }

    /// All rounds of a scenario.
    pub fn run(&mut self, scenario: &Scenario) -> Result<Outcome> {
        let mut outcome = Outcome {
            scenario: scenario.clone(),
            cases: Vec::new(),
            left_out: Vec::new(),
            stolen_percent: 0.0,
        };
        let mut cases = Vec::new();
        for case in scenario.cases() {
            match self.machine.split(case.load.cores(), case.backend_cores()) {
                Ok(_) => cases.push(case),
                Err(error) => {
                    let why = error.to_string();
                    outcome.left_out.push(LeftOut { at: case.at, why });
                }
            }
        }
        if cases.is_empty() {
            return Ok(outcome);
        }
        let contents = self.contents(scenario.backing)?;
        let before = Ticks::now();
        outcome.cases = cases
            .into_iter()
            .map(|case| self.rounds(scenario, case, &contents))
            .collect::<Result<_>>()?;
        outcome.stolen_percent = before.stolen_percent_until(Ticks::now());
        Ok(outcome)
    }

    fn rounds(&self, scenario: &Scenario, case: Case, contents: &Contents) -> Result<CaseOutcome> {
        let mut entries: Vec<Entry> = case.contenders.iter().cloned().map(Entry::new).collect();
        let at = case.at.map(|at| format!(" at {at}")).unwrap_or_default();
        for round in 1..=self.extent.rounds_of(scenario) {
            let round = format!("{}{at}, round {round}", scenario.name);
            for entry in entries.iter_mut().filter(|entry| entry.failed.is_none()) {
                let turn = self.turn(scenario, &case.load, &entry.contender, contents);
                self.check_interrupted()?;
                match turn {
                    Ok(sample) => {
                        output::say(format_args!(
                            "{round}: {}: {}",
                            entry.contender,
                            summary(&sample)
                        ));
                        entry.samples.push(sample);
                    }
                    Err(error) => leave_out(entry, &round, &error, contents),
                }
            }
            if let Some(length) = scenario.slice() {
                let mut judged: Vec<&mut Entry> = entries
                    .iter_mut()
                    .filter(|entry| entry.failed.is_none() && scenario.is_judged(&entry.contender))
                    .collect();
                let slices = self.slices(scenario, &case.load, length, &mut judged, contents);
                self.check_interrupted()?;
                if let Err(error) = slices {
                    judged.iter_mut().for_each(|entry| leave_out(entry, &round, &error, contents));
                }
            }
        }
        let shares_cores = self.machine.is_shared_by(case.load.cores(), case.backend_cores());
        Ok(CaseOutcome { case, shares_cores, entries })
    }

    fn check_interrupted(&self) -> Result<()> {
        ensure!(!self.interrupted.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }

    /// A round's slices of some contenders.
    fn slices(
        &self,
        scenario: &Scenario,
        load: &Load,
        length: Duration,
        entries: &mut [&mut Entry],
        contents: &Contents,
    ) -> Result<()> {
        let lines = entries
            .iter()
            .map(|entry| self.line(scenario, load, &entry.contender, contents, [ENDLESS_S, 0.0]))
            .collect::<Result<Vec<_>>>()?;
        let (load_cores, _) = self.machine.split(load.cores(), 1)?;
        let slices = Slices {
            length,
            count: self.extent.slices(length),
            request_bytes: load.block_kib * 1024,
            writes: load.read == 0,
            core: *load_cores.first().context("no core for the load")?,
        };
        let iops = slices.run(&lines, &self.interrupted)?;
        for (entry, iops) in entries.iter_mut().zip(iops) {
            entry.slices.extend(iops);
        }
        Ok(())
    }

    fn contents(&mut self, backing: Backing) -> Result<Contents> {
        let Some(place) = Place::of(backing, &self.scratch)? else { return Ok(storage::null()) };
        let image = match self.images.entry(backing) {
            Occupied(made) => made.into_mut(),
            Vacant(none) => {
                let image = Image::make(&place)?;
                self.places.push(place);
                none.insert(image)
            }
        };
        Ok(image.contents())
    }

    fn turn(
        &self,
        scenario: &Scenario,
        load: &Load,
        contender: &Contender,
        contents: &Contents,
    ) -> Result<Sample> {
        let Extent { mut seconds, mut warmup_s, .. } = self.extent;
        if load.idle {
            (seconds, warmup_s) = (seconds.max(IDLE_S), warmup_s.max(IDLE_WARMUP_S));
        }
        let line = self.line(scenario, load, contender, contents, [seconds, warmup_s])?;
        if contender.kind() == Kind::Fio {
            let (json, cpu_us) = run_fio(&line)?;
            return Sample::of_fio(&json, cpu_us, self.fio_start_us(line)?);
        }
        let sample = Sample::of_blkload(&json(&output(&line)?)?, load.disks)?;
        Ok(match scenario.latency_cdf {
            true => sample,
            false => Sample { latency_cdf: Vec::new(), ..sample },
        })
    }

    /// The command line that puts the load on a contender: fio's, or blkload's followed by the backend's.
    /// The time that counts starts after the warm-up. fio has no warm-up.
    fn line(
        &self,
        scenario: &Scenario,
        load: &Load,
        contender: &Contender,
        contents: &Contents,
        [seconds, warmup_s]: [f64; 2],
    ) -> Result<Vec<String>> {
        let (load_cores, backend_cores) = self.machine.split(load.cores(), contender.cores())?;
        let pinned = vec!["taskset".to_owned(), "-c".to_owned(), list(&backend_cores)];
        let (kind, words) = match contender {
            Contender::Fio { registered } => {
                let file = contents.file.as_deref().context("fio needs a file")?;
                let mut line = pinned;
                line.extend(program(&self.fio)?.words());
                line.extend(contender::fio_arguments(*registered, load, file, seconds));
                return Ok(line);
            }
            Contender::Polldisk { .. } => {
                let mut words = vec![self.built("polldisk"), "serve".to_owned()];
                words.extend(contender::polldisk_arguments(&list(&backend_cores)));
                let mut kind = vec!["--target".to_owned(), contender::polldisk_target(contents)];
                if let Some(beside) = contender.beside() {
                    kind.extend(["--neighbours".to_owned(), contender::neighbours_name(beside)]);
                    let scratch = self.scratch_beside(contents).display().to_string();
                    kind.extend(["--scratch".to_owned(), scratch]);
                }
                (kind, words)
            }
            Contender::Qemu { iothread, files } => {
                let mut words = program(&self.qemu)?.words();
                words.extend(contender::qemu_arguments(*iothread, *files, contents));
                let kind = ["--no-toolstack", "--backend-type", "qdisk"].map(str::to_owned);
                (kind.into(), words)
            }
            Contender::Echo => (vec!["--echo".to_owned()], Vec::new()),
        };
        let load = match contender.kind() {
            Kind::Qemu => load.split(scenario.split),
            _ => load.clone(),
        };
        let mut line = vec![self.built("blkload"), "--json".to_owned(), "-".to_owned()];
        line.extend(contender::blkload_arguments(&load));
        let blkloads_cores = match contender.kind() {
            Kind::Echo => [load_cores, backend_cores].concat(),
            _ => load_cores,
        };
        line.extend(["--cores", &list(&blkloads_cores), "--samples", "1"].map(str::to_owned));
        line.extend(["--seconds".to_owned(), seconds.to_string()]);
        line.extend(["--warmup".to_owned(), warmup_s.to_string()]);
        line.extend(kind);
        if !words.is_empty() {
            line.push("--".to_owned());
            line.extend(pinned);
            line.extend([self.built("stand-in"), "run".to_owned(), "{folder}".to_owned()]);
            line.extend(self.extent.system_calls.then(|| "--system-calls".to_owned()));
            line.push("--".to_owned());
            line.extend(words);
        }
        Ok(line)
    }

    /// CPU time that fio takes before its first request and after its last, in microseconds. fio
    /// calibrates a clock first, which takes as much time as tens of thousands of requests. Backends are
    /// measured only long after their start.
    fn fio_start_us(&self, mut words: Vec<String>) -> Result<f64> {
        if let Some(known_us) = self.fio_start_us.get() {
            return Ok(*known_us);
        }
        words.extend(contender::FIO_ONE_REQUEST.map(str::to_owned));
        let turns = (0..FIO_STARTS).map(|_| run_fio(&words).map(|(_, cpu_us)| cpu_us));
        let start_us = Interval::of(&turns.collect::<Result<Vec<_>>>()?).context("no starts")?;
        Ok(*self.fio_start_us.get_or_init(|| start_us.median))
    }

    /// Folder for the neighbours' files: that of the measured disk's file, so that all are on the same
    /// storage.
    fn scratch_beside<'b>(&'b self, contents: &'b Contents) -> &'b Path {
        let file = contents.file.as_deref().map(Path::new);
        file.and_then(Path::parent).unwrap_or(&self.scratch)
    }

    fn built(&self, name: &str) -> String {
        self.programs.join(name).display().to_string()
    }
}

fn program(found: &Result<Program>) -> Result<&Program> {
    match found {
        Ok(program) => Ok(program),
        Err(error) => bail!("{error:#}"),
    }
}

/// Gives a contender no further turns.
fn leave_out(entry: &mut Entry, what: &str, error: &anyhow::Error, contents: &Contents) {
    output::say(format_args!("{what}: {}: left out: {error:#}", entry.contender));
    entry.failed = Some(without_folder(&format!("{error:#}"), contents));
}

/// The text with the disk's file but without its folder, which means nothing on other machines.
fn without_folder(text: &str, contents: &Contents) -> String {
    let path = contents.file.as_deref().map(Path::new);
    match path.and_then(Path::parent) {
        Some(folder) => text.replace(&format!("{}/", folder.display()), ""),
        None => text.to_owned(),
    }
}

fn list(cores: &[usize]) -> String {
    cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

fn output(words: &[String]) -> Result<Output> {
    let [name, arguments @ ..] = words else { bail!("no program") };
    let output = Command::new(name)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("{}", text.trim());
    }
    Ok(output)
}

/// Returns fio's JSON, and the CPU time of its process with all its threads in microseconds.
fn run_fio(words: &[String]) -> Result<(Value, f64)> {
    let before_us = machine::children_cpu_us();
    let json = json(&output(words)?)?;
    Ok((json, machine::children_cpu_us() - before_us))
}

/// The JSON in a program's output. fio may write notes before it.
fn json(output: &Output) -> Result<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    let start = text.find('{').context("no JSON in the output")?;
    Ok(serde_json::from_str(&text[start..])?)
}

fn summary(sample: &Sample) -> String {
    let show = [
        Metric::Iops,
        Metric::MeanUs,
        Metric::CpuUsPerIo,
        Metric::ConnectS,
        Metric::OwnKibPerDisk,
        Metric::NeighbourIops,
    ];
    let known = |metric| sample.figures.get(&metric).is_some_and(|figure| *figure > 0.0);
    let has_neighbours = sample.figures.contains_key(&Metric::NeighbourIops);
    let idle = !known(Metric::Iops) && !has_neighbours;
    let figure = |metric: &Metric| {
        let is_shown = idle == matches!(metric, Metric::ConnectS | Metric::OwnKibPerDisk);
        let value = sample.figures.get(metric).filter(|_| is_shown)?;
        Some(format!("{} {}", figures::figure(*value), metric.title()))
    };
    show.iter().filter_map(figure).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn rounds_without_a_goal_are_half_as_many() {
        let of = |more: &str| {
            let text =
                format!("about = \"\"\nbacking = \"null\"\ncontenders = [\"polldisk\"]\n{more}");
            let extent = Extent { rounds: 8, seconds: 1.5, warmup_s: 0.5, system_calls: true };
            extent.rounds_of(&Scenario::parse("x", &text).unwrap())
        };
        assert_eq!(of("load = {}"), 4);
        assert_eq!(of("goals = [{ metric = \"iops\", at_least = 1 }]\nload = {}"), 8);
    }

    #[test]
    fn slices_replace_turns_only_in_the_figure_that_they_show() {
        let turn = BTreeMap::from([(Metric::Iops, 1.0), (Metric::MeanUs, 2.0)]);
        let sample = Sample { figures: turn, latency_cdf: Vec::new() };
        let mut entry = Entry { samples: vec![sample], ..Entry::new(Contender::default()) };
        assert_eq!(entry.judged_figures(Metric::Iops), [1.0]);
        entry.slices = vec![3.0, 4.0];
        assert_eq!(entry.judged_figures(Metric::Iops), [3.0, 4.0]);
        assert_eq!(entry.judged_figures(Metric::MeanUs), [2.0]);
        assert_eq!(entry.figures(Metric::Iops), [1.0]);
    }

    #[test]
    fn a_failure_names_no_folder_of_this_machine() {
        let file = Some("/home/me/target/x.img".to_owned());
        let contents = Contents { file, bytes: 0 };
        let text = "-blockdev filename=/home/me/target/x.img,aio=native: no aio";
        let expected = "-blockdev filename=x.img,aio=native: no aio";
        assert_eq!(without_folder(text, &contents), expected);
        assert_eq!(without_folder(text, &storage::null()), text);
    }
}

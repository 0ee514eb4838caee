//! What the figures were measured on.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use serde::Serialize;

use crate::programs::Program;

/// The machine and its programs.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// As its first CPU names itself.
    pub cpu: String,
    /// Cores that this program may use.
    pub cores: Vec<usize>,
    /// In MiB.
    pub memory_mib: u64,
    /// Linux's release.
    pub kernel: String,
    /// Whether it is a virtual machine.
    pub is_virtual: bool,
    /// The first line of each program's version.
    pub versions: Vec<String>,
    /// The checkout's commit, with `-dirty` where files differ from it.
    pub commit: String,
}

/// What the machine's cores have done so far, in ticks, all cores together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticks {
    stolen: u64,
    all: u64,
}

/// How the machine was used while something was measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Quietness {
    /// Processes that wanted a core in the minute before the start.
    pub load_average: f64,
    /// Percent of the time that the host took from this virtual machine.
    pub stolen_percent: f64,
}

impl Machine {
    /// Looks. Programs are asked for their versions.
    pub fn look(programs: &[&Program]) -> Machine {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(": ")).map_or("", |(_, value)| value)
        };
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib = meminfo.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let mut cores: Vec<usize> = core_affinity::get_core_ids()
            .unwrap_or_default()
            .into_iter()
            .map(|core| core.id)
            .collect();
        cores.sort_unstable();
        Machine {
            cpu: field("model name").to_owned(),
            cores,
            memory_mib: kib.unwrap_or(0) / 1024,
            kernel: release.trim().to_owned(),
            is_virtual: field("flags").split(' ').any(|flag| flag == "hypervisor"),
            versions: programs.iter().map(|program| version(program)).collect(),
            commit: first_line(Command::new("git").args(["describe", "--always", "--dirty"])),
        }
    }

    /// Cores for a load and for a backend, apart from each other. The last ones, since interrupts
    /// often go to the first.
    pub fn split(&self, load: u32, backend: u32) -> Result<(Vec<usize>, Vec<usize>)> {
        let (load, backend) = (load as usize, backend as usize);
        let have = self.cores.len();
        ensure!(load + backend <= have, "needs {} cores, there are {have}", load + backend);
        let (rest, backend) = self.cores.split_at(have - backend);
        Ok((rest[rest.len() - load..].to_vec(), backend.to_vec()))
    }
}

fn version(program: &Program) -> String {
    let words = program.words();
    first_line(Command::new(&words[0]).args(&words[1..]).arg("--version"))
}

fn first_line(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).lines().next().unwrap_or("unknown").to_owned()
}

impl Ticks {
    /// Reads `/proc/stat`.
    pub fn now() -> Ticks {
        Ticks::parse(&fs::read_to_string("/proc/stat").unwrap_or_default())
    }

    fn parse(stat: &str) -> Ticks {
        let line = stat.lines().next().unwrap_or_default();
        let fields: Vec<u64> =
            line.split_whitespace().skip(1).take(8).filter_map(|word| word.parse().ok()).collect();
        let field = |index: usize| fields.get(index).copied().unwrap_or(0);
        Ticks { stolen: field(7), all: fields.iter().sum() }
    }

    /// What others took since then.
    pub fn stolen_percent_until(self, later: Ticks) -> f64 {
        let all = (later.all - self.all).max(1);
        (later.stolen - self.stolen) as f64 * 100.0 / all as f64
    }
}

/// Microseconds of CPU time of this process's children that have ended, in steps of 10 ms.
pub fn children_cpu_us() -> f64 {
    children_ticks(&fs::read_to_string("/proc/self/stat").unwrap_or_default()) as f64 * 1e4
}

/// cutime and cstime: fields 16 and 17, counted behind the name, which may hold anything.
fn children_ticks(stat: &str) -> u64 {
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    fields.skip(13).take(2).filter_map(|word| word.parse::<u64>().ok()).sum()
}

/// Processes that wanted a core in the last minute.
pub fn load_average() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod test {
    use super::*;

    fn machine(cores: &[usize]) -> Machine {
        Machine { cores: cores.to_vec(), ..Machine::look(&[]) }
    }

    #[test]
    fn load_and_backend_have_cores_of_their_own() {
        assert_eq!(machine(&[0, 1]).split(1, 1).unwrap(), (vec![0], vec![1]));
        assert_eq!(machine(&[0, 1, 2, 5]).split(1, 2).unwrap(), (vec![1], vec![2, 5]));
        let error = machine(&[0, 1]).split(2, 2).unwrap_err().to_string();
        assert_eq!(error, "needs 4 cores, there are 2");
    }

    #[test]
    fn childrens_time_is_fields_16_and_17() {
        assert_eq!(children_ticks("12 (a) S 9) R 1 2 3 4 5 6 7 8 9 10 11 12 500 70 15"), 570);
    }

    #[test]
    fn stolen_time_is_the_eighth_field() {
        let before = Ticks::parse("cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1\n");
        let after = Ticks::parse("cpu  150 0 100 720 100 0 0 30 9 9\ncpu0 1\n");
        assert_eq!(before.stolen_percent_until(after), 30.0);
    }
}

//! The machine that the figures were measured on.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::Serialize;

use crate::programs::Program;

/// The machine and its programs.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Model name of the first CPU.
    pub cpu: String,
    /// Cores that this program may use. Each is a list of the threads that it may use.
    pub cores: Vec<Vec<usize>>,
    /// In MiB.
    pub memory_mib: u64,
    /// Linux's release.
    pub kernel: String,
    /// Whether it is a virtual machine.
    pub is_virtual: bool,
    /// The first line of each program's version.
    pub versions: Vec<String>,
    /// The checkout's commit, with `-dirty` if files differ from it.
    pub commit: String,
}

/// Long enough to notice programs that run only now and then. The kernel counts in ticks of 10 ms.
const LOOK_FOR_OTHERS: Duration = Duration::from_secs(2);

/// Time of all cores together since the machine started, in ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticks {
    idle: u64,
    stolen: u64,
    all: u64,
}

/// How the machine was used while something was measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Quietness {
    /// Percent of the cores' time that other programs used before the start.
    pub others_percent: f64,
    /// Percent of the time that the host took from this virtual machine.
    pub stolen_percent: f64,
}

impl Machine {
    /// Reads what the kernel says of the machine, and asks the programs for their versions.
    pub fn look(programs: &[&Program]) -> Machine {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(": ")).map_or("", |(_, value)| value)
        };
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib = meminfo.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let threads = core_affinity::get_core_ids().unwrap_or_default();
        let threads: Vec<usize> = threads.into_iter().map(|thread| thread.id).collect();
        Machine {
            cpu: field("model name").to_owned(),
            cores: cores(&sorted(&threads), siblings),
            memory_mib: kib.unwrap_or(0) / 1024,
            kernel: release.trim().to_owned(),
            is_virtual: field("flags").split(' ').any(|flag| flag == "hypervisor"),
            versions: programs.iter().map(|program| version(program)).collect(),
            commit: first_line(Command::new("git").args(["describe", "--always", "--dirty"])),
        }
    }

    /// Different threads for a load and for a backend: this many for each.
    pub fn split(&self, load: u32, backend: u32) -> Result<(Vec<usize>, Vec<usize>)> {
        let (needed, threads) = (load + backend, self.threads());
        ensure!(
            needed as usize <= threads.len(),
            "needs {needed} cores, there are {}{}",
            self.cores.len(),
            self.with_threads()
        );
        let (backend, rest) = threads.split_at(backend as usize);
        Ok((sorted(&rest[..load as usize]), sorted(backend)))
    }

    /// Whether a load and a backend with these numbers of busy threads have to share cores.
    pub fn is_shared_by(&self, load: u32, backend: u32) -> bool {
        (load + backend) as usize > self.cores.len()
    }

    /// All threads, in the order in which to use them. First comes one thread of each core, from the last
    /// core to the first, since interrupts often go to the first. Then come the other threads, from the
    /// first core to the last, so that the backend, which gets the first threads, is the last to share a
    /// core.
    pub fn threads(&self) -> Vec<usize> {
        let first = self.cores.iter().rev().filter_map(|threads| threads.first());
        let others = self.cores.iter().flat_map(|threads| threads.iter().skip(1));
        first.chain(others).copied().collect()
    }

    /// Words to put after the number of cores if there are more threads than cores.
    pub fn with_threads(&self) -> String {
        match self.threads().len() {
            threads if threads == self.cores.len() => String::new(),
            threads => format!(" with {threads} threads"),
        }
    }
}

fn sorted(threads: &[usize]) -> Vec<usize> {
    let mut threads = threads.to_vec();
    threads.sort_unstable();
    threads
}

/// Groups the threads that have the same siblings.
fn cores(threads: &[usize], siblings: impl Fn(usize) -> Option<String>) -> Vec<Vec<usize>> {
    let mut cores: Vec<(String, Vec<usize>)> = Vec::new();
    for &thread in threads {
        let siblings = siblings(thread).unwrap_or_else(|| thread.to_string());
        match cores.iter_mut().find(|(known, _)| *known == siblings) {
            Some((_, threads)) => threads.push(thread),
            None => cores.push((siblings, vec![thread])),
        }
    }
    cores.into_iter().map(|(_, threads)| threads).collect()
}

/// Linux's list of all threads of this thread's core.
fn siblings(thread: usize) -> Option<String> {
    let path = format!("/sys/devices/system/cpu/cpu{thread}/topology/thread_siblings_list");
    fs::read_to_string(path).ok().map(|list| list.trim().to_owned())
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
        Ticks { idle: field(3) + field(4), stolen: field(7), all: fields.iter().sum() }
    }

    /// What the host took between this moment and a later one.
    pub fn stolen_percent_until(self, later: Ticks) -> f64 {
        let all = (later.all - self.all).max(1);
        (later.stolen - self.stolen) as f64 * 100.0 / all as f64
    }

    /// How busy the cores were between this moment and a later one.
    fn used_percent_until(self, later: Ticks) -> f64 {
        let all = (later.all - self.all).max(1);
        100.0 - (later.idle - self.idle) as f64 * 100.0 / all as f64
    }
}

/// How busy other programs keep the cores. Sleeps while it looks.
pub fn others_percent() -> f64 {
    let start = Ticks::now();
    thread::sleep(LOOK_FOR_OTHERS);
    start.used_percent_until(Ticks::now())
}

/// Microseconds of CPU time of this process's children that have ended, in steps of 10 ms.
pub fn children_cpu_us() -> f64 {
    children_ticks(&fs::read_to_string("/proc/self/stat").unwrap_or_default()) as f64 * 1e4
}

/// cutime and cstime: fields 16 and 17. Counted from behind the name, which may hold anything.
fn children_ticks(stat: &str) -> u64 {
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    fields.skip(13).take(2).filter_map(|word| word.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod test {
    use super::*;

    fn machine(threads: &[usize], siblings: fn(usize) -> Option<String>) -> Machine {
        Machine { cores: cores(threads, siblings), ..Machine::look(&[]) }
    }

    #[test]
    fn load_and_backend_have_cores_of_their_own() {
        let two = machine(&[0, 1], |thread| Some(thread.to_string()));
        assert_eq!(two.split(1, 1).unwrap(), (vec![0], vec![1]));
        assert!(!two.is_shared_by(1, 1));
        let error = two.split(2, 2).unwrap_err().to_string();
        assert_eq!(error, "needs 4 cores, there are 2");
        let without_topology = machine(&[0, 1, 2, 5], |_| None);
        assert_eq!(without_topology.split(1, 2).unwrap(), (vec![1], vec![2, 5]));
    }

    #[test]
    fn a_core_is_shared_only_if_none_is_free() {
        let threads = [0, 1, 2, 3, 4, 5, 6, 7];
        let pairs_apart =
            machine(&threads, |thread| Some(format!("{},{}", thread % 4, thread % 4 + 4)));
        assert_eq!(pairs_apart.split(2, 2).unwrap(), (vec![0, 1], vec![2, 3]));
        assert_eq!(pairs_apart.split(5, 1).unwrap(), (vec![0, 1, 2, 4, 5], vec![3]));
        assert_eq!(pairs_apart.split(4, 4).unwrap(), (vec![4, 5, 6, 7], vec![0, 1, 2, 3]));
        let neighbours =
            machine(&threads, |thread| Some(format!("{}-{}", thread / 2 * 2, thread / 2 * 2 + 1)));
        assert_eq!(neighbours.split(2, 2).unwrap(), (vec![0, 2], vec![4, 6]));
        assert_eq!(neighbours.split(5, 1).unwrap(), (vec![0, 1, 2, 3, 4], vec![6]));
        assert_eq!(neighbours.split(4, 4).unwrap(), (vec![1, 3, 5, 7], vec![0, 2, 4, 6]));
        assert!(neighbours.is_shared_by(4, 1) && !neighbours.is_shared_by(2, 2));
        let error = neighbours.split(8, 1).unwrap_err().to_string();
        assert_eq!(error, "needs 9 cores, there are 4 with 8 threads");
    }

    #[test]
    fn childrens_time_is_fields_16_and_17() {
        assert_eq!(children_ticks("12 (a) S 9) R 1 2 3 4 5 6 7 8 9 10 11 12 500 70 15"), 570);
    }

    #[test]
    fn idle_time_is_the_fourth_and_fifth_field_and_stolen_time_the_eighth() {
        let before = Ticks::parse("cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1\n");
        let after = Ticks::parse("cpu  150 0 100 720 100 0 0 30 9 9\ncpu0 1\n");
        assert_eq!(before.stolen_percent_until(after), 30.0);
        assert_eq!(before.used_percent_until(after), 80.0);
    }
}

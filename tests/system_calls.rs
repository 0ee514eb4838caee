//! System calls on the steady path, counted by strace.
//!
//! Worker and guest take turns in one thread, so that the count is the same on any machine.

#[path = "../benches/rig/mod.rs"]
mod rig;

use std::fs;
use std::process::Command;
use std::time::Duration;

use polldisk::blkif::op;
use polldisk::sim::blkfront::device::Options;
use rig::Rig;

/// Set in the process that strace watches.
const WATCHED: &str = "POLLDISK_TEST_WATCHED";

/// Files that do not exist: looking one up marks a place in the trace.
const MARKS: [&str; 3] = ["/polldisk-begin", "/polldisk-guest-sleeps", "/polldisk-end"];

const BATCHES: usize = 1000;
const DEPTH: usize = 32;

/// System calls of a sleeping guest per batch: ppoll and read.
const GUESTS_CALLS: usize = 2;

#[test]
fn a_polling_worker_makes_few_system_calls_for_its_requests() {
    if std::env::var_os(WATCHED).is_some() {
        return work();
    }
    let Some(trace) = trace() else { return };
    let between = |from: &str, to: &str| {
        let lines = trace.lines().skip_while(|line| !line.contains(from)).skip(1);
        lines.take_while(|line| !line.contains(to)).count()
    };
    assert_eq!(between(MARKS[0], MARKS[1]), 0, "system calls while the guest polls");
    let calls = between(MARKS[1], MARKS[2]) - GUESTS_CALLS * BATCHES;
    let requests = BATCHES * DEPTH;
    assert!(calls > 0, "a sleeping guest has to be woken");
    assert!(
        requests as f64 / calls as f64 > budget(),
        "{calls} system calls for {requests} requests of a sleeping guest"
    );
}

/// The least number of requests per system call of the worker.
fn budget() -> f64 {
    let budgets = concat!(env!("CARGO_MANIFEST_DIR"), "/perf/budgets.toml");
    let budgets: toml::Table = fs::read_to_string(budgets).unwrap().parse().unwrap();
    budgets["requests_per_system_call"].as_float().unwrap()
}

/// What strace saw of [`work`]'s thread; `None` if strace is not installed, which fails in CI.
fn trace() -> Option<String> {
    let found = Command::new("strace").arg("--version").output().is_ok();
    let required = std::env::var("POLLDISK_REQUIRE_XEN_TOOLS").is_ok_and(|value| value == "1");
    assert!(found || !required, "strace is missing: install it");
    if !found {
        eprintln!("skipped: strace is not installed");
        return None;
    }
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let output = Command::new("strace")
        .args(["--follow-forks", "--output-separately", "--output"])
        .arg(folder.path().join("trace"))
        .arg(std::env::current_exe().unwrap())
        .env(WATCHED, "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let traces = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
    let mut texts = traces.map(|trace| fs::read_to_string(trace).unwrap());
    let work = texts.find(|text| MARKS.iter().all(|mark| text.contains(mark)));
    Some(work.expect("one thread does the work"))
}

/// Reads of a guest that polls, then of one that sleeps until its requests are done.
fn work() {
    let mut rig = Rig::connect("null:1G", Options::default());
    // Until all pages are mapped.
    (0..100).for_each(|_| rig.batch(op::READ, DEPTH as u64, 4096));
    mark(MARKS[0]);
    (0..BATCHES).for_each(|_| rig.batch(op::READ, DEPTH as u64, 4096));
    mark(MARKS[1]);
    for _ in 0..BATCHES {
        // This asks for a notification and takes that of the previous batch.
        rig.device.wait(Duration::ZERO).unwrap();
        rig.batch(op::READ, DEPTH as u64, 4096);
    }
    mark(MARKS[2]);
}

fn mark(path: &str) {
    assert!(fs::metadata(path).is_err());
}

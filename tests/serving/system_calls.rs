//! What the data path costs in system calls, counted by strace.

use std::fs;
use std::process::Command;

/// Requests for each system call of the worker at queue depth 32, at the least.
fn budget() -> f64 {
    let budgets = concat!(env!("CARGO_MANIFEST_DIR"), "/perf/budgets.toml");
    let budgets: toml::Table = fs::read_to_string(budgets).unwrap().parse().unwrap();
    budgets["requests_per_system_call"].as_float().unwrap()
}

const SECONDS: f64 = 2.0;

/// Whether strace is here, which CI sees to.
fn has_strace() -> bool {
    let found = Command::new("strace").arg("--version").output().is_ok();
    let required = std::env::var("POLLDISK_REQUIRE_XEN_TOOLS").is_ok_and(|value| value == "1");
    assert!(found || !required, "strace is missing: install it");
    if !found {
        eprintln!("skipped: strace is not installed");
    }
    found
}

#[test]
fn a_busy_worker_makes_few_system_calls_for_its_requests() {
    if !has_strace() {
        return;
    }
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // A small disk, so that the last read of everything is hardly any of the requests.
    let output = Command::new("strace")
        .args(["--follow-forks", "--output-separately", "--output"])
        .arg(folder.path().join("trace"))
        .arg(env!("CARGO_BIN_EXE_polldisk"))
        .args(["demo", "--target", "null:8G", "--guests", "1", "--size", "1M", "--depth", "32"])
        .args(["--seconds", &SECONDS.to_string()])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let requests = iops(&String::from_utf8(output.stdout).unwrap()) * SECONDS;

    let traces = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
    let worker = traces
        .map(|trace| fs::read_to_string(trace).unwrap())
        .find(|trace| trace.contains("PR_SET_NAME, \"worker-0\""))
        .unwrap();
    let calls = worker.lines().count();
    eprintln!("{calls} system calls for {requests:.0} requests");
    assert!(requests / calls as f64 > budget(), "{calls} system calls for {requests:.0} requests");
}

/// The first disk's requests in a second, as the demo's table tells them.
fn iops(table: &str) -> f64 {
    let row = table.lines().find(|line| line.contains("1:xvda")).unwrap();
    row.split_whitespace().nth(1).unwrap().parse().unwrap()
}

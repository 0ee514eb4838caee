//! Xen's own tools against the stand-in's server.
//!
//! They come from the packages `xenstore-utils` and `xen-utils-4.17` (Debian). If one is not
//! installed, its test says so and passes, unless `POLLDISK_REQUIRE_XEN_TOOLS=1` is set, as in CI.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use polldisk::xen::Nodes;
use xenstore_rs::Xs;

use crate::{Bench, permissions};

/// Ends a tool that hangs, so that the test fails rather than waits.
const GUARD_SECONDS: &str = "120";

/// The tool, set up for the server; `None` if it is missing and not required.
fn tool(bench: &Bench, name: &str) -> Option<Command> {
    let package = if name == "test-xenstore" { "xen-utils-4.17" } else { "xenstore-utils" };
    let Some(program) = find(name) else {
        let required = env::var_os("POLLDISK_REQUIRE_XEN_TOOLS").is_some_and(|value| value == "1");
        assert!(!required, "{name} is missing: install the package {package}");
        eprintln!("SKIPPED: {name} is missing (package {package})");
        return None;
    };
    let mut command = Command::new("timeout");
    command.arg(GUARD_SECONDS).arg(program);
    command.env("XENSTORED_PATH", bench.server.socket());
    Some(command)
}

/// Finds a tool in the search path or in the private directory of Xen's packages.
fn find(name: &str) -> Option<PathBuf> {
    let mut places: Vec<PathBuf> =
        env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect();
    let libraries = fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    let of_xen = libraries.filter(|entry| entry.file_name().to_string_lossy().starts_with("xen-"));
    places.extend(of_xen.map(|entry| entry.path().join("bin")));
    places.iter().map(|place| place.join(name)).find(|path: &PathBuf| Path::is_file(path))
}

/// What a tool prints, and whether it succeeds.
#[derive(Debug, PartialEq, Eq)]
struct Ran {
    success: bool,
    stdout: String,
}

fn run(mut command: Command, arguments: &[&str]) -> Ran {
    let output = command.args(arguments).output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    eprintln!("{arguments:?}: {}\n{stdout}", output.status);
    eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    Ran { success: output.status.success(), stdout }
}

fn good(stdout: &str) -> Ran {
    Ran { success: true, stdout: stdout.into() }
}

#[test]
fn xenstore_write_and_xenstore_read_agree_with_the_client() {
    let bench = Bench::new();
    let store = bench.dom0();
    let Some(write) = tool(&bench, "xenstore-write") else { return };
    assert_eq!(run(write, &["/a/b", "one", "relative", "two"]), good(""));
    assert_eq!(&*store.read("/a/b").unwrap(), "one");
    assert_eq!(&*store.read("/local/domain/0/relative").unwrap(), "two");
    let Some(read) = tool(&bench, "xenstore-read") else { return };
    assert_eq!(run(read, &["-p", "/a/b", "relative"]), good("/a/b: one\nrelative: two\n"));
    let Some(read) = tool(&bench, "xenstore-read") else { return };
    assert!(!run(read, &["/missing"]).success);
}

#[test]
fn xenstore_ls_prints_the_whole_tree_with_permissions() {
    let bench = Bench::new();
    let store = bench.dom0();
    store.write("/vm/name", "guest").unwrap();
    store.write("/vm/disk/state", "4").unwrap();
    store.set_permissions("/vm/disk", &permissions("r0 b5")).unwrap();
    let Some(ls) = tool(&bench, "xenstore-ls") else { return };
    assert_eq!(
        run(ls, &["-f"]),
        good("/vm = \"\"\n/vm/disk = \"\"\n/vm/disk/state = \"4\"\n/vm/name = \"guest\"\n")
    );
    let Some(ls) = tool(&bench, "xenstore-ls") else { return };
    let listed = run(ls, &["-p", "/vm"]);
    assert!(listed.success);
    let lines: Vec<&str> = listed.stdout.lines().collect();
    assert!(lines[0].starts_with("disk = \"\"") && lines[0].ends_with("(r0,b5)"), "{lines:?}");
    assert!(lines[1].starts_with(" state = \"4\"") && lines[1].ends_with("(n0)"), "{lines:?}");
}

#[test]
fn xenstore_ls_lists_a_directory_of_thousands() {
    let bench = Bench::new();
    let store = bench.dom0();
    for n in 0..2000 {
        store.write(&format!("/big/node-{n}"), "").unwrap();
    }
    let Some(ls) = tool(&bench, "xenstore-ls") else { return };
    assert_eq!(run(ls, &["/big"]).stdout.lines().count(), 2000);
}

#[test]
fn xenstore_list_rm_exists_and_chmod_work() {
    let bench = Bench::new();
    let store = bench.dom0();
    store.write("/a/x", "").unwrap();
    store.write("/a/y/z", "").unwrap();
    let Some(list) = tool(&bench, "xenstore-list") else { return };
    assert_eq!(run(list, &["/a"]), good("x\ny\n"));
    let Some(chmod) = tool(&bench, "xenstore-chmod") else { return };
    assert_eq!(run(chmod, &["-r", "/a", "n0", "r7"]), good(""));
    assert_eq!(store.permissions("/a/y/z").unwrap(), permissions("n0 r7"));
    let exists = |path: &str| tool(&bench, "xenstore-exists").map(|it| run(it, &[path]).success);
    let Some(there) = exists("/a/y/z") else { return };
    assert!(there);
    let Some(rm) = tool(&bench, "xenstore-rm") else { return };
    assert_eq!(run(rm, &["-t", "/a/y/z"]), good(""));
    assert_eq!(exists("/a/y"), Some(false));
    assert_eq!(exists("/a/x"), Some(true));
}

#[test]
fn xenstore_watch_prints_each_change() {
    let bench = Bench::new();
    let store = bench.dom0();
    let Some(mut watch) = tool(&bench, "xenstore-watch") else { return };
    watch.args(["-n", "4", "/a"]).stdout(Stdio::piped());
    let mut child = watch.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    assert_eq!(next(), "/a");
    store.write("/a/b", "1").unwrap();
    assert_eq!(next(), "/a/b");
    store.write("/elsewhere", "1").unwrap();
    store.rm("/a").unwrap();
    assert_eq!(next(), "/a");
    store.write("/a/c", "1").unwrap();
    assert_eq!(next(), "/a/c");
    assert!(child.wait().unwrap().success());
}

#[test]
fn xens_own_test_of_xenstore_passes() {
    let bench = Bench::new();
    let Some(list) = tool(&bench, "test-xenstore") else { return };
    let listed = run(list, &["-l"]).stdout;
    let names: Vec<&str> = listed.lines().filter_map(|line| line.split(':').next()).collect();
    assert!(names.len() >= 12, "{names:?}");
    let Some(all) = tool(&bench, "test-xenstore") else { return };
    let ran = run(all, &["-i", "20"]);
    assert!(ran.success && !ran.stdout.contains("failed"), "{}", ran.stdout);
    for name in names {
        assert!(ran.stdout.contains(name.trim()), "{name} did not run: {}", ran.stdout);
    }
    assert!(bench.dom0().directory("/local/domain/0").unwrap().is_empty(), "it cleans up");
}

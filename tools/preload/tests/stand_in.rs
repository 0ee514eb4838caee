//! The stand-in as a process of its own.

mod rig;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use polldisk::sim::{Domain, Endpoint};
use rig::Running;

const STAND_IN: &str = env!("CARGO_BIN_EXE_stand-in");

/// Starts a stand-in.
fn serve(folder: &Path) -> Running {
    let child = Command::new(STAND_IN).arg("serve").arg(folder).stdout(Stdio::null()).spawn();
    Running(child.unwrap())
}

/// The error text of a command that has to fail.
fn refusal(output: &Output) -> String {
    assert!(!output.status.success());
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn guests_of_other_processes_live_on_it_until_it_is_told_to_end() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("xen");
    let mut served = serve(&folder);
    let mut guest = None;
    rig::until("a domain can be made", || {
        guest = Domain::create(&Endpoint::at(&folder), rig::domid(1), 16).ok();
        guest.is_some()
    });
    let second = Command::new(STAND_IN).arg("serve").arg(&folder).output().unwrap();
    assert!(refusal(&second).contains("may be running there already"));

    rig::signal(&served.0, "-TERM");
    assert!(rig::ended(&mut served.0).success());
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0, "its sockets are gone");
}

#[test]
fn a_program_without_a_stand_in_is_refused_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let run = Command::new(STAND_IN).arg("run").arg(folder.path()).args(["--", "true"]).output();
    let text = refusal(&run.unwrap());
    assert!(text.contains("no stand-in runs") && text.contains("stand-in serve"), "{text}");
}

//! The command line: what it prints, and its exit statuses.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn polldisk(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_polldisk")).args(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Runs a command that has to fail, and returns its message.
fn refusal(arguments: &[&str]) -> String {
    let output = polldisk(arguments);
    assert!(!output.status.success(), "{arguments:?} has to fail");
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!text.contains("panicked"), "{arguments:?}: {text}");
    text
}

/// Asserts that the command fails with a message that contains all of `parts`.
fn is_refused(arguments: &[&str], parts: &[&str]) {
    let text = refusal(arguments);
    for part in parts {
        assert!(text.contains(part), "{arguments:?} does not say \"{part}\":\n{text}");
    }
}

/// The two numbers in the last line of a demo.
fn verdict(output: &Output) -> (u64, u64) {
    let text = stdout(output);
    let line = text.lines().last().unwrap_or_default();
    let numbers = line
        .strip_prefix("verified ")
        .and_then(|rest| rest.strip_suffix(" mismatches"))
        .and_then(|rest| rest.split_once(" blocks, "));
    let Some((blocks, mismatches)) = numbers else { panic!("the last line is \"{line}\"") };
    (blocks.parse().unwrap(), mismatches.parse().unwrap())
}

#[test]
fn a_demo_ends_with_what_it_verified() {
    let output = polldisk(&["demo", "--seconds", "1", "--size", "32M"]);
    assert!(output.status.success(), "{output:?}");
    let (blocks, mismatches) = verdict(&output);
    assert!(blocks > 0);
    assert_eq!(mismatches, 0);
    let text = stdout(&output);
    for part in ["IOPS", "P99.9", "CPU/IO", "1:xvda", "2:xvda"] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn the_demo_verifies_frontends_of_other_kinds() {
    for frontend in [
        "--queues 2 --workers 2 --ring-order 1 --depth 33 --indirect 32 --block-size 128K",
        "--queues 3 --protocol x86_32 --no-persistent",
        "--no-persistent --data-path map --block-size 32K",
        "--data-path copy",
    ] {
        let mut arguments = vec!["demo", "--seconds", "1", "--size", "64M"];
        arguments.extend(frontend.split(' '));
        let output = polldisk(&arguments);
        let (blocks, mismatches) = verdict(&output);
        assert!(output.status.success() && blocks > 0 && mismatches == 0, "{output:?}");
    }
}

#[test]
fn a_demo_on_an_image_that_somebody_else_changes_finds_every_difference() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("shared.img");
    File::create(&path).unwrap().set_len(4 << 20).unwrap();
    let target = format!("raw:{}", path.display());
    let mut demo = Command::new(env!("CARGO_BIN_EXE_polldisk"))
        .args(["demo", "--guests", "1", "--seconds", "1", "--size", "4M", "--overwrite"])
        .args(["--target", &target])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    while demo.try_wait().unwrap().is_none() {
        wipe(&path);
    }
    let output = demo.wait_with_output().unwrap();
    assert!(!output.status.success());
    let (blocks, mismatches) = verdict(&output);
    assert!(blocks > 0 && mismatches > 0);
}

/// Overwrites everything with zeroes. It bypasses the page cache as polldisk does: a mixture of both
/// kinds of writes would end in EIO.
fn wipe(path: &Path) {
    let status = Command::new("dd")
        .args(["if=/dev/zero", "bs=64K", "count=64", "oflag=direct", "conv=notrunc", "status=none"])
        .arg(format!("of={}", path.display()))
        .status();
    assert!(status.unwrap().success());
}

#[test]
fn quoted_arguments_cannot_control_the_terminal() {
    for arguments in [
        &["list", "--admin", "/tmp/\u{1b}[2J/no\tsuch"][..],
        &["serve", "--cores", "\u{1b}[2J"],
        &["serve", "--log", "\u{1b}[2J"],
        &["serve", "--config", "/tmp/\u{1b}[2J"],
        &["demo", "--overwrite", "--target", "raw:/tmp/\u{1b}[2J"],
    ] {
        let said = refusal(arguments);
        assert!(said.contains("\\u{1b}[2J"), "{arguments:?}: {said:?}");
        assert!(!said.contains(|c: char| c.is_control() && c != '\n'), "{arguments:?}: {said:?}");
    }
}

/// Commands that print, with the exit status of each.
const PRINTING: [(&[&str], i32); 5] = [
    (&["demo", "--seconds", "1", "--size", "32M"], 0),
    (&["--help"], 0),
    (&["serve", "--help"], 0),
    (&["list", "--admin", "/nonexistent"], 1),
    (&["frobnicate"], 2),
];

fn full() -> Stdio {
    File::options().write(true).open("/dev/full").unwrap().into()
}

#[test]
fn no_command_panics_if_its_reader_has_ended() {
    for (arguments, status) in PRINTING {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_polldisk"));
        command.args(arguments).stderr(writer.try_clone().unwrap()).stdout(writer);
        assert_eq!(command.status().unwrap().code(), Some(status), "{arguments:?}");
    }
}

#[test]
fn a_full_standard_output_is_an_error_that_is_reported_once() {
    for (arguments, _) in PRINTING {
        let mut command = Command::new(env!("CARGO_BIN_EXE_polldisk"));
        let output = command.args(arguments).stdout(full()).output().unwrap();
        assert!(matches!(output.status.code(), Some(1 | 2)), "{arguments:?}: {output:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!said.contains("panicked"), "{arguments:?}: {said}");
        assert!(said.matches("No space left").count() <= 1, "{arguments:?}: {said}");
        let mut mute = Command::new(env!("CARGO_BIN_EXE_polldisk"));
        let status = mute.args(arguments).stdout(full()).stderr(full()).status().unwrap();
        assert_eq!(status.code(), output.status.code(), "{arguments:?}");
    }
}

#[test]
fn serve_without_xen_names_cause_and_remedy() {
    if Path::new("/dev/xen").exists() {
        eprintln!("skipped: this is a Xen host");
        return;
    }
    let text = refusal(&["serve"]);
    assert!(text.contains("does not run on Xen"), "{text}");
    assert!(text.contains("polldisk demo"), "{text}");
}

#[test]
fn bad_options_are_named_with_what_would_be_right() {
    let long = "x".repeat(70_000);
    for (arguments, parts) in [
        (&["serve", "--workers", "0"][..], &["--workers 0", "give 1 to"][..]),
        (&["serve", "--workers", "many"], &["--workers <N>", "many"]),
        (&["serve", "--cores", "3-1"], &["--cores 3-1", "2-5,8"]),
        (&["serve", "--cores", "4000"], &["--cores 4000", "choose from"]),
        (&["serve", "--poll-us", "99999999"], &["--poll-us 99999999", "give 0 to"]),
        (&["serve", "--backend-type", "a/b"], &["--backend-type a/b", "give vbd"]),
        (&["serve", "--max-queues", "0"], &["--max-queues 0", "give 1 to"]),
        (&["serve", "--max-ring-page-order", "6"], &["--max-ring-page-order 6", "give 0 to 5"]),
        (&["serve", "--max-indirect-segments", "1025"], &["--max-indirect-segments 1025", "1024"]),
        (&["serve", "--config", "/nonexistent.toml"], &["--config /nonexistent.toml", "TOML"]),
        (&["serve", "--log", "polldisk=loud"], &["--log", "debug"]),
        (&["serve", "--log", "verbose"], &["--log verbose", "debug"]),
        (&["serve", "--log", "control=debug"], &["--log control=debug", "polldisk::control=debug"]),
        (&["insert", "--domid", "5", "--vdev", "xvda", "--target", ""], &["--target", "required"]),
        (&["attach", "--domid", "5", "--vdev", "xvda", "--target", ""], &["--target", "required"]),
        (&["check-target", ""], &["<SPEC>", "required"]),
        (&["serve", "--wrokers", "1"], &["--wrokers", "--workers"]),
        (&["demo", "--guests", "0"], &["--guests 0", "1 to 1000"]),
        (&["demo", "--seconds", "-1"], &["--seconds -1", "0 or more"]),
        (&["demo", "--seconds", "nan"], &["--seconds", "0 or more"]),
        (&["demo", "--depth", "33"], &["--depth 33", "1 to 32"]),
        (&["demo", "--block-size", "100"], &["--block-size 100", "multiple of 512"]),
        (&["demo", "--block-size", "0"], &["--block-size 0", "multiple of 512"]),
        (&["demo", "--block-size", "45K"], &["--block-size", "44K"]),
        (&["demo", "--queues", "0"], &["--queues 0", "give 1 to"]),
        (&["demo", "--ring-order", "6"], &["--ring-order 6", "give 0 to 5"]),
        (&["demo", "--indirect", "11"], &["--indirect 11", "12 to 1024"]),
        (&["demo", "--protocol", "sparc"], &["--protocol", "x86_32"]),
        (&["demo", "--size", "128K"], &["--size", "64 blocks"]),
        (&["demo", "--size", "x"], &["--size", "x"]),
        (&["demo", "--workers", "0"], &["--workers 0", "give 1 to"]),
        (&["demo", "--read-percent", "101"], &["--read-percent", "100"]),
        (&["demo", "--target", "qcow2:/a"], &["--target", "qcow2:/a", "raw:/path"]),
        (&["demo", "--target", "null:1M"], &["--size"]),
        (&["demo", "--target", "raw:/nonexistent"], &["--overwrite"]),
        (&["demo", "--target", "raw:/nonexistent", "--overwrite"], &["/nonexistent", "create it"]),
        (&["demo", "--target", "/dev", "--overwrite"], &["/dev", "block device"]),
        (&["serve", "--data-path", "mop"], &["--data-path", "mop", "auto", "map", "copy"]),
        (&["attach", "--vdev", "xvda", "--target", "null:1G"], &["--domid"]),
        (&["attach", "--domid", "x", "--vdev", "xvda", "--target", "null:1G"], &["--domid", "x"]),
        (&["attach", "--domid", "5", "--vdev", "xvda"], &["--target"]),
        (&["detach", "--domid", "5"], &["--vdev"]),
        (&["insert", "--domid", "5", "--vdev", "xvda"], &["--target"]),
        (&["eject", "--domid", "5"], &["--vdev"]),
        (&["list", "--jsno"], &["--jsno", "--json"]),
        (&["list", "--interval", "-1"], &["--interval -1", "0 or more"]),
        (&["attach", "--domid", "5", "--vdev", "xvda", "--target", &long], &["too long"]),
        (&["check-target"], &["SPEC"]),
        (&["check-target", "--mode", "x", "null:1G"], &["--mode", "x", "w!"]),
        (&["check-target", "--domid", "5", "null:1G"], &["--vdev"]),
        (&["check-target", "raw:/nonexistent"], &["raw:/nonexistent", "does not exist"]),
    ] {
        is_refused(arguments, parts);
    }
}

#[test]
fn commands_without_a_daemon_name_cause_and_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("admin.sock");
    let socket = socket.to_str().unwrap();
    let disk = ["--domid", "5", "--vdev", "xvda"];
    for command in [
        [&["list"][..], &["--admin", socket]].concat(),
        [&["attach", "--target", "null:1G", "--admin", socket][..], &disk].concat(),
        [&["attach", "--cdrom", "--admin", socket][..], &disk].concat(),
        [&["detach", "--admin", socket][..], &disk].concat(),
        [&["insert", "--target", "null:1G", "--admin", socket][..], &disk].concat(),
        [&["eject", "--admin", socket][..], &disk].concat(),
    ] {
        is_refused(&command, &[socket, "polldisk serve"]);
    }
}

#[test]
fn help_lists_every_option() {
    let common = ["--help"];
    for (command, options) in [
        (
            "serve",
            &[
                "--config",
                "--workers",
                "--cores",
                "--poll-us",
                "--max-queues",
                "--max-ring-page-order",
                "--max-indirect-segments",
                "--data-path",
                "--backend-type",
                "--admin",
                "--log",
            ][..],
        ),
        (
            "demo",
            &[
                "--guests",
                "--seconds",
                "--workers",
                "--cores",
                "--poll-us",
                "--target",
                "--overwrite",
                "--size",
                "--depth",
                "--block-size",
                "--read-percent",
                "--queues",
                "--ring-order",
                "--indirect",
                "--no-persistent",
                "--data-path",
                "--protocol",
                "--log",
            ],
        ),
        (
            "attach",
            &["--domid", "--vdev", "--target", "--read-only", "--cdrom", "--removable", "--admin"],
        ),
        ("insert", &["--domid", "--vdev", "--target", "--admin"]),
        ("eject", &["--domid", "--vdev", "--admin"]),
        ("detach", &["--domid", "--vdev", "--force", "--admin"]),
        ("list", &["--json", "--admin"]),
        ("check-target", &["--mode", "--domid", "--vdev", "--admin"]),
    ] {
        let output = polldisk(&[command, "--help"]);
        assert!(output.status.success());
        let text = stdout(&output);
        for option in options.iter().chain(&common) {
            assert!(text.contains(option), "{command} --help does not list {option}");
        }
    }
    assert!(stdout(&polldisk(&["--help"])).contains("demo"));
}

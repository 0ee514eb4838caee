//! Panics while nobody reads standard error, in a test program of their own: the panic hook is
//! process-wide.

use std::io::{self, Read, Write};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use polldisk::output;

/// Only a hang takes this long.
const HANG: Duration = Duration::from_secs(60);

/// Linux's default capacity of a pipe.
const PIPE_BYTES: usize = 64 * 1024;

/// Set in the process that panics.
const PANIC: &str = "POLLDISK_TEST_PANIC";

#[test]
fn a_panic_is_reported_and_waits_for_no_reader() {
    if std::env::var_os(PANIC).is_some() {
        return panic_in_a_thread();
    }
    let (mut reader, writer) = io::pipe().unwrap();
    assert!(run(writer.into()).success());
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    let told = "thread worker-7 panicked: odd\\n\\u{1b}[2J (";
    assert!(said.lines().any(|line| line.starts_with(told)), "{said}");

    let (_reader, mut writer) = io::pipe().unwrap();
    writer.write_all(&[b'x'; PIPE_BYTES]).unwrap();
    assert!(run(writer.into()).success());
}

fn panic_in_a_thread() {
    output::tell_panics();
    output::start_queue().unwrap();
    let worker = std::thread::Builder::new().name("worker-7".to_owned());
    let panicked = worker.spawn(|| panic!("odd\n\u{1b}[2J")).unwrap().join();
    assert!(panicked.is_err());
    output::finish_queue();
}

fn run(stderr: Stdio) -> ExitStatus {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_panic_is_reported_and_waits_for_no_reader", "--nocapture"])
        .env(PANIC, "1")
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .unwrap();
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if start.elapsed() > HANG {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the panic waits for a reader");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

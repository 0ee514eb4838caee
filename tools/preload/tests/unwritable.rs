//! polldisk with a standard error that cannot be written to: it still serves, and ends at a signal.

mod rig;

use std::fs::File;
use std::io::{self, Read, Write};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;

use polldisk::control::admin::client::request;
use polldisk::control::admin::protocol::{Attach, Detach, Request};
use polldisk::sim::blkfront::device::Options;
use polldisk::sim::blkfront::xenbus::Xenbus;
use polldisk::sim::{Domain, StandIn};
use polldisk::units::VbdId;
use rig::Running;

const GUEST: u32 = 5;
const VBD: VbdId = VbdId(51712);

/// Capacity of a pipe: Linux's default.
const PIPE_BYTES: usize = 64 * 1024;

fn serve_with(stderr: Stdio) -> ExitStatus {
    serve(|mut command| {
        command.stderr(stderr);
        command
    })
}

/// Lets a guest come and go, which makes log lines, then sends SIGTERM. Returns polldisk's exit status.
fn serve(set_up: impl FnOnce(Command) -> Command) -> ExitStatus {
    serve_through(set_up, |_| ())
}

/// [`serve`] with something that happens before the guest comes.
fn serve_through(
    set_up: impl FnOnce(Command) -> Command,
    happens: impl FnOnce(&Running),
) -> ExitStatus {
    let stand_in = StandIn::start_temporary().unwrap();
    let guest = Arc::new(stand_in.create_domain(rig::domid(GUEST), 512).unwrap());
    let admin = stand_in.folder().join("admin.sock");
    let mut command = rig::on(&stand_in, false, rig::polldisk().as_os_str());
    command.args(["serve", "--log", "debug", "--admin"]).arg(&admin);
    let mut daemon = Running(set_up(command).stdin(Stdio::null()).spawn().unwrap());
    rig::until("polldisk answers", || {
        assert_running(&mut daemon);
        request(&admin, &Request::List).is_ok()
    });
    happens(&daemon);
    for _ in 0..20 {
        let attach = Attach {
            domid: GUEST,
            vdev: "xvda".into(),
            target: "null:1G".into(),
            ..Attach::default()
        };
        request(&admin, &Request::Attach(attach)).unwrap();
        connect_and_close(&guest);
        let detach = Detach { domid: GUEST, vdev: "xvda".into(), force: false };
        request(&admin, &Request::Detach(detach)).unwrap();
        assert_running(&mut daemon);
    }
    rig::signal(&daemon.0, "-TERM");
    rig::ended(&mut daemon.0)
}

fn connect_and_close(guest: &Arc<Domain>) {
    let xenbus = Xenbus::open(guest, VBD).unwrap();
    let (device, _) = xenbus.connect(guest, Options::default()).unwrap();
    xenbus.close(device).unwrap();
}

/// Asserts that the daemon has not ended by itself.
fn assert_running(daemon: &mut Running) {
    assert_eq!(daemon.0.try_wait().unwrap(), None, "it has ended");
}

#[test]
fn polldisk_serves_on_if_its_log_is_on_a_full_filesystem() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    assert!(serve_with(full.into()).success());
}

#[test]
fn polldisk_serves_on_if_the_reader_of_its_log_has_ended() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    assert!(serve_with(writer.into()).success());
}

#[test]
fn polldisk_serves_on_if_its_terminal_goes_away() {
    let (reader, writer) = io::pipe().unwrap();
    let with_terminal = |mut command: Command| {
        command.stderr(writer);
        command
    };
    let status = serve_through(with_terminal, |daemon| {
        drop(reader);
        rig::signal(&daemon.0, "-HUP");
    });
    assert!(status.success());
}

#[test]
fn polldisk_serves_on_without_a_standard_error() {
    let status = serve(|command| {
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec \"$0\" \"$@\" 2>&-"]);
        shell.arg(command.get_program()).args(command.get_args());
        shell
    });
    assert!(status.success());
}

#[test]
fn polldisk_serves_on_if_nobody_reads_its_log() {
    let (_reader, mut writer) = io::pipe().unwrap();
    writer.write_all(&[b'x'; PIPE_BYTES]).unwrap();
    assert!(serve_with(writer.into()).success());
}

#[test]
fn polldisk_logs_from_its_start_to_its_end() {
    let (mut reader, writer) = io::pipe().unwrap();
    let log = std::thread::spawn(move || {
        let mut log = String::new();
        reader.read_to_string(&mut log).map(|_| log)
    });
    assert!(serve_with(writer.into()).success());
    let log = log.join().unwrap().unwrap();
    let lines: Vec<&str> = log.lines().collect();
    assert!(lines.first().is_some_and(|line| line.contains("starting")), "{log}");
    assert!(lines.last().is_some_and(|line| line.contains("ended")), "{log}");
    // No structures in Rust's debug format.
    assert!(!log.contains(['{', '[']), "{log}");
}

//! `blkload` with polldisk, in a process of its own on the stand-in, and with backends that fail.

mod neighbours;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

/// The backend, which is an example: `cargo test` builds it, `cargo test --test` does not.
fn backend() -> PathBuf {
    let examples = Path::new(env!("CARGO_BIN_EXE_blkload")).with_file_name("examples");
    examples.join("polldisk-on-stand-in")
}

fn blkload(options: &str, command: &[&str]) -> Output {
    blkload_after("--warmup 0.05", options, command)
}

/// Loads that run at the same time would slow each other down.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn blkload_after(warmup: &str, options: &str, command: &[&str]) -> Output {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let short = "--seconds 0.2 --samples 2 --json -";
    let separator: &[&str] = if command.is_empty() { &[] } else { &["--"] };
    Command::new(env!("CARGO_BIN_EXE_blkload"))
        .args(warmup.split_whitespace())
        .args(short.split_whitespace())
        .args(options.split_whitespace())
        .args(separator)
        .args(command)
        .output()
        .unwrap()
}

fn json(output: &Output) -> Value {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn error(output: &Output) -> String {
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Measures polldisk with one worker.
fn polldisk(options: &str) -> Value {
    polldisk_with(options, &[])
}

fn polldisk_with(options: &str, more: &[&str]) -> Value {
    let backend = backend();
    let command = [&[backend.to_str().unwrap(), "--workers", "1", "--log", "warn"], more].concat();
    json(&blkload(options, &command))
}

fn number(json: &Value, pointer: &str) -> f64 {
    let value = json.pointer(pointer).and_then(Value::as_f64);
    value.unwrap_or_else(|| panic!("{pointer}: {json:#}"))
}

/// Asserts what is true of every successful run.
fn assert_sound(json: &Value) {
    assert_eq!(number(json, "/errors"), 0.0);
    let ios = number(json, "/total/ios");
    assert!(ios > 0.0, "{json:#}");
    assert_eq!(ios, number(json, "/samples/0/ios") + number(json, "/samples/1/ios"));
    assert!(number(json, "/total/backend/cpu_us_per_io") > 0.0);
    assert!(number(json, "/total/backend/rss_bytes") > 0.0);
    assert!(number(json, "/total/load_cpu_us_per_io") > 0.0);
    let latency = |name: &str| number(json, &format!("/total/latency/{name}"));
    assert!(latency("min_ns") > 0.0 && latency("min_ns") <= latency("p50_ns"));
    assert!(latency("p50_ns") <= latency("p99_ns") && latency("p99_ns") <= latency("max_ns"));
}

#[test]
fn a_null_disk_is_measured_with_every_kind_of_waiting() {
    for wait in ["--wait busy", "--wait block", "--wait block --spin-us 20"] {
        let json = polldisk(&format!("--target null:1G --depth 8 --read 70 {wait}"));
        assert_sound(&json);
        assert_eq!(json["backend"]["kind"], "child");
        assert_eq!(json["disks"][0]["disk"], "1:xvda");
        assert_eq!(json["disks"][0]["persistent"], true);
        let (reads, writes) = ("/total/read_latency/count", "/total/write_latency/count");
        assert!(number(&json, reads) > number(&json, writes), "{json:#}");
        let noticed = number(&json, "/total/notifications_received_per_io");
        assert_eq!(noticed > 0.0, wait != "--wait busy", "{wait}: {noticed}");
    }
}

#[test]
fn files_are_measured_on_two_disks_with_two_rings_each() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for n in 1..=2 {
        let file = std::fs::File::create(folder.path().join(format!("{n}.img"))).unwrap();
        file.set_len(16 << 20).unwrap();
    }
    // A buffer whose first request is a read holds the file's zeroes from then on. With this many buffers,
    // some are certain to write other data.
    let options = format!(
        "--target raw:{}/{{n}}.img --disks 2 --queues 2 --depth 32 --read 50 --sequential --size 8M",
        folder.path().display()
    );
    let json = polldisk_with(&options, &["--max-queues", "2"]);
    assert_sound(&json);
    for disk in [0, 1] {
        assert_eq!(number(&json, &format!("/disks/{disk}/queues")), 2.0);
        assert_eq!(number(&json, &format!("/disks/{disk}/sectors")), f64::from(16 << 11));
    }
    assert_eq!(json["disks"][1]["disk"], "1:xvdb");
    // Both files were written, but not behind --size.
    for n in 1..=2 {
        let data = std::fs::read(folder.path().join(format!("{n}.img"))).unwrap();
        assert!(data[..8 << 20].iter().any(|byte| *byte != 0));
        assert!(data[8 << 20..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn frontends_of_other_kinds_are_measured_too() {
    let json = polldisk("--target null:1G --no-persistent --protocol x86_32 --domains 2 --disks 3");
    assert_sound(&json);
    assert_eq!(json["disks"][0]["persistent"], false);
    assert_eq!(json["disks"][0]["protocol"], "x86_32");
    assert_eq!(json["disks"][1]["disk"], "2:xvda");
}

#[test]
fn indirect_requests_move_large_blocks() {
    let json = polldisk("--target null:1G --block-size 1M --depth 40 --ring-order 2");
    assert_sound(&json);
    assert_eq!(json["disks"][0]["indirect"], true);
    assert_eq!(
        (number(&json, "/disks/0/depth"), number(&json, "/disks/0/ring_order")),
        (40.0, 2.0)
    );
}

#[test]
fn a_schedule_is_kept_to_the_last_request() {
    for wait in ["busy", "block"] {
        let json = polldisk(&format!("--target null:1G --rate 1000 --depth 32 --wait {wait}"));
        assert_sound(&json);
        // On a busy machine some requests may start late, but none may be left out.
        let due = number(&json, "/schedule/seconds") * 1000.0;
        let (started, unsent) = ("/schedule/started", "/schedule/unsent");
        let accounted = number(&json, started) + number(&json, unsent);
        assert!((due - accounted).abs() <= 1.0, "{accounted} of {due}: {json:#}");
        assert!(number(&json, "/total/ios") <= number(&json, started));
    }
}

#[test]
fn the_load_measures_itself() {
    let output = blkload("--echo --wait busy --queues 2 --ring-order 1 --depth 64", &[]);
    let json = json(&output);
    assert_eq!(json["backend"]["kind"], "echo");
    assert_eq!(json["total"]["backend"], Value::Null);
    assert_eq!(number(&json, "/disks/0/queues"), 2.0);
    assert!(number(&json, "/total/ios") > 0.0);
}

#[test]
fn features_that_a_backend_lacks_are_named_and_not_used() {
    let backend = backend();
    let command = [
        backend.to_str().unwrap(),
        "--workers",
        "1",
        "--max-ring-page-order",
        "0",
        "--data-path",
        "copy",
        "--max-indirect-segments",
        "0",
    ];
    let output = blkload("--target null:1G --ring-order 3 --depth 200 --queues 2", &command);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    let json = json(&output);
    assert_eq!((number(&json, "/disks/0/depth"), number(&json, "/disks/0/queues")), (32.0, 1.0));
    for line in [
        "does not offer --queues 2: 1 is used",
        "does not offer --ring-order 3: 0 is used",
        "does not offer --depth 200: 32 is used",
        "does not offer persistent grants",
    ] {
        assert!(told.contains(line), "{line}: {told}");
    }
    let told = error(&blkload("--target null:1G --block-size 1M", &command));
    assert!(told.contains("give --block-size 44K or less"), "{told}");
}

#[test]
fn the_error_names_a_backend_that_refuses_or_ends_or_never_comes() {
    let backend = backend();
    let backend = backend.to_str().unwrap();
    let told = error(&blkload("--target raw:/no/such/file", &[backend]));
    assert!(
        told.contains("the backend reports for disk 1:xvda: 2 ") && told.contains("/no/such/file"),
        "{told}"
    );
    let told = error(&blkload("--target null:1G", &["sh", "-c", "echo my last words; exit 7"]));
    assert!(
        told.contains("the backend ended (exit status: 7)") && told.contains("my last words"),
        "{told}"
    );
    let told = error(&blkload("--target null:1G --patience 0.1", &["sleep", "1000"]));
    assert!(told.contains("no connection within 0.1 s"), "{told}");
    assert!(
        told.contains("disk 1:xvda: the backend is at Initialising; it printed nothing"),
        "{told}"
    );
    let told = error(&blkload("--no-toolstack --patience 0.1", &["sleep", "1000"]));
    assert!(told.contains("disk 1:xvda: it is not attached to its domain"), "{told}");
    let told = error(&blkload("--target null:1G", &["/no/such/backend"]));
    assert!(told.contains("cannot start the backend /no/such/backend"), "{told}");
}

#[test]
fn requests_that_fail_make_the_run_fail() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("image");
    std::fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
    let backend = backend();
    // The file is truncated once the disk is connected, so reads beyond its end fail.
    let script = format!(
        "(sleep 0.5; truncate -s 4096 {path}) & exec {backend} --workers 1 --log error",
        path = path.display(),
        backend = backend.display()
    );
    let options = format!("--target raw:{}", path.display());
    let output = blkload_after("--warmup 2", &options, &["sh", "-c", &script]);
    let told = error(&output);
    assert!(told.contains("requests failed; the first was a read of sector"), "{told}");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(number(&json, "/errors") > 0.0, "the report still has figures");
}

#[test]
fn another_process_may_be_the_backend_and_be_measured() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let mut daemon = Command::new("sh")
        .args(["-c", "while [ ! -S $POLLDISK_STAND_IN/xenstore.sock ]; do sleep 0.01; done; exec $0 --workers 1"])
        .arg(backend())
        .env("POLLDISK_STAND_IN", &path)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let options = format!("--target null:1G --folder {} --pid {}", path.display(), daemon.id());
    let output = blkload(&options, &[]);
    let _ = daemon.kill();
    daemon.wait().unwrap();
    assert_sound(&json(&output));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains(&format!("POLLDISK_STAND_IN={}", path.display())), "{told}");
}

#[test]
fn a_backend_that_dies_under_load_ends_the_run() {
    let script = format!("(sleep 1; kill -9 $$) & exec {} --workers 1", backend().display());
    let output = blkload_after("--warmup 10000", "--target null:1G", &["sh", "-c", &script]);
    let told = error(&output);
    assert!(told.contains("the backend ended (signal: 9 (SIGKILL))"), "{told}");
}

#[test]
fn an_interrupt_ends_the_backend_too() {
    let folder = tempfile::tempdir().unwrap();
    let pid_file = folder.path().join("pid");
    let script =
        format!("echo $$ > {}; exec {} --workers 1", pid_file.display(), backend().display());
    let blkload = Command::new(env!("CARGO_BIN_EXE_blkload"))
        .args(["--target", "null:1G", "--seconds", "10000", "--", "sh", "-c", &script])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let backend = loop {
        match std::fs::read_to_string(&pid_file) {
            Ok(text) if text.ends_with('\n') => break text.trim().to_owned(),
            _ => std::thread::sleep(std::time::Duration::from_millis(5)),
        }
    };
    let kill =
        |pid: &str| Command::new("sh").args(["-c", &format!("kill {pid}")]).status().unwrap();
    assert!(kill(&blkload.id().to_string()).success());
    let told = error(&blkload.wait_with_output().unwrap());
    assert!(told.contains("interrupted"), "{told}");
    assert!(!Path::new("/proc").join(backend).exists());
}

#[test]
fn output_that_nobody_reads_ends_it_without_a_panic() {
    for form in ["--json=-", "--json=/dev/null"] {
        let mut blkload = Command::new(env!("CARGO_BIN_EXE_blkload"))
            .args(["--echo", "--wait", "busy", "--warmup", "0", "--seconds", "0.1", form])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(blkload.stdout.take());
        let output = blkload.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !told.contains("panicked"), "{told}");
    }
}

#[test]
fn without_xen_the_error_says_so() {
    let told = error(&blkload("--xen --vdev xvdz", &[]));
    assert!(
        told.contains("this machine does not run on Xen") || told.contains("/dev/xen/"),
        "{told}"
    );
}

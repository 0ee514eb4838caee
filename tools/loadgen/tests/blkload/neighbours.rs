//! Guests beside the measured disks.

use super::*;

const NEIGHBOURS: usize = 4;

/// Runs a polling load with 8 requests in flight beside four guests. Returns the report, and the part of it
/// for each guest.
fn beside(kind: &str, more: &[&str]) -> (Value, Vec<Value>) {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let options = format!(
        "--target null:1G --depth 8 --wait busy --neighbours {kind} --scratch {}",
        scratch.path().display()
    );
    let json = polldisk_with(&options, more);
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0, "files are left");
    assert_eq!((&json["errors"], json["disks"].as_array().unwrap().len()), (&0.into(), 1));
    assert_eq!(json["neighbours"]["kind"], kind);
    let guests = json["neighbours"]["guests"].as_array().unwrap().clone();
    let disks: Vec<_> = guests.iter().map(|guest| guest["disk"]["disk"].clone()).collect();
    assert_eq!(disks, ["2:xvda", "3:xvda", "4:xvda", "5:xvda"]);
    (json, guests)
}

/// Requests of all guests answered per second, as the report must say, too.
fn answered(json: &Value, guests: &[Value]) -> f64 {
    let sum: f64 = guests.iter().map(|guest| number(guest, "/iops")).sum();
    assert!((number(json, "/neighbours/iops") - sum).abs() < 1.0, "{json:#}");
    sum
}

#[test]
fn polite_neighbours_all_have_their_requests_answered() {
    let (json, guests) = beside("polite", &[]);
    assert_sound(&json);
    for guest in &guests {
        assert!(number(guest, "/iops") > 0.0 && number(guest, "/errors") == 0.0, "{json:#}");
        assert_eq!((&guest["disk"]["persistent"], &guest["in_flight"]), (&true.into(), &8.into()));
    }
    // Each of them asks for as much as the load, and the load's thread delays none of them.
    assert!(answered(&json, &guests) > number(&json, "/total/iops"), "{json:#}");
}

/// The backend may answer any request first, but each guest must keep its ring full.
#[test]
fn hostile_neighbours_press_at_full_depth() {
    for (kind, in_flight, indirect) in [
        ("copies", 32, true),
        ("indirect", 512, true),
        ("flushes", 512, false),
        ("discards", 512, false),
    ] {
        let (json, guests) = beside(kind, &[]);
        assert!(answered(&json, &guests) > 0.0, "{kind}: {json:#}");
        for guest in &guests {
            assert_eq!(guest["does"], kind);
            assert_eq!(number(guest, "/in_flight"), f64::from(in_flight), "{json:#}");
            assert_eq!(guest["disk"]["indirect"], indirect);
            assert_eq!(guest["disk"]["persistent"], kind != "copies");
            assert_eq!(number(guest, "/errors"), 0.0);
        }
    }
}

#[test]
fn a_storm_of_notifications_has_no_request() {
    let (json, guests) = beside("storm", &[]);
    assert_eq!(answered(&json, &guests), 0.0);
    for guest in &guests {
        assert!(number(guest, "/notifications_sent_per_s") > 0.0, "{json:#}");
        assert_eq!(number(guest, "/in_flight"), 0.0);
    }
}

#[test]
fn neighbours_may_fail_although_the_measured_load_may_not() {
    let (json, guests) = beside("indirect", &["--max-indirect-segments", "0"]);
    assert!(guests.iter().any(|guest| number(guest, "/errors") > 0.0), "{json:#}");
}

/// The worst neighbours are of four different kinds, with or without hung storage.
#[test]
fn the_worst_neighbours_each_do_something_else() {
    let (json, guests) = beside("worst", &[]);
    let mut deeds: Vec<_> = guests.iter().filter_map(|guest| guest["does"].as_str()).collect();
    deeds.sort_unstable();
    deeds.dedup();
    assert_eq!(deeds.len(), NEIGHBOURS, "{json:#}");
}

/// Loop devices and mounts that are left of files below a folder.
fn left_below(folder: &Path) -> Vec<String> {
    let folder = folder.to_str().unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let mounts = mounts.lines().filter(|line| line.contains(folder)).map(str::to_owned);
    let devices = std::fs::read_dir("/sys/block").unwrap().filter_map(|device| {
        let file = device.unwrap().path().join("loop/backing_file");
        std::fs::read_to_string(file).ok().filter(|name| name.contains(folder))
    });
    mounts.chain(devices).collect()
}

/// Whether this machine can make storage that hangs. Prints a message if it can't.
fn hangs(output: &Output, test: &str) -> bool {
    let told = String::from_utf8_lossy(&output.stderr);
    let can = !told.contains("cannot make storage that hangs");
    if !can {
        eprintln!("SKIPPED {test}: {told}");
    }
    can
}

#[test]
fn storage_that_never_answers_is_undone_at_the_end() {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let options = format!(
        "--target null:1G --depth 8 --wait busy --neighbours hung --scratch {}",
        scratch.path().display()
    );
    let backend = backend();
    let output = blkload(&options, &[backend.to_str().unwrap(), "--workers", "1"]);
    if !hangs(&output, "storage_that_never_answers_is_undone_at_the_end") {
        return;
    }
    let json = json(&output);
    for guest in json["neighbours"]["guests"].as_array().unwrap() {
        assert_eq!((number(guest, "/iops"), number(guest, "/in_flight")), (0.0, 512.0));
    }
    assert_eq!(left_below(scratch.path()), Vec::<String>::new());
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
}

#[test]
fn storage_that_never_answers_is_undone_even_if_the_run_is_killed() {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    for signal in ["TERM", "INT", "KILL"] {
        let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let up = scratch.path().join("up");
        let script = format!("touch {}; exec {} --workers 1", up.display(), backend().display());
        let mut blkload = Command::new(env!("CARGO_BIN_EXE_blkload"))
            .args("--target null:1G --wait busy --neighbours hung --seconds 10000".split(' '))
            .arg("--scratch")
            .arg(scratch.path())
            .args(["--", "sh", "-c", &script])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while !up.exists() && blkload.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        // Gives the guests time to send requests to it.
        std::thread::sleep(std::time::Duration::from_millis(300));
        let made = left_below(scratch.path());
        let kill = format!("kill -{signal} {}", blkload.id());
        let _ = Command::new("sh").args(["-c", &kill]).stderr(Stdio::null()).status().unwrap();
        let output = blkload.wait_with_output().unwrap();
        assert!(!output.status.success());
        if !hangs(&output, "storage_that_never_answers_is_undone_even_if_the_run_is_killed") {
            return;
        }
        assert!(made.len() > NEIGHBOURS, "a mount and a device for each: {made:?}");
        // After SIGKILL the shell still has to undo it.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !left_below(scratch.path()).is_empty() {
            assert!(std::time::Instant::now() < end, "{signal}: {:?}", left_below(scratch.path()));
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

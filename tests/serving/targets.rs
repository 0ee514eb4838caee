//! What targets may and may not name, with which messages; and `polldisk check-target`.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use polldisk::backing::{Access, Backing};

use crate::host::{self, folder};
use crate::rig::{IMAGE_BYTES, Rig, raw};

/// Opens a target for nobody in particular.
fn open(target: &str, read_only: bool) -> Result<Backing, String> {
    host::open(target, &Access { read_only, ..Access::default() })
}

/// Asserts that writers and readers are refused, with one-line reasons that contain all of `parts`.
fn is_refused(target: &str, parts: &[&str]) {
    for read_only in [false, true] {
        let reason = host::is_refused(open(target, read_only), parts);
        assert!(!reason.contains(char::is_control), "{reason:?}");
    }
}

#[test]
fn a_target_that_is_not_storage_is_refused_with_a_remedy() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    assert!(Command::new("mkfifo").arg(path("fifo")).status().unwrap().success());
    let _socket = UnixListener::bind(path("socket")).unwrap();
    std::os::unix::fs::symlink("nowhere.img", path("dangling")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", path("link-to-device")).unwrap();
    host::file(&path("empty"), 0);
    host::file(&path("file"), IMAGE_BYTES);
    for (name, parts) in [
        ("fifo", &["it is a FIFO", "name a regular file or a block device"][..]),
        ("socket", &["it is a socket"]),
        ("dangling", &["it is a link to nowhere.img, which does not exist", "correct the link"]),
        ("link-to-device", &["it is a character device"]),
        ("", &["it is a directory"]),
        ("empty", &["no whole sector", "truncate -s"]),
        ("none", &["it does not exist"]),
        ("file/below", &["below"]),
        ("two\nlines", &["two\\nlines", "does not exist"]),
    ] {
        is_refused(&raw(&path(name)), parts);
    }
    for (target, parts) in [
        ("raw:/dev/null", &["it is a character device"][..]),
        ("raw:/dev/fd/0", &["procfs or sysfs", "name the file"]),
        ("raw:/proc/self/fd/0", &["procfs or sysfs"]),
        ("raw:/proc/version", &["procfs or sysfs"]),
        ("raw:/sys/kernel/uevent_seqnum", &["procfs or sysfs"]),
        ("raw:/a\0b", &["NUL"]),
        ("raw:disk.img", &["not absolute"]),
    ] {
        is_refused(target, parts);
    }
    let long = format!("raw:/{}", "a".repeat(300));
    is_refused(&long, &["aaa"]);
}

#[test]
fn any_name_that_a_file_can_have_works() {
    let rig = Rig::start();
    for name in [
        "a,b:c",
        "with space",
        "Gerät-日本.img",
        "tab\there",
        "line\nbreak",
        "back\\slash",
        "$(x)'\"",
    ] {
        let path = rig.image(name);
        let guest = rig.guest(1, &raw(&path));
        let device = guest.connect(polldisk::sim::blkfront::device::Options::default());
        assert_eq!(rig.disk(1).unwrap().target, raw(&path));
        guest.close(device);
        rig.detach_by_force(1);
    }
}

#[test]
fn an_immutable_file_can_only_be_read() {
    let folder = folder();
    let path = folder.path().join("fixed.img");
    host::file(&path, IMAGE_BYTES);
    let fixed = Command::new("chattr").arg("+i").arg(&path).output();
    if !fixed.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: no file can be made immutable here");
        return;
    }
    let (writer, reader) = (open(&raw(&path), false), open(&raw(&path), true));
    assert!(Command::new("chattr").arg("-i").arg(&path).status().unwrap().success());
    assert!(writer.is_err() && reader.is_ok());
}

/// What `polldisk check-target` prints about a target; an error if it refuses the target.
fn verdict(arguments: &[&str], target: &str) -> Result<String, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polldisk"));
    let output = command.arg("check-target").args(arguments).arg(target).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    if output.status.success() { Ok(text) } else { Err(text) }
}

#[test]
fn check_target_says_what_the_daemon_would_say() {
    let folder = folder();
    let path = folder.path().join("disk.img");
    host::file(&path, IMAGE_BYTES);
    for mode in ["r", "w", "r!", "w!"] {
        assert_eq!(verdict(&["--mode", mode], &raw(&path)), Ok(String::new()));
    }
    assert_eq!(verdict(&[], "null:1G"), Ok(String::new()));
    for target in ["raw:/nowhere.img", "vhd:/a", "raw,x:/a", "/dev/null"] {
        let said = verdict(&[], target).unwrap_err();
        let daemons = open(target, false).map(drop).unwrap_err();
        assert!(said.contains(&daemons), "{said}\n{daemons}");
    }
    let user = Access { user: "disk xvda of domain 5".to_owned(), ..Access::default() };
    let held = host::open(&raw(&path), &user).unwrap();
    let said = verdict(&["--mode", "w"], &raw(&path)).unwrap_err();
    assert!(said.contains(&format!("process {}", std::process::id())), "{said}");
    drop(held);
    assert_eq!(verdict(&["--mode", "w"], &raw(&path)), Ok(String::new()), "it holds no lock");
    host::file(&path, IMAGE_BYTES + 1);
    assert!(verdict(&[], &raw(&path)).unwrap().contains("last 1 bytes"));
    assert!(verdict(&["--mode", "x"], "null:1G").unwrap_err().contains("--mode"));
}

#[test]
fn check_target_asks_the_daemon_that_already_serves_the_target() {
    let rig = Rig::start();
    let path = rig.image("served.img");
    let guest = rig.guest(1, &raw(&path));
    let device = guest.connect(polldisk::sim::blkfront::device::Options::default());
    let admin = rig.admin().to_str().unwrap();
    let disk = |domid| ["--admin", admin, "--domid", domid, "--vdev", "xvda"];
    assert_eq!(verdict(&disk("1"), &raw(&path)), Ok(String::new()));
    let said = verdict(&disk("2"), &raw(&path)).unwrap_err();
    assert!(said.contains("served.img"), "{said}");
    let other: PathBuf = rig.image("other.img");
    assert_eq!(verdict(&disk("1"), &raw(Path::new(&other))), Ok(String::new()));
    guest.close(device);
}

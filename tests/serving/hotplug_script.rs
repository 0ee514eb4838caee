//! `block-polldisk`, as libxl runs it, with Xen's own tools on the stand-in's xenstore.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Output};

use polldisk::sim::{StandIn, XENSTORE_SOCKET};
use polldisk::xen::Platform;
use polldisk::xen::store::StoreClient;
use xenstore_rs::Xs;

use crate::host;
use crate::rig::{IMAGE_BYTES, Rig, VBD, raw, toolstack_disk, until};

/// Names that shells and the tools of xenstore could mangle.
const NAMES: [&str; 7] = [
    "plain.img",
    "Gerät-日本.img",
    "a b\tc",
    "back\\slash\\x41",
    "q'u\"o$(t)`e`*",
    "line\nbreak",
    "end\n",
];

fn area(domid: u32) -> String {
    format!("/local/domain/0/backend/vbd/{domid}/{VBD}")
}

/// Whether Xen's tools are installed.
fn has_tools() -> bool {
    // Not `host::run`: without arguments they print their usage and fail.
    host::is_there("xenstore-read") && host::is_there("xenstore-write")
}

fn run(sockets: &Path, domid: u32, command: &str) -> Output {
    let polldisk = Path::new(env!("CARGO_BIN_EXE_polldisk")).parent().unwrap();
    let path = format!("{}:{}", polldisk.display(), std::env::var("PATH").unwrap());
    Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tools/lab/hotplug/block-polldisk"))
        .arg(command)
        .env("PATH", path)
        .env("XENSTORED_PATH", sockets.join(XENSTORE_SOCKET))
        .env("XENBUS_PATH", area(domid))
        .output()
        .unwrap()
}

fn add(sockets: &Path, domid: u32) -> Result<(), String> {
    let output = run(sockets, domid, "add");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(text) }
}

/// Makes the nodes of a disk that names this script.
fn describe(dom0: &StoreClient, domid: u32, target: &str, mode: &str) {
    let script = ("script", "/etc/xen/scripts/block-polldisk");
    toolstack_disk(dom0, domid, &[("params", target), ("mode", mode), script]);
}

#[test]
fn the_script_says_what_polldisk_would_say_of_any_name() {
    if !has_tools() {
        return;
    }
    let stand_in = StandIn::start_temporary().unwrap();
    let store = stand_in.platform().open_store().unwrap();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let node = |node: &str| store.read(&format!("{}/{node}", area(1))).map(String::from).ok();
    for name in NAMES {
        let path = folder.path().join(name);
        for target in
            [raw(&path), path.to_str().unwrap().to_owned(), format!("aio:{}", path.display())]
        {
            describe(&store, 1, &target, "w");
            let said = add(stand_in.folder(), 1).unwrap_err();
            assert!(said.contains("does not exist"), "{said}");
            assert_eq!(node("hotplug-status").as_deref(), Some("error"));
            assert!(node("hotplug-error").unwrap().contains("does not exist"));
            store.rm(&format!("{}/hotplug-status", area(1))).unwrap();
            host::file(&path, IMAGE_BYTES);
            assert_eq!(add(stand_in.folder(), 1), Ok(()), "{name:?}");
            assert_eq!(node("hotplug-status").as_deref(), Some("connected"));
            store.rm(&area(1)).unwrap();
            std::fs::remove_file(&path).unwrap();
        }
    }
    describe(&store, 1, "raw,no-option:/a", "w");
    assert!(add(stand_in.folder(), 1).unwrap_err().contains("there is no option \"no-option\""));
    assert!(run(stand_in.folder(), 1, "remove").status.success());
}

#[test]
fn the_script_leaves_bytes_that_are_not_text_as_they_are() {
    if !has_tools() {
        return;
    }
    let stand_in = StandIn::start_temporary().unwrap();
    let store = stand_in.platform().open_store().unwrap();
    describe(&store, 1, "raw:/x", "w");
    let written = Command::new("xenstore-write")
        .env("XENSTORED_PATH", stand_in.folder().join(XENSTORE_SOCKET))
        .args(["-R", &format!("{}/params", area(1))])
        .arg(OsStr::from_bytes(b"raw:/srv/\xff\xfe.img"))
        .status();
    assert!(written.unwrap().success());
    let said = add(stand_in.folder(), 1).unwrap_err();
    assert!(said.contains("UTF-8"), "{said}");
}

#[test]
fn the_script_passes_on_what_the_daemon_found() {
    if !has_tools() {
        return;
    }
    let rig = Rig::start();
    for (domid, name) in (1..).zip(NAMES) {
        let path = rig.image(name);
        let _domain = rig.domain(domid);
        describe(&rig.dom0, domid, &raw(&path), "w");
        let node = |node: &str| rig.dom0.read(&format!("{}/{node}", area(domid))).ok();
        until("the backend is in InitWait", || node("state").as_deref() == Some("2"));
        assert_eq!(add(rig.sockets(), domid), Ok(()), "polldisk's own locks do not get in the way");
        assert_eq!(node("hotplug-status").as_deref(), Some("connected"));
    }
    let _domain = rig.domain(20);
    describe(&rig.dom0, 20, "raw:/nowhere.img", "w");
    let node = |node: &str| rig.dom0.read(&format!("{}/{node}", area(20))).ok();
    until("the daemon has refused it", || node("hotplug-status").as_deref() == Some("error"));
    assert!(add(rig.sockets(), 20).is_err());
    assert!(node("hotplug-error").unwrap().contains("/nowhere.img"));
}

#[test]
fn disks_share_an_image_if_their_mode_says_so() {
    let rig = Rig::start();
    let path = rig.image("cluster.img");
    let node = |domid, node: &str| rig.dom0.read(&format!("{}/{node}", area(domid))).ok();
    let _domains = [1, 2, 3].map(|domid| rig.domain(domid));
    for domid in [1, 2] {
        describe(&rig.dom0, domid, &raw(&path), "w!");
        until("the backend is in InitWait", || node(domid, "state").as_deref() == Some("2"));
        assert_eq!(node(domid, "hotplug-error"), None);
    }
    describe(&rig.dom0, 3, &raw(&path), "w");
    until("the third is refused", || node(3, "hotplug-status").as_deref() == Some("error"));
    let error = node(3, "hotplug-error").unwrap();
    assert!(error.contains("disk xvda of domain") && error.contains("shareable"), "{error}");
}

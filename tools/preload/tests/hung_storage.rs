//! Storage that never answers: the daemon still ends, and names the requests that are left. A check of a
//! target does not hang either.

#[path = "../../../tests/host/mod.rs"]
mod host;
mod rig;

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use host::{Filesystem, Frozen, LoopDevice};
use polldisk::blkif::op;
use polldisk::control::admin::client::request;
use polldisk::control::admin::protocol::{Attach, Request};
use polldisk::sim::StandIn;
use polldisk::sim::blkfront::device::Options;
use polldisk::sim::blkfront::xenbus::Xenbus;
use polldisk::units::VbdId;

const GUEST: u32 = 5;
const VBD: VbdId = VbdId(51712);

/// A block device whose writes never end once it is frozen. Its file is on a filesystem of its own.
struct HungDevice {
    // Dropped in this order: thawed, detached, unmounted, removed.
    frozen: Option<Frozen>,
    device: LoopDevice,
    filesystem: Filesystem,
    _folder: tempfile::TempDir,
}

impl HungDevice {
    /// Makes one; `None`, with a message, if the machine can't. That is a failure if all tools are required.
    fn new() -> Option<HungDevice> {
        let hung = HungDevice::make();
        assert!(hung.is_some() || !host::is_required(), "no storage can be made to hang");
        hung
    }

    fn make() -> Option<HungDevice> {
        let folder = host::folder();
        let filesystem = Filesystem::new("ext4", folder.path(), 64 << 20, &[])?;
        let disk = filesystem.folder().join("disk.img");
        host::file(&disk, 4 << 20);
        let device = LoopDevice::over(&disk, &[])?;
        Some(HungDevice { frozen: None, device, filesystem, _folder: folder })
    }

    fn freeze(&mut self) {
        self.frozen = Some(host::freeze(self.filesystem.folder()));
    }
}

#[test]
fn a_daemon_beside_hung_storage_ends_and_names_the_requests_that_were_left() {
    let Some(mut hung) = HungDevice::new() else { return };
    let stand_in = StandIn::start_temporary().unwrap();
    let guest = Arc::new(stand_in.create_domain(rig::domid(GUEST), 512).unwrap());
    let admin = stand_in.folder().join("admin.sock");
    let mut command = rig::on(&stand_in, false, rig::polldisk().as_os_str());
    command.args(["serve", "--backend-type", "vbd", "--admin", admin.to_str().unwrap()]);
    let mut daemon = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    rig::until("polldisk answers", || request(&admin, &Request::List).is_ok());
    let target = hung.device.target("");
    let attach = Attach { domid: GUEST, vdev: "xvda".into(), target, ..Attach::default() };
    request(&admin, &Request::Attach(attach)).unwrap();
    let xenbus = Xenbus::open(&guest, VBD).unwrap();
    let (mut frontend, _) = xenbus.connect(&guest, Options::default()).unwrap();

    hung.freeze();
    for sector in [0, 8, 16] {
        frontend.put(op::WRITE, sector, 4096);
    }
    frontend.publish().unwrap();
    let written =
        Path::new("/sys/block").join(hung.device.path.file_name().unwrap()).join("inflight");
    rig::until("the writes are under way", || {
        let text = std::fs::read_to_string(&written).unwrap();
        text.split_whitespace().nth(1).is_some_and(|writes| writes != "0")
    });
    // The first signal ends the daemon, the second one keeps it from waiting for storage.
    rig::signal(&daemon, "-TERM");
    rig::until("control has seen the first signal", || request(&admin, &Request::List).is_ok());
    rig::signal(&daemon, "-TERM");
    let status = rig::ended(&mut daemon);
    let mut said = String::new();
    daemon.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(!status.success(), "{said}");
    for part in [
        "vbd/5/51712 (xvda)".to_owned(),
        format!("target=\"{}\"", hung.device.target("")),
        "not answered by storage".to_owned(),
        "a write of 4096 bytes at byte 8192".to_owned(),
        "storage did not answer all requests".to_owned(),
    ] {
        assert!(said.contains(&part), "no {part} in its output:\n{said}");
    }
}

#[test]
fn a_check_of_a_target_on_hung_storage_ends_with_a_reason() {
    let Some(mut hung) = HungDevice::new() else { return };
    let image = hung.filesystem.folder().join("other.img");
    host::file(&image, 1 << 20);
    hung.freeze();
    let mut check = Command::new(rig::polldisk())
        .arg("check-target")
        .arg(&image)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = check.stderr.take().unwrap();
    let said = std::thread::spawn(move || {
        let mut said = String::new();
        stderr.read_to_string(&mut said).map(|_| said)
    });
    // A script that reads the output does not hang: its end of the pipe closes, too.
    rig::until("its output has ended", || said.is_finished());
    let status = rig::ended(&mut check);
    let said = said.join().unwrap().unwrap();
    assert!(!status.success(), "{said}");
    assert!(said.contains("other.img: it could not be opened within"), "{said}");
}

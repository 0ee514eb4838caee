//! Storage that never answers: the daemon ends all the same, and says what was left; nor does a check
//! of a target hang.

mod rig;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use polldisk::blkif::op;
use polldisk::control::admin::client::request;
use polldisk::control::admin::protocol::{Attach, Request};
use polldisk::sim::StandIn;
use polldisk::sim::blkfront::device::Options;
use polldisk::sim::blkfront::xenbus::Xenbus;
use polldisk::units::VbdId;

const GUEST: u32 = 5;
const VBD: VbdId = VbdId(51712);

/// A block device whose writes never end: its file lies on a filesystem that is frozen.
struct HungDevice {
    folder: tempfile::TempDir,
    device: Option<PathBuf>,
    frozen: bool,
}

impl HungDevice {
    /// `None`, loudly, on a machine that can't have one; a failure where `POLLDISK_REQUIRE_XEN_TOOLS=1`,
    /// as CI sets it.
    fn new() -> Option<HungDevice> {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut hung = HungDevice { folder, device: None, frozen: false };
        match hung.make() {
            Ok(()) => Some(hung),
            Err(reason) => {
                let required =
                    std::env::var("POLLDISK_REQUIRE_XEN_TOOLS").is_ok_and(|value| value == "1");
                assert!(!required, "no storage can be made to hang: {reason}");
                eprintln!("SKIPPED: no storage can be made to hang here: {reason}");
                None
            }
        }
    }

    fn mount_point(&self) -> PathBuf {
        self.folder.path().join("mounted")
    }

    fn make(&mut self) -> Result<(), String> {
        let filesystem = self.folder.path().join("filesystem.img");
        let made = File::create(&filesystem).and_then(|file| file.set_len(64 << 20));
        made.map_err(|error| error.to_string())?;
        let mounted = self.mount_point();
        std::fs::create_dir(&mounted).map_err(|error| error.to_string())?;
        tool("mkfs.ext4", &["-q".as_ref(), "-F".as_ref(), filesystem.as_ref()])?;
        tool("mount", &["-o".as_ref(), "loop".as_ref(), filesystem.as_ref(), mounted.as_ref()])?;
        let disk = mounted.join("disk.img");
        let made = File::create(&disk).and_then(|file| file.set_len(4 << 20));
        made.map_err(|error| error.to_string())?;
        let name = tool("losetup", &["--find".as_ref(), "--show".as_ref(), disk.as_ref()])?;
        self.device = Some(name.trim().into());
        Ok(())
    }

    fn freeze(&mut self) {
        tool("fsfreeze", &["-f".as_ref(), self.mount_point().as_ref()]).unwrap();
        self.frozen = true;
    }
}

impl Drop for HungDevice {
    fn drop(&mut self) {
        let mounted = self.mount_point();
        if self.frozen {
            let _ = tool("fsfreeze", &["-u".as_ref(), mounted.as_ref()]);
        }
        if let Some(device) = &self.device {
            let _ = tool("losetup", &["-d".as_ref(), device.as_ref()]);
        }
        let _ = tool("umount", &["-l".as_ref(), mounted.as_ref()]);
    }
}

/// What it prints, or why it failed.
fn tool(name: &str, arguments: &[&Path]) -> Result<String, String> {
    let output = Command::new(name).args(arguments).output();
    let output = output.map_err(|error| format!("{name}: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!("{name}: {}", String::from_utf8_lossy(&output.stderr))),
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
    let device = hung.device.clone().unwrap();
    let target = format!("raw:{}", device.display());
    let attach = Attach { domid: GUEST, vdev: "xvda".into(), target, ..Attach::default() };
    request(&admin, &Request::Attach(attach)).unwrap();
    let xenbus = Xenbus::open(&guest, VBD).unwrap();
    let (mut frontend, _) = xenbus.connect(&guest, Options::default()).unwrap();

    hung.freeze();
    for sector in [0, 8, 16] {
        frontend.put(op::WRITE, sector, 4096);
    }
    frontend.publish().unwrap();
    let written = Path::new("/sys/block").join(device.file_name().unwrap()).join("inflight");
    rig::until("the writes are under way", || {
        let text = std::fs::read_to_string(&written).unwrap();
        text.split_whitespace().nth(1).is_some_and(|writes| writes != "0")
    });
    // Once to end, and once more not to wait for as long as that may take.
    rig::signal(&daemon, "-TERM");
    rig::until("control has seen the first signal", || request(&admin, &Request::List).is_ok());
    rig::signal(&daemon, "-TERM");
    let status = rig::ended(&mut daemon);
    let mut said = String::new();
    daemon.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(!status.success(), "{said}");
    for part in [
        "vbd/5/51712 (xvda)".to_owned(),
        format!("target=\"raw:{}\"", device.display()),
        "not answered by storage".to_owned(),
        "a write of 4096 bytes at byte 8192".to_owned(),
        "storage did not answer all requests".to_owned(),
    ] {
        assert!(said.contains(&part), "it does not say {part}:\n{said}");
    }
}

#[test]
fn a_check_of_a_target_on_hung_storage_ends_with_a_reason() {
    let Some(mut hung) = HungDevice::new() else { return };
    let image = hung.mount_point().join("other.img");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
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
    // What a script reads ends, too: nothing that still hangs keeps it open.
    rig::until("it has said all", || said.is_finished());
    let status = rig::ended(&mut check);
    let said = said.join().unwrap().unwrap();
    assert!(!status.success(), "{said}");
    assert!(said.contains("other.img: it could not be opened within"), "{said}");
}

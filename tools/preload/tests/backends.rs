//! Whole backends as they are deployed, on the stand-in, with a guest that verifies every byte.

mod rig;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use polldisk::control::admin::client::request;
use polldisk::control::admin::protocol::{Attach, Request};
use polldisk::sim::blkfront::device::Options;
use polldisk::sim::blkfront::load::{Load, Runner};
use polldisk::sim::blkfront::xenbus::Xenbus;
use polldisk::sim::{Domain, StandIn};
use polldisk::units::VbdId;
use polldisk::xen::{NodeAccess, Nodes, Permission, Platform, Store};
use xenstore_rs::Xs;

const GUEST: u32 = 5;
const VBD: VbdId = VbdId(51712);
const IMAGE_BYTES: u64 = 4 << 20;
const REQUESTS: u64 = 2000;

/// A stand-in with one guest and an image on a filesystem that has O_DIRECT.
struct Bench {
    stand_in: StandIn,
    guest: Arc<Domain>,
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        let stand_in = StandIn::start_temporary().unwrap();
        let guest = Arc::new(stand_in.create_domain(rig::domid(GUEST), 512).unwrap());
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let bench = Bench { stand_in, guest, folder };
        File::create(bench.image()).unwrap().set_len(IMAGE_BYTES).unwrap();
        bench
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    /// Connects, reads and writes random blocks, reads everything back and disconnects.
    fn verify(&self, persistent: bool) {
        let xenbus = Xenbus::open(&self.guest, VBD).unwrap();
        let options = Options { persistent, ..Options::default() };
        let (mut device, disk) = xenbus.connect(&self.guest, options).unwrap();
        assert_eq!(disk.sectors.0 * 512, IMAGE_BYTES);
        let load = Load {
            seed: 1,
            block_bytes: 8192,
            depth: 32,
            read_percent: 50,
            flush_every: 100,
            sectors: 0..disk.sectors.0,
            zeroed: true,
            keeps_data: true,
        };
        let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
        let mut runner = Runner::new(load, &mut device);
        std::thread::scope(|scope| {
            let load = scope.spawn(|| runner.run(&stop, &done));
            rig::until("the guest has done its requests", || {
                done.load(Ordering::Relaxed) >= REQUESTS || load.is_finished()
            });
            stop.store(true, Ordering::Relaxed);
            load.join().unwrap().unwrap();
        });
        runner.read_all().unwrap();
        let report = runner.report();
        assert_eq!((report.errors, report.mismatches), (0, 0), "{report:?}");
        assert!(report.verified > 0, "{report:?}");
        xenbus.close(device).unwrap();
        assert_eq!(self.guest.mapped_grants(), 0);
    }

    /// Writes the nodes that libxl writes for QEMU's disks.
    fn write_toolstack_nodes(&self, params: &str) {
        let backend = format!("/local/domain/0/backend/qdisk/{GUEST}/{VBD}");
        let frontend = format!("/local/domain/{GUEST}/device/vbd/{VBD}");
        let (vbd, guest) = (VBD.to_string(), GUEST.to_string());
        let backends = [
            ("frontend", frontend.as_str()),
            ("frontend-id", &guest),
            ("params", params),
            ("type", "qdisk"),
            ("dev", "xvda"),
            ("mode", "w"),
            ("device-type", "disk"),
            ("removable", "0"),
            ("bootable", "1"),
            ("online", "1"),
            ("state", "1"),
        ];
        let frontends = [
            ("backend", backend.as_str()),
            ("backend-id", "0"),
            ("virtual-device", &vbd),
            ("device-type", "disk"),
            ("state", "1"),
        ];
        self.write_area(&backend, [0, GUEST], &backends);
        self.write_area(&frontend, [GUEST, 0], &frontends);
    }

    fn write_area(&self, area: &str, [owner, reader]: [u32; 2], nodes: &[(&str, &str)]) {
        let permissions = [(owner, NodeAccess::None), (reader, NodeAccess::Read)]
            .map(|(domid, access)| Permission { domid: rig::domid(domid), access });
        let store = self.stand_in.platform().open_store().unwrap();
        let written = store.atomically(|span| {
            span.mkdir(area)?;
            span.set_permissions(area, &permissions)?;
            nodes.iter().try_for_each(|(node, value)| span.write(&format!("{area}/{node}"), value))
        });
        written.unwrap();
    }
}

/// A backend's process. Dropping this ends it.
struct Backend(Child);

impl Backend {
    fn start(mut command: Command, arguments: &[&str]) -> Backend {
        command.args(arguments).stdin(Stdio::null()).stderr(Stdio::piped());
        Backend(command.spawn().unwrap())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
        let mut said = String::new();
        if let Some(Ok(_)) = self.0.stderr.take().map(|mut pipe| pipe.read_to_string(&mut said)) {
            eprintln!("{said}");
        }
    }
}

fn polldisk_serves(persistent: bool, system_calls: bool) {
    let bench = Bench::new();
    let admin = bench.stand_in.folder().join("admin.sock");
    let command = rig::on(&bench.stand_in, system_calls, rig::polldisk().as_os_str());
    let arguments = ["serve", "--backend-type", "vbd", "--admin", admin.to_str().unwrap()];
    let _backend = Backend::start(command, &arguments);
    rig::until("polldisk answers", || request(&admin, &Request::List).is_ok());
    let target = format!("raw:{}", bench.image().display());
    let attach = Attach { domid: GUEST, vdev: "xvda".into(), target, ..Attach::default() };
    request(&admin, &Request::Attach(attach)).unwrap();
    bench.verify(persistent);
}

#[test]
fn polldisk_serves_a_guest_through_its_real_device_code() {
    polldisk_serves(true, false);
}

#[test]
fn polldisk_copies_if_the_guest_keeps_no_grants() {
    polldisk_serves(false, true);
}

/// QEMU's command; `None` if QEMU is missing but not required.
fn qemu(bench: &Bench, system_calls: bool) -> Option<Command> {
    const PROGRAM: &str = "/usr/libexec/xen-qemu-system-i386";
    if !Path::new(PROGRAM).exists() {
        let required =
            std::env::var_os("POLLDISK_REQUIRE_XEN_TOOLS").is_some_and(|value| value == "1");
        assert!(!required, "{PROGRAM} is missing: install the package qemu-system-xen");
        eprintln!("SKIPPED: {PROGRAM} is missing (package qemu-system-xen)");
        return None;
    }
    let mut command = rig::on(&bench.stand_in, system_calls, PROGRAM.as_ref());
    command.args(["-machine", "xenpv", "-xen-attach", "-xen-domid", &GUEST.to_string()]);
    command.args("-nodefaults -no-user-config -vnc none -nographic -m 512".split(' '));
    Some(command)
}

#[test]
fn qemu_serves_a_disk_that_a_toolstack_wrote() {
    let bench = Bench::new();
    bench.write_toolstack_nodes(&format!("aio:{}", bench.image().display()));
    let Some(command) = qemu(&bench, false) else { return };
    let _backend = Backend::start(command, &[]);
    bench.verify(false);
}

#[test]
fn qemu_serves_a_disk_of_its_own_command_line() {
    let bench = Bench::new();
    let Some(command) = qemu(&bench, true) else { return };
    let image = format!(
        "driver=file,node-name=n0,filename={},cache.direct=on,aio=threads",
        bench.image().display()
    );
    let device = "xen-disk,drive=n0,vdev=xvda,iothread=io0";
    let _backend = Backend::start(
        command,
        &["-object", "iothread,id=io0", "-blockdev", &image, "-device", device],
    );
    bench.verify(true);
}

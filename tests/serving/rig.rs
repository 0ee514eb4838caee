//! The whole daemon on the stand-in: the real control loop, workers, io_uring and O_DIRECT files;
//! and guests for it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use polldisk::blkif::codec::{RawDirect, RawRequest, RawSegment};
use polldisk::blkif::features::Offer;
use polldisk::control::admin::client::request;
use polldisk::control::admin::protocol::{
    Attach, Detach, DiskReport, Eject, Insert, Reply, Request,
};
use polldisk::control::{self, ControlError, Ended};
use polldisk::msg::report_channel;
use polldisk::park::Doorbell;
use polldisk::patience::Policy;
use polldisk::sim::blkfront::device::{Device, Options};
use polldisk::sim::blkfront::load::{Load, Report, Runner};
use polldisk::sim::blkfront::xenbus::{Disk, Xenbus};
use polldisk::sim::{Domain, Gfn, SimXen, StandIn};
use polldisk::units::{DomId, GrantRef, VbdId};
use polldisk::worker::{WorkerThread, spawn_all};
use polldisk::xen::keys::XenbusState;
use polldisk::xen::store::StoreClient;
use polldisk::xen::{NodeAccess, Nodes, PageAccess, Permission, Platform, Store};
use xenstore_rs::Xs;

use crate::host;

/// Only a hang takes this long.
pub const HANG: Duration = Duration::from_secs(60);

/// The disk of every guest.
pub const VDEV: &str = "xvda";
pub const VBD: VbdId = VbdId(51712);

/// Bytes of an image: small enough to be read back whole after every test.
pub const IMAGE_BYTES: u64 = 4 << 20;

/// Memory of a guest: buffers for a full ring, the ring, and some pages for hostile requests.
const GUEST_PAGES: u32 = 512;

/// A running daemon with one worker, so that a guest that disturbs it disturbs all.
pub struct Rig {
    pub dom0: StoreClient,
    stand_in: StandIn,
    images: tempfile::TempDir,
    admin: PathBuf,
    stop: Doorbell,
    control: Option<JoinHandle<Result<Ended, ControlError>>>,
    workers: Vec<WorkerThread>,
}

impl Rig {
    pub fn start() -> Rig {
        Rig::with_workers(1)
    }

    /// With several workers, each of which may serve a ring of the same disk.
    pub fn with_workers(count: u16) -> Rig {
        let stand_in = StandIn::start_temporary().unwrap();
        let platform = stand_in.platform();
        let (reporter, reports) = report_channel().unwrap();
        let policy = Policy::UpTo(Duration::from_micros(50));
        let (senders, workers) =
            spawn_all(&platform, &vec![None; count.into()], policy, &reporter).unwrap();
        let admin = stand_in.folder().join("admin.sock");
        let config = control::Config {
            admin_path: Some(admin.clone()),
            offer: Offer { queues: count, ..Offer::default() },
            ..control::Config::default()
        };
        let dom0 = platform.open_store().unwrap();
        let stop = Doorbell::new().unwrap();
        let control = std::thread::Builder::new().name("control".to_owned()).spawn({
            let stop = stop.clone();
            move || control::run(&platform, &config, senders, reports, &stop)
        });
        let images = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let control = Some(control.unwrap());
        let rig = Rig { dom0, stand_in, images, admin, stop, control, workers };
        until("the admin socket answers", || request(&rig.admin, &Request::List).is_ok());
        rig
    }

    pub fn platform(&self) -> SimXen {
        self.stand_in.platform()
    }

    /// A file of zeroes.
    pub fn image(&self, name: &str) -> PathBuf {
        let path = self.images.path().join(name);
        host::file(&path, IMAGE_BYTES);
        path
    }

    /// Where the stand-in's sockets are.
    pub fn sockets(&self) -> &Path {
        self.stand_in.folder()
    }

    /// The daemon's socket.
    pub fn admin(&self) -> &Path {
        &self.admin
    }

    /// The folder of the images.
    pub fn images(&self) -> &Path {
        self.images.path()
    }

    pub fn attach(&self, domid: u32, target: &str, read_only: bool) {
        self.try_attach(domid, target, read_only).unwrap();
    }

    /// The same, but it may be refused: an error is the reason.
    pub fn try_attach(&self, domid: u32, target: &str, read_only: bool) -> Result<(), String> {
        let attach = Attach {
            domid,
            vdev: VDEV.into(),
            target: target.into(),
            read_only,
            ..Attach::default()
        };
        request(&self.admin, &Request::Attach(attach)).map(drop).map_err(|error| error.to_string())
    }

    /// A domain with a drive: read-only if it is a CD-ROM, empty if `target` is.
    pub fn drive(&self, domid: u32, target: &str, cdrom: bool) -> Guest {
        let domain = self.domain(domid);
        let (vdev, target) = (VDEV.into(), target.into());
        let attach = Attach { domid, vdev, target, cdrom, removable: true, read_only: false };
        request(&self.admin, &Request::Attach(attach)).unwrap();
        Guest::of(domain)
    }

    /// A function that changes a drive's medium from any thread and returns when that is done. An empty
    /// target ejects.
    pub fn changer(&self, domid: u32) -> impl Fn(&str) + Send + use<> {
        let change = self.try_changer(domid);
        move |target| change(target).unwrap()
    }

    /// The same, but it may be refused: an error is the reason.
    pub fn try_changer(&self, domid: u32) -> impl Fn(&str) -> Result<(), String> + Send + use<> {
        let admin = self.admin.clone();
        move |target| {
            let vdev = VDEV.into();
            let change = match target {
                "" => Request::Eject(Eject { domid, vdev }),
                target => Request::Insert(Insert { domid, vdev, target: target.into() }),
            };
            request(&admin, &change).map(drop).map_err(|error| error.to_string())
        }
    }

    pub fn detach_by_force(&self, domid: u32) {
        let detach = Detach { domid, vdev: VDEV.into(), force: true };
        request(&self.admin, &Request::Detach(detach)).unwrap();
    }

    /// The disk of a guest, as `polldisk list` reports it.
    pub fn disk(&self, domid: u32) -> Option<DiskReport> {
        match request(&self.admin, &Request::List).unwrap() {
            Reply::Disks { disks } => disks.into_iter().find(|disk| disk.domid == domid),
            other => panic!("{other:?}"),
        }
    }

    /// A domain without a disk.
    pub fn domain(&self, domid: u32) -> Arc<Domain> {
        let domid = DomId::try_from(domid).unwrap();
        Arc::new(self.stand_in.create_domain(domid, GUEST_PAGES).unwrap())
    }

    /// A domain with a disk that it has not connected to yet.
    pub fn guest(&self, domid: u32, target: &str) -> Guest {
        let domain = self.domain(domid);
        self.attach(domid, target, false);
        Guest::of(domain)
    }

    /// The same on a file of its own.
    pub fn guest_on_file(&self, domid: u32) -> Guest {
        let path = self.image(&format!("guest-{domid}.img"));
        self.guest(domid, &raw(&path))
    }

    /// Writes a node as the toolstack.
    pub fn set(&self, path: &str, value: &str) {
        self.dom0.write(path, value).unwrap();
    }

    /// What the backend wrote to the disk's `error` node.
    pub fn error_of(&self, domid: u32) -> Option<String> {
        let path = format!("/local/domain/0/error/backend/vbd/{domid}/{VBD}/error");
        self.dom0.read(&path).ok().map(String::from)
    }

    /// Ends the daemon and waits for it.
    fn end(&mut self) {
        self.stop.ring();
        if let Some(control) = self.control.take() {
            control.join().unwrap().unwrap();
        }
        self.workers.drain(..).for_each(WorkerThread::join);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // After a failure the threads may hang, so nobody waits for them.
        if !std::thread::panicking() {
            self.end();
        }
    }
}

/// Makes a disk's areas as a toolstack does, with these nodes in the backend area.
pub fn toolstack_disk(dom0: &StoreClient, domid: u32, nodes: &[(&str, &str)]) {
    let backend = format!("/local/domain/0/backend/vbd/{domid}/{VBD}");
    let frontend = format!("/local/domain/{domid}/device/vbd/{VBD}");
    let (guest, own, vbd) = (DomId::try_from(domid).unwrap(), domid.to_string(), VBD.to_string());
    let permission = |domid, access| Permission { domid, access };
    let owned_by =
        |owner, reader| [permission(owner, NodeAccess::None), permission(reader, NodeAccess::Read)];
    let made = dom0.atomically(|span| {
        span.mkdir(&frontend)?;
        span.set_permissions(&frontend, &owned_by(guest, DomId::DOM0))?;
        span.mkdir(&backend)?;
        span.set_permissions(&backend, &owned_by(DomId::DOM0, guest))?;
        for (node, value) in [
            ("backend", backend.as_str()),
            ("backend-id", "0"),
            ("virtual-device", &vbd),
            ("state", "1"),
        ] {
            span.write(&format!("{frontend}/{node}"), value)?;
        }
        let usual = [
            ("frontend", frontend.as_str()),
            ("frontend-id", &own),
            ("online", "1"),
            ("device-type", "disk"),
            ("state", "1"),
        ];
        usual
            .iter()
            .chain(nodes)
            .try_for_each(|(node, value)| span.write(&format!("{backend}/{node}"), value))
    });
    made.unwrap();
}

/// The target that names a file to the daemon.
pub fn raw(path: &Path) -> String {
    format!("raw:{}", path.display())
}

/// A domain and its view of its disk.
pub struct Guest {
    pub domain: Arc<Domain>,
    pub xenbus: Xenbus,
}

impl Guest {
    /// Waits for the toolstack to make the disk's areas.
    pub fn of(domain: Arc<Domain>) -> Guest {
        let xenbus = Xenbus::open(&domain, VBD).unwrap();
        Guest { domain, xenbus }
    }

    pub fn domid(&self) -> u32 {
        self.domain.domid().raw().into()
    }

    pub fn connect(&self, options: Options) -> Device {
        self.connect_and_look(options).0
    }

    pub fn connect_and_look(&self, options: Options) -> (Device, Disk) {
        self.xenbus.connect(&self.domain, options).unwrap()
    }

    /// Writes some of its own nodes, then `state`.
    pub fn publish(&self, nodes: &[(&str, &str)], state: XenbusState) {
        let written = self.xenbus.store().atomically(|span| {
            nodes.iter().try_for_each(|(node, value)| span.write(&self.xenbus.own(node), value))
        });
        written.unwrap();
        self.xenbus.set_state(state).unwrap();
    }

    /// Closes the device; nothing may stay mapped.
    pub fn close(&self, device: Device) {
        self.xenbus.close(device).unwrap();
        assert_eq!(self.domain.mapped_grants(), 0);
    }

    /// From an error to InitWait: as when the driver is loaded again.
    pub fn start_over(&self) {
        self.xenbus.set_state(XenbusState::Closed).unwrap();
        self.xenbus.wait_for(&[XenbusState::Closed]).unwrap();
        self.xenbus.start_over().unwrap();
        self.xenbus.wait_for(&[XenbusState::InitWait]).unwrap();
    }

    /// A page that the backend may use, with this access.
    pub fn grant(&self, access: PageAccess) -> (Gfn, GrantRef) {
        let page = self.domain.alloc_pages(1).unwrap();
        (page, self.domain.grant(page, DomId::DOM0, access).unwrap())
    }
}

/// A load on a whole image of zeroes.
pub fn load(seed: u64, block_bytes: usize) -> Load {
    Load {
        seed,
        block_bytes,
        depth: 32,
        read_percent: 50,
        flush_every: 50,
        sectors: 0..IMAGE_BYTES / 512,
        zeroed: true,
        keeps_data: true,
    }
}

/// Does at least `requests` random requests, then reads everything back.
pub fn run_verified(device: &mut Device, load: Load, requests: u64) -> Report {
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut runner = Runner::new(load, device);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while done.load(Ordering::Relaxed) < requests && !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            stop.store(true, Ordering::Relaxed);
        });
        let result = runner.run(&stop, &done);
        stop.store(true, Ordering::Relaxed);
        result.unwrap();
    });
    runner.read_all().unwrap();
    let report = runner.report();
    assert_eq!((report.errors, report.mismatches), (0, 0), "{report:?}");
    assert!(report.reads + report.writes + report.flushes >= requests, "{report:?}");
    report
}

/// A guest whose verified I/O runs all the time.
pub struct Neighbour {
    thread: Option<JoinHandle<Report>>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
}

impl Neighbour {
    /// Starts it; its I/O runs when this returns.
    pub fn start(rig: &Rig, domid: u32) -> Neighbour {
        let domain = rig.domain(domid);
        rig.attach(domid, &raw(&rig.image(&format!("guest-{domid}.img"))), false);
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let body = {
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            move || {
                let guest = Guest::of(domain);
                let mut device = guest.connect(Options::default());
                let load = Load { depth: 4, ..load(domid.into(), 4096) };
                let mut runner = Runner::new(load, &mut device);
                runner.run(&stop, &done).unwrap();
                runner.read_all().unwrap();
                let report = runner.report();
                guest.close(device);
                report
            }
        };
        let thread = Some(std::thread::spawn(body));
        let neighbour = Neighbour { thread, stop, done };
        neighbour.goes_on();
        neighbour
    }

    /// Requests so far.
    pub fn requests(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Waits until a good number of further requests are done.
    pub fn goes_on(&self) {
        let goal = self.requests() + 100;
        let alive = || self.thread.as_ref().is_some_and(|thread| !thread.is_finished());
        until("the neighbour's I/O goes on", || {
            assert!(alive(), "the neighbour failed");
            self.requests() >= goal
        });
    }

    /// Reads everything back, and checks that no request failed and no data was wrong.
    pub fn finish(mut self) {
        self.goes_on();
        self.stop.store(true, Ordering::Relaxed);
        let report = self.thread.take().unwrap().join().unwrap();
        assert_eq!((report.errors, report.mismatches), (0, 0), "{report:?}");
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A request with these segments; `id` comes back with its answer.
pub fn raw_request(operation: u8, id: u64, sector: u64, segments: &[RawSegment]) -> RawDirect {
    let mut request = RawDirect::new(operation, id, sector);
    request.nr_segments = u8::try_from(segments.len()).unwrap();
    request.segments[..segments.len()].copy_from_slice(segments);
    request
}

/// All sectors of a page.
pub fn whole(gref: GrantRef) -> RawSegment {
    RawSegment { gref: gref.0, first: 0, last: 7 }
}

/// Sends requests with ids 0, 1, ... as one batch, and returns the statuses by id.
pub fn ask<R: Copy + Into<RawRequest>>(device: &mut Device, requests: &[R]) -> Vec<i16> {
    requests.iter().for_each(|request| device.put_raw(*request));
    device.publish().unwrap();
    let mut statuses = vec![None; requests.len()];
    for _ in requests {
        let response = wait_response(device);
        let status = &mut statuses[usize::try_from(response.id).unwrap()];
        assert_eq!(*status, None, "request {} was answered twice", response.id);
        *status = Some(response.status);
    }
    statuses.into_iter().flatten().collect()
}

pub fn wait_response(device: &mut Device) -> polldisk::blkif::codec::RawResponse {
    let start = Instant::now();
    loop {
        if let Some(response) = device.next_response() {
            return response;
        }
        assert!(start.elapsed() < HANG, "a request was not answered");
        device.wait(HANG).unwrap();
    }
}

/// Waits for all answers, which must be okay.
pub fn settle(device: &mut Device) {
    until("all requests are answered", || {
        while let Some(answer) = device.next_answer().unwrap() {
            assert_eq!(answer.status, 0);
        }
        device.in_flight() == 0
    });
}

/// Waits until `so` returns true.
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < HANG, "still waiting until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Names the test that a child process runs.
const ALONE: &str = "POLLDISK_TEST_ALONE";

/// Runs `body` in a process in which no other test runs, for figures that are counted per process.
pub fn alone(test: &str, body: impl FnOnce()) {
    if std::env::var_os(ALONE).is_some() {
        return body();
    }
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(ALONE, test)
        .status()
        .unwrap();
    assert!(status.success(), "{test}: {status}");
}

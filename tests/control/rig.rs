//! The real control loop between a stand-in xenstore and fake workers that only answer.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use polldisk::control::admin::client::{RequestError, request};
use polldisk::control::admin::protocol::{
    Attach, Detach, DiskReport, Eject, Insert, Reply, Request,
};
use polldisk::control::{self, Config, ControlError, Ended};
use polldisk::metrics::new_latency_histogram;
use polldisk::msg::{
    self, Command, CommandReceiver, GrantMode, InFlight, InFlightRequest, QueueKey, Report,
    ReportSender, WorkerId,
};
use polldisk::park::{self, Doorbell};
use polldisk::sim::store::{Quota, StoreServer};
use polldisk::units::{DomId, GrantRef, Port, VbdId};
use polldisk::xen::shm::GuestPages;
use polldisk::xen::store::StoreClient;
use polldisk::xen::{
    Events, GrantCopy, Grants, NodeAccess, Nodes, PageAccess, Permission, Platform, PlatformError,
    Store,
};
use xenstore_rs::Xs;

/// Only a hang takes this long.
const HANG: Duration = Duration::from_secs(60);

/// A grant that no worker can map.
pub const BAD_GRANT: u32 = u32::MAX;

#[derive(Clone)]
pub struct StorePlatform {
    socket: PathBuf,
}

impl Platform for StorePlatform {
    type Store = StoreClient;
    type Events = Nothing;
    type Grants = Nothing;

    fn open_store(&self) -> Result<StoreClient, PlatformError> {
        StoreClient::connect_unix(&self.socket).map_err(|source| PlatformError {
            what: "cannot reach the store".into(),
            remedy: "start it".into(),
            source,
        })
    }

    fn open_events(&self) -> Result<Nothing, PlatformError> {
        Ok(Nothing)
    }

    fn open_grants(&self) -> Result<Nothing, PlatformError> {
        Ok(Nothing)
    }
}

/// Event channels and grants belong to workers; control must not touch them.
pub struct Nothing;

impl AsFd for Nothing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        unreachable!()
    }
}

impl Events for Nothing {
    fn bind_interdomain(&mut self, _: DomId, _: Port) -> io::Result<Port> {
        unreachable!()
    }

    fn unbind(&mut self, _: Port) -> io::Result<()> {
        unreachable!()
    }

    fn notify(&self, _: Port) -> io::Result<()> {
        unreachable!()
    }

    fn pending(&mut self, _: &mut [Port]) -> io::Result<usize> {
        unreachable!()
    }

    fn unmask(&mut self, _: &[Port]) -> io::Result<()> {
        unreachable!()
    }
}

impl Grants for Nothing {
    fn map(&mut self, _: DomId, _: &[GrantRef], _: PageAccess) -> io::Result<GuestPages> {
        unreachable!()
    }

    fn unmap(&mut self, _: GuestPages) -> io::Result<()> {
        unreachable!()
    }

    fn copy(&mut self, _: DomId, _: &mut [GrantCopy]) -> io::Result<()> {
        unreachable!()
    }
}

/// What the fake workers were asked to do, and what they hold.
#[derive(Debug, Default)]
pub struct Plane {
    pub serving: BTreeMap<QueueKey, (DomId, WorkerId)>,
    pub connects: usize,
    pub disconnects: usize,
    /// Second connections to a ring that was still served.
    pub doubles: usize,
    pub grant_mode: Option<GrantMode>,
    pub read_only: Option<bool>,
    /// Size in bytes of each image that a queue switched to.
    pub media: Vec<u64>,
    /// Answers to Connect and ReplaceImage are kept back.
    pub hold: bool,
    /// Answers to Disconnect are kept back, as by storage that hangs.
    pub hangs: bool,
    held: Vec<Report>,
}

impl Plane {
    /// A worker's answer, unless it is kept back.
    fn unless_kept_back(&mut self, is_kept_back: bool, answer: Report) -> Option<Report> {
        if is_kept_back {
            self.held.push(answer);
            return None;
        }
        Some(answer)
    }
}

pub struct Rig {
    pub plane: Arc<Mutex<Plane>>,
    pub dom0: StoreClient,
    pub worker_reports: ReportSender,
    server: Option<StoreServer>,
    control: Option<JoinHandle<Result<Ended, ControlError>>>,
    /// Its thread, below `/proc`.
    task: PathBuf,
    stop: Doorbell,
    folder: tempfile::TempDir,
}

impl Rig {
    pub fn start() -> Rig {
        Rig::with(Config::default())
    }

    pub fn with(config: Config) -> Rig {
        let mut rig = Rig::without_control();
        rig.run(config);
        rig
    }

    /// Starts no control loop, for a test with a control plane of its own.
    pub fn without_control() -> Rig {
        let folder = tempfile::tempdir().unwrap();
        let server = StoreServer::start(&folder.path().join("store"), Quota::default()).unwrap();
        let dom0 = StoreClient::connect_unix(server.socket()).unwrap();
        let plane = Arc::default();
        let stop = Doorbell::new().unwrap();
        let (reports, _) = msg::report_channel().unwrap();
        Rig {
            plane,
            dom0,
            worker_reports: reports,
            server: Some(server),
            control: None,
            task: PathBuf::new(),
            stop,
            folder,
        }
    }

    /// The platform that connects to this rig's xenstore.
    pub fn platform(&self) -> StorePlatform {
        StorePlatform { socket: self.folder.path().join("store") }
    }

    /// Starts a control loop with its own fake workers.
    pub fn run(&mut self, config: Config) {
        let config = Config { admin_path: Some(self.admin_path()), ..config };
        let (reports, receiver) = msg::report_channel().unwrap();
        let mut senders = Vec::new();
        for number in 0..2 {
            let (sender, commands) = msg::command_channel(WorkerId(number)).unwrap();
            senders.push(sender);
            let (plane, reports) = (self.plane.clone(), reports.clone());
            std::thread::spawn(move || serve(WorkerId(number), &commands, &reports, &plane));
        }
        let platform = self.platform();
        let stop = self.stop.clone();
        self.worker_reports = reports;
        let (sender, task) = std::sync::mpsc::channel();
        self.control = Some(std::thread::spawn(move || {
            sender.send(std::fs::read_link("/proc/thread-self").unwrap()).unwrap();
            control::run(&platform, &config, senders, receiver, &stop)
        }));
        self.task = task.recv().unwrap();
        until("the admin socket answers", || self.ask(&Request::List).is_ok());
    }

    /// Ends the control loop and waits for it.
    pub fn stop(&mut self) {
        self.ring_stop();
        self.join();
    }

    /// Waits for the control loop to end by itself.
    pub fn join(&mut self) -> Ended {
        self.control.take().unwrap().join().unwrap().unwrap()
    }

    /// The number of the control loop's thread.
    pub fn thread(&self) -> &str {
        self.task.file_name().unwrap().to_str().unwrap()
    }

    /// Asks the control loop to end, without waiting.
    pub fn ring_stop(&self) {
        self.stop.ring();
    }

    /// The queue of a guest's disk.
    pub fn queue_of(&self, domid: u32) -> QueueKey {
        let plane = self.plane();
        let mut queues = plane.serving.iter();
        let found = queues.find(|(_, (id, _))| u32::from(id.raw()) == domid);
        *found.expect("the guest is served").0
    }

    /// Tries to run a second control loop in this thread.
    pub fn start_another(&self) -> Result<Ended, ControlError> {
        let config = Config { admin_path: Some(self.admin_path()), ..Config::default() };
        let (_, receiver) = msg::report_channel().unwrap();
        let platform = self.platform();
        control::run(&platform, &config, Vec::new(), receiver, &Doorbell::new().unwrap())
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn admin_path(&self) -> PathBuf {
        self.folder.path().join("admin.sock")
    }

    pub fn server(&self) -> &StoreServer {
        self.server.as_ref().unwrap()
    }

    /// Stops the xenstore server.
    pub fn kill_server(&mut self) {
        self.server = None;
    }

    pub fn restart_server(&mut self) {
        let socket = self.folder.path().join("store");
        self.server = Some(StoreServer::start(&socket, Quota::default()).unwrap());
        self.dom0 = StoreClient::connect_unix(&socket).unwrap();
    }

    pub fn ask(&self, what: &Request) -> Result<Reply, RequestError> {
        request(&self.admin_path(), what)
    }

    /// The same in a thread, for an answer that has to wait for something.
    pub fn ask_meanwhile(&self, what: Request) -> JoinHandle<Result<Reply, RequestError>> {
        let path = self.admin_path();
        std::thread::spawn(move || request(&path, &what))
    }

    pub fn list(&self) -> Vec<DiskReport> {
        match self.ask(&Request::List).unwrap() {
            Reply::Disks { disks } => disks,
            other => panic!("{other:?}"),
        }
    }

    pub fn attach(&self, domid: u32, vdev: &str, target: &str) -> Result<Reply, String> {
        let attach = Attach {
            domid,
            vdev: vdev.into(),
            target: target.into(),
            read_only: false,
            ..Attach::default()
        };
        self.ask(&Request::Attach(attach)).map_err(|error| error.to_string())
    }

    /// A CD-ROM drive, empty without a target.
    pub fn attach_cdrom(&self, domid: u32, vdev: &str, target: &str) -> Result<Reply, String> {
        let (vdev, target) = (vdev.into(), target.into());
        let attach = Attach { domid, vdev, target, cdrom: true, ..Attach::default() };
        self.ask(&Request::Attach(attach)).map_err(|error| error.to_string())
    }

    pub fn insert(&self, domid: u32, vdev: &str, target: &str) -> Result<Reply, String> {
        let insert = Insert { domid, vdev: vdev.into(), target: target.into() };
        self.ask(&Request::Insert(insert)).map_err(|error| error.to_string())
    }

    pub fn eject(&self, domid: u32, vdev: &str) -> Result<Reply, String> {
        let eject = Eject { domid, vdev: vdev.into() };
        self.ask(&Request::Eject(eject)).map_err(|error| error.to_string())
    }

    pub fn detach(&self, domid: u32, vdev: &str, force: bool) -> Result<Reply, String> {
        let detach = Detach { domid, vdev: vdev.into(), force };
        self.ask(&Request::Detach(detach)).map_err(|error| error.to_string())
    }

    pub fn plane(&self) -> std::sync::MutexGuard<'_, Plane> {
        self.plane.lock().unwrap()
    }

    /// Sends the answers that were kept back.
    pub fn release(&self) {
        let held = {
            let mut plane = self.plane();
            (plane.hold, plane.hangs) = (false, false);
            std::mem::take(&mut plane.held)
        };
        held.into_iter().for_each(|report| self.worker_reports.send(report));
    }

    /// A guest domain, as the toolstack makes its first nodes.
    pub fn guest(&self, domid: u32) -> Guest {
        let id = self::domid(domid);
        self.server().introduce(id).unwrap();
        let home = format!("/local/domain/{domid}");
        self.dom0.mkdir(&home).unwrap();
        self.dom0.set_permissions(&home, &[owner(0), reads(domid)]).unwrap();
        self.dom0.write(&format!("{home}/domid"), &domid.to_string()).unwrap();
        let stream = self.server().connect_as(id).unwrap();
        Guest { store: StoreClient::from_stream(stream).unwrap() }
    }

    /// A disk, as libxl makes one without a script.
    pub fn toolstack_disk(&self, domid: u32, vbd: u32, params: &str) -> Areas {
        self.toolstack_disk_with(domid, vbd, &[("params", params)])
    }

    /// The same with other nodes in the backend area.
    pub fn toolstack_disk_with(&self, domid: u32, vbd: u32, nodes: &[(&str, &str)]) -> Areas {
        let areas = Areas::new(domid, vbd);
        let (domid_text, vbd_text) = (domid.to_string(), vbd.to_string());
        self.dom0
            .atomically(|span| {
                span.mkdir(&areas.frontend)?;
                span.set_permissions(&areas.frontend, &[owner(domid), reads(0)])?;
                span.mkdir(&areas.backend)?;
                span.set_permissions(&areas.backend, &[owner(0), reads(domid)])?;
                for (node, value) in [
                    ("backend", areas.backend.as_str()),
                    ("backend-id", "0"),
                    ("state", "1"),
                    ("virtual-device", &vbd_text),
                    ("device-type", "disk"),
                    ("trusted", "1"),
                ] {
                    span.write(&format!("{}/{node}", areas.frontend), value)?;
                }
                for (node, value) in [
                    ("frontend", areas.frontend.as_str()),
                    ("frontend-id", &domid_text),
                    ("online", "1"),
                    ("removable", "0"),
                    ("bootable", "1"),
                    ("state", "1"),
                    ("dev", "xvda"),
                    ("type", "phy"),
                    ("mode", "w"),
                    ("device-type", "disk"),
                    ("discard-enable", "1"),
                    ("specification", "xen"),
                ]
                .iter()
                .chain(nodes)
                {
                    span.write(&format!("{}/{node}", areas.backend), value)?;
                }
                Ok(())
            })
            .unwrap();
        areas
    }

    /// Writes what libxl does in one of its two transactions to change a CD-ROM's medium.
    pub fn toolstack_sets_medium(&self, areas: &Areas, params: &str) {
        self.dom0
            .atomically(|span| {
                span.write(&format!("{}/type", areas.backend), "phy")?;
                span.write(&format!("{}/params", areas.backend), params)
            })
            .unwrap();
    }

    pub fn read(&self, path: &str) -> Option<String> {
        self.dom0.read(path).ok().map(String::from)
    }

    pub fn node(&self, area: &str, node: &str) -> Option<String> {
        self.read(&format!("{area}/{node}"))
    }

    pub fn state(&self, area: &str) -> Option<u8> {
        self.node(area, "state").and_then(|text| text.parse().ok())
    }

    pub fn wait_state(&self, area: &str, wanted: u8) {
        let what = format!("{area} reaches state {wanted}");
        until(&what, || self.state(area) == Some(wanted));
    }

    /// Begins a removal as libxl does.
    pub fn toolstack_removes(&self, areas: &Areas, force: bool) {
        self.dom0
            .atomically(|span| {
                if force {
                    span.rm(&areas.frontend)?;
                }
                span.write(&format!("{}/online", areas.backend), "0")?;
                if &*span.read(&format!("{}/state", areas.backend))? != "6" {
                    span.write(&format!("{}/state", areas.backend), "5")?;
                }
                Ok(())
            })
            .unwrap();
    }

    /// Removes both areas at once, as a toolstack may.
    pub fn toolstack_forgets(&self, areas: &Areas) -> io::Result<()> {
        self.dom0.atomically(|span| {
            span.rm(&areas.backend)?;
            span.rm(&areas.frontend)
        })
    }

    pub fn served(&self, domid: u32) -> usize {
        self.plane().serving.values().filter(|(id, _)| u32::from(id.raw()) == domid).count()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if self.control.is_some() && !std::thread::panicking() {
            self.stop();
        }
    }
}

/// The paths of one disk.
#[derive(Clone, Debug)]
pub struct Areas {
    pub backend: String,
    pub frontend: String,
    pub error: String,
}

impl Areas {
    pub fn new(domid: u32, vbd: u32) -> Areas {
        Areas {
            backend: format!("/local/domain/0/backend/vbd/{domid}/{vbd}"),
            frontend: format!("/local/domain/{domid}/device/vbd/{vbd}"),
            error: format!("/local/domain/0/error/backend/vbd/{domid}/{vbd}/error"),
        }
    }
}

/// A guest's view of xenstore.
pub struct Guest {
    pub store: StoreClient,
}

impl Guest {
    pub fn set(&self, areas: &Areas, node: &str, value: &str) {
        self.store.write(&format!("{}/{node}", areas.frontend), value).unwrap();
    }

    pub fn set_state(&self, areas: &Areas, state: u8) {
        self.set(areas, "state", &state.to_string());
    }

    pub fn read(&self, area: &str, node: &str) -> Option<String> {
        self.store.read(&format!("{area}/{node}")).ok().map(String::from)
    }

    /// Publishes a ring as blkfront does, and goes to Initialised.
    pub fn publish(&self, areas: &Areas, ring_ref: u32) {
        self.publish_nodes(areas, &[("ring-ref", &ring_ref.to_string())]);
    }

    pub fn publish_nodes(&self, areas: &Areas, nodes: &[(&str, &str)]) {
        let usual =
            [("event-channel", "9"), ("protocol", "x86_64-abi"), ("feature-persistent", "1")];
        self.store
            .atomically(|span| {
                for (node, value) in usual.iter().chain(nodes) {
                    span.write(&format!("{}/{node}", areas.frontend), value)?;
                }
                span.write(&format!("{}/state", areas.frontend), "3")
            })
            .unwrap();
    }

    /// From InitWait to Connected.
    pub fn connect(&self, rig: &Rig, areas: &Areas) {
        rig.wait_state(&areas.backend, 2);
        self.publish(areas, 8);
        rig.wait_state(&areas.backend, 4);
        self.set_state(areas, 4);
    }

    /// From Connected to Closed.
    pub fn close(&self, rig: &Rig, areas: &Areas) {
        self.set_state(areas, 5);
        rig.wait_state(&areas.backend, 5);
        self.set_state(areas, 6);
        rig.wait_state(&areas.backend, 6);
    }
}

pub fn domid(number: u32) -> DomId {
    DomId::try_from(number).unwrap()
}

pub fn owner(number: u32) -> Permission {
    Permission { domid: domid(number), access: NodeAccess::None }
}

pub fn reads(number: u32) -> Permission {
    Permission { domid: domid(number), access: NodeAccess::Read }
}

/// Waits until `so` returns true.
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < HANG, "still waiting until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// How many times this process has a file open.
pub fn open_files_of(path: &Path) -> usize {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
    descriptors
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target == path)
        .count()
}

/// The vbd number of xvda, xvdb, ... by index.
pub fn xvd(index: u32) -> VbdId {
    VbdId(if index < 16 { 202 << 8 | index << 4 } else { 1 << 28 | index << 8 })
}

fn serve(
    worker: WorkerId,
    commands: &CommandReceiver,
    reports: &ReportSender,
    plane: &Mutex<Plane>,
) {
    loop {
        park::sleep(&[commands.bell.as_fd()], None);
        commands.bell.silence();
        while let Ok(command) = commands.commands.try_recv() {
            if matches!(command, Command::Stop) {
                return;
            }
            if let Some(report) = answer(worker, command, &mut plane.lock().unwrap()) {
                reports.send(report);
            }
        }
    }
}

fn answer(worker: WorkerId, command: Command, plane: &mut Plane) -> Option<Report> {
    Some(match command {
        Command::Connect(connect) => {
            plane.connects += 1;
            plane.grant_mode = Some(connect.grant_mode);
            plane.read_only = Some(connect.rules.read_only);
            if connect.ring_refs.contains(&GrantRef(BAD_GRANT)) {
                Report::ConnectFailed(connect.key, "grant 4294967295 can't be mapped".into())
            } else {
                let rings: BTreeSet<_> = plane.serving.keys().map(|key| key.connection).collect();
                plane.doubles += usize::from(rings.contains(&connect.key.connection));
                plane.serving.insert(connect.key, (connect.frontend, worker));
                plane.unless_kept_back(plane.hold, Report::Connected(connect.key))?
            }
        }
        Command::Disconnect(key) => {
            plane.disconnects += 1;
            plane.serving.remove(&key);
            plane.unless_kept_back(plane.hangs, Report::Disconnected(key))?
        }
        Command::ReplaceImage(replace) => {
            plane.media.push(replace.rules.geometry.size.0);
            plane.unless_kept_back(plane.hold, Report::ImageReplaced(replace.key))?
        }
        Command::TakeLatency(key) => {
            let latency = plane.serving.contains_key(&key).then(|| {
                let mut latency = new_latency_histogram();
                latency.record(1_000).unwrap();
                Box::new(latency)
            });
            Report::Latency(key, latency)
        }
        Command::TellInFlight(key) => {
            let write = InFlightRequest {
                operation: "write",
                offset_bytes: 8192,
                len_bytes: 4096,
                age_ns: 31_500_000_000,
            };
            Report::InFlight(key, InFlight { count: 7, oldest: vec![write] })
        }
        Command::Stop => return None,
    })
}

//! Workers without control: a connection is just a command, so it costs next to nothing.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use polldisk::backing::{Access, DiskOptions, Geometry, Image, RawImage};
use polldisk::blkif::request::DiskRules;
use polldisk::budget::GrantBudget;
use polldisk::metrics::QueueCounters;
use polldisk::msg::{
    Command, CommandSender, Connect, ConnectionId, QueueKey, Report, ReportReceiver, report_channel,
};
use polldisk::patience::Policy;
use polldisk::sim::blkfront::device::Device;
use polldisk::sim::{Domain, StandIn};
use polldisk::units::{DomId, QueueId};
use polldisk::worker::{WorkerThread, spawn_all};

use crate::draw::{Combination, SECTORS};
use crate::guest::HANG;

/// Pages of a guest: its buffers, the largest rings of four queues, and some spare.
pub const GUEST_PAGES: u32 = 8 * 1024;

/// Two workers, a guest, and a disk.
pub struct Rig {
    pub domain: Arc<Domain>,
    _stand_in: StandIn,
    _folder: tempfile::TempDir,
    path: PathBuf,
    senders: Vec<CommandSender>,
    threads: Vec<WorkerThread>,
    reports: ReportReceiver,
    connections: u64,
    /// The budget of the current connection.
    budget: Arc<GrantBudget>,
    budget_pages: usize,
}

/// Makes a file of zeroes in `folder`.
pub fn zeroes(folder: &Path) -> PathBuf {
    let path = folder.join("disk.img");
    File::create(&path).unwrap().set_len(SECTORS * 512).unwrap();
    path
}

/// A file, opened as a disk that its guest may write to.
pub fn opened(path: &Path) -> Image {
    opened_with(path, DiskOptions::default())
}

/// The same with options.
pub fn opened_with(path: &Path, options: DiskOptions) -> Image {
    Image::Raw(RawImage::open(path, options, &Access::default()).unwrap().image)
}

impl Rig {
    pub fn start() -> Rig {
        let stand_in = StandIn::start_temporary().unwrap();
        let domid = DomId::try_from(1).unwrap();
        let domain = Arc::new(stand_in.create_domain(domid, GUEST_PAGES).unwrap());
        let (reporter, reports) = report_channel().unwrap();
        let policy = Policy::UpTo(Duration::from_micros(50));
        let (senders, threads) =
            spawn_all(&stand_in.platform(), &[None, None], policy, &reporter).unwrap();
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = zeroes(folder.path());
        Rig {
            domain,
            _stand_in: stand_in,
            _folder: folder,
            path,
            senders,
            threads,
            reports,
            connections: 0,
            budget: Arc::new(GrantBudget::new(0)),
            budget_pages: 0,
        }
    }

    /// Connects the queues to the workers in turn, with the file as their disk.
    pub fn connect(&mut self, combination: &Combination) -> Vec<Device> {
        let access = Access { read_only: combination.read_only, ..Access::default() };
        let opened = RawImage::open(&self.path, DiskOptions::default(), &access).unwrap();
        self.connect_to(Image::Raw(opened.image), combination)
    }

    /// The same with another disk.
    pub fn connect_to(&mut self, image: Image, combination: &Combination) -> Vec<Device> {
        self.connections += 1;
        self.budget_pages = combination.budget;
        self.budget = Arc::new(GrantBudget::new(combination.budget));
        // The rules may have larger sectors than storage has.
        let geometry = Geometry { sector_bytes: combination.sector_bytes, ..image.geometry() };
        let rules = DiskRules {
            geometry,
            read_only: combination.read_only,
            indirect_segments: combination.offered_segments,
            discard: combination.discard,
            secure_discard: false,
        };
        let image = Arc::new(image);
        let devices: Vec<Device> = (0..combination.queues)
            .map(|_| Device::new(Arc::clone(&self.domain), combination.options).unwrap())
            .collect();
        for (queue, device) in devices.iter().enumerate() {
            let connect = Connect {
                key: self.key(queue),
                frontend: self.domain.domid(),
                ring_refs: device.ring_refs().to_vec(),
                port: device.port(),
                protocol: combination.options.protocol,
                grant_mode: combination.grant_mode,
                budget: Arc::clone(&self.budget),
                rules,
                image: Arc::clone(&image),
                counters: Arc::new(QueueCounters::default()),
            };
            self.ask(queue % 2, Command::Connect(Box::new(connect)));
            match self.answer() {
                Report::Connected(key) => assert_eq!(key, self.key(queue)),
                other => panic!("{other:?}"),
            }
        }
        devices
    }

    /// Disconnects all queues; nothing of the guest may stay mapped.
    pub fn disconnect(&self, devices: Vec<Device>) {
        for queue in 0..devices.len() {
            self.ask(queue % 2, Command::Disconnect(self.key(queue)));
            match self.answer() {
                Report::Disconnected(key) => assert_eq!(key, self.key(queue)),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(self.domain.mapped_grants(), 0);
        assert_eq!(self.budget.left(), self.budget_pages, "all of the budget is back");
        devices.into_iter().for_each(|device| device.close().unwrap());
    }

    /// Requests that a worker has answered on a queue since the last call; `None` if it does not
    /// serve that queue.
    pub fn answered(&self, worker: usize, queue: usize) -> Option<u64> {
        self.ask(worker, Command::TakeLatency(self.key(queue)));
        match self.answer() {
            Report::Latency(key, latency) if key == self.key(queue) => {
                latency.map(|latency| latency.len())
            }
            other => panic!("{other:?}"),
        }
    }

    fn key(&self, queue: usize) -> QueueKey {
        QueueKey {
            connection: ConnectionId(self.connections),
            queue: QueueId(u16::try_from(queue).unwrap()),
        }
    }

    fn ask(&self, worker: usize, command: Command) {
        self.senders[worker].send(command).unwrap();
    }

    fn answer(&self) -> Report {
        self.reports.reports.recv_timeout(HANG).unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // After a failure the threads may hang, so nobody waits for them.
        if !std::thread::panicking() {
            self.senders.iter().for_each(|sender| sender.send(Command::Stop).unwrap());
            self.threads.drain(..).for_each(WorkerThread::join);
        }
    }
}

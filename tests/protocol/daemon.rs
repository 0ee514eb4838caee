//! The whole daemon with two workers, for connections through xenstore.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use polldisk::blkif::features::Offer;
use polldisk::control::admin::client::request;
use polldisk::control::admin::protocol::{Attach, DiskReport, Reply, Request};
use polldisk::control::{self, ControlError, Ended};
use polldisk::msg::report_channel;
use polldisk::park::Doorbell;
use polldisk::patience::Policy;
use polldisk::sim::blkfront::xenbus::Xenbus;
use polldisk::sim::{Domain, StandIn};
use polldisk::units::{DomId, VbdId};
use polldisk::worker::{WorkerThread, spawn_all};

use crate::guest::HANG;
use crate::workers::{GUEST_PAGES, zeroes};

const VDEV: &str = "xvda";
const VBD: VbdId = VbdId(51712);

/// A daemon and a guest with a disk.
pub struct Daemon {
    pub domain: Arc<Domain>,
    pub xenbus: Xenbus,
    _stand_in: StandIn,
    _folder: tempfile::TempDir,
    admin: PathBuf,
    stop: Doorbell,
    control: Option<JoinHandle<Result<Ended, ControlError>>>,
    workers: Vec<WorkerThread>,
}

impl Daemon {
    pub fn start(offer: Offer) -> Daemon {
        let stand_in = StandIn::start_temporary().unwrap();
        let platform = stand_in.platform();
        let (reporter, reports) = report_channel().unwrap();
        let policy = Policy::UpTo(Duration::from_micros(50));
        let (senders, workers) = spawn_all(&platform, &[None, None], policy, &reporter).unwrap();
        let admin = stand_in.folder().join("admin.sock");
        let config = control::Config {
            admin_path: Some(admin.clone()),
            offer,
            ..control::Config::default()
        };
        let stop = Doorbell::new().unwrap();
        let control = std::thread::spawn({
            let stop = stop.clone();
            move || control::run(&platform, &config, senders, reports, &stop)
        });
        let start = std::time::Instant::now();
        while request(&admin, &Request::List).is_err() {
            assert!(start.elapsed() < HANG, "the admin socket does not answer");
            std::thread::sleep(Duration::from_millis(1));
        }
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let domid = DomId::try_from(1).unwrap();
        let domain = Arc::new(stand_in.create_domain(domid, GUEST_PAGES).unwrap());
        let target = format!("raw:{}", zeroes(folder.path()).display());
        let attach = Attach { domid: 1, vdev: VDEV.into(), target, ..Attach::default() };
        request(&admin, &Request::Attach(attach)).unwrap();
        Daemon {
            xenbus: Xenbus::open(&domain, VBD).unwrap(),
            domain,
            _stand_in: stand_in,
            _folder: folder,
            admin,
            stop,
            control: Some(control),
            workers,
        }
    }

    /// The disk as `polldisk list` reports it.
    pub fn disk(&self) -> DiskReport {
        match request(&self.admin, &Request::List).unwrap() {
            Reply::Disks { mut disks } => disks.remove(0),
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // After a failure the threads may hang, so nobody waits for them.
        if !std::thread::panicking() {
            self.stop.ring();
            self.control.take().unwrap().join().unwrap().unwrap();
            self.workers.drain(..).for_each(WorkerThread::join);
        }
    }
}

//! A worker in the test's own thread, with the test's engine and one ring of one guest.

use std::sync::Arc;

use polldisk::backing::Image;
use polldisk::blkif::request::DiskRules;
use polldisk::budget::GrantBudget;
use polldisk::engine::Engine;
use polldisk::metrics::QueueCounters;
use polldisk::msg::{
    Command, CommandSender, Connect, ConnectionId, GrantMode, QueueKey, ReportReceiver, WorkerId,
    command_channel, report_channel,
};
use polldisk::sim::LocalStandIn;
use polldisk::sim::blkfront::device::{Device, Options};
use polldisk::units::{DomId, QueueId};
use polldisk::worker::{Setup, Worker};
use polldisk::xen::Platform;

/// Pages of the guest.
const GUEST_PAGES: u32 = 512;

/// A worker with a pending command to connect, and what belongs to it.
pub struct Alone<P: Platform, E> {
    pub worker: Worker<P, E>,
    pub commands: CommandSender,
    pub budget: Arc<GrantBudget>,
    _reports: ReportReceiver,
}

/// A guest without a backend.
pub fn device(stand_in: &LocalStandIn) -> Device {
    let domain = stand_in.create_domain(DomId::try_from(1).unwrap(), GUEST_PAGES).unwrap();
    Device::new(Arc::new(domain), Options::default()).unwrap()
}

/// A worker that never spins, for the only ring of `device`. It may map `budget_pages` pages.
pub fn worker<P: Platform, E: Engine<Target = Image>>(
    platform: P,
    engine: E,
    device: &Device,
    image: Image,
    budget_pages: usize,
) -> Alone<P, E> {
    let (commands, receiver) = command_channel(WorkerId(0)).unwrap();
    let (reporter, reports) = report_channel().unwrap();
    let budget = Arc::new(GrantBudget::new(budget_pages));
    let connect = Connect {
        key: QueueKey { connection: ConnectionId(1), queue: QueueId(0) },
        frontend: device.domain().domid(),
        ring_refs: device.ring_refs().to_vec(),
        port: device.port(),
        protocol: device.options().protocol,
        grant_mode: GrantMode::Persistent,
        budget: Arc::clone(&budget),
        rules: DiskRules {
            geometry: image.geometry(),
            read_only: false,
            indirect_segments: 0,
            discard: false,
            secure_discard: false,
        },
        image: Arc::new(image),
        counters: Arc::new(QueueCounters::default()),
    };
    commands.send(Command::Connect(Box::new(connect))).unwrap();
    let setup = Setup::stepped(WorkerId(0), 1, platform, receiver, reporter);
    Alone { worker: Worker::new(setup, engine).unwrap(), commands, budget, _reports: reports }
}

//! A worker stepped by the test, on storage scripted by the test. Progress is counted in passes, not in
//! time.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use polldisk::backing::{Image, NullImage};
use polldisk::blkif::op;
use polldisk::blkif::request::DiskRules;
use polldisk::budget::GrantBudget;
use polldisk::engine::Engine;
use polldisk::metrics::QueueCounters;
use polldisk::msg::{
    Command, CommandSender, Connect, ConnectionId, GrantMode, QueueKey, Report, ReportReceiver,
    WorkerId, command_channel, report_channel,
};
use polldisk::sim::blkfront::device::{Device, Options};
use polldisk::sim::disk::{Script, ScriptedDisk};
use polldisk::sim::grants::SimGrants;
use polldisk::sim::{LocalStandIn, SimXen};
use polldisk::units::{Bytes, DomId, QueueId};
use polldisk::worker::{Progress, Setup, Worker};
use polldisk::xen::{Grants, Platform, PlatformError};

/// Passes after which nothing more can happen.
const PASSES_MAX: usize = 100_000;

/// Bytes of every disk.
const DISK: Bytes = Bytes(1 << 30);

/// A worker with its guests, each with one ring. A guest has the number of its queue.
pub struct Bench<P: Platform = SimXen, E = ScriptedDisk> {
    pub worker: Worker<P, E>,
    pub guests: Vec<Device>,
    pub counters: Vec<Arc<QueueCounters>>,
    pub commands: CommandSender,
    pub reports: ReportReceiver,
    pub now_ns: u64,
    stand_in: LocalStandIn,
}

/// What a guest and its disk are like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub options: Options,
    pub grant_mode: GrantMode,
    pub indirect_segments: u16,
}

impl Shape {
    /// A ring of one page, data copied, no indirect requests.
    pub fn copied(buffers: usize) -> Shape {
        let options = Options { persistent: false, buffers, ..Options::default() };
        Shape { options, grant_mode: GrantMode::Copy, indirect_segments: 0 }
    }

    /// Pages kept mapped, no indirect requests.
    pub fn mapped(buffers: usize) -> Shape {
        let options = Options { persistent: true, buffers, ..Options::default() };
        Shape { options, grant_mode: GrantMode::Persistent, indirect_segments: 0 }
    }

    /// Indirect requests of at most `segments` segments, on a ring of `1 << ring_order` pages.
    pub fn indirect(self, segments: usize, ring_order: u32) -> Shape {
        let options = Options { segments: segments.max(12), ring_order, ..self.options };
        let indirect_segments = u16::try_from(options.segments).unwrap();
        Shape { options, indirect_segments, ..self }
    }
}

/// A disk without contents.
pub fn null(read_zeroes: bool) -> Image {
    Image::Null(NullImage::new(DISK, read_zeroes))
}

/// What a guest may do with an image: all but secure discards.
pub fn rules(image: &Image, indirect_segments: u16) -> DiskRules {
    DiskRules {
        geometry: image.geometry(),
        read_only: false,
        indirect_segments,
        discard: true,
        secure_discard: false,
    }
}

/// Scripted storage, and its script.
pub fn storage() -> (ScriptedDisk, Rc<RefCell<Script>>) {
    ScriptedDisk::new(Script::default()).unwrap()
}

/// A bench with scripted storage, and its script.
pub fn bench() -> (Bench, Rc<RefCell<Script>>) {
    let (engine, script) = storage();
    (Bench::over(engine), script)
}

impl<E: Engine<Target = Image>> Bench<SimXen, E> {
    /// A worker without guests, with this storage.
    pub fn over(engine: E) -> Bench<SimXen, E> {
        let stand_in = LocalStandIn::new().unwrap();
        Bench::on(stand_in.platform(), engine, stand_in)
    }
}

impl<P: Platform, E: Engine<Target = Image>> Bench<P, E> {
    /// The same on the test's own platform.
    pub fn on(platform: P, engine: E, stand_in: LocalStandIn) -> Bench<P, E> {
        let (commands, receiver) = command_channel(WorkerId(0)).unwrap();
        let (reporter, reports) = report_channel().unwrap();
        let setup = Setup::stepped(WorkerId(0), 1, platform, receiver, reporter);
        let worker = Worker::new(setup, engine).unwrap();
        let (guests, counters) = Default::default();
        Bench { worker, guests, counters, commands, reports, now_ns: 1, stand_in }
    }

    /// Adds a guest, on a disk without contents, and returns its number.
    pub fn guest(&mut self, shape: Shape) -> usize {
        self.guest_on(shape, null(false))
    }

    /// The same on an image.
    pub fn guest_on(&mut self, shape: Shape, image: Image) -> usize {
        self.guest_with(shape, image, Arc::new(GrantBudget::new(4096)))
    }

    /// The same with a budget for what stays mapped.
    pub fn guest_with(&mut self, shape: Shape, image: Image, budget: Arc<GrantBudget>) -> usize {
        let number = self.guests.len();
        let key = self.key(number);
        let domid = DomId::try_from(u32::try_from(number).unwrap() + 1).unwrap();
        let pages = u32::try_from(shape.options.device_pages()).unwrap();
        let domain = Arc::new(self.stand_in.create_domain(domid, pages).unwrap());
        let device = Device::new(domain, shape.options).unwrap();
        let counters = Arc::new(QueueCounters::default());
        let connect = Connect {
            key,
            frontend: domid,
            ring_refs: device.ring_refs().to_vec(),
            port: device.port(),
            protocol: shape.options.protocol,
            grant_mode: shape.grant_mode,
            budget,
            rules: rules(&image, shape.indirect_segments),
            image: Arc::new(image),
            counters: Arc::clone(&counters),
        };
        self.commands.send(Command::Connect(Box::new(connect))).unwrap();
        self.settle();
        match self.report() {
            Report::Connected(connected) => assert_eq!(connected, key),
            other => panic!("{other:?}"),
        }
        self.guests.push(device);
        self.counters.push(counters);
        number
    }

    pub fn key(&self, guest: usize) -> QueueKey {
        QueueKey { connection: ConnectionId(guest as u64), queue: QueueId(0) }
    }

    pub fn report(&self) -> Report {
        self.reports.reports.try_recv().unwrap()
    }

    /// Makes a guest send up to `count` requests of `pages` pages each, at different places, as long as it
    /// has buffers; returns how many it sent.
    pub fn ask(&mut self, guest: usize, operation: u8, count: usize, pages: usize) -> usize {
        let device = &mut self.guests[guest];
        let mut asked = 0;
        while asked < count && device.free_buffer().is_some() {
            device.put(operation, (asked * pages * 8) as u64, pages * 4096);
            asked += 1;
        }
        device.publish().unwrap();
        asked
    }

    /// Makes a guest read `count` pages by indirect requests of one segment each.
    pub fn ask_indirect(&mut self, guest: usize, count: usize) {
        let device = &mut self.guests[guest];
        for number in 0..count {
            let buffer = device.free_buffer().unwrap();
            let segment = device.segment(buffer, 0, 0, 7);
            let request = device.indirect(op::READ, number as u64 * 8, &[segment]);
            device.put_request(&request.into(), 1);
        }
        device.publish().unwrap();
    }

    /// One pass.
    pub fn pass(&mut self) -> Progress {
        let now_ns = self.now_ns;
        self.worker.poll_once(|| now_ns).unwrap()
    }

    /// Makes passes until nothing more happens, as a worker that never spins does. Returns whether it would
    /// then sleep.
    pub fn settle(&mut self) -> bool {
        for _ in 0..PASSES_MAX {
            if self.pass() == Progress::Idle && self.worker.arm().unwrap() {
                return true;
            }
        }
        false
    }

    /// How many answers a guest has received since the last call, all of which must be okay.
    pub fn answers(&mut self, guest: usize) -> usize {
        let device = &mut self.guests[guest];
        std::iter::from_fn(|| device.next_answer().unwrap())
            .inspect(|answer| assert_eq!(answer.status, 0))
            .count()
    }

    /// The statuses of the answers since the last call, which may be errors.
    pub fn statuses(&mut self, guest: usize) -> Vec<i16> {
        let device = &mut self.guests[guest];
        std::iter::from_fn(|| device.next_answer().unwrap()).map(|answer| answer.status).collect()
    }
}

/// The stand-in, with a test's own grants in front of the stand-in's.
#[derive(Clone)]
pub struct WithGrants<W>(pub SimXen, pub W);

/// Makes a test's own grants.
pub trait InFront: Clone + Send + Sync + 'static {
    type Grants: Grants;

    fn put(&self, grants: SimGrants) -> Self::Grants;
}

impl<W: InFront> Platform for WithGrants<W> {
    type Store = <SimXen as Platform>::Store;
    type Events = <SimXen as Platform>::Events;
    type Grants = W::Grants;

    fn open_store(&self) -> Result<Self::Store, PlatformError> {
        self.0.open_store()
    }

    fn open_events(&self) -> Result<Self::Events, PlatformError> {
        self.0.open_events()
    }

    fn open_grants(&self) -> Result<W::Grants, PlatformError> {
        Ok(self.1.put(self.0.open_grants()?))
    }
}

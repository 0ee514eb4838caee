//! A worker that the test steps, on storage that does what the test says. Nothing here takes time: what
//! happens is counted in passes.

use std::cell::RefCell;
use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use polldisk::backing::{Image, NullImage};
use polldisk::blkif::op;
use polldisk::blkif::request::DiskRules;
use polldisk::budget::GrantBudget;
use polldisk::engine::{By, Completion, Engine, IoOp, RegisterBuffers, Submitted, Ticket};
use polldisk::metrics::QueueCounters;
use polldisk::msg::{
    Command, CommandSender, Connect, ConnectionId, GrantMode, QueueKey, Report, ReportReceiver,
    WorkerId, command_channel, report_channel,
};
use polldisk::park::Doorbell;
use polldisk::sim::blkfront::device::{Device, Options};
use polldisk::sim::grants::SimGrants;
use polldisk::sim::{SimXen, StandIn};
use polldisk::units::{Bytes, DomId, QueueId};
use polldisk::worker::{Progress, Setup, Worker};
use polldisk::xen::shm::{GuestBuf, PAGE_BYTES, Registration};
use polldisk::xen::{Grants, Platform, PlatformError};

/// Passes until everything that can happen has happened.
const PASSES_MAX: usize = 100_000;

/// What it costs to submit an operation, if there is a clock.
const SUBMIT_NS: u64 = 300;

/// The same for storage whose kernel driver takes its time.
const SLOW_SUBMIT_NS: u64 = 5_000;

/// What each operation adds to the time of a kick, if its pages do.
const KICK_NS: u64 = 2_000;

/// Bytes of every disk.
const DISK: Bytes = Bytes(1 << 30);

/// What storage does, as the test says, and what it was asked for.
#[derive(Debug, Default)]
pub struct Script {
    /// Queues whose operations hang.
    pub hung: HashSet<usize>,
    /// Operations that there is room for; `None`: for all.
    pub room: Option<usize>,
    /// Operations that complete with each reap; `None`: all that do not hang.
    pub per_reap: Option<usize>,
    /// What becomes of each operation, in place of its success.
    pub errno: Option<i32>,
    /// Something completes just when the worker falls asleep.
    pub arming_finds_a_completion: bool,
    /// Flushes are kept by the engine.
    pub parks_flushes: bool,
    /// The host fails with its next operation, or panics.
    pub fails: Option<Failure>,
    /// Queues whose operations cost the worker much.
    pub slow: HashSet<usize>,
    /// What a flush, or several of a disk at once, takes a thread of the kernel,
    pub flush_ns: u64,
    /// ... and what all have taken since the test last took it out.
    pub threads_ns: u64,
    /// What the next kick takes of the worker's time, and what each page submitted adds to it.
    pub kick_ns: u64,
    pub kick_page_ns: u64,
    /// Moves with each operation, by what it costs to submit.
    pub clock: Option<Arc<AtomicU64>>,
    /// The engine is no more.
    pub is_dropped: bool,
    /// Operations taken and not completed, in order.
    pub taken: Vec<Taken>,
}

/// How the host fails.
#[derive(Clone, Copy, Debug)]
pub enum Failure {
    Error,
    Panic,
}

/// An operation.
#[derive(Debug)]
pub struct Taken {
    pub ticket: Ticket,
    pub is_flush: bool,
    /// How far its buffers begin behind the starts of their pages, or'ed together.
    pub misaligned: usize,
    bytes: i32,
}

/// Storage by a script.
pub struct Scripted {
    script: Rc<RefCell<Script>>,
    bell: Doorbell,
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.script.borrow_mut().is_dropped = true;
    }
}

impl RegisterBuffers for Scripted {
    fn register(&mut self, _memory: GuestBuf) -> io::Result<Registration> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn unregister(&mut self, _registration: Registration) {
        unreachable!("nothing was registered");
    }
}

impl Engine for Scripted {
    type Target = Image;

    fn submit(&mut self, _: &Image, operation: &IoOp<'_>, ticket: Ticket, _: By) -> Submitted {
        let mut script = self.script.borrow_mut();
        if script.room.is_some_and(|room| script.taken.len() >= room) {
            return Submitted::Full(ticket);
        }
        let buffers = match *operation {
            IoOp::Read { buffers, .. } | IoOp::Write { buffers, .. } => buffers,
            IoOp::Flush | IoOp::Discard { .. } => &[],
        };
        let bytes = buffers.iter().map(|buffer| buffer.len().cast_signed()).sum();
        let starts = buffers.iter().map(|buffer| buffer.address().addr().get() % PAGE_BYTES);
        let misaligned = starts.fold(0, |all, start| all | start);
        if let Some(clock) = &script.clock {
            let is_slow = script.slow.contains(&ticket.queue());
            clock.fetch_add(if is_slow { SLOW_SUBMIT_NS } else { SUBMIT_NS }, Ordering::Relaxed);
        }
        if script.kick_page_ns > 0 {
            let pages = u64::try_from(bytes).unwrap() / 4096;
            script.kick_ns += KICK_NS + script.kick_page_ns * pages;
        }
        let is_flush = matches!(operation, IoOp::Flush);
        script.taken.push(Taken { ticket, is_flush, misaligned, bytes });
        match operation {
            IoOp::Flush if script.parks_flushes => Submitted::Parked,
            _ => Submitted::Started,
        }
    }

    fn kick(&mut self) -> io::Result<()> {
        let script = &mut *self.script.borrow_mut();
        let kick_ns = std::mem::take(&mut script.kick_ns);
        if let Some(clock) = &script.clock {
            clock.fetch_add(kick_ns, Ordering::Relaxed);
        }
        let fails = script.fails;
        match fails {
            None => Ok(()),
            Some(Failure::Error) => Err(io::Error::other("the host fails")),
            Some(Failure::Panic) => panic!("the host has its worker panic"),
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let script = &mut *self.script.borrow_mut();
        let Script { hung, per_reap, errno, taken, flush_ns, threads_ns, .. } = script;
        let mut flushed = HashSet::new();
        let mut left = per_reap.unwrap_or(usize::MAX);
        for it in std::mem::take(taken) {
            if hung.contains(&it.ticket.queue()) || left == 0 {
                taken.push(it);
            } else {
                left -= 1;
                let Taken { ticket, bytes, is_flush, .. } = it;
                if is_flush && flushed.insert(ticket.queue()) {
                    *threads_ns += *flush_ns;
                }
                done.push(Completion { ticket, result: errno.map_or(bytes, |errno| -errno) });
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.script.borrow().taken.len()
    }

    fn arm(&mut self) -> io::Result<bool> {
        Ok(self.script.borrow().arming_finds_a_completion)
    }

    fn disarm(&mut self, _signalled: bool) {}

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// A worker with its guests, each with one ring. A guest's number is its queue's.
pub struct Bench<P: Platform = SimXen, E = Scripted> {
    pub worker: Worker<P, E>,
    pub guests: Vec<Device>,
    pub counters: Vec<Arc<QueueCounters>>,
    pub commands: CommandSender,
    pub reports: ReportReceiver,
    pub now_ns: u64,
    stand_in: StandIn,
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

/// Storage by a script, and the script.
pub fn storage() -> (Scripted, Rc<RefCell<Script>>) {
    let script = Rc::new(RefCell::new(Script::default()));
    (Scripted { script: Rc::clone(&script), bell: Doorbell::new().unwrap() }, script)
}

/// A bench with storage by a script.
pub fn bench() -> (Bench, Rc<RefCell<Script>>) {
    let (engine, script) = storage();
    (Bench::over(engine), script)
}

impl<E: Engine<Target = Image>> Bench<SimXen, E> {
    /// A worker without guests, with this storage.
    pub fn over(engine: E) -> Bench<SimXen, E> {
        let stand_in = StandIn::start_temporary().unwrap();
        Bench::on(stand_in.platform(), engine, stand_in)
    }
}

impl<P: Platform, E: Engine<Target = Image>> Bench<P, E> {
    /// The same on a platform of the test's.
    pub fn on(platform: P, engine: E, stand_in: StandIn) -> Bench<P, E> {
        let (commands, receiver) = command_channel(WorkerId(0)).unwrap();
        let (reporter, reports) = report_channel().unwrap();
        let (id, poll) = (WorkerId(0), Duration::ZERO);
        let setup =
            Setup { id, workers: 1, platform, core: None, poll, commands: receiver, reporter };
        let worker = Worker::new(setup, engine).unwrap();
        let (guests, counters) = Default::default();
        Bench { worker, guests, counters, commands, reports, now_ns: 1, stand_in }
    }

    /// One more guest, on a disk without contents; its number.
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

    /// A guest asks for `count` times `pages` pages at different places, as far as it has buffers.
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

    /// A guest asks for `count` pages by indirect requests of one segment each.
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

    /// Passes until nothing happens any more, as a worker that never spins does them: whether it would
    /// sleep then.
    pub fn settle(&mut self) -> bool {
        for _ in 0..PASSES_MAX {
            if self.pass() == Progress::Idle && self.worker.arm().unwrap() {
                return true;
            }
        }
        false
    }

    /// How many answers a guest has got since the last time.
    pub fn answers(&mut self, guest: usize) -> usize {
        let device = &mut self.guests[guest];
        std::iter::from_fn(|| device.next_answer().unwrap())
            .inspect(|answer| assert_eq!(answer.status, 0))
            .count()
    }

    /// The same for answers of any kind, by their statuses.
    pub fn statuses(&mut self, guest: usize) -> Vec<i16> {
        let device = &mut self.guests[guest];
        std::iter::from_fn(|| device.next_answer().unwrap()).map(|answer| answer.status).collect()
    }
}

/// The stand-in, with grants of a test's own in front of its own.
#[derive(Clone)]
pub struct WithGrants<W>(pub SimXen, pub W);

/// Makes those grants.
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

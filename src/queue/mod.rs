//! One ring being served, from the request on the ring to the response on it.
//!
//! A pass of the worker takes each queue through the same steps: [`Queue::take`] copies and checks
//! requests, reads the pages of indirect ones ([`indirect`]), finds where their data is, mapping all
//! missing pages in one batch and filling bounce memory by one grant copy ([`locate`]), and submits;
//! [`Queue::complete`] takes the engine's results; [`Queue::finish_pass`] copies bounced reads to the
//! guest, as far as the turn's effort allows, publishes what is left of the responses, and says
//! whether to notify.
//!
//! What a pass does for a queue is bounded by the *effort* of its turn. What is left of copies and
//! transfers goes on with the next turn.
//!
//! A request that finds nothing left of what the worker's queues share *waits*, and so does the ring
//! behind it: it is tried again only once something was given back ([`Resources::freed`]).
//!
//! The steady path neither allocates nor calls the system per request, with one exception that the
//! admin has to choose: pages that are mapped for the time of a request ([`transient`]).
//!
//! [`grants`] and [`slots`] are public for `benches/` only.

mod bounce;
mod copies;
mod devices;
pub mod grants;
mod indirect;
mod locate;
mod report;
pub mod slots;
mod transient;

use std::collections::VecDeque;
use std::sync::Arc;

use crate::backing::Image;
use crate::blkif::Status;
use crate::blkif::codec::{Loaded, RawDirect, RawResponse};
use crate::blkif::op;
use crate::blkif::request::{DiskRules, IndirectHead, Kind, RequestFault};
use crate::blkif::ring::{BackRing, RingFault};
use crate::budget::GrantShare;
use crate::engine::{By, Completion, Engine, IoOp, RegisterBuffers, Submitted, Ticket};
use crate::limits::{
    BOUNCE_PAGES_COMMON, DISCARD_BYTES_PER_EFFORT, MOVED_PAGE_EFFORT, OPERATION_WEIGHT,
    REQUEST_EFFORT, REQUESTS_COMMON, REQUESTS_PER_PASS, REQUESTS_PER_QUEUE, RESPONSES_HELD_BACK,
    SEGMENT_EFFORT, SEGMENTS_PER_REQUEST,
};
use crate::metrics::{LatencyLog, QueueCounters};
use crate::msg::{Connect, Mapping, Outbox, QueueKey};
use crate::pool::{Pool, Share};
use crate::units::{DomId, GrantRef, Port};
use crate::xen::shm::SharedPage;
use crate::xen::{Events, Grants, PageAccess};

pub use bounce::BouncePool;
use copies::CopyBatch;
use devices::DeviceShare;
pub use devices::Devices;
use grants::{Mapper, PersistentGrants};
use indirect::Indirect;
use locate::locate_mapped;
use report::Reports;
pub use slots::LargeTables;
use slots::{Advance, Slots, Step};
use transient::TransientGrants;

/// What the queues of one worker share, lent to them for a pass.
#[derive(Debug)]
pub struct Resources<G, E> {
    /// Mappings and copies.
    pub grants: G,
    /// Storage.
    pub engine: E,
    /// When the pass began, or its completions were looked at.
    pub now_ns: u64,
    /// Changes whenever something that a queue can wait for was given back.
    pub freed: u64,
    /// What control is told.
    pub outbox: Outbox,
    /// Requests in flight,
    requests: Pool,
    /// ... and how many of them block devices have.
    devices: Devices,
    /// Memory for data that is copied.
    bounce: BouncePool,
    /// Tables for indirect requests.
    tables: LargeTables,
    /// Reused lists, so that a pass allocates nothing.
    scratch: Scratch,
}

impl<G, E> Resources<G, E> {
    /// All of it unused, by one of so many workers.
    pub fn new(grants: G, engine: E, outbox: Outbox, workers: usize) -> Resources<G, E> {
        Resources {
            grants,
            engine,
            now_ns: 0,
            freed: 0,
            outbox,
            requests: Pool::new(REQUESTS_PER_QUEUE, REQUESTS_COMMON),
            devices: Devices::new(workers),
            bounce: BouncePool::new(BOUNCE_PAGES_COMMON),
            tables: LargeTables::default(),
            scratch: Scratch::default(),
        }
    }

    fn mapper(&mut self) -> Mapper<'_, G, E> {
        Mapper { grants: &mut self.grants, engine: &mut self.engine }
    }
}

/// What a pass fills and empties.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The direct request being taken.
    direct: RawDirect,
    /// Slots of requests just taken.
    fresh: Vec<u32>,
    /// Indirect requests whose segments are still to be read.
    indirect: Vec<Indirect>,
    /// Their segments as they were copied, one request after the other.
    segment_bytes: Vec<u8>,
    /// Segments whose page is not mapped: slot, index of the segment.
    unmapped: Vec<(u32, usize)>,
    /// References to map.
    wanted: Vec<GrantRef>,
    copies: CopyBatch,
}

/// One connected ring.
#[derive(Debug)]
pub struct Queue {
    key: QueueKey,
    index: u32,
    frontend: DomId,
    port: Port,
    ring: BackRing,
    rules: DiskRules,
    image: Arc<Image>,
    memory_alignment: u16,
    /// The worker moves its data itself.
    moves_data: bool,
    /// A thread of the kernel moves its data.
    is_threaded: bool,
    slots: Slots,
    /// This queue's part of the worker's requests in flight and tables.
    requests: Share,
    tables: Share,
    /// ... and of what the block device of its disk can have.
    device: Option<DeviceShare>,
    /// Its own bounce memory, for data that finds no room in the worker's.
    bounce: BouncePool,
    /// Slots whose next step the engine had no room for.
    refused: VecDeque<u32>,
    /// Slots that wait for bounce memory.
    stalled: VecDeque<u32>,
    /// An indirect request that waits for a table.
    parked: Option<IndirectHead>,
    /// [`Resources::freed`] when what waits was last tried; `None`: nothing waits.
    waits_since: Option<u64>,
    /// Writes whose data is being copied to bounce memory.
    fetched: VecDeque<u32>,
    /// Reads whose data is being copied from bounce memory to the guest.
    copied_out: VecDeque<u32>,
    /// Slots whose next step has to wait for the next turn.
    interrupted: VecDeque<u32>,
    /// What is left of the turn, and what storage costs of it for each request.
    effort: u32,
    operation_effort: u32,
    /// What goes to storage with the next kick, by the weights of operations.
    started: u32,
    /// Operations that came back since [`Queue::take_threaded`] and that threads of the kernel did,
    threaded: u32,
    /// ... without flushes: those that come back together were one for storage.
    flushed: bool,
    mapped: Mapped,
    counters: Arc<QueueCounters>,
    latency: LatencyLog,
    barrier: Barrier,
    /// The frontend is to be notified at the end of the pass.
    notify: bool,
    /// Takes no more requests: asked to, or the frontend broke the ring.
    stopped: bool,
    /// Takes so many requests more, and then none until its image is replaced.
    before_pause: Option<u32>,
    reports: Reports,
}

/// What one turn of a queue may cost, in units of [`EFFORT_NS`](crate::limits::EFFORT_NS).
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// When it is spent, the turn ends.
    pub effort: u32,
    /// What it costs of it to give storage an operation without data.
    pub operation_effort: u32,
}

/// What is mapped of the guest's data pages ([`Mapping`]).
#[derive(Debug)]
enum Mapped {
    Kept(PersistentGrants),
    PerRequest(TransientGrants),
    Nothing,
}

/// A write that may not change places with others. Nothing is taken before it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Barrier {
    None,
    /// Its slot waits until it is alone in flight.
    Waits(u32),
    /// Its slot is alone in flight.
    Began(u32),
}

impl Queue {
    /// Maps the ring and binds the event channel. On an error nothing stays mapped or bound; the
    /// text names the reference or port, for the frontend's `error` node.
    pub fn connect<G: Grants, E, V: Events>(
        connect: Connect,
        index: u32,
        io: &mut Resources<G, E>,
        events: &mut V,
    ) -> Result<Queue, String> {
        let grants = &mut io.grants;
        let refs = &connect.ring_refs;
        let pages = grants.map(connect.frontend, refs, PageAccess::ReadWrite).map_err(|error| {
            let refs: Vec<u32> = refs.iter().map(|gref| gref.0).collect();
            format!("mapping ring-ref {refs:?}: {error}")
        })?;
        let ring = match BackRing::attach(SharedPage::over(pages), connect.protocol) {
            Ok(ring) => ring,
            Err((fault, page)) => {
                unmap_ring(grants, page);
                return Err(fault.to_string());
            }
        };
        let port = match events.bind_interdomain(connect.frontend, connect.port) {
            Ok(port) => port,
            Err(error) => {
                unmap_ring(grants, ring.into_page());
                return Err(format!("binding event-channel {}: {error}", connect.port));
            }
        };
        let size = ring.size();
        let list = || VecDeque::with_capacity(size as usize);
        let share = GrantShare::of(connect.budget);
        let device = io.devices.join(&connect.image);
        Ok(Queue {
            key: connect.key,
            index,
            frontend: connect.frontend,
            port,
            ring,
            bounce: BouncePool::new(largest_request(&connect.rules)),
            rules: connect.rules,
            memory_alignment: connect.image.memory_alignment(),
            moves_data: connect.image.is_moved_by_worker(),
            is_threaded: connect.image.is_moved_by_thread(),
            image: connect.image,
            slots: Slots::new(size),
            requests: Share::default(),
            tables: Share::default(),
            device,
            refused: list(),
            stalled: list(),
            parked: None,
            waits_since: None,
            fetched: list(),
            copied_out: list(),
            interrupted: list(),
            effort: 0,
            operation_effort: 0,
            started: 0,
            threaded: 0,
            flushed: false,
            mapped: match connect.mapping {
                Mapping::Kept => Mapped::Kept(PersistentGrants::new(share)),
                Mapping::PerRequest => Mapped::PerRequest(TransientGrants::new(share)),
                Mapping::Nothing => Mapped::Nothing,
            },
            counters: connect.counters,
            latency: LatencyLog::default(),
            barrier: Barrier::None,
            notify: false,
            stopped: false,
            before_pause: None,
            reports: Reports::default(),
        })
    }

    /// Unmaps and unbinds everything. Call only once [`Queue::is_drained`].
    pub fn disconnect<G: Grants, E: RegisterBuffers, V: Events>(
        mut self,
        io: &mut Resources<G, E>,
        events: &mut V,
    ) {
        assert!(self.is_drained());
        self.settle(io);
        if let Err(error) = events.unbind(self.port) {
            tracing::warn!(domid = %self.frontend, port = %self.port, %error, "unbinding failed");
        }
        if let Mapped::Kept(persistent) = &mut self.mapped {
            persistent.unmap_all(&mut io.mapper());
        }
        self.counters.grants_mapped.set(0);
        io.devices.leave(self.device);
        unmap_ring(&mut io.grants, self.ring.into_page());
    }

    /// Its name.
    pub fn key(&self) -> QueueKey {
        self.key
    }

    /// Our end of its event channel.
    pub fn port(&self) -> Port {
        self.port
    }

    /// Whether nothing is in flight.
    pub fn is_drained(&self) -> bool {
        self.ring.in_flight() == 0
    }

    /// Takes no more requests; those in flight are finished and answered.
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    /// Takes what the frontend has published by now, and then no requests until
    /// [`Queue::replace_image`]; those in flight are finished and answered. It has to be polled.
    pub fn pause(&mut self) {
        // A broken ring is found out when it is looked at again.
        self.before_pause = Some(self.ring.requests().unwrap_or(0));
    }

    /// Whether all of that is done.
    pub fn is_paused(&self) -> bool {
        self.is_drained() && (self.stopped || self.before_pause == Some(0))
    }

    /// Serves another image from now on. Call only once [`Queue::is_paused`], so that no request
    /// is checked against one image and carried out on another.
    pub fn replace_image<G, E>(
        &mut self,
        io: &mut Resources<G, E>,
        image: Arc<Image>,
        rules: DiskRules,
    ) {
        assert!(self.is_drained());
        let device = io.devices.join(&image);
        io.devices.leave(std::mem::replace(&mut self.device, device));
        self.memory_alignment = image.memory_alignment();
        self.moves_data = image.is_moved_by_worker();
        self.is_threaded = image.is_moved_by_thread();
        self.image = image;
        if largest_request(&rules) > self.bounce.pages() {
            self.bounce = BouncePool::new(largest_request(&rules));
        }
        self.rules = rules;
        self.before_pause = None;
        // What it waited for was of the image before.
        self.waits_since = None;
    }

    /// Whether there is something to do at once. If not, the frontend was asked for a notification, unless
    /// its requests have to wait for something else; `freed` is [`Resources::freed`].
    pub fn arm(&mut self, freed: u64) -> bool {
        self.has_work_off_ring(freed).unwrap_or_else(|| self.ring.arm())
    }

    /// Whether data waits to be copied to the guest.
    pub fn has_copies(&self) -> bool {
        !self.copied_out.is_empty()
    }

    /// It has no turn in this pass.
    pub fn put_off(&mut self) {
        self.effort = 0;
    }

    /// Takes out what goes to storage with the next kick: [`OPERATION_WEIGHT`] for each operation, and 1 for
    /// each page of its data.
    pub fn take_started(&mut self) -> u32 {
        std::mem::take(&mut self.started)
    }

    /// Takes out how many operations threads of the kernel have done.
    pub fn take_threaded(&mut self) -> u32 {
        let flushes = u32::from(std::mem::take(&mut self.flushed));
        std::mem::take(&mut self.threaded).saturating_add(flushes)
    }

    /// Whether it waits for something that others have.
    pub fn waits(&self) -> bool {
        self.waits_since.is_some()
    }

    /// Whether what it waits for may be there, now that something was given back.
    pub fn may_go_on<G, E>(&self, io: &Resources<G, E>) -> bool {
        self.has_waiting() || self.has_unfinished() || io.devices.has_room(&self.device)
    }

    /// Whether a turn would find anything to do; `freed` is [`Resources::freed`].
    pub fn has_work(&self, freed: u64) -> bool {
        let on_ring = || !matches!(self.ring.requests(), Ok(0));
        self.has_work_off_ring(freed).unwrap_or_else(on_ring)
    }

    /// The same, as far as that does not depend on what the ring holds; `None`: it does.
    fn has_work_off_ring(&self, freed: u64) -> Option<bool> {
        if self.has_unfinished() {
            return Some(true);
        }
        if let Some(since) = self.waits_since {
            return Some(since != freed);
        }
        match self.barrier {
            // Their own completions bring the worker back.
            Barrier::Waits(_) => Some(self.barrier_may_begin()),
            Barrier::Began(_) => Some(false),
            Barrier::None if self.stopped => Some(false),
            Barrier::None => self.before_pause.map(|left| left > 0),
        }
    }

    /// Whether a barrier waits for nothing but its turn.
    fn barrier_may_begin(&self) -> bool {
        matches!(self.barrier, Barrier::Waits(_)) && self.ring.in_flight() == 1
    }

    /// Asks the frontend for no notification any more, until [`Queue::arm`].
    pub fn disarm(&self) {
        self.ring.disarm();
    }

    /// Unmaps granted pages that have long been idle; `true`: others are still mapped.
    pub fn sweep<G: Grants, E: RegisterBuffers>(&mut self, io: &mut Resources<G, E>) -> bool {
        let Mapped::Kept(persistent) = &mut self.mapped else { return false };
        persistent.sweep(&mut io.mapper(), self.slots.refs());
        self.counters.grants_mapped.set(persistent.count() as u64);
        persistent.count() > 0
    }

    /// A turn: takes requests off the ring and gets them under way, after what is left of the turn
    /// before, until its effort is spent. `true`: [`Queue::finish_pass`] has to follow, because something
    /// was done, or what had waited is done.
    #[inline]
    pub fn take<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        turn: Turn,
    ) -> Result<bool, RingFault> {
        let Turn { effort, operation_effort } = turn;
        (self.effort, self.operation_effort) = (effort, operation_effort);
        if self.has_unfinished() {
            self.go_on(io);
        }
        self.take_requests(io)?;
        Ok(self.effort < effort || self.ring.unpublished() > 0 || !self.copied_out.is_empty())
    }

    #[inline]
    fn take_requests<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
    ) -> Result<(), RingFault> {
        let freed = io.freed;
        if let Some(since) = self.waits_since {
            if since == freed {
                return Ok(());
            }
            self.waits_since = None;
            self.retry(io);
        }
        if self.has_waiting() {
            self.waits_since = Some(freed);
            return Ok(());
        }
        if self.barrier != Barrier::None {
            self.try_barrier(io);
            return Ok(());
        }
        if self.stopped || self.before_pause == Some(0) {
            return Ok(());
        }
        let mut waiting = self.ring.requests().inspect_err(|_| self.stopped = true)?;
        if let Some(left) = &mut self.before_pause {
            // A frontend that took requests back is not waited for.
            *left = waiting.min(*left);
            waiting = *left;
        }
        if waiting == 0 {
            return Ok(());
        }
        let room = REQUESTS_PER_PASS.min(io.requests.available(&self.requests));
        let count = waiting.min(u32::try_from(room).unwrap_or(0));
        let taken = self.take_some(io, count);
        if let Some(left) = &mut self.before_pause {
            *left -= taken;
        }
        // A barrier that was taken has all that it needs, and waits for those before it.
        let is_full = self.barrier == Barrier::None && !io.devices.has_room(&self.device);
        if room == 0 || self.has_waiting() || is_full {
            self.waits_since = Some(freed);
        }
        Ok(())
    }

    /// Takes at most `count` requests, which there are; says how many.
    #[inline]
    fn take_some<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        count: u32,
    ) -> u32 {
        let mut taken = 0;
        while taken < count && self.takes_more(io) {
            self.ring.prefetch();
            self.take_one(io);
            taken += 1;
            if self.ring.unpublished() >= RESPONSES_HELD_BACK {
                self.notify |= self.ring.publish();
            }
        }
        let had_room = io.requests.take(&mut self.requests, taken as usize);
        assert!(had_room, "no more are taken than there is room for");
        if !io.scratch.indirect.is_empty() {
            self.read_indirect(io);
        }
        if !io.scratch.fresh.is_empty() {
            self.start(io);
        }
        taken
    }

    /// Whether the turn goes on with the next request.
    #[inline]
    fn takes_more<G, E>(&self, io: &Resources<G, E>) -> bool {
        self.barrier == Barrier::None
            && self.parked.is_none()
            && self.effort > 0
            && io.devices.has_room(&self.device)
    }

    #[inline]
    fn spend(&mut self, effort: u32) {
        self.effort = self.effort.saturating_sub(effort);
    }

    #[inline]
    fn spend_on_request(&mut self, count: usize) {
        let segments = u32::try_from(count).unwrap_or(u32::MAX);
        let to_look = REQUEST_EFFORT + segments.saturating_mul(SEGMENT_EFFORT);
        let to_submit = self.operation_effort.saturating_mul(weight(count)) / OPERATION_WEIGHT;
        self.spend(to_look.saturating_add(to_submit));
    }

    #[inline]
    fn take_one<G: Grants, E: Engine<Target = Image>>(&mut self, io: &mut Resources<G, E>) {
        match self.ring.take_into(&mut io.scratch.direct) {
            Loaded::Direct => self.take_direct(io),
            Loaded::Indirect(raw) => match self.rules.check_indirect(&raw) {
                Ok(head) => self.take_indirect(io, head),
                Err(fault) => self.refuse(raw.id, raw.operation, fault),
            },
            Loaded::Discard(raw) => match self.rules.check_discard(&raw) {
                Ok(request) => {
                    let (index, slot) = self.slots.take();
                    slot.begin(request, 0, None, io.now_ns);
                    io.devices.take(&mut self.device, 0);
                    let parts = request.len_bytes / DISCARD_BYTES_PER_EFFORT;
                    self.spend_on_request(0);
                    self.spend(u32::try_from(parts).unwrap_or(u32::MAX));
                    io.scratch.fresh.push(index);
                }
                Err(fault) => self.refuse(raw.id, op::DISCARD, fault),
            },
        }
    }

    /// Begins a direct request; where all its pages are mapped, which is the rule, it gets under
    /// way at once.
    #[inline]
    fn take_direct<G: Grants, E: Engine<Target = Image>>(&mut self, io: &mut Resources<G, E>) {
        let raw = &io.scratch.direct;
        let (index, slot) = self.slots.take();
        match self.rules.check_direct(raw, slot.inline_segments_mut()) {
            Ok((request, count)) => {
                slot.begin(request, count, None, io.now_ns);
                let is_mapped = locate_mapped(self.mapped.kept(), slot, self.memory_alignment);
                io.devices.take(&mut self.device, count);
                self.spend_on_request(count);
                if request.is_barrier() {
                    self.barrier = Barrier::Waits(index);
                } else if is_mapped {
                    self.submit(io, index);
                } else {
                    io.scratch.fresh.push(index);
                }
            }
            Err(fault) => {
                let (id, operation) = (raw.id, raw.operation);
                let none = self.slots.give_back(index);
                assert!(none.is_none(), "a direct request has no table");
                self.refuse(id, operation, fault);
            }
        }
    }

    /// Begins the barrier if nothing else is in flight any more.
    #[cold]
    fn try_barrier<G: Grants, E: Engine<Target = Image>>(&mut self, io: &mut Resources<G, E>) {
        if let Barrier::Waits(slot) = self.barrier
            && self.barrier_may_begin()
        {
            self.barrier = Barrier::Began(slot);
            io.scratch.fresh.push(slot);
            self.start(io);
        }
    }

    /// Answers a request that never gets a slot.
    #[cold]
    fn refuse(&mut self, id: u64, operation: u8, fault: RequestFault) {
        self.spend(REQUEST_EFFORT);
        self.counters.errors.add(1);
        self.ring.answer(&RawResponse::new(id, operation, fault.status()));
    }

    /// Gets the fresh requests under way: finds their data, and submits them.
    #[inline]
    fn start<G: Grants, E: Engine<Target = Image>>(&mut self, io: &mut Resources<G, E>) {
        self.locate(io);
        for at in 0..io.scratch.fresh.len() {
            let slot = io.scratch.fresh[at];
            self.submit(io, slot);
        }
        io.scratch.fresh.clear();
        if !self.fetched.is_empty() {
            self.fetch(io);
        }
    }

    /// Whether requests that were taken wait for what others have.
    #[inline]
    fn has_waiting(&self) -> bool {
        !self.refused.is_empty() || !self.stalled.is_empty() || self.parked.is_some()
    }

    /// Tries again what waits, in order, as far as there is room now.
    #[cold]
    fn retry<G: Grants, E: Engine<Target = Image>>(&mut self, io: &mut Resources<G, E>) {
        while let Some(slot) = self.refused.pop_front() {
            let others = self.refused.len();
            self.submit(io, slot);
            if stays_first(&mut self.refused, others) {
                break;
            }
        }
        while let Some(slot) = self.stalled.front().copied() {
            if !self.bounce(io, slot) {
                break;
            }
            self.stalled.pop_front();
            if !self.slots.get_mut(slot).is_to_be_fetched() {
                self.submit(io, slot);
            }
        }
        if !self.fetched.is_empty() {
            self.fetch(io);
        }
        if let Some(head) = self.parked.take() {
            self.take_indirect(io, head);
            if !io.scratch.indirect.is_empty() {
                self.read_indirect(io);
                self.start(io);
            }
        }
    }

    /// Whether the turn before has left anything.
    #[inline]
    fn has_unfinished(&self) -> bool {
        !self.interrupted.is_empty() || !self.fetched.is_empty() || !self.copied_out.is_empty()
    }

    /// Goes on with what the turn before has left, what is nearest to its end first.
    #[cold]
    fn go_on<G: Grants, E: Engine<Target = Image>>(&mut self, io: &mut Resources<G, E>) {
        if !self.copied_out.is_empty() {
            self.copy_reads_out(io);
        }
        while let Some(slot) = self.interrupted.pop_front() {
            let others = self.interrupted.len();
            self.submit(io, slot);
            if stays_first(&mut self.interrupted, others) {
                break;
            }
        }
        if !self.fetched.is_empty() {
            self.fetch(io);
        }
    }

    /// Hands a slot's next step to the engine, now or when it has room again.
    fn submit<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        slot_index: u32,
    ) {
        loop {
            if self.moves_data && self.effort == 0 {
                return self.interrupted.push_back(slot_index);
            }
            let by = io.devices.submitter(&self.device);
            match self.submit_step(&mut io.engine, slot_index, by) {
                Submitted::Started => {
                    self.started += weight(self.slots.get_mut(slot_index).segments().len());
                    return;
                }
                Submitted::Parked => return,
                Submitted::Done(Completion { result, .. }) => {
                    if !self.finish_step(io, slot_index, result) {
                        return;
                    }
                }
                Submitted::Full(_) => {
                    // Set here, because a step may also be submitted outside of a turn, by `complete`.
                    self.waits_since.get_or_insert(io.freed);
                    return self.refused.push_back(slot_index);
                }
            }
        }
    }

    #[inline(always)]
    fn submit_step<E: Engine<Target = Image>>(
        &mut self,
        engine: &mut E,
        slot_index: u32,
        by: By,
    ) -> Submitted {
        let count = if self.moves_data { self.pages_to_move(slot_index) } else { usize::MAX };
        let slot = self.slots.get_mut(slot_index);
        let ticket = Ticket::new(self.index, slot_index);
        let offset = slot.offset_bytes();
        match slot.step() {
            Step::Flush => engine.submit(&self.image, &IoOp::Flush, ticket, by),
            Step::Discard { secure } => {
                let len = slot.request.len_bytes;
                engine.submit(&self.image, &IoOp::Discard { offset, len, secure }, ticket, by)
            }
            Step::Read => slot.with_buffers(count, |buffers| {
                engine.submit(&self.image, &IoOp::Read { offset, buffers }, ticket, by)
            }),
            Step::Write => slot.with_buffers(count, |buffers| {
                engine.submit(&self.image, &IoOp::Write { offset, buffers }, ticket, by)
            }),
        }
    }

    /// How many buffers of a slot the worker itself moves in one go: as many as the turn allows.
    fn pages_to_move(&mut self, slot_index: u32) -> usize {
        let count = (self.effort / MOVED_PAGE_EFFORT).max(1);
        let segments = self.slots.get_mut(slot_index).segments().len();
        let moved = count.min(u32::try_from(segments).unwrap_or(u32::MAX));
        self.spend(moved * MOVED_PAGE_EFFORT);
        count as usize
    }

    /// Takes the result of a step.
    #[inline]
    pub fn complete<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        slot_index: u32,
        result: i32,
    ) {
        match self.slots.get_mut(slot_index).step() {
            Step::Flush => self.flushed = true,
            Step::Read | Step::Write if !self.is_threaded => {}
            Step::Read | Step::Write | Step::Discard { .. } => {
                self.threaded = self.threaded.saturating_add(1);
            }
        }
        if self.finish_step(io, slot_index, result) {
            self.submit(io, slot_index);
        }
    }

    /// Takes note of a step's result; `true`: the next one is to be submitted.
    #[inline(always)]
    fn finish_step<G: Grants, E: Engine>(
        &mut self,
        io: &mut Resources<G, E>,
        slot_index: u32,
        result: i32,
    ) -> bool {
        let slot = self.slots.get_mut(slot_index);
        let advance = slot.advance(result);
        let needs_copy = slot.is_bounced() && slot.request.kind == Kind::Read;
        match advance {
            Advance::Done if needs_copy => self.copied_out.push_back(slot_index),
            Advance::Done => self.answer(io, slot_index, Status::Okay),
            Advance::Again => return true,
            Advance::Failed(errno) => {
                let status = self.storage_failed(io, slot_index, errno);
                self.answer(io, slot_index, status);
            }
        }
        false
    }

    /// Ends a pass: bounced reads go to the guest as far as the turn allows, all responses become
    /// visible. `true`: notify.
    #[inline]
    pub fn finish_pass<G: Grants, E>(&mut self, io: &mut Resources<G, E>) -> bool {
        if !self.copied_out.is_empty() {
            self.copy_reads_out(io);
        }
        self.settle(io);
        let notify = self.ring.publish() | std::mem::take(&mut self.notify);
        if notify {
            self.counters.notifications.add(1);
        }
        notify
    }

    /// Gives back the places of requests that were answered.
    #[inline]
    fn settle<G, E>(&mut self, io: &mut Resources<G, E>) {
        let answered = self.requests.used() - self.ring.in_flight() as usize;
        if answered > 0 {
            io.requests.give_back(&mut self.requests, answered);
            io.freed += 1;
        }
    }

    #[inline(always)]
    fn answer<G: Grants, E>(&mut self, io: &mut Resources<G, E>, slot_index: u32, status: Status) {
        let slot = self.slots.get_mut(slot_index);
        if slot.is_bounced() {
            slot.give_back_bounced(&mut io.bounce, &mut self.bounce);
        }
        if let Mapped::PerRequest(transient) = &mut self.mapped {
            transient.release(&mut io.grants, slot);
            self.counters.grants_mapped.set(transient.count() as u64);
        }
        let (request, taken_ns) = (slot.request, slot.taken_ns);
        if self.device.is_some() {
            io.devices.give_back(&mut self.device, slot.segments().len());
        }
        if let Some(table) = self.slots.give_back(slot_index) {
            io.tables.give_back(table, &mut self.tables);
        }
        if self.barrier == Barrier::Began(slot_index) {
            self.barrier = Barrier::None;
        }
        self.ring.answer(&RawResponse::new(request.id, request.operation, status));
        io.freed += 1;
        self.latency.record(io.now_ns.saturating_sub(taken_ns));
        self.count(io, &request, status);
    }
}

/// What an operation with so many segments weighs where the time to submit is shared.
fn weight(segments: usize) -> u32 {
    OPERATION_WEIGHT.saturating_add(u32::try_from(segments).unwrap_or(u32::MAX))
}

/// If a slot that was taken off a list is at its end again, beside the `others`, it stays the first.
fn stays_first(list: &mut VecDeque<u32>, others: usize) -> bool {
    let is_back = list.len() > others;
    if is_back {
        list.rotate_right(1);
    }
    is_back
}

/// Pages that the data of the largest request can be in.
fn largest_request(rules: &DiskRules) -> usize {
    SEGMENTS_PER_REQUEST.max(rules.indirect_segments.into())
}

fn unmap_ring<G: Grants>(grants: &mut G, page: SharedPage) {
    let pages = page.into_guest_pages().expect("a ring is made over guest pages");
    if let Err(error) = grants.unmap(pages) {
        tracing::warn!(%error, "unmapping a ring failed");
    }
}

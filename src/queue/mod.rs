//! One ring being served, from the request on the ring to the response on it.
//!
//! A pass of the worker takes each queue through the same steps: [`Queue::take`] copies and checks
//! requests, reads the pages of indirect ones ([`indirect`]), finds where their data is, mapping all
//! missing pages in one batch and filling bounce memory by one grant copy ([`locate`]), and
//! submits; [`Queue::complete`] takes the engine's results; [`Queue::finish_pass`] empties bounce
//! memory by one grant copy, publishes what is left of the responses, and says whether to notify.
//!
//! The steady path neither allocates nor calls the system per request, with one exception that the
//! admin has to choose: pages that are mapped for the time of a request ([`transient`]).
//!
//! [`grants`] and [`slots`] are public for `benches/` only.

mod bounce;
pub mod grants;
mod indirect;
mod locate;
pub mod slots;
mod transient;

use std::sync::Arc;

use hdrhistogram::Histogram;

use crate::backing::Image;
use crate::blkif::Status;
use crate::blkif::codec::{Loaded, RawDirect, RawResponse};
use crate::blkif::op;
use crate::blkif::request::{DiskRules, IndirectHead, Kind, Request, RequestFault};
use crate::blkif::ring::{BackRing, RingFault};
use crate::budget::Share;
use crate::engine::{Completion, Engine, IoOp, RegisterBuffers, Submitted, Ticket};
use crate::limits::{REQUESTS_PER_PASS, RESPONSES_HELD_BACK};
use crate::metrics::{LatencyLog, QueueCounters};
use crate::msg::{Connect, Mapping, QueueKey};
use crate::units::{DomId, GrantRef, Port};
use crate::xen::shm::SharedPage;
use crate::xen::{Events, GrantCopy, Grants, PageAccess};

pub use bounce::BouncePool;
use grants::{Mapper, PersistentGrants};
use locate::locate_mapped;
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
    /// Memory for data that is copied.
    pub bounce: BouncePool,
    /// Tables for indirect requests.
    pub tables: LargeTables,
    /// Reused lists, so that a pass allocates nothing.
    pub scratch: Scratch,
}

impl<G, E> Resources<G, E> {
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
    heads: Vec<IndirectHead>,
    /// Their segments as they were copied, one request after the other.
    segment_bytes: Vec<u8>,
    /// Segments whose page is not mapped: slot, index of the segment.
    unmapped: Vec<(u32, usize)>,
    /// References to map.
    wanted: Vec<GrantRef>,
    /// Copies to do, and the slot or head of each.
    copies: Vec<GrantCopy>,
    owners: Vec<u32>,
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
    slots: Slots,
    /// Slots whose next step the engine had no room for.
    refused: Vec<u32>,
    /// Slots that wait for bounce memory.
    stalled: Vec<u32>,
    /// Reads whose data waits in bounce memory for the end of the pass.
    copy_out: Vec<u32>,
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
    storage_errors: u64,
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
    pub fn connect<G: Grants, V: Events>(
        connect: Connect,
        index: u32,
        grants: &mut G,
        events: &mut V,
    ) -> Result<Queue, String> {
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
        let share = Share::of(connect.budget);
        Ok(Queue {
            key: connect.key,
            index,
            frontend: connect.frontend,
            port,
            ring,
            rules: connect.rules,
            memory_alignment: connect.image.memory_alignment(),
            image: connect.image,
            slots: Slots::new(size),
            refused: Vec::with_capacity(size as usize),
            stalled: Vec::with_capacity(size as usize),
            copy_out: Vec::with_capacity(size as usize),
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
            storage_errors: 0,
        })
    }

    /// Unmaps and unbinds everything. Call only once [`Queue::is_drained`].
    pub fn disconnect<G: Grants, E: RegisterBuffers, V: Events>(
        mut self,
        io: &mut Resources<G, E>,
        events: &mut V,
    ) {
        assert!(self.is_drained());
        if let Err(error) = events.unbind(self.port) {
            tracing::warn!(domid = %self.frontend, port = %self.port, %error, "unbinding failed");
        }
        if let Mapped::Kept(persistent) = &mut self.mapped {
            persistent.unmap_all(&mut io.mapper());
        }
        self.counters.grants_mapped.set(0);
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
    pub fn replace_image(&mut self, image: Arc<Image>, rules: DiskRules) {
        assert!(self.is_drained());
        self.memory_alignment = image.memory_alignment();
        self.image = image;
        self.rules = rules;
        self.before_pause = None;
    }

    /// Asks the frontend for a notification, then looks again; `true`: there is work already.
    pub fn arm(&mut self) -> bool {
        let more = match self.before_pause {
            None => !self.stopped && self.ring.arm(),
            Some(left) => !self.stopped && left > 0,
        };
        self.has_waiting() || more
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

    /// Hands over the latencies recorded since the last time.
    pub fn take_latency(&mut self) -> Histogram<u64> {
        self.latency.take()
    }

    /// Takes requests off the ring and gets them under way. `true`: [`Queue::finish_pass`] has to
    /// follow, because some were taken, or some that had waited are done.
    #[inline]
    pub fn take<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        now_ns: u64,
    ) -> Result<bool, RingFault> {
        let taken = self.take_requests(io, now_ns)?;
        Ok(taken > 0 || self.ring.unpublished() > 0 || !self.copy_out.is_empty())
    }

    #[inline]
    fn take_requests<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        now_ns: u64,
    ) -> Result<u32, RingFault> {
        if self.has_waiting() {
            self.retry(io, now_ns);
        }
        if self.barrier != Barrier::None {
            self.try_barrier(io, now_ns);
            return Ok(0);
        }
        if self.stopped || self.before_pause == Some(0) || self.has_waiting() {
            return Ok(0);
        }
        let mut waiting = self.ring.requests().inspect_err(|_| self.stopped = true)?;
        if let Some(left) = &mut self.before_pause {
            // A frontend that took requests back is not waited for.
            *left = waiting.min(*left);
            waiting = *left;
        }
        // Any of them may be indirect.
        let room = REQUESTS_PER_PASS.min(io.tables.free());
        let count = waiting.min(u32::try_from(room).unwrap_or(0));
        if count == 0 {
            return Ok(0);
        }
        let mut taken = 0;
        while taken < count && self.barrier == Barrier::None {
            self.ring.prefetch();
            self.take_one(io, now_ns);
            taken += 1;
            if self.ring.unpublished() >= RESPONSES_HELD_BACK {
                self.notify |= self.ring.publish();
            }
        }
        if let Some(left) = &mut self.before_pause {
            *left -= taken;
        }
        if !io.scratch.heads.is_empty() {
            self.read_indirect(io, now_ns);
        }
        if !io.scratch.fresh.is_empty() {
            self.start(io, now_ns);
        }
        Ok(taken)
    }

    #[inline]
    fn take_one<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        now_ns: u64,
    ) {
        match self.ring.take_into(&mut io.scratch.direct) {
            Loaded::Direct => self.take_direct(io, now_ns),
            Loaded::Indirect(raw) => match self.rules.check_indirect(&raw) {
                Ok(head) => io.scratch.heads.push(head),
                Err(fault) => self.refuse(raw.id, raw.operation, fault),
            },
            Loaded::Discard(raw) => match self.rules.check_discard(&raw) {
                Ok(request) => {
                    let (index, slot) = self.slots.take();
                    slot.begin(request, 0, None, now_ns);
                    io.scratch.fresh.push(index);
                }
                Err(fault) => self.refuse(raw.id, op::DISCARD, fault),
            },
        }
    }

    /// Begins a direct request; where all its pages are mapped, which is the rule, it gets under
    /// way at once.
    #[inline]
    fn take_direct<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        now_ns: u64,
    ) {
        let raw = &io.scratch.direct;
        let (index, slot) = self.slots.take();
        match self.rules.check_direct(raw, slot.inline_segments_mut()) {
            Ok((request, count)) => {
                slot.begin(request, count, None, now_ns);
                if request.is_barrier() {
                    self.barrier = Barrier::Waits(index);
                } else if locate_mapped(self.mapped.kept(), slot, self.memory_alignment) {
                    self.submit(io, index, now_ns);
                } else {
                    io.scratch.fresh.push(index);
                }
            }
            Err(fault) => {
                let (id, operation) = (raw.id, raw.operation);
                self.slots.give_back(index, &mut io.tables);
                self.refuse(id, operation, fault);
            }
        }
    }

    /// Begins the barrier if nothing else is in flight any more.
    #[cold]
    fn try_barrier<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        now_ns: u64,
    ) {
        if let Barrier::Waits(slot) = self.barrier
            && self.ring.in_flight() == 1
        {
            self.barrier = Barrier::Began(slot);
            io.scratch.fresh.push(slot);
            self.start(io, now_ns);
        }
    }

    /// Answers a request that never gets a slot.
    #[cold]
    fn refuse(&mut self, id: u64, operation: u8, fault: RequestFault) {
        self.counters.errors.add(1);
        self.ring.answer(&RawResponse::new(id, operation, fault.status()));
    }

    /// Gets the fresh requests under way: finds their data, and submits them.
    #[inline]
    fn start<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        now_ns: u64,
    ) {
        self.locate(io);
        for at in 0..io.scratch.fresh.len() {
            let slot = io.scratch.fresh[at];
            if self.slots.get_mut(slot).failed {
                self.answer(io, slot, Status::Error, now_ns);
            } else {
                self.submit(io, slot, now_ns);
            }
        }
        io.scratch.fresh.clear();
    }

    /// Whether requests that were taken wait for room in the engine or for bounce memory.
    #[inline]
    fn has_waiting(&self) -> bool {
        !self.refused.is_empty() || !self.stalled.is_empty()
    }

    #[cold]
    fn retry<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        now_ns: u64,
    ) {
        let mut again = std::mem::take(&mut self.refused);
        for slot in again.drain(..) {
            self.submit(io, slot, now_ns);
        }
        // The list goes on with its memory, for a pass allocates nothing.
        again.append(&mut self.refused);
        self.refused = again;
        if !self.stalled.is_empty() {
            io.scratch.fresh.append(&mut self.stalled);
            self.start(io, now_ns);
        }
    }

    /// Hands a slot's next step to the engine, now or when it has room again.
    fn submit<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        slot_index: u32,
        now_ns: u64,
    ) {
        loop {
            match self.submit_step(&mut io.engine, slot_index) {
                Submitted::Started | Submitted::Parked => return,
                Submitted::Done(Completion { result, .. }) => {
                    if !self.finish_step(io, slot_index, result, now_ns) {
                        return;
                    }
                }
                Submitted::Full(_) => return self.refused.push(slot_index),
            }
        }
    }

    #[inline(always)]
    fn submit_step<E: Engine<Target = Image>>(
        &mut self,
        engine: &mut E,
        slot_index: u32,
    ) -> Submitted {
        let slot = self.slots.get_mut(slot_index);
        let ticket = Ticket::new(self.index, slot_index);
        let offset = slot.offset_bytes();
        match slot.step() {
            Step::Flush => engine.submit(&self.image, &IoOp::Flush, ticket),
            Step::Discard { secure } => {
                let len = slot.request.len_bytes;
                engine.submit(&self.image, &IoOp::Discard { offset, len, secure }, ticket)
            }
            Step::Read => slot.with_buffers(|buffers| {
                engine.submit(&self.image, &IoOp::Read { offset, buffers }, ticket)
            }),
            Step::Write => slot.with_buffers(|buffers| {
                engine.submit(&self.image, &IoOp::Write { offset, buffers }, ticket)
            }),
        }
    }

    /// Takes the result of a step.
    #[inline]
    pub fn complete<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        slot_index: u32,
        result: i32,
        now_ns: u64,
    ) {
        if self.finish_step(io, slot_index, result, now_ns) {
            self.submit(io, slot_index, now_ns);
        }
    }

    /// Takes note of a step's result; `true`: the next one is to be submitted.
    #[inline(always)]
    fn finish_step<G: Grants, E: Engine>(
        &mut self,
        io: &mut Resources<G, E>,
        slot_index: u32,
        result: i32,
        now_ns: u64,
    ) -> bool {
        let slot = self.slots.get_mut(slot_index);
        let advance = slot.advance(result);
        let needs_copy = slot.is_bounced() && slot.request.kind == Kind::Read;
        match advance {
            Advance::Done if needs_copy => self.copy_out.push(slot_index),
            Advance::Done => self.answer(io, slot_index, Status::Okay, now_ns),
            Advance::Again => return true,
            Advance::Failed(errno) => {
                let status = self.storage_error(slot_index, errno);
                self.answer(io, slot_index, status, now_ns);
            }
        }
        false
    }

    /// Ends a pass: bounced reads go to the guest, all responses become visible. `true`: notify.
    #[inline]
    pub fn finish_pass<G: Grants, E>(&mut self, io: &mut Resources<G, E>, now_ns: u64) -> bool {
        if !self.copy_out.is_empty() {
            self.copy_reads_out(io, now_ns);
        }
        let notify = self.ring.publish() | std::mem::take(&mut self.notify);
        if notify {
            self.counters.notifications.add(1);
        }
        notify
    }

    #[inline(always)]
    fn answer<G: Grants, E>(
        &mut self,
        io: &mut Resources<G, E>,
        slot_index: u32,
        status: Status,
        now_ns: u64,
    ) {
        let slot = self.slots.get_mut(slot_index);
        if slot.is_bounced() {
            slot.give_back_bounced(&mut io.bounce);
        }
        if let Mapped::PerRequest(transient) = &mut self.mapped {
            transient.release(&mut io.grants, slot);
            self.counters.grants_mapped.set(transient.count() as u64);
        }
        let (request, taken_ns) = (slot.request, slot.taken_ns);
        self.slots.give_back(slot_index, &mut io.tables);
        if self.barrier == Barrier::Began(slot_index) {
            self.barrier = Barrier::None;
        }
        self.ring.answer(&RawResponse::new(request.id, request.operation, status));
        self.latency.record(now_ns.saturating_sub(taken_ns));
        self.count(&request, status);
    }

    #[inline]
    fn count(&self, request: &Request, status: Status) {
        let counters = &self.counters;
        if status != Status::Okay {
            return counters.errors.add(1);
        }
        match request.kind {
            Kind::Read => {
                counters.reads.add(1);
                counters.read_bytes.add(request.len_bytes);
            }
            Kind::Write | Kind::FlushThenWrite | Kind::FlushedWrite => {
                counters.writes.add(1);
                counters.written_bytes.add(request.len_bytes);
            }
            Kind::Flush => {}
            Kind::Discard | Kind::SecureDiscard => {
                counters.discards.add(1);
                counters.discarded_bytes.add(request.len_bytes);
            }
        }
        if matches!(request.kind, Kind::Flush | Kind::FlushThenWrite | Kind::FlushedWrite) {
            counters.flushes.add(1);
        }
    }

    /// Tells the admin, ever more seldom, and finds the answer for the guest.
    #[cold]
    fn storage_error(&mut self, slot: u32, errno: i32) -> Status {
        let request = self.slots.get_mut(slot).request;
        self.storage_errors += 1;
        if self.storage_errors.is_power_of_two() {
            tracing::error!(
                domid = %self.frontend,
                kind = ?request.kind,
                offset_bytes = request.offset_bytes,
                len_bytes = request.len_bytes,
                error = %std::io::Error::from_raw_os_error(errno),
                errors_so_far = self.storage_errors,
                "storage failed a request"
            );
        }
        match (request.kind, errno) {
            (Kind::Read | Kind::Write, _) => Status::Error,
            (_, libc::EOPNOTSUPP) => Status::NotSupported,
            _ => Status::Error,
        }
    }
}

fn unmap_ring<G: Grants>(grants: &mut G, page: SharedPage) {
    let pages = page.into_guest_pages().expect("a ring is made over guest pages");
    if let Err(error) = grants.unmap(pages) {
        tracing::warn!(%error, "unmapping a ring failed");
    }
}

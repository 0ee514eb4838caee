//! One ring being served, from the request on the ring to the response on it.
//!
//! A pass of the worker takes each queue through the same steps: [`Queue::take`] copies and checks
//! requests, finds their pages (mapping all missing ones in one batch), fills bounce memory by one
//! grant copy, and submits; [`Queue::complete`] takes the engine's results; [`Queue::finish_pass`]
//! empties bounce memory by one grant copy, and publishes all responses at once.

mod grants;
mod slots;

use std::sync::Arc;

use hdrhistogram::Histogram;

use crate::backing::Image;
use crate::blkif::Status;
use crate::blkif::codec::RawResponse;
use crate::blkif::request::{DiskRules, Kind, Request, Segment};
use crate::blkif::ring::{BackRing, RingFault};
use crate::engine::{Engine, IoOp, Ticket};
use crate::limits::{REQUESTS_PER_PASS, SEGMENTS_PER_COPY_BATCH, SEGMENTS_PER_REQUEST};
use crate::metrics::{QueueCounters, new_latency_histogram};
use crate::msg::{Connect, QueueKey};
use crate::units::{DomId, GrantRef, Port};
use crate::xen::shm::{GuestBuf, SharedPage};
use crate::xen::{CopyDirection, Events, GrantCopy, Grants, PageAccess};

pub use grants::BouncePool;
use grants::PersistentGrants;
use slots::{Advance, Slots, Step};

/// `GNTST_general_error` of Xen's `public/grant_table.h`.
const GNTST_GENERAL_ERROR: i16 = -1;

/// What the queues of one worker share, lent to them for a pass.
#[derive(Debug)]
pub struct Resources<G, E> {
    /// Mappings and copies.
    pub grants: G,
    /// Storage.
    pub engine: E,
    /// Memory for data that is copied.
    pub bounce: BouncePool,
    /// Reused lists, so that a pass allocates nothing.
    pub scratch: Scratch,
}

/// Lists that a pass fills and empties.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Slots of requests just taken.
    fresh: Vec<u32>,
    /// Segments whose page is not mapped: slot, index of the segment.
    unmapped: Vec<(u32, usize)>,
    /// References to map.
    wanted: Vec<GrantRef>,
    /// Copies to do, and the slot of each.
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
    /// Reads whose data waits in bounce memory for the end of the pass.
    copy_out: Vec<u32>,
    /// Granted pages stay mapped.
    persistent: Option<PersistentGrants>,
    counters: Arc<QueueCounters>,
    latency: Histogram<u64>,
    /// Takes no more requests: asked to, or the frontend broke the ring.
    stopped: bool,
    storage_errors: u64,
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
        Ok(Queue {
            key: connect.key,
            index,
            frontend: connect.frontend,
            port,
            ring,
            rules: DiskRules { geometry: connect.image.geometry(), read_only: connect.read_only },
            memory_alignment: connect.image.memory_alignment(),
            image: connect.image,
            slots: Slots::new(size),
            refused: Vec::with_capacity(size as usize),
            copy_out: Vec::with_capacity(size as usize),
            persistent: connect.persistent.then(PersistentGrants::default),
            counters: connect.counters,
            latency: new_latency_histogram(),
            stopped: false,
            storage_errors: 0,
        })
    }

    /// Unmaps and unbinds everything. Call only once [`Queue::is_drained`].
    pub fn disconnect<G: Grants, V: Events>(mut self, grants: &mut G, events: &mut V) {
        assert!(self.is_drained());
        if let Err(error) = events.unbind(self.port) {
            tracing::warn!(domid = %self.frontend, port = %self.port, %error, "unbinding failed");
        }
        if let Some(persistent) = &mut self.persistent
            && let Err(error) = persistent.unmap_all(grants)
        {
            tracing::warn!(domid = %self.frontend, %error, "unmapping granted pages failed");
        }
        self.counters.grants_mapped.set(0);
        unmap_ring(grants, self.ring.into_page());
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

    /// Asks the frontend for a notification, then looks again; `true`: there is work already.
    pub fn arm(&mut self) -> bool {
        !self.refused.is_empty() || (!self.stopped && self.ring.arm())
    }

    /// Hands over the latencies recorded since the last time.
    pub fn take_latency(&mut self) -> Histogram<u64> {
        std::mem::replace(&mut self.latency, new_latency_histogram())
    }

    /// Takes requests off the ring and gets them under way; the count of those taken.
    #[inline]
    pub fn take<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        now_ns: u64,
    ) -> Result<u32, RingFault> {
        if !self.refused.is_empty() {
            self.retry_refused(&mut io.engine);
        }
        if self.stopped || !self.refused.is_empty() {
            return Ok(0);
        }
        let waiting = self.ring.requests().inspect_err(|_| self.stopped = true)?;
        // Any request may need bounce memory for all of its segments.
        let room = (io.bounce.free() / SEGMENTS_PER_REQUEST).min(REQUESTS_PER_PASS);
        let count = waiting.min(u32::try_from(room).unwrap_or(0));
        if count == 0 {
            return Ok(0);
        }
        for _ in 0..count {
            self.take_one(io, now_ns);
        }
        self.locate(io);
        self.submit_fresh(io, now_ns);
        Ok(count)
    }

    #[inline]
    fn take_one<G, E>(&mut self, io: &mut Resources<G, E>, now_ns: u64) {
        let raw = self.ring.take();
        match Request::check(&raw, &self.rules) {
            Ok(request) => io.scratch.fresh.push(self.slots.insert(request, now_ns)),
            Err(fault) => {
                self.counters.errors.add(1);
                self.ring.answer(&RawResponse::new(raw.id, raw.operation, fault.status()));
            }
        }
    }

    /// Gives every segment of the fresh requests its buffer: the guest's page where that is
    /// mapped, after mapping all that can be in one go, and bounce memory otherwise.
    #[inline]
    fn locate<G: Grants, E>(&mut self, io: &mut Resources<G, E>) {
        let Scratch { fresh, unmapped, .. } = &mut io.scratch;
        for slot_index in &*fresh {
            let slot = self.slots.get_mut(*slot_index as usize);
            for index in 0..slot.request.segments().len() {
                let segment = slot.request.segments()[index];
                match mapped(self.persistent.as_ref(), segment, self.memory_alignment) {
                    Some(buffer) => slot.set_buffer(index, buffer, false),
                    None => unmapped.push((*slot_index, index)),
                }
            }
        }
        if !unmapped.is_empty() {
            self.map_missing(io);
            self.bounce_unmapped(io);
        }
    }

    fn map_missing<G: Grants, E>(&mut self, io: &mut Resources<G, E>) {
        let Some(persistent) = &mut self.persistent else { return };
        let Scratch { unmapped, wanted, .. } = &mut io.scratch;
        let segments = unmapped
            .iter()
            .map(|(slot, index)| self.slots.get_mut(*slot as usize).request.segments()[*index]);
        wanted
            .extend(segments.map(Segment::grant).filter(|gref| persistent.page(gref.0).is_none()));
        persistent.map(&mut io.grants, self.frontend, wanted);
        wanted.clear();
        self.counters.grants_mapped.set(persistent.count() as u64);
    }

    fn bounce_unmapped<G: Grants, E>(&mut self, io: &mut Resources<G, E>) {
        let Scratch { unmapped, copies, owners, .. } = &mut io.scratch;
        for (slot_index, index) in unmapped.drain(..) {
            let slot = self.slots.get_mut(slot_index as usize);
            let segment = slot.request.segments()[index];
            if let Some(buffer) = mapped(self.persistent.as_ref(), segment, self.memory_alignment) {
                slot.set_buffer(index, buffer, false);
                continue;
            }
            let buffer = bounce_buffer(&mut io.bounce, segment);
            slot.set_buffer(index, buffer, true);
            if slot.request.kind != Kind::Read {
                copies.push(grant_copy(segment, buffer, CopyDirection::FromGuest));
                owners.push(slot_index);
            }
        }
        self.copy(io);
    }

    /// Does the copies listed; a slot with a failing one is marked failed.
    fn copy<G: Grants, E>(&mut self, io: &mut Resources<G, E>) {
        let Scratch { copies, owners, .. } = &mut io.scratch;
        for batch in copies.chunks_mut(SEGMENTS_PER_COPY_BATCH) {
            if io.grants.copy(self.frontend, batch).is_err() {
                batch.iter_mut().for_each(|copy| copy.status = GNTST_GENERAL_ERROR);
            }
        }
        self.counters.grants_copied.add(copies.len() as u64);
        for (copy, owner) in copies.drain(..).zip(owners.drain(..)) {
            if copy.status != 0 {
                self.slots.get_mut(owner as usize).failed = true;
            }
        }
    }

    #[inline]
    fn submit_fresh<G, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        now_ns: u64,
    ) {
        for at in 0..io.scratch.fresh.len() {
            let slot = io.scratch.fresh[at];
            if self.slots.get_mut(slot as usize).failed {
                self.answer(&mut io.bounce, slot, Status::Error, now_ns);
            } else {
                self.submit(&mut io.engine, slot);
            }
        }
        io.scratch.fresh.clear();
    }

    /// Hands a slot's next step to the engine, now or when it has room again.
    #[inline]
    fn submit<E: Engine<Target = Image>>(&mut self, engine: &mut E, slot_index: u32) {
        let slot = self.slots.get_mut(slot_index as usize);
        let ticket = Ticket::new(self.index, slot_index);
        let offset = slot.offset_bytes();
        let taken = match slot.step() {
            Step::Flush => engine.submit(&self.image, &IoOp::Flush, ticket),
            Step::Read => slot.with_buffers(|buffers| {
                engine.submit(&self.image, &IoOp::Read { offset, buffers }, ticket)
            }),
            Step::Write => slot.with_buffers(|buffers| {
                engine.submit(&self.image, &IoOp::Write { offset, buffers }, ticket)
            }),
        };
        if taken.is_err() {
            self.refused.push(slot_index);
        }
    }

    fn retry_refused<E: Engine<Target = Image>>(&mut self, engine: &mut E) {
        for slot in std::mem::take(&mut self.refused) {
            self.submit(engine, slot);
        }
    }

    /// Takes the result of a step.
    #[inline]
    pub fn complete<G, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        slot_index: usize,
        result: i32,
        now_ns: u64,
    ) {
        let slot = self.slots.get_mut(slot_index);
        let advance = slot.advance(result);
        let needs_copy = slot.has_bounced() && slot.request.kind == Kind::Read;
        let slot_index = u32::try_from(slot_index).expect("at most a ring's entries");
        match advance {
            Advance::Done if needs_copy => self.copy_out.push(slot_index),
            Advance::Done => self.answer(&mut io.bounce, slot_index, Status::Okay, now_ns),
            Advance::Again => self.submit(&mut io.engine, slot_index),
            Advance::Failed(errno) => {
                let status = self.storage_error(slot_index, errno);
                self.answer(&mut io.bounce, slot_index, status, now_ns);
            }
        }
    }

    /// Ends a pass: bounced reads go to the guest, responses become visible. `true`: notify.
    #[inline]
    pub fn finish_pass<G: Grants, E>(&mut self, io: &mut Resources<G, E>, now_ns: u64) -> bool {
        if !self.copy_out.is_empty() {
            self.copy_reads_out(io, now_ns);
        }
        let notify = self.ring.publish();
        if notify {
            self.counters.notifications.add(1);
        }
        notify
    }

    fn copy_reads_out<G: Grants, E>(&mut self, io: &mut Resources<G, E>, now_ns: u64) {
        let Scratch { copies, owners, .. } = &mut io.scratch;
        for slot in &self.copy_out {
            for (segment, buffer) in self.slots.get_mut(*slot as usize).bounced() {
                copies.push(grant_copy(segment, buffer, CopyDirection::ToGuest));
                owners.push(*slot);
            }
        }
        self.copy(io);
        while let Some(slot) = self.copy_out.pop() {
            let failed = self.slots.get_mut(slot as usize).failed;
            let status = if failed { Status::Error } else { Status::Okay };
            self.answer(&mut io.bounce, slot, status, now_ns);
        }
    }

    #[inline]
    fn answer(&mut self, bounce: &mut BouncePool, slot: u32, status: Status, now_ns: u64) {
        let slot = self.slots.remove(slot as usize);
        if slot.has_bounced() {
            slot.bounced().for_each(|(_, buffer)| bounce.give_back(buffer));
        }
        let request = &slot.request;
        self.ring.answer(&RawResponse::new(request.id, request.kind.operation(), status));
        self.latency.saturating_record(now_ns.saturating_sub(slot.taken_ns).max(1));
        self.count(request, status);
    }

    #[inline]
    fn count(&self, request: &Request, status: Status) {
        let counters = &self.counters;
        match request.kind {
            _ if status != Status::Okay => counters.errors.add(1),
            Kind::Read => {
                counters.reads.add(1);
                counters.read_bytes.add(request.len_bytes.into());
            }
            Kind::Write | Kind::FlushThenWrite => {
                counters.writes.add(1);
                counters.written_bytes.add(request.len_bytes.into());
            }
            Kind::Flush => {}
        }
        if status == Status::Okay && matches!(request.kind, Kind::Flush | Kind::FlushThenWrite) {
            counters.flushes.add(1);
        }
    }

    /// Tells the admin, ever more seldom, and finds the answer for the guest.
    #[cold]
    fn storage_error(&mut self, slot: u32, errno: i32) -> Status {
        let request = self.slots.get_mut(slot as usize).request;
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
            (Kind::Flush | Kind::FlushThenWrite, libc::EOPNOTSUPP) => Status::NotSupported,
            _ => Status::Error,
        }
    }
}

/// The guest's page of a segment, where it is mapped and good for direct I/O.
#[inline]
fn mapped(
    persistent: Option<&PersistentGrants>,
    segment: Segment,
    memory_alignment: u16,
) -> Option<GuestBuf> {
    if !segment.offset.is_multiple_of(memory_alignment) {
        return None;
    }
    persistent?.page(segment.gref)?.part(segment.offset.into(), segment.len.into())
}

fn bounce_buffer(bounce: &mut BouncePool, segment: Segment) -> GuestBuf {
    bounce.take().part(0, segment.len.into()).expect("a segment is no longer than a page")
}

fn grant_copy(segment: Segment, buffer: GuestBuf, direction: CopyDirection) -> GrantCopy {
    GrantCopy {
        gref: segment.grant(),
        offset: segment.offset,
        len: segment.len,
        local: buffer.address().as_ptr(),
        direction,
        status: 0,
    }
}

fn unmap_ring<G: Grants>(grants: &mut G, page: SharedPage) {
    let pages = page.into_guest_pages().expect("a ring is made over guest pages");
    if let Err(error) = grants.unmap(pages) {
        tracing::warn!(%error, "unmapping a ring failed");
    }
}

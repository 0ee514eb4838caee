//! What a pass does with a queue: takes requests off its ring, submits each of their steps to storage, takes
//! the results, and answers.
//!
//! All of this is in one module, because what a request costs depends on what the compiler inlines here.

use std::collections::VecDeque;

use super::locate::locate_persistent;
use super::slots::{Advance, Step};
use super::{Barrier, DataGrants, Queue, Resources, Turn};
use crate::backing::Image;
use crate::blkif::Status;
use crate::blkif::codec::{Loaded, RawResponse};
use crate::blkif::op;
use crate::blkif::request::{Kind, RequestFault};
use crate::blkif::ring::RingFault;
use crate::engine::{By, Completion, Engine, IoOp, Submitted, Ticket};
use crate::limits::{
    DISCARD_BYTES_PER_EFFORT, MOVED_PAGE_EFFORT, OPERATION_WEIGHT, REQUEST_EFFORT,
    REQUESTS_PER_PASS, RESPONSES_HELD_BACK, SEGMENT_EFFORT,
};
use crate::xen::Grants;

impl Queue {
    /// Runs one turn: continues what the previous turn left, then takes requests off the ring and starts
    /// them, until the turn's effort is spent. `true`: [`Queue::finish_pass`] must follow, because something
    /// was done, or there are responses to publish or reads to copy to the guest.
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
        Ok(self.effort < effort || self.ring.unpublished() > 0 || !self.to_copy_out.is_empty())
    }

    #[inline]
    fn take_requests<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
    ) -> Result<(), RingFault> {
        let give_backs = io.give_backs;
        if let Some(since) = self.waits_since {
            if since == give_backs {
                return Ok(());
            }
            self.waits_since = None;
            self.retry(io);
        }
        if self.has_waiting() {
            self.waits_since = Some(give_backs);
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
            // Don't wait for requests that the frontend took back.
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
        // A barrier that was taken has all it needs, and only waits for the requests before it.
        let is_full =
            taken < count && self.barrier == Barrier::None && !io.devices.has_room(&self.device);
        if room == 0 || self.has_waiting() || is_full {
            self.waits_since = Some(give_backs);
        }
        Ok(())
    }

    /// Takes at most `count` requests, which the ring must hold; returns how many.
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

    /// Whether the turn takes another request.
    #[inline]
    fn takes_more<G, E>(&self, io: &Resources<G, E>) -> bool {
        self.barrier == Barrier::None
            && self.waiting_head.is_none()
            && self.effort > 0
            && io.devices.has_room(&self.device)
    }

    #[inline]
    pub(super) fn spend(&mut self, effort: u32) {
        self.effort = self.effort.saturating_sub(effort);
    }

    #[inline]
    pub(super) fn spend_on_request(&mut self, count: usize) {
        let segments = u32::try_from(count).unwrap_or(u32::MAX);
        let to_look = REQUEST_EFFORT + segments.saturating_mul(SEGMENT_EFFORT);
        self.spend(to_look);
        if self.operation_effort > 0 {
            self.spend(self.operation_effort.saturating_mul(weight(count)) / OPERATION_WEIGHT);
        }
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

    /// Begins a direct request. If all its pages are mapped, as they usually are, it is submitted at once.
    #[inline]
    fn take_direct<G: Grants, E: Engine<Target = Image>>(&mut self, io: &mut Resources<G, E>) {
        let raw = &io.scratch.direct;
        let (index, slot) = self.slots.take();
        match self.rules.check_direct(raw, slot.inline_segments_mut()) {
            Ok((request, count)) => {
                slot.begin(request, count, None, io.now_ns);
                let is_mapped =
                    locate_persistent(self.data_grants.persistent(), slot, self.memory_alignment);
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

    /// Begins the barrier if nothing else is in flight.
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

    /// Answers a request that is refused before it has a slot.
    #[cold]
    pub(super) fn refuse(&mut self, id: u64, operation: u8, fault: RequestFault) {
        self.spend(REQUEST_EFFORT);
        self.counters.errors.add(1);
        self.ring.answer(&RawResponse::new(id, operation, fault.status()));
    }

    /// Starts the fresh requests: locates their data and submits them.
    #[inline]
    pub(super) fn start<G: Grants, E: Engine<Target = Image>>(&mut self, io: &mut Resources<G, E>) {
        self.locate(io);
        for at in 0..io.scratch.fresh.len() {
            let slot = io.scratch.fresh[at];
            self.submit(io, slot);
        }
        io.scratch.fresh.clear();
        if !self.to_fetch.is_empty() {
            self.fetch(io);
        }
    }

    /// Whether any request that was taken waits for something that others hold.
    #[inline]
    pub(super) fn has_waiting(&self) -> bool {
        !self.no_room.is_empty() || !self.stalled.is_empty() || self.waiting_head.is_some()
    }

    /// Retries the waiting requests, in order, until there is no room for one.
    #[cold]
    fn retry<G: Grants, E: Engine<Target = Image>>(&mut self, io: &mut Resources<G, E>) {
        while let Some(slot) = self.no_room.pop_front() {
            let others = self.no_room.len();
            self.submit(io, slot);
            if stays_first(&mut self.no_room, others) {
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
        if !self.to_fetch.is_empty() {
            self.fetch(io);
        }
        if let Some(head) = self.waiting_head.take() {
            self.take_indirect(io, head);
            if !io.scratch.indirect.is_empty() {
                self.read_indirect(io);
                self.start(io);
            }
        }
    }

    /// Whether the previous turn left anything to do.
    #[inline]
    pub(super) fn has_unfinished(&self) -> bool {
        !self.interrupted.is_empty() || !self.to_fetch.is_empty() || !self.to_copy_out.is_empty()
    }

    /// Continues what the previous turn left, beginning with the requests closest to completion.
    #[cold]
    fn go_on<G: Grants, E: Engine<Target = Image>>(&mut self, io: &mut Resources<G, E>) {
        if !self.to_copy_out.is_empty() {
            self.copy_reads_out(io);
        }
        while let Some(slot) = self.interrupted.pop_front() {
            let others = self.interrupted.len();
            self.submit(io, slot);
            if stays_first(&mut self.interrupted, others) {
                break;
            }
        }
        if !self.to_fetch.is_empty() {
            self.fetch(io);
        }
    }

    /// Submits a slot's next step: now, or once the engine has room or the next turn begins.
    pub(super) fn submit<G: Grants, E: Engine<Target = Image>>(
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
                    // Set here, because `complete` may also submit a step, outside any turn.
                    self.waits_since.get_or_insert(io.give_backs);
                    return self.no_room.push_back(slot_index);
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

    /// How many of a slot's buffers the worker itself moves at once: as many as the turn's effort allows.
    fn pages_to_move(&mut self, slot_index: u32) -> usize {
        let count = (self.effort / MOVED_PAGE_EFFORT).max(1);
        let segments = self.slots.get_mut(slot_index).segments().len();
        let moved = count.min(u32::try_from(segments).unwrap_or(u32::MAX));
        self.spend(moved * MOVED_PAGE_EFFORT);
        count as usize
    }

    /// Handles the result of a slot's step.
    #[inline]
    pub fn complete<G: Grants, E: Engine<Target = Image>>(
        &mut self,
        io: &mut Resources<G, E>,
        slot_index: u32,
        result: i32,
    ) {
        match self.slots.get_mut(slot_index).step() {
            Step::Flush => self.flushed = true,
            Step::Read | Step::Write if !self.image.is_moved_by_thread() => {}
            Step::Read | Step::Write | Step::Discard { .. } => {
                self.threaded = self.threaded.saturating_add(1);
            }
        }
        if self.finish_step(io, slot_index, result) {
            self.submit(io, slot_index);
        }
    }

    /// Records a step's result and answers a finished request; `true`: the next step is to be submitted.
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
            Advance::Done if needs_copy => self.to_copy_out.push_back(slot_index),
            Advance::Done => self.answer(io, slot_index, Status::Okay),
            Advance::Again => return true,
            Advance::Failed(errno) => {
                let status = self.storage_failed(io, slot_index, errno);
                self.answer(io, slot_index, status);
            }
        }
        false
    }

    /// Ends a pass: copies bounced reads to the guest as far as the turn's effort allows, and publishes all
    /// responses. `true`: notify the frontend.
    #[inline]
    pub fn finish_pass<G: Grants, E>(&mut self, io: &mut Resources<G, E>) -> bool {
        if !self.to_copy_out.is_empty() {
            self.copy_reads_out(io);
        }
        self.settle(io);
        let notify = self.ring.publish() | std::mem::take(&mut self.notify);
        if notify {
            self.counters.notifications.add(1);
        }
        notify
    }

    /// Gives the places of answered requests back to the worker's pool.
    #[inline]
    pub(super) fn settle<G, E>(&mut self, io: &mut Resources<G, E>) {
        let answered = self.requests.used() - self.ring.in_flight() as usize;
        if answered > 0 {
            io.requests.give_back(&mut self.requests, answered);
            io.give_backs += 1;
        }
    }

    #[inline(always)]
    pub(super) fn answer<G: Grants, E>(
        &mut self,
        io: &mut Resources<G, E>,
        slot_index: u32,
        status: Status,
    ) {
        let slot = self.slots.get_mut(slot_index);
        if slot.is_bounced() {
            slot.give_back_bounced(&mut io.bounce, &mut self.bounce);
        }
        if let DataGrants::Map(transient) = &mut self.data_grants {
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
        io.give_backs += 1;
        self.latency.record(io.now_ns.saturating_sub(taken_ns));
        self.count(io, &request, status);
    }
}

/// The weight of an operation with this number of segments, by which queues share the time to submit.
#[inline]
pub(super) fn weight(segments: usize) -> u32 {
    OPERATION_WEIGHT.saturating_add(u32::try_from(segments).unwrap_or(u32::MAX))
}

/// If a slot popped off a list was pushed back behind the `others`, makes it the first again; says whether.
fn stays_first(list: &mut VecDeque<u32>, others: usize) -> bool {
    let is_back = list.len() > others;
    if is_back {
        list.rotate_right(1);
    }
    is_back
}

//! Where the data of each segment is: the guest's page where that is mapped, else bounce memory.

use super::grants::PersistentGrants;
use super::slots::Slot;
use super::{Mapped, Queue, Resources, Scratch};
use crate::blkif::Status;
use crate::blkif::request::{Kind, Segment};
use crate::engine::{Engine, RegisterBuffers};
use crate::limits::SEGMENTS_PER_COPY_BATCH;
use crate::units::DomId;
use crate::xen::abi::GNTST_GENERAL_ERROR;
use crate::xen::shm::GuestBuf;
use crate::xen::{CopyDirection, GrantCopy, Grants};

impl Queue {
    /// Gives every segment of the fresh requests its buffer, after mapping all that can be in one
    /// go. A request for which there is not enough bounce memory is moved to the stalled ones.
    #[inline]
    pub(super) fn locate<G: Grants, E: Engine>(&mut self, io: &mut Resources<G, E>) {
        let Scratch { fresh, unmapped, .. } = &mut io.scratch;
        let persistent = self.mapped.kept();
        for slot_index in &*fresh {
            let slot = self.slots.get_mut(*slot_index);
            for index in 0..slot.segments().len() {
                let segment = slot.segments()[index];
                match mapped(persistent, segment, self.memory_alignment) {
                    Some(buffer) => slot.set_buffer(index, buffer),
                    None => unmapped.push((*slot_index, index)),
                }
            }
        }
        if !unmapped.is_empty() {
            match self.mapped {
                Mapped::Kept(_) => self.map_missing(io),
                Mapped::PerRequest(_) => self.map_requests(io),
                Mapped::Nothing => {}
            }
            self.bounce_unmapped(io);
        }
    }

    /// Maps pages that are to stay mapped.
    fn map_missing<G: Grants, E: RegisterBuffers>(&mut self, io: &mut Resources<G, E>) {
        let Scratch { unmapped, wanted, .. } = &mut io.scratch;
        wanted.extend(
            unmapped
                .iter()
                .map(|(slot, index)| self.slots.get_mut(*slot).segments()[*index].grant()),
        );
        self.map_wanted(io);
    }

    /// Maps the wanted pages that are not mapped yet, to stay; for a queue that keeps none mapped
    /// nothing is wanted.
    pub(super) fn map_wanted<G: Grants, E: RegisterBuffers>(&mut self, io: &mut Resources<G, E>) {
        let Mapped::Kept(persistent) = &mut self.mapped else { return };
        let mut wanted = std::mem::take(&mut io.scratch.wanted);
        wanted.retain(|gref| persistent.page(gref.0).is_none());
        if !wanted.is_empty() {
            persistent.map(&mut io.mapper(), self.frontend, &mut wanted, self.slots.refs());
            wanted.clear();
            self.counters.grants_mapped.set(persistent.count() as u64);
        }
        io.scratch.wanted = wanted;
    }

    /// Maps the pages of each request, for its time; what has no page then is left as unmapped.
    fn map_requests<G: Grants, E>(&mut self, io: &mut Resources<G, E>) {
        let Mapped::PerRequest(transient) = &mut self.mapped else { return };
        let Scratch { fresh, unmapped, wanted, .. } = &mut io.scratch;
        for index in &*fresh {
            let slot = self.slots.get_mut(*index);
            transient.map(&mut io.grants, self.frontend, slot, self.memory_alignment, wanted);
        }
        wanted.clear();
        unmapped.retain(|(slot, _)| self.slots.get_mut(*slot).mapped.is_empty());
        self.counters.grants_mapped.set(transient.count() as u64);
    }

    /// Gives bounce memory to requests of which anything is not mapped now either, and copies what
    /// the guest writes.
    fn bounce_unmapped<G: Grants, E: Engine>(&mut self, io: &mut Resources<G, E>) {
        let unmapped = std::mem::take(&mut io.scratch.unmapped);
        for segments in unmapped.chunk_by(|one, next| one.0 == next.0) {
            if !self.point_at_kept(segments)
                && let Some((slot, _)) = segments.first()
            {
                self.bounce(io, *slot);
            }
        }
        io.scratch.unmapped = unmapped;
        io.scratch.unmapped.clear();
        if !self.stalled.is_empty() {
            io.scratch.fresh.retain(|slot| !self.stalled.contains(slot));
        }
        self.copy(io);
    }

    /// Points segments of one slot at their pages, now that more of them are mapped; `false`: not
    /// all are.
    fn point_at_kept(&mut self, segments: &[(u32, usize)]) -> bool {
        segments.iter().all(|(slot, index)| {
            let slot = self.slots.get_mut(*slot);
            let segment = slot.segments()[*index];
            let buffer = mapped(self.mapped.kept(), segment, self.memory_alignment);
            buffer.inspect(|buffer| slot.set_buffer(*index, *buffer)).is_some()
        })
    }

    /// Brings all data of a slot to bounce memory: so it is one vector for storage.
    fn bounce<G, E: Engine>(&mut self, io: &mut Resources<G, E>, index: u32) {
        if let Some(memory) = io.bounce.allocate() {
            match io.engine.register(memory) {
                Ok(registration) => io.bounce.set_registration(registration),
                Err(error) => tracing::info!(
                    %error,
                    "bounce memory is not registered with io_uring, which costs some CPU where \
                     data is copied; a higher memlock limit (ulimit -l) may mend it"
                ),
            }
        }
        let slot = self.slots.get_mut(index);
        if !slot.bounce(&mut io.bounce) {
            self.stalled.push(index);
        } else if slot.request.kind == Kind::Read {
            if !self.image.fills_reads() {
                // It holds data of others.
                slot.located().for_each(|(_, buffer)| buffer.zero());
            }
        } else {
            for (segment, buffer) in slot.located() {
                io.scratch.copies.push(grant_copy(segment, buffer, CopyDirection::FromGuest));
                io.scratch.owners.push(index);
            }
        }
    }

    /// Does the copies listed; a slot with a failing one is marked failed.
    fn copy<G: Grants, E>(&mut self, io: &mut Resources<G, E>) {
        let Scratch { copies, owners, .. } = &mut io.scratch;
        copy_all(&mut io.grants, self.frontend, copies);
        self.counters.grants_copied.add(copies.len() as u64);
        for (copy, owner) in copies.drain(..).zip(owners.drain(..)) {
            if copy.status != 0 {
                self.slots.get_mut(owner).failed = true;
            }
        }
    }

    /// Brings the data of finished reads from bounce memory to the guest, and answers them.
    pub(super) fn copy_reads_out<G: Grants, E>(&mut self, io: &mut Resources<G, E>, now_ns: u64) {
        let Scratch { copies, owners, .. } = &mut io.scratch;
        for slot in &self.copy_out {
            for (segment, buffer) in self.slots.get_mut(*slot).located() {
                copies.push(grant_copy(segment, buffer, CopyDirection::ToGuest));
                owners.push(*slot);
            }
        }
        self.copy(io);
        while let Some(slot) = self.copy_out.pop() {
            let failed = self.slots.get_mut(slot).failed;
            let status = if failed { Status::Error } else { Status::Okay };
            self.answer(io, slot, status, now_ns);
        }
    }
}

impl Mapped {
    #[inline]
    pub(super) fn kept(&self) -> Option<&PersistentGrants> {
        match self {
            Mapped::Kept(persistent) => Some(persistent),
            Mapped::PerRequest(_) | Mapped::Nothing => None,
        }
    }
}

/// Does copies in batches; where a whole batch is refused, each of it has failed.
pub(super) fn copy_all<G: Grants>(grants: &mut G, frontend: DomId, copies: &mut [GrantCopy]) {
    for batch in copies.chunks_mut(SEGMENTS_PER_COPY_BATCH) {
        if grants.copy(frontend, batch).is_err() {
            batch.iter_mut().for_each(|copy| copy.status = GNTST_GENERAL_ERROR);
        }
    }
}

/// Gives every segment of a request its buffer, where all their pages stay mapped.
#[inline]
pub(super) fn locate_mapped(
    persistent: Option<&PersistentGrants>,
    slot: &mut Slot,
    memory_alignment: u16,
) -> bool {
    let (segments, buffers) = slot.segments_and_buffers();
    segments.iter().zip(buffers).all(|(segment, buffer)| {
        mapped(persistent, *segment, memory_alignment).map(|page| *buffer = page).is_some()
    })
}

/// The guest's page of a segment, where it is mapped and good for direct I/O.
#[inline]
fn mapped(
    persistent: Option<&PersistentGrants>,
    segment: Segment,
    memory_alignment: u16,
) -> Option<GuestBuf> {
    // A power of two; a division would cost more than all the rest.
    if segment.offset & (memory_alignment - 1) != 0 {
        return None;
    }
    persistent?.page(segment.gref)?.part(segment.offset.into(), segment.len.into())
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

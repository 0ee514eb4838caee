//! Where the data of each segment is: in the guest's page if it is mapped, otherwise in bounce memory.

use super::bounce::Whose;
use super::persistent::PersistentGrants;
use super::slots::Slot;
use super::{DataGrants, Queue, Resources, Scratch};
use crate::backing::Image;
use crate::blkif::Status;
use crate::blkif::request::{Kind, Segment};
use crate::engine::{Engine, RegisterBuffers};
use crate::limits::MOVED_PAGE_EFFORT;
use crate::xen::shm::GuestBuf;
use crate::xen::{CopyDirection, GrantCopy, Grants};

impl Queue {
    /// Gives every segment of the fresh requests its buffer, after mapping the missing pages together. A
    /// request without enough bounce memory moves to the stalled ones; one whose data must be copied from the
    /// guest moves to those being fetched.
    #[inline]
    pub(super) fn locate<G: Grants, E: Engine>(&mut self, io: &mut Resources<G, E>) {
        let Scratch { fresh, unmapped, .. } = &mut io.scratch;
        let persistent = self.data_grants.persistent();
        for slot_index in &*fresh {
            let slot = self.slots.get_mut(*slot_index);
            for index in 0..slot.segments().len() {
                let segment = slot.segments()[index];
                match persistent_buffer(persistent, segment, self.memory_alignment) {
                    Some(buffer) => slot.set_buffer(index, buffer),
                    None => unmapped.push((*slot_index, index)),
                }
            }
        }
        if !unmapped.is_empty() {
            match self.data_grants {
                DataGrants::Persistent(_) => self.map_missing(io),
                DataGrants::Map(_) => self.map_requests(io),
                DataGrants::Copy => {}
            }
            self.bounce_unmapped(io);
        }
    }

    /// Maps the missing pages, to stay mapped.
    fn map_missing<G: Grants, E: RegisterBuffers>(&mut self, io: &mut Resources<G, E>) {
        let Scratch { unmapped, wanted, .. } = &mut io.scratch;
        wanted.extend(
            unmapped
                .iter()
                .map(|(slot, index)| self.slots.get_mut(*slot).segments()[*index].grant()),
        );
        self.map_wanted(io);
    }

    /// Maps the wanted pages that are not mapped yet, to stay mapped. A queue without persistent grants wants
    /// none.
    pub(super) fn map_wanted<G: Grants, E: RegisterBuffers>(&mut self, io: &mut Resources<G, E>) {
        let DataGrants::Persistent(persistent) = &mut self.data_grants else { return };
        let mut wanted = std::mem::take(&mut io.scratch.wanted);
        wanted.retain(|gref| persistent.page(gref.0).is_none());
        if !wanted.is_empty() {
            persistent.map(&mut io.mapper(), self.frontend, &mut wanted, self.slots.refs());
            wanted.clear();
            self.counters.grants_mapped.set(persistent.count() as u64);
        }
        io.scratch.wanted = wanted;
    }

    /// Maps each request's pages for its duration; segments that it can't map stay in `unmapped`.
    fn map_requests<G: Grants, E>(&mut self, io: &mut Resources<G, E>) {
        let DataGrants::Map(transient) = &mut self.data_grants else { return };
        let Scratch { fresh, unmapped, wanted, .. } = &mut io.scratch;
        for index in &*fresh {
            let slot = self.slots.get_mut(*index);
            transient.map(&mut io.grants, self.frontend, slot, self.memory_alignment, wanted);
        }
        wanted.clear();
        unmapped.retain(|(slot, _)| self.slots.get_mut(*slot).own_pages.is_empty());
        self.counters.grants_mapped.set(transient.count() as u64);
    }

    /// Gives bounce memory to requests that still have a segment whose page is not mapped.
    fn bounce_unmapped<G: Grants, E: Engine>(&mut self, io: &mut Resources<G, E>) {
        let unmapped = std::mem::take(&mut io.scratch.unmapped);
        for segments in unmapped.chunk_by(|one, next| one.0 == next.0) {
            if !self.point_at_kept(segments)
                && let Some((slot, _)) = segments.first()
            {
                // Requests that wait already are served first.
                if !self.stalled.is_empty() || !self.bounce(io, *slot) {
                    self.stalled.push_back(*slot);
                }
            }
        }
        io.scratch.unmapped = unmapped;
        io.scratch.unmapped.clear();
        if !self.stalled.is_empty() || !self.to_fetch.is_empty() {
            let (slots, stalled) = (&mut self.slots, &self.stalled);
            io.scratch
                .fresh
                .retain(|slot| !slots.get_mut(*slot).is_to_be_fetched() && !stalled.contains(slot));
        }
    }

    /// Points segments of one slot at their pages, now that more are mapped; `false`: some still are not.
    fn point_at_kept(&mut self, segments: &[(u32, usize)]) -> bool {
        segments.iter().all(|(slot, index)| {
            let slot = self.slots.get_mut(*slot);
            let segment = slot.segments()[*index];
            let buffer =
                persistent_buffer(self.data_grants.persistent(), segment, self.memory_alignment);
            buffer.inspect(|buffer| slot.set_buffer(*index, *buffer)).is_some()
        })
    }

    /// Finds bounce memory for all data of a slot, mapped or not: if there is a run of pages, storage gets a
    /// single vector. `false`: there is not enough now.
    pub(super) fn bounce<G, E: Engine>(&mut self, io: &mut Resources<G, E>, index: u32) -> bool {
        if let Some(memory) = io.bounce.allocate() {
            match io.engine.register(memory) {
                Ok(registration) => io.bounce.set_registration(registration),
                Err(error) => tracing::info!(
                    %error,
                    "bounce memory is not registered with io_uring, which costs some CPU when \
                     data is copied; a higher memlock limit (ulimit -l) may help"
                ),
            }
        }
        let slot = self.slots.get_mut(index);
        if !slot.bounce(&mut io.bounce, Whose::Common) {
            self.bounce.allocate();
            if !slot.bounce(&mut self.bounce, Whose::Own) {
                return false;
            }
        }
        if slot.request.kind != Kind::Read {
            self.to_fetch.push_back(index);
        } else if !self.image.fills_reads() {
            // It may hold another guest's data.
            slot.zero();
        }
        true
    }

    /// Copies the data of writes from the guest to bounce memory, as much as this turn allows, and submits
    /// the writes whose data is complete.
    pub(super) fn fetch<G: Grants, E: Engine<Target = Image>>(&mut self, io: &mut Resources<G, E>) {
        let mut waiting = std::mem::take(&mut self.to_fetch);
        self.copy(io, waiting.iter(), CopyDirection::FromGuest);
        while let Some(slot) = waiting.pop_front_if(|slot| self.slots.get_mut(*slot).is_copied()) {
            if self.slots.get_mut(slot).failed {
                self.answer(io, slot, Status::Error);
            } else {
                self.submit(io, slot);
            }
        }
        self.to_fetch = waiting;
    }

    /// Copies the data of finished reads from bounce memory to the guest, as much as this turn allows, and
    /// answers the reads whose data is complete.
    pub(super) fn copy_reads_out<G: Grants, E>(&mut self, io: &mut Resources<G, E>) {
        let mut waiting = std::mem::take(&mut self.to_copy_out);
        self.copy(io, waiting.iter(), CopyDirection::ToGuest);
        while let Some(slot) = waiting.pop_front_if(|slot| self.slots.get_mut(*slot).is_copied()) {
            let failed = self.slots.get_mut(slot).failed;
            self.answer(io, slot, if failed { Status::Error } else { Status::Okay });
        }
        self.to_copy_out = waiting;
    }

    /// Copies segments of these slots, in order, as many as this turn allows. If a copy fails, its slot is
    /// marked failed.
    fn copy<'a, G: Grants, E>(
        &mut self,
        io: &mut Resources<G, E>,
        slots: impl Iterator<Item = &'a u32>,
        direction: CopyDirection,
    ) {
        let copies = &mut io.scratch.copies;
        for index in slots {
            let count = (self.effort / MOVED_PAGE_EFFORT) as usize;
            if count == 0 {
                break;
            }
            let segments = self.slots.get_mut(*index).take_uncopied(count);
            self.effort -= segments_effort(segments.len());
            for (segment, buffer) in segments {
                copies.push(*index, grant_copy(segment, buffer, direction));
            }
        }
        let copied = copies.run(&mut io.grants, self.frontend);
        self.counters.grants_copied.add(copied as u64);
        copies.failed().for_each(|slot| self.slots.get_mut(slot).failed = true);
        copies.clear();
    }
}

/// The effort of copying `count` segments, which were chosen to cost no more than the turn has left.
fn segments_effort(count: usize) -> u32 {
    u32::try_from(count).expect("at most a request's segments") * MOVED_PAGE_EFFORT
}

impl DataGrants {
    #[inline]
    pub(super) fn persistent(&self) -> Option<&PersistentGrants> {
        match self {
            DataGrants::Persistent(persistent) => Some(persistent),
            DataGrants::Map(_) | DataGrants::Copy => None,
        }
    }
}

/// Gives every segment of a request its buffer; `false`: not all of their pages are mapped.
#[inline]
pub(super) fn locate_persistent(
    persistent: Option<&PersistentGrants>,
    slot: &mut Slot,
    memory_alignment: u16,
) -> bool {
    let (segments, buffers) = slot.segments_and_buffers();
    segments.iter().zip(buffers).all(|(segment, buffer)| {
        persistent_buffer(persistent, *segment, memory_alignment)
            .map(|page| *buffer = page)
            .is_some()
    })
}

/// The guest's page of a segment, if it stays mapped and the segment is aligned for direct I/O.
#[inline]
fn persistent_buffer(
    persistent: Option<&PersistentGrants>,
    segment: Segment,
    memory_alignment: u16,
) -> Option<GuestBuf> {
    // The alignment is a power of two; a division would cost more than everything else here.
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

//! The segments of indirect requests, read from the guest's pages.
//!
//! The guest can write these pages at any time, so the segments are copied once, into our own memory, and
//! only the copy is checked and used (XSA-155). With persistent grants the pages stay mapped like data
//! pages, within the same bound; otherwise one grant copy reads them for all requests of the pass.

use super::slots::LargeTable;
use super::{DataGrants, Queue, Resources, Scratch};
use crate::blkif::Status;
use crate::blkif::codec::{RawResponse, RawSegment, SEGMENT_BYTES};
use crate::blkif::request::IndirectHead;
use crate::engine::RegisterBuffers;
use crate::units::GrantRef;
use crate::xen::{CopyDirection, GrantCopy, Grants};

/// An indirect request whose segments are still to be read, and the table for them.
#[derive(Debug)]
pub struct Indirect {
    head: IndirectHead,
    table: Box<LargeTable>,
    /// Its segments could not be read.
    failed: bool,
}

impl Queue {
    /// Begins an indirect request. If there is no table for it, it waits in [`Queue::waiting_head`], and so do the
    /// requests behind it on the ring.
    pub(super) fn take_indirect<G, E>(&mut self, io: &mut Resources<G, E>, head: IndirectHead) {
        match io.tables.take(&mut self.tables) {
            Some(table) => {
                self.spend_on_request(head.segment_count());
                io.devices.take(&mut self.device, head.segment_count());
                io.scratch.indirect.push(Indirect { head, table, failed: false });
            }
            None => self.waiting_head = Some(head),
        }
    }

    /// Reads and checks the segments of the indirect requests just taken. Valid requests become fresh ones;
    /// the others are answered with an error.
    pub(super) fn read_indirect<G: Grants, E: RegisterBuffers>(
        &mut self,
        io: &mut Resources<G, E>,
    ) {
        self.map_segment_pages(io);
        self.copy_segments(io);
        let mut indirect = std::mem::take(&mut io.scratch.indirect);
        io.scratch.copies.failed().for_each(|index| indirect[index as usize].failed = true);
        io.scratch.copies.clear();
        let mut at = 0;
        for Indirect { head, table, failed } in indirect.drain(..) {
            let end = at + head.segment_count() * SEGMENT_BYTES;
            if failed {
                self.counters.errors.add(1);
                let response = RawResponse::new(head.id(), head.operation(), Status::Error);
                self.ring.answer(&response);
                self.give_back_indirect(io, &head, table);
            } else {
                self.begin_indirect(io, &head, table, at..end);
            }
            at = end;
        }
        io.scratch.indirect = indirect;
    }

    fn map_segment_pages<G: Grants, E: RegisterBuffers>(&mut self, io: &mut Resources<G, E>) {
        if let DataGrants::Persistent(_) = self.data_grants {
            let Scratch { indirect, wanted, .. } = &mut io.scratch;
            let pages = indirect.iter().flat_map(|indirect| indirect.head.pages());
            wanted.extend(pages.map(|(gref, _)| GrantRef(gref)));
            self.map_wanted(io);
        }
    }

    /// Copies the segments of all heads, one after another, into `segment_bytes`. The grant copies that this
    /// takes stay in the list, with their status and the index of their head.
    fn copy_segments<G: Grants, E>(&mut self, io: &mut Resources<G, E>) {
        let Scratch { indirect, segment_bytes, copies, .. } = &mut io.scratch;
        let total: usize = indirect.iter().map(|indirect| indirect.head.segment_count()).sum();
        segment_bytes.clear();
        segment_bytes.resize(total * SEGMENT_BYTES, 0);
        let mut rest = &mut segment_bytes[..];
        for (owner, Indirect { head, .. }) in (0u32..).zip(&*indirect) {
            for (gref, count) in head.pages() {
                let (bytes, after) = rest.split_at_mut(count * SEGMENT_BYTES);
                rest = after;
                match self.data_grants.persistent().and_then(|persistent| persistent.page(gref)) {
                    Some(page) => page.copy_to(bytes),
                    None => {
                        let copy = GrantCopy {
                            gref: GrantRef(gref),
                            offset: 0,
                            len: u16::try_from(bytes.len()).expect("at most a page"),
                            local: bytes.as_mut_ptr(),
                            direction: CopyDirection::FromGuest,
                            status: 0,
                        };
                        copies.push(owner, copy);
                    }
                }
            }
        }
        let copied = copies.run(&mut io.grants, self.frontend);
        self.counters.grants_copied.add(copied as u64);
    }

    fn begin_indirect<G, E>(
        &mut self,
        io: &mut Resources<G, E>,
        head: &IndirectHead,
        mut table: Box<LargeTable>,
        bytes: std::ops::Range<usize>,
    ) {
        let words = io.scratch.segment_bytes[bytes].as_chunks::<SEGMENT_BYTES>().0;
        let raw = words.iter().map(|word| RawSegment::from_word(u64::from_le_bytes(*word)));
        let count = head.segment_count();
        match self.rules.check_indirect_segments(head, raw, table.segments_mut(count)) {
            Ok(request) => {
                let (index, slot) = self.slots.take();
                slot.begin(request, count, Some(table), io.now_ns);
                io.scratch.fresh.push(index);
            }
            Err(fault) => {
                self.give_back_indirect(io, head, table);
                self.refuse(head.id(), head.operation(), fault);
            }
        }
    }

    /// Gives back what a failed indirect request had taken.
    fn give_back_indirect<G, E>(
        &mut self,
        io: &mut Resources<G, E>,
        head: &IndirectHead,
        table: Box<LargeTable>,
    ) {
        io.tables.give_back(table, &mut self.tables);
        io.devices.give_back(&mut self.device, head.segment_count());
        io.give_backs += 1;
    }
}

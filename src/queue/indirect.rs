//! The segments of indirect requests, read out of the guest's pages.
//!
//! The pages are the guest's to write at any time, so their segments are copied once, into memory
//! of ours, and only the copy is checked and used (XSA-155). Pages of a frontend with persistent
//! grants stay mapped like its data pages, within the same bound; others are read by one grant copy
//! for all requests of the pass.

use super::locate::copy_all;
use super::{Mapped, Queue, Resources, Scratch};
use crate::blkif::Status;
use crate::blkif::codec::{RawResponse, RawSegment, SEGMENT_BYTES};
use crate::blkif::request::IndirectHead;
use crate::engine::RegisterBuffers;
use crate::units::GrantRef;
use crate::xen::{CopyDirection, GrantCopy, Grants};

impl Queue {
    /// Reads and checks the segments of the indirect requests just taken. The good ones become
    /// fresh requests; the others are answered.
    pub(super) fn read_indirect<G: Grants, E: RegisterBuffers>(
        &mut self,
        io: &mut Resources<G, E>,
        now_ns: u64,
    ) {
        self.map_segment_pages(io);
        self.copy_segments(io);
        let heads = std::mem::take(&mut io.scratch.heads);
        let mut at = 0;
        for (index, head) in heads.iter().enumerate() {
            let end = at + head.segment_count() * SEGMENT_BYTES;
            if has_failed(&io.scratch, index) {
                self.counters.errors.add(1);
                let response = RawResponse::new(head.id(), head.operation(), Status::Error);
                self.ring.answer(&response);
            } else {
                self.begin_indirect(io, head, at..end, now_ns);
            }
            at = end;
        }
        io.scratch.heads = heads;
        io.scratch.heads.clear();
        io.scratch.copies.clear();
        io.scratch.owners.clear();
    }

    fn map_segment_pages<G: Grants, E: RegisterBuffers>(&mut self, io: &mut Resources<G, E>) {
        if let Mapped::Kept(_) = self.mapped {
            let Scratch { heads, wanted, .. } = &mut io.scratch;
            let pages = heads.iter().flat_map(IndirectHead::pages);
            wanted.extend(pages.map(|(gref, _)| GrantRef(gref)));
            self.map_wanted(io);
        }
    }

    /// Copies the segments of all heads, one after the other, into `segment_bytes`. The copies that
    /// needed the hypervisor stay listed, with their status and the index of their head.
    fn copy_segments<G: Grants, E>(&mut self, io: &mut Resources<G, E>) {
        let Scratch { heads, segment_bytes, copies, owners, .. } = &mut io.scratch;
        let total: usize = heads.iter().map(IndirectHead::segment_count).sum();
        segment_bytes.clear();
        segment_bytes.resize(total * SEGMENT_BYTES, 0);
        let mut rest = &mut segment_bytes[..];
        for (owner, head) in (0u32..).zip(&*heads) {
            for (gref, count) in head.pages() {
                let (bytes, after) = rest.split_at_mut(count * SEGMENT_BYTES);
                rest = after;
                match self.mapped.kept().and_then(|persistent| persistent.page(gref)) {
                    Some(page) => page.copy_to(bytes),
                    None => {
                        copies.push(GrantCopy {
                            gref: GrantRef(gref),
                            offset: 0,
                            len: u16::try_from(bytes.len()).expect("at most a page"),
                            local: bytes.as_mut_ptr(),
                            direction: CopyDirection::FromGuest,
                            status: 0,
                        });
                        owners.push(owner);
                    }
                }
            }
        }
        copy_all(&mut io.grants, self.frontend, copies);
        self.counters.grants_copied.add(copies.len() as u64);
    }

    fn begin_indirect<G, E>(
        &mut self,
        io: &mut Resources<G, E>,
        head: &IndirectHead,
        bytes: std::ops::Range<usize>,
        now_ns: u64,
    ) {
        let words = io.scratch.segment_bytes[bytes].as_chunks::<SEGMENT_BYTES>().0;
        let raw = words.iter().map(|word| RawSegment::from_word(u64::from_le_bytes(*word)));
        let count = head.segment_count();
        let mut table = io.tables.take();
        match self.rules.check_indirect_segments(head, raw, table.segments_mut(count)) {
            Ok(request) => {
                let (index, slot) = self.slots.take();
                slot.begin(request, count, Some(table), now_ns);
                io.scratch.fresh.push(index);
            }
            Err(fault) => {
                io.tables.give_back(table);
                self.refuse(head.id(), head.operation(), fault);
            }
        }
    }
}

fn has_failed(scratch: &Scratch, head: usize) -> bool {
    let statuses = scratch.owners.iter().zip(&scratch.copies);
    statuses.into_iter().any(|(owner, copy)| *owner as usize == head && copy.status != 0)
}

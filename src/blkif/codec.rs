//! Ring entries in the layout of each protocol, copied out of and into shared memory.
//!
//! An entry is copied out of the ring word by word, each word once, before anything looks at it
//! (`RING_COPY_REQUEST`, XSA-155). Only as many segments are copied as the copied count says.

use crate::blkif::Protocol;
use crate::limits::{INDIRECT_PAGES_PER_REQUEST, SEGMENTS_PER_INDIRECT_PAGE, SEGMENTS_PER_REQUEST};
use crate::xen::shm::{PAGE_BYTES, SharedPage};

use super::{Status, op};

const _: () = assert!(cfg!(target_endian = "little"), "blkif words are little-endian");

/// A request as the frontend wrote it, copied but not yet validated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawRequest {
    /// A request whose segments are in the entry itself, or an unknown operation.
    Direct(RawDirect),
    /// A request whose segments are in granted pages.
    Indirect(RawIndirect),
    /// A discard, which has no data.
    Discard(RawDiscard),
}

/// What [`load_request_into`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// A direct request, which was put where the caller wanted it.
    Direct,
    /// A request whose segments are in granted pages.
    Indirect(RawIndirect),
    /// A discard, which has no data.
    Discard(RawDiscard),
}

/// `struct blkif_request`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawDirect {
    /// One of [`super::op`] except INDIRECT and DISCARD, or any unknown operation.
    pub operation: u8,
    /// The claimed number of segments; at most 11 are in `segments`.
    pub nr_segments: u8,
    /// The frontend's handle of the disk; backends ignore it.
    pub handle: u16,
    /// Echoed in the response.
    pub id: u64,
    /// First sector on the disk, in 512-byte units.
    pub sector: u64,
    /// Where the data is.
    pub segments: [RawSegment; SEGMENTS_PER_REQUEST],
}

/// `struct blkif_request_indirect`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawIndirect {
    /// What the request claims to do: READ, WRITE, or anything else.
    pub operation: u8,
    /// The claimed number of segments.
    pub nr_segments: u16,
    /// Echoed in the response.
    pub id: u64,
    /// First sector on the disk, in 512-byte units.
    pub sector: u64,
    /// The frontend's handle of the disk; backends ignore it.
    pub handle: u16,
    /// Grants of the pages with the segments, 512 in each.
    pub pages: [u32; INDIRECT_PAGES_PER_REQUEST],
}

/// `struct blkif_request_discard`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawDiscard {
    /// `BLKIF_DISCARD_SECURE` is bit 0; the others may be anything.
    pub flag: u8,
    /// The frontend's handle of the disk; backends ignore it.
    pub handle: u16,
    /// Echoed in the response.
    pub id: u64,
    /// First sector on the disk, in 512-byte units.
    pub sector: u64,
    /// How many sectors.
    pub nr_sectors: u64,
}

/// `struct blkif_request_segment`: sectors `first` to `last` (inclusive) of one granted page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawSegment {
    /// The page's grant reference.
    pub gref: u32,
    /// First 512-byte sector in the page.
    pub first: u8,
    /// Last 512-byte sector in the page.
    pub last: u8,
}

/// Bytes of a segment, in an entry and in a page of segments.
pub const SEGMENT_BYTES: usize = 8;

const _: () = assert!(SEGMENTS_PER_INDIRECT_PAGE * SEGMENT_BYTES == PAGE_BYTES);

impl RawRequest {
    /// Echoed in the response.
    pub fn id(&self) -> u64 {
        match self {
            RawRequest::Direct(direct) => direct.id,
            RawRequest::Indirect(indirect) => indirect.id,
            RawRequest::Discard(discard) => discard.id,
        }
    }

    /// Echoed in the response: for an indirect request its inner operation, as in blkback.
    pub fn operation(&self) -> u8 {
        match self {
            RawRequest::Direct(direct) => direct.operation,
            RawRequest::Indirect(indirect) => indirect.operation,
            RawRequest::Discard(_) => op::DISCARD,
        }
    }
}

impl From<RawIndirect> for RawRequest {
    fn from(indirect: RawIndirect) -> RawRequest {
        RawRequest::Indirect(indirect)
    }
}

impl From<RawDirect> for RawRequest {
    fn from(direct: RawDirect) -> RawRequest {
        RawRequest::Direct(direct)
    }
}

impl RawDirect {
    /// A request without segments.
    pub fn new(operation: u8, id: u64, sector: u64) -> RawDirect {
        RawDirect { operation, id, sector, ..RawDirect::default() }
    }

    /// How many segments the entry itself holds.
    #[inline]
    fn present(&self) -> usize {
        usize::from(self.nr_segments).min(SEGMENTS_PER_REQUEST)
    }
}

/// A response: `struct blkif_response`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawResponse {
    /// The request's id.
    pub id: u64,
    /// The request's operation.
    pub operation: u8,
    /// A [`Status`], or anything else if the backend is not polldisk.
    pub status: i16,
}

impl Protocol {
    /// Bytes from one ring entry to the next: the size of `union blkif_sring_entry`.
    pub const fn entry_bytes(self) -> usize {
        match self {
            Protocol::X86_64 => 112,
            Protocol::X86_32 => 108,
        }
    }
}

/// Copies a request out of the entry at byte `at`.
pub fn load_request(page: &SharedPage, at: usize, protocol: Protocol) -> RawRequest {
    let mut direct = RawDirect::new(0, 0, 0);
    match load_request_into(page, at, protocol, &mut direct) {
        Loaded::Direct => RawRequest::Direct(direct),
        Loaded::Indirect(indirect) => RawRequest::Indirect(indirect),
        Loaded::Discard(discard) => RawRequest::Discard(discard),
    }
}

/// As [`load_request`], but puts a direct request, the largest and most frequent kind, into `direct`, where
/// segments beyond the request's own keep their old values.
#[inline(always)]
pub fn load_request_into(
    page: &SharedPage,
    at: usize,
    protocol: Protocol,
    direct: &mut RawDirect,
) -> Loaded {
    let (head, id, sector) = load_head(page, at, protocol);
    let [operation, second, third, fourth] = head.to_le_bytes();
    let upper = u16::from_le_bytes([third, fourth]);
    let rest = at + head_bytes(protocol);
    match operation {
        op::INDIRECT => {
            let [handle] = page.load::<u32, 1>(rest);
            Loaded::Indirect(RawIndirect {
                operation: second,
                nr_segments: upper,
                id,
                sector,
                handle: low_half(handle),
                pages: page.load(rest + 4),
            })
        }
        op::DISCARD => {
            let [low, high] = page.load::<u32, 2>(rest);
            let nr_sectors = join(low, high);
            Loaded::Discard(RawDiscard { flag: second, handle: upper, id, sector, nr_sectors })
        }
        _ => {
            (direct.operation, direct.nr_segments, direct.handle) = (operation, second, upper);
            (direct.id, direct.sector) = (id, sector);
            let count = direct.present();
            load_segments(page, rest, protocol, &mut direct.segments[..count]);
            Loaded::Direct
        }
    }
}

/// Writes a request into the entry at byte `at`: the frontend's side.
#[inline]
pub fn store_request(page: &SharedPage, at: usize, protocol: Protocol, request: &RawRequest) {
    let rest = at + head_bytes(protocol);
    match request {
        RawRequest::Direct(direct) => {
            let head = head_word(direct.operation, direct.nr_segments, direct.handle);
            store_head(page, at, protocol, head, direct.id, direct.sector);
            for (index, segment) in direct.segments[..direct.present()].iter().enumerate() {
                page.store(rest + SEGMENT_BYTES * index, &split(segment.to_word()));
            }
        }
        RawRequest::Indirect(indirect) => {
            let head = head_word(op::INDIRECT, indirect.operation, indirect.nr_segments);
            store_head(page, at, protocol, head, indirect.id, indirect.sector);
            page.store(rest, &[u32::from(indirect.handle)]);
            page.store(rest + 4, &indirect.pages);
        }
        RawRequest::Discard(discard) => {
            let head = head_word(op::DISCARD, discard.flag, discard.handle);
            store_head(page, at, protocol, head, discard.id, discard.sector);
            page.store(rest, &split(discard.nr_sectors));
        }
    }
}

/// Bytes before the part that differs by operation: the operation and three bytes more, id, sector.
const fn head_bytes(protocol: Protocol) -> usize {
    match protocol {
        Protocol::X86_64 => 24,
        Protocol::X86_32 => 20,
    }
}

#[inline]
fn load_head(page: &SharedPage, at: usize, protocol: Protocol) -> (u32, u64, u64) {
    match protocol {
        Protocol::X86_64 => {
            let [head, id, sector] = page.load::<u64, 3>(at);
            (split(head)[0], id, sector)
        }
        Protocol::X86_32 => {
            let [head, id_low, id_high, sector_low, sector_high] = page.load::<u32, 5>(at);
            (head, join(id_low, id_high), join(sector_low, sector_high))
        }
    }
}

#[inline]
fn store_head(page: &SharedPage, at: usize, protocol: Protocol, head: u32, id: u64, sector: u64) {
    match protocol {
        Protocol::X86_64 => page.store(at, &[u64::from(head), id, sector]),
        Protocol::X86_32 => {
            let (id, sector) = (split(id), split(sector));
            page.store(at, &[head, id[0], id[1], sector[0], sector[1]]);
        }
    }
}

#[inline]
fn load_segments(page: &SharedPage, at: usize, protocol: Protocol, segments: &mut [RawSegment]) {
    let count = segments.len();
    match protocol {
        Protocol::X86_64 => {
            for (segment, word) in segments.iter_mut().zip(page.words::<u64>(at, count)) {
                *segment = RawSegment::from_word(word);
            }
        }
        Protocol::X86_32 => {
            let mut words = page.words::<u32>(at, 2 * count);
            for segment in segments {
                let (Some(low), Some(high)) = (words.next(), words.next()) else { return };
                *segment = RawSegment::from_word(join(low, high));
            }
        }
    }
}

/// Writes a response into the entry at byte `at`, padding included, so that nothing of our stack leaks into
/// the guest (XSA-216).
#[inline]
pub fn store_response(page: &SharedPage, at: usize, protocol: Protocol, response: &RawResponse) {
    let tail = u32::from(response.operation) | u32::from(response.status.cast_unsigned()) << 16;
    match protocol {
        Protocol::X86_64 => page.store(at, &[response.id, u64::from(tail)]),
        Protocol::X86_32 => {
            let id = split(response.id);
            page.store(at, &[id[0], id[1], tail]);
        }
    }
}

/// Copies a response out of the entry at byte `at`: the frontend's side.
#[inline]
pub fn load_response(page: &SharedPage, at: usize, protocol: Protocol) -> RawResponse {
    let (id, tail) = match protocol {
        Protocol::X86_64 => {
            let [id, tail] = page.load::<u64, 2>(at);
            (id, split(tail)[0])
        }
        Protocol::X86_32 => {
            let [low, high, tail] = page.load::<u32, 3>(at);
            (join(low, high), tail)
        }
    };
    let [operation, _, low, high] = tail.to_le_bytes();
    RawResponse { id, operation, status: i16::from_le_bytes([low, high]) }
}

impl RawSegment {
    /// Decodes its 8 bytes; the padding is ignored.
    #[inline]
    pub fn from_word(word: u64) -> RawSegment {
        let [g0, g1, g2, g3, first, last, ..] = word.to_le_bytes();
        RawSegment { gref: u32::from_le_bytes([g0, g1, g2, g3]), first, last }
    }

    /// Encodes it in 8 bytes; the padding is zero.
    #[inline]
    pub fn to_word(self) -> u64 {
        u64::from(self.gref) | u64::from(self.first) << 32 | u64::from(self.last) << 40
    }
}

#[inline]
fn head_word(operation: u8, second: u8, upper: u16) -> u32 {
    u32::from(operation) | u32::from(second) << 8 | u32::from(upper) << 16
}

#[inline]
fn low_half(word: u32) -> u16 {
    let [low, high, ..] = word.to_le_bytes();
    u16::from_le_bytes([low, high])
}

#[inline]
fn join(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

#[inline]
fn split(word: u64) -> [u32; 2] {
    let [b0, b1, b2, b3, b4, b5, b6, b7] = word.to_le_bytes();
    [u32::from_le_bytes([b0, b1, b2, b3]), u32::from_le_bytes([b4, b5, b6, b7])]
}

impl RawResponse {
    /// The response to a request.
    pub fn new(id: u64, operation: u8, status: Status) -> RawResponse {
        RawResponse { id, operation, status: status as i16 }
    }
}

#[cfg(test)]
mod test;

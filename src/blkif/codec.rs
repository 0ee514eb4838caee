//! Entries of a ring, laid out as each protocol has them, in and out of shared memory.
//!
//! An entry is copied out of the ring word by word, each word once, before anything looks at it
//! (`RING_COPY_REQUEST`, XSA-155). Only as many segments are copied as the copied count says.

use crate::limits::SEGMENTS_PER_REQUEST;
use crate::msg::Protocol;
use crate::xen::shm::SharedPage;

use super::{Status, op};

const _: () = assert!(cfg!(target_endian = "little"), "blkif words are little-endian");

/// A request as the frontend wrote it, copied and not yet believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawRequest {
    /// One of [`super::op`], or anything else.
    pub operation: u8,
    /// Claimed count of segments; those up to 11 are in `segments`.
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

/// `struct blkif_request_segment`: sectors `first` to `last` (inclusive) of one granted page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawSegment {
    /// The page's grant reference.
    pub gref: u32,
    /// First 512-byte sector in the page.
    pub first: u8,
    /// Last one.
    pub last: u8,
}

impl RawRequest {
    /// A request without segments.
    pub fn new(operation: u8, id: u64, sector: u64) -> RawRequest {
        RawRequest {
            operation,
            nr_segments: 0,
            handle: 0,
            id,
            sector,
            segments: [RawSegment::default(); SEGMENTS_PER_REQUEST],
        }
    }
}

/// A response: `struct blkif_response`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawResponse {
    /// The request's id.
    pub id: u64,
    /// The request's operation.
    pub operation: u8,
    /// A [`Status`], or anything else where the backend is not polldisk.
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
#[inline]
pub fn load_request(page: &SharedPage, at: usize, protocol: Protocol) -> RawRequest {
    match protocol {
        Protocol::X86_64 => {
            let [head, id, sector] = page.load::<u64, 3>(at);
            let mut request = with_head(head & 0xffff_ffff, id, sector);
            let mut segments = [0u64; SEGMENTS_PER_REQUEST];
            let count = segments_present(&request);
            page.load_into(at + 24, &mut segments[..count]);
            for (segment, word) in request.segments.iter_mut().zip(&segments[..count]) {
                *segment = RawSegment::from_word(*word);
            }
            request
        }
        Protocol::X86_32 => {
            let [head, id_low, id_high, sector_low, sector_high] = page.load::<u32, 5>(at);
            let mut request =
                with_head(head.into(), join(id_low, id_high), join(sector_low, sector_high));
            let mut segments = [0u32; 2 * SEGMENTS_PER_REQUEST];
            let count = segments_present(&request);
            page.load_into(at + 20, &mut segments[..2 * count]);
            let words = segments[..2 * count].as_chunks::<2>().0;
            for (segment, [low, high]) in request.segments.iter_mut().zip(words) {
                *segment = RawSegment::from_word(join(*low, *high));
            }
            request
        }
    }
}

/// Writes a request into the entry at byte `at`: the frontend's side.
#[inline]
pub fn store_request(page: &SharedPage, at: usize, protocol: Protocol, request: &RawRequest) {
    let head = u32::from(request.operation)
        | u32::from(request.nr_segments) << 8
        | u32::from(request.handle) << 16;
    let segments = &request.segments[..segments_present(request)];
    match protocol {
        Protocol::X86_64 => {
            page.store(at, &[u64::from(head), request.id, request.sector]);
            for (index, segment) in segments.iter().enumerate() {
                page.store(at + 24 + 8 * index, &[segment.to_word()]);
            }
        }
        Protocol::X86_32 => {
            let (id, sector) = (split(request.id), split(request.sector));
            page.store(at, &[head, id[0], id[1], sector[0], sector[1]]);
            for (index, segment) in segments.iter().enumerate() {
                page.store(at + 20 + 8 * index, &split(segment.to_word()));
            }
        }
    }
}

/// Writes a response into the entry at byte `at`, padding included: what the entry held before,
/// and our stack, stay our own (XSA-216).
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

#[inline]
fn with_head(head: u64, id: u64, sector: u64) -> RawRequest {
    let [operation, nr_segments, low, high, ..] = head.to_le_bytes();
    let request = RawRequest::new(operation, id, sector);
    RawRequest { nr_segments, handle: u16::from_le_bytes([low, high]), ..request }
}

/// Segments that the entry itself holds.
#[inline]
fn segments_present(request: &RawRequest) -> usize {
    match request.operation {
        op::DISCARD | op::INDIRECT => 0,
        _ => usize::from(request.nr_segments).min(SEGMENTS_PER_REQUEST),
    }
}

impl RawSegment {
    #[inline]
    fn from_word(word: u64) -> RawSegment {
        let [g0, g1, g2, g3, first, last, ..] = word.to_le_bytes();
        RawSegment { gref: u32::from_le_bytes([g0, g1, g2, g3]), first, last }
    }

    #[inline]
    fn to_word(self) -> u64 {
        u64::from(self.gref) | u64::from(self.first) << 32 | u64::from(self.last) << 40
    }
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

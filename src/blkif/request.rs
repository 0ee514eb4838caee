//! Validation: every [`Request`] comes from one of the checks here and may be executed.

use crate::backing::Geometry;
use crate::limits::{SEGMENTS_PER_INDIRECT_PAGE, SEGMENTS_PER_REQUEST};
use crate::units::{GrantRef, SECTOR_BYTES};

use super::codec::{RawDirect, RawDiscard, RawIndirect, RawSegment};
use super::{Status, op};

/// Last 512-byte sector of a granted page.
const LAST_SECTOR_OF_PAGE: u8 = 7;

/// What a disk allows its guest to do; requests are checked against it.
#[derive(Clone, Copy, Debug)]
pub struct DiskRules {
    /// Size and sector size.
    pub geometry: Geometry,
    /// Whether everything that changes data is refused.
    pub read_only: bool,
    /// The most segments in an indirect request; 0: such requests were not offered.
    pub indirect_segments: u16,
    /// Whether discards were offered.
    pub discard: bool,
    /// Whether secure discards were offered, too.
    pub secure_discard: bool,
}

/// `BLKIF_DISCARD_SECURE`.
const DISCARD_SECURE: u8 = 1;

/// A request whose numbers are all in range. Its segments are checked together with it and kept separately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Echoed in the response.
    pub id: u64,
    /// Echoed in the response.
    pub operation: u8,
    /// What to do.
    pub kind: Kind,
    /// Where on the disk, in bytes.
    pub offset_bytes: u64,
    /// How much, in bytes: the sum of the segments.
    pub len_bytes: u64,
}

impl Request {
    /// Whether it must wait for all earlier requests, and all later ones for it (`BLKIF_OP_WRITE_BARRIER`).
    #[inline]
    pub fn is_barrier(&self) -> bool {
        self.operation == op::WRITE_BARRIER
    }
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Disk to guest.
    Read,
    /// Guest to disk.
    Write,
    /// Make completed writes durable.
    Flush,
    /// Make completed writes durable, then write.
    FlushThenWrite,
    /// Make completed writes durable, write, then make that write durable, too.
    FlushedWrite,
    /// Forget the data.
    Discard,
    /// Erase the data beyond recovery.
    SecureDiscard,
}

/// A run of bytes in one granted page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// The page.
    pub gref: u32,
    /// First byte in it: a multiple of 512 below 4096.
    pub offset: u16,
    /// Bytes: a multiple of 512, at most 4096 - offset.
    pub len: u16,
}

impl Segment {
    /// The page's grant reference.
    pub fn grant(self) -> GrantRef {
        GrantRef(self.gref)
    }
}

/// Why a request can't be executed. It is answered with [`RequestFault::status`]; nobody else is affected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestFault {
    /// The operation is unknown, or was not offered.
    #[error("unknown operation")]
    UnknownOperation,
    /// 0, or more than the entry or its pages may hold.
    #[error("bad number of segments")]
    SegmentCount,
    /// It ends before it starts, or past its page.
    #[error("a segment is outside its page")]
    SegmentRange,
    /// Beyond the disk's last sector.
    #[error("beyond the end of the disk")]
    BeyondEnd,
    /// Not in whole sectors of the disk.
    #[error("not aligned to the sector size")]
    Unaligned,
    /// A write or discard on a read-only disk (XSA-142, XSA-266).
    #[error("the disk is read-only")]
    ReadOnly,
}

impl RequestFault {
    /// How the request is answered.
    pub fn status(self) -> Status {
        match self {
            RequestFault::UnknownOperation => Status::NotSupported,
            _ => Status::Error,
        }
    }
}

impl DiskRules {
    /// Checks every number of a copied request and puts its segments into `segments`.
    #[inline]
    pub fn check_direct(
        &self,
        raw: &RawDirect,
        segments: &mut [Segment; SEGMENTS_PER_REQUEST],
    ) -> Result<(Request, usize), RequestFault> {
        let kind = match (raw.operation, raw.nr_segments) {
            (op::READ, _) => Kind::Read,
            (op::WRITE, _) => Kind::Write,
            (op::FLUSH_DISKCACHE, 0) => Kind::Flush,
            (op::FLUSH_DISKCACHE, _) => Kind::FlushThenWrite,
            (op::WRITE_BARRIER, 0) => Kind::Flush,
            (op::WRITE_BARRIER, _) => Kind::FlushedWrite,
            _ => return Err(RequestFault::UnknownOperation),
        };
        self.check_writable(kind)?;
        let mut request =
            Request { id: raw.id, operation: raw.operation, kind, offset_bytes: 0, len_bytes: 0 };
        if kind == Kind::Flush {
            return Ok((request, 0));
        }
        let count = usize::from(raw.nr_segments);
        let raw_segments = raw.segments.get(..count).ok_or(RequestFault::SegmentCount)?;
        let sectors = self.check_segments(raw_segments.iter().copied(), segments)?;
        self.place(&mut request, raw.sector, sectors)?;
        Ok((request, count))
    }

    /// Checks a discard. If discards were not offered it is refused as unknown, so that a guest that relies
    /// on them finds out.
    pub fn check_discard(&self, raw: &RawDiscard) -> Result<Request, RequestFault> {
        let secure = raw.flag & DISCARD_SECURE != 0;
        if !self.discard || (secure && !self.secure_discard) {
            return Err(RequestFault::UnknownOperation);
        }
        let kind = if secure { Kind::SecureDiscard } else { Kind::Discard };
        self.check_writable(kind)?;
        if raw.nr_sectors == 0 || !self.geometry.is_whole(raw.nr_sectors) {
            return Err(RequestFault::Unaligned);
        }
        let mut request =
            Request { id: raw.id, operation: op::DISCARD, kind, offset_bytes: 0, len_bytes: 0 };
        self.place(&mut request, raw.sector, raw.nr_sectors)?;
        Ok(request)
    }

    /// Checks an indirect request before its pages are read.
    pub fn check_indirect(&self, raw: &RawIndirect) -> Result<IndirectHead, RequestFault> {
        let kind = match raw.operation {
            _ if self.indirect_segments == 0 => return Err(RequestFault::UnknownOperation),
            op::READ => Kind::Read,
            op::WRITE => Kind::Write,
            _ => return Err(RequestFault::UnknownOperation),
        };
        self.check_writable(kind)?;
        if raw.nr_segments == 0 || raw.nr_segments > self.indirect_segments {
            return Err(RequestFault::SegmentCount);
        }
        Ok(IndirectHead { raw: *raw, kind })
    }

    /// Checks the segments that were copied from the pages of an indirect request.
    pub fn check_indirect_segments(
        &self,
        head: &IndirectHead,
        raw_segments: impl ExactSizeIterator<Item = RawSegment>,
        segments: &mut [Segment],
    ) -> Result<Request, RequestFault> {
        let IndirectHead { raw, kind } = head;
        let mut request = Request {
            id: raw.id,
            operation: raw.operation,
            kind: *kind,
            offset_bytes: 0,
            len_bytes: 0,
        };
        let sectors = self.check_segments(raw_segments, segments)?;
        self.place(&mut request, raw.sector, sectors)?;
        Ok(request)
    }

    /// Refuses to change a read-only disk. A flush is harmless: there is nothing to flush, but some guests
    /// send it anyway.
    #[inline]
    fn check_writable(&self, kind: Kind) -> Result<(), RequestFault> {
        match kind {
            Kind::Read | Kind::Flush => Ok(()),
            _ if self.read_only => Err(RequestFault::ReadOnly),
            _ => Ok(()),
        }
    }

    /// Checks each segment against its page and the sector size; returns the sum in 512-byte sectors.
    #[inline]
    fn check_segments(
        &self,
        raw_segments: impl ExactSizeIterator<Item = RawSegment>,
        segments: &mut [Segment],
    ) -> Result<u64, RequestFault> {
        if raw_segments.len() == 0 || raw_segments.len() > segments.len() {
            return Err(RequestFault::SegmentCount);
        }
        let mut sectors = 0u64;
        for (segment, raw) in segments.iter_mut().zip(raw_segments) {
            let (checked, count) = check_segment(&raw)?;
            if !self.geometry.is_whole((raw.first | count).into()) {
                return Err(RequestFault::Unaligned);
            }
            *segment = checked;
            sectors += u64::from(count);
        }
        Ok(sectors)
    }

    /// Checks that `sectors` from `first` on are on the disk, and sets them as the request's range.
    #[inline]
    fn place(&self, request: &mut Request, first: u64, sectors: u64) -> Result<(), RequestFault> {
        if !self.geometry.is_whole(first) {
            return Err(RequestFault::Unaligned);
        }
        let end = first.checked_add(sectors).ok_or(RequestFault::BeyondEnd)?;
        if end > self.geometry.sectors().0 {
            return Err(RequestFault::BeyondEnd);
        }
        // Cannot overflow: end <= size in bytes / 512.
        request.offset_bytes = first * SECTOR_BYTES;
        request.len_bytes = sectors * SECTOR_BYTES;
        Ok(())
    }
}

/// An indirect request whose segments are still to be read.
#[derive(Clone, Copy, Debug)]
pub struct IndirectHead {
    raw: RawIndirect,
    kind: Kind,
}

impl IndirectHead {
    /// Echoed in the response.
    pub fn id(&self) -> u64 {
        self.raw.id
    }

    /// Echoed in the response.
    pub fn operation(&self) -> u8 {
        self.raw.operation
    }

    /// Segments in its pages, at least 1.
    pub fn segment_count(&self) -> usize {
        self.raw.nr_segments.into()
    }

    /// The grants of its pages, and how many segments are in each.
    pub fn pages(&self) -> impl Iterator<Item = (u32, usize)> + '_ {
        let starts = (0..self.segment_count()).step_by(SEGMENTS_PER_INDIRECT_PAGE);
        self.raw.pages.iter().zip(starts).map(|(gref, start)| {
            (*gref, (self.segment_count() - start).min(SEGMENTS_PER_INDIRECT_PAGE))
        })
    }
}

/// Checks that a segment is inside its page; returns it and its number of sectors.
#[inline]
fn check_segment(raw: &RawSegment) -> Result<(Segment, u8), RequestFault> {
    if raw.first > raw.last || raw.last > LAST_SECTOR_OF_PAGE {
        return Err(RequestFault::SegmentRange);
    }
    let count = raw.last - raw.first + 1;
    let segment =
        Segment { gref: raw.gref, offset: u16::from(raw.first) * 512, len: u16::from(count) * 512 };
    Ok((segment, count))
}

#[cfg(test)]
mod test;

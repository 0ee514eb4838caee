//! A request that may be executed: constructing one is the validation.

use crate::backing::Geometry;
use crate::limits::SEGMENTS_PER_REQUEST;
use crate::units::{GrantRef, SECTOR_BYTES};

use super::codec::{RawRequest, RawSegment};
use super::{Status, op};

/// Last 512-byte sector of a granted page.
const LAST_SECTOR_OF_PAGE: u8 = 7;

/// What a disk lets its guest do; requests are checked against it.
#[derive(Clone, Copy, Debug)]
pub struct DiskRules {
    /// Size and sector size.
    pub geometry: Geometry,
    /// Whether everything that changes data is refused.
    pub read_only: bool,
}

/// A request all of whose numbers are in range.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Echoed in the response.
    pub id: u64,
    /// What to do.
    pub kind: Kind,
    /// Where on the disk, in bytes.
    pub offset_bytes: u64,
    /// How much, in bytes: the sum of the segments.
    pub len_bytes: u32,
    segments: [Segment; SEGMENTS_PER_REQUEST],
    segment_count: u8,
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
}

impl Kind {
    /// The operation a response echoes.
    pub fn operation(self) -> u8 {
        match self {
            Kind::Read => op::READ,
            Kind::Write => op::WRITE,
            Kind::Flush | Kind::FlushThenWrite => op::FLUSH_DISKCACHE,
        }
    }
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

/// Why a request can't be executed; it is answered with the status, and harms nobody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestFault {
    /// No such operation here.
    #[error("unknown operation")]
    UnknownOperation,
    /// 0, or more than the entry holds.
    #[error("bad count of segments")]
    SegmentCount,
    /// Backwards, or past the page.
    #[error("a segment is outside its page")]
    SegmentRange,
    /// Beyond the disk's last sector.
    #[error("beyond the end of the disk")]
    BeyondEnd,
    /// Not in whole sectors of the disk.
    #[error("not aligned to the sector size")]
    Unaligned,
    /// A change of a disk that is read-only (XSA-142, XSA-266).
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

impl Request {
    /// Checks every number of a copied request.
    #[inline]
    pub fn check(raw: &RawRequest, disk: &DiskRules) -> Result<Request, RequestFault> {
        let kind = match (raw.operation, raw.nr_segments) {
            (op::READ, _) => Kind::Read,
            (op::WRITE, _) => Kind::Write,
            (op::FLUSH_DISKCACHE, 0) => Kind::Flush,
            (op::FLUSH_DISKCACHE, _) => Kind::FlushThenWrite,
            _ => return Err(RequestFault::UnknownOperation),
        };
        // A guest that may not write has nothing to flush, but some flush all the same: harmless.
        if disk.read_only && matches!(kind, Kind::Write | Kind::FlushThenWrite) {
            return Err(RequestFault::ReadOnly);
        }
        let mut request = Request {
            id: raw.id,
            kind,
            offset_bytes: 0,
            len_bytes: 0,
            segments: [Segment::default(); SEGMENTS_PER_REQUEST],
            segment_count: raw.nr_segments,
        };
        if kind != Kind::Flush {
            request.check_data(raw, &disk.geometry)?;
        }
        Ok(request)
    }

    #[inline]
    fn check_data(&mut self, raw: &RawRequest, disk: &Geometry) -> Result<(), RequestFault> {
        let raw_segments = raw
            .segments
            .get(..usize::from(raw.nr_segments))
            .filter(|segments| !segments.is_empty())
            .ok_or(RequestFault::SegmentCount)?;
        let block = disk.sectors_per_block();
        let mut sectors = 0u32;
        for (segment, raw) in self.segments.iter_mut().zip(raw_segments) {
            let (checked, count) = check_segment(raw)?;
            if !u64::from(raw.first).is_multiple_of(block)
                || !u64::from(count).is_multiple_of(block)
            {
                return Err(RequestFault::Unaligned);
            }
            *segment = checked;
            sectors += u32::from(count);
        }
        if !raw.sector.is_multiple_of(block) {
            return Err(RequestFault::Unaligned);
        }
        let end = raw.sector.checked_add(u64::from(sectors)).ok_or(RequestFault::BeyondEnd)?;
        if end > disk.sectors().0 {
            return Err(RequestFault::BeyondEnd);
        }
        // Cannot overflow: end <= size in bytes / 512.
        self.offset_bytes = raw.sector * SECTOR_BYTES;
        self.len_bytes = sectors * 512;
        Ok(())
    }

    /// Where the data is; empty for a plain flush.
    #[inline]
    pub fn segments(&self) -> &[Segment] {
        self.segments.get(..usize::from(self.segment_count)).unwrap_or(&[])
    }
}

/// A segment inside its page, and its sectors.
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

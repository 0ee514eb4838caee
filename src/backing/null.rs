//! A disk without contents: writes vanish, reads complete at once. For measuring everything except storage.

use super::{Discard, Geometry};
use crate::units::Bytes;

/// A disk of a given size that stores nothing.
///
/// As with null_blk and QEMU's null-co, a read leaves the guest's mapped buffer as it is unless
/// `read_zeroes` is set. If data is copied instead, the guest gets zeroes.
#[derive(Debug)]
pub struct NullImage {
    size: Bytes,
    read_zeroes: bool,
    memory_alignment: u16,
}

impl NullImage {
    /// A disk of `size` bytes, a multiple of 512.
    pub fn new(size: Bytes, read_zeroes: bool) -> Self {
        NullImage { size, read_zeroes, memory_alignment: 1 }
    }

    /// The same, as if it were storage that takes only buffers of this alignment, a power of two.
    pub fn with_memory_alignment(self, memory_alignment: u16) -> Self {
        NullImage { memory_alignment, ..self }
    }

    /// What buffer addresses must be a multiple of.
    pub fn memory_alignment(&self) -> u16 {
        self.memory_alignment
    }

    /// Whether reads fill the buffer with zeroes.
    pub fn read_zeroes(&self) -> bool {
        self.read_zeroes
    }

    /// Its geometry: plain 512-byte sectors.
    pub fn geometry(&self) -> Geometry {
        Geometry { size: self.size, sector_bytes: 512, physical_sector_bytes: 512 }
    }

    /// Any sectors can be discarded.
    pub const DISCARD: Discard =
        Discard { granularity_bytes: 512, alignment_bytes: 0, secure: false };
}

//! The blkif protocol without I/O: features, ring, entry layouts, validated requests.
//!
//! Mirrors Xen's `public/io/blkif.h` and `public/io/ring.h`.

pub mod codec;
pub mod features;
pub mod request;
pub mod ring;

/// `BLKIF_OP_*`: what a request asks for.
pub mod op {
    /// Read sectors into the segments.
    pub const READ: u8 = 0;
    /// Write the segments to sectors.
    pub const WRITE: u8 = 1;
    /// Write, ordered against everything before and after.
    pub const WRITE_BARRIER: u8 = 2;
    /// Make completed writes durable; with segments, write them afterwards.
    pub const FLUSH_DISKCACHE: u8 = 3;
    /// Discard sectors.
    pub const DISCARD: u8 = 5;
    /// A read or write whose segments lie in granted pages.
    pub const INDIRECT: u8 = 6;
}

/// The layout of ring entries that a frontend uses: `XEN_IO_PROTO_ABI_*` of Xen's
/// `public/io/protocols.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// 64-bit layout: `x86_64-abi`, and native on every 64-bit host.
    X86_64,
    /// 32-bit x86 layout (4-byte alignment of u64): `x86_32-abi`.
    X86_32,
}

/// `BLKIF_RSP_*`: how a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i16)]
pub enum Status {
    /// Done.
    Okay = 0,
    /// Not done.
    Error = -1,
    /// Not supported by this backend: the frontend should not ask again.
    NotSupported = -2,
}

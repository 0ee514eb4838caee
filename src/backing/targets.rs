//! What the layers of an engine need to know of an image, nested as the layers are: each target holds
//! the target of the layer below.

use std::os::fd::RawFd;
use std::sync::Arc;

use super::{BlockLocks, DeviceHandle, MappedFile};

/// A file or block device as the kernel takes it. The image keeps it open.
#[derive(Clone, Debug)]
pub struct OpenFile {
    /// Its descriptor.
    pub raw_fd: RawFd,
    /// The device, for a thread that discards; `None` for a file.
    pub device: Option<Arc<DeviceHandle>>,
    /// Whether each operation waits for another process: a file of FUSE.
    pub always_waits: bool,
}

/// Storage whose guest may see smaller sectors than its blocks.
#[derive(Debug)]
pub struct EmulationTarget<T> {
    /// Locks of its blocks; `None` if the guest's sectors are whole blocks.
    pub locks: Option<Arc<BlockLocks>>,
    /// The end of a file, if it does not fill a block.
    pub tail: Option<Tail<T>>,
    /// Takes whole blocks.
    pub below: T,
}

/// The end of a file that does not fill a block of its storage. O_DIRECT would write the whole block
/// and make the file longer, so this part goes through the page cache, which holds no other part.
#[derive(Debug)]
pub struct Tail<T> {
    /// First byte of the file that belongs to it.
    pub start: u64,
    /// The file without O_DIRECT: takes any sectors.
    pub below: T,
}

/// Storage that may be a file in memory (tmpfs).
#[derive(Debug)]
pub struct MemoryTarget<T> {
    /// The file, if it is in memory and the guest's sectors are whole blocks.
    pub file: Option<MemoryFile>,
    /// Takes what is not reading or writing memory.
    pub below: T,
}

/// A file of tmpfs.
#[derive(Debug)]
pub struct MemoryFile {
    /// Its descriptor.
    pub raw_fd: RawFd,
    /// Its pages in our address space, if it could be mapped.
    pub mapping: Option<MappedFile>,
}

//! What a disk stores: the spec that names its contents, and the opened image.
//!
//! Control opens images; workers only use them. The format always comes from the host's configuration,
//! never from bytes that a guest can write (XSA-48).

mod advice;
mod blocks;
mod claims;
mod device;
mod hint;
mod holders;
mod locks;
mod mapped;
pub mod mounts;
mod null;
mod raw;
mod request_queue;
mod sharing;
mod spec;
mod storage;
mod targets;

pub use blocks::{BlockLock, BlockLocks};
pub use mapped::MappedFile;
pub use null::NullImage;
pub use raw::{DeviceHandle, OpenedRaw, RawImage, RawTarget};
pub use request_queue::RequestQueue;
pub use spec::{Contents, DataPath, Direct, DiskOptions, Spec};
pub use targets::{EmulationTarget, MemoryFile, MemoryTarget, OpenFile, Tail};

use std::sync::Arc;

use crate::limits;
use crate::text::printable;
use crate::units::{Bytes, SECTOR_BYTES, Sectors};

/// How a disk wants to use its storage.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// The guest may not write.
    pub read_only: bool,
    /// The admin allows others to write at the same time, as a cluster filesystem does.
    pub shareable: bool,
    /// Who uses it, for the error that another user gets: `disk xvda of domain 5`.
    pub user: String,
}

/// Opened storage as control holds it: the [`Image`] that workers do I/O on, and what only control needs to
/// know about it.
#[derive(Debug)]
pub struct Backing {
    image: Arc<Image>,
    discard: Option<Discard>,
    warnings: Vec<String>,
    options: DiskOptions,
}

impl Backing {
    /// A drive without a medium.
    pub fn empty() -> Backing {
        let options = DiskOptions::default();
        Backing { image: Arc::new(Image::Empty), discard: None, warnings: Vec::new(), options }
    }

    /// What workers do I/O on.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// The options from its target.
    pub fn options(&self) -> DiskOptions {
        self.options
    }

    /// What the admin should know although it is served: sentences whose subject is "it".
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// What its guest may discard; `None` if nothing can be discarded, or it is read-only.
    pub fn discard(&self) -> Option<Discard> {
        self.discard
    }

    /// Tells that it is about to be closed: from now on another disk that wants the same storage waits for
    /// that, instead of being refused.
    pub fn closing(&self) {
        match &*self.image {
            Image::Raw(image) => image.closing(),
            Image::Null(_) | Image::Empty => {}
        }
    }
}

/// An opened image of any kind: one match per operation.
#[derive(Debug)]
pub enum Image {
    /// A file or a block device, byte for byte.
    Raw(RawImage),
    /// No contents.
    Null(NullImage),
    /// A drive without a medium: no sectors to read or write.
    Empty,
}

impl Image {
    /// Its size and sector sizes, as the guest sees them.
    pub fn geometry(&self) -> Geometry {
        match self {
            Image::Raw(image) => image.geometry(),
            Image::Null(image) => image.geometry(),
            Image::Empty => Geometry::NO_MEDIUM,
        }
    }

    /// The alignment that buffer addresses need, at most a page.
    pub fn memory_alignment(&self) -> u16 {
        match self {
            Image::Raw(image) => image.memory_alignment(),
            Image::Null(image) => image.memory_alignment(),
            Image::Empty => 1,
        }
    }

    /// Whether the worker itself moves its data while it submits.
    pub fn is_moved_by_worker(&self) -> bool {
        match self {
            Image::Raw(image) => image.target().file.is_some(),
            Image::Null(image) => image.read_zeroes(),
            Image::Empty => false,
        }
    }

    /// Whether a kernel thread moves its data, because each operation waits for another process.
    pub fn is_moved_by_thread(&self) -> bool {
        match self {
            Image::Raw(image) => image.target().below.below.always_waits,
            Image::Null(_) | Image::Empty => false,
        }
    }

    /// The request queue in which a thread that submits may have to sleep; `None`: none is known.
    pub fn request_queue(&self) -> Option<RequestQueue> {
        match self {
            Image::Raw(image) => image.request_queue(),
            Image::Null(_) | Image::Empty => None,
        }
    }

    /// Whether a read always overwrites its buffers.
    pub fn fills_reads(&self) -> bool {
        match self {
            // A drive without a medium can't be read at all.
            Image::Raw(_) | Image::Empty => true,
            Image::Null(image) => image.read_zeroes(),
        }
    }
}

/// A disk's size and sector sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Its size; a multiple of `sector_bytes`.
    pub size: Bytes,
    /// Smallest unit of I/O (logical block size): 512 or 4096. What `sector-size` says.
    pub sector_bytes: u32,
    /// Smallest unit written without read-modify-write below. What `physical-sector-size` says.
    pub physical_sector_bytes: u32,
}

impl Geometry {
    /// The geometry of a drive without a medium.
    pub const NO_MEDIUM: Geometry =
        Geometry { size: Bytes(0), sector_bytes: 512, physical_sector_bytes: 512 };

    /// The same in logical blocks of at least `sector_bytes`; a rest that does not fill one is cut off.
    pub fn in_sectors_of(self, sector_bytes: u32) -> Geometry {
        let sector_bytes = self.sector_bytes.max(sector_bytes);
        let whole = u64::from(sector_bytes);
        Geometry {
            size: Bytes(self.size.0 / whole * whole),
            sector_bytes,
            physical_sector_bytes: self.physical_sector_bytes.max(sector_bytes),
        }
    }

    /// The size in ring sectors of 512 bytes: what `sectors` says, whatever `sector-size` is.
    pub fn sectors(&self) -> Sectors {
        self.size.to_sectors()
    }

    /// Whether all numbers of ring sectors in this bitwise OR are whole sectors of the disk.
    #[inline]
    pub fn is_whole(&self, ring_sectors: u64) -> bool {
        // A sector's size is a power of two: a division would cost as much as all other checks.
        ring_sectors & (u64::from(self.sector_bytes) / SECTOR_BYTES - 1) == 0
    }
}

/// How a disk can be discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discard {
    /// The smallest part that storage really frees. What `discard-granularity` says.
    pub granularity_bytes: u32,
    /// Where the first such part starts. What `discard-alignment` says.
    pub alignment_bytes: u32,
    /// Data can be made unrecoverable. What `discard-secure` says.
    pub secure: bool,
}

/// The reason why a disk's contents can't be served.
#[derive(Debug, thiserror::Error)]
#[error("{target}: {what}; {remedy}")]
pub struct BackingError {
    /// The target as it was given.
    pub target: String,
    /// What is wrong with it.
    pub what: String,
    /// What the admin can do.
    pub remedy: String,
    /// The system's own error, if it was one.
    #[source]
    pub source: Option<std::io::Error>,
}

impl BackingError {
    /// Makes each text printable on one line, because names of files may hold anything.
    pub fn new(
        target: &str,
        what: &str,
        remedy: &str,
        source: Option<std::io::Error>,
    ) -> BackingError {
        let [target, what, remedy] =
            [target, what, remedy].map(|text| printable(text).into_owned());
        BackingError { target, what, remedy, source }
    }

    /// The error for storage that was not opened within `limits::OPEN_SECONDS`.
    pub fn too_slow(target: &str) -> BackingError {
        let what = format!("it could not be opened within {} s", limits::OPEN_SECONDS);
        let remedy = "check that its storage answers (a hung server or automount, a lease), then \
                    try again";
        BackingError::new(target, &what, remedy, None)
    }
}

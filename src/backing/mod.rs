//! WHAT is stored: the spec that names a disk's contents, and the opened image.
//!
//! Control opens images; workers only use them. The format always comes from the host's
//! configuration and is never guessed from bytes that a guest can write (XSA-48).

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

pub use blocks::{BlockLock, BlockLocks};
pub use mapped::MappedFile;
pub use null::NullImage;
pub use raw::{DeviceHandle, RawImage, Tail};
pub use request_queue::RequestQueue;
pub use spec::{Contents, DataPath, Direct, DiskOptions, Spec};

use std::sync::Arc;

use crate::limits;
use crate::text::printable;
use crate::units::{Bytes, SECTOR_BYTES, Sectors};

/// How a disk wants to use its storage.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// The guest may not write.
    pub read_only: bool,
    /// The admin says that others may write at the same time, as a cluster filesystem lets them.
    pub shareable: bool,
    /// Who uses it, for the error that another one gets: `disk xvda of domain 5`.
    pub user: String,
}

/// Opened storage as control holds it: what a disk's guest is told of it, and the [`Image`] that
/// workers do I/O on.
#[derive(Debug)]
pub struct Backing {
    image: Arc<Image>,
    options: DiskOptions,
}

impl Backing {
    fn of(image: Image, options: DiskOptions) -> Backing {
        Backing { image: Arc::new(image), options }
    }

    /// A drive without a medium.
    pub fn empty() -> Backing {
        Backing::of(Image::Empty, DiskOptions::default())
    }

    /// What workers do I/O on.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// The options that stood in its target.
    pub fn options(&self) -> DiskOptions {
        self.options
    }

    /// What its admin should know, though it is served: each one sentence about "it".
    pub fn warnings(&self) -> &[String] {
        match &*self.image {
            Image::Raw(image) => image.warnings(),
            Image::Null(_) | Image::Empty => &[],
        }
    }

    /// It is about to be closed: another disk that wants the same storage waits for that from now
    /// on, instead of being refused.
    pub fn closing(&self) {
        match &*self.image {
            Image::Raw(image) => image.closing(),
            Image::Null(_) | Image::Empty => {}
        }
    }
}

/// An opened image, of one kind or another: one match per operation.
#[derive(Debug)]
pub enum Image {
    /// A file or a block device, byte for byte.
    Raw(RawImage),
    /// Nothing.
    Null(NullImage),
    /// A drive without a medium: no sectors to read or write.
    Empty,
}

impl Image {
    /// Its size and sector sizes, as the guest is told them.
    pub fn geometry(&self) -> Geometry {
        match self {
            Image::Raw(image) => image.geometry(),
            Image::Null(image) => image.geometry(),
            Image::Empty => Geometry::NO_MEDIUM,
        }
    }

    /// What buffer addresses must be a multiple of, at most a page.
    pub fn memory_alignment(&self) -> u16 {
        match self {
            Image::Raw(image) => image.memory_alignment(),
            Image::Null(image) => image.memory_alignment(),
            Image::Empty => 1,
        }
    }

    /// Whether a worker moves its data itself, as a part of submitting.
    pub fn is_moved_by_worker(&self) -> bool {
        match self {
            Image::Raw(image) => image.is_in_memory(),
            Image::Null(image) => image.read_zeroes(),
            Image::Empty => false,
        }
    }

    /// Whether a thread of the kernel moves its data, because each operation waits for another process.
    pub fn is_moved_by_thread(&self) -> bool {
        match self {
            Image::Raw(image) => image.always_waits(),
            Image::Null(_) | Image::Empty => false,
        }
    }

    /// The request queue that may have whoever submits to it sleep; `None`: there is none that is known.
    pub fn request_queue(&self) -> Option<RequestQueue> {
        match self {
            Image::Raw(image) => image.request_queue(),
            Image::Null(_) | Image::Empty => None,
        }
    }

    /// Whether a read leaves nothing in its buffers of what was there before.
    pub fn fills_reads(&self) -> bool {
        match self {
            // Nothing can be read of a drive without a medium.
            Image::Raw(_) | Image::Empty => true,
            Image::Null(image) => image.read_zeroes(),
        }
    }

    /// What its guest may discard.
    pub fn discard(&self) -> Option<Discard> {
        match self {
            Image::Raw(image) => image.discard(),
            Image::Null(image) => Some(image.discard()),
            Image::Empty => None,
        }
    }

    /// Whether it was opened without write access.
    pub fn is_read_only(&self) -> bool {
        match self {
            Image::Raw(image) => image.is_read_only(),
            Image::Null(_) | Image::Empty => false,
        }
    }
}

/// A disk's shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes it holds; a multiple of `sector_bytes`.
    pub size: Bytes,
    /// Smallest unit of I/O (logical block size): 512 or 4096. What `sector-size` says.
    pub sector_bytes: u32,
    /// Smallest unit written without read-modify-write below. What `physical-sector-size` says.
    pub physical_sector_bytes: u32,
}

impl Geometry {
    /// The shape of a drive without a medium.
    pub const NO_MEDIUM: Geometry =
        Geometry { size: Bytes(0), sector_bytes: 512, physical_sector_bytes: 512 };

    /// The same in logical blocks of at least `sector_bytes`; a tail that fills none is cut off.
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

    /// Whether numbers of ring sectors, or'ed together, are all whole sectors of the disk.
    #[inline]
    pub fn is_whole(&self, ring_sectors: u64) -> bool {
        // A sector's size is a power of two; a division would cost as much as all other checks.
        ring_sectors & (u64::from(self.sector_bytes) / SECTOR_BYTES - 1) == 0
    }
}

/// What can be discarded of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discard {
    /// Smallest part that is really given back. What `discard-granularity` says.
    pub granularity_bytes: u32,
    /// Where the first such part starts. What `discard-alignment` says.
    pub alignment_bytes: u32,
    /// Data can be made unrecoverable. What `discard-secure` says.
    pub secure: bool,
}

/// Why a disk's contents can't be served.
#[derive(Debug, thiserror::Error)]
#[error("{target}: {what}; {mend}")]
pub struct BackingError {
    /// The target as it was given.
    pub target: String,
    /// What is wrong with it.
    pub what: String,
    /// What the admin can do.
    pub mend: String,
    /// The system's own error, if it was one.
    #[source]
    pub source: Option<std::io::Error>,
}

impl BackingError {
    /// Each text is made fit for one line, whatever is in the names of files.
    pub fn new(
        target: &str,
        what: &str,
        mend: &str,
        source: Option<std::io::Error>,
    ) -> BackingError {
        let [target, what, mend] = [target, what, mend].map(|text| printable(text).into_owned());
        BackingError { target, what, mend, source }
    }

    /// Its storage has not been opened within `limits::OPEN_SECONDS`.
    pub fn too_slow(target: &str) -> BackingError {
        let what = format!("it could not be opened within {} s", limits::OPEN_SECONDS);
        let mend = "see whether its storage answers (a hung server or automount, a lease), and then \
                    try again";
        BackingError::new(target, &what, mend, None)
    }
}

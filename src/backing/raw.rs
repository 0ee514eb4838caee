//! A raw image: a regular file or a block device, opened with O_DIRECT if possible.

use std::fs::{File, FileType, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, FallocateFlags, FsWord, OFlags, StatxFlags};

use super::advice::{self, Advice};
use super::claims::{Claim, Usage};
use super::device::DiscardPieces;
use super::sharing::{self, SharingError};
use super::storage::Located;
use super::targets::{EmulationTarget, MemoryFile, MemoryTarget, OpenFile, Tail};
use super::{
    Access, BackingError, BlockLocks, Direct, Discard, DiskOptions, Geometry, MappedFile,
    RequestQueue, device, hint,
};
use crate::units::{Bytes, SECTOR_BYTES};

/// What an engine's layers do I/O on: a file in memory, or emulated sectors over a file or device.
pub type RawTarget = MemoryTarget<EmulationTarget<OpenFile>>;

/// An open raw image. Its fields are closed in their order, so that the claim goes last.
#[derive(Debug)]
pub struct RawImage {
    target: RawTarget,
    /// Open for the target's tail.
    _tail_file: Option<File>,
    file: Arc<DeviceHandle>,
    request_queue: Option<RequestQueue>,
    geometry: Geometry,
    memory_alignment: u16,
}

/// An opened raw image, and what only control needs to know of it.
#[derive(Debug)]
pub struct OpenedRaw {
    /// What workers do I/O on.
    pub image: RawImage,
    /// What its guest may discard; `None` if nothing can be discarded, or it is read-only.
    pub discard: Option<Discard>,
    /// What its admin should know.
    pub warnings: Vec<String>,
}

/// Largest block whose sectors are emulated: a page, because the guest's data comes in pages.
const EMULATED_BLOCK_MAX: u32 = PAGE_BYTES;

/// Bytes of a page of the page cache.
const PAGE_BYTES: u32 = 4096;

/// An open file or device, shared with the thread that discards.
#[derive(Debug)]
pub struct DeviceHandle {
    file: Arc<File>,
    discard_pieces: DiscardPieces,
    claim: Claim,
}

impl RawImage {
    /// Opens the file or device at `path`, unless somebody else uses it in a way that conflicts with
    /// `access`. May take any time, as storage may hang.
    pub fn open(
        path: &Path,
        options: DiskOptions,
        access: &Access,
    ) -> Result<OpenedRaw, BackingError> {
        let usage = Usage {
            writes: !access.read_only,
            shareable: access.shareable || options.shareable,
            emulates: options.emulate_512,
        };
        Opening { path, options, usage, warnings: Vec::new() }.open(&access.user)
    }

    /// What an engine's layers do I/O on.
    #[inline]
    pub fn target(&self) -> &RawTarget {
        &self.target
    }

    /// Its size and sector sizes.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The alignment that O_DIRECT needs of buffer addresses: a power of two.
    pub fn memory_alignment(&self) -> u16 {
        self.memory_alignment
    }

    /// The request queue of the device that it lies on, if a thread that submits sleeps while that queue is
    /// full.
    pub fn request_queue(&self) -> Option<RequestQueue> {
        self.request_queue
    }

    /// Tells that it is about to be closed: others that want the storage wait for that.
    pub fn closing(&self) {
        self.file.claim.closing();
    }
}

impl Drop for RawImage {
    fn drop(&mut self) {
        self.closing();
    }
}

impl DeviceHandle {
    /// Discards bytes of a block device; `secure`: beyond recovery. May take long.
    pub fn discard(&self, offset: u64, len: u64, secure: bool) -> io::Result<()> {
        device::discard(&self.file, self.discard_pieces, offset, len, secure)
    }
}

/// An image that is being opened.
struct Opening<'a> {
    path: &'a Path,
    options: DiskOptions,
    usage: Usage,
    warnings: Vec<String>,
}

impl Opening<'_> {
    fn open(mut self, user: &str) -> Result<OpenedRaw, BackingError> {
        let located = self.find()?;
        let claim = sharing::claim(&located, self.usage, user).map_err(|why| self.shared(why))?;
        let (file, shape) = self.open_storage(&located)?;
        let file = Arc::new(file);
        let unlocked = sharing::lock(&claim, &file, self.usage).map_err(|why| self.shared(why))?;
        self.warnings.extend(unlocked);
        leave_access_time(&file);
        let emulation = self.emulation(&shape, &claim)?;
        let geometry = self.geometry(&shape, emulation.is_some())?;
        let read_only = !self.usage.writes;
        let is_device = shape.is_device;
        let lies_on = if is_device { None } else { filesystem(&file) };
        let is_in_memory = lies_on == Some(libc::TMPFS_MAGIC);
        // For block devices and the page cache, io_uring asks that the submitter does not sleep.
        let sleeps_for_tags = !is_device && !is_in_memory && is_direct(&file);
        let has_tail = !geometry.size.0.is_multiple_of(shape.sector_bytes.into());
        let tail_file = has_tail.then(|| self.open_tail(&located)).transpose()?;
        self.advise(&file, &geometry);
        let discard_pieces = DiscardPieces::of(located.metadata.rdev());
        claim.opened();
        let raw_fd = file.as_raw_fd();
        let memory_file = (is_in_memory && emulation.is_none())
            .then(|| MemoryFile { raw_fd, mapping: map(&file, shape.size, self.path, read_only) });
        let handle = Arc::new(DeviceHandle { file, discard_pieces, claim });
        let open_file = OpenFile {
            raw_fd,
            device: is_device.then(|| Arc::clone(&handle)),
            always_waits: lies_on == Some(libc::FUSE_SUPER_MAGIC),
        };
        let tail = tail_file.as_ref().map(|file| tail(file, geometry.size, &open_file));
        let discard = shape.discard_in_sectors(emulation.is_some());
        let blocks = EmulationTarget { locks: emulation, tail, below: open_file };
        let image = RawImage {
            target: MemoryTarget { file: memory_file, below: blocks },
            _tail_file: tail_file,
            file: handle,
            request_queue: sleeps_for_tags
                .then(|| RequestQueue::of(located.metadata.dev()))
                .flatten(),
            geometry,
            // Guests' pages can't be aligned to more than a page, and the kernel never asks for more.
            memory_alignment: shape
                .memory_alignment
                .clamp(1, 4096)
                .next_power_of_two()
                .try_into()
                .unwrap_or(4096),
        };
        Ok(OpenedRaw { image, discard, warnings: self.warnings })
    }

    fn fail(&self, what: &str, remedy: &str, source: Option<io::Error>) -> BackingError {
        let target = format!("raw{}:{}", self.options, self.path.display());
        BackingError::new(&target, what, remedy, source)
    }

    fn cannot_open(&self, error: io::Error) -> BackingError {
        let Advice { what, remedy } = advice::on_open(self.path, &error);
        self.fail(what, remedy, Some(error))
    }

    fn shared(&self, error: SharingError) -> BackingError {
        match error {
            SharingError::InUse { what, remedy } => self.fail(&what, &remedy, None),
            SharingError::Open(error) => self.cannot_open(error),
        }
    }

    /// Finds out what the path leads to before it is opened: opening a FIFO would wait for its other end,
    /// and some devices react to being opened.
    fn find(&self) -> Result<Located, BackingError> {
        let located = Located::find(self.path).map_err(|error| self.not_found(error))?;
        let kind = located.metadata.file_type();
        let folder = self.path.parent().and_then(|folder| Located::find(folder).ok());
        let is_kernels = |located: &Located| {
            let kernels = [libc::PROC_SUPER_MAGIC, libc::SYSFS_MAGIC];
            filesystem(located.handle()).is_some_and(|kind| kernels.contains(&kind))
        };
        if is_kernels(&located) || folder.is_some_and(|folder| is_kernels(&folder)) {
            let what = "it is in procfs or sysfs, which hold no storage";
            return Err(self.fail(what, "name the file or block device itself", None));
        }
        if !kind.is_file() && !kind.is_block_device() {
            let what = format!("it is a {}", kind_of(kind));
            return Err(self.fail(&what, "name a regular file or a block device", None));
        }
        if kind.is_block_device()
            && self.usage.writes
            && device::is_read_only(located.metadata.rdev())
        {
            let Advice { what, remedy } = advice::READ_ONLY_DEVICE;
            return Err(self.fail(what, remedy, None));
        }
        Ok(located)
    }

    fn not_found(&self, error: io::Error) -> BackingError {
        match std::fs::read_link(self.path) {
            Ok(to) if error.raw_os_error() == Some(libc::ENOENT) => {
                let what = format!("it is a link to {}, which does not exist", to.display());
                self.fail(&what, "create that or correct the link", Some(error))
            }
            _ => self.cannot_open(error),
        }
    }

    /// Opens it with O_DIRECT, or without if the filesystem does not support that.
    fn open_storage(&mut self, located: &Located) -> Result<(File, Shape), BackingError> {
        let direct = match self.open_file(located, libc::O_DIRECT) {
            Ok(file) => self.direct_shape(located, &file)?.map(|shape| (file, shape)),
            Err(error) if is_invalid(&error) => None,
            Err(error) => return Err(self.cannot_open(error)),
        };
        if let Some(direct) = direct {
            return Ok(direct);
        }
        if self.options.direct == Direct::Required {
            let remedy = "put it on another filesystem, or remove direct=required";
            return Err(self.fail("its filesystem refuses O_DIRECT", remedy, None));
        }
        let file = self.open_file(located, 0).map_err(|error| self.cannot_open(error))?;
        self.warnings.push(
            "its filesystem refuses O_DIRECT, so it is served through the page cache, which takes \
             memory and CPU; put it on another filesystem, or forbid this with direct=required"
                .to_owned(),
        );
        let shape =
            buffered_shape(located, &file, self.usage.writes).map_err(|e| self.unknown(e))?;
        Ok((file, shape))
    }

    fn open_file(&self, located: &Located, flags: libc::c_int) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(self.usage.writes).custom_flags(flags | libc::O_CLOEXEC);
        located.open(&options)
    }

    /// `None`: the filesystem opens the file with O_DIRECT, but refuses to read it so.
    fn direct_shape(&self, located: &Located, file: &File) -> Result<Option<Shape>, BackingError> {
        if located.metadata.file_type().is_block_device() {
            return device_shape(file, self.usage.writes).map(Some).map_err(|e| self.unknown(e));
        }
        let shape = file_shape(located, file, self.usage.writes).map_err(|e| self.unknown(e))?;
        Ok(readable_block(file, shape.sector_bytes).map(|bytes| shape.with_blocks_of(bytes)))
    }

    fn unknown(&self, error: io::Error) -> BackingError {
        self.fail("its sizes can't be read", "check the file or device", Some(error))
    }

    /// The locks of the storage's blocks, if its guest sees smaller sectors (`emulate-512`). If the blocks
    /// have 512 bytes, there is nothing to emulate.
    fn emulation(
        &self,
        shape: &Shape,
        claim: &Claim,
    ) -> Result<Option<Arc<BlockLocks>>, BackingError> {
        let block_bytes = shape.sector_bytes;
        if !self.options.emulate_512 || u64::from(block_bytes) <= SECTOR_BYTES {
            return Ok(None);
        }
        if block_bytes > EMULATED_BLOCK_MAX {
            let what = format!("its blocks have {block_bytes} bytes, which is more than a page");
            return Err(self.fail(&what, "remove emulate-512", None));
        }
        Ok(Some(claim.block_locks(block_bytes)))
    }

    /// What the guest sees. A rest that is shorter than a sector can't be shown to it.
    fn geometry(&mut self, shape: &Shape, emulates: bool) -> Result<Geometry, BackingError> {
        let sector_bytes = if emulates { 512 } else { shape.sector_bytes };
        let sector = u64::from(sector_bytes);
        let left_over = shape.size % sector;
        if shape.size < sector {
            let Advice { what, remedy } = advice::empty(shape.is_device);
            return Err(self.fail(what, remedy, None));
        }
        if left_over > 0 {
            self.warnings.push(format!(
                "its last {left_over} bytes do not fill a sector of {sector} bytes, and the guest does \
                 not see them; make its size a multiple of that (truncate -s %{sector}){}",
                if sector_bytes > 512 { ", or name it with emulate-512" } else { "" }
            ));
        }
        Ok(Geometry {
            size: Bytes(shape.size - left_over),
            sector_bytes,
            physical_sector_bytes: shape.physical_sector_bytes.max(shape.sector_bytes),
        })
    }

    /// Opens a file once more for its tail, without O_DIRECT.
    fn open_tail(&self, located: &Located) -> Result<File, BackingError> {
        let file = self.open_file(located, 0).map_err(|error| self.cannot_open(error))?;
        // Reading ahead would put blocks into the page cache that are written with O_DIRECT. A filesystem
        // that does not accept the advice is served anyway.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random);
        Ok(file)
    }

    /// Warns about likely mistakes.
    fn advise(&mut self, file: &File, geometry: &Geometry) {
        let sector_bytes = geometry.sector_bytes;
        if u64::from(sector_bytes) > SECTOR_BYTES
            && let Ok(start) = read_start(file, 2 * sector_bytes as usize)
            && hint::is_made_for_512(&start, sector_bytes, geometry.size.0)
        {
            self.warnings.push(format!(
                "it was partitioned with sectors of 512 bytes but is stored in blocks of \
                 {sector_bytes}, so its guest will find no partitions; name it with emulate-512"
            ));
        }
        if self.usage.emulates && self.usage.shareable && self.usage.writes {
            self.warnings.push(
                "it is shareable with emulate-512, which is safe between disks of this polldisk \
                 only: other hosts and programs can lose what they write next to its writes"
                    .to_owned(),
            );
        }
    }
}

/// The tail of a file of this size, through a descriptor without O_DIRECT.
fn tail(file: &File, size: Bytes, whole: &OpenFile) -> Tail<OpenFile> {
    let start = size.0 / u64::from(PAGE_BYTES) * u64::from(PAGE_BYTES);
    Tail { start, below: OpenFile { raw_fd: file.as_raw_fd(), ..whole.clone() } }
}

/// The kind of a file that is not storage, in words.
fn kind_of(kind: FileType) -> &'static str {
    match () {
        () if kind.is_dir() => "directory",
        () if kind.is_fifo() => "FIFO",
        () if kind.is_socket() => "socket",
        () if kind.is_char_device() => "character device",
        () => "special file",
    }
}

fn is_direct(file: &File) -> bool {
    rustix::fs::fcntl_getfl(file).is_ok_and(|flags| flags.contains(OFlags::DIRECT))
}

fn is_invalid(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

/// The properties of storage, as opposed to what the guest sees.
struct Shape {
    size: u64,
    /// The unit of its I/O.
    sector_bytes: u32,
    physical_sector_bytes: u32,
    memory_alignment: u32,
    discard: Option<Discard>,
    is_device: bool,
}

impl Shape {
    /// What a guest may discard; `emulates`: it sees smaller sectors. Then the parts of blocks at the ends
    /// of a discard stay, which for a secure one is wrong.
    fn discard_in_sectors(&self, emulates: bool) -> Option<Discard> {
        self.discard.map(|discard| Discard { secure: discard.secure && !emulates, ..discard })
    }

    fn with_blocks_of(self, bytes: u32) -> Shape {
        let discard = self.discard.map(|discard| Discard {
            granularity_bytes: discard.granularity_bytes.max(bytes),
            ..discard
        });
        Shape { sector_bytes: bytes, discard, ..self }
    }
}

fn device_shape(file: &File, writes: bool) -> io::Result<Shape> {
    let device::Sizes { bytes, sector_bytes, physical_sector_bytes } = device::sizes(file)?;
    let direct = direct_io_alignment(file);
    Ok(Shape {
        size: bytes,
        sector_bytes,
        physical_sector_bytes,
        memory_alignment: direct.map_or(512, |direct| direct.memory),
        discard: writes.then(|| device::discard_limits(file, sector_bytes)).flatten(),
        is_device: true,
    })
}

/// A file has the sector size that O_DIRECT needs: what statx says, else what sysfs says about the disk
/// under its filesystem, else (tmpfs) 512.
fn file_shape(located: &Located, file: &File, writes: bool) -> io::Result<Shape> {
    let direct = direct_io_alignment(file);
    let sector_bytes = direct
        .map(|direct| direct.offset)
        .or_else(|| device::sysfs_value(located.metadata.dev(), "queue/logical_block_size"))
        .unwrap_or(512)
        .max(512);
    let shape = buffered_shape(located, file, writes)?.with_blocks_of(sector_bytes);
    Ok(Shape { memory_alignment: direct.map_or(sector_bytes, |direct| direct.memory), ..shape })
}

/// The page cache accepts sectors of any size and memory of any alignment.
fn buffered_shape(located: &Located, file: &File, writes: bool) -> io::Result<Shape> {
    let metadata = file.metadata()?;
    Ok(Shape {
        size: metadata.len(),
        sector_bytes: 512,
        physical_sector_bytes: device::sysfs_value(metadata.dev(), "queue/physical_block_size")
            .unwrap_or(512),
        memory_alignment: 1,
        discard: writes.then(|| file_discard(located, file, &metadata)).flatten(),
        is_device: false,
    })
}

/// The smallest block, of `sector_bytes` or a page, in which a file can be read with O_DIRECT; `None` if it
/// can't. Any other read error is left to the guest's own requests.
fn readable_block(file: &File, sector_bytes: u32) -> Option<u32> {
    [sector_bytes, PAGE_BYTES]
        .into_iter()
        .filter(|bytes| *bytes >= sector_bytes)
        .find(|bytes| !read_start(file, *bytes as usize).is_err_and(|error| is_invalid(&error)))
}

/// The first `len` bytes, or fewer if there are no more.
fn read_start(file: &File, len: usize) -> io::Result<Vec<u8>> {
    const ALIGNMENT: usize = PAGE_BYTES as usize;
    let mut memory = vec![0; len + ALIGNMENT];
    let aligned = memory.as_ptr().align_offset(ALIGNMENT);
    let read = file.read_at(&mut memory[aligned..aligned + len], 0)?;
    Ok(memory[aligned..aligned + read].to_vec())
}

/// The kind of filesystem that a file lies on.
fn filesystem(file: &File) -> Option<FsWord> {
    rustix::fs::fstatfs(file).ok().map(|stat| stat.f_type)
}

/// Spares the kernel from checking at each read whether to update the file's access time. Only the file's
/// owner and root may ask for this; for others nothing changes.
fn leave_access_time(file: &File) {
    if let Ok(flags) = rustix::fs::fcntl_getfl(file) {
        let _ = rustix::fs::fcntl_setfl(file, flags | OFlags::NOATIME);
    }
}

/// Maps the file. `None`: its data goes by system calls, which take half as long again. This includes all
/// processors for which the engine has no copy that survives a fault.
fn map(file: &File, size: u64, path: &Path, read_only: bool) -> Option<MappedFile> {
    if cfg!(not(target_arch = "x86_64")) {
        return None;
    }
    MappedFile::new(file, size, !read_only)
        .inspect_err(|error| tracing::info!(image = %path.display(), "not mapped: {error}"))
        .ok()
}

/// A file's blocks can be punched out if its filesystem supports holes.
fn file_discard(located: &Located, file: &File, metadata: &Metadata) -> Option<Discard> {
    let folder = located.true_path().parent().and_then(nameless_file);
    let nameless = folder.filter(|nameless| {
        nameless.metadata().is_ok_and(|nameless| nameless.dev() == metadata.dev())
    });
    let knows_holes = match nameless {
        Some(nameless) => punch(&nameless, 0),
        // Try the file itself, beyond its end: its data stays, its modification time may change.
        None => {
            metadata.len().checked_next_multiple_of(1 << 20).is_some_and(|end| punch(file, end))
        }
    };
    let block_bytes = u32::try_from(metadata.blksize()).unwrap_or(4096);
    knows_holes.then_some(Discard {
        granularity_bytes: block_bytes.max(512),
        alignment_bytes: 0,
        secure: false,
    })
}

/// A file that nobody sees and that is gone when it is closed, for trying out what its filesystem supports.
fn nameless_file(folder: &Path) -> Option<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).open(folder).ok()
}

fn punch(file: &File, offset: u64) -> bool {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, mode, offset, 4096).is_ok()
}

#[derive(Clone, Copy)]
struct DirectAlignment {
    offset: u32,
    memory: u32,
}

/// statx's STATX_DIOALIGN (Linux 6.1). `None` if the kernel or filesystem does not report it.
fn direct_io_alignment(file: &File) -> Option<DirectAlignment> {
    // An empty path names the descriptor itself.
    let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let told = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0
        && stat.stx_dio_offset_align != 0
        && stat.stx_dio_mem_align != 0;
    told.then_some(DirectAlignment {
        offset: stat.stx_dio_offset_align,
        memory: stat.stx_dio_mem_align,
    })
}

#[cfg(test)]
mod test {
    use super::*;
    use std::error::Error;

    fn open(path: &Path, read_only: bool) -> Result<OpenedRaw, BackingError> {
        let access = Access { read_only, ..Access::default() };
        RawImage::open(path, DiskOptions::default(), &access)
    }

    /// A file of this size, which is deleted with its folder but stays open.
    fn opened(len: u64, read_only: bool) -> OpenedRaw {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("disk.img");
        File::create(&path).unwrap().set_len(len).unwrap();
        open(&path, read_only).unwrap()
    }

    fn image_of(len: u64, read_only: bool) -> RawImage {
        opened(len, read_only).image
    }

    #[test]
    fn a_file_is_opened_with_its_whole_sectors() {
        let image = image_of(1_000_000, false);
        let geometry = image.geometry();
        let sector = u64::from(geometry.sector_bytes);
        assert!(geometry.sector_bytes.is_power_of_two());
        assert_eq!(geometry.size.0, 1_000_000 / sector * sector);
        assert!(geometry.physical_sector_bytes >= geometry.sector_bytes);
        assert!(image.memory_alignment().is_power_of_two());
    }

    #[test]
    fn reads_are_direct_and_leave_the_access_time() {
        let image = image_of(4096, true);
        let wanted = OFlags::DIRECT | OFlags::NOATIME;
        let flags = rustix::fs::fcntl_getfl(&*image.file.file).unwrap();
        assert_eq!(flags & wanted, wanted);
    }

    #[test]
    fn nothing_can_be_discarded_of_what_may_only_be_read() {
        let can_be = |read_only| opened(4096, read_only).discard.is_some();
        assert!(can_be(false), "its filesystem knows holes");
        assert!(!can_be(true));
    }

    #[test]
    fn parts_of_blocks_are_not_discarded_securely() {
        let discard = Discard { granularity_bytes: 4096, alignment_bytes: 0, secure: true };
        let shape = Shape {
            size: 1 << 20,
            sector_bytes: 4096,
            physical_sector_bytes: 4096,
            memory_alignment: 512,
            discard: Some(discard),
            is_device: true,
        };
        let secure = |emulates| shape.discard_in_sectors(emulates).map(|discard| discard.secure);
        assert_eq!([false, true].map(secure), [Some(true), Some(false)]);
    }

    #[test]
    fn what_cannot_be_opened_is_named_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let missing = open(&folder.path().join("none"), false).unwrap_err();
        assert!(missing.to_string().contains("does not exist"), "{missing}");
        assert!(missing.source().is_some());
        let directory = open(folder.path(), false).unwrap_err();
        assert!(directory.to_string().contains("directory"), "{directory}");
        let empty = folder.path().join("empty");
        File::create(&empty).unwrap();
        let empty = open(&empty, true).unwrap_err();
        assert!(empty.to_string().contains("no whole sector"), "{empty}");
        let null = open(Path::new("/dev/null"), true).unwrap_err();
        assert!(null.to_string().contains("raw:/dev/null"), "{null}");
    }
}

//! A raw image: a regular file or a block device, opened with O_DIRECT.
#![allow(unsafe_code)]

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use super::advice::{self, Advice};
use super::{BackingError, BlockLocks, Discard, Geometry, MappedFile};
use crate::units::{Bytes, SECTOR_BYTES};

/// An open raw image.
#[derive(Debug)]
pub struct RawImage {
    file: Arc<DeviceHandle>,
    is_device: bool,
    is_in_memory: bool,
    geometry: Geometry,
    memory_alignment: u16,
    read_only: bool,
    discard: Option<Discard>,
    emulation: Option<Arc<BlockLocks>>,
    mapping: Option<MappedFile>,
}

/// Largest block whose sectors are emulated: a page, which is what the guest's data comes in.
const EMULATED_BLOCK_MAX: u32 = 4096;

/// An open file or device, to be shared with a thread that discards.
#[derive(Debug)]
pub struct DeviceHandle(File);

/// Linux's BLKGETSIZE64 and the like (`include/uapi/linux/fs.h`).
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272u32 as libc::Ioctl;
const BLKSSZGET: libc::Ioctl = 0x1268;
const BLKPBSZGET: libc::Ioctl = 0x127b;
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKSECDISCARD: libc::Ioctl = 0x127d;

impl RawImage {
    /// Opens `path` with O_DIRECT, for reading only or for both.
    pub fn open(path: &Path, read_only: bool) -> Result<RawImage, BackingError> {
        let fail = |what: &str, mend: &str, source: Option<io::Error>| BackingError {
            target: format!("raw:{}", path.display()),
            what: what.to_owned(),
            mend: mend.to_owned(),
            source,
        };
        // Opening a FIFO would wait for its other end.
        if std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo()) {
            return Err(not_storage(&fail));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
            .open(path)
            .map_err(|error| {
                let Advice { what, mend } = advice::on_open(path, &error);
                fail(what, mend, Some(error))
            })?;
        leave_access_time(&file);
        let metadata =
            file.metadata().map_err(|error| fail("can't be examined", "check it", Some(error)))?;
        let kind = metadata.file_type();
        let shape = if kind.is_block_device() {
            device_shape(&file)
                .map_err(|error| fail("its sizes can't be read", "check the device", Some(error)))?
        } else if kind.is_file() {
            file_shape(&file, metadata.dev(), metadata.len())
        } else {
            return Err(not_storage(&fail));
        };
        // A tail shorter than a sector can't be reached by O_DIRECT, nor shown to a guest.
        let sector = u64::from(shape.sector_bytes);
        let size = Bytes(shape.size / sector * sector);
        if size.0 == 0 {
            let Advice { what, mend } = advice::empty(kind.is_block_device());
            return Err(fail(what, mend, None));
        }
        let is_in_memory = kind.is_file() && is_tmpfs(&file);
        Ok(RawImage {
            mapping: is_in_memory.then(|| map(&file, &metadata, path, read_only)).flatten(),
            geometry: Geometry {
                size,
                sector_bytes: shape.sector_bytes,
                physical_sector_bytes: shape.physical_sector_bytes.max(shape.sector_bytes),
            },
            // Beyond a page no page is aligned enough; the kernel asks for no such thing.
            memory_alignment: shape
                .memory_alignment
                .clamp(1, 4096)
                .next_power_of_two()
                .try_into()
                .unwrap_or(4096),
            read_only,
            discard: shape.discard.filter(|_| !read_only),
            emulation: None,
            is_device: kind.is_block_device(),
            is_in_memory,
            file: Arc::new(DeviceHandle(file)),
        })
    }

    /// Shows 512-byte sectors to the guest whatever the storage's blocks are (`emulate-512`). Where
    /// they are of 512 bytes, nothing changes.
    pub fn emulating_512(mut self, path: &Path) -> Result<RawImage, BackingError> {
        let block_bytes = self.geometry.sector_bytes;
        if block_bytes > EMULATED_BLOCK_MAX {
            return Err(BackingError {
                target: format!("raw,emulate-512:{}", path.display()),
                what: format!("its blocks have {block_bytes} bytes, which is more than a page"),
                mend: "leave emulate-512 out".to_owned(),
                source: None,
            });
        }
        if u64::from(block_bytes) > SECTOR_BYTES {
            self.emulation = Some(BlockLocks::new(block_bytes));
            self.mapping = None;
            self.geometry.sector_bytes = 512;
            // The parts of blocks at the ends of a discard stay, which for a secure one is wrong.
            self.discard = self.discard.map(|discard| Discard { secure: false, ..discard });
        }
        Ok(self)
    }

    /// The storage's blocks, where its guest sees smaller sectors.
    pub fn emulation(&self) -> Option<&Arc<BlockLocks>> {
        self.emulation.as_ref()
    }

    /// Its shape.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// What buffer addresses must be a multiple of for O_DIRECT: a power of two.
    pub fn memory_alignment(&self) -> u16 {
        self.memory_alignment
    }

    /// Whether it was opened without write access.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// What its guest may discard; `None` where nothing can be, or it is read-only.
    pub fn discard(&self) -> Option<Discard> {
        self.discard
    }

    /// Whether it is a file of tmpfs, which is read and written without any device. Blocks that are
    /// emulated are not counted in.
    pub fn is_in_memory(&self) -> bool {
        self.is_in_memory && self.emulation.is_none()
    }

    /// Its mapping, where it is in memory and could be mapped.
    #[inline]
    pub fn mapping(&self) -> Option<&MappedFile> {
        self.mapping.as_ref()
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.is_device
    }

    /// The open device, for a thread that discards.
    pub fn device_handle(&self) -> Arc<DeviceHandle> {
        Arc::clone(&self.file)
    }

    /// The descriptor, for the engine.
    pub fn raw_fd(&self) -> RawFd {
        self.file.0.as_raw_fd()
    }
}

impl DeviceHandle {
    /// Discards bytes of a block device; `secure`: beyond recovery. May take long.
    pub fn discard(&self, offset: u64, len: u64, secure: bool) -> io::Result<()> {
        let request = if secure { BLKSECDISCARD } else { BLKDISCARD };
        let range = [offset, len];
        // SAFETY: both ioctls read two u64, start and length.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), request, range.as_ptr()) })
    }
}

type Fail<'a> = &'a dyn Fn(&str, &str, Option<io::Error>) -> BackingError;

fn not_storage(fail: Fail<'_>) -> BackingError {
    let Advice { what, mend } = advice::NOT_STORAGE;
    fail(what, mend, None)
}

struct Shape {
    size: u64,
    sector_bytes: u32,
    physical_sector_bytes: u32,
    memory_alignment: u32,
    discard: Option<Discard>,
}

fn device_shape(file: &File) -> io::Result<Shape> {
    let mut size = 0u64;
    let mut sector_bytes: libc::c_int = 0;
    let mut physical_sector_bytes: libc::c_uint = 0;
    // SAFETY: each ioctl writes one value of the type passed (linux/fs.h).
    unsafe {
        check(libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &mut size))?;
        check(libc::ioctl(file.as_raw_fd(), BLKSSZGET, &mut sector_bytes))?;
        check(libc::ioctl(file.as_raw_fd(), BLKPBSZGET, &mut physical_sector_bytes))?;
    }
    let sector_bytes = u32::try_from(sector_bytes).unwrap_or(512).max(512);
    let direct = direct_io_alignment(file);
    Ok(Shape {
        size,
        sector_bytes,
        physical_sector_bytes,
        memory_alignment: direct.map_or(512, |direct| direct.memory),
        discard: device_discard(file, sector_bytes),
    })
}

fn is_tmpfs(file: &File) -> bool {
    // SAFETY: statfs is plain integers, for which zeroes are valid; the call fills it.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is writable.
    unsafe { libc::fstatfs(file.as_raw_fd(), &mut stat) == 0 && stat.f_type == libc::TMPFS_MAGIC }
}

/// Spares the kernel from checking with each read whether the file's access time is due. It lets the
/// file's owner and root ask for that; for others all stays as it is.
fn leave_access_time(file: &File) {
    let flags = libc::O_DIRECT | libc::O_NOATIME;
    // SAFETY: no pointers. These replace the flags that can be changed at all, of which the file was
    // opened with O_DIRECT.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) };
}

/// `None`: its data goes by system calls, which take half as long again. So it does where engines have
/// no copy that survives faults of a mapping.
fn map(file: &File, metadata: &Metadata, path: &Path, read_only: bool) -> Option<MappedFile> {
    if cfg!(not(target_arch = "x86_64")) {
        return None;
    }
    MappedFile::new(file, metadata.len(), !read_only)
        .inspect_err(|error| tracing::info!(image = %path.display(), "is not mapped: {error}"))
        .ok()
}

/// What a device says of discards in its queue's limits.
fn device_discard(file: &File, sector_bytes: u32) -> Option<Discard> {
    let dev = file.metadata().ok()?.rdev();
    if sysfs_value::<u64>(dev, "queue/discard_max_bytes").unwrap_or(0) == 0 {
        return None;
    }
    let granularity = sysfs_value(dev, "queue/discard_granularity").unwrap_or(0);
    // Discarding nothing succeeds where secure discard is there, and else says EOPNOTSUPP.
    let nothing = [0u64, 0];
    // SAFETY: the ioctl reads two u64, start and length.
    let secure = unsafe { libc::ioctl(file.as_raw_fd(), BLKSECDISCARD, nothing.as_ptr()) } == 0;
    Some(Discard {
        granularity_bytes: u32::max(granularity, sector_bytes),
        alignment_bytes: sysfs_value(dev, "discard_alignment").unwrap_or(0),
        secure,
    })
}

/// A file takes the sector size that O_DIRECT on it asks for: what statx says, else what sysfs says
/// of the disk that its filesystem lies on, else (tmpfs) 512.
fn file_shape(file: &File, dev: u64, size: u64) -> Shape {
    let direct = direct_io_alignment(file);
    let sector_bytes = direct
        .map(|direct| direct.offset)
        .or_else(|| sysfs_value(dev, "queue/logical_block_size"))
        .unwrap_or(512)
        .max(512);
    Shape {
        size,
        sector_bytes,
        physical_sector_bytes: sysfs_value(dev, "queue/physical_block_size")
            .unwrap_or(sector_bytes),
        memory_alignment: direct.map_or(sector_bytes, |direct| direct.memory),
        discard: file_discard(file, sector_bytes),
    }
}

/// A file's blocks can be punched out where its filesystem knows holes, which is found by punching
/// beyond its end, where nothing is.
fn file_discard(file: &File, sector_bytes: u32) -> Option<Discard> {
    let metadata = file.metadata().ok()?;
    let beyond = libc::off_t::try_from(metadata.len().checked_next_multiple_of(1 << 20)?).ok()?;
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: no pointers.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, beyond, 4096) }).ok()?;
    let block_bytes = u32::try_from(metadata.blksize()).unwrap_or(4096);
    Some(Discard {
        granularity_bytes: block_bytes.max(sector_bytes),
        alignment_bytes: 0,
        secure: false,
    })
}

#[derive(Clone, Copy)]
struct DirectAlignment {
    offset: u32,
    memory: u32,
}

/// statx's STATX_DIOALIGN (Linux 6.1). `None` where the kernel or filesystem does not tell.
fn direct_io_alignment(file: &File) -> Option<DirectAlignment> {
    // SAFETY: statx is plain integers, for which zeroes are valid; the call fills it.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path with AT_EMPTY_PATH names the descriptor itself; `stat` is writable.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &mut stat,
        )
    };
    let told = result == 0
        && stat.stx_mask & libc::STATX_DIOALIGN != 0
        && stat.stx_dio_offset_align != 0
        && stat.stx_dio_mem_align != 0;
    told.then_some(DirectAlignment {
        offset: stat.stx_dio_offset_align,
        memory: stat.stx_dio_mem_align,
    })
}

/// A value that sysfs has for the disk `dev` (or, for a partition, for the whole disk).
fn sysfs_value<T: FromStr>(dev: u64, name: &str) -> Option<T> {
    let (major, minor) = (libc::major(dev), libc::minor(dev));
    let device = format!("/sys/dev/block/{major}:{minor}");
    [format!("{device}/{name}"), format!("{device}/../{name}")]
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok())
        .and_then(|text| text.trim().parse().ok())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::error::Error;

    /// A file of so many bytes, which is gone with its folder but stays open.
    fn image_of(len: u64, read_only: bool) -> RawImage {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("disk.img");
        File::create(&path).unwrap().set_len(len).unwrap();
        RawImage::open(&path, read_only).unwrap()
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
        let wanted = libc::O_DIRECT | libc::O_NOATIME;
        // SAFETY: no pointers.
        let flags = unsafe { libc::fcntl(image.raw_fd(), libc::F_GETFL) };
        assert_eq!(flags & wanted, wanted);
    }

    #[test]
    fn what_cannot_be_opened_is_named_with_the_mend() {
        let folder = tempfile::tempdir().unwrap();
        let missing = RawImage::open(&folder.path().join("none"), false).unwrap_err();
        assert!(missing.to_string().contains("does not exist"), "{missing}");
        assert!(missing.source().is_some());
        let directory = RawImage::open(folder.path(), false).unwrap_err();
        assert!(directory.to_string().contains("directory"), "{directory}");
        let empty = folder.path().join("empty");
        File::create(&empty).unwrap();
        let empty = RawImage::open(&empty, true).unwrap_err();
        assert!(empty.to_string().contains("no whole sector"), "{empty}");
        let null = RawImage::open(Path::new("/dev/null"), true).unwrap_err();
        assert!(null.to_string().contains("raw:/dev/null"), "{null}");
    }
}

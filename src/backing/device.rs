//! What Linux tells about block devices, by ioctl and in sysfs.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::str::FromStr;

use super::Discard;

/// Linux's BLKGETSIZE64 and the like (`include/uapi/linux/fs.h`).
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272u32 as libc::Ioctl;
const BLKSSZGET: libc::Ioctl = 0x1268;
const BLKPBSZGET: libc::Ioctl = 0x127b;
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKSECDISCARD: libc::Ioctl = 0x127d;
/// `include/uapi/linux/loop.h`.
const LOOP_GET_STATUS64: libc::Ioctl = 0x4c05;
const LO_FLAGS_READ_ONLY: u32 = 1;

/// Bytes and sector sizes of a device.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Its size.
    pub bytes: u64,
    /// Its logical block size.
    pub sector_bytes: u32,
    /// Its physical block size.
    pub physical_sector_bytes: u32,
}

/// Asks an open device for its sizes.
pub fn sizes(device: &File) -> io::Result<Sizes> {
    let mut bytes = 0u64;
    let mut sector_bytes: libc::c_int = 0;
    let mut physical_sector_bytes: libc::c_uint = 0;
    // SAFETY: each ioctl writes one value of the type passed (linux/fs.h).
    unsafe {
        check(libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &mut bytes))?;
        check(libc::ioctl(device.as_raw_fd(), BLKSSZGET, &mut sector_bytes))?;
        check(libc::ioctl(device.as_raw_fd(), BLKPBSZGET, &mut physical_sector_bytes))?;
    }
    let sector_bytes = u32::try_from(sector_bytes).unwrap_or(512).max(512);
    Ok(Sizes { bytes, sector_bytes, physical_sector_bytes })
}

/// Whether the device `number` refuses writes (what BLKROGET tells about an open one).
pub fn is_read_only(number: u64) -> bool {
    sysfs_value::<u8>(number, "ro") == Some(1)
}

/// The parts of a discard that a device handles in one request each.
///
/// The kernel submits all requests of one call together, and those of a large discard can take all of the
/// device's tags. So each call asks for a single request.
#[derive(Clone, Copy, Debug)]
pub struct DiscardPieces {
    /// Largest number of bytes; 0: no limit.
    most: u64,
    /// Pieces begin at a multiple of this if possible.
    granularity: u64,
}

impl DiscardPieces {
    /// The pieces for the device with this number.
    pub fn of(number: u64) -> DiscardPieces {
        let limit = |name| sysfs_value(number, name).unwrap_or(0);
        DiscardPieces {
            most: limit("queue/discard_max_bytes"),
            granularity: limit("queue/discard_granularity").max(1),
        }
    }

    /// Splits a range into offsets and lengths.
    fn split(self, offset: u64, len: u64) -> impl Iterator<Item = [u64; 2]> {
        let DiscardPieces { most, granularity } = self;
        let (mut at, end) = (offset, offset + len);
        std::iter::from_fn(move || {
            let next = if most == 0 || end - at <= most {
                end
            } else {
                let whole = (at + most) / granularity * granularity;
                if whole > at { whole } else { at + most }
            };
            let piece = [at, next - at];
            at = next;
            (piece[1] > 0).then_some(piece)
        })
    }
}

/// Discards bytes; `secure`: beyond recovery. May take long.
pub fn discard(
    device: &File,
    pieces: DiscardPieces,
    offset: u64,
    len: u64,
    secure: bool,
) -> io::Result<()> {
    let request = if secure { BLKSECDISCARD } else { BLKDISCARD };
    for range in pieces.split(offset, len) {
        // SAFETY: both ioctls read two u64, start and length.
        check(unsafe { libc::ioctl(device.as_raw_fd(), request, range.as_ptr()) })?;
    }
    Ok(())
}

/// The discard limits of the queue of a device that is open for writing.
pub fn discard_limits(device: &File, sector_bytes: u32) -> Option<Discard> {
    let number = device.metadata().ok()?.rdev();
    if sysfs_value::<u64>(number, "queue/discard_max_bytes").unwrap_or(0) == 0 {
        return None;
    }
    let granularity = sysfs_value(number, "queue/discard_granularity").unwrap_or(0);
    Some(Discard {
        granularity_bytes: u32::max(granularity, sector_bytes),
        alignment_bytes: sysfs_value(number, "discard_alignment").unwrap_or(0),
        secure: can_erase(device),
    })
}

/// Whether a device that is open for writing can erase beyond recovery.
///
/// Linux has no way to ask. Since 5.19 the ioctl first checks whether the device can, and then whether the
/// range is made of whole sectors (`blk_ioctl_secure_erase`, `block/ioctl.c`). So the error for an invalid
/// range shows which check failed, and nothing is touched. An empty range would drop the device's whole
/// page cache. Before 5.19 the order of the checks was not the same.
fn can_erase(device: &File) -> bool {
    let odd = [1u64, 0];
    // SAFETY: the ioctl reads two u64, start and length.
    let result = check(unsafe { libc::ioctl(device.as_raw_fd(), BLKSECDISCARD, odd.as_ptr()) });
    kernel_release().is_some_and(|release| erases(release, result))
}

fn erases(release: (u32, u32), answer: io::Result<()>) -> bool {
    let refused_range = answer.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL));
    release >= (5, 19) && refused_range
}

fn kernel_release() -> Option<(u32, u32)> {
    parse_release(&std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?)
}

fn parse_release(text: &str) -> Option<(u32, u32)> {
    let mut numbers =
        text.trim().split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// What a loop device is set up on.
#[derive(Clone, Copy, Debug)]
pub struct LoopStatus {
    /// The filesystem and inode of the file.
    pub file: (u64, u64),
    /// The device's number, if it is a block device.
    pub device: Option<u64>,
    /// The loop device refuses writes.
    pub read_only: bool,
}

/// Linux's `struct loop_info64`.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}
const _: () = assert!(size_of::<LoopInfo64>() == 232);
const _: () = assert!(std::mem::offset_of!(LoopInfo64, flags) == 52);

/// Asks an open loop device what it is set up on.
pub fn loop_status(device: &File) -> io::Result<LoopStatus> {
    // SAFETY: the structure is plain integers, for which zeroes are valid.
    let mut info: LoopInfo64 = unsafe { std::mem::zeroed() };
    // SAFETY: the ioctl fills one `struct loop_info64`.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &mut info) })?;
    Ok(LoopStatus {
        file: (info.device, info.inode),
        device: (info.rdevice != 0).then_some(info.rdevice),
        read_only: info.flags & LO_FLAGS_READ_ONLY != 0,
    })
}

/// The folder of a device in sysfs.
pub fn sysfs(number: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number)))
}

/// The device node that the kernel makes.
pub fn node(number: u64) -> Option<PathBuf> {
    let uevent = std::fs::read_to_string(sysfs(number).join("uevent")).ok()?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(PathBuf::from("/dev").join(name))
}

/// A value that sysfs has for a device (or, for a partition, for the whole disk).
pub fn sysfs_value<T: FromStr>(number: u64, name: &str) -> Option<T> {
    let device = sysfs(number);
    [device.join(name), device.join("..").join(name)]
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok())
        .and_then(|text| text.trim().parse().ok())
}

/// The number in the text `7:0` of sysfs or `/proc/self/mountinfo`.
pub fn parse_number(text: &str) -> Option<u64> {
    let (major, minor) = text.trim().split_once(':')?;
    Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn secure_erase_is_read_off_the_refusal_of_an_odd_range() {
        let refused = |errno| Err(io::Error::from_raw_os_error(errno));
        assert!(erases((5, 19), refused(libc::EINVAL)));
        assert!(erases((6, 1), refused(libc::EINVAL)));
        assert!(!erases((5, 18), refused(libc::EINVAL)), "every device that discards answers so");
        assert!(!erases((6, 1), refused(libc::EOPNOTSUPP)));
        assert!(!erases((6, 1), refused(libc::EBADF)));
        assert!(!erases((6, 1), Ok(())));
    }

    #[test]
    fn a_discard_comes_in_pieces_that_the_device_does_at_once() {
        let all = |offset, len, most, granularity| -> Vec<[u64; 2]> {
            DiscardPieces { most, granularity }.split(offset, len).collect()
        };
        assert_eq!(all(512, 4096, 0, 512), [[512, 4096]]);
        assert_eq!(all(512, 4096, 4096, 512), [[512, 4096]]);
        assert_eq!(all(0, 10, 4, 1), [[0, 4], [4, 4], [8, 2]]);
        assert_eq!(all(512, 8192, 4096, 4096), [[512, 3584], [4096, 4096], [8192, 512]]);
        assert_eq!(all(1, 20, 4, 100), [[1, 4], [5, 4], [9, 4], [13, 4], [17, 4]]);
        assert_eq!(all(5, 0, 4, 1), [[0; 2]; 0]);
    }

    #[test]
    fn releases_of_kernels_are_read() {
        assert_eq!(parse_release("6.18.44-fc-v669\n"), Some((6, 18)));
        assert_eq!(parse_release("5.19\n"), Some((5, 19)));
        assert_eq!(parse_release("5.10-rc1"), Some((5, 10)));
        assert_eq!(parse_release("linux"), None);
        assert!(kernel_release().is_some());
    }

    #[test]
    fn numbers_of_devices_are_read() {
        assert_eq!(parse_number("7:1\n"), Some(libc::makedev(7, 1)));
        assert_eq!(parse_number("259:70000"), Some(libc::makedev(259, 70000)));
        assert_eq!(parse_number("7"), None);
    }
}

//! Who else on this host uses storage, for error messages, and whether all of them only read.
//!
//! It is read from `/proc` and `/sys` after an open was refused. What can't be read is left out.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::device;
use super::mounts::{self, unescaped};
use super::storage::{Loop, Storage};

/// One user of storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A filesystem on it.
    Mount {
        /// The mount point.
        point: PathBuf,
        /// It does not write to the storage.
        read_only: bool,
    },
    /// Swap space.
    Swap(PathBuf),
    /// A device built on it: LVM, encryption, RAID, bcache.
    Device(String),
    /// A loop device over it.
    Loop {
        /// Its path.
        device: String,
        /// It refuses writes.
        read_only: bool,
    },
    /// A program that has it open.
    Process {
        /// Its number.
        pid: u32,
        /// Its name.
        name: String,
    },
}

impl Holder {
    /// Whether it writes nothing.
    pub fn only_reads(&self) -> bool {
        matches!(self, Holder::Mount { read_only: true, .. } | Holder::Loop { read_only: true, .. })
    }

    /// How to free the storage.
    pub fn remedy(&self) -> String {
        match self {
            Holder::Mount { point, .. } => {
                format!("unmount it (umount {})", point.display())
            }
            Holder::Swap(path) => format!("disable it (swapoff {})", path.display()),
            Holder::Device(name) => format!("name {name} instead, or remove that device"),
            Holder::Loop { device, .. } => format!("detach the loop device (losetup -d {device})"),
            Holder::Process { .. } => "end that program, or detach the disk from it".to_owned(),
        }
    }
}

impl fmt::Display for Holder {
    /// Continues a sentence that begins with "it".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::Mount { point, .. } => write!(f, "is mounted at {}", point.display()),
            Holder::Swap(_) => f.write_str("is swap space"),
            Holder::Device(name) => write!(f, "is a part of {name}"),
            Holder::Loop { device, read_only: true } => write!(f, "backs {device}"),
            Holder::Loop { device, .. } => write!(f, "backs {device}, which may write to it"),
            Holder::Process { pid, name } => write!(f, "is in use by {name} (process {pid})"),
        }
    }
}

/// The users of a device, its partitions, or the disk that it is a partition of.
pub fn of_device(device: Storage) -> Vec<Holder> {
    let Storage::Device { number, disk } = device else { return Vec::new() };
    let numbers = related(number, disk);
    let is_one = |other: u64| numbers.contains(&other);
    let mut found = mounts(is_one);
    found.extend(
        swaps()
            .into_iter()
            .filter(|(_, metadata)| is_one(metadata.rdev()))
            .map(|(path, _)| Holder::Swap(path)),
    );
    found.extend(numbers.iter().flat_map(|number| made_of(*number)));
    if found.is_empty() {
        found = processes(
            |link, _| link.starts_with("/dev"),
            |metadata| metadata.file_type().is_block_device() && is_one(metadata.rdev()),
        );
    }
    found
}

/// The programs that have a file locked, or if there are none, those that have it open.
pub fn of_file(storage: Storage) -> Vec<Holder> {
    let Storage::File { filesystem, inode } = storage else { return Vec::new() };
    let is_it = |metadata: &Metadata| (metadata.dev(), metadata.ino()) == (filesystem, inode);
    let (lock, open) = (format!(":{inode} "), format!("ino:\t{inode}\n"));
    let locks = |_: &Path, info: &str| {
        info.lines().any(|line| line.starts_with("lock:") && line.contains(&lock))
    };
    match processes(locks, is_it) {
        found if found.is_empty() => processes(|_, info| info.contains(&open), is_it),
        found => found,
    }
}

/// The file as swap space, if it is used so.
pub fn swap_in_file(storage: Storage) -> Option<Holder> {
    let (path, _) =
        swaps().into_iter().find(|(_, metadata)| Storage::of(metadata) == Some(storage))?;
    Some(Holder::Swap(path))
}

/// The loop devices over storage, except those that overlap one in `own`.
pub fn loops_over(storage: Storage, own: &[Storage]) -> Vec<Holder> {
    let is_own = |device: &Loop| {
        let device = Storage::device(device.number);
        own.iter().any(|own| own.overlaps(device))
    };
    let loops = Loop::all().into_iter();
    let loops = loops.filter(|device| device.is_on() == Some(storage) && !is_own(device));
    let holder = |device: Loop| Holder::Loop {
        device: format!("/dev/{}", device.name),
        read_only: device.status.read_only,
    };
    loops.map(holder).collect()
}

/// A device, and the partitions or the disk that share bytes with it.
fn related(number: u64, disk: u64) -> BTreeSet<u64> {
    let mut numbers = BTreeSet::from([number, disk]);
    if number == disk {
        let parts = fs::read_dir(device::sysfs(disk)).into_iter().flatten().flatten();
        let parts = parts.filter(|part| part.path().join("partition").exists());
        numbers.extend(parts.filter_map(|part| {
            device::parse_number(&fs::read_to_string(part.path().join("dev")).ok()?)
        }));
    }
    numbers
}

/// Devices that are built on a device.
fn made_of(number: u64) -> Vec<Holder> {
    let folders = fs::read_dir(device::sysfs(number).join("holders"));
    let made = folders.into_iter().flatten().flatten().map(|holder| {
        let name = fs::read_to_string(holder.path().join("dm/name"));
        Holder::Device(match name {
            Ok(name) => format!("/dev/mapper/{}", name.trim()),
            Err(_) => format!("/dev/{}", holder.file_name().display()),
        })
    });
    made.chain(loops_over(Storage::device(number), &[])).collect()
}

/// Where devices are mounted in this mount namespace.
fn mounts(is_one: impl Fn(u64) -> bool) -> Vec<Holder> {
    let table = mounts::table();
    table.split(|byte| *byte == b'\n').filter_map(|line| mount(line, &is_one)).collect()
}

/// One line of `/proc/self/mountinfo`. A filesystem over several devices (btrfs) has a number of its own,
/// and its source names one of them.
fn mount(line: &[u8], is_one: impl Fn(u64) -> bool) -> Option<Holder> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let dash = fields.iter().position(|field| *field == b"-")?;
    let number = device::parse_number(std::str::from_utf8(fields.get(2)?).ok()?)?;
    let source = unescaped(fields.get(dash + 2)?);
    let is_source = || {
        source.starts_with("/dev")
            && fs::metadata(&source).is_ok_and(|source| is_one(source.rdev()) && source.rdev() != 0)
    };
    if !is_one(number) && !is_source() {
        return None;
    }
    // The filesystem's own options count: a read-only mount may have a writable one elsewhere.
    let read_only = fields.get(dash + 3)?.split(|byte| *byte == b',').any(|word| word == b"ro");
    Some(Holder::Mount { point: unescaped(fields.get(4)?), read_only })
}

/// The paths of `/proc/swaps` that lead somewhere.
fn swaps() -> Vec<(PathBuf, Metadata)> {
    let table = fs::read("/proc/swaps").unwrap_or_default();
    let lines = table.split(|byte| *byte == b'\n').skip(1);
    let paths = lines.filter_map(|line| line.split(|byte| byte.is_ascii_whitespace()).next());
    let paths = paths.filter(|path| path.starts_with(b"/")).map(unescaped);
    paths.filter_map(|path| fs::metadata(&path).ok().map(|metadata| (path, metadata))).collect()
}

/// Other programs that have a file open which matches both tests. `looks_like` gets the descriptor's link
/// and what `/proc` says about it. Only if that matches, storage is asked for the metadata for `is_it`,
/// because storage of unrelated files may hang.
fn processes(
    looks_like: impl Fn(&Path, &str) -> bool,
    is_it: impl Fn(&Metadata) -> bool,
) -> Vec<Holder> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let others = pids.filter(|pid| *pid != std::process::id());
    others
        .filter_map(|pid| {
            let folder = PathBuf::from(format!("/proc/{pid}"));
            let mut descriptors = fs::read_dir(folder.join("fd")).ok()?.flatten();
            descriptors.find(|descriptor| {
                let info = fs::read_to_string(folder.join("fdinfo").join(descriptor.file_name()));
                let link = fs::read_link(descriptor.path());
                link.is_ok_and(|link| looks_like(&link, &info.unwrap_or_default()))
                    && fs::metadata(descriptor.path()).is_ok_and(|metadata| is_it(&metadata))
            })?;
            let name = fs::read_to_string(folder.join("comm")).unwrap_or_default();
            Some(Holder::Process { pid, name: name.trim().to_owned() })
        })
        .collect()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn mounts_are_read_with_blanks_in_their_names() {
        let number = libc::makedev(259, 4);
        let line =
            b"36 35 259:4 / /mnt/a\\040b\\134c rw,noatime shared:1 - ext4 /dev/x ro,data=ordered";
        let found = mount(line, |other| other == number);
        let point = PathBuf::from("/mnt/a b\\c");
        assert_eq!(found, Some(Holder::Mount { point, read_only: true }));
        assert_eq!(mount(line, |other| other == number + 1), None);
        let line = b"36 35 259:4 / /mnt ro,noatime - ext4 /dev/x rw";
        let point = PathBuf::from("/mnt");
        let found = mount(line, |other| other == number);
        assert_eq!(found, Some(Holder::Mount { point, read_only: false }), "the filesystem counts");
        for bad in
            [&b""[..], b"36 35", b"36 35 259:4 / /mnt rw -", b"36 35 x / /mnt rw - ext4 a rw"]
        {
            assert_eq!(mount(bad, |_| true), None);
        }
    }
}

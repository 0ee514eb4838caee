//! Which storage a path leads to, by whatever name: symbolic and hard links, bind mounts, duplicate device
//! nodes, partitions, and loop devices over files.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::device::{self, LoopStatus};
use crate::limits::LOOPS_ON_LOOPS_MAX;

/// The identity of a file or block device in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// A regular file.
    File {
        /// Its filesystem (`st_dev`).
        filesystem: u64,
        /// Its inode number.
        inode: u64,
    },
    /// A block device.
    Device {
        /// Its number (`st_rdev`).
        number: u64,
        /// The number of the whole disk: its own, unless it is a partition.
        disk: u64,
    },
}

impl Storage {
    /// The device with this number.
    pub fn device(number: u64) -> Storage {
        let folder = device::sysfs(number);
        let disk = folder.join("partition").exists().then(|| {
            let disk = std::fs::read_to_string(folder.join("../dev")).ok()?;
            device::parse_number(&disk)
        });
        Storage::Device { number, disk: disk.flatten().unwrap_or(number) }
    }

    /// The storage that a file with this metadata is, if any.
    pub fn of(metadata: &Metadata) -> Option<Storage> {
        let kind = metadata.file_type();
        if kind.is_block_device() {
            Some(Storage::device(metadata.rdev()))
        } else {
            let (filesystem, inode) = (metadata.dev(), metadata.ino());
            kind.is_file().then_some(Storage::File { filesystem, inode })
        }
    }

    /// Whether data written to one can be read from the other: they are the same, or one is a partition of
    /// the other.
    pub fn overlaps(self, other: Storage) -> bool {
        match (self, other) {
            (
                Storage::Device { number, disk },
                Storage::Device { number: other_number, disk: other_disk },
            ) => {
                let is_whole = number == disk || other_number == other_disk;
                number == other_number || disk == other_disk && is_whole
            }
            _ => self == other,
        }
    }

    /// Whether they are different partitions of one disk.
    pub fn is_beside(self, other: Storage) -> bool {
        match (self, other) {
            (Storage::Device { disk, .. }, Storage::Device { disk: other_disk, .. }) => {
                disk == other_disk && !self.overlaps(other)
            }
            _ => false,
        }
    }
}

/// What a path led to when it was looked up, whatever the path leads to later.
#[derive(Debug)]
pub struct Located {
    handle: File,
    /// Its metadata at that time.
    pub metadata: Metadata,
}

impl Located {
    /// Follows a path without opening what it leads to.
    pub fn find(path: &Path) -> io::Result<Located> {
        let handle = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
        let metadata = handle.metadata()?;
        Ok(Located { handle, metadata })
    }

    /// Opens it.
    pub fn open(&self, options: &OpenOptions) -> io::Result<File> {
        options.open(self.by_descriptor())
    }

    /// A descriptor of it that allows neither reading nor writing (O_PATH).
    pub fn handle(&self) -> &File {
        &self.handle
    }

    /// Its path without symbolic links; empty if that can't be read.
    pub fn true_path(&self) -> PathBuf {
        std::fs::read_link(self.by_descriptor()).unwrap_or_default()
    }

    fn by_descriptor(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.handle.as_raw_fd()))
    }

    /// The storage it is and, for a loop device, what that is made of, all the way down.
    pub fn storages(&self) -> Vec<Storage> {
        let mut found = Vec::from_iter(Storage::of(&self.metadata));
        while let Some(Storage::Device { disk, .. }) = found.last()
            && found.len() <= LOOPS_ON_LOOPS_MAX
            && let Some(below) = Loop::of_device(*disk).and_then(|device| device.is_on())
        {
            found.push(below);
        }
        found
    }
}

/// A loop device that is set up.
#[derive(Clone, Debug)]
pub struct Loop {
    /// Its name: `loop0`.
    pub name: String,
    /// Its number.
    pub number: u64,
    /// What the kernel says about it.
    pub status: LoopStatus,
}

impl Loop {
    /// All loop devices of this host that are set up.
    pub fn all() -> Vec<Loop> {
        let devices = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
        devices.filter_map(|entry| Loop::of_name(entry.file_name().to_str()?)).collect()
    }

    /// The device with this number, if it is a loop device.
    pub fn of_device(number: u64) -> Option<Loop> {
        let folder = std::fs::read_link(device::sysfs(number)).ok()?;
        Loop::of_name(folder.file_name()?.to_str()?)
    }

    fn of_name(name: &str) -> Option<Loop> {
        let folder = Path::new("/sys/block").join(name);
        folder.join("loop").exists().then_some(())?;
        let number = device::parse_number(&std::fs::read_to_string(folder.join("dev")).ok()?)?;
        let status = device::loop_status(&File::open(Path::new("/dev").join(name)).ok()?).ok()?;
        Some(Loop { name: name.to_owned(), number, status })
    }

    /// The file or device under it.
    pub fn is_on(&self) -> Option<Storage> {
        let LoopStatus { file: (filesystem, inode), device, .. } = self.status;
        Some(match device {
            Some(number) => Storage::device(number),
            None => Storage::File { filesystem, inode },
        })
    }

    /// The file under it, opened for reading; `None` if that file no longer has the same name, or is not
    /// visible in this mount namespace.
    pub fn open_file(&self) -> Option<File> {
        let name = Path::new("/sys/block").join(&self.name).join("loop/backing_file");
        let path = std::fs::read_to_string(name).ok()?;
        let located = Located::find(Path::new(path.trim_end_matches('\n'))).ok()?;
        (Storage::of(&located.metadata) == self.is_on()).then_some(())?;
        located.open(OpenOptions::new().read(true)).ok()
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_disk_overlaps_its_partitions_and_these_not_each_other() {
        let [whole, first, second] = [8, 9, 10].map(|number| Storage::Device { number, disk: 8 });
        let other = Storage::Device { number: 24, disk: 24 };
        let file = Storage::File { filesystem: 8, inode: 8 };
        for (one, two, overlap) in [
            (whole, whole, true),
            (whole, first, true),
            (first, first, true),
            (first, second, false),
            (whole, other, false),
            (whole, file, false),
            (file, file, true),
            (file, Storage::File { filesystem: 8, inode: 9 }, false),
            (file, Storage::File { filesystem: 9, inode: 8 }, false),
        ] {
            assert_eq!(one.overlaps(two), overlap, "{one:?} {two:?}");
            assert_eq!(two.overlaps(one), overlap, "{two:?} {one:?}");
        }
        assert!(first.is_beside(second) && !first.is_beside(whole) && !other.is_beside(whole));
    }

    #[test]
    fn a_file_is_the_same_by_any_of_its_names() {
        let folder = tempfile::tempdir().unwrap();
        let [file, hard, soft, other] =
            ["file", "hard", "soft", "other"].map(|name| folder.path().join(name));
        for path in [&file, &other] {
            File::create(path).unwrap();
        }
        std::fs::hard_link(&file, &hard).unwrap();
        std::os::unix::fs::symlink(&file, &soft).unwrap();
        let [file, hard, soft, other] =
            [file, hard, soft, other].map(|path| Located::find(&path).unwrap().storages());
        assert_eq!(file.len(), 1);
        assert_eq!(file, hard);
        assert_eq!(file, soft);
        assert_ne!(file, other);
    }
}

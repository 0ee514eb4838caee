//! What the kernel says about mounts (`/proc/self/mountinfo`, proc(5)), read without waiting for storage.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The table as it is now; empty if it can't be read.
pub fn table() -> Vec<u8> {
    fs::read("/proc/self/mountinfo").unwrap_or_default()
}

/// The mount point above `path`, found by name only, because looking the path up may hang.
pub fn point_of(path: &Path) -> PathBuf {
    point_in(&table(), path)
}

/// The longest mount point in a table that is above `path`.
fn point_in(table: &[u8], path: &Path) -> PathBuf {
    let points = table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(unescaped)
        .filter(|point| path.starts_with(point));
    points.max_by_key(|point| point.as_os_str().len()).unwrap_or_else(|| PathBuf::from("/"))
}

/// A path from `/proc`, which writes blanks and the like in octal: `\040`.
pub fn unescaped(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, after @ ..] = rest {
        let octal = after.get(..3).filter(|_| *first == b'\\');
        let octal = octal.and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(std::ffi::OsStr::from_bytes(&bytes))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_mount_is_found_by_its_name_alone() {
        let table = b"22 1 8:1 / / rw - ext4 /dev/a rw\n\
            30 22 0:5 / /dev rw - devtmpfs udev rw\n\
            31 22 0:50 / /srv/my\\040disks rw - nfs4 server:/x rw\n\
            32 22 0:51 / /srv rw - nfs4 server:/y rw\n";
        for (path, mount) in [
            ("/srv/my disks/a.img", "/srv/my disks"),
            ("/srv/my disk/a.img", "/srv"),
            ("/srvx/a.img", "/"),
            ("/dev/sda", "/dev"),
        ] {
            assert_eq!(point_in(table, Path::new(path)), Path::new(mount), "{path}");
        }
        assert_eq!(point_in(b"", Path::new("/a")), Path::new("/"));
    }

    #[test]
    fn names_are_read_as_the_kernel_writes_them() {
        for (written, name) in [("/a\\040b\\134", "/a b\\"), ("/a\\04", "/a\\04"), ("/a\\", "/a\\")]
        {
            assert_eq!(unescaped(written.as_bytes()), Path::new(name));
        }
    }
}

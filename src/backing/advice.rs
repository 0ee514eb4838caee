//! What is wrong with storage that can't be used, and what an admin can do about it. Each of the system's
//! errors has several causes, and the advice has to fit the actual one.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
use rustix::process::geteuid;

use super::device;

/// A cause and its remedy, for a `BackingError`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Advice {
    pub what: &'static str,
    pub remedy: &'static str,
}

const fn advice(what: &'static str, remedy: &'static str) -> Advice {
    Advice { what, remedy }
}

/// A file or device without a single sector.
pub(super) fn empty(is_device: bool) -> Advice {
    let what = "it holds no whole sector";
    match is_device {
        true => {
            advice(what, "set the device up first (losetup, a medium in the drive, its volume)")
        }
        false => advice(what, "give it the size of the disk (truncate -s SIZE)"),
    }
}

/// Why `path` could not be found or opened.
pub(super) fn on_open(path: &Path, error: &io::Error) -> Advice {
    let metadata = std::fs::metadata(path).ok();
    match error.raw_os_error().unwrap_or(0) {
        libc::ENOENT => advice("it does not exist", "create it or correct the path"),
        libc::ENOTDIR => advice("a part of its path is not a folder", "correct the path"),
        libc::ELOOP => advice("its symbolic links lead in a circle", "correct the path"),
        libc::ENAMETOOLONG => advice("its path is too long", "use a shorter path"),
        libc::EISDIR => advice("it is a directory", "name a regular file or a block device"),
        libc::EACCES => forbidden(metadata.as_ref()),
        libc::EPERM => not_permitted(path),
        libc::EROFS if is_block_device(metadata.as_ref()) => READ_ONLY_DEVICE,
        libc::EROFS => {
            advice("it lies on a read-only filesystem", "attach the disk read-only (mode r)")
        }
        libc::ETXTBSY => advice(
            "the host uses it as swap space or runs it as a program",
            "stop that first (swapoff), or name another file",
        ),
        libc::EBUSY => advice("somebody else holds it exclusively", "unmount or release it first"),
        libc::EMFILE => advice(
            "polldisk has as many files open as its limit allows",
            "raise its limit (ulimit -n, or LimitNOFILE= under systemd)",
        ),
        libc::ENFILE => advice(
            "the host has as many files open as its limit allows",
            "raise the limit (sysctl fs.file-max)",
        ),
        libc::ENOMEM => advice("the host has no memory left", "free some memory"),
        libc::EFBIG | libc::EOVERFLOW => {
            advice("it is larger than its filesystem can open", "use another filesystem")
        }
        libc::EIO => advice(
            "the storage answers with an error",
            "see the kernel's log (dmesg) for the device's errors",
        ),
        libc::ESTALE | libc::ENOTCONN | libc::EHOSTDOWN | libc::ETIMEDOUT => advice(
            "the server of its filesystem does not answer or no longer knows it",
            "check that the server runs, and mount the filesystem again",
        ),
        libc::ENXIO if !is_block_device(metadata.as_ref()) => advice(
            "it is neither a file nor a block device",
            "name a regular file or a block device",
        ),
        libc::ENOMEDIUM => advice("there is no medium in the drive", "insert one"),
        libc::ENXIO | libc::ENODEV => advice("there is no device behind it", "check the device"),
        _ => advice("it can't be opened", "check the path and the device"),
    }
}

pub(super) const READ_ONLY_DEVICE: Advice = advice(
    "the device is read-only",
    "attach the disk read-only (mode r), or make it writable (blockdev --setrw, lvchange -p rw, \
     losetup without -r)",
);

fn is_block_device(metadata: Option<&Metadata>) -> bool {
    metadata.is_some_and(|metadata| metadata.file_type().is_block_device())
}

fn is_read_only_device(metadata: &Metadata) -> bool {
    metadata.file_type().is_block_device() && device::is_read_only(metadata.rdev())
}

/// EACCES: the permissions of the file or a folder above say no. Root gets it only if something else denies
/// access.
fn forbidden(metadata: Option<&Metadata>) -> Advice {
    match geteuid().is_root() {
        false => advice("polldisk may not open it", "run polldisk as a user who may, usually root"),
        true if metadata.is_some_and(is_read_only_device) => READ_ONLY_DEVICE,
        true => advice(
            "not even root may open it",
            "check whether its server squashes root (NFS), its FUSE mount excludes root, or SELinux or \
             AppArmor forbids it (dmesg)",
        ),
    }
}

/// EPERM: something other than permissions forbids it.
fn not_permitted(path: &Path) -> Advice {
    match protection(path) {
        protected if protected.contains(StatxAttributes::IMMUTABLE) => advice(
            "it is immutable",
            "attach the disk read-only (mode r), or make it writable (chattr -i)",
        ),
        protected if protected.contains(StatxAttributes::APPEND) => advice(
            "it may only be appended to",
            "attach the disk read-only (mode r), or make it writable (chattr -a)",
        ),
        _ if geteuid().is_root() => advice(
            "the host does not let this process open it",
            "check the device rules of its container or service (DeviceAllow= under systemd)",
        ),
        _ => advice("polldisk may not open it", "run polldisk as a user who may, usually root"),
    }
}

/// The flags that chattr sets; none if the filesystem does not support them.
fn protection(path: &Path) -> StatxAttributes {
    rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::empty())
        .map_or(StatxAttributes::empty(), |stat| stat.stx_attributes)
}

#[cfg(test)]
mod test {
    use std::fs::File;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::backing::{Access, DiskOptions, RawImage};

    fn refusal(path: &Path) -> String {
        RawImage::open(path, DiskOptions::default(), &Access::default()).unwrap_err().to_string()
    }

    fn is_told(path: &Path, parts: &[&str]) {
        let refusal = refusal(path);
        assert!(parts.iter().all(|part| refusal.contains(part)), "{refusal}");
    }

    #[test]
    fn an_immutable_file_is_not_a_matter_of_who_runs_polldisk() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("disk.img");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let chattr = |flag| Command::new("chattr").arg(flag).arg(&path).status();
        for (set, clear, what) in [("+i", "-i", "immutable"), ("+a", "-a", "appended")] {
            if !chattr(set).is_ok_and(|status| status.success()) {
                return eprintln!(
                    "skipped: chattr {set} needs root and a filesystem that supports it"
                );
            }
            let refusal = refusal(&path);
            assert!(chattr(clear).unwrap().success());
            assert!(
                refusal.contains(what) && refusal.contains(&format!("chattr {clear}")),
                "{refusal}"
            );
            assert!(!refusal.contains("run polldisk as"), "{refusal}");
        }
    }

    #[test]
    fn a_program_that_runs_is_told_as_busy() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("sleep");
        std::fs::copy("/bin/sleep", &path).unwrap();
        let mut running = loop {
            match Command::new(&path).arg("600").stdin(Stdio::null()).spawn() {
                // Another test has just forked and still has the copy open for writing.
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {}
                started => break started.unwrap(),
            }
        };
        let refusal = refusal(&path);
        running.kill().unwrap();
        running.wait().unwrap();
        assert!(refusal.contains("runs it as a program"), "{refusal}");
    }

    #[test]
    fn paths_that_lead_nowhere_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        File::create(at("file")).unwrap();
        std::os::unix::fs::symlink(at("none"), at("dangling")).unwrap();
        std::os::unix::fs::symlink(at("circle"), at("circle")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        is_told(&at("none"), &["does not exist"]);
        is_told(&at("dangling"), &["a link to", "does not exist"]);
        is_told(&at("circle"), &["circle"]);
        is_told(&at("file/disk.img"), &["not a folder"]);
        is_told(&at(&"x".repeat(300)), &["too long"]);
        is_told(&at("socket"), &["it is a socket", "a block device"]);
        is_told(&at("file"), &["no whole sector", "truncate"]);
    }

    #[test]
    fn an_empty_device_is_not_to_be_truncated() {
        assert!(!empty(true).remedy.contains("truncate"));
        let Some(device) = empty_loop_device() else {
            return eprintln!("skipped: there is no loop device without a file");
        };
        let refusal = refusal(&device);
        assert!(refusal.contains("losetup") && !refusal.contains("truncate"), "{refusal}");
    }

    fn empty_loop_device() -> Option<std::path::PathBuf> {
        let loops = (0..8).map(|n| Path::new("/dev").join(format!("loop{n}")));
        loops.into_iter().find(|device| {
            let name = device.file_name().unwrap().to_str().unwrap();
            let size = std::fs::read_to_string(format!("/sys/block/{name}/size"));
            size.is_ok_and(|size| size.trim() == "0") && File::open(device).is_ok()
        })
    }

    #[test]
    fn each_error_has_advice_of_its_own() {
        let told = |errno| on_open(Path::new("/nonexistent"), &io::Error::from_raw_os_error(errno));
        let other = told(0);
        for errno in [
            libc::EMFILE,
            libc::ENFILE,
            libc::ENOMEM,
            libc::EIO,
            libc::ESTALE,
            libc::EOVERFLOW,
            libc::EBUSY,
            libc::EROFS,
            libc::ENOMEDIUM,
            libc::EACCES,
            libc::EPERM,
        ] {
            assert_ne!(told(errno), other, "{errno}");
        }
        assert!(told(libc::EMFILE).remedy.contains("ulimit -n"));
        assert_ne!(told(libc::EMFILE), told(libc::ENFILE));
        assert_ne!(told(libc::EACCES), told(libc::EPERM));
    }
}

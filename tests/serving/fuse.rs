//! A filesystem with one file, `disk.img`, for tests: it opens the file with O_DIRECT but refuses to read
//! it that way, and its server can die under the mount.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::host::{self, Mounted};
use crate::rig::IMAGE_BYTES;

/// Linux's `include/uapi/linux/fuse.h`.
mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const BATCH_FORGET: u32 = 42;
}

const FOLDER: u64 = 1;
const FILE: u64 = 2;
/// Set in the server's process.
const SERVER: &str = "POLLDISK_TEST_FUSE";

/// The mount and its server, which is a process of its own: a process that is killed while it waits for
/// a filesystem it serves itself would wait for ever.
pub struct Filesystem {
    server: Child,
    // Dropped after the server has ended, so that unmounting does not wait for it.
    mounted: Mounted,
}

impl Filesystem {
    /// `None`, with a message, if this user may not.
    pub fn mount(folder: &Path) -> Option<Filesystem> {
        let Ok(device) = File::options().read(true).write(true).open("/dev/fuse") else {
            eprintln!("skipped: there is no /dev/fuse");
            return None;
        };
        std::fs::create_dir(folder).unwrap();
        let served = device.try_clone().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-i", "-t", "fuse", "-o", "fd=0,rootmode=40000,user_id=0,group_id=0", "test"]);
        host::run(mount.arg(folder).stdin(device))?;
        let mounted = Mounted { folder: folder.to_owned() };
        let server = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "fuse::server", "--ignored", "--nocapture"])
            .env(SERVER, "1")
            .stdin(served)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Some(Filesystem { server, mounted })
    }

    /// Where it is mounted.
    pub fn folder(&self) -> &Path {
        &self.mounted.folder
    }

    /// How many times the file was synced.
    pub fn syncs(&self) -> i64 {
        std::fs::metadata(self.mounted.folder.join("disk.img")).unwrap().ctime()
    }

    /// Ends the server; the mount stays.
    pub fn die(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }
}

impl Drop for Filesystem {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// The server's process: this program, started once more.
#[test]
#[ignore = "not a test: the server for tests that mount this filesystem"]
fn server() {
    if std::env::var_os(SERVER).is_some() {
        serve(std::io::stdin().as_fd().try_clone_to_owned().unwrap().into());
    }
}

fn serve(mut device: File) {
    let mut syncs = 0;
    let mut contents = vec![0; usize::try_from(IMAGE_BYTES).unwrap()];
    let mut request = vec![0; (1 << 20) + 4096];
    // The read fails when the filesystem is unmounted.
    while let Ok(len) = device.read(&mut request) {
        let request = &request[..len];
        let number = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_ne_bytes(request[at..at + 8].try_into().unwrap());
        let (opcode, unique, node) = (number(4), long(8), long(16));
        let answer = match opcode {
            opcode::INIT => Ok(init()),
            opcode::FORGET | opcode::BATCH_FORGET => continue,
            opcode::LOOKUP => match &request[40..] {
                b"disk.img\0" => {
                    Ok([&words(&[FILE, 0, 0, 0, 0])[..], &attributes(FILE, syncs)].concat())
                }
                _ => Err(libc::ENOENT),
            },
            opcode::GETATTR => Ok([&words(&[0, 0])[..], &attributes(node, syncs)].concat()),
            opcode::OPEN => Ok(words(&[0, 0])),
            opcode::READ => {
                let (offset, size) = (usize::try_from(long(48)).unwrap(), number(56) as usize);
                match number(72) & libc::O_DIRECT.cast_unsigned() {
                    0 => Ok(contents[offset..contents.len().min(offset + size)].to_vec()),
                    _ => Err(libc::EINVAL),
                }
            }
            opcode::WRITE => {
                let (offset, size) = (usize::try_from(long(48)).unwrap(), number(56) as usize);
                contents[offset..offset + size].copy_from_slice(&request[80..80 + size]);
                Ok(words(&[size as u64]))
            }
            opcode::STATFS => Ok(words(&[0; 10])),
            opcode::FSYNC => {
                syncs += 1;
                Ok(Vec::new())
            }
            opcode::RELEASE | opcode::FLUSH => Ok(Vec::new()),
            _ => Err(libc::ENOSYS),
        };
        let (errno, payload) = match answer {
            Ok(payload) => (0, payload),
            Err(errno) => (-errno, Vec::new()),
        };
        let len = u32::try_from(16 + payload.len()).unwrap();
        let head = [&len.to_ne_bytes()[..], &errno.to_ne_bytes(), &unique.to_ne_bytes()].concat();
        // The process that asked may have been killed.
        let _ = device.write_all(&[head, payload].concat());
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn init() -> Vec<u8> {
    // Version 7.31, no reading ahead, no features; 12 and 9 requests in the background, writes of
    // 128 KiB, times in nanoseconds.
    let [major, minor, background, write] = [7u32, 31, 12 | 9 << 16, 128 << 10];
    let fields = [major, minor, 0, 0, background, write, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    fields.iter().flat_map(|field| field.to_ne_bytes()).collect()
}

/// Linux's `struct fuse_attr`, with `number` as the time of the last change.
fn attributes(node: u64, number: u64) -> Vec<u8> {
    let (size, mode) = match node {
        FOLDER => (0, libc::S_IFDIR | 0o755),
        _ => (IMAGE_BYTES, libc::S_IFREG | 0o644),
    };
    let rest = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0];
    let rest = rest.iter().flat_map(|field: &u32| field.to_ne_bytes());
    words(&[node, size, size / 512, 0, 0, number]).into_iter().chain(rest).collect()
}

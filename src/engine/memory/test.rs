use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::engine::layer::test::Below;
use crate::xen::shm::LocalPages;

const PAGE: u64 = 4096;
const BYTES: u64 = 1 << 20;
/// [`BYTES`] as the length of a buffer.
const LEN: usize = 1 << 20;

/// Not a file: an operation that succeeds on it made no system call.
const NO_FILE: RawFd = -1;

/// A file of tmpfs, served through its mapping.
struct Rig {
    file: File,
    target: MemoryTarget<()>,
    memory: MemoryFiles<Below<()>>,
    pages: LocalPages,
    _folder: Option<tempfile::TempDir>,
}

impl Rig {
    /// A file without any pages, on a tmpfs that every Linux has.
    fn sparse() -> Rig {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let rig = Rig::of(&folder_file(folder.path(), BYTES));
        Rig { _folder: Some(folder), ..rig }
    }

    fn of(path: &Path) -> Rig {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mapping = MappedFile::new(&file, file.metadata().unwrap().len(), true).unwrap();
        let (memory, pages) = (MemoryFiles::new(Below::new()), LocalPages::new(16));
        assert!(memory.is_guarded);
        let target = target(file.as_raw_fd(), Some(mapping));
        Rig { file, target, memory, pages, _folder: None }
    }

    /// A file whose pages were all written by another program.
    fn filled() -> Rig {
        let rig = Rig::sparse();
        rig.file.write_all_at(&vec![0x5a; LEN], 0).unwrap();
        rig
    }

    fn run_by(&mut self, file: RawFd, operation: &IoOp<'_>) -> i32 {
        let raw_fd = &mut self.target.file.as_mut().unwrap().raw_fd;
        let own = std::mem::replace(raw_fd, file);
        let result = run(&mut self.memory, &self.target, operation);
        self.target.file.as_mut().unwrap().raw_fd = own;
        result
    }

    fn mapping(&self) -> &MappedFile {
        self.target.file.as_ref().and_then(|file| file.mapping.as_ref()).unwrap()
    }

    fn read_by(&mut self, file: RawFd, offset: u64) -> i32 {
        self.pages.page(0).copy_from(&[0xee; 4096]);
        let read = IoOp::Read { offset, buffers: &[self.pages.page(0)] };
        self.run_by(file, &read)
    }

    fn write_by(&mut self, file: RawFd, offset: u64, byte: u8) -> i32 {
        self.pages.page(0).copy_from(&[byte; 4096]);
        let write = IoOp::Write { offset, buffers: &[self.pages.page(0)] };
        self.run_by(file, &write)
    }

    fn read(&mut self, offset: u64) -> i32 {
        self.read_by(self.file.as_raw_fd(), offset)
    }

    fn write(&mut self, offset: u64, byte: u8) -> i32 {
        self.write_by(self.file.as_raw_fd(), offset, byte)
    }

    /// Whether the page that was read last holds only this byte.
    fn was_read(&self, byte: u8) -> bool {
        let mut found = [0; 4096];
        self.pages.page(0).copy_to(&mut found);
        found == [byte; 4096]
    }

    /// Discards pages, as the guest does.
    fn discard(&mut self, offset: u64, len: u64) {
        let discard = IoOp::Discard { offset, len, secure: false };
        let submitted = submit(&mut self.memory, &self.target, &discard);
        assert_eq!(submitted, Submitted::Started);
        assert_eq!(self.memory.below.texts(), [format!("discard {offset}+{len}")]);
        self.punch(offset, len);
    }

    /// Gives pages back, as another program may.
    fn punch(&self, offset: u64, len: u64) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let [offset, len] = [offset, len].map(u64::cast_signed);
        // SAFETY: no pointers.
        assert_eq!(unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) }, 0);
    }

    /// Bytes of memory that the file takes.
    fn allocated(&self) -> u64 {
        self.file.metadata().unwrap().blocks() * 512
    }

    fn learn_all(&self) {
        self.mapping().learn(0, BYTES);
    }
}

fn target(raw_fd: RawFd, mapping: Option<MappedFile>) -> MemoryTarget<()> {
    MemoryTarget { file: Some(MemoryFile { raw_fd, mapping }), below: () }
}

fn submit(
    memory: &mut MemoryFiles<Below<()>>,
    target: &MemoryTarget<()>,
    operation: &IoOp<'_>,
) -> Submitted {
    memory.submit(target, operation, Ticket::new(0, 0), By::Worker)
}

/// The result of an operation that is done at once.
fn run(
    memory: &mut MemoryFiles<Below<()>>,
    target: &MemoryTarget<()>,
    operation: &IoOp<'_>,
) -> i32 {
    let submitted = submit(memory, target, operation);
    let Submitted::Done(completion) = submitted else { panic!("{submitted:?}") };
    completion.result
}

fn folder_file(folder: &Path, bytes: u64) -> PathBuf {
    let path = folder.join("disk.img");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

#[test]
fn data_goes_to_its_place_and_comes_back_and_an_error_is_its_errno() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * 1024).unwrap();
    let pages = LocalPages::new(3);
    pages.page(0).copy_from(&[1; 4096]);
    pages.page(2).copy_from(&[3; 4096]);
    let mut memory = MemoryFiles::new(Below::new());
    let by_calls = target(file.as_raw_fd(), None);
    let apart = [pages.page(2), pages.page(0)];
    let write = IoOp::Write { offset: 4096, buffers: &apart };
    assert_eq!(run(&mut memory, &by_calls, &write), 8192);
    let mut found = [0; 12288];
    file.read_exact_at(&mut found, 4096).unwrap();
    assert!(found[..4096].iter().all(|byte| *byte == 3));
    assert!(found[4096..8192].iter().all(|byte| *byte == 1));
    let read = IoOp::Read { offset: 4096, buffers: &[pages.page(1)] };
    assert_eq!(run(&mut memory, &by_calls, &read), 4096);
    let mut copied = [0; 4096];
    pages.page(1).copy_to(&mut copied);
    assert_eq!(copied, [3; 4096]);
    let beyond = IoOp::Read { offset: 1 << 20, buffers: &[pages.page(1)] };
    assert_eq!(run(&mut memory, &by_calls, &beyond), 0);
    assert_eq!(run(&mut memory, &target(NO_FILE, None), &read), -libc::EBADF);
    let read_only = File::open("/proc/self/exe").unwrap();
    let read_only = target(read_only.as_raw_fd(), None);
    assert_eq!(run(&mut memory, &read_only, &write), -libc::EBADF);
}

#[test]
fn a_file_that_is_not_in_memory_is_passed_on() {
    let (mut memory, pages) = (MemoryFiles::new(Below::new()), LocalPages::new(1));
    let elsewhere = MemoryTarget { file: None, below: () };
    let read = IoOp::Read { offset: 4096, buffers: &[pages.page(0)] };
    for operation in [read, IoOp::Flush] {
        assert_eq!(submit(&mut memory, &elsewhere, &operation), Submitted::Started);
    }
    assert_eq!((memory.below.texts(), memory.in_flight()), (vec!["read 4096+4096", "flush"], 2));
    memory.below.complete(4096);
    assert!(memory.arm().unwrap());
    let mut done = Vec::new();
    memory.reap(&mut done);
    assert_eq!(done, [Completion { ticket: Ticket::new(0, 0), result: 4096 }]);
}

#[test]
fn a_file_full_of_data_is_read_and_written_without_system_calls() {
    let mut rig = Rig::filled();
    for page in [0, 63, 64, 255] {
        assert_eq!(rig.read_by(NO_FILE, page * PAGE), 4096);
        assert!(rig.was_read(0x5a));
    }
    assert_eq!(rig.write_by(NO_FILE, 62 * PAGE, 0x11), 4096);
    let mut found = [0; 4096];
    rig.file.read_exact_at(&mut found, 62 * PAGE).unwrap();
    assert_eq!(found, [0x11; 4096]);
}

#[test]
fn what_was_written_by_a_system_call_is_read_and_written_without() {
    let mut rig = Rig::sparse();
    for page in 0..BYTES / PAGE {
        assert_eq!(rig.write(page * PAGE, 0x33), 4096);
        assert_eq!(rig.read_by(NO_FILE, page * PAGE), 4096);
        assert!(rig.was_read(0x33));
        assert_eq!(rig.write_by(NO_FILE, page * PAGE, 0x44), 4096);
    }
    let mut found = vec![0; LEN];
    rig.file.read_exact_at(&mut found, 0).unwrap();
    assert!(found.iter().all(|byte| *byte == 0x44));
}

#[test]
fn both_ways_move_the_same_bytes_whatever_the_pieces() {
    let mut rig = Rig::filled();
    let pattern: Vec<u8> = (0..=250).cycle().take(LEN).collect();
    rig.file.write_all_at(&pattern, 0).unwrap();
    rig.learn_all();
    let part = |index, offset, len| rig.pages.page(index).part(offset, len).unwrap();
    let pieces = [part(3, 512, 1024), part(1, 0, 4096), part(2, 3584, 512), part(7, 0, 2048)];
    let len = 7680;
    let gather = || {
        let gathered = pieces.iter().flat_map(|piece| {
            let mut data = vec![0; piece.len() as usize];
            piece.copy_to(&mut data);
            data
        });
        gathered.collect::<Vec<u8>>()
    };
    let read = IoOp::Read { offset: 5 * PAGE + 512, buffers: &pieces };
    assert_eq!(rig.run_by(NO_FILE, &read), len);
    assert_eq!(gather(), pattern[5 * 4096 + 512..][..7680]);

    pieces.iter().zip(1..).for_each(|(piece, byte)| piece.copy_from(&[byte; 4096]));
    let write = IoOp::Write { offset: 63 * PAGE + 1024, buffers: &pieces };
    assert_eq!(rig.run_by(NO_FILE, &write), len);
    let mut found = vec![0; LEN];
    rig.file.read_exact_at(&mut found, 0).unwrap();
    let mut expected = pattern;
    expected[63 * 4096 + 1024..][..7680].copy_from_slice(&gather());
    assert!(found == expected, "the rest is as it was");
}

#[test]
fn reading_holes_gives_the_file_no_memory() {
    let mut rig = Rig::sparse();
    rig.file.write_all_at(&[0x5a; 4096], 9 * PAGE).unwrap();
    for _ in 0..3 {
        for page in 0..BYTES / PAGE {
            assert_eq!(rig.read(page * PAGE), 4096);
            assert!(rig.was_read(if page == 9 { 0x5a } else { 0 }));
        }
        assert_eq!(rig.allocated(), PAGE);
    }
    assert_eq!(rig.read_by(NO_FILE, 9 * PAGE), 4096);
    assert_eq!(rig.read_by(NO_FILE, 10 * PAGE), -libc::EBADF);
}

#[test]
fn discarded_pages_read_as_zeroes_and_take_no_memory() {
    let mut rig = Rig::filled();
    rig.learn_all();
    // Half of the last page stays in use, so the file keeps that page.
    rig.discard(4 * PAGE, 100 * PAGE + 2048);
    let kept = BYTES - 100 * PAGE;
    for _ in 0..2 {
        for page in 4..104 {
            assert_eq!(rig.read(page * PAGE), 4096);
            assert!(rig.was_read(0));
        }
        assert_eq!(rig.allocated(), kept);
    }
    assert_eq!(rig.read_by(NO_FILE, 3 * PAGE), 4096);
    assert_eq!(rig.write(50 * PAGE, 0x66), 4096);
    assert_eq!(rig.read_by(NO_FILE, 50 * PAGE), 4096);
    assert!(rig.was_read(0x66));
    assert_eq!(rig.allocated(), kept + PAGE);
}

#[test]
fn pages_that_another_program_gave_back_read_as_zeroes() {
    let mut rig = Rig::filled();
    rig.learn_all();
    rig.punch(0, 8 * PAGE);
    assert_eq!(rig.read(PAGE), 4096);
    assert!(rig.was_read(0));
    assert_eq!(rig.write(2 * PAGE, 0x12), 4096);
    let mut found = [0; 4096];
    rig.file.read_exact_at(&mut found, 2 * PAGE).unwrap();
    assert_eq!(found, [0x12; 4096]);
}

#[test]
fn a_file_made_shorter_ends_there_and_can_grow_again() {
    let mut rig = Rig::filled();
    rig.learn_all();
    rig.file.set_len(10 * PAGE).unwrap();
    assert_eq!(rig.read(9 * PAGE), 4096);
    assert_eq!(rig.read(10 * PAGE), 0, "as a system call finds the end");
    assert_eq!(rig.read_by(NO_FILE, 10 * PAGE), -libc::EBADF, "the page is known to be gone");
    assert_eq!(rig.read_by(NO_FILE, 11 * PAGE), -libc::EBADF);

    rig.file.set_len(BYTES).unwrap();
    assert_eq!(rig.read(10 * PAGE), 4096);
    assert!(rig.was_read(0));
    assert_eq!(rig.write(20 * PAGE, 0x77), 4096);
    assert_eq!(rig.read_by(NO_FILE, 20 * PAGE), 4096);
    assert!(rig.was_read(0x77));
}

#[test]
fn a_file_opened_for_reading_is_only_read() {
    let Rig { file, _folder: folder, .. } = Rig::filled();
    let path = folder.as_ref().unwrap().path().join("disk.img");
    let read_only = File::open(path).unwrap();
    let mapping = MappedFile::new(&read_only, BYTES, false).unwrap();
    mapping.learn(0, BYTES);
    let mut target = target(NO_FILE, Some(mapping));
    let (mut memory, pages) = (MemoryFiles::new(Below::new()), LocalPages::new(1));
    let buffers = [pages.page(0)];
    let read = IoOp::Read { offset: 0, buffers: &buffers };
    assert_eq!(run(&mut memory, &target, &read), 4096);
    let write = IoOp::Write { offset: 0, buffers: &buffers };
    target.file.as_mut().unwrap().raw_fd = read_only.as_raw_fd();
    assert_eq!(run(&mut memory, &target, &write), -libc::EBADF);
    assert_eq!(file.metadata().unwrap().len(), BYTES);
}

#[test]
fn writes_by_the_mapping_leave_their_time_when_it_ends() {
    let mut rig = Rig::filled();
    rig.learn_all();
    rig.file.set_modified(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(rig.write_by(NO_FILE, 0, 1), 4096);
    drop(rig.target);
    assert!(rig.file.metadata().unwrap().mtime() > 0);
}

/// Names the folder of a full tmpfs to the child process that has it.
const FULL: &str = "POLLDISK_TEST_FULL_TMPFS";

#[test]
fn a_full_filesystem_is_an_error_of_the_write() {
    const NAME: &str = "engine::memory::test::a_full_filesystem_is_an_error_of_the_write";
    const FULL_BYTES: u64 = 64 * 1024;
    if let Some(folder) = std::env::var_os(FULL) {
        let mut rig = Rig::of(&folder_file(Path::new(&folder), FULL_BYTES));
        for page in 0..FULL_BYTES / PAGE {
            assert_eq!(rig.write(page * PAGE, 1), 4096);
        }
        rig.punch(0, PAGE);
        // Another program takes the page that became free.
        std::fs::write(Path::new(&folder).join("other"), [0; 4096]).unwrap();
        assert_eq!(rig.write(0, 2), -libc::ENOSPC);
        assert_eq!(rig.read(0), 4096);
        assert!(rig.was_read(0));
        assert_eq!(rig.write(PAGE, 3), 4096);
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let test = std::env::current_exe().unwrap();
    let mounted = |command: &[&OsStr]| {
        let script = r#"mount -t tmpfs -o size=64k none "$0" && exec "$@""#;
        let mut unshare = Command::new("unshare");
        unshare.args(["--map-root-user", "--mount", "sh", "-c", script]).arg(folder.path());
        unshare.args(command).env(FULL, folder.path()).status()
    };
    if !mounted(&["true".as_ref()]).is_ok_and(|status| status.success()) {
        return eprintln!("skipped: a user may not mount here (unshare --map-root-user --mount)");
    }
    let status = mounted(&[test.as_ref(), "--exact".as_ref(), NAME.as_ref()]).unwrap();
    assert!(status.success(), "{status}");
}

//! A filesystem that is frozen, as by a snapshot: what is asked of it waits inside of the kernel.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use polldisk::blkif::codec::{RawDiscard, RawRequest};
use polldisk::blkif::op;
use polldisk::engine::host::HostEngine;
use polldisk::sim::SimXen;

use crate::guest::HANG;
use crate::scripted::{Bench, Shape};
use crate::workers::{opened, zeroes};

/// An ext4 of its own, mounted.
struct Filesystem {
    place: PathBuf,
}

/// It is frozen for as long as this lives.
struct Frozen<'a>(&'a Filesystem);

const SKIPPED: &str = "skipped: no filesystem can be mounted and frozen here";

impl Filesystem {
    /// `None`, loudly, on a machine that can't have one; without the tools a failure where
    /// `POLLDISK_REQUIRE_XEN_TOOLS=1`, as CI sets it.
    fn mount(folder: &Path) -> Option<Filesystem> {
        let required = std::env::var("POLLDISK_REQUIRE_XEN_TOOLS").is_ok_and(|value| value == "1");
        let (file, place) = (folder.join("ext4.img"), folder.join("mounted"));
        File::create(&file).unwrap().set_len(256 << 20).unwrap();
        std::fs::create_dir(&place).unwrap();
        for tool in ["mkfs.ext4", "mount", "umount", "fsfreeze"] {
            if let Err(error) = Command::new(tool).arg("--version").output() {
                assert!(!required, "{tool}: {error}");
                eprintln!("{SKIPPED}: {tool} is missing ({error})");
                return None;
            }
        }
        run("mkfs.ext4", |command| command.args(["-q", "-F"]).arg(&file)).unwrap();
        match run("mount", |command| command.args(["-o", "loop"]).args([&file, &place])) {
            Ok(()) => Some(Filesystem { place }),
            Err(reason) => {
                let able = File::options().write(true).open("/dev/loop-control").is_ok();
                assert!(!able, "mount failed: {reason}");
                eprintln!("{SKIPPED}: this user may not mount ({reason})");
                None
            }
        }
    }

    fn freeze(&self) -> Frozen<'_> {
        run("fsfreeze", |command| command.arg("--freeze").arg(&self.place)).unwrap();
        Frozen(self)
    }
}

impl Drop for Filesystem {
    fn drop(&mut self) {
        // Lazily: what a test that failed left in flight may still use it.
        let _ = run("umount", |command| command.arg("--lazy").arg(&self.place));
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = run("fsfreeze", |command| command.arg("--unfreeze").arg(&self.0.place));
    }
}

/// Runs a tool; what it says if it fails.
fn run(tool: &str, with: impl FnOnce(&mut Command) -> &mut Command) -> Result<(), String> {
    let output = with(&mut Command::new(tool)).output().unwrap();
    let said = || String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(said()) }
}

/// Passes until a guest has this many answers.
fn wait(bench: &mut Bench<SimXen, HostEngine>, guest: usize, count: usize) {
    let (start, mut answers) = (Instant::now(), 0);
    while answers < count {
        assert!(start.elapsed() < HANG, "{answers} of {count} answers");
        bench.pass();
        answers += bench.answers(guest);
    }
}

#[test]
fn discards_and_writes_on_a_frozen_filesystem_leave_anothers_flushes_answered() {
    const DISCARDS: usize = 64;
    const WRITES: usize = 64;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let Some(filesystem) = Filesystem::mount(folder.path()) else { return };
    let image = filesystem.place.join("disk.img");
    File::create(&image).unwrap().write_all(&vec![7; 8 << 20]).unwrap();

    let mut bench = Bench::over(HostEngine::new().unwrap());
    let shape = Shape::mapped(DISCARDS + WRITES).indirect(12, 2);
    let slow = bench.guest_on(shape, opened(&image));
    let victim = bench.guest_on(Shape::mapped(32), opened(&zeroes(folder.path())));
    bench.ask(victim, op::FLUSH_DISKCACHE, 1, 0);
    wait(&mut bench, victim, 1);

    let frozen = filesystem.freeze();
    let device = &mut bench.guests[slow];
    for number in 0..DISCARDS as u64 {
        let id = device.free_buffer().unwrap() as u64;
        let discard = RawDiscard { flag: 0, handle: 0, id, sector: number * 64, nr_sectors: 32 };
        device.put_request(&RawRequest::Discard(discard), 0);
    }
    assert_eq!(bench.ask(slow, op::WRITE, WRITES, 1), WRITES);
    for _ in 0..100 {
        bench.pass();
    }
    for _ in 0..20 {
        bench.ask(victim, op::WRITE, 8, 1);
        bench.ask(victim, op::FLUSH_DISKCACHE, 8, 0);
        wait(&mut bench, victim, 16);
    }
    assert_eq!(bench.answers(slow), 0, "nothing is done on a frozen filesystem");
    drop(frozen);
    wait(&mut bench, slow, DISCARDS + WRITES);
}

//! Allocations on the steady path, counted by the allocator of this program.
//!
//! A test program of its own, because its allocator counts for the whole program.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use polldisk::control;
use polldisk::control::admin::client::request;
use polldisk::control::admin::protocol::{Attach, Request};
use polldisk::msg::report_channel;
use polldisk::park::Doorbell;
use polldisk::patience::Policy;
use polldisk::sim::StandIn;
use polldisk::sim::blkfront::device::Options;
use polldisk::sim::blkfront::load::{Load, Runner};
use polldisk::sim::blkfront::xenbus::Xenbus;
use polldisk::units::{DomId, VbdId};
use polldisk::worker::{WorkerThread, spawn_all};

/// The id of the thread whose allocations are counted; 0: none.
static WATCHED: AtomicI32 = AtomicI32::new(0);

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// The system's allocator, with a count of allocations.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count() {
    let watched = WATCHED.load(Ordering::Relaxed);
    // SAFETY: no arguments, no effect.
    if watched != 0 && watched == unsafe { libc::gettid() } {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on unchanged to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

/// Only a hang takes this long.
const HANG: Duration = Duration::from_secs(60);

/// Requests until all grants are mapped and all buffers have their final sizes.
const WARM_UP: u64 = 5_000;

const COUNTED: u64 = 50_000;

const VBD: VbdId = VbdId(51712);

fn until(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < HANG, "still waiting until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The id of this process's thread with that name.
fn thread(name: &str) -> i32 {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|entry| entry.unwrap());
    let mut named = tasks.filter(|task| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
    });
    let task = named.next().unwrap_or_else(|| panic!("no thread {name}"));
    task.file_name().to_str().unwrap().parse().unwrap()
}

/// How often a worker allocates during [`COUNTED`] requests to a disk.
fn allocations(target: &str, options: Options) -> u64 {
    let stand_in = StandIn::start_temporary().unwrap();
    let platform = stand_in.platform();
    let (reporter, reports) = report_channel().unwrap();
    let policy = Policy::UpTo(Duration::from_micros(50));
    let (senders, workers) = spawn_all(&platform, &[None], policy, &reporter).unwrap();
    let admin = stand_in.folder().join("admin.sock");
    let config = control::Config { admin_path: Some(admin.clone()), ..control::Config::default() };
    let stop = Doorbell::new().unwrap();
    let control = std::thread::spawn({
        let stop = stop.clone();
        move || control::run(&platform, &config, senders, reports, &stop)
    });
    until("the daemon answers", || request(&admin, &Request::List).is_ok());

    let domain = Arc::new(stand_in.create_domain(DomId::try_from(1).unwrap(), 4096).unwrap());
    let attach =
        Attach { domid: 1, vdev: "xvda".into(), target: target.into(), ..Attach::default() };
    request(&admin, &Request::Attach(attach)).unwrap();
    let xenbus = Xenbus::open(&domain, VBD).unwrap();
    let (mut device, disk) = xenbus.connect(&domain, options).unwrap();
    let load = Load {
        seed: 1,
        block_bytes: 4096,
        depth: 32,
        read_percent: 50,
        flush_every: 1000,
        sectors: 0..disk.sectors.0.min(8192),
        zeroed: false,
        keeps_data: false,
    };
    let (ended, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut runner = Runner::new(load, &mut device);
    ALLOCATIONS.store(0, Ordering::Relaxed);
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| runner.run(&ended, &done));
        let wait = |requests| {
            until("the guest has done its requests", || {
                done.load(Ordering::Relaxed) >= requests || guest.is_finished()
            });
        };
        wait(WARM_UP);
        WATCHED.store(thread("worker-0"), Ordering::Relaxed);
        wait(WARM_UP + COUNTED);
        WATCHED.store(0, Ordering::Relaxed);
        ended.store(true, Ordering::Relaxed);
        guest.join().unwrap().unwrap();
    });
    assert!(done.load(Ordering::Relaxed) >= WARM_UP + COUNTED);
    xenbus.close(device).unwrap();
    stop.ring();
    control.join().unwrap().unwrap();
    workers.into_iter().for_each(WorkerThread::join);
    ALLOCATIONS.load(Ordering::Relaxed)
}

#[test]
fn the_steady_path_allocates_nothing() {
    let budgets = concat!(env!("CARGO_MANIFEST_DIR"), "/perf/budgets.toml");
    let budgets: toml::Table = fs::read_to_string(budgets).unwrap().parse().unwrap();
    let budget = budgets["allocations"].as_integer().unwrap();

    // SAFETY: no arguments, no effect.
    WATCHED.store(unsafe { libc::gettid() }, Ordering::Relaxed);
    drop(std::hint::black_box(Box::new(1)));
    WATCHED.store(0, Ordering::Relaxed);
    assert!(ALLOCATIONS.load(Ordering::Relaxed) > 0, "the allocator does not count");

    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = folder.path().join("disk.img");
    fs::File::create(&image).unwrap().set_len(4 << 20).unwrap();
    let file = format!("raw:{}", image.display());
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let image = memory.path().join("disk.img");
    fs::File::create(&image).unwrap().set_len(4 << 20).unwrap();
    let in_memory = format!("raw:{}", image.display());
    let kept = Options::default();
    let copied = Options { persistent: false, ..Options::default() };
    for (what, target, options) in [
        ("a null disk with persistent grants", "null:8G", kept),
        ("a file with persistent grants", &file, kept),
        ("a file, copied", &file, copied),
        ("a file in memory", &in_memory, kept),
    ] {
        let found = allocations(target, options);
        assert!(
            i64::try_from(found).unwrap() <= budget,
            "{what}: {found} allocations for {COUNTED} requests"
        );
    }
}

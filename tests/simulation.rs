//! The whole daemon in one thread, without a socket, a clock or a thread of its own.

use std::ops::Range;
use std::sync::Arc;

use polldisk::blkif::features::Offer;
use polldisk::control::{Config, Ended, Progress};
use polldisk::sim::blkfront::device::{Device, Options};
use polldisk::sim::blkfront::load::{Load, Report, Runner};
use polldisk::sim::blkfront::xenbus::{Wanted, Xenbus};
use polldisk::sim::world::World;
use polldisk::units::{DomId, VbdId};
use polldisk::xen::keys::{self, XenbusState};
use polldisk::xen::{NodeAccess, Nodes, Permission, Platform, Store};
use xenstore_rs::Xs;

const DISK_BYTES: usize = 4 << 20;
const SECTORS: Range<u64> = 0..(DISK_BYTES / 512) as u64;
const REQUESTS: u64 = 500;
const XVDA: u32 = 51712;

#[test]
fn a_guest_is_served_from_initialising_to_closed_in_one_thread_and_its_seed_replays() {
    // Opened by a helper's job; what is in it is the world's storage.
    let file = image();
    let targets = [format!("raw:{}", file.path().display()), format!("null:{DISK_BYTES}")];
    let run = |seed: u64| run(seed, &targets[usize::from(seed > 4)]);
    for seed in 1..=8 {
        let (trace, report) = run(seed);
        assert_eq!((report.mismatches, report.errors), (0, 0), "seed {seed}");
        assert!(report.verified > REQUESTS / 4 && report.writes > 0 && report.flushes > 0);
        let (again, _) = run(seed);
        let first_difference = trace.iter().zip(&again).find(|(one, other)| one != other);
        assert_eq!(first_difference, None, "seed {seed}");
        assert_eq!(trace.len(), again.len(), "seed {seed}");
    }
    assert_ne!(run(1).0, run(2).0, "seeds matter");
    assert_eq!(threads_named_by_polldisk(), 0, "no thread was started");
    assert_eq!(sockets(), 0, "no socket was opened");
}

#[test]
fn a_drive_opens_its_first_medium_once() {
    let file = image();
    for seed in 1..=8 {
        let mut world = World::new(seed, 1, DISK_BYTES, &Config::default()).unwrap();
        let domid = DomId::try_from(7).unwrap();
        let guest = world.create_domain(domid, 1).unwrap();
        make_disk(&world, domid, &format!("raw:{}", file.path().display()), "cdrom");
        let store = guest.open_store().unwrap();
        let xenbus = Xenbus::find(&store, VbdId(XVDA)).unwrap().unwrap();
        wait(&mut world, &xenbus, XenbusState::InitWait);
        (0..1000).for_each(|_| world.step().unwrap());
        let jobs = world.trace().iter().filter(|line| line.ends_with("Helper")).count();
        assert_eq!(jobs, 1, "seed {seed}: it is not closed and opened again");
    }
}

/// A guest's whole life on a host of two workers: what happened, and what the guest saw.
fn run(seed: u64, target: &str) -> (Vec<String>, Report) {
    let offer = Offer { queues: 2, ..Offer::default() };
    let mut world =
        World::new(seed, 2, DISK_BYTES, &Config { offer, ..Config::default() }).unwrap();
    let options = Options { persistent: seed.is_multiple_of(2), ..Options::default() };
    let wanted =
        Wanted { queues: if seed.is_multiple_of(3) { 1 } else { 2 }, ..Wanted::one_queue(options) };
    let domid = DomId::try_from(7).unwrap();
    let pages = u32::try_from(wanted.pages()).unwrap();
    let guest = Arc::new(world.create_domain(domid, pages).unwrap());
    make_disk(&world, domid, target, "disk");
    let store = guest.open_store().unwrap();
    let xenbus = Xenbus::find(&store, VbdId(XVDA)).unwrap().unwrap();
    wait(&mut world, &xenbus, XenbusState::InitWait);

    let device = |_| Device::new(Arc::clone(&guest), options).unwrap();
    let mut devices: Vec<Device> = (0..wanted.queues).map(device).collect();
    xenbus.publish_all(&devices, &wanted).unwrap();
    wait(&mut world, &xenbus, XenbusState::Connected);
    assert_eq!(xenbus.disk().unwrap().sectors.0, SECTORS.end);
    xenbus.set_state(XenbusState::Connected).unwrap();
    let report = play(seed, &mut world, &mut devices);

    xenbus.set_state(XenbusState::Closing).unwrap();
    wait(&mut world, &xenbus, XenbusState::Closing);
    xenbus.set_state(XenbusState::Closed).unwrap();
    wait(&mut world, &xenbus, XenbusState::Closed);
    assert_eq!(guest.mapped_grants(), 0);
    devices.into_iter().for_each(|device| device.close().unwrap());
    assert_eq!(world.end().unwrap(), Progress::Ended(Ended::Drained));
    (world.trace().to_vec(), report)
}

/// Random requests on each ring, to a part of the disk of its own.
fn play(seed: u64, world: &mut World, devices: &mut [Device]) -> Report {
    let part = SECTORS.end / devices.len() as u64;
    let load = |number: u64| Load {
        seed: seed + number,
        block_bytes: 16 << 10,
        depth: 16,
        read_percent: 50,
        flush_every: 20,
        sectors: number * part..(number + 1) * part,
        zeroed: true,
        keeps_data: true,
    };
    let mut runners: Vec<Runner> =
        (0..).zip(devices).map(|(number, device)| Runner::new(load(number), device)).collect();
    let mut done = 0;
    world
        .run_until("the load is done", |world| {
            for (number, runner) in runners.iter_mut().enumerate() {
                let answers = runner.step(done < REQUESTS).map_err(std::io::Error::other)?;
                if answers > 0 {
                    world.note(format!("  guest: {answers} answers on ring {number}"));
                }
                done += answers;
            }
            Ok(done >= REQUESTS && runners.iter().all(Runner::is_settled))
        })
        .unwrap();
    let mut report = Report::default();
    runners.iter().for_each(|runner| report += runner.report());
    report
}

fn wait(world: &mut World, xenbus: &Xenbus, wanted: XenbusState) {
    world
        .run_until(&format!("the backend is {wanted}"), |_| Ok(xenbus.backend_state()? == wanted))
        .unwrap();
}

/// What a toolstack does for a disk; `kind` is `disk` or `cdrom`.
fn make_disk(world: &World, domid: DomId, target: &str, kind: &str) {
    let dom0 = world.stand_in().platform().open_store().unwrap();
    let vbd = VbdId(XVDA);
    let frontend = keys::frontend_area(domid, vbd);
    let backend = keys::backend_area(DomId::DOM0, "vbd", domid, vbd);
    let permissions = |owner, reader| {
        [(owner, NodeAccess::None), (reader, NodeAccess::Read)]
            .map(|(domid, access)| Permission { domid, access })
    };
    dom0.atomically(|span| {
        span.mkdir(&frontend)?;
        span.set_permissions(&frontend, &permissions(domid, DomId::DOM0))?;
        span.mkdir(&backend)?;
        span.set_permissions(&backend, &permissions(DomId::DOM0, domid))?;
        let ours = [
            (keys::FRONTEND, frontend.as_str()),
            (keys::FRONTEND_ID, &domid.to_string()),
            (keys::ONLINE, "1"),
            (keys::DEV, "xvda"),
            (keys::MODE, "w"),
            (keys::DEVICE_TYPE, kind),
            (keys::PARAMS, target),
            (keys::STATE, "1"),
        ];
        let theirs =
            [(keys::BACKEND, backend.as_str()), (keys::BACKEND_ID, "0"), (keys::STATE, "1")];
        theirs
            .iter()
            .try_for_each(|(key, value)| span.write(&format!("{frontend}/{key}"), value))?;
        ours.iter().try_for_each(|(key, value)| span.write(&format!("{backend}/{key}"), value))
    })
    .unwrap();
}

fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(DISK_BYTES as u64).unwrap();
    file
}

/// Threads of the daemon and of the stand-in, which all have names.
fn threads_named_by_polldisk() -> usize {
    const NAMES: [&str; 5] = ["storage", "discard", "worker-", "hypervisor", "sim-xenstored"];
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| NAMES.iter().any(|ours| name.starts_with(ours))).count()
}

fn sockets() -> usize {
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    let targets = open.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count()
}

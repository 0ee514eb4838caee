//! A daemon without work sleeps.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use polldisk::blkif::op;
use polldisk::sim::blkfront::device::Options;
use polldisk::xen::PageAccess;

use crate::rig::{Rig, alone, ask, raw_request, whole};

const DISKS: u32 = 100;

/// What a thread has used so far.
#[derive(Clone, Copy, Debug)]
struct Used {
    cpu_ns: u64,
    wake_ups: u64,
}

/// The daemon's threads by name.
fn daemon() -> BTreeMap<String, Used> {
    let mut threads = BTreeMap::new();
    for task in fs::read_dir("/proc/self/task").unwrap() {
        let task = task.unwrap().path();
        let read = |file: &str| fs::read_to_string(task.join(file)).unwrap();
        let name = read("comm").trim().to_owned();
        if name == "control" || name.starts_with("worker-") {
            let status = read("status");
            let switches =
                status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            let used = Used {
                cpu_ns: read("schedstat").split(' ').next().unwrap().parse().unwrap(),
                wake_ups: switches.unwrap().trim().parse().unwrap(),
            };
            threads.insert(name, used);
        }
    }
    threads
}

/// How long nothing may happen.
const WATCHED: Duration = Duration::from_secs(10);

#[test]
fn a_hundred_connected_disks_without_requests_use_no_cpu() {
    alone("idle::a_hundred_connected_disks_without_requests_use_no_cpu", || {
        let rig = Rig::start();
        let mut guests: Vec<_> = (1..=DISKS)
            .map(|domid| {
                let guest = rig.guest(domid, "null:8G");
                let device = guest.connect(Options { buffers: 1, ..Options::default() });
                (guest, device)
            })
            .collect();
        std::thread::sleep(Duration::from_millis(200));

        let before = daemon();
        std::thread::sleep(WATCHED);
        let after = daemon();
        assert_eq!(after.keys().collect::<Vec<_>>(), ["control", "worker-0"]);
        for (name, after) in after {
            let before = before[&name];
            let (cpu_ns, wake_ups) =
                (after.cpu_ns - before.cpu_ns, after.wake_ups - before.wake_ups);
            eprintln!("{name}: {cpu_ns} ns and {wake_ups} wake-ups in {WATCHED:?}");
            assert!(wake_ups <= 4, "{name} woke up {wake_ups} times");
            assert!(cpu_ns < 2_000_000, "{name} used {cpu_ns} ns");
        }

        for (guest, device) in &mut guests {
            let (_, gref) = guest.grant(PageAccess::ReadWrite);
            assert_eq!(ask(device, &[raw_request(op::READ, 0, 8, &[whole(gref)])]), [0]);
        }
    });
}

//! Guests that close and start over: nothing is left behind.

use std::fs;
use std::io;
use std::time::Duration;

use polldisk::sim::blkfront::device::Options;
use polldisk::sim::blkfront::load::Load;
use polldisk::xen::keys::XenbusState;
use polldisk::xen::{Events, Platform};

use crate::rig::{Guest, Rig, alone, load, run_verified, until};

/// What a process has open.
#[derive(Debug, PartialEq, Eq)]
struct Usage {
    descriptors: usize,
    threads: usize,
    mappings: usize,
}

impl Usage {
    /// Waits until nothing changes any more: connections and images may be closed only after the
    /// answer.
    fn settled() -> Usage {
        let mut last = Usage::now();
        until("nothing changes any more", || {
            std::thread::sleep(Duration::from_millis(50));
            let now = Usage::now();
            let settled = now == last;
            last = now;
            settled
        });
        last
    }

    fn now() -> Usage {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        Usage {
            descriptors: fs::read_dir("/proc/self/fd").unwrap().count(),
            threads: fs::read_dir("/proc/self/task").unwrap().filter(is_ours).count(),
            // Memory of guests; the allocator's own mappings come and go.
            mappings: maps.lines().filter(|line| line.contains("memfd:")).count(),
        }
    }
}

/// Whether the thread is permanent. The kernel's threads for io_uring come and go, and helpers end when
/// they have had nothing to open or close for a while.
fn is_ours(task: &io::Result<fs::DirEntry>) -> bool {
    let name = fs::read_to_string(task.as_ref().unwrap().path().join("comm"));
    // A thread that has just ended has no name.
    name.is_ok_and(|name| !name.starts_with("iou-") && name.trim_end() != "storage")
}

fn round(rig: &Rig, guest: &Guest, number: u64) {
    let persistent = number.is_multiple_of(2);
    let mut device = guest.connect(Options { persistent, ..Options::default() });
    run_verified(&mut device, Load { zeroed: false, ..load(number + 1, 4096) }, 500);

    guest.xenbus.set_state(XenbusState::Closing).unwrap();
    guest.xenbus.wait_for(&[XenbusState::Closing]).unwrap();
    guest.xenbus.set_state(XenbusState::Closed).unwrap();
    guest.xenbus.wait_for(&[XenbusState::Closed]).unwrap();
    assert_eq!(guest.domain.mapped_grants(), 0);
    // Only a channel that the daemon has let go of can be bound again.
    let mut events = rig.platform().open_events().unwrap();
    events.bind_interdomain(guest.domain.domid(), device.port()).unwrap();
    device.close().unwrap();
    guest.xenbus.start_over().unwrap();
}

#[test]
fn a_guest_that_starts_over_ten_times_leaves_nothing_behind() {
    alone("reconnect::a_guest_that_starts_over_ten_times_leaves_nothing_behind", || {
        let rig = Rig::start();
        let guest = rig.guest_on_file(1);
        (0..2).for_each(|number| round(&rig, &guest, number));
        guest.xenbus.wait_for(&[XenbusState::InitWait]).unwrap();
        let before = Usage::settled();
        (2..12).for_each(|number| round(&rig, &guest, number));
        guest.xenbus.wait_for(&[XenbusState::InitWait]).unwrap();
        assert_eq!(Usage::settled(), before);
    });
}

#[test]
fn domains_that_come_and_go_leave_nothing_behind() {
    alone("reconnect::domains_that_come_and_go_leave_nothing_behind", || {
        let rig = Rig::start();
        let visit = |domid: u32| {
            let guest = rig.guest_on_file(domid);
            let mut device = guest.connect(Options::default());
            run_verified(&mut device, load(u64::from(domid), 4096), 100);
            if domid.is_multiple_of(2) {
                guest.close(device);
            } else {
                drop(device);
            }
            drop(guest);
            until("the disk is gone with it", || rig.disk(domid).is_none());
        };
        (1..3).for_each(visit);
        let before = Usage::settled();
        (3..13).for_each(visit);
        assert_eq!(Usage::settled(), before);
    });
}

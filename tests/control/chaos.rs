//! Toolstack, guests, workers and hung storage do anything in any order; in the end everything can be
//! removed, and the next disk works.

use std::thread::JoinHandle;

use polldisk::control::admin::client::RequestError;
use polldisk::control::admin::protocol::{Attach, Detach, Eject, Insert, Reply, Request};
use polldisk::msg::Report;
use polldisk::sim::random::Random;
use polldisk::units::VbdId;
use polldisk::xen::Store;
use polldisk::xen::vdev::Vdev;
use xenstore_rs::Xs;

use crate::rig::{Areas, BAD_GRANT, Guest, Rig, domid, until, xvd};

const DOMAINS: [u32; 2] = [5, 6];
const DISKS: u32 = 3;
const STEPS: usize = 80;
const ROUNDS: u64 = 40;

/// Names the only round to play.
const SEED: &str = "POLLDISK_CHAOS_SEED";

struct Play<'a> {
    rig: &'a Rig,
    random: Random,
    /// The guests of domains that exist.
    guests: [Option<Guest>; DOMAINS.len()],
    /// Requests that the daemon may not have answered yet.
    asked: Vec<JoinHandle<Result<Reply, RequestError>>>,
}

impl Play<'_> {
    fn step(&mut self) {
        let guest = self.random.between(0, DOMAINS.len() - 1);
        let vbd = xvd(self.random.between(0, DISKS - 1)).0;
        let areas = Areas::new(DOMAINS[guest], vbd);
        match self.random.between(0, 12) {
            0 | 1 => self.make(DOMAINS[guest], vbd, &areas),
            2 => self.toolstack(&areas),
            3 => self.storage(),
            4 => self.workers(),
            5 => std::thread::sleep(std::time::Duration::from_micros(500)),
            // A domain ends, or begins again.
            6 if self.random.between(0, 3) == 0 => {
                if self.guests[guest].take().is_some() {
                    self.rig.server().release(domid(DOMAINS[guest])).unwrap();
                }
            }
            6 => self.introduce(guest),
            7 => self.admin(DOMAINS[guest], vbd),
            8 | 9 => self.go_on(&areas, guest),
            _ => self.guest(guest, &areas),
        }
    }

    fn introduce(&mut self, guest: usize) {
        self.guests[guest].get_or_insert_with(|| self.rig.guest(DOMAINS[guest]));
    }

    fn make(&mut self, domid: u32, vbd: u32, areas: &Areas) {
        if self.rig.read(&areas.backend).is_some() {
            return;
        }
        let target = self.random.one_of(&["null:1G", "null:2G", "raw:/nowhere/at/all", "bad"]);
        let nodes: &[(&str, &str)] = match self.random.between(0, 4) {
            0 | 1 => &[("device-type", "cdrom"), ("removable", "1")],
            2 => &[("script", "/etc/xen/scripts/block-polldisk")],
            _ => &[],
        };
        let nodes = [&[("params", target)], nodes].concat();
        self.rig.toolstack_disk_with(domid, vbd, &nodes);
    }

    fn toolstack(&mut self, areas: &Areas) {
        let dom0 = &self.rig.dom0;
        let write = |node: &str, value: &str| {
            let _ = dom0.atomically(|span| {
                span.read(&format!("{}/frontend", areas.backend))?;
                span.write(&format!("{}/{node}", areas.backend), value)
            });
        };
        match self.random.between(0, 9) {
            0 => drop(dom0.rm(&areas.backend)),
            1 => drop(dom0.rm(&areas.frontend)),
            2 => drop(self.rig.toolstack_forgets(areas)),
            3 => write(
                "state",
                self.random.one_of(&["0", "1", "2", "3", "4", "5", "6", "7", "x", ""]),
            ),
            4 => write("online", self.random.one_of(&["0", "1", "1\n", "y"])),
            5 => write("hotplug-status", self.random.one_of(&["connected", "error"])),
            6 | 7 => {
                let target = self.random.one_of(&["", "null:1G", "aio:null:3G", "raw:/nowhere"]);
                write("params", target);
            }
            8 => {
                write("online", "0");
                write("state", "5");
            }
            _ => {
                let _ = dom0.rm(&areas.frontend);
                write("online", "0");
                write("state", "5");
            }
        }
    }

    fn storage(&mut self) {
        match self.random.between(0, 3) {
            0 => self.rig.plane().hold = true,
            1 => self.rig.plane().hangs = true,
            _ => self.rig.release(),
        }
    }

    /// Asks the daemon for something and does not wait for it.
    fn admin(&mut self, domid: u32, vbd: u32) {
        let vdev = Vdev::from(VbdId(vbd)).to_string();
        let target = self.random.one_of(&["null:1G", "null:2G", "raw:/nowhere", ""]).to_owned();
        let asked = match self.random.between(0, 4) {
            0 => Request::Detach(Detach { domid, vdev, force: true }),
            1 => Request::Insert(Insert { domid, vdev, target }),
            2 => Request::Eject(Eject { domid, vdev }),
            _ => {
                let cdrom = self.random.between(0, 1) == 0;
                Request::Attach(Attach { domid, vdev, target, cdrom, ..Attach::default() })
            }
        };
        self.asked.push(self.rig.ask_meanwhile(asked));
    }

    fn workers(&mut self) {
        let served: Vec<_> = self.rig.plane().serving.keys().copied().collect();
        if let Some(queue) = served.first().copied() {
            let report = match self.random.between(0, 2) {
                0 => Report::RingFault(queue, "a broken ring".to_owned()),
                1 => Report::ImageReplaced(queue),
                _ => Report::SpaceLeft(queue),
            };
            self.rig.worker_reports.send(report);
        }
    }

    fn guest(&mut self, guest: usize, areas: &Areas) {
        let Some(guest) = &self.guests[guest] else { return };
        let node = |node: &str| format!("{}/{node}", areas.frontend);
        match self.random.between(0, 7) {
            0 => drop(guest.store.rm(&node("state"))),
            1 => drop(guest.store.rm(&node("ring-ref"))),
            _ => {
                let state =
                    self.random.one_of(&["1", "2", "3", "4", "5", "6", "7", "8", "0", "-1", "4\n"]);
                drop(guest.store.write(&node("state"), state));
            }
        }
    }

    /// Does what a frontend does next, by the backend's state.
    fn go_on(&mut self, areas: &Areas, guest: usize) {
        let Some(guest) = &self.guests[guest] else { return };
        let backend = self.rig.state(&areas.backend);
        let ring = self.random.one_of(&[8, 9, BAD_GRANT]).to_string();
        let next = match backend {
            Some(2) => {
                for (node, value) in [
                    ("ring-ref", ring.as_str()),
                    ("event-channel", "9"),
                    ("protocol", "x86_64-abi"),
                ] {
                    let _ = guest.store.write(&format!("{}/{node}", areas.frontend), value);
                }
                "3"
            }
            Some(4) => "4",
            Some(5) => "6",
            Some(6) => "1",
            _ => return,
        };
        let _ = guest.store.write(&format!("{}/state", areas.frontend), next);
    }

    /// Removes everything, as a toolstack does.
    fn end(&mut self) {
        self.rig.release();
        // Nothing hangs any more, so all requests end.
        for asked in self.asked.drain(..) {
            let _ = asked.join().unwrap();
        }
        for domid in DOMAINS {
            for number in 0..DISKS {
                let areas = Areas::new(domid, xvd(number).0);
                let _ = self.rig.dom0.rm(&areas.frontend);
                let _ = self.rig.dom0.atomically(|span| {
                    span.read(&format!("{}/frontend", areas.backend))?;
                    span.write(&format!("{}/online", areas.backend), "0")?;
                    span.write(&format!("{}/state", areas.backend), "5")
                });
            }
        }
        until("all disks are forgotten", || self.rig.list().is_empty());
        until("nothing is served", || self.rig.plane().serving.is_empty());
        assert_eq!(self.rig.plane().doubles, 0);
        for domid in DOMAINS {
            for number in 0..DISKS {
                let areas = Areas::new(domid, xvd(number).0);
                let state = self.rig.state(&areas.backend);
                assert!(matches!(state, None | Some(6)), "{areas:?}: {state:?}");
                let _ = self.rig.dom0.rm(&areas.backend);
            }
        }
    }
}

#[test]
fn whatever_happens_in_any_order_everything_can_be_removed_and_the_next_disk_works() {
    let rig = Rig::start();
    let guests = DOMAINS.map(|domid| Some(rig.guest(domid)));
    let mut play = Play { rig: &rig, random: Random::new(1), guests, asked: Vec::new() };
    let asked = std::env::var(SEED).ok().map(|seed| seed.parse().expect("a number"));
    for seed in asked.map_or(1..=ROUNDS, |seed: u64| seed..=seed) {
        println!("{SEED}={seed}");
        play.random = Random::new(seed);
        (0..STEPS).for_each(|_| play.step());
        play.end();
        for (number, domid) in DOMAINS.into_iter().enumerate() {
            play.introduce(number);
            let areas = rig.toolstack_disk(domid, xvd(0).0, "null:1G");
            play.guests[number].as_ref().unwrap().connect(&rig, &areas);
        }
        play.end();
    }
}

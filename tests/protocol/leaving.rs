//! Queues that are being disconnected, and what may still arrive for them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use polldisk::backing::Image;
use polldisk::blkif::op;
use polldisk::msg::{Command, ReplaceImage, Report};
use polldisk::sim::{LocalStandIn, SimXen};
use polldisk::units::{DomId, Port};
use polldisk::xen::{Events, Platform, PlatformError};

use crate::scripted::{Bench, Shape, bench, null, rules, storage};

#[test]
fn a_queue_that_is_leaving_takes_no_more_requests() {
    let (mut bench, script) = bench();
    let guest = bench.guest(Shape::mapped(8));
    script.borrow_mut().hung.insert(guest);
    bench.ask(guest, op::READ, 1, 1);
    assert!(bench.settle());
    bench.commands.send(Command::Disconnect(bench.key(guest))).unwrap();
    bench.pass();
    bench.ask(guest, op::READ, 4, 1);
    assert!(bench.settle());
    assert_eq!(script.borrow().taken.len(), 1);
    script.borrow_mut().hung.clear();
    assert!(bench.settle());
    assert!(matches!(bench.report(), Report::Disconnected(key) if key == bench.key(guest)));
    assert_eq!(bench.answers(guest), 1);
}

#[test]
fn a_broken_ring_is_reported_once_and_nothing_more_is_taken_from_it() {
    let (mut bench, script) = bench();
    let guest = bench.guest(Shape::mapped(8));
    let other = bench.guest(Shape::mapped(8));
    script.borrow_mut().hung.insert(guest);
    bench.guests[guest].ring_mut().forge_req_prod(1 << 31);
    bench.ask(other, op::READ, 1, 1);
    assert!(bench.settle());
    assert!(matches!(bench.report(), Report::RingFault(key, _) if key == bench.key(guest)));
    // The guest goes on as if nothing had happened.
    bench.ask(guest, op::READ, 1, 1);
    for _ in 0..10 {
        assert_eq!(bench.answers(other), 1);
        bench.ask(other, op::READ, 1, 1);
        assert!(bench.settle());
    }
    assert!(script.borrow().taken.is_empty());
    assert!(bench.reports.reports.is_empty(), "control was told already");
}

#[test]
fn each_of_several_replacements_is_reported_when_the_queue_is_drained() {
    let (mut bench, script) = bench();
    let guest = bench.guest(Shape::mapped(8));
    let key = bench.key(guest);
    script.borrow_mut().hung.insert(guest);
    bench.ask(guest, op::READ, 1, 1);
    assert!(bench.settle());
    for _ in 0..3 {
        let image = null(true);
        let rules = rules(&image, 0);
        let replace = ReplaceImage { key, rules, image: Arc::new(image) };
        bench.commands.send(Command::ReplaceImage(Box::new(replace))).unwrap();
        bench.pass();
    }
    assert!(bench.settle());
    assert!(bench.reports.reports.is_empty(), "a request is in flight");
    script.borrow_mut().hung.clear();
    assert!(bench.settle());
    let told = bench.reports.reports.try_iter();
    let told = told.filter(|report| matches!(report, Report::ImageReplaced(of) if *of == key));
    assert_eq!(told.count(), 3);
    bench.ask(guest, op::READ, 2, 1);
    assert!(bench.settle());
    assert_eq!(bench.answers(guest), 3);
}

#[test]
fn requests_published_after_an_ejection_are_not_done_on_the_old_medium() {
    let (mut bench, script) = bench();
    let guest = bench.guest(Shape::mapped(8));
    script.borrow_mut().hung.insert(guest);
    bench.ask(guest, op::READ, 2, 1);
    let (key, image) = (bench.key(guest), Image::Empty);
    let replace = ReplaceImage { key, rules: rules(&image, 0), image: Arc::new(image) };
    bench.commands.send(Command::ReplaceImage(Box::new(replace))).unwrap();
    bench.pass();
    bench.ask(guest, op::READ, 2, 1);
    assert!(bench.settle());
    assert_eq!(script.borrow().taken.len(), 2, "the others wait for the next medium");
    script.borrow_mut().hung.clear();
    assert!(bench.settle());
    assert_eq!(bench.statuses(guest), [0, 0, -1, -1]);
}

#[test]
fn a_completion_while_the_worker_falls_asleep_keeps_it_awake() {
    let (mut bench, script) = bench();
    let guest = bench.guest(Shape::mapped(8));
    script.borrow_mut().hung.insert(guest);
    bench.ask(guest, op::READ, 1, 1);
    assert!(bench.settle());
    script.borrow_mut().arming_finds_a_completion = true;
    assert!(!bench.worker.arm().unwrap());
    script.borrow_mut().arming_finds_a_completion = false;
    assert!(bench.worker.arm().unwrap());
}

/// The stand-in, but its event channels report a port once more after it was unbound, as the kernel's
/// list of pending ports does.
#[derive(Clone)]
struct Late(SimXen);

struct LateEvents {
    events: <SimXen as Platform>::Events,
    unbound: Vec<Port>,
}

impl Platform for Late {
    type Store = <SimXen as Platform>::Store;
    type Events = LateEvents;
    type Grants = <SimXen as Platform>::Grants;

    fn open_store(&self) -> Result<Self::Store, PlatformError> {
        self.0.open_store()
    }

    fn open_events(&self) -> Result<LateEvents, PlatformError> {
        Ok(LateEvents { events: self.0.open_events()?, unbound: Vec::new() })
    }

    fn open_grants(&self) -> Result<Self::Grants, PlatformError> {
        self.0.open_grants()
    }
}

impl AsFd for LateEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

impl Events for LateEvents {
    fn bind_interdomain(&mut self, remote: DomId, port: Port) -> io::Result<Port> {
        self.events.bind_interdomain(remote, port)
    }

    fn unbind(&mut self, port: Port) -> io::Result<()> {
        self.unbound.push(port);
        self.events.unbind(port)
    }

    fn notify(&self, port: Port) -> io::Result<()> {
        self.events.notify(port)
    }

    fn pending(&mut self, ports: &mut [Port]) -> io::Result<usize> {
        let late = std::mem::take(&mut self.unbound);
        ports[..late.len()].copy_from_slice(&late);
        Ok(late.len() + self.events.pending(&mut ports[late.len()..])?)
    }

    fn unmask(&mut self, ports: &[Port]) -> io::Result<()> {
        self.events.unmask(ports)
    }
}

#[test]
fn an_event_for_a_port_that_was_let_go_reaches_nobody() {
    let stand_in = LocalStandIn::new().unwrap();
    let mut bench = Bench::on(Late(stand_in.platform()), storage().0, stand_in);
    let [gone, stays] = [(); 2].map(|()| bench.guest(Shape::mapped(8)));
    bench.commands.send(Command::Disconnect(bench.key(gone))).unwrap();
    assert!(bench.settle());
    assert!(matches!(bench.report(), Report::Disconnected(key) if key == bench.key(gone)));
    bench.ask(stays, op::READ, 1, 1);
    assert!(bench.settle() && bench.settle());
    assert_eq!(bench.answers(stays), 1);
}

//! The cost of being woken by storage, counted for a worker that sleeps as soon as it can.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use polldisk::backing::{Image, NullImage};
use polldisk::blkif::op;
use polldisk::engine::{By, Completion, Engine, IoOp, Layer, RegisterBuffers, Submitted, Ticket};
use polldisk::msg::{Command, CommandSender};
use polldisk::park::Doorbell;
use polldisk::sim::blkfront::device::Device;
use polldisk::sim::{LocalStandIn, SimXen};
use polldisk::units::{Bytes, DomId, Port};
use polldisk::xen::shm::{GuestBuf, Registration};
use polldisk::xen::{Events, Platform, PlatformError};

use crate::alone;

/// Reads, one at a time.
const READS: usize = 100;

/// Calls needed to connect and disconnect, and for the event of the first request.
const CALLS_BESIDE: usize = 4;

#[test]
fn storage_wakes_a_worker_once_for_each_request_and_the_guest_not_at_all() {
    let stand_in = LocalStandIn::new().unwrap();
    let mut device = alone::device(&stand_in);
    device.put(op::READ, 0, 4096);
    device.publish().unwrap();
    let guest = Rc::new(RefCell::new(None));
    let seen = Rc::new(Seen::default());
    let engine = Late {
        held: None,
        completed: false,
        bell: Doorbell::new().unwrap(),
        guest: Rc::clone(&guest),
        seen: Rc::clone(&seen),
    };
    let platform = Counted { platform: stand_in.platform(), calls: Arc::default() };
    let calls = Arc::clone(&platform.calls);
    let image = Image::Null(NullImage::new(Bytes(1 << 20), true));
    let mut alone = alone::worker(platform, engine, &device, image, 64);
    *guest.borrow_mut() = Some((device, alone.commands));
    alone.worker.run().unwrap();
    assert_eq!(seen.answers.get(), READS);
    assert_eq!(seen.notifications.get(), 0, "the worker looks at the ring without them");
    assert_eq!(seen.sleeps.get(), READS, "one for each request");
    let [looks, unmasks] = [&calls.pending, &calls.unmask].map(|it| it.load(Ordering::Relaxed));
    assert!(looks <= CALLS_BESIDE, "{looks} looks for events when there were none");
    assert!(unmasks <= CALLS_BESIDE, "{unmasks} unmasks of a port that was not masked");
}

/// Storage that finishes a request when the worker falls asleep, and a guest that asks for the next
/// one in the worker's next pass.
struct Late {
    held: Option<Ticket>,
    completed: bool,
    bell: Doorbell,
    guest: Rc<RefCell<Option<(Device, CommandSender)>>>,
    seen: Rc<Seen>,
}

/// What happened.
#[derive(Default)]
struct Seen {
    answers: Cell<usize>,
    notifications: Cell<usize>,
    sleeps: Cell<usize>,
}

fn count(counter: &Cell<usize>) {
    counter.set(counter.get() + 1);
}

impl RegisterBuffers for Late {
    fn register(&mut self, _memory: GuestBuf) -> io::Result<Registration> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn unregister(&mut self, _registration: Registration) {
        unreachable!("nothing was registered");
    }
}

impl Layer for Late {
    type Target = Image;

    fn submit(&mut self, _: &Image, _: &IoOp<'_>, ticket: Ticket, _: By) -> Submitted {
        self.held = Some(ticket);
        Submitted::Started
    }

    fn kick(&mut self) -> io::Result<()> {
        let mut guest = self.guest.borrow_mut();
        let (device, commands) = guest.as_mut().expect("set before the worker runs");
        if device.next_answer().unwrap().is_none() {
            return Ok(());
        }
        count(&self.seen.answers);
        if self.seen.answers.get() == READS {
            commands.send(Command::Stop).unwrap();
            return Ok(());
        }
        device.put(op::READ, 0, 4096);
        if device.ring_mut().publish() {
            count(&self.seen.notifications);
            device.notify()?;
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        if std::mem::take(&mut self.completed) {
            done.extend(self.held.take().map(|ticket| Completion { ticket, result: 4096 }));
        }
    }

    fn in_flight(&self) -> usize {
        usize::from(self.held.is_some())
    }

    fn arm(&mut self) -> io::Result<bool> {
        if self.held.is_some() {
            count(&self.seen.sleeps);
            self.completed = true;
            self.bell.ring();
        }
        Ok(false)
    }
}

impl Engine for Late {
    fn disarm(&mut self, signalled: bool) {
        if signalled {
            self.bell.silence();
        }
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// The stand-in, with a count of the calls for events.
#[derive(Clone)]
struct Counted {
    platform: SimXen,
    calls: Arc<Calls>,
}

#[derive(Default)]
struct Calls {
    pending: AtomicUsize,
    unmask: AtomicUsize,
}

impl Platform for Counted {
    type Store = <SimXen as Platform>::Store;
    type Events = CountedEvents;
    type Grants = <SimXen as Platform>::Grants;

    fn open_store(&self) -> Result<Self::Store, PlatformError> {
        self.platform.open_store()
    }

    fn open_events(&self) -> Result<CountedEvents, PlatformError> {
        let calls = Arc::clone(&self.calls);
        Ok(CountedEvents { events: self.platform.open_events()?, calls })
    }

    fn open_grants(&self) -> Result<Self::Grants, PlatformError> {
        self.platform.open_grants()
    }
}

struct CountedEvents {
    events: <SimXen as Platform>::Events,
    calls: Arc<Calls>,
}

impl Events for CountedEvents {
    fn bind_interdomain(&mut self, remote: DomId, port: Port) -> io::Result<Port> {
        self.events.bind_interdomain(remote, port)
    }

    fn unbind(&mut self, port: Port) -> io::Result<()> {
        self.events.unbind(port)
    }

    fn notify(&self, port: Port) -> io::Result<()> {
        self.events.notify(port)
    }

    fn pending(&mut self, ports: &mut [Port]) -> io::Result<usize> {
        self.calls.pending.fetch_add(1, Ordering::Relaxed);
        self.events.pending(ports)
    }

    fn unmask(&mut self, ports: &[Port]) -> io::Result<()> {
        self.calls.unmask.fetch_add(1, Ordering::Relaxed);
        self.events.unmask(ports)
    }
}

impl AsFd for CountedEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

//! Which of the program's descriptors are devices of ours.
//!
//! A table by descriptor: asking it about any other descriptor is one load, and that is all that
//! the program's other reads and writes pay.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use crate::evtchn::Evtchn;
use crate::gntdev::Gntdev;
use crate::mappings;

/// Descriptors that can be devices: 1.5 MiB of address space, of which the system backs what is
/// used.
const DESCRIPTORS: usize = 1 << 16;

/// An open device.
#[derive(Debug)]
pub enum Device {
    /// `/dev/xen/gntdev`. Mappings outlive the descriptor, so that they share the device.
    Gntdev {
        /// What the program polls and closes.
        fd: OwnedFd,
        /// The device.
        device: Arc<Mutex<Gntdev>>,
    },
    /// `/dev/xen/evtchn`, which has the descriptor itself.
    Evtchn(Box<Evtchn>),
}

impl Device {
    fn fd(&self) -> c_int {
        match self {
            Device::Gntdev { fd, .. } => fd.as_raw_fd(),
            Device::Evtchn(evtchn) => evtchn.fd(),
        }
    }
}

struct Slot {
    is_open: AtomicBool,
    device: Mutex<Option<Device>>,
}

static SLOTS: [Slot; DESCRIPTORS] =
    [const { Slot { is_open: AtomicBool::new(false), device: Mutex::new(None) } }; DESCRIPTORS];

fn slot(fd: c_int) -> Option<&'static Slot> {
    SLOTS.get(usize::try_from(fd).ok()?)
}

/// Whether a descriptor is a device of ours.
#[inline]
pub fn is_device(fd: c_int) -> bool {
    slot(fd).is_some_and(|slot| slot.is_open.load(Ordering::Acquire))
}

/// Uses a device; `None` where the descriptor is none. Must not wait: it keeps the device's other
/// users waiting.
pub fn with<T>(fd: c_int, body: impl FnOnce(&mut Device) -> T) -> Option<T> {
    lock(&slot(fd)?.device).as_mut().map(body)
}

/// Takes a device in and returns its descriptor.
pub fn insert(device: Device) -> io::Result<c_int> {
    forget_in_children();
    let fd = device.fd();
    let slot = slot(fd).ok_or_else(|| io::Error::from_raw_os_error(libc::EMFILE))?;
    let stale = lock(&slot.device).replace(device);
    // The descriptor was closed behind our back, or belongs to the process that we are a fork of:
    // either way it is not ours to close.
    std::mem::forget(stale);
    slot.is_open.store(true, Ordering::Release);
    Ok(fd)
}

/// Takes a device out. Its descriptor closes when it is dropped, and not before, so that no
/// other thread gets the number while the slot is still full.
pub fn remove(fd: c_int) -> Option<Device> {
    let slot = slot(fd)?;
    slot.is_open.store(false, Ordering::Release);
    lock(&slot.device).take()
}

/// Devices belong to the process that opened them, as granted pages do on Linux: in a child after
/// fork the descriptors are empty shells.
fn forget_in_children() {
    extern "C" fn in_child() {
        SLOTS.iter().for_each(|slot| {
            if slot.is_open.load(Ordering::Relaxed) {
                slot.is_open.store(false, Ordering::Relaxed);
            }
        });
        mappings::forget_all();
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler only stores to atomics, which is allowed in a child of fork.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    });
}

/// What the locks guard is whole even where a thread panicked while it held one.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    static IS_INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, what this thread calls of the C library goes straight there.
#[derive(Debug)]
pub struct Inside(());

impl Inside {
    /// `None` where the thread is inside already.
    pub fn enter() -> Option<Inside> {
        // Not `then_some`: the value that it drops would end the state that it found.
        IS_INSIDE.with(|inside| (!inside.replace(true)).then(|| Inside(())))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        IS_INSIDE.with(|inside| inside.set(false));
    }
}

#[cfg(test)]
mod test {
    use std::fs::File;

    use polldisk::sim::StandIn;

    use super::*;
    use crate::settings::{Settings, Toll};

    fn gntdev(stand_in: &StandIn) -> Device {
        let settings = Settings { folder: stand_in.folder().to_owned(), toll: Toll::None };
        let device = Arc::new(Mutex::new(Gntdev::open(&settings).unwrap()));
        Device::Gntdev { fd: File::open("/dev/null").unwrap().into(), device }
    }

    #[test]
    fn a_descriptor_is_a_device_from_its_opening_to_its_closing() {
        let stand_in = StandIn::start_temporary().unwrap();
        let fd = insert(gntdev(&stand_in)).unwrap();
        assert!(is_device(fd));
        assert!(with(fd, |device| matches!(device, Device::Gntdev { .. })).unwrap());
        drop(remove(fd));
        assert!(!is_device(fd));
        assert!(with(fd, |_| ()).is_none());
    }

    #[test]
    fn other_descriptors_are_none() {
        for fd in [c_int::MIN, -1, 0, 1 << 16, c_int::MAX] {
            assert!(!is_device(fd) && with(fd, |_| ()).is_none() && remove(fd).is_none());
        }
    }

    #[test]
    fn who_is_inside_stays_so_however_often_it_asks() {
        let inside = Inside::enter().unwrap();
        assert!(Inside::enter().is_none());
        assert!(Inside::enter().is_none(), "the first question changed nothing");
        drop(inside);
        assert!(Inside::enter().is_some());
    }
}

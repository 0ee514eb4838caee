//! The program's descriptors that are intercepted devices.
//!
//! They are in a table by descriptor. A lookup is a single load, which is all that reads and writes of
//! other descriptors cost.
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

/// Number of descriptors that can be devices. The table takes 1.5 MiB of address space, but the system backs
/// only the used part with memory.
const DESCRIPTORS: usize = 1 << 16;

/// An open device.
#[derive(Debug)]
pub enum Device {
    /// `/dev/xen/gntdev`. Mappings outlive the descriptor, so they share the device.
    Gntdev {
        /// The program's descriptor.
        fd: OwnedFd,
        /// The device.
        device: Arc<Mutex<Gntdev>>,
    },
    /// `/dev/xen/evtchn`, which holds the descriptor itself.
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

/// Whether a descriptor is an intercepted device.
#[inline]
pub fn is_device(fd: c_int) -> bool {
    slot(fd).is_some_and(|slot| slot.is_open.load(Ordering::Acquire))
}

/// Uses a device; `None` if the descriptor is not one. `body` must not wait, since the device is locked.
pub fn with<T>(fd: c_int, body: impl FnOnce(&mut Device) -> T) -> Option<T> {
    lock(&slot(fd)?.device).as_mut().map(body)
}

/// Adds a device and returns its descriptor.
pub fn insert(device: Device) -> io::Result<c_int> {
    forget_in_children();
    let fd = device.fd();
    let slot = slot(fd).ok_or_else(|| io::Error::from_raw_os_error(libc::EMFILE))?;
    let stale = lock(&slot.device).replace(device);
    // The old descriptor was closed by other means, or belongs to the parent process. In neither case may it
    // be closed here.
    std::mem::forget(stale);
    slot.is_open.store(true, Ordering::Release);
    Ok(fd)
}

/// Removes a device. Its descriptor closes only when the device is dropped, so that no other thread gets
/// the number while the slot is still full.
pub fn remove(fd: c_int) -> Option<Device> {
    let slot = slot(fd)?;
    slot.is_open.store(false, Ordering::Release);
    lock(&slot.device).take()
}

/// Forgets the devices in a child after fork: they belong to the process that opened them, as granted pages
/// do on Linux.
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

/// Locks a mutex, even if a thread panicked while it held the lock, since the data stays valid.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    static IS_INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// While this value lives, the thread's calls go straight to the C library.
#[derive(Debug)]
pub struct Inside(());

impl Inside {
    /// `None` if the thread already has such a value.
    pub fn enter() -> Option<Inside> {
        // Not `then_some`: if the thread is inside already, it would drop the value, which ends that state.
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
    fn other_descriptors_are_not_devices() {
        for fd in [c_int::MIN, -1, 0, 1 << 16, c_int::MAX] {
            assert!(!is_device(fd) && with(fd, |_| ()).is_none() && remove(fd).is_none());
        }
    }

    #[test]
    fn entering_again_does_not_end_the_first_entry() {
        let inside = Inside::enter().unwrap();
        assert!(Inside::enter().is_none());
        assert!(Inside::enter().is_none(), "the first refusal changed nothing");
        drop(inside);
        assert!(Inside::enter().is_some());
    }
}

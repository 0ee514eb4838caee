//! The functions that programs call instead of the C library's.
//!
//! Each handles calls on intercepted devices and passes all others on. `open`, `ioctl` and `fcntl` are
//! variadic in C. With fixed arguments they use the same registers in the calling convention of x86_64
//! Linux; an argument that the program did not pass is passed on but never used.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_ulong, c_void};
use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use libc::{mode_t, off_t, size_t, ssize_t};

use crate::evtchn::{Evtchn, Taken};
use crate::gntdev::{self, Gntdev, MapRequest};
use crate::handles::{self, Device, Inside};
use crate::settings::Settings;
use crate::{mappings, next};

const DEVICES: &[u8] = b"/dev/xen/";

/// What to open instead of a file of the program.
enum Opened {
    /// An intercepted device, or the error of opening it.
    Device(io::Result<c_int>),
    /// This file instead. It answers every ioctl with ENOTTY.
    Instead(&'static CStr),
    Other,
}

/// # Safety
/// `path` must be a C string, or null.
unsafe fn open_device(path: *const c_char, flags: c_int) -> Opened {
    if path.is_null() {
        return Opened::Other;
    }
    // SAFETY: the caller's promise.
    let path = unsafe { CStr::from_ptr(path) };
    let Some(name) = path.to_bytes().strip_prefix(DEVICES) else { return Opened::Other };
    let Some(_inside) = Inside::enter() else { return Opened::Other };
    let Some(settings) = Settings::get() else { return Opened::Other };
    match name {
        b"gntdev" => Opened::Device(open_gntdev(settings)),
        b"evtchn" => Opened::Device(open_evtchn(settings, flags)),
        // For hypercalls. libxenctrl, libxenforeignmemory and libxendevicemodel open it at their start.
        b"privcmd" => Opened::Instead(c"/dev/null"),
        _ => Opened::Other,
    }
}

fn open_gntdev(settings: &Settings) -> io::Result<c_int> {
    let device = Arc::new(Mutex::new(Gntdev::open(settings)?));
    let fd = std::fs::File::open("/dev/null")?.into();
    handles::insert(Device::Gntdev { fd, device })
}

fn open_evtchn(settings: &Settings, flags: c_int) -> io::Result<c_int> {
    handles::insert(Device::Evtchn(Box::new(Evtchn::open(settings, flags)?)))
}

macro_rules! open {
    ($($name:ident($($folder:ident)?; $($mode:ident)?);)*) => { $(
        /// # Safety
        /// The same as for the C library's function.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            $($folder: c_int,)?
            path: *const c_char,
            flags: c_int,
            $($mode: mode_t,)?
        ) -> c_int {
            // SAFETY: the program passes what the C library's function takes.
            unsafe {
                match open_device(path, flags) {
                    Opened::Device(opened) => result(opened),
                    Opened::Instead(path) => {
                        next::$name($($folder,)? path.as_ptr(), flags, $($mode,)?)
                    }
                    Opened::Other => next::$name($($folder,)? path, flags, $($mode,)?),
                }
            }
        }
    )* };
}

open! {
    open(; mode);
    open64(; mode);
    __open_2(;);
    __open64_2(;);
    openat(folder; mode);
    openat64(folder; mode);
}

/// # Safety
/// The same as for the C library's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    if let Some(_inside) = enter(fd) {
        drop(handles::remove(fd));
        return 0;
    }
    // SAFETY: passed on as it came.
    unsafe { next::close(fd) }
}

/// # Safety
/// The same as for the C library's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn read(fd: c_int, buffer: *mut c_void, len: size_t) -> ssize_t {
    // SAFETY: passed on as it came.
    unsafe {
        match read_device(fd, buffer, len) {
            Some(read) => bytes(read),
            None => next::read(fd, buffer, len),
        }
    }
}

/// `read` in programs built with `_FORTIFY_SOURCE`.
///
/// # Safety
/// The same as for the C library's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __read_chk(
    fd: c_int,
    buffer: *mut c_void,
    len: size_t,
    room: size_t,
) -> ssize_t {
    // SAFETY: passed on as it came; the C library checks that `len` is at most `room`.
    unsafe {
        match read_device(fd, buffer, len.min(room)) {
            Some(read) => bytes(read),
            None => next::__read_chk(fd, buffer, len, room),
        }
    }
}

/// Reads from an event channel device; `None` if the descriptor is not one.
///
/// # Safety
/// `buffer` must be valid for `len` bytes.
unsafe fn read_device(fd: c_int, buffer: *mut c_void, len: size_t) -> Option<io::Result<usize>> {
    let _inside = enter(fd)?;
    let buffer = if len == 0 { NonNull::dangling().as_ptr() } else { buffer.cast::<u8>() };
    // SAFETY: the caller's promise; nobody else uses the program's buffer during the call.
    let buffer = unsafe { std::slice::from_raw_parts_mut(buffer, len) };
    loop {
        let taken = handles::with(fd, |device| match device {
            Device::Evtchn(evtchn) => Some(evtchn.read(buffer)),
            Device::Gntdev { .. } => None,
        });
        match taken?? {
            Ok(Taken::Bytes(bytes)) => return Some(Ok(bytes)),
            Ok(Taken::Wait) => {}
            Err(error) => return Some(Err(error)),
        }
        if let Err(error) = wait_readable(fd) {
            return Some(Err(error));
        }
    }
}

/// Waits until a descriptor is readable. A signal ends the wait with EINTR, as it ends a read.
fn wait_readable(fd: c_int) -> io::Result<()> {
    let mut polled = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, which outlives the call.
    match unsafe { libc::poll(&raw mut polled, 1, -1) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// # Safety
/// The same as for the C library's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(fd: c_int, buffer: *const c_void, len: size_t) -> ssize_t {
    if let Some(_inside) = enter(fd) {
        let from = if len == 0 { NonNull::dangling().as_ptr() } else { buffer.cast_mut().cast() };
        // SAFETY: the program's buffer is valid for `len` bytes.
        let numbers = unsafe { std::slice::from_raw_parts(from, len) };
        let written = handles::with(fd, |device| match device {
            Device::Evtchn(evtchn) => Some(evtchn.write(numbers)),
            Device::Gntdev { .. } => None,
        });
        if let Some(Some(written)) = written {
            return bytes(Ok(written));
        }
    }
    // SAFETY: passed on as it came.
    unsafe { next::write(fd, buffer, len) }
}

/// # Safety
/// The same as for the C library's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, number: c_ulong, argument: *mut c_void) -> c_int {
    if let Some(_inside) = enter(fd) {
        // SAFETY: the program passes what the device's ioctl takes.
        let done = handles::with(fd, |device| unsafe {
            match device {
                Device::Gntdev { device, .. } => {
                    handles::lock(device).ioctl(number, argument).map(|()| 0)
                }
                Device::Evtchn(evtchn) => evtchn.ioctl(number, argument),
            }
        });
        if let Some(done) = done {
            return result(done);
        }
    }
    // SAFETY: passed on as it came.
    unsafe { next::ioctl(fd, number, argument) }
}

/// Handles fcntl's F_GETFL and F_SETFL for an event channel device; `None` for anything else. The descriptor
/// must stay non-blocking, since it is shared with the processes that signal it, so the program's flags are
/// kept separately.
fn status_flags(fd: c_int, command: c_int, argument: *mut c_void) -> Option<c_int> {
    if command != libc::F_GETFL && command != libc::F_SETFL {
        return None;
    }
    let _inside = enter(fd)?;
    handles::with(fd, |device| match device {
        Device::Evtchn(evtchn) if command == libc::F_GETFL => Some(evtchn.flags()),
        Device::Evtchn(evtchn) => {
            // The argument is an int.
            evtchn.set_flags(c_int::try_from(argument.addr()).unwrap_or(0));
            Some(0)
        }
        Device::Gntdev { .. } => None,
    })?
}

/// # Safety
/// The same as for the C library's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fcntl(fd: c_int, command: c_int, argument: *mut c_void) -> c_int {
    match status_flags(fd, command, argument) {
        Some(result) => result,
        // SAFETY: passed on as it came.
        None => unsafe { next::fcntl(fd, command, argument) },
    }
}

/// # Safety
/// The same as for the C library's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fcntl64(fd: c_int, command: c_int, argument: *mut c_void) -> c_int {
    match status_flags(fd, command, argument) {
        Some(result) => result,
        // SAFETY: passed on as it came.
        None => unsafe { next::fcntl64(fd, command, argument) },
    }
}

macro_rules! mmap {
    ($($name:ident)*) => { $(
        /// # Safety
        /// The same as for the C library's function.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            place: *mut c_void,
            len: size_t,
            protection: c_int,
            flags: c_int,
            fd: c_int,
            offset: off_t,
        ) -> *mut c_void {
            let request = || MapRequest { len, protection, flags, index: offset.cast_unsigned() };
            match map_device(fd, request) {
                Some(Ok(address)) => address,
                Some(Err(error)) => {
                    failed(&error);
                    libc::MAP_FAILED
                }
                // SAFETY: passed on as it came.
                None => unsafe { next::$name(place, len, protection, flags, fd, offset) },
            }
        }
    )* };
}

mmap! { mmap mmap64 }

/// Maps granted pages; `None` if the descriptor is not a grant device.
fn map_device(fd: c_int, request: impl FnOnce() -> MapRequest) -> Option<io::Result<*mut c_void>> {
    let _inside = enter(fd)?;
    let device = handles::with(fd, |device| match device {
        Device::Gntdev { device, .. } => Some(Arc::clone(device)),
        Device::Evtchn(_) => None,
    })??;
    Some(gntdev::mmap(&device, &request()))
}

/// # Safety
/// The same as for the C library's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn munmap(place: *mut c_void, len: size_t) -> c_int {
    if mappings::exist()
        && let Some(_inside) = Inside::enter()
    {
        match gntdev::munmap(place, len) {
            Ok(true) => return 0,
            Ok(false) => {}
            Err(error) => return failed(&error),
        }
    }
    // SAFETY: passed on as it came.
    unsafe { next::munmap(place, len) }
}

/// `Some` if the descriptor is an intercepted device and the call is the program's, not this library's.
#[inline]
fn enter(fd: c_int) -> Option<Inside> {
    if handles::is_device(fd) { Inside::enter() } else { None }
}

fn result(done: io::Result<c_int>) -> c_int {
    done.unwrap_or_else(|error| failed(&error))
}

fn bytes(done: io::Result<usize>) -> ssize_t {
    match done {
        Ok(bytes) => bytes.cast_signed(),
        Err(error) => {
            failed(&error);
            -1
        }
    }
}

/// Sets errno and returns -1.
fn failed(error: &io::Error) -> c_int {
    let errno = error.raw_os_error().unwrap_or(match error.kind() {
        io::ErrorKind::InvalidInput => libc::EINVAL,
        _ => libc::EIO,
    });
    // SAFETY: the calling thread's own errno.
    unsafe { *libc::__errno_location() = errno };
    -1
}

//! Pages of this domain granted to another through `/dev/xen/gntalloc`, as a frontend in user space needs
//! them.
//!
//! An ioctl allocates zeroed pages with their references, and an mmap of the offset it returns makes them
//! usable. Closing the device revokes the grants; the kernel frees a page once nobody has it mapped.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use crate::limits::PAGES_PER_ALLOC;
use crate::units::{DomId, GrantRef};
use crate::xen::abi;
use crate::xen::shm::{GuestPages, PAGE_BYTES};

/// An open gntalloc. Its pages and grants are valid until it is dropped.
#[derive(Debug)]
pub struct Gntalloc {
    device: File,
    /// First byte and length of each range.
    mappings: RefCell<Vec<(NonNull<u8>, usize)>>,
}

impl Gntalloc {
    /// Takes the opened device.
    pub fn new(device: File) -> Gntalloc {
        Gntalloc { device, mappings: RefCell::default() }
    }

    /// Allocates 1 to [`PAGES_PER_ALLOC`] pages that `to` may map and write. ENOSPC: the module's
    /// limit is reached. The range must not be given to a `Grants`, nor be used after this device is dropped.
    pub fn alloc(&self, to: DomId, count: usize) -> io::Result<(GuestPages, Vec<GrantRef>)> {
        if count == 0 || count > PAGES_PER_ALLOC {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut request = abi::GntallocAllocGref {
            domid: to.raw(),
            flags: abi::GNTALLOC_FLAG_WRITABLE,
            count: u32::try_from(count).map_err(io::Error::other)?,
            index: 0,
            refs: [0; PAGES_PER_ALLOC],
        };
        let fd = self.device.as_raw_fd();
        // SAFETY: the kernel writes `count` references, for which the request has room.
        if unsafe { libc::ioctl(fd, abi::IOCTL_GNTALLOC_ALLOC_GREF, &raw mut request) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let (len, protection) = (count * PAGE_BYTES, libc::PROT_READ | libc::PROT_WRITE);
        let offset = libc::off_t::try_from(request.index).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, offset)
        };
        let base = match NonNull::new(base.cast::<u8>()) {
            Some(address) if base != libc::MAP_FAILED => address,
            _ => return Err(io::Error::last_os_error()),
        };
        self.mappings.borrow_mut().push((base, len));
        let refs = request.refs[..count].iter().copied().map(GrantRef).collect();
        // SAFETY: mapped just now, writable, until drop.
        Ok((unsafe { GuestPages::from_raw(base, count, request.index) }, refs))
    }
}

impl Drop for Gntalloc {
    fn drop(&mut self) {
        for (base, len) in self.mappings.get_mut() {
            // SAFETY: mapped by `alloc`, whose caller uses nothing of it any more.
            unsafe { libc::munmap(base.as_ptr().cast(), *len) };
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_device_of_another_kind_refuses() {
        let gntalloc = Gntalloc::new(File::open("/dev/null").unwrap());
        let errno = |count| gntalloc.alloc(DomId::DOM0, count).unwrap_err().raw_os_error();
        assert_eq!(errno(1), Some(libc::ENOTTY));
        assert_eq!(errno(PAGES_PER_ALLOC), Some(libc::ENOTTY));
        assert_eq!((errno(0), errno(PAGES_PER_ALLOC + 1)), (None, None), "the device is not asked");
    }
}

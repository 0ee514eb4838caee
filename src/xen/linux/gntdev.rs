//! Grants through `/dev/xen/gntdev`.
//!
//! Mapping a batch takes an ioctl, which reserves a range of the device's offsets, and an mmap of that
//! range, which calls the hypervisor. The mmap fails with EINVAL if any reference of the batch is bad. Then
//! the range must be given back by another ioctl, or it counts against the module's limit for as long as the
//! device is open.
#![allow(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use rustc_hash::FxHashMap;

use crate::limits::{GRANTS_PER_MAP_BATCH, SEGMENTS_PER_COPY_BATCH};
use crate::units::{DomId, GrantRef};
use crate::xen::abi::{self, GntdevCopySegment, GntdevCopySide, GntdevForeign, GntdevGrantRef};
use crate::xen::shm::{GuestPages, PAGE_BYTES};
use crate::xen::{CopyDirection, GrantCopy, Grants, PageAccess};

/// An open gntdev. It allocates nothing after its first calls.
pub struct Gntdev {
    device: File,
    request: Box<abi::GntdevMapGrantRef>,
    segments: Vec<GntdevCopySegment>,
    /// What is mapped, by the device's offset.
    mappings: FxHashMap<u64, Mapping>,
}

#[derive(Clone, Copy)]
struct Mapping {
    base: NonNull<u8>,
    count: usize,
}

impl Gntdev {
    /// Takes the opened device.
    pub fn new(device: File) -> Gntdev {
        let request = abi::GntdevMapGrantRef {
            count: 0,
            pad: 0,
            index: 0,
            refs: [GntdevGrantRef::default(); GRANTS_PER_MAP_BATCH],
        };
        Gntdev {
            device,
            request: Box::new(request),
            segments: Vec::with_capacity(SEGMENTS_PER_COPY_BATCH),
            mappings: FxHashMap::default(),
        }
    }

    /// Reserves a range for a batch; returns its offset in the device.
    fn reserve(&mut self, domid: DomId, refs: &[GrantRef]) -> io::Result<u64> {
        if refs.is_empty() || refs.len() > GRANTS_PER_MAP_BATCH {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.request.count = u32::try_from(refs.len()).map_err(io::Error::other)?;
        for (slot, gref) in self.request.refs.iter_mut().zip(refs) {
            *slot = GntdevGrantRef { domid: u32::from(domid.raw()), gref: gref.0 };
        }
        let request = std::ptr::from_mut(&mut *self.request);
        // SAFETY: `request` holds `count` references, count <= GRANTS_PER_MAP_BATCH.
        unsafe { self.ioctl(abi::IOCTL_GNTDEV_MAP_GRANT_REF, request) }?;
        Ok(self.request.index)
    }

    /// Gives a reserved range back, which must not be mapped any more.
    fn give_back(&self, index: u64, count: usize) -> io::Result<()> {
        let count = u32::try_from(count).map_err(io::Error::other)?;
        let mut request = abi::GntdevUnmapGrantRef { index, count, pad: 0 };
        // SAFETY: the ioctl reads the request.
        unsafe { self.ioctl(abi::IOCTL_GNTDEV_UNMAP_GRANT_REF, &raw mut request) }
    }

    fn mmap(&self, index: u64, count: usize, access: PageAccess) -> io::Result<NonNull<u8>> {
        let protection = match access {
            PageAccess::ReadOnly => libc::PROT_READ,
            PageAccess::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        let offset = libc::off_t::try_from(index).map_err(io::Error::other)?;
        let (len, fd) = (count * PAGE_BYTES, self.device.as_raw_fd());
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, offset)
        };
        match NonNull::new(base.cast::<u8>()) {
            Some(address) if base != libc::MAP_FAILED => Ok(address),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Copies at most [`SEGMENTS_PER_COPY_BATCH`] segments by one ioctl. On an error none was copied.
    fn copy_batch(&mut self, domid: DomId, segments: &mut [GrantCopy]) -> io::Result<()> {
        self.segments.clear();
        self.segments.extend(segments.iter().map(|segment| to_kernel(domid, segment)));
        let mut request = abi::GntdevGrantCopy {
            count: u32::try_from(segments.len()).map_err(io::Error::other)?,
            segments: self.segments.as_mut_ptr(),
        };
        // SAFETY: `segments` holds `count` of them, and each one's local side is valid for its
        // length (GrantCopy).
        unsafe { self.ioctl(abi::IOCTL_GNTDEV_GRANT_COPY, &raw mut request) }?;
        for (segment, done) in segments.iter_mut().zip(&self.segments) {
            segment.status = done.status;
        }
        Ok(())
    }

    /// # Safety
    /// `argument` must be what the ioctl `number` takes.
    unsafe fn ioctl<T>(&self, number: libc::Ioctl, argument: *mut T) -> io::Result<()> {
        // SAFETY: the caller's promise; the device is open.
        match unsafe { libc::ioctl(self.device.as_raw_fd(), number, argument) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Grants for Gntdev {
    /// Maps at most [`GRANTS_PER_MAP_BATCH`] references.
    fn map(
        &mut self,
        domid: DomId,
        refs: &[GrantRef],
        access: PageAccess,
    ) -> io::Result<GuestPages> {
        let index = self.reserve(domid, refs)?;
        let base = match self.mmap(index, refs.len(), access) {
            Ok(base) => base,
            Err(error) => {
                self.give_back(index, refs.len())?;
                return Err(error);
            }
        };
        self.mappings.insert(index, Mapping { base, count: refs.len() });
        // SAFETY: the mmap succeeded, so every page is mapped, until `unmap` or drop.
        Ok(unsafe { GuestPages::from_raw(base, refs.len(), index) })
    }

    fn unmap(&mut self, pages: GuestPages) -> io::Result<()> {
        let index = pages.cookie();
        let mapping = self.mappings.remove(&index).ok_or(io::ErrorKind::InvalidInput)?;
        mapping.munmap()?;
        self.give_back(index, mapping.count)
    }

    /// Copies [`SEGMENTS_PER_COPY_BATCH`] segments per system call. If a later batch fails as a whole, its
    /// segments' status is `GNTST_general_error`.
    fn copy(&mut self, domid: DomId, segments: &mut [GrantCopy]) -> io::Result<()> {
        if segments.iter().any(crosses_page) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut batches = segments.chunks_mut(SEGMENTS_PER_COPY_BATCH);
        let Some(first) = batches.next() else { return Ok(()) };
        self.copy_batch(domid, first)?;
        for batch in batches {
            if self.copy_batch(domid, batch).is_err() {
                batch.iter_mut().for_each(|segment| segment.status = abi::GNTST_GENERAL_ERROR);
            }
        }
        Ok(())
    }
}

/// Whether a segment would make the kernel refuse its whole batch.
fn crosses_page(segment: &GrantCopy) -> bool {
    usize::from(segment.offset) + usize::from(segment.len) > PAGE_BYTES
}

fn to_kernel(domid: DomId, segment: &GrantCopy) -> GntdevCopySegment {
    let local = GntdevCopySide { local: segment.local };
    let foreign =
        GntdevForeign { gref: segment.gref.0, offset: segment.offset, domid: domid.raw() };
    let foreign = GntdevCopySide { foreign };
    let (source, dest, flags) = match segment.direction {
        CopyDirection::FromGuest => (foreign, local, abi::GNTCOPY_SOURCE_GREF),
        CopyDirection::ToGuest => (local, foreign, abi::GNTCOPY_DEST_GREF),
    };
    // The kernel sets each segment's status; one that it skipped must not look copied.
    let status = abi::GNTST_GENERAL_ERROR;
    GntdevCopySegment { source, dest, len: segment.len, flags, status }
}

impl Mapping {
    fn munmap(self) -> io::Result<()> {
        // SAFETY: mapped by `map`; after `unmap`, or when the device is dropped, nobody uses the pages.
        match unsafe { libc::munmap(self.base.as_ptr().cast(), self.count * PAGE_BYTES) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Unmaps everything: closing the device would not, because each mapping keeps it open.
impl Drop for Gntdev {
    fn drop(&mut self) {
        for mapping in self.mappings.values() {
            // Unmapping our own mapping can't fail; closing the device gives its range back.
            let _ = mapping.munmap();
        }
    }
}

impl fmt::Debug for Gntdev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gntdev").field("mappings", &self.mappings.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod test {
    use super::*;

    /// A device that knows no ioctl.
    fn no_device() -> Gntdev {
        Gntdev::new(File::open("/dev/null").unwrap())
    }

    fn segment(direction: CopyDirection, local: &mut [u8]) -> GrantCopy {
        let len = u16::try_from(local.len()).unwrap();
        let (gref, local) = (GrantRef(77), local.as_mut_ptr());
        GrantCopy { gref, offset: 8, len, local, direction, status: 0 }
    }

    #[test]
    fn a_copy_names_the_granted_side_by_its_flag() {
        let mut local = [0; 16];
        let domid = DomId::try_from(5).unwrap();
        let write = to_kernel(domid, &segment(CopyDirection::FromGuest, &mut local));
        let read = to_kernel(domid, &segment(CopyDirection::ToGuest, &mut local));
        assert_eq!((write.flags, read.flags), (1, 2));
        assert_eq!((write.len, write.status), (16, abi::GNTST_GENERAL_ERROR));
        // SAFETY: to_kernel filled these sides with these variants.
        let (foreign, ours) = unsafe { (write.source.foreign, read.source.local) };
        assert_eq!((foreign.gref, foreign.offset, foreign.domid), (77, 8, 5));
        assert_eq!(ours, local.as_mut_ptr());
    }

    #[test]
    fn what_the_kernel_would_refuse_is_not_sent_to_it() {
        let mut gntdev = no_device();
        let mut local = [0; 4089];
        let mut segments = [segment(CopyDirection::FromGuest, &mut local)];
        let refused = gntdev.copy(DomId::DOM0, &mut segments).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        for count in [0, GRANTS_PER_MAP_BATCH + 1] {
            let refs = vec![GrantRef(8); count];
            let refused = gntdev.map(DomId::DOM0, &refs, PageAccess::ReadOnly).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn system_errors_are_passed_on() {
        let mut gntdev = no_device();
        let mut local = [0; 16];
        let mut segments = [segment(CopyDirection::FromGuest, &mut local)];
        let refused = gntdev.copy(DomId::DOM0, &mut segments).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ENOTTY));
        let refused = gntdev.map(DomId::DOM0, &[GrantRef(8)], PageAccess::ReadOnly).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ENOTTY));
    }
}

//! Shared memory of the stand-in: a guest's pages with its grant table, and what lies in them.
//!
//! A guest is one memfd. Backends and the hypervisor map the whole of it; only [`SharedFile`] and
//! [`GuestMemory`] touch it, through atomics and through the types of `xen::shm`.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use crate::limits::{SIM_GRANT_ENTRIES, SIM_GUEST_PAGES_MAX};
use crate::units::GrantRef;
use crate::xen::abi::GrantEntryV1;
use crate::xen::shm::{GuestBuf, GuestPages, PAGE_BYTES, PAGE_LEN, SharedPage};
use crate::xen::{CopyDirection, GrantCopy, PageAccess};

/// A guest frame number: a page of a guest, counted from its first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gfn(pub u32);

/// A memfd mapped here as a whole. Its offsets are our own constants, so a wrong one panics.
#[derive(Debug)]
pub struct SharedFile {
    base: NonNull<u8>,
    len: usize,
    file: OwnedFd,
}

// SAFETY: the mapping belongs to the process and lives until drop; shared bytes are reached
// through atomics, or through GuestBuf and SharedPage, whose accesses tolerate other writers.
unsafe impl Send for SharedFile {}
// SAFETY: as above.
unsafe impl Sync for SharedFile {}

impl SharedFile {
    /// Makes a file of `len` zero bytes; `name` shows in /proc/PID/fd.
    pub fn create(name: &CStr, len: usize) -> io::Result<SharedFile> {
        // SAFETY: `name` is a C string; a negative result is an error.
        let raw = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: freshly made and owned by nobody else.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(raw) });
        file.set_len(len as u64)?;
        SharedFile::map(file.into(), len)
    }

    /// Maps a file that another process made.
    pub fn open(file: OwnedFd) -> io::Result<SharedFile> {
        let file = File::from(file);
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        SharedFile::map(file.into(), len)
    }

    fn map(file: OwnedFd, len: usize) -> io::Result<SharedFile> {
        let base = map_file(std::ptr::null_mut(), &file, 0, len, PageAccess::ReadWrite, 0)?;
        Ok(SharedFile { base, len, file })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The byte at an offset.
    pub fn byte(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: `at` checked range and alignment; other processes use atomics too; the mapping
        // outlives the borrow of self.
        unsafe { AtomicU8::from_ptr(self.at(offset)) }
    }

    /// The 32-bit word at an aligned offset.
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as in `byte`.
        unsafe { AtomicU32::from_ptr(self.at(offset)) }
    }

    /// The 64-bit word at an aligned offset.
    pub fn double_word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as in `byte`.
        unsafe { AtomicU64::from_ptr(self.at(offset)) }
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset.is_multiple_of(align_of::<T>()) && offset <= self.len - size_of::<T>());
        // SAFETY: inside the mapping, checked above.
        unsafe { self.base.as_ptr().add(offset).cast() }
    }
}

impl AsFd for SharedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; nothing borrows from it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

// What a guest's file holds. Frame f is at PAGES_AT + f pages.
const ALIVE_AT: usize = 0;
const TABLE_AT: usize = PAGE_BYTES;
const TABLE_BYTES: usize = SIM_GRANT_ENTRIES as usize * size_of::<GrantEntryV1>();
const FAULTS_AT: usize = TABLE_AT + TABLE_BYTES;
const PAGES_AT: usize = (FAULTS_AT + SIM_GRANT_ENTRIES as usize).next_multiple_of(PAGE_BYTES);

/// A guest's memory: its pages and its grant table.
#[derive(Debug)]
pub struct GuestMemory {
    shared: SharedFile,
    pages: u32,
}

impl GuestMemory {
    /// Makes the memory of a guest that lives.
    pub fn create(pages: u32) -> io::Result<GuestMemory> {
        if pages == 0 || pages > SIM_GUEST_PAGES_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let shared = SharedFile::create(c"guest memory", PAGES_AT + pages as usize * PAGE_BYTES)?;
        shared.word(ALIVE_AT).store(1, Ordering::Release);
        Ok(GuestMemory { shared, pages })
    }

    /// Maps the memory of a guest that the hypervisor made.
    pub fn open(file: OwnedFd) -> io::Result<GuestMemory> {
        let shared = SharedFile::open(file)?;
        let bytes = shared.len().checked_sub(PAGES_AT).ok_or(io::ErrorKind::InvalidData)?;
        let pages = u32::try_from(bytes / PAGE_BYTES).map_err(io::Error::other)?;
        Ok(GuestMemory { shared, pages })
    }

    /// Whether the guest still exists. Who kept the memory of one that does not asks the
    /// hypervisor again: a new guest may have its domid.
    pub fn is_alive(&self) -> bool {
        self.shared.word(ALIVE_AT).load(Ordering::Acquire) != 0
    }

    /// The guest is no more.
    pub fn set_dead(&self) {
        self.shared.word(ALIVE_AT).store(0, Ordering::Release);
    }

    /// How many pages.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// An entry of the grant table, as [`GrantEntryV1::to_word`] packs it.
    pub fn entry(&self, gref: GrantRef) -> Option<&AtomicU64> {
        let index = gref.0 as usize;
        (gref.0 < SIM_GRANT_ENTRIES)
            .then(|| self.shared.double_word(TABLE_AT + index * size_of::<GrantEntryV1>()))
    }

    /// The faults ordered for a reference; `grants` knows their meaning.
    pub fn fault(&self, gref: GrantRef) -> Option<&AtomicU8> {
        let index = gref.0 as usize;
        (gref.0 < SIM_GRANT_ENTRIES).then(|| self.shared.byte(FAULTS_AT + index))
    }

    /// A page. It is valid while this mapping is.
    #[inline]
    pub fn page(&self, gfn: Gfn) -> Option<GuestBuf> {
        let address = self.address(gfn, 1)?;
        // SAFETY: the page is mapped until self is dropped, and callers must not use it after that.
        Some(unsafe { GuestBuf::from_raw(address, PAGE_LEN) })
    }

    /// Consecutive pages, seen as words. They are valid while this mapping is.
    pub fn shared_pages(&self, first: Gfn, count: u32) -> Option<SharedPage> {
        let address = self.address(first, count)?;
        // SAFETY: as in `page`.
        Some(unsafe { SharedPage::from_raw(address, count as usize * PAGE_BYTES) })
    }

    /// Consecutive pages as one range, valid while this mapping is.
    pub fn guest_pages(&self, first: Gfn, count: u32) -> Option<GuestPages> {
        let address = self.address(first, count)?;
        // SAFETY: as in `page`.
        Some(unsafe { GuestPages::from_raw(address, count as usize, 0) })
    }

    #[inline]
    fn address(&self, first: Gfn, count: u32) -> Option<NonNull<u8>> {
        let inside = first.0.checked_add(count).is_some_and(|end| end <= self.pages);
        // SAFETY: inside the mapping, just checked.
        inside.then(|| unsafe { self.shared.base.add(PAGES_AT + first.0 as usize * PAGE_BYTES) })
    }

    /// Maps these frames as one contiguous range.
    pub fn map_frames(&self, frames: &[u32], access: PageAccess) -> io::Result<MappedRange> {
        let range = MappedRange::reserve(frames.len() * PAGE_BYTES)?;
        let mut done = 0;
        for run in frames.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            let count = u32::try_from(run.len()).map_err(io::Error::other)?;
            let first = run.first().copied().map(Gfn).ok_or(io::ErrorKind::InvalidInput)?;
            self.address(first, count).ok_or(io::ErrorKind::InvalidInput)?;
            let offset = PAGES_AT + first.0 as usize * PAGE_BYTES;
            let bytes = run.len() * PAGE_BYTES;
            // SAFETY: the runs together are as long as the range.
            let place = unsafe { range.base.as_ptr().add(done) };
            map_file(place, &self.shared.file, offset, bytes, access, libc::MAP_FIXED)?;
            done += bytes;
        }
        Ok(range)
    }
}

impl AsFd for GuestMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.as_fd()
    }
}

/// Frames of a guest, mapped as one range by [`GuestMemory::map_frames`]; unmapped on drop.
#[derive(Debug)]
pub struct MappedRange {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: address space belongs to the process, not to a thread.
unsafe impl Send for MappedRange {}

impl MappedRange {
    /// Address space that nobody can touch yet.
    fn reserve(len: usize) -> io::Result<MappedRange> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
        Ok(MappedRange { base: mapped(base)?, len })
    }

    /// The range as its user sees it. While it exists, the range stays mapped.
    pub fn pages(&self, cookie: u64) -> GuestPages {
        // SAFETY: `map_frames` mapped every page; the range goes only when the GuestPages, which
        // is not Clone, was given back to `unmap`, or the Grants that holds it is closed.
        unsafe { GuestPages::from_raw(self.base, self.len / PAGE_BYTES, cookie) }
    }
}

impl Drop for MappedRange {
    fn drop(&mut self) {
        // SAFETY: the range is ours, and nothing uses it any more (`pages`).
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Copies one segment between its local memory and `page`, the granted page that it names.
/// The segment's offset and length must have been checked against the page.
#[inline]
pub fn copy_segment(segment: &GrantCopy, page: GuestBuf) {
    let Some(granted) = page.part(u32::from(segment.offset), u32::from(segment.len)) else {
        panic!("{segment:?} crosses its page");
    };
    let granted = granted.address().as_ptr();
    let (from, to) = match segment.direction {
        CopyDirection::FromGuest => (granted.cast_const(), segment.local),
        CopyDirection::ToGuest => (segment.local.cast_const(), granted),
    };
    // SAFETY: `local` is valid for `len` bytes (GrantCopy), the granted side was checked above.
    // `copy` and not `copy_nonoverlapping`: a segment may name a page that is also mapped here.
    unsafe { std::ptr::copy(from, to, usize::from(segment.len)) };
}

/// Maps a piece of a file. With `MAP_FIXED`, `place` must be address space that is ours.
fn map_file(
    place: *mut u8,
    file: &OwnedFd,
    offset: usize,
    len: usize,
    access: PageAccess,
    flags: libc::c_int,
) -> io::Result<NonNull<u8>> {
    let protection = match access {
        PageAccess::ReadOnly => libc::PROT_READ,
        PageAccess::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
    };
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: without MAP_FIXED the kernel chooses the place; with it the caller owns the place.
    let base = unsafe {
        libc::mmap(
            place.cast(),
            len,
            protection,
            libc::MAP_SHARED | flags,
            file.as_raw_fd(),
            offset,
        )
    };
    mapped(base)
}

fn mapped(base: *mut libc::c_void) -> io::Result<NonNull<u8>> {
    match NonNull::new(base.cast::<u8>()) {
        Some(base) if base.as_ptr().cast() != libc::MAP_FAILED => Ok(base),
        _ => Err(io::Error::last_os_error()),
    }
}

//! A file on tmpfs, mapped into the process, and which of its pages are known to be allocated.
//!
//! Touching a hole of the file through the mapping would allocate a page, even for a read, and kill the
//! process if no memory is left. So data goes through the mapping only if all pages of an operation are
//! known to be allocated, and else by system calls, which read holes without allocating. This knowledge is
//! only a hint: a page may be freed just before it is touched, by another worker, another disk on the same
//! file or another program. It is then allocated again, all zeroes, as by any guest's write; and a touch
//! that fails is caught (`engine`'s guarded copy). So what a guest's races can cost is bounded by the size
//! of its file. If a file was made shorter, bytes beyond its end but in its last page read as zeroes, and
//! writes to them are lost.
//!
//! The page tables take 2 MiB for each GiB of the file that was used, and the pages count as resident
//! memory of this process, for which `oom_score_adj` must compensate.
#![allow(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Bytes of a page of the file; one bit tells whether it is allocated.
const PAGE_BYTES: usize = 4096;
/// Pages of one word of bits, which are queried and put into the page tables together: 256 KiB, which takes
/// some ten microseconds.
const WORD_PAGES: usize = 64;
const _: () = assert!(WORD_PAGES == u64::BITS as usize);
/// The largest folio that tmpfs makes.
const FOLIO_BYTES: usize = 2 << 20;

/// A whole file, mapped and shared. Data is copied by address: others may change it at any time, so there
/// is never a reference or slice to it.
pub struct MappedFile {
    base: NonNull<u8>,
    /// Bytes of the mapping, which is longer than the file.
    map_bytes: usize,
    /// Bytes of the file when it was mapped.
    file_bytes: u64,
    /// One bit for each page: it is allocated. They publish no data, so they need no memory ordering.
    present: Box<[AtomicU64]>,
    /// The file, whose modification time is set at the end if `written`.
    file: OwnedFd,
    written: AtomicBool,
}

// SAFETY: the mapping belongs to the process and lives as long as the value, whichever thread has it; only
// its address is handed out, and everything else is atomic.
unsafe impl Send for MappedFile {}
// SAFETY: as for Send.
unsafe impl Sync for MappedFile {}

impl MappedFile {
    /// Maps a file of this size; `writable` if it was opened for writing.
    pub fn new(file: &File, file_bytes: u64, writable: bool) -> io::Result<MappedFile> {
        // One more page, which no folio of the file reaches, shows whether `mincore` tells the truth
        // (`tells_the_truth`).
        let bytes = usize::try_from(file_bytes).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let map_bytes = bytes
            .checked_next_multiple_of(FOLIO_BYTES)
            .and_then(|end| end.checked_add(PAGE_BYTES))
            .ok_or(io::ErrorKind::FileTooLarge)?;
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let words = bytes.div_ceil(PAGE_BYTES * WORD_PAGES);
        let owned = file.as_fd().try_clone_to_owned()?;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let base = unsafe {
            let (null, fd) = (std::ptr::null_mut(), file.as_raw_fd());
            libc::mmap(null, map_bytes, protection, libc::MAP_SHARED, fd, 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapped = MappedFile {
            base: NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?,
            map_bytes,
            file_bytes,
            // SAFETY: zeroes are valid for atomics. Zeroed memory costs nothing until it is used.
            present: unsafe { Box::new_zeroed_slice(words).assume_init() },
            file: owned,
            written: AtomicBool::new(false),
        };
        // Guests' data must not go into a core dump.
        mapped.advise(0, map_bytes, libc::MADV_DONTDUMP);
        if !mapped.tells_the_truth() {
            return Err(io::Error::other("mincore does not report on files of other users"));
        }
        Ok(mapped)
    }

    /// The address of the bytes from `offset` on, if all their pages are known to be allocated. They can be
    /// freed at any moment: only a copy that survives a fault may use it.
    #[inline]
    pub fn place(&self, offset: u64, len: u64) -> Option<NonNull<u8>> {
        if len == 0 || offset.checked_add(len)? > self.file_bytes {
            return None;
        }
        for (word, pages) in words(offset, len) {
            if self.present.get(word)?.load(Ordering::Relaxed) & pages != pages {
                return None;
            }
        }
        // SAFETY: offset is inside the file and so inside the mapping.
        Some(unsafe { self.base.add(usize::try_from(offset).ok()?) })
    }

    /// The address of the byte at `offset`, for a prefetch: it may lie outside the mapping.
    #[inline]
    pub fn address(&self, offset: u64) -> *const u8 {
        self.base.as_ptr().wrapping_add(usize::try_from(offset).unwrap_or(0))
    }

    /// The same for bytes that are to be written. The kernel takes no note of writes to mapped tmpfs files,
    /// so the file's modification time is set when the mapping ends.
    #[inline]
    pub fn place_to_write(&self, offset: u64, len: u64) -> Option<NonNull<u8>> {
        let place = self.place(offset, len)?;
        if !self.written.load(Ordering::Relaxed) {
            self.written.store(true, Ordering::Relaxed);
        }
        Some(place)
    }

    /// Asks the kernel which pages there and around are allocated: one system call for each 256 KiB, and
    /// one more that saves page faults later. Pages in swap do not count until somebody reads them.
    #[cold]
    pub fn learn(&self, offset: u64, len: u64) {
        for (word, pages) in words(offset, len) {
            let known = self.present.get(word).map(|word| word.load(Ordering::Relaxed) & pages);
            if known.is_some_and(|known| known != pages) {
                self.add(word, self.resident(word));
            }
        }
    }

    /// Notes that these bytes were written by a system call, which has allocated their pages.
    pub fn wrote(&self, offset: u64, len: u64) {
        for (word, pages) in words(offset, len) {
            self.add(word, pages);
        }
    }

    /// Notes that these pages may be freed, or can't be touched. A discard calls this before it begins:
    /// afterwards others could already have written there again.
    #[cold]
    pub fn forget(&self, offset: u64, len: u64) {
        for (word, pages) in words(offset, len) {
            let Some(present) = self.present.get(word) else { return };
            // In a large discard most words are empty; their memory was never touched and should stay so.
            if present.load(Ordering::Relaxed) & pages != 0 {
                present.fetch_and(!pages, Ordering::Relaxed);
            }
        }
    }

    fn add(&self, word: usize, pages: u64) {
        let Some(present) = self.present.get(word) else { return };
        if present.load(Ordering::Relaxed) & pages == pages {
            return;
        }
        let before = present.fetch_or(pages, Ordering::Relaxed);
        if before | pages == u64::MAX && before != u64::MAX {
            // This saves a fault for each page written, or for each sixteen read. Before Linux 5.14 the
            // kernel refuses it.
            let bytes = WORD_PAGES * PAGE_BYTES;
            self.advise(word * bytes, bytes, libc::MADV_POPULATE_READ);
        }
    }

    /// Which pages of a word are allocated.
    fn resident(&self, word: usize) -> u64 {
        let mut pages = [0; WORD_PAGES];
        if !self.mincore(word * WORD_PAGES, &mut pages) {
            return 0;
        }
        (0..).zip(pages).fold(0, |bits, (page, is_there)| bits | u64::from(is_there & 1) << page)
    }

    /// If the process may not write to the file, `mincore` reports all pages as present, even beyond its end.
    fn tells_the_truth(&self) -> bool {
        let last = self.map_bytes / PAGE_BYTES - 1;
        let mut page = [1];
        self.mincore(last, &mut page) && page[0] & 1 == 0
    }

    fn mincore(&self, first: usize, pages: &mut [u8]) -> bool {
        let (start, bytes) = (first * PAGE_BYTES, pages.len() * PAGE_BYTES);
        if start + bytes > self.map_bytes {
            return false;
        }
        // SAFETY: the range is inside the mapping (checked above); the call writes one byte per page.
        unsafe {
            let base = self.base.add(start).as_ptr();
            libc::mincore(base.cast(), bytes, pages.as_mut_ptr()) == 0
        }
    }

    /// Gives the kernel advice, which it may refuse.
    fn advise(&self, start: usize, bytes: usize, advice: libc::c_int) {
        if start + bytes > self.map_bytes {
            return;
        }
        // SAFETY: the range is inside the mapping (checked above), and the advice used here does not change
        // its contents.
        unsafe { libc::madvise(self.base.add(start).as_ptr().cast(), bytes, advice) };
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and code that uses an address holds a reference to the value.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.map_bytes) };
        if *self.written.get_mut() {
            touch(self.file.as_fd());
        }
    }
}

impl fmt::Debug for MappedFile {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file_bytes = &self.file_bytes;
        formatter.debug_struct("MappedFile").field("file_bytes", file_bytes).finish_non_exhaustive()
    }
}

/// Sets the file's modification time to now.
fn touch(file: BorrowedFd<'_>) {
    let times =
        [libc::UTIME_OMIT, libc::UTIME_NOW].map(|tv_nsec| libc::timespec { tv_sec: 0, tv_nsec });
    // SAFETY: `times` holds two entries, for last access and modification.
    unsafe { libc::futimens(file.as_raw_fd(), times.as_ptr()) };
}

/// The words with bits for the pages of these bytes, each with a mask of those bits.
#[inline]
fn words(offset: u64, len: u64) -> impl Iterator<Item = (usize, u64)> {
    // With 32-bit addresses, bytes beyond them are never mapped.
    let page_of = |byte: u64| usize::try_from(byte / PAGE_BYTES as u64).unwrap_or(usize::MAX);
    let mut page = page_of(offset);
    let end =
        if len == 0 { page } else { page_of(offset.saturating_add(len - 1)).saturating_add(1) };
    std::iter::from_fn(move || {
        let first = page % WORD_PAGES;
        let count = end.checked_sub(page).filter(|left| *left > 0)?.min(WORD_PAGES - first);
        let word = page / WORD_PAGES;
        page += count;
        Some((word, u64::MAX >> (WORD_PAGES - count) << first))
    })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn bytes_have_the_bits_of_all_pages_they_touch() {
        let words = |offset, len| words(offset, len).collect::<Vec<_>>();
        assert_eq!(words(0, 512), [(0, 1)]);
        assert_eq!(words(4096 - 512, 1024), [(0, 0b11)]);
        assert_eq!(words(63 * 4096, 8192), [(0, 1 << 63), (1, 1)]);
        let whole = [(1, u64::MAX), (2, u64::MAX), (3, 1)];
        assert_eq!(words(64 * 4096, 128 * 4096 + 1), whole);
        assert_eq!(words(4096, 0), []);
        assert_eq!(words(u64::MAX, u64::MAX).len(), 1);
    }

    #[test]
    fn a_place_is_told_only_of_pages_that_are_known_and_inside() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(1_000_000).unwrap();
        let mapped = MappedFile::new(&file, 1_000_000, true).unwrap();
        assert!(mapped.place(0, 4096).is_none());
        mapped.wrote(0, 1_000_000);
        let base = mapped.place(0, 4096).unwrap();
        let last = mapped.place(1_000_000 - 512, 512).unwrap();
        assert_eq!(last.as_ptr().addr() - base.as_ptr().addr(), 1_000_000 - 512);
        assert!(mapped.place(1_000_000 - 512, 1024).is_none());
        assert!(mapped.place(u64::MAX, 2).is_none());
        mapped.forget(4096, 1);
        assert!(mapped.place(0, 4096).is_some() && mapped.place(4095, 2).is_none());
        // All of these are beyond the last bit.
        mapped.learn(1 << 40, 4096);
        mapped.wrote(1 << 40, 4096);
        mapped.forget(u64::MAX - 1, 4096);
    }

    #[test]
    fn a_write_by_the_mapping_is_seen_in_the_files_time_of_modification() {
        use std::time::SystemTime;
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(4096).unwrap();
        for writes in [false, true] {
            let mapped = MappedFile::new(&file, 4096, true).unwrap();
            mapped.wrote(0, 4096);
            file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
            let place = if writes { mapped.place_to_write(0, 512) } else { mapped.place(0, 512) };
            assert!(place.is_some());
            drop(mapped);
            let modified = file.metadata().unwrap().modified().unwrap();
            assert_eq!(modified > SystemTime::UNIX_EPOCH, writes);
        }
    }

    #[test]
    fn only_what_is_allocated_is_learnt() {
        use std::os::unix::fs::{FileExt, MetadataExt};
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 8192], 70 * 4096).unwrap();
        let mapped = MappedFile::new(&file, 1 << 20, false).unwrap();
        mapped.learn(0, 1 << 20);
        let known: Vec<u64> =
            (0..256).filter(|page| mapped.place(page * 4096, 4096).is_some()).collect();
        assert_eq!(known, [70, 71]);
        assert_eq!(file.metadata().unwrap().blocks(), 16);
    }

    #[test]
    fn what_cannot_be_mapped_is_an_error() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let pipe = File::from(OwnedFd::from(reader));
        MappedFile::new(&pipe, 4096, false).unwrap_err();
        MappedFile::new(&pipe, u64::MAX, false).unwrap_err();
    }
}

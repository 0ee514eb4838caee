//! Files in memory (tmpfs): the worker moves the data itself.
//!
//! io_uring hands each operation on such a file to a kernel thread, because the filesystem can't promise
//! not to wait; that costs more than the copy. In fact the filesystem waits only for pages that were
//! swapped out. If the file's pages are known to be there, the worker copies between them and the guest's
//! pages without the kernel, in half the time that a system call needs for its look-up, lock and copy. If
//! that fails, or they are not known to be there, it makes one system call, whose result is the answer.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;

use super::layer::Layer;
use super::vectors::append;
use super::{By, Completion, IoOp, Submitted, Ticket, bytes, guarded};
use crate::backing::{MappedFile, MemoryFile, MemoryTarget};
use crate::xen::shm::{GuestBuf, PAGE_LEN};

/// How many pages go by system calls after the kernel reported that pages are missing, before it is asked
/// again. It takes a microsecond to report holes, five times as long as to read one, so guests that read
/// holes lose little. In a file full of data the kernel is asked at once, about 64 pages each time.
const PAGES_UNTIL_ASKED: u32 = 32;

/// A layer that does the I/O of files in memory at once, over one for everything else.
#[derive(Debug)]
pub struct MemoryFiles<B> {
    /// Takes what does not read or write a file in memory.
    pub below: B,
    /// Reused for the vectors of one operation.
    vectors: Vec<libc::iovec>,
    /// Copies survive faults, so mappings can be used.
    is_guarded: bool,
    /// Pages of unknown presence that still go by system calls before the kernel is asked again.
    unasked_pages: u32,
}

impl<B: Layer> Layer for MemoryFiles<B> {
    type Target = MemoryTarget<B::Target>;

    #[inline]
    fn submit(
        &mut self,
        target: &MemoryTarget<B::Target>,
        operation: &IoOp<'_>,
        ticket: Ticket,
        by: By,
    ) -> Submitted {
        if let Some(file) = &target.file
            && let Some(result) = self.run(file, operation)
        {
            return Submitted::Done(Completion { ticket, result });
        }
        self.below.submit(&target.below, operation, ticket, by)
    }

    #[inline]
    fn kick(&mut self) -> io::Result<()> {
        self.below.kick()
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.below.reap(done);
    }

    fn in_flight(&self) -> usize {
        self.below.in_flight()
    }

    fn arm(&mut self) -> io::Result<bool> {
        self.below.arm()
    }
}

impl<B> MemoryFiles<B> {
    /// For the files of one worker.
    pub fn new(below: B) -> MemoryFiles<B> {
        let is_guarded = guarded::install();
        MemoryFiles { below, vectors: Vec::new(), is_guarded, unasked_pages: 0 }
    }

    /// The result of an operation that is done now; `None` if the layer below has to do it.
    #[inline]
    fn run(&mut self, file: &MemoryFile, operation: &IoOp<'_>) -> Option<i32> {
        let mapping = file.mapping.as_ref().filter(|_| self.is_guarded);
        let file = file.raw_fd;
        match *operation {
            IoOp::Read { offset, buffers } => Some(self.read(file, mapping, offset, buffers)),
            IoOp::Write { offset, buffers } => Some(self.write(file, mapping, offset, buffers)),
            // Memory is as durable as it will ever be.
            IoOp::Flush => Some(0),
            IoOp::Discard { offset, len, .. } => {
                if let Some(mapping) = mapping {
                    mapping.forget(offset, len);
                }
                None
            }
        }
    }

    #[inline]
    fn read(
        &mut self,
        file: RawFd,
        mapping: Option<&MappedFile>,
        offset: u64,
        buffers: &[GuestBuf],
    ) -> i32 {
        let moved = mapping.and_then(|file| self.copy(file, offset, buffers, Way::FromFile));
        moved.unwrap_or_else(|| self.transfer(READ, file, offset, buffers))
    }

    #[inline]
    fn write(
        &mut self,
        file: RawFd,
        mapping: Option<&MappedFile>,
        offset: u64,
        buffers: &[GuestBuf],
    ) -> i32 {
        if let Some(moved) = mapping.and_then(|file| self.copy(file, offset, buffers, Way::ToFile))
        {
            return moved;
        }
        let result = self.transfer(WRITE, file, offset, buffers);
        if let (Some(mapping), Ok(moved)) = (mapping, u64::try_from(result)) {
            mapping.wrote(offset, moved);
        }
        result
    }

    /// Moves the data by the mapping. Returns the bytes moved, or `None` if all of it has to go by a
    /// system call, even if some was moved before a fault.
    #[inline]
    fn copy(
        &mut self,
        mapping: &MappedFile,
        offset: u64,
        buffers: &[GuestBuf],
        way: Way,
    ) -> Option<i32> {
        // The processor looks up the file's page while the following is done; else the copy waits for it.
        guarded::prefetch_line(mapping.address(offset));
        let len = bytes(buffers);
        let mut place = match way.place(mapping, offset, len) {
            Some(place) => place,
            None => self.ask(mapping, offset, len, way)?,
        };
        for buffer in buffers {
            let (page, len) = (buffer.address(), buffer.len() as usize);
            let (to, from) = match way {
                Way::FromFile => (page, place),
                Way::ToFile => (place, page),
            };
            if let Way::ToFile = way {
                guarded::prefetch(to, len);
            }
            // SAFETY: buffers are mapped (GuestBuf's contract). All of them together are as long as
            // the range at `place`, which lies in a mapping that the caller's image holds. Nobody sees
            // either as Rust values. A mapping is used only if copies are guarded (`run`).
            let left = unsafe { guarded::copy(to.as_ptr(), from.as_ptr(), len) };
            if left > 0 {
                mapping.forget(offset, bytes(buffers).into());
                return None;
            }
            // SAFETY: as above.
            place = unsafe { place.add(len) };
        }
        i32::try_from(len).ok()
    }

    /// Asks the kernel which pages are there, unless it found none lately, then tries [`Way::place`].
    #[cold]
    fn ask(
        &mut self,
        mapping: &MappedFile,
        offset: u64,
        len: u32,
        way: Way,
    ) -> Option<NonNull<u8>> {
        let pages = len.div_ceil(PAGE_LEN);
        if let Some(unasked_pages) = self.unasked_pages.checked_sub(pages) {
            self.unasked_pages = unasked_pages;
            return None;
        }
        mapping.learn(offset, len.into());
        let place = way.place(mapping, offset, len);
        self.unasked_pages = if place.is_some() { 0 } else { PAGES_UNTIL_ASKED };
        place
    }

    fn transfer(&mut self, calls: Transfer, file: RawFd, offset: u64, buffers: &[GuestBuf]) -> i32 {
        self.vectors.clear();
        append(&mut self.vectors, buffers);
        loop {
            // SAFETY: each vector is a buffer that stays mapped and writable (GuestBuf's contract);
            // the file is open because the caller holds its image.
            let moved = unsafe {
                match self.vectors[..] {
                    [one] => libc::syscall(calls.one, file, one.iov_base, one.iov_len, offset),
                    ref many => {
                        libc::syscall(calls.many, file, many.as_ptr(), many.len(), offset, 0)
                    }
                }
            };
            let error = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
            match i32::try_from(moved) {
                Ok(moved) if moved >= 0 => return moved,
                _ if error == libc::EINTR => {}
                _ => return -error,
            }
        }
    }
}

/// The direction of a copy.
#[derive(Clone, Copy)]
enum Way {
    FromFile,
    ToFile,
}

impl Way {
    /// The address of the file's bytes, if their pages are known to be there.
    #[inline]
    fn place(self, mapping: &MappedFile, offset: u64, len: u32) -> Option<NonNull<u8>> {
        match self {
            Way::FromFile => mapping.place(offset, len.into()),
            Way::ToFile => mapping.place_to_write(offset, len.into()),
        }
    }
}

/// The system calls of one direction, for one vector and for several. They are called directly, because
/// the C library's functions are cancellation points, which costs them about twenty nanoseconds.
#[derive(Clone, Copy)]
struct Transfer {
    one: libc::c_long,
    many: libc::c_long,
}

const READ: Transfer = Transfer { one: libc::SYS_pread64, many: libc::SYS_preadv };
const WRITE: Transfer = Transfer { one: libc::SYS_pwrite64, many: libc::SYS_pwritev };

const _: () = assert!(cfg!(target_pointer_width = "64"), "offsets are passed in one register");

#[cfg(test)]
mod test;

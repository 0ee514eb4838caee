//! Files that lie in memory (tmpfs): the worker moves the data itself.
//!
//! io_uring hands each operation on such a file to a kernel thread, for the filesystem can't promise
//! not to wait, and that costs more than the copy. In truth it waits only for pages that were
//! swapped out.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;

use super::IoOp;
use super::vectors::append;
use crate::xen::shm::GuestBuf;

/// Does the I/O of files in memory at once, by one system call each.
#[derive(Debug, Default)]
pub struct MemoryFiles {
    /// Reused for the vectors of one operation.
    vectors: Vec<libc::iovec>,
}

impl MemoryFiles {
    /// The result of an operation that is done now; `None` for one that this is not for.
    #[inline]
    pub fn run(&mut self, file: RawFd, operation: &IoOp<'_>) -> Option<i32> {
        match *operation {
            IoOp::Read { offset, buffers } => Some(self.transfer(READ, file, offset, buffers)),
            IoOp::Write { offset, buffers } => Some(self.transfer(WRITE, file, offset, buffers)),
            // It is as durable as it will ever be.
            IoOp::Flush => Some(0),
            IoOp::Discard { .. } => None,
        }
    }

    fn transfer(&mut self, calls: Transfer, file: RawFd, offset: u64, buffers: &[GuestBuf]) -> i32 {
        self.vectors.clear();
        append(&mut self.vectors, buffers);
        loop {
            // SAFETY: each vector is a buffer that stays mapped and writable (GuestBuf's contract);
            // the file is open, for the caller holds its image.
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

/// The system calls of one direction, for one vector and for several. The C library's functions of
/// these names are points where a thread may be cancelled, which costs them some twenty nanoseconds.
#[derive(Clone, Copy)]
struct Transfer {
    one: libc::c_long,
    many: libc::c_long,
}

const READ: Transfer = Transfer { one: libc::SYS_pread64, many: libc::SYS_preadv };
const WRITE: Transfer = Transfer { one: libc::SYS_pwrite64, many: libc::SYS_pwritev };

const _: () = assert!(cfg!(target_pointer_width = "64"), "offsets are passed in one register");

#[cfg(test)]
mod test {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::xen::shm::LocalPages;

    #[test]
    fn data_goes_to_its_place_and_comes_back_and_an_error_is_its_errno() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 * 1024).unwrap();
        let pages = LocalPages::new(3);
        pages.page(0).copy_from(&[1; 4096]);
        pages.page(2).copy_from(&[3; 4096]);
        let mut memory = MemoryFiles::default();
        let apart = [pages.page(2), pages.page(0)];
        let write = IoOp::Write { offset: 4096, buffers: &apart };
        assert_eq!(memory.run(file.as_raw_fd(), &write), Some(8192));
        let mut found = [0; 12288];
        file.read_exact_at(&mut found, 4096).unwrap();
        assert!(found[..4096].iter().all(|byte| *byte == 3));
        assert!(found[4096..8192].iter().all(|byte| *byte == 1));
        let read = IoOp::Read { offset: 4096, buffers: &[pages.page(1)] };
        assert_eq!(memory.run(file.as_raw_fd(), &read), Some(4096));
        let mut copied = [0; 4096];
        pages.page(1).copy_to(&mut copied);
        assert_eq!(copied, [3; 4096]);
        let beyond = IoOp::Read { offset: 1 << 20, buffers: &[pages.page(1)] };
        assert_eq!(memory.run(file.as_raw_fd(), &beyond), Some(0));
        assert_eq!(memory.run(-1, &read), Some(-libc::EBADF));
        let read_only = File::open("/proc/self/exe").unwrap();
        assert_eq!(memory.run(read_only.as_raw_fd(), &write), Some(-libc::EBADF));
    }
}

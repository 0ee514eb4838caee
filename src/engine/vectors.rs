//! Buffers as the kernel takes them.

use crate::xen::shm::GuestBuf;

/// Appends the vectors of one operation; neighbours in memory become one.
#[inline]
pub fn append(vectors: &mut Vec<libc::iovec>, buffers: &[GuestBuf]) {
    let first = vectors.len();
    for buffer in buffers {
        let (start, len) = (buffer.address().as_ptr(), buffer.len() as usize);
        match vectors[first..].last_mut() {
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == start.cast() => {
                last.iov_len += len;
            }
            _ => vectors.push(libc::iovec { iov_base: start.cast(), iov_len: len }),
        }
    }
}

//! Buffers as the kernel takes them.

use crate::xen::shm::GuestBuf;

/// Appends the vectors of one operation. Adjacent buffers share one.
#[inline]
pub fn append(vectors: &mut Vec<libc::iovec>, buffers: &[GuestBuf]) {
    let first = vectors.len();
    for buffer in buffers {
        let next = vector(buffer);
        match vectors[first..].last_mut() {
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == next.iov_base => {
                last.iov_len += next.iov_len;
            }
            _ => vectors.push(next),
        }
    }
}

/// The vector of one buffer.
#[inline]
pub fn vector(buffer: &GuestBuf) -> libc::iovec {
    libc::iovec { iov_base: buffer.address().as_ptr().cast(), iov_len: buffer.len() as usize }
}
